"""The accountant against table 3.1 of the privacy reference, analytic values and its own monotonicity."""

import math

import numpy as np
import pytest
from dp_accounting import NeighboringRelation, dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import GaussianAccountant, PRVAccountant
from scipy.stats import norm

from fedpers.errors import ConfigError
from fedpers.privacy.accounting import GaussianEvent, cross_check, epsilon, gaussian_epsilon
from fedpers.privacy.calibration import calibrate, calibrate_gaussian, smallest_noise_multiplier

# q, noise multiplier, count, delta, dp-accounting PLD, Opacus RDP, Opacus PRV (eps_error .01)
TABLE = [
    (0.01, 1.0, 1000, 1e-5, 1.8282, 2.1014, 1.8384),
    (0.05, 1.3, 200, 1e-5, 2.9492, 3.2834, 2.9594),
    (0.1, 2.0, 500, 1e-5, 5.5555, 6.0343, 5.5658),
    (0.25, 1.0, 60, 1e-4, 12.1033, 13.5649, 12.1141),
    (1.0, 4.0, 50, 1e-5, 8.5959, 9.2350, 8.6063),
    (0.001, 0.7, 10000, 1e-6, 1.6370, 2.4730, 1.6471),
    (0.02, 0.6, 300, 1e-5, 8.3931, 9.8046, 8.4038),
    (0.5, 5.0, 100, 1e-5, 4.4878, 4.8622, 4.4981),
    (0.1, 0.5, 10, 1e-5, 12.2612, 14.4183, 12.2722),
    (0.004, 1.1, 15000, 1e-5, 2.2955, 2.5029, 2.3055),
]
# the other columns: Opacus PRV (eps_error .001), Opacus GDP, dp-accounting RDP, no amplification (and its digits)
OTHER_COLUMNS = [
    (1.8294, 1.6177, 2.1014, 633.9, 0.05),
    (2.9504, 2.6073, 3.2834, 104.7, 0.05),
    (5.5568, 5.3695, 6.0346, 109.3, 0.05),
    (12.1051, 12.0502, 13.6308, 58.0, 0.05),
    (8.5973, 8.7617, 9.2350, 8.5959, 5e-5),
    (1.6381, 1.1010, 2.4730, 10882, 0.5),
    (8.3948, 6.1948, 9.8231, 538.9, 0.05),
    (4.4891, 4.4283, 4.8664, 10.00, 0.005),
    (12.2632, 11.9896, 14.4183, 46.2, 0.05),
    (2.2965, 2.2417, 2.5029, 6672, 0.5),
]

few = settings(max_examples=12, deadline=None, derandomize=True)
rates = st.sampled_from([0.01, 0.1, 0.5, 1.0])
noises = st.floats(0.7, 20)
counts = st.integers(1, 500)
deltas = st.sampled_from([1e-8, 1e-6, 1e-4])


def one(q: float, z: float, count: int) -> list[GaussianEvent]:
    return [GaussianEvent(z, q, count)]


@pytest.mark.parametrize(("q", "z", "count", "delta", "pld", "rdp", "prv"), TABLE)
def test_table_of_the_reference(
    q: float, z: float, count: int, delta: float, pld: float, rdp: float, prv: float
) -> None:
    claimed = epsilon(one(q, z, count), delta)
    others = cross_check(one(q, z, count), delta)
    assert claimed == pytest.approx(pld, abs=5e-4)
    assert others["rdp"] == pytest.approx(rdp, abs=1e-4)
    assert others["prv"] == pytest.approx(prv, abs=1e-4)
    assert others["prv"] == pytest.approx(claimed + 0.01, abs=0.0012)  # Opacus returns its upper bound
    assert claimed <= others["rdp"]


@pytest.mark.filterwarnings("ignore:GDP accounting")
@pytest.mark.parametrize(("row", "columns"), zip(TABLE, OTHER_COLUMNS, strict=True))
def test_second_opinions_of_the_reference(row: tuple[float, ...], columns: tuple[float, ...]) -> None:
    q, z, count, delta, pld, rdp = row[:6]
    _, gdp, dpa_rdp, unamplified, digits = columns
    accountant = RdpAccountant()
    accountant.compose(dp_event.PoissonSampledDpEvent(q, dp_event.GaussianDpEvent(z)), int(count))
    assert accountant.get_epsilon(delta) == pytest.approx(dpa_rdp, abs=1e-4)
    assert accountant.get_epsilon(delta) == pytest.approx(rdp, abs=0.07)  # they drop different orders
    assert gaussian_epsilon(math.sqrt(count) / z, delta) == pytest.approx(unamplified, abs=digits)
    central_limit = GaussianAccountant()
    central_limit.history = [(z, q, int(count))]
    assert central_limit.get_epsilon(delta) == pytest.approx(gdp, abs=1e-4)
    # control: with sampling the central limit theorem under-reports what PLD and PRV agree on, so it is never a claim
    assert (gdp < pld - 0.05) == (q < 1)


