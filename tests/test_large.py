"""Volumes larger than memory: the parts are the whole, and stopping at any place loses nothing."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_tracing import check_same

from neurolib import volume
from neurolib.course import large
from neurolib.course.adapters import as_probability
from neurolib.course.large import Mapped, normalised, predict_large, stored_boxes, thresholded
from neurolib.data.formats import LazyStack
from neurolib.errors import NeurolibError, SettingsError
from neurolib.evaluation import tree_scores
from neurolib.inference import Tiling, predict_volume
from neurolib.network import NetworkSettings, Segmenter
from neurolib.swc import Tree, read_swc
from neurolib.tracing import trace
from neurolib.training import load_checkpoint, save_checkpoint
from neurolib.volume import create_zarr, limits, normalise, read_volume, write_volume

SHAPE = (11, 75, 90)
TILING = Tiling(device="cpu", skip_empty=False)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(volume, "CHUNKS", (4, 32, 32))
    monkeypatch.setattr(large, "REGION", (4, 32, 64))


class Placed(torch.nn.Module):
    """Depends on the place in the tile, on all its slices, and on which slice is asked."""

    def __init__(self, predict):
        super().__init__()
        self.settings = SimpleNamespace(depth=3, block=48, predict=predict)

    def forward(self, blocks):
        slices = torch.arange(3 if self.settings.predict == "all" else 1).view(1, -1, 1, 1) / 5
        place = torch.arange(48.0 * 48).view(48, 48) / 600
        return 4 * blocks.mean((1, 2))[:, None] - place + slices


@pytest.fixture
def cheap(monkeypatch):
    """Takes a stand-in for the network of a checkpoint, by the name of the file."""
    monkeypatch.setattr(large, "_network", lambda checkpoint, digest: Placed(checkpoint.stem))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A network that predicts the centre slice, and one that predicts all slices."""
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = {}
    for seed, predict in enumerate(("center", "all")):
        torch.manual_seed(seed)
        kind = NetworkSettings("test_vit", 3, block=48, size=48, predict=predict, width=32)
        network = Segmenter(kind)
        facts = {"training": {"frozen": False}, "tau": 0.1, "threshold": 0.5}
        paths[predict] = folder / f"{predict}.safetensors"
        save_checkpoint(paths[predict], network, network.state_dict(), facts)
    return paths


def stack(shape=SHAPE):
    """Noise with a bright part, 16 bits, zero in a corner."""
    data = np.random.default_rng(0).integers(100, 900, shape, dtype=np.uint16)
    data[:, 20:40, 30:70] += 3000
    data[:, 50:, :40] = 0
    return data


@pytest.fixture
def image(tmp_path):
    return write_volume(tmp_path / "in.zarr", stack(), (2.0, 0.5, 0.5))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.zarr"


def check(out, network, data=None, atol=1e-5, **options):
    """A result on disk is the prediction of the whole volume in memory."""
    scaled, tiling = normalise(stack() if data is None else data), replace(TILING, **options)
    whole = predict_volume(network, scaled, progress=False, **asdict(tiling))
    np.testing.assert_allclose(read_volume(out).data[:], whole, atol=atol)


def sparse(dtype=np.uint8, shape=(11, 130, 160)):
    """Two bars, most of the volume exactly zero."""
    data = np.zeros(shape, dtype)
    data[1:4, 5:8, 3:60] = 150
    data[7:10, 100:103, 90:155] = 200
    return data


class Dim(Placed):
    """Passes the intensity of the slice asked for: 0.5 and more where it is above the middle."""

    def forward(self, blocks):
        return 9 * blocks[:, 0, slice(None) if self.settings.predict == "all" else [1]] - 4.5


