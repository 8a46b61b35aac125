"""Volumes, against independent writers and oracles."""

import gzip
import io
import json
import os
import random
import struct
import tracemalloc
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from neurolib import volume as volume_module
from neurolib.errors import SettingsError, VolumeError
from neurolib.volume import Volume, check_values, normalise, read_volume, write_volume

DATA = Path(__file__).parents[1].parent / "shared" / "data"
CASES = int(os.environ.get("NEUROLIB_FUZZ", "150"))
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
    top = 256**kind
    while len(voxels) < total:
        room = total - len(voxels)
        choice = rng.integers(3) if voxels else 0
        if choice == 0:
            n = min(room, int(rng.integers(1, 33)))
            values = rng.integers(0, top, n).tolist()
            packed.append(n - 1)
            for value in values:
                packed += struct.pack(order + ("B" if kind == 1 else "H"), value)
        elif choice == 1:
            n = min(room, int(rng.integers(1, 30)))
            value = int(rng.integers(0, top))
            values = [value] * n
            packed.append((127 if kind == 1 else 222) + n)
            packed += struct.pack(order + ("B" if kind == 1 else "H"), value)
        else:
            n = min(room, int(rng.integers(1, 48)))
            if kind == 1:
                # Two bits a step, first step lowest: 0, 1, 2 and 3 for -1.
                codes = rng.integers(0, 4, n).tolist()
                steps = [-1 if c == 3 else c for c in codes]
                packed.append(32 + n)
                for at in range(0, n, 4):
                    packed.append(sum(c << 2 * k for k, c in enumerate(codes[at : at + 4])))
            else:
                # Three bits a step, first step highest: 0 to 4, and 5, 6, 7 for -1, -2, -3.
                codes = rng.integers(0, 8, n).tolist()
                steps = [4 - c if c > 4 else c for c in codes]
                packed.append(31 + n)
                bits = "".join(f"{c:03b}" for c in codes)
                bits += "0" * (-len(bits) % 8)
                packed += bytes(int(bits[k : k + 8], 2) for k in range(0, len(bits), 8))
            values = []
            for step in steps:
                values.append(((values or voxels)[-1] + step) % top)
        voxels += values
    head = b"v3d_volume_pkbitdf_encod" + (b"L" if order == "<" else b"B")
    head += struct.pack(f"{order}h4i", kind, *shape[::-1])
    return head + bytes(packed), np.array(voxels, dtype=f"u{kind}").reshape(shape)


def nrrd(data, encoding="raw", extra="", order="<"):
    names = {"uint8": "uchar", "uint16": "unsigned short", "float32": "float", "int16": "short"}
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


def refused(path, words, **options):
    """Assert that reading fails with one line that begins with the file's name."""
    with pytest.raises(VolumeError, match=words) as caught:
        read_volume(path, **options)
    assert str(caught.value).startswith(f"{path.name}: ")
    assert "\n" not in str(caught.value)


# TIFF ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "int16"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_plain_tiff(tmp_path, dtype, order, compression):
    data = stack(dtype)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, data, byteorder=order, compression=compression, photometric="minisblack")
    volume = read_volume(path)
    assert np.array_equal(volume.data, data)
    assert volume.data.dtype == np.dtype(dtype)
    assert volume.data.dtype.isnative
    assert volume.spacing == (1, 1, 1)
    mapped = compression is None and np.dtype(order + data.dtype.str[1:]).isnative
    assert isinstance(volume.data, np.memmap) == mapped


def test_tiff_of_slices_written_one_by_one(tmp_path):
    data = stack("uint16")
    for metadata in ({}, None):
        with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
            for page in data:
                writer.write(page, contiguous=False, metadata=metadata, photometric="minisblack")
        assert np.array_equal(read_volume(tmp_path / "a.tif").data, data)


@pytest.mark.parametrize(
    ("unit", "factor"),
    [("um", 1), ("micron", 1), ("\\u00B5m", 1), ("nm", 1e-3), ("mm", 1e3), ("pixel", 1), ("", 1)],
)
def test_imagej_spacing_and_units(tmp_path, unit, factor):
    path = tmp_path / "a.tif"
    metadata = {"axes": "ZYX", "spacing": 2.5, "unit": unit}
    tifffile.imwrite(path, stack(), imagej=True, resolution=(4, 2), metadata=metadata)
    dz, dy, dx = read_volume(path).spacing
    assert (dz, dy, dx) == pytest.approx((2.5 * factor, 0.5 * factor, 0.25 * factor))


