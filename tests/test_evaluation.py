"""Metrics against brute force, their definitions' properties, peers, and published values."""

import csv
import functools
import itertools
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.morphology import skeletonize
from test_swc import distance_by_edges, forest

from neurolib.errors import NeurolibError, SettingsError, SwcError, VolumeError
from neurolib.evaluation import (
    betti0_error,
    cl_dice,
    compare,
    dice,
    distance_to_tree,
    hd95,
    in_unit,
    length_unit,
    name_unit,
    sample_edges,
    skeleton,
    surface_dice,
    surface_shares,
    surface_voxels,
    tree_distance,
    tree_scores,
    volume_diagonal,
)
from neurolib.swc import Tree, densify, read_swc
from neurolib.tracing import EMPTY_TREE
from neurolib.volume import Volume

JANELIA = Path(__file__).parents[1].parent / "shared" / "data" / "janelia_gold"
SPACING = (2.0, 0.5, 0.7)


def random_masks(seed: int, shape: tuple = (7, 9, 8)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return tuple(ndimage.gaussian_filter(rng.random(shape), 0.8) > 0.5 for _ in range(2))


random_tree = functools.partial(forest, n=30, roots=1, spread=0)


def line(*points: tuple) -> Tree:
    n = len(points)
    return Tree(np.array(points, float), np.ones(n), np.zeros(n, int), np.arange(n) - 1)


NODE = line((0, 0, 0))


def batches(*masks: np.ndarray) -> list:
    """Masks as MONAI takes them."""
    import torch

    return [torch.tensor(mask)[None, None] for mask in masks]


# --- Oracles: the definitions, one voxel and one edge at a time ----------------------------------


def slow_surface(mask: np.ndarray) -> np.ndarray:
    found = []
    for voxel in np.argwhere(mask):
        for axis, move in itertools.product(range(3), (-1, 1)):
            other = voxel.copy()
            other[axis] += move
            if not 0 <= other[axis] < mask.shape[axis] or not mask[tuple(other)]:
                found.append(voxel)
                break
    return np.array(found)


def slow_hd95(a: np.ndarray, b: np.ndarray, spacing: tuple, method: str) -> float:
    a, b = slow_surface(a) * spacing, slow_surface(b) * spacing
    distances = np.linalg.norm(a[:, None] - b[None], axis=2)
    there, back = distances.min(axis=1), distances.min(axis=0)
    if method == "medpy":
        return np.percentile(np.concatenate([there, back]), 95)
    return max(np.percentile(there, 95), np.percentile(back, 95))


def slow_tree_distance(tree: Tree, reference: Tree, threshold: float) -> tuple:
    directions = []
    for one, other in ((tree, reference), (reference, tree)):
        points = []
        for child, parent in enumerate(one.parent):
            if parent >= 0:
                a, b = one.xyz[child], one.xyz[parent]
                count = int(1 + np.linalg.norm(b - a) + 0.5)
                points += [a + (b - a) * j / max(count - 1, 1) for j in range(count)]
        directions.append(distance_by_edges(np.array(points), other))
    there, back = directions
    apart = [d[d >= threshold].mean() for d in directions if (d >= threshold).any()]
    dsa = sum(apart) / len(apart) if apart else 0
    pds = ((there >= threshold).mean() + (back >= threshold).mean()) / 2
    return (there.mean() + back.mean()) / 2, dsa, pds


# --- Masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("method", ["monai", "medpy"])
def test_hd95_is_its_definition(seed, method):
    a, b = random_masks(seed)
    assert hd95(a, b, SPACING, method) == pytest.approx(slow_hd95(a, b, SPACING, method))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 6), (4, 1, 1), (5, 5, 5)])
def test_surface_is_its_definition_at_the_border(shape):
    for mask in (np.ones(shape, bool), np.random.default_rng(1).random(shape) < 0.8):
        mask.flat[0] = True
        found = surface_voxels(mask)
        assert {tuple(v) for v in found} == {tuple(v) for v in slow_surface(mask)}


def test_hd95_agrees_with_medpy_and_monai():
    from medpy.metric import binary as medpy
    from monai.metrics import compute_hausdorff_distance

    options = {"include_background": True, "percentile": 95, "spacing": list(SPACING)}
    for seed in range(12):
        a, b = random_masks(seed)
        assert hd95(a, b, SPACING, "medpy") == pytest.approx(medpy.hd95(a, b, SPACING))
        assert dice(a, b) == pytest.approx(medpy.dc(a, b))
        value = compute_hausdorff_distance(*batches(a, b), **options)
        assert hd95(a, b, SPACING, "monai") == pytest.approx(float(value), abs=1e-5)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), SPACING])
