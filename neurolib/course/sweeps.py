"""Sweeps: run the notebooks once per network, seed and fold, and collect one file of results.

A grid is a YAML file, such as ``profiles/table1-cpu.yaml``. Each of its cells is a run
(`neurolib.course.runs`), so that finished runs are skipped and failed ones resumed.
"""

import contextlib
import csv
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

from neurolib.course import cluster, runs
from neurolib.course.baselines import FILTERS
from neurolib.course.runs import NotebookError, Run
from neurolib.data.datasets import data_label, read_manifest
from neurolib.errors import NeurolibError, SettingsError
from neurolib.evaluation import in_unit, volume_diagonal
from neurolib.files import atomic_path, claim, decode, naming, text_key, write_text
from neurolib.parameters import read_as
from neurolib.volume import read_volume

# What to measure, and the notebooks that do it: masks of test neurons, also the trees traced from
# them, or learning curves on validation neurons. Choices must not depend on test neurons.
MEASURES = {
    "test": ("03_training", "04_evaluation"),
    "tree": ("03_training", "04_evaluation", "05_swc_tracing"),
    "validation": ("03_training",),
}
# Parameters that grids vary, one column each; empty for the notebook's default.
VARIED = (
    "encoder", "initialisation", "frozen", "depth", "stem", "contrast", "predict", "loss",
    "encoder_rate", "layer_decay", "train_neurons",
)  # fmt: skip
VARIED_AND_SHARED = ("steps", "batch", "size", *VARIED)
SHARED = (
    "data", "style", "threshold_tau", *VARIED_AND_SHARED, "settings", "seconds", "weights",
    "device", "key", "run",
)  # fmt: skip
TESTED = ("network", "seed", "fold", "neuron", "volume", "dice", "hd95", "diagonal", "cldice")
TREE = ("esa", "dsa", "pds", "precision", "recall", "trees")
# Columns of a results file, in this order.
COLUMNS = {
    "test": (*TESTED, "every", *SHARED),
    "tree": (*TESTED, *TREE, "every", *SHARED),
    "validation": ("network", "seed", "fold", "neuron", "step", "training_loss", "dice", *SHARED),
}  # fmt: skip
# Parameters on which the rows of filters depend, besides the data.
FILTERED = (
    "held_out", "validate_on", "validation_neurons", "target", "tau", "every", "channel", "spacing",
)  # fmt: skip
NUMBERS = ("dice", "hd95", "diagonal", "cldice", *TREE, "seconds", "step", "training_loss")
# Parameters that a grid must give elsewhere.
RESERVED = {"seed": "seeds", "held_out": "folds", "data": "data", "run_dir": "--folder"}
KEYS = {"data", "networks", "seeds", "folds", "common", "results"}
# Whether a value is usable, and what is expected.
USABLE: dict[str, tuple[Callable, str]] = {
    "measure": (lambda v: isinstance(v, str) and v in MEASURES, f"one of {', '.join(MEASURES)}"),
    "common": (lambda v: isinstance(v, dict), "parameters: values"),
    "networks": (lambda v: isinstance(v, dict) and v, "rows such as 'a: {depth: 1}'"),
    "seeds": (lambda v: isinstance(v, list) and v, "a list such as [0, 1]"),
    "folds": (lambda v: isinstance(v, list) and v, "a list such as ['cell1', 'cell2']"),
    "data": (lambda v: isinstance(v, str) and v, "a name"),
    "results": (lambda v: isinstance(v, str) and v.endswith(".csv"), "a .csv"),
}
# Command of a process that does one run.
# -P: a file of the current folder, such as yaml.py, must not hide a module.
WORKER = [sys.executable, "-P", "-c", "from neurolib.course.sweeps import _work; _work()"]


@dataclass(frozen=True)
class Cell:
    """One run of a grid: which network, seed and fold, and the parameters of its notebooks."""

    network: str
    seed: int
    fold: int
    name: str
    parameters: dict

    @property
    def settings(self) -> str:
        """Hash of all parameters but the seed; runs with equal hashes may be averaged."""
        return _hash({key: self.parameters[key] for key in self.parameters if key != "seed"})

    @property
    def data_settings(self) -> str:
        """Hash of the parameters on which a filter's result depends."""
        return _hash_filtered(self.parameters)


def _hash_filtered(parameters: dict) -> str:
    return _hash({key: parameters[key] for key in FILTERED if key in parameters})


