"""Sphinx directives that show the course's notebooks, modules, commands and results."""

import ast
import csv
import json
import re
from datetime import datetime, timedelta
from pathlib import Path

import nbformat
import typer.main
from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from neurolib.course import plotting, statistics, sweeps
from neurolib.course.cli import app as command
from neurolib.course.runs import table
from neurolib.files import write_text

import build
import readme
import slides

ROOT = Path(__file__).resolve().parents[1]
# In the order of the paper's rows; other files are compared with their first network.
BASELINES = ("3D scratch", "2D scratch")
PAGE = """\
# {name}

```{{eval-rst}}
.. automodule:: {name}
   :members:
```
"""


def notebooks() -> dict[str, dict]:
    """Facts about the notebooks of the course, by their numbers."""
    return {source.name[:2]: readme.facts(source) for source in build.sources()}


def stage(folder: Path) -> None:
    """Write the pages that are copies: stored notebooks, and a page per module."""
    pages = {f"api/{name}.md": PAGE.format(name=name) for name in modules()}
    for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        # Readers look for the number and do not need the cell for Colab.
        first = notebook.cells[0]
        first.source = f"# {path.name[:2]} {first.source[2:]}"
        for name, picture in first.pop("attachments", {}).items():  # MyST-NB ignores them
            address = f"data:image/png;base64,{picture['image/png']}"
            first.source = first.source.replace(f"attachment:{name}", address)
        notebook.cells = [c for c in notebook.cells if build.BOOTSTRAP not in build.tags(c)]
        pages[f"notebooks/{path.name}"] = nbformat.writes(notebook)
    for name in ("api", "notebooks"):
        (folder / name).mkdir(exist_ok=True)
        for old in set((folder / name).iterdir()) - {folder / page for page in pages}:
            old.unlink()
    for name, text in pages.items():
        page = folder / name
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            write_text(page, text)


def modules() -> dict[str, str]:
    """Public modules of the package, and the first lines of their docstrings."""
    lines = {}
    packages = (ROOT / "neurolib/course/exercises/__init__.py",)
    for path in (*(ROOT / "neurolib").rglob("[!_]*.py"), *packages):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        lines[name] = text.partition("\n")[0]
    return dict(sorted(lines.items()))


