"""How much shorter is the trace of a perfect mask than its tree, and how much of it is zigzag?

    python benchmarks/shorter.py FOLDER_OF_SWC

Each tree's target is traced. For comparison, the tree is smoothed along its paths with Gaussians
of 1 and 2 voxels: the length that it loses is zigzag of the manual trace.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from neurolib import swc, tracing
from neurolib.blocking import make_target
from neurolib.evaluation import tree_scores

STEP, ROOM = 0.5, 8


def smoothed(tree: swc.Tree, sigma: float) -> swc.Tree:
    """Smooth all but roots, tips and branch points; each pass adds a variance of STEP²/2."""
    tree = swc.resample(tree, STEP)
    child, parent = swc.edges(tree)
    degree = np.bincount(np.concatenate([child, parent]), minlength=len(tree.parent))
    xyz, free = tree.xyz.copy(), (degree == 2)[:, None]
    for _ in range(round(2 * (sigma / STEP) ** 2)):
        near = np.zeros_like(xyz)
        np.add.at(near, child, xyz[parent])
        np.add.at(near, parent, xyz[child])
        xyz = np.where(free, xyz / 2 + near / np.maximum(degree, 1)[:, None] / 2, xyz)
    return replace(tree, xyz=xyz)


def shares(path: Path) -> dict[str, float]:
    """Lengths relative to that of the tree, and the recall of the trace."""
    tree = swc.read_swc(path)
    low, high = np.floor(tree.xyz.min(0)) - ROOM, np.ceil(tree.xyz.max(0)) + ROOM + 1
    tree = replace(tree, xyz=tree.xyz - low)
    traced = tracing.trace(make_target(tree, tuple((high - low).astype(int)[::-1]))[1])
    lengths = {"trace": traced, "smooth 1": smoothed(tree, 1), "smooth 2": smoothed(tree, 2)}
    row = {name: swc.length(one) / swc.length(tree) for name, one in lengths.items()}
    return row | {"recall": tree_scores(traced, tree).recall}


if __name__ == "__main__":
    rows = []
    for path in sorted(Path(sys.argv[1]).glob("*.swc")):
        rows.append(shares(path))
        print(path.stem, *(f"{name} {value:.3f}" for name, value in rows[-1].items()), flush=True)
    for name in rows[0]:
        low, middle, high = np.percentile([row[name] for row in rows], [0, 50, 100])
        print(f"{name}: median {middle:.3f}, {low:.3f} to {high:.3f}, n = {len(rows)}")
