"""One reader per file format: from a path to voxels (z, y, x) and their spacing.

Before a reader allocates memory, it checks that the file can hold what its header claims. Where
the format allows, it maps the file into memory or reads it piece by piece. `neurolib.volume`
chooses the reader, adds the file's name to errors, and checks the result.
"""

import functools
import gzip
import html
import itertools
import logging
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from operator import lt, mul
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import psutil
import tifffile

from neurolib.errors import VolumeError
from neurolib.files import decode

# Our errors include what tifffile would log.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

Box = tuple[slice, slice, slice]  # part of a volume (z, y, x)

# A voxel's edges: least and largest length, from atoms to planets in any unit, and largest ratio.
LENGTHS, LONGEST = (1e-12, 1e12), 10_000


@dataclass(frozen=True)
class Spacing:
    """Lengths (dz, dy, dx) of a voxel, in µm unless `unknown` says why not; `source`: the fields.

    Without a unit they are a ratio, or 1 if that is unknown too.
    """

    lengths: tuple[float, float, float] = (1.0, 1.0, 1.0)
    unknown: str = "the file records none"
    source: str = ""


@dataclass(frozen=True)
class Stack:
    """Result of a reader: voxels (z, y, x) in any byte order, their spacing, and notes.

    A note is a sentence about a choice or a conversion.
    """

    data: Any
    spacing: Spacing = Spacing()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Header:
    """The header of a file with one array, which begins at byte `offset`.

    shape: slowest axis first; axis: the channel axis, or None; unpack: for
    packed voxels, the function that makes them from the path and this header.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    axis: int | None
    offset: int
    order: str = "C"
    spacing: Spacing = Spacing()
    unpack: Callable[..., np.ndarray] | None = None


# Units of length ------------------------------------------------------------------------------

_PREFIXES = """
Y yotta 24, Z zetta 21, E exa 18, P peta 15, T tera 12, G giga 9, M mega 6, k kilo 3, h hecto 2,
da deca 1, d deci -1, c centi -2, m milli -3, µ micro -6, n nano -9, p pico -12, f femto -15,
a atto -18, z zepto -21, y yocto -24
"""
# Micrometres per unit, by its names in OME, OME-Zarr, ImageJ and NRRD files: all of OME's
# UnitsLength (schema 2016-06) in symbols and words.
MICRONS = {
    name: 10.0 ** (int(power) + 6)
    for sign, word, power in [entry.split() for entry in _PREFIXES.split(",")]
    for name in (f"{sign}m", f"{word}meter")
}
MICRONS |= {"m": 1e6, "meter": 1e6, "um": 1.0, "micron": 1.0}
MICRONS |= {"å": 1e-4, "angstrom": 1e-4, "Å": 1e-4}
MICRONS |= {"inch": 25400.0, "in": 25400.0, "inches": 25400.0, "thou": 25.4, "li": 25400 / 12}
MICRONS |= {"ft": 304800.0, "foot": 304800.0, "feet": 304800.0, "yd": 914400.0, "yard": 914400.0}
MICRONS |= {"mi": 1609344e3, "mile": 1609344e3, "pt": 25400 / 72, "ua": 1.495978707e17}
MICRONS |= {"ly": 9.4607304725808e21, "pc": 3.0856775814913673e22, "parsec": 3.0856775814913673e22}
# Units without a length; their numbers still give the ratio of the axes.
NO_LENGTH = ("", "pixel", "px", "voxel", "reference frame", "none", "???", "unknown")
MICRONS |= dict.fromkeys(NO_LENGTH, 0.0)


def microns(unit: str) -> float | None:
    """Micrometres per `unit`; 0 if it is not a length (`NO_LENGTH`), None if unknown."""
    # "Mm" is not "mm": try it as written first. µ has two code points, and an escape in ImageJ.
    unit = unit.strip().replace("\\u00b5", "µ").replace("\\u00B5", "µ").replace("μ", "µ")
    names = (unit, unit.lower(), unit.lower().replace("metre", "meter"))
    forms = (form for n in names for form in (n, n.removesuffix("s") if len(n) > 4 else n))
    return next((MICRONS[form] for form in forms if form in MICRONS), None)


def calibrate(values: Sequence[float], units: Sequence[str], fields: Sequence[str]) -> Spacing:
    """Turn what a file records about each axis into one spacing.

    Parameters
    ----------
    values, units, fields : three of each, in the order z, y, x
        Lengths of a voxel, their units, and the names of their fields in the file.

    Returns
    -------
    Spacing
        In µm; if no axis has a unit, the numbers of the file as a ratio; if an axis has no usable
        value or an unknown unit, (1, 1, 1).
    """
    factors = [microns(unit) for unit in units]
    source = ", ".join(
        f"{field} {'missing' if np.isnan(value) else f'{value:g} {unit}'.strip()}"
        for field, value, unit in zip(fields, values, units, strict=True)
    )
    odd = {repr(unit): None for unit, f in zip(units, factors, strict=True) if f is None}
    if odd:
        return Spacing(unknown=f"{', '.join(odd)} is not a known length ({source})")
    scale = factors if any(factors) else [1.0] * 3
    lengths = tuple(float(v) * f for v, f in zip(values, scale, strict=True))
    if not all(np.isfinite(d) and d > 0 for d in lengths):
        return Spacing(unknown=f"not every axis has a length ({source})")
    if any(factors):
        return Spacing(lengths, "", source)
    return Spacing(lengths, f"no unit of length ({source}), so only the ratio is known", source)


def _number(value: Any) -> float:
    """`value` as float, NaN if it is not a number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


# Checks of all formats ------------------------------------------------------------------------


