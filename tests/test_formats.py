"""File formats, against independent writers and readers."""

import gzip
import io
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc
import uuid
import warnings
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numcodecs import Blosc, GZip, Zstd
from PIL import Image, ImageSequence

from neurolib.data import formats
from neurolib.errors import VolumeError
from neurolib.volume import normalise, read_volume

DATA = Path(__file__).parents[1].parent / "shared" / "data"
CASES = int(os.environ.get("NEUROLIB_FUZZ", "600"))
# OME-Zarr, with several files, takes longer.
ZARR_CASES = CASES // 2
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}")


def stack(dtype="uint8", shape=(4, 5, 6), seed=0):
    top = min(np.iinfo(dtype).max, 60000) if np.dtype(dtype).kind in "iu" else 1000
    return (np.random.default_rng(seed).random(shape) * top).astype(dtype)


# Independent writers of the foreign formats ------------------------------------------------


def v3draw(data, order="<", code="i", dims=4):
    """Bytes of a .v3draw file of (c, z, y, x) data."""
    data = data if data.ndim == 4 else data[None]
    sizes = [*data.shape[::-1], *[1] * (dims - 4)]
    key = b"raw_image_stack_by_hpeng" if dims == 4 else b"raw5image_stack_by_hpeng"
    head = key + (b"L" if order == "<" else b"B")
    head += struct.pack(f"{order}h{dims}{code}", data.dtype.itemsize, *sizes)
    return head + data.astype(data.dtype.newbyteorder(order)).tobytes()


def v3dpbd(seed, shape, kind, order="<"):
    """Bytes of a .v3dpbd file made of random runs, and the voxels (c, z, y, x) they stand for."""
    rng = np.random.default_rng(seed)
    total, packed, voxels = int(np.prod(shape)), bytearray(), []
    top, letter = 256**kind, "BH"[kind - 1]
    while len(voxels) < total:
        choice = rng.integers(3) if voxels else 0
        n = min(total - len(voxels), int(rng.integers(1, (33, 30, 40)[choice])))
        if choice == 0:
            values = rng.integers(0, top, n).tolist()
            packed.append(n - 1)
            packed += struct.pack(f"{order}{n}{letter}", *values)
        elif choice == 1:
            values = [int(rng.integers(0, top))] * n
            packed.append((127 if kind == 1 else 222) + n)
            packed += struct.pack(order + letter, values[0])
        else:
            # Three bits a step, first step highest: 0 to 4, and 5, 6, 7 for -1, -2, -3. Two, four
            # and five bits alike; but of two, for 1-byte voxels, the first step is lowest.
            width = 2 if kind == 1 else int(rng.integers(3, 6))
            half, codes = 1 << width - 1, rng.integers(0, 1 << width, n).tolist()
            packed.append({2: 32, 3: 31, 4: 79, 5: 182}[width] + n)
            words = [f"{code:0{width}b}" for code in codes]
            if kind == 1:
                words = ["".join(words[k : k + 4][::-1]).rjust(8, "0") for k in range(0, n, 4)]
            bits = "".join(words)
            bits += "0" * (-len(bits) % 8)
            packed += int(bits, 2).to_bytes(len(bits) // 8, "big")
            values = voxels[-1:]
            for code in codes:
                values.append((values[-1] + (half - code if code > half else code)) % top)
            del values[0]
        voxels += values
    head = b"v3d_volume_pkbitdf_encod" + (b"L" if order == "<" else b"B")
    head += struct.pack(f"{order}h4i", kind, *shape[::-1])
    return head + bytes(packed), np.array(voxels, dtype=f"u{kind}").reshape(shape)


def nrrd(data, encoding="raw", extra="", order="<"):
    names = {"uint8": "uchar", "uint16": "unsigned short", "float32": "float", "int16": "short"}
    names |= {"int64": "int64", "uint64": "unsigned long long int"}
    head = (
        f"NRRD0004\n# made by a test\ntype: {names[data.dtype.name]}\ndimension: {data.ndim}\n"
        f"sizes: {' '.join(map(str, data.shape[::-1]))}\n"
        f"endian: {'little' if order == '<' else 'big'}\nencoding: {encoding}\n{extra}\n"
    )
    body = data.astype(data.dtype.newbyteorder(order)).tobytes()
    return head.encode() + (gzip.compress(body) if encoding == "gzip" else body)


def save(folder, content, name):
    path = folder / name
    path.write_bytes(content)
    return path


def reads(path, data, spacing=None, **options):
    """The volume read from a file, after a comparison with its voxels and perhaps its spacing."""
    volume = read_volume(path, **options)
    assert np.array_equal(volume.data[:], data)
    assert volume.data.dtype == data.dtype.newbyteorder("=")
    assert volume.data.dtype.isnative
    assert spacing is None or volume.spacing == pytest.approx(spacing)
    return volume


def tiff(path, data, **options):
    tifffile.imwrite(path, data, **{"photometric": "minisblack"} | options)
    return path


def peak_of(call, *arguments, **options):
    """Peak of the memory that Python allocates in a call."""
    tracemalloc.start()
    try:
        call(*arguments, **options)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refusal(error, call, *arguments, **options):
    """The one line that a call raises as an error."""
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refused(path, words, **options):
    """Assert that reading fails with one line that begins with the file's name."""
    said = refusal(VolumeError, read_volume, path, **options)
    assert said.startswith(f"{path.name}: ")
    assert re.search(words, said), said


# TIFF ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "int16"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_plain_tiff(tmp_path, dtype, order, compression):
    data = stack(dtype)
    path = tiff(tmp_path / "a.tif", data, byteorder=order, compression=compression)
    volume = reads(path, data, (1, 1, 1))
    mapped = compression is None and np.dtype(order + data.dtype.str[1:]).isnative
    assert isinstance(volume.data, np.memmap) == mapped


def test_tiff_of_slices_written_one_by_one(tmp_path):
    data = stack("uint16")
    for metadata in ({}, None):
        with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
            for page in data:
                writer.write(page, contiguous=False, metadata=metadata, photometric="minisblack")
        reads(tmp_path / "a.tif", data)


def test_a_negative_spacing_is_a_distance_and_a_printing_resolution_none(tmp_path):
    metadata = {"axes": "ZYX", "spacing": -2.0, "unit": "um"}
    path = tiff(tmp_path / "a.tif", stack(), imagej=True, metadata=metadata)
    assert read_volume(path).spacing == (2, 1, 1)
    tiff(path, stack(), resolution=(72, 72), resolutionunit="INCH")
    assert read_volume(path).spacing == (1, 1, 1)


@pytest.mark.parametrize("axes", ["ZCYX", "CZYX"])
def test_channels_of_tiff(tmp_path, axes):
    data = np.stack([stack("uint16", seed=k) for k in range(3)], axis=axes.index("C"))
    path = tiff(tmp_path / "a.ome.tif", data, metadata={"axes": axes})
    refused(path, r"3 channels \(0 to 2\)")
    for channel in (3, -1):
        refused(path, f"channel {channel} does not exist; .* from 0 to 2", channel=channel)
    for k in range(3):
        reads(path, stack("uint16", seed=k), channel=k)
    # A single channel has the number 0.
    path = tiff(tmp_path / "a.tif", stack())
    reads(path, stack(), channel=0)
    refused(path, "channel 1 does not exist; .* 0, the only one", channel=1)


SINGLE = r"expected a 3D stack, got shape \(5, 6\); a single slice is not a volume"


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        (stack()[0], {}, SINGLE),
        (stack(shape=(4, 5, 6, 3)), {"photometric": "rgb"}, "colour image with 3 samples"),
        (stack(shape=(5, 6, 3)), {"photometric": "rgb"}, "colour image with 3 samples"),
        (stack(shape=(2, 4, 5, 6)), {"imagej": True, "metadata": {"axes": "TZYX"}}, "axes TZYX"),
        (stack(), {"imagej": True, "metadata": {"axes": "CYX"}}, "channels are slices"),
        (stack().astype(complex), {}, "complex"),
        *[(stack(), {"metadata": {"axes": f"{a}YX"}}, f"axes {a}YX") for a in "EHAR"],
    ],
)
def test_tiffs_that_are_no_volume(tmp_path, data, options, words):
    refused(tiff(tmp_path / "a.tif", data, **options), words)


