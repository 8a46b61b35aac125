"""Where tracing fails: damage masks step by step, trace them, and compare with the reference."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from scipy import ndimage, sparse
from scipy.sparse import csgraph
from scipy.spatial import KDTree

from neurolib.errors import NeurolibWarning, SettingsError, VolumeError
from neurolib.evaluation import compare, distance_to_tree, in_unit, skeleton
from neurolib.swc import Tree, Zyx, densify, edges
from neurolib.tracing import (
    EMPTY_TREE,
    HALF_VOXEL,
    UNDEFINED,
    find_foreground,
    measure_radius,
    rooted,
)

# In voxels.
GAP = 3.5  # radius of a ball cut out of a neurite; a cut is 7 long
SPECK = (1.8, 3.2)  # radii of specks, balls of about 24 to 137 voxels; the border cuts some
CLEAR = 8.0  # smallest distance from the centre of a speck to the neurite
TRIES = 500  # random places to try per speck before giving up
NEAR = 2.0  # largest distance between trees that agree
BLUR = 1.5  # σ of the blur for the damage "threshold"

# Kinds of damage: the name of the amount, and amounts from harmless to hopeless.
DAMAGE = {
    "cuts": ("cuts", (0, 5, 10, 20, 40)),
    "specks": ("specks", (0, 10, 20, 40)),
    "noise": ("share of voxels lost", (0.0, 0.2, 0.4, 0.6)),
    "blur": ("σ, voxels", (0.0, 1.0, 1.5, 1.7)),
    "threshold": ("threshold", (0.1, 0.3, 0.5, 0.6)),
}


def trace_skeleton(
    probability: np.ndarray,
    spacing: Zyx = (1.0, 1.0, 1.0),
    threshold: float = 0.5,
    min_size: int = 20,
) -> Tree:
    """The simplest tracer: join the voxels of scikit-image's thinning (Lee et al. 1994) into trees.

    A minimum spanning tree over neighbouring voxels opens loops. Nothing is pruned, no gap is
    closed, and thinning ignores the spacing (`neurolib.evaluation.skeleton`). Its parameters and
    result are as in `neurolib.tracing.trace`; each root is an end of its tree.
    """
    foreground = find_foreground(probability, spacing, threshold, min_size)
    mask = np.zeros(foreground.shape, bool)
    mask[tuple(foreground.voxels.T)] = True
    thin = find_foreground(skeleton(mask), spacing, min_size=1)
    radius = measure_radius(foreground, thin.points) + HALF_VOXEL
    radius /= np.sqrt(thin.scale[1] * thin.scale[2])
    n, (one, other) = len(thin.points), sparse.triu(thin.neighbours).nonzero()
    length = np.linalg.norm(thin.points[one] - thin.points[other], axis=1)
    graph = csgraph.minimum_spanning_tree(sparse.csr_array((length, (one, other)), shape=(n, n)))
    _, group = csgraph.connected_components(graph, directed=False)
    order = np.lexsort([np.bincount(np.concatenate(graph.nonzero()), minlength=n), group])
    roots = order[np.flatnonzero(np.diff(group[order], prepend=-1))]
    xyz = (thin.points / thin.scale)[:, ::-1].astype(float)
    tree = Tree(xyz, radius, np.full(n, UNDEFINED), np.full(n, -1))
    return rooted(tree, np.stack(graph.nonzero()), roots)


def degrade(mask: np.ndarray, tree: Tree, kind: str, amount: float) -> tuple[np.ndarray, float]:
    """Damage a mask in one way; return it as a probability, with the threshold to trace it at.

    ===========  =====================================================  ==================
    kind         damage                                                 amount
    ===========  =====================================================  ==================
    cuts         balls of radius 3.5 voxels cut out along the tree      number
    specks       balls of radius 1.8 to 3.2 added off the tree          number
    noise        voxels of the mask lost independently                  share lost, 0 to 1
    blur         a Gaussian, like a wider point spread                  σ in voxels
    threshold    a Gaussian of σ = 1.5, cut at other values than 0.5    threshold, 0 to 1
    ===========  =====================================================  ==================

    `mask` (z, y, x) is perfect, the target of `tree`. A larger amount adds to the damage of a
    smaller one. If there is no room for all specks, a `NeurolibWarning` says how many there are.
    """
    if kind not in DAMAGE:
        raise SettingsError(f"damage {kind!r}: expected one of {', '.join(DAMAGE)}")
    rng = np.random.default_rng(0)
    if kind in ("blur", "threshold"):
        sigma = amount if kind == "blur" else BLUR
        blurred = ndimage.gaussian_filter(mask.astype(np.float32), sigma)
        return np.clip(blurred, 0, 1), 0.5 if kind == "blur" else amount
    if kind == "noise":
        return mask & (rng.random(mask.shape) >= amount), 0.5
    damaged = mask.copy()
    points = densify(tree, 1.0)[0][:, ::-1]
    if kind == "cuts":
        for centre in rng.permutation(points)[: int(amount)]:
            _ball(damaged, centre, GAP, False)
        return damaged, 0.5
    near, made = KDTree(points), 0
    for _ in range(int(TRIES * amount)):
        if made >= amount:
            break
        centre, radius = rng.random(3) * mask.shape, rng.uniform(*SPECK)
        if near.query(centre)[0] > CLEAR:
            _ball(damaged, centre, radius, True)
            made += 1
    if made < amount:
        told = f"only {made} of {amount:g} specks found a place {CLEAR:g} voxels from the neurite"
        warnings.warn(told, NeurolibWarning, stacklevel=2)
    return damaged, 0.5


def _ball(mask: np.ndarray, centre: np.ndarray, radius: float, value: bool) -> None:
    low = np.maximum(np.ceil(centre - radius), 0).astype(int)
    high = np.minimum(np.floor(centre + radius) + 1, mask.shape).astype(int)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    grid = np.ogrid[box]
    square = sum((axis - c) ** 2 for axis, c in zip(grid, centre, strict=True))
    mask[box][square <= radius**2] = value


def robustness(
    mask: np.ndarray,
    tree: Tree,
    tracers: Mapping[str, Callable[..., Tree]],
    spacing: Zyx = (1.0, 1.0, 1.0),
    damage: Mapping[str, Sequence[float]] | None = None,
) -> list[dict]:
    """Trace a mask (z, y, x) under growing damage of every kind, with several tracers.

    The reference `tree` is in voxels of the mask. `tracers` maps names to functions that are called
    like `neurolib.tracing.trace`, `damage` maps kinds to amounts (by default those of `DAMAGE`).

    Returns
    -------
    list of dict
        ``damage``, ``amount``, ``tracer``, and what `neurolib.evaluation.compare` gives, in voxels
        of the finest axis.
    """
    rows = []
    for kind, amounts in (damage or {k: amounts for k, (_, amounts) in DAMAGE.items()}).items():
        for amount in amounts:
            probability, threshold = degrade(mask, tree, kind, amount)
            for name, tracer in tracers.items():
                try:
                    traced = tracer(probability, spacing, threshold=threshold)
                except VolumeError:
                    traced = EMPTY_TREE
                scores = compare(traced, tree, in_unit(spacing, "voxels"))
                rows.append({"damage": kind, "amount": amount, "tracer": name, **scores})
    return rows


def agreement(tree: Tree, reference: Tree, spacing: Zyx = (1.0, 1.0, 1.0)) -> dict[str, Tree]:
    """Tell which edges of two trees are near the other tree: correct, false and missed edges.

    Returns
    -------
    dict
        ``correct`` and ``false``, parts of `tree`, and ``missed``, a part of `reference`. An edge
        is near if its middle is at most `NEAR` voxels (of the finest axis) from the other tree.
        Each part keeps all nodes; those without their edge become roots.
    """
    scale = np.array(in_unit(spacing, "voxels"))[::-1]
    near, far = _parts(tree, reference, scale)
    return {"correct": near, "false": far, "missed": _parts(reference, tree, scale)[1]}


def _parts(tree: Tree, other: Tree, scale: np.ndarray) -> tuple[Tree, Tree]:
    child, parent = edges(tree)
    middle = (tree.xyz[child] + tree.xyz[parent]) / 2 * scale
    near = np.zeros(len(tree.parent), bool)
    near[child] = distance_to_tree(middle, replace(other, xyz=other.xyz * scale)) <= NEAR
    return tuple(replace(tree, parent=np.where(some, tree.parent, -1)) for some in (near, ~near))
