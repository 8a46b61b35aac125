"""The command line on bad input: one line, exit status 2, and nothing left over."""

import hashlib
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import faults
import numpy as np
import psutil
import pytest
import tifffile
from faults import command as call
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from test_formats import ome_images, ome_set

import neurolib
from neurolib import __version__
from neurolib.blocking import read_sample
from neurolib.course import cli
from neurolib.data.datasets import load_dataset
from neurolib.errors import DataError, NeurolibWarning, SettingsError, VolumeError
from neurolib.evaluation import dice, drop_small
from neurolib.files import check_outputs
from neurolib.inference import predict_volume
from neurolib.segmentation import choose_size
from neurolib.swc import length as swc_length
from neurolib.swc import read_swc
from neurolib.training import check_unseen, load_checkpoint, save_checkpoint
from neurolib.volume import Volume, read_volume, write_volume

SWC = "1 3 10 10 4 1 -1\n2 3 20 12 4 1 1\n3 3 30 14 5 1 2\n"
SHAPE = (8, 32, 48)
# An untrained network is unsure everywhere: a low threshold takes the whole volume.
ALL = ("--threshold", "0.0001")


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, SHAPE, dtype=np.uint8)


def put(path, data, **options):
    tifffile.imwrite(path, data, **options)
    return path


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
    return faults.checkpoint(tmp_path_factory.mktemp("checkpoint") / "checkpoint.safetensors")


@pytest.fixture(scope="module")
def segment(checkpoint):
    return ["segment", "--checkpoint", checkpoint]


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
    "no nodes": "# nothing\n",
    "outside the image": "1 3 900 900 400 1 -1\n2 3 910 900 400 1 1\n",
}


@pytest.fixture
def refused(capsys):
    """Calls a command that must end with status 2 and one line, which has the words."""

    def refused(*arguments, says=()):
        capsys.readouterr()
        assert call(*arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("neurolib: ")
        assert error.count("\n") == 1, error
        for word in [says] if isinstance(says, str) else says:
            assert word in error

    return refused


@pytest.mark.parametrize("kind", [*BAD_IMAGES, *BAD_TREES])
def test_run_refuses_bad_images_and_trees(kind, pairs, tmp_path, refused):
    if kind in BAD_IMAGES:
        BAD_IMAGES[kind](pairs / "cell1.tif")
    else:
        (pairs / "cell1.swc").write_text(BAD_TREES[kind])
    arguments = ["--data", pairs, "--folder", tmp_path / "runs", "--ignore-frames"]
    refused("run", *arguments, says="cell1.tif" if kind in BAD_IMAGES else "cell1")
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
        (["-p", "min_size=-1"], "min_size=-1"),
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
def test_run_refuses_bad_settings(arguments, word, pairs, tmp_path, refused):
    if "held_out" in str(arguments):
        arguments = [*arguments, "--data", pairs]
    refused("run", "--folder", tmp_path / "runs", *arguments, says=word)
    assert not (tmp_path / "runs").exists()


def test_profile_with_a_misspelt_key(tmp_path, refused):
    profile = tmp_path / "mine.yaml"
    profile.write_text("bach: 3\n")
    refused("run", "--profile", profile, "--folder", tmp_path / "runs", says=("'bach'", "'batch'"))


def test_too_few_neurons_are_refused(pairs, tmp_path, refused):
    for i in (1, 2):
        (pairs / f"cell{i}.swc").unlink()
    arguments = ("--data", pairs, "--folder", tmp_path / "runs", "-p", "steps=1")
    refused("run", *arguments, says="1 neurons cannot be split")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["segment", "trace"])
@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_images_are_refused(kind, command, segment, tmp_path, refused):
    start = segment if command == "segment" else ["trace"]
    BAD_IMAGES[kind](tmp_path / "scan.tif")
    says = "scan.tif" if command == "segment" or kind != "constant" else "foreground"
    refused(*start, tmp_path / "scan.tif", "--out", tmp_path / "scan.swc", says=says)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scan.tif"]


def test_missing_and_foreign_files_are_refused(segment, tmp_path, refused):
    path, out = put(tmp_path / "scan.tif", image()), tmp_path / "scan.swc"
    for start in (segment, ["trace"]):
        refused(*start, tmp_path / "no.tif", "--out", out, says="no.tif")
        refused(*start, path, "--out", tmp_path / "x.txt", says=".swc")
        refused(*start, path, "--out", path / "x.swc", says="x.swc")
    for missing in (tmp_path / "no.safetensors", tmp_path):
        refused("segment", path, "--checkpoint", missing, "--out", out, says="no such checkpoint")
    refused("segment", path, "--checkpoint", path, "--out", out, says="scan.tif")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scan.tif"]


def test_segment_with_nothing_above_the_threshold(tmp_path, capsys, segment):
    path, out = put(tmp_path / "scan.tif", image()), tmp_path / "scan.swc"
    assert call(*segment, path, "--out", out, "--threshold", "0.999") == 2
    assert "threshold" in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()


