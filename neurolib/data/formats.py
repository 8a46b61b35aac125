"""One reader per file format: from a path to voxels (z, y, x) and their spacing.

Every reader compares what a header claims with what the file can hold before it allocates
anything, and maps the file into memory, or reads it piece by piece, where its format allows.
`neurolib.volume` chooses the reader and checks what it gave.
"""

import functools
import gzip
import logging
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from operator import add, lt, mul
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import psutil
import tifffile

from neurolib.errors import VolumeError

# What tifffile logs beside raising comes in our own errors, on one line.
logging.getLogger("tifffile").addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Spacing:
    """Lengths (dz, dy, dx) of a voxel, in µm unless `unknown` says why not; `source`: the fields.

    Where they are not known in µm, their ratio may still be; else they are 1.
    """

    lengths: tuple[float, float, float] = (1.0, 1.0, 1.0)
    unknown: str = "the file records none"
    source: str = ""


@dataclass(frozen=True)
class Stack:
    """What a reader gives: voxels (z, y, x) of any byte order, their spacing, and notes.

    A note is a sentence on what was chosen or converted.
    """

    data: Any
    spacing: Spacing = Spacing()
    notes: tuple[str, ...] = ()


# Units of length ------------------------------------------------------------------------------

_PREFIXES = {"Y": "yotta", "Z": "zetta", "E": "exa", "P": "peta", "T": "tera", "G": "giga"}
_PREFIXES |= {"M": "mega", "k": "kilo", "h": "hecto", "da": "deca", "": "", "d": "deci"}
_PREFIXES |= {"c": "centi", "m": "milli", "µ": "micro", "n": "nano", "p": "pico", "f": "femto"}
_PREFIXES |= {"a": "atto", "z": "zepto", "y": "yocto"}
_POWERS = [24, 21, 18, 15, 12, 9, 6, 3, 2, 1, 0, -1, -2, -3, -6, -9, -12, -15, -18, -21, -24]

# Micrometres per unit, by the names that OME, OME-Zarr, ImageJ and NRRD files use: all lengths of
# OME's list (UnitsLength of the schema 2016-06) in symbols and words.
MICRONS = {
    name: 10.0 ** (power + 6)
    for (sign, word), power in zip(_PREFIXES.items(), _POWERS, strict=True)
    for name in (f"{sign}m", f"{word}meter")
}
MICRONS |= {"um": 1.0, "micron": 1.0, "å": 1e-4, "angstrom": 1e-4, "Å": 1e-4}
MICRONS |= {"inch": 25400.0, "in": 25400.0, "inches": 25400.0, "thou": 25.4, "li": 25400 / 12}
MICRONS |= {"ft": 304800.0, "foot": 304800.0, "feet": 304800.0, "yd": 914400.0, "yard": 914400.0}
MICRONS |= {"mi": 1609344e3, "mile": 1609344e3, "pt": 25400 / 72, "ua": 1.495978707e17}
MICRONS |= {"ly": 9.4607304725808e21, "pc": 3.0856775814913673e22, "parsec": 3.0856775814913673e22}

# What stands where no length is meant: numbers with it still tell the ratio of the axes.
NO_LENGTH = ("", "pixel", "px", "voxel", "reference frame", "none", "???", "unknown")


def microns(unit: str) -> float | None:
    """Micrometres per `unit`; 0 of what is no length (`NO_LENGTH`), None of a name not known."""
    # "Mm" is not "mm": as it is written first. Both signs of µ, and ImageJ's way to escape it.
    unit = unit.strip().replace("\\u00b5", "µ").replace("\\u00B5", "µ").replace("μ", "µ")
    for name in (unit, unit.lower(), unit.lower().replace("metre", "meter")):
        for form in (name, name.removesuffix("s") if len(name) > 4 else name):
            if form in NO_LENGTH:
                return 0.0
            if form in MICRONS:
                return MICRONS[form]
    return None


