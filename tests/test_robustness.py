"""The study of robustness: damage is as described and grows, and rows follow from it."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial import KDTree
from skimage.morphology import skeletonize

from neurolib.course import plotting, robustness
from neurolib.course.robustness import degrade, trace_skeleton
from neurolib.errors import NeurolibWarning, SettingsError, VolumeError
from neurolib.evaluation import distance_to_tree, tree_distance, tree_scores
from neurolib.swc import Tree, length, tips
from neurolib.tracing import trace

SHAPE = (24, 50, 90)
NODES = np.array([[10, 25, 12], [45, 25, 12], [80, 25, 12], [45, 8, 12]], float)
TREE = Tree(NODES, np.full(4, 2.0), np.zeros(4, int), np.array([-1, 0, 1, 1]))
MASK = np.zeros(SHAPE, bool)
MASK[10:15, 23:28, 8:83] = True
MASK[10:15, 8:28, 43:48] = True


@pytest.mark.parametrize("kind", robustness.DAMAGE)
def test_damage_is_the_same_every_time_and_none_at_zero(kind):
    for amount in robustness.DAMAGE[kind][1]:
        one, level = degrade(MASK, TREE, kind, amount)
        other, _ = degrade(MASK, TREE, kind, amount)
        assert np.array_equal(one, other)
        assert one.shape == SHAPE
        assert 0 < level < 1
    none, level = degrade(MASK, TREE, kind, 0)
    if kind != "threshold":
        assert np.array_equal(none >= level, MASK)
    with pytest.raises(SettingsError, match="cuts, specks"):
        degrade(MASK, TREE, "rust", 1)


def test_cuts_are_balls_on_the_tree_and_grow():
    one, many = (degrade(MASK, TREE, "cuts", n)[0] for n in (1, 6))
    assert not (many & ~one).any()
    lost = np.argwhere(MASK & ~one)
    assert np.ptp(lost, axis=0).max() <= 7
    assert ((lost - lost.mean(axis=0)) ** 2).sum(axis=1).max() < 4.5**2
    assert (MASK & ~many).sum() > 2 * len(lost)


def test_specks_are_separate_and_off_the_tree():
    mask, _ = degrade(MASK, TREE, "specks", 5)
    assert not (MASK & ~mask).any()
    specks = np.argwhere(mask & ~MASK)
    assert KDTree(np.argwhere(MASK)).query(specks)[0].min() > 2
    more, _ = degrade(MASK, TREE, "specks", 9)
    assert not (mask & ~more).any()
    assert more.sum() > mask.sum()


def test_where_there_is_no_room_there_are_fewer_specks():
    small, tree = MASK[8:17, 20:31, 10:81], replace(TREE, xyz=NODES - (10, 20, 8))
    with pytest.warns(NeurolibWarning, match="only 0 of 3 specks found a place"):
        mask, _ = degrade(small, tree, "specks", 3)
    assert np.array_equal(mask, small)


def test_noise_loses_the_share_that_is_asked_for():
    mask, _ = degrade(MASK, TREE, "noise", 0.3)
    assert not (mask & ~MASK).any()
    assert mask.sum() / MASK.sum() == pytest.approx(0.7, abs=0.03)


def test_rows_follow_the_damage():
    damage = {"cuts": (0, 6), "noise": (0.0, 1.0), "threshold": (0.5,)}
    tracers = {"ours": trace, "forest": lambda *a, **o: trace(*a, **o, bridge=0)}
    rows = robustness.robustness(MASK, TREE, tracers, damage=damage)
    assert len(rows) == 10
    assert rows == robustness.robustness(MASK, TREE, tracers, damage=damage)
    at = {(row["damage"], row["amount"], row["tracer"]): row for row in rows}
    whole, cut = at["cuts", 0, "ours"], at["cuts", 6, "forest"]
    assert min(whole["recall"], whole["precision"]) > 0.98
    assert cut["trees"] > whole["trees"] == 1
    assert at["cuts", 6, "ours"]["recall"] >= cut["recall"]
    nothing = at["noise", 1.0, "ours"]
    assert nothing["recall"] == nothing["precision"] == 0
    assert np.isinf(nothing["ESA"])


def test_what_is_no_lack_of_foreground_is_raised():
    def broken(*_, **__):
        raise ValueError("a fault")

    with pytest.raises(ValueError, match="a fault"):
        robustness.robustness(MASK, TREE, {"broken": broken}, damage={"cuts": (0,)})
    with pytest.raises(VolumeError):
        trace(np.zeros(SHAPE, bool))


def test_agreement_divides_the_length_of_both_trees():
    tree = trace(MASK)
    n, xyz = len(tree.parent), np.concatenate([tree.xyz, [[20, 40, 5], [24, 40, 5]]])
    away = Tree(xyz, np.ones(n + 2), np.zeros(n + 2, int), np.append(tree.parent, [-1, n]))
    parts = robustness.agreement(away, TREE)
    assert length(parts["false"]) == pytest.approx(4)
    assert length(parts["correct"]) + 4 == pytest.approx(length(away))
    assert length(parts["missed"]) == 0
    half = trace(MASK[:, :, :40])
    some, recall = robustness.agreement(half, tree), tree_scores(half, tree).recall
    assert 1 - length(some["missed"]) / length(tree) == pytest.approx(recall, abs=0.05)


# --- Plain thinning ------------------------------------------------------------------------------


def test_a_thinned_tree_is_a_forest_in_our_frame():
    mask = MASK.copy()
    mask[20, 45, 80:84] = True  # a speck
    tree = trace_skeleton(mask)
    assert (tree.parent < np.arange(len(tree.parent))).all()
    assert (tree.parent < 0).sum() == 1  # the speck is dropped
    assert (trace_skeleton(mask, min_size=1).parent < 0).sum() == 2
    assert distance_to_tree(tree.xyz, TREE).max() <= 1.5
    assert tree_scores(tree, TREE).recall > 0.95
    assert np.median(tree.radius) == pytest.approx(2.5, abs=0.6)
    turned = trace_skeleton(mask.transpose(2, 0, 1))
    assert tree_distance(Tree(turned.xyz[:, [2, 0, 1]], *[None] * 2, turned.parent), tree).esa < 0.7
    # The spacing changes radii and not coordinates.
    assert (trace_skeleton(mask, (6.0, 2.0, 2.0)).xyz == tree.xyz).all()
    with pytest.raises(VolumeError, match="nothing to trace"):
        trace_skeleton(np.zeros(SHAPE, bool))
    whole = trace_skeleton(mask, min_size=1).xyz[:, ::-1].astype(int)
    assert {tuple(v) for v in whole} == {tuple(v) for v in np.argwhere(skeletonize(mask))}


@pytest.mark.parametrize("size", [(2, 2), (4, 4), (4, 6), (3, 4)])
def test_tubes_that_thinning_removes_are_traced(size):
    mask = np.zeros((20, 20, 60), bool)
    mask[5 : 5 + size[0], 5 : 5 + size[1], 5:55] = True
    tree = trace_skeleton(mask)
    assert (tree.parent < 0).sum() == 1
    assert length(tree) == pytest.approx(50, abs=6)
    middle = 4.5 + np.array(size) / 2
    assert np.abs(tree.xyz[:, [2, 1]] - middle).max() <= 1


def test_loops_are_opened_once():
    ring = np.zeros((5, 20, 20), bool)
    ring[2, 3:17, 3:17] = True
    ring[2, 6:14, 6:14] = False
    tree = trace_skeleton(ring)
    assert (tree.parent < 0).sum() == 1
    assert len(tips(tree)) == 2


# --- Its figures ---------------------------------------------------------------------------------


def test_a_window_shows_its_part_of_the_whole():
    plane = np.full((60, 100), np.nan)
    plane[40, 90] = 3.0
    lines = {"path": [np.array([[40, 88], [40, 92]])]}
    for centre, low in (((40, 90), (24, 68)), ((0, 0), (0, 0))):
        figure = plotting.zoomed(plane, centre, lines, label="r", size=32)
        whole, window, _ = figure.get_axes()
        assert window.get_xlim() == (low[1] - 0.5, low[1] + 31.5)
        assert window.get_ylim() == (low[0] + 31.5, low[0] - 0.5)
        (frame,) = whole.patches
        assert (frame.get_y() + 0.5, frame.get_x() + 0.5) == low
        assert window.collections[0].get_segments()[0].tolist() == [[88, 40], [92, 40]]
    assert plotting.zoomed(np.zeros((9, 9)), (4, 4)).get_axes()


def test_judged_parts_have_their_colours():
    image = np.random.default_rng(0).random(SHAPE)
    others = {"all": TREE, "half": trace(MASK)}
    groups = {name: robustness.agreement(TREE, other) for name, other in others.items()}
    axes = plotting.judged(image, groups).get_axes()
    assert len(axes) == 6
    assert [line.get_label() for line in axes[0].collections] == ["correct", "false", "missed"]
    segments = [len(line.get_segments()) for line in axes[0].collections]
    assert segments == [3, 0, 0]
    x, y = np.array(axes[0].collections[0].get_segments()[2]).T
    assert (x.tolist(), y.tolist()) == ([45, 45], [8, 25])


def test_the_scene_is_in_the_frame_of_the_volume():
    pytest.importorskip("k3d")
    plot = plotting.scene(MASK * 0.5, {"tree": TREE}, (2.0, 1.0, 1.0))
    volume, lines = plot.objects
    assert volume.volume.shape == SHAPE
    box = np.array(volume.model_matrix)
    assert np.allclose(np.diag(box)[:3], [90, 50, 48])
    assert np.allclose(lines.vertices[0], [10, 25, 24])


def test_without_k3d_there_is_no_scene(monkeypatch):
    monkeypatch.setitem(sys.modules, "k3d", None)
    assert plotting.scene(MASK * 0.5, {"tree": TREE}) is None
