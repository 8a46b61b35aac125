"""Questions of notebook 05: bridges, a cut without a bridge, the order of an SWC file."""

from collections.abc import Callable, Sequence

import numpy as np

from neurolib import tracing
from neurolib.course.exercises import call, question, recognise
from neurolib.evaluation import distance_to_tree
from neurolib.swc import Tree

LONGEST, ANGLE = 15.0, 60.0  # of a bridge, in voxels and degrees


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@question("near, and each end points at the other: that is worth a guess.")
def q1(justified: Callable) -> str:
    """Two ends and their outward steps, each (3,) in voxels, give whether to bridge."""
    rng = np.random.default_rng(2)
    cases = []
    for _ in range(400):
        a, out_a, out_b = rng.uniform(0, 50, 3), *rng.normal(size=(2, 3)) * [[3.0], [9.0]]
        cases.append((a, out_a, a + rng.normal(size=3) * 7, out_b))
    answers = [call(justified, *(part.copy() for part in case)) for case in cases]
    if not all(isinstance(answer, bool | np.bool_) for answer in answers):
        return f"Give True or False; you gave {answers[0]!r}."
    least = np.cos(np.radians(ANGLE))
    short = np.array([np.linalg.norm(b - a) <= LONGEST for a, _, b, _ in cases])
    faces = np.array([_cosine(o, b - a) >= least for a, o, b, _ in cases])
    faced = np.array([_cosine(o, a - b) >= least for a, _, b, o in cases])
    exact = short & faces & faced
    # The pattern of all answers reveals the mistake.
    same_way = np.array([_cosine(o, b - a) >= 0.5 for a, _, b, o in cases])
    away = np.array([_cosine(o, a - b) >= 0.5 for a, o, b, _ in cases])
    either = (faces | away) & (faced | same_way)
    plain = np.array([p @ (b - a) >= 0.5 and q @ (a - b) >= 0.5 for a, p, b, q in cases])
    wide = np.array([_cosine(p, b - a) >= 0 <= _cosine(q, a - b) for a, p, b, q in cases])
    mistakes = [
        (short, "Near is not enough: parallel neurites are near, too. Look where the ends point."),
        (faces & faced, f"Two ends 100 voxels apart may point at each other; allow {LONGEST:g}."),
        (short & faces, "The second end has a direction, too: it must point back at the first."),
        (short & faced, "The first end has a direction, too: it must point at the second."),
        (short & faces & same_way, "Seen from b the way to a is a - b, not b - a."),
        (short & away & same_way, "You accept ends that point away from each other: turn the gap."),
        (short & either, "An end that points away is no candidate: take no absolute value."),
        (short & plain, "A scalar product is a cosine only of steps of length 1: divide by both."),
        (short & wide, f"Within 90 degrees is half of all directions; ask for {ANGLE:g}."),
        (short & (faces | faced), "Both ends must point at the other, not one of them."),
        (~exact, "That is the opposite."),
    ]
    if np.array_equal(answers, exact):
        return ""
    if hint := recognise(answers, mistakes):
        return hint
    k = int(np.argmax(np.array(answers) != exact))
    a, p, b, q = cases[k]
    angles = [np.degrees(np.arccos(c)) for c in (_cosine(p, b - a), _cosine(q, a - b))]
    return (
        f"Ends {np.linalg.norm(b - a):.1f} voxels apart, {angles[0]:.0f} and {angles[1]:.0f} "
        f"degrees off the way to each other: {bool(exact[k])} is expected."
    )


@question("at a turn both ends point past the gap, and no rule about single ends can tell.")
def q2(place: Sequence[float]) -> str:
    """Centre (x, y) of a ball of radius 4 whose removal splits the turning neurite for good."""
    if np.shape(place) != (2,):
        return f"Give two numbers, x and y; you gave {place!r}."
    corners = np.array([[10, 10, 8], [60, 10, 8], [60, 60, 8]], float)
    neurite = Tree(corners, np.full(3, 2.0), np.zeros(3, int), np.array([-1, 0, 1]))
    grid = np.moveaxis(np.indices((17, 71, 71)), 0, -1)[..., ::-1].astype(float)
    away = distance_to_tree(grid.reshape(-1, 3), neurite).reshape(grid.shape[:3])
    mask = away <= 2
    cut = np.linalg.norm(grid - [*map(float, place), 8], axis=-1) <= 4
    if not (mask & cut).any():
        return f"At {tuple(place)} there is no neurite to cut."
    before, after = (tracing.find_foreground(m).component.max() for m in (mask, mask & ~cut))
    if after == before:
        return "The ball takes an end away and leaves one piece: cut where there is more behind it."
    log: list = []
    if (tracing.trace(mask & ~cut, log=log).parent < 0).sum() == 1:
        return (
            f"The tracer mended it with a bridge of {log[0].length:.1f} voxels: there the ends "
            "face each other. Where do they not?"
        )
    return ""


@question("any forest can be written as an SWC file now.")
def q3(parents_first: Callable) -> str:
    """Parents (n,), -1 for a root, give the rows with every parent before its children."""
    rng = np.random.default_rng(3)
    for n, roots in [(6, 1), (1, 1), (12, 3), (200, 4), (3000, 1)]:
        parent = np.concatenate([np.full(roots, -1), np.arange(n - roots)])
        if n < 1000:  # the last one is a chain, too deep for recursion
            parent[roots:] = [rng.integers(0, k) for k in range(roots, n)]
        shuffled = rng.permutation(n)
        mixed = np.empty(n, int)
        mixed[shuffled] = np.where(parent < 0, -1, shuffled[parent])
        order = np.asarray(call(parents_first, mixed.copy()))
        about = f"({n} nodes, {roots} {'root' if roots == 1 else 'roots'})"
        if order.ndim != 1 or order.dtype.kind not in "iu":
            return f"Give a list of rows, whole numbers {about}."
        if len(order) < n and len(set(order.tolist())) == len(order):
            return f"{n - len(order)} of the rows are missing {about}: there may be several roots."
        if sorted(order.tolist()) != list(range(n)):
            return f"Each row once {about}: give the rows in their new order, not their parents."
        place = np.argsort(order)
        child = np.flatnonzero(mixed >= 0)
        late = child[place[mixed[child]] > place[child]]
        if len(child) and len(late) == len(child):
            return f"Children come first {about}: turn the order round."
        if len(late):
            return (
                f"Row {late[0]} comes before its parent, row {mixed[late[0]]} {about}: numbers say "
                "nothing about who is whose parent."
            )
    return ""
