"""Work that `test_faults.py` can kill, in separate processes.

The processes are forked from a server that has imported slow modules before starting any thread,
so that each costs some hundredths of a second.
"""

import csv
import dataclasses
import io
import json
import locale
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import numpy as np
from safetensors import safe_open

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [f"neurolib.{name}" for name in ("cli", "large", "sweeps", "bigneuron", "_timm")]
    + ["papermill", "nbconvert", "zarr", "huggingface_hub", "pytest", "skimage.morphology"]
)
PIPE = None  # in such a process, the other end of what `start` returns
FUTURE = 2_200_000_000.0  # the year 2039
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree"}


# -------------------------------------------------------------------- processes that end early


def start(work: Callable, *args, end_at: int = -1, **kwargs):
    """Start `work(*args)` in a process; return it, and a pipe with messages from it.

    With `end_at`, it kills itself before that event (`EVENTS`) at a file below `args[0]`.
    """
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_child, args=(theirs, end_at, work, args, kwargs))
    process.start()
    theirs.close()
    assert ours.poll(120), "the process does not begin"
    ours.recv()
    return process, ours


def _child(pipe, end_at: int, work: Callable, args: tuple, kwargs: dict) -> None:
    import torch

    global PIPE
    PIPE = pipe
    torch.set_num_threads(1)
    place, events = os.fspath(args[0]) if args else "", 0

    def heard(event: str, about: tuple) -> None:
        nonlocal events
        if event in EVENTS and about and place in str(about[0]):
            if events == end_at:
                os.kill(os.getpid(), signal.SIGKILL)
            events += 1

    pipe.send("begun")
    log = os.open(os.devnull, os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.addaudithook(heard)
    began = time.monotonic()
    try:
        result = work(*args, **kwargs)
    except BaseException as error:
        pipe.send((events, 0.0, f"{type(error).__name__}: {error}"))
        raise
    pipe.send((events, time.monotonic() - began, result))


def finish(work: Callable, *args, **kwargs):
    """Run `work` in a process; return its events, seconds and result."""
    process, pipe = start(work, *args, **kwargs)
    return end_of(process, pipe)


def end_of(process, pipe):
    """Wait for a process; return its events, seconds and result, or raise its error."""
    try:
        answer = pipe.recv() if pipe.poll(120) else (0, 0.0, "no answer in 120 s")
    except EOFError:
        answer = (0, 0.0, None)
    process.join(10)
    if process.exitcode != 0:
        process.kill()
        answer = (*answer[:2], answer[2] or f"ended by {process.exitcode}")
        raise RuntimeError(answer[2])
    return answer


def killed(work: Callable, folder: Path, number: int, seed: int, *args) -> Iterator[Path]:
    """Run `work` whole, then `number` times with a kill and a second run; yield each folder.

    Every other kill is at an event of the file system, drawn from those of the whole run, which
    hits the moments between two files; the others are at random times. All files
    then get times in the future, as if the clock had been set back.
    """
    events, seconds, _ = finish(work, folder / "whole", *args)
    assert events > 10
    rng = random.Random(seed)
    for kill in range(number):
        for attempt in range(10):
            here = folder / f"{kill}-{attempt}"
            if kill % 2 == 0 and attempt == 0:
                process, _ = start(work, here, *args, end_at=rng.randrange(events))
                process.join(300)
            else:
                process, _ = start(work, here, *args)
                process.join(seconds * rng.uniform(0, 1) / (1 + attempt))
                process.kill()
                process.join(60)
            if process.exitcode == -signal.SIGKILL:
                break
        assert process.exitcode == -signal.SIGKILL, "it was always done before it could be killed"
        for path in here.rglob("*"):
            os.utime(path, (FUTURE, FUTURE), follow_symlinks=False)
        finish(work, here, *args)
        yield here


def content(folder: Path) -> dict[str, object]:
    """Contents of a folder's files by name, without parts that may differ and empty workplaces."""
    contents = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            # An empty one was killed between moving its output and removing its workplace.
            if path.name.startswith(".") and any(path.iterdir()):
                contents[name] = "left"
        elif path.suffix == ".safetensors":
            with safe_open(path, "np") as file:
                tensors = {k: file.get_tensor(k).tobytes() for k in sorted(file.keys())}
                contents[name] = (file.metadata(), tensors)
        elif path.suffix in (".html", ".ipynb"):
            contents[name] = "times"
        elif path.name == "metrics.json":
            metrics = json.loads(path.read_text().replace(str(folder), ""))
            metrics["notebooks"] = sorted(metrics["notebooks"])
            contents[name] = metrics
        elif path.name == "results.csv":
            with open(path, encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            contents[name] = [
                {k: v for k, v in r.items() if k not in ("seconds", "key")} for r in rows
            ]
        else:
            contents[name] = path.read_bytes().replace(os.fsencode(folder), b"")
    return contents


# ------------------------------------------------------------------------------------- works

NOTEBOOK = """\
import json
from pathlib import Path
from neurolib.files import write_text
run = Path(run_dir)
"""
STEPS = """\
for step in range(6):
    write_text(run / "step.txt", str(step * encoder_rate))
"""
RECORD = """\
metrics = json.loads((run / "metrics.json").read_text())
metrics["about"] = dict(style="real", encoder="none scratch", weights="none", device="CPU")
points = [{"step": step, "training_loss": 1.0, "dice": step * encoder_rate} for step in (1, 2)]
metrics["validation"] = {"neurons": "b", "points": points}
_ = write_text(run / "metrics.json", json.dumps(metrics))
"""
GRID = """\
measure: validation
data: {folder}/pairs
results: {folder}/results.csv
seeds: [0]
folds: [a]
common: {{validate_on: b}}
networks: {{slow: {{encoder_rate: 0.5}}, schnell ü: {{encoder_rate: 0.25}}}}
"""


def tree(z: float = 4.0):
    from neurolib.swc import Tree

    xyz = np.column_stack([np.arange(4.0, 60.0, 8), np.linspace(8, 50, 7), np.full(7, z)])
    return Tree(xyz, np.ones(7), np.full(7, 3), np.arange(-1, 6))


def stack(seed: int = 0, shape: tuple = (9, 64, 80)) -> np.ndarray:
    return np.random.default_rng(seed).integers(100, 900, shape, dtype=np.uint16)


def train(folder: Path) -> None:
    """Four steps of a small network on two volumes."""
    from test_training import FAST, NETWORK, tubes

    from neurolib.network import build
    from neurolib.training import train

    network, _ = build(NETWORK, "scratch", seed=3)
    how = {"steps": 4, "batch": 1, "validate_every": 2, "validation_blocks": 2, "save_every": 1}
    train(network, [tubes("a", 0)], [tubes("b", 1)], folder, dataclasses.replace(FAST, **how))


def checkpoint(path: Path) -> Path:
    """A checkpoint of a small network without training."""
    import torch
    from test_training import NETWORK

    from neurolib.network import Segmenter
    from neurolib.training import save_checkpoint

    torch.manual_seed(0)
    network = Segmenter(NETWORK)
    facts = {"training": {"frozen": False}, "tau": 0.1, "threshold": 0.5, "dice": 0, "step": 1}
    save_checkpoint(path, network, network.state_dict(), facts)
    return path


def notebooks(folder: Path) -> None:
    """Tiny notebooks in place of the repository's."""
    folder.mkdir(parents=True)
    one = "test_neurons = 1\nvalidation_neurons = 1\nseed = 0\nheld_out = ''\nvalidate_on = ''\n"
    one += "train_neurons = 0\ntarget = 'sironi'\ntau = 0.1\nrun_dir = ''\ndata = ''\n"
    one += "channel = -1\nspacing = ''\n"
    three = "run_dir = ''\ndata = ''\nseed = 0\nencoder_rate = 1.0\n"
    three += "held_out = ''\nvalidate_on = ''\n"
    for name, parameters in (("01_data_blocking", one), ("03_training", three)):
        cells = [parameters, NOTEBOOK, STEPS, RECORD]
        notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, cells)))
        notebook.cells[0].metadata["tags"] = ["parameters"]
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "", "language": ""}
        notebook.metadata["language_info"] = {"name": "python"}
        for number, cell in enumerate(notebook.cells):
            cell["id"] = f"cell-{number}"
        nbformat.write(notebook, folder / f"{name}.ipynb")


