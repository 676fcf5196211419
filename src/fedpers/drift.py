"""A change of preference at a known point: from there on a member's records are another person's.

It is no module of `fedpers.data`, where each module is a source.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from fedpers.errors import DataError
from fedpers.privacy.randomness import derive

if TYPE_CHECKING:  # data/base.py, where this is called, imports it
    from fedpers.data.base import Federation

T = TypeVar("T")


def changed(federation: Federation, everyone: Federation, share: float, key: bytes) -> Federation:
    """Return the federation in which each member's records, after `share` of the history, are a donor's.

    A donor is a person outside the federation and gives to one member: the training records after the same share of the
    donor's own history, and all test records. Records keep their ids. Whoever shares a conversation with a member's
    donor is the member's partner too; where state may be swapped within groups only, it is the donor's group, since the
    test records come from there.

    Args:
        federation: the members with their own records.
        everyone: members and people outside, of the same source, each with their own records.
        share: between 0 and 1.
        key: the public seed's; donors are paired with members by it and their ids.

    Raises:
        DataError: fewer people outside than members.
    """
    members, place = federation.users, {user: index for index, user in enumerate(everyone.users)}
    outside = sorted(place.keys() - set(members), key=lambda user: derive(key, "drift", user))
    if len(outside) < len(members):
        both = len(members) + len(outside)
        raise DataError(
            f"data.drift: each of {len(members)} members needs the records of another person, and outside the "
            f"federation are {len(outside)} people with enough records; set data.users to {both // 2} or less, or "
            f"data.held_out to {math.ceil(both / 2)} or more."
        )
    if missing := set(members) - place.keys():
        raise DataError(
            f"data {federation.source}: {len(missing)} members are not among the people whom it has for a larger "
            "data.users, so nobody is known to be outside; choose users with `choose_users`."
        )
    donors = outside[: len(members)]
    pairs = [(place[user], place[donor]) for user, donor in zip(members, donors, strict=True)]
    stands_for = {person: member for member, pair in enumerate(pairs) for person in pair}

    def members_for(people: Iterable[int], member: int) -> frozenset[int]:
        return frozenset(stands_for[person] for person in people if person in stands_for) - {member}

    before = [_split(federation.train[member], share)[0] for member in range(len(members))]
    after = [_split(everyone.train[donor], share)[1] for _, donor in pairs]
    met, swap = everyone.partners, everyone.swap
    return replace(
        federation,
        train=tuple((*old, *new) for old, new in zip(before, after, strict=True)),
        test=tuple(everyone.test[donor] for _, donor in pairs),
        partners=tuple(members_for(met[own] | met[donor], n) for n, (own, donor) in enumerate(pairs)),
        swap=None if swap is None else tuple(members_for(swap[donor], n) for n, (_, donor) in enumerate(pairs)),
        donors=tuple(donors),
        counts={
            **federation.counts,
            "drift_donors": len(donors),
            "drift_train_records_before": sum(map(len, before)),
            "drift_train_records_after": sum(map(len, after)),
        },
        facts=(*federation.facts, *_facts(share)),
    )


def _split(history: Sequence[T], share: float) -> tuple[Sequence[T], Sequence[T]]:
    """Split at the first position that is `share` of the history or more.

    A member's and the donor's are split each by its own length: one record more or less moves one record at the split,
    and both parts together are never more than a cap that holds for each history.
    """
    point = math.ceil(share * len(history))
    return history[:point], history[point:]


def _facts(share: float) -> tuple[str, ...]:
    return (
        f"every member's preference changes on purpose (data.drift={share:g}): the records after that share of the "
        "training history and all test records are another person's, so the protected unit is a made-up history of "
        "two people, and what is claimed of a user holds for no real person",
        "where the change lies in a history (leaving one record out makes room for the next one at the change) and "
        "who is paired with whom come from the raw data, and the other numbers of this list count the members' "
        "records as they were before the exchange",
    )