def test_imagej_negative_spacing_is_a_distance(tmp_path):
    path = tmp_path / "a.tif"
    metadata = {"axes": "ZYX", "spacing": -2.0, "unit": "um"}
    tifffile.imwrite(path, stack(), imagej=True, metadata=metadata)
    assert read_volume(path).spacing == (2, 1, 1)


def test_ome_spacing_and_units(tmp_path):
    path = tmp_path / "a.ome.tif"
    metadata = {
        "axes": "ZYX",
        "PhysicalSizeX": 250.0,
        "PhysicalSizeXUnit": "nm",
        "PhysicalSizeY": 0.5,
        "PhysicalSizeZ": 0.002,
        "PhysicalSizeZUnit": "mm",
    }
    tifffile.imwrite(path, stack(), metadata=metadata)
    assert read_volume(path).spacing == pytest.approx((2, 0.5, 0.25))


def test_printing_resolution_is_no_spacing(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path, stack(), resolution=(72, 72), resolutionunit="INCH", photometric="minisblack"
    )
    assert read_volume(path).spacing == (1, 1, 1)


@pytest.mark.parametrize("axes", ["ZCYX", "CZYX"])
def test_channels_of_tiff(tmp_path, axes):
    data = np.stack([stack("uint16", seed=k) for k in range(3)], axis=axes.index("C"))
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, data, metadata={"axes": axes}, photometric="minisblack")
    refused(path, r"3 channels \(0 to 2\)")
    refused(path, "channel 3 asked for", channel=3)
    refused(path, "channel -1 asked for", channel=-1)
    for k in range(3):
        assert np.array_equal(read_volume(path, channel=k).data, stack("uint16", seed=k))


def test_single_channel_accepts_channel_zero_only(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, stack(), photometric="minisblack")
    assert np.array_equal(read_volume(path, channel=0).data, stack())
    refused(path, "channel 1 asked for", channel=1)


def test_tiffs_that_are_no_volume(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, stack()[0])
    refused(path, r"expected a 3D stack, got shape \(5, 6\); a single slice is not a volume")
    tifffile.imwrite(path, stack(shape=(4, 5, 6, 3)), photometric="rgb")
    refused(path, "colour image with 3 samples")
    tifffile.imwrite(path, stack(shape=(5, 6, 3)), photometric="rgb")
    refused(path, "colour image with 3 samples")
    tifffile.imwrite(path, stack(shape=(2, 4, 5, 6)), imagej=True, metadata={"axes": "TZYX"})
    refused(path, "axes TZYX")
    tifffile.imwrite(path, stack(), imagej=True, metadata={"axes": "CYX"})
    refused(path, "channels are slices")
    tifffile.imwrite(path, stack().astype(complex), photometric="minisblack")
    refused(path, "complex")


def test_tiff_truncated_anywhere_is_refused(tmp_path):
    for name, options in {
        "whole.tif": {},
        "packed.tif": {"compression": "zlib"},
        "big.tif": {"bigtiff": True},
        "ij.tif": {"imagej": True, "metadata": {"axes": "ZYX"}},
    }.items():
        path = tmp_path / name
        tifffile.imwrite(path, stack("uint16"), photometric="minisblack", **options)
        content = path.read_bytes()
        refusals = 0
        for size in range(0, len(content), 7):
            path.write_bytes(content[:size])
            try:
                volume = read_volume(path)
            except VolumeError:
                refusals += 1
                continue
            # Without the bytes after the last voxel the volume is still whole.
            assert np.array_equal(volume.data, stack("uint16"))
        assert refusals > (len(content) - 20) // 7 - 2


# NumPy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "f4", "f8", "?"])
def test_npy(tmp_path, order, dtype):
    data = np.asarray(stack("uint16") % 7, order=order).astype(dtype)
    np.save(tmp_path / "a.npy", data)
    volume = read_volume(tmp_path / "a.npy")
    assert np.array_equal(volume.data, data)
    assert volume.data.dtype.isnative
    assert isinstance(volume.data, np.memmap) == data.dtype.isnative


def test_npy_refusals(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.array([[[{}]]] * 3), allow_pickle=True)
    refused(path, "Python objects")
    np.save(path, stack()[0])
    refused(path, "single slice")
    np.save(path, stack(shape=(2, 4, 5, 6)))
    refused(path, r"2 channels \(0 to 1\)")
    assert read_volume(path, channel=1).data.shape == (4, 5, 6)
    np.save(path, stack()[:, :0])
    refused(path, "expected a 3D stack")
    np.save(path, stack().astype(complex))
    refused(path, "complex")
    path.write_bytes(b"not numpy at all, but long enough to hold a header")
    refused(path, "NumPy header")


