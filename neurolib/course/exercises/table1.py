"""Questions of notebook 06: pairing neurons, and what few neurons can show at all."""

import math
from collections.abc import Callable

import numpy as np

from neurolib.course.exercises import call, question


@question("each neuron is compared with itself, whatever else was measured.")
def q1(gains: Callable) -> str:
    """Two mappings of neuron to Dice give the gain on each neuron that both have, as a list."""
    draw = np.random.default_rng(6)
    for _ in range(20):
        names = [f"neuron {i}" for i in draw.permutation(8)]
        ours = dict(zip(names[:6], draw.random(6).round(3), strict=True))
        theirs = dict(zip(draw.permutation(names[2:]).tolist(), draw.random(6), strict=True))
        exact = [ours[name] - theirs[name] for name in ours if name in theirs]
        try:
            found = call(gains, dict(ours), dict(theirs))
        except KeyError as error:
            return f"{error} was measured with one of the two networks only: leave it out."
        if np.ndim(found) == 0:
            return "One gain per neuron is expected, as a list; yours is a single number."
        if hint := _gain_hint(sorted(found), sorted(exact), ours, theirs):
            return hint
    return ""


def _gain_hint(found: list, exact: list, ours: dict, theirs: dict) -> str:
    if np.allclose(found, [-g for g in exact[::-1]]) if len(found) == len(exact) else False:
        return "A gain is positive where the new network is better: the other sign."
    by_order = sorted(a - b for a, b in zip(ours.values(), theirs.values(), strict=True))
    if len(found) == len(by_order) and np.allclose(found, by_order):
        return (
            "You pair by place in the list: the first neuron of one with another's first. Pair by "
            "name."
        )
    if len(found) != len(exact):
        return (
            f"{len(exact)} neurons were measured with both networks; you give {len(found)} gains."
        )
    return "" if np.allclose(found, exact) else "These are not the differences on equal neurons."


@question("six neurons at least, all of one sign, before p can be below 0.05.")
def q2(smallest_p: Callable) -> str:
    """The smallest two-sided p that flipping the signs of n differences can give."""
    for n in (4, 1, 2, 3, 6, 10):
        found = float(call(smallest_p, n))
        mistakes = [
            (2.0**-n, "That is one-sided: all signs turned round are as extreme as none."),
            (
                1 / math.factorial(n),
                "Signs are flipped, not neurons exchanged: 2ⁿ patterns, not n!.",
            ),
            (2 / n, "Each of n signs is + or -: how many patterns is that?"),
            (1 / n, "Each of n signs is + or -: how many patterns is that?"),
            (2.0 ** (n - 1), "That is 1/p: the share of patterns is asked for, not their number."),
            (0.05, "0.05 is what p is compared with; what can p be at best?"),
        ]
        if math.isclose(found, 2.0 ** (1 - n)):
            continue
        hints = [hint for wrong, hint in mistakes if math.isclose(found, wrong)]
        return hints[0] if hints else f"For {n} neurons {found:g} is not the smallest p."
    return ""