@pytest.mark.parametrize("predict", ["center", "all"])
def test_where_the_input_has_no_chunks_nothing_is_read_run_or_written(
    predict, checkpoints, out, tmp_path, monkeypatch
):
    monkeypatch.setattr(large, "_network", lambda checkpoint, digest: Dim(checkpoint.stem))
    image = write_volume(tmp_path / "in.zarr", sparse(), (2.0, 0.5, 0.5))
    assert len(chunk_files(image)) < 30
    monkeypatch.setattr(volume, "SLAB", 1)
    regions, predict_box = [], large.predict_box
    monkeypatch.setattr(large, "predict_box", lambda *a: regions.append(a[2]) or predict_box(*a))
    looks, bounding_box = [], volume.bounding_box
    monkeypatch.setattr(volume, "bounding_box", lambda a: looks.append(1) or bounding_box(a))
    predict_large(image, checkpoints[predict], out, TILING)
    assert 0 < len(looks) <= len(chunk_files(image))  # for the level of emptiness
    check(out, Dim(predict), sparse(), atol=1e-6)
    assert 0 < len(chunk_files(out)) < 3 * 5 * 5
    assert 0 < len(regions) < 3 * 5 * 3
    # Chunks that are there are done, chunks that are not need nothing: either is known again.
    part = out.rename(tmp_path / "out.zarr.part")
    next(iter(chunk_files(part))).unlink()
    regions.clear()
    predict_large(image, checkpoints[predict], out, TILING)
    assert len(regions) == 1
    check(out, Dim(predict), sparse(), atol=1e-6)


def test_a_missing_chunk_that_is_not_the_darkest_is_run(checkpoints, out, tmp_path, monkeypatch):
    monkeypatch.setattr(large, "_network", lambda checkpoint, digest: Dim(checkpoint.stem))
    data = sparse(np.int16)
    data[:, 40:60, 40:60] = -100  # so that zero is grey
    image = write_volume(tmp_path / "in.zarr", data)
    predict_large(image, checkpoints["center"], out, TILING)
    check(out, Dim("center"), data, atol=1e-6)
    assert len(chunk_files(out)) == 3 * 5 * 5


def test_stored_boxes_hold_all_that_is_not_zero_and_leave_out_what_is_not_stored(
    tmp_path, monkeypatch
):
    data = sparse()
    stored = read_volume(write_volume(tmp_path / "x.zarr", data)).data
    for slab in (1, 3 * 4 * 32 * 32, 1 << 22):
        monkeypatch.setattr(volume, "SLAB", slab)
        for view in (stored, Mapped(stored, lambda part: part > 9, np.dtype(bool))):
            times = np.zeros(data.shape, int)
            for box in stored_boxes(view):
                times[box] += 1
            assert times.max() == 1
            assert times[data > 0].all()
            if slab == 1:
                assert times.sum() <= len(chunk_files(tmp_path)) * 4 * 32 * 32
            pieces = [box for box in volume.pieces(data, stored.chunks) if data[box].any()]
            assert list(stored_boxes(view, cut=False)) == pieces
        scaled = Mapped(stored, lambda part: part / np.float32(255), np.dtype(np.float32))
        level = volume.empty_level(scaled)
        assert volume.empty_level(scaled, stored_boxes(scaled, cut=False)) == level > 0
        for every in (data, Mapped(stored, lambda part: part == 0, np.dtype(bool))):
            assert sum(data[box].size for box in stored_boxes(every)) == data.size