def test_tiff_of_several_images(tmp_path):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as writer:
        for slices in (4, 4, 2):
            writer.write(stack(shape=(slices, 5, 6)), photometric="minisblack")
    refused(path, r"3 separate images, the first of shape \(4, 5, 6\)")
    # A thumbnail and a smaller copy are no second image, in any order.
    for shapes in permutations([(4, 5, 6), (2, 3), (2, 2, 3)]):
        with tifffile.TiffWriter(path) as writer:
            for shape in shapes:
                writer.write(stack(shape=shape), photometric="minisblack")
        assert "3 images" in reads(path, stack(shape=(4, 5, 6))).notes[0]
    # Neither is a colour overview or a single picture with more pixels than the stack.
    with tifffile.TiffWriter(path) as writer:
        writer.write(stack(shape=(30, 40, 3)), photometric="rgb")
        writer.write(stack(shape=(50, 60)), photometric="minisblack")
        for page in stack(shape=(4, 5, 6)):
            writer.write(page, contiguous=False, metadata=None, photometric="minisblack")
    volume = reads(path, stack(shape=(4, 5, 6)))
    assert "(30, 40, 3), (50, 60), (4, 5, 6); the largest stack is used" in volume.notes[0]


def test_several_ome_images_have_each_their_own_spacing(tmp_path):
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as writer:
        for shape, size in (((2, 3, 4), 8.0), ((4, 5, 6), 2.0)):
            metadata = {"axes": "ZYX"} | {f"PhysicalSize{axis}": size for axis in "XYZ"}
            writer.write(stack(shape=shape), photometric="minisblack", metadata=metadata)
    reads(path, stack(shape=(4, 5, 6)), (2, 2, 2))


def test_an_image_and_its_segmentation_are_no_two_slices(tmp_path):
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as writer:
        for seed in range(2):
            writer.write(stack(shape=(5, 6), seed=seed), photometric="minisblack")
    refused(path, r"2 separate images, the first of shape \(5, 6\)")


def test_pages_that_the_ome_metadata_do_not_describe_are_said(tmp_path):
    path = tiff(tmp_path / "a.ome.tif", stack(), metadata={"axes": "ZYX"})
    assert reads(path, stack()).notes == ()
    with tifffile.TiffFile(path, mode="r+") as tif:
        text = re.sub('(SizeZ|PlaneCount)="4"', r'\1="3"', tif.ome_metadata)
        tif.pages[0].tags["ImageDescription"].overwrite(text)
    (note,) = reads(path, stack()[:3]).notes
    assert "describe 3 of 4 pages" in note


@pytest.mark.parametrize("kind", ["described only", "without data", "in a file that is lost"])
def test_an_ome_image_that_is_not_in_the_file_gives_no_spacing(tmp_path, kind):
    path, data = tmp_path / "a.ome.tif", stack(shape=(4, 5, 6))
    sizes = {f"PhysicalSize{axis}": size for axis, size in zip("XYZ", (0.35, 0.35, 1), strict=True)}
    with tifffile.TiffWriter(path, ome=True) as writer:
        for shape, more in (((2, 5, 6), dict.fromkeys(sizes, 9.0)), (data.shape, sizes)):
            page = data if shape == data.shape else stack(shape=shape)
            writer.write(page, photometric="minisblack", metadata={"axes": "ZYX"} | more)
    with tifffile.TiffFile(path, mode="r+") as tif:
        text = tif.ome_metadata
        own = re.search(r'<TiffData IFD="0"[^>]*?/>', text)[0]
        uuid_of = '<UUID FileName="lost.tif">urn:uuid:11111111-1111-1111-1111-111111111111</UUID>'
        new = {"without data": "", "described only": "<MetadataOnly/>"}
        text = text.replace(own, new.get(kind, f"{own[:-2]}>{uuid_of}</TiffData>"), 1)
        tif.pages[0].tags["ImageDescription"].overwrite(text)
    reads(path, data, (1, 0.35, 0.35))


def ome_set(folder, data, binary_only=False):
    """One OME-TIFF per slice, with the metadata of the whole set in each, or in the first."""
    head = '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
    planes = "".join(
        f'<TiffData FirstZ="{k}" IFD="0" PlaneCount="1"><UUID FileName="s{k}.ome.tif">'
        f"urn:uuid:{uuid.UUID(int=k)}</UUID></TiffData>"
        for k in range(len(data))
    )
    z, y, x = data.shape
    image = (
        f'<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="{data.dtype}" '
        f'SizeX="{x}" SizeY="{y}" SizeZ="{z}" SizeC="1" SizeT="1">'
        f'<Channel ID="Channel:0:0" SamplesPerPixel="1"/>{planes}</Pixels></Image>'
    )
    other = f'<BinaryOnly MetadataFile="s0.ome.tif" UUID="urn:uuid:{uuid.UUID(int=0)}"/>'
    for k, page in enumerate(data):
        text = f'{head}UUID="urn:uuid:{uuid.UUID(int=k)}">' + (
            other if binary_only and k else image
        )
        options = {"description": text + "</OME>", "metadata": None, "compression": "zlib"}
        tifffile.imwrite(folder / f"s{k}.ome.tif", page, **options)


def ome_images(folder, images, compression=None):
    """One OME-TIFF per image, with the metadata of all in each; image k has voxels of k + 1 µm."""
    names, text = [f"i{k}.ome.tif" for k in range(len(images))], ""
    for k, (name, data) in enumerate(zip(names, images, strict=True)):
        (z, y, x), samples = data.shape[:3], data.shape[3] if data.ndim == 4 else 1
        sizes = "".join(f'PhysicalSize{axis}="{k + 1}" ' for axis in "XYZ")
        text += (
            f'<Image ID="Image:{k}"><Pixels ID="Pixels:{k}" DimensionOrder="XYZCT" SizeX="{x}" '
            f'SizeY="{y}" SizeZ="{z}" SizeC="{samples}" SizeT="1" {sizes} Type="{data.dtype}">'
            f'<Channel ID="Channel:{k}:0" SamplesPerPixel="{samples}"/><TiffData IFD="0" '
            f'PlaneCount="{z}"><UUID FileName="{name}">urn:uuid:{uuid.UUID(int=k)}</UUID>'
            "</TiffData></Pixels></Image>"
        )
    head = '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
    for k, (name, data) in enumerate(zip(names, images, strict=True)):
        own = f'{head}UUID="urn:uuid:{uuid.UUID(int=k)}">{text}</OME>'
        kind = "rgb" if data.ndim == 4 else "minisblack"
        options = {"description": own, "metadata": None, "compression": compression}
        tiff(folder / name, data[0] if kind == "rgb" else data, photometric=kind, **options)
    return [folder / name for name in names]


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("other", [(3, 15, 20), (9, 50, 60), (4, 30, 40), (1, 90, 80, 3)])
def test_of_a_set_with_an_image_per_file_each_file_is_its_own(tmp_path, other, compression):
    images = [stack("uint16", (4, 30, 40)), stack("uint16", other, seed=1)]
    first, second = files = ome_images(tmp_path, images, compression)
    reads(first, images[0], (1, 1, 1))
    if len(other) == 4:
        refused(second, "colour image with 3 samples")
    else:
        reads(second, images[1], (2, 2, 2))
    assert [formats.files_read(file) for file in files] == [[first], [second]]
    first.unlink()
    if len(other) == 3:
        reads(second, images[1])


