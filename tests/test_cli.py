"""The command line on bad input: one line, exit status 2, and nothing left over."""

import sys

import numpy as np
import pytest
import tifffile

from neurolib import cli
from neurolib.network import NetworkSettings, Segmenter
from neurolib.swc import Tree, read_swc, write_swc
from neurolib.training import save_checkpoint

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
    "unknown parent": "1 3 10 10 4 1 -1\n2 3 20 12 4 1 7\n",
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
        (["-p", "encoder=5"], "expected str"),
    ],
)
def test_run_refuses_bad_settings(arguments, word, tmp_path, capsys):
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


def test_help_names_every_command(capsys):
    assert call("--help") == 0
    text = capsys.readouterr().out
    for command in ("run", "segment", "sweep", "fetch", "doctor"):
        assert command in text


def test_write_swc_of_a_cycle_leaves_nothing(tmp_path):
    tree = Tree(np.zeros((2, 3)), np.ones(2), np.ones(2, int), np.array([1, 0]))
    with pytest.raises(ValueError, match=r"ancestor|cycle"):
        write_swc(tmp_path / "x.swc", tree)
    assert not list(tmp_path.iterdir())
