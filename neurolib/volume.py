"""Volumes (z, y, x): reading, checking, scaling and writing image stacks.

`neurolib.data.formats` has the readers of the file formats.
"""

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from scipy.ndimage import gaussian_filter, uniform_filter1d

from neurolib.data import formats
from neurolib.data.formats import Box, LazyStack, check_memory, check_spacing, check_type
from neurolib.errors import NeurolibWarning, VolumeError
from neurolib.files import atomic_path, naming, seal_zarr

# Code that turns masks and probabilities from NIfTI, nnU-Net and ilastik into .npy.
CONVERT = {
    (".nii", ".nii.gz"): "import nibabel, numpy; numpy.save('out.npy', "
    "numpy.asarray(nibabel.load({0!r}).dataobj).T)",
    (".npz",): "import numpy; numpy.save('out.npy', numpy.load({0!r})['probabilities'][1])",
    (".h5", ".hdf5"): "import h5py, numpy; numpy.save('out.npy', "
    "h5py.File({0!r})['exported_data'][..., 0])",
}

# Microscope formats that Fiji opens.
PROPRIETARY = (".czi", ".lif", ".nd2", ".oib", ".oif", ".ims", ".lsm", ".mrc", ".nhdr", ".ome")

SUFFIXES = (*formats.FORMATS, ".zarr")

# A larger ratio of voxel edges probably comes from a wrong field in the file.
ANISOTROPY = 20
# Voxels processed at a time: 8-byte temporaries take 32 MB.
SLAB = 1 << 22
# Voxels drawn for the percentiles of a larger volume of floats or wide integers.
SAMPLE = 1 << 24


@dataclass(frozen=True)
class Volume:
    """A stack: data (z, y, x) and the lengths (dz, dy, dx) of a voxel.

    spacing: in µm, unless `unknown` says why not; then only the ratio matters. notes: one sentence
    for each choice or conversion of the reader.
    """

    data: np.ndarray | LazyStack
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    unknown: str = ""
    notes: tuple[str, ...] = ()

    @property
    def known_spacing(self) -> tuple[float, float, float] | None:
        """The spacing in µm, None if it is not known, as `neurolib.swc.read_swc` takes it."""
        return None if self.unknown else self.spacing


# Reading ------------------------------------------------------------------------------------------


def read_volume(
    path: str | Path,
    channel: int | None = None,
    check: bool = True,
    spacing: Sequence[float] | None = None,
) -> Volume:
    """Read an image stack; its suffix tells the format.

    ==================  ====================================  =========================
    suffix              spacing from                          in memory
    ==================  ====================================  =========================
    .tif, .tiff         ImageJ or OME metadata                mapped if not compressed
    .npy                (none)                                mapped; axes (z, y, x) or
                                                              (channel, z, y, x)
    .v3draw             (none)                                mapped
    .v3dpbd             (none)                                loaded
    .nrrd               spacings or space directions          mapped if raw
    .zarr (OME-Zarr;    coordinate transformations of level   read where it is indexed
    or a group in one)  0
    ==================  ====================================  =========================

    Parameters
    ----------
    path : str or Path
    channel : int, optional
        Channel of a multi-channel image, from 0.
    check : bool
        Check the values too (`check_values`), which reads the volume at most once.
    spacing : (dz, dy, dx), optional
        In µm; overrides the file's.

    Returns
    -------
    Volume
        Mapped data are read-only; foreign byte orders are converted. The data of OME-Zarr are a
        `neurolib.data.formats.LazyStack`, which reads only what is indexed. Where the spacing
        has no known unit, `Volume.unknown` says so; its ratio is still the anisotropy.

    Notes
    -----
    A `NeurolibWarning` reports voxels more than 20 times longer along one axis than along another.
    A damaged chunk of OME-Zarr is a `VolumeError` when it is read: here with `check`, or later.
    """
    path = Path(path)
    name = path.name
    with naming(name):
        stack = _read(path, channel)
        size = stack.spacing
        if spacing is not None:
            size = formats.Spacing(tuple(check_spacing(spacing).tolist()), "")
    if spacing is None and max(size.lengths) > ANISOTROPY * min(size.lengths):
        warnings.warn(
            f"{name}: voxels are more than {ANISOTROPY} times longer along one axis than along "
            f"another ({size.source}); if that is wrong, give spacing= (--spacing Z,Y,X in µm)",
            NeurolibWarning,
            stacklevel=2,
        )
    volume = Volume(stack.data, size.lengths, size.unknown, stack.notes)
    if check:
        check_values(volume, name)
    return volume