def check_shape(shape: Sequence[int]) -> None:
    """Refuse shapes other than three dimensions with more than one slice."""
    flat = len(shape) == 2 or (len(shape) == 3 and shape[0] == 1)
    if flat or len(shape) != 3 or min(shape) < 1:
        remedy = "a single slice is not a volume" if flat else "convert it"
        raise VolumeError(f"expected a 3D stack, got shape {tuple(shape)}; {remedy}")


def check_type(dtype: np.dtype) -> None:
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise VolumeError(f"voxel type {dtype}, expected integers or floats; convert it")


def check_size(shape: Sequence[int], dtype: np.dtype, available: int) -> None:
    """Refuse a header that claims more bytes than there are."""
    claimed = prod(shape) * dtype.itemsize
    if claimed > available:
        raise VolumeError(
            f"header claims {tuple(shape)} voxels of {dtype} ({claimed} bytes), "
            f"found {max(available, 0)} bytes; the file is truncated or damaged"
        )


def check_memory(name: str, shape: Sequence[int], dtype: np.dtype) -> None:
    """Refuse an array larger than memory, for which the system might kill the process."""
    needed, memory = prod(shape) * dtype.itemsize, psutil.virtual_memory().total
    if needed > memory:
        raise VolumeError(
            f"{name}: {tuple(shape)} voxels of {dtype} ({needed} bytes) do not fit in memory "
            f"({memory} bytes); cut out a part"
        )


def choose_channel(channels: int, channel: int | None) -> int:
    """Index of the channel to take, or an error that lists the channels."""
    if channel is None and channels > 1:
        raise VolumeError(
            f"{channels} channels (0 to {channels - 1}), expected one; give channel= (--channel)"
        )
    if not 0 <= (channel or 0) < channels:
        known = f"from 0 to {channels - 1}" if channels > 1 else "0, the only one"
        raise VolumeError(f"channel {channel} does not exist; give channel= (--channel) {known}")
    return channel or 0


def check_spacing(spacing: Sequence[float]) -> np.ndarray:
    """A spacing as (3,) float64."""
    values = np.asarray(spacing, dtype=float)
    low, high = LENGTHS
    usable = values.shape == (3,) and np.all((values >= low) & (values <= high))
    if not usable or values.max() > LONGEST * values.min():
        raise VolumeError(
            f"spacing is {tuple(spacing)}, expected three positive numbers (dz, dy, dx), the "
            f"largest at most {LONGEST} times the smallest; give the lengths of a voxel's edges"
        )
    return values


def boxes(lower: Sequence[int], upper: Sequence[int], step: Sequence[int]) -> Iterator[Box]:
    """Cut the range between two corners (z, y, x) into boxes of `step`, ordered by z, y, x."""
    for corner in itertools.product(*map(range, lower, upper, step)):
        ends = (min(i + n, end) for i, n, end in zip(corner, step, upper, strict=True))
        yield tuple(map(slice, corner, ends))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def read_file(path: Path, channel: int | None) -> Stack:
    """Read a file by its suffix; see `FORMATS`. Voxels that are not packed are mapped."""
    if path.is_dir():
        raise VolumeError("is a folder, expected a file; give one image stack")
    with open(path, "rb") as file:
        begin = file.read(1 << 16)
    if not begin:
        raise VolumeError("the file is empty (0 bytes); copy or download it again")
    signs, read = FORMATS[path.suffix.lower()]
    if not begin.startswith(signs):
        raise VolumeError(f"does not begin like a {path.suffix} file; it is damaged or misnamed")
    if read is read_tiff:
        return read_tiff(path, channel)
    header = read(path, begin)
    shape, axis = header.shape, header.axis
    check_type(header.dtype)
    if not all(n > 0 for n in shape):
        raise VolumeError(f"shape {shape}, expected positive numbers; it is damaged")
    check_shape([n for k, n in enumerate(shape) if k != axis])
    index = choose_channel(1 if axis is None else shape[axis], channel)
    if header.unpack:
        data = header.unpack(path, header)
    else:
        check_size(shape, header.dtype, path.stat().st_size - header.offset)
        data = np.memmap(path, header.dtype, "r", header.offset, shape, header.order)
    return Stack(data if axis is None else np.moveaxis(data, axis, 0)[index], header.spacing)


# TIFF ---------------------------------------------------------------------------------------

# Most bytes that one stored byte can expand to, by compression. 1: packed bits; 5: LZW, 4096 bytes
# per 12 bits; 8 and 32946: Deflate; 32773: PackBits.
EXPANSION = {1: 8, 5: 2731, 8: 1032, 32773: 64, 32946: 1032}
EXPANSION_OTHER = 1 << 15


def read_tiff(path: Path, channel: int | None) -> Stack:
    try:
        with tifffile.TiffFile(path) as tif:
            _check_directories(tif)
            return _read_series(path, tif, channel)
    except (VolumeError, MemoryError):
        raise
    except Exception as error:
        # Damaged files make tifffile and its codecs raise almost any error.
        raise VolumeError(f"cannot be read as TIFF: {_first_line(error)}") from error


