"""Volumes (z, y, x): reading, checking, scaling and writing image stacks.

Every reader compares what a header claims with what the file can hold before it allocates
anything, and maps the file into memory where its format allows.
"""

import importlib
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile

from neurolib.errors import VolumeError
from neurolib.files import atomic_path

SUFFIXES = (".tif", ".tiff", ".npy", ".v3draw", ".v3dpbd", ".nrrd", ".zarr")

# Voxels looked at together: temporaries of 8 bytes each stay at 32 MB, whatever the volume.
SLAB = 1 << 22

# Voxels whose percentiles stand for those of a larger float volume.
SAMPLE = 1 << 24

# Micrometres per unit, by the names that ImageJ, OME and NRRD files use.
MICRONS = {
    "um": 1.0,
    "µm": 1.0,
    "μm": 1.0,
    "\\u00b5m": 1.0,
    "micron": 1.0,
    "microns": 1.0,
    "micrometer": 1.0,
    "micrometers": 1.0,
    "micrometre": 1.0,
    "nm": 1e-3,
    "nanometer": 1e-3,
    "mm": 1e3,
    "millimeter": 1e3,
    "cm": 1e4,
    "centimeter": 1e4,
    "m": 1e6,
    "inch": 25400.0,
}


@dataclass(frozen=True)
class Volume:
    """A stack: data (z, y, x) and physical spacing (dz, dy, dx) in µm (1, 1, 1 where unknown)."""

    data: np.ndarray
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)


# --------------------------------------------------------------------------------------------
# Reading


def read_volume(path: str | Path, channel: int | None = None, check: bool = True) -> Volume:
    """Read an image stack, chosen by its suffix.

    ==================  ====================================  =========================
    suffix              spacing from                          in memory
    ==================  ====================================  =========================
    .tif, .tiff         ImageJ or OME metadata                mapped if not compressed
    .npy                (none)                                mapped; axes (z, y, x) or
                                                              (channel, z, y, x)
    .v3draw             (none)                                mapped
    .v3dpbd             (none)                                loaded, by v3d-py-helper
    .nrrd               spacings or space directions          mapped if raw
    .zarr (OME-Zarr)    coordinate transformations of level   read piece by piece, by zarr
                        0
    ==================  ====================================  =========================

    Parameters
    ----------
    path : str or Path
    channel : int, optional
        Which channel of a multi-channel image to take, from 0.
    check : bool
        Look at the values, too (`check_values`). It reads the volume once, at most.

    Returns
    -------
    Volume
        Mapped data are read-only and in native byte order; other byte orders are converted.
        Where the unit is missing or is "pixel", the numbers of the file are kept, since their
        ratio is still the anisotropy.

    Raises
    ------
    VolumeError
        If the file is missing, empty, truncated or of another format; is 2D, RGB, a time
        series or multi-channel with no `channel` given; claims more voxels than its bytes can
        hold; or holds NaN, infinite or only equal values.
    """
    path = Path(path)
    name = path.name
    suffix = path.suffix.lower()
    if not path.exists():
        raise VolumeError(f"{name}: not found; check {path}")
    if suffix not in SUFFIXES:
        raise VolumeError(
            f"{name}: suffix {suffix or 'missing'!r}, expected one of {', '.join(SUFFIXES)}"
        )
    if suffix == ".zarr":
        volume = _read_zarr(path, channel)
    else:
        if not path.is_file():
            raise VolumeError(f"{name}: is a folder, expected a file; give one image stack")
        try:
            size = path.stat().st_size
            with open(path, "rb") as file:
                head = file.read(4096)
        except OSError as error:
            raise VolumeError(f"{name}: cannot be read ({error.strerror}); check {path}") from None
        if not size:
            raise VolumeError(f"{name}: the file is empty (0 bytes); copy or download it again")
        reader = {
            ".tif": _read_tiff,
            ".tiff": _read_tiff,
            ".npy": _read_npy,
            ".v3draw": _read_v3draw,
            ".v3dpbd": _read_v3dpbd,
            ".nrrd": _read_nrrd,
        }[suffix]
        try:
            volume = reader(path, head, size, channel)
        except MemoryError as error:
            raise VolumeError(
                f"{name}: does not fit in memory; convert it to OME-Zarr or an uncompressed TIFF"
            ) from error
    if check:
        check_values(volume, name)
    return volume


def check_values(volume: Volume, name: str) -> None:
    """Refuse a volume that holds NaN, infinite or only equal values.

    It is looked at slab by slab, and of whole-number images only as far as the first
    difference.

    Raises
    ------
    VolumeError
    """
    low, high = np.inf, -np.inf
    floating = volume.data.dtype.kind == "f"
    for start, slab in _slabs(volume.data):
        # NaN and infinities show in the extremes, so no array of flags is needed.
        bottom, top = float(slab.min()), float(slab.max())
        if not (np.isfinite(bottom) and np.isfinite(top)):
            z = start + int(np.argmin(np.isfinite(slab).all(axis=(1, 2))))
            raise VolumeError(
                f"{name}: slice {z} holds NaN or infinite values, expected finite intensities; "
                "replace them"
            )
        low, high = min(low, bottom), max(high, top)
        if low < high and not floating:
            return
    if low == high:
        raise VolumeError(
            f"{name}: every voxel is {low:g}, expected an image; "
            "check the export or choose another channel"
        )


