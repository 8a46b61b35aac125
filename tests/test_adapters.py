"""Segmentations of other programs: the meaning of voxels."""

import numpy as np
import pytest

from neurolib.course import adapters
from neurolib.errors import NeurolibError, SettingsError, VolumeError

SHAPE = (12, 30, 60)


def bar() -> np.ndarray:
    """A bar along x with a branch along y, off the middle of every axis, and a speck."""
    mask = np.zeros(SHAPE, bool)
    mask[3:6, 8:11, 5:50] = True
    mask[3:6, 11:27, 20:23] = True
    mask[10, 28, 56:59] = True
    return mask


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32, np.uint32, np.int64])
def test_whole_numbers_are_labels(dtype):
    labels = bar().astype(dtype)
    labels[labels > 0] = 1 + np.arange(labels.sum()) % 5
    for data, options, expected, words in (
        (labels, {}, bar(), "5 labels, all but 0 taken as foreground"),
        (labels, {"label": 3}, labels == 3, "label 3 of 0, 1, 2, 3, 4, 5"),
        # One label is a mask, whatever its number.
        *((bar() * dtype(value), {}, bar(), "a mask") for value in (1, 7, 255)),
    ):
        foreground, meaning = adapters.as_probability(data, **options)
        assert np.array_equal(foreground, expected)
        assert meaning == words


@pytest.mark.parametrize(("dtype", "top"), [(np.uint8, 255), (np.uint16, 65535)])
def test_whole_numbers_with_a_threshold_are_probabilities(dtype, top):
    data = np.linspace(0, top, 60).astype(dtype).reshape(3, 4, 5)
    probability, meaning = adapters.as_probability(data, threshold=0.5)
    assert probability.dtype == np.float32
    np.testing.assert_allclose(probability, data / top, rtol=1e-6)
    assert str(top) in meaning


def test_masks_and_probabilities_stay_what_they_are():
    assert adapters.as_probability(bar())[0].dtype == bool
    values = np.linspace(0, 1, 24).reshape(2, 3, 4)
    for threshold in (None, 0.3):
        assert np.array_equal(adapters.as_probability(values, threshold=threshold)[0], values)


ONES = np.ones((3, 4, 5))


@pytest.mark.parametrize(
    ("data", "options", "error", "words"),
    [
        (ONES[0], {}, VolumeError, "3D"),
        (ONES[:0], {}, VolumeError, "3D"),
        (np.full((3, 4, 5), np.nan), {}, VolumeError, "nan"),
        (ONES * 1.01, {}, VolumeError, "from 1.01 to 1.01"),
        (ONES * 255.0, {}, VolumeError, "save labels as integers"),
        (-0.1 * ONES, {}, VolumeError, "expected probabilities"),
        (ONES.astype(complex), {}, VolumeError, "complex128"),
        (ONES > 0, {}, VolumeError, "every voxel is foreground"),
        ((ONES + np.arange(5) % 2).astype(int), {}, VolumeError, "choose one label"),
        (-ONES.astype(int), {}, VolumeError, "label -1"),
        (bar().astype(np.uint8), {"label": 2}, VolumeError, "no voxel has the label 2; found 0, 1"),
        (ONES, {"label": 1}, SettingsError, "expected whole numbers"),
        (bar().astype(np.uint8), {"label": 1, "threshold": 0.5}, SettingsError, "give one"),
        (bar().astype(np.int32), {"threshold": 0.5}, SettingsError, "int32"),
    ],
)
def test_what_is_no_segmentation_is_refused_in_one_line(data, options, error, words):
    with pytest.raises(NeurolibError, match=words) as caught:
        adapters.as_probability(data, name="cell.tif", **options)
    assert caught.type is error
    assert "\n" not in str(caught.value)