def _read(path: Path, channel: int | None) -> formats.Stack:
    """Choose the reader by the suffix; return its result in native byte order."""
    name, suffix = path.name, path.suffix.lower()
    # path.exists() would raise where a parent folder may not be read.
    if not os.path.exists(path):
        raise VolumeError(f"not found; check {path}")
    if suffix not in SUFFIXES and is_image(path):
        suffix = ".zarr"  # a group within an image, such as labels
    if suffix not in SUFFIXES:
        convert = next((code for end, code in CONVERT.items() if name.lower().endswith(end)), "")
        raise VolumeError(
            f"suffix {suffix or 'missing'!r}, expected one of {', '.join(SUFFIXES)}"
            + (f"; convert it in Python: {convert.format(name)}" if convert else "")
            + ("; unpack it first" if suffix in (".gz", ".zip", ".bz2") and not convert else "")
            + ("; save it as TIFF, for example with Fiji" if suffix in PROPRIETARY else "")
        )
    try:
        stack = (formats.read_zarr if suffix == ".zarr" else formats.read_file)(path, channel)
        data = stack.data
        if not data.dtype.isnative:
            stack = replace(stack, data=np.asarray(data).astype(data.dtype.newbyteorder("=")))
        return stack
    except MemoryError as error:
        raise VolumeError("does not fit in memory; use OME-Zarr or an uncompressed TIFF") from error
    except OSError as error:
        raise VolumeError(f"cannot be read ({error.strerror or error}); check {path}") from None


def remarks(volume: Volume, name: str) -> Iterator[str]:
    """Lines for the user on how the file `name` was read."""
    yield from (f"{name}: {note}" for note in volume.notes)
    if volume.unknown:
        yield f"{name}: spacing not known: {volume.unknown}; give spacing= (--spacing Z,Y,X in µm)"


def is_image(path: Path) -> bool:
    """Whether a path has the suffix of an image, or is a group of Zarr that holds no such path."""
    if path.suffix.lower() in SUFFIXES:
        return True
    is_group = any((path / name).exists() for name in ("zarr.json", ".zattrs", ".zgroup"))
    return is_group and not any(inside.suffix.lower() in SUFFIXES for inside in path.iterdir())


def check_values(volume: Volume, name: str) -> None:
    """Refuse a volume that holds NaN, infinite or only equal values.

    It reads piece by piece: integers only up to the first difference, OME-Zarr only stored chunks.
    """
    data = volume.data
    low, high = np.inf, -np.inf
    whole = ((box[0].start, data[box]) for box in pieces(data))
    for start, piece in data.stored() if isinstance(data, LazyStack) else whole:
        # NaN and infinities show up in the extremes.
        bottom, top = float(piece.min()), float(piece.max())
        if not (np.isfinite(bottom) and np.isfinite(top)):
            z = start + int(np.argmin(np.isfinite(piece).all(axis=(1, 2))))
            raise VolumeError(
                f"{name}: slice {z} holds NaN or infinite values, expected finite; replace them"
            )
        low, high = min(low, bottom), max(high, top)
        if low < high and data.dtype.kind != "f":
            return
    if low == high:
        raise VolumeError(
            f"{name}: every voxel is {low:g}, expected an image; check its export and its channel"
        )


