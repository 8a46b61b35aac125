"""Volumes: checks, scaling and writing, against independent oracles."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from test_formats import (
    DATA,
    multiscales,
    needs_data,
    needs_proc,
    peak_memory,
    peak_of,
    reads,
    refused,
    stack,
)

from neurolib import volume as volume_module
from neurolib.errors import SettingsError, VolumeError
from neurolib.volume import Volume, check_values, inverted, normalise, read_volume, write_volume

TYPES = ["uint8", "uint16", "float32", "int8", "int16", "int32", "uint32", "float64"]

# Checking -----------------------------------------------------------------------------------


def test_unusable_values(tmp_path):
    path, data = tmp_path / "a.npy", stack("float32")
    data[2, 3, 4] = np.nan
    np.save(path, data)
    refused(path, "slice 2 holds NaN or infinite")
    assert np.isnan(read_volume(path, check=False).data[2, 3, 4])
    data[2, 3, 4] = -np.inf
    data[1, 0, 0] = np.inf
    np.save(path, data)
    refused(path, "slice 1 holds NaN or infinite")
    np.save(path, np.full((3, 4, 5), 7))
    refused(path, "every voxel is 7")


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


@pytest.mark.parametrize("dtype", TYPES)
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
    assert (result.dtype, result.shape) == (np.float32, data.shape)
    assert np.allclose(result, scaled_by_numpy(data), atol=1e-6)
    assert (result.min(), result.max()) == (0, 1)


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
    # Besides the result: one slab as indices of the histogram, 8 bytes per voxel, and its copy.
    assert peak_of(normalise, data) < 4 * data.size + 3 * 8 * volume_module.SLAB


@needs_data
def test_real_masked_volume(tmp_path):
    with zipfile.ZipFile(DATA / "rivuletpy" / "test.tif.zip") as archive:
        archive.extract("test.tif", tmp_path)
    volume = read_volume(tmp_path / "test.tif")
    assert volume.data.shape == (119, 415, 409)
    assert (volume.data == 0).mean() > 0.5
    part = volume.data[:, 100:300, 100:300]
    assert np.allclose(normalise(part), scaled_by_numpy(part), atol=1e-6)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 99),
    gain=st.sampled_from([1, 20]),
    tilt=st.sampled_from([0, 60]),
    slices=st.sampled_from([2, 12]),
)
def test_dark_structures_on_a_bright_ground_are_noticed(seed, gain, tilt, slices):
    """For any brightness and gradient; noise is not inverted."""
    rng, shape = np.random.default_rng(seed), (slices, 80, 90)
    line = np.zeros(shape)
    line[slices // 2, rng.integers(20, 60), 5:85] = 1
    line[slices // 2, 5:75, rng.integers(20, 70)] = 1
    blurred = gaussian_filter(line, (0, 1.2, 1.2))
    ground = 30 + tilt * np.linspace(0, 1, 90) + rng.normal(0, 3, shape)
    image = gain * (ground + 60 * blurred / blurred.max())
    assert not inverted(normalise(image))
    assert inverted(normalise(image.max() - image))
    assert not inverted(normalise(ground))
    assert not inverted(normalise(-ground))
    assert not inverted(np.zeros(shape, np.float32))


# Writing ------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(TYPES),
    shape=st.tuples(st.integers(2, 6), st.integers(1, 9), st.integers(1, 9)),
    spacing=st.tuples(*[st.floats(0.02, 150)] * 3),
    suffix=st.sampled_from([".tif", ".tiff", ".ome.tif", ".zarr", ".ome.zarr"]),
    known=st.booleans(),
)
@pytest.mark.filterwarnings("ignore:.*times longer")
def test_written_volumes_come_back(tmp_path_factory, dtype, shape, spacing, suffix, known):
    """With their spacing, and without a unit if none was known."""
    data = stack(dtype, shape)
    path = tmp_path_factory.mktemp("volume") / f"a{suffix}"
    assert write_volume(path, data, np.array(spacing), known=known) == path
    volume = reads(path, data, check=False)
    assert volume.spacing == pytest.approx(spacing, rel=1e-5)
    assert known == (not volume.unknown)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_written_tiff_is_what_imagej_expects(tmp_path):
    path = write_volume(tmp_path / "a.tif", stack("uint16"), (2, 0.5, 0.25))
    with tifffile.TiffFile(path) as tif:
        assert tif.is_imagej
        expected = {"slices": 4, "spacing": 2, "unit": "micron"}
        assert tif.imagej_metadata.items() >= expected.items()
        tags = tif.pages[0].tags
        assert (tags["XResolution"].value, tags["YResolution"].value) == ((4, 1), (2, 1))
        assert tif.pages[0].compression == tifffile.COMPRESSION.ADOBE_DEFLATE


def test_volumes_beyond_imagejs_limit_become_ome(tmp_path, monkeypatch):
    monkeypatch.setattr(volume_module, "IMAGEJ_BYTES", 100)
    path = write_volume(tmp_path / "a.tif", stack("uint16"), (2, 0.5, 0.25))
    with tifffile.TiffFile(path) as tif:
        assert (tif.is_ome, tif.is_bigtiff) == (True, True)
    reads(path, stack("uint16"), (2, 0.5, 0.25))


def test_masks_and_arrays(tmp_path):
    mask = stack() > 100
    assert np.array_equal(read_volume(write_volume(tmp_path / "m.tif", mask)).data, mask * 255)
    for dtype in ("bool", "float16", "int64", ">u2"):
        for name in ("a.npy", "a.zarr"):
            data = stack("uint16").astype(dtype)
            reads(write_volume(tmp_path / name, data), data, check=False)


def test_write_refusals_leave_nothing(tmp_path):
    for path, data, spacing, words in [
        ("a.png", stack(), (1, 1, 1), "suffix '.png'"),
        ("a.tif", stack()[0], (1, 1, 1), "expected an array"),
        ("a.tif", stack()[:0], (1, 1, 1), "expected an array"),
        ("a.tif", stack().astype("int64"), (1, 1, 1), "TIFF cannot hold int64"),
        ("a.npy", stack().astype(complex), (1, 1, 1), "voxel type complex"),
        ("a.zarr", stack().astype(complex), (1, 1, 1), "voxel type complex"),
        ("a.zarr", stack()[0], (1, 1, 1), "expected an array"),
        ("a.zarr", stack(), (1, 1, -1), "spacing"),
        ("a.tif", stack(), (1, 0, 1), "spacing"),
        ("a.tif", stack(), (1, 1), "spacing"),
        ("a.tif", stack(), (1, 1, np.nan), "spacing"),
    ]:
        with pytest.raises(VolumeError, match=f"^{path}: {words}"):
            write_volume(tmp_path / path, data, spacing)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for name in ("a.tif", "a.zarr"):
        with pytest.raises(SettingsError):
            write_volume(tmp_path / "file" / name, stack())


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


def test_written_zarr_is_what_ngff_says(tmp_path):
    data = stack("uint16", (40, 150, 140))
    path = write_volume(tmp_path / "cell.zarr", data, (2, 0.5, 0.25))
    group = json.loads((path / "zarr.json").read_text())
    assert (group["zarr_format"], group["node_type"]) == (3, "group")
    image = multiscales() | {"name": "cell"}
    image["axes"] = [{"type": "space", **axis} for axis in image["axes"]]
    assert group["attributes"]["ome"] == {"version": "0.5", "multiscales": [image]}
    array = json.loads((path / "0" / "zarr.json").read_text())
    assert array["dimension_names"] == ["z", "y", "x"]
    assert array["data_type"] == "uint16"
    assert array["chunk_grid"]["configuration"]["chunk_shape"] == [16, 128, 128]
    # Compression makes empty and smooth parts small.
    assert np.array_equal(zarr.open_array(path / "0", mode="r")[:], data)
    data[:] = np.arange(40)[:, None, None]
    data[:16] = 0
    files = list(write_volume(path, data).rglob("*/c/*/*/*"))
    assert len(files) == 2 * 2 * 2
    assert sum(file.stat().st_size for file in files) < data.nbytes / 50


def test_written_zarr_is_read_by_its_reference_reader(tmp_path):
    reader = pytest.importorskip("ome_zarr.reader")
    parse_url = pytest.importorskip("ome_zarr.io").parse_url
    data = stack("uint16", (20, 150, 140))
    path = write_volume(tmp_path / "a.zarr", data, (2, 0.5, 0.25))
    (node,) = reader.Reader(parse_url(path))()
    assert np.array_equal(np.asarray(node.data[0]), data)
    (transformation,) = node.metadata["coordinateTransformations"][0]
    assert transformation["scale"] == [2, 0.5, 0.25]
    assert [axis["unit"] for axis in node.metadata["axes"]] == ["micrometer"] * 3


def test_zarr_is_written_from_anything_that_can_be_sliced(tmp_path, monkeypatch):
    data = stack("uint16", (40, 150, 140))
    np.save(tmp_path / "a.npy", data)
    group = zarr.create_group(tmp_path / "foreign")
    foreign = group.create_array("0", data=data, chunks=(24, 31, 300))
    first = write_volume(tmp_path / "first.zarr", data)
    monkeypatch.setattr(volume_module, "SLAB", 20_000)
    sources = [np.load(tmp_path / "a.npy", mmap_mode="r"), foreign, data.tolist()]
    for source in [*sources, read_volume(first).data]:
        path = write_volume(tmp_path / "b.zarr", source)
        assert np.array_equal(read_volume(path).data, data)
    # An image in place of itself.
    reads(write_volume(first, read_volume(first).data, (3, 1, 1)), data, (3, 1, 1))


@needs_proc
def test_a_zarr_larger_than_memory_may_be_written(tmp_path):
    # 160 MB, mostly not stored; a piece has 8 MB.
    path = write_volume(tmp_path / "a.zarr", np.broadcast_to(np.uint16(0), (80, 1000, 1000)))
    array = zarr.open_array(path / "0")
    array[40:60, 500:600, 500:700] = 7
    code = """