def test_sets_of_ome_files(tmp_path):
    data = stack("uint16", (5, 60, 70))
    data[0] = 0  # compressed, far smaller than the others
    ome_set(tmp_path, data)
    files = [tmp_path / f"s{k}.ome.tif" for k in range(5)]
    for file in files:
        reads(file, data)
    content = files[3].read_bytes()
    files[3].unlink()
    refused(files[1], r"slice 3 .* missing: s3\.ome\.tif not found")
    files[3].write_bytes(content[: len(content) // 2])
    refused(files[1], "slice 3|page 3|cannot be read")
    for wrong in (b"", b"no TIFF at all"):
        files[3].write_bytes(wrong)
        refused(files[1], r"slice 3 .* missing: s3\.ome\.tif not found, or not a TIFF")
        assert sorted(formats.files_read(files[1])) == files
    # Another slice of the set under its name, and an image of another size.
    files[3].write_bytes(files[4].read_bytes())
    refused(files[1], r"s3\.ome\.tif does not belong to its set of files")
    tifffile.imwrite(files[3], data[3, :9, :9].copy())
    refused(files[1], r"s3\.ome\.tif does not belong .*shape \(9, 9\).*copy the set again")
    ome_set(tmp_path, data, binary_only=True)
    reads(files[0], data)
    refused(files[2], r"that s0\.ome\.tif describes; read that file")


@given(
    dtype=st.sampled_from(["bool", "uint8", "uint16", "uint32", "int16"]),
    writer=st.sampled_from(["plain", "ome", "imagej"]),
    compression=st.sampled_from([None, "zlib", "lzw"]),
    order=st.sampled_from("<>"),
)
@settings(deadline=None, max_examples=40, derandomize=True)
def test_min_is_white_is_inverted_but_imagejs(tmp_path_factory, dtype, writer, compression, order):
    assume(writer != "imagej" or dtype in ("uint8", "uint16"))
    path = tmp_path_factory.mktemp("white") / "a.tif"
    data = stack("uint8") > 90 if dtype == "bool" else stack(dtype)
    options = {"plain": {}, "ome": {"ome": True}, "imagej": {"imagej": True}}[writer]
    options |= {"byteorder": order, "compression": compression, "metadata": {"axes": "ZYX"}}
    options |= {"software": "another"}
    tiff(path, data, photometric="miniswhite", **options)
    if writer == "imagej":
        assert reads(path, data).notes == ()
    else:
        top = 1 if dtype == "bool" else np.iinfo(dtype).max + np.iinfo(dtype).min
        expected = (top - data.astype(np.int64)).astype(dtype)
        assert "MinIsWhite" in reads(path, expected).notes[0]
    reads(tiff(path, data, **options), data)


def test_masks_of_tifffile_are_kept(tmp_path):
    """tifffile marks boolean arrays as MinIsWhite and stores 1 for True."""
    tifffile.imwrite(tmp_path / "a.tif", stack() > 90)
    assert "kept" in reads(tmp_path / "a.tif", stack() > 90).notes[0]


def test_min_is_white_as_pillow_shows_it(tmp_path):
    pages = [Image.fromarray(page) for page in stack() > 90]
    for white in (0, 1):
        path = tmp_path / f"{white}.tif"
        pages[0].save(path, save_all=True, append_images=pages[1:], tiffinfo={262: white})
        shown = [np.asarray(frame.copy()) for frame in ImageSequence.Iterator(Image.open(path))]
        assert np.array_equal(read_volume(path).data, shown)
    refused(tiff(tmp_path / "f.tif", stack("float32"), photometric="miniswhite"), "MinIsWhite")


def test_a_table_of_greys_that_falls_is_used(tmp_path):
    """As Pillow shows it; one that rises leaves the values as they are."""
    path, data = tmp_path / "a.tif", stack()
    for white in (0, 1):
        pages = [Image.fromarray(page).convert("P") for page in data]
        for page in pages:
            page.putpalette([255 - v if white else v for v in range(256) for _ in range(3)])
        pages[0].save(path, save_all=True, append_images=pages[1:])
        shown = [np.asarray(f.convert("L")) for f in ImageSequence.Iterator(Image.open(path))]
        found = read_volume(path)
        assert np.array_equal(found.data >> (8 if white else 0), shown)
        assert bool(found.notes) == bool(white)


@pytest.mark.parametrize("order", [1, -1])
def test_of_a_table_of_colours_the_numbers_are_read_and_that_is_said(tmp_path, order):
    """Labels are stored so; an image so stored would be read wrong."""
    path, data = tmp_path / "a.tif", stack()
    table = [v * weight // 4 for v in range(256)[::order] for weight in (4, 2, 1)]
    pages = [Image.fromarray(page).convert("P") for page in data]
    for page in pages:
        page.putpalette(table)
    pages[0].save(path, save_all=True, append_images=pages[1:])
    volume = read_volume(path)
    assert np.array_equal(volume.data, data)
    assert ["colours" in note for note in volume.notes] == [True] * (order < 0)


def test_an_orientation_is_said(tmp_path):
    path, tag = tmp_path / "a.tif", [(274, "H", 1, 3, True)]
    tifffile.imwrite(path, stack(), photometric="minisblack", extratags=tag, metadata=None)
    assert "Orientation 3 is not applied" in read_volume(path).notes[-1]


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_adobe_deflate"])
def test_compressions_of_other_writers(tmp_path, compression):
    data = stack("uint16", (5, 40, 50))
    pages = [Image.fromarray(page) for page in data]
    path = tmp_path / "a.tif"
    pages[0].save(path, save_all=True, append_images=pages[1:], compression=compression)
    reads(path, data)


@pytest.mark.parametrize("compression", ["zstd", "lzma", "jpeg2000", "lerc"])
def test_other_compressions_of_tifffile(tmp_path, compression):
    data = stack("uint8", (5, 40, 50))
    reads(tiff(tmp_path / "a.tif", data, compression=compression), data)


def test_imagejs_header_and_pages_belong_together(tmp_path, capfd):
    """Too many pages or too few; one line, without messages of the library."""
    path = tmp_path / "a.tif"
    for images, contiguous in ((3, False), (3, True), (9, True)):
        with tifffile.TiffWriter(path) as writer:
            text = f"ImageJ=1.54f\nimages={images}\nslices={images}\n"
            for k, page in enumerate(stack(shape=(5, 20, 30))):
                description = None if k else text
                writer.write(page, description=description, metadata=None, contiguous=contiguous)
        refused(path, rf"claims {images} slices, found 5")
    text = "ImageJ=1.54f\nimages=5\nslices=2\n"
    options = {"description": text, "metadata": None, "contiguous": False}
    tifffile.imwrite(path, stack(shape=(5, 20, 30)), **options)
    refused(path, "claims 5 slices as 2 channels times slices, found 5")
    assert capfd.readouterr().err == ""


# Spacing ------------------------------------------------------------------------------------

# Micrometres per unit, from their definitions, not from the readers' table.
SI = {"k": 3, "h": 2, "da": 1, "d": -1, "c": -2, "m": -3, "µ": -6, "n": -9, "p": -12, "f": -15}
SI |= {"a": -18, "z": -21, "y": -24, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18, "Z": 21, "Y": 24}
OME_UNITS = {f"{sign}m": 1e6 * 10.0**power for sign, power in SI.items()} | {"m": 1e6, "Å": 1e-4}
OME_UNITS |= {"in": 25400, "thou": 25.4, "li": 25400 / 12, "ft": 12 * 25400, "yd": 36 * 25400}
OME_UNITS |= {"mi": 63360 * 25400, "pt": 25400 / 72, "ua": 149597870700e6}
OME_UNITS |= {"ly": 9460730472580800e6, "pc": 648000 / np.pi * 149597870700e6}
WORDS = {"nanometer": 1e-3, "micrometer": 1, "millimeter": 1e3, "angstrom": 1e-4, "meter": 1e6}
WORDS |= {"centimeter": 1e4, "inch": 25400, "foot": 304800, "picometer": 1e-6, "megameter": 1e12}
MICROSCOPE = {"um": 1, "micron": 1, "microns": 1, "µm": 1, "\u03bcm": 1, "nm": 1e-3, "mm": 1e3}
NO_LENGTHS = ["furlong", "s", "nmm", "bananas"]
RATIO = ["pixel", "pixels"]


def ome_with(path, values, units):
    fields = {f"PhysicalSize{a}": v for a, v in zip("ZYX", values, strict=True) if v is not None}
    fields |= {f"PhysicalSize{a}Unit": u for a, u in zip("ZYX", units, strict=True)}
    tiff(path, stack(), ome=True, metadata={"axes": "ZYX", **fields})


def imagej_with(path, values, units):
    dz, dy, dx = values
    text = "ImageJ=1.54f\nimages=4\nslices=4\n" + f"unit={units[2]}\nyunit={units[1]}\n"
    text += f"zunit={units[0]}\n" + ("" if dz is None else f"spacing={dz}\n")
    per_unit = [0 if d is None else 1 / d for d in (dx, dy)]
    text = text.replace("µ", "\\u00B5").replace("\u03bc", "\\u00B5")
    options = {"resolution": per_unit, "resolutionunit": 1, "metadata": None}
    tiff(path, stack(), description=text.encode("ascii"), **options)


def nrrd_with(path, values, units):
    lengths = " ".join("nan" if v is None else str(v) for v in values[::-1])
    path.write_bytes(nrrd(stack(), extra=f"spacings: {lengths}\nunits: {_quoted(units)}\n"))


def directions_with(path, values, units):
    steps = ["nan" if v is None else str(v) for v in values[::-1]]
    text = f"space directions: ({steps[0]},0,0) (0,{steps[1]},0) (0,0,{steps[2]})\n"
    path.write_bytes(nrrd(stack(), extra=text + f"space units: {_quoted(units)}\n"))


def _quoted(units):
    return " ".join(f'"{unit}"' for unit in units[::-1])


def zarr_with(path, values, units):
    image = multiscales(scale=[0 if v is None else v for v in values])
    for axis, unit in zip(image["axes"], units, strict=True):
        axis["unit"] = unit
    ome_zarr(path, stack(), image)


WRITERS = {
    "a.ome.tif": (ome_with, OME_UNITS, ["pixel", "reference frame"]),
    "a.tif": (imagej_with, MICROSCOPE | {"inch": 25400, "cm": 1e4}, RATIO),
    "a.nrrd": (nrrd_with, MICROSCOPE | {"m": 1e6}, ["", *RATIO]),
    "b.nrrd": (directions_with, MICROSCOPE | {"m": 1e6}, ["", *RATIO]),
    "a.zarr": (zarr_with, WORDS, ["", *RATIO]),
}


@given(name=st.sampled_from(list(WRITERS)), data=st.data())
@settings(deadline=None, max_examples=100, derandomize=True)
@pytest.mark.filterwarnings("ignore:.*times longer")
def test_every_axis_has_its_own_unit(tmp_path_factory, name, data):
    """In all formats; if one axis lacks a length or has an unknown unit, none is known."""
    write, known, _ = WRITERS[name]
    units = [data.draw(st.sampled_from(list(known))) for _ in range(3)]
    # ImageJ's resolutions are fractions of 32-bit integers.
    values = [data.draw(st.sampled_from([0.0625, 0.25, 0.5, 1, 2.0, 4.0, 300.0])) for _ in range(3)]
    path = tmp_path_factory.mktemp("units") / name
    write(path, values, units)
    volume = read_volume(path)
    expected = [v * known[u] for v, u in zip(values, units, strict=True)]
    assert volume.spacing == pytest.approx(expected, rel=1e-6)
    assert volume.unknown == ""
    axis = data.draw(st.integers(0, 2))
    if data.draw(st.booleans()) and not (name == "a.tif" and axis == 0):
        values[axis] = None
    else:
        units[axis] = data.draw(st.sampled_from(NO_LENGTHS))
    if name == "a.ome.tif" and units[axis] in NO_LENGTHS:
        units[axis] = "pixel"
    write(path, values, units)
    volume = read_volume(path)
    assert volume.spacing == (1, 1, 1)
    assert volume.unknown
    # A given spacing overrides all that.
    volume = read_volume(path, spacing=(3, 2, 1))
    assert (volume.spacing, volume.unknown) == ((3, 2, 1), "")


@pytest.mark.parametrize("name", WRITERS)
def test_without_a_unit_the_ratio_is_kept_and_said(tmp_path, name):
    write, _, no_length = WRITERS[name]
    for unit in no_length:
        write(tmp_path / name, (2.5, 0.5, 0.25), [unit] * 3)
        volume = read_volume(tmp_path / name)
        assert volume.spacing == (2.5, 0.5, 0.25)
        assert "no unit of length" in volume.unknown


def test_imagej_without_unit_and_spacing_invents_no_ratio(tmp_path):
    path, metadata = tmp_path / "a.tif", {"axes": "ZYX"}
    tiff(path, stack(), imagej=True, resolution=(10, 10), metadata=metadata)
    assert "spacing missing" in reads(path, stack(), (1, 1, 1)).unknown
    # With a unit, ImageJ leaves out a spacing of 1.
    tiff(path, stack(), imagej=True, resolution=(4, 4), metadata=metadata | {"unit": "micron"})
    assert read_volume(path).spacing == (1, 0.25, 0.25)


def test_directions_across_axes_of_different_units(tmp_path):
    text = 'space directions: (3,4,0) (0,0.5,0) (0,0,2)\nspace units: "mm" {} "um"\n'
    path = save(tmp_path, nrrd(stack(), extra=text.format('"mm"')), "a.nrrd")
    with pytest.warns(UserWarning, match="longer"):
        assert read_volume(path).spacing == pytest.approx((2, 500, 5000))
    path = save(tmp_path, nrrd(stack(), extra=text.format('"um"')), "a.nrrd")
    assert "mm and um" in read_volume(path).unknown


def test_absurd_anisotropy_is_a_warning_that_names_file_and_fields(tmp_path):
    imagej_with(tmp_path / "a.tif", (300, 0.1, 0.1), ["micron"] * 3)
    with pytest.warns(UserWarning, match=r"a\.tif: .*20 times.*spacing 300 micron.*--spacing"):
        read_volume(tmp_path / "a.tif")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_volume(tmp_path / "a.tif", spacing=(0.3, 0.1, 0.1))
        imagej_with(tmp_path / "a.tif", (300, 0.1, 0.1), ["nm", "micron", "micron"])
        assert read_volume(tmp_path / "a.tif").spacing == pytest.approx((0.3, 0.1, 0.1))


def test_tiff_truncated_anywhere_is_refused(tmp_path):
    for name, options in {
        "whole.tif": {},
        "packed.tif": {"compression": "zlib"},
        "big.tif": {"bigtiff": True},
        "ij.tif": {"imagej": True, "metadata": {"axes": "ZYX"}},
    }.items():
        path = tiff(tmp_path / name, stack("uint16"), **options)
        content = path.read_bytes()
        refusals = 0
        for size in range(0, len(content), 7):
            path.write_bytes(content[:size])
            try:
                # Without the bytes after the last voxel the volume is still whole.
                reads(path, stack("uint16"))
            except VolumeError:
                refusals += 1
        assert refusals > (len(content) - 20) // 7 - 2


# NumPy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "f4", "f8", "?"])
def test_npy(tmp_path, order, dtype):
    data = np.asarray(stack("uint16") % 7, order=order).astype(dtype)
    np.save(tmp_path / "a.npy", data)
    volume = reads(tmp_path / "a.npy", data)
    assert isinstance(volume.data, np.memmap) == data.dtype.isnative


def test_npy_refusals(tmp_path):
    path = tmp_path / "a.npy"
    for data, words in (
        (np.array([[[{}]]] * 3), "Python objects"),
        (stack()[0], "single slice"),
        (stack()[:, :0], "expected positive numbers"),
        (stack().astype(complex), "complex"),
        (stack(shape=(2, 4, 5, 6)), r"2 channels \(0 to 1\)"),
    ):
        np.save(path, data, allow_pickle=True)
        refused(path, words)
    reads(path, data[1], channel=1)
    path.write_bytes(b"not numpy at all, but long enough to hold a header")
    refused(path, "does not begin like a .npy file")
    path.write_bytes(b"\x93NUMPY\x01\x00\x10\x00not a dictionary")
    refused(path, "NumPy header")


# Vaa3D --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("code", "dims"), [("i", 4), ("h", 4), ("i", 5)])
def test_v3draw(tmp_path, dtype, order, code, dims):
    data = stack(dtype)
    volume = reads(save(tmp_path, v3draw(data, order, code, dims), "a.v3draw"), data)
    if order == "<" or dtype == "uint8":
        assert isinstance(volume.data, np.memmap)


def test_v3draw_agrees_with_v3dpy(tmp_path):
    loaders = pytest.importorskip("v3dpy.loaders")
    data = np.stack([stack("uint16", seed=k) for k in range(2)])
    loaders.Raw().save(str(tmp_path / "a.v3draw"), data)
    refused(tmp_path / "a.v3draw", r"2 channels")
    reads(tmp_path / "a.v3draw", data[1], channel=1)
    path = save(tmp_path, v3draw(data), "b.v3draw")
    assert np.array_equal(loaders.Raw().load(str(path)), data)


@pytest.mark.parametrize("kind", [1, 2])
@pytest.mark.parametrize("order", ["<", ">"])
def test_v3dpbd_of_random_runs(tmp_path, kind, order, monkeypatch):
    # Unpack a few runs at a time.
    monkeypatch.setattr(formats, "_PBD_RUNS", 7)
    for seed in range(10):
        content, voxels = v3dpbd(seed, (1, 3, 17, 23), kind, order)
        reads(save(tmp_path, content, "a.v3dpbd"), voxels[0])


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_v3dpbd_written_by_v3dpy(tmp_path, dtype):
    loaders = pytest.importorskip("v3dpy.loaders")
    smooth = np.cumsum(np.random.default_rng(0).integers(-3, 4, (2, 8, 40, 50)), axis=-1) + 1000
    smooth[:, :, :10] = 0
    data = (smooth % np.iinfo(dtype).max).astype(dtype)
    loaders.PBD().save(str(tmp_path / "a.v3dpbd"), data)
    for channel in range(2):
        reads(tmp_path / "a.v3dpbd", data[channel], channel=channel)


PBD, RAW = v3dpbd(0, (1, 3, 17, 23), 1)[0], v3draw(stack())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (PBD[:-1], "truncated"),
        (PBD + b"\x80\x01", "unpack to"),
        (PBD[:25] + struct.pack("<h", 33) + PBD[27:], r"voxel type 33.*\.v3draw"),
        (PBD[:43] + bytes([40]) + PBD[44:], "no voxel precedes it"),
        (RAW[:-1], "truncated or damaged"),
        (RAW[:30], "truncated"),
        (b"x" + RAW[1:], "does not begin like"),
        (RAW[:24] + b"?" + RAW[25:], "byte order"),
        (RAW[:25] + struct.pack("<h", 8) + RAW[27:], "voxel type 8"),
        (RAW[:27] + struct.pack("<i", -6) + RAW[31:], "expected positive"),
        (v3draw(stack()[:1]), "single slice"),
    ],
)
def test_v3d_refusals(tmp_path, content, words):
    refused(save(tmp_path, content, "a.v3dpbd" if content[:3] == b"v3d" else "a.v3draw"), words)


# NRRD ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["raw", "gzip"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "int16", "int64", "uint64"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_nrrd(tmp_path, encoding, dtype, order):
    data = stack(dtype)
    reads(save(tmp_path, nrrd(data, encoding, order=order), "a.nrrd"), data, (1, 1, 1))


@pytest.mark.parametrize(
    ("extra", "spacing"),
    [
        ("spacings: 0.25 0.5 2\n", (2, 0.5, 0.25)),
        ("space directions: (0.25,0,0) (0,0.5,0) (0,0,2)\n", (2, 0.5, 0.25)),
        ("space directions: (3,4,0) (0,0.5,0) (0,0,-2)\n", (2, 0.5, 5)),
        ("spacings: 0.25 0.5\n", (1, 1, 1)),
        ("spacings: nan 0.5 0\n", (1, 1, 1)),
        ("kinds: domain none ???\n", (1, 1, 1)),
    ],
)
def test_nrrd_spacing(tmp_path, extra, spacing):
    reads(save(tmp_path, nrrd(stack(), extra=extra), "a.nrrd"), stack(), spacing)


def test_nrrd_channels(tmp_path):
    data = np.stack([stack(seed=k) for k in range(2)])
    slow = "space directions: (1,0,0) (0,1,0) (0,0,3) none\n"
    path = save(tmp_path, nrrd(data, extra=slow), "a.nrrd")
    refused(path, r"2 channels \(0 to 1\)")
    reads(path, data[1], (3, 1, 1), channel=1)
    fast = "space directions: none (1,0,0) (0,1,0) (0,0,3)\n"
    path = save(tmp_path, nrrd(np.moveaxis(data, 0, -1), extra=fast), "a.nrrd")
    reads(path, data[1], channel=1)
    # Without spacings, the kinds of axes tell; without these, it is the slowest axis.
    for kinds in ("", "kinds: vector domain domain domain\n", "kinds: ??? space space space\n"):
        shown = np.moveaxis(data, 0, -1) if kinds else data
        path = save(tmp_path, nrrd(shown, "gzip", extra=kinds), "a.nrrd")
        refused(path, r"2 channels \(0 to 1\)")
        reads(path, data[1], channel=1)


def test_nrrd_of_several_gzip_members(tmp_path):
    data = stack("uint16")
    raw, whole = data.tobytes(), nrrd(data, "gzip")
    head = whole[: whole.index(b"\n\n") + 2]
    for ends in ((100,), (1, 2, 200), ()):
        parts = [raw[i:j] for i, j in zip((0, *ends), (*ends, len(raw)), strict=True)]
        body = b"".join(map(gzip.compress, parts))
        reads(save(tmp_path, head + body, "a.nrrd"), data)
        refused(save(tmp_path, head + body[:-30], "a.nrrd"), "truncated|damaged")
    # An empty last member, as from bgzip, and padding.
    for end in (gzip.compress(b"") + bytes(9), b"a note behind the data"):
        reads(save(tmp_path, head + gzip.compress(raw) + end, "a.nrrd"), data)
    # All voxels are there, but the checksum says that they are others.
    refused(save(tmp_path, head + gzip.compress(raw)[:-8] + bytes(8), "a.nrrd"), "CRC")


def test_nrrd_refusals(tmp_path):
    for content, words in (
        (nrrd(stack(), extra="data file: a.raw\n"), "data file.*in one .nrrd file"),
        (nrrd(stack(), "bzip2"), "encoding 'bzip2'"),
        (nrrd(stack())[:-1], "truncated"),
        (nrrd(stack(), "gzip")[:-20], "truncated|damaged"),
        (b"NRRD0004\ntype: uchar\n\n", "no usable sizes, type or encoding"),
        (nrrd(stack(), extra="kinds: vector domain domain\n"), "axis of kind 'vector'"),
        (nrrd(stack(), extra="kinds: domain domain time\n"), "axis of kind 'time'"),
        (b"something else", "does not begin like"),
    ):
        refused(save(tmp_path, content, "a.nrrd"), words)


# OME-Zarr -----------------------------------------------------------------------------------


def multiscales(axes="zyx", scale=(2, 0.5, 0.25), unit="micrometer"):
    """Metadata of an image of one level."""
    transformation = {"type": "scale", "scale": [*[1] * (len(axes) - 3), *scale]}
    return {
        "axes": [{"name": a, **({"unit": unit} if a in "zyx" else {})} for a in axes],
        "datasets": [{"path": "0", "coordinateTransformations": [transformation]}],
    }


def ome_zarr(path, data, image=None, ngff="0.5", chunks=(2, 3, 4), **options):
    """Write `data` with zarr alone, in the Zarr format of that version of NGFF."""
    image = image or multiscales()
    version = 3 if ngff == "0.5" else 2
    attributes = {"multiscales": [image]}
    if version == 2:
        # NGFF wants slashes in the names of chunks, which are not Zarr's default.
        options["chunk_key_encoding"] = {"name": "v2", "separator": "/"}
    group = zarr.create_group(
        path,
        zarr_format=version,
        overwrite=True,
        attributes=attributes if version == 2 else {"ome": {"version": ngff, **attributes}},
    )
    chunks = (*[1] * (data.ndim - 3), *chunks)
    array = group.create_array("0", shape=data.shape, dtype=data.dtype, chunks=chunks, **options)
    array[:] = data
    return path


def chunk_files(path):
    return sorted(p for p in (path / "0").rglob("*") if p.is_file() and p.name[0].isdecimal())


@pytest.fixture
def fetched(monkeypatch):
    """Names of what zarr fetches, without metadata."""
    names, get = [], zarr.storage.LocalStore.get

    async def recorded(self, key, *arguments, **options):
        if not key.endswith(("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")):
            names.append(key)
        return await get(self, key, *arguments, **options)

    monkeypatch.setattr(zarr.storage.LocalStore, "get", recorded)
    return names


V2 = [("0.4", codec) for codec in (None, Blosc("lz4"), GZip(), Blosc("zstd", shuffle=2), Zstd())]
V3 = [("0.5", codec) for codec in (None, zarr.codecs.BloscCodec(cname="lz4"))]
V3 += [("0.5", zarr.codecs.ZstdCodec(checksum=True)), ("0.5", zarr.codecs.GzipCodec())]


@pytest.mark.parametrize(("ngff", "codec"), V2 + V3)
@pytest.mark.parametrize("dtype", ["uint8", ">u2", "float32", "int16"])
def test_zarr(tmp_path, ngff, codec, dtype):
    data = stack("uint16").astype(dtype)
    path = ome_zarr(tmp_path / "a.zarr", data, ngff=ngff, compressors=codec)
    volume = reads(path, data, (2, 0.5, 0.25))
    assert volume.data.shape == (4, 5, 6)
    assert np.array_equal(np.asarray(volume.data), data)
    assert np.asarray(volume.data).dtype.isnative
    for key in (np.s_[1:3, 2], np.s_[3, 4, 5], np.s_[..., -1]):
        assert np.array_equal(volume.data[key], data[key])


@pytest.mark.parametrize("ngff", ["0.4", "0.5"])
def test_zarr_channels(tmp_path, ngff):
    data = np.stack([stack("uint16", seed=k) for k in range(3)])
    path = tmp_path / "a.ome.zarr"
    for axes, shape in {"czyx": data.shape, "tczyx": (1, *data.shape)}.items():
        ome_zarr(path, data.reshape(shape), multiscales(axes), ngff)
        refused(path, r"3 channels \(0 to 2\)")
        refused(path, "channel 3 does not exist", channel=3)
        for k in range(3):
            assert reads(path, data[k], (2, 0.5, 0.25), channel=k).data.ndim == 3
    reads(ome_zarr(path, data[:1], multiscales("czyx"), ngff), data[0])


def test_zarr_spacing(tmp_path):
    path = tmp_path / "a.zarr"
    # The scale of the image multiplies that of the level.
    common = {"coordinateTransformations": [{"type": "scale", "scale": [1, 2, 4]}]}
    ome_zarr(path, stack(), multiscales() | common)
    assert read_volume(path).spacing == (2, 1, 1)
    twice = multiscales()
    twice["datasets"][0]["coordinateTransformations"] += common["coordinateTransformations"]
    for image in (twice, {**multiscales(), "datasets": [{"path": "0"}]} | common):
        ome_zarr(path, stack(), image)
        assert read_volume(path).spacing == ((2, 1, 1) if image is twice else (1, 2, 4))
    for scale in ((0, -1, float("nan")), (None, 1, 1), (1, 1), ("", 1, 1)):
        ome_zarr(path, stack(), multiscales(scale=scale))
        volume = read_volume(path)
        assert volume.spacing == (1, 1, 1)
        assert "not every axis has a length" in volume.unknown


@pytest.mark.parametrize("ngff", ["0.4", "0.5"])
def test_of_several_levels_the_largest_is_read_wherever_it_stands(tmp_path, ngff):
    image = multiscales()
    level = {"path": "1", "coordinateTransformations": [{"type": "scale", "scale": [4, 1, 1]}]}
    lost = level | {"path": "2"}
    for levels in ([level, *image["datasets"], lost], [*image["datasets"], level]):
        path = ome_zarr(tmp_path / "a.zarr", stack(), image | {"datasets": levels}, ngff)
        zarr.open_group(path).create_array("1", data=stack()[::2, ::2, ::2])
        assert bool(reads(path, stack(), (2, 0.5, 0.25)).notes) == (lost in levels)
    shutil.rmtree(path / "0")
    (note,) = reads(path, stack()[::2, ::2, ::2], (4, 1, 1)).notes
    assert note.startswith("missing levels: 0; ")


def test_zarr_of_older_versions_and_groups_within(tmp_path):
    """Axes as names (0.3) or none (before); labels in a folder without the suffix."""
    path = tmp_path / "a.zarr"
    image = multiscales() | {"axes": ["z", "y", "x"]}
    del image["datasets"][0]["coordinateTransformations"]
    assert reads(ome_zarr(path, stack(), image, ngff="0.4"), stack(), (1, 1, 1)).unknown
    del image["axes"]
    reads(ome_zarr(path, stack()[None, None], image, ngff="0.4"), stack())
    for ngff in ("0.4", "0.5"):
        ome_zarr(path, stack(), ngff=ngff)
        reads(ome_zarr(path / "labels" / "cells", stack(seed=1), ngff=ngff), stack(seed=1))
    zarr.create_group(path / "labels")
    refused(path / "labels", "OME-Zarr")


def test_zarr_of_bioformats2raw(tmp_path):
    path = tmp_path / "a.zarr"
    root = zarr.create_group(path, zarr_format=2, attributes={"bioformats2raw.layout": 3})
    ome_zarr(path / "0", stack(), ngff="0.4")
    reads(path, stack())
    root.create_group("1")
    refused(path, r"several images, expected one; name one, for example a\.zarr/0")
    reads(path / "0", stack())


def test_zarr_reads_no_chunk_that_is_not_asked_for(tmp_path, fetched):
    data = np.stack([stack("uint16", (8, 12, 16), seed=k) for k in range(2)])
    path = ome_zarr(tmp_path / "a.zarr", data, multiscales("czyx"))
    fetched.clear()
    volume = read_volume(path, channel=1, check=False)
    assert fetched == []
    assert np.array_equal(volume.data[2:4, 3:6, 2:6], data[1, 2:4, 3:6, 2:6])
    assert sorted(fetched) == ["0/c/1/1/1/0", "0/c/1/1/1/1"]
    # The first chunk shows that voxels differ; of floats, each chunk is read once.
    fetched.clear()
    read_volume(path, channel=1)
    assert fetched == ["0/c/1/0/0/0"]
    ome_zarr(path, data.astype("f4"), multiscales("czyx"))
    fetched.clear()
    read_volume(path, channel=1)
    assert len(fetched) == len(set(fetched)) == 4 * 4 * 4


def test_zarr_in_shards(tmp_path, fetched):
    data = stack("float32", (16, 12, 16))
    path = ome_zarr(tmp_path / "a.zarr", data, shards=(8, 12, 8))
    volume = reads(path, data)
    fetched.clear()
    assert np.array_equal(volume.data[1:3, 4:6, 7:9], data[1:3, 4:6, 7:9])
    assert set(fetched) == {"0/c/0/0/0", "0/c/0/0/1"}
    data[9, 3, 2] = np.nan
    refused(ome_zarr(path, data, shards=(8, 12, 8)), "slice 9 holds NaN")
    damage(path / "0/zarr.json", lambda text: re.sub(rb'("chunk_shape": \[\s+)8', rb"\g<1>0", text))
    refused(path, "chunks of")


def test_zarr_is_normalised_as_an_array_is(tmp_path, monkeypatch):
    monkeypatch.setattr("neurolib.volume.SLAB", 500)
    for dtype in ("uint8", "int16", "float32"):
        data = stack(dtype, (9, 20, 30))
        path = ome_zarr(tmp_path / "a.zarr", data, chunks=(4, 7, 8))
        result = normalise(read_volume(path).data)
        assert np.array_equal(result, normalise(data)), dtype


def test_zarr_values_that_are_not_stored(tmp_path):
    path = tmp_path / "a.zarr"
    empty = np.zeros((4, 6, 8), "uint8")
    refused(ome_zarr(path, empty), "every voxel is 0")
    assert chunk_files(path) == []
    empty[3, 5, 7] = 9
    reads(ome_zarr(path, empty), empty)
    assert len(chunk_files(path)) == 1
    # With a fill value of NaN, as from many writers, a gap is not finite.
    data = stack("float32", (4, 6, 8))
    ome_zarr(path, data, fill_value=float("nan"))
    assert read_volume(path).data.shape == (4, 6, 8)
    (path / "0/c/1/1/0").unlink()
    refused(path, "slice 2 holds NaN or infinite")


def test_zarr_refusals(tmp_path):
    path = tmp_path / "a.zarr"
    path.write_bytes(b"not a folder")
    refused(path, "not an OME-Zarr image")
    path.unlink()
    path.mkdir()
    refused(path, "not an OME-Zarr image")
    ome_zarr(path, stack())
    # The array inside an image, and a group without metadata.
    (path / "0").rename(tmp_path / "0.zarr")
    refused(tmp_path / "0.zarr", "not an OME-Zarr image")
    refused(path, "not an OME-Zarr image")
    zarr.create_group(path, overwrite=True)
    refused(path, "not an OME-Zarr image .KeyError: 'multiscales'")
    ome_zarr(path / "B/2/0", stack())  # the field of a plate
    refused(path, r"expected multiscales .*; name the image, for example a\.zarr/B/2/0$")
    reads(path / "B/2/0", stack())
    refused(ome_zarr(path, stack(), multiscales() | {"datasets": []}), "expected multiscales")
    flat = multiscales("yx", (0.5, 0.25))
    refused(ome_zarr(path, stack()[0], flat, chunks=(3, 4)), "end with z, y, x")
    infinite, series = stack("float32"), stack(shape=(3, 4, 5, 6))
    infinite[2, 1, 1] = np.inf
    for axes, data, words in (
        ("xyz", stack(), "end with z, y, x"),
        ("cyx", stack(), "end with z, y, x"),
        ("czyx", stack(), "end with z, y, x"),
        ("zyxc", series, "end with z, y, x"),
        ("cczyx", series[:, None], "end with z, y, x"),
        ("tzyx", series, "a series of 3 time points"),
        ("qzyx", series, "a series of 3 images along 'q'"),
        ("zyx", stack()[:1], "single slice"),
        ("zyx", stack().astype(complex), "complex"),
        ("zyx", infinite, "slice 2 holds NaN or infinite"),
    ):
        refused(ome_zarr(path, data, multiscales(axes)), words)


def damage(path, change):
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(("ngff", "codec"), [*V2[:3], *V3[:2], ("0.5", zarr.codecs.ZstdCodec())])
def test_zarr_with_a_truncated_chunk(tmp_path, ngff, codec):
    data = stack("uint16", (4, 6, 8))
    path = ome_zarr(tmp_path / "a.zarr", data, ngff=ngff, compressors=codec)
    damage(chunk_files(path)[-1], lambda content: content[:-5])
    volume = read_volume(path)
    assert np.array_equal(volume.data[:2], data[:2])
    for key in (np.s_[2:], np.s_[3, 5, 7], np.s_[:]):
        with pytest.raises(VolumeError, match=r"^a\.zarr: a chunk cannot be read"):
            volume.data[key]
    with pytest.raises(VolumeError, match="a chunk cannot be read"):
        normalise(volume.data)
    with pytest.raises(IndexError):
        volume.data[4]
    for file in chunk_files(path):
        damage(file, lambda content: content[:-5])
    refused(path, "a chunk cannot be read")


@pytest.mark.parametrize("ngff", ["0.4", "0.5"])
def test_zarr_with_blosc_that_claims_too_much(tmp_path, ngff):
    # The library would read beyond its memory and crash.
    codec = Blosc() if ngff == "0.4" else zarr.codecs.BloscCodec()
    path = ome_zarr(tmp_path / "a.zarr", stack(), ngff=ngff, compressors=codec)
    file = chunk_files(path)[0]
    damage(file, lambda content: content[:12] + b"\xff\xff\xff\x7f" + content[16:])
    refused(path, "Blosc claims 2147483647 bytes, found")
    damage(file, lambda content: content[:7])
    refused(path, "a chunk cannot be read")


def test_zarr_with_an_absurd_shape(tmp_path):
    path = tmp_path / "a.zarr"
    side = 1 << 14
    ome_zarr(path, stack("uint16", (4, 16, 16)), chunks=(2, 8, 8))
    file = path / "0/zarr.json"
    small = json.loads(file.read_text())

    def check():
        for shape in ([side] * 3, [1 << 62] * 3):
            file.write_text(json.dumps(small | {"shape": shape}))
            volume = read_volume(path)
            assert volume.data.shape == tuple(shape)
            assert volume.data[2:7, 10:20, 10:20].max() > 0
            for load in (normalise, np.asarray):
                with pytest.raises(VolumeError, match=r"a\.zarr: .* do not fit in memory"):
                    load(volume.data)
        for chunk in (side, 0):
            grid = {"name": "regular", "configuration": {"chunk_shape": [chunk, side, side]}}
            file.write_text(json.dumps(small | {"shape": [side] * 3, "chunk_grid": grid}))
            refused(path, "chunks of .* 1 byte to 2 GiB")
        # No chunk at all, found without visiting the 2^33 possible ones.
        for chunk in chunk_files(path):
            chunk.unlink()
        file.write_text(json.dumps(small | {"shape": [side] * 3}))
        refused(path, "every voxel is 0")

    assert peak_of(check) < 20e6


# Memory -------------------------------------------------------------------------------------

# The peak of this process alone; `resource` includes that of the parent.
PEAK = """
import re, sys
from neurolib.volume import normalise, read_volume, write_volume
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
"""
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the system does not tell a process's peak"
)