def test_surface_dice_agrees_with_the_published_code(spacing):
    from monai.metrics import compute_surface_dice

    options = {"include_background": True, "spacing": list(spacing), "use_subvoxels": True}
    for seed, tolerance in itertools.product(range(8), (0.0, 0.5, 1.0, 1.5)):
        a, b = random_masks(seed)
        peer = compute_surface_dice(*batches(a, b), [tolerance], **options)
        # Of 256 kinds of corners a few are ambiguous and have other triangles there.
        assert surface_dice(a, b, tolerance, spacing) == pytest.approx(peer.item(), abs=0.005)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(0, 2),
    st.permutations([0, 1, 2]),
    st.sampled_from([0.3, 0.1, 1.7]),
)
def test_surface_dice_does_not_depend_on_frame_or_unit(seed, axis, order, unit):
    a, b = random_masks(seed, (6, 7, 8))
    found = surface_dice(a, b, 1.0, SPACING)
    assert found == pytest.approx(surface_dice(b, a, 1.0, SPACING))
    assert found == pytest.approx(surface_dice(np.pad(a, 2), np.pad(b, 2), 1.0, SPACING))
    turned = surface_dice(a.transpose(order), b.transpose(order), 1.0, np.take(SPACING, order))
    assert found == pytest.approx(turned, abs=0.01)
    flipped = surface_dice(np.flip(a, axis), np.flip(b, axis), 1.0, SPACING)
    assert found == pytest.approx(flipped, abs=0.01)
    # Steps of one and two voxels are no further away in another unit.
    for steps in (1, 2):
        whole = surface_dice(a, b, steps)
        assert surface_dice(a, b, steps * unit, (unit,) * 3) == pytest.approx(whole)
    assert surface_dice(a, b, spacing=SPACING) == surface_dice(a, b, 1.0, SPACING)
    assert surface_dice(a, b, 0.4, SPACING) <= found <= surface_dice(a, b, 9.0, SPACING)
    assert surface_dice(a, a, 0) == 1


def test_known_surface_dice():
    plate = np.zeros((20, 30, 30), bool)
    plate[5:7] = True
    # Its two faces lie 2 apart: shifted by 3 or 4, one of them is still near the other's opposite.
    for shift, expected in {1: 1.0, 2: 1.0, 3: 0.5, 4: 0.5, 5: 0.0}.items():
        assert surface_dice(plate, np.roll(plate, shift, 0)) == pytest.approx(expected, abs=0.1)
    # In µm: a step in z is five steps in x.
    assert surface_dice(plate, np.roll(plate, 1, 0), 1.0, (5, 1, 1)) < 0.4  # its rims
    assert surface_dice(plate, np.roll(plate, 1, 0), 5.0, (5, 1, 1)) == 1


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("seed", range(5))
def test_surface_shares_pass_95_percent_at_the_directed_distance(seed):
    a, b = random_masks(seed)
    distances, shares = surface_shares(a, b)
    there, back = (slow_surface(mask) for mask in (a, b))
    exact = np.linalg.norm(there[:, None] - back[None], axis=2).min(axis=1)
    for distance, share in zip(distances, shares, strict=True):
        assert share == pytest.approx((exact <= distance + 1e-9).mean())
    assert distances[0] == 0
    assert shares[-1] == 1
    directed = np.percentile(exact, 95, method="inverted_cdf")
    assert distances[np.searchsorted(shares, 0.95)] == pytest.approx(directed, rel=1e-7)
    with pytest.raises(VolumeError, match="empty"):
        surface_shares(a, a & False)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 2), st.permutations([0, 1, 2]))
def test_mask_scores_do_not_depend_on_the_frame(seed, axis, order):
    a, b = random_masks(seed, (6, 7, 8))
    spacing = np.array(SPACING)
    for method in ("monai", "medpy"):
        value = hd95(a, b, SPACING, method)
        assert value <= volume_diagonal(a.shape, SPACING)
        turned = a.transpose(order), b.transpose(order), tuple(spacing[order])
        for one, two, size in (
            (b, a, SPACING),
            (np.flip(a, axis), np.flip(b, axis), SPACING),
            turned,
            (np.pad(a, 3), np.pad(b, 3), SPACING),
        ):
            assert hd95(one, two, size, method) == pytest.approx(value)
        assert hd95(a, b, tuple(2 * spacing), method) == pytest.approx(2 * value)
    assert dice(a, b) == dice(b, a) == dice(np.pad(a, 1), np.pad(b, 1))


