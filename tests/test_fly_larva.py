"""Fly neurons from a server that drops, stalls and lies; their repair; replacement folders."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import faults
import jupytext
import nbformat
import networkx as nx
import numpy as np
import papermill
import pytest
import servers
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from test_formats import DATA, needs_data, refusal

from neurolib import blocking, evaluation, inference, training
from neurolib.blocking import make_target
from neurolib.course import baselines, cli, runs, sweeps
from neurolib.data import datasets, fly_larva
from neurolib.data.fly_larva import FINAL, load_fly_larva, repair_trace
from neurolib.errors import DataError, NeurolibError
from neurolib.swc import components, length, read_swc
from neurolib.volume import read_volume

NAMES = ("alpha", "beta_body", "beta_tail", FINAL[0])
PUBLISHED = fly_larva.MANIFEST


def digest(content):
    return hashlib.sha256(content).hexdigest()


def stack_of(seed):
    return np.random.default_rng(seed).integers(0, 255, (3 + seed, 20, 24), np.uint8)


# As the tracer saves: rows from the bottom (y = 19 - y), each branch separately with its branch
# point repeated, a missing parent, a cycle (6, 7, 8), and a gap of 4 voxels before 9.
TRACE = b"""# a trace
1 0 2 17 1 1 -1
2 0 5 14 1 2 1
3 0 8 11 1 1 2
4 0 5 14 1 2 99
5 0 5 10 2 1 4
6 0 8 11 1 1 8
7 0 11 11 1 1 6
8 0 11 9 1 1 7
9 0 15 9 1 1 -1
"""


def slice_file(pixels):
    """A slice like those of the microscope: a palette image with a grey palette."""
    grey = np.tile(np.arange(256, dtype=np.uint16) * 257, (3, 1))
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, photometric="palette", colormap=grey)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def raw():
    """Raw files by their path in the repository, and the manifest of them."""
    files, pairs = {}, []
    for seed, name in enumerate(NAMES):
        stem = f"Journal Results/{name}/a stack/S_"
        slices = {f"{z:03d}.tif": slice_file(pixels) for z, pixels in enumerate(stack_of(seed))}
        swc = f"Journal Results/{name}/a trace.swc"
        files |= {stem + key: content for key, content in slices.items()} | {swc: TRACE}
        pairs.append(
            {
                "name": name,
                "neuron": name.partition("_")[0] if name.startswith("beta") else name,
                "z_shift": 0.0,
                "raw_mb": 1.0,
                "voxels": digest(stack_of(seed).tobytes()),
                "trees": ["0" * 64],
                "swc": {swc: digest(TRACE)},
                "stem": stem,
                "slices": {key: digest(content) for key, content in slices.items()},
            }
        )
    return files, {"repository": "https://example.org/x", "commit": "c" * 40, "pairs": pairs}


@pytest.fixture(autouse=True)
def environment(raw, tmp_path, monkeypatch):
    """The generated manifest, the test's own cache, and no address of the user's."""
    servers.hurry(monkeypatch)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(raw[1]))
    monkeypatch.setattr(fly_larva, "MANIFEST", path)
    monkeypatch.setenv("NEUROLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NEUROLIB_DATA", raising=False)
    monkeypatch.setenv(fly_larva.VARIABLE, "http://127.0.0.1:9/nobody")


def behave(monkeypatch, server, way):
    monkeypatch.setenv(fly_larva.VARIABLE, server.url(way, "/"))


@pytest.fixture
def server(raw, monkeypatch):
    with servers.serve(raw[0]) as server:
        behave(monkeypatch, server, "good")
        yield server


def refused(*args):
    return refusal(DataError, load_fly_larva, *args)


def finished(tmp_path):
    """Files in the cache with final names."""
    folder = tmp_path / "cache" / "fly-larva"
    return sorted(p.name for p in folder.glob("[!.]*")) if folder.exists() else []


def check_pairs(pairs, names=NAMES[:3]):
    assert [pair.name for pair in pairs] == list(names)
    for pair in pairs:
        assert np.array_equal(read_volume(pair.image).data, stack_of(NAMES.index(pair.name)))
        tree = read_swc(pair.swc)
        # The nodes of the trace in the image's frame, repeated places once, as one tree.
        assert len(tree.xyz) == 7
        assert tree.xyz[tree.parent < 0].tolist() == [[5, 5, 1]]  # the thickest
        assert length(tree) == pytest.approx(2 * 18**0.5 + 17**0.5 + 3 + 2 + 4)


# ----------------------------------------------------------------------------------- download


def test_fetch_brings_the_pairs_and_says_that_there_is_no_licence(server, tmp_path, capsys):
    cli.app(["fetch", "fly-larva"], standalone_mode=False)
    told = capsys.readouterr().out
    for words in ("https://example.org/x at commit cccccccccccc", "no licence", "3 pairs"):
        assert words in told
    asked = len(server.requests)
    assert asked == sum(3 + seed + 1 for seed in range(3))
    pairs = datasets.load_dataset("fly-larva")
    check_pairs(pairs)
    assert [pair.neuron for pair in pairs] == ["alpha", "beta", "beta"]
    assert len(server.requests) == asked, "what is in the cache was asked for again"
    # Raw files are gone; the final neurons were not downloaded.
    whole = [f"{name}.{kind}" for name in NAMES[:3] for kind in ("swc", "tif")]
    assert finished(tmp_path) == [*whole, "trees.json"]
    assert not list((tmp_path / "cache" / "fly-larva").glob(".*"))


@pytest.mark.parametrize("way", ["drops", "drops_once", "busy", "unannounced"])
def test_servers_that_drop_or_are_busy_are_borne_with(server, monkeypatch, way):
    behave(monkeypatch, server, way)
    check_pairs(load_fly_larva())


@pytest.mark.parametrize(
    ("way", "part"),
    [
        ("truncated", "stopped at"),
        ("trickle", "bytes per second"),
        ("silent", "timed out"),
        ("down", "503"),
        ("missing", "answered 404"),
        ("huge", "bytes, expected"),
        ("endless", "more bytes"),
        ("elsewhere", "asked for the bytes from"),
        ("loop", "redirect"),
        ("altered", "has sha256"),
        ("short", "has sha256"),
        ("page", "has sha256"),
    ],
)
def test_servers_that_stall_and_lie_leave_nothing(server, monkeypatch, tmp_path, way, part):
    behave(monkeypatch, server, way)
    message = refused()
    assert part in message
    assert len(server.requests) <= (31 if way == "loop" else 10)
    assert f"/{way}/Journal%20Results/alpha/" in message
    assert finished(tmp_path) == []
    behave(monkeypatch, server, "good")
    # The hash refuses the liar's part once, and the part is not kept.
    with suppress(DataError):
        load_fly_larva()
    check_pairs(load_fly_larva())


def test_without_a_network_one_line_says_what_to_do(tmp_path):
    message = refused()
    assert re.search(f"127.0.0.1:9.*{fly_larva.VARIABLE}", message)
    assert finished(tmp_path) == []


def test_an_interrupted_download_goes_on_wherever_it_was(server, tmp_path, monkeypatch):
    real, files = fly_larva.download, sum(3 + seed + 1 for seed in range(3))
    for before in range(files):

        def one_more(*args, before=before):
            if len(server.requests) > before:
                raise KeyboardInterrupt
            real(*args)

        monkeypatch.setattr(fly_larva, "download", one_more)
        with suppress(KeyboardInterrupt):
            load_fly_larva()
        # One more file each time, none twice, and only whole pairs.
        assert len(server.requests) == before + 1
        pairs = {name.partition(".")[0] for name in finished(tmp_path)} - {"trees"}
        assert len(pairs) == sum(before + 1 >= whole for whole in (4, 9, 15))
    check_pairs(load_fly_larva())


def test_a_killed_download_ends_in_the_same_files(server, tmp_path):
    kills = 20 if os.environ.get("NEUROLIB_FAULTS") else 2
    args = fly_larva.MANIFEST, os.environ[fly_larva.VARIABLE]
    whole = None
    for here in faults.killed(faults.download_pairs, tmp_path / "killed", kills, 7, *args):
        whole = whole or faults.content(tmp_path / "killed" / "whole")
        assert len(whole) == 7
        # Killed between its last file and the end, a process leaves its work folder to the next
        # one that writes; where all files are there, none does.
        made = {name: content for name, content in faults.content(here).items() if "/." not in name}
        assert made == whole


@pytest.mark.parametrize("lost", ["alpha.tif", "beta_body.swc"])
def test_of_a_partial_cache_only_the_rest_is_fetched(server, tmp_path, lost):
    load_fly_larva()
    asked = len(server.requests)
    (tmp_path / "cache" / "fly-larva" / lost).unlink()
    check_pairs(load_fly_larva())
    assert len(server.requests) - asked == (4 if lost == "alpha.tif" else 5)


def test_doctor_says_whether_the_pairs_are_there(server, tmp_path, monkeypatch):
    assert re.search("0 of 3 pairs .*neurolib fetch fly-larva", fly_larva.describe_fly_larva())
    load_fly_larva()
    assert fly_larva.describe_fly_larva().endswith("3 of 3 pairs in the cache")
    monkeypatch.setenv("NEUROLIB_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="no such folder"):
        fly_larva.describe_fly_larva()


# ---------------------------------------------------------------------------------- stand-ins


@pytest.fixture
def own(server, tmp_path):
    """A folder of all finished pairs outside the cache."""
    load_fly_larva()
    load_fly_larva("fly-larva-final")
    shutil.move(tmp_path / "cache" / "fly-larva", tmp_path / "own" / "fly-larva")
    server.requests.clear()
    return tmp_path / "own" / "fly-larva"


@pytest.mark.parametrize("place", ["own/fly-larva", "own", "relative"])
def test_a_folder_of_pairs_stands_in_for_the_download(own, server, monkeypatch, tmp_path, place):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEUROLIB_DATA", "own" if place == "relative" else str(tmp_path / place))
    check_pairs(load_fly_larva())
    check_pairs(load_fly_larva("fly-larva-final"), NAMES[3:])
    # Notebooks in another folder find it by the same variable.
    code = "from neurolib.data import pairs; print(pairs.stand_in('fly-larva'))"
    told = subprocess.check_output([sys.executable, "-c", code], cwd="/", text=True)
    assert Path(told.strip()) == own
    assert server.requests == []


def test_missing_pairs_are_said_and_foreign_ones_refused(own, monkeypatch, tmp_path):
    monkeypatch.setenv("NEUROLIB_DATA", str(own))
    (own / "beta_body.swc").unlink()
    with pytest.warns(UserWarning, match=r"1 of 3 pairs of fly-larva are missing \(beta_body\)"):
        pairs = load_fly_larva()
    check_pairs(pairs, ("alpha", "beta_tail"))
    for name in NAMES[:3]:
        (own / f"{name}.tif").unlink()
    assert "3 of 3 pairs of fly-larva are missing" in refused()
    (tmp_path / "empty").mkdir()
    for place, words in (("empty", "found 0 images"), ("nowhere", "no such folder")):
        monkeypatch.setenv("NEUROLIB_DATA", str(tmp_path / place))
        assert words in refused()


def test_altered_pairs_are_refused_in_stand_ins_and_in_the_cache(own, monkeypatch, tmp_path):
    def alter(folder):
        stack = stack_of(0)
        stack[1, 2, 3] ^= 1
        tifffile.imwrite(folder / "alpha.tif", stack, photometric="minisblack")
        assert "alpha.tif: not the published data" in refused()
        tifffile.imwrite(folder / "alpha.tif", stack_of(0), photometric="minisblack")
        swc = folder / "beta_tail.swc"
        swc.write_text(swc.read_text().replace("5.0000 5.0000", "5.0000 6.0000"))
        assert "beta_tail.swc" in refused()

    shutil.copytree(own, tmp_path / "cache" / "fly-larva")
    alter(tmp_path / "cache" / "fly-larva")
    monkeypatch.setenv("NEUROLIB_DATA", str(own))
    alter(own)


def test_a_folder_for_another_data_set_is_found_by_its_name(own, monkeypatch, tmp_path):
    shutil.copytree(own, tmp_path / "all" / "bigneuron-janelia")
    monkeypatch.setenv("NEUROLIB_DATA", str(tmp_path / "all"))
    pairs = datasets.load_dataset("bigneuron-janelia")
    assert {pair.image.parent.name for pair in pairs} == {"bigneuron-janelia"}


def test_names_stay_names_and_results_depend_on_the_files(own, monkeypatch, tmp_path):
    monkeypatch.setenv("NEUROLIB_DATA", str(own))
    assert datasets.name_from("fly-larva", tmp_path) == "fly-larva"
    assert datasets.data_label("fly-larva") == "fly-larva"
    whole = datasets.data_key("fly-larva")
    (own / "alpha.tif").unlink()
    with pytest.warns(UserWarning, match="alpha"):
        assert datasets.data_key("fly-larva") != whole


# ------------------------------------------------------------------------------ final test set


def test_nothing_trains_on_the_final_neurons(own, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("NEUROLIB_DATA", str(own))
    assert not {pair.name for pair in load_fly_larva()} & set(FINAL)
    final = datasets.load_dataset("fly-larva-final")
    for pairs in (final, final + load_fly_larva()):
        with pytest.raises(DataError, match="final test set"):
            datasets.split_by_neuron(pairs)
    runs = ["--folder", str(tmp_path / "runs")]
    grid = str(Path(cli.__file__).parents[2] / "profiles" / "table1-cpu.yaml")
    for command in (["run"], ["train"], ["sweep", grid]):
        with pytest.raises(NeurolibError, match="final test set"):
            cli.app([*command, "--data", "fly-larva-final", *runs], standalone_mode=False)
    calibrate = ["calibrate", "fly-larva-final", "--out", str(tmp_path / "x.safetensors")]
    with pytest.raises(NeurolibError, match="final test set"):
        cli.app(calibrate, standalone_mode=False)


def execute_in_this_process(source, target, parameters, cwd, **_):
    """The code of a notebook up to its measurements; a kernel would not know the generated data."""
    notebook, names = jupytext.read(source.with_suffix(".py")), {}
    os.chdir(cwd)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "code" and "bootstrap" not in tags:
            exec(cell.source, names)
        if "parameters" in tags:
            names |= parameters
        if "run" in names and "chosen" in names["run"].metrics():
            break
    nbformat.write(nbformat.v4.new_notebook(), target)


@pytest.mark.parametrize("profile", ["final", "course"])
def test_a_finished_checkpoint_is_evaluated_on_final_neurons(own, monkeypatch, tmp_path, profile):
    """Notebook 04 itself, in this process, which knows the generated data set.

    What another profile says of training does not matter.
    """
    monkeypatch.setenv("NEUROLIB_DATA", str(own))
    monkeypatch.setattr(papermill, "execute_notebook", execute_in_this_process)
    monkeypatch.setattr(runs, "EVALUATION", ("04_evaluation",))
    monkeypatch.chdir(tmp_path)
    checkpoint = faults.checkpoint(tmp_path / "trained.safetensors")
    call = {"data": "fly-larva-final", "profile": profile, "folder": tmp_path / "runs"}
    # The images are noise, so no frame fits.
    call |= {"ignore_frames": True}
    run = runs.run_course(**call, parameters={"checkpoint": str(checkpoint)})
    split = datasets.read_manifest(run.path("split.json"))
    assert [len(part) for part in split] == [0, 0, 1]
    assert split.test[0].name == FINAL[0]
    (name,) = run.metrics()["neurons"]
    assert name == FINAL[0]
    network, facts = training.load_checkpoint(checkpoint)
    sample = blocking.read_sample(split.test[0])
    mask = inference.predict_volume(network, sample.image) >= facts["threshold"]
    mask = baselines.drop_small(mask, 200)
    score = run.metrics()["neurons"][name]["Dice"]
    assert score == pytest.approx(evaluation.dice(mask, sample.mask))
    # A trained run keeps its network, and a file without a network is refused.
    run.record("validation", {})
    (tmp_path / "other.safetensors").write_bytes(b"none")
    for path, words in ((checkpoint, "trained here"), (tmp_path / "other.safetensors", "other")):
        with pytest.raises(NeurolibError, match=words):
            runs.run_course(**call, parameters={"checkpoint": str(path)})
    with pytest.raises(DataError, match="final test set"):
        runs.run_course(**call)


# ------------------------------------------------------------------------------------- repairs


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), nodes=st.integers(1, 40), size=st.floats(3, 60))
def test_repaired_traces_are_minimum_forests_as_networkx_finds_them(seed, nodes, size):
    rng = np.random.default_rng(seed)
    xyz = np.round(rng.uniform(0, size, (nodes, 3)), 3)
    again = rng.integers(nodes, size=nodes // 4)
    xyz = np.concatenate([xyz, xyz[again]])
    parent = rng.integers(-1, len(xyz) + 2, len(xyz))  # roots, cycles, itself, and no such node
    rows = [
        f"{i} 0 {x} {y} {z} 1 {p}" for i, ((x, y, z), p) in enumerate(zip(xyz, parent, strict=True))
    ]
    tree, joined = repair_trace("\n".join(rows).encode(), 100, 0.5)

    there = xyz * (1, -1, 1) + (0, 99, 0.5)
    moved = [tuple(row) for row in np.round(there, 2)]
    at = dict(zip(moved, there, strict=True))

    def apart(a, b):
        return float(np.linalg.norm(at[a] - at[b]))

    graph = nx.Graph()
    graph.add_nodes_from(moved)
    for i, p in enumerate(parent):
        if 0 <= p < len(xyz) and moved[i] != moved[p]:
            graph.add_edge(moved[i], moved[p], weight=apart(moved[i], moved[p]))
    forest = nx.minimum_spanning_tree(graph)
    gaps = [(apart(a, b), a, b) for a in forest for b in forest if a < b]
    expected = 0
    for gap, a, b in sorted(gaps):
        if gap <= 6 and not nx.has_path(forest, a, b):
            forest.add_edge(a, b, weight=gap)
            expected += 1
    assert joined == expected
    assert len(tree.xyz) == len(forest)
    assert {tuple(row) for row in np.round(tree.xyz, 2)} == set(forest)
    assert length(tree) == pytest.approx(forest.size("weight"))
    parts = {frozenset(part) for part in nx.connected_components(forest)}
    labels = components(tree)
    edges = {
        frozenset(tuple(row) for row in np.round(tree.xyz[labels == label], 2))
        for label in np.unique(labels)
    }
    assert edges == parts


@pytest.fixture
def published(monkeypatch):
    monkeypatch.setattr(fly_larva, "MANIFEST", PUBLISHED)
    return json.loads(PUBLISHED.read_text())


@needs_data
@pytest.mark.parametrize("way", ["good", "drops_once"])
def test_real_raw_files_become_the_reference_pairs(published, tmp_path, monkeypatch, raw, way):
    """The three pairs whose raw files are at hand, from the server to the cache."""
    root = DATA / "fly_larva" / "raw"
    files = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*.*")}
    published["pairs"] = [e for e in published["pairs"] if next(iter(e["swc"])) in files]
    assert len(published["pairs"]) == 3
    small = tmp_path / "three.json"
    small.write_text(json.dumps(published))
    monkeypatch.setattr(fly_larva, "MANIFEST", small)
    with servers.serve(files) as server:
        behave(monkeypatch, server, way)
        pairs = load_fly_larva()
    for pair in pairs:
        volume = read_volume(pair.image).data
        assert np.array_equal(volume, read_volume(DATA / "real3d" / f"{pair.name}.tif").data)
        ours, theirs = read_swc(pair.swc), read_swc(DATA / "real3d" / f"{pair.name}.swc")
        assert length(ours) == pytest.approx(length(theirs), abs=0.01)
        masks = [make_target(tree, volume.shape)[1] for tree in (ours, theirs)]
        assert np.array_equal(*masks)


@needs_data
def test_the_reference_pairs_stand_in(published, monkeypatch):
    monkeypatch.setenv("NEUROLIB_DATA", str(DATA / "real3d"))
    neurons = {pair.name: pair.neuron for pair in load_fly_larva()}
    assert (len(neurons), len(set(neurons.values()))) == (10, 8)
    assert neurons["in40_body"] == neurons["in40_tail"]
    assert neurons["in44_body"] == neurons["in44_tail"]
    assert "4 of 4 pairs" in refused("fly-larva-final")


@needs_data
def test_the_manifest_holds_the_published_facts(published):
    facts = json.loads((DATA / "fly_larva" / "manifest.json").read_text())
    assert published["commit"] == facts["commit"]
    for ours, theirs in zip(published["pairs"], facts["pairs"], strict=True):
        paths = {ours["stem"] + key: value for key, value in ours["slices"].items()}
        folder = theirs["slice_folder"]
        assert paths == {f"{folder}/{s['name']}": s["sha256"] for s in theirs["slices"]}
        expected = {key: theirs[key] for key in ("name", "neuron", "z_shift")}
        expected["swc"] = {theirs["swc"]: theirs["swc_sha256"]}
        assert ours.items() >= (expected | {"voxels": theirs["voxels_sha256"]}).items()


def test_the_manifest_comes_with_the_package(published):
    assert len(published["pairs"]) == 14
    assert {entry["name"] for entry in published["pairs"]} > set(FINAL)
    assert sum(len(entry["slices"]) + 1 for entry in published["pairs"]) == 1429
    hashes = [h for e in published["pairs"] for h in (*e["slices"].values(), *e["trees"])]
    assert all(len(h) == 64 for h in hashes)
    project = Path(cli.__file__).parents[2] / "pyproject.toml"
    assert '"neurolib.data" = ["*.json"]' in project.read_text()


def test_profiles_name_data_that_anybody_can_get_and_never_a_final_neuron():
    root = Path(cli.__file__).parents[2]
    grids = [sweeps.read_grid(path) for path in root.glob("profiles/*-cpu.yaml")]
    assert len(grids) >= 4
    for grid in grids:
        assert grid["data"] in ("synthetic", "fly-larva")
        rows = (grid["common"], *grid["networks"].values())
        named = [names for fold in grid["folds"] for names in fold.values()]
        named += [row.get("validate_on", "") for row in rows]
        assert not set(",".join(named).split(",")) & set(FINAL)
    for kind in ("profiles/*", "notebooks/*.py", "docs/*.md", "*.md", "data/README.md"):
        for path in root.glob(kind):
            assert "../shared" not in path.read_text(encoding="utf-8"), path
