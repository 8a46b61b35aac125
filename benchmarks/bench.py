"""Ours beside what people would use instead, in one run: seconds, ratio, and agreement.

    python benchmarks/bench.py [target hd95 tracing blocks swc tiff] [--repeats 5] [--out FILE]

Peers that are not installed are named; ``pip install -c constraints.txt -e .[bench]`` brings
them. Each time is the median of the repeats, after one call that is not counted; ours and the
peer's take turns, so that whatever else the machine does meets both.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import tifffile
from scipy import ndimage
from scipy.spatial import KDTree

from neurolib import blocking, evaluation, synthesis, tracing
from neurolib.files import write_text
from neurolib.runs import table
from neurolib.swc import Tree, densify, read_swc, write_swc
from neurolib.volume import read_volume, write_volume

SHAPE = (100, 512, 512)
# The tracer's own, 1.5 r + 3: kimimaro's defaults are in nanometres and would drop every branch.
INVALIDATION = {"scale": 1.5, "const": 3}
# Least share of foreground in the centre slice of a block, as in `blocking.salient`.
SALIENT = 0.001
NODES = 35_000
PACKAGES = ("numpy", "scipy", "scikit-image", "tifffile", "torch")
PEERS = (
    "edt", "kimimaro", "medpy", "monai", "morphio", "pandas", "patchify", "surface-distance",
)  # fmt: skip


def seconds(function: Callable) -> float:
    """Time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def row(task: str, ours: Callable, peer: str, theirs: Callable, same: str, repeats: int) -> dict:
    """One line of the table: our seconds, theirs, the ratio, and how far both agree."""
    ours(), theirs()
    times = [(seconds(ours), seconds(theirs)) for _ in range(repeats)]
    a, b = (statistics.median(column) for column in zip(*times, strict=True))
    return {"task": task, "ours s": a, "peer": peer, "peer s": b, "ratio": b / a, "agreement": same}


def missing(task: str, peer: str) -> dict:
    """A line that says that a peer is not installed."""
    blank = {"ours s": "", "peer": peer, "peer s": "", "ratio": ""}
    return {"task": task, **blank, "agreement": "not installed"}


def installed(package: str) -> bool:
    """Whether a peer can be imported."""
    return importlib.util.find_spec(package) is not None


def peak_mb(function: Callable) -> float:
    """Most memory that a call holds beyond what was there before, as NumPy and Python see it."""
    tracemalloc.start()
    function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6


@functools.cache
def scene() -> tuple[Tree, np.ndarray]:
    """The tree and its mask that all tasks on volumes share."""
    tree = synthesis.grow(0, SHAPE)
    return tree, blocking.make_target(tree, SHAPE)[1]


def target_by_transform(tree: Tree, transform: Callable) -> np.ndarray:
    """The same mask by a distance transform of rasterised edges, as is usual."""
    points, _ = densify(tree, 0.25)
    seeds = np.ones(SHAPE, bool)
    seeds[tuple(np.rint(points[:, ::-1]).astype(int).T)] = False
    return transform(seeds) <= blocking.tube_radius()


def bench_target(repeats: int) -> list[dict]:
    """Response and mask of a tree; the peers' is the mask alone."""
    tree, mask = scene()
    task, peers = "target, 100x512x512", {"SciPy EDT": ndimage.distance_transform_edt}
    if installed("edt"):
        import edt

        # Ours and SciPy's run on one core, and so would edt unless told otherwise.
        peers["edt, all cores"] = functools.partial(edt.edt, parallel=os.cpu_count())
    ours, rows = (lambda: blocking.make_target(tree, SHAPE)), []
    for peer, transform in peers.items():
        theirs = functools.partial(target_by_transform, tree, transform)
        same = f"Dice {evaluation.dice(mask, theirs()):.3f}; peer: mask only"
        rows.append(row(task, ours, peer, theirs, same, repeats))
    return rows if installed("edt") else [*rows, missing(task, "edt")]


def bench_hd95(repeats: int) -> list[dict]:
    """The surface distance, on masks that differ by a shift and a far speck."""
    _, mask = scene()
    task, other = "Hd95, 100x512x512", np.roll(mask, 2, axis=2)
    other[:4, :4, :4] = True
    peers, rows = {}, []
    if installed("monai"):
        import torch
        from monai.metrics import compute_hausdorff_distance

        a, b = (torch.from_numpy(m[None, None].astype(np.float32)) for m in (mask, other))
        peers["MONAI"] = lambda: float(
            compute_hausdorff_distance(a, b, include_background=True, percentile=95)
        )
    if installed("medpy"):
        from medpy.metric.binary import hd95

        peers["medpy"] = lambda: hd95(mask, other)
    if installed("surface_distance"):
        from surface_distance import compute_robust_hausdorff, compute_surface_distances

        # Its surfaces lie between voxels and are weighted by area: another definition.
        peers["surface-distance"] = lambda: compute_robust_hausdorff(
            compute_surface_distances(mask, other, (1, 1, 1)), 95
        )
    for peer, theirs in peers.items():
        method = "medpy" if peer == "medpy" else "monai"
        ours = functools.partial(evaluation.hd95, mask, other, method=method)
        same = f"ours {ours():.4f}, theirs {theirs():.4f}"
        rows.append(row(task, ours, peer, theirs, same, repeats))
    absent = [n for n in ("monai", "medpy", "surface_distance") if not installed(n)]
    return rows + [missing(task, name) for name in absent]