def sweep(folder: Path, source: Path, kernel: bool) -> None:
    """Two runs of a grid, in kernels or, cheaper, in this process."""
    import papermill

    from neurolib import swc, volume
    from neurolib.course import runs, sweeps

    if not (folder / "pairs").exists():
        with volume.atomic_path(folder / "pairs") as pairs:
            for seed, name in enumerate("abc"):
                volume.write_volume(pairs / f"{name}.tif", stack(seed))
                swc.write_swc(pairs / f"{name}.swc", tree())
    runs.NOTEBOOKS = source
    if not kernel:
        papermill.execute_notebook = _execute
    (folder / "grid.yaml").write_text(GRID.format(folder=folder), encoding="utf-8")
    # The stacks are noise, so no tree fits.
    sweeps.run_sweep(folder / "grid.yaml", folder / "runs", ignore_frames=True)


def _execute(source, target, parameters, cwd, **_) -> None:
    notebook = nbformat.read(source, as_version=4)
    names: dict[str, object] = {}
    os.chdir(cwd)
    for number, cell in enumerate(notebook.cells):
        exec(cell.source, names)
        if not number:
            names |= parameters
        cell.execution_count = number + 1
        nbformat.write(notebook, target)


def segment(folder: Path, checkpoint: Path) -> None:
    """The command on a TIFF in memory: tree, mask and probability."""
    from neurolib import volume

    folder.mkdir(exist_ok=True)
    if not (folder / "in.tif").exists():
        volume.write_volume(folder / "in.tif", stack(shape=(6, 40, 56)))
    arguments = ["--checkpoint", checkpoint, "--threshold", "0.0001", "--device", "cpu"]
    arguments += ["--out", folder / "out.swc", "--mask", folder / "mask.tif"]
    arguments += ["--probability", folder / "probability.tif"]
    assert command("segment", folder / "in.tif", *arguments) == 0


