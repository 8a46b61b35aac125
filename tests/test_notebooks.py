"""The whole course in one small papermill run, its resumption, and bad inputs.

nbval checks that each stored notebook still gives its outputs (see `make test`).
"""

import math
import re
import subprocess
import symtable
import sys
from dataclasses import replace
from types import SimpleNamespace

import jupytext
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from neurolib import blocking, evaluation, tracing
from neurolib.course import baselines, runs
from neurolib.errors import SettingsError
from neurolib.swc import read_swc

MEASURES = {"dice", "hd95", "esa", "dsa", "pds"}
MEMORY_LIMIT_MB = 1500


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run(folder):
    """The course on the embedded data set, with the smallest profile and real weights."""
    return runs.run_course(profile="smoke", name="smoke", folder=folder)


def test_every_notebook_is_executed(run):
    assert list(run.metrics()["notebooks"]) == list(runs.COURSE)
    for name in runs.COURSE:
        assert run.path(f"{name}.ipynb").is_file()
        record = run.metrics()["notebooks"][name]
        assert 0 < record["peak_mb"] < MEMORY_LIMIT_MB, name


def test_test_neurons_are_measured(run):
    neurons = run.metrics()["neurons"]
    assert neurons
    for name, values in neurons.items():
        values = {key.lower(): value for key, value in values.items()}
        assert values.keys() >= MEASURES, name
        assert 0 <= values["dice"] <= 1
        assert 0 <= values["pds"] <= 1
        # A smoke run may find nothing; distances are then infinite.
        assert all(values[key] >= 0 and not math.isnan(values[key]) for key in MEASURES), name


def test_every_test_neuron_has_a_valid_swc(run):
    trees = sorted(run.folder.rglob("*.swc"))
    assert {path.stem for path in trees} >= set(run.metrics()["neurons"])
    for path in trees:
        rows = [line.split() for line in path.read_text().splitlines() if line[:1] not in "#"]
        seen = set()
        for row in rows:
            assert row[0] not in seen, f"{path.name}: two nodes {row[0]}"
            assert row[6] == "-1" or row[6] in seen, f"{path.name}: {row[0]} before its parent"
            seen.add(row[0])
        assert len(read_swc(path).xyz) == len(rows)


def test_checkpoint_volumes_and_figures_are_left(run):
    assert run.path("checkpoint.safetensors").is_file()
    assert list(run.folder.rglob("*.tif"))
    assert list(run.figures.glob("*.png"))
    assert not list(run.folder.rglob("*.failed.ipynb"))
    assert not [path.name for path in run.folder.iterdir() if path.name.startswith(".")]


def test_report_stands_alone(run):
    report = run.path("report.html").read_text(encoding="utf-8")
    for name in (*runs.COURSE, *run.metrics()["neurons"]):
        assert name in report
    assert "data:image/png;base64," in report


def test_a_second_call_skips_everything(run, folder, capfd):
    before = {name: run.path(f"{name}.ipynb").stat().st_mtime_ns for name in runs.COURSE}
    runs.run_course(profile="smoke", name="smoke", folder=folder)
    assert capfd.readouterr().out.count("done before") == len(runs.COURSE)
    assert before == {n: run.path(f"{n}.ipynb").stat().st_mtime_ns for n in runs.COURSE}


def test_an_interrupted_run_goes_on(run, folder, capfd):
    *done, last = runs.COURSE
    run.path(f"{last}.ipynb").unlink()
    runs.run_course(profile="smoke", name="smoke", folder=folder)
    assert capfd.readouterr().out.count("done before") == len(done)
    assert run.path(f"{last}.ipynb").is_file()


def cell_of(notebook, words):
    cells = jupytext.read(runs.notebook_path(notebook).with_suffix(".py")).cells
    return next(cell.source for cell in cells if words in cell.source)


def test_cells_that_compare_bear_small_stacks_of_the_readers_own():
    """A filter that finds nothing in one, and one in which the target touches every patch."""
    mask = np.zeros((6, 9, 9), bool)
    mask[2:4, 3:6, 3:6] = True
    names = {"np": np, "ndimage": ndimage, "evaluation": evaluation}
    names["sample"] = SimpleNamespace(pair=SimpleNamespace(name="a"), mask=mask)
    for found in (np.zeros_like(mask), np.roll(mask, 1, 2)):
        names["filtered"] = {"a": {"threshold": found}}
        exec(cell_of("04_evaluation", "def hd95_by_hand"), names)
    names = {"np": np, "torch": torch, "F": F, "depth": 5, "real": torch.rand(1, 5, 32, 32)}
    for target in (np.ones((32, 32)), np.eye(32)):
        names |= {"target": target, "maps": {"center": torch.rand(6, 2, 2).numpy()}}
        for words in ("touched = F.", "twins ="):
            exec(cell_of("02_weight_inflation", words), names)
        assert np.isfinite(names["twins"])