@pytest.mark.slow
@pytest.mark.parametrize(("row", "columns"), zip(TABLE, OTHER_COLUMNS, strict=True))
def test_fine_prv_lies_just_above_the_claim(row: tuple[float, ...], columns: tuple[float, ...]) -> None:
    q, z, count, delta = row[:4]
    accountant = PRVAccountant()
    accountant.history = [(z, q, int(count))]
    with np.errstate(divide="ignore"):  # it takes log(1 - q) also at q = 1
        prv = accountant.get_epsilon(delta, eps_error=0.001, delta_error=delta / 1000)
    assert prv == pytest.approx(columns[0], abs=1e-4)
    claimed = epsilon(one(q, z, int(count)), delta)
    assert claimed <= prv <= claimed + 0.0021  # the table's own row with q = .1 and z = .5 is at .0020


def mixture(q: float, mean: float, z: float, x: np.ndarray) -> np.ndarray:
    """Density of one sampled release of a unit that contributes `mean` clips."""
    return (1 - q) * norm.pdf(x, 0, z) + q * norm.pdf(x, mean, z)


def divergence(q: float, first: tuple[float, float], second: tuple[float, float], z: float, eps: float) -> float:
    """delta(eps) between units that contribute two vectors of the plane, by summation over a grid."""
    x, step = np.linspace(-8 * z - 1, 8 * z + 1, 401, retstep=True)
    columns, rows = norm.pdf(x[None, :], 0, z), norm.pdf(x[:, None], 0, z)

    def density(mean: tuple[float, float]) -> np.ndarray:
        return (1 - q) * columns * rows + q * norm.pdf(x[None, :], mean[0], z) * norm.pdf(x[:, None], mean[1], z)

    return float(np.maximum(density(first) - math.exp(eps) * density(second), 0).sum() * step**2)


def test_replace_one_of_the_reference() -> None:
    assert epsilon(one(0.05, 1.3, 200), 1e-5, replace_one=True) == pytest.approx(4.944, abs=5e-4)
    assert epsilon(one(1.0, 4.0, 50), 1e-5, replace_one=True) == pytest.approx(20.68, abs=0.005)
    assert epsilon(one(0.05, 1.3, 200), 1e-5) == pytest.approx(2.949, abs=5e-4)  # not the other adjacency's, cached


@pytest.mark.parametrize(("q", "z"), [(0.05, 1.3), (0.5, 0.8), (0.9, 3.0)])
def test_replace_one_is_doubled_once(q: float, z: float) -> None:
    """One release against the integral of its definition; the control doubles in both places."""
    eps = epsilon(one(q, z, 1), 1e-4, replace_one=True)
    x, step = np.linspace(-12 * z, 12 * z, 200_001, retstep=True)
    hockey_stick = [
        float(np.maximum(mixture(q, 1, z, x) - math.exp(e) * mixture(q, -1, z, x), 0).sum() * step)
        for e in (eps, eps - 0.002)
    ]
    assert hockey_stick[0] <= 1e-4 < hockey_stick[1]
    assert epsilon(one(q, z / 2, 1), 1e-4, replace_one=True) > eps + 0.1


@pytest.mark.parametrize(("q", "z", "eps"), [(0.1, 1.0, 0.1), (0.5, 0.7, 1.0), (0.3, 2.0, 0.3)])
def test_opposite_contributions_are_the_worst_replacement(q: float, z: float, eps: float) -> None:
    """Why the pair of dp-accounting is enough: no other two vectors of norm 1 or less are told apart better."""
    worst = divergence(q, (1, 0), (-1, 0), z, eps)
    for angle in np.linspace(0, math.pi, 9):
        for length in (0.0, 0.5, 1.0):
            other = (length * math.cos(angle), length * math.sin(angle))
            assert divergence(q, (1, 0), other, z, eps) <= worst + 1e-9
            assert divergence(q, other, (1, 0), z, eps) <= worst + 1e-9
    assert divergence(q, (1, 0), (0, 1), z, eps) < 0.9 * worst