# Vaa3D --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("code", "dims"), [("i", 4), ("h", 4), ("i", 5)])
def test_v3draw(tmp_path, dtype, order, code, dims):
    data = stack(dtype)
    path = save(tmp_path, v3draw(data, order, code, dims), "a.v3draw")
    volume = read_volume(path)
    assert np.array_equal(volume.data, data)
    assert volume.data.dtype == np.dtype(dtype)
    assert volume.data.dtype.isnative
    if order == "<" or dtype == "uint8":
        assert isinstance(volume.data, np.memmap)


def test_v3draw_agrees_with_v3dpy(tmp_path):
    loaders = pytest.importorskip("v3dpy.loaders")
    data = np.stack([stack("uint16", seed=k) for k in range(2)])
    loaders.Raw().save(str(tmp_path / "a.v3draw"), data)
    refused(tmp_path / "a.v3draw", r"2 channels")
    assert np.array_equal(read_volume(tmp_path / "a.v3draw", channel=1).data, data[1])
    path = save(tmp_path, v3draw(data), "b.v3draw")
    assert np.array_equal(loaders.Raw().load(str(path)), data)


@pytest.mark.parametrize("kind", [1, 2])
@pytest.mark.parametrize("order", ["<", ">"])
def test_v3dpbd_of_random_runs(tmp_path, kind, order):
    pytest.importorskip("v3dpy.loaders")
    for seed in range(10):
        content, voxels = v3dpbd(seed, (1, 3, 17, 23), kind, order)
        volume = read_volume(save(tmp_path, content, "a.v3dpbd"))
        assert np.array_equal(volume.data, voxels[0]), seed
        assert volume.data.dtype == voxels.dtype
        assert volume.data.dtype.isnative


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_v3dpbd_written_by_v3dpy(tmp_path, dtype):
    loaders = pytest.importorskip("v3dpy.loaders")
    smooth = np.cumsum(np.random.default_rng(0).integers(-3, 4, (2, 8, 40, 50)), axis=-1) + 1000
    smooth[:, :, :10] = 0
    data = (smooth % np.iinfo(dtype).max).astype(dtype)
    loaders.PBD().save(str(tmp_path / "a.v3dpbd"), data)
    for channel in range(2):
        volume = read_volume(tmp_path / "a.v3dpbd", channel=channel)
        assert np.array_equal(volume.data, data[channel])


def test_v3dpbd_refusals(tmp_path, monkeypatch):
    pytest.importorskip("v3dpy.loaders")
    content, _ = v3dpbd(0, (1, 3, 17, 23), 1)
    refused(save(tmp_path, content[:-1], "a.v3dpbd"), "truncated")
    refused(save(tmp_path, content + b"\x80\x01", "a.v3dpbd"), "unpack to")
    three_bit = content[:25] + struct.pack("<h", 33) + content[27:]
    refused(save(tmp_path, three_bit, "a.v3dpbd"), r"packing 33.*\.v3draw")
    started = content[:43] + bytes([40]) + content[44:]
    refused(save(tmp_path, started, "a.v3dpbd"), "difference to no voxel")

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(volume_module.importlib, "import_module", missing)
    refused(save(tmp_path, content, "a.v3dpbd"), "pip install v3d-py-helper")


def test_v3d_refusals(tmp_path):
    content = v3draw(stack())
    refused(save(tmp_path, content[:-1], "a.v3draw"), "truncated or damaged")
    refused(save(tmp_path, content[:30], "a.v3draw"), "truncated")
    refused(save(tmp_path, b"x" + content[1:], "a.v3draw"), "does not begin like")
    refused(save(tmp_path, content[:24] + b"?" + content[25:], "a.v3draw"), "byte order")
    wrong_type = content[:25] + struct.pack("<h", 8) + content[27:]
    refused(save(tmp_path, wrong_type, "a.v3draw"), "voxel type 8")
    negative = content[:27] + struct.pack("<i", -6) + content[31:]
    refused(save(tmp_path, negative, "a.v3draw"), "expected positive")
    refused(save(tmp_path, v3draw(stack()[:1]), "a.v3draw"), "single slice")


