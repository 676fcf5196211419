"""The server side: samples clients, protects and records what they send, and lets a stock Flower strategy go on.

At user level the order is fixed: sample (Poisson, by user id), clip, sum, add noise, divide by a constant, for an
empty cohort too; the stock strategy then receives one synthetic reply with the noised mean and is post-processing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flwr.serverapp.strategy as stock
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from fedpers.config import Config
from fedpers.errors import ConfigError
from fedpers.flower import messages as wire
from fedpers.models.adapters import group_of
from fedpers.privacy.guarantee import Guarantee
from fedpers.privacy.ledger import Ledger, Release, release_hash
from fedpers.privacy.mechanisms import gaussian_mean
from fedpers.privacy.randomness import fingerprint, generator, uniforms

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
        first_round: rounds done before (resume); Flower counts from 1, the ledger from the run's start.
    """

    def __init__(
        self,
        config: Config,
        guarantee: Guarantee,
        users: Sequence[str],
        ledger: Ledger,
        secret: bytes,
        first_round: int = 0,
    ) -> None:
        self.config, self.guarantee, self.users, self.ledger = config, guarantee, users, ledger
        self.done = first_round
        self.inner = stock_strategy(config)
        self.report: RoundReport | None = None
        self._secret = secret
        self._broadcast: Arrays = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the shared arrays to a Poisson sample of the users."""
        number = self.done + server_round
        coins = uniforms(self._secret, ("clients", number), self.users)[:, 0]
        nodes = [wire.FIRST_NODE + int(user) for user in np.flatnonzero(coins < self.config.client_rate)]
        self._broadcast = wire.from_record(arrays)
        self._sampled = nodes
        messages: list[Message] = list(self.inner.configure_train(number, arrays, config, _Sampled(grid, nodes)))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Make the next broadcast from the replies, under the guarantee; write the ledger line first."""
        number = self.done + server_round
        # One reply of each node that was asked: a second one would count beyond the clip. A failure is no update.
        answered = {message.metadata.src_node_id: message for message in replies if message.has_content()}
        listed = [answered[node] for node in self._sampled if node in answered]
        nodes = [message.metadata.src_node_id for message in listed]
        received = [wire.from_record(wire.arrays_of(message)) for message in listed]
        size = wire.nbytes(self._broadcast)
        self.report = RoundReport(len(listed), bytes_up=size * len(listed), bytes_down=size * len(self._sampled))
        if self.guarantee.clips_updates:
            listed = [self._synthetic_reply(number, nodes, received)]
        else:
            self._record(number, nodes, received)
        if not listed:
            return None, None
        arrays, metrics = self.inner.aggregate_train(number, listed)
        if arrays is None:
            return None, metrics
        # Stock optimizers may compute in fp64; what is broadcast is fp32.
        return wire.to_record(wire.from_record(arrays), sorted(self._broadcast)), metrics

    def _record(self, number: int, nodes: Sequence[int], received: Sequence[Arrays]) -> None:
        """Enter replies that were protected by the clients themselves, or not at all."""
        protected = self.guarantee.unit == "record" and self.guarantee.noise_multiplier > 0
        sent = {
            f"{node}/{name}": array for node, one in zip(nodes, received, strict=True) for name, array in one.items()
        }
        self.ledger.append(
            Release(
                round=number,
                mechanism="gaussian" if protected else "none",
                noise_multiplier=self.guarantee.noise_multiplier,
                clip=self.guarantee.clip,
                sampling_rate=self.guarantee.rate,
                steps=max(1, self.guarantee.releases // self.config.rounds),
                clients=[node - wire.FIRST_NODE for node in nodes],
                # The clients draw with a key that the server lacks; this only tells their rounds apart.
                noise_address=fingerprint(self._secret, "round", number) if protected else "",
                release_hash=release_hash(sent),
            )
        )

    def _synthetic_reply(self, number: int, nodes: Sequence[int], received: Sequence[Arrays]) -> Message:
        """Clip, sum, add noise, divide; the result looks to the stock strategy like one client's reply."""
        assert self.guarantee.clip is not None
        updates = [{name: one[name] - self._broadcast[name] for name in self._broadcast} for one in received]
        address = ("user-noise", number)
        found = gaussian_mean(
            updates,
            {name: array.shape for name, array in self._broadcast.items()},
            group_of,
            clip=self.guarantee.clip,
            noise_multiplier=self.guarantee.noise_multiplier,
            denominator=self.guarantee.denominator,
            rng=generator(self._secret, *address),
        )
        noised = self.guarantee.noise_multiplier > 0
        private = self.guarantee.unit == "user"
        self.ledger.append(
            Release(
                round=number,
                mechanism="gaussian" if noised else "none",
                noise_multiplier=self.guarantee.noise_multiplier,
                clip=self.guarantee.clip,
                sampling_rate=self.guarantee.rate,
                steps=1,
                # Who took part amplifies only while it is secret, so it is not written down.
                clients=None if private else [node - wire.FIRST_NODE for node in nodes],
                noise_address=fingerprint(self._secret, *address) if noised else "",
                release_hash=release_hash(found.mean),
            )
        )
        assert self.report is not None
        self.report = RoundReport(
            self.report.clients,
            self.report.bytes_up,
            self.report.bytes_down,
            clipped=found.clipped,
            nonfinite=found.nonfinite,
            median_update_norm=found.median_norm,
            signal=found.signal,
            noise=found.noise,
        )
        arrays = {name: self._broadcast[name] + found.mean[name] for name in self._broadcast}
        content = RecordDict(
            {wire.ARRAYS: wire.to_record(arrays, sorted(arrays)), wire.METRICS: MetricRecord({wire.WEIGHT: 1})}
        )
        return Message(content, dst_node_id=wire.FIRST_NODE, message_type=MessageType.TRAIN)

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
        """Return the stock strategy's own state (momenta), as flat names and arrays, for a checkpoint."""
        return dict(_flatten(self.inner))

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Restore what `state` returned."""
        values: dict[str, Any] = {}
        for name, array in state.items():
            attribute, kind, key = name.split("|", 2)
            if kind == "dict":
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