@pytest.mark.parametrize(
    ("data", "arguments"),
    [
        (sparse() > 0, {}),
        (sparse(), {}),
        (sparse(np.int32), {"label": 150}),
        (sparse() // 150, {"label": 0}),
        (sparse(), {"threshold": 0.7}),
        (sparse(np.uint16), {"threshold": 0.002}),
        (sparse(np.float32) / 255, {}),
    ],
)
def test_a_segmentation_on_disk_means_what_it_means_in_memory(data, arguments, tmp_path):
    expected, words = as_probability(data, **arguments)
    stored = read_volume(write_volume(tmp_path / "x.zarr", data), check=False).data
    found, said = large.segmentation(stored, **arguments)
    assert (said, found.dtype) == (words, expected.dtype)
    np.testing.assert_array_equal(found[:], expected)
    if expected.mean() > 0.1:
        return  # all that is not a bar
    options = {"threshold": arguments.get("threshold", 0.5), "min_size": 5}
    check_same(trace(found, regions=stored_boxes(found), **options), trace(expected, **options))


@pytest.mark.parametrize(
    ("data", "arguments", "words"),
    [
        (sparse() + np.uint8(1), {}, "every voxel is foreground"),
        (sparse(), {"label": 7}, "no voxel has the label 7; found 0, 150, 200"),
        (sparse(np.float32), {"label": 1}, "whole numbers"),
        (sparse(np.int32), {"threshold": 0.5}, "int32"),
    ],
)
def test_a_segmentation_on_disk_is_refused_as_in_memory(data, arguments, words, tmp_path):
    stored = read_volume(write_volume(tmp_path / "x.zarr", data), check=False).data
    with pytest.raises(NeurolibError, match=words):
        large.segmentation(stored, name="x.zarr", **arguments)


def chunk_files(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if "c" in p.parts and p.is_file()}


def test_the_network_is_that_of_the_checkpoint(checkpoints, image, out):
    predict_large(image, checkpoints["all"], out, TILING)
    check(out, load_checkpoint(checkpoints["all"])[0])


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("predict", ["center", "all"])
def test_regions_together_are_the_prediction_of_the_whole(predict, checkpoints, image, out):
    assert predict_large(image, checkpoints[predict], out, TILING) == out
    check(out, Placed(predict))
    found = read_volume(out)
    assert found.spacing == (2.0, 0.5, 0.5)
    assert found.data.dtype == np.float32
    assert np.ptp(found.data[:]) > 0.01
    assert sorted(p.name for p in out.parent.iterdir()) == ["in.zarr", "out.zarr"]


@pytest.mark.usefixtures("cheap")
def test_flips_skipping_and_filter_are_those_of_the_whole(checkpoints, image, out):
    options = {"flips": True, "skip_empty": True, "filter_weight": 3.0}
    predict_large(image, checkpoints["center"], out, replace(TILING, **options))
    check(out, Placed("center"), **options)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32", "float64", "int32"])
def test_a_part_is_normalised_as_in_the_whole(dtype, tmp_path, monkeypatch):
    data = (stack((9, 40, 50)) // 16).astype(dtype)
    stored = read_volume(write_volume(tmp_path / "x.zarr", data)).data
    whole = normalise(data)
    monkeypatch.setattr(volume, "SLAB", 3000)
    view = normalised(stored, *limits(stored))
    assert (view.shape, view.dtype) == (data.shape, np.float32)
    for box in (np.s_[:], np.s_[2:5, 7:40, 9:11], np.s_[8]):
        np.testing.assert_array_equal(view[box], whole[box])


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32])
def test_limits_of_what_is_stored_are_those_of_the_whole(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(volume, "SLAB", 4 * 32 * 32)
    data = sparse(dtype)
    stored = read_volume(write_volume(tmp_path / "x.zarr", data)).data
    boxes = list(stored_boxes(stored))
    assert sum(np.prod([s.stop - s.start for s in box]) for box in boxes) < data.size / 2
    assert limits(stored, boxes) == limits(data)


def test_a_mask_is_written_part_by_part(tmp_path):
    probability = np.random.default_rng(0).random((9, 40, 50)).astype(np.float32)
    mask = thresholded(probability, 0.25)
    assert mask.chunks is None  # unless its data have chunks
    found = read_volume(write_volume(tmp_path / "mask.zarr", mask)).data[:]
    np.testing.assert_array_equal(found, np.where(probability >= 0.25, 255, 0))
    assert found.dtype == np.uint8


class Stop(Exception):
    pass


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("after", [0, 1, 4])
def test_an_interrupted_call_goes_on_with_the_chunks_that_are_missing(
    after, checkpoints, image, out, monkeypatch
):
    part = out.with_name("out.zarr.part")
    predict, boxes = large.predict_box, []

    def some(*arguments):
        if len(boxes) == after:
            raise Stop
        boxes.append(arguments[2])
        return predict(*arguments)

    monkeypatch.setattr(large, "predict_box", some)
    with pytest.raises(Stop):
        predict_large(image, checkpoints["center"], out, TILING)
    assert not out.exists()
    assert len(boxes) == after
    done = chunk_files(part)
    lost = next(iter(done), None)
    if lost:
        # As if the call had been stopped between the chunks of a region, while writing one.
        lost.rename(lost.with_suffix(".0123.partial"))
        del done[lost]
    boxes.clear()
    monkeypatch.setattr(large, "predict_box", lambda *a: boxes.append(a[2]) or predict(*a))
    predict_large(image, checkpoints["center"], out, TILING)
    total = 3 * 3 * 2  # regions
    assert len(boxes) == total - after + bool(lost)
    again = chunk_files(out)
    assert len(again) == 3 * 3 * 3
    assert {out / p.relative_to(part): t for p, t in done.items()}.items() <= again.items()
    check(out, Placed("center"))
    assert not list(out.parent.rglob("*.partial"))


@pytest.mark.usefixtures("cheap")
def test_a_finished_call_is_not_repeated_and_other_settings_are_another_result(
    checkpoints, image, out, monkeypatch
):
    predict_large(image, checkpoints["center"], out, TILING)
    before = chunk_files(out)
    predict_large(image, checkpoints["center"], out, TILING)
    assert chunk_files(out) == before

    def stopped(tiling=TILING):
        with monkeypatch.context() as patch:
            patch.setattr(large, "predict_box", None)
            with pytest.raises(TypeError):
                predict_large(image, checkpoints["all"], out, tiling)

    stopped()
    assert chunk_files(out) == before
    other = replace(TILING, overlap=0.5)
    for tiling in (other, replace(TILING, flips=True), replace(TILING, skip_empty=True)):
        with pytest.raises(SettingsError, match=r"out\.zarr\.part: .*options"):
            predict_large(image, checkpoints["all"], out, tiling)
    with pytest.raises(SettingsError, match="another checkpoint;"):
        predict_large(image, checkpoints["center"], out, TILING)
    # How much is done at a time is no other result.
    with monkeypatch.context() as patch:
        patch.setattr(large, "REGION", (5, 99, 9))
        predict_large(image, checkpoints["all"], out, replace(TILING, batch=3))
    check(out, Placed("all"))
    stopped(other)
    write_volume(image, stack() + np.uint16(1))
    with pytest.raises(SettingsError, match="another input"):
        predict_large(image, checkpoints["all"], out, other)


@pytest.mark.usefixtures("cheap")
def test_no_more_is_read_than_a_region_and_its_margin(checkpoints, image, out, monkeypatch):
    monkeypatch.setattr(volume, "SLAB", 4 * 32 * 32)
    sizes, read = [], LazyStack.__getitem__

    def watched(self, key):
        part = read(self, key)
        sizes.append(part.size)
        return part

    monkeypatch.setattr(LazyStack, "__getitem__", watched)
    monkeypatch.setattr(LazyStack, "__array__", None)
    monkeypatch.setattr(large, "REGION", (4, 32, 32))
    predict_large(image, checkpoints["center"], out, replace(TILING, skip_empty=True))
    # Tiles of 48 that begin before a region of 32 or end after it, and a slice on either side.
    assert max(sizes) <= 6 * (32 + 2 * 47) ** 2
    # 27 regions, and two passes over what is stored for the statistics.
    assert len(sizes) >= 27 + 2 * len(list(stored_boxes(read_volume(image).data)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"out": "out.tif"}, ".zarr"),
        ({"workers": -1}, "workers"),
        ({"image": "no.zarr"}, "no.zarr"),
        ({"checkpoint": "no.safetensors"}, "checkpoint"),
    ],
    ids=str,
)
def test_unusable_settings_leave_nothing(change, words, checkpoints, image, tmp_path):
    paths = {"image": image, "checkpoint": checkpoints["center"], "out": "out.zarr"}
    arguments = paths | {"tiling": TILING} | change
    arguments["out"] = tmp_path / arguments["out"]
    with pytest.raises(NeurolibError, match=words) as error:
        predict_large(**arguments)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["in.zarr"]