# NRRD ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["raw", "gzip"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "int16"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_nrrd(tmp_path, encoding, dtype, order):
    data = stack(dtype)
    volume = read_volume(save(tmp_path, nrrd(data, encoding, order=order), "a.nrrd"))
    assert np.array_equal(volume.data, data)
    assert volume.data.dtype == np.dtype(dtype)
    assert volume.spacing == (1, 1, 1)


@pytest.mark.parametrize(
    ("extra", "spacing"),
    [
        ("spacings: 0.25 0.5 2\n", (2, 0.5, 0.25)),
        ("space directions: (0.25,0,0) (0,0.5,0) (0,0,2)\n", (2, 0.5, 0.25)),
        ("space directions: (3,4,0) (0,0.5,0) (0,0,-2)\n", (2, 0.5, 5)),
        (
            'space directions: (250,0,0) (0,500,0) (0,0,2000)\nspace units: "nm" "nm" "nm"\n',
            (2, 0.5, 0.25),
        ),
        ("spacings: 0.25 0.5\n", (1, 1, 1)),
        ("spacings: nan 0.5 0\n", (1, 0.5, 1)),
    ],
)
def test_nrrd_spacing(tmp_path, extra, spacing):
    volume = read_volume(save(tmp_path, nrrd(stack(), extra=extra), "a.nrrd"))
    assert volume.spacing == pytest.approx(spacing)


def test_nrrd_channels(tmp_path):
    data = np.stack([stack(seed=k) for k in range(2)])
    slow = "space directions: (1,0,0) (0,1,0) (0,0,3) none\n"
    path = save(tmp_path, nrrd(data, extra=slow), "a.nrrd")
    refused(path, r"2 channels \(0 to 1\)")
    volume = read_volume(path, channel=1)
    assert np.array_equal(volume.data, data[1])
    assert volume.spacing == (3, 1, 1)
    fast = "space directions: none (1,0,0) (0,1,0) (0,0,3)\n"
    path = save(tmp_path, nrrd(np.moveaxis(data, 0, -1), extra=fast), "a.nrrd")
    assert np.array_equal(read_volume(path, channel=1).data, data[1])


def test_nrrd_refusals(tmp_path):
    detached = nrrd(stack(), extra="data file: a.raw\n")
    refused(save(tmp_path, detached, "a.nrrd"), "data file.*attached")
    refused(save(tmp_path, nrrd(stack(), "bzip2"), "a.nrrd"), "encoding 'bzip2'")
    refused(save(tmp_path, nrrd(stack())[:-1], "a.nrrd"), "truncated")
    refused(save(tmp_path, nrrd(stack(), "gzip")[:-20], "a.nrrd"), "truncated|damaged")
    refused(save(tmp_path, b"NRRD0004\ntype: uchar\n\n", "a.nrrd"), "lacks")
    refused(save(tmp_path, b"something else", "a.nrrd"), "does not begin like")


# OME-Zarr -----------------------------------------------------------------------------------