def calibrate(values: Sequence[float], units: Sequence[str], fields: Sequence[str]) -> Spacing:
    """Turn what a file records of each axis into one spacing.

    Parameters
    ----------
    values, units, fields : three of each, in the order z, y, x
        Lengths of a voxel, their units, and the names of the file's fields that hold them.

    Returns
    -------
    Spacing
        In µm. Where no axis has a unit, the numbers of the file, as their ratio still counts.
        (1, 1, 1) where an axis has no usable value, or a unit that is no known length.
    """
    factors = [microns(unit) for unit in units]
    source = ", ".join(
        f"{field} {'missing' if np.isnan(value) else f'{value:g} {unit}'.strip()}"
        for field, value, unit in zip(fields, values, units, strict=True)
    )
    odd = {repr(unit): None for unit, f in zip(units, factors, strict=True) if f is None}
    if odd:
        return Spacing(unknown=f"{', '.join(odd)} is no known length ({source})")
    scale = factors if any(factors) else [1.0] * 3
    lengths = tuple(float(v) * f for v, f in zip(values, scale, strict=True))
    if not all(np.isfinite(d) and d > 0 for d in lengths):
        return Spacing(unknown=f"not every axis has a length ({source})")
    if not any(factors):
        return Spacing(
            lengths, f"no unit of length ({source}), so that only the ratio counts", source
        )
    return Spacing(lengths, "", source)


# What all formats share -----------------------------------------------------------------------


def check_shape(name: str, shape: Sequence[int]) -> None:
    """Refuse everything but three dimensions of which z has more than one slice."""
    if len(shape) == 2 or (len(shape) == 3 and shape[0] == 1):
        raise VolumeError(
            f"{name}: expected a 3D stack, got shape {tuple(shape)}; a single slice is not a volume"
        )
    if len(shape) != 3 or not all(n > 0 for n in shape):
        raise VolumeError(f"{name}: expected a 3D stack, got shape {tuple(shape)}; convert it")


def check_type(name: str, dtype: np.dtype) -> None:
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise VolumeError(f"{name}: voxel type {dtype}, expected integers or floats; convert it")


def check_size(name: str, shape: Sequence[int], dtype: np.dtype, available: int) -> None:
    """Compare the bytes that a header claims with those that are there."""
    claimed = prod(shape) * dtype.itemsize
    if claimed > available:
        raise VolumeError(
            f"{name}: header claims {tuple(shape)} voxels of {dtype} ({claimed} bytes), "
            f"found {max(available, 0)} bytes; the file is truncated or damaged"
        )


def check_memory(name: str, shape: Sequence[int], dtype: np.dtype) -> None:
    """Refuse an array larger than all memory: systems that promise any amount end the process."""
    needed, memory = prod(shape) * dtype.itemsize, psutil.virtual_memory().total
    if needed > memory:
        raise VolumeError(
            f"{name}: {tuple(shape)} voxels of {dtype} ({needed} bytes) do not fit in memory "
            f"({memory} bytes); cut out a part"
        )


def choose_channel(name: str, channels: int, channel: int | None) -> int:
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


def check_spacing(spacing: Sequence[float], name: str = "") -> np.ndarray:
    """A spacing as (3,) float64; VolumeError, with the name of a file, if it is none."""
    values = np.asarray(spacing, dtype=float)
    if values.shape != (3,) or not np.all(np.isfinite(values) & (values > 0)):
        raise VolumeError(
            f"{name}: " * bool(name)
            + f"spacing is {tuple(spacing)}, expected three positive numbers (dz, dy, dx)"
        )
    return values


def boxes(
    lower: Sequence[int], upper: Sequence[int], step: Sequence[int]
) -> Iterator[tuple[slice, slice, slice]]:
    """Cut what lies between two corners (z, y, x) into boxes of `step`, ordered by z, y, x."""
    for z in range(lower[0], upper[0], step[0]):
        for y in range(lower[1], upper[1], step[1]):
            for x in range(lower[2], upper[2], step[2]):
                ends = (min(i + n, end) for i, n, end in zip((z, y, x), step, upper, strict=True))
                yield tuple(map(slice, (z, y, x), ends))


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