def _hash(values: dict) -> str:
    return text_key(json.dumps(values, sort_keys=True))


def read_grid(path: str | Path) -> dict:
    """Read a sweep's grid.

    Keys: ``networks`` maps the name of each row to its parameters, ``folds`` lists test neurons
    held out together (comma-separated, or a mapping of ``held_out`` and ``validate_on``),
    ``seeds`` lists numbers, ``common`` holds parameters of all runs, ``data`` and ``results`` name
    the data set and the file to write, and ``measure`` is ``test`` (the default), ``tree`` or
    ``validation``. Several seeds need ``validate_on`` if filters are measured, too.
    """
    path = Path(path)
    if not path.is_file():
        raise SettingsError(f"{path}: no such grid; expected one like profiles/table1-cpu.yaml")
    grid = runs.read_yaml(path)
    if not isinstance(grid, dict) or set(grid) - {"measure"} != KEYS:
        given = ", ".join(sorted(grid)) if isinstance(grid, dict) else type(grid).__name__
        raise SettingsError(f"{path}: expected the keys {', '.join(sorted(KEYS))}; got {given}")
    grid.setdefault("measure", "test")
    for key, (is_usable, expected) in USABLE.items():
        if not is_usable(grid[key]):
            raise SettingsError(f"{path}: {key} is {grid[key]!r}, expected {expected}")
    for name, changes in grid["networks"].items():
        if not isinstance(changes, dict):
            raise SettingsError(
                f"{path}: network {name!r}: {changes!r}, expected parameters such as {{depth: 1}}"
            )
        if name in FILTERS:
            raise SettingsError(
                f"{path}: network {name!r}: that is a filter's name; choose another"
            )
        for key in RESERVED.keys() & (grid["common"].keys() | changes.keys()):
            raise SettingsError(
                f"{path}: network {name!r} has {key!r}; set it with {RESERVED[key]}"
            )
    grid["seeds"] = [read_as(0, seed, f"{path}: seeds") for seed in grid["seeds"]]
    folds = [fold if isinstance(fold, dict) else {"held_out": fold} for fold in grid["folds"]]
    for fold in folds:
        if "held_out" not in fold or fold.keys() - {"held_out", "validate_on"}:
            raise SettingsError(
                f"{path}: fold {fold}: expected held_out and, optionally, validate_on"
            )
    grid["folds"] = [
        {key: read_as("cell1", names, f"{path}: folds") for key, names in fold.items()}
        for fold in folds
    ]
    return grid