def multiscales(axes, scale, unit="micrometer"):
    return {
        "version": "0.4",
        "axes": [{"name": a, **({"unit": unit} if a in "zyx" else {})} for a in axes],
        "datasets": [
            {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": scale}]}
        ],
    }


class Recorder:
    """Stands in for a Zarr array and keeps what was asked of it."""

    def __init__(self, data):
        self.data, self.asked = data, []
        self.shape, self.dtype = data.shape, data.dtype
        self.chunks = (*[1] * (data.ndim - 3), 2, 5, 6)

    def __getitem__(self, key):
        self.asked.append(key)
        return self.data[key]


def fake_zarr(monkeypatch, array, attributes):
    group = types.SimpleNamespace(attrs=attributes)
    folder = type("Group", (), {"__getitem__": lambda self, key: {"0": array}[key]})()
    folder.attrs = group.attrs
    module = types.SimpleNamespace(open_group=lambda path, mode: folder)
    monkeypatch.setattr(volume_module.importlib, "import_module", lambda name: module)


@pytest.mark.parametrize("nested", [False, True])
def test_zarr_metadata_and_laziness(tmp_path, monkeypatch, nested):
    data = np.stack([stack("uint16", seed=k) for k in range(2)])[None]
    array = Recorder(data)
    scales = {"multiscales": [multiscales("tczyx", [1, 1, 2000, 500, 250], "nanometer")]}
    fake_zarr(monkeypatch, array, {"ome": scales} if nested else scales)
    path = tmp_path / "a.ome.zarr"
    path.mkdir()
    refused(path, r"2 channels \(0 to 1\)")
    assert array.asked == []
    volume = read_volume(path, channel=1, check=False)
    assert array.asked == []
    assert volume.spacing == pytest.approx((2, 0.5, 0.25))
    assert volume.data.shape == (4, 5, 6)
    assert volume.data.ndim == 3
    assert np.array_equal(volume.data[1:3, 2], data[0, 1, 1:3, 2])
    assert array.asked == [(0, 1, slice(1, 3), 2)]
    assert np.array_equal(np.asarray(volume.data), data[0, 1])
    assert np.array_equal(normalise(volume.data), normalise(data[0, 1]))


def test_zarr_slabs_do_not_cut_chunks(tmp_path, monkeypatch):
    array = Recorder(stack("float32"))
    fake_zarr(monkeypatch, array, {"multiscales": [multiscales("zyx", [1, 1, 1])]})
    monkeypatch.setattr(volume_module, "SLAB", 5 * 6)
    (tmp_path / "a.zarr").mkdir()
    read_volume(tmp_path / "a.zarr")
    assert array.asked == [(slice(0, 2),), (slice(2, 4),)]


def test_zarr_refusals(tmp_path, monkeypatch):
    path = tmp_path / "a.zarr"
    path.mkdir()
    fake_zarr(monkeypatch, Recorder(stack()), {"something": "else"})
    refused(path, "not an OME-Zarr image")
    fake_zarr(monkeypatch, Recorder(stack()), {"multiscales": [multiscales("xyz", [1, 1, 1])]})
    refused(path, "end with z, y, x")
    series = Recorder(stack(shape=(3, 4, 5, 6)))
    fake_zarr(monkeypatch, series, {"multiscales": [multiscales("tzyx", [1, 1, 1, 1])]})
    refused(path, "3 time points")

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(volume_module.importlib, "import_module", missing)
    refused(path, "pip install zarr")


def test_zarr_itself(tmp_path):
    zarr = pytest.importorskip("zarr")
    data = np.stack([stack("uint16", seed=k) for k in range(2)])
    group = zarr.open_group(str(tmp_path / "a.zarr"), mode="w")
    array = group.create_array("0", shape=data.shape, dtype=data.dtype, chunks=(1, 2, 5, 6))
    array[:] = data
    group.attrs["multiscales"] = [multiscales("czyx", [1, 2, 0.5, 0.25])]
    volume = read_volume(tmp_path / "a.zarr", channel=1)
    assert np.array_equal(volume.data[:], data[1])
    assert volume.spacing == (2, 0.5, 0.25)


# What any format may suffer from -------------------------------------------------------------


def test_paths_that_are_no_volume(tmp_path):
    refused(tmp_path / "none.tif", "not found")
    refused(save(tmp_path, b"x", "a.jpg"), r"suffix '.jpg', expected one of \.tif")
    refused(save(tmp_path, b"x", "a"), "suffix 'missing'")
    (tmp_path / "folder.tif").mkdir()
    refused(tmp_path / "folder.tif", "is a folder")
    for suffix in ("tif", "tiff", "npy", "v3draw", "v3dpbd", "nrrd"):
        refused(save(tmp_path, b"", f"empty.{suffix}"), r"empty \(0 bytes\)")
        for size in (5, 5000):
            refused(save(tmp_path, bytes(size), f"zeros.{suffix}"), "begin like|NumPy header")


def absurd(name):
    """Small files whose headers claim 2^40 voxels or more."""
    side = 1 << 14
    if name == "a.v3draw":
        head = b"raw_image_stack_by_hpengL" + struct.pack("<h4i", 1, side, side, side, 1)
        return head + bytes(100)
    if name == "a.v3dpbd":
        head = b"v3d_volume_pkbitdf_encodL" + struct.pack("<h4i", 1, side, side, side, 1)
        return head + bytes([255, 7]) * 100
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
    buffer = io.BytesIO()
    if name == "images.tif":
        tifffile.imwrite(buffer, stack(shape=(16, 16, 16)), imagej=True, metadata={"axes": "ZYX"})
        content = buffer.getvalue()
        return content.replace(b"images=16\nslices=16\n", b"images=99\nslices=99\n")
    compression = "zlib" if name == "packed.tif" else None
    tifffile.imwrite(
        buffer, stack(shape=(3, 16, 16)), photometric="minisblack", compression=compression
    )
    content = bytearray(buffer.getvalue())
    buffer.seek(0)
    with tifffile.TiffFile(buffer) as tif:
        for page in tif.pages:
            for code in (256, 257, 278):
                # Width, length and rows per strip, given as 4-byte integers.
                at = page.tags[code].offset
                content[at + 2 : at + 12] = struct.pack("<HII", 4, 1, 1 << 20)
    return bytes(content)


@pytest.mark.parametrize(
    "name",
    [
        "a.v3draw",
        "a.v3dpbd",
        "a.npy",
        "wrap.npy",
        "a.nrrd",
        "gzip.nrrd",
        "plain.tif",
        "packed.tif",
        "images.tif",
    ],
)
def test_absurd_claims_are_refused_without_allocating(tmp_path, name):
    path = save(tmp_path, absurd(name), name)
    assert path.stat().st_size < 50_000
    tracemalloc.start()
    try:
        refused(path, "claims|not within|expected a 3D stack|every voxel")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20e6


def test_unusable_values(tmp_path):
    data = stack("float32")
    data[2, 3, 4] = np.nan
    np.save(tmp_path / "a.npy", data)
    refused(tmp_path / "a.npy", "slice 2 holds NaN or infinite")
    assert np.isnan(read_volume(tmp_path / "a.npy", check=False).data[2, 3, 4])
    data[2, 3, 4] = -np.inf
    data[1, 0, 0] = np.inf
    np.save(tmp_path / "a.npy", data)
    refused(tmp_path / "a.npy", "slice 1 holds NaN or infinite")
    np.save(tmp_path / "a.npy", np.full((3, 4, 5), 7))
    refused(tmp_path / "a.npy", "every voxel is 7")


def test_values_are_checked_across_slabs(monkeypatch):
    monkeypatch.setattr(volume_module, "SLAB", 1)
    data = np.full((5, 3, 3), 7.0)
    with pytest.raises(VolumeError, match="a: every voxel is 7"):
        check_values(Volume(data), "a")
    data[4] = 8
    check_values(Volume(data), "a")
    data[3, 0, 0] = np.inf
    with pytest.raises(VolumeError, match="a: slice 3"):
        check_values(Volume(data), "a")


# Scaling ------------------------------------------------------------------------------------


def scaled_by_numpy(data):
    values = data.astype(np.float64)
    used = values[values != 0] if (values == 0).mean() > 0.5 else values
    low, high = np.percentile(used, [0.5, 99.8])
    return np.clip((values - low) / (high - low), 0, 1)


@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "uint16", "int16", "int32", "float32", "float64"]
)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("slab", [1 << 22, 700])
def test_normalise_is_numpys_percentile(monkeypatch, dtype, sparse, slab):
    monkeypatch.setattr(volume_module, "SLAB", slab)
    rng = np.random.default_rng(1)
    data = rng.gamma(2, 12, (10, 20, 30)) - (5 if np.dtype(dtype).kind != "u" else 0)
    data = np.clip(data, -100, 120)
    if sparse:
        data[rng.random(data.shape) < 0.8] = 0
    data = data.astype(dtype)
    result = normalise(data)
    assert result.dtype == np.float32
    assert result.shape == data.shape
    assert np.allclose(result, scaled_by_numpy(data), atol=1e-6)
    assert result.min() == 0
    assert result.max() == 1


