"""Runs: papermill executes the notebooks in order; a run can be resumed in its folder.

The folder holds the executed notebooks, what they pass on (split, checkpoint, predicted volumes,
SWC), ``figures/``, ``metrics.json`` and ``report.html``. A notebook is executed again only if its
key changes: the hash of its code, its parameters, the modules that it computes with, and the key
of the notebook before it.
"""

import ast
import contextlib
import difflib
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import yaml

from neurolib import files
from neurolib.blocking import ignore_untraced, read_sample
from neurolib.data import datasets
from neurolib.data.datasets import Split, load_dataset
from neurolib.data.pairs import GENERATED, Pair, read_pair
from neurolib.errors import DataError, NeurolibError, SettingsError, WeightsError
from neurolib.evaluation import name_unit
from neurolib.files import CHECKPOINT, SHIPPED, SHIPPED_NAME
from neurolib.parameters import check_range, read_as
from neurolib.swc import Tree, check_frame, check_pair
from neurolib.volume import INVERT, Volume, inverted, normalise, remarks

REPOSITORY = Path(__file__).resolve().parents[2]
NOTEBOOKS = REPOSITORY / "notebooks"
PROFILES = REPOSITORY / "profiles"
DATA_NOTEBOOK = "01_data_blocking"
COURSE = (
    "00_start_here", DATA_NOTEBOOK, "02_weight_inflation", "03_training", "04_evaluation",
    "05_swc_tracing", "06_table1",
)  # fmt: skip
# The notebooks that evaluate a finished network (parameter `checkpoint` of `run_course`).
EVALUATION = ("04_evaluation", "05_swc_tracing")
# Modules that cannot change any number.
SHOWING = {"plotting", "widgets", "runs", "parameters", "exercises", "errors"}
# Seconds after which a hanging kernel is killed: at its start; per cell (GPUs train for hours).
START_TIMEOUT, CELL_TIMEOUT = 120, 24 * 3600
# Parameters that name files, relative to the user's current folder.
PATHS = (
    "weights_file", "start_from", "gold", "stacks", "real", "results", "ours", "regime",
)  # fmt: skip
# Parameters that name neurons.
NEURONS = ("held_out", "validate_on")
# Parameters set by an option of the command.
OPTIONS = {"data": "--data", "run_dir": "--folder and --name"}
# The output format of a live widget.
WIDGET = "application/vnd.jupyter.widget-view+json"
PROGRESS = re.compile(r"\d+%\s*\|.*\d+/\d+|\d+it \[|\bit/s\b|\bs/it\b")


# ------------------------------------------------------------------- the folder of a run


@dataclass(frozen=True)
class Run:
    """A run folder and its files."""

    folder: Path

    @property
    def figures(self) -> Path:
        """Folder of the figures."""
        return self.folder / "figures"

    def path(self, name: str) -> Path:
        """Path of a file of the run."""
        return self.folder / name

    def record(self, stage: str, values: dict) -> None:
        """Write `values` under `stage` into ``metrics.json``."""
        metrics = self.metrics()
        metrics[stage] = values
        files.write_text(self.path("metrics.json"), json.dumps(metrics, indent=1))

    def metrics(self) -> dict:
        """The recorded values, by stage."""
        path = self.path("metrics.json")
        try:
            return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
        except (ValueError, TypeError):
            raise SettingsError(
                f"{path}: damaged; expected the JSON file that a run writes; choose another --name"
            ) from None

    def describe_file(self, name: str) -> str:
        """Name, size and hash of a file that a notebook passes on."""
        path = self.path(name)
        return f"{name}: {path.stat().st_size / 1e6:.1f} MB, sha256 {files.sha256(path)[:12]}"


def split_of(run: Run, data: str) -> Split:
    """The split that notebook 01 left in a run, or its default split of `data`."""
    path = run.path("split.json")
    pairs = load_dataset(data)
    if not path.exists():
        datasets.write_manifest(path, datasets.split_by_neuron(pairs), seed=0)
    split = datasets.read_manifest(path)
    images = {pair.image.resolve() for pair in pairs}
    for pair in (*split.train, *split.validation, *split.test):
        if pair.image.resolve() not in images:
            raise DataError(
                f"{path}: a split of data other than {data} (of {pair.image}); choose another "
                "run_dir, or run notebook 01 with these data"
            )
    return split