def peak_memory(code, *arguments):
    """Output of `code` in a new process, where ``peak()`` is its peak memory in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(line) for line in done.stdout.split()]


@needs_proc
@pytest.mark.parametrize("suffix", [".tif", ".npy", ".zarr"])
def test_a_block_of_4_gb_takes_little_memory(tmp_path, suffix):
    path, shape = tmp_path / f"a{suffix}", (1000, 2000, 2000)
    where = (slice(500, 505), slice(700, 800), slice(900, 1000))
    # Files with holes take little room on the disk.
    if suffix == ".tif":
        data = tifffile.memmap(path, shape=shape, dtype="u1", bigtiff=True)
    elif suffix == ".npy":
        data = np.lib.format.open_memmap(path, mode="w+", shape=shape, dtype="u1")
    else:
        group = zarr.create_group(path, attributes={"ome": {"multiscales": [multiscales()]}})
        data = group.create_array("0", shape=shape, dtype="u1", chunks=(16, 128, 128))
    data[where] = stack(shape=(5, 100, 100))
    del data
    code = """
import zarr.storage
start = peak()
volume = read_volume(sys.argv[1], check=False)
assert volume.data.shape == (1000, 2000, 2000)
assert volume.data[500:505, 700:800, 900:1000].max() > 0
print(peak() - start)
print(volume.data[:50].max())
print(peak() - start)
"""
    block, value, slices = peak_memory(code, path)
    assert block < 30e6
    # The measurement sees reading: fifty slices are 200 MB.
    assert value == 0
    assert slices > 150e6


# Damage in all formats ----------------------------------------------------------------------


def test_paths_that_are_no_volume(tmp_path):
    refused(tmp_path / "none.tif", "not found")
    for name, words in {
        "a.jpg": r"suffix '.jpg', expected one of \.tif",
        "a": "suffix 'missing'",
        "a.czi": "suffix '.czi', .*; save it as TIFF",
        "a.tif.gz": "suffix '.gz', .*; unpack it first",
    }.items():
        refused(save(tmp_path, b"x", name), words)
    (tmp_path / "folder.tif").mkdir()
    refused(tmp_path / "folder.tif", "is a folder")
    for suffix in ("tif", "tiff", "npy", "v3draw", "v3dpbd", "nrrd"):
        refused(save(tmp_path, b"", f"empty.{suffix}"), r"empty \(0 bytes\)")
        for size in (5, 5000):
            refused(save(tmp_path, bytes(size), f"zeros.{suffix}"), "begin like")


def absurd(name):
    """Small files whose headers claim 2^40 voxels or more."""
    side = 1 << 14
    if name.startswith("a.v3d"):
        raw = name == "a.v3draw"
        head = b"raw_image_stack_by_hpengL" if raw else b"v3d_volume_pkbitdf_encodL"
        head += struct.pack("<h4i", 1, side, side, side, 1)
        return head + (bytes(100) if raw else bytes([255, 7]) * 100)
    if name in ("a.npy", "wrap.npy"):
        # The second shape wraps around to a small number in 64-bit arithmetic.
        shape = (side, side, side) if name == "a.npy" else (1 << 32, 1 << 31, 2)
        head = str({"descr": "|u1", "fortran_order": False, "shape": shape})
        head = head.ljust(117) + "\n"
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode() + bytes(100)
    if name.endswith(".nrrd"):
        head = f"NRRD0004\ntype: uchar\ndimension: 3\nsizes: {side} {side} {side}\n"
        if name == "gzip.nrrd":
            return (head + "encoding: gzip\n\n").encode() + gzip.compress(bytes(100_000))
        return (head + "encoding: raw\n\n").encode() + bytes(100)
    if name == "images.tif":
        cube = stack(shape=(16, 16, 16))
        content = saved(tifffile.imwrite, cube, imagej=True, metadata={"axes": "ZYX"})
        return content.replace(b"images=16\nslices=16\n", b"images=99\nslices=99\n")
    options = {"photometric": "minisblack", "compression": "zlib" if name == "packed.tif" else None}
    content = bytearray(saved(tifffile.imwrite, stack(shape=(3, 16, 16)), **options))
    with tifffile.TiffFile(io.BytesIO(content)) as tif:
        for page in tif.pages:
            for code in (256, 257, 278):
                # Width, length and rows per strip, given as 4-byte integers.
                at = page.tags[code].offset
                content[at + 2 : at + 12] = struct.pack("<HII", 4, 1, 1 << 20)
    return bytes(content)


ABSURD = ["a.v3draw", "a.v3dpbd", "a.npy", "wrap.npy", "a.nrrd", "gzip.nrrd", "plain.tif"]


@pytest.mark.parametrize("name", [*ABSURD, "packed.tif", "images.tif"])
def test_absurd_claims_are_refused_without_allocating(tmp_path, name):
    path = save(tmp_path, absurd(name), name)
    assert path.stat().st_size < 50_000
    words = "claims|not within|expected a 3D stack|every voxel"
    assert peak_of(refused, path, words) < 20e6


# Real data ----------------------------------------------------------------------------------


@needs_data
def test_all_real_volumes_read():
    paths = sorted((DATA / "real3d").glob("*.tif"))
    assert len(paths) >= 6
    for path in paths:
        assert reads(path, tifffile.imread(path)).data.dtype == np.uint8


@needs_data
def test_real_projections_are_refused():
    for path in sorted((DATA / "janelia_gold").glob("*.mip.tif")):
        refused(path, "single slice")


# Fuzz ---------------------------------------------------------------------------------------


def mutate(content, rng, words=(b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"9999")):
    """Damage a file; half of the time in its header."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        limit = len(data) if rng.random() < 0.5 else min(len(data), 400)
        at, kind = rng.randrange(max(1, limit)), rng.randrange(6)
        if kind == 0:
            del data[at:]
        elif kind == 1 and data:
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif kind in (2, 3):
            data[at : at + 4 * (kind == 2)] = rng.choice(words)
        elif kind == 4:
            data[at:at] = data[at : at + rng.randint(1, 40)]
        elif kind == 5:
            del data[at : at + rng.randint(1, 40)]
    return bytes(data)


