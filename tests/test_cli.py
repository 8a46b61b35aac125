"""The command line on bad input: one line, exit status 2, and nothing left over."""

import sys
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import tifffile

from neurolib import cli
from neurolib.network import NetworkSettings, Segmenter
from neurolib.swc import Tree, read_swc, write_swc
from neurolib.training import save_checkpoint
from neurolib.volume import read_volume, write_volume

SWC = "1 3 10 10 4 1 -1\n2 3 20 12 4 1 1\n3 3 30 14 5 1 2\n"
SHAPE = (8, 32, 48)


def call(*arguments: object) -> int:
    """Exit status of ``neurolib ARGUMENTS``, in this process."""
    before = sys.argv
    sys.argv = ["neurolib", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code or 0
    finally:
        sys.argv = before


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, SHAPE, dtype=np.uint8)


@pytest.fixture
def pairs(tmp_path):
    """A folder of three good pairs."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for i in range(3):
        tifffile.imwrite(folder / f"cell{i}.tif", image(i))
        (folder / f"cell{i}.swc").write_text(SWC)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of a small network without training: enough to get past reading it."""
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.safetensors"
    network = Segmenter(NetworkSettings(encoder="vit_tiny_patch16_224", size=112))
    facts = {"threshold": 0.5, "tau": 0.1, "dice": 0.0, "step": 1}
    save_checkpoint(path, network, network.state_dict(), facts | {"training": {"frozen": False}})
    return path


def with_value(value: float) -> np.ndarray:
    volume = image().astype(np.float32)
    volume[0, 0, 0] = value
    return volume


def truncated(path) -> None:
    tifffile.imwrite(path, image())
    path.write_bytes(path.read_bytes()[:2000])


BAD_IMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not an image"),
    "truncated": truncated,
    "2D": lambda path: tifffile.imwrite(path, image()[0]),
    "RGB": lambda path: tifffile.imwrite(path, np.stack([image()[0]] * 3, -1), photometric="rgb"),
    "NaN": lambda path: tifffile.imwrite(path, with_value(np.nan)),
    "constant": lambda path: tifffile.imwrite(path, np.full(SHAPE, 7, np.uint8)),
}
BAD_TREES = {
    "columns": "1 3 10 10\n",
    "cycle": "1 3 10 10 4 1 2\n2 3 20 12 4 1 1\n",
    "no root": "1 3 10 10 4 1 2\n2 3 20 12 4 1 3\n3 3 30 14 5 1 1\n",
    "empty": "# nothing\n",
    "outside the image": "1 3 900 900 400 1 -1\n2 3 910 900 400 1 1\n",
}


