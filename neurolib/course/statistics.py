"""Statistics for few neurons: intervals, exact tests, and methods compared neuron by neuron."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from neurolib.errors import SettingsError

EXACT, RANDOM_FLIPS = 16, 99_999  # all 2ⁿ sign flips for up to 16 differences, else random ones


@dataclass(frozen=True)
class Interval:
    """A mean over n neurons with its interval, which is NaN if n is 1."""

    mean: float
    low: float
    high: float
    n: int


def t_interval(values: np.ndarray, level: float = 0.95) -> Interval:
    """Mean over neurons (and seeds) and its t interval.

    Four neurons are enough: for normal values it covers the true mean in 95 % of experiments, but
    the percentile bootstrap only in 80 %. With several seeds, both neurons and seeds count as
    random. The variance of the mean is then the sum of three parts (neurons, seeds, their
    interaction), estimated by the mean squares of a two-way table, with degrees of freedom after
    Satterthwaite, "An approximate distribution of estimates of variance components", Biometrics
    Bulletin 1946.

    Parameters
    ----------
    values : (n,) one finite value or paired difference per neuron, or (n, k) of k seeds
    level : share of experiments whose interval holds the true mean
    """
    values = _check_values(values)
    (n, k), mean = values.shape, float(values.mean())
    if n == 1:
        return Interval(mean, float("nan"), float("nan"), 1)
    neurons, seeds, rest = _mean_squares(values)
    if seeds <= rest:  # the seeds add nothing that their interaction does not explain
        square, freedom = neurons, n - 1
    else:
        square = neurons + seeds - rest
        parts = neurons**2 / (n - 1) + seeds**2 / (k - 1) + rest**2 / ((n - 1) * (k - 1))
        freedom = square**2 / parts
    half = float(stats.t.ppf((1 + level) / 2, freedom) * np.sqrt(square / (n * k)))
    return Interval(mean, mean - half, mean + half, n)


def spreads(values: np.ndarray) -> tuple[float, float]:
    """Standard deviations of neurons and of seeds, each without the share of the other.

    The values are (n, k), one per neuron and seed; for one neuron or one seed, the result is NaN.
    """
    values = _check_values(values)
    n, k = values.shape
    if min(n, k) == 1:
        return float("nan"), float("nan")
    neurons, seeds, rest = _mean_squares(values)
    return max(neurons - rest, 0.0) ** 0.5 / k**0.5, max(seeds - rest, 0.0) ** 0.5 / n**0.5


def _mean_squares(values: np.ndarray) -> tuple[float, float, float]:
    """Mean squares of neurons (rows), of seeds (columns), and of the residuals."""
    n, k = values.shape
    rows, columns = values.mean(axis=1), values.mean(axis=0)
    if k == 1:
        return float(rows.var(ddof=1)), 0.0, 0.0
    rest = values - rows[:, None] - columns + values.mean()
    left = float((rest**2).sum() / ((n - 1) * (k - 1)))
    return float(k * rows.var(ddof=1)), float(n * columns.var(ddof=1)), left


def sign_flip_p(differences: np.ndarray) -> float:
    """Two-sided p of paired differences, by flipping their signs.

    If neither method were better, each difference could just as well have the other sign. For up
    to 16 differences all 2ⁿ patterns are tried, so that p is exact and at least 2 / 2ⁿ: 0.125 for
    four neurons. For more, 99,999 patterns are drawn (`scipy.stats.permutation_test`).

    The differences are (n,), one per neuron, or (n, k) of k seeds.
    """
    values = _check_values(differences).mean(axis=1)
    if len(values) == 1:
        return 1.0  # both patterns are equally far from zero; SciPy refuses a single value
    test = stats.permutation_test(
        (values,),
        lambda sample, axis: sample.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf if len(values) <= EXACT else RANDOM_FLIPS,
        batch=10_000,
        random_state=np.random.default_rng(0),
    )
    return float(test.pvalue)


def aggregate(values: np.ndarray, penalty: float | np.ndarray | None = None) -> Interval:
    """Mean over volumes with its t interval; infinite values are misses.

    `penalty` replaces them, one per volume or one for all: the volume's diagonal
    (`neurolib.evaluation.volume_diagonal`), so that a miss never improves the mean.
    """
    values = np.asarray(values, dtype=float)
    missed = np.isposinf(values)
    if missed.any() and penalty is None:
        raise SettingsError(
            f"{missed.sum()} of {values.size} values are infinite (an empty mask); give the "
            "volumes' diagonals as penalty"
        )
    return t_interval(np.where(missed, penalty if missed.any() else 0.0, values))


Score = float | Mapping[str, float]  # of one neuron: one number, or one per seed


def compare_networks(values: Mapping[str, Mapping[str, Score]], baseline: str) -> list[dict]:
    """Mean of each method, and its paired difference from a baseline.

    Parameters
    ----------
    values : mapping of method to mapping of neuron to value, or to mapping of seed to value
    baseline : str
        The method to compare the others with, on the neurons that both have.

    Returns
    -------
    list of dict
        Per method: ``mean`` (over neurons of means over seeds), ``difference``, ``low`` and
        ``high`` (95 % t interval, see `t_interval`), ``p`` (exact sign flips of the neurons'
        means), ``n`` neurons; with several seeds ``sd neurons`` and ``sd seeds`` (`spreads`).
    """
    if baseline not in values:
        raise SettingsError(f"baseline={baseline!r}: expected one of {', '.join(values)}")
    rows = []
    for name, scores in values.items():
        row = {"network": name, "mean": float(np.mean([_mean(s) for s in scores.values()]))}
        if name != baseline:
            gain = differences(scores, values[baseline])
            interval = t_interval(gain)
            row |= {"difference": interval.mean, "low": interval.low, "high": interval.high}
            row |= {"p": sign_flip_p(gain), "n": interval.n}
            if gain.shape[1] > 1:
                row["sd neurons"], row["sd seeds"] = spreads(gain)
        rows.append(row)
    return rows


def differences(ours: Mapping[str, Score], theirs: Mapping[str, Score]) -> np.ndarray:
    """Paired differences (n, k) of the neurons that both have, seed by seed (see `by_neuron`)."""
    shared = [neuron for neuron in ours if neuron in theirs]
    if not shared:
        raise SettingsError("the two methods were not measured on a common neuron")
    one, two = ({neuron: scores[neuron] for neuron in shared} for scores in (ours, theirs))
    if all(_seeds(one[neuron]) == _seeds(two[neuron]) for neuron in shared):
        one, two = by_neuron(one), by_neuron(two)
    else:
        one, two = ([[_mean(score)] for score in scores.values()] for scores in (one, two))
    return np.subtract(one, two)


def by_neuron(scores: Mapping[str, Score]) -> np.ndarray:
    """Scores as (n, k), a row per neuron and a column per seed.

    If the neurons differ in their seeds, k is 1: the means over seeds.
    """
    seeds = {_seeds(score) for score in scores.values()}
    if len(seeds) > 1 or seeds == {()}:
        return np.array([[_mean(score)] for score in scores.values()])
    return np.array([[score[seed] for seed in next(iter(seeds))] for score in scores.values()])


def _seeds(score: Score) -> tuple[str, ...]:
    return tuple(sorted(score)) if isinstance(score, Mapping) else ()


def _mean(score: Score) -> float:
    return float(np.mean(list(score.values()))) if isinstance(score, Mapping) else float(score)


def _check_values(values: np.ndarray) -> np.ndarray:
    """Values as (n, k), for n neurons and k seeds."""
    values = np.asarray(values, dtype=float)
    if values.ndim not in (1, 2) or values.size == 0 or not np.isfinite(values).all():
        raise SettingsError(
            f"expected at least one finite value per neuron, got shape {values.shape} with "
            f"{np.count_nonzero(~np.isfinite(values))} not finite"
        )
    return values[:, None] if values.ndim == 1 else values