@pytest.mark.skipif(
    not os.environ.get("NEUROLIB_FAULTS"), reason="starts a cluster; set NEUROLIB_FAULTS=1"
)
def test_a_killed_worker_loses_nothing(checkpoints, image, out, monkeypatch):
    monkeypatch.setattr(large, "REGION", (4, 32, 32))
    distributed = pytest.importorskip("distributed")
    part, killed = out.with_name("out.zarr.part"), []
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster:

        def kill():
            while len(chunk_files(part)) < 3:
                time.sleep(0.005)
            pid = next(iter(cluster.workers.values())).process.pid
            os.kill(pid, signal.SIGKILL)
            killed.append(len(chunk_files(part)))

        thread = threading.Thread(target=kill, daemon=True)
        thread.start()
        address = cluster.scheduler_address
        predict_large(image, checkpoints["center"], out, TILING, scheduler=address)
        thread.join()
    assert 3 <= killed[0] < 27
    assert len(chunk_files(out)) == 27
    check(out, load_checkpoint(checkpoints["center"])[0])


def neurons(count, length, shape, seed=0):
    """Random trees with a branch every 200 voxels or so, in steps of one voxel."""
    rng = np.random.default_rng(seed)
    xyz, parent = [], []
    for _ in range(count):
        first = len(xyz)
        xyz.append(rng.uniform(0.2, 0.8, 3) * shape[::-1])
        parent.append(-1)
        while len(xyz) < first + length:
            above = int(rng.integers(first, len(xyz)))
            way = rng.normal(size=3)
            for _ in range(int(rng.integers(100, 300))):
                way = way / np.linalg.norm(way) + rng.normal(0, 0.08, 3)
                point = xyz[above] + way / np.linalg.norm(way)
                if np.any(point < 8) or np.any(point > np.array(shape[::-1]) - 9):
                    break
                xyz.append(point)
                parent.append(above)
                above = len(xyz) - 1
    n = len(xyz)
    return Tree(np.array(xyz), np.full(n, 1.9), np.zeros(n, int), np.array(parent))