def run_sweep(
    path: str | Path,
    folder: str | Path = "runs",
    data: str = "",
    workers: int = 1,
    seeds: Sequence[int] = (),
    scheduler: str = "",
    rows: Sequence[str] = (),
    folds: Sequence[int] = (),
    ignore_frames: bool = False,
) -> Path:
    """Run every network, seed and fold of a grid that is not yet done; write the results.

    Parameters
    ----------
    path : path
        A grid, see `read_grid`.
    folder : path
        Parent of the runs, which are in ``<grid>/<network>-s<seed>-f<fold>``.
    data : str
        Replaces the grid's; folders and results are then also named after the data.
    workers : int
        Number of runs at a time, each in its own process; they share the cores.
    seeds : sequence of int
        Replaces the grid's. Results of other seeds stay in the file.
    scheduler : str
        Address of a Dask cluster that does the runs, such as ``tcp://10.0.0.1:8786``. Its workers
        must have one thread each, and see repository, data and `folder` under the same absolute
        paths; a run whose worker dies goes to another one.
    rows, folds : sequence of str, sequence of int
        Run only the networks with these names and the folds with these numbers, from 0. Other
        results stay in the file, so that the parts of a grid add up.
    ignore_frames : bool
        Accept trees that do not lie on the neurites of their images.

    Returns
    -------
    Path
        The results file, which is written after every run. An existing one with rows of other data,
        networks, folds or settings is refused. If runs fail, a NotebookError follows at the end; a
        second call tries them again.
    """
    if workers < 1:
        raise SettingsError(f"workers={workers}: expected at least one")
    grid, stem = read_grid(path), Path(path).stem
    measure, results = grid["measure"], Path(grid["results"]).absolute()
    chain = MEASURES[measure]
    if data and data_label(data) != data_label(grid["data"]):
        results = results.with_stem(f"{results.stem}-{data_label(data)}")
        stem += f"-{data_label(data)}"
    data, folder = data or grid["data"], Path(folder).absolute()
    defaults = runs.defaults_of(chain)
    with naming(str(path)):
        for given in (grid["common"], *grid["networks"].values()):
            given |= runs.merge(runs.choose_parameters(given, defaults))
    whole = list(_cells(grid, stem, seeds))
    cells = _part(path, grid, whole, rows, folds)
    _check(path, grid, seeds, whole, defaults, results)
    splits = [defaults[runs.DATA_NOTEBOOK] | cell.parameters for cell in cells]
    runs.check_data(data, splits, ignore_frames)
    for cell in cells:
        runs.check_run(folder / cell.name, data)
    locks = folder / stem / ".lock", results.with_name(f".{results.name}.lock")
    order, failed = [*FILTERS, *grid["networks"]], {}
    usual = _usual(grid, whole)
    with claim(locks[0]), claim(locks[1], results):
        kept, done = _kept(results, cells, whole, data, measure), {}
        job = functools.partial(_run_cell, data, str(folder), chain, os.getcwd())
        for cell, ended in _execute(cells, job, workers, scheduler):
            if isinstance(ended, NeurolibError):
                failed[cell.name] = str(ended)
                print(f"== {cell.name} failed: {ended}", flush=True)
            else:
                with_filters = cell.data_settings in usual
                done[cell.name] = _rows(ended, cell, data, measure, with_filters)
                _write_together(results, [kept, *done.values()], order, measure)
                print(f"== {len(done)} of {len(cells)} done: {cell.name}", flush=True)
            there = [*kept, *(row for rows in done.values() for row in rows)]
            _write_index(folder / stem / "index.html", whole, there, failed)
    if failed:
        raise NotebookError(
            f"{len(failed)} of {len(cells)} runs failed (the first: {next(iter(failed.values()))});"
            " run the same command to try them again"
        )
    return results


def _check(
    path: str | Path,
    grid: dict,
    seeds: Sequence[int],
    cells: list[Cell],
    defaults: dict,
    results: Path,
) -> None:
    """Refuse early what would fail hours later (SettingsError)."""
    known, measure = runs.merge(defaults), grid["measure"]
    for cell in {cell.network: cell for cell in cells}.values():
        runs.localise(cell.parameters)
        if "encoder" in known:
            runs.check_settings(known | cell.parameters, ".")
        if measure == "tree" and cell.parameters.get("every", 1) != 1:
            raise SettingsError(f"{path}: measure tree needs all slices; remove 'every'")
    try:
        if results.exists():
            read_results(results, measure)
    except SettingsError as error:
        reason = str(error).removeprefix(f"{results}: ")
        raise SettingsError(
            f"{results}: not a results file for measure {measure} ({reason}), so it is not "
            "replaced; name another file in 'results', or move this one away"
        ) from None
    name, count = Counter(cell.name for cell in cells).most_common(1)[0]
    if count > 1:
        raise SettingsError(f"{path}: two runs would share the folder {name}; rename a network")
    filtered = [own for cell in cells if (own := known | cell.parameters).get("filtered_too")]
    several = sorted({*grid["seeds"], *seeds})
    if len(several) > 1 and not all(own["validate_on"] for own in filtered):
        raise SettingsError(
            f"{path}: the seeds {', '.join(map(str, several))} draw different validation neurons, "
            "and the filters are chosen on them; expected the same for all: name them in "
            "validate_on, in 'common' or in each fold"
        )


def _cells(grid: dict, stem: str, seeds: Sequence[int]) -> Iterator[Cell]:
    for fold, neurons in enumerate(grid["folds"]):
        for seed in dict.fromkeys(seeds or grid["seeds"]):
            for network, changes in grid["networks"].items():
                label = re.sub(r"[^\w.+-]+", "-", network)
                name = f"{stem}/{label}-s{seed}-f{fold}"
                own = neurons | {"seed": seed}
                yield Cell(network, seed, fold, name, grid["common"] | changes | own)


def _usual(grid: dict, cells: list[Cell]) -> set[str]:
    """The `Cell.data_settings` whose filters are stored: the common ones, or all if none is.

    A network with its own sampling, say, would store other rows for the same filters.
    """
    measured = {cell.data_settings for cell in cells}
    return {_hash_filtered(grid["common"] | fold) for fold in grid["folds"]} & measured or measured