def fuzz(cases, damaged, read, error=VolumeError):
    """Number of damaged files that are refused in one line; the others must be read."""
    said = []
    for _ in range(cases):
        path = damaged()
        try:
            read(path)
        except error as caught:
            said.append(str(caught))
    assert [text for text in said if "\n" in text] == []
    return len(said)


def read_well(path):
    volume = read_volume(path)
    part = volume.data[:4, :20, :20]
    assert part.ndim == 3
    assert np.isfinite(part).all()
    assert all(np.isfinite(d) and d > 0 for d in volume.spacing)


DATA_16 = stack("uint16", (3, 16, 17))
OPTIONS = {
    "plain.tif": {},
    "imagej.tif": {"imagej": True, "metadata": {"axes": "ZYX", "unit": "um"}},
    "packed.tif": {"imagej": True, "compression": "zlib", "metadata": {"axes": "ZYX"}},
    "ome.tif": {"ome": True, "bigtiff": True, "metadata": {"axes": "ZYX", "PhysicalSizeX": 0.5}},
}
OTHERS = {
    "a.npy": lambda: saved(np.save, DATA_16),
    "a.v3draw": lambda: v3draw(DATA_16),
    "8.v3dpbd": lambda: v3dpbd(0, (1, 3, 16, 17), 1)[0],
    "16.v3dpbd": lambda: v3dpbd(0, (1, 3, 16, 17), 2)[0],
    "raw.nrrd": lambda: nrrd(DATA_16, extra="spacings: 1 1 2\n"),
    "gzip.nrrd": lambda: nrrd(DATA_16, "gzip"),
}