def _check_directories(tif: tifffile.TiffFile) -> None:
    """Follow the directories of all pages; refuse a chain or a tag that leads out of the file.

    tifffile stops at the first page that it cannot reach, so a truncated file would pass for a
    smaller volume.
    """
    form, file, at = tif.tiff, tif.filehandle, tif.pages.first.offset
    seen: set[int] = set()
    why = "the file is truncated or damaged"
    while at:
        page = len(seen)
        if at in seen or not 8 <= at < file.size:
            raise VolumeError(f"page {page} is not within the file of {file.size} bytes; {why}")
        seen.add(at)
        file.seek(at)
        try:
            (count,) = struct.unpack(form.tagnoformat, file.read(form.tagnosize))
            tags = file.read(min(count * form.tagsize, file.size))
            (at,) = struct.unpack(form.offsetformat, file.read(form.offsetsize))
        except struct.error:
            raise VolumeError(f"ends within a page directory; {why}") from None
        # Tag, type, number of values, then the values or their place.
        for tag, kind, values, _ in struct.iter_unpack(form.tagformat1 + form.tagformat2[1:], tags):
            if values * struct.calcsize(tifffile.TIFF.DATA_FORMATS.get(kind, "B")) > file.size:
                raise VolumeError(
                    f"tag {tag} of page {page} claims {values} values in {file.size} bytes; {why}"
                )


