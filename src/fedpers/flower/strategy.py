"""The server side: samples clients, protects and records what they send, and lets a stock Flower strategy go on.

At user level the order is fixed: sample (Poisson, by place on the list of users), clip, sum, add noise, divide by a
constant, for an empty cohort too; the stock strategy then receives one synthetic reply with the noised mean and is
post-processing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import flwr.serverapp.strategy as stock
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from fedpers.cohort.layout import Layout
from fedpers.config import Config
from fedpers.errors import ConfigError, PrivacyRefusal
from fedpers.flower import messages as wire
from fedpers.flower.aggregation import Diagnosis, combine, diagnose, serve
from fedpers.models.array_names import family_of
from fedpers.privacy.guarantee import Guarantee
from fedpers.privacy.ledger import Ledger, release_hash
from fedpers.privacy.ledger_lines import Release
from fedpers.privacy.sampling import draw
from fedpers.privacy.spending import check_budget
from fedpers.privacy.user_level import UserLevelServer
from fedpers.visit import mean

_OWN = "fedpers"  # of our own state among the stock strategy's, in a checkpoint
Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class RoundReport:
    """What the simulator, and nobody else, learns about a round on the server."""

    clients: int
    bytes_up: int
    bytes_down: int
    clipped: int = 0
    nonfinite: int = 0
    median_update_norm: float = float("nan")
    signal: Mapping[str, float] | None = None  # per group, L2 norm of the noise-free mean update
    noise: Mapping[str, float] | None = None
    diagnosis: Diagnosis | None = None
    moved: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)  # mean of the replies less the broadcast


class _Sampled:
    """What a stock strategy sees of the grid: exactly the nodes that were sampled for this round."""

    def __init__(self, grid: Grid, nodes: Sequence[int]) -> None:
        self._grid, self._nodes = grid, list(nodes)

    def get_node_ids(self) -> list[int]:
        return self._nodes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)


class FedpersStrategy(Strategy):  # type: ignore[misc]
    """Wraps a stock strategy by name.

    Args:
        config: the run's configuration (`server.strategy`, `server.options`, `client_rate`).
        guarantee: clipping and noise.
        users: ids of the registered users; node i of the grid acts for users[i].
        ledger: gets a line for every release, before it leaves.
        secret: the server's key of client sampling and user-level noise; never the clients' key.
        layout: which arrays travel, and the method's server functions.
        first_round: rounds done before (resume); Flower counts from 1, the ledger from the run's start.
        tell: where clients are elsewhere, how its operator hears of those that are left out of a round; None where
            the clients are ours, and a reply that none of them may send is a bug to see.
    """

    def __init__(
        self,
        config: Config,
        guarantee: Guarantee,
        users: Sequence[str],
        ledger: Ledger,
        secret: bytes,
        layout: Layout,
        first_round: int = 0,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.config, self.guarantee, self.users, self.ledger = config, guarantee, users, ledger
        self.layout, self.done = layout, first_round
        self.inner = stock_strategy(config)
        self.report: RoundReport | None = None
        self._secret, self._tell = secret, tell
        self._broadcast: Arrays = {}
        self._user_level: UserLevelServer | None = None
        self._restored: dict[str, NDArray[Any]] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the shared arrays to the round's sample of the users.

        Raises:
            BudgetSpent: the round would pass the budget (`privacy.stop`, or a filter); nothing is sent.
        """
        number = self.done + server_round
        drawn = draw(self.config.client_sampling, self.config.client_rate, self.users, self._secret, number)
        self._broadcast = wire.from_record(arrays)
        check_budget(self.ledger, self._planned(number, drawn.tolist()), self.guarantee.budget)
        nodes = [wire.FIRST_NODE + int(user) for user in drawn]
        self._sampled = nodes
        messages: list[Message] = list(self.inner.configure_train(number, arrays, config, _Sampled(grid, nodes)))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Make the next broadcast from the replies, under the guarantee; write the ledger line first."""
        number = self.done + server_round
        expected = {name: self._broadcast[name] for name in self.layout.up(number)}
        answered = self._answers(number, replies, expected)
        # Who was asked is charged: a reply that was lost on the way, or came late, was seen by somebody all the same.
        asked = [node - wire.FIRST_NODE for node in self._sampled]
        participants = [user for user in asked if user in answered]
        received = [answered[user] for user in participants]
        self.report = RoundReport(
            len(received),
            bytes_up=wire.nbytes(expected) * len(received),
            bytes_down=wire.nbytes(self._broadcast) * len(self._sampled),
            moved={n: value - expected[n] for n, value in mean(received).items()} if received else {},
        )
        if self.guarantee.server_sums:
            replies = [self._synthetic_reply(number, asked, received)]
        else:
            self._record(number, asked, participants, received)
            if received and self.layout.plan.method.overrides("combine"):
                replies = [self._reply(combine(self.layout, received, self._broadcast, number))]
            else:
                replies = [self._reply({**self._broadcast, **one}) for one in received]
        if not replies:
            return None, None
        arrays, metrics = self.inner.aggregate_train(number, replies)
        if arrays is None:
            return None, metrics
        # Stock optimizers may compute in fp64; what is broadcast is fp32.
        after = serve(self.layout, wire.from_record(arrays), self._broadcast, number)
        diagnosis = diagnose(self.layout, received, self._broadcast, after, number)
        self.report = replace(self.report, diagnosis=diagnosis)
        return wire.to_record(after, sorted(self._broadcast)), metrics

    def _answers(self, number: int, replies: Iterable[Message], expected: Arrays) -> dict[int, Arrays]:
        """Return what counts of a round's replies, by the user's position.

        One reply of each node that was asked: a second one would count beyond the clip. A failure is no update, and
        neither is what a node elsewhere sends that no client of this run would: at user level, noise and denominator
        are those of the claim, whoever comes.

        Raises:
            BadReply: such a reply where the clients are ours.
        """
        waiting, answers = set(self._sampled), {}
        for message in replies:
            node = message.metadata.src_node_id
            if node not in waiting:
                continue
            waiting.remove(node)
            if message.has_error():
                self._left_out(number, node, wire.REASONS.get(message.error.code, wire.NO_ANSWER))
                continue
            try:
                # In a simulation what is not finite counts as zero, and is counted.
                answers[node - wire.FIRST_NODE] = wire.shared_of(message, expected, finite=self._tell is not None)
            except wire.BadReply as bad:
                if self._tell is None:
                    raise
                self._left_out(number, node, f"a reply with {bad.reason}")
        return answers

    def _left_out(self, number: int, node: int, why: str) -> None:
        if self._tell is not None:
            # Where the drawing is credited, who was drawn stays out of what is streamed to the operator.
            secret = self.guarantee.amplification == "clients" and self.guarantee.rate < 1
            who = "somebody who was asked" if secret else f"seat {node - wire.FIRST_NODE}"
            self._tell(f"round {number}: {who} is left out: {why}")

    def _planned(self, number: int, participants: Sequence[int]) -> Release:
        """Return the round's ledger line, but for what is released."""
        if self.guarantee.server_sums:
            return self._server().planned(number, participants)
        # The clients draw with keys that the server lacks; its own only tells their rounds apart.
        return self.guarantee.release(number, participants, self._secret)

    def _record(
        self, number: int, asked: Sequence[int], participants: Sequence[int], received: Sequence[Arrays]
    ) -> None:
        """Enter replies that were protected by the clients themselves, or not at all."""
        sent = {
            f"{wire.FIRST_NODE + user}/{name}": array
            for user, one in zip(participants, received, strict=True)
            for name, array in one.items()
        }
        line = self._planned(number, asked)
        self.ledger.append(line.model_copy(update={"release_hash": release_hash(sent)}))

    def _synthetic_reply(self, number: int, asked: Sequence[int], received: Sequence[Arrays]) -> Message:
        """Clip, sum, add noise, divide; the result looks to the stock strategy like one client's reply."""
        honest, server = self.guarantee.honest, self._server()
        server.shapes = {name: self._broadcast[name].shape for name in self.layout.up(number)}
        updates = [{name: one[name] - self._broadcast[name] for name in one} for one in received]
        # A reply that is not finite counts as zero, and so its share of the noise is gone.
        whole = sum(all(np.isfinite(array).all() for array in update.values()) for update in updates)
        if honest is not None and whole < honest:
            raise PrivacyRefusal(
                f"round {number}: {whole} clients answered, fewer than the {honest} whose noise shares have to be "
                "enough, so their sum is not opened; lower privacy.honest in a new run."
            )
        line = server.planned(number, asked)
        found = server.mean(number, updates)
        fraction = server.advance(number, found)
        released = found.mean if fraction is None else {**found.mean, "fraction": np.array(fraction)}
        self.ledger.append(line.model_copy(update={"release_hash": release_hash(released)}))
        assert self.report is not None
        self.report = replace(
            self.report,
            clipped=found.clipped,
            nonfinite=found.nonfinite,
            median_update_norm=found.median_norm,
            signal=None if honest else found.signal,  # shares of noise are in these sums already
            noise=None if honest else found.noise,
        )
        moved = {name: self._broadcast[name] + mean for name, mean in found.mean.items()}
        return self._reply({**self._broadcast, **moved})

    def _reply(self, arrays: Arrays) -> Message:
        """Return what the stock strategy takes for a client's reply, with all that travels down."""
        content = RecordDict(
            {wire.ARRAYS: wire.to_record(arrays, sorted(arrays)), wire.METRICS: MetricRecord({wire.WEIGHT: 1})}
        )
        return Message(content, dst_node_id=wire.FIRST_NODE, message_type=MessageType.TRAIN)

    def _server(self) -> UserLevelServer:
        """Return the state of user-level protection."""
        if self._user_level is None:
            self._user_level = UserLevelServer(self.guarantee, {}, family_of, self._secret)
            if self._restored:
                self._user_level.load_state(self._restored)
        return self._user_level

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nobody: metrics of users are private and are measured on the simulator's own channel."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing was asked for."""
        return None

    def summary(self) -> None:
        """Flower asks for a log entry; the claim says it better."""

    def state(self) -> dict[str, NDArray[Any]]:
        """Return what the next round depends on, as flat names and arrays, for a checkpoint: the stock strategy's
        momenta, and the clip and noise of the round to come.
        """
        own = {} if self._user_level is None else self._user_level.state()
        return dict(_flatten(self.inner)) | {f"{_OWN}|own|{name}": array for name, array in own.items()}

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Restore what `state` returned."""
        values: dict[str, Any] = {}
        for name, array in state.items():
            attribute, kind, key = name.split("|", 2)
            if kind == "own":
                self._restored[key] = array
            elif kind == "dict":
                values.setdefault(attribute, {})[key] = array
            else:
                values.setdefault(attribute, []).append(array)
        for attribute, value in values.items():
            setattr(self.inner, attribute, value)


def stock_strategy(config: Config) -> Any:
    """Return Flower's own strategy, as configured, asking all nodes that it is shown.

    Raises:
        ConfigError: options, or values of them, that the strategy does not take.
    """
    try:
        return getattr(stock, config.server.strategy)(
            fraction_train=1.0, fraction_evaluate=1.0, min_train_nodes=0, min_evaluate_nodes=0, min_available_nodes=0,
            weighted_by_key=wire.WEIGHT, arrayrecord_key=wire.ARRAYS, configrecord_key=wire.CONFIG,
            **config.server.options,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise ConfigError(f"server.options = {config.server.options}: {config.server.strategy}: {error}.") from error


def _flatten(inner: Any) -> Iterator[tuple[str, NDArray[Any]]]:
    for attribute, value in sorted(vars(inner).items()):
        if isinstance(value, dict) and value and all(isinstance(v, np.ndarray) for v in value.values()):
            yield from ((f"{attribute}|dict|{key}", array) for key, array in value.items())
        elif isinstance(value, list) and value and all(isinstance(v, np.ndarray) for v in value):
            yield from ((f"{attribute}|list|{place:06d}", array) for place, array in enumerate(value))
