"""Run folders, grids and results files: good ones are read back, bad ones refused."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml

from neurolib import blocking, swc, volume
from neurolib.course import runs, sweeps
from neurolib.course.baselines import FILTERS
from neurolib.data import datasets, pairs, synthesis
from neurolib.errors import DataError, NeurolibError, SettingsError, VolumeError, WeightsError
from neurolib.files import SHIPPED
from neurolib.inference import Tiling

GRID = """\
data: somewhere
results: data/results/x.csv
seeds: [0, 1]
folds: [a]
common: {steps: 3}
networks: {one: {depth: 1}}
"""
COMMON = """\
data: {data}
results: {results}
seeds: [0]
folds: [cell0]
common:
  encoder: test_vit.r160_in1k
  initialisation: scratch
  validate_on: cell1
  size: 96
  steps: 2
  batch: 2
  validate_every: 1
  validation_blocks: 4
networks:
"""
SMALL = f"""\
measure: validation
{COMMON}\
  slow: {{{{encoder_rate: 1.0e-5}}}}
  wrong: {{{{initialisation: center, weights_file: {{bad}}}}}}
"""
MENDED = re.compile(r"\{initialisation: center, weights.*\}")
PAIR = f"""\
{COMMON.replace("steps: 2", "steps: 1")}\
  thin, 2D: {{{{depth: 1, every: 2}}}}
  thick: {{{{depth: 3}}}}