def segment_regions(folder: Path, checkpoint: Path, image: Path) -> None:
    """A Zarr on disk into another, one region at a time."""
    from neurolib import volume
    from neurolib.course import large
    from neurolib.inference import Tiling

    volume.CHUNKS = (3, 32, 32)
    folder.mkdir(exist_ok=True)
    out = folder / "out.zarr"
    large.REGION = (3, 32, 64)
    large.predict_large(image, checkpoint, out, Tiling(device="cpu"))


DINO = "vit_small_patch16_224.dino"


def download(
    folder: Path, hub: str, archive: str = "", wait: float = 0.0, limit: int = 0, name: str = DINO
) -> None:
    """Weights from a model hub, then the archive of a data set, into a cache."""
    from neurolib import weights
    from neurolib.data import bigneuron
    from neurolib.data import download as downloading

    use_hub(hub)
    os.environ |= {"NEUROLIB_CACHE": str(folder), "NEUROLIB_WEIGHTS": "", "NO_PROXY": "127.0.0.1"}
    if limit:
        limit_files(limit)
    if wait:
        time.sleep(max(0.0, wait - time.time()))
    weights.load_pretrained(name)
    if archive:
        url, digest = archive.split("#")
        downloading.PAUSE = 0.0
        os.environ |= {"NEUROLIB_BIGNEURON_URL": url, "NEUROLIB_BIGNEURON_SHA256": digest}
        bigneuron.fetch_janelia()


def download_pairs(folder: Path, manifest: Path, address: str) -> None:
    """Download the raw files of a data set into a cache and make its pairs."""
    from neurolib.data import download as downloading
    from neurolib.data import fly_larva

    os.environ |= {"NEUROLIB_CACHE": str(folder), "NEUROLIB_DATA": "", "NO_PROXY": "127.0.0.1"}
    os.environ[fly_larva.VARIABLE] = address
    downloading.PAUSE, fly_larva.MANIFEST = 0.0, manifest
    fly_larva.load_fly_larva()


