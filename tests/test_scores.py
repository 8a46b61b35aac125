"""Predictions against references, from arrays and files, by brute force and identities."""

import csv
import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
from faults import command
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from test_evaluation import random_masks
from typer.testing import CliRunner

from neurolib.blocking import make_target
from neurolib.course.cli import app
from neurolib.course.scores import MISSES, SCORES, evaluate, evaluate_files
from neurolib.data.synthesis import grow
from neurolib.errors import NeurolibError, SettingsError
from neurolib.evaluation import dice, hd95, surface_dice, tree_distance, tree_scores
from neurolib.swc import Tree, length, read_swc, write_swc
from neurolib.tracing import EMPTY_TREE, trace
from neurolib.volume import write_volume

SHAPE = (24, 64, 64)
TREE = grow(3, SHAPE)
MASK = make_target(TREE, SHAPE)[1]
SPACING = (1.5, 0.5, 0.5)


def tubes(*rows: tuple[int, int, int]) -> np.ndarray:
    """Tubes along x, each given by its y, beginning and end."""
    mask = np.zeros((9, 40, 60), bool)
    for y, first, last in rows:
        mask[3:6, y : y + 3, first:last] = True
    return mask


def lines(*rows: tuple[int, int, int]) -> Tree:
    """The trees of `tubes`."""
    trees = [[(x, y + 1, 4) for x in range(first, last)] for y, first, last in rows]
    xyz = np.array(list(itertools.chain(*trees)), float)
    parent = np.arange(len(xyz)) - 1
    parent[np.cumsum([0, *map(len, trees)])[:-1]] = -1
    return Tree(xyz, np.ones(len(xyz)), np.zeros(len(xyz), int), parent)


@pytest.mark.parametrize("made", [tubes, lines])
@pytest.mark.parametrize(
    ("prediction", "reference", "splits", "merges"),
    [
        ([(5, 3, 57)], [(5, 3, 57)], 0, 0),
        ([(5, 3, 20), (5, 25, 40), (5, 45, 57)], [(5, 3, 57)], 2, 0),
        ([(5, 3, 57)], [(5, 3, 20), (5, 25, 40), (5, 45, 57)], 0, 2),
        ([(5, 3, 57), (20, 3, 30), (20, 33, 57)], [(5, 3, 25), (5, 30, 57), (20, 3, 57)], 1, 1),
        ([(5, 3, 57), (30, 3, 57)], [(5, 3, 57)], 0, 0),  # a false piece splits nothing
        ([(30, 3, 57)], [(5, 3, 57)], 0, 0),
    ],
)
def test_splits_and_merges(made, prediction, reference, splits, merges):
    scores = evaluate(made(*prediction), made(*reference))
    assert (scores["splits"], scores["merges"]) == (splits, merges)
    assert (scores["pieces"], scores["reference_pieces"]) == (len(prediction), len(reference))
    # A mask against a tree counts the same.
    if made is tubes:
        mixed = evaluate(tubes(*prediction), lines(*reference))
        assert (mixed["splits"], mixed["merges"]) == (splits, merges)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_splits_are_counted_by_their_definition(seed):
    a, b = random_masks(seed)
    labels = [ndimage.label(mask, np.ones((3, 3, 3)))[0] for mask in (a, b)]
    expected = []
    for one, other in (labels, labels[::-1]):
        matched = []
        for number in range(1, one.max() + 1):
            shared = other[(one == number) & (other > 0)]
            if len(shared):
                matched.append(np.bincount(shared).argmax())
        expected.append(len(matched) - len(set(matched)))
    scores = evaluate(a, b)
    assert [scores["splits"], scores["merges"]] == expected


def test_masks_and_trees_have_the_scores_of_their_functions():
    moved = np.roll(MASK, 1, 1)
    result = evaluate(moved, TREE, SPACING)
    assert result["dice"] == dice(moved, make_target(TREE, SHAPE, SPACING)[1])
    assert result["tolerance"] == 1.0
    tree = trace(moved, SPACING)
    same = evaluate(tree, TREE, SPACING)
    scores = tree_scores(tree, TREE, 1.0, SPACING)
    for some in (result, same):
        assert (some["precision"], some["recall"]) == (scores.precision, scores.recall)
        assert some["esa"] == tree_distance(tree, TREE, 1.0, SPACING).esa
        assert some["length"] == length(tree, SPACING)
    assert np.isnan(same["dice"])
    masks = evaluate(moved, MASK, SPACING, tolerance=0.7)
    assert masks["hd95_medpy"] == hd95(moved, MASK, SPACING, "medpy")
    assert masks["surface_dice"] == surface_dice(moved, MASK, 0.7, SPACING)
    perfect = evaluate(MASK, MASK)
    assert (perfect["dice"], perfect["hd95_monai"], perfect["recall"]) == (1, 0, 1)