def one_line(capsys, *words: str) -> None:
    error = capsys.readouterr().err
    assert error.startswith("neurolib: ")
    assert error.count("\n") == 1, error
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--profile", "smoke", "-p", "setps=3"],
        ["run", "--profile", "smoke", "-p", "steps"],
        ["run", "--data", "no_such_folder"],
        ["fetch", "no_such_model"],
    ],
)
def test_what_is_not_there_is_one_line(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == 2
    one_line(capsys)
    assert not list(tmp_path.rglob("*.ipynb"))


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_run_refuses_bad_images(kind, pairs, tmp_path, capsys):
    (pairs / "cell1.tif").unlink()
    BAD_IMAGES[kind](pairs / "cell1.tif")
    assert call("run", "--data", pairs, "--folder", tmp_path / "runs") == 2
    one_line(capsys, "cell1.tif")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kind", BAD_TREES)
def test_run_refuses_bad_trees(kind, pairs, tmp_path, capsys):
    (pairs / "cell1.swc").write_text(BAD_TREES[kind])
    assert call("run", "--data", pairs, "--folder", tmp_path / "runs") == 2
    one_line(capsys, "cell1")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--data", "no/such/folder"], "no/such/folder"),
        (["--profile", "no_such_profile"], "no_such_profile"),
        (["-p", "stepz=3"], "did you mean 'steps'"),
        (["-p", "steps=many"], "expected int"),
        (["-p", "steps"], "key=value"),
        (["-p", "encoder=5"], "encoder='5': timm has no such model"),
        (["-p", "steps=1.5"], "expected int"),
        (["-p", "stem=2"], "expected bool"),
        (["-p", "steps=0"], "steps=0: expected at least 1"),
        (["-p", "overlap=2"], "overlap=2.0: expected at least 0 and at most 0.9"),
        (["-p", "overlap=nan"], "overlap=nan"),
        (["-p", "every=0"], "every=0: expected at least 1"),
        (["-p", "every=2", "-p", "predict=all"], "every=2"),
        (["-p", "depth=4"], "depth=4: expected an odd number"),
        (["-p", "size=3"], "size=3"),
        (["-p", "encoder_rate=-1e-4"], "encoder_rate=-0.0001: expected more than 0"),
        (["-p", "layer_decay=inf"], "layer_decay=inf"),
        (["-p", "bridge=inf"], "bridge=inf"),
        (["-p", "tau=0"], "tau=0.0"),
        (["-p", "min_size=0"], "min_size=0"),
        (["-p", "seed=-1"], "seed=-1"),
        (["-p", "loss=luck"], "loss='luck'"),
        (["-p", "predict=none"], "predict='none'"),
        (["-p", "initialisation=centre"], "initialisation='centre'"),
        (["-p", "target=tube"], "target='tube'"),
        (["-p", "device=gpu9"], "device='gpu9'"),
        (["-p", "precision=64-false"], "precision='64-false'"),
        (["-p", "weights_file=no.pth"], "weights_file=no.pth: no such file"),
        (["-p", "held_out=*x"], "no neuron '*x'"),
        (["-p", "data=x"], "--data"),
        (["-p", "run_dir=x"], "--folder"),
    ],
)
def test_run_refuses_bad_settings(arguments, word, pairs, tmp_path, capsys):
    if "held_out" in str(arguments):
        arguments = [*arguments, "--data", pairs]
    assert call("run", "--folder", tmp_path / "runs", *arguments) == 2
    one_line(capsys, word)
    assert not (tmp_path / "runs").exists()


def test_profile_with_a_misspelt_key(tmp_path, capsys):
    profile = tmp_path / "mine.yaml"
    profile.write_text("bach: 3\n")
    assert call("run", "--profile", profile, "--folder", tmp_path / "runs") == 2
    one_line(capsys, "'bach'", "'batch'")


def test_too_few_neurons_are_refused(pairs, tmp_path, capsys):
    for i in (1, 2):
        (pairs / f"cell{i}.swc").unlink()
    status = call("run", "--data", pairs, "--folder", tmp_path / "runs", "-p", "steps=1")
    assert status == 2
    one_line(capsys, "1 neurons cannot be split")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_segment_refuses_bad_images(kind, checkpoint, tmp_path, capsys):
    path, out = tmp_path / "scan.tif", tmp_path / "scan.swc"
    BAD_IMAGES[kind](path)
    assert call("segment", path, "--checkpoint", checkpoint, "--out", out) == 2
    one_line(capsys, "scan.tif")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scan.tif"]


def test_segment_refuses_missing_and_foreign_files(checkpoint, tmp_path, capsys):
    path = tmp_path / "scan.tif"
    tifffile.imwrite(path, image())
    out = tmp_path / "scan.swc"
    assert call("segment", tmp_path / "no.tif", "--checkpoint", checkpoint, "--out", out) == 2
    one_line(capsys, "no.tif")
    assert call("segment", path, "--checkpoint", tmp_path / "no.safetensors", "--out", out) == 2
    one_line(capsys, "no such checkpoint")
    assert call("segment", path, "--checkpoint", path, "--out", out) == 2
    one_line(capsys, "scan.tif")
    assert call("segment", path, "--checkpoint", checkpoint, "--out", tmp_path / "x.txt") == 2
    one_line(capsys, ".swc")
    assert call("segment", path, "--checkpoint", checkpoint, "--out", path / "x.swc") == 2
    one_line(capsys, "x.swc")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scan.tif"]