def target_of(run: Run) -> dict:
    """Kind and threshold of the target of a run: ``kind`` and ``tau`` for `read_sample`."""
    return run.metrics().get("target", {"kind": "sironi", "tau": 0.1})


def checkpoint_of(run: Run) -> Path:
    """The checkpoint that notebook 03 left in a run or, before that, the shipped network.

    ``data/neurite.md`` describes the shipped network. If a trained run has
    lost its checkpoint, this is a WeightsError instead.
    """
    path = run.path(CHECKPOINT)
    if path.exists():
        return path
    if "validation" in run.metrics():
        raise WeightsError(f"{path}: missing, but the run was trained; run notebook 03 again")
    return SHIPPED


def open_run(folder: str | Path, notebook: str = "", names: dict | None = None) -> Run:
    """Open a run folder; create it if necessary.

    `names` are the ``globals()`` of a `notebook`, in which the parameters that papermill set are
    converted to their declared types, or refused (SettingsError).
    """
    for name, default in (notebook_parameters(notebook) if notebook else {}).items():
        # papermill reads the name 003 as a number; only `split_by_neuron` can undo that.
        if isinstance(default, str) and type(names[name]) is int:
            names[name] = names[name] if name in NEURONS else str(names[name])
        else:
            names[name] = read_as(default, names[name], f"parameter {name!r}")
        if names[name] != default:
            check_range(name, names[name])
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            f"{folder}: cannot be created ({error.strerror}); choose a folder you may write to"
        ) from None
    return Run(folder)


# ------------------------------------------------------------------ profiles and parameters


def read_profile(name: str | Path) -> dict:
    """Read a profile, a flat YAML file of notebook parameters.

    `name` is a file, or the name of one in ``profiles/`` without suffix.
    """
    path = Path(name)
    if path.suffix.lower() not in (".yaml", ".yml"):
        path = PROFILES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml")))
        raise SettingsError(f"{name}: no such profile; choose from {known}, or give a .yaml file")
    values = read_yaml(path) or {}
    if not isinstance(values, dict) or any(isinstance(v, dict | list) for v in values.values()):
        raise SettingsError(f"{path}: expected a flat list of 'parameter: value' lines")
    return values


class _Text(yaml.SafeLoader):
    """YAML whose values stay text; the parameter's declaration decides their type."""

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def compose_mapping_node(self, anchor: str | None) -> yaml.Node:
        """Refuse a key that appears twice; YAML's parser would keep the last."""
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                problem = f"the key {key.value!r} appears twice"
                raise yaml.composer.ComposerError(problem=problem, problem_mark=key.start_mark)
        return node


def read_yaml(path: Path) -> object:
    """Read a YAML file, all numbers as text (SettingsError if it is not YAML)."""
    try:
        return _Text(files.decode(path.read_bytes())).get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = f" ({error.problem})" if getattr(error, "problem", None) else ""
        raise SettingsError(
            f"{path}:{line} not valid YAML{problem}; expected lines 'key: value'"
        ) from None
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error}); expected a YAML file") from None


def notebook_parameters(name: str) -> dict:
    """Names and default values in the one cell tagged ``parameters`` of a notebook."""
    tagged = [code for code, tags in _code_cells(name) if "parameters" in tags]
    if len(tagged) != 1:
        raise SettingsError(f"{name}: {len(tagged)} cells tagged 'parameters', expected one")
    return read_assignments(tagged[0], name)