@few
@given(q=rates, z=noises, count=counts, delta=deltas)
def test_replacing_costs_more_than_vanishing_and_sampling_never_hurts(
    q: float, z: float, count: int, delta: float
) -> None:
    vanishing, replaced = (epsilon(one(q, z, count), delta, replace_one=replace) for replace in (False, True))
    assert vanishing <= replaced + 1e-6
    assert vanishing <= gaussian_epsilon(math.sqrt(count) / z, delta)
    assert replaced <= gaussian_epsilon(2 * math.sqrt(count) / z, delta)
    if q == 1:
        assert replaced == gaussian_epsilon(2 * math.sqrt(count) / z, delta)


@pytest.mark.parametrize(
    ("q", "z", "count", "delta"),
    [(0.004, 1.1, 15000, 1e-5), pytest.param(0.02, 0.6, 300, 1e-5, marks=pytest.mark.slow)],
)
def test_grid_is_never_tighter_than_a_finer_one(q: float, z: float, count: int, delta: float) -> None:
    fine = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=5e-5)
    fine.compose(dp_event.PoissonSampledDpEvent(q, dp_event.GaussianDpEvent(z)), count)
    assert 0 <= epsilon(one(q, z, count), delta) - fine.get_epsilon(delta) <= 0.001


def test_table_value_at_the_coarse_grid_is_not_the_same_to_four_digits() -> None:
    """Why no fixed interval of 1e-3 is used: it is .01 too high in the last row."""
    coarse = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=1e-3)
    coarse.compose(dp_event.PoissonSampledDpEvent(0.004, dp_event.GaussianDpEvent(1.1)), 15000)
    assert coarse.get_epsilon(1e-5) > 2.2955 + 0.005


@few
@given(z=st.floats(0.3, 50), count=counts, delta=deltas)
def test_without_sampling_it_is_the_analytic_gaussian(z: float, count: int, delta: float) -> None:
    eps, mu = epsilon(one(1.0, z, count), delta), math.sqrt(count) / z

    def delta_at(eps: float) -> float:  # Balle and Wang 2018, Theorem 8, on another road than the code's
        return float(norm.cdf(mu / 2 - eps / mu) - math.exp(eps + norm.logcdf(-mu / 2 - eps / mu)))

    assert delta_at(eps) <= delta * (1 + 1e-6)
    if eps > 1e-4:
        assert delta_at(eps - 1e-4) > delta


def test_analytic_gaussian_of_the_reference_and_of_mixed_noise() -> None:
    assert epsilon(one(1.0, 4.0, 50), 1e-5) == pytest.approx(8.59587, abs=1e-4)
    mixed = [GaussianEvent(4.0, 1.0, 25), GaussianEvent(2.0, 1.0, 6), GaussianEvent(4.0, 1.0, 1)]
    assert epsilon(mixed, 1e-5) == pytest.approx(epsilon(one(1.0, 4.0, 50), 1e-5), abs=1e-6)


@pytest.mark.parametrize("delta", [1e-8, 1e-5, 0.3])
def test_gaussian_at_huge_sensitivity(delta: float) -> None:
    """No digits are lost: the loss is Gaussian, so epsilon tends to its 1 - delta quantile."""
    for mu in (1e4, 1e6):
        assert gaussian_epsilon(mu, delta) == pytest.approx(mu**2 / 2 - mu * norm.ppf(delta), rel=10 / mu**2)


def test_gaussian_limits() -> None:
    assert gaussian_epsilon(0.0, 1e-5) == gaussian_epsilon(1e-7, 1e-5) == 0
    assert gaussian_epsilon(math.inf, 1e-5) == gaussian_epsilon(1e200, 1e-5) == math.inf
    for mu in (-1.0, math.nan):
        with pytest.raises(ConfigError, match="mu"):
            gaussian_epsilon(mu, 1e-5)
    with pytest.raises(ConfigError, match="delta"):
        gaussian_epsilon(1.0, 0.0)


@few
@given(target=st.floats(0.05, 50), delta=deltas, sensitivity=st.sampled_from([0.3, 1.0, 2.0, math.sqrt(50)]))
def test_calibrate_gaussian_inverts_gaussian_epsilon(target: float, delta: float, sensitivity: float) -> None:
    z = calibrate_gaussian(target, delta, sensitivity)
    assert z == round(z, 4)
    assert gaussian_epsilon(sensitivity / z, delta) <= target < gaussian_epsilon(sensitivity / (z - 0.0001), delta)