def render(path, tree, shape):
    """An OME-Zarr of tubes in a dim halo, chunk by chunk; chunks without any are not stored."""
    array = create_zarr(path, "cells", shape, np.dtype(np.uint8), (1.0, 1.0, 1.0))
    grid = np.indices((13, 13, 13)).reshape(3, -1).T - 6
    away = np.linalg.norm(grid, axis=1)
    chunks = np.array(array.chunks)
    centres = np.rint(tree.xyz[:, ::-1]).astype(int)
    near = (centres[:, None] + grid[(np.abs(grid) == 6).all(axis=1)]) // chunks
    place, row = np.unique(near.reshape(-1, 3), axis=0, return_inverse=True)
    order = np.argsort(row.ravel(), kind="stable")
    ends = np.searchsorted(row.ravel()[order], np.arange(len(place) + 1))
    for number, corner in enumerate(place * chunks):
        part = np.zeros(chunks, np.uint8)
        for radius, value in ((6, 40), (1.9, 200)):
            balls = centres[np.unique(order[ends[number] : ends[number + 1]] // 8)] - corner
            voxels = (balls[:, None] + grid[away <= radius]).reshape(-1, 3)
            part[tuple(voxels[((voxels >= 0) & (voxels < chunks)).all(axis=1)].T)] = value
        stop = np.minimum(corner + chunks, shape)
        array[tuple(map(slice, corner, stop))] = part[tuple(map(slice, stop - corner))]


# A stand-in for a trained network: passes the intensity of the centre slice.
SEGMENT = """
import json, resource, sys
from types import SimpleNamespace
import torch
from neurolib import training
from neurolib.course import cli, large

class Passes(torch.nn.Module):
    settings = SimpleNamespace(depth=5, block=100, predict="center")
    def forward(self, blocks):
        return 20 * (blocks[:, 0, 2:3] - 0.5)

large._network = lambda checkpoint, digest: Passes()
training.load_checkpoint = lambda checkpoint: (Passes(), {"threshold": 0.5})
status = 0
try:
    cli.main()
except SystemExit as end:
    status = end.code or 0
print(json.dumps([status, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""


@pytest.mark.skipif(
    not os.environ.get("NEUROLIB_FAULTS"), reason="takes minutes; set NEUROLIB_FAULTS=1"
)
def test_a_volume_larger_than_memory_becomes_a_tree(tmp_path, monkeypatch):
    monkeypatch.undo()  # chunks as users have them
    shape = (2000, 2048, 2048)  # 8.4 GB, and 33.6 GB of probability
    tree = neurons(8, 10_000, shape)
    image, probability, out = (tmp_path / name for name in ("in.zarr", "p.zarr", "out.swc"))
    render(image, tree, shape)
    checkpoint = tmp_path / "any.safetensors"
    checkpoint.write_bytes(b"")

    def call(*arguments):
        command = [sys.executable, "-c", SEGMENT, *map(str, arguments)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return json.loads(said.splitlines()[-1])

    arguments = ["--checkpoint", checkpoint, "--probability", probability, "--out", out]
    status, memory = call("segment", image, *arguments)
    assert status == 0
    assert memory < 3 * 2**30
    score = tree_scores(read_swc(out), tree)
    assert min(score.precision, score.recall) > 0.95
    status, memory = call("trace", probability, "--out", tmp_path / "again.swc", "--min-size", 200)
    assert status == 0
    assert memory < 2 * 2**30
    again = read_swc(tmp_path / "again.swc")
    np.testing.assert_array_equal(again.xyz, read_swc(out).xyz)