@pytest.mark.parametrize("unit", [0.1, 0.3, 2.0])
def test_only_distances_depend_on_the_unit(unit):
    noisy = MASK ^ (np.random.default_rng(0).random(SHAPE) < 0.01)
    for one, two in ((noisy, MASK), (noisy, TREE), (trace(noisy), TREE)):
        voxels, scaled = evaluate(one, two), evaluate(one, two, (unit,) * 3)
        for key, value in voxels.items():
            known = key in SCORES and key not in (*MISSES, "length", "reference_length")
            factor = 1 if known else unit
            assert scaled[key] == pytest.approx(value * factor, nan_ok=True), key


@pytest.mark.parametrize("kinds", list(itertools.product(["mask", "tree"], repeat=2)))
def test_empty_predictions_and_references(kinds):
    full = {"mask": MASK, "tree": TREE}
    none = {"mask": np.zeros_like(MASK), "tree": EMPTY_TREE}
    one, two = kinds
    both = evaluate(none[one], none[two])
    for scores in (evaluate(none[one], full[two]), evaluate(full[one], none[two])):
        assert all(scores[key] == np.inf for key in ("esa", "dsa"))
        assert (scores["precision"], scores["recall"], scores["pds"]) == (0, 0, 1)
        if "mask" in kinds:
            assert (scores["dice"], scores["surface_dice"], scores["cldice"]) == (0, 0, 0)
            assert scores["hd95_monai"] == np.inf
        assert scores["diagonal"] > 0
    assert (both["precision"], both["recall"], both["pds"], both["esa"]) == (1, 1, 0, 0)
    assert (both["splits"], both["pieces"], both["length"]) == (0, 0, 0)
    if "mask" in kinds:
        assert (both["dice"], both["hd95_medpy"], both["surface_dice"]) == (1, 0, 1)


# --- Files ---------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """Predictions and references of three neurons, in common formats."""
    predictions, references = tmp_path / "predictions", tmp_path / "references"
    for folder in (predictions, references):
        folder.mkdir()
    write_volume(predictions / "a.tif", np.roll(MASK, 1, 2), SPACING)
    write_swc(references / "A.swc", TREE)
    write_volume(references / "a.tif", MASK.astype(np.uint8), SPACING)  # the stack beside it
    write_volume(predictions / "b.zarr", MASK.astype(np.float32) * 0.8, SPACING)
    np.save(references / "b.npy", MASK)
    write_volume(predictions / "c.tif", np.zeros_like(MASK), SPACING)
    write_swc(references / "c.swc", TREE)
    return predictions, references


def read(path):
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def test_folders_are_matched_by_name(folders, tmp_path):
    out = tmp_path / "scores.csv"
    write_swc(folders[1] / "d.swc", TREE)
    lines = list(evaluate_files(*folders, out))
    text = "\n".join(lines)
    rows = {row["name"]: row for row in read(out)}
    assert set(rows) == {"a", "b", "c"}
    assert "because their SWC is used: a.tif" in text
    assert "that have no prediction of the same name: d.swc" in text
    assert "c.tif: no foreground, an empty mask" in text
    assert "b.zarr: a probability, foreground from 0.5" in text
    expected = evaluate(np.roll(MASK, 1, 2), TREE, SPACING)
    for key in SCORES:
        head = key if key in rows["a"] else f"{key}_um"
        assert float(rows["a"][head]) == pytest.approx(expected[key], rel=1e-5)
    assert rows["c"]["esa_um"] == "inf"
    assert float(rows["b"]["dice"]) == 1
    mean = next(line for line in lines if line.startswith("mean of 3"))
    assert "1 empty, each distance set to the diagonal" in mean
    esa = [float(rows[name]["esa_um"]) for name in "ab"] + [float(rows["c"]["diagonal_um"])]
    assert f"ESA {np.mean(esa):.4g} µm" in mean


def test_one_unit_for_all_pairs(folders, tmp_path):
    out = tmp_path / "scores.csv"
    np.save(folders[0] / "d.npy", MASK)
    np.save(folders[1] / "d.npy", MASK)
    lines = list(evaluate_files(*folders, out))
    assert any("voxel size unknown (d)" in line for line in lines)
    row = read(out)[0]
    assert {"hd95_monai_voxels", "esa_voxels", "tolerance_voxels"} <= set(row)
    # Voxels of the finest axis, not indices.
    expected = evaluate(np.roll(MASK, 1, 2), TREE, (3, 1, 1))
    assert float(row["esa_voxels"]) == pytest.approx(expected["esa"], rel=1e-5)
    assert float(row["length_voxels"]) == pytest.approx(expected["length"], rel=1e-5)
    list(evaluate_files(*folders, out, spacing=SPACING))
    assert "esa_um" in read(out)[0]