def _part(
    path: str | Path, grid: dict, cells: list[Cell], rows: Sequence[str], folds: Sequence[int]
) -> list[Cell]:
    """The cells of some rows and folds, by default of all."""
    known = list(grid["networks"])
    for name in rows:
        if name not in known:
            raise SettingsError(f"--rows {name}: no such row in {path}; expected one of {known}")
    for fold in folds:
        if not 0 <= fold < len(grid["folds"]):
            raise SettingsError(
                f"--folds {fold}: {path} has the folds 0 to {len(grid['folds']) - 1}; they are "
                "counted from 0"
            )
    return [c for c in cells if c.network in (rows or known) and (not folds or c.fold in folds)]


def _run_cell(data: str, folder: str, chain: Sequence[str], start: str, cell: Cell) -> Run:
    """Run one cell in the folder `start`, because data may be relative to it."""
    with contextlib.chdir(start):
        options = {"notebooks": tuple(chain), "ignore_frames": True, "overwrite": True}
        return runs.run_course(data, "empty", cell.name, folder, cell.parameters, **options)


def _execute(
    cells: list[Cell], job: Callable[[Cell], Run], workers: int = 1, scheduler: str = ""
) -> Iterator[tuple[Cell, Run | NeurolibError]]:
    """Run the cells; as each ends, yield it with its run or its error."""
    if scheduler:
        with cluster.connect(scheduler=scheduler) as client:
            yield from cluster.share(client, job, cells)
    elif workers == 1:
        for cell in cells:
            try:
                yield cell, job(cell)
            except NeurolibError as error:
                yield cell, error
    else:
        apart = functools.partial(_run_apart, job, max(1, (os.cpu_count() or 1) // workers))
        pool = ThreadPoolExecutor(workers)
        try:
            futures = {pool.submit(apart, cell): cell for cell in cells}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _run_apart(job: functools.partial, threads: int, cell: Cell) -> Run | NeurolibError:
    """Run a job on a cell in its own process, with `threads` threads there and in its kernels."""
    env, pipe = os.environ | {"OMP_NUM_THREADS": str(threads)}, subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(WORKER, stdin=pipe, stderr=errors, text=True, env=env) as process,
    ):
        process.stdin.write(json.dumps([*job.args, vars(cell)]) + "\n")
        process.stdin.flush()  # stays open, so that its end tells the worker that we ended
        status = process.wait()
        errors.seek(0)
        last = (errors.read().splitlines() or [""])[-1]
    if status == 0:
        return Run(Path(job.args[1]) / cell.name)
    if status < 0:
        return NotebookError("its process was killed; perhaps it ran out of memory")
    return NotebookError(json.loads(last) if status == 2 else f"{cell.name}: {last}")


def _work() -> None:
    """Do the run described by the input's first line; report an error as JSON, with status 2."""
    *job, cell = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _run_cell(*job, Cell(**cell))
    except NeurolibError as error:
        print(json.dumps(str(error)), file=sys.stderr)
        sys.exit(2)


def _end_with_parent() -> None:
    """Kill this process when the input ends, because its sweep was killed."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGKILL)


def _rows(run: Run, cell: Cell, data: str, measure: str, with_filters: bool) -> list[dict]:
    """Lines of a results file for one run and, if wanted, for the filters measured beside it."""
    metrics = run.metrics()
    records, about = metrics["notebooks"], metrics["about"]
    chain = MEASURES[measure]
    common = {
        "network": cell.network,
        "seed": cell.seed,
        "fold": cell.fold,
        "data": data_label(data),
        "style": about["style"],
        "threshold_tau": metrics["target"]["tau"],
        "weights": "none" if about["encoder"].endswith(" scratch") else about["weights"],
        "device": about["device"],
        "seconds": round(sum(records[n]["seconds"] for n in chain)),
        "key": records[chain[-1]]["key"][:16],
        "run": cell.name,
        "every": cell.parameters.get("every", 1),
        "settings": cell.settings,
    }
    # A parameter at its default is empty.
    common |= {key: cell.parameters.get(key, "") for key in VARIED_AND_SHARED}
    if measure == "validation":
        curve = metrics["validation"]
        return [common | {"neuron": curve["neurons"]} | point for point in curve["points"]]
    rows = []
    for pair in read_manifest(run.path("split.json")).test:
        volume = read_volume(pair.image, pair.channel, spacing=pair.spacing)
        scores = metrics["neurons"][pair.name]
        # In the unit of the distances.
        scale = in_unit(volume.spacing, scores.get("unit", "µm"))
        diagonal = volume_diagonal(volume.data.shape, scale)
        names = {"neuron": pair.neuron, "volume": pair.name, "style": pair.style}
        names |= {"diagonal": round(diagonal, 1)}
        rows.append(common | names | _numbers(scores))
        filters = metrics.get("filters", {}).get(pair.name, {}) if with_filters else {}
        for name, filtered in filters.items():
            trained = dict.fromkeys((*VARIED_AND_SHARED, "key", "weights", "device", "seconds"), "")
            row = common | trained | names | _numbers(filtered)
            rows.append(row | {"network": name, "seed": "", "settings": cell.data_settings})
    return rows


def _numbers(scores: dict) -> dict:
    numbers = {k: v for k, v in scores.items() if isinstance(v, (int, float))}
    return {k.lower(): round(value, 4) for k, value in numbers.items()}


def _write_together(path: Path, parts: list[list[dict]], order: list[str], measure: str) -> None:
    """Write all rows, sorted, each once, because all runs of a fold repeat its filters."""
    keys = ("network", "seed", "fold", "volume", "step")
    single = {tuple(str(row.get(k)) for k in keys): row for part in parts for row in part}

    def place(row: dict) -> tuple[int, int, int]:
        seed = -1 if row["seed"] == "" else int(row["seed"])  # a filter has none
        return int(row["fold"]), seed, order.index(row["network"])

    write_results(path, sorted(single.values(), key=place), measure)


def _write_index(path: Path, cells: list[Cell], rows: list[dict], failed: dict[str, str]) -> None:
    """Write a page with a line per run of a grid: its state, its Dice and seconds, its report."""
    lines = [("network", "seed", "fold", "state", "Dice", "seconds")]
    for cell in cells:
        # Without the filters, which each run measures too.
        own = [r for r in rows if (r["run"], r["network"]) == (cell.name, cell.network)]
        name, dice = escape(cell.network), [row["dice"] for row in own]
        line = [name, cell.seed, cell.fold, escape(failed.get(cell.name, "not yet")), "", ""]
        if own:
            best = max(dice) if "step" in own[0] else _mean(dice)
            link = f'<a href="{quote(Path(cell.name).name)}/report.html">{name}</a>'
            line = [link, cell.seed, cell.fold, "done", f"{best:.3f}", f"{own[0]['seconds']:.0f}"]
        lines.append(line)
    body = "\n".join(f"<tr>{''.join(f'<td>{one}</td>' for one in line)}</tr>" for line in lines)
    title = escape(path.parent.name)
    write_text(
        path,
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>\n'
        "<style>body { font: 1em sans-serif; margin: 2em } td { padding: .2em .8em }</style>\n"
        f"<h1>{title}</h1><p>Dice: mean over the volumes of a run, or its best validation.</p>\n"
        f"<table>\n{body}\n</table></html>\n",
    )


def _kept(path: Path, cells: list[Cell], grid: list[Cell], data: str, measure: str) -> list[dict]:
    """Results of earlier calls that this call does not repeat.

    A file is refused if it has rows that do not belong to this grid and so would be lost.
    """
    rows = read_results(path, measure) if path.exists() else []
    ours = {(cell.network, str(cell.fold), cell.settings) for cell in grid}
    ours |= {(name, str(cell.fold), cell.data_settings) for cell in grid for name in FILTERS}
    foreign = {
        row["network"]
        for row in rows
        if row["data"] != data_label(data)
        or (row["network"], row["fold"], row["settings"]) not in ours
    }
    if foreign:
        raise SettingsError(
            f"{path}: has rows of other data, networks, folds or settings than this grid "
            f"({', '.join(sorted(foreign))}), so it is not replaced; name another file in "
            "'results', or move this one away"
        )
    now = {(cell.network, str(cell.seed), str(cell.fold)) for cell in cells}
    return [row for row in rows if (row["network"], row["seed"], row["fold"]) not in now]


# ----------------------------------------------------------------------------------- results


def write_results(path: Path, rows: list[dict], measure: str = "test") -> None:
    """Write a results file atomically; NaN becomes empty."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        options = {"lineterminator": "\n", "extrasaction": "ignore"}
        writer = csv.DictWriter(file, COLUMNS[measure], **options)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: "" if value != value else value for k, value in row.items()})


