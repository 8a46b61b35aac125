"""Timing of benchmarks, and rows of the table."""

import functools
import importlib.util
import statistics
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from neurolib import blocking
from neurolib.data import synthesis
from neurolib.network import NetworkSettings
from neurolib.swc import Tree

# After this many seconds, `FEWEST` repeats are enough.
PATIENCE, FEWEST = 40.0, 3
COLUMNS = (
    "task", "unit", "ours", "peer", "theirs", "ratio", "target", "verdict", "agreement", "repeats",
)  # fmt: skip
NETWORK, SMALL = NetworkSettings(), NetworkSettings(size=112)
LEAST = NetworkSettings("vit_tiny_patch16_224.augreg_in21k", size=32, width=32)


@dataclass(frozen=True)
class Scale:
    """Sizes of all inputs."""

    shape: tuple[int, int, int] = (100, 512, 512)
    nodes: int = 35_000
    # Multiples of a tile's sides, so that tiles need not overlap.
    stitched: tuple[int, int, int] = (100, 500, 500)
    cell: tuple[int, int, int] = (64, 256, 256)
    cells: tuple[tuple[int, int], ...] = ((1, 1), (1, 2), (2, 2), (2, 4))
    sparse: tuple[int, int, int] = (24, 300, 300)
    network: NetworkSettings = NETWORK
    small_network: NetworkSettings = SMALL
    batch: int = 64
    steps: int = 20
    every: int = 8
    inferred: tuple[int, int, int] = (20, 500, 500)
    matrix: int = 8192
    device: str = "cuda"
    memory: tuple[str, ...] = ("target", "hd95", "tracing", "stitching", "prediction", "training")


FULL = Scale()
# Runs everything on a CPU in seconds; the measurements mean nothing.
TINY = Scale(
    shape=(24, 128, 128),
    nodes=300,
    stitched=(8, 100, 200),
    cell=(24, 64, 64),
    cells=((1, 1), (1, 2)),
    sparse=(24, 100, 200),
    network=LEAST,
    small_network=LEAST,
    batch=2,
    steps=1,
    inferred=(5, 100, 100),
    matrix=64,
    device="cpu",
    memory=("target",),
)


@functools.cache
def scene(shape: tuple[int, int, int]) -> tuple[Tree, np.ndarray]:
    """A tree and its mask, shared by all tasks on this shape."""
    tree = synthesis.grow(0, shape)
    return tree, blocking.make_target(tree, shape)[1]


def size(shape: tuple[int, ...]) -> str:
    """A shape in words."""
    return "x".join(map(str, shape))


def seconds(function: Callable) -> float:
    """Time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def line(
    task: str,
    unit: str,
    ours: float | str,
    peer: str = "",
    theirs: float | str = "",
    met: bool | None = None,
    **more: object,
) -> dict:
    """One row of the table (`COLUMNS`); its ratio says how many times better ours is."""
    given = {"task": task, "unit": unit, "ours": ours, "peer": peer, "theirs": theirs}
    row = dict.fromkeys(COLUMNS, "") | given | more
    if ours != "" and theirs != "":
        row["ratio"] = ours / theirs if unit.endswith("/s") else theirs / ours
    if met is not None:
        row["verdict"] = "met" if met else "missed"
    return row


def compete(
    task: str,
    ours: Callable,
    peer: str,
    theirs: Callable,
    compare: Callable[[object, object], str],
    repeats: int,
    target: float | None = None,
    holds: Callable[[object, object], bool] = lambda a, b: True,
    work: float | None = None,
    unit: str = "s",
) -> dict:
    """Time ours and a peer in turn, after a first call of each whose results are compared.

    Parameters
    ----------
    compare : function of both results
        Says how far they agree.
    repeats : int
        At most this many; fewer if `PATIENCE` runs out.
    target : float, optional
        Smallest acceptable ratio, provided that `holds` is true of both results.
    work : float, optional
        Work done by one call; the row then has rates in `unit` instead of seconds.
    """
    a, b = ours(), theirs()
    times = []
    while len(times) < repeats and not (len(times) >= FEWEST and np.sum(times) > PATIENCE):
        times.append((seconds(ours), seconds(theirs)))
    values = [statistics.median(column) for column in zip(*times, strict=True)]
    if work is not None:
        values = [work / value for value in values]
    row = line(task, unit, values[0], peer, values[1], repeats=len(times))
    row["agreement"] = compare(a, b)
    if target is not None:
        met = row["ratio"] >= target and holds(a, b)
        row |= {"target": f">= {target:g}", "verdict": "met" if met else "missed"}
    return row


def missing(task: str, peer: str) -> dict:
    """A row for a peer that is not installed."""
    return line(task, "", "", peer, agreement="not installed")


def installed(package: str) -> bool:
    """Whether a peer can be imported."""
    return importlib.util.find_spec(package) is not None


def peak_mb(function: Callable) -> float:
    """Peak memory that a call allocates in NumPy and Python."""
    tracemalloc.start()
    function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6
