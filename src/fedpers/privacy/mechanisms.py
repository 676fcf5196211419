"""User-level aggregation: clip each user's whole shared update, add up, add noise, divide by a public constant."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpers.errors import ConfigError

Arrays = Mapping[str, NDArray[np.float32]]
Floats = NDArray[np.float64]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Aggregate:
    """A noised mean update, and what only the simulator may see of how it came about."""

    mean: dict[str, NDArray[np.float32]]
    clipped: int  # users whose update, or a layer of it, was longer than its bound
    norms: tuple[float, ...]  # L2 norm of each user's update before clipping; infinity where it was not finite
    signal: dict[str, float]  # L2 norm of the mean before noise is added here, per parameter group
    noise: dict[str, float]  # L2 norm of the noise that is added here, in the mean, per parameter group

    @property
    def nonfinite(self) -> int:
        """Users whose update was not finite and counted as zero."""
        return sum(math.isinf(norm) for norm in self.norms)

    @property
    def median_norm(self) -> float:
        """Median norm of the finite updates before clipping; nan for an empty cohort."""
        finite = [norm for norm in self.norms if math.isfinite(norm)]
        return float(np.median(finite)) if finite else float("nan")


def clip_update(update: Arrays, bound: float, per_layer: bool = False) -> tuple[dict[str, Floats], float]:
    """Scale an update so that the L2 norm over all its arrays jointly is at most `bound`.

    Returns the clipped update and the joint norm before. An update that is not finite becomes the zero vector and its
    norm is reported as infinity: a rule that looks at this user alone. An infinite bound clips nothing.

    With `per_layer` every array is a layer and is clipped by itself to bound / sqrt(number of arrays), which keeps the
    joint norm within `bound` (McMahan et al., ICLR 2018, per-layer clipping).
    """
    kept, norm, _ = _clip(update, bound, per_layer)
    return kept, norm


def standard_normals(shapes: Shapes, rng: np.random.Generator) -> dict[str, Floats]:
    """Draw independent standard normals, in the order of the sorted names: the bytes of one long vector, cut up."""
    return {name: rng.standard_normal(shape) for name, shape in sorted(shapes.items())}


def unflatten(flat: Floats, shapes: Shapes) -> dict[str, Floats]:
    """Cut one vector, all entries of all arrays, into arrays in the order of the sorted names.

    Raises:
        ValueError: the vector has another length.
    """
    if flat.shape != (_size(shapes),):
        raise ValueError(f"a vector of shape {flat.shape} cannot fill {_size(shapes)} entries.")
    cuts = np.cumsum([math.prod(shape) for _, shape in sorted(shapes.items())])[:-1]
    parts = zip(sorted(shapes.items()), np.split(flat, cuts), strict=True)
    return {name: part.reshape(shape) for (name, shape), part in parts}


def noise_share(
    shapes: Shapes, clip: float, noise_multiplier: float, honest: int, rng: np.random.Generator
) -> dict[str, Floats]:
    """One client's share of the noise on a sum: deviation noise_multiplier * clip / sqrt(honest).

    The shares of any `honest` clients add up to noise of deviation noise_multiplier * clip; more clients make it more.
    This models distributed noise under secure aggregation in floating point; it is no such protocol. A client that
    trusts nobody is the case honest = 1: it adds the full noise itself.

    Args:
        shapes: shape of every array.
        clip: L2 bound on a whole update; the client adds its share after clipping.
        noise_multiplier: noise deviation over clip, of the sum.
        honest: clients that are certain to answer and to keep their share secret.
        rng: the stream of this client's noise in this round, used for nothing else.

    Raises:
        ConfigError: fewer than one honest client.
    """
    if honest < 1:
        raise ConfigError(f"noise shares for {honest} honest clients: the guarantee needs at least 1 of them.")
    deviation = noise_multiplier * clip / math.sqrt(honest)
    return {name: deviation * normals for name, normals in standard_normals(shapes, rng).items()}


def gaussian_mean(
    updates: Sequence[Arrays],
    shapes: Shapes,
    group_of: Callable[[str], str],
    *,
    clip: float,
    noise_multiplier: float,
    denominator: float,
    noise: Mapping[str, Floats] | None,
    per_layer: bool = False,
) -> Aggregate:
    """DP-FedAvg's fixed-denominator mean (McMahan et al., ICLR 2018, estimator f_f), as user-central needs it.

    In this order: clip, sum, add noise, divide. Every user weighs the same, noise of deviation
    `noise_multiplier * clip` goes on the sum, and an empty cohort releases noise too. Removing one user changes the sum
    by at most `clip`.

    Args:
        updates: one mapping of name to array for each user of the cohort.
        shapes: shape of every array, so that an empty cohort knows what to release.
        group_of: parameter group of an array's name.
        clip: L2 bound on a whole update; infinity for updates that were clipped before noise shares were added.
        noise_multiplier: noise deviation over clip; 0 where the updates bring their noise along.
        denominator: public constant, sampling rate times the number of registered users.
        noise: this round's noise before it is scaled, used for nothing else: `standard_normals` for independent noise,
            a row of `BandedNoise` through `unflatten` for correlated noise; None adds none.
        per_layer: clip each array by itself, see `clip_update`.

    Raises:
        ValueError: a noise multiplier without noise, noise without a clip, or arrays of other shapes, which would be
            spread over the sum.
    """
    if (noise is None and noise_multiplier != 0) or (noise is not None and not math.isfinite(clip)):
        raise ValueError(f"noise multiplier {noise_multiplier}, clip {clip}: a multiplier needs noise, noise a clip.")
    total = {name: np.zeros(shape) for name, shape in sorted(shapes.items())}
    norms, clipped = [], 0
    for update in updates:
        _check(update, shapes)
        kept, norm, longer = _clip(update, clip, per_layer)
        norms.append(norm)
        clipped += longer
        for name in total:
            total[name] += kept[name]
    added = {name: np.zeros(array.shape) for name, array in total.items()}
    if noise is not None:
        _check(noise, shapes)
        added = {name: noise_multiplier * clip * noise[name] for name in total}
    return Aggregate(
        mean={name: ((total[name] + added[name]) / denominator).astype(np.float32) for name in total},
        clipped=clipped,
        norms=tuple(norms),
        signal=_group_norms(total, group_of, denominator),
        noise=_group_norms(added, group_of, denominator),
    )


def _clip(update: Arrays, bound: float, per_layer: bool) -> tuple[dict[str, Floats], float, bool]:
    """Return the clipped update, its norm before, and whether anything was longer than its bound."""
    squares = {name: float(np.sum(np.square(array, dtype=np.float64))) for name, array in update.items()}
    norm = float(np.sqrt(sum(squares.values())))
    if not np.isfinite(norm):
        return {name: np.zeros(array.shape) for name, array in update.items()}, float("inf"), False
    lengths, limit = dict.fromkeys(update, norm), bound
    if per_layer:
        lengths = {name: math.sqrt(square) for name, square in squares.items()}
        limit = bound / math.sqrt(max(len(update), 1))
    kept = {
        name: array.astype(np.float64) * (min(1.0, limit / lengths[name]) if lengths[name] > 0 else 1.0)
        for name, array in update.items()
    }
    return kept, norm, any(length > limit for length in lengths.values())


def _size(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _check(arrays: Mapping[str, NDArray[Any]], shapes: Shapes) -> None:
    found = {name: array.shape for name, array in arrays.items()}
    if found != dict(shapes):
        raise ValueError(f"arrays of shapes {found} where {dict(shapes)} are expected.")


def _group_norms(arrays: Mapping[str, Floats], group_of: Callable[[str], str], denominator: float) -> dict[str, float]:
    squares: dict[str, float] = {}
    for name, array in arrays.items():
        squares[group_of(name)] = squares.get(group_of(name), 0.0) + float(np.sum(array**2))
    return {group: float(np.sqrt(square)) / denominator for group, square in squares.items()}