def _slabs(data: Any) -> Iterator[tuple[int, np.ndarray]]:
    """Cut along the first axis into pieces of at most SLAB voxels (or single slices)."""
    step = max(1, SLAB // max(1, prod(data.shape[1:])))
    # Stored pieces are never cut: each is fetched and unpacked once.
    depth = getattr(data, "chunks", (1,))[0]
    step = max(depth, step // depth * depth)
    for start in range(0, data.shape[0], step):
        yield start, np.asarray(data[start : start + step])


def _check_shape(name: str, shape: Sequence[int]) -> None:
    """Refuse everything but three dimensions of which z has more than one slice."""
    if len(shape) == 2 or (len(shape) == 3 and shape[0] == 1):
        raise VolumeError(
            f"{name}: expected a 3D stack, got shape {tuple(shape)}; a single slice is not a volume"
        )
    if len(shape) != 3 or not all(n > 0 for n in shape):
        raise VolumeError(f"{name}: expected a 3D stack, got shape {tuple(shape)}; convert it")


def _check_type(name: str, dtype: np.dtype) -> None:
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise VolumeError(f"{name}: voxel type {dtype}, expected integers or floats; convert it")


def _check_size(name: str, shape: Sequence[int], dtype: np.dtype, available: int) -> None:
    """Compare the bytes that a header claims with those that are there."""
    claimed = prod(shape) * dtype.itemsize
    if claimed > available:
        raise VolumeError(
            f"{name}: header claims {tuple(shape)} voxels of {dtype} ({claimed} bytes), "
            f"found {max(available, 0)} bytes; the file is truncated or damaged"
        )


def _choose_channel(name: str, channels: int, channel: int | None) -> int:
    """Index of the channel to take, or the error that tells which there are."""
    if channel is None:
        if channels > 1:
            raise VolumeError(
                f"{name}: {channels} channels (0 to {channels - 1}), expected one; "
                "say which with channel="
            )
        return 0
    if not 0 <= channel < channels:
        raise VolumeError(
            f"{name}: channel {channel} asked for, but there are channels 0 to {channels - 1}"
        )
    return channel


def _finish(name: str, data: np.ndarray, spacing: Sequence[float] = (1.0, 1.0, 1.0)) -> Volume:
    """Check the shape and type once more and give the data in native byte order."""
    _check_shape(name, data.shape)
    _check_type(name, data.dtype)
    if not data.dtype.isnative:
        data = np.asarray(data).astype(data.dtype.newbyteorder("="))
    return Volume(data, _clean_spacing(spacing))


def _clean_spacing(spacing: Sequence[float]) -> tuple[float, float, float]:
    """Replace what cannot be a distance (zero, negative, NaN) by 1, for "unknown"."""
    return tuple(float(d) if np.isfinite(d) and d > 0 else 1.0 for d in spacing)


def _map(path: Path, dtype: np.dtype, offset: int, shape: Sequence[int]) -> np.ndarray:
    try:
        return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=tuple(shape))
    except (OSError, ValueError) as error:
        raise VolumeError(f"{path.name}: cannot be mapped into memory ({error})") from None


# TIFF ---------------------------------------------------------------------------------------

# Most bytes that one stored byte can stand for, by compression: a claim beyond it is no image.
# 1: packed bits; 5: LZW, 4096 bytes per 12 bits; 8 and 32946: Deflate; 32773: PackBits.
EXPANSION = {1: 8, 5: 2731, 8: 1032, 32773: 64, 32946: 1032}
EXPANSION_OTHER = 1 << 15

# Bytes per value of each TIFF field type (TIFF 6.0, section 2, and BigTIFF).
FIELD_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
FIELD_BYTES |= {13: 4, 16: 8, 17: 8, 18: 8}


def _read_tiff(path: Path, head: bytes, size: int, channel: int | None) -> Volume:
    name = path.name
    if head[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        raise VolumeError(
            f"{name}: does not begin like a TIFF file; it is damaged or has the wrong suffix"
        )
    _check_tiff_chain(path, head, size)
    try:
        with tifffile.TiffFile(path) as tif:
            return _read_tiff_series(path, tif, size, channel)
    except VolumeError:
        raise
    except Exception as error:
        # Damaged files make tifffile and its codecs raise errors of nearly every type.
        raise VolumeError(f"{name}: cannot be read as TIFF: {_first_line(error)}") from error


def _read_tiff_series(path: Path, tif: tifffile.TiffFile, size: int, channel: int | None) -> Volume:
    name = path.name
    parts = list(tif.series)
    first = parts[0]
    same = all((s.shape, s.dtype) == (first.shape, first.dtype) for s in parts)
    if first.dtype is None:
        raise VolumeError(f"{name}: its voxel type is none that TIFF defines; convert it")
    if len(parts) > 1 and len(first.shape) == 2 and same:
        # Slices written one by one come as one series each.
        axes, shape = "ZYX", (len(parts), *first.shape)
    else:
        parts = parts[:1]
        axes, shape = _tiff_axes(name, first.axes, first.shape)
    _check_type(name, first.dtype)
    slices = prod(shape) // prod(shape[axes.index(axis)] for axis in "YX")
    claimed = _number((tif.imagej_metadata or {}).get("images", 1)) if tif.is_imagej else 1
    if claimed > slices:
        raise VolumeError(
            f"{name}: ImageJ's header claims {claimed:.0f} slices, found {slices}; "
            "the file is truncated or damaged"
        )
    index = _choose_channel(name, shape[axes.index("C")] if "C" in axes else 1, channel)
    spacing = _tiff_spacing(tif)
    if len(parts) == 1 and first.dataoffset is not None:
        _check_size(name, shape, first.dtype, size - first.dataoffset)
        dtype = first.dtype.newbyteorder(tif.byteorder)
        data = _map(path, dtype, first.dataoffset, shape)
    else:
        _check_tiff_pages(name, parts, shape, size)
        loaded = [s.asarray() for s in parts]
        data = (np.stack(loaded) if len(loaded) > 1 else loaded[0]).reshape(shape)
    data = data.transpose([axes.index(axis) for axis in "CZYX" if axis in axes])
    return _finish(name, data[index] if "C" in axes else data, spacing)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def _tiff_axes(name: str, axes: str, shape: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """Axes and shape without those of length 1, the stack axis named Z."""
    kept = [(a, n) for a, n in zip(axes, shape, strict=True) if n != 1 or a in "YX"]
    axes, shape = "".join(a for a, _ in kept), tuple(n for _, n in kept)
    if "S" in axes:
        raise VolumeError(
            f"{name}: colour image with {shape[axes.index('S')]} samples per pixel, expected "
            "grey values; split its channels first"
        )
    # Stacks of plain pages have no name for their axis: I, Q or "other" in tifffile's terms.
    unnamed = [a for a in axes if a not in "ZCTYX"]
    if "Z" not in axes and len(unnamed) == 1:
        axes = axes.replace(unnamed[0], "Z")
    if len(shape) == 2:
        _check_shape(name, shape)
    if sorted(axes) not in (sorted("ZYX"), sorted("CZYX")):
        raise VolumeError(
            f"{name}: axes {axes} of shape {shape}, expected ZYX or CZYX; if its frames or "
            "channels are slices, say so in the image's properties (ImageJ: Image > Properties)"
        )
    return axes, shape


def _check_tiff_chain(path: Path, head: bytes, size: int) -> None:
    """Follow the directories of all pages; refuse a chain or a tag that leaves the file.

    tifffile stops at the first page that it cannot reach and reports a shorter stack, so that
    a truncated file would pass for a smaller volume.
    """
    name = path.name
    end = "<" if head[:2] == b"II" else ">"
    big = b"+" in head[2:4]
    start = struct.Struct(end + ("8xQ" if big else "4xI"))
    count_field = struct.Struct(end + ("Q" if big else "H"))
    entry = struct.Struct(end + ("HHQ8x" if big else "HHI4x"))
    next_field = struct.Struct(end + ("Q" if big else "I"))
    cut = VolumeError(f"{name}: ends within a page directory; the file is truncated or damaged")
    seen: set[int] = set()
    with open(path, "rb") as file:
        if size < start.size:
            raise cut
        (offset,) = start.unpack_from(head)
        while offset or not seen:
            if offset in seen or not 8 <= offset < size:
                raise VolumeError(
                    f"{name}: page {len(seen)} is not within the file of {size} bytes; "
                    "the file is truncated or damaged"
                )
            seen.add(offset)
            if offset + count_field.size > size:
                raise cut
            file.seek(offset)
            (count,) = count_field.unpack(file.read(count_field.size))
            if offset + count_field.size + count * entry.size + next_field.size > size:
                raise cut
            for tag, kind, values in entry.iter_unpack(file.read(count * entry.size)):
                if values * FIELD_BYTES.get(kind, 1) > size:
                    raise VolumeError(
                        f"{name}: tag {tag} of page {len(seen) - 1} claims {values} values in a "
                        f"file of {size} bytes; the file is truncated or damaged"
                    )
            (offset,) = next_field.unpack(file.read(next_field.size))


def _check_tiff_pages(
    name: str, parts: Sequence[tifffile.TiffPageSeries], shape: Sequence[int], size: int
) -> None:
    """Refuse pages whose data are missing, leave the file, or are too few for `shape`."""
    available = 0
    for number, page in enumerate(page for part in parts for page in part.pages):
        counts = page.databytecounts if page is not None else ()
        offsets = page.dataoffsets if page is not None else ()
        ends = [o + n for o, n in zip(offsets, counts, strict=False)]
        if not ends or min(counts) <= 0 or max(ends) > size:
            raise VolumeError(
                f"{name}: the data of page {number} are not within the file of {size} bytes; "
                "the file is truncated or damaged"
            )
        compression = int(page.keyframe.compression)
        available += sum(counts) * EXPANSION.get(compression, EXPANSION_OTHER)
    _check_size(name, shape, parts[0].dtype, available)


def _tiff_spacing(tif: tifffile.TiffFile) -> tuple[float, float, float]:
    """(dz, dy, dx) from OME or ImageJ metadata; a plain TIFF records none."""
    if tif.is_ome:
        return _ome_spacing(tif.ome_metadata)
    if not tif.is_imagej:
        return (1.0, 1.0, 1.0)
    metadata = tif.imagej_metadata or {}
    tags = tif.pages[0].tags
    unit = MICRONS.get(str(metadata.get("unit", "")).strip().lower())
    if unit is None and tags.valueof(296, default=1) != 1:
        # Per inch or centimetre but without ImageJ's unit: a resolution for printing.
        return (1.0, 1.0, 1.0)
    # XResolution and YResolution are pixels per unit, as fractions.
    per_unit = [tags.valueof(code, default=(1, 1)) for code in (283, 282)]
    dy, dx = (d / n if n else 1.0 for n, d in per_unit)
    # ImageJ writes a negative spacing for a stack that was taken from top to bottom.
    dz = abs(_number(metadata.get("spacing", 1.0)))
    return tuple((unit or 1.0) * d for d in (dz, dy, dx))


def _number(value: Any) -> float:
    """`value` as float, NaN (for "unknown") where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def _ome_spacing(xml: str) -> tuple[float, float, float]:
    root = ElementTree.fromstring(xml)
    pixels = next((e for e in root.iter() if e.tag.endswith("}Pixels")), None)
    get = pixels.attrib.get if pixels is not None else {}.get
    # The OME schema's default unit is the micrometre.
    return tuple(
        _number(get(f"PhysicalSize{a}", 1))
        * MICRONS.get(get(f"PhysicalSize{a}Unit", "µm").lower(), 1)
        for a in "ZYX"
    )


# NumPy --------------------------------------------------------------------------------------


def _read_npy(path: Path, head: bytes, size: int, channel: int | None) -> Volume:
    name = path.name
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, fortran, dtype = read_header(file)
            offset = file.tell()
    except Exception as error:
        # The header is a Python literal: parsing damaged ones fails in many ways.
        raise VolumeError(
            f"{name}: its NumPy header cannot be read ({type(error).__name__}); save it again "
            "with numpy.save"
        ) from error
    if dtype.hasobject or dtype.names:
        raise VolumeError(f"{name}: holds Python objects or records, expected an array of numbers")
    _check_type(name, dtype)
    if len(shape) != 4:
        _check_shape(name, shape)
    if not all(n > 0 for n in shape):
        raise VolumeError(f"{name}: expected a 3D stack, got shape {shape}; it has no voxels")
    _check_size(name, shape, dtype, size - offset)
    data = _map(path, dtype, offset, shape[::-1] if fortran else shape)
    data = data.transpose() if fortran else data
    index = _choose_channel(name, shape[0] if len(shape) == 4 else 1, channel)
    return _finish(name, data[index] if data.ndim == 4 else data)


# Vaa3D --------------------------------------------------------------------------------------

# The formats are defined by their reader, stackutil.cpp and ImageLoaderBasic.cpp of Vaa3D.
V3DRAW_KEYS = {b"raw_image_stack_by_hpeng": 4, b"raw5image_stack_by_hpeng": 5}
V3DPBD_KEY = b"v3d_volume_pkbitdf_encod"


def _v3d_header(name: str, head: bytes, key: bytes, dims: int, code: str) -> tuple:
    """(byte order, type code, sizes) of a Vaa3D header with sizes of struct type `code`."""
    order = {b"L": "<", b"B": ">"}.get(head[24:25])
    if order is None:
        raise VolumeError(
            f"{name}: byte order {head[24:25]!r}, expected b'L' or b'B'; the file is damaged"
        )
    fields = struct.Struct(f"{order}h{dims}{code}")
    if len(head) < 25 + fields.size:
        raise VolumeError(f"{name}: ends within its header; the file is truncated")
    kind, *sizes = fields.unpack_from(head, 25)
    return order, kind, tuple(sizes), 25 + fields.size


def _read_v3draw(path: Path, head: bytes, size: int, channel: int | None) -> Volume:
    name = path.name
    dims = V3DRAW_KEYS.get(head[:24])
    if dims is None:
        raise VolumeError(f"{name}: does not begin like a .v3draw file; it is damaged")
    order, kind, sizes, offset = _v3d_header(name, head, head[:24], dims, "i")
    code = {1: "u1", 2: "u2", 4: "f4"}.get(kind)
    if code is None:
        raise VolumeError(f"{name}: voxel type {kind}, expected 1, 2 or 4 bytes; convert it")
    dtype = np.dtype(order + code)
    if prod(sizes) * kind + offset != size or min(sizes) < 1:
        # Early versions of Vaa3D wrote the sizes as 2-byte integers.
        _, _, short, short_offset = _v3d_header(name, head, head[:24], dims, "h")
        if min(short) > 0 and prod(short) * kind + short_offset == size:
            sizes, offset = short, short_offset
    return _v3d_volume(
        name, sizes, channel, lambda shape: _map_checked(path, dtype, offset, shape, size)
    )


def _map_checked(
    path: Path, dtype: np.dtype, offset: int, shape: Sequence[int], size: int
) -> np.ndarray:
    _check_size(path.name, shape, dtype, size - offset)
    return _map(path, dtype, offset, shape)


def _v3d_volume(name: str, sizes: Sequence[int], channel: int | None, load) -> Volume:
    """Check the sizes (x, y, z, channel[, time]), then `load` them as (channel, z, y, x)."""
    if min(sizes) < 1:
        raise VolumeError(f"{name}: sizes {sizes} (x, y, z, c), expected positive; it is damaged")
    if len(sizes) == 5 and sizes[4] != 1:
        raise VolumeError(f"{name}: a series of {sizes[4]} time points, expected one 3D stack")
    shape = sizes[3::-1]
    _check_shape(name, shape[1:])
    index = _choose_channel(name, shape[0], channel)
    return _finish(name, load(shape)[index])


def _read_v3dpbd(path: Path, head: bytes, size: int, channel: int | None) -> Volume:
    name = path.name
    if head[:24] != V3DPBD_KEY:
        raise VolumeError(f"{name}: does not begin like a .v3dpbd file; it is damaged")
    _, kind, sizes, offset = _v3d_header(name, head, V3DPBD_KEY, 4, "i")
    if kind not in (1, 2):
        raise VolumeError(
            f"{name}: packing {kind}, expected 1 or 2 bytes per voxel; "
            "save it as .v3draw with Vaa3D"
        )
    try:
        loaders = importlib.import_module("v3dpy.loaders")
    except ImportError as error:
        raise VolumeError(
            f"{name}: reading .v3dpbd needs v3d-py-helper; "
            "pip install v3d-py-helper, or save it as .v3draw with Vaa3D"
        ) from error

    def load(shape: tuple[int, ...]) -> np.ndarray:
        unpacked = _pbd_voxels(name, path.read_bytes()[offset:], kind)
        if unpacked != prod(shape):
            raise VolumeError(
                f"{name}: header claims {shape} (c, z, y, x) = {prod(shape)} voxels, its data "
                f"unpack to {unpacked}; the file is truncated or damaged"
            )
        stack = loaders.PBD().load(str(path))
        # The library unpacks to native order, but labels 2-byte voxels with the file's.
        return stack.view(stack.dtype.newbyteorder("="))

    return _v3d_volume(name, sizes, channel, load)


def _pbd_voxels(name: str, packed: bytes, kind: int) -> int:
    """Number of voxels that a packed stream holds, from its codes alone.

    The library trusts the file: a damaged one makes it write beyond its memory. So all codes
    are followed here first. A code byte stands for a run of literals, of differences to the
    previous voxel, or of one repeated value; `step` is its length in bytes, `run` in voxels.
    """
    step, run, difference = _PBD_CODES[kind]
    if packed and difference[packed[0]]:
        raise VolumeError(f"{name}: begins with a difference to no voxel; the file is damaged")
    position = voxels = 0
    end = len(packed)
    while position < end:
        code = packed[position]
        voxels += run[code]
        position += step[code]
    if position > end:
        raise VolumeError(f"{name}: ends within a run of voxels; the file is truncated")
    return voxels


def _pbd_codes(kind: int) -> tuple[list[int], list[int], list[bool]]:
    """Bytes and voxels behind each of the 256 codes, and whether it is one of differences."""
    if kind == 1:
        # Below 33 literals, below 128 differences of 2 bits, above repeats.
        literal, widths, repeat = 33, [(128, 32, 2)], 127
    else:
        # Below 32 literals, then differences of 3, 4 and 5 bits, above repeats.
        literal, widths, repeat = 32, [(80, 31, 3), (183, 79, 4), (223, 182, 5)], 222
    step, run, difference = [], [], []
    for code in range(256):
        width = next((w for w in widths if literal <= code < w[0]), None)
        if code < literal:
            run.append(code + 1)
            step.append(1 + (code + 1) * kind)
        elif width:
            _, gap, bits = width
            run.append(code - gap)
            step.append(1 + -(-run[-1] * bits // 8))
        else:
            run.append(code - repeat)
            step.append(1 + kind)
        difference.append(width is not None)
    return step, run, difference


_PBD_CODES = {kind: _pbd_codes(kind) for kind in (1, 2)}


# NRRD ---------------------------------------------------------------------------------------

NRRD_TYPES = {
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(("short", "short int", "signed short", "int16", "int16_t"), "i2"),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    "float": "f4",
    "double": "f8",
}


def _read_nrrd(path: Path, head: bytes, size: int, channel: int | None) -> Volume:
    """Read a NRRD with attached data, raw or gzip (http://teem.sourceforge.net/nrrd/)."""
    name = path.name
    fields, offset = _nrrd_fields(path, size)
    try:
        shape = tuple(int(n) for n in fields["sizes"].split())[::-1]
        code = NRRD_TYPES[fields["type"].lower()]
        encoding = fields["encoding"].lower()
    except (KeyError, ValueError) as error:
        raise VolumeError(
            f"{name}: NRRD header lacks a usable sizes, type or encoding ({error}); export it again"
        ) from error
    order = {"little": "<", "big": ">"}.get(fields.get("endian", "little").lower(), "<")
    dtype = np.dtype(order + code)
    if len(shape) not in (3, 4):
        _check_shape(name, shape)
    if not all(n > 0 for n in shape):
        raise VolumeError(f"{name}: sizes {shape[::-1]}, expected positive numbers")

    spacing = _nrrd_spacing(fields, len(shape))
    axis = None
    if len(shape) == 4:
        # The channel axis is the one that has no spacing; by habit the fastest or the slowest.
        axis = next((k for k, d in enumerate(spacing) if not np.isfinite(d)), 0)
        spacing = [d for k, d in enumerate(spacing) if k != axis]
    index = _choose_channel(name, shape[axis] if axis is not None else 1, channel)

    if encoding == "raw":
        data = _map_checked(path, dtype, offset, shape, size)
    elif encoding in ("gzip", "gz"):
        claimed = prod(shape) * dtype.itemsize
        _check_size(name, shape, dtype, (size - offset) * EXPANSION[8])
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                # 31: a gzip header. One byte more than claimed is enough to see an excess.
                unpacked = zlib.decompressobj(31).decompress(file.read(), claimed)
        except zlib.error as error:
            raise VolumeError(f"{name}: gzip data are damaged ({error}); export again") from error
        _check_size(name, shape, dtype, len(unpacked))
        data = np.frombuffer(unpacked, dtype).reshape(shape)
    else:
        raise VolumeError(f"{name}: encoding {encoding!r}, expected raw or gzip; save it as raw")
    if axis is not None:
        data = np.moveaxis(data, axis, 0)[index]
    return _finish(name, data, spacing)


def _nrrd_fields(path: Path, size: int) -> tuple[dict[str, str], int]:
    """Fields of a NRRD header and the offset of its data."""
    name = path.name
    with open(path, "rb") as file:
        if not file.readline(16).startswith(b"NRRD000"):
            raise VolumeError(f"{name}: does not begin like a NRRD file; it is damaged")
        fields = {}
        while True:
            line = file.readline(1 << 16)
            if not line.endswith(b"\n"):
                raise VolumeError(
                    f"{name}: no empty line after the header; its data are in another file or "
                    "cut off, expected both in one .nrrd file"
                )
            text = line.decode("latin-1").strip()
            if not text:
                break
            key, colon, value = text.partition(":")
            if colon and not text.startswith("#") and not value.startswith("="):
                fields[key.strip().lower()] = value.strip()
        offset = file.tell()
    for key in ("data file", "datafile", "line skip", "lineskip", "byte skip", "byteskip"):
        if fields.get(key, "0") != "0":
            raise VolumeError(
                f"{name}: header with {key!r}, expected header and data in one .nrrd file; "
                "save it attached"
            )
    return fields, offset


def _nrrd_spacing(fields: dict[str, str], dims: int) -> list[float]:
    """Spacing of each axis, slowest first, in µm; NaN for an axis that is not of space."""
    try:
        if "space directions" in fields:
            text = fields["space directions"].replace("none", "(nan)").replace(" ", "")
            vectors = [v.strip("()") for v in text.split(")(")]
            spacing = [
                float(np.linalg.norm([float(x) for x in vector.split(",")])) for vector in vectors
            ]
        else:
            spacing = [float(x) for x in fields.get("spacings", "").split()]
    except ValueError:
        spacing = []
    if len(spacing) != dims:
        return [1.0] * dims
    units = fields.get("space units", fields.get("units", "")).replace('"', " ").split()
    scale = MICRONS.get(units[0].lower(), 1.0) if units else 1.0
    return [d * scale for d in spacing[::-1]]


# OME-Zarr -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piecewise:
    """One channel of a Zarr array: reads what is indexed, nothing before."""

    array: Any
    fixed: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape[len(self.fixed) :])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def chunks(self) -> tuple[int, ...]:
        return tuple(self.array.chunks[len(self.fixed) :])

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.array.dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        key = key if isinstance(key, tuple) else (key,)
        return np.asarray(self.array[(*self.fixed, *key)])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)


def _read_zarr(path: Path, channel: int | None) -> Volume:
    """Open level 0 of an OME-Zarr image (NGFF 0.4 and 0.5, https://ngff.openmicroscopy.org)."""
    name = path.name
    try:
        zarr = importlib.import_module("zarr")
    except ImportError as error:
        raise VolumeError(f"{name}: reading OME-Zarr needs zarr; pip install zarr") from error
    try:
        group = zarr.open_group(str(path), mode="r")
        attributes = dict(group.attrs)
        scales = attributes.get("ome", attributes)["multiscales"][0]
        axes = [axis["name"].lower() for axis in scales["axes"]]
        level = scales["datasets"][0]
        array = group[level["path"]]
        scale = next(t["scale"] for t in level["coordinateTransformations"] if t["type"] == "scale")
        shape = tuple(array.shape)
        factors = [
            d * MICRONS.get(axis.get("unit", ""), 1.0)
            for d, axis in zip(scale, scales["axes"], strict=True)
        ]
    except Exception as error:
        # Metadata are free JSON and zarr has its own errors for each kind of damage.
        raise VolumeError(
            f"{name}: not an OME-Zarr image ({type(error).__name__}: {_first_line(error)}); "
            "expected multiscales with axes and a scale"
        ) from error
    if axes[-3:] != ["z", "y", "x"] or len(axes) != len(shape):
        raise VolumeError(f"{name}: axes {axes}, expected them to end with z, y, x")
    extra = dict(zip(axes[:-3], shape[:-3], strict=True))
    if extra.get("t", 1) != 1:
        raise VolumeError(f"{name}: a series of {extra['t']} time points, expected one 3D stack")
    index = _choose_channel(name, extra.get("c", 1), channel)
    data = _Piecewise(array, tuple(index if axis == "c" else 0 for axis in axes[:-3]))
    _check_shape(name, data.shape)
    _check_type(name, data.dtype)
    return Volume(data, _clean_spacing(factors[-3:]))


# --------------------------------------------------------------------------------------------
# Scaling


# Percentiles that become 0 and 1.
LEVELS = (0.5, 99.8)


def normalise(data: np.ndarray) -> np.ndarray:
    """Scale intensities to [0, 1], clipped at the 0.5 and 99.8 percentiles.

    In sparse, masked volumes (more than half of the voxels exactly zero) the percentiles are
    those of the other voxels, since the background would put both at zero. The ceiling keeps
    saturated spots from dimming the neurites.

    Parameters
    ----------
    data : ndarray, (z, y, x)
        Finite values of any integer or float type; need not be in memory.

    Returns
    -------
    ndarray, (z, y, x) float32
        All zero if `data` is constant. Beside it no more than a few slabs are in memory.

    Notes
    -----
    Percentiles (linear between ranks) are exact for 8- and 16-bit integers, by histogram, and
    for other types up to 2^24 voxels; of larger ones a fixed random sample of that many is
    taken, whose percentile levels have a standard error of 0.002 percentage points or less.
    """
    low, high = _limits(data)
    scaled = np.empty(data.shape, dtype=np.float32)
    # In double precision where float32 could not tell neighbouring values apart.
    working = np.float32 if data.dtype.itemsize <= 2 or data.dtype == np.float32 else np.float64
    for start, slab in _slabs(data):
        part = slab.astype(working)
        part -= working(low)
        part /= working(high - low)
        np.clip(part, 0, 1, out=scaled[start : start + len(slab)], casting="same_kind")
    return scaled


def _limits(data: np.ndarray) -> tuple[float, float]:
    """Intensities that become 0 and 1."""
    if data.dtype.kind in "iub" and data.dtype.itemsize <= 2:
        values, counts = _histogram(data)
        smallest, largest = values[0], values[-1]
        bright, shares = values[values != 0], counts[values != 0]
        if 0 < shares.sum() < counts.sum() / 2:
            values, counts = bright, shares
        low, high = _percentiles(values, counts, LEVELS)
    else:
        values = _sample(data)
        smallest, largest = values.min(), values.max()
        bright = values[values != 0]
        low, high = np.percentile(bright if 0 < len(bright) < len(values) / 2 else values, LEVELS)
    if low >= high:
        # Nearly all voxels are equal, as in a mask: scale by the extremes.
        low, high = smallest, largest
    return float(low), float(high if low < high else low + 1)


def _histogram(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values of a narrow integer type, ascending, and how often they occur."""
    low = int(np.iinfo(data.dtype).min) if data.dtype.kind != "b" else 0
    counts = np.zeros(1 << (8 * data.dtype.itemsize), dtype=np.int64)
    for _, slab in _slabs(data):
        counts += np.bincount(
            (slab.ravel() if low == 0 else slab.ravel().astype(np.intp) - low),
            minlength=len(counts),
        )
    values = np.flatnonzero(counts)
    return values + low, counts[values]


def _sample(data: np.ndarray) -> np.ndarray:
    """All values, or 2^24 of them drawn with a fixed seed, as float64."""
    total = prod(data.shape)
    if total <= SAMPLE:
        return np.asarray(data, dtype=np.float64).ravel()
    rng = np.random.default_rng(0)
    parts = []
    for _, slab in _slabs(data):
        parts.append(rng.choice(slab.ravel(), round(SAMPLE * slab.size / total)))
    return np.concatenate(parts).astype(np.float64)


def _percentiles(values: np.ndarray, counts: np.ndarray, levels: Sequence[float]) -> np.ndarray:
    """Percentiles, linear between ranks, of ascending `values` that occur `counts` times."""
    ranks = np.cumsum(counts)
    position = np.asarray(levels) / 100 * (ranks[-1] - 1)
    below = np.floor(position)
    lower = values[np.searchsorted(ranks, below, side="right")].astype(np.float64)
    upper = values[np.searchsorted(ranks, np.ceil(position), side="right")].astype(np.float64)
    return lower + (upper - lower) * (position - below)


# --------------------------------------------------------------------------------------------
# Writing

# ImageJ's TIFF holds these types, and 4 GiB at most; OME-TIFF takes over beyond.
IMAGEJ_TYPES = ("uint8", "uint16", "float32")
IMAGEJ_BYTES = (1 << 32) - (1 << 20)
OME_TYPES = ("int8", "int16", "int32", "uint32", "float64")


def write_volume(
    path: str | Path, data: np.ndarray, spacing: Sequence[float] = (1.0, 1.0, 1.0)
) -> Path:
    """Write a stack as TIFF or .npy, whole or not at all.

    Parameters
    ----------
    path : str or Path
        ``.tif`` or ``.tiff``: compressed without loss, with spacing for ImageJ (as OME-TIFF
        where ImageJ's format cannot hold it: more than 4 GiB, other integers, float64).
        ``.npy``: the array alone; the spacing is lost.
    data : ndarray, (z, y, x)
        Booleans are written to TIFF as 0 and 255, as ImageJ keeps its masks.
    spacing : sequence of float
        (dz, dy, dx) in µm.

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    VolumeError
        If the suffix, the shape, the type or the spacing cannot be written.
    SettingsError
        If the folder cannot be written to.
    """
    path = Path(path)
    name = path.name
    suffix = path.suffix.lower()
    if suffix not in (".tif", ".tiff", ".npy"):
        raise VolumeError(f"{name}: suffix {suffix or 'missing'!r}, expected .tif, .tiff or .npy")
    data = np.asarray(data)
    if data.ndim != 3 or not data.size:
        raise VolumeError(f"{name}: expected an array (z, y, x), got shape {data.shape}")
    dz, dy, dx = _checked_spacing(name, spacing)
    if suffix == ".npy":
        _check_type(name, data.dtype)
        with atomic_path(path) as temporary:
            np.save(temporary, data, allow_pickle=False)
        return path
    if data.dtype == bool:
        data = data.astype(np.uint8) * np.uint8(255)
    # tifffile lays out an ImageJ stack of single columns as one page, which is not read back.
    imagej = data.dtype.name in IMAGEJ_TYPES and data.nbytes < IMAGEJ_BYTES and data.shape[2] > 1
    if not imagej and data.dtype.name not in (*IMAGEJ_TYPES, *OME_TYPES):
        raise VolumeError(f"{name}: TIFF cannot hold {data.dtype}; convert it or write .npy")
    with atomic_path(path) as temporary:
        if imagej:
            tifffile.imwrite(
                temporary,
                data,
                imagej=True,
                photometric="minisblack",
                compression="zlib",
                resolution=(1 / dx, 1 / dy),
                metadata={"axes": "ZYX", "spacing": dz, "unit": "micron"},
            )
        else:
            sizes = {f"PhysicalSize{a}": d for a, d in zip("ZYX", (dz, dy, dx), strict=True)}
            tifffile.imwrite(
                temporary,
                data,
                ome=True,
                bigtiff=True,
                photometric="minisblack",
                compression="zlib",
                metadata={"axes": "ZYX", **sizes},
            )
    return path


def _checked_spacing(name: str, spacing: Sequence[float]) -> tuple[float, float, float]:
    values = tuple(float(d) for d in spacing)
    if len(values) != 3 or _clean_spacing(values) != values:
        raise VolumeError(f"{name}: spacing {values}, expected three positive numbers (dz, dy, dx)")
    return values