def test_known_values():
    a, b = np.zeros((5, 5, 20), bool), np.zeros((5, 5, 20), bool)
    a[2, 2, 2:12] = b[2, 2, 7:17] = True
    assert dice(a, b) == 0.5
    assert hd95(a, a) == 0.0
    assert dice(a, a) == cl_dice(a, a) == 1.0
    b[0, 0, 0] = True
    assert betti0_error(a, b) == 1
    diagonal = np.zeros((3, 3, 3), bool)
    diagonal[[0, 1, 2], [0, 1, 2], [0, 1, 2]] = True
    assert betti0_error(diagonal, a[:3, :3, :3]) == 0  # 26 neighbours: one piece each
    assert volume_diagonal((3, 4, 12)) == 13.0
    assert volume_diagonal((3, 4, 12), (2, 2, 2)) == 26.0


def test_one_and_two_empty_masks():
    empty, full = np.zeros((4, 5, 6), bool), np.ones((4, 5, 6), bool)
    for method in ("monai", "medpy"):
        assert hd95(empty, empty, method=method) == 0
        assert hd95(empty, full, method=method) == hd95(full, empty, method=method) == np.inf
    for score in (dice, cl_dice, surface_dice):
        assert score(empty, empty) == 1
        assert score(empty, full) == score(full, empty) == 0
    assert (betti0_error(empty, empty), betti0_error(empty, full)) == (0, 1)


def slow_pieces(mask: np.ndarray) -> list[np.ndarray]:
    """Connected pieces, by flooding from one voxel after the other."""
    left, pieces = {tuple(map(int, v)) for v in np.argwhere(mask)}, []
    while left:
        todo, piece = [left.pop()], np.zeros_like(mask)
        while todo:
            voxel = todo.pop()
            piece[voxel] = True
            moves = itertools.product((-1, 0, 1), repeat=3)
            around = {tuple(np.add(voxel, move)) for move in moves}
            todo += around & left
            left -= around
        pieces.append(piece)
    return pieces


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 0.5), st.sampled_from([0.0, 0.7, 1.2]))
def test_every_piece_keeps_a_part_of_its_skeleton(seed, share, blur):
    values = ndimage.gaussian_filter(np.random.default_rng(seed).random((9, 10, 11)), blur)
    mask = values > np.quantile(values, 1 - share)
    thin = skeleton(mask)
    assert not (thin & ~mask).any()
    lost = np.zeros_like(mask)
    for piece in slow_pieces(mask):
        assert (thin & piece).any()
        lost |= piece & ~(skeletonize(mask) & piece).any()
    # What thinning keeps is left as it is.
    assert np.array_equal(thin & ~lost, skeletonize(mask))
    assert cl_dice(mask, mask) == 1


@pytest.mark.parametrize("height", range(1, 8))
@pytest.mark.parametrize("width", range(1, 8))
def test_a_false_tube_costs_the_same_whatever_its_width(height, width):
    true = np.zeros((24, 24, 60), bool)
    true[3:6, 3:6, 3:57] = True
    both = true.copy()
    both[12 : 12 + height, 12 : 12 + width, 3:57] = True
    assert cl_dice(both, both) == 1
    assert cl_dice(both, true) == cl_dice(true, both) == pytest.approx(2 / 3, abs=0.02)
    assert betti0_error(both, true) == 1


def test_cl_dice_weighs_branches_not_voxels():
    tube = np.zeros((15, 15, 60), bool)
    tube[5:10, 5:10, 5:55] = True
    wide = ndimage.binary_dilation(tube)
    assert cl_dice(tube, wide) > 0.98 > dice(tube, wide)
    doubled = tube.copy()
    doubled[1, 1, 5:55] = True
    assert cl_dice(doubled, tube) < 0.7 < 0.97 < dice(doubled, tube)


MASK = np.ones((3, 3, 3), bool)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: dice(MASK, MASK[:2]), VolumeError, "the same shape"),
        (lambda: dice(MASK, MASK.astype(float)), VolumeError, "float64; threshold"),
        (lambda: hd95(MASK.astype("u1"), MASK), VolumeError, "uint8"),
        (lambda: hd95(MASK[0], MASK[0]), VolumeError, "3D"),
        (lambda: hd95(MASK, MASK, (1, 0, 1)), VolumeError, "positive"),
        (lambda: hd95(MASK, MASK, (1, 1)), VolumeError, "three"),
        (lambda: hd95(MASK, MASK, method="median"), SettingsError, "median"),
        (lambda: surface_dice(MASK, MASK, -1), SettingsError, "tolerance=-1"),
        (lambda: surface_dice(MASK, MASK, 1, (1, 1)), VolumeError, "three"),
        (lambda: cl_dice(MASK[0], MASK[0]), VolumeError, "3D"),
        (lambda: betti0_error(MASK, MASK[:, :2]), VolumeError, "the same shape"),
        (lambda: tree_distance(line(), line((0, 0, 0))), SwcError, "without nodes"),
        (lambda: tree_distance(NODE, NODE, float("nan")), SettingsError, "threshold=nan"),
        (lambda: tree_scores(NODE, NODE, -1), SettingsError, "threshold=-1"),
    ],
)
def test_errors_are_one_line_of_ours(call, error, words):
    with pytest.raises(NeurolibError, match=words) as caught:
        call()
    assert caught.type is error
    assert "\n" not in str(caught.value)


