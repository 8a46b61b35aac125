"""Filters and thresholds against brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from neurolib import evaluation
from neurolib.course import baselines
from neurolib.errors import DataError, SettingsError
from neurolib.evaluation import choose_cut, dice, drop_small, in_voxels


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.sampled_from([1, 1.3, 4]))
def test_threshold_and_size_are_those_of_brute_force(seed, count, dz):
    rng = np.random.default_rng(seed)
    responses = [rng.integers(0, 12, (6, 14, 15)) / 10 for _ in range(count)]
    masks = [rng.random((6, 14, 15)) < 0.3 for _ in range(count)]
    candidates = np.unique(responses)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "SIZES", (1, 2, 4, 40))
        threshold, size, score = choose_cut(responses, masks, candidates, [(dz, 1, 1)] * count)
    pairs = list(zip(responses, masks, strict=True))
    alone = {cut: np.mean([dice(r >= cut, m) for r, m in pairs]) for cut in candidates}
    voxels = {least: max(1, round(least / dz)) for least in (1, 2, 4, 40)}
    means = {
        (cut, least): np.mean([dice(drop_small(r >= cut, voxels[least]), m) for r, m in pairs])
        for cut in candidates
        for least in voxels
        if alone[cut] >= 0.8 * max(alone.values())
    }
    assert score == pytest.approx(max(means.values()))
    assert means[threshold, size] == pytest.approx(score)


def test_default_candidates_come_close_to_every_value():
    rng = np.random.default_rng(0)
    mask = rng.random((20, 60, 60)) < 0.003
    response = rng.normal(0, 1, mask.shape) + 4 * mask
    *_, every = choose_cut([response], [mask], np.unique(response))
    chosen = baselines.choose("threshold", [response], [mask])
    assert every - 0.02 < chosen.dice <= every + 0.02


@pytest.mark.parametrize("size", [0, 1, 2, 7, 50])
def test_drop_small_is_counted_by_hand(size):
    mask = np.random.default_rng(1).random((8, 30, 30)) < 0.05
    label, count = ndimage.label(mask, np.ones((3, 3, 3)))
    wanted = np.zeros_like(mask)
    for number in range(1, count + 1):
        piece = label == number
        if piece.sum() >= size:
            wanted |= piece
    np.testing.assert_array_equal(drop_small(mask, size), wanted)


@given(st.integers(1, 10**4), st.tuples(*[st.floats(0.01, 10)] * 3))
def test_a_piece_keeps_its_volume_when_voxels_change(size, spacing):
    volume = in_voxels(size, spacing) * np.prod(spacing)
    assert abs(volume - size * min(spacing) ** 3) <= np.prod(spacing)


@pytest.mark.parametrize("name", baselines.FILTERS)
def test_each_filter_finds_a_thread_in_an_uneven_ground(name):
    rng = np.random.default_rng(2)
    images, masks = [], []
    for row in (12, 25):
        mask = np.zeros((16, 40, 40), bool)
        mask[7:10, row - 1 : row + 2, 3:37] = True
        ground = np.linspace(0, 0.1, 40)[None, None]
        images.append(np.clip(ground + 0.6 * mask + rng.normal(0, 0.05, mask.shape), 0, 1))
        masks.append(mask)
    baseline = baselines.choose(name, images[:1], masks[:1])
    assert baseline.dice > 0.6
    assert dice(baseline.mask(images[1]), masks[1]) > 0.6


def test_where_slices_are_far_apart_a_smaller_piece_is_a_neurite():
    mask, specks = np.zeros((2, 8, 60, 60), bool)
    mask[2:6, ::12, 5:35] = True  # pieces of 120 voxels
    specks[2:6, 6::12, 40:46] = True  # of 24
    image = 0.9 * (mask | specks)
    thin = baselines.choose("threshold", [image], [mask], [(4, 1, 1)])
    assert (thin.min_size, thin.dice) == (200, 1)
    assert dice(thin.mask(image, (4, 1, 1)), mask) == 1
    assert not thin.mask(image).any()
    assert baselines.choose("threshold", [image], [mask]).min_size == 50


def test_an_unknown_filter_and_no_volume_are_refused():
    with pytest.raises(SettingsError, match=r"'frangi'.*threshold"):
        baselines.respond("frangi", np.zeros((3, 3, 3)))
    with pytest.raises(DataError, match="hold out at least one"):
        baselines.choose("threshold", [], [])
