"""The exercises: every stub says so, every printed solution passes, typical mistakes get a hint."""

import re

import numpy as np
import pytest
import torch

from neurolib.check import blocking, inflation
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
    assert min(counts["01_data_blocking"], counts["02_weight_inflation"]) >= 2
    assert 1 not in counts.values()


def hint(question, answer, capsys):
    question(answer)
    said = capsys.readouterr().out
    assert said.startswith("✗"), said
    return said


def folded(weight, std, times=1.0):
    """A grey kernel with its σ right, or wrong by what it is multiplied with."""
    return (times * weight / std.view(1, 3, 1, 1)).sum(1, keepdim=True)


def shift(weight, mean, std):
    """What the bias loses to µ and σ."""
    return (weight * (mean / std).view(1, 3, 1, 1)).sum((1, 2, 3))


def in_slice(place):
    """An inflation that puts the kernel into the slice that `place` gives for a depth."""

    def inflate(grey, depth):
        kernel = torch.zeros(len(grey), 1, depth, *grey.shape[2:])
        kernel[:, :, place(depth)] = grey
        return kernel

    return inflate


def spread(*shares):
    """An inflation of depth 5 with these shares of the kernel."""
    return lambda grey, depth: torch.stack([share * grey for share in shares], 2)


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
    (inflation.q1, lambda w, b, m, s: folded(w, s), "two things"),
    (inflation.q1, lambda w, b, m, s: (folded(w, s)[:, 0], b), "keepdim"),
    (inflation.q1, lambda w, b, m, s: (w, b), "One kernel per token"),
    (inflation.q1, lambda w, b, m, s: (folded(w, s), (w * m.max()).sum()), "not over tokens"),
    (inflation.q1, lambda w, b, m, s: (w.sum(1, keepdim=True), b), "so must w'"),
    (inflation.q1, lambda w, b, m, s: (folded(w * s.view(1, 3, 1, 1) ** 2, s), b), "you multiply"),
    (inflation.q1, lambda w, b, m, s: (w.mean(1, keepdim=True), b), "do not average"),
    (inflation.q1, lambda w, b, m, s: (folded(w, s, 1 / 3), b), "Right σ; but"),
    (inflation.q1, lambda w, b, m, s: (w[:, :1], b), "not right yet"),
    (inflation.q1, lambda w, b, m, s: (folded(w, s), b), "b' is not b"),
    (inflation.q1, lambda w, b, m, s: (folded(w, s), b + shift(w, m, s)), "b minus"),
    (inflation.q1, lambda w, b, m, s: (folded(w, s), b - shift(w, m, s / s)), "too, divide by σ"),
    (inflation.q1, lambda w, b, m, s: (folded(w, s), b - shift(w, m, s) / 16), "do not average"),
    (inflation.q1, lambda w, b, m, s: (folded(w, s), b - shift(w, m, s) / 48), "do not average"),
    (
        inflation.q1,
        lambda w, b, m, s: (folded(w, s), b - (m / s).sum() * folded(w, s).sum((1, 2, 3))),
        "a µ/σ of its own",
    ),
    (
        inflation.q1,
        lambda w, b, m, s: (folded(w, s), b - (m.view(1, 3, 1, 1) * folded(w, s)).sum((1, 2, 3))),
        "not with their sum",
    ),
    (inflation.q1, lambda w, b, m, s: (folded(w, s), -shift(w, m, s)), "b itself is missing"),
    (inflation.q1, lambda w, b, m, s: (folded(w, s), 2 * b), "put g = 0"),
    (inflation.q1, lambda w, b: (w, b), "raises TypeError"),
    (inflation.q2, lambda g, d: g, "expected (E, 1, D, p, p)"),
    (inflation.q2, lambda g, d: in_slice(lambda n: n // 2)(g, d)[:, 0], "expected (E, 1, D, p, p)"),
    (inflation.q2, lambda g, d: g[:, :, None].repeat(1, 1, d, 1, 1), "5 times as strongly"),
    (inflation.q2, lambda g, d: g[:, :, None].repeat(1, 1, d, 1, 1) / d, "That is average"),
    (inflation.q2, in_slice(lambda depth: 0), "in slice 0 of 5"),
    (inflation.q2, in_slice(lambda depth: (depth + 1) // 2 % depth), "in slice 3 of 5"),
    (inflation.q2, spread(0, 0, 0.2, 0, 0), "0.2 times the kernel"),
    (inflation.q2, spread(0, 0.5, 1, 0.5, 0), "shares [0.0, 0.5, 1.0, 0.5, 0.0]"),
    (inflation.q2, lambda g, d: torch.ones(len(g), 1, d, *g.shape[2:]), "no multiple"),
    (inflation.q2, lambda g, d: spread(0, 0, 1, 0, 0)(g, d), "Depth 1"),
    (inflation.q3, lambda depth, n: n / depth, "The noise shrinks, too"),
    (inflation.q3, lambda depth, n: n, "like 1/√D"),
    (inflation.q3, lambda depth, n: depth**0.5, "a tube in all slices"),
    (inflation.q3, lambda depth, n: depth**-0.5, "a tube in one slice"),
    (inflation.q3, lambda depth, n: depth**0.5 / n, "not the noise by the signal"),
    (inflation.q3, lambda depth, n: n / depth**1.5, "divide by 1/√D"),
    (inflation.q3, lambda depth, n: (n / depth) ** 0.5, "not with its root"),
    (inflation.q3, lambda depth, n: 1, "is not right"),
    (inflation.q3, lambda depth: depth, "raises TypeError"),
]


@pytest.mark.parametrize(("question", "answer", "words"), WRONG)
def test_a_typical_mistake_has_its_own_hint(question, answer, words, capsys):
    assert words in hint(question, answer, capsys)


QUESTIONS = [blocking.q1, blocking.q2, blocking.q3, inflation.q1, inflation.q2, inflation.q3]


@pytest.mark.parametrize("question", QUESTIONS)
def test_dots_are_not_attempted(question, capsys):
    for answer in (..., lambda *_: ...):
        question(answer)
        assert "not attempted" in capsys.readouterr().out