# --- Trees ---------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1e-3, 1.0, 1e3]))
def test_nearest_edge_is_exact_at_any_scale(seed, scale):
    rng = np.random.default_rng(seed)
    tree = random_tree(seed, n=40)
    # One edge far longer than the others, one of length 0, far points and points on the tree.
    tree.xyz[5] += 60
    tree.xyz[7] = tree.xyz[tree.parent[7]]
    points = np.concatenate([rng.normal(0, 30, (20, 3)), tree.xyz[:4], [[0, 0, 1e4]]])
    expected = distance_by_edges(points, tree)
    scaled = replace(tree, xyz=tree.xyz * scale)
    assert distance_to_tree(points * scale, scaled) / scale == pytest.approx(expected, abs=1e-9)


def test_nearest_edge_is_exact_where_all_are_equally_near():
    angle = np.linspace(0, 2 * np.pi, 400)
    circle = line(*np.stack([10 * np.cos(angle), 10 * np.sin(angle), 0 * angle], axis=1))
    points = np.array([[0, 0, 0], [0, 0, 5], [1e-3, 0, 0]])
    expected = distance_by_edges(points, circle)
    assert distance_to_tree(points, circle) == pytest.approx(expected, abs=1e-12)


def test_known_tree_distances():
    tree, reference = line((0, 0, 0), (10, 0, 0)), line((0, 3, 0), (10, 3, 0))
    assert astuple(tree_distance(tree, reference)) == (3, 3, 1)
    assert astuple(tree_distance(tree, reference, 3.5)) == (3, 0, 0)
    assert astuple(tree_distance(tree, tree)) == (0, 0, 0)
    # A half-long tree: all of it fits; points 2..10 of the other half are apart by 2 or more.
    half = tree_distance(line((0, 0, 0), (5, 0, 0)), line((0, 0, 0), (10, 0, 0)))
    assert half.esa == pytest.approx(sum(range(1, 6)) / 11 / 2)
    assert half.pds == pytest.approx(4 / 11 / 2)
    assert half.dsa == pytest.approx((2 + 3 + 4 + 5) / 4)  # the other direction has none


def test_edges_are_sampled_as_vaa3d_does():
    assert len(sample_edges(line((0, 0, 0), (0.4, 0, 0)))) == 1
    assert len(sample_edges(line((0, 0, 0), (0.5, 0, 0)))) == 2
    points = sample_edges(line((0, 0, 0), (3, 0, 0), (3, 0, 0)))
    assert points[:4, 0].tolist() == [3, 2, 1, 0]  # from the child to the parent
    assert len(points) == 5


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_tree_scores_properties(seed):
    tree, reference = random_tree(seed), random_tree(seed + 1)
    one, two = tree_scores(tree, reference), tree_scores(reference, tree)
    assert (one.precision, one.recall) == (two.recall, two.precision)
    assert 0 <= min(one.precision, one.recall) <= max(one.precision, one.recall) <= 1
    turn, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    moved = [replace(t, xyz=t.xyz @ turn + [5.0, -7, 11]) for t in (tree, reference)]
    expected = astuple(tree_distance(tree, reference))
    assert astuple(tree_distance(*moved)) == pytest.approx(expected, rel=1e-6)
    assert astuple(tree_scores(tree, tree, 1e-6)) == (1, 1)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10_000),
    st.tuples(*[st.sampled_from([0.2, 0.25, 0.3, 1.0, 3.0])] * 3),
    st.sampled_from([None, 0.0, 0.7, 3.0, 1e9]),
)
@example(0, (1.0, 1.0, 1.0), 2.0)
def test_tree_distance_is_its_definition_at_any_spacing(seed, spacing, threshold):
    tree, reference = random_tree(seed, n=22), random_tree(seed + 1)
    voxel = min(spacing)
    reach = 2 * voxel if threshold is None else threshold
    # The same trees, stretched by hand into voxels of the finest axis.
    factor = np.array(spacing)[::-1] / voxel
    stretched = [replace(t, xyz=t.xyz * factor) for t in (tree, reference)]
    unit = np.array([voxel, voxel, 1])
    expected = np.array(slow_tree_distance(*stretched, reach / voxel)) * unit
    assert astuple(tree_distance(tree, reference, threshold, spacing)) == pytest.approx(expected)
    scores = tree_scores(tree, reference, threshold, spacing)
    points, _ = densify(reference, voxel / 20, spacing)
    near = distance_by_edges(points[::40] / voxel, stretched[0]) <= reach / voxel
    assert scores.recall == pytest.approx(np.mean(near), abs=0.12)
    row = compare(tree, reference, spacing)
    assert row["ESA"] == pytest.approx(expected[0])


