"""Volumes larger than memory: OME-Zarr in, OME-Zarr probability and SWC out, region by region.

The output is cut into regions of whole chunks. For each region, the input that its tiles see is
read, predicted, and written chunk by chunk, each once and whole. Until all chunks are there, the
result is called ``OUT.part`` and has a manifest of its inputs; a later call computes only the
missing chunks. Regions are independent: they run one after the other, in processes of this
machine, or on any Dask cluster that sees the same files.

Sparse volumes are stored without their empty chunks. Where the input has no chunk, nothing is
read, run or written, and `neurolib.tracing.trace` reads only the `stored_boxes` of the result.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from neurolib.course import cluster
from neurolib.course.adapters import FULL_SCALE, as_probability
from neurolib.data.formats import Box, LazyStack, boxes
from neurolib.errors import SettingsError
from neurolib.files import (
    atomic_path,
    claim,
    explain_full_disk,
    is_result,
    provenance,
    seal_zarr,
    sha256,
    workplace,
    write_text,
)
from neurolib.inference import Tiling, box_of_tiles, predict_box
from neurolib.network import Segmenter
from neurolib.parameters import check_range
from neurolib.training import load_checkpoint
from neurolib.volume import Volume, create_zarr, empty_level, limits, pieces, read_volume, rescale

# Slices, rows, columns. Tiles that cross the border of a region run for both sides: a fifth more
# tiles than for the whole volume at once, if tiles of 100 overlap by a quarter. A region takes at
# most 0.44 GB (measured) besides the network: for its input, its probability and its votes.
REGION = (32, 1024, 1024)

MANIFEST = "neurolib.json"


@dataclass(frozen=True)
class Mapped:
    """A volume (z, y, x) whose parts are computed from those of another when they are read."""

    data: Any
    function: Callable[[np.ndarray], np.ndarray]
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    @property
    def chunks(self) -> tuple[int, ...] | None:
        return getattr(self.data, "chunks", None)

    def __getitem__(self, key: Any) -> np.ndarray:
        return self.function(self.data[key])


def normalised(data: np.ndarray, low: float, high: float) -> Mapped:
    """`neurolib.volume.normalise` part by part, as it is read; `low` and `high` as in `limits`."""

    def function(part: np.ndarray) -> np.ndarray:
        return rescale(part, low, high, np.empty(part.shape, np.float32))

    return Mapped(data, function, np.dtype(np.float32))


def thresholded(probability: np.ndarray, cut: float) -> Mapped:
    """The mask of a probability, 0 and 255 as uint8, part by part, as it is read."""
    return Mapped(probability, lambda part: (part >= cut) * np.uint8(255), np.dtype(np.uint8))


def segmentation(
    data: np.ndarray, label: int | None = None, threshold: float | None = None, name: str = "volume"
) -> tuple[np.ndarray | Mapped, str]:
    """`neurolib.course.adapters.as_probability` part by part, as it is read.

    Labels are read once here, to know which exist; whether probabilities lie in [0, 1] is checked
    when they are traced.
    """
    labels = data.dtype.kind in "biu" and threshold is None
    values = _distinct(data) if labels else np.zeros(1, data.dtype)
    result, meaning = as_probability(values[None, None], label, threshold, name)
    if result.dtype == data.dtype:
        return data, meaning

    def function(part: np.ndarray) -> np.ndarray:
        if not labels:
            return part / np.float32(FULL_SCALE[data.dtype.name])
        return part != 0 if label is None else part == label

    return Mapped(data, function, result.dtype), meaning


def _distinct(data: np.ndarray) -> np.ndarray:
    """The values that occur, ascending."""
    values, read = set(), 0
    for box in stored_boxes(data):
        part = data[box]
        read += part.size
        values.update(np.unique(part).tolist() if part.any() else [0])
    if read < prod(data.shape):
        values.add(0)  # in the parts that need not be read
    return np.array(sorted(values), data.dtype)


# --- Empty parts -------------------------------------------------------------------------------


def stored_boxes(data: np.ndarray, cut: bool = True) -> Iterator[Box]:
    """Boxes of whole chunks that do not overlap and contain every voxel that is not zero.

    They are the `neurolib.volume.pieces` of the volume. For a `LazyStack`, or a `Mapped` one, those
    without stored chunks are left out, if missing chunks mean zeros, and with `cut` the others are
    cut down to the stored chunks.
    """
    cells = _stored(data)
    if cells is None:
        yield from pieces(data)
        return
    stored, step = cells
    for box in pieces(data):
        cells = _cells_of(box, step)
        places = np.argwhere(stored[cells])
        if len(places) and not cut:
            yield box
        elif len(places):
            first = [side.start for side in cells]
            low = (places.min(axis=0) + first) * step
            high = (places.max(axis=0) + first + 1) * step
            yield tuple(
                slice(max(side.start, int(a)), min(side.stop, int(b)))
                for side, a, b in zip(box, low, high, strict=True)
            )


def _cells_of(box: Box, step: tuple[int, int, int]) -> Box:
    return tuple(slice(s.start // n, -(-s.stop // n)) for s, n in zip(box, step, strict=True))


def _stored(data: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int]] | None:
    """Which cells of a grid over a volume (z, y, x) have a file, and the size of a cell in voxels.

    None if it is not stored in cells, or if a cell without a file is not zero.
    """
    functions = []
    while isinstance(data, Mapped):
        functions.insert(0, data.function)
        data = data.data
    if not isinstance(data, LazyStack):
        return None
    value = np.full((1, 1, 1), data.array.fill_value or 0, data.dtype)
    for function in functions:
        value = function(value)
    if value.any():
        return None
    places, step, grid = data.stored_cells()
    stored = np.zeros(grid, bool)
    for place in places:
        stored[place] = True
    return stored, step


@functools.lru_cache(1)
def _blank_of(job: "_Job") -> Callable[[Box], bool]:
    """A test whether the tiles of a box, as far as known without reading, see only zeros."""
    image, settings = _image(job), _network(job.checkpoint, job.digest).settings
    grid = _stored(image)
    if grid is None:
        return lambda box: False
    stored, step = grid

    def blank(box: Box) -> bool:
        around, _ = box_of_tiles(settings, image.shape, box, job.tiling.overlap)
        return not stored[_cells_of(around, step)].any()

    return blank


# --- Prediction --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """Everything that a worker needs to know; paths are absolute."""

    image: Path
    channel: int | None
    source: str  # fingerprint of the image
    checkpoint: Path
    digest: str  # SHA-256 of the checkpoint
    part: Path
    low: float
    high: float
    empty: float  # of `empty_level`
    tiling: Tiling
    threads: int  # of PyTorch; 0: PyTorch's default


def predict_large(
    image: str | Path,
    checkpoint: str | Path,
    out: str | Path,
    tiling: Tiling,
    channel: int | None = None,
    workers: int = 0,
    scheduler: str = "",
    spacing: tuple[float, float, float] | None = None,
) -> Path:
    """Predict the probability of neurite of an image on disk, into an OME-Zarr on disk.

    The result is that of `neurolib.inference.predict_volume` on the normalised image, up to
    rounding. The same call resumes an interrupted one, and returns at once after a finished one.

    Parameters
    ----------
    image : path
        OME-Zarr, or a file that can be mapped into memory (`neurolib.volume.read_volume`); every
        worker reads any other file whole.
    checkpoint : path
    out : path
        Ends in ``.zarr``: float32, in chunks, with the spacing of the image.
    tiling : Tiling
        All slices are predicted.
    channel, spacing
        As in `neurolib.volume.read_volume`.
    workers : int
        Processes of this machine that share the regions and the cores; 0: only this process.
    scheduler : str
        Address of a Dask cluster instead, such as ``tcp://10.0.0.1:8786``. Its workers must see the
        files under the same absolute paths.

    Returns
    -------
    Path
        `out`.
    """
    image, checkpoint, out = (Path(path).absolute() for path in (image, checkpoint, out))
    check_range("workers", workers)
    if out.suffix.lower() != ".zarr":
        raise SettingsError(f"{out.name}: expected a name that ends in .zarr")
    digest = sha256(checkpoint) if checkpoint.is_file() else ""
    _network(checkpoint, digest)
    read_volume(image, channel, check=False)
    source = fingerprint(image)
    kept = ("overlap", "flips", "skip_empty", "filter_weight")
    options = {name: getattr(tiling, name) for name in kept} | {"channel": channel}
    options |= {"spacing": list(spacing)} if spacing else {}
    wanted = {"checkpoint": digest, "input": source, "options": options}
    part = out.with_name(f"{out.name}.part")
    with claim(out.with_name(f".{out.name}.lock"), part):
        if not part.exists():
            same = out.exists() and wanted.items() <= _manifest(out).items()
            if same and is_result(out):
                return out
            _begin(part, out.stem, read_volume(image, channel, spacing=spacing), wanted)
        begun = _manifest(part)
        differs = [key for key in wanted if begun.get(key) != wanted[key]]
        if differs:
            raise SettingsError(
                f"{part.name}: begun with another {' and '.join(differs)}; use the "
                f"same as before, or remove {part} to start again"
            )
        threads = max(1, (os.cpu_count() or 1) // workers) if workers and not scheduler else 0
        levels = begun["low"], begun["high"], begun["empty"]
        job = _Job(image, channel, source, checkpoint, digest, part, *levels, tiling, threads)
        array = _array(part)
        step = [-(-n // chunk) * chunk for n, chunk in zip(REGION, array.chunks, strict=True)]
        todo = [box for box in boxes((0, 0, 0), array.shape, step) if _missing(job, box)]
        for _ in tqdm(_predict_regions(job, todo, workers, scheduler), "regions", len(todo)):
            pass
        for left in part.rglob("*.partial"):  # left by killed writes
            left.unlink(missing_ok=True)
        with workplace(out) as folder:
            if out.exists():
                os.replace(out, folder / out.name)
            seal_zarr(part)
            os.replace(part, out)
    return out


def _predict_regions(job: _Job, todo: list[Box], workers: int, scheduler: str) -> Iterator[None]:
    """Predict regions, in any order, here or by Dask; yield as each one is done."""
    if not workers and not scheduler:
        yield from (_predict_region(job, box) for box in todo)
        return
    with cluster.connect(workers, scheduler) as client:
        for _, error in cluster.share(client, functools.partial(_predict_region, job), todo):
            if error is not None:
                raise error
            yield


def fingerprint(path: Path) -> str:
    """SHA-256 over names, sizes and times of the files of an image, not over their contents.

    Reading terabytes would take hours at every start.
    """
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        facts = file.stat()
        digest.update(f"{file.relative_to(path.parent)}\0{facts.st_size}\0".encode())
        digest.update(f"{facts.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _begin(part: Path, name: str, volume: Volume, wanted: dict) -> None:
    """Make an output without chunks, and a manifest with all that depends on the whole input."""
    low, high = limits(volume.data, stored_boxes(volume.data))
    scaled = normalised(volume.data, low, high)
    level = empty_level(scaled, stored_boxes(scaled, cut=False))
    with atomic_path(part) as temporary:
        about = provenance("probability", checkpoint=wanted["checkpoint"], **wanted["options"])
        array = (tuple(volume.data.shape), np.dtype(np.float32), volume.spacing)
        create_zarr(temporary, name, *array, known=not volume.unknown, about=about)
        facts = wanted | {"low": low, "high": high, "empty": level}
        write_text(temporary / MANIFEST, json.dumps(facts, indent=1))


def _manifest(folder: Path) -> dict:
    """The manifest of an output; empty if it has none."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _array(part: Path) -> Any:
    """The array of an output; chunks of zeros are written too, so that they count as done."""
    import zarr

    return zarr.open_array(part / "0", mode="r+").with_config({"write_empty_chunks": True})


