"""Volumes larger than memory: OME-Zarr in, OME-Zarr probability out, one region at a time.

The output is cut into regions of whole chunks. What a region's tiles see of the input is read,
predicted, and written chunk by chunk, each once and whole. Until all chunks are there the result
has the name ``OUT.part``, with a manifest of what it is made of; a call that finds it goes on with
the chunks that are missing. Regions are independent: they run one after the other, on processes of
this machine, or on any Dask cluster that sees the same files.
"""

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from neurolib.errors import SettingsError
from neurolib.files import atomic_path, sha256, write_text
from neurolib.formats import boxes
from neurolib.inference import Box, check_options, empty_level, predict_box
from neurolib.network import Segmenter
from neurolib.training import load_checkpoint
from neurolib.volume import Volume, create_zarr, limits, read_volume, rescale

# Slices, rows, columns. Tiles that reach over the border of a region are run for both sides: here,
# with tiles of 100 that overlap by a quarter, a fifth more than for the volume at once. A region
# takes about half a gigabyte: its input and its probability in float32, and votes of a few slices.
REGION = (32, 1024, 1024)

MANIFEST = "neurolib.json"


@dataclass(frozen=True)
class Mapped:
    """A volume (z, y, x) of which each part is computed from that of another, when it is read."""

    data: Any
    function: Callable[[np.ndarray], np.ndarray]
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def chunks(self) -> tuple[int, ...] | None:
        return getattr(self.data, "chunks", None)

    def __getitem__(self, key: Any) -> np.ndarray:
        return self.function(self.data[key])


def normalised(data: np.ndarray, low: float, high: float) -> Mapped:
    """`neurolib.volume.normalise` part by part, when it is read; `low` and `high` of `limits`."""

    def function(part: np.ndarray) -> np.ndarray:
        return rescale(part, low, high, np.empty(part.shape, np.float32))

    return Mapped(data, function, np.dtype(np.float32))


def thresholded(probability: np.ndarray, cut: float) -> Mapped:
    """The mask of a probability, 0 and 255 as uint8, part by part, when it is read."""
    return Mapped(probability, lambda part: (part >= cut) * np.uint8(255), np.dtype(np.uint8))


@dataclass(frozen=True)
class _Job:
    """All that a worker needs to know; files by absolute paths."""

    image: Path
    channel: int | None
    source: str  # fingerprint of the image
    checkpoint: Path
    digest: str  # SHA-256 of the checkpoint
    part: Path
    low: float
    high: float
    overlap: float
    batch: int
    device: str
    flips: bool
    skip_below: float
    threads: int  # of PyTorch; 0: its own choice