"""


def write_grid(folder: Path, text: str) -> Path:
    path = folder / "grid.yaml"
    path.write_text(text)
    return path


def row(network: str, neuron: str, seed: int, dice: float) -> dict:
    values = dict.fromkeys(sweeps.COLUMNS["test"], "x")
    values |= {"network": network, "neuron": neuron, "seed": seed, "fold": 0, "dice": dice}
    return values | {"hd95": 1.0, "diagonal": 99.0, "cldice": 0.5, "seconds": 60}


def test_results_round_trip_and_are_averaged_over_seeds(tmp_path):
    path = tmp_path / "table.csv"
    rows = [row("a", "n1", 0, 0.2), row("a", "n1", 1, 0.4), row("a", "n2", 0, 0.5)]
    rows += [row("b", "n1", 0, 0.6), row("b", "n2", 0, 0.5)]
    sweeps.write_results(path, rows)
    stored = sweeps.read_results(path)
    assert sweeps.by_network(stored, "dice") == {
        "a": {"n1": pytest.approx(0.3), "n2": 0.5},
        "b": {"n1": 0.6, "n2": 0.5},
    }
    assert sweeps.by_seed(stored, "dice") == {
        "a": {"seed 0": pytest.approx(0.35), "seed 1": 0.4},
        "b": {"seed 0": pytest.approx(0.55)},
    }
    # A volume in which nothing was found counts with its diagonal, and the neuron counts once.
    rows = [row("a", "n1", 0, 0.2) | {"hd95": float("inf")}, row("a", "n1", 0, 0.2)]
    assert sweeps.by_network(rows, "hd95") == {"a": {"n1": 50.0}}
    assert "3 minutes" in sweeps.describe_results(stored)[-1]


def test_results_of_another_kind_are_refused(tmp_path):
    path = tmp_path / "table.csv"
    with pytest.raises(SettingsError, match="no results"):
        sweeps.read_results(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(SettingsError, match="expected the columns"):
        sweeps.read_results(path)
    sweeps.write_results(path, [row("a", "n1", 0, 0.2)])
    text = path.read_text()
    path.write_text(text[: text.rindex(",")])
    with pytest.raises(SettingsError, match="expected the columns"):
        sweeps.read_results(path)
    path.write_text(f'{text}"a')
    with pytest.raises(SettingsError, match="not a CSV"):
        sweeps.read_results(path)
    path.write_text(text.replace("\na,0,", "\na,0.0,"))  # as a spreadsheet may save it
    with pytest.raises(SettingsError, match="whole numbers in seed and fold"):
        sweeps.read_results(path)


@pytest.mark.parametrize("code", ["utf-8-sig", "utf-16", "cp1252"])
def test_results_of_any_editor_are_read(tmp_path, code):
    path = tmp_path / "table.csv"
    sweeps.write_results(path, [row("größer", "n1", 0, 0.2)])
    path.write_bytes(path.read_text(encoding="utf-8").replace("\n", "\r\n").encode(code))
    assert sweeps.by_network(sweeps.read_results(path), "dice") == {"größer": {"n1": 0.2}}


@pytest.mark.parametrize("text", ["", "{", "[1]", "5", "\xff"])
def test_damaged_metrics_are_one_line(data, tmp_path, text):
    call = str(data), "empty", "x", tmp_path, {}, ()
    path = runs.run_course(*call).path("metrics.json")
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(SettingsError, match=r"metrics.json: damaged; .*another --name"):
        runs.run_course(*call)
    assert path.read_bytes() == text.encode("latin-1")


def test_a_grid_is_read(tmp_path):
    grid = sweeps.read_grid(write_grid(tmp_path, GRID))
    assert grid["seeds"] == [0, 1]
    assert grid["networks"] == {"one": {"depth": "1"}}  # the notebook says what it is


def test_a_fold_may_name_its_own_validation_neurons(tmp_path):
    change = "folds: [cell0]", "folds: [cell0, {held_out: cell2, validate_on: cell0}]"
    text = SMALL.format(results="x.csv", data="x", bad="").replace(*change)
    path = write_grid(tmp_path, text)
    cells = list(sweeps._cells(sweeps.read_grid(path), "grid", ()))
    named = {(c.fold, c.parameters["held_out"], c.parameters["validate_on"]) for c in cells}
    assert named == {(0, "cell0", "cell1"), (1, "cell2", "cell0")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GRID.replace("depth", "dept"), r"grid\.yaml: .*did you mean 'depth'"),
        (GRID.replace("{steps: 3}", "{every: 3}") + "measure: tree\n", "tree needs all slices"),
        (GRID.replace("{one: {", "{a b: {}, a/b: {"), "share the folder grid/a-b-s0-f0"),
        (GRID, "seeds 0, 1 draw different .* name them in validate_on"),
    ],
)
def test_a_grid_that_cannot_be_run_fails_before_anything_runs(text, message, tmp_path):
    with pytest.raises(SettingsError, match=message):
        sweeps.run_sweep(write_grid(tmp_path, text), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_several_seeds_may_draw_their_validation_neurons_if_no_filter_is_chosen_on_them(tmp_path):
    path = write_grid(tmp_path, GRID.replace("{steps: 3}", "{filtered_too: false}"))
    with pytest.raises(NeurolibError, match="somewhere"):  # nothing but its data is missing
        sweeps.run_sweep(path, tmp_path / "runs")


def test_a_file_beside_the_user_hides_no_module_from_a_worker(tmp_path):
    (tmp_path / "yaml.py").write_text("raise SystemExit('not the real one')")
    command = [*sweeps.WORKER[:-1], "import yaml"]
    assert subprocess.run(command, cwd=tmp_path).returncode == 0


def test_every_profile_is_made_of_known_parameters():
    defaults = {n: runs.notebook_parameters(n) for n in runs.COURSE}
    paths = sorted(runs.PROFILES.glob("*.yaml"))
    grids = [path for path in paths if "\nnetworks:" in path.read_text()]
    assert len(grids) >= 2
    assert len(paths) - len(grids) >= 4
    for path in paths:
        if path in grids:
            grid = sweeps.read_grid(path)
            for network in grid["networks"].values():
                runs.choose_parameters(grid["common"] | network, defaults)
        else:
            runs.choose_parameters(runs.read_profile(path), defaults)


def test_tiles_overlap_alike_everywhere():
    """Tiles without overlap give another Dice of the same network."""
    notebooks = [runs.notebook_parameters(name)["overlap"] for name in runs.EVALUATION]
    profiles = [runs.read_yaml(path) for path in runs.PROFILES.glob("*.yaml")]
    given = [values["overlap"] for values in profiles if values and "overlap" in values]
    assert {*notebooks, *map(float, given)} == {Tiling().overlap}


def test_a_run_keeps_what_stages_record(tmp_path):
    run = runs.open_run(tmp_path / "run")
    run.record("target", {"kind": "radius", "tau": 0.5})
    run.record("neurons", {"a": {"Dice": 0.5}})
    assert runs.target_of(run) == {"kind": "radius", "tau": 0.5}
    assert run.metrics()["neurons"]["a"]["Dice"] == 0.5
    lines = [[cell.strip() for cell in line.split("|")] for line in runs.summary(run).splitlines()]
    assert ["", "a", "0.500", ""] in lines


def test_a_table_can_be_read_before_it_is_rendered():
    printed = runs.table([{"a": 1.5, "name": "x"}, {"a": 22.25, "name": "long", "n": 3}])
    assert printed.splitlines() == [
        "|      a | name |   n |",
        "| -----: | ---- | --: |",
        "|  1.500 | x    |     |",
        "| 22.250 | long |   3 |",
    ]


def test_without_a_checkpoint_a_run_takes_the_one_that_comes_along(tmp_path):
    run = runs.open_run(tmp_path)
    assert runs.checkpoint_of(run).name == "neurite.safetensors"
    assert runs.checkpoint_of(run).is_file()
    run.path("checkpoint.safetensors").write_bytes(b"")
    assert runs.checkpoint_of(run) == run.path("checkpoint.safetensors")


def test_a_run_that_lost_its_checkpoint_gets_no_other(tmp_path):
    run = runs.open_run(tmp_path)
    run.record("validation", {"points": []})
    with pytest.raises(WeightsError, match=r"checkpoint\.safetensors: missing.*notebook 03"):
        runs.checkpoint_of(run)
    run.record("notebooks", {"03_training": {"key": "k"}, "04_evaluation": {"key": "k"}})
    for name in ("03_training", "04_evaluation"):
        run.path(f"{name}.ipynb").write_text("{}")
    assert runs._is_done(run, "04_evaluation", "k")
    assert not runs._is_done(run, "03_training", "k")
    run.path("checkpoint.safetensors").write_bytes(b"")
    assert runs._is_done(run, "03_training", "k")


def test_a_run_split_from_other_data_is_no_run_of_these(tmp_path):
    run = runs.open_run(tmp_path / "run")
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
        for k in range(3):
            volume.write_volume(tmp_path / name / f"cell{k}.tif", np.eye(9)[None].repeat(5, 0))
            (tmp_path / name / f"cell{k}.swc").write_text("1 2 1 1 1 1 -1\n")
    split = runs.split_of(run, str(tmp_path / "ours"))
    assert runs.split_of(run, str(tmp_path / "ours")) == split
    with pytest.raises(DataError, match=r"split of data other than .*theirs.*run_dir"):
        runs.split_of(run, str(tmp_path / "theirs"))


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for seed in range(3):
        tree = synthesis.grow(seed, (24, 64, 64))
        swc.write_swc(folder / f"cell{seed}.swc", tree)
        stack = synthesis.render(tree, (24, 64, 64), seed=seed)
        volume.write_volume(folder / f"cell{seed}.tif", stack.data)
    return folder


def test_a_sweep_with_two_workers_keeps_what_succeeds_and_goes_on(data, tmp_path, capfd):
    bad, results = tmp_path / "bad.pth", tmp_path / "results.csv"
    bad.write_text("no weights")
    text = SMALL.format(results=results, data=data, bad=bad)
    grid = write_grid(tmp_path, text)
    with pytest.raises(runs.NotebookError, match=r"1 of 2 runs failed .*bad\.pth"):
        sweeps.run_sweep(grid, tmp_path / "runs", workers=2)
    rows = sweeps.read_results(results, "validation")
    assert [(row["network"], row["step"]) for row in rows] == [("slow", 1), ("slow", 2)]
    assert {row["neuron"] for row in rows} == {"cell1"}
    assert {row["encoder_rate"] for row in rows} == {"1e-05"}
    assert all(0 <= row["dice"] <= 1 for row in rows)
    # The mended grid: finished runs are kept, the others run; equal parameters give equal numbers.
    grid.write_text(MENDED.sub("{encoder_rate: 1e-5}", text))
    sweeps.run_sweep(grid, tmp_path / "runs", workers=2)
    again = sweeps.read_results(results, "validation")
    assert again[:2] == rows
    assert [row["dice"] for row in again[2:]] == [row["dice"] for row in rows]
    assert capfd.readouterr().out.count("done before") == 1
    page = (tmp_path / "runs" / "grid" / "index.html").read_text()
    assert page.count("<td>done</td>") == 2
    assert '<a href="slow-s0-f0/report.html">slow</a>' in page
    assert (tmp_path / "runs" / "grid" / "slow-s0-f0" / "report.html").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("measure: validation", "measure: luck"), "expected one of test, tree, validation"),
        (("seeds: [0]", "seeds: []"), r"seeds is \[\], expected a list"),
        (("seeds: [0]", "seeds: [yes]"), "seeds: expected int, such as 0, got 'yes'"),
        (("folds: [cell0]", "folds: [[cell0]]"), "folds: expected str"),
        (("  slow:", "  ridge filter:"), "a filter's name; choose another"),
        (
            ("folds: [cell0]", "folds: [{held_out: a, steps: 3}]"),
            "expected held_out and, optionally, validate_on",
        ),
        (
            ("folds: [cell0]", "folds: [{validate_on: a}]"),
            "expected held_out and, optionally, validate_on",
        ),
        (("{encoder_rate: 1.0e-5}", "3"), "network 'slow': '3'"),
        (("  steps: 2", "  held_out: a"), "has 'held_out'; set it with folds"),
        (("results: x.csv", "results:"), "results is ''"),
        (("results: x.csv", "results: x.txt"), "expected a .csv"),
        (("networks:", "common_networks:"), "expected the keys"),
        (("networks:", "a: {"), "not valid YAML"),
    ],
)
def test_unusable_grids_say_why(change, message, tmp_path):
    path = tmp_path / "grid.yaml"
    with pytest.raises(SettingsError, match="no such grid"):
        sweeps.read_grid(path)
    path.write_text(SMALL.format(results="x.csv", data="x", bad="").replace(*change))
    with pytest.raises(SettingsError, match=message):
        sweeps.read_grid(path)


def test_a_run_that_traces_gives_rows_with_the_scores_of_its_trees(tmp_path):
    image = tmp_path / "cell1.npy"
    np.save(image, np.arange(144, dtype=np.uint8).reshape(3, 4, 12))
    pair = pairs.Pair("cell1", "cell", image, image, "real")
    run = runs.open_run(tmp_path / "run")
    datasets.write_manifest(run.path("split.json"), datasets.Split((), (), (pair,)), 0)
    record = {"seconds": 20, "key": "0" * 64}
    run.record("notebooks", dict.fromkeys(sweeps.MEASURES["tree"], record))
    about = {"encoder": "vit center", "weights": "w", "style": "real", "device": "CPU"}
    run.record("about", about)
    run.record("target", {"tau": 0.1})
    scores = {"style": "real", "Dice": 0.5, "Hd95": float("inf"), "ESA": 1.23456}
    scores |= {"recall": 0.9, "trees": 3}
    run.record("neurons", {"cell1": scores})
    cell = sweeps.Cell("a", 0, 0, "grid/a-s0-f0", {"depth": 5})
    path = tmp_path / "trees.csv"
    sweeps.write_results(path, sweeps._rows(run, cell, "x", "tree", True), "tree")
    (stored,) = sweeps.read_results(path, "tree")
    told = {key: stored[key] for key in ("neuron", "volume", "esa", "recall", "trees", "seconds")}
    assert told == {
        "neuron": "cell", "volume": "cell1", "esa": 1.2346, "recall": 0.9, "trees": 3, "seconds": 60
    }  # fmt: skip
    assert sweeps.by_network([stored], "hd95") == {"a": {"cell": 13.0}}


def test_results_of_other_seeds_stay_and_a_file_with_others_is_refused(tmp_path):
    path = tmp_path / "results.csv"
    parameters = {"steps": 5, "every": 4, "negatives": 1.0}

    def cell(**changes) -> sweeps.Cell:
        return sweeps.Cell("a", 0, 0, "grid/a-s0-f0", parameters | changes)

    def old(settings: str = cell(seed=1).settings, **changes) -> dict:
        shared = {"fold": 0, "data": "x", "settings": settings}
        return row("a", "n1", 1, 0.5) | shared | changes

    def kept() -> list[dict]:
        return sweeps._kept(path, [cell(seed=0)], [cell(seed=0)], "somewhere/x", "test")

    mine = [old(cldice=float("nan")), old(seed=0)]
    sweeps.write_results(path, mine)
    stored = kept()
    assert [(one["seed"], one["network"], one["fold"]) for one in stored] == [("1", "a", "0")]
    assert np.isnan(stored[0]["cldice"])
    others = [old(data="y"), old(network="nnU-Net"), old(fold=1)]
    others += [old(cell(**{name: 7}).settings) for name in (*parameters, "tau")]
    for other in others:
        sweeps.write_results(path, [*mine, other])
        before = path.read_bytes()
        with pytest.raises(SettingsError, match=f"other data.*{other['network']}.*move this one"):
            kept()
        assert path.read_bytes() == before
    for name in sweeps.FILTERED:
        assert cell(**{name: 7}).data_settings != cell().data_settings
    # Filters come from the common settings; if no network has them, from all.
    grid = {"common": parameters, "folds": [{}]}
    assert sweeps._usual(grid, [cell(every=1), cell()]) == {cell().data_settings}
    assert sweeps._usual(grid, [cell(every=1)]) == {cell(every=1).data_settings}


def test_the_page_of_a_sweep_shows_all_its_runs_without_their_filters(tmp_path):
    cells = [sweeps.Cell(name, 0, 0, f"grid/{name}", {}) for name in ("a", "b", "c")]
    values = {("a", 0): 0.3, ("b", 0): 0.5, (next(iter(FILTERS)), ""): 0.1}
    rows = [row(name, "n1", seed, dice) for (name, seed), dice in values.items()]
    rows = [one | {"run": f"grid/{run}"} for one, run in zip(rows, "aba", strict=True)]
    rows[1]["seconds"] = float("nan")  # as of a cell that somebody emptied
    sweeps._write_index(tmp_path / "index.html", cells, rows, {})
    page = (tmp_path / "index.html").read_text()
    assert re.findall(r"<td>(0\.\d+)</td>", page) == ["0.300", "0.500"]
    assert page.count("not yet") == 1


def test_a_grid_that_measures_masks_runs_in_parts_to_one_file(data, tmp_path, capfd):
    """Real records of notebooks 03 and 04 become rows, and a later part keeps the others."""
    results = tmp_path / "results.csv"
    grid = write_grid(tmp_path, PAIR.format(results=results, data=data))
    sweeps.run_sweep(grid, tmp_path / "runs", rows=["thick"])
    first = sweeps.read_results(results)
    sweeps.run_sweep(grid, tmp_path / "runs", rows=["thin, 2D"], folds=[0])
    both = sweeps.read_results(results)
    # The filters, which all runs of a fold repeat, are there once.
    assert [row["network"] for row in first] == [*FILTERS, "thick"]
    assert [row["network"] for row in both] == [*FILTERS, "thin, 2D", "thick"]
    kept = [row for row in both if row["network"] != "thin, 2D"]
    # As text, because NaN is not equal to itself. The filters on fewer slices are not stored.
    assert [str(one | {"run": ""}) for one in kept] == [str(one | {"run": ""}) for one in first]
    for line in both:
        assert line["neuron"] == line["volume"] == "cell0"
        assert line["style"] == "real"
        assert 0 <= line["dice"] <= 1
        assert line["hd95"] > 0
        assert line["diagonal"] == pytest.approx(np.linalg.norm((24, 64, 64)), abs=0.1)
    assert "done before" not in capfd.readouterr().out
    for part, word in (({"rows": ["thik"]}, "--rows thik"), ({"folds": [1]}, "--folds 1")):
        with pytest.raises(SettingsError, match=word):
            sweeps.run_sweep(grid, tmp_path / "runs", **part)
    assert str(sweeps.read_results(results)) == str(both)  # NaN is not itself


def test_parts_of_a_grid_keep_what_is_not_run(tmp_path):
    """Brute force: all subsets of rows, folds and seeds add up to the whole."""
    path = tmp_path / "results.csv"
    keys = [("ab"[i % 2], i // 2 % 2, i // 4) for i in range(8)]
    cells = [sweeps.Cell(n, seed, fold, f"{n}{seed}{fold}", {"depth": 1}) for n, seed, fold in keys]

    def rows(some):
        names = {"data": "x", "settings": cells[0].settings}
        return [
            row(c.network, f"n{c.fold}", c.seed, 0.5) | names | {"fold": c.fold, "run": c.name}
            for c in some
        ]

    for number in range(1, 255):
        now = [cell for i, cell in enumerate(cells) if number >> i & 1]
        sweeps.write_results(path, rows(cells))
        kept = sweeps._kept(path, now, cells, "x", "test")
        assert {one["run"] for one in kept} == {c.name for c in cells} - {c.name for c in now}


KILLER = """
import json, os, signal, sys
cell = json.loads(sys.stdin.readline())[-1]
if cell["name"] == "killer":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(cell["name"] == "broken" and "ValueError: a fault")
"""


def test_a_run_that_kills_its_worker_fails_alone(monkeypatch):
    monkeypatch.setattr(sweeps, "WORKER", [sys.executable, "-c", KILLER])
    cells = [sweeps.Cell(name, 0, 0, name, {}) for name in ("one", "killer", "broken", "two")]
    job = functools.partial(sweeps._run_cell, "data", "runs", (), ".")
    ended = {cell.name: got for cell, got in sweeps._execute(cells, job, 2)}
    assert str(ended.pop("killer")).startswith("its process was killed")
    assert str(ended.pop("broken")) == "broken: ValueError: a fault"
    assert [ended[name].folder.name for name in ("one", "two")] == ["one", "two"]


@pytest.mark.skipif(
    not os.environ.get("NEUROLIB_FAULTS"), reason="starts a cluster; set NEUROLIB_FAULTS=1"
)
def test_a_sweep_on_a_cluster_outlives_a_killed_worker(data, tmp_path):
    distributed = pytest.importorskip("distributed")
    results, folder = tmp_path / "results.csv", tmp_path / "runs"
    text = SMALL.format(results=results, data=data, bad="")
    grid = write_grid(tmp_path, MENDED.sub("{encoder_rate: 1e-5}", text))
    sweeps.run_sweep(grid, tmp_path / "alone", workers=2)
    alone = sweeps.read_results(results, "validation")
    results.unlink()
    local = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**local) as cluster:
        before = {worker.pid for worker in cluster.workers.values()}

        def kill():
            while not list(folder.rglob("split.json")):
                time.sleep(0.1)
            os.kill(min(before), signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        sweeps.run_sweep(grid, folder, scheduler=cluster.scheduler_address)
        thread.join()
        assert before - {worker.pid for worker in cluster.workers.values()} == {min(before)}
    told = ("network", "seed", "fold", "neuron", "step", "training_loss", "dice", "run")
    shared = sweeps.read_results(results, "validation")
    assert [[one[key] for key in told] for one in shared] == [
        [a[key] for key in told] for a in alone
    ]


def test_a_cluster_that_is_not_there_is_one_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(SettingsError, match=r"need Dask, .* pip install -e .\[cluster\]"):
        list(sweeps._execute([], None, scheduler="tcp://127.0.0.1:1"))


def test_a_run_folder_is_of_one_data_set(data, tmp_path):
    """Two folders with the same last name never share a run."""
    other = tmp_path / "other" / "data"
    other.mkdir(parents=True)
    for path in data.iterdir():
        (other / path.name.replace("cell", "nerve")).write_bytes(path.read_bytes())
    folder = tmp_path / "runs"
    run = runs.run_course(str(data), "empty", "", folder, {"held_out": "cell0"}, ())
    before = run.path("split.json").read_bytes()
    with pytest.raises(SettingsError, match=rf"a run on {data}, not on {other}; .*--name"):
        runs.run_course(str(other), "empty", "", folder, {}, ())
    assert run.path("split.json").read_bytes() == before
    run.record("about", {"data": "../../from/the/notebooks", "device": "CPU"})
    assert "from/the/notebooks" not in runs.summary(run)
    assert "- device: CPU" in runs.summary(run)
    assert "Data: " in (text := runs.summary(run))
    assert f"{data}. Parameters: held_out cell0." in text
    # The same files elsewhere, or more of them in place, are the same data.
    moved = data.rename(tmp_path / "moved")
    runs.run_course(str(moved), "empty", run.folder.name, folder, {}, ())
    (moved / "cell0.swc").write_bytes((moved / "cell1.swc").read_bytes())
    runs.run_course(str(moved), "empty", run.folder.name, folder, {}, (), True)


def test_a_folder_of_other_things_does_not_become_a_run(data, tmp_path):
    before = {path: path.read_bytes() for path in data.iterdir()}
    with pytest.raises(SettingsError, match=r"holds something other than a run; .*--name"):
        runs.run_course(str(data), "empty", data.name, data.parent, {}, ())
    assert {path: path.read_bytes() for path in data.iterdir()} == before


def test_a_file_that_is_no_results_is_not_replaced(data, tmp_path):
    results = tmp_path / "mine.csv"
    grid = write_grid(tmp_path, PAIR.format(results=results, data=data))
    results.write_text("name,neuron\n")
    with pytest.raises(SettingsError, match=r"mine\.csv: not a results file"):
        sweeps.run_sweep(grid, tmp_path / "runs")
    assert results.read_text() == "name,neuron\n"
    assert not (tmp_path / "runs").exists()


def test_paths_are_where_the_user_stands(data, tmp_path, monkeypatch):
    (tmp_path / "w.pth").write_text("x")
    monkeypatch.chdir(tmp_path)
    moved = runs.localise({"weights_file": "w.pth", "steps": 3, "gold": ""})
    assert (runs.NOTEBOOKS / moved["weights_file"]).resolve() == tmp_path / "w.pth"
    assert moved["steps"] == 3
    assert moved["gold"] == ""
    text = PAIR.format(results="mine.csv", data="data")
    grid = write_grid(tmp_path, text.replace("steps: 1", "steps: 0"))
    with pytest.raises(SettingsError, match="steps=0: expected at least 1"):
        sweeps.run_sweep(grid, tmp_path / "runs")
    (tmp_path / "mine.csv").write_text("mine\n")
    grid.write_text(text)
    with pytest.raises(SettingsError, match=rf"{tmp_path}/mine\.csv: not a results file"):
        sweeps.run_sweep(grid, tmp_path / "runs")


def test_a_run_stops_on_misplaced_trees(data, tmp_path, capsys):
    for path in data.glob("*.swc"):
        tree = swc.read_swc(path)
        swc.write_swc(path, replace(tree, xyz=tree.xyz * (1, -1, 1) + (0, 63, 0)))
    parameters = {"held_out": "cell0"}
    with pytest.raises(DataError, match=r"cell\d: .*--ignore-frames"):
        runs.run_course(str(data), "empty", "x", tmp_path / "runs", parameters, ())
    assert not (tmp_path / "runs").exists()
    runs.run_course(str(data), "empty", "x", tmp_path / "runs", parameters, (), True)
    said = capsys.readouterr().out
    assert "cell0.tif: spacing not known" in said
    assert "; give spacing= (--spacing Z,Y,X in µm)" in said


def test_trees_in_micrometres_lie_in_their_images(data, tmp_path, capsys):
    lengths = [row["length"] for row in datasets.measure(data)]
    for path in data.glob("*.swc"):
        image = path.with_suffix(".tif")
        volume.write_volume(image, volume.read_volume(image).data, (2.0, 0.5, 0.5))
        swc.write_swc(path, swc.read_swc(path), units="um", spacing=(2.0, 0.5, 0.5))
        # Other programs write no voxel size into the SWC.
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if "separation" not in line))
    runs.run_course(str(data), "empty", "x", tmp_path / "runs", {"held_out": "cell0"}, ())
    assert "spacing" not in capsys.readouterr().out
    again = [row["length"] for row in datasets.measure(data)]
    assert again == pytest.approx(lengths, rel=1e-3)


def test_channel_and_spacing_of_a_run_reach_every_notebook(data, tmp_path, monkeypatch):
    for path in data.glob("*.tif"):
        stack = volume.read_volume(path).data
        tifffile.imwrite(path, np.stack([stack[::-1], stack], 1), imagej=True)
    call = str(data), "empty", "x", tmp_path / "runs"
    with pytest.raises(VolumeError, match=r"2 channels .*channel="):
        runs.run_course(*call, {"held_out": "cell0"}, ())
    with pytest.raises(SettingsError, match="spacing=2,1: expected three positive"):
        runs.run_course(*call, {"channel": "1", "spacing": "2,1"}, ())
    parameters = {"held_out": "cell0", "channel": "1", "spacing": "2,0.5,0.5"}
    run = runs.run_course(*call, parameters, ())
    sample = blocking.read_sample(runs.split_of(run, str(data)).test[0])
    assert (sample.spacing, sample.unknown) == ((2.0, 0.5, 0.5), "")
    stack = tifffile.imread(data / "cell0.tif")[:, 1]
    np.testing.assert_array_equal(sample.image, volume.normalise(stack))
    # Also with a finished network.
    monkeypatch.setattr(runs, "EVALUATION", ())
    finished = str(data), "empty", "y", tmp_path / "runs"
    with pytest.raises(VolumeError, match="channel"):
        runs.run_course(*finished, {"checkpoint": "shipped", "channel": "5"})
    run = runs.run_course(*finished, {"checkpoint": "shipped", "channel": "1"})
    assert [pair.channel for pair in runs.split_of(run, str(data)).test] == [1, 1, 1]


def test_a_trained_network_is_not_replaced_by_one_of_other_settings(data, tmp_path):
    call = str(data), "empty", "x", tmp_path / "runs"
    run = runs.run_course(*call, {"held_out": "cell0"}, ())
    run.path("checkpoint.safetensors").write_text("hours of work")
    for parameters, words in (
        ({"held_out": "cell1"}, "held_out='cell0'"),
        ({"held_out": "cell0", "tau": "0.2"}, "tau=0.1"),
        ({"held_out": "cell1", "checkpoint": ""}, "held_out='cell0'"),
    ):
        with pytest.raises(SettingsError, match=f"x: .*{words}.*--name.*--overwrite"):
            runs.run_course(*call, parameters, ())
    with pytest.raises(SettingsError, match=r"x: a network was trained here; .*--name"):
        runs.run_course(*call, {"checkpoint": "shipped"})
    assert run.path("checkpoint.safetensors").read_text() == "hours of work"
    # The declared value as text gives the same network.
    runs.run_course(*call, {"held_out": "cell0", "tau": ".10"}, ())
    tree = swc.read_swc(data / "cell2.swc")
    swc.write_swc(data / "cell2.swc", replace(tree, radius=tree.radius + 1))
    with pytest.raises(SettingsError, match="other files"):
        runs.run_course(*call, {"held_out": "cell0"}, ())
    runs.run_course(*call, {"held_out": "cell0"}, (), overwrite=True)


@pytest.mark.parametrize("where", ["folder", "pair", "runs", "parameter"])
def test_names_that_notebooks_cannot_hold_are_refused(data, tmp_path, where):
    """Before anything is written: JSON, which notebooks are, has no place for such bytes."""
    strange = os.fsdecode(b"z\xe4hler")
    own, runs_folder = tmp_path / "pairs", tmp_path / "runs"
    shutil.copytree(data, own)
    if where == "folder":
        own = own.rename(tmp_path / strange)
    if where == "pair":
        for path in own.glob("cell0.*"):
            path.rename(own / f"{strange}{path.suffix}")
    if where == "runs":
        runs_folder = tmp_path / strange
    parameters = {"held_out": strange} if where == "parameter" else {}
    with pytest.raises(SettingsError, match=r"that are not UTF-8.* rename it"):
        runs.run_course(str(own), "smoke", folder=runs_folder, parameters=parameters)
    assert not runs_folder.exists()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("steps", "abc", "'steps': expected int, such as 200, got 'abc'"),
        ("frozen", "maybe", "expected bool"),
        ("size", 22.5, "expected int"),
        ("batch", 0, "batch=0: expected at least 1"),
        ("encoder_rate", "1e-4", 1e-4),
        ("frozen", "no", False),
        ("decoder_rate", 1, 1.0),
        ("start_from", 2024, "2024"),
        ("start_from", True, "'start_from': expected str"),
    ],
)
def test_parameters_of_papermill_are_read_as_declared(tmp_path, name, value, expected):
    names = runs.notebook_parameters("03_training") | {name: value}
    if isinstance(expected, str) and "expected" in expected:
        with pytest.raises(SettingsError, match=re.escape(expected)):
            runs.open_run(tmp_path / "run", "03_training", names)
        assert not (tmp_path / "run").exists()
    else:
        runs.open_run(tmp_path / "run", "03_training", names)
        assert (names[name], type(names[name])) == (expected, type(expected))


@pytest.mark.parametrize("change", [{"depth": 3}, {"initialisation": "scratch"}])
def test_a_start_that_does_not_fit_is_refused_before_the_work(data, tmp_path, change):
    """By default, runs continue from the shipped network."""
    said = f"start_from=.*shipped: has {next(iter(change))}=.*start_from= to begin without it"
    with pytest.raises(WeightsError, match=said):
        runs.run_course(str(data), "course", "x", tmp_path / "runs", change)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["run", "train", "sweep"])
def test_a_start_is_looked_for_where_the_user_stands(data, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    shutil.copy(SHIPPED, "mine.safetensors")
    given = {"start_from": "mine.safetensors", "initialisation": "center", "depth": 3}
    grid = yaml.safe_load(SMALL.format(results="x.csv", data=data, bad=""))
    Path("grid.yaml").write_text(yaml.safe_dump(grid | {"networks": {"mine": given}}))
    call = {
        "run": lambda: runs.run_course(str(data), "empty", "x", "runs", given),
        "train": lambda: runs.train_run(str(data), "empty", "x", "runs", given),
        "sweep": lambda: sweeps.run_sweep("grid.yaml", "runs"),
    }[command]
    # Read and compared, so it was found.
    with pytest.raises(WeightsError, match=r"start_from=.*mine.safetensors: has .*depth=5"):
        call()


def test_a_run_in_which_nothing_is_found_goes_on_to_its_report(data, tmp_path, monkeypatch):
    """A network that finds nothing, and a foreign kernel that answers to python3."""
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    foreign = {"argv": ["false", "{connection_file}"], "display_name": "x", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(foreign))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    parameters = {"held_out": "cell0", "validate_on": "cell1", "min_size": 999_999}
    chain = ("05_swc_tracing",)
    run = runs.run_course(str(data), "empty", "x", tmp_path / "runs", parameters, chain)
    assert run.path("report.html").is_file()
    assert not list(run.path("swc").glob("*.swc"))
    scores = run.metrics()["neurons"]["cell0"]
    assert (scores["recall"], scores["trees"], scores["ESA"]) == (0, 0, float("inf"))
    assert "nothing to trace" in run.path("report.html").read_text()


@pytest.mark.parametrize("name", ["weights_file", "start_from"])
def test_a_key_follows_what_is_in_a_file_and_not_its_name_alone(name, tmp_path):
    file = tmp_path / "net.safetensors"
    parameters, keys = {name: os.path.relpath(file, runs.NOTEBOOKS)}, set()
    for content in (b"a", b"b"):
        file.write_bytes(content)
        keys.add(runs._key("03_training", parameters, ""))
    keys |= {runs._key("03_training", {name: given}, "") for given in ("", "shipped")}
    assert len(keys) == 4


@pytest.mark.parametrize("name", ["results", "ours", "regime"])
def test_notebook_06_is_made_again_when_its_results_change(name, tmp_path, monkeypatch):
    """Also where no parameter names them, as in `make course`."""
    for notebook in runs.NOTEBOOKS.glob("06_*.ipynb"):
        (tmp_path / "notebooks").mkdir()
        shutil.copy(notebook, tmp_path / "notebooks")
    shutil.copytree(runs.REPOSITORY / "data" / "results", tmp_path / "data" / "results")
    monkeypatch.setattr(runs, "NOTEBOOKS", tmp_path / "notebooks")
    before = runs._key("06_table1", {}, "")
    assert runs._key("06_table1", {}, "") == before
    default = runs.notebook_parameters("06_table1")[name]
    with (runs.NOTEBOOKS / default).open("a") as file:
        file.write("\n")
    assert runs._key("06_table1", {}, "") != before


def test_a_key_follows_the_modules_that_compute_and_no_others():
    code = "!pip install x\nfrom neurolib import training\n"
    code += "from neurolib.course import plotting, runs\n"
    code += "from neurolib.course.exercises import evaluation as exercises\nimport numpy"
    names = {path.stem for path in runs.modules_of(code)}
    # Direct and indirect imports of training.
    assert {"training", "network", "inflation", "blocking", "volume", "formats", "swc"} <= names
    assert not names & {"plotting", "widgets", "runs", "sweeps", "cli", "tracing", "evaluation"}
    assert runs.modules_of("from numpy import linalg") == []
    inside = "def f():\n    from neurolib.tracing import trace"
    assert "tracing" in {path.stem for path in runs.modules_of(inside)}
