"""Benchmarks of the whole pipeline from a stack to a tree: growth of its time, and memory."""

import functools
import statistics
from types import SimpleNamespace

import numpy as np
import torch
from measure import Scale, installed, line, seconds
from memory import resident
from torch import nn

from neurolib import blocking, evaluation, inference, tracing
from neurolib.data import synthesis
from neurolib.swc import Tree

TAU = 0.1  # threshold of the target
# How far caches and scatter may raise a fitted exponent above 1.
TOLERANCE = 0.1


class Threshold(nn.Module):
    """Replaces a network: foreground where the centre slice reaches `TAU`."""

    settings = SimpleNamespace(depth=5, block=100, predict="center")

    def forward(self, blocks: torch.Tensor) -> torch.Tensor:
        return 100 * (blocks[:, 0, 2:3] - TAU)


def stack(scale: Scale, cells: tuple[int, int], filled: bool) -> np.ndarray:
    """Copies of one neuron's response side by side, or only one beside exact zeros."""
    tree = synthesis.grow(0, scale.cell)
    response = blocking.make_target(tree, scale.cell)[0]
    depth, height, width = scale.cell
    image = np.zeros((depth, height * cells[0], width * cells[1]), np.float32)
    for y, x in np.ndindex(cells) if filled else [(0, 0)]:
        image[:, y * height : (y + 1) * height, x * width : (x + 1) * width] = response
    return image


def pipeline(image: np.ndarray) -> Tree:
    """Segment and trace; tiles that are exactly zero are skipped."""
    probability = inference.predict_volume(
        Threshold(), image, overlap=0.25, batch=16, device="cpu", progress=False
    )
    return tracing.trace(probability)


def bench_pipeline(scale: Scale, repeats: int) -> list[dict]:
    """Growth of segmenting and tracing, time ~ size ** exponent; a threshold is the network."""
    truth, rows = synthesis.grow(0, scale.cell), []
    for name, filled in (("empty surroundings", False), ("foreground and volume", True)):
        sizes, times = [], []
        for cells in scale.cells:
            image = stack(scale, cells, filled)
            call = functools.partial(pipeline, image)
            traced = call()
            times.append(statistics.median(seconds(call) for _ in range(min(repeats, 3))))
            sizes.append(image.size / 1e6)
            if len(sizes) == 1:
                esa = evaluation.tree_distance(traced, truth).esa
        exponent = float(np.polyfit(np.log(sizes), np.log(times), 1)[0])
        each = ", ".join(f"{t / s:.3f}" for t, s in zip(times, sizes, strict=True))
        limit = 1 + TOLERANCE
        task = (
            f"pipeline with a stand-in network, growing {name}, {sizes[0]:.1f} to {sizes[-1]:.1f} "
            "million voxels"
        )
        told = {"agreement": f"{each} s per million voxels; ESA {esa:.2f} voxels"}
        told |= {"target": f"<= {limit:g}", "met": exponent <= limit, "repeats": min(repeats, 3)}
        rows.append(line(task, "exponent", exponent, **told))
    return rows


def bench_memory(scale: Scale, repeats: int) -> list[dict]:
    """Largest resident memory of a process that does one step, and what it had before."""
    rows = []
    for step in scale.memory:
        before, peak = resident(step, scale)
        note, peer = f"{before:.0f} MB before it, for packages and input", {}
        if step == "stitching" and installed("monai"):
            peer = {"peer": "MONAI, slices as batch", "theirs": resident("MONAI", scale)[1]}
        rows.append(line(f"resident memory, {step}", "MB", peak, agreement=note, **peer))
    return rows