def test_normalise_keeps_16_bit_steps_and_large_offsets():
    ramp = np.arange(27_000, dtype=np.uint16).reshape(30, 30, 30)
    low, high = np.percentile(ramp, [0.5, 99.8])
    between = ((ramp > low) & (ramp < high)).sum()
    assert len(np.unique(normalise(ramp))) == between + 2
    # A spacing of 1 at 2^31 is lost in float32 unless the subtraction is done before.
    lifted = ramp.astype(np.uint32) + np.uint32(1 << 31)
    assert np.allclose(normalise(lifted), normalise(ramp), atol=1e-6)


def test_normalise_of_masks_and_constants():
    mask = np.zeros((10, 10, 10), np.uint8)
    mask[2:4, 2:4, 2:4] = 255
    for dtype in (np.uint8, bool, np.float32):
        assert np.array_equal(normalise(mask.astype(dtype)), mask / 255)
    for value in (0, 9):
        assert not normalise(np.full((3, 4, 5), value, np.uint8)).any()
        assert not normalise(np.full((3, 4, 5), value, np.float32)).any()


def test_normalise_of_a_large_float_volume_uses_a_fair_sample(monkeypatch):
    monkeypatch.setattr(volume_module, "SLAB", 10_000)
    monkeypatch.setattr(volume_module, "SAMPLE", 60_000)
    data = np.random.default_rng(0).normal(size=(40, 50, 60)).astype(np.float32)
    data += np.arange(40, dtype=np.float32)[:, None, None] / 10
    result = normalise(data)
    assert np.array_equal(result, normalise(data))
    assert np.abs(result - scaled_by_numpy(data)).max() < 0.02