@pytest.mark.parametrize("path", sorted(runs.NOTEBOOKS.glob("0*.py")), ids=lambda p: p.stem)
def test_no_later_cell_changes_what_a_slider_draws_with(path):
    """A callback looks its names up when the slider moves, after all cells have run."""
    cells = [cell.source for cell in jupytext.read(path).cells if cell.cell_type == "code"]
    for number, source in enumerate(cells):
        if not (drawn := re.search(r"widgets\.explore\((\w+)", source)):
            continue
        own = next(cell for cell in cells[number::-1] if f"def {drawn[1]}(" in cell)
        functions = symtable.symtable(own, "", "exec").get_children()
        draw = next(table for table in functions if table.get_name() == drawn[1])
        read = {s.get_name() for t in (draw, *draw.get_children()) for s in t.get_symbols()}
        later = symtable.symtable("\n".join(cells[number + 1 :]), "", "exec").get_symbols()
        changed = read & {symbol.get_name() for symbol in later if symbol.is_assigned()}
        assert not changed - set(draw.get_locals())


def test_filters_are_compared_like_the_network():
    """Of a sample of slices with all pieces; with slices far apart, with pieces of fewer voxels."""
    mask = np.zeros((6, 20, 30), bool)
    mask[3, 10:12, 2:28] = True  # 52 voxels
    one, pair = baselines.Baseline("threshold", (), 0.5, 200, 1.0), SimpleNamespace(name="a")
    sample = blocking.Sample(pair, 1.0 * mask, (1, 1, 1), None, mask, mask)
    names = {"filters": {"b": one}, "tests": [sample], "every": 3, "replace": replace}
    names |= {"blocking": blocking, "evaluation": evaluation}
    exec(cell_of("04_evaluation", "filtered = {"), names)
    assert np.array_equal(names["filtered"]["a"]["b"], mask[::3])
    assert names["unit"] == "voxels"  # as of the whole volume
    for image, recall in ((1.0 * mask, 1), (0.0 * mask, 0)):
        stored = {"chosen": {"b": vars(one)}, "filters": {"a": {"b": {}}}}
        names = {"tests": [replace(sample, image=image, spacing=(4, 1, 1))], "bridge": 15.0}
        # What is recorded is changed in place.
        names["run"] = SimpleNamespace(metrics=lambda of=stored: of, record=lambda *_: None)
        names["compared"] = lambda tree, s: {"recall": float(len(tree.xyz) > 0)}
        names |= {"baselines": baselines, "evaluation": evaluation, "tracing": tracing}
        names |= {"runs": runs, "Markdown": str, "display": print}
        exec(cell_of("05_swc_tracing", "by_filter, rows ="), names)
        assert stored["filters"]["a"]["b"]["recall"] == recall


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("mine.yaml", "seteps: 3\n", "'seteps': no notebook declares it"),
        ("mine.yaml", "steps: [1, 2]\n", "flat list"),
        ("mine.yaml", "steps: !foo 3\n", "not valid YAML .could not determine a constructor"),
        ("mine.yaml", "steps: {\n", "not valid YAML"),
        ("mine.yaml", "a: 3\nb: 2\na: 30\n", r"line 1 not valid YAML .the key 'a' appears twice"),
        ("mine.txt", "steps: 3\n", r"no such profile; .*, or give a \.yaml file"),
    ],
)
def test_unusable_profiles_are_refused(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(SettingsError, match=message):
        runs.run_course(profile=str(tmp_path / name), folder=tmp_path)


@pytest.mark.parametrize("code", ["utf-8-sig", "utf-16", "latin-1"])
def test_profiles_of_any_editor_are_read(code, tmp_path):
    """Also with a suffix in capitals, as old systems write them."""
    profile = tmp_path / "MINE.YML"
    profile.write_bytes("# Größe\r\nsteps: 007\r\nheld_out: 007\r\n".encode(code))
    assert runs.read_profile(profile) == {"steps": "007", "held_out": "007"}


def test_the_command_says_it_in_one_line(tmp_path):
    command = [sys.executable, "-m", "neurolib", "run", "-p", "setps=3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("neurolib: ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("*.ipynb"))
