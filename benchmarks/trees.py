"""Benchmarks on trees: tracing, distance of two trees, reading SWC."""

import functools
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from measure import Scale, compete, installed, missing, scene, size
from scipy.spatial import KDTree

from neurolib import evaluation, tracing
from neurolib.errors import VolumeError
from neurolib.files import write_text
from neurolib.swc import Tree, edges, read_swc, write_swc

# As in our tracer: kimimaro's defaults are in nanometres and would drop every branch.
INVALIDATION = {"scale": tracing.EXPLAINED_SCALE, "const": tracing.EXPLAINED_MARGIN}
# Points that the brute-force distance compares with all edges at a time.
CHUNK = 500


def as_tree(skeleton, scale: tuple[float, float, float] = (1, 1, 1)) -> Tree:
    """A skeleton of kimimaro, whose columns are the array's axes times `scale`, in voxels."""
    with tempfile.TemporaryDirectory() as folder:
        tree = read_swc(write_text(Path(folder) / "skeleton.swc", skeleton.to_swc()))
    return replace(tree, xyz=(tree.xyz / scale)[:, ::-1])


def trace_kimimaro(
    probability: np.ndarray,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    threshold: float = 0.5,
    min_size: int = 20,
    bridge: float = 15.0,
) -> Tree:
    """kimimaro (Silversmith et al., 2021) with the parameters of `neurolib.tracing.trace`.

    The study of robustness can use it: `robustness(mask, tree, {"kimimaro": trace_kimimaro})`. It
    joins the nearest pieces up to `bridge` apart in any direction. Radii stay in kimimaro's unit.
    """
    import kimimaro

    scale = evaluation.in_unit(spacing, "voxels")
    options = {"anisotropy": scale, "dust_threshold": min_size, "progress": False}
    mask = (probability >= threshold).astype(np.uint8)
    skeletons = kimimaro.skeletonize(mask, INVALIDATION, **options)
    if not skeletons:
        raise VolumeError("kimimaro found nothing to trace; lower the threshold or min_size")
    skeleton = kimimaro.postprocess(
        skeletons[1], dust_threshold=0, tick_threshold=tracing.BRANCH_MARGIN
    )
    return as_tree(kimimaro.join_close_components(skeleton, radius=bridge), scale)


def bench_tracing(scale: Scale, repeats: int) -> list[dict]:
    """Mask to tree; a skeleton is only a set of voxels, but it is what many start from."""
    from skimage.morphology import skeletonize

    tree, mask = scene(scale.shape)
    task, ours = f"tracing, {size(scale.shape)}", functools.partial(tracing.trace, mask)

    def esa(traced: Tree) -> float:
        return evaluation.tree_distance(traced, tree).esa

    def compare(a: Tree, b: np.ndarray | dict) -> str:
        if isinstance(b, np.ndarray):
            return f"ours: ESA {esa(a):.2f} voxels"
        return f"ESA: ours {esa(a):.2f} voxels, theirs {esa(as_tree(b[1])):.2f}"

    theirs = functools.partial(skeletonize, mask)
    rows = [compete(task, ours, "skeletonize (Lee)", theirs, compare, repeats)]
    kinds = {"kimimaro fast": False, "kimimaro default": True}
    if not installed("kimimaro"):
        return rows + [missing(task, name) for name in kinds]
    import kimimaro

    labels, options = mask.astype(np.uint32), {"dust_threshold": 20, "progress": False}
    wanted = {"target": 3, "holds": lambda a, b: esa(a) <= esa(as_tree(b[1]))}
    for name, fix in kinds.items():
        options["fix_branching"] = fix
        theirs = functools.partial(kimimaro.skeletonize, labels, INVALIDATION, **options)
        limits = {} if fix else wanted
        rows.append(compete(task, ours, name, theirs, compare, repeats, **limits))
    return rows