import zarr.storage
start = peak()
write_volume(sys.argv[2], read_volume(sys.argv[1], check=False).data)
print(peak() - start)
print(int(read_volume(sys.argv[1], check=False).data[:].sum()))
print(peak() - start)
"""
    writing, total, reading = peak_memory(code, path, tmp_path / "b.zarr")
    assert writing < 80e6
    # The measurement would see an array of that size.
    assert reading > 150e6
    assert total == 7 * 20 * 100 * 200
    data = read_volume(tmp_path / "b.zarr").data
    assert data[40:60, 500:600, 500:700].min() == 7
    assert np.asarray(data).sum() == total


def test_overwriting_a_zarr_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = write_volume(tmp_path / "a.zarr", stack(shape=(40, 9, 9)), (2, 1, 1))
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}

    def same():
        assert [p.name for p in tmp_path.iterdir()] == ["a.zarr"]
        assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before

    class Failing:
        shape, dtype = (40, 9, 9), np.dtype("u1")

        def __getitem__(self, key):
            if key[0].start:
                raise OSError("disk full")
            return np.ones((16, 9, 9), "u1")

    monkeypatch.setattr(volume_module, "SLAB", 16 * 81)
    with pytest.raises(OSError, match="disk full"):
        write_volume(path, Failing())
    same()

    # The last rename fails, or the process is interrupted before it.
    replace, done = os.replace, []
    for error in (OSError("busy"), KeyboardInterrupt()):

        def stop(source, target, error=error):
            if target == path and source.name == path.name:  # but the old one can return
                done.append(source)
                raise error
            replace(source, target)

        done.clear()
        monkeypatch.setattr(os, "replace", stop)
        with pytest.raises((SettingsError, KeyboardInterrupt)):
            write_volume(path, stack(shape=(3, 4, 5)))
        assert done
        same()
    monkeypatch.setattr(os, "replace", replace)

    # Nothing of the old folder remains, and a file of that name is replaced.
    write_volume(path, stack(shape=(3, 4, 5)))
    assert read_volume(path).data.shape == (3, 4, 5)
    assert len(list((path / "0" / "c").rglob("*"))) < len(before)
    (tmp_path / "b.zarr").write_text("a file")
    reads(write_volume(tmp_path / "b.zarr", stack()), stack())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zarr", "b.zarr"]


def test_an_old_zarr_is_never_seen_half_removed(tmp_path, monkeypatch):
    path = write_volume(tmp_path / "a.zarr", stack(shape=(40, 9, 9)))
    shapes = []
    remove = shutil.rmtree

    def removing(folder, *arguments, **options):
        shapes.append(read_volume(path).data.shape)
        remove(folder, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", removing)
    write_volume(path, stack(shape=(3, 4, 5)))
    assert shapes == [(3, 4, 5)]
