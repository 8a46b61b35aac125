"""The exercises: stubs are recognised, printed solutions pass, typical mistakes get a hint."""

import importlib
import math
import pkgutil
import re

import numpy as np
import pytest
import torch
from scipy.stats import t as student_t

from neurolib.course import exercises
from neurolib.course.exercises import (
    blocking,
    evaluation,
    inflation,
    start_here,
    table1,
    tracing,
    training,
)
from neurolib.course.runs import NOTEBOOKS

STUB = re.compile(
    r'\n# %% tags=\["exercise"\]\n(?P<stub>.*?)\n# %% \[markdown\] tags=\["solution"\]\n'
    r".*?# ```python\n(?P<solution>.*?)# ```\n",
    re.DOTALL,
)
quantile = student_t.ppf
SOURCES = sorted(NOTEBOOKS.glob("[0-9]*.py"))


def stubs(path):
    """The stub and the solution of each exercise of a notebook, as code."""
    for match in STUB.finditer(path.read_text(encoding="utf-8")):
        solution = re.sub(r"(?m)^# ?", "", match["solution"])
        yield match["stub"].strip(), solution.strip()


def ask(source, stub, solution=""):
    """Execute an exercise like a reader, with the notebook's imports."""
    names = {}
    text = source.read_text(encoding="utf-8")
    imports = re.findall(r"(?m)^(?:import|from) (?!sys\b|site\b).*$", text)
    exec("\n".join(imports), names)
    question = stub.splitlines()[-1]
    assert question.startswith("exercises.q"), stub
    exec(f"{solution}\n{question}" if solution else stub, names)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_stubs_are_not_attempted_and_solutions_are_right(source, capsys):
    text = source.read_text(encoding="utf-8")
    questions = list(stubs(source))
    assert len(questions) >= 2
    assert len(questions) == text.count('tags=["exercise"]') == text.count('tags=["solution"]')
    for number, (stub, solution) in enumerate(questions, 1):
        ask(source, stub)
        assert f"q{number}: not attempted" in capsys.readouterr().out
        ask(source, stub, solution)
        assert "● right" in capsys.readouterr().out, solution


def hint(question, answer, capsys):
    question(answer)
    said = capsys.readouterr().out
    assert said.startswith("✗"), said
    return said


def folded(weight, std, times=1.0):
    """A grey kernel with the right σ, or multiplied by a wrong factor."""
    return (times * weight / std.view(1, 3, 1, 1)).sum(1, keepdim=True)


def shift(weight, mean, std):
    """The change of the bias by µ and σ."""
    return (weight * (mean / std).view(1, 3, 1, 1)).sum((1, 2, 3))


def in_slice(place):
    """An inflation that puts the kernel into slice `place(depth)`."""

    def inflate(grey, depth):
        kernel = torch.zeros(len(grey), 1, depth, *grey.shape[2:])
        kernel[:, :, place(depth)] = grey
        return kernel

    return inflate


def spread(*shares):
    """An inflation of depth 5 with these shares of the kernel."""
    return lambda grey, depth: torch.stack([share * grey for share in shares], 2)


def dice(above=1.0, below=1.0, times=2.0, power=1):
    """A soft Dice loss, right by default."""
    return lambda p, y: (
        1 - (times * (p * y).sum() + above) / ((p**power).sum() + (y**power).sum() + below)
    )


def hard_dice(p, y):
    return dice()((p >= 0.5).to(p), y)


def dice_per_block(p, y):
    return 1 - ((2 * (p * y).sum((1, 2, 3)) + 1) / ((p + y).sum((1, 2, 3)) + 1)).mean()


def cosine(progress, low=0.01):
    return low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2


def after(warm_up, curve):
    """A schedule: one function of (step, warm) in the warm-up, one of the progress afterwards."""
    return lambda k, n, w: warm_up(k, w) if k < w else curve((k - w) / (n - w))


def rise(k, w):
    return (k + 1) / w


def from_step_0(low):
    """A cosine that does not begin after the warm-up."""
    return lambda k, n, w: rise(k, w) if k < w else cosine(k / n, low)


SHARED = np.random.default_rng(0)


def by_depth(parent):
    """A right order: breadth-first."""
    order = list(np.flatnonzero(parent < 0))
    for row in order:
        order += list(np.flatnonzero(parent == row))
    return order


ORDER = ["alternate slices", "random blocks", "halves in z", "another neuron"]


def specks(truth):
    mask = truth.copy()
    mask[::13, 40::5, ::13] = True
    return mask