def saved(write, data, **options):
    buffer = io.BytesIO()
    write(buffer, data, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("name", [*OPTIONS, *OTHERS])
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_refused_or_read(tmp_path, name, caplog, count_damaged):
    # tifffile reports thousands of skipped parts here.
    caplog.set_level("CRITICAL", logger="tifffile")
    if name in OPTIONS:
        source = saved(tifffile.imwrite, DATA_16, photometric="minisblack", **OPTIONS[name])
    else:
        source = OTHERS[name]()
    assert read_volume(save(tmp_path, source, name)).data.shape == (3, 16, 17)
    rng = random.Random(json.dumps(name))
    assert fuzz(CASES, lambda: save(tmp_path, mutate(source, rng), name), read_well) > 0
    count_damaged(CASES)


# Replacements for values in JSON.
ODD = [None, True, -1, 0, 1, 3, 1e308, float("nan"), 1 << 40, 1 << 70, 10**400, "", "x", "..", []]
ODD += [{}, [1] * 5, [1 << 20] * 3, {"a": 1}, "uint64", "complex128", "r7", "|O", "gzip", "../../a"]


def mutate_json(content: bytes, rng: random.Random) -> bytes:
    """Replace, remove or double something in a JSON file; sometimes damage its bytes."""
    root = json.loads(content)
    if rng.random() < 0.3 or not root:
        return mutate(content, rng)
    nodes = [root]
    for node in nodes:
        inner = node.values() if isinstance(node, dict) else node
        nodes += [n for n in inner if isinstance(n, dict | list) and n]
    node = rng.choice(nodes)
    key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
    kind = rng.randrange(4)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, list):
        node.append(node[key])
    else:
        node[key] = rng.choice(ODD)
    return json.dumps(root).encode()


