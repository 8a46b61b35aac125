"""Run folders, grids and results files: what is written is read back, the rest is refused."""

import numpy as np
import pytest

from neurolib import evaluation, runs
from neurolib.errors import SettingsError

GRID = """\
data: somewhere
results: data/results/x.csv
seeds: [0, 1]
folds: [a]
common: {steps: 3}
networks: {one: {depth: 1}}
"""


def row(network: str, neuron: str, seed: int, dice: float) -> dict:
    values = dict.fromkeys(runs.COLUMNS, "x")
    values |= {"network": network, "neuron": neuron, "seed": seed, "dice": dice}
    return values | {"hd95": 1.0, "cldice": 0.5, "seconds": 60}


def test_results_round_trip_and_are_averaged_over_seeds(tmp_path):
    path = tmp_path / "table.csv"
    rows = [row("a", "n1", 0, 0.2), row("a", "n1", 1, 0.4), row("a", "n2", 0, 0.5)]
    rows += [row("b", "n1", 0, 0.6), row("b", "n2", 0, 0.5)]
    runs._write_results(path, rows)
    found = runs.read_results(path)
    assert runs.by_network(found, "dice") == {
        "a": {"n1": pytest.approx(0.3), "n2": 0.5},
        "b": {"n1": 0.6, "n2": 0.5},
    }
    assert "5 minutes" in runs.describe_results(found)[-1]


def test_results_of_another_kind_are_refused(tmp_path):
    path = tmp_path / "table.csv"
    with pytest.raises(SettingsError, match="no results"):
        runs.read_results(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(SettingsError, match="expected the columns"):
        runs.read_results(path)


def test_networks_are_compared_on_the_neurons_that_both_have():
    values = {
        "base": {"n1": 0.1, "n2": 0.2, "n3": 0.3},
        "other": {"n1": 0.2, "n2": 0.4, "n9": 0.9},
    }
    base, other = evaluation.compare_networks(values, "base")
    assert set(base) == {"network", "mean"}
    assert other["n"] == 2
    assert other["difference"] == pytest.approx(np.mean([0.1, 0.2]))
    assert other["low"] <= other["difference"] <= other["high"]
    # Two differences of one sign: of the four sign patterns two are as extreme.
    assert other["p"] == pytest.approx(0.5)
    with pytest.raises(SettingsError, match="expected one of base, other"):
        evaluation.compare_networks(values, "none")


def test_a_grid_is_read(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(GRID)
    assert runs.read_grid(path)["networks"] == {"one": {"depth": 1}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GRID.replace("seeds", "sedes"), "expected the keys"),
        ("just text", "expected the keys"),
        ("a: {", "not valid YAML"),
    ],
)
def test_bad_grids_are_refused(text, message, tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=message):
        runs.read_grid(path)
    with pytest.raises(SettingsError, match="no such grid"):
        runs.read_grid(tmp_path / "none.yaml")


def test_a_grid_with_an_unknown_parameter_fails_before_anything_runs(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(GRID.replace("depth", "dept"))
    with pytest.raises(SettingsError, match="did you mean 'depth'"):
        runs.run_sweep(path, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_every_profile_is_made_of_known_parameters():
    defaults = {n: runs.notebook_parameters(runs.notebook_path(n)) for n in runs.COURSE}
    profiles = [path for path in runs.PROFILES.glob("*.yaml") if path.stem != "table1-cpu"]
    assert len(profiles) >= 4
    for path in profiles:
        runs.choose_parameters(runs.read_profile(path), defaults)
    grid = runs.read_grid(runs.PROFILES / "table1-cpu.yaml")
    for network in grid["networks"].values():
        runs.choose_parameters(grid["common"] | network, defaults)


def test_a_run_keeps_what_stages_record(tmp_path):
    run = runs.open_run(tmp_path / "run")
    run.record("target", {"kind": "radius", "tau": 0.5})
    run.record("neurons", {"a": {"Dice": 0.5}})
    assert runs.target_of(run) == {"kind": "radius", "tau": 0.5}
    assert run.metrics()["neurons"]["a"]["Dice"] == 0.5
    assert "| a | 0.500 |" in runs.summary(run)


def test_without_a_checkpoint_a_run_takes_the_one_that_comes_along(tmp_path):
    run = runs.open_run(tmp_path)
    assert runs.checkpoint_of(run).name == "example.safetensors"
    assert runs.checkpoint_of(run).is_file()
    run.path("checkpoint.safetensors").write_bytes(b"")
    assert runs.checkpoint_of(run) == run.path("checkpoint.safetensors")
