"""Ours beside what people would use instead, in one run: seconds, ratio, and agreement.

    python benchmarks/bench.py [--repeats 5] [--out benchmarks/results.json]

Peers that are not installed are named as such (``pip install -e .[bench]`` brings them). Each
time is the median of the repeats, after one that is not counted.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import ndimage

from neurolib import blocking, evaluation, synthesis, tracing
from neurolib.files import write_text
from neurolib.runs import table
from neurolib.swc import Tree, densify, read_swc, write_swc

SHAPE = (100, 512, 512)
# The tracer's own, 1.5 r + 3: kimimaro's defaults are in nanometres and would drop every branch.
INVALIDATION = {"scale": 1.5, "const": 3}


def seconds(function: Callable, repeats: int) -> float:
    """Median time of a call."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def row(task: str, ours: Callable, peer: str, theirs: Callable, same: str, repeats: int) -> dict:
    """One line of the table: our seconds, theirs, the ratio, and how far both agree."""
    a, b = seconds(ours, repeats), seconds(theirs, repeats)
    return {"task": task, "ours s": a, "peer": peer, "peer s": b, "ratio": b / a, "agreement": same}


def missing(task: str, peer: str) -> dict:
    """A line that says that a peer is not installed."""
    return {"task": task, "peer": peer, "agreement": "not installed"}


def target_by_transform(tree: Tree) -> np.ndarray:
    """The same mask by SciPy's distance transform of rasterised edges, as is usual."""
    points, _ = densify(tree, 0.25)
    seeds = np.ones(SHAPE, bool)
    seeds[tuple(np.rint(points[:, ::-1]).astype(int).T)] = False
    return ndimage.distance_transform_edt(seeds) <= blocking.tube_radius()


def bench_target(tree: Tree, mask: np.ndarray, repeats: int) -> list[dict]:
    """Target generation."""
    same = f"Dice {evaluation.dice(mask, target_by_transform(tree)):.3f}"
    ours, theirs = (lambda: blocking.make_target(tree, SHAPE)), (lambda: target_by_transform(tree))
    return [row("target, 100x512x512", ours, "SciPy EDT", theirs, same, repeats)]


def bench_hd95(mask: np.ndarray, repeats: int) -> list[dict]:
    """The surface distance, on masks that differ by a shift and a far speck."""
    task, other = "Hd95, 100x512x512", np.roll(mask, 2, axis=2)
    other[:4, :4, :4] = True
    if importlib.util.find_spec("monai") is None:
        return [missing(task, "MONAI")]
    import torch
    from monai.metrics import compute_hausdorff_distance

    a, b = (torch.from_numpy(m[None, None].astype(np.float32)) for m in (mask, other))

    def theirs() -> float:
        return float(compute_hausdorff_distance(a, b, include_background=True, percentile=95))

    gap = abs(theirs() - evaluation.hd95(mask, other))
    ours = lambda: evaluation.hd95(mask, other)  # noqa: E731
    return [row(task, ours, "MONAI", theirs, f"difference {gap:.1e}", repeats)]


def bench_tracing(tree: Tree, mask: np.ndarray, repeats: int) -> list[dict]:
    """Mask to tree; a skeleton is only a set of voxels, but it is what many start from."""
    from skimage.morphology import skeletonize

    esa = evaluation.tree_distance(tracing.trace(mask), tree).esa
    ours = lambda: tracing.trace(mask)  # noqa: E731
    task, same = "tracing, 100x512x512", f"ours: ESA {esa:.2f} voxels"
    rows = [row(task, ours, "skeletonize (Lee)", lambda: skeletonize(mask), same, repeats)]
    if importlib.util.find_spec("kimimaro") is None:
        return [*rows, missing(task, "kimimaro")]
    import kimimaro

    labels = mask.astype(np.uint32)
    for name, fix in (("kimimaro fast", False), ("kimimaro default", True)):

        def theirs(fix: bool = fix):
            return kimimaro.skeletonize(
                labels, INVALIDATION, dust_threshold=20, fix_branching=fix, progress=False
            )

        skeleton = theirs()[1]
        vertices = skeleton.vertices[:, ::-1].astype(float)
        far = evaluation.distance_to_tree(vertices, tree).mean()
        back = np.linalg.norm(tree.xyz[:, None] - vertices[None], axis=2).min(1).mean()
        agreement = f"{same}, theirs {(far + back) / 2:.2f}"
        rows.append(row(task, ours, name, theirs, agreement, repeats))
    return rows


def bench_swc(repeats: int) -> list[dict]:
    """Reading a tree of 35,000 nodes, checked and repaired, against its bare numbers."""
    rng = np.random.default_rng(0)
    n = 35_000
    tree = Tree(rng.uniform(0, 500, (n, 3)), np.ones(n), np.ones(n, int), np.arange(n) - 1)
    with tempfile.TemporaryDirectory() as folder:
        path = write_swc(Path(folder) / "large.swc", tree)
        ours, theirs = (lambda: read_swc(path)), (lambda: np.loadtxt(path))
        same = "peer: numbers only, no tree"
        return [row("SWC, 35,000 nodes", ours, "numpy.loadtxt", theirs, same, repeats)]


def main() -> None:
    """Run all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    tree = synthesis.grow(0, SHAPE)
    _, mask = blocking.make_target(tree, SHAPE)
    rows = [
        *bench_target(tree, mask, chosen.repeats),
        *bench_hd95(mask, chosen.repeats),
        *bench_tracing(tree, mask, chosen.repeats),
        *bench_swc(chosen.repeats),
    ]
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    print(f"{len(tree.xyz)} nodes; {machine}; median of {chosen.repeats}\n\n{table(rows)}")
    if chosen.out:
        write_text(chosen.out, json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