def test_segment_writes_a_valid_tree(checkpoint, tmp_path, capsys):
    path, out, mask = put(tmp_path / "scan.tif", image()), tmp_path / "a.swc", tmp_path / "mask.tif"
    # The folder of a run stands for its checkpoint.
    arguments = ["--checkpoint", checkpoint.parent, "--out", out, "--mask", mask]
    assert call("segment", path, *arguments, *ALL) == 0
    tree = read_swc(out)
    assert not tree.repairs
    assert (tree.parent < np.arange(len(tree.parent))).all()
    assert tifffile.imread(mask).shape == SHAPE
    assert str(out) in capsys.readouterr().out


def test_the_mask_loses_the_pieces_that_the_tree_loses(tmp_path, capsys, segment):
    path, mask, probability = (tmp_path / name for name in ("scan.tif", "mask.tif", "p.tif"))
    put(path, image())
    outputs = ["--mask", mask, "--probability", probability]
    assert call(*segment, path, "--probability", probability) == 0
    cut = float(np.quantile(tifffile.imread(probability), 0.97))
    label, count = ndimage.label(tifffile.imread(probability) >= cut, np.ones((3, 3, 3)))
    sizes = np.bincount(label.ravel())[1:]
    size = int(sizes.max())
    assert count > 1
    assert call(*segment, path, "--threshold", repr(cut), "--min-size", size, *outputs) == 0
    wanted = np.isin(label, 1 + np.flatnonzero(sizes >= size))
    np.testing.assert_array_equal(tifffile.imread(mask) > 0, wanted)
    assert f"in pieces of at least {size}" in capsys.readouterr().out


def test_a_small_stack_keeps_pieces_that_a_large_one_loses(checkpoint, tmp_path):
    path, mine, mask = (tmp_path / n for n in ("scan.tif", "mine.safetensors", "mask.tif"))
    inverse = np.full(SHAPE, 255, np.uint8)
    inverse[:, 14:17, 2:46] = 0
    tifffile.imwrite(path, inverse)
    network, facts = load_checkpoint(checkpoint)
    facts |= {"threshold": 0.0001, "min_size": 10**6}
    save_checkpoint(mine, network, network.state_dict(), facts)
    arguments = ["segment", path, "--checkpoint", mine, "--mask", mask]
    with pytest.warns(NeurolibWarning) as told:
        assert call(*arguments) == 0
    assert tifffile.imread(mask).all()
    dark, small = (str(warning.message) for warning in told)
    assert dark.startswith("scan.tif: dark structures on a bright background")
    assert "Edit > Invert" in dark
    assert "image.max() - image" in dark
    assert small == "scan.tif: no piece has 1000000 voxels; those of at least 200 are kept"
    with pytest.warns(NeurolibWarning, match="dark"):
        assert call(*arguments, "--min-size", 10**6) == 0
    assert not tifffile.imread(mask).any()


@pytest.mark.parametrize(
    ("spacing", "voxels", "least"),
    [((1, 1, 1), 900, 800), ((1, 0.25, 0.25), 250, 200), ((0.25, 0.5, 0.5), 250, 200)],
)
def test_the_smallest_piece_of_a_checkpoint_is_a_volume(spacing, voxels, least, recwarn):
    probability = np.zeros((1, 30, 30))
    probability.flat[:voxels] = 1
    stack = Volume(probability, spacing)
    assert choose_size({"min_size": 800}, stack, 0.5, "cell.tif") == least
    assert not recwarn.list
    with pytest.warns(NeurolibWarning, match=rf"no piece has {1000 * least}"):
        assert choose_size({"min_size": 800_000}, stack, 0.5, "cell.tif") == least // 4


def test_calibrate_chooses_the_cut_that_is_best_on_the_pairs(
    checkpoint, pairs, tmp_path, capsys, refused
):
    out = tmp_path / "mine.safetensors"
    noise = "--ignore-frames"  # the images of these pairs are noise
    assert call("calibrate", pairs, "--checkpoint", checkpoint, "--out", out, noise) == 0
    told = capsys.readouterr().out
    network, facts = load_checkpoint(out)
    samples = [read_sample(pair) for pair in load_dataset(pairs)]
    probabilities = [predict_volume(network, sample.image, progress=False) for sample in samples]

    def mean(cut: float, size: int = 1) -> float:
        masks = [drop_small(probability >= cut, size) for probability in probabilities]
        return np.mean([dice(mask, s.mask) for mask, s in zip(masks, samples, strict=True)])

    best = mean(facts["threshold"], facts["min_size"])
    assert all(mean(cut) <= best for cut in np.arange(1, 100) / 100)
    assert f"mean Dice {best:.3f} on cell0, cell1, cell2" in told
    assert ("end of its range" in told) == (facts["threshold"] in (0.01, 0.99))
    with pytest.raises(DataError, match="cell1"):
        check_unseen(facts, samples[1:], out)
    assert load_checkpoint(checkpoint)[1].get("seen", {}) == {}
    refused("calibrate", tmp_path / "none", "--out", tmp_path / "x.safetensors", says="none")
    for option, value, said in (("--spacing", "1,2", "spacing"), ("--channel", 5, "channel 5")):
        given = (option, value, "--out", tmp_path / "x.safetensors")
        refused("calibrate", pairs, "--checkpoint", checkpoint, *given, says=said)
    assert not (tmp_path / "x.safetensors").exists()