def test_segment_with_nothing_above_the_threshold(checkpoint, tmp_path, capsys):
    path, out = tmp_path / "scan.tif", tmp_path / "scan.swc"
    tifffile.imwrite(path, image())
    arguments = ["--checkpoint", checkpoint, "--out", out, "--threshold", "0.999"]
    assert call("segment", path, *arguments) == 2
    assert "threshold" in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()


def test_segment_writes_a_valid_tree(checkpoint, tmp_path, capsys):
    path, out, mask = tmp_path / "scan.tif", tmp_path / "scan.swc", tmp_path / "mask.tif"
    tifffile.imwrite(path, image())
    # An untrained network is unsure everywhere: a low threshold takes the whole volume.
    arguments = ["--checkpoint", checkpoint, "--out", out, "--mask", mask]
    assert call("segment", path, *arguments, "--threshold", "0.0001") == 0
    tree = read_swc(out)
    assert not tree.repairs
    assert (tree.parent < np.arange(len(tree.parent))).all()
    assert tifffile.imread(mask).shape == SHAPE
    assert str(out) in capsys.readouterr().out


BAR = np.zeros((9, 24, 48), np.uint8)
BAR[3:6, 9:12, 4:44] = 1


def put(path, data, **options):
    tifffile.imwrite(path, data, **options)
    return path


@pytest.mark.parametrize(
    ("data", "arguments"),
    [
        (BAR, []),
        (BAR * 255, []),
        (BAR > 0, []),
        (BAR * np.arange(48, dtype=np.uint16), []),  # labels, one per column
        (BAR + 1, ["--label", "2"]),  # as ilastik writes them
        (BAR * 150 + 20, ["--threshold", "0.5"]),
        (BAR * np.float32(0.7), ["--threshold", "0.6"]),
        (BAR * np.float32(0.7) + np.float32(0.1), []),
    ],
)
def test_trace_takes_what_segmentations_come_as(data, arguments, tmp_path, capsys):
    path, out = put(tmp_path / "cell.tif", data), tmp_path / "new" / "cell.swc"
    assert call("trace", path, "--out", out, *arguments, "--seed", "4,10,4") == 0
    tree = read_swc(out)
    assert not tree.repairs
    assert np.abs(tree.xyz[:, 1:] - [10, 4]).max() < 1
    assert np.ptp(tree.xyz[:, 0]) > 34
    assert tree.xyz[0, 0] < 8
    said = capsys.readouterr().out
    assert str(out) in said
    assert "cell.tif: " in said
    # From OME-Zarr it is read part by part, and is the same.
    path, again = write_volume(tmp_path / "cell.zarr", data), tmp_path / "again.swc"
    assert call("trace", path, "--out", again, *arguments, "--seed", "4,10,4") == 0
    words, *_ = said.splitlines()
    assert capsys.readouterr().out.startswith(words.replace("cell.tif", "cell.zarr"))
    np.testing.assert_array_equal(read_swc(again).xyz, tree.xyz)


def test_trace_says_how_it_read_labels(tmp_path, capsys):
    path = put(tmp_path / "cell.tif", BAR * np.arange(48, dtype=np.uint16))
    assert call("trace", path, "--out", tmp_path / "cell.swc") == 0
    assert "40 labels, all but 0 taken as foreground" in capsys.readouterr().out


def test_trace_takes_the_spacing_of_the_file_or_the_one_given(tmp_path):
    data, radius = np.zeros((8, 30, 60), np.uint8), []
    data[3:5, 12:18, 5:50] = 255
    options = {"imagej": True, "metadata": {"axes": "ZYX", "spacing": 3.0, "unit": "micron"}}
    path, out = put(tmp_path / "cell.tif", data, resolution=(1, 1), **options), tmp_path / "a.swc"
    for spacing in ([], ["--spacing", "3,1,1"], ["--spacing", "1,1,1"]):
        assert call("trace", path, "--out", out, *spacing) == 0
        radius.append(np.median(read_swc(out).radius))
    assert radius[0] == radius[1] > 1.5 * radius[2]