class Written(SphinxDirective):
    """A directive that writes Markdown."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(self.text(), allow_section_headings=True)


class Notebooks(Written):
    """A table of the notebooks: promise, time, memory, exercises."""

    def text(self) -> str:
        return table(
            [
                {
                    "notebook": f"[{number} {n['title']}](notebooks/{n['name']}.ipynb)",
                    "question": n["promise"],
                    "runs in": f"{n['minutes']}, {n['memory']}",
                    "exercises": n["exercises"],
                }
                for number, n in notebooks().items()
            ]
        )


class Modules(Written):
    """A table of the modules of the package."""

    def text(self) -> str:
        return table(
            [{"module": f"[](api/{n}.md)", "about": about} for n, about in modules().items()]
        )


class Schedule(Written):
    """A timetable from lines ``minutes | what``; ``{03}`` stands for a link to that notebook.

    The argument is the time of the start, ``09:00``.
    """

    required_arguments = 1

    def text(self) -> str:
        clock = datetime.strptime(self.arguments[0], "%H:%M")
        known, rows = notebooks(), []
        for line in self.content:
            minutes, what = (part.strip() for part in line.split("|", 1))
            used = re.findall(r"\{(\d\d)\}", what)
            for number in used:
                what = what.replace(f"{{{number}}}", f"{known[number]['link']}:")
            needs = "; ".join(known[number]["minutes"] for number in used)
            row = {"at": f"{clock:%H:%M}", "minutes": int(minutes), "what": what}
            rows.append(row | {"the machine needs": needs})
            clock += timedelta(minutes=int(minutes))
        return table([*rows, {"at": f"{clock:%H:%M}", "minutes": "", "what": "end"}])


class Commands(Written):
    """A section per command of ``neurolib``: its help and its options."""

    def text(self) -> str:
        sections = []
        for name, entry in sorted(typer.main.get_command(command).commands.items()):
            text = re.sub(r"Example: (.*)", r"```\n\1\n```", entry.help)
            sections += [f"### `neurolib {name}`", text]
            rows = [
                {
                    "option": ", ".join(f"`{text}`" for text in parameter.opts),
                    "meaning": getattr(parameter, "help", "") or "",
                    # As the command's help shows it: the default of --checkpoint is a path here.
                    "default": f"`{parameter.default}`"
                    if parameter.default and parameter.show_default
                    else "",
                }
                for parameter in entry.params
                if parameter.name != "help"
            ]
            sections += [table(rows)] if rows else []
        return "\n\n".join(sections)


class Results(SphinxDirective):
    """Every results file in data/results: settings, comparison, and scores of each neuron."""

    def run(self) -> list[nodes.Node]:
        sections = []
        for path in sorted((ROOT / "data/results").glob("*.csv")):
            with open(path, newline="", encoding="utf-8") as file:
                header = next(csv.reader(file))
            if "network" in header:  # of a sweep
                self.env.note_dependency(str(path))
                kinds = {"step": "validation", "esa": "tree"}
                measure = next((kind for column, kind in kinds.items() if column in header), "test")
                sections += self.of_file(path, measure)
        return sections

    def of_file(self, path: Path, measure: str) -> list[nodes.Node]:
        try:
            rows = sweeps.read_results(path, measure)
        except sweeps.SettingsError as error:
            raise self.error(str(error)) from None
        lines = [*(f"- {line}" for line in sweeps.describe_results(rows)), ""]
        dice = sweeps.by_network(rows, "dice")
        if measure == "validation":
            lines += ["The best validation Dice of each run:", "", table(best(rows))]
        else:
            baseline = next((name for name in BASELINES if name in dice), next(iter(dice)))
            lines += [f"Dice, and the difference from *{baseline}* on the same neurons:", ""]
            values = sweeps.by_neuron_and_seed(rows, "dice")
            lines += [table(statistics.compare_networks(values, baseline))]
        # Sphinx would put a heading in parsed text beside this section.
        section = nodes.section("", nodes.title(text=path.name), ids=[nodes.make_id(path.name)])
        section += self.parse_text_to_nodes("\n".join(lines))
        if measure == "validation":
            return [section]
        labels = {"dice": "Dice", "hd95": "Hd95 (voxels)"}
        if measure == "tree":
            labels["esa"] = "ESA (voxels)"
        for column, label in labels.items():
            values = sweeps.by_network(rows, column)
            drawn = plotting.png(plotting.dots(values, label))
            alt = f"{label} of each neuron under {len(values)} networks; the table has the means."
            markup = plotting.markup(drawn, f"{path.stem}-{column}", alt)
            section += nodes.raw("", markup, format="html")
        return [section]


class Benchmarks(Written):
    """Results of ``make bench``: the machine, the missed targets, a table per task."""

    def text(self) -> str:
        path = ROOT / "data/results/bench.json"
        self.env.note_dependency(str(path))
        record = json.loads(path.read_text(encoding="utf-8"))
        about, rows = record["machine"], record["rows"]
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        targets = [r for r in rows if r["target"] != ""]
        missed = [r for r in targets if r["verdict"] == "missed"]
        sections = [
            # Without a heading it would come after the sections.
            "## Machine and targets",
            f"Measured on {record['date']} in {record['minutes']} minutes: {about['cpu']}, "
            f"{about['cores']} cores, {about['memory GiB']} GiB, GPU: {about['gpu']}, load before "
            f"{about['load before']}; {about['system']}, Python {about['python']}, {versions}.",
            f"{len(targets) - len(missed)} of {len(targets)} targets are met"
            + (", these are not:" if missed else "."),
            "\n".join(f"- {': '.join(filter(None, (r['task'], r['peer'])))}" for r in missed),
        ]
        for name, title in record["about"].items():
            own = [r for r in rows if r["benchmark"] == name]
            # Omit columns that are empty for this task.
            used = [c for c in own[0] if c != "benchmark" and any(r[c] != "" for r in own)]
            sections += [f"## {name.capitalize()}", title]
            sections += [table([{c: r[c] for c in used} for r in own])]
        return "\n\n".join(sections)


def best(rows: list[dict]) -> list[dict]:
    """The best validation Dice of each network and seed, and its step."""
    runs: dict[tuple, list[dict]] = {}
    for row in rows:
        runs.setdefault((row["network"], row["seed"], row["fold"]), []).append(row)
    top = [max(group, key=lambda row: row["dice"]) for group in runs.values()]
    names = ("network", "seed", "dice")
    return [{name: row[name] for name in names} | {"step": int(row["step"])} for row in top]


def mathml(node: nodes.Element, block: bool) -> str:
    """An equation as MathML; the browser chooses the sizes of brackets."""
    tex = re.sub(r"\\[bB]ig+[lr]?(?![a-zA-Z])", "", node.astext()).replace(r"\dots", r"\ldots")
    try:
        return tex2mathml(tex, as_block=block)
    except MathError as error:
        logging.getLogger(__name__).warning("%s in %s", error, tex, location=node)
        return ""


def visit_inline(self, node: nodes.math) -> None:
    self.body.append(mathml(node, block=False))
    raise nodes.SkipNode


def visit_block(self, node: nodes.math_block) -> None:
    self.body.append(f'<div class="math">{mathml(node, block=True)}</div>')
    raise nodes.SkipNode


def without_badges(app, doctree: nodes.document) -> None:
    """Replace badges with their text, so that a page loads nothing from elsewhere."""
    for image in list(doctree.findall(nodes.image)):
        if "://" in image["uri"]:
            image.replace_self(nodes.Text(f"{image.get('alt', '')} "))


def plain_bars(app, what, name, obj, options, lines: list[str]) -> None:
    """Escape bars in docstrings, which are mathematics (|A ∩ B|), not substitutions."""
    lines[:] = [line if "`" in line else line.replace("|", r"\|") for line in lines]


def add_slides(app, error: Exception | None) -> None:
    """Write the lecture's slides beside the pages."""
    if error is None:
        text = (Path(app.srcdir) / "slides.md").read_text(encoding="utf-8")
        page = slides.slides(text, slides.figures())
        write_text(Path(app.outdir) / "slides.html", page)


def setup(app) -> dict:
    """Called by Sphinx."""
    stage(Path(app.srcdir))
    app.connect("build-finished", add_slides)
    for directive in (Notebooks, Modules, Schedule, Commands, Results, Benchmarks):
        app.add_directive(directive.__name__.lower(), directive)
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    app.connect("doctree-read", without_badges)
    app.connect("autodoc-process-docstring", plain_bars)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
