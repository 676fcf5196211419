"""Where private data flows in a method: the static check behind the record-level refusals.

Record-level noise covers what a record does to its own gradient. If some state that was computed from the records
*without* noise is read while a shared group is trained, one record moves the gradients of all the others and the noise
covers none of that: the true sensitivity is up to 2b + 1 clips for b records in a batch. So a setup is sound exactly if
no path leads from the records, through state without noise, into something that is released.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedpers.methods.base import FROZEN, PERSONAL, SHARED, Phase
from fedpers.plan import Plan


@dataclass(frozen=True)
class State:
    """A parameter group in one of the places where it may live, or the records themselves."""

    group: str
    place: Literal["records", "public", "shared", "personal", "own copy", "choice"]

    def __str__(self) -> str:
        if self.place in {"records", "choice"}:
            return {"records": "the records", "choice": "the choice among the shared models"}[self.place]
        return f"{self.place} {self.group}"


@dataclass(frozen=True)
class Flow:
    """What one phase lets one state learn from another; `noised` flows from the records are covered by the noise."""

    source: State
    target: State
    phase: str
    noised: bool = False


RECORDS, CHOICE = State("records", "records"), State("choice", "choice")


def flows(plan: Plan) -> list[Flow]:
    """Return all flows of the rounds; what happens after the last release is never released."""
    found = []
    for phase in plan.round:
        for group in phase.train:
            target = _place(plan, phase, group)
            found.append(Flow(RECORDS, target, str(phase), noised=_noised(plan, phase, target)))
            # A forward pass reads every group, as it is then.
            read = [other for other in plan.scopes if other != group and other not in phase.without]
            found += [Flow(_place(plan, phase, other), target, str(phase)) for other in read]
            if phase.mix:
                found.append(Flow(State(group, "shared"), target, str(phase)))
            if phase.blend:
                found.append(Flow(State(group, "own copy"), target, str(phase)))
    return found + _of_functions(plan)


def _of_functions(plan: Plan) -> list[Flow]:
    """What moves outside of phases: client functions, which read no records, and a choice, which does."""
    method, found = plan.method, []
    shared = [State(group, "shared") for group in plan.shared]
    if method.clusters:
        found.append(Flow(RECORDS, CHOICE, "the choice"))
        found += [Flow(CHOICE, target, "the choice") for target in shared]
    if method.keeps:
        found += [Flow(state, State(state.group, "own copy"), "keeping a copy") for state in shared]
    if method.overrides("begin", "gradient", "end"):
        kept = [State(group, "personal") for group in plan.groups(PERSONAL)]
        kept += [State(group, "own copy") for group in plan.twins]
        found += [Flow(state, target, "the method's own functions") for state in kept for target in shared]
    return found


def _noised(plan: Plan, phase: Phase, target: State) -> bool:
    """Whether noise covers what the records themselves do to a phase's target."""
    if phase.blend:
        return False
    return target.place == "shared" or (plan.head in {"joint", "split-dp"} and target.place == "personal")


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


def memories(plan: Plan) -> tuple[str, ...]:
    """What stays at home from earlier rounds and shapes what is sent, noised or not: it remembers taking part."""
    method = plan.method
    functions = method.overrides("begin", "gradient", "end")
    held = list(feedback(plan)) + [f"the {kind} companions" for kind in method.remembers if functions]
    if method.keeps and (functions or any(phase.blend for phase in plan.round)):
        held.append("a copy of what was sent last")
    return tuple(held)


def _place(plan: Plan, phase: Phase, group: str) -> State:
    """Where a phase finds, and leaves, a group."""
    scope = plan.scopes[group]
    if phase.own and group in plan.twins:
        return State(group, "own copy")
    return State(group, {FROZEN: "public", SHARED: "shared", PERSONAL: "personal"}[scope])  # type: ignore[arg-type]