def brute_force_esa(a: Tree, b: Tree) -> float:
    """ESA from comparing every sample of one tree with every edge of the other."""

    def mean_distance(points: np.ndarray, tree: Tree) -> float:
        child, parent = edges(tree)
        start = tree.xyz[child]
        step = tree.xyz[parent] - start
        square = np.maximum((step**2).sum(axis=1), np.finfo(float).tiny)
        total = 0.0
        for i in range(0, len(points), CHUNK):
            away = points[i : i + CHUNK, None] - start
            along = np.clip((away * step).sum(axis=2) / square, 0, 1)
            away -= along[..., None] * step
            total += np.sqrt((away**2).sum(axis=2).min(axis=1)).sum()
        return total / len(points)

    there = mean_distance(evaluation.sample_edges(a), b)
    return (there + mean_distance(evaluation.sample_edges(b), a)) / 2


def bench_distance(scale: Scale, repeats: int) -> list[dict]:
    """Distance of a traced tree from the true one; PyNeval's is between nodes, one voxel apart."""
    tree, mask = scene(scale.shape)
    traced = tracing.trace(mask)
    ours = lambda: evaluation.tree_distance(traced, tree).esa  # noqa: E731
    task = f"ESA, {len(traced.xyz)} and {len(tree.xyz)} nodes"
    brute = functools.partial(brute_force_esa, traced, tree)
    compare = lambda a, b: f"ours {a:.4f}, theirs {b:.4f}, {abs(a - b):.0e} apart"  # noqa: E731
    rows = [compete(task, ours, "NumPy, all pairs", brute, compare, repeats)]
    if not installed("pyneval"):
        return [*rows, missing(task, "PyNeval SSD")]
    from pyneval.metric.ssd_metric import ssd_metric
    from pyneval.model.swc_tree import SwcTree

    with tempfile.TemporaryDirectory() as folder:
        trees = []
        for name, one in (("true", tree), ("traced", traced)):
            trees.append(SwcTree())
            trees[-1].load(str(write_swc(Path(folder) / f"{name}.swc", one)))
    options = {"threshold_mode": 1, "ssd_threshold": 0.0, "up_sample_threshold": 1.0}
    theirs = lambda: ssd_metric(*trees, options | {"scale": (1, 1, 1)})[0]["ssd_score"]  # noqa: E731
    compare = lambda a, b: f"ours {a:.4f}, theirs {b:.4f}, another definition"  # noqa: E731
    return [*rows, compete(task, ours, "PyNeval SSD", theirs, compare, repeats)]


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """Largest distance of a point (n, 3) of one set from the other set."""
    return max(KDTree(a).query(b)[0].max(), KDTree(b).query(a)[0].max())


def bench_swc(scale: Scale, repeats: int) -> list[dict]:
    """Reading a tree: ours is checked and repaired."""
    rng = np.random.default_rng(0)
    parent = np.arange(scale.nodes) - 1
    # A branch every 100 nodes, somewhere on earlier nodes; row 0 is the soma.
    starts = np.arange(200, scale.nodes, 100)
    parent[starts] = rng.integers(1, starts)
    kind = np.where(parent < 0, 1, 3)
    tree = Tree(rng.uniform(0, 500, (scale.nodes, 3)), np.ones(scale.nodes), kind, parent)
    task, rows = f"SWC, {scale.nodes} nodes", []
    with tempfile.TemporaryDirectory() as folder:
        path = write_swc(Path(folder) / "large.swc", tree)

        def add(peer: str, theirs: Callable, points: Callable, gives: str) -> None:
            def compare(a: Tree, b: object) -> str:
                return f"coordinates within {apart(a.xyz, points(b)):.0e} voxels; peer: {gives}"

            rows.append(compete(task, lambda: read_swc(path), peer, theirs, compare, repeats))

        add("numpy.loadtxt", lambda: np.loadtxt(path), lambda b: b[:, 2:5], "numbers only")
        if installed("pandas"):
            import pandas as pd

            theirs = lambda: pd.read_csv(path, sep=r"\s+", comment="#", header=None)  # noqa: E731
            add("pandas.read_csv", theirs, lambda b: b.to_numpy()[:, 2:5], "numbers only")
        else:
            rows.append(missing(task, "pandas.read_csv"))
        if installed("morphio"):
            import morphio

            theirs = lambda: morphio.Morphology(str(path))  # noqa: E731
            points = lambda b: np.concatenate([b.soma.points, b.points])  # noqa: E731
            add("MorphIO", theirs, points, "a tree in float32")
        else:
            rows.append(missing(task, "MorphIO"))
    return rows
