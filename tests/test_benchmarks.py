"""The benchmarks: all of them run, and the stored table has what they give. Nothing is timed."""

import csv
import importlib
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from neurolib.course.runs import REPOSITORY
from neurolib.inference import predict_volume
from neurolib.swc import Tree

STORED = json.loads((REPOSITORY / "data/results/bench.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def load():
    """Imports a module of the folder, which is no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "benchmarks")
        yield importlib.import_module


@pytest.fixture(scope="module")
def tiny(load):
    bench = load("bench")
    return bench.measure(list(bench.TASKS), load("measure").TINY, 1)


def identity(row):
    return row["benchmark"], row["peer"]


def test_every_benchmark_runs(tiny, load):
    ran = {row["benchmark"] for row in tiny["rows"]}
    assert set(tiny["about"]) == ran == {*load("bench").TASKS}
    for row in tiny["rows"]:
        assert row["agreement"], row["task"]
        if row["agreement"] != "not installed":
            assert math.isfinite(row["ours"]), row["task"]
        assert (row["verdict"] != "") == (row["target"] != "")
    said = {identity(row): row["agreement"] for row in tiny["rows"]}
    assert said["hd95", "MONAI"] == said["hd95", "medpy"] == "ours 2.0000, theirs 2.0000"
    assert float(said["distance", "NumPy, all pairs"].split()[4]) < 1e-12
    for (benchmark, peer), agreement in said.items():
        if benchmark == "tiff":
            assert agreement.startswith("equal")
        if benchmark == "stitching":
            errors = [float(words.split()[-1]) for words in agreement.split(",")]
            assert max(errors) < 1e-6, peer
        if benchmark == "inference":
            assert float(agreement.split()[-1]) < 0.01


def test_the_stored_table_is_what_the_benchmarks_give(tiny):
    assert tiny["about"] == STORED["about"]
    assert {identity(row) for row in tiny["rows"]} <= {identity(row) for row in STORED["rows"]}
    targets = [
        {(*identity(row), row["target"]) for row in rows if row["target"]}
        for rows in (tiny["rows"], STORED["rows"])
    ]
    assert targets[0] <= targets[1]
    assert ("tracing", "kimimaro fast", ">= 3") in targets[1]
    for row in STORED["rows"]:
        assert row["agreement"] != "not installed", row["task"]
        if row["theirs"] != "":
            better = (row["theirs"], row["ours"])[:: -1 if row["unit"].endswith("/s") else 1]
            assert row["ratio"] == pytest.approx(better[0] / better[1])
        if row["verdict"] == "met":
            sign, limit = row["target"].split()
            met = row["ratio"] >= float(limit) if sign == ">=" else row["ours"] <= float(limit)
            assert met, row["task"]


@pytest.mark.parametrize("name", [p.name for p in (REPOSITORY / "data/results").glob("*.csv")])
def test_every_line_of_a_stored_table_has_as_many_cells_as_the_first(name):
    with open(REPOSITORY / "data/results" / name, newline="", encoding="utf-8") as file:
        assert len({len(row) for row in csv.reader(file, strict=True)}) == 1


@pytest.mark.parametrize(
    ("target", "holds", "verdict"), [(3, True, "met"), (3, False, "missed"), (3.1, True, "missed")]
)
def test_a_target_needs_the_ratio_and_the_result(load, monkeypatch, target, holds, verdict):
    measure = load("measure")
    ours, theirs = (lambda: 1), (lambda: 2)
    times = {ours: iter([1, 9, 2, 1]), theirs: iter([5, 6, 6, 9])}
    monkeypatch.setattr(measure, "seconds", lambda function: next(times[function]))
    told = []
    limits = {"target": target, "holds": lambda a, b: told.append((a, b)) or holds}
    row = measure.compete("t", ours, "p", theirs, lambda a, b: f"{a} {b}", 3, **limits)
    assert (row["ours"], row["theirs"], row["ratio"]) == (2, 6, 3)
    assert (row["verdict"], row["agreement"], row["repeats"]) == (verdict, "1 2", 3)
    assert set(told) <= {(1, 2)}


def test_slow_rows_are_repeated_less_and_rates_are_the_other_way_round(load, monkeypatch):
    measure = load("measure")
    monkeypatch.setattr(measure, "seconds", lambda function: function())
    compare, rate = lambda a, b: "", {"work": 40, "unit": "x/s"}
    slow = measure.compete("t", lambda: 10, "p", lambda: 20, compare, 9, **rate)
    assert slow["repeats"] == measure.FEWEST
    assert (slow["ours"], slow["theirs"], slow["ratio"]) == (4, 2, 2)
    assert measure.compete("t", lambda: 1, "p", lambda: 2, compare, 9)["repeats"] == 9


def test_brute_force_distance_by_hand(load):
    line = Tree(np.array([[0.0, 0, 0], [4, 0, 0]]), np.ones(2), np.zeros(2, int), np.array([-1, 0]))
    beside = replace(line, xyz=line.xyz + np.array([0, 3, 0]))
    assert load("trees").brute_force_esa(line, beside) == pytest.approx(3)
    longer = replace(line, xyz=line.xyz * 3)
    # Of 13 points at 0 to 12, those beyond 4 are 1 to 8 away.
    assert load("trees").brute_force_esa(longer, line) == pytest.approx(36 / 13 / 2)


@pytest.mark.parametrize("arguments", [["none"], ["--repeats", "0"]])
def test_what_there_is_not_is_refused(load, arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        load("bench").main(arguments)
    assert ended.value.code == 2
    assert "expected at least 1" in (said := capsys.readouterr().err) or "choose from" in said


@pytest.mark.parametrize("predict", ["center", "all"])
@pytest.mark.parametrize("overlap", [0, 0.5])
def test_the_cost_of_skipped_tiles_is_counted(predict, overlap, load):
    class Certain(torch.nn.Module):
        settings, tiles = SimpleNamespace(depth=3, block=20, predict=predict), 0

        def forward(self, blocks):
            self.tiles += len(blocks)
            return torch.full_like(blocks[:, 0] if predict == "all" else blocks[:, 0, :1], 9.0)

    rng, skipping = np.random.default_rng(3), load("skipping").skipping
    image = rng.uniform(0.01, 0.3, (9, 64, 67)).astype(np.float32)
    image[4, 10:12, 5:15] = image[6, 50, 40:60] = 0.9
    mask = rng.random(image.shape) < 0.02
    options = {"overlap": overlap, "device": "cpu", "progress": False}
    counted, kept = Certain(), Certain()
    predict_volume(counted, image, skip_empty=False, **options)
    chance = predict_volume(kept, image, **options)
    cost = skipping(image, mask, kept.settings, overlap)
    assert cost.tiles == pytest.approx(1 - kept.tiles / counted.tiles)
    assert 0.1 < cost.tiles < 0.95
    assert cost.foreground == pytest.approx((chance[mask] == 0).mean())
    assert cost.foreground > 0.05
    assert skipping(image, image == 0.9, kept.settings, overlap).foreground == 0
    assert skipping(image, mask & False, kept.settings, overlap).foreground == 0


def test_kimimaro_joins_gaps_up_to_the_bridge(load):
    pytest.importorskip("kimimaro")
    mask = np.zeros((12, 30, 60), bool)
    mask[3:6, 8:11, 5:50] = True
    mask[:, :, 30:36] = False
    trace = load("trees").trace_kimimaro
    assert [(trace(mask, bridge=gap).parent < 0).sum() for gap in (0, 15)] == [2, 1]
    xyz = trace(mask, (6.0, 2.0, 2.0)).xyz
    assert np.abs(xyz[:, 1:] - (9, 4)).max() <= 1.5
    assert np.ptp(xyz[:, 0]) > 35