def pieces(data: Any, chunks: Sequence[int] | None = None) -> Iterator[Box]:
    """Cut a volume into boxes of whole chunks, of at most SLAB voxels or one chunk.

    This way, each stored chunk is unpacked only once.
    """
    step = list(chunks or getattr(data, "chunks", None) or (1, 1, 1))
    for axis in (2, 1, 0):
        step[axis] = min(data.shape[axis], step[axis] * max(1, SLAB // prod(step)))
    return formats.boxes((0, 0, 0), data.shape, step)


def bounding_box(data: np.ndarray) -> Box | None:
    """Slices of the smallest box around what is not zero in a volume or mask; None if all is."""
    used = [np.flatnonzero(data.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    if not len(used[0]):
        return None
    return tuple(slice(int(places[0]), int(places[-1]) + 1) for places in used)


# Scaling ------------------------------------------------------------------------------------------


LEVELS = (0.5, 99.8)  # percentiles that become 0 and 1


def normalise(data: np.ndarray) -> np.ndarray:
    """Scale intensities (z, y, x) to [0, 1] float32, clipped at the 0.5 and 99.8 percentiles.

    If more than half of the voxels are exactly zero, as in masked volumes, the percentiles are
    those of the other voxels. The ceiling keeps saturated spots from dimming the neurites. The
    data, finite integers or floats, need not be in memory; constant data become zero.

    Percentiles (linear between ranks) are exact for 8- and 16-bit integers, by histogram, and
    for other types up to 2^24 voxels. Larger volumes are sampled with a fixed seed; the levels
    then have a standard error of at most 0.002 percentage points.
    """
    check_memory(getattr(data, "name", "volume"), data.shape, np.dtype(np.float32))
    scaled = np.empty(data.shape, dtype=np.float32)
    low, high = limits(data)
    for box in pieces(data):
        rescale(data[box], low, high, scaled[box])
    return scaled


def rescale(part: np.ndarray, low: float, high: float, out: np.ndarray) -> np.ndarray:
    """Scale a part of a volume into `out`, so that `low` and `high` (`limits`) become 0 and 1."""
    # float32 cannot tell neighbouring values of wide types apart.
    working = np.float32 if part.dtype.itemsize <= 2 or part.dtype == np.float32 else np.float64
    part = part.astype(working)
    part -= working(low)
    part /= working(high - low)
    return np.clip(part, 0, 1, out=out, casting="same_kind")


def limits(data: np.ndarray, regions: Iterable[Box] | None = None) -> tuple[float, float]:
    """Intensities that become 0 and 1 (`normalise`), in one pass over data of any size.

    For integers of up to 16 bits only `regions` are read, if given: disjoint boxes that hold all
    nonzero voxels (`neurolib.course.large.stored_boxes`).
    """
    if data.dtype.kind in "iub" and data.dtype.itemsize <= 2:
        values, counts = _histogram(data, pieces(data) if regions is None else regions)
        smallest, largest = values[0], values[-1]
        bright, shares = values[values != 0], counts[values != 0]
        if 0 < shares.sum() < counts.sum() / 2:
            values, counts = bright, shares
        # Each value has a run of ranks; between runs, percentiles are linear.
        last = np.cumsum(counts) - 1
        runs = np.stack([last - counts + 1, last], axis=1).ravel()
        low, high = np.interp(np.array(LEVELS) / 100 * last[-1], runs, values.repeat(2))
    else:
        values = _sample(data)
        smallest, largest = values.min(), values.max()
        bright = values[values != 0]
        low, high = np.percentile(bright if 0 < len(bright) < len(values) / 2 else values, LEVELS)
    if low >= high:
        # Nearly all voxels are equal, as in a mask.
        low, high = smallest, largest
    return float(low), float(high if low < high else low + 1)


def _histogram(data: np.ndarray, regions: Iterable[Box]) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values of a narrow integer type, ascending, and their counts."""
    low = int(np.iinfo(data.dtype).min) if data.dtype.kind != "b" else 0
    counts = np.zeros(1 << (8 * data.dtype.itemsize), dtype=np.int64)
    for box in regions:
        piece = data[box].ravel()
        piece = piece if low == 0 else piece.astype(np.intp) - low
        counts += np.bincount(piece, minlength=len(counts))
    counts[-low] += prod(data.shape) - counts.sum()
    values = np.flatnonzero(counts)
    return values + low, counts[values]


def _sample(data: np.ndarray) -> np.ndarray:
    """All values as float64, or `SAMPLE` of them drawn with a fixed seed."""
    total = prod(data.shape)
    if total <= SAMPLE:
        return np.asarray(data, dtype=np.float64).ravel()
    rng = np.random.default_rng(0)
    parts = []
    for box in pieces(data):
        piece = data[box].ravel()
        parts.append(rng.choice(piece, round(SAMPLE * piece.size / total)))
    return np.concatenate(parts).astype(np.float64)


POLARITY = 1 << 21  # voxels that `inverted` looks at
# What users are told about an inverted stack.
INVERT = (
    "dark structures on a bright background; neurites must be bright: invert it, in ImageJ with "
    "Edit > Invert, in NumPy with image.max() - image"
)

# Bins of the histogram of `standing_out`, which lies in [-1, 1].
BINS = 1 << 16
# Nothing stands out in a tile that stays below this percentile of the volume, or below this many
# standard deviations of the background if that is less.
EMPTY, CERTAIN = 99.7, 20.0
REACH = 24  # of the wider Gaussian of `standing_out`, which SciPy cuts off at 4 σ


def standing_out(slices: np.ndarray, kept: slice = slice(None)) -> np.ndarray:
    """How much brighter voxels are than their surroundings: a difference of two Gaussians.

    Each of the slices (z, y, x) is averaged with its neighbours, then smoothed in the plane with
    σ = 1.5 voxels, minus the same with σ = 6: neurites remain, haze and broad background go. Only
    the slices `kept` are smoothed and returned.
    """
    mean = uniform_filter1d(np.asarray(slices, np.float32), 3, axis=0, mode="nearest")[kept]
    return gaussian_filter(mean, (0, 1.5, 1.5)) - gaussian_filter(mean, (0, 6, 6))


def empty_level(image: np.ndarray, regions: Iterable[Box] | None = None) -> float:
    """What a voxel must exceed in `standing_out` for its tile to be run.

    A percentile over the volume, since neurites fill few voxels; at most 20 standard deviations of
    the background, so that dim neurites are not lost where bright ones fill much of the volume.
    Voxels that do not stand out at all, as outside a mask, are not counted.
    `benchmarks/skipping.py` counts what is saved and lost. The image is normalised to [0, 1] and
    need not be in memory. Only `regions` are read, if given: the `pieces` that are not all zero.
    """
    counts = np.zeros(BINS, np.int64)
    for box in pieces(image) if regions is None else regions:
        part = image[box]
        # Heights are exactly zero where everything that the Gaussians reach is zero.
        if (inside := bounding_box(part)) is None:
            continue
        near = (slice(max(0, side.start - REACH), side.stop + REACH) for side in inside)
        heights = standing_out(part[tuple(near)])
        counts += np.histogram(heights[heights != 0], BINS, (-1, 1))[0]
    ranks = np.array([25, 75, EMPTY]) / 100 * (counts.sum() - 1)
    low, high, level = np.searchsorted(np.cumsum(counts), ranks, "right") * 2 / BINS - 1
    # The interquartile range of a normal distribution is 1.349 standard deviations.
    return max(0.0, min(level, CERTAIN * (high - low) / 1.349)) if counts.any() else 0.0


def inverted(data: np.ndarray) -> bool:
    """Whether the structures of an image (`normalise`) are dark on a bright background.

    The difference of Gaussians of 1.5 and 6 pixels in each slice leaves structures about as thick
    as a neurite. Its skewness is 3.3 to 6.3 in ten confocal stacks, -5.6 to -2.8 in their
    negatives, and within 0.03 of 0 in noise. The bound of -0.3 lies between. For large images,
    only evenly spaced slices are used.
    """
    step = min(len(data), -(-data.size // POLARITY))
    some = data[step // 2 :: step]
    fine, coarse = (gaussian_filter(some, (0, sigma, sigma)) for sigma in (1.5, 6))
    detail = (fine - coarse).astype(np.float64)
    detail -= detail.mean()
    spread = float((detail**2).mean())
    return spread > 0 and float((detail**3).mean()) < -0.3 * spread**1.5


# Writing ------------------------------------------------------------------------------------------

# ImageJ's TIFF holds these types and up to 4 GiB; the rest is written as OME-TIFF.
IMAGEJ_TYPES = ("uint8", "uint16", "float32")
IMAGEJ_BYTES = (1 << 32) - (1 << 20)
OME_TYPES = ("int8", "int16", "int32", "uint32", "float64")

# Chunks of OME-Zarr, of half a megabyte in 16 bits; a block of 5 x 100 x 100 touches four of them
# on average. Smaller ones hardly speed up a block, slow down all else, and make millions of files.
CHUNKS = (16, 128, 128)


def write_volume(
    path: str | Path,
    data: np.ndarray,
    spacing: Sequence[float] | None = None,
    *,
    known: bool = True,
    about: str = "",
) -> Path:
    """Write a stack as TIFF, .npy or OME-Zarr, atomically.

    Parameters
    ----------
    path : str or Path
        ``.tif`` or ``.tiff``: compressed without loss, with spacing for ImageJ (as OME-TIFF
        where ImageJ's format cannot hold it: more than 4 GiB, other integers, float64).
        ``.npy``: the array alone; the spacing is lost.
        ``.zarr``: OME-Zarr (NGFF 0.5) of one level, in compressed chunks with checksums.
    data : ndarray, (z, y, x)
        TIFF stores booleans as 0 and 255, like ImageJ's masks. ``.zarr`` takes anything that can
        be sliced and writes it piece by piece, so that it need not fit in memory.
    spacing : sequence of float, optional
        (dz, dy, dx) in µm; without it, (1, 1, 1) in no unit.
    known : bool
        False writes `spacing` without a unit (in OME-TIFF, which needs one, as "pixel").
    about : str
        Provenance (`neurolib.files.provenance`) for the metadata: ImageJ shows it as the image's
        info; ``.npy`` cannot hold it.
    """
    path = Path(path)
    suffix, known = path.suffix.lower(), known and spacing is not None
    with naming(path.name):
        if suffix not in (".tif", ".tiff", ".npy", ".zarr"):
            raise VolumeError(f"suffix {suffix or 'missing'!r}, expected .tif, .tiff, .npy, .zarr")
        if suffix != ".zarr" or not hasattr(data, "shape"):
            data = np.asarray(data)
        if len(data.shape) != 3 or not prod(data.shape):
            raise VolumeError(f"expected an array (z, y, x), got shape {data.shape}")
        lengths = tuple(check_spacing((1, 1, 1) if spacing is None else spacing).tolist())
        if suffix in (".npy", ".zarr"):
            check_type(data.dtype)
        else:
            data = data.astype(np.uint8) * np.uint8(255) if data.dtype == bool else data
            options = _tiff_options(data, lengths, known, about)
    with atomic_path(path) as temporary:
        if suffix == ".zarr":
            _write_zarr(temporary, data, lengths, known=known, about=about)
            seal_zarr(temporary)
        elif suffix == ".npy":
            np.save(temporary, data, allow_pickle=False)
        else:
            tifffile.imwrite(temporary, data, **options)
    return path


def _tiff_options(
    data: np.ndarray, lengths: tuple[float, float, float], known: bool, about: str
) -> dict[str, Any]:
    """Options of tifffile that write a stack for ImageJ, or as OME-TIFF."""
    dz, dy, dx = lengths
    options = {"photometric": "minisblack", "compression": "zlib"}
    options |= {"software": about.splitlines()[0]} if about else {}
    # tifffile writes an ImageJ stack of single columns as one page, which cannot be read back.
    if data.dtype.name in IMAGEJ_TYPES and data.nbytes < IMAGEJ_BYTES and data.shape[2] > 1:
        metadata = {"axes": "ZYX", "spacing": dz} | ({"unit": "micron"} if known else {})
        metadata |= {"Info": about} if about else {}
        return options | {"imagej": True, "resolution": (1 / dx, 1 / dy), "metadata": metadata}
    if data.dtype.name not in (*IMAGEJ_TYPES, *OME_TYPES):
        raise VolumeError(f"TIFF cannot hold {data.dtype}; convert it or write .npy")
    metadata = {f"PhysicalSize{a}": d for a, d in zip("ZYX", lengths, strict=True)}
    metadata |= {} if known else {f"PhysicalSize{a}Unit": "pixel" for a in "ZYX"}
    metadata |= {"Description": about} if about else {}
    return options | {"ome": True, "bigtiff": True, "metadata": {"axes": "ZYX", **metadata}}


def create_zarr(
    path: Path,
    name: str,
    shape: tuple[int, int, int],
    dtype: np.dtype,
    spacing: tuple[float, float, float],
    *,
    known: bool = True,
    about: str = "",
) -> Any:
    """Create an empty OME-Zarr image (https://ngff.openmicroscopy.org/0.5) of one level.

    Its metadata hold `name`, `spacing` (dz, dy, dx; in µm, or without a unit if not `known`) and
    `about`. Write to the `zarr.Array` that is returned; chunks never written are zero.
    """
    import zarr

    unit = {"unit": "micrometer"} if known else {}
    axes = [{"name": axis, "type": "space", **unit} for axis in "zyx"]
    scale = {"type": "scale", "scale": list(spacing)}
    level = {"path": "0", "coordinateTransformations": [scale]}
    image = {"name": name, "axes": axes, "datasets": [level]}
    metadata = {"ome": {"version": "0.5", "multiscales": [image]}}
    if about:
        metadata["neurolib"] = about.splitlines()
    group = zarr.create_group(path, zarr_format=3, attributes=metadata)
    return group.create_array(
        "0",
        shape=shape,
        dtype=dtype.newbyteorder("="),
        chunks=tuple(map(min, CHUNKS, shape)),
        # Higher levels gain nothing on noise. The checksum reveals damage.
        compressors=zarr.codecs.ZstdCodec(level=1, checksum=True),
        dimension_names=("z", "y", "x"),
    )


def _write_zarr(path: Path, data: Any, spacing: tuple[float, float, float], **options: Any) -> None:
    """Write an OME-Zarr image, piece by piece."""
    array = create_zarr(path, path.stem, data.shape, data.dtype, spacing, **options)
    # Boxes of whole chunks here and, where the two agree, in the source.
    source = getattr(data, "chunks", None) or array.chunks
    step = [-(-n // own) * own for own, n in zip(array.chunks, source, strict=True)]
    for box in pieces(array, step):
        array[box] = data[box]
