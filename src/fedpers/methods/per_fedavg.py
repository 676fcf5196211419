"""A start from which one step goes far."""

from fedpers.methods.base import SHARED, Method, Phase


class PerFedAvg(Method):
    """Each client's gradient is taken after a step on another batch of its own, and applied from before that step.

    Fallah, Mokhtari, Ozdaglar: Personalized Federated Learning with Theoretical Guarantees: A Model-Agnostic
    Meta-Learning Approach, NeurIPS 2020 (arXiv:2002.07948), Algorithm 1, first-order (without the Hessian).
    `options.inner` is the inner step over the step size; with few records the two batches may share some.
    A step costs two gradients, and two noised steps at record
    level. At home each user tunes from the learnt start.
    """

    cite = "Fallah, Mokhtari, Ozdaglar, NeurIPS 2020"
    differs = "from fedavg-finetune: gradients are taken one step ahead, so that the start suits tuning"
    options = {"inner": 1.0}
    scopes = {"adapter": SHARED, "head": SHARED}
    round = (Phase("adapter", "head", inner="inner"),)
    finish = (Phase("adapter", "head"),)