def read_tiff(path: Path, head: bytes, size: int, channel: int | None) -> Stack:
    name = path.name
    if head[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        raise VolumeError(
            f"{name}: does not begin like a TIFF file; it is damaged or has the wrong suffix"
        )
    _check_tiff_chain(path, head, size)
    try:
        with tifffile.TiffFile(path) as tif:
            return _read_tiff_series(path, tif, size, channel)
    except (VolumeError, MemoryError):
        raise
    except Exception as error:
        # Damaged files make tifffile and its codecs raise errors of nearly every type.
        raise VolumeError(f"{name}: cannot be read as TIFF: {_first_line(error)}") from error


def _read_tiff_series(path: Path, tif: tifffile.TiffFile, size: int, channel: int | None) -> Stack:
    name = path.name
    described = re.search(r'<BinaryOnly [^>]*MetadataFile="([^"]*)"', tif.ome_metadata or "")
    if described:
        raise VolumeError(
            f"{name}: only a part of the OME set that {described[1]} describes; read that file, or "
            "save the set as one file"
        )
    parts, notes = _choose_images(name, tif)
    first = parts[0]
    if len(parts) > 1:
        # Slices written one by one come as one series each.
        axes, shape = "ZYX", (len(parts), *first.shape)
    else:
        axes, shape = _tiff_axes(name, first.axes, first.shape)
    check_type(name, first.dtype)
    slices = prod(shape) // prod(shape[axes.index(axis)] for axis in "YX")
    _check_imagej(name, tif, slices)
    index = choose_channel(name, shape[axes.index("C")] if "C" in axes else 1, channel)
    spacing = _tiff_spacing(tif, first)
    if len(parts) == 1 and first.dataoffset is not None:
        check_size(name, shape, first.dtype, size - first.dataoffset)
        dtype = first.dtype.newbyteorder(tif.byteorder)
        data = _map(path, dtype, first.dataoffset, shape)
    else:
        _check_tiff_pages(path, tif, parts, shape)
        loaded = [s.asarray() for s in parts]
        data = (np.stack(loaded) if len(loaded) > 1 else loaded[0]).reshape(shape)
    data = data.transpose([axes.index(axis) for axis in "CZYX" if axis in axes])
    data = data[index] if "C" in axes else data
    page = first.keyframe
    # ImageJ stores pixels as they are and inverts what it shows.
    if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and not tif.is_imagej:
        if data.dtype == bool and page.software.startswith("tifffile"):
            # It gives boolean arrays that mark, and stores them as they are.
            notes += ("a mask marked MinIsWhite by tifffile, kept as it is",)
        else:
            data = _negative(name, data, page.bitspersample)
            notes += ("stored with 0 as white (MinIsWhite), inverted",)
    return Stack(data, spacing, notes)


def _choose_images(
    name: str, tif: tifffile.TiffFile
) -> tuple[list[tifffile.TiffPageSeries], tuple[str, ...]]:
    """The series of the largest stack, or of its slices; with a note if there are others."""
    groups: dict[tuple, list] = {}
    for series in tif.series:
        groups.setdefault((series.shape, series.dtype), []).append(series)

    def weight(group: list) -> tuple[bool, bool, int]:
        voxels = len(group) * prod(group[0].shape)
        # Colour overviews and single slices are no rival of a stack, however large.
        return "S" not in group[0].axes, voxels > prod(group[0].shape[-2:]), voxels

    main = max(groups.values(), key=weight)
    first = main[0]
    if first.dtype is None:
        raise VolumeError(f"{name}: its voxel type is none that TIFF defines; convert it")
    # Thumbnails, labels and smaller copies have other rows and columns than the image.
    alike = [s for s in tif.series if s.shape[-2:] == first.shape[-2:]]
    if len(alike) > 1 and (len(first.shape) != 2 or len(alike) > len(main)):
        raise VolumeError(
            f"{name}: {len(alike)} separate images, the first of shape {alike[0].shape}, expected "
            "one 3D stack; save it as one, or each as a file"
        )
    if len(main) == len(tif.series):
        return main, ()
    return main, (
        f"{len(tif.series)} images, of shapes "
        f"{', '.join(dict.fromkeys(str(s.shape) for s in tif.series))}; the largest stack is used",
    )


def _negative(name: str, data: np.ndarray, bits: Any) -> np.ndarray:
    """Pixels of which 0 is white, turned into intensities."""
    if data.dtype.kind == "f":
        raise VolumeError(
            f"{name}: 0 is white (MinIsWhite) in voxels of {data.dtype}, which have no black; "
            "invert and save it as MinIsBlack"
        )
    if data.dtype.kind != "u":
        return ~data
    return data.dtype.type((1 << int(np.max(bits))) - 1) - data


def _check_imagej(name: str, tif: tifffile.TiffFile, slices: int) -> None:
    """Compare the images that ImageJ's header claims with those that are there."""
    if not tif.is_imagej:
        return
    claimed = _number((tif.imagej_metadata or {}).get("images", 1))
    if claimed > slices:
        raise VolumeError(
            f"{name}: ImageJ's header claims {claimed:.0f} slices, found {slices}; the file is "
            "truncated or damaged"
        )
    # Beyond 4 GiB, ImageJ writes one page for all.
    if 1 < claimed < len(tif.pages):
        raise VolumeError(
            f"{name}: ImageJ's header claims {claimed:.0f} slices, found {len(tif.pages)} pages; "
            "it is not of this stack, save the file again with ImageJ"
        )


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
        check_shape(name, shape)
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
    path: Path,
    tif: tifffile.TiffFile,
    parts: Sequence[tifffile.TiffPageSeries],
    shape: Sequence[int],
) -> None:
    """Refuse pages whose data are missing, leave their file, or are too few for `shape`."""
    available, name = 0, path.name
    for number, page in enumerate(page for part in parts for page in part.pages):
        if page is None and tif.is_ome:
            names = re.findall(r'FileName="([^"]*)"', tif.ome_metadata)
            lost = [file for file in dict.fromkeys(names) if not (path.parent / file).exists()]
            raise VolumeError(
                f"{name}: slice {number} of its set of files is missing"
                f"{': ' + ', '.join(lost) + ' not found' if lost else ''}; put all files of the "
                "set into one folder"
            )
        # In a set of OME files, most pages are in another file.
        file = page.parent.filehandle if page is not None else tif.filehandle
        counts = page.databytecounts if page is not None else ()
        offsets = page.dataoffsets if page is not None else ()
        ends = [o + n for o, n in zip(offsets, counts, strict=False)]
        if not ends or min(counts) <= 0 or max(ends) > file.size:
            raise VolumeError(
                f"{name}: the data of page {number} are not within the file of {file.size} bytes"
                f"{'' if file.name == name else f' ({file.name})'}; it is truncated or damaged"
            )
        compression = int(page.keyframe.compression)
        available += sum(counts) * EXPANSION.get(compression, EXPANSION_OTHER)
    check_size(name, shape, parts[0].dtype, available)