def read_results(path: str | Path, measure: str = "test") -> list[dict]:
    """Read a results file; measurements are floats, NaN if missing."""
    path = Path(path)
    if not path.is_file():
        raise SettingsError(f"{path}: no results; run: neurolib sweep profiles/table1-cpu.yaml")
    try:
        rows = list(csv.DictReader(decode(path.read_bytes()).split("\n"), strict=True))
    except csv.Error as error:
        raise SettingsError(f"{path}: not a CSV ({error}); write it again") from None
    columns = set(COLUMNS[measure])
    if not rows or any(set(row) != columns or None in row.values() for row in rows):
        raise SettingsError(f"{path}: expected the columns {', '.join(COLUMNS[measure])}")
    try:
        for row in rows:
            int(row["fold"]), int(row["seed"] or 0)
        return [
            {k: float(v or "nan") if k in NUMBERS else v for k, v in row.items()} for row in rows
        ]
    except ValueError as error:
        raise SettingsError(
            f"{path}: {error}; expected whole numbers in seed and fold, and numbers in "
            f"{', '.join(NUMBERS)}"
        ) from None


def by_neuron_and_seed(rows: list[dict], column: str) -> dict[str, dict[str, dict[str, float]]]:
    """Mean of a column over the volumes of a neuron, as network → neuron → seed → value.

    If a network found nothing, its infinite distance is replaced by the volume's diagonal.
    """
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        value = row["diagonal"] if row[column] == float("inf") else row[column]
        groups.setdefault((row["network"], row["neuron"], row["seed"]), []).append(value)
    values: dict[str, dict[str, dict[str, float]]] = {}
    for (network, neuron, seed), group in groups.items():
        values.setdefault(network, {}).setdefault(neuron, {})[seed] = _mean(group)
    return values


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values)