def ask(cache: Path, address: str, name: str = DINO) -> str:
    """Outcome of asking a hub for weights, with no package index at hand."""
    from huggingface_hub import constants

    from neurolib import weights
    from neurolib.errors import NeurolibError

    constants.HF_HUB_DOWNLOAD_TIMEOUT = 1
    weights.TIMEOUT, weights.DEADLINE = 0.5, 2.0
    os.environ |= {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    try:
        download(cache, address, name=name)
    except NeurolibError as error:
        return f"{type(error).__name__}: {error}"
    return weights.provenance(name)


def write_slowly(path: Path) -> None:
    from neurolib.files import atomic_path

    with atomic_path(path) as temporary:
        temporary.write_text("half")
        PIPE.send("half")
        time.sleep(60)


def parent_of_worker(folder: Path) -> None:
    code = "from neurolib.course import sweeps; sweeps._end_with_parent()"
    worker = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    PIPE.send(worker.pid)
    time.sleep(60)


def hold(path: Path) -> None:
    from neurolib.files import claim

    with claim(path):
        PIPE.send("held")
        time.sleep(60)


def read_as_nobody(folder: Path, checkpoint: Path) -> dict[str, str]:
    """Errors of all readers for a user who may not read the files."""
    import test_faults

    files = [(name, read) for name, _, read in test_faults.readers(checkpoint)]
    # Others may not be allowed to enter the folder.
    os.chdir(folder)
    if os.getuid() == 0:
        os.setuid(65534)
    errors = {}
    for name, read in files:
        try:
            read(Path(name))
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
    return errors


def copy_of_shrinking(folder: Path) -> None:
    from neurolib import volume

    data = volume.read_volume(folder / "in.npy").data
    os.truncate(folder / "in.npy", 1000)
    volume.write_volume(folder / "out.zarr", data)


# A name for each kind of output.
OUTPUTS = {
    "write_swc": "a.swc", "write_text": "a.json", "write_results": "a.csv",
    "record": "metrics.json", "history": "history.csv", "TIFF": "a.tif", "OME-TIFF": "b.tif",
    "npy": "a.npy", "zarr": "a.zarr", "weights": "w.safetensors", "checkpoint": "c.safetensors",
    "neurolib trace": "b.swc", "neurolib segment": "c.tif",
}  # fmt: skip


def write_all(folder: Path, checkpoint: Path, limit: int) -> dict[str, tuple[str, int]]:
    """Write every kind of output without enough room; return the error and exit status of each.

    The room is `limit` bytes per file or, if 0, a full disk.
    """
    import torch

    from neurolib import swc, training, volume
    from neurolib.course import runs, sweeps
    from neurolib.errors import NeurolibError
    from neurolib.files import write_text
    from neurolib.training import load_checkpoint, save_checkpoint

    network, facts = load_checkpoint(checkpoint)
    for name in OUTPUTS.values():
        (folder / name).write_bytes(b"old")
    source = volume.write_volume(checkpoint.parent / "in.tif", stack(shape=(8, 64, 64)))
    mask = np.zeros((64, 64, 64), bool)
    mask[2:-2:8, 2:-2:8, 2:-2] = True
    mask = volume.write_volume(checkpoint.parent / "mask.tif", mask)
    if limit:
        limit_files(limit)
    else:
        (folder / OUTPUTS["write_text"]).write_bytes(b"old")

    data, forest = stack(), tree()
    points = np.tile(forest.xyz, (2000, 1))
    parent = np.arange(-1, len(points) - 1)
    large = swc.Tree(points, np.ones(len(points)), np.full(len(points), 3), parent)
    path = {kind: folder / name for kind, name in OUTPUTS.items()}
    rows = [{"network": "x" * 100, "loss": 0.5}] * 2000
    (folder / "metrics.json").write_text("{}")
    works = {
        "write_swc": lambda p: swc.write_swc(p, large),
        "write_text": lambda p: write_text(p, "x" * 200_000),
        "write_results": lambda p: sweeps.write_results(p, rows),
        "record": lambda p: runs.Run(p.parent).record("x", {"y": "z" * 200_000}),
        "history": lambda p: training._write_history(p, rows),
        "TIFF": lambda p: volume.write_volume(p, data),
        "OME-TIFF": lambda p: volume.write_volume(p, data.astype(np.int32)),
        "npy": lambda p: volume.write_volume(p, data),
        "zarr": lambda p: volume.write_volume(p, np.concatenate([data] * 30)),
        "weights": lambda p: weights_of(p, {"x": torch.zeros(100_000)}),
        "checkpoint": lambda p: save_checkpoint(p, network, network.state_dict(), facts),
    }
    outcomes = {}
    for kind, work in works.items():
        try:
            work(path[kind])
            outcomes[kind] = ("nothing", 0)
        except NeurolibError as error:
            outcomes[kind] = (str(error), 0)
    (folder / "metrics.json").write_bytes(b"old")
    for name, arguments in (
        ("neurolib trace", (mask, "--out", path["neurolib trace"], "--min-size", 1)),
        (
            "neurolib segment",
            (source, "--checkpoint", checkpoint, "--probability", path["neurolib segment"]),
        ),
    ):
        sys.stderr = io.StringIO()
        status = command(name.split()[1], *arguments, "--overwrite")
        outcomes[name] = (sys.stderr.getvalue().splitlines()[-1], status)
    return outcomes


def weights_of(path: Path, tensors: dict) -> None:
    from neurolib.weights import save_weights

    save_weights(path, tensors, source="here")


def use_hub(address: str) -> None:
    """Point the hub's client, which reads its address at import, to another server."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    for module in (constants, file_download):
        if hasattr(module, "ENDPOINT"):
            module.ENDPOINT = address
        if hasattr(module, "HUGGINGFACE_CO_URL_TEMPLATE"):
            module.HUGGINGFACE_CO_URL_TEMPLATE = (
                address + "/{repo_id}/resolve/{revision}/{filename}"
            )


def command(*arguments: object) -> int:
    """Exit status of ``neurolib ARGUMENTS``, in this process."""
    from neurolib.course import cli

    sys.argv = ["neurolib", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0
    return 0


def facts(folder: Path, place: str = "", definitions: str = "") -> dict[str, str]:
    """Keys of runs, draws and hashes of files, which must not depend on the machine.

    With `place`, in that locale, whose definitions are in a folder.
    """
    from neurolib import blocking, swc, training, volume
    from neurolib.course import runs, sweeps
    from neurolib.data import datasets
    from neurolib.files import sha256, write_text

    if place:
        os.environ["LOCPATH"] = definitions
        locale.setlocale(locale.LC_ALL, place)
        assert locale.str(0.5) == "0,5"
    folder.mkdir(parents=True)
    notebooks(folder / "notebooks")
    runs.NOTEBOOKS = folder / "notebooks"
    pairs = folder / "pairs"
    for seed, name in enumerate("abcdef"):
        volume.write_volume(pairs / f"{name}.tif", stack(seed), (0.5, 0.25, 0.25))
        swc.write_swc(pairs / f"{name}.swc", tree(4.5), "Mikrometer: µm")
    write_text(folder / "a.json", json.dumps({"Länge": 0.25}, ensure_ascii=False))
    rows = [{"network": "größer", "dice": 0.5, "hd95": 1e-7}]
    sweeps.write_results(folder / "a.csv", rows)
    training._write_history(folder / "b.csv", rows)
    assert command("trace", pairs / "a.tif", "--threshold", "0.001", "--out", folder / "a.swc") == 0
    listed = datasets.load_dataset(str(pairs))
    split = datasets.split_by_neuron(listed, 2, 1, seed=3)
    values = {
        "data": datasets.data_key(str(pairs)),
        "run": runs._key("03_training", {"b": 1.5, "a": 2}, "x"),
        "split": str([[pair.name for pair in part] for part in split]),
        "spacing": str(volume.read_volume(pairs / "a.tif").spacing),
    }
    samples = [blocking.read_sample(pair) for pair in listed[:2]]
    blocks = training.BlockSource(samples, 3, 48, seed=1)
    values["blocks"] = str([blocks.places[blocks._row(k)].tolist() for k in range(20)])
    kinds = (".json", ".csv", ".swc", ".tif")
    paths = sorted(path for path in folder.rglob("*") if path.suffix in kinds)
    return values | {path.name: sha256(path) for path in paths}


def claims(folder: Path) -> dict[str, tuple[str, int]]:
    """Outcomes of reading weights that claim a terabyte, and the memory in bytes."""
    import torch

    from neurolib import weights
    from neurolib.errors import WeightsError
    from neurolib.training import load_checkpoint

    terabyte = 1 << 40
    about = {"x": {"dtype": "F32", "shape": [terabyte // 4], "data_offsets": [0, terabyte]}}
    header = json.dumps(about).encode()
    (folder / "data.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (folder / "header.safetensors").write_bytes(terabyte.to_bytes(8, "little") + header)
    repeated = torch.zeros(1, dtype=torch.half).expand(terabyte // 4)
    torch.save({"x": repeated}, folder / "repeated.pth")
    torch.save({"x": repeated}, folder / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({"x": torch.zeros(3 << 20)}, folder / "stored.pth")
    with (
        zipfile.ZipFile(folder / "stored.pth") as whole,
        zipfile.ZipFile(folder / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for member in whole.infolist():
            packed.writestr(member.filename, whole.read(member))
    (folder / "stored.pth").unlink()
    outcomes = {}
    for path in sorted(folder.iterdir()):
        weights.MAX_BYTES = 1 << (22 if path.name == "packed.pth" else 33)
        for read in (weights.read_weights, load_checkpoint):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                read(path)
                said = "read"
            except WeightsError as error:
                said = str(error)
            took = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            took *= 1 if sys.platform == "darwin" else 1024
            outcomes[f"{read.__name__} {path.name}"] = (said, took)
    return outcomes


def limit_files(size: int) -> None:
    """Limit this process to files of `size` bytes; beyond, writing fails as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
