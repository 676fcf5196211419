"""Where private data flows in a method: the static check behind the record-level refusals.

Record-level noise covers what a record does to its own gradient. If some state that was computed from the records
*without* noise is read while a shared group is trained, one record moves the gradients of all the others and the noise
covers none of that: the true sensitivity is up to 2b + 1 clips for b records in a batch. So a setup is sound exactly if
no path leads from the records, through state without noise, into something that is released.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedpers.methods.base import FROZEN, PERSONAL, SHARED, Phase, Plan


@dataclass(frozen=True)
class State:
    """A parameter group in one of the places where it may live, or the records themselves."""

    group: str
    place: Literal["records", "public", "shared", "personal", "own copy"]

    def __str__(self) -> str:
        return "the records" if self.place == "records" else f"{self.place} {self.group}"


@dataclass(frozen=True)
class Flow:
    """What one phase lets one state learn from another; `noised` flows from the records are covered by the noise."""

    source: State
    target: State
    phase: str
    noised: bool = False


RECORDS = State("records", "records")


def flows(plan: Plan) -> list[Flow]:
    """Return all flows of the rounds; what happens after the last release is never released."""
    found = []
    for phase in plan.round:
        for group in phase.train:
            target = _place(plan, phase, group)
            noised = target.place == "shared" or (plan.head in {"joint", "split-dp"} and target.place == "personal")
            found.append(Flow(RECORDS, target, str(phase), noised))
            # A forward pass reads every group, as it is then.
            found += [Flow(_place(plan, phase, other), target, str(phase)) for other in plan.scopes if other != group]
    return found


def leaks(plan: Plan) -> list[tuple[State, ...]]:
    """Return the paths from the records into a release that no noise covers, shortest first; none means sound."""
    edges: dict[State, list[State]] = {}
    for flow in flows(plan):
        if not flow.noised:
            edges.setdefault(flow.source, []).append(flow.target)
    found: list[tuple[State, ...]] = []
    paths: list[tuple[State, ...]] = [(RECORDS,)]
    seen = {RECORDS}
    while paths:
        path = paths.pop(0)
        for target in edges.get(path[-1], []):
            if target.place == "shared":
                found.append((*path, target))
            elif target not in seen:
                seen.add(target)
                paths.append((*path, target))
    return list(dict.fromkeys(found))


def feedback(plan: Plan) -> tuple[str, ...]:
    """Personal groups that shape what is shared, trained on the records without noise."""
    between = {state.group for path in leaks(plan) for state in path[1:-1]}
    return tuple(group for group in plan.scopes if group in between)


def _place(plan: Plan, phase: Phase, group: str) -> State:
    """Where a phase finds, and leaves, a group."""
    scope = plan.scopes[group]
    if phase.own and group in plan.twins:
        return State(group, "own copy")
    return State(group, {FROZEN: "public", SHARED: "shared", PERSONAL: "personal"}[scope])  # type: ignore[arg-type]
