"""Questions of notebook 04: Dice and Hd95 where a mask is empty, the interval of a paired gain."""

from collections.abc import Callable

import numpy as np
from scipy import stats

from neurolib import evaluation
from neurolib.course.exercises import call, question


@question("and it is a number for every pair of masks, empty ones too.")
def q1(dice: Callable) -> str:
    """Two boolean masks give their Dice; 1 if both are empty."""
    rng = np.random.default_rng(1)
    pairs = [(rng.random((4, 6, 5)) < share, rng.random((4, 6, 5)) < 0.4) for share in (0.3, 0.6)]
    for a, b in pairs:
        found, exact = float(call(dice, a.copy(), b.copy())), evaluation.dice(a, b)
        if np.isclose(found, exact, rtol=1e-9):
            continue
        both, either, total = (a & b).sum(), (a | b).sum(), a.sum() + b.sum()
        if np.isclose(found, both / either):
            return "That is the Jaccard index: divide by |A| + |B|, not by |A ∪ B|."
        if np.isclose(found, 2 * both / either):
            return "|A| + |B| counts the voxels of each mask; of two booleans, + makes a union."
        if np.isclose(found, both / total):
            return "The numerator is twice the intersection: equal masks have Dice 1."
        if np.isclose(found, (a == b).mean()):
            return "That is the share of equal voxels; the background, which is easy, rules it."
        if np.isclose(found, both / a.sum()) or np.isclose(found, both / b.sum()):
            return "That is precision or recall: divide by the voxels of both masks."
        if np.isclose(found, exact, rtol=0.05):
            return (
                f"{found:.4f} is close to {exact:.4f}: a constant added against 0 / 0 changes "
                "every value. Treat the empty masks by themselves."
            )
        return f"Masks of {a.sum()} and {b.sum()} voxels share {both}: {found:.3f} is not right."
    empty, full = np.zeros((2, 3, 4), bool), np.ones((2, 3, 4), bool)
    with np.errstate(all="ignore"):
        try:
            found = float(call(dice, empty.copy(), empty.copy()))
        except ZeroDivisionError:
            return "Right, but for two empty masks it divides by zero."
        if not np.isfinite(found):
            return f"Right, but for two empty masks it is {found}: one such value spoils a mean."
        if found != 1:
            return f"Two empty masks agree in every voxel: their Dice is 1, yours is {found:g}."
        for a, b in ((empty, full), (full, empty)):
            if (found := float(call(dice, a.copy(), b.copy()))) != 0:
                return f"One mask empty: nothing is shared, the Dice is 0, yours is {found:g}."
    return ""


@question("a miss costs what the volume allows at most, and failing is never rewarded.")
def q2(mean_hd95: Callable) -> str:
    """Hd95 (n,) with infinities, and diagonals (n,), give the mean with misses as diagonals."""
    cases = [
        ([2.0, 3.0, np.inf, 4.0], [90.0, 80.0, 60.0, 70.0]),
        ([2.0, 3.5], [50.0, 60.0]),
        ([np.inf, np.inf, 1.0], [30.0, 50.0, 90.0]),
    ]
    for values, diagonals in (map(np.array, case) for case in cases):
        with np.errstate(all="ignore"):
            found = float(call(mean_hd95, values.copy(), diagonals.copy()))
        missed = np.isinf(values)
        kept = values[~missed]
        if np.isclose(found, np.where(missed, diagonals, values).mean()):
            continue
        about = f"Of {values.tolist()} with diagonals {diagonals.tolist()} you say {found:.2f}."
        if not np.isfinite(found):
            return f"{about} Put something finite in the place of each infinity first."
        if np.isclose(found, kept.mean()):
            return f"{about} The miss is left out: whoever fails on hard neurons looks better."
        if np.isclose(found, kept.sum() / len(values)):
            return f"{about} The miss counts as 0: that is the best score there is."
        if np.isclose(found, diagonals.mean()):
            return f"{about} Those are the diagonals alone; most values are finite, keep them."
        mistakes = {
            "Its own volume's diagonal takes the place of a miss": (
                diagonals.max(),
                diagonals.mean(),
                diagonals.min(),
                diagonals[0],
            ),
            "The largest value seen is no bound for a miss; the diagonal is": (kept.max(),),
        }
        for hint, penalties in mistakes.items():
            if any(np.isclose(found, np.where(missed, p, values).mean()) for p in penalties):
                return f"{about} {hint}."
        return f"{about} Replace each infinity by the diagonal of its volume, then take the mean."
    return ""


@question("what two methods share on a neuron cancels, and four neurons are given their due.")
def q3(interval: Callable) -> str:
    """Scores (n,) of two methods on the same neurons give the 95 % t interval of the mean gain."""
    rng = np.random.default_rng(3)
    n, neurons = 5, rng.normal(0.5, 0.1, 5)
    a = neurons + rng.normal(0.04, 0.02, n)
    b = neurons + rng.normal(0.0, 0.02, n)
    found = call(interval, a.copy(), b.copy())
    if np.shape(found) != (2,):
        return f"Return two numbers, low and high; yours has the shape {np.shape(found)}."
    found = np.asarray(found, float)

    def near(mean: float, half: float) -> bool:
        return bool(np.allclose(found, (mean - half, mean + half), rtol=1e-6))

    gain = a - b
    mean, deviation, t = gain.mean(), gain.std(ddof=1), stats.t.ppf(0.975, n - 1)
    half = t * deviation / np.sqrt(n)
    if near(mean, half):
        return ""
    said = f"You say {found[0]:.3f} to {found[1]:.3f}."
    if found[0] > found[1]:
        return f"{said} The lower end comes first."
    apart = np.sqrt(a.var(ddof=1) + b.var(ddof=1))
    mistakes = [
        (-mean, half, "The gain is that of the first method over the second: a - b."),
        (mean, half * apart / deviation, "Take the spread of the differences, not that of each."),
        (mean, half * np.sqrt(n), "That is the spread of single neurons: divide by √n."),
        (mean, half * np.sqrt(1 - 1 / n), "The standard deviation of a sample has ddof=1."),
        (mean, half * stats.norm.ppf(0.975) / t, "1.96 is for many neurons; take t of n - 1."),
        (mean, half * 1.96 / t, "1.96 is for many neurons; take t of n - 1."),
        (mean, half * stats.t.ppf(0.95, n - 1) / t, "95 % leave 2.5 % at each end: t of 0.975."),
        (mean, half * stats.t.ppf(0.975, n) / t, "n differences have n - 1 degrees of freedom."),
        (a.mean(), t * a.std(ddof=1) / np.sqrt(n), "That is the mean of one method, not the gain."),
    ]
    for centre, width, hint in mistakes:
        if near(centre, width):
            return f"{said} {hint}"
    draws = gain[rng.integers(n, size=(10_000, n))].mean(axis=1)
    if np.abs(found - np.percentile(draws, [2.5, 97.5])).max() < half / 10:
        return f"{said} That is the percentile bootstrap, which is too narrow for {n} neurons."
    return f"{said} Expected the mean gain, plus and minus t · s / √n."