def test_trace_of_one_slice_and_of_one_voxel(tmp_path, capsys):
    out = tmp_path / "cell.swc"
    np.save(tmp_path / "slice.npy", BAR[4:5])
    assert call("trace", tmp_path / "slice.npy", "--out", out) == 2
    one_line(capsys, "a single slice is not a volume")
    voxel = np.zeros((3, 4, 5), np.uint8)
    voxel[1, 2, 3] = 9
    path = put(tmp_path / "voxel.tif", voxel, photometric="minisblack")
    assert call("trace", path, "--out", out, "--min-size", "1") == 0
    assert read_swc(out).xyz.tolist() == [[3, 2, 1]]


@pytest.mark.parametrize(
    ("data", "arguments", "word"),
    [
        (0 * BAR, [], "nothing to trace"),
        (0 * BAR + 1, [], "every voxel is foreground"),
        (0 * BAR + np.float32(0.2), [], "lower the threshold"),
        (BAR * np.float32(np.nan), [], "nan"),
        (BAR * np.float32(1.5), [], "[0, 1]"),
        (BAR * np.float32(-1), [], "[0, 1]"),
        (BAR, ["--label", "3"], "no voxel has the label 3"),
        (BAR, ["--label", "1", "--threshold", "0.5"], "give one"),
        (BAR, ["--threshold", "0.5"], "0 voxels reach the threshold"),
        (BAR * 255, ["--threshold", "128"], "threshold must lie in (0, 1]"),
        (BAR, ["--seed", "48,3,3"], "(x, y, z)"),
        (BAR, ["--seed", "nan,3,3"], "seed=nan,3,3"),
        (BAR, ["--seed", "3,3"], "three numbers"),
        (BAR, ["--spacing", "0,1,1"], "three positive numbers"),
        (BAR, ["--spacing", "wide"], "three numbers"),
        (BAR, ["--min-size", "500"], "lower the threshold or min_size"),
        (BAR, ["--bridge", "-1"], "bridge"),
        (BAR, ["--tracer", "best"], "kimimaro"),
        (BAR, ["--vaa3d", "vaa3d"], "--tracer app2"),
        (BAR, ["--tracer", "app2", "--vaa3d", "no/such"], "no/such"),
        (BAR, ["--channel", "1"], "channel"),
    ],
)
def test_trace_refuses_in_one_line(data, arguments, word, tmp_path, capsys):
    path = put(tmp_path / "cell.tif", data)
    assert call("trace", path, "--out", tmp_path / "cell.swc", *arguments) == 2
    one_line(capsys, word)
    assert [p.name for p in tmp_path.iterdir()] == ["cell.tif"]


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "2D", "RGB", "NaN"])
def test_trace_refuses_bad_images(kind, tmp_path, capsys):
    BAD_IMAGES[kind](tmp_path / "cell.tif")
    assert call("trace", tmp_path / "cell.tif", "--out", tmp_path / "cell.swc") == 2
    one_line(capsys, "cell.tif")
    assert call("trace", tmp_path / "no.tif", "--out", tmp_path / "cell.swc") == 2
    one_line(capsys, "no.tif")
    assert call("trace", tmp_path / "cell.tif", "--out", tmp_path / "cell.txt") == 2
    one_line(capsys, ".swc")