def _code_cells(notebook: str) -> list[tuple[str, list[str]]]:
    """Code and tags of each code cell, without nbformat, whose import takes a second."""
    cells = json.loads(notebook_path(notebook).read_text(encoding="utf-8"))["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    return [("".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in cells]


def read_assignments(code: str, shown: str) -> dict:
    """Names and values of the lines ``name = literal`` of Python code that holds nothing else.

    `shown` says in errors where the code comes from.
    """
    try:
        statements = ast.parse(code).body
    except SyntaxError as error:
        raise SettingsError(f"{shown}: not Python ({error.msg})") from None
    values = {}
    for statement in statements:
        try:
            (target,), value = statement.targets, statement.value
            values[target.id] = ast.literal_eval(value)
        except (AttributeError, ValueError):
            line = ast.unparse(statement).splitlines()[0]
            raise SettingsError(f"{shown}: {line!r} is not 'name = literal'") from None
    return values


def defaults_of(notebooks: Iterable[str]) -> dict[str, dict]:
    """The parameters and default values of notebooks, and of notebook 01, which splits the data."""
    return {name: notebook_parameters(name) for name in dict.fromkeys((DATA_NOTEBOOK, *notebooks))}


def merge(*settings: dict[str, dict]) -> dict:
    """The parameters of all notebooks together; later settings override earlier ones."""
    return {k: v for part in settings for own in part.values() for k, v in own.items()}


def choose_parameters(values: dict, defaults: dict[str, dict]) -> dict[str, dict]:
    """Give each notebook the parameters that it declares, converted to the declared types.

    `values` come from a profile and the command line; text is converted to the type of the
    default. `defaults` maps each notebook to its parameters and their default values.
    """
    values = dict(values)
    known = merge(defaults)
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"
            raise SettingsError(f"parameter {name!r}: no notebook declares it; {hint}")
        values[name] = read_as(known[name], value, f"parameter {name!r}")
        check_range(name, values[name])
        files.check_name(str(values[name]))
    return {
        notebook: {name: values[name] for name in own if name in values}
        for notebook, own in defaults.items()
    }


def check_settings(values: dict, folder: str | Path = NOTEBOOKS) -> tuple:
    """Refuse early what a stage would refuse hours later (SettingsError).

    `values` holds all parameters of the notebooks; their paths are relative to `folder`. This
    returns the settings of network and training.
    """
    from neurolib import blocking, devices, inflation, network, training

    def those_of(settings):
        return settings(**{f.name: values[f.name] for f in fields(settings) if f.name in values})

    shape, training_settings = map(those_of, (network.NetworkSettings, training.TrainingSettings))
    patch = getattr(network.make(shape), "patch", 1)
    if shape.size < patch:
        raise SettingsError(f"size={shape.size}: expected at least a patch, {patch} pixels")
    devices.pick_precision(values["precision"], devices.pick_device(values["device"]).type)
    for name, choices in (
        ("initialisation", (*inflation.STRATEGIES, "scratch")),
        ("target", blocking.KINDS),
    ):
        if values[name] not in choices:
            raise SettingsError(f"{name}={values[name]!r}: expected one of {', '.join(choices)}")
    if values["target"] == "radius" and "skeleton" in training_settings.loss:
        raise SettingsError(
            f"loss={training_settings.loss}: expected another for target=radius, in which the "
            "centreline cannot be told from the rest of the neurite"
        )
    if values.get("every", 1) > 1 and shape.predict == "all":
        raise SettingsError(
            f"every={values['every']}: expected 1 for a network that predicts all slices"
        )
    if start := values["start_from"]:
        start = start if start == SHIPPED_NAME else Path(folder) / start
        training.check_start(start, shape, values["initialisation"])
    return shape, training_settings


def localise(values: dict, start: str | Path = NOTEBOOKS) -> dict:
    """Rewrite paths among the parameters relative to the folder `start`."""
    paths = {n: values[n] for n in PATHS if values.get(n) and values[n] != SHIPPED_NAME}
    for name, path in paths.items():
        if not os.path.exists(path):
            raise SettingsError(f"{name}={path}: no such file or folder in {Path.cwd()}")
    return values | {name: os.path.relpath(path, start) for name, path in paths.items()}


# -------------------------------------------------------------------------------- execution


def run_course(
    data: str = "synthetic",
    profile: str = "course",
    name: str = "",
    folder: str | Path = "runs",
    parameters: dict | None = None,
    notebooks: tuple[str, ...] = COURSE,
    ignore_frames: bool = False,
    overwrite: bool = False,
) -> Run:
    """Execute the notebooks on a data set; skip finished ones and resume an interrupted run.

    Parameters
    ----------
    data, profile : str
        See `neurolib.data.datasets.load_dataset` and `read_profile`.
    name, folder : str, path
        Name of the run, by default data and profile, and the folder of all runs.
    parameters : dict, optional
        These override the profile. With ``checkpoint``, the path of a trained network, notebooks
        04 and 05 evaluate it on all pairs, and nothing is trained.
    notebooks : tuple of str
        Notebooks to run. Without 01, its split and target are made from the same parameters.
    ignore_frames : bool
        Accept trees that do not lie on the neurites of their images.
    overwrite : bool
        Train again in a folder whose network had other settings or data.
    """
    given = _merge_parameters(profile, parameters)
    checkpoint = given.get("checkpoint", "")
    checkpoint = str(files.checkpoint_file(checkpoint)) if checkpoint else ""
    notebooks = EVALUATION if checkpoint else notebooks
    defaults = defaults_of(notebooks)
    if checkpoint:  # what a profile says about training does not matter
        used = {"checkpoint"} | merge(defaults).keys() | (parameters or {}).keys()
        given = {key: given[key] for key in given if key in used}
    path = _run_path(data, profile, name, folder)
    # Notebooks run in their own folder.
    values = localise({key: given[key] for key in given if key != "checkpoint"}) | {
        "run_dir": os.path.relpath(path, NOTEBOOKS),
        "data": datasets.name_from(data, NOTEBOOKS),
    }
    chosen = choose_parameters(values, defaults)
    merged = merge(defaults, chosen)
    if "encoder" in merged:
        check_settings(merged)
    if checkpoint:
        defaults[DATA_NOTEBOOK] |= _target_of(checkpoint, path)
    split = defaults[DATA_NOTEBOOK] | chosen[DATA_NOTEBOOK]
    check_data(data, [split], ignore_frames, not checkpoint)
    with _begin(path, data, given, overwrite) as (run, before):
        if DATA_NOTEBOOK not in notebooks:
            before += _prepare(run, data, split, checkpoint)
        for number, notebook in enumerate(notebooks, 1):
            before = _key(notebook, chosen[notebook], before)
            label = f"[{number}/{len(notebooks)}] {notebook}"
            if _is_done(run, notebook, before):
                print(f"{label}: done before", flush=True)
                continue
            print(label, flush=True)
            _execute(run, notebook, chosen[notebook], before)
        write_report(run, notebooks)
    return run


def train_run(
    data: str = "synthetic",
    profile: str = "course",
    name: str = "",
    folder: str | Path = "runs",
    parameters: dict | None = None,
    ignore_frames: bool = False,
    overwrite: bool = False,
) -> Run:
    """Train like notebook 03, without pictures, on all devices that torchrun provides.

    `run_course` with the same parameters continues from there. Parameters and errors are the same.
    """
    from neurolib import inference, network, training

    defaults = defaults_of(COURSE)
    given = _merge_parameters(profile, parameters)
    chosen = choose_parameters(localise(given, "."), defaults)
    split = defaults[DATA_NOTEBOOK] | chosen[DATA_NOTEBOOK]
    values = defaults["03_training"] | chosen["03_training"]
    shape, settings = check_settings(split | values, ".")
    fabric = training.start_fabric(values["device"], values["precision"])
    path = _run_path(data, profile, name, folder)
    first = fabric.is_global_zero
    if first:
        check_data(data, [split], ignore_frames)
    others = contextlib.nullcontext((Run(path), ""))
    with _begin(path, data, given, overwrite) if first else others as (run, _):
        if first:
            _prepare(run, data, split)
        fabric.barrier()
        pairs, target = datasets.read_manifest(run.path("split.json")), target_of(run)
        samples = [read_sample(pair, **target) for pair in pairs.train]
        if values["ignore_untraced"]:
            samples = [ignore_untraced(sample) for sample in samples]
        held_out = [read_sample(pair, **target) for pair in pairs.validation]
        source = (values["initialisation"], values["weights_file"], values["seed"])
        net, _ = network.build(shape, *source)
        if values["start_from"]:
            training.restore(net, values["start_from"])
        options = (settings, target["tau"], fabric)
        result = training.train(net, samples, held_out, run.folder, *options)
        if first:
            device = values["device"]
            inference.calibrate(result.checkpoint, held_out, values["fused"], device=device)
    return run


def _merge_parameters(profile: str | Path, parameters: dict | None) -> dict:
    """Parameters of a profile and of the caller; those with their own options are refused."""
    values = read_profile(profile) | (parameters or {})
    for name in OPTIONS.keys() & values.keys():
        raise SettingsError(f"parameter {name!r}: set it with {OPTIONS[name]}")
    return values


def check_run(folder: Path, data: str, given: dict | None = None) -> None:
    """Refuse a folder that holds something else (SettingsError).

    This includes a network trained with parameters other than `given`, or on other files.
    """
    files.check_name(folder.resolve())
    if not folder.is_dir():
        return
    if not (folder / "metrics.json").is_file():
        if any(not path.name.startswith(".") for path in folder.iterdir()):
            raise SettingsError(
                f"{folder}: holds something other than a run; choose another --name or --folder"
            )
        return
    made = Run(folder).metrics().get("made_from", {})
    moved = made and made["folder"] != _absolute(data)
    trained = given is not None and (folder / CHECKPOINT).is_file()
    key = files.text_key(datasets.data_key(data)) if made and (moved or trained) else ""
    if moved and made["key"] != key:
        raise SettingsError(
            f"{folder}: a run on {made['folder']}, not on {_absolute(data)}; choose another --name"
        )
    old = made.get("parameters", {})
    if not trained or old.get("checkpoint"):
        return
    changed = []
    for name, default in merge(defaults_of(("03_training",))).items():
        before, now = (read_as(default, of.get(name, default), name) for of in (old, given))
        changed += [f"{name}={before!r}"] if now != before else []
    if made and made["key"] != key:
        changed.append("other files")
    if changed:
        raise SettingsError(
            f"{folder}: its network was trained with other settings ({', '.join(changed)}); choose "
            "another --name, or give --overwrite to train again"
        )


def _target_of(checkpoint: str, folder: Path) -> dict:
    """The target of a finished network; refuse `folder` if it has a trained one."""
    from neurolib.training import load_checkpoint

    metrics = Run(folder).metrics()
    made = metrics.get("made_from", {}).get("parameters", {})
    trained = (folder / CHECKPOINT).exists() and not made.get("checkpoint")
    if trained or "validation" in metrics:
        raise SettingsError(
            f"{folder}: a network was trained here; choose another --name to evaluate {checkpoint}"
        )
    facts = load_checkpoint(checkpoint)[1]
    return {"target": facts.get("target", "sironi"), "tau": facts["tau"]}


def _run_path(data: str, profile: str | Path, name: str, folder: str | Path) -> Path:
    return Path(folder) / (name or f"{datasets.data_label(data)}-{Path(profile).stem}")


@contextlib.contextmanager
def _begin(path: Path, data: str, given: dict, overwrite: bool) -> Iterator[tuple[Run, str]]:
    """Check and lock a run's folder; record data (name and place) and parameters.

    This yields the run and the key of the data.
    """
    check_run(path, data, None if overwrite else given)
    run = open_run(path)
    with files.claim(run.path(".lock")):
        key = datasets.data_key(data)
        source = {"data": data, "folder": _absolute(data), "key": files.text_key(key)}
        run.record("made_from", source | {"parameters": given})
        yield run, key


def _absolute(data: str) -> str:
    """A data set's name, with its folder (if any) as an absolute path."""
    folder = datasets.folder_in(data)
    return data.removesuffix(folder) + os.path.realpath(folder) if folder else data


def notebook_path(name: str) -> Path:
    """Path of one of the repository's own notebooks."""
    path = NOTEBOOKS / f"{name}.ipynb"
    if path.resolve().parent != NOTEBOOKS:
        raise SettingsError(f"{path}: not one of the repository's notebooks; only those can be run")
    if not path.is_file():
        raise SettingsError(
            f"{path}: no such notebook; the command works in a clone of the repository "
            "installed with 'pip install -e .'"
        )
    return path


def check_data(
    data: str, choices: Sequence[dict], ignore_frames: bool = False, is_split: bool = True
) -> None:
    """Refuse unusable data now, not inside a notebook.

    `choices` are parameters of notebook 01, one dict for each way to read and (if `is_split`) to
    split the data. `ignore_frames` accepts trees that do not lie on the neurites of their images.
    """
    if data in GENERATED:
        return
    printed: set[str] = set()
    options = {(v["channel"], v["spacing"]) for v in choices}
    for values in choices if is_split else ():
        _split(load_dataset(data), values)
    for pair in (pair for option in sorted(options) for pair in load_dataset(data, *option)):
        files.check_name(data, pair.image.resolve(), pair.swc.resolve())
        volume, tree = read_pair(pair)
        for remark in set(remarks(volume, "")) - printed:  # once, not for every image
            print(f"{pair.image.name}{remark}", flush=True)
            printed.add(remark)
        check_pair(tree, volume.data.shape, pair.name)
        if not ignore_frames:
            refuse_misplaced(volume, tree, pair.name)


def refuse_misplaced(volume: Volume, tree: Tree, name: str) -> None:
    """Refuse a tree that does not lie on its neurites, and name the command's way out."""
    try:
        check_frame(tree, volume, name)
    except DataError as error:
        why = f"{name}: {INVERT}" if inverted(normalise(volume.data)) else error
        raise DataError(f"{why}, or continue with --ignore-frames") from None


def _split(pairs: list[Pair], values: dict) -> Split:
    """The split that notebook 01 makes with these parameters."""
    names = ("test_neurons", "validation_neurons", "seed", "held_out", "validate_on")
    return datasets.split_by_neuron(
        pairs, *(values[n] for n in names), train=values["train_neurons"]
    )


def _prepare(run: Run, data: str, values: dict, checkpoint: str = "") -> str:
    """Write the split and the target like notebook 01; return their parameters as text.

    With a finished `checkpoint`, store it like notebook 03; all pairs are test pairs.
    """
    # Notebooks resolve paths from another folder.
    pairs = [
        replace(pair, image=pair.image.resolve(), swc=pair.swc.resolve())
        for pair in load_dataset(data, values["channel"], values["spacing"])
    ]
    split = Split((), (), tuple(pairs)) if checkpoint else _split(pairs, values)
    datasets.write_manifest(run.path("split.json"), split, values["seed"])
    run.record("target", {"kind": values["target"], "tau": values["tau"]})
    if checkpoint:
        with files.atomic_path(run.path(CHECKPOINT)) as temporary:
            shutil.copyfile(checkpoint, temporary)
        run.record("about", {"data": data, "network": run.describe_file(CHECKPOINT)})
        values = values | run.metrics()["about"]
        note = "" if data == "fly-larva-final" else "; it must not have been trained on any of them"
        print(f"{checkpoint}: evaluated on all {len(pairs)} pairs of {data}{note}", flush=True)
    return json.dumps(values, sort_keys=True)


def _key(notebook: str, parameters: dict, before: str) -> str:
    code = [code for code, _ in _code_cells(notebook)]
    facts = [before, json.dumps(parameters, sort_keys=True), *code]
    facts += map(files.sha256, modules_of("\n".join(code)))
    values = notebook_parameters(notebook) | parameters
    paths = filter(None, map(values.get, PATHS))
    named = (SHIPPED if path == SHIPPED_NAME else NOTEBOOKS / path for path in paths)
    facts += [files.sha256(path) for path in named if path.is_file()]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()


def modules_of(code: str) -> list[Path]:
    """The package's modules that code imports, directly or indirectly.

    Modules that only display or control (`SHOWING`) are left out: a new colour in a figure must
    not train a network again.
    """
    package, modules = Path(__file__).parents[1], set()
    todo = [re.sub(r"(?m)^(\s*)[!%].*", r"\1pass", code)]  # the notebook's shell lines
    while todo:
        for node in ast.walk(ast.parse(todo.pop())):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            top, *inside = node.module.split(".")
            if top != "neurolib" or SHOWING & set(inside):
                continue
            folder = package.joinpath(*inside)
            names = [folder / alias.name for alias in node.names] if folder.is_dir() else [folder]
            for path in (name.with_suffix(".py") for name in names if name.name not in SHOWING):
                if path not in modules and path.is_file():
                    modules.add(path)
                    todo.append(path.read_text(encoding="utf-8"))
    return sorted(modules)


def _is_done(run: Run, notebook: str, key: str) -> bool:
    record = run.metrics().get("notebooks", {}).get(notebook, {})
    left = [f"{notebook}.ipynb", *([CHECKPOINT] if notebook == "03_training" else [])]
    return record.get("key") == key and all(run.path(name).exists() for name in left)


def _execute(run: Run, notebook: str, parameters: dict, key: str) -> None:
    import nbformat
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    source, target = notebook_path(notebook), run.path(f"{notebook}.ipynb")
    if notebook == "05_swc_tracing":
        # Trees of neurons that are no longer tested would look like results.
        for path in run.path("swc").glob("*.swc"):
            if files.is_sealed(path):
                path.unlink()
    # Until it ends, the notebook does not count as done.
    records = run.metrics().get("notebooks", {})
    records.pop(notebook, None)
    run.record("notebooks", records)
    started = time.monotonic()
    # Progress bars of several workers would overwrite each other.
    alone = multiprocessing.parent_process() is None
    # Idle OpenMP threads sleep; on a shared CPU, spinning ones slow a ViT step six times.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with files.atomic_path(target) as temporary, peak_memory() as peak:
        try:
            papermill.execute_notebook(
                source,
                temporary,
                parameters=parameters,
                cwd=NOTEBOOKS,
                kernel_name="python3",
                kernel_manager_class="neurolib.course.kernel.ThisPython",
                start_timeout=START_TIMEOUT,
                execution_timeout=CELL_TIMEOUT,
                stderr_file=sys.stderr if alone else None,
                # A warning about local ports would break up the progress bars.
                extra_arguments=["--log-level=ERROR"],
                progress_bar={"mininterval": 2, "ascii": True, "disable": not alone},
            )
        except PapermillExecutionError as error:
            failed = run.path(f"{notebook}.failed.ipynb")
            shutil.copy(temporary, failed)
            ours = {cls.__name__: cls for cls in NeurolibError.__subclasses__()}
            cell = f"{notebook}, cell {error.exec_count}: {error.evalue}"
            raise ours.get(error.ename, NotebookError)(f"{cell} (notebook: {failed})") from None
        except (DeadKernelError, CellTimeoutError) as error:
            # When memory runs out, the system kills the kernel.
            reason = (str(error).splitlines() or ["the kernel died"])[0]
            raise NotebookError(f"{notebook}: {reason}; perhaps it ran out of memory") from None
        executed = nbformat.read(temporary, as_version=4)
        for cell in executed.cells:
            if cell.cell_type == "code":
                cell.outputs = list(strip_live_outputs(cell.outputs))
        nbformat.write(executed, temporary)
    run.path(f"{notebook}.failed.ipynb").unlink(missing_ok=True)
    records[notebook] = {
        "key": key,
        "seconds": round(time.monotonic() - started, 1),
        "peak_mb": round(peak[0] / 2**20),
    }
    run.record("notebooks", records)


def strip_live_outputs(outputs: Iterable[dict]) -> Iterator[dict]:
    """Remove progress bars, and replace widgets by their still pictures."""
    from nbformat import from_dict

    for output in outputs:
        if output.output_type == "stream" and output.name == "stderr":
            # A bar redraws itself with carriage returns and "cursor up".
            lines = re.split(r"[\r\n]+", output.text.replace("\x1b[A", ""))
            kept = [line for line in lines if line.strip() and not PROGRESS.search(line)]
            output = from_dict({**output, "text": "".join(f"{line}\n" for line in kept)})
            if not kept:
                continue
        data = output.get("data", {})
        if WIDGET in data:
            # A progress bar or a live curve has no still picture.
            if "text/html" not in data:
                continue
            rest = {key: value for key, value in data.items() if key != WIDGET}
            output = from_dict({**output, "data": rest})
        yield output


class NotebookError(NeurolibError):
    """A notebook failed for a reason other than bad input."""


@contextlib.contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Peak resident memory, in bytes, of processes started inside the block, as a list of one."""
    import psutil

    peak, stop = [0], threading.Event()
    me = psutil.Process()
    before = set(me.children(recursive=True))

    def watch():
        while not stop.wait(0.3):
            with contextlib.suppress(psutil.Error):
                new = set(me.children(recursive=True)) - before
                peak[0] = max(peak[0], sum(child.memory_info().rss for child in new))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


# ----------------------------------------------------------------------------------- report


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table, aligned for reading as text; numbers have three decimals."""
    columns = []
    for name in dict.fromkeys(key for row in rows for key in row):
        values = [row.get(name, "") for row in rows]
        texts = [f"{v:.3f}" if isinstance(v, float) else str(v) for v in values]
        width = max(3, len(name), *map(len, texts))
        given = [v for row, v in zip(rows, values, strict=True) if row.get(name) is not None]
        if given and all(isinstance(v, int | float) for v in given):
            pad, rule = str.rjust, "-" * (width - 1) + ":"
        else:
            pad, rule = str.ljust, "-" * width
        columns.append([pad(name, width), rule, *(pad(text, width) for text in texts)])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns, strict=True))