def _missing(job: _Job, box: Box) -> list[Box]:
    """The chunks of a region that still need a file; chunks without one mean zeros."""
    blank, chunks, missing = _blank_of(job), _array(job.part).chunks, []
    lower, upper = ([getattr(s, end) for s in box] for end in ("start", "stop"))
    for chunk in boxes(lower, upper, chunks):
        place = (str(s.start // n) for s, n in zip(chunk, chunks, strict=True))
        if not (job.part.joinpath("0", "c", *place).exists() or blank(chunk)):
            missing.append(chunk)
    return missing


def _predict_region(job: _Job, box: Box) -> None:
    """Predict the chunks of a region that are missing."""
    missing = _missing(job, box)
    if not missing:
        return
    if job.threads:
        torch.set_num_threads(job.threads)
    around = tuple(
        slice(min(c[axis].start for c in missing), max(c[axis].stop for c in missing))
        for axis in range(3)
    )
    network = _network(job.checkpoint, job.digest)
    probability = predict_box(network, _image(job), around, job.tiling, job.empty)
    array, origin = _array(job.part), [s.start for s in around]
    for chunk in missing:
        here = (slice(s.start - o, s.stop - o) for s, o in zip(chunk, origin, strict=True))
        # Zarr writes a chunk under another name and then renames it.
        with explain_full_disk(job.part):
            array[chunk] = probability[tuple(here)]


def _image(job: _Job) -> Mapped:
    return normalised(_read(job.image, job.channel, job.source).data, job.low, job.high)


# A cluster's worker outlives a call, so its cache is keyed by contents, not by name alone.
@functools.lru_cache(1)
def _read(image: Path, channel: int | None, source: str) -> Volume:
    return read_volume(image, channel, check=False)


@functools.lru_cache(1)
def _network(checkpoint: Path, digest: str) -> Segmenter:
    return load_checkpoint(checkpoint)[0]