def by_network(rows: list[dict], column: str) -> dict[str, dict[str, float]]:
    """Mean over seeds of `by_neuron_and_seed`, as network → neuron → value."""
    return {
        network: {neuron: _mean(seeds.values()) for neuron, seeds in neurons.items()}
        for network, neurons in by_neuron_and_seed(rows, column).items()
    }


def means(rows: list[dict], columns: Mapping[str, str]) -> list[dict]:
    """A row per network or filter: the mean over neurons of each column, under its heading."""
    values = {heading: by_network(rows, column) for column, heading in columns.items()}
    names = dict.fromkeys(row["network"] for row in rows)
    return [
        {"method": name} | {heading: _mean(of[name].values()) for heading, of in values.items()}
        for name in names
    ]


def by_seed(rows: list[dict], column: str) -> dict[str, dict[str, float]]:
    """Mean of a column over neurons, as network → seed → value."""
    averages: dict[str, dict[str, float]] = {}
    for seed in sorted({row["seed"] for row in rows} - {""}):
        values = by_network([row for row in rows if row["seed"] == seed], column)
        for network, neurons in values.items():
            averages.setdefault(network, {})[f"seed {seed}"] = _mean(neurons.values())
    return averages


def gains(
    values: Mapping[str, Mapping[str, float]], network: str, baseline: str
) -> dict[str, float]:
    """Difference of a network from another on each neuron that both have."""
    for name in (network, baseline):
        if name not in values:
            raise SettingsError(f"no network {name!r}; expected one of {', '.join(values)}")
    ours, theirs = values[network], values[baseline]
    return {neuron: ours[neuron] - theirs[neuron] for neuron in ours if neuron in theirs}


def describe_results(rows: list[dict]) -> list[str]:
    """Settings of a results file, one fact per line."""

    def values(column: str) -> str:
        return ", ".join(sorted({str(row[column]) or "default" for row in rows}))

    rows = [row for row in rows if row["network"] not in FILTERS]
    runs = {(row["network"], row["seed"], row["fold"]): row["seconds"] for row in rows}
    tested = [f"slices tested: one in {values('every')}"] if "every" in rows[0] else []
    return [
        f"data: {values('data')} ({values('style')}), target threshold {values('threshold_tau')}",
        f"{len(runs)} runs; seeds: {values('seed')}; folds: {values('fold')}",
        f"{values('steps')} steps of {values('batch')} blocks at {values('size')} pixels",
        *tested,
        f"{sum(runs.values()) / 60:.0f} minutes of runs on {values('device')}",
    ]