def _read_series(path: Path, tif: tifffile.TiffFile, channel: int | None) -> Stack:
    described = re.search(r'<BinaryOnly [^>]*MetadataFile="([^"]*)"', tif.ome_metadata or "")
    if described:
        readable = described[1].lower().endswith((".tif", ".tiff"))
        raise VolumeError(
            f"only a part of the OME set that {described[1]} describes; "
            f"{'read that file, or ' * readable}save the set as one file, for example with Fiji"
        )
    chosen, notes = _choose_images(tif)
    first, axes = chosen[0], "ZYX"
    # Slices that were written separately are one series each.
    shape, several = (len(chosen), *first.shape), len(chosen) > 1
    if not several:
        axes, shape = _axes(first.axes, first.shape)
    check_type(first.dtype)
    _check_imagej(tif, prod(shape) // prod(shape[axes.index(axis)] for axis in "YX"))
    index = choose_channel(shape[axes.index("C")] if "C" in axes else 1, channel)
    spacing = _ome_spacing(tif, first) if tif.is_ome else _imagej_spacing(tif)
    if not several and first.dataoffset is not None and first.keyframe.parent is tif:
        check_size(shape, first.dtype, tif.filehandle.size - first.dataoffset)
        dtype = first.dtype.newbyteorder(tif.byteorder)
        data = np.memmap(path, dtype, "r", first.dataoffset, shape)
    else:
        _check_pages(tif, chosen, shape)
        loaded = [series.asarray() for series in chosen]
        data = (np.stack(loaded) if several else loaded[0]).reshape(shape)
    data = data.transpose([axes.index(axis) for axis in "CZYX" if axis in axes])
    data = data[index] if "C" in axes else data
    page = first.keyframe
    if page.photometric == tifffile.PHOTOMETRIC.PALETTE and not tif.is_imagej:
        table = np.asarray(page.colormap)
        # If a table does not rise, its indices are not brightness.
        if (np.diff(table.sum(axis=0, dtype=int)) < 0).any():
            if (table == table[0]).all():
                data = table[0][data]
                notes += ("stored with a table of greys, whose brightness is used",)
            else:  # perhaps labels, not an image
                notes += ("stored with a table of colours; its indices are read, not brightness",)
    if (turned := page.tags.valueof("Orientation", 1)) != 1:
        notes += (f"its Orientation {int(turned)} is not applied; rows and columns as stored",)
    # ImageJ stores pixels as they are and inverts only the display.
    if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and not tif.is_imagej:
        if data.dtype == bool and page.software.startswith("tifffile"):
            # tifffile marks boolean arrays this way, but stores them unchanged.
            notes += ("a mask marked MinIsWhite by tifffile, kept unchanged",)
        else:
            data = _negative(data, page.bitspersample)
            notes += ("stored with 0 as white (MinIsWhite), inverted",)
    return Stack(data, spacing, notes)


def _choose_images(
    tif: tifffile.TiffFile,
) -> tuple[list[tifffile.TiffPageSeries], tuple[str, ...]]:
    """The series of the largest stack, or of its slices, and a note if there are others."""
    # The metadata of a set of OME files also describe images that are only in its other files.
    own = [s for s in tif.series if any(p is not None and p.parent is tif for p in s.pages)]
    every = own or tif.series
    groups: dict[tuple, list] = {}
    for series in every:
        groups.setdefault((series.shape, series.dtype), []).append(series)

    def weight(group: list) -> tuple[bool, bool, int]:
        voxels = len(group) * prod(group[0].shape)
        # A stack comes before colour overviews and single slices, however large.
        return "S" not in group[0].axes, voxels > prod(group[0].shape[-2:]), voxels

    main = max(groups.values(), key=weight)
    first = main[0]
    if first.dtype is None:
        raise VolumeError("its voxel type is not one that TIFF defines; convert it")
    # Thumbnails, labels and smaller copies have other rows and columns than the image.
    alike = [s for s in every if s.shape[-2:] == first.shape[-2:]]
    if len(alike) > 1 and (tif.is_ome or len(first.shape) != 2 or len(alike) > len(main)):
        raise VolumeError(
            f"{len(alike)} separate images, the first of shape {alike[0].shape}, expected "
            "one 3D stack; save them as one, or each as its own file"
        )
    if len(main) == len(every):
        if not tif.is_ome:
            return main, ()
        used = sum(p is not None and p.parent is tif for s in every for p in s.pages)
        left = (
            f"its OME metadata describe {used} of {len(tif.pages)} pages; the others are not read"
        )
        return main, (left,) * (used < len(tif.pages))
    shapes = ", ".join(dict.fromkeys(str(s.shape) for s in every))
    return main, (f"{len(every)} images, of shapes {shapes}; the largest stack is used",)


def _axes(axes: str, shape: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """Axes and shape without axes of length 1; the stack axis is named Z."""
    kept = [(a, n) for a, n in zip(axes, shape, strict=True) if n != 1 or a in "YX"]
    axes, shape = "".join(a for a, _ in kept), tuple(n for _, n in kept)
    if "S" in axes:
        raise VolumeError(
            f"colour image with {shape[axes.index('S')]} samples per pixel, expected grey; split "
            "its channels or, if they are slices, save as grey (tifffile: photometric='minisblack')"
        )
    # tifffile calls the axis of plain pages I, Q or "other".
    unnamed = [a for a in axes if a in "IQ"]
    if "Z" not in axes and len(unnamed) == 1:
        axes = axes.replace(unnamed[0], "Z")
    if len(shape) == 2:
        check_shape(shape)
    if sorted(axes) not in (sorted("ZYX"), sorted("CZYX")):
        raise VolumeError(
            f"axes {axes} of shape {shape}, expected ZYX or CZYX; if its frames or "
            "channels are slices, say so in the image's properties (ImageJ: Image > Properties)"
        )
    return axes, shape


def _check_imagej(tif: tifffile.TiffFile, slices: int) -> None:
    """Refuse a file with fewer images than ImageJ's header claims."""
    if not tif.is_imagej:
        return
    claimed, pages = _number((tif.imagej_metadata or {}).get("images", 1)), len(tif.pages)
    # Beyond 4 GiB, ImageJ writes a single page.
    if claimed > slices or 1 < claimed < pages:
        laid = f" as {slices} channels times slices" if claimed == pages else ""
        raise VolumeError(
            f"ImageJ's header claims {claimed:.0f} slices{laid}, found {max(slices, pages)}; the "
            "file is truncated, or the header is another stack's: save it again with ImageJ"
        )


def _check_pages(
    tif: tifffile.TiffFile, chosen: Sequence[tifffile.TiffPageSeries], shape: Sequence[int]
) -> None:
    """Refuse pages whose data are missing, exceed their file, or are too few for `shape`."""
    available, pages = 0, [page for series in chosen for page in series.pages]
    for number, page in enumerate(pages):
        if page is None and tif.is_ome:
            found = {page.parent.filehandle.name for page in pages if page is not None}
            lost = ", ".join(file for file in _set_of(tif.ome_metadata) if file not in found)
            raise VolumeError(
                f"slice {number} of its set of files is missing: {lost} not found, or not a TIFF; "
                "put all files of the set into one folder"
            )
        # In a set of OME files, most pages are in other files.
        file = (tif if page is None else page.parent).filehandle
        if page is not None and page.parent is not tif:
            _check_member(tif, page)
        counts, offsets = ((), ()) if page is None else (page.databytecounts, page.dataoffsets)
        ends = [o + n for o, n in zip(offsets, counts, strict=False)]
        if not ends or min(counts) <= 0 or max(ends) > file.size:
            raise VolumeError(
                f"the data of page {number} are not within {file.name}, of {file.size} "
                "bytes; it is truncated or damaged"
            )
        compression = int(page.keyframe.compression)
        available += sum(counts) * EXPANSION.get(compression, EXPANSION_OTHER)
    check_size(shape, chosen[0].dtype, available)


def files_read(path: Path) -> list[Path]:
    """The file of an image and, if others of its set of OME files hold parts of it, those."""
    try:
        with tifffile.TiffFile(path) as tif:
            text = tif.ome_metadata or ""
    except Exception:  # another format, or damaged: reading will tell
        return [path]
    own, parts = _uuid_in(text), {}
    # Each file describes all images of the set, also those that it has no part in.
    for named in map(_set_of, re.split(r"<Image\b", text)):
        if path.name in named or own in named.values():
            parts |= named
    others = (name for name, uuid in parts.items() if name != path.name and uuid != own)
    return [path, *(path.parent / name for name in others)]


def _set_of(text: str) -> dict[str, str]:
    """The files of a set of OME files that their metadata name, with their UUIDs."""
    named = re.findall(r'<UUID [^>]*FileName="([^"]*)"[^>]*>([^<]*)<', text)
    return {html.unescape(file): uuid.strip() for file, uuid in named}


def _uuid_in(text: str) -> str | None:
    """A file's own UUID in its OME metadata."""
    own = re.search(r'<OME\b[^>]* UUID="([^"]*)"', text)
    return own and own[1]


def _check_member(tif: tifffile.TiffFile, page: tifffile.TiffPage) -> None:
    """Refuse a page from another file if that belongs to another set or has another shape."""
    file, first = page.parent.filehandle.name, tif.pages.first
    own = _uuid_in(page.parent.ome_metadata or "")
    wanted = _set_of(tif.ome_metadata or "").get(file)
    other = page.parent.pages.first
    if (own and wanted and own != wanted) or other.shape != first.shape:
        raise VolumeError(
            f"{file} does not belong to its set of files (shape {other.shape}); "
            "expected the file that was saved with it: copy the set again"
        )


def _negative(data: np.ndarray, bits: Any) -> np.ndarray:
    """Invert pixels whose 0 is white."""
    if data.dtype.kind == "f":
        raise VolumeError(
            f"0 is white (MinIsWhite) in {data.dtype} voxels, which have no defined black; "
            "invert and save it as MinIsBlack"
        )
    if data.dtype.kind != "u":
        return ~data
    return data.dtype.type((1 << int(np.max(bits))) - 1) - data


def _imagej_spacing(tif: tifffile.TiffFile) -> Spacing:
    """Spacing from ImageJ's metadata; a plain TIFF records none."""
    metadata, tags = tif.imagej_metadata or {}, tif.pages[0].tags
    unit = str(metadata.get("unit", ""))
    if not tif.is_imagej or (not microns(unit) and tags.valueof(296, default=1) != 1):
        # Per inch or centimetre without ImageJ's unit: a resolution for printing.
        return Spacing()
    # XResolution and YResolution are pixels per unit, as fractions.
    per_unit = [tags.valueof(code, default=(0, 1)) for code in (283, 282)]
    dy, dx = (d / n if n else float("nan") for n, d in per_unit)
    # ImageJ omits a spacing of 1 (writers without a unit omit an unknown one), and writes a
    # negative one for a stack taken from top to bottom. It writes `yunit` and `zunit` if they
    # differ from `unit`.
    dz = abs(_number(metadata.get("spacing", 1.0 if microns(unit) else None)))
    units = [str(metadata.get(key, unit)) for key in ("zunit", "yunit")]
    return calibrate((dz, dy, dx), (*units, unit), ("spacing", "YResolution", "XResolution"))


def _ome_spacing(tif: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> Spacing:
    root = ElementTree.fromstring(tif.ome_metadata)
    pixels = [e.attrib for e in root.iter() if e.tag.endswith("}Pixels")]
    fields = [f"PhysicalSize{axis}" for axis in "ZYX"]
    if len(pixels) == len(tif.series):  # one series per image, in the same order
        pixels = [pixels[list(tif.series).index(series)]]
    elif len(pixels) > 1:  # some images are only described, or are in other files
        size = dict(zip(series.axes, map(str, series.shape), strict=True))
        size = [size.get(axis, "1") for axis in "ZYX"]
        pixels = [p for p in pixels if [p.get(f"Size{axis}", "1") for axis in "ZYX"] == size]
    # The OME schema's default unit is the micrometre.
    found = {tuple((p.get(field), p.get(f"{field}Unit", "µm")) for field in fields) for p in pixels}
    if len(found) > 1:
        return Spacing(unknown="it describes several images of this size, with different spacings")
    sizes, units = zip(*next(iter(found), [(None, "")] * 3), strict=True)
    return calibrate(list(map(_number, sizes)), list(units), fields) if any(sizes) else Spacing()


# NumPy --------------------------------------------------------------------------------------


def read_npy(path: Path, begin: bytes) -> Header:
    try:
        with open(path, "rb") as file:
            major, _ = np.lib.format.read_magic(file)
            read = getattr(np.lib.format, f"read_array_header_{major}_0")
            shape, fortran, dtype = read(file)
            offset = file.tell()
    except OSError:
        raise
    except Exception as error:
        # The header is a Python literal: parsing a damaged one fails in many ways.
        raise VolumeError(
            f"its NumPy header cannot be read ({type(error).__name__}); save it with numpy.save"
        ) from error
    if dtype.hasobject or dtype.names:
        raise VolumeError(
            f"holds Python objects or records, expected an array of numbers; if it is "
            "from Cellpose, and you trust it, convert it in Python: import numpy; "
            f"numpy.save('out.npy', numpy.load({path.name!r}, allow_pickle=True).item()['masks'])"
        )
    return Header(shape, dtype, 0 if len(shape) == 4 else None, offset, "F" if fortran else "C")


# Vaa3D --------------------------------------------------------------------------------------

# Vaa3D's readers, stackutil.cpp and ImageLoaderBasic.cpp, define the formats.
V3DRAW, V3DRAW5 = b"raw_image_stack_by_hpeng", b"raw5image_stack_by_hpeng"
V3DPBD = b"v3d_volume_pkbitdf_encod"


def _vaa3d_header(begin: bytes, code: str = "i") -> Header:
    """A Vaa3D header with sizes of struct type `code`."""
    order = {b"L": "<", b"B": ">"}.get(begin[24:25])
    if order is None:
        raise VolumeError(f"byte order {begin[24:25]!r}, expected b'L' or b'B'; it is damaged")
    fields = struct.Struct(f"{order}h{5 if begin.startswith(V3DRAW5) else 4}{code}")
    if len(begin) < 25 + fields.size:
        raise VolumeError("ends within its header; the file is truncated")
    kind, *sizes = fields.unpack_from(begin, 25)
    widths = {1: "u1", 2: "u2"} | ({} if begin.startswith(V3DPBD) else {4: "f4"})
    if kind not in widths:
        raise VolumeError(
            f"voxel type {kind}, expected one of {', '.join(map(str, widths))} bytes; save "
            "it as .v3draw, 8 or 16 bit, with Vaa3D"
        )
    return Header(tuple(sizes[::-1]), np.dtype(order + widths[kind]), 0, 25 + fields.size)


def read_v3draw(path: Path, begin: bytes) -> Header:
    def fills(header: Header) -> bool:
        claimed = prod(header.shape) * header.dtype.itemsize + header.offset
        return claimed == path.stat().st_size and min(header.shape) > 0

    # Early versions of Vaa3D wrote the sizes as 2-byte integers.
    headers = [_vaa3d_header(begin, code) for code in "ih"]
    header = next(filter(fills, headers), headers[0])
    if len(header.shape) == 4:
        return header
    if header.shape[0] != 1:
        raise VolumeError(
            f"a series of {header.shape[0]} time points; save one of them as a 3D stack"
        )
    return replace(header, shape=header.shape[1:])


def read_v3dpbd(path: Path, begin: bytes) -> Header:
    return replace(_vaa3d_header(begin), unpack=_pbd_unpack)


# For voxels of 1 and 2 bytes: the first code of each class of runs, and its bits per difference.
# The first class is literals, the last one repeats a value.
_PBD = {1: ((0, 33, 128), (0, 2, 0)), 2: ((0, 32, 80, 183, 223), (0, 3, 4, 5, 0))}
# Runs unpacked at a time.
_PBD_RUNS = 1 << 16


def _pbd_unpack(path: Path, header: Header) -> np.ndarray:
    """Voxels of a packed stream, in native byte order.

    A code byte starts a run of literals, of differences to the previous voxel, or of one repeated
    value. All codes are read before anything is allocated.
    """
    packed = path.read_bytes()[header.offset :]
    shape, kind, total = header.shape, header.dtype.itemsize, prod(header.shape)
    begins, widths = (np.array(part) for part in _PBD[kind])
    group = np.searchsorted(begins, np.arange(256), side="right") - 1
    lengths, bits = np.arange(1, 257) - begins[group], widths[group]
    literal, difference = group == 0, bits > 0
    at = _pbd_codes(packed, np.where(literal, lengths * kind, kind), lengths * bits)
    data = np.frombuffer(packed + bytes(2), np.uint8)
    codes = data[at]
    if len(codes) and difference[codes[0]]:
        raise VolumeError("begins with a difference, but no voxel precedes it; the file is damaged")
    if (unpacked := int(lengths[codes].sum())) != total:
        raise VolumeError(
            f"header claims {shape} (c, z, y, x) = {total} voxels, its data unpack to "
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
        first = begin + np.where(literal[code], place * kind, 0)
        value = data[first].astype(np.int64)
        if kind == 2:
            low, high = (first + 1, first) if header.dtype.str[0] == ">" else (first, first + 1)
            value = data[low] | data[high].astype(np.int64) << 8
        # Differences fill a byte from the lowest bits (1-byte voxels) or the highest (2-byte).
        # Numbers above half of the range are negative.
        width, change = bits[code[step]], np.zeros(len(run), np.int64)
        byte, bit = np.divmod(place[step] * width, 8)
        byte += begin[step]
        window = data[byte].astype(np.int64) << 8 | data[byte + 1]
        raw = window >> (8 + bit if kind == 1 else 16 - width - bit) & ((1 << width) - 1)
        change[step] = np.where(raw > 1 << width >> 1, (1 << width >> 1) - raw, raw)
        change = np.cumsum(change)
        last = np.maximum.accumulate(np.where(step, -1, np.arange(len(run))))
        base = np.where(last < 0, int(voxels[done - 1]), value[last] - change[last])
        voxels[done : done + len(run)] = np.where(step, base + change, value)
        done += len(run)
    return voxels.reshape(shape)


def _pbd_codes(packed: bytes, stored: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Place of each run's code, which is followed by its `bits` or, if 0, by `stored` bytes."""
    sizes = (1 + np.where(bits > 0, -(-bits // 8), stored)).tolist()
    starts, position, end = [], 0, len(packed)
    while position < end:
        starts.append(position)
        position += sizes[packed[position]]
    if position > end:
        raise VolumeError("ends within a run of voxels; the file is truncated")
    return np.array(starts, np.int64)


# NRRD ---------------------------------------------------------------------------------------

NRRD_TYPES = {"char": "i1", "short": "i2", "int": "i4", "float": "f4", "double": "f8"}
NRRD_TYPES |= {"uchar": "u1", "ushort": "u2", "uint": "u4"}
NRRD_TYPES |= {f"{sign}int{8 * n}": f"{sign or 'i'}{n}" for sign in ("", "u") for n in (1, 2, 4, 8)}
NRRD_TYPES |= {f"{sign}long{gap}long": f"{sign or 'i'}8" for sign in ("", "u") for gap in ("", " ")}


def read_nrrd(path: Path, begin: bytes) -> Header:
    """Read a NRRD with attached data, raw or gzip (http://teem.sourceforge.net/nrrd/)."""
    head = re.match(rb".*?\n(?=[ \t]*\r?\n)", begin, re.DOTALL)
    if not head:
        raise VolumeError(
            "no empty line after the header; its data are missing or in another file, "
            "expected both in one .nrrd file"
        )
    offset = begin.index(b"\n", head.end()) + 1
    lines = re.findall(r"^([^#:\n]+):(?!=)[ \t]*(.*?)[ \t]*$", decode(head[0]), re.MULTILINE)
    fields = {key.strip().lower(): value for key, value in lines}
    for key in ("data file", "datafile", "line skip", "lineskip", "byte skip", "byteskip"):
        if fields.get(key, "0") != "0":
            raise VolumeError(f"header with {key!r}; save header and data in one .nrrd file")
    try:
        shape = tuple(int(n) for n in fields["sizes"].split())[::-1]
        word = fields["type"].lower().replace("unsigned ", "u").replace("signed ", "")
        code = NRRD_TYPES[re.sub("_t$| int$", "", word)]
        encoding = fields["encoding"].lower()
    except (KeyError, ValueError) as error:
        raise VolumeError(
            f"the NRRD header has no usable sizes, type or encoding ({error}); export it again"
        ) from error
    if encoding not in ("raw", "gzip", "gz"):
        raise VolumeError(f"encoding {encoding!r}, expected raw or gzip; save it as raw")
    dtype = np.dtype({"big": ">"}.get(fields.get("endian", "little").lower(), "<") + code)
    axis, spacing = _nrrd_axes(fields, len(shape))
    unpack = None if encoding == "raw" else _gunzip
    return Header(shape, dtype, axis, offset, spacing=spacing, unpack=unpack)


def _gunzip(path: Path, header: Header) -> np.ndarray:
    available = (path.stat().st_size - header.offset) * EXPANSION[8]
    check_size(header.shape, header.dtype, available)
    try:
        with open(path, "rb") as file:
            file.seek(header.offset)
            # This reads any number of members (RFC 1952).
            stream = gzip.GzipFile(fileobj=file)
            unpacked = stream.read(prod(header.shape) * header.dtype.itemsize)
            try:
                stream.read(1)  # the checksum comes at the end
            except gzip.BadGzipFile as error:
                if "CRC" in str(error):
                    raise  # other bytes after the data do not matter
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise VolumeError(f"the gzip data are damaged ({error}); export the file again") from error
    check_size(header.shape, header.dtype, len(unpacked))
    return np.frombuffer(unpacked, header.dtype).reshape(header.shape)


def _nrrd_axes(fields: dict[str, str], dims: int) -> tuple[int | None, Spacing]:
    """The channel axis (of four axes) and the spacing of the others."""

    def listed(key: str) -> list[str]:
        text = fields.get(key, "")
        return re.findall(r'"([^"]*)"', text) if '"' in text else text.split()

    units = listed("units") or listed("space units")
    key = next((key for key in ("space directions", "spacings") if key in fields), "")
    if key == "space directions":
        text = fields[key].replace("none", "(nan)").replace(" ", "")
        steps = [[_number(x) for x in v.split(",")] for v in text.strip("()").split(")(")]
        values = [float(np.linalg.norm(s)) for s in steps]
        # An oblique direction has a unit only if all of its axes have the same.
        pairs = [zip(listed("space units"), s, strict=False) for s in steps]
        joined = [" and ".join(sorted({unit for unit, x in pair if x})) for pair in pairs]
        units = joined if any(joined) else units
    else:
        values = [_number(x) for x in fields.get("spacings", "").split()]
    # The file lists the fastest axis first; NaN stands for an axis not in space.
    values = values[::-1] if len(values) == dims else [float("nan")] * dims
    units = [*units, *[""] * dims][:dims][::-1]
    axis = None
    kinds = fields.get("kinds", "").lower().split()[::-1]
    odd = [k for k, n in enumerate(kinds) if n not in ("domain", "space") and len(kinds) == dims]
    if dims == 3 and (other := [kinds[k] for k in odd if kinds[k] not in ("none", "???")]):
        raise VolumeError(
            f"an axis of kind {other[0]!r}, expected three axes in space; save one stack"
        )
    if dims == 4:
        # The channel axis is the one that is not spatial or has no spacing, else the slowest.
        axis = [*odd, *np.flatnonzero(~np.isfinite(values)).tolist(), 0][0]
        del values[axis], units[axis]
    if dims not in (3, 4) or not key:
        return axis, Spacing()
    return axis, calibrate(values, units, [f"{key} of {a}" for a in "zyx"])


# OME-Zarr -----------------------------------------------------------------------------------

# The largest chunk that Zarr's compressors can make.
CHUNK_BYTES = 1 << 31


@dataclass(frozen=True)
class LazyStack:
    """One channel of a Zarr array as a stack (z, y, x) that is read when it is indexed.

    Index it with integers and slices; ``numpy.asarray`` reads all of it. A damaged chunk raises
    `VolumeError`. A missing one holds the fill value, as Zarr defines it for sparse volumes.
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
                f"{self.name}: the part read of its {self.shape} voxels does not fit in memory; "
                "read a smaller part"
            ) from error
        except Exception as error:
            # Codecs and file systems have their own errors.
            raise VolumeError(
                f"{self.name}: a chunk cannot be read ({type(error).__name__}: "
                f"{_first_line(error)}); it is damaged, copy or export the image again"
            ) from error

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a stack on disk can become an array only by copying")
        check_memory(self.name, self.shape, self.dtype)
        return np.asarray(self[:], dtype=dtype)

    def stored_cells(self) -> tuple[list[tuple[int, ...]], tuple[int, ...], list[int]]:
        """Grid places of the cells that have a file; size of a cell; size of the grid.

        The time depends on the number of files, not on the shape that the array claims. A cell is
        one chunk or, with sharding, many.
        """
        lead = len(self.fixed)
        step = getattr(self.array, "shards", None) or self.array.chunks
        fixed = tuple(i // n for i, n in zip(self.fixed, step, strict=False))
        grid = [-(-n // s) for n, s in zip(self.shape, step[lead:], strict=True)]
        files = _chunk_files(self.folder, self.array.ndim)
        inside = {place[lead:] for place in files if place[:lead] == fixed}
        return sorted(p for p in inside if all(map(lt, p, grid))), step[lead:], grid

    def stored(self) -> Iterator[tuple[int, np.ndarray]]:
        """First slice and voxels of each stored chunk, in order; then a voxel of a missing one."""
        places, step, grid = self.stored_cells()
        for place in places:
            lower = tuple(map(mul, place, step))
            upper = [min(i + s, n) for i, s, n in zip(lower, step, self.shape, strict=True)]
            for box in boxes(lower, upper, self.chunks):
                yield box[0].start, self[box]
        if len(places) < prod(grid):
            known = set(places)
            gap = next(p for p in np.ndindex(*grid) if p not in known)
            z, y, x = map(mul, gap, step)
            yield z, self[z : z + 1, y : y + 1, x : x + 1]


def _chunk_files(folder: Path, ndim: int) -> Iterator[tuple[int, ...]]:
    """Grid places of an array's chunk files, which are named 0.1.2, 0/1/2 or c/0/1/2."""
    for parent, _, files in os.walk(folder):
        above = Path(parent).relative_to(folder).parts
        for file in files:
            numbers = ".".join((*above, file)).removeprefix("c.").split(".")
            if len(numbers) == ndim and all(n.isdecimal() for n in numbers):
                yield tuple(map(int, numbers))


def read_zarr(path: Path, channel: int | None) -> Stack:
    """Open the largest level of an OME-Zarr image (NGFF 0.4, 0.5; ngff.openmicroscopy.org)."""
    try:
        array, axes, spacing, notes = _open_multiscale(path)
        shape, chunks, dtype = tuple(array.shape), tuple(array.chunks), np.dtype(array.dtype)
    except VolumeError:
        raise
    except Exception as error:
        # Metadata can be any JSON, and zarr has its own errors.
        raise VolumeError(
            f"not an OME-Zarr image ({type(error).__name__}: {_first_line(error)}); "
            f"expected multiscales with axes and datasets{_inside(path)}"
        ) from error
    if axes[-3:] != ["z", "y", "x"] or len(axes) != len(shape) or axes.count("c") > 1:
        raise VolumeError(
            f"axes {axes} of shape {shape} must end with z, y, x; export as (channel, z, y, x)"
        )
    check_type(dtype)
    for axis, n in zip(axes[:-3], shape, strict=False):
        if n < 1 or (axis != "c" and n != 1):
            what = "time points" if axis == "t" else f"images along {axis!r}"
            raise VolumeError(f"a series of {n} {what}; save one of them as a 3D stack")
    check_shape(shape[-3:])
    smallest = min(*chunks, *(getattr(array, "shards", None) or chunks))
    if smallest < 1 or prod(chunks) * dtype.itemsize > CHUNK_BYTES:
        raise VolumeError(
            f"chunks of {chunks} voxels, expected 1 byte to 2 GiB each; write it "
            "again with other chunks, or copy it again if it is damaged"
        )
    index = choose_channel(shape[axes.index("c")] if "c" in axes else 1, channel)
    fixed = tuple(index if axis == "c" else 0 for axis in axes[:-3])
    return Stack(LazyStack(path.name, array, fixed, path / array.path), spacing, notes)


def _inside(path: Path) -> str:
    """A remedy: the first image within a plate or another group of Zarr, or another format."""
    files = (
        p for k in (1, 2, 3) for n in (".zattrs", "zarr.json") for p in path.glob("*/" * k + n)
    )
    images = sorted(p.parent for p in files if '"multiscales"' in p.read_text("utf-8", "replace"))
    if images:
        return f"; name the image, for example {path.name}/{images[0].relative_to(path)}"
    return "; a bare array can be saved as .npy"


def _open_multiscale(path: Path) -> tuple[Any, list[str], Spacing, tuple[str, ...]]:
    """Largest level of the first image of a group, its axes and spacing, and notes."""
    zarr = _import_zarr()
    group = zarr.open_group(zarr.storage.LocalStore(path, read_only=True), mode="r")
    attributes = dict(group.attrs)
    if "bioformats2raw.layout" in attributes.get("ome", attributes):
        # The converter's folder of images, usually with only one.
        if "1" in group:
            raise VolumeError(f"several images, expected one; name one, for example {path.name}/0")
        group = group["0"]
        attributes = dict(group.attrs)
    images = attributes.get("ome", attributes)["multiscales"]
    image = images[0]
    # Axes are objects from version 0.4 on, names in 0.3, and these five before.
    described = [a if isinstance(a, dict) else {"name": a} for a in image.get("axes", "tczyx")]
    axes = [axis["name"].lower() for axis in described]
    levels = [level for level in image["datasets"] if level["path"] in group]
    lost = ", ".join(x["path"] for x in image["datasets"] if x not in levels)
    notes = (f"{len(images)} images; the first is used",) if len(images) > 1 else ()
    notes += (f"missing levels: {lost}; the largest of the others is used",) if lost else ()
    # Some writers list the smallest level first.
    level = max(levels, key=lambda level: prod(group[level["path"]].shape))
    # The scales of image and level are multiplied; up to version 0.3 there are none.
    scales = [
        step["scale"]
        for part in (level, image)
        for step in part.get("coordinateTransformations") or ()
        if "scale" in step
    ]
    spacing = Spacing()
    if scales and axes[-3:] == ["z", "y", "x"]:
        values = [prod(map(_number, of_axis)) for of_axis in zip(*scales, strict=False)]
        values = values if len(values) == len(axes) else [float("nan")] * 3
        units = [str(axis.get("unit") or "") for axis in described[-3:]]
        spacing = calibrate(values[-3:], units, [f"scale of {axis}" for axis in axes[-3:]])
    return group[level["path"]], axes, spacing, notes


@functools.cache
def _import_zarr() -> Any:
    """The package zarr, imported on first use (half a second), with a safer Blosc.

    numcodecs does not compare the length that a Blosc chunk claims with its real one, so a
    damaged chunk can crash the process (https://github.com/zarr-developers/numcodecs/issues/228).
    """
    import zarr
    from numcodecs import blosc

    unpack = blosc.decompress

    def decompress(source: Any, dest: Any = None) -> Any:
        data = np.frombuffer(source, np.uint8)
        # Bytes 12 to 16 of Blosc's header: length of the chunk with its header.
        claimed = int.from_bytes(data[12:16].tobytes(), "little") if len(data) >= 16 else 16
        if claimed > len(data):
            raise ValueError(f"Blosc claims {claimed} bytes, found {len(data)}")
        return unpack(source, dest)

    blosc.decompress = decompress
    return zarr


# First bytes and reader of each format of single files.
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
FORMATS: dict[str, tuple[tuple[bytes, ...], Callable]] = {
    ".tif": (TIFF, read_tiff),
    ".tiff": (TIFF, read_tiff),
    ".npy": ((b"\x93NUMPY",), read_npy),
    ".v3draw": ((V3DRAW, V3DRAW5), read_v3draw),
    ".v3dpbd": ((V3DPBD,), read_v3dpbd),
    ".nrrd": ((b"NRRD000",), read_nrrd),
}
