"""Questions of notebook 05: a cut without a bridge, the order of an SWC file."""

from collections.abc import Callable, Sequence

import numpy as np

from neurolib import tracing
from neurolib.course.exercises import call, question
from neurolib.evaluation import distance_to_tree
from neurolib.swc import Tree


@question(
    "at a turn, both ends point past the gap, and a rule that judges one end alone is blind to it."
)
def q1(place: Sequence[float]) -> str:
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
    sizes = np.diff(tracing.find_foreground(mask & ~cut).start)
    if len(sizes) == 1:
        return "The ball only cuts off an end and leaves one piece: cut where both sides continue."
    log: list = []
    if (tracing.trace(mask & ~cut, log=log).parent < 0).sum() == 1:
        return (
            f"The tracer mended it with a bridge of {log[0].length:.1f} voxels, because the ends "
            "face each other there. Where do they not?"
        )
    if sizes.min() < 100:
        return (
            f"The ball leaves only a stump of {sizes.min()} voxels, too short to show where it "
            "points. Cut where both pieces are long."
        )
    return ""


@question("now you can write any forest as an SWC file.")
def q2(parents_first: Callable) -> str:
    """Rows in an order with parents before children, from the parents (n,), -1 for a root."""
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
            return f"Return a list of rows, as whole numbers {about}."
        if len(order) < n and len(set(order.tolist())) == len(order):
            return f"{n - len(order)} of the rows are missing {about}: there may be several roots."
        if sorted(order.tolist()) != list(range(n)):
            return f"List each row once {about}: the rows in their new order, not their parents."
        place = np.argsort(order)
        child = np.flatnonzero(mixed >= 0)
        late = child[place[mixed[child]] > place[child]]
        if len(child) and len(late) == len(child):
            return f"Children come first {about}: reverse the order."
        if len(late):
            return (
                f"Row {late[0]} comes before its parent, row {mixed[late[0]]} {about}: row "
                "numbers do not tell which node is whose parent."
            )
    return ""