def test_thresholds_are_the_same_in_every_unit():
    tree, reference = line((0, 0, 0), (9, 0, 0)), line((0, 2, 0), (9, 2, 0))
    for unit in (0.1, 0.3, 0.7, 1.0, 1.1):
        for reach in (None, 2 * unit):
            assert tree_scores(tree, reference, reach, (unit,) * 3).recall == 1
            assert tree_distance(tree, reference, reach, (unit,) * 3).pds == 1


def test_a_table_has_one_unit():
    known, data = (2.0, 0.5, 0.5), np.zeros((1, 1, 1))
    assert length_unit([Volume(data, known)] * 2) == "µm"
    assert length_unit([Volume(data, known), Volume(data)]) == "voxels"
    assert length_unit([Volume(data, known), Volume(data, known, "no unit")]) == "voxels"
    assert in_unit(known, "µm") == known
    assert in_unit(known, "voxels") == (4, 1, 1)
    row = {"neuron": "a", "unit": "µm", "Dice": 0.5, "Hd95": 3.0, "ESA": 1.0}
    assert name_unit(row) == {"neuron": "a", "Dice": 0.5, "Hd95 (µm)": 3.0, "ESA (µm)": 1.0}
    assert name_unit({"Hd95": 3.0}) == {"Hd95": 3.0}


def test_tree_scores_count_length_not_nodes():
    # Many nodes on the right tenth, one long edge on the wrong rest.
    right = [(x / 10, 0, 0) for x in range(101)]
    tree = line(*right, (10, 90, 0))
    score = tree_scores(tree, line((0, 0, 0), (10, 0, 0)))
    assert score.precision == pytest.approx(0.12, abs=0.01)
    assert score.recall == 1


def test_single_nodes_are_compared_by_place():
    a, b = line((0, 0, 0)), line((0, 0, 3))
    assert tree_distance(a, b).esa == 3
    assert tree_scores(a, b).recall == 0


def test_where_one_tree_is_empty_nothing_agrees():
    tree = line((0, 0, 0), (9, 0, 0))
    for one, other in ((EMPTY_TREE, tree), (tree, EMPTY_TREE)):
        row = compare(one, other)
        assert (row["precision"], row["recall"], row["PDS"]) == (0, 0, 1)
        assert row["ESA"] == row["DSA"] == np.inf
        assert row["trees"] == len(one.parent) // 2
    both = compare(EMPTY_TREE, EMPTY_TREE)
    assert list(both.values()) == [0, 0, 0, 1, 1, 0]


# --- Published values ----------------------------------------------------------------------------


@pytest.mark.skipif(not JANELIA.is_dir(), reason=f"{JANELIA} is absent")
def test_agreement_with_bigneuron():
    with open(JANELIA / "reference_neuron_distance.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    # Some trees are listed more than once, with values up to 4 voxels apart: the first counts.
    published = {(row["id"], row["swc"]): row for row in reversed(rows)}
    names = ["esa", "dsa", "pds"]
    ours, theirs = [], []
    for path in sorted(JANELIA.glob("auto/*/*.swc")):
        row = published[path.parent.name, path.name.removesuffix("_resampled.swc")]
        gold, tree = read_swc(JANELIA / f"{path.parent.name}.swc"), read_swc(path)
        ours.append(astuple(tree_distance(gold, tree)))
        theirs.append([float(row[name]) for name in names])
    ours, theirs = np.array(ours), np.array(theirs)
    assert len(ours) == 39
    for name, mine, reference in zip(names, ours.T, theirs.T, strict=True):
        assert np.corrcoef(mine, reference)[0, 1] > 0.99, name
        # The files at hand were resampled to steps of 3 voxels after the table was made, which
        # moves a distance by a few hundredths of a voxel.
        assert np.median(np.abs(mine - reference)) < (0.015 if "pds" in name else 0.08), name
