"""Questions of notebook 06: pair neurons, and find out how many are needed."""

from collections.abc import Callable

import numpy as np
from scipy import stats

from neurolib.course.exercises import call, question, recognise


@question("each neuron is compared with itself, whatever else was measured.")
def q1(gains: Callable) -> str:
    """List of gains on the neurons that two mappings of neuron to Dice have in common."""
    draw = np.random.default_rng(6)
    for _ in range(20):
        names = [f"neuron {i}" for i in draw.permutation(8)]
        ours = dict(zip(names[:6], draw.random(6).round(3), strict=True))
        theirs = dict(zip(draw.permutation(names[2:]).tolist(), draw.random(6), strict=True))
        exact = [ours[name] - theirs[name] for name in ours if name in theirs]
        try:
            answer = call(gains, dict(ours), dict(theirs))
        except KeyError as error:
            return f"{error} was measured with only one of the two networks: leave it out."
        if np.ndim(answer) == 0:
            kind = "dictionary" if isinstance(answer, dict) else "single number"
            return f"One gain per neuron is expected, as a list; yours is a {kind}."
        if hint := _gain_hint(sorted(answer), sorted(exact), ours, theirs):
            return hint
    return ""


def _gain_hint(answer: list, exact: list, ours: dict, theirs: dict) -> str:
    if len(answer) == len(exact) and np.allclose(answer, [-g for g in exact[::-1]]):
        return "A gain is positive where `ours` is better: yours have the other sign."
    by_order = sorted(a - b for a, b in zip(ours.values(), theirs.values(), strict=True))
    if len(answer) == len(by_order) and np.allclose(answer, by_order):
        return (
            "You pair by position: the first neuron of one network with the first of the other, "
            "which may be a different neuron. Pair by name."
        )
    if len(answer) != len(exact):
        return (
            f"{len(exact)} neurons were measured with both networks; you gave {len(answer)} gains."
        )
    return "" if np.allclose(answer, exact) else "These are not the differences, neuron by neuron."


@question("the spread of the gains decides, and few neurons cost twice: in t and in 1/√n.")
def q2(needed: Callable) -> str:
    """Smallest number of neurons that can show a gain, from its mean and standard deviation."""
    for gain, deviation in [(0.036, 0.019), (0.05, 0.1), (0.02, 0.05)]:
        answer = call(needed, gain, deviation)
        about = f"Gain {gain}, deviation {deviation}: {answer}. "
        if answer != int(answer):
            return f"{about}The number of neurons must be whole."

        def half(n: int, level: float = 0.975, sd: float = deviation) -> float:
            return float(stats.t.ppf(level, n - 1) * sd / np.sqrt(n))

        exact = next(n for n in range(2, 10_000) if half(n) < gain)
        if answer == exact:
            continue
        normal = np.ceil((stats.norm.ppf(0.975) * deviation / gain) ** 2)
        one_sided = next(n for n in range(2, 10_000) if half(n, 0.95) < gain)
        mistakes = [
            (normal, "That uses 1.96 for t, which is right only for many neurons."),
            (one_sided, "A 95 % interval leaves 2.5 % at each end."),
        ]
        if hint := recognise(answer, mistakes, 0):
            return about + hint
        if answer < 2:
            return f"{about}One neuron has no interval."
        end = "below" if half(int(answer)) > gain else "above"
        return f"{about}With that many, the lower end is {gain - half(int(answer)):+.3f}, {end} 0."
    return ""