def test_segment_writes_ome_zarr_and_no_tree_where_none_is_asked_for(checkpoint, tmp_path, capsys):
    path, mask, prob = (tmp_path / name for name in ("scan.tif", "mask.zarr", "p.zarr"))
    tifffile.imwrite(path, image(), imagej=True, metadata={"axes": "ZYX", "spacing": 2.0})
    arguments = ["--checkpoint", checkpoint, "--mask", mask, "--probability", prob, "--flips"]
    assert call("segment", path, *arguments, "--threshold", "0.5") == 0
    found, binary = read_volume(prob, check=False), read_volume(mask, check=False)
    assert found.spacing == binary.spacing == (2.0, 1.0, 1.0)
    np.testing.assert_array_equal(binary.data[:], (found.data[:] >= 0.5) * 255)
    # From OME-Zarr it goes part by part, to the same; a folder of another kind is never replaced.
    again = tmp_path / "again.zarr"
    source = write_volume(tmp_path / "scan.zarr", image(), (2.0, 1.0, 1.0))
    arguments = ["--checkpoint", checkpoint, "--probability"]
    swc, traced = tmp_path / "again.swc", tmp_path / "traced.swc"
    options = ["--checkpoint", checkpoint, "--flips", "--threshold", "0.0001"]
    assert call("segment", source, *options, "--out", again, "--swc", swc) == 0
    assert call("trace", prob, "--threshold", "0.0001", "--out", traced) == 0
    assert read_swc(swc).radius.max() == pytest.approx(read_swc(traced).radius.max(), abs=0.2)
    np.testing.assert_allclose(read_volume(again).data[:], found.data[:], atol=1e-5)
    (tmp_path / "mine.zarr").mkdir()
    capsys.readouterr()
    assert call("segment", path, *arguments, tmp_path / "mine.zarr") == 2
    one_line(capsys, "mine.zarr")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to write"),
        (["--probability", "p.nrrd"], ".tif or .zarr"),
        (["--mask", "m.npy"], ".tif or .zarr"),
        (["--out", "x.swc", "--workers", "2"], "--probability NAME.zarr"),
        (["--out", "x.swc", "--swc", "y.swc"], "give one of them"),
        (["--out", "x.zarr", "--probability", "p.zarr"], "give one of them"),
        (["--mask", "m.tif", "--scheduler", "tcp://x:1"], "--probability NAME.zarr"),
    ],
)
def test_segment_refuses_outputs_that_do_not_fit(arguments, words, checkpoint, tmp_path, capsys):
    path = tmp_path / "scan.tif"
    tifffile.imwrite(path, image())
    assert call("segment", path, "--checkpoint", checkpoint, *arguments) == 2
    one_line(capsys, words)


def test_segment_refuses_what_does_not_fit_in_memory(checkpoint, tmp_path, capsys, monkeypatch):
    free = SimpleNamespace(available=8 * image().size - 1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    path = tmp_path / "scan.tif"
    tifffile.imwrite(path, image())
    assert call("segment", path, "--checkpoint", checkpoint, "--out", tmp_path / "x.swc") == 2
    one_line(capsys, "scan.tif", "--probability NAME.zarr")


def test_help_names_every_command(capsys):
    assert call("--help") == 0
    text = capsys.readouterr().out
    for command in ("run", "segment", "trace", "sweep", "fetch", "doctor"):
        assert command in text


def test_write_swc_of_a_cycle_leaves_nothing(tmp_path):
    tree = Tree(np.zeros((2, 3)), np.ones(2), np.ones(2, int), np.array([1, 0]))
    with pytest.raises(ValueError, match=r"ancestor|cycle"):
        write_swc(tmp_path / "x.swc", tree)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [(), ("--spacing", "0.3,0.1,0.1")])
def test_a_spacing_that_is_not_known_is_said_and_not_made_up(tmp_path, capsys, given):
    """By `inspect` and `trace`, unless it is given; the tree is that of the spacing."""
    data = np.zeros((12, 40, 50), np.uint8)
    data[4:7, 15:18, 4:46] = 255
    metadata = {"axes": "ZYX", "PhysicalSizeX": 0.1, "PhysicalSizeY": 0.1}
    tifffile.imwrite(tmp_path / "a.ome.tif", data, ome=True, metadata=metadata)
    assert call("inspect", tmp_path / "a.ome.tif", *given) == 0
    assert ("not known" in capsys.readouterr().out) == (not given)
    assert call("trace", tmp_path / "a.ome.tif", "--out", tmp_path / "a.swc", *given) == 0
    said = capsys.readouterr().out
    assert said.count("spacing not known") == (not given)
    assert given or "PhysicalSizeZ missing" in said
