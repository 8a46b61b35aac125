"""Intervals and tests against brute force, simulated experiments, and their definitions."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from neurolib.course.statistics import (
    aggregate,
    by_neuron,
    compare_networks,
    differences,
    sign_flip_p,
    spreads,
    t_interval,
)
from neurolib.errors import NeurolibError, SettingsError


def share_covered(experiments: list[np.ndarray]) -> float:
    """Share of experiments whose interval holds the true mean 0."""
    intervals = [t_interval(values) for values in experiments]
    return float(np.mean([one.low < 0 < one.high for one in intervals]))


def test_a_t_interval_covers_what_it_says_and_a_bootstrap_does_not():
    rng = np.random.default_rng(0)
    experiments = rng.normal(size=(2000, 4))
    assert share_covered(list(experiments)) == pytest.approx(0.95, abs=0.015)
    draws = rng.integers(4, size=(1000, 4))
    low, high = np.percentile(experiments[:, draws].mean(axis=2), [2.5, 97.5], axis=1)
    assert np.mean((low < 0) & (high > 0)) == pytest.approx(0.80, abs=0.03)


@pytest.mark.parametrize(
    ("neurons", "seeds", "rest"), [(1, 1, 0.3), (0.3, 1, 0.3), (1, 0, 0.5), (0.1, 0.1, 1)]
)
def test_both_neurons_and_seeds_are_covered(neurons, seeds, rest):
    rng = np.random.default_rng(1)
    experiments = [
        rng.normal(0, neurons, (4, 1)) + rng.normal(0, seeds, (1, 3)) + rng.normal(0, rest, (4, 3))
        for _ in range(600)
    ]
    assert 0.93 < share_covered(experiments) < 0.985
    if seeds == 1:  # seeds shared by all neurons do not average out over neurons
        assert share_covered([values.mean(axis=1) for values in experiments]) < 0.9


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=2, max_size=9), st.sampled_from([0.5, 0.95]))
def test_one_seed_gives_the_interval_of_scipy(values, level):
    values = np.round(values, 3) + np.arange(len(values)) * 1e-2
    low, high = stats.ttest_1samp(values, 0).confidence_interval(level)
    interval = t_interval(values, level)
    assert (interval.low, interval.high) == (pytest.approx(low), pytest.approx(high))
    assert (interval.mean, interval.n) == (pytest.approx(values.mean()), len(values))
    # Identical seeds count as one.
    same = t_interval(np.stack([values] * 3, axis=1), level)
    assert (same.low, same.high) == (pytest.approx(low), pytest.approx(high))


def test_spreads_are_those_that_were_put_in():
    rng = np.random.default_rng(2)
    values = rng.normal(0, 2.0, (400, 1)) + rng.normal(0, 0.7, (1, 400))
    estimated = spreads(values + rng.normal(0, 0.5, values.shape))
    assert estimated == (pytest.approx(2.0, rel=0.1), pytest.approx(0.7, rel=0.1))
    assert np.isnan(spreads(np.ones((3, 1)))).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-20, 20), min_size=1, max_size=8))
def test_p_counts_all_sign_flips(values):
    values = np.array(values) / 4
    signs = itertools.product((-1, 1), repeat=len(values))
    extreme = [abs(values @ flip) >= abs(values.sum()) for flip in signs]
    assert sign_flip_p(values) == pytest.approx(np.mean(extreme))
    assert sign_flip_p(-values) == sign_flip_p(values)


def test_p_of_few_and_of_many():
    assert sign_flip_p([5.0]) == 1
    assert sign_flip_p([0.1, 0.2, 0.3, 0.4]) == 0.125
    assert sign_flip_p(np.full(16, 0.1)) == 2 / 2**16
    many = np.random.default_rng(0).normal(0.2, 1, 40)
    assert sign_flip_p(many) == sign_flip_p(many)
    assert sign_flip_p(many) == pytest.approx(stats.ttest_1samp(many, 0).pvalue, abs=0.02)
    # Seeds are averaged; they do not count as neurons.
    assert sign_flip_p(np.ones((4, 9))) == 0.125


def test_aggregate_replaces_misses():
    interval = aggregate([1.0, np.inf, 3.0], penalty=np.array([10, 20, 30]))
    assert (interval.mean, interval.n) == (8, 3)


def test_networks_are_compared_on_the_neurons_that_both_have():
    values = {
        "base": {"n1": 0.1, "n2": 0.2, "n3": 0.3},
        "other": {"n1": 0.2, "n2": 0.4, "n9": 0.9},
    }
    base, other = compare_networks(values, "base")
    assert set(base) == {"network", "mean"}
    assert other["n"] == 2
    assert other["difference"] == pytest.approx(np.mean([0.1, 0.2]))
    interval = stats.ttest_1samp([0.1, 0.2], 0).confidence_interval()
    assert (other["low"], other["high"]) == pytest.approx(tuple(interval))
    # For two differences of one sign, two of the four sign patterns are as extreme.
    assert other["p"] == pytest.approx(0.5)
    with pytest.raises(SettingsError, match="expected one of base, other"):
        compare_networks(values, "none")
    with pytest.raises(SettingsError, match="common neuron"):
        compare_networks({"a": {"n1": 1.0}, "b": {"n2": 1.0}}, "a")
    alone = compare_networks({"a": {"n1": 1.0}, "b": {"n1": 2.0}}, "a")[1]
    assert alone["p"] == 1
    assert np.isnan([alone["low"], alone["high"]]).all()


def test_networks_are_compared_seed_by_seed():
    base = {"n1": {"0": 0.1, "1": 0.3}, "n2": {"1": 0.5, "0": 0.2}}
    other = {"n2": {"0": 0.3, "1": 0.5}, "n1": {"1": 0.5, "0": 0.2}}
    assert differences(other, base) == pytest.approx(np.array([[0.1, 0.0], [0.1, 0.2]]))
    row = compare_networks({"base": base, "other": other}, "base")[1]
    assert row["difference"] == pytest.approx(0.1)
    assert row["sd seeds"] >= 0
    # If only one neuron has a seed, means over seeds remain.
    base["n3"], other["n3"] = {"0": 1.0}, {"0": 1.5}
    assert by_neuron(base).shape == (3, 1)
    assert differences(other, base) == pytest.approx(np.array([[0.05], [0.15], [0.5]]))
    assert "sd seeds" not in compare_networks({"base": base, "other": other}, "base")[1]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: t_interval([]), "at least one"),
        (lambda: t_interval([1, np.nan]), "1 not finite"),
        (lambda: sign_flip_p([[[1.0]]]), "shape"),
        (lambda: aggregate([1, np.inf]), "diagonals"),
        (lambda: aggregate([1, np.nan], penalty=3), "finite"),
    ],
)
def test_errors_are_one_line_of_ours(call, words):
    with pytest.raises(NeurolibError, match=words) as caught:
        call()
    assert caught.type is SettingsError
    assert "\n" not in str(caught.value)