def bench_tracing(repeats: int) -> list[dict]:
    """Mask to tree; a skeleton is only a set of voxels, but it is what many start from."""
    from skimage.morphology import skeletonize

    tree, mask = scene()
    esa = evaluation.tree_distance(tracing.trace(mask), tree).esa
    ours = lambda: tracing.trace(mask)  # noqa: E731
    task, same = "tracing, 100x512x512", f"ours: ESA {esa:.2f} voxels"
    rows = [row(task, ours, "skeletonize (Lee)", lambda: skeletonize(mask), same, repeats)]
    if not installed("kimimaro"):
        return [*rows, missing(task, "kimimaro")]
    import kimimaro

    labels = mask.astype(np.uint32)
    for name, fix in (("kimimaro fast", False), ("kimimaro default", True)):
        theirs = functools.partial(
            kimimaro.skeletonize,
            labels,
            INVALIDATION,
            dust_threshold=20,
            fix_branching=fix,
            progress=False,
        )
        with tempfile.TemporaryDirectory() as folder:
            found = read_swc(write_text(Path(folder) / "found.swc", theirs()[1].to_swc()))
        # Its columns are the axes of the array, which are z, y, x.
        found = replace(found, xyz=found.xyz[:, ::-1])
        agreement = f"{same}, theirs {evaluation.tree_distance(found, tree).esa:.2f}"
        rows.append(row(task, ours, name, theirs, agreement, repeats))
    return rows


def our_blocks(volume: np.ndarray, mask: np.ndarray | None) -> Iterable[np.ndarray]:
    """The blocks that the peers' grid has too, one view at a time; with a mask the salient ones.

    Our own grid also covers the rim: slices repeated beyond the ends, rows and columns that a
    stride leaves over.
    """
    grid = blocking.block_grid(volume.shape)
    depth = blocking.BLOCK[0] // 2
    inner = (grid[:, 0] >= depth) & (grid[:, 0] < volume.shape[0] - depth)
    grid = grid[inner & (grid % blocking.STRIDE == 0).all(axis=1)]
    if mask is not None:
        grid = grid[blocking.salient(mask, grid, SALIENT)]
    return (blocking.read_block(volume, position) for position in grid)