def test_the_command_measures_a_pair(folders, tmp_path):
    out = tmp_path / "scores.csv"
    pair = [str(folders[0] / "a.tif"), str(folders[1] / "A.swc")]
    done = CliRunner().invoke(app, ["evaluate", *pair, "--out", str(out), "--tolerance", "0.75"])
    assert done.exit_code == 0, done.output
    line = next(line for line in done.output.splitlines() if line.startswith("a: "))
    for words in ("Dice", "Hd95 (monai)", "Hd95 (medpy)", "clDice", "ESA", "splits", " µm"):
        assert words in line
    assert float(read(out)[0]["tolerance_um"]) == 0.75


def test_a_table_replaces_none_but_its_own_kind(folders):
    out = folders[1] / "scores.csv"
    command = ["evaluate", *map(str, folders), "--out", str(out)]
    for _ in range(2):
        assert CliRunner().invoke(app, command).exit_code == 0
    out.write_text("neuron,remark\na,do not lose this\n")
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, SettingsError)
    assert "--overwrite" in str(refused.exception)
    assert "do not lose this" in out.read_text()
    assert CliRunner().invoke(app, [*command, "--overwrite"]).exit_code == 0
    out.unlink()
    out.symlink_to(folders[1] / "A.swc")
    for options in ([], ["--overwrite"]):
        refused = CliRunner().invoke(app, [*command, *options])
        assert "A.swc" in str(refused.exception)
    assert read_swc(folders[1] / "A.swc").xyz.shape == TREE.xyz.shape