def summary(run: Run) -> str:
    """Results of a run as Markdown: a line per test neuron, then a line per notebook."""
    metrics = run.metrics()
    sections = []
    if made := metrics.get("made_from"):
        given = ", ".join(f"{key} {value}" for key, value in made["parameters"].items())
        sections.append(f"Data: {made['data']}. Parameters: {given or 'all defaults'}.")
    if neurons := metrics.get("neurons"):
        sections.append(table([name_unit({"neuron": name, **neurons[name]}) for name in neurons]))
    about = metrics.get("about", {}).items()
    # Notebooks know the data by a path from their own folder; its name is given above.
    if facts := [f"- {key}: {value}" for key, value in about if key != "data" or not made]:
        sections.append("\n".join(facts))
    if records := metrics.get("notebooks"):
        rows = [
            {"notebook": name, "seconds": record["seconds"], "peak MB": record["peak_mb"]}
            for name, record in records.items()
        ]
        sections.append(table(rows))
    return "\n\n".join(sections)


def write_report(run: Run, notebooks: Sequence[str]) -> None:
    """Write ``report.html``: the summary and every executed notebook."""
    import nbformat
    from nbconvert import HTMLExporter
    from nbformat.v4 import new_markdown_cell, new_notebook

    title = run.folder.name
    links = "\n".join(f"- [{name}](#{name})" for name in notebooks)
    merged = new_notebook(metadata={"language_info": {"name": "python"}, "title": title})
    merged.cells.append(new_markdown_cell(f"# Run {title}\n\n{summary(run)}\n\n{links}"))
    for name in notebooks:
        merged.cells.append(new_markdown_cell(f'<hr id="{name}">'))
        merged.cells.extend(nbformat.read(run.path(f"{name}.ipynb"), as_version=4).cells)
    for number, cell in enumerate(merged.cells):
        cell["id"] = f"cell-{number}"
    exporter = HTMLExporter(embed_images=True)
    body, _ = exporter.from_notebook_node(merged, {"metadata": {"name": title}})
    files.write_text(run.path("report.html"), body)
