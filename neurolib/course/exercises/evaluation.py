"""Questions of notebook 04: beat a threshold, fool metrics, misses, a paired gain."""

from collections.abc import Callable

import numpy as np
from scipy import stats

from neurolib import blocking, evaluation
from neurolib.course.exercises import call, question, recognise
from neurolib.data.datasets import load_dataset


@question("five lines beat the best threshold there is, and a network must beat them.")
def q1(segment: Callable) -> str:
    """A function from an image in [0, 1] to a mask beats every threshold by a Dice of 0.05."""
    sample = blocking.read_sample(load_dataset("synthetic")[0])
    mask = np.asarray(call(segment, sample.image.copy()))
    if mask.shape != sample.image.shape or mask.dtype != bool:
        return (
            f"Return a mask, True or False for every voxel of {sample.image.shape}; yours is "
            f"{mask.dtype} {mask.shape}."
        )
    cuts = np.linspace(0.05, 1, 39)
    best = max(evaluation.dice(sample.image >= cut, sample.mask) for cut in cuts)
    own = evaluation.dice(mask, sample.mask)
    said = f"Your Dice is {own:.3f}, the best threshold's {best:.3f}. "
    if own >= best + 0.05:
        print(said)
        return ""
    if mask.mean() > 10 * sample.mask.mean():
        return (
            f"{said}You mark {mask.mean():.1%} of the volume; {sample.mask.mean():.1%} is neurite."
        )
    if mask.any() and sample.image[mask].min() > sample.image[~mask].max():
        return f"{said}That is a threshold: look at what lies around a voxel, too."
    return f"{said}A neurite is brighter than its surroundings, and long: use both."


@question("Dice counts voxels and Hd95 measures surfaces: each has a mask that fools it.")
def q2(fool: Callable) -> str:
    """A true mask gives a mask of Dice 0.9 and Hd95 20, and one of Dice 0.6 and Hd95 2 voxels."""
    truth = np.zeros((40, 60, 80), bool)
    truth[10:14, 20:24, 5:75] = True
    masks = call(fool, truth.copy())
    if not isinstance(masks, tuple | list) or len(masks) != 2:
        return "Return two masks: one that fools Dice, one that fools Hd95."
    scores = []
    for mask in map(np.asarray, masks):
        if mask.shape != truth.shape or mask.dtype != bool:
            return f"Expected boolean masks {truth.shape}; one is {mask.dtype} {mask.shape}."
        scores.append((evaluation.dice(mask, truth), evaluation.hd95(mask, truth)))
    (high, far), (low, near) = scores
    if high < 0.9:
        return f"The first mask has Dice {high:.2f}: it must be at least 0.9, so add little."
    if far < 20:
        return (
            f"The first mask has Dice {high:.2f} and Hd95 {far:.1f}; it must be at least 20. More "
            "than a twentieth of its *surface* must be far away: single voxels have much surface."
        )
    if near > 2:
        return f"The second mask has Hd95 {near:.1f}; it must be at most 2: stay near the truth."
    if low > 0.6:
        return f"The second mask has Dice {low:.2f}; it must be at most 0.6: make it much thicker."
    return ""


@question("a miss costs the most that its volume allows, and failing is never rewarded.")
def q3(mean_hd95: Callable) -> str:
    """Hd95 (n,) with infinities, and diagonals (n,), give the mean with a diagonal per miss."""
    cases = [
        ([2.0, 3.0, np.inf, 4.0], [90.0, 80.0, 60.0, 70.0]),
        ([2.0, 3.5], [50.0, 60.0]),
        ([np.inf, np.inf, 1.0], [30.0, 50.0, 90.0]),
    ]
    for values, diagonals in (map(np.array, case) for case in cases):
        with np.errstate(all="ignore"):
            answer = float(call(mean_hd95, values.copy(), diagonals.copy()))
        kept = values[np.isfinite(values)]
        if np.isclose(answer, _mean(values, diagonals)):
            continue
        about = f"For {values.tolist()} and diagonals {diagonals.tolist()} you return {answer:.2f}."
        if not np.isfinite(answer):
            return f"{about} First replace each infinity with something finite."
        others = (diagonals.max(), diagonals.mean(), diagonals.min(), diagonals[0])
        mistakes = [
            (kept.mean(), "The miss is left out: networks that fail on hard neurons look better."),
            (_mean(values, 0), "The miss counts as 0: that is the best score there is."),
            (diagonals.mean(), "That is the mean of the diagonals alone; keep the finite values."),
            *((_mean(values, o), "Its own volume's diagonal must replace a miss.") for o in others),
            (_mean(values, kept.max()), "The largest value seen is no bound; the diagonal is."),
        ]
        remedy = "Replace each infinity with the diagonal of its volume, then take the mean."
        return f"{about} {recognise(answer, mistakes, 1e-5) or remedy}"
    return ""


def _mean(values: np.ndarray, penalty: np.ndarray | float) -> float:
    """The mean, with infinite values replaced."""
    return float(np.where(np.isinf(values), penalty, values).mean())


@question("what two methods share on a neuron cancels, and t allows for having few neurons.")
def q4(interval: Callable) -> str:
    """Scores (n,) of two methods on the same neurons give the 95 % t interval of the mean gain."""
    rng = np.random.default_rng(3)
    n, neurons = 5, rng.normal(0.5, 0.1, 5)
    a = neurons + rng.normal(0.04, 0.02, n)
    b = neurons + rng.normal(0.0, 0.02, n)
    answer = call(interval, a.copy(), b.copy())
    if np.shape(answer) != (2,):
        return f"Return two numbers, low and high; yours has the shape {np.shape(answer)}."
    answer = np.asarray(answer, float)
    gain = a - b
    mean, deviation, t = gain.mean(), gain.std(ddof=1), stats.t.ppf(0.975, n - 1)
    half = t * deviation / np.sqrt(n)
    if np.allclose(answer, (mean - half, mean + half), rtol=1e-6):
        return ""
    said = f"You return {answer[0]:.3f} to {answer[1]:.3f}."
    if answer[0] > answer[1]:
        return f"{said} The lower end comes first."
    apart = np.sqrt(a.var(ddof=1) + b.var(ddof=1))
    mistakes = [
        (-mean, half, "The gain is that of the first method over the second: a - b."),
        (mean, half * apart / deviation, "Take the spread of the differences, not that of each."),
        (mean, half * np.sqrt(n), "That is the spread of single neurons: divide by √n."),
        (mean, half * np.sqrt(1 - 1 / n), "The standard deviation of a sample needs ddof=1."),
        (mean, half * stats.norm.ppf(0.975) / t, "1.96 is for many neurons; take t of n - 1."),
        (mean, half * 1.96 / t, "1.96 is for many neurons; take t of n - 1."),
        (mean, half * stats.t.ppf(0.95, n - 1) / t, "95 % leaves 2.5 % at each end: t of 0.975."),
        (mean, half * stats.t.ppf(0.975, n) / t, "n differences have n - 1 degrees of freedom."),
        (a.mean(), t * a.std(ddof=1) / np.sqrt(n), "That is the mean of one method, not the gain."),
    ]
    intervals = (((centre - w, centre + w), hint) for centre, w, hint in mistakes)
    if hint := recognise(answer, intervals, 1e-6):
        return f"{said} {hint}"
    draws = gain[rng.integers(n, size=(10_000, n))].mean(axis=1)
    if np.abs(answer - np.percentile(draws, [2.5, 97.5])).max() < half / 10:
        return f"{said} That is the percentile bootstrap, which is too narrow for {n} neurons."
    return f"{said} Expected the mean gain, plus and minus t · s / √n."