def neurons(gain, deviation, level):
    """The number of neurons for a t interval of another level."""
    n = 2
    while quantile(level, n - 1) * deviation / n**0.5 >= gain:
        n += 1
    return n


def means(values, draws=10_000):
    rng = np.random.default_rng(5)
    return rng.choice(values, (draws, len(values))).mean(1)


def ends(values, low=2.5, high=97.5):
    return np.percentile(values, [low, high])


def stds(*samples):
    return [sample.std(ddof=1) for sample in samples]


def student(values, t=None, spread=None, share=None):
    """A t interval, right by default."""
    n = len(values)
    half = t or quantile(0.975, n - 1)
    half *= (spread or values.std(ddof=1)) * (share or 1 / math.sqrt(n))
    return values.mean() - half, values.mean() + half


def penalised(penalty):
    """A mean Hd95 in which a miss costs `penalty(values, diagonals)`."""
    return lambda v, d: np.where(np.isinf(v), penalty(v, d), v).mean()


WRONG = [
    (evaluation.q1, lambda image: image, "a mask"),
    (evaluation.q1, lambda image: image > 0.2, "You mark"),
    (evaluation.q1, lambda image: image >= 0.675, "That is a threshold"),
    (evaluation.q1, lambda image: np.roll(image > 0.8, 1), "use both"),
    (evaluation.q2, lambda truth: truth, "two masks"),
    (evaluation.q2, lambda truth: (truth[1:], truth), "Expected boolean masks"),
    (evaluation.q2, lambda truth: (~truth, truth), "at least 0.9"),
    (evaluation.q2, lambda truth: (truth, truth), "single voxels"),
    (evaluation.q2, lambda truth: (specks(truth), ~truth), "stay near"),
    (evaluation.q2, lambda truth: (specks(truth), truth), "much thicker"),
    (evaluation.q3, lambda v, d: v.mean(), "something finite"),
    (evaluation.q3, lambda v, d: v[np.isfinite(v)].mean(), "left out"),
    (evaluation.q3, penalised(lambda v, d: 0), "counts as 0"),
    (evaluation.q3, lambda v, d: d.mean(), "diagonals alone"),
    (evaluation.q3, penalised(lambda v, d: d.max()), "Its own volume's"),
    (evaluation.q3, penalised(lambda v, d: v[np.isfinite(v)].max()), "no bound"),
    (evaluation.q3, penalised(lambda v, d: 1000), "Replace each infinity"),
    (evaluation.q4, lambda a, b: (a - b).mean(), "two numbers"),
    (evaluation.q4, lambda a, b: student(a - b)[::-1], "lower end comes first"),
    (evaluation.q4, lambda a, b: student(b - a), "first method over the second"),
    (evaluation.q4, lambda a, b: student(a - b, spread=np.hypot(*stds(a, b))), "not that of each"),
    (evaluation.q4, lambda a, b: student(a - b, share=1), "spread of single neurons"),
    (evaluation.q4, lambda a, b: student(a - b, spread=(a - b).std()), "ddof=1"),
    (evaluation.q4, lambda a, b: student(a - b, t=1.96), "many neurons"),
    (evaluation.q4, lambda a, b: student(a - b, t=quantile(0.95, len(a) - 1)), "at each end"),
    (evaluation.q4, lambda a, b: student(a - b, t=quantile(0.975, len(a))), "degrees of freedom"),
    (evaluation.q4, lambda a, b: student(a), "one method"),
    (evaluation.q4, lambda a, b: ends(means(a - b)), "percentile bootstrap"),
    (evaluation.q4, lambda a, b: (0, 1), "plus and minus"),
    (tracing.q1, 5, "two numbers"),
    (tracing.q1, (20, 40), "no neurite to cut"),
    (tracing.q1, (10, 10), "leaves one piece"),
    (tracing.q1, (35, 10), "mended it"),
    (tracing.q1, (60, 35), "mended it"),
    (tracing.q1, (15, 10), "only a stump of 35 voxels"),
    (tracing.q2, lambda parent: np.arange(len(parent)), "before its parent"),
    (tracing.q2, lambda parent: np.argsort(parent, kind="stable"), "before its parent"),
    (tracing.q2, lambda parent: by_depth(parent)[::-1], "Children come first"),
    (tracing.q2, lambda parent: parent, "each row once"),
    (tracing.q2, lambda parent: by_depth(parent)[:-2], "missing"),
    (tracing.q2, lambda parent: parent.astype(float), "whole numbers"),
    (tracing.q2, lambda parent: 5, "list of rows"),
    (start_here.q1, lambda n, r, s: n / np.prod(s), "one voxel wide"),
    (start_here.q1, lambda n, r, s: n * r**2 / np.prod(s), "π is missing"),
    (start_here.q1, lambda n, r, s: n * np.pi * (2 * r) ** 2 / np.prod(s), "half the width"),
    (start_here.q1, lambda n, r, s: n * np.pi * r**2, "size of the volume"),
    (start_here.q1, lambda n, r, s: 100 * n * np.pi * r**2 / np.prod(s), "between 0 and 1"),
    (start_here.q1, lambda n, r, s: n * 2 * np.pi * r / np.prod(s), "the surface"),
    (start_here.q1, lambda n, r, s: 0.5, "one long straight tube"),
    (start_here.q2, lambda m: m.mean(), "gets wrong"),
    (start_here.q2, lambda m: 100 * (~m).mean(), "between 0 and 1"),
    (start_here.q2, lambda m: (~m).sum(), "size of the mask"),
    (start_here.q2, lambda m: 0, "the network's Dice"),
    (start_here.q2, lambda m: 1.0, "Not all of them"),
    (start_here.q2, lambda m: 0.5, "False in the mask"),
    (training.q1, lambda s, k: np.random.default_rng(s).random(3), "Every step draws the same"),
    (training.q1, lambda s, k: SHARED.random(3), "new generator for every step"),
    (training.q1, lambda s, k: np.random.default_rng(k).random(3), "Another seed"),
    (training.q1, lambda s, k: np.random.default_rng(s + k).random(3), "[seed, step]"),
    (training.q1, lambda s: 0, "raises TypeError"),
    (training.q2, dice(0, 0), "Without the ones"),
    (training.q2, dice(1, 0), "below the line"),
    (training.q2, dice(0, 1), "above the line"),
    (training.q2, dice(times=1), "twice the overlap"),
    (training.q2, dice(power=2), "not of its square"),
    (training.q2, hard_dice, "has no slope"),
    (training.q2, dice_per_block, "over the whole batch"),
    (training.q2, lambda p, y: 1 - dice()(p, y), "That is the Dice"),
    (training.q2, lambda p, y: 1 - dice(0, 0)(p, y), "That is the Dice"),
    (training.q2, lambda p, y: dice()(p, y).item(), "no gradient"),
    (training.q2, lambda p, y: p * y, "One number"),
    (training.q2, lambda p, y: p.sum() * math.nan, "0 / 0"),
    (training.q2, lambda p, y: p.mean(), "each of the three sums"),
    (training.q3, lambda f: 0.5, "two probabilities"),
    (training.q3, lambda f: (2, 1), "between 0 and 1"),
    (training.q3, lambda f: (0, 1), "and another p has 0.056"),
    (training.q3, lambda f: (0.5, 1), "Where is -f log p"),
    (training.q3, lambda f: (f, f), "the end of that"),
    (training.q3, lambda f: (f, 0), "soft Dice of p = 0 everywhere is 1.000"),
    (training.q4, after(lambda k, w: k / w, cosine), "would have no rate"),
    (training.q4, after(lambda k, w: k / (w - 1), cosine), "(step + 1) / warm"),
    (training.q4, after(lambda k, w: 1, cosine), "Warm up first"),
    (training.q4, lambda k, n, w: (k + 1) / n, "not at the end"),
    (training.q4, after(rise, lambda q: cosine(q, 0)), "It ends at 0"),
    (training.q4, after(rise, lambda q: 0.01 + cosine(q, 0)), "1.01"),
    (training.q4, after(rise, lambda q: max(0.01, cosine(q, 0))), "do not cut it"),
    (training.q4, after(rise, lambda q: math.cos(math.pi * q)), "from 1 to -1"),
    (training.q4, after(rise, lambda q: 1 - 0.99 * q), "That is a line"),
    (training.q4, from_step_0(0), "begins at the end of the warm-up"),
    (training.q4, from_step_0(0.01), "begins where the warm-up ends"),
    (training.q4, lambda k, n, w: rise(k, w), "The warm-up goes on"),
    (training.q4, lambda k, n, w: 0.5, "Expected 0"),
    (blocking.q1, lambda p, s: p / np.array(s), "reverse one of the two"),
    (blocking.q1, lambda p, s: p * np.array(s)[::-1], "divide"),
    (blocking.q1, lambda p, s: np.rint(p / np.array(s)[::-1]), "do not round"),
    (blocking.q1, lambda p, s: p / np.array(s)[::-1] - 0.5, "nothing to add"),
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
    (blocking.q3, lambda n, b, s: [*range(0, n - b + 1, s), n - b], "appears twice"),
    (blocking.q3, lambda n, b, s: list(range(n - b + 1)), "not by the expected blocks"),
    (blocking.q3, lambda n, b, s: 0, "list of whole numbers"),
    (blocking.q4, "random", "four names"),
    (blocking.q4, ORDER[::-1], "no split flatters less"),
    (blocking.q4, [ORDER[1], ORDER[0], *ORDER[2:]], "nearest training blocks"),
    (blocking.q3, lambda n, b, s: [-1, *range(0, n - b, s), n - b], "begins at -1"),
    (inflation.q1, lambda w, b, m, s: folded(w, s), "two things"),
    (inflation.q1, lambda w, b, m, s: (folded(w, s)[:, 0], b), "keepdim"),
    (inflation.q1, lambda w, b, m, s: (w, b), "one kernel for each"),
    (inflation.q1, lambda w, b, m, s: (folded(w, s), (w * m.max()).sum()), "over the patch only"),
    (inflation.q1, lambda w, b, m, s: (w.sum(1, keepdim=True), b), "so must w'"),
    (inflation.q1, lambda w, b, m, s: (folded(w * s.view(1, 3, 1, 1) ** 2, s), b), "you multiply"),
    (inflation.q1, lambda w, b, m, s: (w.mean(1, keepdim=True), b), "do not average"),
    (inflation.q1, lambda w, b, m, s: (folded(w, s, 1 / 3), b), "σ is right, but"),
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
    (inflation.q2, lambda g, d: g[:, :, None].repeat(1, 1, d, 1, 1), "5 times the response"),
    (inflation.q2, lambda g, d: g[:, :, None].repeat(1, 1, d, 1, 1) / d, "That is average"),
    (inflation.q2, in_slice(lambda depth: 0), "in slice 0 of 5"),
    (inflation.q2, in_slice(lambda depth: (depth + 1) // 2 % depth), "in slice 3 of 5"),
    (inflation.q2, spread(0, 0, 0.2, 0, 0), "0.2 times the kernel"),
    (inflation.q2, spread(0, 0.5, 1, 0.5, 0), "shares [0.0, 0.5, 1.0, 0.5, 0.0]"),
    (inflation.q2, lambda g, d: torch.ones(len(g), 1, d, *g.shape[2:]), "not a multiple"),
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
    (table1.q1, lambda a, b: [a[n] - b[n] for n in a], "with only one of the two networks"),
    (table1.q1, lambda a, b: [b[n] - a[n] for n in a if n in b], "the other sign"),
    (table1.q1, lambda a, b: np.subtract(list(a.values()), list(b.values())), "Pair by name"),
    (table1.q1, lambda a, b: np.mean(list(a.values())) - np.mean(list(b.values())), "as a list"),
    (table1.q1, lambda a, b: {n: a[n] - b[n] for n in a if n in b}, "yours is a dictionary"),
    (table1.q1, lambda a, b: [a[n] for n in a], "4 neurons were measured with both"),
    (table1.q1, lambda a, b: [a[n] for n in a if n in b], "not the differences"),
    (table1.q2, lambda g, s: 2.5, "must be whole"),
    (table1.q2, lambda g, s: math.ceil((1.96 * s / g) ** 2), "1.96 for t"),
    (table1.q2, lambda g, s: 1, "no interval"),
    (table1.q2, lambda g, s: 4, "below 0"),
    (table1.q2, lambda g, s: 100, "above 0"),
    (table1.q2, lambda g, s: neurons(g, s, 0.95), "at each end"),
]


@pytest.mark.parametrize(("question", "answer", "words"), WRONG)
def test_a_typical_mistake_has_its_own_hint(question, answer, words, capsys):
    assert words in hint(question, answer, capsys)


QUESTIONS = [
    judge
    for module in pkgutil.iter_modules(exercises.__path__, "neurolib.course.exercises.")
    for name, judge in vars(importlib.import_module(module.name)).items()
    if re.fullmatch(r"q\d", name)
]


# These answers are no functions.
VALUES = (tracing.q1, blocking.q4)


@pytest.mark.parametrize("question", QUESTIONS)
def test_dots_are_not_attempted(question, capsys):
    for answer in (..., lambda *_: ...)[: 1 if question in VALUES else 2]:
        question(answer)
        assert "not attempted" in capsys.readouterr().out