def predict_large(
    image: str | Path,
    checkpoint: str | Path,
    out: str | Path,
    overlap: float = 0.25,
    batch: int = 8,
    device: str = "auto",
    flips: bool = False,
    skip_empty: float = 0.0,
    channel: int | None = None,
    workers: int = 0,
    scheduler: str = "",
    region: tuple[int, int, int] = REGION,
    progress: bool = True,
) -> Path:
    """Predict the probability of neurite of an image on disk, into an OME-Zarr on disk.

    The result is that of `neurolib.inference.predict_volume` on the normalised image, up to
    rounding. If the call is interrupted, the same call goes on; if it was finished, it returns.

    Parameters
    ----------
    image : path
        OME-Zarr, or what can be mapped into memory (`neurolib.volume.read_volume`); other files
        are read whole by every worker.
    checkpoint : path
    out : path
        Ends in ``.zarr``: float32, in chunks, with the spacing of the image.
    overlap, batch, device, flips
        As in `neurolib.inference.predict_volume`.
    skip_empty : float
        Percentile of the normalised image; tiles with no voxel above it are not run (see
        `neurolib.inference.empty_level`). 0: none but those that are exactly zero.
    channel : int, optional
        Of a multi-channel image.
    workers : int
        Processes of this machine that share the regions and the cores; 0: this process alone.
    scheduler : str
        Address of a Dask cluster instead, as ``tcp://10.0.0.1:8786``. Its workers see the files
        under the same absolute paths.
    region : (int, int, int)
        Voxels (z, y, x) predicted at once, rounded up to whole chunks.
    progress : bool
        Show a progress bar over regions.

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    VolumeError, WeightsError
        If image or checkpoint cannot be read.
    SettingsError
        If an option is out of range; if ``OUT.part`` was begun with another checkpoint, input or
        other options; if Dask is not installed, cannot be reached, or a worker keeps dying.
    """
    image, checkpoint, out = (Path(path).absolute() for path in (image, checkpoint, out))
    check_options(overlap, batch, 0.0)
    if out.suffix.lower() != ".zarr":
        raise SettingsError(f"{out.name}: expected a name that ends in .zarr")
    if workers < 0 or min(region) < 1:
        raise SettingsError(f"workers={workers}, region={region}: expected no negative number")
    digest = sha256(checkpoint) if checkpoint.is_file() else ""
    _network(checkpoint, digest)
    read_volume(image, channel, check=False)
    source = fingerprint(image)
    options = {"overlap": overlap, "flips": flips, "skip_empty": skip_empty, "channel": channel}
    wanted = {"checkpoint": digest, "input": source, "options": options}
    part = out.with_name(f"{out.name}.part")
    if not part.exists():
        if out.exists() and _same(_manifest(out), wanted):
            return out
        volume = read_volume(image, channel)
        _begin(part, out.stem, volume, wanted)
    found = _manifest(part)
    if not _same(found, wanted):
        differs = [key for key in wanted if found.get(key) != wanted[key]]
        raise SettingsError(
            f"{part.name}: begun with another {' and '.join(differs)}; go on with the same, or "
            f"remove {part} to begin anew"
        )
    threads = max(1, (os.cpu_count() or 1) // workers) if workers and not scheduler else 0
    job = _Job(
        *(image, channel, source, checkpoint, digest, part, found["low"], found["high"]),
        *(overlap, batch, device, flips, found["skip_below"], threads),
    )
    todo = [box for box in _regions(part, region) if _missing(part, box)]
    with _runner(workers, scheduler) as run:
        done = run(functools.partial(_predict_region, job), todo)
        for _ in tqdm(done, "regions", len(todo), mininterval=2, disable=not progress):
            pass
    _finish(part, out)
    return out


def fingerprint(path: Path) -> str:
    """SHA-256 over names, sizes and times of the files of an image, not over their contents.

    Contents of terabytes would be read for hours at every start.
    """
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        facts = file.stat()
        digest.update(f"{file.relative_to(path.parent)}\0{facts.st_size}\0".encode())
        digest.update(f"{facts.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _begin(part: Path, name: str, volume: Volume, wanted: dict) -> None:
    """Make an output without chunks, and the manifest; what needs the whole input is found here."""
    low, high = limits(volume.data)
    skip = wanted["options"]["skip_empty"]
    level = empty_level(normalised(volume.data, low, high), skip) if skip else 0.0
    with atomic_path(part) as temporary:
        shape = tuple(volume.data.shape)
        create_zarr(temporary, name, shape, np.dtype(np.float32), volume.spacing)
        facts = wanted | {"low": low, "high": high, "skip_below": min(level, 1 - 1e-6)}
        write_text(temporary / MANIFEST, json.dumps(facts, indent=1))


def _manifest(folder: Path) -> dict:
    """The manifest of an output; empty if it has none."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _same(found: dict, wanted: dict) -> bool:
    return {key: found.get(key) for key in wanted} == wanted


def _array(part: Path) -> Any:
    """The array of an output; chunks of nothing but zeros are written, too, to be seen as done."""
    import zarr

    return zarr.open_array(part / "0", mode="r+").with_config({"write_empty_chunks": True})


def _regions(part: Path, region: tuple[int, int, int]) -> Iterator[Box]:
    """Boxes of whole chunks that cover an output."""
    array = _array(part)
    step = [-(-n // chunk) * chunk for n, chunk in zip(region, array.chunks, strict=True)]
    yield from boxes((0, 0, 0), array.shape, step)


def _missing(part: Path, box: Box) -> list[Box]:
    """The chunks of a region that have no file yet."""
    chunks = _array(part).chunks
    lower, upper = ([getattr(s, end) for s in box] for end in ("start", "stop"))
    return [
        chunk
        for chunk in boxes(lower, upper, chunks)
        if not _chunk_file(part, chunk, chunks).exists()
    ]


def _chunk_file(part: Path, chunk: Box, chunks: tuple[int, ...]) -> Path:
    place = (str(s.start // n) for s, n in zip(chunk, chunks, strict=True))
    return part.joinpath("0", "c", *place)


def _predict_region(job: _Job, box: Box) -> int:
    """Predict the chunks of a region that are missing; return how many were written."""
    missing = _missing(job.part, box)
    if not missing:
        return 0
    if job.threads:
        torch.set_num_threads(job.threads)
    around = tuple(
        slice(min(c[axis].start for c in missing), max(c[axis].stop for c in missing))
        for axis in range(3)
    )
    data = normalised(_read(job.image, job.channel, job.source).data, job.low, job.high)
    found = predict_box(
        *(_network(job.checkpoint, job.digest), data, around, job.overlap, job.batch),
        *(job.device, job.flips, job.skip_below),
    )
    array, origin = _array(job.part), [s.start for s in around]
    for chunk in missing:
        here = (slice(s.start - o, s.stop - o) for s, o in zip(chunk, origin, strict=True))
        # Zarr writes a chunk beside and renames it.
        array[chunk] = found[tuple(here)]
    return len(missing)


# A worker of a cluster outlives a call: what it keeps goes by contents, not by name alone.
@functools.lru_cache(1)
def _read(image: Path, channel: int | None, source: str) -> Volume:
    return read_volume(image, channel, check=False)


@functools.lru_cache(1)
def _network(checkpoint: Path, digest: str) -> Segmenter:
    return load_checkpoint(checkpoint)[0]


@contextmanager
def _runner(workers: int, scheduler: str) -> Iterator[Callable[[Callable, list], Iterable]]:
    """A `map` in any order: over the processes of this machine, of a cluster, or in this one."""
    if not workers and not scheduler:
        yield map
        return
    try:
        import distributed
    except ImportError:
        raise SettingsError(
            "several workers need Dask, which is not installed; pip install -e .[cluster]"
        ) from None
    local = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": None}
    try:
        where = {"address": scheduler} if scheduler else local
        client = distributed.Client(**where)
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"scheduler={scheduler!r}: cannot be reached ({error}); give its address, as "
            "tcp://10.0.0.1:8786"
        ) from None

    def run(function: Callable, items: list) -> Iterator:
        futures = client.map(function, items, pure=False)
        for future in distributed.as_completed(futures):
            yield future.result()

    with client:
        try:
            yield run
        except distributed.scheduler.KilledWorker as error:
            raise SettingsError(
                f"workers keep dying on one region ({error.last_worker}), of too little memory "
                "perhaps; take fewer workers or a smaller region, the same command goes on"
            ) from None


def _finish(part: Path, out: Path) -> None:
    """Give a complete output its name; what had that name leaves as a whole."""
    for left in part.rglob("*.partial"):  # of writes that were killed
        left.unlink(missing_ok=True)
    old = None
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name[:40]}.", dir=out.parent)) / out.name
        os.replace(out, old)
    os.replace(part, out)
    if old:
        shutil.rmtree(old.parent, ignore_errors=True)
