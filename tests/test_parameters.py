"""Parameters and options: read as declared types, and checked before any work."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurolib.course import runs
from neurolib.errors import SettingsError
from neurolib.parameters import RANGES, TRUTH, check_range, read_as


@given(st.floats(allow_nan=False))
def test_numbers_are_read_as_python_writes_them(value):
    for text in (repr(value), f"{value:e}", f" {value!r} "):
        assert read_as(1.0, text, "x") == float(text)


@given(st.integers())
def test_whole_numbers_are_no_truth_and_no_fraction(value):
    assert read_as(1, str(value), "x") == value
    assert type(read_as(1.0, value, "x")) is float
    for text in (f"{value}.0", f"{value}e0", f"[{value}]"):
        with pytest.raises(SettingsError, match="x: expected int"):
            read_as(1, text, "x")


@given(st.text())
def test_text_stays_as_it_is(value):
    assert read_as("", value, "x") == value


@pytest.mark.parametrize("text", ["007", "1e5", "on", "~", "*x", "null", "0x10", "2024-01-01"])
def test_names_that_yaml_would_change_stay_names(text, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"held_out: {text!r}\nvalidate_on: {text.replace('*', '')}\n")
    assert runs.read_profile(path) == {"held_out": text, "validate_on": text.replace("*", "")}


def test_truth_is_a_word():
    assert {word: read_as(True, word, "x") for word in TRUTH} == TRUTH
    for value in (1, "1", "maybe", 1.0):
        with pytest.raises(SettingsError, match="expected bool"):
            read_as(True, value, "x")
    with pytest.raises(SettingsError, match="expected int"):
        read_as(1, True, "x")


@pytest.mark.parametrize("name", RANGES)
def test_intervals_hold_at_their_ends(name):
    left, (low, high), right = RANGES[name][0], eval_pair(RANGES[name]), RANGES[name][-1]
    inside = {low: left == "[", high: right == "]"}
    for end, towards in ((low, -math.inf), (high, math.inf)):
        if inside[end]:
            check_range(name, end)
            outside = math.nextafter(end, towards)
        else:
            outside = end
        for value in (outside, math.nan, -math.inf, math.inf, np.float32("nan"), np.int64(-1)):
            with pytest.raises(SettingsError, match=rf"--{name} .*: expected (at least|more than)"):
                check_range(name, value, f"--{name} ")


def eval_pair(interval: str) -> tuple[float, float]:
    low, high = interval[1:-1].split(", ")
    return float(low), float(high)


def test_every_number_of_a_notebook_has_an_interval():
    for notebook in runs.COURSE:
        for name, default in runs.notebook_parameters(notebook).items():
            if default != -1:  # stands for none
                check_range(name, default)
            numeric = isinstance(default, int | float) and not isinstance(default, bool)
            assert not numeric or name in RANGES, f"{notebook}: add {name} to parameters.RANGES"


def test_an_open_end_is_told():
    with pytest.raises(SettingsError, match=r"average=1\.0: expected at least 0 and below 1$"):
        check_range("average", 1.0)
