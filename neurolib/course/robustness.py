"""Where tracing fails: masks made worse step by step, traced, and compared with the reference."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

from neurolib.course.adapters import trace_kimimaro, trace_skeleton
from neurolib.errors import SettingsError, VolumeError
from neurolib.evaluation import compare, distance_to_tree, in_unit
from neurolib.swc import Tree, densify
from neurolib.tracing import NOTHING, trace

GAP = 3.5  # voxels: radius of a ball cut out of a neurite, so that a cut is 7 long
SPECK = (1.8, 3.2)  # voxels: radii of specks; balls of 27 to 123 voxels
CLEAR = 8.0  # voxels from the centre of a speck to the neurite
BLUR = 1.5  # voxels: the blur under which thresholds are compared

# What is done to the mask: the name of its amount, and amounts from harmless to hopeless.
DAMAGE = {
    "cuts": ("cuts", (0, 5, 10, 20, 40)),
    "specks": ("specks", (0, 10, 20, 40)),
    "noise": ("share of voxels lost", (0.0, 0.2, 0.4, 0.6)),
    "blur": ("σ, voxels", (0.0, 1.0, 1.5, 1.7)),
    "threshold": ("threshold", (0.1, 0.3, 0.5, 0.6)),
}


def installed() -> dict[str, Callable[..., Tree]]:
    """The tracers that can be compared here: ours, plain thinning, and kimimaro if it is there."""
    found = {"neurolib": trace, "thinning": trace_skeleton}
    if importlib.util.find_spec("kimimaro"):
        found["kimimaro"] = trace_kimimaro
    return found


def degrade(
    mask: np.ndarray, tree: Tree, kind: str, amount: float, seed: int = 0
) -> tuple[np.ndarray, float]:
    """A mask made worse in one way, as a probability, and the threshold to trace it at.

    ===========  =====================================================  ==================
    kind         what is done                                           amount
    ===========  =====================================================  ==================
    cuts         balls of radius 3.5 voxels are cut out along the tree  how many
    specks       balls of radius 1.8 to 3.2 are added off the tree      how many
    noise        voxels of the mask are lost, each by itself            share lost, 0 to 1
    blur         a Gaussian, as of a wider point spread                 σ in voxels
    threshold    a Gaussian of σ = 1.5, cut at other values than 0.5    threshold, 0 to 1
    ===========  =====================================================  ==================

    Parameters
    ----------
    mask : (z, y, x) bool
        A faultless one: the target of `tree`.
    tree : Tree
    kind, amount : str, float
    seed : int
        A larger amount with the same seed adds to what a smaller one does.

    Returns
    -------
    probability : (z, y, x), bool or float32
    threshold : float

    Raises
    ------
    SettingsError
        If there is no such damage.
    """
    if kind not in DAMAGE:
        raise SettingsError(f"damage {kind!r}: expected one of {', '.join(DAMAGE)}")
    rng = np.random.default_rng(seed)
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
    while made < amount:
        centre, radius = rng.random(3) * mask.shape, rng.uniform(*SPECK)
        if near.query(centre)[0] > CLEAR:
            _ball(damaged, centre, radius, True)
            made += 1
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
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    damage: Mapping[str, Sequence[float]] | None = None,
    seed: int = 0,
) -> list[dict]:
    """Trace a mask under growing damage of every kind, with several tracers.

    Parameters
    ----------
    mask : (z, y, x) bool
    tree : Tree
        The reference, in voxels of `mask`.
    tracers : mapping of name to function
        Called like `neurolib.tracing.trace`, as those of `neurolib.course.adapters` are.
    spacing : (dz, dy, dx)
    damage : mapping of kind to amounts, optional
        Those of `DAMAGE` by default.
    seed : int
        Same seed, same rows.

    Returns
    -------
    list of dict
        ``damage``, ``amount``, ``tracer``, and what `neurolib.evaluation.compare` gives: ESA, DSA,
        PDS, precision, recall (of length, within 2 voxels) and trees, in voxels of the finest axis.
        Where nothing is left to trace, recall is 0, distances are infinite and the rest is NaN.
    """
    rows = []
    for kind, amounts in (damage or {k: amounts for k, (_, amounts) in DAMAGE.items()}).items():
        for amount in amounts:
            probability, threshold = degrade(mask, tree, kind, amount, seed)
            for name, tracer in tracers.items():
                try:
                    traced = tracer(probability, spacing, threshold=threshold)
                except VolumeError:
                    traced = NOTHING
                found = compare(traced, tree, in_unit(spacing, "voxels"))
                rows.append({"damage": kind, "amount": amount, "tracer": name, **found})
    return rows


def agreement(
    tree: Tree,
    reference: Tree,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    threshold: float = 2.0,
) -> dict[str, Tree]:
    """What of two trees is near the other: the edges that are correct, false and missed.

    Parameters
    ----------
    tree, reference : Tree
        In the same voxels; edges of a voxel or two, as tracers make them.
    spacing : (dz, dy, dx)
    threshold : float
        Distance, in voxels of the finest axis, up to which the middle of an edge is near the other
        tree.

    Returns
    -------
    dict
        ``correct`` and ``false``, parts of `tree`, and ``missed``, a part of `reference`. All nodes
        are kept; those whose edge belongs elsewhere are roots.
    """
    scale = np.array(in_unit(spacing, "voxels"))[::-1]
    near, far = _parts(tree, reference, scale, threshold)
    return {"correct": near, "false": far, "missed": _parts(reference, tree, scale, threshold)[1]}


def _parts(tree: Tree, other: Tree, scale: np.ndarray, threshold: float) -> tuple[Tree, Tree]:
    child = np.flatnonzero(tree.parent >= 0)
    middle = (tree.xyz[child] + tree.xyz[tree.parent[child]]) / 2 * scale
    near = np.zeros(len(tree.parent), bool)
    near[child] = distance_to_tree(middle, replace(other, xyz=other.xyz * scale)) <= threshold
    return tuple(
        replace(tree, parent=np.where(chosen, tree.parent, -1)) for chosen in (near, ~near)
    )