@pytest.mark.parametrize(
    ("prediction", "reference", "options", "words"),
    [
        ("none.tif", "references/A.swc", [], "none.tif: no such file"),
        ("predictions", "references/A.swc", [], "two files or two folders"),
        ("predictions", "empty", [], "no two with the same name"),
        ("predictions/a.tif", "small.npy", [], "a.tif with small.npy: .*the same shape"),
        ("predictions/a.tif", "far.swc", [], "a.tif with far.swc: .*0% of the SWC"),
        ("predictions/a.tif", "other.tif", [], "voxel sizes differ"),
        ("predictions/a.tif", "references/A.swc", ["--spacing", "1,0,1"], "positive"),
        ("predictions/a.tif", "references/A.swc", ["--tolerance", "-1"], "--tolerance -1"),
        ("predictions/a.tif", "references/A.swc", ["--threshold", "2"], "--threshold 2"),
        ("references/A.swc", "references/A.swc", ["--tolerance", "nan"], "--tolerance nan"),
        ("references/A.swc", "references/A.swc", ["--threshold", "50"], "--threshold 50"),
        ("predictions/a.tif", "references/A.swc", ["--out", "s.txt"], "ends in .csv"),
        ("predictions/a.tif", "full.npy", [], "full.npy: every voxel is foreground"),
        ("predictions/a.tif", "broken.swc", [], "broken.swc: line 1"),
    ],
)
def test_wrong_input_is_one_line(
    folders, tmp_path, monkeypatch, capsys, prediction, reference, options, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    np.save("small.npy", MASK[:-1])
    np.save("full.npy", np.ones(SHAPE, bool))
    write_swc("far.swc", replace(TREE, xyz=TREE.xyz + 1000))
    write_volume("other.tif", MASK, (1.5, 0.6, 0.6))
    (tmp_path / "broken.swc").write_text("1 2 3\n")
    assert command("evaluate", prediction, reference, "--out", "scores.csv", *options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(words, error), error
    assert not (tmp_path / "scores.csv").exists()


@pytest.mark.parametrize(("one", "words"), [(MASK[:-1], "the same shape"), (1.0 * MASK, "boolean")])
def test_errors_are_of_ours(one, words):
    with pytest.raises(NeurolibError, match=words):
        evaluate(one, MASK)


def test_a_voxel_of_one_micrometre_is_known_and_one_without_a_unit_is_not(tmp_path):
    known = write_volume(tmp_path / "a.tif", MASK, (1.0, 1.0, 1.0))
    np.save(tmp_path / "b.npy", MASK)
    *_, last = evaluate_files(known, tmp_path / "b.npy")
    assert " µm" in last
    first, *_, last = evaluate_files(tmp_path / "b.npy", tmp_path / "b.npy")
    assert "voxel size unknown (b)" in first
    assert " voxels" in last


@pytest.mark.parametrize("units", [("um", "um"), ("um", "voxels"), ("voxels", "voxels")])
def test_two_trees_are_compared_in_the_voxels_that_their_heads_name(units, tmp_path):
    """On slices four times as far apart as pixels, index voxels are no distance."""
    spacing, pair = (2.0, 0.5, 0.5), [tmp_path / "a.swc", tmp_path / "b.swc"]
    for path, unit in zip(pair, units, strict=True):
        write_swc(path, TREE, units=unit, spacing=spacing)
    *_, line = evaluate_files(*pair)
    assert f", length {length(TREE, spacing):.4g} µm" in line
    write_swc(pair[1], TREE, spacing=(1.0, 0.5, 0.5))
    with pytest.raises(NeurolibError, match=r"voxel sizes differ: a.swc .* and b.swc"):
        list(evaluate_files(*pair))


def test_of_a_folder_what_can_be_compared_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("p", "r"):
        (tmp_path / folder).mkdir()
        for name in "abcd":
            write_volume(tmp_path / folder / f"{name}.tif", MASK, (2.0, 0.5, 0.5))
    (tmp_path / "p" / "b.tif").write_bytes((tmp_path / "p" / "b.tif").read_bytes()[:200])
    write_volume(tmp_path / "p" / "c.tif", MASK[:-1], (2.0, 0.5, 0.5))
    assert command("evaluate", "p", "r", "--out", "scores.csv") == 2
    out, error = capsys.readouterr()
    assert "2 of 4 pairs could not be compared (b, c)" in error
    assert re.search(r"(?m)^b: not compared: b.tif: ", out)
    assert re.search(r"(?m)^c: not compared: c.tif with c.tif: .*the same shape", out)
    names = [line.split(",")[0] for line in (tmp_path / "scores.csv").read_text().splitlines()]
    assert names == ["name", "a", "d"]


def test_a_folder_in_place_of_a_tree_costs_its_pair_alone(tmp_path, capsys):
    for folder in ("p", "r"):
        (tmp_path / folder).mkdir()
        write_swc(tmp_path / folder / "a.swc", TREE)
    (tmp_path / "p" / "b.swc").mkdir()
    write_swc(tmp_path / "r" / "b.swc", TREE)
    assert command("evaluate", str(tmp_path / "p"), str(tmp_path / "r")) == 2
    assert "b: not compared: b.swc: cannot be read" in capsys.readouterr().out


def test_a_table_with_words_of_the_user_is_not_replaced(tmp_path, capsys):
    mask, out = write_volume(tmp_path / "a.tif", MASK), tmp_path / "scores.csv"
    arguments = ["evaluate", str(mask), str(mask), "--out", str(out)]
    assert command(*arguments) == command(*arguments) == 0
    text = out.read_text()
    head, row = text.splitlines()
    for changed in (f"{head},note\n{row},good\n", f"{text}by Ann\n", f"{head}\n{row[:-1]}?\n"):
        out.write_text(changed)
        assert command(*arguments) == 2
        assert "--overwrite" in capsys.readouterr().err
        assert out.read_text() == changed
    assert command(*arguments, "--overwrite") == 0


def test_ratios_without_a_unit_count_whichever_side_has_them(tmp_path):
    """Shapes of voxels that only one file, or two files differently, tell."""
    files = [tmp_path / f"{name}.nrrd" for name in "abc"]
    for path, spacings in zip(files, ("1 1 3", "1 1 1", "1 1 2"), strict=True):
        head = "NRRD0004\ntype: uint8\ndimension: 3\nencoding: raw\nendian: little\n"
        sizes = " ".join(map(str, SHAPE[::-1]))
        path.write_bytes(f"{head}sizes: {sizes}\nspacings: {spacings}\n\n".encode())
        with open(path, "ab") as file:
            file.write((MASK * np.uint8(255)).tobytes())
    ends = [
        list(evaluate_files(*pair))[-1].partition(": ")[2] for pair in (files[:2], files[1::-1])
    ]
    assert ends[0] == ends[1]
    with pytest.raises(NeurolibError, match="voxel sizes differ"):
        list(evaluate_files(files[0], files[2]))


def test_specks_are_compared_where_there_is_nothing_else():
    masks = np.zeros((3, 9, 9, 9), bool)
    masks[0, 1, 1, 1] = masks[1, 7, 7, 7] = True
    apart, against_none, same = (evaluate(masks[0], masks[i]) for i in (1, 2, 0))
    assert [apart[key] for key in ("dice", "precision", "recall")] == [0, 0, 0]
    assert apart["esa"] == pytest.approx(6 * 3**0.5)
    assert [against_none[key] for key in ("precision", "recall", "esa")] == [0, 0, np.inf]
    assert [same[key] for key in ("dice", "precision", "recall", "esa")] == [1, 1, 1, 0]


def test_without_tolerance_a_tree_agrees_with_itself():
    scores = evaluate(TREE, TREE, SPACING, tolerance=0.0)
    assert [scores[key] for key in ("precision", "recall")] == [1, 1]