def test_calibrations_agree_without_sampling() -> None:
    assert calibrate_gaussian(4.0, 1e-5, math.sqrt(50)) == calibrate(4.0, 1e-5, 1.0, 50)
    assert calibrate_gaussian(1e9, 1e-5, 1.0) == 0.0001  # the smallest there is


@pytest.mark.parametrize(
    ("target", "delta", "sensitivity"),
    [
        (0.0, 1e-5, 1.0),
        (math.inf, 1e-5, 1.0),
        (1.0, 0.0, 1.0),
        (1.0, 1e-5, 0.0),
        (1.0, 1e-5, math.inf),
        (1e-9, 1e-12, 9),
    ],
)
def test_calibrate_gaussian_refuses(target: float, delta: float, sensitivity: float) -> None:
    with pytest.raises(ConfigError):
        calibrate_gaussian(target, delta, sensitivity)


@pytest.mark.parametrize("guess", [1e-9, 0.01, 2.34, 99.0, math.inf])
def test_smallest_noise_multiplier_from_any_guess(guess: float) -> None:
    assert smallest_noise_multiplier(lambda z: z >= 2.34561, guess) == 2.3457
    with pytest.raises(ConfigError, match="no noise multiplier"):
        smallest_noise_multiplier(lambda z: False, guess)


@pytest.mark.parametrize("q", [0.001, 0.1, 0.9])
@pytest.mark.parametrize("z", [1e-6, 1e-5, 1e-4, 9e-4, 1e-3, 2e-3, 0.01, 0.1])
def test_hardly_any_noise_gives_a_finite_upper_bound(q: float, z: float) -> None:
    """One sampled release in closed form: delta(eps) is q times the Gaussian's at log(1 + (exp(eps) - 1) / q)."""
    delta = 1e-5
    plain = gaussian_epsilon(1 / z, delta / q)
    exact = plain + math.log(q + (1 - q) * math.exp(-plain))
    claimed = epsilon(one(q, z, 1), delta)
    assert exact <= claimed <= gaussian_epsilon(1 / z, delta)
    assert exact <= epsilon(one(q, z, 1), delta, replace_one=True) <= gaussian_epsilon(2 / z, delta)
    if z >= 1e-3:
        assert claimed == pytest.approx(exact, rel=2e-4)


def test_many_releases_with_hardly_any_noise() -> None:
    """100 releases at rate .5: with z = 1e-3 what counts is how often the unit took part, 71 times but for 1e-5."""
    assert 70 / (2 * 0.001**2) < epsilon(one(0.5, 0.001, 100), 1e-5) < 72 / (2 * 0.001**2)
    assert epsilon(one(0.5, 0.0009, 100), 1e-5) == gaussian_epsilon(10 / 0.0009, 1e-5)
    assert epsilon(one(0.5, 0.0009, 100), 1e-5) > epsilon(one(0.5, 0.001, 100), 1e-5)
    assert epsilon(one(0.5, 5e-324, 1), 1e-5) == math.inf


def test_a_release_with_hardly_any_noise_among_others() -> None:
    """Where a grid as fine as the common releases need would have a billion points."""
    common = GaussianEvent(1.0, 0.01, 1000)
    for z in (0.005, 0.1):
        alone = epsilon([GaussianEvent(z, 0.01, 1)], 1e-5)
        together = epsilon([common, GaussianEvent(z, 0.01, 1)], 1e-5)
        assert alone < together < alone + 10
    with_least = epsilon([common, GaussianEvent(1e-6, 0.01, 1)], 1e-5)
    assert with_least == gaussian_epsilon(math.hypot(math.sqrt(1000), 1e6), 1e-5)


def test_nothing_and_no_noise() -> None:
    assert epsilon([], 1e-5) == epsilon([], 1e-5, replace_one=True) == 0
    assert epsilon([GaussianEvent(0.0, 0.5, 1)], 1e-5, replace_one=True) == math.inf
    assert epsilon([GaussianEvent(0.0, 0.5, 0)], 1e-5) == 0
    assert epsilon([GaussianEvent(0.0, 0.5, 1), GaussianEvent(3.0, 0.5, 9)], 1e-5) == math.inf
    assert cross_check([], 1e-5) == {"rdp": 0.0, "prv": 0.0}
    assert cross_check([GaussianEvent(0.0, 0.5, 1)], 1e-5) == {"rdp": math.inf}