def test_normalise_is_bounded_in_memory(tmp_path):
    data = np.memmap(tmp_path / "big", dtype=np.uint16, mode="w+", shape=(96, 512, 512))
    data[::7, ::3] = 500
    tracemalloc.start()
    try:
        result = normalise(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Beside the result: one slab as index of the histogram, 8 bytes a voxel, and its copy.
    assert peak < result.nbytes + 3 * 8 * volume_module.SLAB


# Writing ------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from(
        ["uint8", "uint16", "float32", "int8", "int16", "int32", "uint32", "float64"]
    ),
    shape=st.tuples(st.integers(2, 6), st.integers(1, 9), st.integers(1, 9)),
    spacing=st.tuples(*[st.floats(1e-3, 1e3)] * 3),
    suffix=st.sampled_from([".tif", ".tiff", ".ome.tif"]),
)
def test_written_volumes_come_back(tmp_path_factory, dtype, shape, spacing, suffix):
    data = stack(dtype, shape)
    path = tmp_path_factory.mktemp("volume") / f"a{suffix}"
    assert write_volume(path, data, spacing) == path
    volume = read_volume(path, check=False)
    assert np.array_equal(volume.data, data)
    assert volume.data.dtype == np.dtype(dtype)
    assert volume.spacing == pytest.approx(spacing, rel=1e-5)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_written_tiff_is_what_imagej_expects(tmp_path):
    path = write_volume(tmp_path / "a.tif", stack("uint16"), (2, 0.5, 0.25))
    with tifffile.TiffFile(path) as tif:
        assert tif.is_imagej
        assert tif.imagej_metadata["slices"] == 4
        assert tif.imagej_metadata["spacing"] == 2
        assert tif.imagej_metadata["unit"] == "micron"
        assert tif.pages[0].tags["XResolution"].value == (4, 1)
        assert tif.pages[0].tags["YResolution"].value == (2, 1)
        assert tif.pages[0].compression == tifffile.COMPRESSION.ADOBE_DEFLATE


def test_volumes_beyond_imagejs_limit_become_ome(tmp_path, monkeypatch):
    monkeypatch.setattr(volume_module, "IMAGEJ_BYTES", 100)
    path = write_volume(tmp_path / "a.tif", stack("uint16"), (2, 0.5, 0.25))
    with tifffile.TiffFile(path) as tif:
        assert tif.is_ome
        assert tif.is_bigtiff
    assert read_volume(path).spacing == (2, 0.5, 0.25)


def test_masks_and_arrays(tmp_path):
    mask = stack() > 100
    assert np.array_equal(read_volume(write_volume(tmp_path / "m.tif", mask)).data, mask * 255)
    for dtype in ("bool", "float16", "int64"):
        path = write_volume(tmp_path / "a.npy", stack("uint16").astype(dtype))
        assert np.array_equal(np.load(path), stack("uint16").astype(dtype))


def test_write_refusals_leave_nothing(tmp_path):
    for path, data, spacing, words in [
        ("a.png", stack(), (1, 1, 1), "suffix '.png'"),
        ("a.tif", stack()[0], (1, 1, 1), "expected an array"),
        ("a.tif", stack()[:0], (1, 1, 1), "expected an array"),
        ("a.tif", stack().astype("int64"), (1, 1, 1), "cannot hold int64"),
        ("a.npy", stack().astype(complex), (1, 1, 1), "complex"),
        ("a.tif", stack(), (1, 0, 1), "spacing"),
        ("a.tif", stack(), (1, 1), "spacing"),
        ("a.tif", stack(), (1, 1, np.nan), "spacing"),
    ]:
        with pytest.raises(VolumeError, match=words):
            write_volume(tmp_path / path, data, spacing)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError):
        write_volume(tmp_path / "file" / "a.tif", stack())


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = write_volume(tmp_path / "a.tif", stack())
    before = path.read_bytes()

    def fail(*arguments, **options):
        Path(arguments[0]).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(volume_module.tifffile, "imwrite", fail)
    with pytest.raises(OSError, match="disk full"):
        write_volume(path, stack(seed=1))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.tif"]


