"""Whom a claim holds against, and whom not."""

from __future__ import annotations

import math

from fedpers.privacy.ledger_lines import EACH_ITS_OWN, Opening

_HONEST_SERVER = "the server (as long as it asks each client once a round, and in no round that the ledger lacks)"
_SILENCE = "what a client's failure to answer tells, or the time that its answer takes"


def adversaries(opening: Opening, total: float) -> tuple[list[str], list[str]]:
    """Whom a claim holds against, and whom or what it does not cover (reference: table 2.5).

    Args:
        opening: the ledger's opening line.
        total: epsilon of all releases together; infinity covers nobody.
    """
    others, personal = (
        ["other clients", "recipients of the shared model"],
        "whoever obtains or queries a user's personal model",
    )
    fixed = opening.amplification == "clients" and opening.client_sampling == "fixed"
    if total == math.inf:
        return [], ["the server", *others, personal]
    if opening.unit == "none":
        return ["the server", *others], [personal]
    whole = "conclusions about a user as a whole: that the user takes part, or what all records have in common"
    against, not_against = {
        "user-central": (
            others[1:] if fixed else others,
            [
                "the server (trusted: it sees raw updates)",
                # whoever knows its own draw knows something of the others', as the places are counted
                *(["other clients, who know whether they were drawn"] if fixed else []),
            ],
        ),
        "user-distributed": (
            [
                f"the server (if it sees sums only, here simulated, and {opening.honest} clients a round are honest)",
                f"other clients (if {opening.honest} clients a round beside them are honest)",
                others[1],
            ],
            ["a server that sees single messages, or fewer honest clients"],
        ),
        "user-local": ([_HONEST_SERVER, *others], [_SILENCE]),
        "record-local": ([_HONEST_SERVER, *others], [_SILENCE, whole]),
    }[opening.trust]
    against, not_against = list(against), list(not_against)
    if opening.personal_covered:
        against.append("whoever obtains one user's personal model")
    else:
        not_against.append(personal)
    if opening.secret == EACH_ITS_OWN and opening.trust in {"user-local", "record-local"}:
        only = "only a node whose Flower commands are fedpers' own leaves it shut"
        not_against.append(f"a server whose app a node runs (Flower hands it over; {only})")
    if opening.secret == "given in the configuration":
        not_against.append("whoever reads the configuration: it holds the secret that the noise is made from")
    return against, not_against