BAR = np.zeros((9, 24, 48), np.uint8)
BAR[3:6, 9:12, 4:44] = 1


@pytest.mark.parametrize(
    ("data", "arguments", "meaning"),
    [
        (BAR, [], "a mask"),
        (BAR * 255, [], "a mask"),
        (BAR > 0, [], "a mask"),
        # Labels, one per column; then as ilastik writes them.
        (BAR * np.arange(48, dtype=np.uint16), [], "40 labels, all but 0 taken as foreground"),
        (BAR + 1, ["--label", "2"], "label 2 of 1, 2"),
        (BAR * 150 + 20, ["--threshold", "0.5"], "a probability, 255 being 1"),
        (BAR * np.float32(0.7), ["--threshold", "0.6"], "a probability"),
        (BAR * np.float32(0.7) + np.float32(0.1), [], "a probability"),
    ],
)
def test_trace_reads_all_kinds_of_segmentations(data, arguments, meaning, tmp_path, capsys):
    path, out = put(tmp_path / "cell.tif", data), tmp_path / "new" / "cell.swc"
    assert call("trace", path, "--out", out, *arguments, "--seed", "4,10,4") == 0
    tree = read_swc(out)
    assert not tree.repairs
    assert np.abs(tree.xyz[:, 1:] - [10, 4]).max() < 1
    assert np.ptp(tree.xyz[:, 0]) > 34
    assert tree.xyz[0, 0] < 8
    said = capsys.readouterr().out
    assert str(out) in said
    assert f"cell.tif: {meaning}" in said.splitlines()
    # Reading OME-Zarr part by part gives the same.
    path, again = write_volume(tmp_path / "cell.zarr", data), tmp_path / "again.swc"
    assert call("trace", path, "--out", again, *arguments, "--seed", "4,10,4") == 0
    assert f"cell.zarr: {meaning}" in capsys.readouterr().out.splitlines()
    np.testing.assert_array_equal(read_swc(again).xyz, tree.xyz)


def test_trace_takes_the_spacing_of_the_file_or_the_one_given(tmp_path):
    data, radius = np.zeros((8, 30, 60), np.uint8), []
    data[3:5, 12:18, 5:50] = 255
    options = {"imagej": True, "metadata": {"axes": "ZYX", "spacing": 3.0, "unit": "micron"}}
    path, out = put(tmp_path / "cell.tif", data, resolution=(1, 1), **options), tmp_path / "a.swc"
    for spacing in ([], ["--spacing", "3,1,1"], ["--spacing", "1,1,1"]):
        assert call("trace", path, "--out", out, *spacing) == 0
        radius.append(np.median(read_swc(out).radius))
    assert radius[0] == radius[1] > 1.5 * radius[2]


def test_bridges_are_counted(tmp_path, capsys):
    cut = BAR.copy()
    cut[:, :, 20:26] = 0
    for data, told in ((BAR, "0 gaps"), (cut, "1 gap")):
        path, out = put(tmp_path / "cell.tif", data), tmp_path / f"{told}.swc"
        assert call("trace", path, "--out", out) == 0
        assert f" 1 tree, {told} bridged; " in capsys.readouterr().out
        assert f"# gaps bridged: {told[0]}\n" in out.read_text()


def test_trace_of_one_slice_and_of_one_voxel(tmp_path, refused):
    out = tmp_path / "cell.swc"
    np.save(tmp_path / "slice.npy", BAR[4:5])
    refused("trace", tmp_path / "slice.npy", "--out", out, says="a single slice is not a volume")
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
        (BAR * 255, ["--threshold", "128"], "--threshold 128.0: expected more than 0"),
        (BAR, ["--seed", "48,3,3"], "(x, y, z)"),
        (BAR, ["--seed", "nan,3,3"], "--seed nan,3,3"),
        (BAR, ["--seed", "3,3"], "three numbers"),
        (BAR, ["--spacing", "0,1,1"], "three positive numbers"),
        (BAR, ["--spacing", "1e-300,1,1"], "cell.tif: spacing is (1e-300, 1.0, 1.0)"),
        (BAR, ["--spacing", "wide"], "three positive numbers"),
        (BAR, ["--min-size", "500"], "lower the threshold or min_size"),
        (BAR, ["--bridge", "-1"], "--bridge -1.0: expected at least 0"),
        (BAR, ["--channel", "1"], "channel"),
    ],
)
def test_trace_refuses_in_one_line(data, arguments, word, tmp_path, refused):
    path = put(tmp_path / "cell.tif", data)
    refused("trace", path, "--out", tmp_path / "cell.swc", *arguments, says=word)
    assert [p.name for p in tmp_path.iterdir()] == ["cell.tif"]


