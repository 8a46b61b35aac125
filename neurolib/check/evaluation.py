"""Questions of notebook 04: Dice and Hd95 where a mask is empty, the interval of a paired gain."""

from collections.abc import Callable

import numpy as np

from neurolib import evaluation
from neurolib.check import call, question

DRAWS = 10_000  # of the bootstrap
CLOSE = 0.05  # of the interval's length: 10,000 draws stay within, 5 to 95 % does not


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


@question("neurons are drawn, not measurements: what two methods share on a neuron cancels.")
def q3(interval: Callable) -> str:
    """Scores (n,) of two methods on the same neurons give the 95 % interval of the mean gain."""
    rng = np.random.default_rng(3)
    neurons = rng.normal(0.5, 0.1, 12)
    a = neurons + rng.normal(0.04, 0.02, 12)
    b = neurons + rng.normal(0.0, 0.02, 12)
    found = call(interval, a.copy(), b.copy())
    if np.shape(found) != (2,):
        return f"Return two numbers, low and high; yours has the shape {np.shape(found)}."
    found = np.asarray(found, float)

    def near(low: float, high: float) -> bool:
        return bool(np.abs(found - (low, high)).max() < CLOSE * (high - low))

    gain = a - b
    draw = rng.integers(12, size=(2, DRAWS, 12))
    means = gain[draw[0]].mean(axis=1)
    if near(*np.percentile(means, [2.5, 97.5])):
        return ""
    said = f"You say {found[0]:.3f} to {found[1]:.3f}."
    if found[0] > found[1]:
        return f"{said} The lower end comes first."
    if np.ptp(found) < 1e-9:
        return f"{said} All draws are alike: draw with replacement, and as many as there are."
    apart = a[draw[0]].mean(axis=1) - b[draw[1]].mean(axis=1)
    mistakes = [
        (-means, [2.5, 97.5], "The gain is that of the first method over the second: a - b."),
        (apart, [2.5, 97.5], "You draw for each method by itself: draw neurons, take both scores."),
        (gain, [2.5, 97.5], "That is the spread of single neurons: take the mean of each draw."),
        (means, [5, 95], "95 % of the means lie between the percentiles 2.5 and 97.5."),
        (means, [0, 100], "Those are the extremes of all draws: take percentiles 2.5 and 97.5."),
        (a[draw[0]].mean(axis=1), [2.5, 97.5], "That is the mean of one method, not the gain."),
    ]
    for values, levels, hint in mistakes:
        if near(*np.percentile(values, levels)):
            return f"{said} {hint}"
    return f"{said} Draw n of the n differences with replacement, {DRAWS:,} times; sort the means."