def patchify_blocks(volume: np.ndarray, mask: np.ndarray | None) -> Iterable[np.ndarray]:
    """The same blocks by patchify: one strided view of everything."""
    from patchify import patchify

    windows = patchify(volume, blocking.BLOCK, blocking.STRIDE)
    chosen = np.ones(windows.shape[:3], bool)
    if mask is not None:
        centres = patchify(mask, blocking.BLOCK, blocking.STRIDE)[..., blocking.BLOCK[0] // 2, :, :]
        chosen = centres.mean(axis=(-2, -1)) >= SALIENT
    return (windows[index] for index in zip(*np.nonzero(chosen), strict=True))


def monai_blocks(volume: np.ndarray, mask: np.ndarray | None) -> Iterable[np.ndarray]:
    """The same blocks by MONAI: GridPatch copies all, then those wanted are looked at."""
    from monai.transforms import GridPatch

    def cut(data: np.ndarray, depth: int) -> np.ndarray:
        overlap = (0.0, 1 - 1 / depth, 0.0, 0.0)
        patches = GridPatch((depth, *blocking.BLOCK[1:]), overlap=overlap)(data[None])
        # Past MetaTensor's own indexing, which is slow.
        return patches.as_tensor().numpy()[:, 0]

    patches, reach = cut(volume, blocking.BLOCK[0]), blocking.BLOCK[0] // 2
    if mask is not None:
        chosen = cut(mask[reach:-reach], 1).mean(axis=(1, 2, 3)) >= SALIENT
        return (patches[index] for index in np.flatnonzero(chosen))
    return iter(patches)


def bench_blocks(repeats: int) -> list[dict]:
    """Cutting a volume into overlapping blocks of which every voxel is then read, by summing."""
    _, mask = scene()
    volume = np.random.default_rng(0).random(SHAPE, np.float32)
    peers = {
        "patchify": ("patchify (one view)", patchify_blocks),
        "monai": ("MONAI GridPatch (copies all)", monai_blocks),
    }
    rows = []
    for name, chosen in (("all", None), ("salient", mask)):

        def visit(blocks: Callable, chosen: np.ndarray | None = chosen) -> list[float]:
            return [float(block.sum()) for block in blocks(volume, chosen)]

        count = len(visit(our_blocks))
        task = f"{name} {count} blocks of 100x512x512"
        for package, (peer, blocks) in peers.items():
            if not installed(package):
                rows.append(missing(task, peer))
                continue
            ours, theirs = functools.partial(visit, our_blocks), functools.partial(visit, blocks)
            pairs = zip(our_blocks(volume, chosen), blocks(volume, chosen), strict=True)
            equal = sum(np.array_equal(a, b) for a, b in pairs)
            line = row(task, ours, peer, theirs, f"{equal} of {count} blocks equal", repeats)
            rows.append(line | {"ours MB": peak_mb(ours), "peer MB": peak_mb(theirs)})
    return rows


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """How far a point (n, 3) of one set may be from the other set."""
    return max(KDTree(a).query(b)[0].max(), KDTree(b).query(a)[0].max())


def bench_swc(repeats: int) -> list[dict]:
    """Reading a tree: ours is checked and repaired."""
    rng = np.random.default_rng(0)
    parent = np.arange(NODES) - 1
    # A branch every 100 nodes, somewhere on what is there already; row 0 is the soma.
    starts = np.arange(200, NODES, 100)
    parent[starts] = rng.integers(1, starts)
    kind = np.where(parent < 0, 1, 3)
    tree = Tree(rng.uniform(0, 500, (NODES, 3)), np.ones(NODES), kind, parent)
    task, rows = f"SWC, {NODES} nodes", []
    with tempfile.TemporaryDirectory() as folder:
        path = write_swc(Path(folder) / "large.swc", tree)
        ours, xyz = (lambda: read_swc(path)), read_swc(path).xyz

        def add(peer: str, theirs: Callable, points: np.ndarray, gives: str) -> None:
            same = f"coordinates within {apart(xyz, points):.0e} voxels; peer: {gives}"
            rows.append(row(task, ours, peer, theirs, same, repeats))

        add("numpy.loadtxt", lambda: np.loadtxt(path), np.loadtxt(path)[:, 2:5], "numbers only")
        if installed("pandas"):
            import pandas as pd

            theirs = lambda: pd.read_csv(path, sep=r"\s+", comment="#", header=None)  # noqa: E731
            add("pandas.read_csv", theirs, theirs().to_numpy()[:, 2:5], "numbers only")
        else:
            rows.append(missing(task, "pandas.read_csv"))
        if installed("morphio"):
            import morphio

            neuron = morphio.Morphology(str(path))
            points = np.concatenate([neuron.soma.points, neuron.points])
            add("MorphIO", lambda: morphio.Morphology(str(path)), points, "a tree in float32")
        else:
            rows.append(missing(task, "MorphIO"))
    return rows


def bench_tiff(repeats: int) -> list[dict]:
    """Reading a 16-bit stack; ours maps what is not compressed, so nothing is loaded yet."""
    _, mask = scene()
    data = np.random.default_rng(0).poisson(100, SHAPE).astype(np.uint16)
    data[mask] += 900
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        plain, packed = Path(folder) / "plain.tif", Path(folder) / "zlib.tif"
        tifffile.imwrite(plain, data)
        write_volume(packed, data)
        for name, path, check, load in (
            ("plain, mapped, unchecked", plain, False, False),
            ("plain, mapped, checked", plain, True, False),
            ("plain, loaded, unchecked", plain, False, True),
            ("plain, loaded, checked", plain, True, True),
            ("zlib, unchecked", packed, False, False),
            ("zlib, checked", packed, True, False),
        ):

            def ours(path: Path = path, check: bool = check, load: bool = load) -> np.ndarray:
                volume = read_volume(path, check=check).data
                return np.array(volume) if load else volume

            theirs = functools.partial(tifffile.imread, path)
            same = "equal" if np.array_equal(ours(), theirs()) else "DIFFERENT"
            same += "; peer: loaded" if "mapped" in name else ""
            rows.append(row(f"TIFF {name}", ours, "tifffile.imread", theirs, same, repeats))
    return rows


def machine() -> dict:
    """What the numbers were measured on and with."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    packages = (*PACKAGES, *(peer for peer in PEERS if installed(peer)))
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load before": psutil.getloadavg()[0],
        "memory GiB": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


TASKS = {
    "target": bench_target,
    "hd95": bench_hd95,
    "tracing": bench_tracing,
    "blocks": bench_blocks,
    "swc": bench_swc,
    "tiff": bench_tiff,
}


def main() -> None:
    """Run what was asked for, or all, and print the table."""
    parser = argparse.ArgumentParser(description="Ours beside what people would use instead.")
    parser.add_argument("tasks", nargs="*", help=f"some of {', '.join(TASKS)}; default: all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write machine and rows as JSON")
    chosen = parser.parse_args()
    if unknown := set(chosen.tasks) - set(TASKS):
        parser.error(f"unknown task {', '.join(sorted(unknown))}; choose from {', '.join(TASKS)}")
    about = machine()
    rows = [line for name in chosen.tasks or TASKS for line in TASKS[name](chosen.repeats)]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    print(f"{about['cpu']}, {about['cores']} cores; Python {about['python']}, {versions}")
    print(f"{len(scene()[0].xyz)} nodes; median of {chosen.repeats}\n\n{table(rows)}")
    if chosen.out:
        record = {"machine": about, "repeats": chosen.repeats, "rows": rows}
        write_text(chosen.out, json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