ZARRS = {
    "0.4": {"ngff": "0.4", "compressors": Blosc("lz4")},
    "0.4 gzip": {"ngff": "0.4", "compressors": GZip()},
    "0.5": {"compressors": zarr.codecs.ZstdCodec(checksum=True)},
    "0.5 blosc": {"compressors": zarr.codecs.BloscCodec()},
    "0.5 shards": {"compressors": None, "shards": (2, 16, 18)},
}


@pytest.mark.parametrize("kind", ZARRS)
@pytest.mark.filterwarnings("ignore")
def test_damaged_zarrs_are_refused_or_read(tmp_path, kind, count_damaged):
    path = ome_zarr(tmp_path / "a.zarr", DATA_16, chunks=(2, 16, 9), **ZARRS[kind])
    metadata = sorted(p for p in path.rglob("*") if p.is_file() and p.name[-1].isalpha())
    files = {file: file.read_bytes() for file in [*metadata, *chunk_files(path)]}
    rng = random.Random(kind)

    def damaged():
        for file, content in files.items():
            file.write_bytes(content)
        part = metadata if rng.random() < 0.5 else list(files)[len(metadata) :]
        file = rng.choice(part)
        change = mutate_json if part is metadata else mutate
        file.write_bytes(change(files[file], rng))
        return path

    assert 0 < fuzz(ZARR_CASES, damaged, read_well) < ZARR_CASES
    count_damaged(ZARR_CASES)
    for file, content in files.items():
        file.write_bytes(content)
    reads(path, DATA_16)
