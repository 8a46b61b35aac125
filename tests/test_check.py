"""The exercises: every stub says so, every printed solution passes, typical mistakes get a hint."""

import re

import numpy as np
import pytest

from neurolib.check import blocking
from neurolib.runs import NOTEBOOKS

STUB = re.compile(
    r'\n# %% tags=\["exercise"\]\n(?P<stub>.*?)\n# %% \[markdown\] tags=\["solution"\]\n'
    r".*?# ```python\n(?P<solution>.*?)# ```\n",
    re.DOTALL,
)
SOURCES = sorted(NOTEBOOKS.glob("[0-9]*.py"))


def exercises(path):
    """The stub and the solution of each exercise of a notebook, as code."""
    for match in STUB.finditer(path.read_text(encoding="utf-8")):
        solution = re.sub(r"(?m)^# ?", "", match["solution"])
        yield match["stub"].strip(), solution.strip()


def ask(source, stub, solution=""):
    """Execute an exercise as a reader would: with the notebook's imports, solved or not."""
    names = {}
    text = source.read_text(encoding="utf-8")
    imports = re.findall(r"(?m)^(?:import|from) (?!sys\b|site\b).*$", text)
    exec("\n".join(imports), names)
    question = stub.splitlines()[-1]
    assert question.startswith("check.q"), stub
    exec(f"{solution}\n{question}" if solution else stub, names)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_stubs_are_not_attempted_and_solutions_are_right(source, capsys):
    text = source.read_text(encoding="utf-8")
    found = list(exercises(source))
    assert len(found) == text.count('tags=["exercise"]') == text.count('tags=["solution"]')
    for number, (stub, solution) in enumerate(found, 1):
        ask(source, stub)
        assert f"q{number}: not attempted" in capsys.readouterr().out
        ask(source, stub, solution)
        assert capsys.readouterr().out.startswith("● right"), solution


def test_the_notebooks_with_exercises_have_at_least_two():
    counts = {source.stem: len(list(exercises(source))) for source in SOURCES}
    assert counts["01_data_blocking"] >= 2
    assert 1 not in counts.values()


def hint(question, answer, capsys):
    question(answer)
    said = capsys.readouterr().out
    assert said.startswith("✗"), said
    return said


WRONG = [
    (blocking.q1, lambda p, s: p / np.array(s), "turn one of them round"),
    (blocking.q1, lambda p, s: p * np.array(s)[::-1], "divide"),
    (blocking.q1, lambda p, s: np.rint(p / np.array(s)[::-1]), "do not round"),
    (blocking.q1, lambda p, s: p / np.array(s)[::-1] - 0.5, "nothing is to be added"),
    (blocking.q1, lambda p, s: (p / np.array(s)[::-1])[0], "came back"),
    (blocking.q1, lambda p, s: p, "(8, 8, 4)"),
    (blocking.q1, lambda p: p, "raises TypeError"),
    (blocking.q1, 5, "raises TypeError: expected a function"),
    (blocking.q2, lambda r: np.exp(6 * (1 - r / 5)) / np.exp(6), "without the two -1"),
    (blocking.q2, lambda r: np.exp(6 * (1 - r / 5)) - 1, "largest value"),
    (blocking.q2, lambda r: np.expm1(6 * (1 - 2 * r / 5)) / np.expm1(6), "not the diameter"),
    (blocking.q2, lambda r: 0.1, "gives a tube of radius 1.90"),
    (blocking.q2, lambda r: r, "tube of radius"),
    (blocking.q2, lambda r: -1.0, "between 0 and 1"),
    (blocking.q3, lambda n, b, s: list(range(0, n, s)), "move the last one inward"),
    (blocking.q3, lambda n, b, s: list(range(0, n - b + 1, s)), "is in no block"),
    (
        blocking.q3,
        lambda n, b, s: [*range(0, n - b + 1, s), n - b],
        "comes twice",
    ),
    (blocking.q3, lambda n, b, s: list(range(n - b + 1)), "other blocks than necessary"),
    (blocking.q3, lambda n, b, s: 0, "list of whole numbers"),
    (blocking.q3, lambda n, b, s: [-1, *range(0, n - b, s), n - b], "begins at -1"),
]


@pytest.mark.parametrize(("question", "answer", "words"), WRONG)
def test_a_typical_mistake_has_its_own_hint(question, answer, words, capsys):
    assert words in hint(question, answer, capsys)


@pytest.mark.parametrize("question", [blocking.q1, blocking.q2, blocking.q3])
def test_dots_are_not_attempted(question, capsys):
    for answer in (..., lambda *_: ...):
        question(answer)
        assert "not attempted" in capsys.readouterr().out