def test_prv_is_left_out_where_its_grid_would_be_huge() -> None:
    assert list(cross_check(one(0.3, 0.3, 3000), 1e-6)) == ["rdp"]


def test_equal_events_merge_and_order_does_not_matter() -> None:
    apart = [GaussianEvent(1.3, 0.05, 1), GaussianEvent(2.0, 0.1, 30)] + [GaussianEvent(1.3, 0.05, 1)] * 49
    assert epsilon(apart, 1e-5) == epsilon([GaussianEvent(2.0, 0.1, 30), GaussianEvent(1.3, 0.05, 50)], 1e-5)


@few
@given(q=rates, z=noises, count=counts, delta=deltas)
def test_more_steps_cost_more(q: float, z: float, count: int, delta: float) -> None:
    less, more = (epsilon(one(q, z, n), delta) for n in (count, count + count // 10 + 1))
    assert less < more or less == more == 0  # weak enough noise is (0, delta)-private


@few
@given(q=rates, z=noises, count=counts, delta=deltas)
def test_more_noise_costs_less(q: float, z: float, count: int, delta: float) -> None:
    more, less = (epsilon(one(q, noise, count), delta) for noise in (z, z * 1.05))
    assert less < more or less == more == 0


@few
@given(q=rates, z=noises, count=counts, delta=deltas)
def test_smaller_delta_costs_more(q: float, z: float, count: int, delta: float) -> None:
    less, more = (epsilon(one(q, z, count), d) for d in (delta, delta / 3))
    assert less < more or less == more == 0


def test_rate_of_clients_times_rate_of_records_is_not_a_rate() -> None:
    """R7 and table 3.2 of the reference: per-step q_client * q_local is far below what the server can learn."""
    p, q, steps, rounds, z = 0.1, 1.0, 10, 20, 4.0
    naive = epsilon(one(p * q, z, steps * rounds), 1e-5)
    assert naive == pytest.approx(1.42, abs=0.02)
    took_part = epsilon(one(q, z, steps * int(p * rounds)), 1e-5)
    assert took_part == pytest.approx(4.98, abs=0.02)


@pytest.mark.parametrize(
    ("target", "delta", "q", "count"),
    [
        (8.0, 1e-5, 0.1, 100),
        pytest.param(1000.0, 1e-5, 0.5, 10, marks=pytest.mark.slow),
        (3.0, 1e-5, 0.05, 200),
        (1.0, 1e-6, 0.01, 1000),
        (4.0, 1e-5, 1.0, 50),
        (0.1, 1e-7, 0.2, 5),
    ],
)
def test_calibrate_inverts_epsilon(target: float, delta: float, q: float, count: int) -> None:
    z = calibrate(target, delta, q, count)
    assert z == round(z, 4)
    assert epsilon(one(q, z, count), delta) <= target
    assert epsilon(one(q, z - 0.0001, count), delta) > target
    assert epsilon(one(q, z - 0.01, count), delta) > target


def test_calibrate_finds_the_noise_that_epsilon_came_from() -> None:
    assert calibrate(epsilon(one(0.05, 1.3, 200), 1e-5), 1e-5, 0.05, 200) == 1.3


@pytest.mark.parametrize(
    ("target", "delta", "q", "count"),
    [
        (0.0, 1e-5, 0.1, 10),
        (-1.0, 1e-5, 0.1, 10),
        (math.inf, 1e-5, 0.1, 10),
        (math.nan, 1e-5, 0.1, 10),
        (1.0, 0.0, 0.1, 10),
        (1.0, 1.0, 0.1, 10),
        (1.0, 1e-5, 0.0, 10),
        (1.0, 1e-5, 1.1, 10),
        (1.0, 1e-5, 0.1, 0),
        (1e9, 1e-5, 1.0, 1),
    ],
)
def test_calibrate_refuses(target: float, delta: float, q: float, count: int) -> None:
    with pytest.raises(ConfigError):
        calibrate(target, delta, q, count)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_delta_outside_its_range(delta: float) -> None:
    with pytest.raises(ConfigError, match="delta"):
        epsilon(one(0.1, 1.0, 1), delta)


@pytest.mark.parametrize(("z", "q", "count"), [(-1.0, 0.5, 1), (math.nan, 0.5, 1), (1.0, 0.0, 1), (1.0, 0.5, -1)])
def test_events_outside_their_range(z: float, q: float, count: int) -> None:
    with pytest.raises(ConfigError):
        GaussianEvent(z, q, count)
