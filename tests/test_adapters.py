"""Other people's segmentations and tracers: what voxels mean, and whose frame trees are in."""

import numpy as np
import pytest
from skimage.morphology import skeletonize

from neurolib.course import adapters
from neurolib.errors import NeurolibError, SettingsError, VolumeError
from neurolib.evaluation import distance_to_tree, tree_distance, tree_scores
from neurolib.swc import Tree, components, length, tips
from neurolib.tracing import trace

SHAPE = (12, 30, 60)


def bar() -> np.ndarray:
    """A bar along x with a branch along y, off the middle of every axis, and a speck."""
    mask = np.zeros(SHAPE, bool)
    mask[3:6, 8:11, 5:50] = True
    mask[3:6, 11:27, 20:23] = True
    mask[10, 28, 56:59] = True
    return mask


AXIS = Tree(
    np.array([[5, 9, 4], [21, 9, 4], [49, 9, 4], [21, 26, 4]], float),
    np.ones(4),
    np.zeros(4, int),
    np.array([-1, 0, 1, 1]),
)


def check_is_forest(tree: Tree) -> None:
    assert (tree.parent < np.arange(len(tree.parent))).all()
    assert np.isfinite(tree.xyz).all()
    assert (tree.radius > 0).all()


# --- Segmentations -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32, np.uint32, np.int64])
def test_whole_numbers_are_labels(dtype):
    labels = bar().astype(dtype)
    labels[labels > 0] = 1 + np.arange(labels.sum()) % 5
    found, meaning = adapters.as_probability(labels)
    assert np.array_equal(found, bar())
    assert "5 labels, all but 0" in meaning
    found, meaning = adapters.as_probability(labels, label=3)
    assert np.array_equal(found, labels == 3)
    assert "label 3" in meaning


@pytest.mark.parametrize("value", [1, 7, 255])
def test_one_label_is_a_mask_whatever_its_number(value):
    found, meaning = adapters.as_probability(bar() * np.uint8(value))
    assert np.array_equal(found, bar())
    assert meaning == "a mask"


@pytest.mark.parametrize(("dtype", "top"), [(np.uint8, 255), (np.uint16, 65535)])
def test_whole_numbers_with_a_threshold_are_probabilities(dtype, top):
    data = np.linspace(0, top, 60).astype(dtype).reshape(3, 4, 5)
    found, meaning = adapters.as_probability(data, threshold=0.5)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, data / top, rtol=1e-6)
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


# --- Tracers -------------------------------------------------------------------------------------

INSTALLED = {"skeleton": adapters.trace_skeleton, "neurolib": trace}
try:
    import kimimaro  # noqa: F401

    INSTALLED["kimimaro"] = adapters.trace_kimimaro
except ImportError:
    pass
needs_kimimaro = pytest.mark.skipif("kimimaro" not in INSTALLED, reason="kimimaro is not installed")


@pytest.mark.parametrize("name", INSTALLED)
def test_trees_are_in_our_frame(name):
    tracer = INSTALLED[name]
    tree = tracer(bar())
    check_is_forest(tree)
    assert len(set(components(tree))) == 1  # the speck is dropped
    assert distance_to_tree(tree.xyz, AXIS).max() <= 1.5
    assert tree_scores(tree, AXIS).recall > 0.95
    assert 1 <= np.median(tree.radius) <= 2
    assert len(set(components(tracer(bar(), min_size=1)))) == 2
    turned = tracer(bar().transpose(2, 0, 1))
    assert tree_distance(Tree(turned.xyz[:, [2, 0, 1]], *[None] * 2, turned.parent), tree).esa < 0.7


@pytest.mark.parametrize("name", INSTALLED)
def test_spacing_changes_lengths_and_not_coordinates(name):
    mask = np.zeros((8, 30, 60), bool)
    mask[3:5, 12:18, 5:50] = True  # a tube of radius 3 in voxels of 3 x 1 x 1
    tree = INSTALLED[name](mask, spacing=(6.0, 2.0, 2.0))
    check_is_forest(tree)
    assert np.abs(tree.xyz[:, 2] - 3.5).max() <= 1
    assert np.abs(tree.xyz[:, 1] - 14.5).max() <= 2.5
    assert np.ptp(tree.xyz[:, 0]) > 35
    assert 2 <= np.median(tree.radius) <= 3.6


@pytest.mark.parametrize("name", INSTALLED)
def test_the_seed_is_the_root(name):
    tracer = INSTALLED[name]
    tree = tracer(bar(), seed=(4, 26, 21))
    assert np.allclose(tree.xyz[0], [21, 26, 4], atol=2)
    tree = tracer(bar(), seed=(11, 29, 58), min_size=1)
    assert tree.xyz[0, 0] > 50  # the piece of the seed comes first, however small
    with pytest.raises(VolumeError, match="outside"):
        tracer(bar(), seed=(0, 0, 60))
    with pytest.raises(VolumeError, match="nothing to trace"):
        tracer(np.zeros(SHAPE, bool))


def test_a_skeleton_keeps_every_voxel_of_the_thinning():
    tree = adapters.trace_skeleton(bar(), min_size=1)
    found = {tuple(v) for v in tree.xyz[:, ::-1].astype(int)}
    assert found == {tuple(v) for v in np.argwhere(skeletonize(bar()))}


@pytest.mark.parametrize("size", [(2, 2), (4, 4), (4, 6), (3, 4)])
def test_tubes_that_thinning_removes_are_traced(size):
    mask = np.zeros((20, 20, 60), bool)
    mask[5 : 5 + size[0], 5 : 5 + size[1], 5:55] = True
    tree = adapters.trace_skeleton(mask)
    assert (tree.parent < 0).sum() == 1
    assert length(tree) == pytest.approx(50, abs=6)
    middle = 4.5 + np.array(size) / 2
    assert np.abs(tree.xyz[:, [2, 1]] - middle).max() <= 1


def test_loops_are_opened_once():
    ring = np.zeros((5, 20, 20), bool)
    ring[2, 3:17, 3:17] = True
    ring[2, 6:14, 6:14] = False
    tree = adapters.trace_skeleton(ring)
    assert (tree.parent < 0).sum() == 1
    assert len(tips(tree)) == 2


@needs_kimimaro
def test_kimimaro_joins_gaps_up_to_the_bridge():
    mask = bar()
    mask[:, :, 30:36] = False
    assert (adapters.trace_kimimaro(mask, bridge=0).parent < 0).sum() == 2
    assert (adapters.trace_kimimaro(mask, bridge=15).parent < 0).sum() == 1


@pytest.mark.skipif("kimimaro" in INSTALLED, reason="kimimaro is installed")
def test_a_missing_tracer_says_how_to_get_it():
    with pytest.raises(SettingsError, match="pip install kimimaro"):
        adapters.trace_kimimaro(bar())