# Real data ----------------------------------------------------------------------------------


@needs_data
def test_all_real_volumes_read():
    paths = sorted((DATA / "real3d").glob("*.tif"))
    assert len(paths) == 6
    for path in paths:
        volume = read_volume(path)
        assert np.array_equal(volume.data, tifffile.imread(path))
        assert volume.data.dtype == np.uint8


@needs_data
def test_real_masked_volume(tmp_path):
    with zipfile.ZipFile(DATA / "rivuletpy" / "test.tif.zip") as archive:
        archive.extract("test.tif", tmp_path)
    volume = read_volume(tmp_path / "test.tif")
    assert volume.data.shape == (119, 415, 409)
    assert (volume.data == 0).mean() > 0.5
    part = volume.data[:, 100:300, 100:300]
    assert np.allclose(normalise(part), scaled_by_numpy(part), atol=1e-6)


@needs_data
def test_real_projections_are_refused():
    for path in sorted((DATA / "janelia_gold").glob("*.mip.tif")):
        refused(path, "single slice")


# Fuzz ---------------------------------------------------------------------------------------


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Damage a file; half of the time near its beginning, where the header is."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        limit = len(data) if rng.random() < 0.5 else min(len(data), 400)
        at = rng.randrange(max(1, limit))
        kind = rng.randrange(5)
        if kind == 0:
            del data[at:]
        elif kind == 1 and data:
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 2:
            extreme = [
                b"\xff\xff\xff\xff",
                b"\xff\xff\xff\x7f",
                b"\0\0\0\x80",
                b"\0\0\0\0",
                b"9999",
            ]
            data[at : at + 4] = rng.choice(extreme)
        elif kind == 3:
            data[at:at] = data[: rng.randint(1, 40)]
        elif kind == 4:
            del data[at : at + rng.randint(1, 40)]
    return bytes(data)


def healthy(name):
    data = stack("uint16", (3, 16, 17))
    buffer = io.BytesIO()
    options = {
        "plain.tif": {},
        "imagej.tif": {
            "imagej": True,
            "resolution": (4, 4),
            "metadata": {"axes": "ZYX", "unit": "um"},
        },
        "packed.tif": {"imagej": True, "compression": "zlib", "metadata": {"axes": "ZYX"}},
        "ome.tif": {
            "ome": True,
            "bigtiff": True,
            "metadata": {"axes": "ZYX", "PhysicalSizeX": 0.5},
        },
    }
    if name in options:
        tifffile.imwrite(buffer, data, photometric="minisblack", **options[name])
        return buffer.getvalue()
    if name == "a.npy":
        np.save(buffer, data)
        return buffer.getvalue()
    return {
        "a.v3draw": lambda: v3draw(data),
        "8.v3dpbd": lambda: v3dpbd(0, (1, 3, 16, 17), 1)[0],
        "16.v3dpbd": lambda: v3dpbd(0, (1, 3, 16, 17), 2)[0],
        "raw.nrrd": lambda: nrrd(data, extra="spacings: 1 1 2\n"),
        "gzip.nrrd": lambda: nrrd(data, "gzip"),
    }[name]()


@pytest.mark.parametrize(
    "name",
    [
        "plain.tif",
        "imagej.tif",
        "packed.tif",
        "ome.tif",
        "a.npy",
        "a.v3draw",
        "8.v3dpbd",
        "16.v3dpbd",
        "raw.nrrd",
        "gzip.nrrd",
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_refused_or_read(tmp_path, name, caplog):
    if name.endswith("pbd"):
        pytest.importorskip("v3dpy.loaders")
    # tifffile reports what it skips over; here that is expected by the thousand.
    caplog.set_level("CRITICAL", logger="tifffile")
    source = healthy(name)
    assert read_volume(save(tmp_path, source, name)).data.shape == (3, 16, 17)
    rng = random.Random(json.dumps(name))
    stopped = several_lines = 0
    for case in range(CASES):
        content = mutate(source, rng)
        path = save(tmp_path, content, name)
        try:
            volume = read_volume(path)
        except VolumeError as error:
            stopped += 1
            several_lines += "\n" in str(error)
            continue
        assert volume.data.ndim == 3, case
        assert np.isfinite(volume.data).all(), case
        assert all(np.isfinite(d) and d > 0 for d in volume.spacing), case
    print(f"{name}: {CASES} damaged files, {stopped} refused, {CASES - stopped} read")
    assert stopped > 0
    assert several_lines == 0
