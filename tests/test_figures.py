"""The comparison of figures accepts the same picture and nothing else."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from figures import LIMIT, Comparison, difference, figures

from neurolib.course import plotting


def curve(shift: float = 0.0, title: str = "Dice", noise: float = 0.0) -> bytes:
    x = np.linspace(0, 1, 50)
    figure, axes = plt.subplots(figsize=(4, 3))
    axes.plot(x, x**2 + shift + noise * np.sin(40 * x))
    axes.set(ylim=(0, 1.5), title=title)
    return plotting.png(figure)


def volume(seed: int, change: float = 0.0) -> bytes:
    values = np.random.default_rng(seed).random((8, 8)) * (1 - change)
    figure, axes = plt.subplots(figsize=(3, 3))
    axes.imshow(values, vmin=0, vmax=1, cmap="gray")
    return plotting.png(figure)


@pytest.mark.parametrize(
    ("one", "other"), [(curve(), curve(noise=0.002)), (volume(0), volume(0, change=0.02))]
)
def test_the_same_figure_with_other_last_digits_passes(one, other):
    assert difference(one, one) == 0
    assert 0 < difference(one, other) < LIMIT / 2


@pytest.mark.parametrize(
    ("one", "other"),
    [(curve(), curve(shift=0.2)), (volume(0), volume(1)), (curve(), volume(0))],
)
def test_another_figure_does_not(one, other):
    assert difference(one, other) > LIMIT


def run_cell(stored: bytes, drawn: bytes | None) -> Comparison:
    def outputs(data):
        return [{"data": {"text/html": plotting.markup(data, "dice", "a curve")}}] if data else []

    item = SimpleNamespace(
        test_outputs=outputs(drawn),
        options={"check": True},
        cell=SimpleNamespace(outputs=outputs(stored)),
    )
    comparison = Comparison()
    call = comparison.pytest_runtest_call(item)
    next(call)
    with pytest.raises(StopIteration):
        call.send(None)
    return comparison


def test_each_figure_of_a_cell_is_compared():
    assert list(figures([{"data": {"text/html": ["<figure ", 'id="a">;base64,QQ==']}}])) == ["a"]
    assert run_cell(curve(), curve()).compared == 1
    with pytest.raises(AssertionError, match=r"figure dice: differs .* run make notebooks"):
        run_cell(curve(), curve(shift=0.2))
    with pytest.raises(AssertionError, match="figure dice: stored in the notebook, not drawn"):
        run_cell(curve(), None)
