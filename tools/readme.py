"""The README's tables of notebooks and results.

``build.py`` writes them; ``build.py --check`` checks that they are current.
"""

import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from neurolib.course import sweeps
from neurolib.course.baselines import FILTERS
from neurolib.course.runs import REPOSITORY, table
from neurolib.course.statistics import by_neuron, compare_networks, differences, t_interval
from neurolib.files import write_text

README = REPOSITORY / "README.md"
RESULTS = REPOSITORY / "data" / "results" / "table1.csv"
OURS = REPOSITORY / "data" / "results" / "ours.csv"
HEADS = {
    "dice": "Dice",
    "hd95": "Hd95, voxels",
    "recall": "recall of the tree",
    "precision": "precision",
    "esa": "ESA, voxels",
}
# The filters to beat, then the paper's rows in its order; other networks come after them.
ORDER = (*FILTERS, "2D scratch", "2D pre-trained", "3D scratch", "3D average", "3D center")
BASELINE = "3D scratch"
FACTS = re.compile(
    r"# # (?P<title>.+)\n#\n# \*(?P<promise>.+)\*\n(?:#.*\n)*?"
    r"# \*\*Takes\*\* (?P<minutes>.+?) and (?P<memory>.+?) of memory"
)


def facts(source: Path) -> dict:
    """What the text source of a notebook says about it, and a link with its short title."""
    text = source.read_text(encoding="utf-8")
    found = FACTS.match(text[text.index("# # ") :]).groupdict()
    link = f"[{source.stem[:2]} {found['title'].partition(':')[0]}](notebooks/{source.stem}.ipynb)"
    exercises = text.count('tags=["exercise"]')
    return found | {"name": source.stem, "link": link, "exercises": exercises}


def write(sources: Sequence[Path], executed: bool) -> None:
    """Write the tables and, if all notebooks were `executed` just now, with which versions."""
    text = README.read_text(encoding="utf-8")
    for name, part in (tables(sources) | ({"seen": seen()} if executed else {})).items():
        text = fill(text, name, part)
    write_text(README, text)


def check(sources: Sequence[Path]) -> list[str]:
    """Tables of the README that differ from what `write` would write."""
    text = README.read_text(encoding="utf-8")
    return [
        f"README.md, its table of {name} is out of date; run make notebooks"
        for name, content in tables(sources).items()
        if fill(text, name, content) != text
    ]


def tables(sources: Sequence[Path]) -> dict[str, str]:
    """The tables by the names of their marks."""
    return {"notebooks": notebooks(sources), "ours": ours(), "results": results()}


def fill(text: str, name: str, part: str) -> str:
    """Put `part` between the marks ``<!-- name -->`` and ``<!-- /name -->``."""
    begin, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
    before, mark, rest = text.partition(begin)
    _, closing, after = rest.partition(end)
    if not (mark and closing):
        raise SystemExit(f"README.md: expected the marks {begin.strip()} and {end.strip()}")
    return before + begin + part + end + after


def notebooks(sources: Sequence[Path]) -> str:
    """A line per notebook: what it asks, and its minutes and memory."""
    heads = {"link": "notebook", "promise": "asks", "minutes": "takes", "memory": "memory"}
    told = map(facts, sources)
    return table([{head: of[key] for key, head in heads.items()} for of in told])


def seen() -> str:
    """The versions with which the notebooks were just executed."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "jupyterlab"))
    return (
        f"All of them were last executed with Python {platform.python_version()}, {packages} on "
        f"{platform.system()}, without a GPU."
    )


def ours() -> str:
    """Means over neurons of filters, our network, and the same network without pre-training."""
    rows = sweeps.read_results(OURS, "tree")
    neurons = {row["neuron"] for row in rows}
    lines = [
        line | {"Hd95, voxels": round(line["Hd95, voxels"])} for line in sweeps.means(rows, HEADS)
    ]
    return table(lines) + f"\n\nMeans over n = {len(neurons)} neurons, one seed."


def results() -> str:
    """Means with intervals over neurons and seeds, and paired gains, from the stored results."""
    rows = sweeps.read_results(RESULTS)
    dice, hd95 = (sweeps.by_neuron_and_seed(rows, column) for column in ("dice", "hd95"))

    def spread(values: np.ndarray, form: str) -> str:
        interval = t_interval(values)
        return f"{interval.mean:{form}} ({interval.low:{form}} to {interval.high:{form}})"

    p = {row["network"]: row.get("p") for row in compare_networks(dice, BASELINE)}
    lines = []
    neurons = {row["neuron"] for row in rows}
    for name in sorted(dice, key=lambda name: [*ORDER, name].index(name)):
        scores = dice[name]
        if name in FILTERS and scores.keys() != neurons:
            continue  # the table above has them on all neurons
        line = {"method": name, "n": len(scores)}
        line["Dice (95 % t interval)"] = spread(by_neuron(scores), ".3f")
        line["Hd95, voxels"] = spread(by_neuron(hd95[name]), ".0f")
        line[f"gain in Dice over {BASELINE}"], line["p"] = "", ""
        if name != BASELINE:
            gain = differences(scores, dice[BASELINE])
            line[f"gain in Dice over {BASELINE}"] = spread(gain, "+.3f")
            line["p"] = f"{p[name]:.3f}"
        lines.append(line)
    seeds = {row["seed"] for row in rows} - {""}  # a filter has none
    return (
        table(lines)
        + f"\n\nn: number of test neurons, {len(seeds)} seed{'s'[: len(seeds) > 1]} each; "
        "in brackets the 95 % t interval of the mean, p from flipping all signs."
    )