def _tiff_spacing(tif: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> Spacing:
    """Spacing (`calibrate`) from OME or ImageJ metadata; a plain TIFF records none."""
    if tif.is_ome:
        return _ome_spacing(tif, series)
    metadata, tags = tif.imagej_metadata or {}, tif.pages[0].tags
    unit = str(metadata.get("unit", ""))
    if not tif.is_imagej or (not microns(unit) and tags.valueof(296, default=1) != 1):
        # Per inch or centimetre but without ImageJ's unit: a resolution for printing.
        return Spacing()
    # XResolution and YResolution are pixels per unit, as fractions.
    per_unit = [tags.valueof(code, default=(0, 1)) for code in (283, 282)]
    dy, dx = (d / n if n else float("nan") for n, d in per_unit)
    # ImageJ leaves out a spacing of 1 (other writers without a unit leave out what they do not
    # know), and writes a negative one for a stack that was taken from top to bottom; it has
    # `yunit` and `zunit` where they differ from `unit`.
    dz = abs(_number(metadata.get("spacing", 1.0 if microns(unit) else None)))
    units = [str(metadata.get(key, unit)) for key in ("zunit", "yunit")]
    return calibrate((dz, dy, dx), (*units, unit), ("spacing", "YResolution", "XResolution"))


def _number(value: Any) -> float:
    """`value` as float, NaN (for "unknown") where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def _ome_spacing(tif: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> Spacing:
    root = ElementTree.fromstring(tif.ome_metadata)
    pixels = [e.attrib for e in root.iter() if e.tag.endswith("}Pixels")]
    if not pixels:
        return Spacing()
    # One series an image, in their order.
    whole = len(pixels) == len(tif.series)
    get = pixels[list(tif.series).index(series) if whole else 0].get
    fields = [f"PhysicalSize{axis}" for axis in "ZYX"]
    if not any(map(get, fields)):
        return Spacing()
    # The OME schema's default unit is the micrometre.
    units = [get(f"{field}Unit", "µm") for field in fields]
    return calibrate([_number(get(field)) for field in fields], units, fields)


# NumPy --------------------------------------------------------------------------------------


def read_npy(path: Path, head: bytes, size: int, channel: int | None) -> Stack:
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
    except OSError:
        raise
    except Exception as error:
        # The header is a Python literal: parsing damaged ones fails in many ways.
        raise VolumeError(
            f"{name}: its NumPy header cannot be read ({type(error).__name__}); save it again "
            "with numpy.save"
        ) from error
    if dtype.hasobject or dtype.names:
        raise VolumeError(f"{name}: holds Python objects or records, expected an array of numbers")
    check_type(name, dtype)
    if len(shape) != 4:
        check_shape(name, shape)
    if not all(n > 0 for n in shape):
        raise VolumeError(f"{name}: expected a 3D stack, got shape {shape}; it has no voxels")
    check_size(name, shape, dtype, size - offset)
    data = _map(path, dtype, offset, shape[::-1] if fortran else shape)
    data = data.transpose() if fortran else data
    index = choose_channel(name, shape[0] if len(shape) == 4 else 1, channel)
    return Stack(data[index] if data.ndim == 4 else data)


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


def read_v3draw(path: Path, head: bytes, size: int, channel: int | None) -> Stack:
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
    check_size(path.name, shape, dtype, size - offset)
    return _map(path, dtype, offset, shape)


def _v3d_volume(name: str, sizes: Sequence[int], channel: int | None, load: Callable) -> Stack:
    """Check the sizes (x, y, z, channel[, time]), then `load` them as (channel, z, y, x)."""
    if min(sizes) < 1:
        raise VolumeError(f"{name}: sizes {sizes} (x, y, z, c), expected positive; it is damaged")
    if len(sizes) == 5 and sizes[4] != 1:
        raise VolumeError(f"{name}: a series of {sizes[4]} time points, expected one 3D stack")
    shape = sizes[3::-1]
    check_shape(name, shape[1:])
    index = choose_channel(name, shape[0], channel)
    return Stack(load(shape)[index])


def read_v3dpbd(path: Path, head: bytes, size: int, channel: int | None) -> Stack:
    name = path.name
    if head[:24] != V3DPBD_KEY:
        raise VolumeError(f"{name}: does not begin like a .v3dpbd file; it is damaged")
    order, kind, sizes, offset = _v3d_header(name, head, V3DPBD_KEY, 4, "i")
    if kind not in (1, 2):
        raise VolumeError(
            f"{name}: packing {kind}, expected 1 or 2 bytes per voxel; "
            "save it as .v3draw with Vaa3D"
        )

    def load(shape: tuple[int, ...]) -> np.ndarray:
        packed = path.read_bytes()[offset:]
        return _pbd_unpack(name, packed, kind, order, prod(shape), shape)

    return _v3d_volume(name, sizes, channel, load)


# The first codes of each class of runs, for voxels of 1 and 2 bytes, and the bits of a difference
# in it: literals have none, and the last class repeats one value.
_PBD = {1: ((0, 33, 128), (0, 2, 0)), 2: ((0, 32, 80, 183, 223), (0, 3, 4, 5, 0))}
# Runs of voxels that are unpacked together.
_PBD_RUNS = 1 << 16


def _pbd_unpack(
    name: str, packed: bytes, kind: int, order: str, total: int, shape: tuple[int, ...]
) -> np.ndarray:
    """Voxels of a packed stream of `kind` bytes a voxel.

    A code byte stands for a run of literals, of differences to the previous voxel, or of one
    repeated value. All codes are followed before anything is allocated.
    """
    begins, widths = (np.array(part) for part in _PBD[kind])
    group = np.searchsorted(begins, np.arange(256), side="right") - 1
    lengths, bits = np.arange(1, 257) - begins[group], widths[group]
    literal, difference = group == 0, bits > 0
    stored = np.where(literal, lengths * kind, np.where(difference, -(-lengths * bits // 8), kind))
    sizes = (1 + stored).tolist()
    starts, position, end = [], 0, len(packed)
    while position < end:
        starts.append(position)
        position += sizes[packed[position]]
    if position > end:
        raise VolumeError(f"{name}: ends within a run of voxels; the file is truncated")
    data = np.frombuffer(packed + bytes(2), np.uint8)
    at = np.array(starts, np.int64)
    codes = data[at]
    if len(codes) and difference[codes[0]]:
        raise VolumeError(f"{name}: begins with a difference to no voxel; the file is damaged")
    unpacked = int(lengths[codes].sum())
    if unpacked != total:
        raise VolumeError(
            f"{name}: header claims {shape} (c, z, y, x) = {total} voxels, its data unpack to "
            f"{unpacked}; the file is truncated or damaged"
        )
    voxels, done = np.empty(total, f"u{kind}"), 0
    for k in range(0, len(at), _PBD_RUNS):
        code = codes[k : k + _PBD_RUNS]
        count = lengths[code]
        run = np.repeat(np.arange(len(code)), count)
        place = np.arange(len(run)) - np.repeat(np.cumsum(count) - count, count)
        begin, code = at[k : k + _PBD_RUNS][run] + 1, code[run]
        step = difference[code]
        where = begin + np.where(literal[code], place * kind, 0)
        value = data[where].astype(np.int64)
        if kind == 2:
            low, high = (where, where + 1) if order == "<" else (where + 1, where)
            value = data[low] | data[high].astype(np.int64) << 8
        # Differences of one byte fill it from the lowest bits, those of two from the highest; the
        # upper half of the codes, but for the first of them, are negative.
        width, change = bits[code[step]], np.zeros(len(run), np.int64)
        byte, bit = np.divmod(place[step] * width, 8)
        byte += begin[step]
        window = data[byte].astype(np.int64) << 8 | data[byte + 1]
        found = window >> (8 + bit if kind == 1 else 16 - width - bit) & ((1 << width) - 1)
        change[step] = np.where(found > 1 << width >> 1, (1 << width >> 1) - found, found)
        change = np.cumsum(change)
        last = np.maximum.accumulate(np.where(step, -1, np.arange(len(run))))
        base = np.where(last < 0, int(voxels[done - 1]), value[last] - change[last])
        voxels[done : done + len(run)] = np.where(step, base + change, value)
        done += len(run)
    return voxels.reshape(shape)


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


def read_nrrd(path: Path, head: bytes, size: int, channel: int | None) -> Stack:
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
        check_shape(name, shape)
    if not all(n > 0 for n in shape):
        raise VolumeError(f"{name}: sizes {shape[::-1]}, expected positive numbers")

    key, values, units = _nrrd_spacing(fields, len(shape))
    axis = None
    if len(shape) == 4:
        # The channel axis has no spacing or is of a kind not of space; by habit the slowest.
        kinds = fields.get("kinds", "").lower().split()[::-1]
        if len(kinds) == 4:
            axis = next((k for k, n in enumerate(kinds) if n not in ("domain", "space")), None)
        if axis is None:
            axis = next((k for k, d in enumerate(values) if not np.isfinite(d)), 0)
        del values[axis], units[axis]
    names = [f"{key} of {a}" for a in "zyx"]
    spacing = calibrate(values, units, names) if key else Spacing()
    index = choose_channel(name, shape[axis] if axis is not None else 1, channel)

    if encoding == "raw":
        data = _map_checked(path, dtype, offset, shape, size)
    elif encoding in ("gzip", "gz"):
        claimed = prod(shape) * dtype.itemsize
        check_size(name, shape, dtype, (size - offset) * EXPANSION[8])
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                # Of any number of members, one after the other (RFC 1952).
                unpacked = gzip.GzipFile(fileobj=file).read(claimed)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise VolumeError(f"{name}: gzip data are damaged ({error}); export again") from error
        check_size(name, shape, dtype, len(unpacked))
        data = np.frombuffer(unpacked, dtype).reshape(shape)
    else:
        raise VolumeError(f"{name}: encoding {encoding!r}, expected raw or gzip; save it as raw")
    if axis is not None:
        data = np.moveaxis(data, axis, 0)[index]
    return Stack(data, spacing)


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
            try:
                text = line.decode().strip()
            except UnicodeDecodeError:
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


def _nrrd_spacing(fields: dict[str, str], dims: int) -> tuple[str, list[float], list[str]]:
    """Field, length and unit of each axis, slowest first; NaN for an axis that is not of space."""
    try:
        if "space directions" in fields:
            key, text = "space directions", fields["space directions"].replace("none", "(nan)")
            vectors = [v.strip("()") for v in text.replace(" ", "").split(")(")]
            steps = [[float(x) for x in vector.split(",")] for vector in vectors]
            units = _nrrd_units(fields.get("space units", ""))
            # Each direction has a unit: along one axis it is its own, across some only if equal.
            own = [{u for u, x in zip(units, s, strict=False) if x} for s in steps]
            units = [" and ".join(sorted(o)) for o in own]
            values = [float(np.linalg.norm(s)) for s in steps]
        else:
            key, values = "spacings", [float(x) for x in fields.get("spacings", "").split()]
            units = []
    except ValueError:
        key, values, units = "spacings", [], []
    if key not in fields:
        return "", [float("nan")] * dims, [""] * dims
    if not any(units):
        units = _nrrd_units(fields.get("units", fields.get("space units", "")))
    if len(values) != dims:
        values = [float("nan")] * dims
    units = [*units, *[""] * dims][:dims]
    return key, values[::-1], units[::-1]


def _nrrd_units(text: str) -> list[str]:
    return re.findall(r'"([^"]*)"', text) if '"' in text else text.split()


# OME-Zarr -----------------------------------------------------------------------------------

# No compressor of Zarr's makes chunks of more: a claim beyond it is no image.
CHUNK_BYTES = 1 << 31


@dataclass(frozen=True)
class LazyStack:
    """One channel of a Zarr array as a stack (z, y, x): reads what is indexed, nothing before.

    It is indexed with whole numbers and slices; ``numpy.asarray`` reads all of it. A chunk that
    turns out to be damaged raises `VolumeError` then. One that is not there holds the fill
    value: so Zarr defines it, and so sparse volumes are stored.
    """

    name: str
    array: Any
    fixed: tuple[int, ...]
    folder: Path

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
        return np.dtype(self.array.dtype).newbyteorder("=")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        key = key if isinstance(key, tuple) else (key,)
        try:
            return np.asarray(self.array[(*self.fixed, *key)], dtype=self.dtype)
        except IndexError:
            raise
        except MemoryError as error:
            raise VolumeError(
                f"{self.name}: what is read of its {self.shape} voxels does not fit in memory; "
                "read a smaller part"
            ) from error
        except Exception as error:
            # Each codec and file system has errors of its own.
            raise VolumeError(
                f"{self.name}: a chunk cannot be read ({type(error).__name__}: "
                f"{_first_line(error)}); it is damaged, copy or export the image again"
            ) from error

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a stack on disk becomes an array only by a copy")
        check_memory(self.name, self.shape, self.dtype)
        return np.asarray(self[:], dtype=dtype)

    def stored(self) -> Iterator[tuple[int, np.ndarray]]:
        """First slice and voxels of each chunk that is stored, by z; then those of a missing one.

        What an array holds is found from its files, in the time that these take, however large
        the shape that it claims. One voxel stands for all chunks that are not there.
        """
        lead = len(self.fixed)
        # With sharding, a file holds many chunks.
        step = getattr(self.array, "shards", None) or self.array.chunks
        fixed = tuple(i // n for i, n in zip(self.fixed, step, strict=False))
        step = step[lead:]
        grid = [-(-n // s) for n, s in zip(self.shape, step, strict=True)]
        files = _chunk_files(self.folder, self.array.ndim)
        inside = (place[lead:] for place in files if place[:lead] == fixed)
        places = {place for place in inside if all(map(lt, place, grid))}
        for place in sorted(places):
            lower = tuple(map(mul, place, step))
            upper = tuple(map(min, map(add, lower, step), self.shape))
            for box in boxes(lower, upper, self.chunks):
                yield box[0].start, self[box]
        if len(places) < prod(grid):
            cells = boxes((0, 0, 0), grid, (1, 1, 1))
            gaps = (tuple(s.start for s in cell) for cell in cells)
            lower = tuple(map(mul, next(gap for gap in gaps if gap not in places), step))
            yield lower[0], self[tuple(slice(i, i + 1) for i in lower)]


def _chunk_files(folder: Path, ndim: int) -> Iterator[tuple[int, ...]]:
    """Places in the grid of an array's chunk files: named 0.1.2, 0/1/2 or c/0/1/2."""
    for parent, _, files in os.walk(folder):
        above = Path(parent).relative_to(folder).parts
        for file in files:
            numbers = ".".join((*above, file)).removeprefix("c.").split(".")
            if len(numbers) == ndim and all(n.isdecimal() for n in numbers):
                yield tuple(map(int, numbers))


def read_zarr(path: Path, channel: int | None) -> Stack:
    """Open level 0 of an OME-Zarr image (NGFF 0.4 and 0.5, https://ngff.openmicroscopy.org)."""
    name = path.name
    zarr = _import_zarr()
    try:
        group = zarr.open_group(zarr.storage.LocalStore(path, read_only=True), mode="r")
        attributes = dict(group.attrs)
        if "bioformats2raw.layout" in attributes.get("ome", attributes):
            # That converter's folder of images, most often of one.
            if "1" in group:
                raise VolumeError(f"{name}: several images, expected one; name it, as {name}/0")
            group = group["0"]
            attributes = dict(group.attrs)
        images = attributes.get("ome", attributes)["multiscales"]
        image = images[0]
        # Axes are objects from version 0.4 on, names in 0.3, and always these five before.
        described = [a if isinstance(a, dict) else {"name": a} for a in image.get("axes", "tczyx")]
        axes = [axis["name"].lower() for axis in described]
        level = image["datasets"][0]
        array = group[level["path"]]
        shape, chunks, dtype = tuple(array.shape), tuple(array.chunks), np.dtype(array.dtype)
        # A scale of all levels comes on top of that of the level; up to 0.3 there is none.
        scales = [
            _zarr_scale(where.get("coordinateTransformations") or []) for where in (level, image)
        ]
        scale, common = (s or [1.0] * len(axes) for s in scales)
        values = [float(a * b) for a, b in zip(scale, common, strict=True)]
        units = [str(axis.get("unit") or "") for axis in described]
        fields = [f"scale of {axis}" for axis in axes[-3:]]
        spacing = calibrate(values[-3:], units[-3:], fields) if scales[0] else Spacing()
    except VolumeError:
        raise
    except Exception as error:
        # Metadata are free JSON and zarr has its own errors for each kind of damage.
        raise VolumeError(
            f"{name}: not an OME-Zarr image ({type(error).__name__}: {_first_line(error)}); "
            "expected multiscales with axes and datasets"
        ) from error
    if axes[-3:] != ["z", "y", "x"] or len(axes) != len(shape) or axes.count("c") > 1:
        raise VolumeError(
            f"{name}: axes {axes} of shape {shape}, expected them to end with z, y, x; export it "
            "as (channel, z, y, x)"
        )
    check_type(name, dtype)
    for axis, n in zip(axes[:-3], shape, strict=False):
        if n < 1 or (axis != "c" and n != 1):
            what = "time points" if axis == "t" else f"images along {axis!r}"
            raise VolumeError(f"{name}: a series of {n} {what}, expected one 3D stack")
    check_shape(name, shape[-3:])
    whole = min(*chunks, *(getattr(array, "shards", None) or chunks)) > 0
    if not whole or prod(chunks) * dtype.itemsize > CHUNK_BYTES:
        raise VolumeError(
            f"{name}: chunks of {chunks} voxels, expected 1 byte to 2 GiB each; it is damaged, or "
            "write it again in other chunks"
        )
    index = choose_channel(name, shape[axes.index("c")] if "c" in axes else 1, channel)
    fixed = tuple(index if axis == "c" else 0 for axis in axes[:-3])
    notes = () if len(images) == 1 else (f"{len(images)} images; the first is used",)
    return Stack(LazyStack(name, array, fixed, path / array.path), spacing, notes)


def _zarr_scale(steps: Sequence[dict]) -> Sequence[float] | None:
    """The scale among coordinate transformations, one factor an axis."""
    return next((step["scale"] for step in steps if step.get("type") == "scale"), None)


@functools.cache
def _import_zarr() -> Any:
    """The package zarr, imported on first use as it takes half a second, made safe for Blosc.

    numcodecs hands a Blosc chunk to its C library without comparing the length that the chunk
    claims with the one that it has, so that a damaged one can end the process
    (https://github.com/zarr-developers/numcodecs/issues/228). The comparison is made here.
    """
    import zarr
    from numcodecs import blosc

    unpack = blosc.decompress

    def decompress(source: Any, dest: Any = None) -> Any:
        data = np.frombuffer(source, np.uint8)
        # Bytes 12 to 16 of Blosc's header: length of the chunk, header included.
        claimed = int.from_bytes(data[12:16].tobytes(), "little") if len(data) >= 16 else 16
        if claimed > len(data):
            raise ValueError(f"Blosc claims {claimed} bytes, found {len(data)}")
        return unpack(source, dest)

    blosc.decompress = decompress
    return zarr


# Readers of single files, called with their path, first bytes, size and the channel to take.
READERS = {
    ".tif": read_tiff,
    ".tiff": read_tiff,
    ".npy": read_npy,
    ".v3draw": read_v3draw,
    ".v3dpbd": read_v3dpbd,
    ".nrrd": read_nrrd,
}
