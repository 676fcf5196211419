"""Moreau envelopes: the shared model goes toward what each user's own model has become."""

from fedpers.errors import ConfigError
from fedpers.methods.base import SHARED, Method, Phase
from fedpers.visit import Visit


class PFedMe(Method):
    """A user trains an own copy theta, pulled toward w with strength lambda, then sends w - eta lambda (w - theta).

    Dinh, Tran, Nguyen: Personalized Federated Learning with Moreau Envelopes, NeurIPS 2020 (arXiv:2006.08848),
    Algorithm 1 with one local round (R = 1) of `personal.epochs` passes, theta starting at w as in the official code,
    and beta = 1. `options.eta` must be at most 1 / lambda, where w would move all the way.
    """

    cite = "Dinh, Tran, Nguyen, NeurIPS 2020"
    differs = "from ditto: the shared model is not trained itself, it follows the own copies"
    options = {"lambda": 1.0, "eta": 0.5}
    scopes = {"adapter": SHARED, "head": SHARED}
    round = (Phase("adapter", "head", own=True, pull="lambda"),)

    @classmethod
    def begin(cls, visit: Visit) -> None:
        """Start theta at w."""
        step = visit.options["eta"] * visit.options["lambda"]
        if step > 1:
            raise ConfigError(f"options.eta * options.lambda = {step:g}: pfedme would go beyond theta; at most 1.")
        visit.own.update({name: visit.received[name].clone() for name in visit.shared})

    @classmethod
    def end(cls, visit: Visit) -> None:
        """Go toward theta: the gradient of the Moreau envelope is lambda (w - theta)."""
        step = visit.options["eta"] * visit.options["lambda"]
        for name in visit.shared:
            visit.local[name] = visit.received[name] - step * (visit.received[name] - visit.own[name])
