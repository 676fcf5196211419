"""A shared encoder and a head for each user, refitted at the end; a new user fits a head alone."""

from fedpers.methods.base import PERSONAL, SHARED, Method, Phase


class Hydra(Method):
    """Shared adapter and personal heads trained together; then the adapter is frozen and every user fits the head.

    The shape of Zhuang et al.: HYDRA: Model Factorization Framework for Black-Box LLM Personalization, NeurIPS 2024
    (arXiv:2406.02888), section 3.4, made federated: there all users' data are in one place. The last fit is all that a
    user does who was in no round.
    """

    cite = "Zhuang et al., NeurIPS 2024"
    differs = "from fedper: every head is fitted once more on the final adapter, a newcomer's from its public value"
    scopes = {"adapter": SHARED, "head": PERSONAL}
    round = (Phase("adapter", "head"),)
    finish = (Phase("head"),)
