"""Benchmarks on volumes: target, surface distance, blocks, files."""

import functools
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import tifffile
from measure import Scale, compete, installed, line, missing, peak_mb, scene, size
from scipy import ndimage

from neurolib import blocking, evaluation
from neurolib.swc import Tree, densify
from neurolib.volume import read_volume, write_volume

# Least share of foreground in the centre slice of a block, as in `blocking.salient`.
SALIENT = 0.001


def target_by_transform(tree: Tree, shape: tuple, transform: Callable) -> np.ndarray:
    """The same mask in the usual way, by a distance transform of rasterised edges."""
    points, _ = densify(tree, 0.25)
    seeds = np.ones(shape, bool)
    seeds[tuple(np.rint(points[:, ::-1]).astype(int).T)] = False
    return transform(seeds) <= blocking.tube_radius()


def bench_target(scale: Scale, repeats: int) -> list[dict]:
    """Response and mask of a tree; the peers' is the mask alone, from voxels and not from edges."""
    tree, _ = scene(scale.shape)
    task, peers = f"target, {size(scale.shape)}", {"SciPy EDT": ndimage.distance_transform_edt}
    if installed("edt"):
        import edt

        # Ours and SciPy's use one core.
        peers["edt, all cores"] = functools.partial(edt.edt, parallel=os.cpu_count())

    def ours() -> np.ndarray:
        return blocking.make_target(tree, scale.shape)[1]

    def compare(a: np.ndarray, b: np.ndarray) -> str:
        return f"Dice of both {evaluation.dice(a, b):.3f}"

    rows = []
    for peer, transform in peers.items():
        theirs = functools.partial(target_by_transform, tree, scale.shape, transform)
        target = 10 if peer == "SciPy EDT" else None
        rows.append(compete(task, ours, peer, theirs, compare, repeats, target))
    return rows if installed("edt") else [*rows, missing(task, "edt, all cores")]


def bench_hd95(scale: Scale, repeats: int) -> list[dict]:
    """Hd95 of two masks that differ by a shift and a far speck.

    The surfaces of surface-distance lie between voxels and are weighted by area.
    """
    _, mask = scene(scale.shape)
    task, other = f"Hd95, {size(scale.shape)}", np.roll(mask, 2, axis=2)
    other[:4, :4, :4] = True
    peers, rows = {}, []

    def compare(a: float, b: float) -> str:
        return f"ours {a:.4f}, theirs {b:.4f}"

    def holds(a: float, b: float) -> bool:
        return abs(a - b) < 1e-4

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

        peers["surface-distance"] = lambda: compute_robust_hausdorff(
            compute_surface_distances(mask, other, (1, 1, 1)), 95
        )
    targets = {"MONAI": 6, "medpy": 25, "surface-distance": None}
    for peer, target in targets.items():
        if peer not in peers:
            rows.append(missing(task, peer))
            continue
        method = "medpy" if peer == "medpy" else "monai"
        ours = functools.partial(evaluation.hd95, mask, other, method=method)
        rows.append(compete(task, ours, peer, peers[peer], compare, repeats, target, holds))
    return rows


def our_blocks(volume: np.ndarray, mask: np.ndarray | None) -> Iterable[np.ndarray]:
    """The blocks that the peers' grid shares, one view at a time; with a mask the salient ones.

    Our full grid also covers the rim: slices repeated beyond the ends, and rows and columns that
    the stride leaves out.
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
    """The same blocks by MONAI: GridPatch copies all, then the salient ones are chosen."""
    from monai.transforms import GridPatch

    def cut(data: np.ndarray, depth: int) -> np.ndarray:
        overlap = (0.0, 1 - 1 / depth, 0.0, 0.0)
        patches = GridPatch((depth, *blocking.BLOCK[1:]), overlap=overlap)(data[None])
        # Avoids MetaTensor's slow indexing.
        return patches.as_tensor().numpy()[:, 0]

    patches, reach = cut(volume, blocking.BLOCK[0]), blocking.BLOCK[0] // 2
    if mask is not None:
        chosen = cut(mask[reach:-reach], 1).mean(axis=(1, 2, 3)) >= SALIENT
        return (patches[index] for index in np.flatnonzero(chosen))
    return iter(patches)


def bench_blocks(scale: Scale, repeats: int) -> list[dict]:
    """Cutting a volume into overlapping blocks of which every voxel is then read, by summing."""
    _, mask = scene(scale.shape)
    volume = np.random.default_rng(0).random(scale.shape, np.float32)
    peers = {
        "patchify": ("patchify (one view)", patchify_blocks),
        "monai": ("MONAI GridPatch (copies all)", monai_blocks),
    }
    rows = []
    for name, chosen in (("all", None), ("salient", mask)):

        def visit(blocks: Callable, chosen: np.ndarray | None = chosen) -> list[float]:
            return [float(block.sum()) for block in blocks(volume, chosen)]

        count = len(visit(our_blocks))
        task = f"{name} {count} blocks of {size(scale.shape)}"
        for package, (peer, blocks) in peers.items():
            if not installed(package):
                rows.append(missing(task, peer))
                continue
            ours, theirs = functools.partial(visit, our_blocks), functools.partial(visit, blocks)
            pairs = zip(our_blocks(volume, chosen), blocks(volume, chosen), strict=True)
            equal = sum(np.array_equal(a, b) for a, b in pairs)
            same = f"{equal} of {count} blocks equal"
            rows.append(compete(task, ours, peer, theirs, lambda a, b, same=same: same, repeats))
            peaks = {"ours": peak_mb(ours), "theirs": peak_mb(theirs)}
            rows.append(line(task, "MB", peer=peer, agreement=same, **peaks))
    return rows


def bench_tiff(scale: Scale, repeats: int) -> list[dict]:
    """Reading a 16-bit stack; ours maps what is not compressed, so nothing is loaded yet."""
    _, mask = scene(scale.shape)
    data = np.random.default_rng(0).poisson(100, scale.shape).astype(np.uint16)
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

            def compare(a: np.ndarray, b: np.ndarray, mapped: bool = "mapped" in name) -> str:
                same = "equal" if np.array_equal(a, b) else "DIFFERENT"
                return f"{same}; peer: loaded" if mapped else same

            theirs = functools.partial(tifffile.imread, path)
            task = f"TIFF, {size(scale.shape)}, {name}"
            rows.append(compete(task, ours, "tifffile.imread", theirs, compare, repeats))
    return rows