def test_segment_writes_ome_zarr_and_no_tree_where_none_is_asked_for(tmp_path, refused, segment):
    path, mask, prob = (tmp_path / name for name in ("scan.tif", "mask.zarr", "p.zarr"))
    tifffile.imwrite(path, image(), imagej=True, metadata={"axes": "ZYX", "spacing": 2.0})
    arguments = ["--mask", mask, "--probability", prob, "--flips", "--threshold", "0.5"]
    assert call(*segment, path, *arguments) == 0
    predicted, binary = read_volume(prob, check=False), read_volume(mask, check=False)
    assert predicted.spacing == binary.spacing == (2.0, 1.0, 1.0)
    np.testing.assert_array_equal(binary.data[:], (predicted.data[:] >= 0.5) * 255)
    # OME-Zarr goes part by part, with the same result; other folders are never replaced.
    again = tmp_path / "again.zarr"
    source = write_volume(tmp_path / "scan.zarr", image(), (2.0, 1.0, 1.0))
    given = tmp_path / "given.zarr"
    assert call(*segment, source, "--probability", given, "--spacing", "3,0.5,0.5") == 0
    stored = read_volume(given, check=False)
    assert (stored.spacing, stored.unknown) == ((3.0, 0.5, 0.5), "")
    swc, traced = tmp_path / "again.swc", tmp_path / "traced.swc"
    assert call(*segment, source, "--flips", *ALL, "--out", again, "--swc", swc) == 0
    assert call("trace", prob, *ALL, "--out", traced) == 0
    assert read_swc(swc).radius.max() == pytest.approx(read_swc(traced).radius.max(), abs=0.2)
    np.testing.assert_allclose(read_volume(again).data[:], predicted.data[:], atol=1e-5)
    (tmp_path / "mine.zarr").mkdir()
    refused(*segment, path, "--probability", tmp_path / "mine.zarr", says="mine.zarr")


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
        *(
            (["--mask", "m.tif", f"--{option}", value], option)
            for option, *values in (
                ("threshold", "50", "-1", "nan", "0"), ("min-size", "-1", "2.5"),
                ("overlap", "1", "nan", "half"), ("channel", "-1"), ("workers", "-2"),
                ("device", "abacus"),
            )
            for value in values
        ),
    ],
)  # fmt: skip
def test_segment_refuses_options_before_the_work(
    arguments, words, segment, tmp_path, refused, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    put("cell.tif", image())
    monkeypatch.setattr("neurolib.volume.read_volume", lambda *_, **__: pytest.fail("work"))
    refused(*segment, "cell.tif", *arguments, says=words)
    assert [p.name for p in tmp_path.iterdir()] == ["cell.tif"]


def test_segment_refuses_what_does_not_fit_in_memory(segment, tmp_path, refused, monkeypatch):
    free = SimpleNamespace(available=8 * image().size - 1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    path = put(tmp_path / "scan.tif", image())
    says = "scan.tif", "--probability NAME.zarr"
    refused(*segment, path, "--out", tmp_path / "x.swc", says=says)


def test_help_names_every_command(capsys):
    assert call("--help") == 0
    text = capsys.readouterr().out
    for command in ("run", "segment", "trace", "sweep", "fetch", "doctor"):
        assert command in text


def content(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def link_of(kind, path):
    """A link to a file or folder, in its own folder."""
    other = path.parent / "elsewhere" / path.name
    other.parent.mkdir(exist_ok=True)
    if kind == "symbolic":
        other.symlink_to(path)
    elif kind == "folder":
        (path.parent / "linked").symlink_to(path.parent)
        return path.parent / "linked" / path.name
    elif kind == "dotted":
        return path.parent / "elsewhere" / ".." / path.name
    elif kind == "hard":
        other.hardlink_to(path)
    return other if kind != "same" else path


@pytest.mark.parametrize("kind", ["same", "symbolic", "folder", "dotted", "hard"])
@pytest.mark.parametrize("option", ["--mask", "--probability", "--out"])
@pytest.mark.parametrize("suffix", [".tif", ".zarr"])
def test_an_output_that_is_an_input_is_refused(kind, option, suffix, segment, tmp_path, refused):
    if (kind, suffix) == ("hard", ".zarr") or (option, suffix) == ("--out", ".tif"):
        pytest.skip("no such case")
    path = write_volume(tmp_path / f"cell{suffix}", image())
    out, before = link_of(kind, path), content(tmp_path)
    for more in ([], ["--overwrite"]):
        refused(*segment, path, option, out, *more, says="or lies inside it")
    assert content(tmp_path) == before


@settings(max_examples=100, deadline=None)
@given(*[st.lists(st.sampled_from(["a", "b", "link", "new", ".."]), min_size=1, max_size=4)] * 2)
def test_outputs_that_meet_an_input_are_refused_however_they_are_written(one, other):
    """By the system's own resolution of links and dots."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve() / "up" / "up" / "up" / "up"
        (root / "a" / "b").mkdir(parents=True)
        (root / "link").symlink_to(root / "a")
        out, source = (root.joinpath(*parts) for parts in (one, other))
        real = [os.path.realpath(path) for path in (out, source)]
        try:
            check_outputs([out], [source], overwrite=True)
            said = ""
        except SettingsError as error:
            said = str(error)
        assert ("lies inside it" in said) == (os.path.commonpath(real) in real)


def test_the_outputs_of_many_images_are_checked_in_one_pass(tmp_path, monkeypatch):
    looks, stat = [], os.stat
    monkeypatch.setattr(os, "stat", lambda *a, **k: looks.append(a) or stat(*a, **k))

    def count(images: int) -> int:
        looks.clear()
        files = [tmp_path / f"{number}.tif" for number in range(images)]
        check_outputs([path.with_suffix(".swc") for path in files], files)
        return len(looks)

    assert 0 < count(40) <= 2 * count(20)


@pytest.mark.parametrize("option", ["--mask", "--probability"])
def test_an_output_of_the_set_of_files_that_is_read_is_refused(option, segment, tmp_path, refused):
    ome_set(tmp_path, image())
    before = content(tmp_path)
    arguments = [*segment, tmp_path / "s0.ome.tif", "--overwrite"]
    says = "s3.ome.tif: is the input"
    refused(*arguments, option, tmp_path / "s3.ome.tif", says=says)
    assert content(tmp_path) == before


def test_an_output_inside_an_input_or_an_output_is_refused(segment, tmp_path, refused):
    path = write_volume(tmp_path / "cell.zarr", image())
    before = content(tmp_path)
    arguments = [*segment, path]
    inside = ["--mask", path / "mask.tif"], ["--out", path / "0" / "a.swc"]
    both = ["--mask", tmp_path / "p.tif", "--probability", tmp_path / "p.tif"]
    nested = ["--probability", tmp_path / "p.zarr", "--mask", tmp_path / "p.zarr" / "m.tif"]
    for options in (*inside, both, nested):
        refused(*arguments, *options, says="or lies inside it")
    # Conversely, the image lies in the folder to replace.
    (path / "in.zarr").mkdir()
    inner = write_volume(path / "in.zarr" / "x.zarr", image())
    before = content(tmp_path)
    assert call("trace", inner, "--out", path / "x.swc") in (0, 2)
    assert call(*segment, inner, "--mask", path) == 2
    assert content(tmp_path).items() >= before.items()


@pytest.mark.parametrize("tree", ["cell.swc", "Cell.SWC", "cell.CNG.swc", "cell.ome.swc"])
def test_the_tree_of_an_image_is_never_replaced(tree, tmp_path, refused, segment):
    path = put(tmp_path / "cell.ome.tif", image())
    (tmp_path / tree).write_text(SWC)
    for more in ([], ["--overwrite"]):
        arguments = [*segment, path, "--out", tmp_path / tree, *ALL, *more]
        refused(*arguments, says="the tree of the image beside it")
    assert (tmp_path / tree).read_text() == SWC


def test_what_neurolib_did_not_write_is_replaced_only_if_asked(segment, tmp_path, refused):
    path = put(tmp_path / "cell.tif", image())
    names = ("a.swc", "mask.tif", "p.tif", "mask.zarr")
    out, mask, prob, lazy = (tmp_path / name for name in names)
    arguments = [*segment, path, *ALL]
    outputs = [["--out", out], ["--mask", mask], ["--probability", prob], ["--mask", lazy]]
    foreign = [
        lambda: out.write_text(SWC),
        lambda: put(mask, image()),
        lambda: write_volume(prob, image().astype(np.float32)),
        lambda: write_volume(lazy, image()),
    ]
    for option, make in zip(outputs, foreign, strict=True):
        make()
        before = content(tmp_path)
        refused(*arguments, *option, says=(str(option[1]), "--overwrite"))
        assert content(tmp_path) == before
        assert call(*arguments, *option, "--overwrite") == 0
        # It replaces its own results.
        assert call(*arguments, *option) == 0
    # A tree corrected or commented by hand belongs to the user.
    text = out.read_text()
    for changed in (text[: text.rindex("\n", 0, -1)] + "\n", f"# seen by Ann\n{text}"):
        out.write_text(changed)
        refused("trace", mask, "--out", out, says=("a.swc", "--overwrite"))


def test_results_say_what_they_were_made_with(checkpoint, tmp_path, segment):
    path = put(tmp_path / "cell.tif", image())
    out, mask, lazy, prob = (tmp_path / n for n in ("a.swc", "m.tif", "m.zarr", "p.zarr"))
    arguments = [*segment, path, *ALL]
    assert call(*arguments, "--out", out, "--mask", mask, "--probability", prob) == 0
    assert call(*arguments, "--mask", lazy) == 0
    with tifffile.TiffFile(mask) as file:
        info = file.imagej_metadata["Info"]
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    texts = [out.read_text(), info, (lazy / "zarr.json").read_text()]
    texts.append((prob / "zarr.json").read_text())
    for text in texts:
        for words in (f"neurolib {__version__}", "cell.tif", digest, "(1.0, 1.0, 1.0)", "0.25"):
            assert words in text
    assert "threshold: 0.0001" in texts[0]
    assert "min_size: 200" in texts[0]
    traced = tmp_path / "t.swc"
    assert call("trace", put(tmp_path / "bar.tif", BAR), "--out", traced, "--min-size", 7) == 0
    assert "# min_size: 7" in traced.read_text()


def test_a_name_that_is_no_utf8(tmp_path, segment):
    strange = os.fsdecode(os.fsencode(tmp_path) + b"/zelle_\xe4")
    image_path, mask, out = (f"{strange}{end}" for end in (".tif", "_mask.tif", ".swc"))
    put(tmp_path / "a.tif", BAR * 255).rename(image_path)
    assert call("trace", image_path, "--out", out) == 0
    assert r"zelle_\udce4.tif" in Path(out).read_text()
    assert call(*segment, image_path, *ALL, "--out", out, "--mask", mask) == 0
    assert Path(mask).is_file()
    assert len(read_swc(out).xyz)


def test_folders_and_patterns_give_a_tree_each(tmp_path, capsys, segment):
    folder, out, masks = (tmp_path / name for name in ("in", "trees", "masks"))
    folder.mkdir()
    for name in ("a.tif", "b.x.tif", "c.npy"):
        put(folder / name, image()) if "tif" in name else np.save(folder / name, image())
    (folder / "bad.tif").write_bytes(b"II*\0\xff\xff\0\0")  # a copy that broke off
    (folder / "notes.txt").write_text("mine")
    arguments = [*segment, *ALL, "--out", out]
    assert call(*arguments, folder, "--mask", masks) == 1
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith(f"neurolib: {folder / 'bad.tif'}: ")
    assert "3 of 4 images segmented" in said.out
    assert sorted(p.name for p in masks.iterdir()) == ["a.tif", "b.x.tif", "c.tif"]
    trees = content(out)
    assert sorted(p.name for p in trees) == ["a.swc", "b.x.swc", "c.swc"]
    # One by one, and by a pattern, the results are the same.
    single = tmp_path / "single.swc"
    assert call(*segment, *ALL, "--out", single, folder / "a.tif") == 0
    assert single.read_bytes() == trees[out / "a.swc"]
    assert call(*arguments, folder / "?.*") == 0
    assert {path: trees[path] for path in (out / "a.swc", out / "c.swc")}.items() <= trees.items()
    assert content(out) == trees
    (folder / "bad.tif").unlink()
    assert call(*arguments, folder, folder / "a.tif") == 0
    assert "3 of 3 images" in capsys.readouterr().out
    # Results among the images are no images.
    assert call(*segment, *ALL, folder / "a.tif", "--mask", folder / "m.tif") == 0
    assert call(*arguments, folder) == 0
    said = capsys.readouterr().out
    assert "skipped 1 results of earlier calls" in said
    assert "3 of 3 images" in said


def test_an_image_within_a_group_is_an_image(tmp_path, segment):
    inner = tmp_path / "plate.zarr" / "0"
    inner.parent.mkdir()
    write_volume(tmp_path / "x.zarr", BAR).rename(inner)
    assert call(*segment, inner, *ALL, "--out", tmp_path / "x.swc") == 0
    assert call("evaluate", inner, inner) == 0
    # A group of whole images is a folder of them.
    group = tmp_path / "group"
    group.mkdir()
    (group / "zarr.json").write_text("{}")
    write_volume(group / "b.zarr", BAR)
    assert cli._expand([group]) == ([group / "b.zarr"], True)


@pytest.mark.parametrize("pattern", ["", "*.tif"])
def test_a_set_of_ome_files_is_one_image(pattern, tmp_path, segment):
    folder = tmp_path / "in"
    folder.mkdir()
    ome_set(folder, image())
    put(folder / "t.tif", image())
    out = tmp_path / "out"
    assert call(*segment, folder / pattern, *ALL, "--out", out) == 0
    assert sorted(path.name for path in out.iterdir()) == ["s0.ome.swc", "t.swc"]


def test_a_set_with_an_image_per_file_is_several_images(tmp_path):
    files = ome_images(tmp_path, [image(), image()])
    assert cli._expand([tmp_path]) == (files, True)


@pytest.mark.parametrize(
    ("images", "out", "words"),
    [
        (["in"], "a.swc", "--out a.swc: expected a folder"),
        (["empty"], "trees", "no image"),
        (["none*.tif"], "trees", "no image"),
        (["in", "more"], "trees", "the output"),
    ],
)
def test_several_images_are_refused_before_the_work(
    images, out, words, segment, tmp_path, refused, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for folder in ("in", "more", "empty"):
        (tmp_path / folder).mkdir()
        for name in ("a.tif", "b.tif") if folder != "empty" else ():
            put(tmp_path / folder / name, image())
    refused(*segment, *images, "--out", out, says=words)
    assert not (tmp_path / "trees").exists()


def test_from_an_image_to_a_tree_in_one_call(checkpoint, tmp_path, segment):
    path, out = put(tmp_path / "cell.tif", image()), tmp_path / "a.swc"
    assert call(*segment, path, *ALL, "--out", out) == 0
    told = read_swc(out)
    for one, where in ((path, checkpoint), (image(), checkpoint.parent), (str(path), checkpoint)):
        tree = neurolib.segment(one, where, threshold=0.0001, progress=False)
        np.testing.assert_allclose(tree.xyz, told.xyz, atol=1e-4)
        np.testing.assert_array_equal(tree.parent, told.parent)
    assert "# gaps bridged: " in out.read_text()
    with pytest.raises(SettingsError, match=r"threshold=50: expected more than 0"):
        neurolib.segment(path, checkpoint, threshold=50)
    for array, words in (
        (image()[0], "expected a 3D stack"),
        (np.stack([image()] * 3, -1), "expected a 3D stack"),
        (image()[:0], "expected a 3D stack"),
        (with_value(np.nan), "slice 0 holds NaN"),
    ):
        with pytest.raises(VolumeError, match=f"^image: {words}"):
            neurolib.segment(array, checkpoint, progress=False)


@pytest.mark.parametrize(
    "arguments",
    [["segmnt"], ["segment"], ["trace", "--ou", "x"], ["run", "x"], ["fetch", "no_such_model"]],
)
def test_a_wrong_command_is_one_line(arguments, refused):
    refused(*arguments)


def test_interrupts_say_how_to_resume(tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("neurolib.course.runs.run_course", interrupted)
    assert call("run") == 130
    assert "run the same command again to resume" in capsys.readouterr().err


@pytest.mark.parametrize("given", [(), ("--spacing", "0.3,0.1,0.1")])
def test_a_spacing_that_is_not_known_is_said_and_not_made_up(tmp_path, capsys, given):
    """By `inspect` and `trace`, unless it is given; the tree has the spacing."""
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


@pytest.mark.parametrize("options", [[], ["--spacing", "0.3,0.7,0.7"]])
def test_an_swc_in_micrometres_is_the_tree_that_others_read(tmp_path, capsys, options):
    mask = np.zeros((14, 24, 60), np.uint8)
    for z in range(14):
        mask[max(z - 1, 0) : z + 2, 8:12, 4 * z : 4 * z + 6] = 1
    path = write_volume(tmp_path / "cell.tif", mask, (2.0, 0.5, 0.5))
    plain, um = tmp_path / "plain.swc", tmp_path / "um.swc"
    assert call("trace", path, "--out", plain, *options) == 0
    assert call("trace", path, "--out", um, "--units", "um", *options) == 0
    spacing = (0.3, 0.7, 0.7) if options else (2.0, 0.5, 0.5)
    length = swc_length(read_swc(plain), spacing)
    assert capsys.readouterr().out.count(f" nodes, {length:.1f} µm long") == 2
    np.testing.assert_allclose(read_swc(um).xyz, read_swc(plain).xyz, atol=1e-3)
    np.testing.assert_allclose(read_swc(um).radius, read_swc(plain).radius, rtol=1e-3)
    sections = pytest.importorskip("morphio").Morphology(str(um)).iter()
    theirs = sum(np.linalg.norm(np.diff(s.points, axis=0), axis=1).sum() for s in sections)
    assert theirs == pytest.approx(length, rel=1e-3)


def test_a_folder_gets_a_tree_of_every_label(tmp_path, capsys, refused):
    labels = np.zeros((9, 24, 48), np.uint16)
    labels[3:6, 3:6, 4:44], labels[3:6, 12:15, 4:24], labels[4, 20, 4:9] = 7, 300, 8
    path, trees = put(tmp_path / "cells.tif", labels), tmp_path / "trees"
    assert call("trace", path, "--out-dir", trees) == 1  # 8 is a speck
    said = capsys.readouterr()
    assert "label 8: " in said.err
    assert "2 of 3 labels traced" in said.out
    assert sorted(p.name for p in trees.iterdir()) == ["cells_300.swc", "cells_7.swc"]
    assert np.ptp(read_swc(trees / "cells_7.swc").xyz, axis=0) == pytest.approx([37, 0, 0], abs=2)
    assert np.allclose(read_swc(trees / "cells_300.swc").xyz[:, 1], 13, atol=0.5)
    (trees / "cells_7.swc").write_text(SWC)
    refused("trace", path, "--out-dir", trees, says=("cells_7.swc", "--overwrite"))
    for wrong in ([], ["--out-dir", trees, "--out", tmp_path / "a.swc"]):
        refused("trace", path, *wrong, says="--out-dir")
    refused("trace", path, "--out-dir", trees, "--label", 7, says="--label")
    chance, empty = put(tmp_path / "p.tif", BAR / np.float32(2)), tmp_path / "empty.tif"
    refused("trace", chance, "--out-dir", trees, says=("float32", "labels"))
    refused("trace", put(empty, 0 * labels), "--out-dir", trees, says="empty.tif: every voxel is 0")


@pytest.mark.parametrize("name", ["a.nii.gz", "a.npz", "a.h5", "a_seg.npy"])
def test_what_other_programs_write_is_converted_by_the_line_that_is_told(
    tmp_path, capsys, monkeypatch, name
):
    monkeypatch.chdir(tmp_path)
    if name == "a.nii.gz":
        nibabel = pytest.importorskip("nibabel")
        nibabel.save(nibabel.Nifti1Image(BAR.T, np.eye(4)), name)
    elif name == "a.npz":
        np.savez(name, probabilities=np.stack([1 - BAR, BAR]))
    elif name == "a.h5":
        with pytest.importorskip("h5py").File(name, "w") as file:
            file["exported_data"] = BAR[..., None]
    else:
        np.save(name, {"masks": BAR, "filename": "a.tif"})
    assert call("trace", name, "--out", "a.swc") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    exec(error.strip().split("in Python: ")[1])
    np.testing.assert_array_equal(np.load("out.npy"), BAR)
    assert call("trace", "out.npy", "--out", "a.swc") == 0


def test_units_that_cannot_be_written_are_refused_before_tracing(tmp_path, capsys, refused):
    path, out = put(tmp_path / "cell.tif", BAR), tmp_path / "a.swc"
    arguments = ["trace", path, "--out", out, "--units"]
    refused(*arguments, "um", says=("cell.tif", "voxel size", "--spacing"))
    refused(*arguments, "inch", says=("--units inch", "voxels or um"))
    assert not out.exists()
    assert call(*arguments, "um", "--spacing", "1,1,1") == 0
    assert "voxels long" in capsys.readouterr().out


def test_a_corrected_zarr_is_not_replaced(segment, tmp_path, refused):
    image, mask = tmp_path / "cell.npy", tmp_path / "mask.zarr"
    np.save(image, np.random.default_rng(0).random(SHAPE))
    arguments = [*segment, image, "--mask", mask]
    assert call(*arguments) == 0
    assert call(*arguments) == 0  # what neurolib wrote it may write again
    zarr = pytest.importorskip("zarr")
    array = zarr.open_array(mask / "0", mode="r+")
    array[:4] = 1
    refused(*arguments, says="may hold your own work")
    assert (zarr.open_array(mask / "0", mode="r")[:4] == 1).all()
    # To write its metadata last makes it no result either.
    zarr.open_group(mask, mode="r+").attrs["corrected_by"] = "Ann"
    refused(*arguments, says="may hold your own work")
    assert call(*arguments, "--overwrite") == 0


def test_a_corrected_probability_is_replaced_if_asked(segment, tmp_path, refused):
    zarr = pytest.importorskip("zarr")
    image, out = tmp_path / "cell.zarr", tmp_path / "p.zarr"
    write_volume(image, (np.random.default_rng(0).random(SHAPE) * 255).astype(np.uint8))
    arguments = [*segment, image, "--probability", out]
    assert call(*arguments) == 0
    before = zarr.open_array(out / "0", mode="r")[:]
    zarr.open_array(out / "0", mode="r+")[:4] = 1
    refused(*arguments, says="may hold your own work")
    assert call(*arguments, "--overwrite") == 0
    assert np.array_equal(zarr.open_array(out / "0", mode="r")[:], before)


def test_a_linked_image_keeps_its_tree(tmp_path, refused):
    for folder in ("raw", "work"):
        (tmp_path / folder).mkdir()
    put(tmp_path / "raw" / "s17.tif", BAR)
    (tmp_path / "work" / "cell.tif").symlink_to(tmp_path / "raw" / "s17.tif")
    tree = tmp_path / "work" / "cell.swc"
    tree.write_text(SWC)
    arguments = ["trace", tmp_path / "work" / "cell.tif", "--out", tree, "--overwrite"]
    refused(*arguments, says="the tree of the image beside it")
    assert tree.read_text() == SWC


def test_a_name_that_is_too_long_is_said(tmp_path, refused):
    path = put(tmp_path / "bar.tif", BAR)
    refused("trace", path, "--out", tmp_path / f"{'a' * 300}.swc", says="the name is too long")


@pytest.mark.parametrize(("dark", "y"), [(False, 38), (True, 21)])
def test_calibrate_refuses_trees_beside_their_neurites(checkpoint, tmp_path, refused, dark, y):
    """A flipped tree, or an image whose neurites are dark."""
    for name in ("a", "b"):
        image = np.zeros((12, 60, 70), np.uint8)
        image[5:8, 20:23, 5:60] = 200
        tifffile.imwrite(tmp_path / f"{name}.tif", 255 - image if dark else image)
        lines = [f"{i} 3 {x} {y} 6 1 {i - 1 or -1}" for i, x in enumerate((5, 30, 59), 1)]
        (tmp_path / f"{name}.swc").write_text("\n".join(lines))
    out = tmp_path / "mine.safetensors"
    arguments = ["calibrate", tmp_path, "--checkpoint", checkpoint, "--out", out]
    refused(*arguments, says="invert it" if dark else "does not lie on the neurites")
    refused(*arguments, says="--ignore-frames")
    assert not out.exists()
    assert call(*arguments, "--ignore-frames") == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--name", "../evil"], "--name ../evil: expected a name"),
        (["train", "--name", "a/b"], "--name a/b: expected a name"),
        (["run", "--name", ".."], "--name ..: expected a name"),
        (["segment", "nofolder", "--out", "trees"], "nofolder: not found"),
        (["trace", "x.tif", "--label", "0", "--out", "x.swc"], "--label 0"),
    ],
)
def test_unusable_names_and_numbers_are_named(arguments, said, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    refused(*arguments, says=said)
    assert list(tmp_path.iterdir()) == []


def test_workers_without_dask_are_refused_before_the_work(segment, tmp_path, monkeypatch, refused):
    np.save(tmp_path / "cell.npy", np.random.default_rng(0).random(SHAPE))
    monkeypatch.setattr("neurolib.course.cluster.find_spec", lambda name: None)
    arguments = [*segment, tmp_path / "cell.npy", "--workers", 2]
    refused(*arguments, "--probability", tmp_path / "p.zarr", says="pip install -e .[cluster]")
    assert [path.name for path in tmp_path.iterdir()] == ["cell.npy"]
