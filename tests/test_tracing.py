"""The tracer: invariants for any mask, known shapes, invariances, and six real neurons."""

import functools
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial import KDTree
from test_evaluation import line

from neurolib import tracing
from neurolib.blocking import make_target
from neurolib.data.formats import boxes
from neurolib.errors import NeurolibError, SettingsError, VolumeError
from neurolib.evaluation import distance_to_tree, sample_edges, tree_distance, tree_scores
from neurolib.swc import Tree, densify, length, read_swc, tips, write_swc
from neurolib.tracing import bridge_gaps, find_foreground, measure_radius, trace

REAL = Path(__file__).parents[1].parent / "shared" / "data" / "real3d"
TUBE = 1.9  # radius of the tubes, in voxels
SENSORY = [f"sensory_{name}" for name in ("I4-2", "IM3-1_sn30", "M4-4")]
NEURONS = ["class1_sn23", "in40_body", "in40_tail", *SENSORY]


def draw(tree: Tree, shape: tuple, radius: float = TUBE, spacing: tuple = (1, 1, 1)) -> np.ndarray:
    """Mask of the voxels whose centre lies within `radius` of the tree, in units of `spacing`."""
    points, _ = densify(tree, 0.25, spacing)
    near = KDTree(points[:, ::-1])
    mask = np.zeros(shape, bool)
    low = np.maximum(tree.xyz.min(axis=0)[::-1] - radius - 1, 0).astype(int)
    high = np.minimum(tree.xyz.max(axis=0)[::-1] + radius + 2, shape).astype(int)
    voxels = np.indices(high - low).reshape(3, -1).T + low
    inside = near.query(voxels * spacing, distance_upper_bound=radius + 1e-6)[0] <= radius
    mask[tuple(voxels[inside].T)] = True
    return mask


def grow(seed: int, shape: tuple = (40, 90, 100), branches: int = 7) -> Tree:
    """A curved random tree inside a volume, in steps of two voxels."""
    rng = np.random.default_rng(seed)
    low, high = np.full(3, 6.0), np.array(shape[::-1]) - 7.0
    xyz, parent = [np.array(shape[::-1]) / 2], [-1]
    for _ in range(branches):
        above = int(rng.integers(len(xyz)))
        direction = rng.normal(size=3) * [1, 1, 0.6]
        for _ in range(20):
            direction = direction / np.linalg.norm(direction) + rng.normal(0, 0.15, 3)
            point = xyz[above] + 2 * direction / np.linalg.norm(direction)
            if np.any(point < low) or np.any(point > high):
                break
            xyz.append(point)
            parent.append(above)
            above = len(xyz) - 1
    n = len(xyz)
    return Tree(np.array(xyz), np.full(n, TUBE), np.zeros(n, int), np.array(parent))


def moved(tree: Tree, xyz: np.ndarray) -> Tree:
    return replace(tree, xyz=xyz)


def neuron(seed: int) -> np.ndarray:
    return draw(grow(seed), (40, 90, 100))


def count(tree: Tree) -> int:
    """The number of trees."""
    return int((tree.parent < 0).sum())


def check_is_forest(tree: Tree, mask: np.ndarray) -> None:
    n = len(tree.xyz)
    assert n > 0
    assert tree.xyz.shape == (n, 3)
    assert len(tree.radius) == len(tree.type) == len(tree.parent) == n
    assert np.all(tree.parent < np.arange(n))  # parents first, so no cycle
    assert np.all(tree.parent >= -1)
    assert len(np.unique(tree.xyz, axis=0)) == n
    assert np.isfinite(tree.xyz).all()
    assert np.all(tree.radius >= 0.5)
    assert np.all((tree.xyz >= 0) & (tree.xyz <= np.array(mask.shape)[::-1] - 1))
    voxels = np.argwhere(mask)
    # No node is farther from the foreground than half the longest bridge.
    assert KDTree(voxels).query(tree.xyz[:, ::-1])[0].max() <= 7.5


def check_close(traced: Tree, tree: Tree) -> None:
    distance, score = tree_distance(traced, tree), tree_scores(traced, tree)
    assert distance.esa < 0.5
    assert distance.pds < 0.05
    assert min(score.precision, score.recall) >= 0.95


def drawn_paths(foreground: tracing.Foreground) -> tuple[np.ndarray, list, list]:
    """Radius, paths, and the paths that are long enough."""
    radius = measure_radius(foreground)
    paths = tracing.find_paths(foreground, radius, tracing.path_cost(foreground, radius))
    return radius, paths, tracing.prune_paths(paths, foreground, radius)


# --- Stages against brute force ------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), *[st.tuples(*[st.integers(1, 9)] * 3)] * 2)
def test_graph_and_components_are_their_definitions(seed, shape, region):
    mask = np.random.default_rng(seed).random(shape) < 0.3
    mask.flat[seed % mask.size] = True
    spacing = np.array((2.0, 1.0, 1.5))
    cut = functools.partial(boxes, (0, 0, 0), shape, region)
    foreground = find_foreground(mask, tuple(spacing), min_size=1, regions=cut())
    label, count = ndimage.label(mask, np.ones((3, 3, 3)))
    assert foreground.component[-1] + 1 == count
    sizes = np.bincount(foreground.component)
    assert np.all(np.diff(sizes) <= 0)  # the largest first
    assert sorted(sizes) == sorted(np.bincount(label.ravel())[1:])
    assert {tuple(v) for v in foreground.voxels} == {tuple(v) for v in np.argwhere(mask)}
    steps = foreground.voxels[:, None] - foreground.voxels[None]
    expected = np.linalg.norm(steps * spacing, axis=2) * (np.abs(steps).max(axis=2) == 1)
    np.testing.assert_allclose(foreground.neighbours.toarray(), expected)
    for component in range(count):
        voxels = foreground.voxels[foreground.component == component]
        assert len(np.unique(label[tuple(voxels.T)])) == 1
        assert np.all(np.diff(np.ravel_multi_index(voxels.T, shape)) > 0)
    kept = find_foreground(mask, min_size=int(sizes[0]), regions=cut())
    assert np.all(np.bincount(kept.component) == sizes[0])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.02, 0.9]), st.integers(1, 8))
def test_radius_is_the_distance_to_the_background(seed, density, depth):
    mask = np.random.default_rng(seed).random((depth, 8, 9)) < density
    mask[0, 4, 4] = mask[-1, 0, 8] = True
    spacing = np.array((1.5, 1.0, 2.0))
    foreground = find_foreground(mask, tuple(spacing), min_size=1)
    # The outside is background, except along an axis with a single slice.
    margin = [(int(depth > 1),) * 2, (1, 1), (1, 1)]
    padded = np.pad(mask, margin)
    distance = ndimage.distance_transform_edt(padded, sampling=spacing)
    expected = distance[tuple((foreground.voxels + np.array(margin)[:, 0]).T)] - 0.5
    assert measure_radius(foreground) == pytest.approx(expected)
    assert measure_radius(foreground, foreground.points) == pytest.approx(expected)
    shell = {tuple(v) for v in tracing.background_shell(foreground)}
    wide = np.pad(mask, 1)
    grown = ndimage.binary_dilation(wide, ndimage.generate_binary_structure(3, 1)) & ~wide
    everywhere = {tuple(v - 1) for v in np.argwhere(grown)}
    assert shell == {v for v in everywhere if depth > 1 or v[0] == 0}


def test_cost_is_its_formula():
    probability = np.zeros((5, 5, 12))
    probability[1:4, 1:4, 1:11] = 0.7
    foreground = find_foreground(probability)
    radius = measure_radius(foreground)
    expected = np.exp(10 * (1 - radius / radius.max()) ** 2) * np.exp(2 * 0.3)
    assert tracing.path_cost(foreground, radius) == pytest.approx(expected)


def test_paths_share_no_voxel_and_start_on_earlier_ones():
    foreground = find_foreground(neuron(1))
    radius, paths, kept = drawn_paths(foreground)
    seen = set()
    for path in paths:
        assert (not seen) or path[0] in seen
        assert not seen.intersection(path[1:].tolist())
        assert np.all(np.abs(np.diff(foreground.voxels[path], axis=0)).max(axis=1) == 1)
        seen.update(path.tolist())
    assert kept[0] is paths[0]
    starts = set(np.concatenate(kept).tolist())
    assert all(path[0] in starts for path in kept)
    for path in kept[1:]:
        length = np.linalg.norm(np.diff(foreground.points[path], axis=0), axis=1).sum()
        assert length + 0.5 >= 6 + radius[path[0]]
    nodes = tracing.paths_to_tree(kept, foreground, radius)
    assert len(nodes.xyz) == len(starts)
    assert count(nodes) == 1


def test_short_branches_are_dropped_and_long_ones_kept():
    for size, expected in ((4, 2), (15, 3)):
        mask = np.zeros((15, 40, 60), bool)
        mask[6:9, 10:13, 5:55] = True
        mask[6:9, 13 : 13 + size, 29:32] = True
        assert len(tips(trace(mask))) == expected


# --- The root ------------------------------------------------------------------------------------


def bar(soma: bool) -> np.ndarray:
    mask = np.zeros((30, 30, 90), bool)
    mask[13:16, 13:16, 5:85] = True
    if soma:
        mask |= np.linalg.norm(np.indices(mask.shape).T - [14, 14, 60], axis=-1).T <= 7
    return mask


def test_root_at_the_soma_then_the_seed_then_an_end():
    def starts_at(tree, x, kind):
        assert np.allclose(tree.xyz[0], [x, 14, 14], atol=1.5)
        assert tree.type[0] == kind

    tree = trace(bar(soma=True))
    starts_at(tree, 60, 1)
    assert tree.radius[0] == pytest.approx(7, abs=0.6)
    assert np.all(tree.type[1:] == 0)
    for inside in ((14, 14, 60), (17, 14, 57)):
        assert np.allclose(trace(bar(soma=True), seed=inside).xyz, tree.xyz)
    # The user's seed goes before the soma.
    with_seed = trace(bar(soma=True), seed=(14, 14, 10))
    starts_at(with_seed, 10, 0)
    assert (with_seed.type == 0).all()
    starts_at(trace(bar(soma=False), seed=(14, 14, 40)), 40, 0)
    tree = trace(bar(soma=False))
    assert min(abs(tree.xyz[0, 0] - 5), abs(tree.xyz[0, 0] - 84)) < 3
    assert len(tips(tree)) == 2
    assert 0 in tips(tree)


def add_ball(mask, centre, radius):
    places = np.moveaxis(np.indices(mask.shape), 0, -1)
    mask |= np.linalg.norm(places - centre, axis=-1) <= radius


def two_neurons(thick=(7, 6)):
    """Two bars with a ball each, and two isolated balls."""
    mask = np.zeros((30, 90, 120), bool)
    for y, x, radius in zip((20, 60), (40, 70), thick, strict=True):
        mask[13:16, y : y + 3, 5:115] = True
        if radius:
            add_ball(mask, (14, y + 1, x), radius)
    add_ball(mask, (14, 40, 90), 9)
    add_ball(mask, (14, 80, 20), 3)
    return mask


def opened_by_morphio(tree, tmp_path):
    morphio = pytest.importorskip("morphio")
    return morphio.Morphology(str(write_swc(tmp_path / "tree.swc", tree)))


def test_one_soma_at_most_and_no_fragment(tmp_path):
    tree = trace(two_neurons(), bridge=0)
    (soma,) = np.flatnonzero(tree.type == 1)
    assert np.allclose(tree.xyz[soma], [40, 21, 14], atol=1.5)
    assert len(opened_by_morphio(tree, tmp_path).soma.points) == 1
    assert count(tree) == 4
    # The other neuron begins at an end, as if it had no soma.
    roots = tree.xyz[tree.parent < 0]
    other = roots[np.abs(roots[:, 1] - 61) < 3]
    assert min(abs(other[0, 0] - 5), abs(other[0, 0] - 114)) < 3
    # Thick fragments beside neurites are no somata.
    assert (trace(two_neurons((0, 0)), bridge=0).type == 0).all()


@pytest.mark.parametrize("seed", [(14, 61, 70), (14, 61, 8), (14, 80, 20), (14, 40, 90)])
def test_the_seed_goes_before_any_soma(tmp_path, seed):
    tree = trace(two_neurons(), seed=seed, bridge=0)
    assert np.linalg.norm(tree.xyz[0] - seed[::-1]) < 3
    assert tree.type[0] == (seed == (14, 61, 70))
    assert (tree.type[1:] == 0).all()
    opened_by_morphio(tree, tmp_path)


@pytest.mark.parametrize("seed", range(4))
def test_morphio_opens_traces_of_noise_and_fragments(tmp_path, seed):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(30, 60, 60)), 2)
    tree = trace(noise > 1.2 * noise.std(), bridge=8 * (seed % 2))
    assert count(tree) > 3
    assert (tree.type == 1).sum() <= 1
    opened_by_morphio(tree, tmp_path)


def test_the_tree_with_the_seed_comes_first():
    mask = np.zeros((20, 50, 90), bool)
    mask[9:12, 10:13, 5:85] = True
    mask[9:12, 40:43, 30:60] = True
    assert trace(mask).xyz[0, 1] < 20
    tree = trace(mask, seed=(0, 49, 45))  # off the foreground: the nearest voxel counts
    assert np.allclose(tree.xyz[0], [45, 41, 10], atol=2)
    assert count(tree) == 2


# --- Round trip ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_swc_to_mask_to_swc(seed, tmp_path):
    tree = grow(seed)
    mask = draw(tree, (40, 90, 100))
    traced = trace(mask)
    check_is_forest(traced, mask)
    traced = read_swc(write_swc(tmp_path / "traced.swc", traced))
    assert traced.repairs == ()
    check_close(traced, tree)
    # Signed: the mean of the steps from each sample to the nearest point of the reference.
    points, dense = sample_edges(traced), densify(tree, 0.05)[0]
    offset = points - dense[KDTree(dense).query(points)[1]]
    assert np.all(np.abs(offset.mean(axis=0)) < 0.1)


@pytest.mark.parametrize("radius", [1.5, 1.9, 2.5, 3.5, 5.0])
def test_radius_and_ends_of_a_tube(radius):
    rng = np.random.default_rng(int(10 * radius))
    radii, ends, off_axis = [], [], []
    for _ in range(4):
        way = rng.normal(size=3)
        way /= np.linalg.norm(way)
        centre = 29 + rng.random(3)
        tube = line(tuple(centre - 18 * way), tuple(centre + 18 * way))
        traced = trace(draw(tube, (60, 60, 60), radius))
        along = (traced.xyz - centre) @ way
        off_axis.append(distance_to_tree(traced.xyz[np.abs(along) < 15], tube).mean())
        radii.append(np.median(traced.radius))
        ends += [along.max() - 18, -along.min() - 18]
    assert np.mean(radii) == pytest.approx(radius, abs=0.15)
    assert abs(np.mean(ends)) < 1
    assert np.mean(off_axis) < 0.5


@pytest.mark.parametrize("name", NEURONS)
@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is absent")
def test_six_real_neurons(name):
    tree = read_swc(REAL / f"{name}.swc")
    shape = tuple((np.ceil(tree.xyz.max(axis=0)) + 4).astype(int)[::-1])
    mask = make_target(tree, shape)[1]  # a tube of radius 1.90 voxels
    traced = trace(mask)
    check_is_forest(traced, mask)
    check_close(traced, tree)
    assert count(traced) == count(tree)
    assert abs(len(tips(traced)) - len(tips(tree))) <= 6


# --- Invariance ----------------------------------------------------------------------------------


def same(one: Tree, two: Tree) -> bool:
    distance = tree_distance(one, two)
    return distance.esa < 0.4 and distance.pds < 0.04


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_flips(axis):
    mask = neuron(2)
    tree, flipped = trace(mask), trace(np.flip(mask, axis))
    xyz = flipped.xyz.copy()
    xyz[:, 2 - axis] = mask.shape[axis] - 1 - xyz[:, 2 - axis]
    assert same(moved(flipped, xyz), tree)


@pytest.mark.parametrize("order", [(1, 2, 0), (2, 1, 0), (0, 2, 1)])
def test_transposes_with_their_spacing(order):
    spacing = (2.0, 1.0, 1.0)
    tree = grow(3, (60, 90, 100))
    mask = draw(moved(tree, tree.xyz * [1, 1, 0.5]), (30, 90, 100), 2.5, spacing)
    straight = trace(mask, spacing)
    turned = trace(mask.transpose(order), tuple(np.array(spacing)[list(order)]))
    xyz = np.empty_like(turned.xyz)
    xyz[:, ::-1][:, list(order)] = turned.xyz[:, ::-1]
    # Radii are in voxels of the plane, of which one side may be the coarse one.
    plane = np.prod(np.array(spacing)[list(order)][1:]) ** 0.5
    assert same(moved(turned, xyz), straight)
    assert np.median(turned.radius) * plane == pytest.approx(np.median(straight.radius), abs=0.1)


def test_crops_and_margins_change_nothing():
    mask = neuron(4)
    tree = trace(mask)
    wide = trace(np.pad(mask, ((3, 9), (20, 0), (5, 1))))
    assert np.allclose(wide.xyz - [5, 20, 3], tree.xyz)
    box = ndimage.find_objects(mask.astype(int))[0]
    tight = trace(mask[box])
    assert np.allclose(tight.xyz + [part.start for part in box[::-1]], tree.xyz)
    assert np.allclose(tight.radius, tree.radius)


@pytest.mark.parametrize("dz", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("high", [0.6, 1.01, 1.5, 2.01])
@pytest.mark.parametrize("wide", [1.01, 2.01])
def test_a_neurite_taller_than_wide_is_no_bush(dz, high, wide):
    """Slices far apart and a point spread that is long in z: both rims would become branches."""
    tree = line((10, 40, 12), (60, 40, 12), (110, 15, 12))
    fork = line((60, 40, 12), (110, 65, 12))
    form = (25, 80, 120), wide, (wide / high, 1, 1)
    mask = draw(tree, *form) | draw(fork, *form)
    traced = trace(mask, (dz, 1, 1))
    assert len(tips(traced)) == 3
    truth = length(tree) + length(fork)
    assert 0.95 * truth < length(traced, (dz, 1, 1)) < 1.25 * truth


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.tuples(*[st.sampled_from([1.0, 1.5, 4.0])] * 3))
def test_the_extent_of_a_neurite_is_counted_voxel_by_voxel(seed, spacing):
    mask = np.random.default_rng(seed).random((6, 7, 8)) < 0.6
    foreground = find_foreground(mask, spacing, min_size=1)
    radius = measure_radius(foreground)
    extent, scale = tracing.measure_extent(foreground, radius), np.array(spacing) / min(spacing)
    for voxel, r, found in zip(foreground.voxels, radius, extent, strict=True):
        for axis in range(3):
            along = mask[tuple(np.s_[:] if a == axis else voxel[a] for a in range(3))]
            pieces, _ = ndimage.label(along)
            run = np.count_nonzero(pieces == pieces[voxel[axis]])
            half = min(max(run * scale[axis] / 2 - 0.5, r), (r + 1) * scale[axis])
            assert found[axis] == pytest.approx(half if scale[axis] > 1 else r)


def test_anisotropic_voxels():
    # A neuron of 100 slices of which only every third is known.
    tree = grow(5, (99, 90, 100))
    thin = moved(tree, tree.xyz / [1, 1, 3])
    mask = draw(thin, (33, 90, 100), 3.0, (3, 1, 1))
    traced = trace(mask, (3, 1, 1))
    check_is_forest(traced, mask)
    back = moved(traced, traced.xyz * [1, 1, 3])
    assert tree_distance(back, tree).esa < 1
    assert tree_scores(back, tree, 3.0).recall > 0.95
    assert np.median(traced.radius) == pytest.approx(3, abs=0.5)
    # Only ratios count.
    assert np.allclose(trace(mask, (6, 2, 2)).xyz, traced.xyz)


def test_mask_and_probability_of_one_are_the_same():
    mask = neuron(6)
    assert np.array_equal(trace(mask).xyz, trace(mask.astype(np.float32)).xyz)
    assert np.array_equal(trace(mask).xyz, trace(mask * 0.9, threshold=0.9).xyz)


# --- Gaps ----------------------------------------------------------------------------------------


def cut_bar(gap: int) -> np.ndarray:
    probability = bar(soma=False).astype(np.float32) * 0.9
    start = 45 - gap // 2
    probability[:, :, start : start + gap] = 0.1
    return probability


def test_a_gap_is_bridged_and_logged_or_kept():
    log = []
    tree = trace(cut_bar(8), log=log)
    check_is_forest(tree, cut_bar(8) >= 0.5)
    assert (count(tree), len(tips(tree))) == (1, 2)
    assert 0 in tips(tree)  # the root is an end of the whole, not the end at the gap
    (bridge,) = log
    assert bridge.length == pytest.approx(9, abs=1)
    assert bridge.probability == pytest.approx(0.2, abs=0.1)
    assert {round(bridge.start[0] / 2), round(bridge.end[0] / 2)} == {20, 24}

    for gap, options in ((8, {"bridge": 0}), (8, {"bridge": 6}), (20, {})):
        assert count(trace(cut_bar(gap), log=log, **options)) == 2
    assert log == [bridge]


def test_a_bridge_is_no_thicker_than_its_ends():
    assert trace(cut_bar(12)).radius.max() <= trace(bar(soma=False)).radius.max() + 0.01


def test_a_thin_branch_is_bridged_where_it_points():
    mask = np.zeros((15, 60, 90), bool)
    mask[5:10, 10:15, 5:60] = True
    mask[7, 15:24, 30] = True  # the branch ends at y = 23
    beside, ahead = mask.copy(), mask.copy()
    beside[6:9, 18:21, 38:78] = True
    ahead[6:9, 30:58, 29:32] = True
    assert [count(trace(with_other)) for with_other in (mask, beside, ahead)] == [1, 2, 1]


def forest_of(*lines: np.ndarray) -> Tree:
    """Unbranched trees along points (n, 3), x, y, z."""
    parent = [row for line in lines for row in [-1, *range(len(line) - 1)]]
    above = np.repeat(np.cumsum([0, *map(len, lines[:-1])]), [len(line) for line in lines])
    parent = np.where(np.array(parent) < 0, -1, parent + above)
    n = len(parent)
    return Tree(np.concatenate(lines).astype(float), np.full(n, 1.5), np.zeros(n, int), parent)


def test_no_bridge_passes_between_the_nodes_of_another_tree_or_bridge():
    k = np.arange(15)[:, None]
    across = [(31, 40, 7) - k * (1, -1, 0), (40, 31, 7) + k * (1, -1, 0)]
    along = [(31, 31, 7) - k * (1, 1, 0), (40, 40, 7) + k * (1, 1, 0)]
    through = (20, 20, 7) + np.arange(30)[:, None] * (1, 1, 0)
    empty = np.zeros((15, 90, 90), bool)
    for lines, bridges in ((across, 1), ([*across, through], 0), ([*across, *along], 1)):
        assert len(bridge_gaps(forest_of(*lines), empty)[1]) == bridges
    aside = through + np.array([0, 0, 4])  # in another plane it is not in the way
    assert len(bridge_gaps(forest_of(*across, aside), empty)[1]) == 1


def test_bridging_takes_time_in_proportion_to_the_forest(monkeypatch):
    sizes = []

    def counted(points, **options):
        sizes.append(len(points))
        return KDTree(points, **options)

    x = np.arange(42)[:, None] * (1, 0, 0)
    pieces = [x + np.array([50 * column, 20 * row, 5]) for row in range(4) for column in range(20)]
    forest = forest_of(*pieces)
    monkeypatch.setattr(tracing, "KDTree", counted)
    assert len(bridge_gaps(forest, np.zeros((11, 90, 1000), bool))[1]) == 76
    assert sum(sizes) < 10 * len(forest.xyz)  # all search trees together


def test_ends_that_do_not_face_each_other_stay_apart():
    mask = np.zeros((20, 60, 80), bool)
    mask[9:12, 20:23, 5:75] = True
    mask[9:12, 30:33, 5:75] = True  # parallel: the ends are near, but point past each other
    assert count(trace(mask)) == 2


@pytest.mark.parametrize(
    ("one", "other", "joined"),
    [(35, 35, True), (55, 10, True), (50, 50, False), (65, 0, False), (0, 65, False)],
)
def test_how_far_two_ends_may_point_past_each_other(one, other, joined):
    def neurite(end, angle):
        way = np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle)), 0])
        return np.array(end) - np.arange(20)[:, None] * way

    xyz = np.concatenate([neurite((25, 25, 5), one), neurite((35, 25, 5), 180 - other)])
    parent = np.where(np.arange(40) % 20 == 0, -1, np.arange(40) - 1)
    forest = Tree(xyz, np.full(40, 2.0), np.zeros(40, int), parent)
    tree, bridges = bridge_gaps(forest, np.zeros((10, 60, 60), bool))
    assert [bridge.length for bridge in bridges] == pytest.approx([10.0] * joined)
    assert count(tree) == 2 - joined


def test_bridges_make_no_loop_and_take_the_probable_way():
    # Three arms end near one point: two bridges join them, the third would close a loop.
    arms = [(30 + 26 * np.cos(a), 30 + 26 * np.sin(a)) for a in (0.3, 2.4, 4.5)]
    mask = np.zeros((15, 61, 61), bool)
    for x, y in arms:
        inner = (30 + (x - 30) * 0.2, 30 + (y - 30) * 0.2)
        mask |= draw(line((x, y, 7), (*inner, 7)), mask.shape, 1.5)
    log = []
    tree = trace(mask, log=log)
    assert len(log) == 2
    assert count(tree) == 1
    check_is_forest(tree, mask)
    # If the other pair is made probable, it is joined.
    joined = {frozenset((bridge.start, bridge.end)) for bridge in log}
    ends = frozenset.union(*joined)
    assert len(ends) == 3
    left_out = next((a, b) for a in ends for b in ends if a < b and frozenset((a, b)) not in joined)
    probability = mask * 1.0
    probability[draw(line(*left_out), mask.shape, 1.0) & ~mask] = 0.45
    log = []
    trace(probability, log=log)
    assert frozenset(left_out) in {frozenset((bridge.start, bridge.end)) for bridge in log}


def test_bridging_keeps_soma_and_seed_as_root():
    mask = bar(soma=True)
    mask[:, :, 40:47] = False
    tree = trace(mask)
    assert count(tree) == 1
    assert tree.type[0] == 1
    tree = trace(cut_bar(8), seed=(14, 14, 60))
    assert count(tree) == 1
    assert np.allclose(tree.xyz[0], [60, 14, 14], atol=1.5)


def test_a_cut_neuron_keeps_its_recall_as_forest_and_bridged():
    tree = grow(0, (50, 150, 150), branches=14)
    whole = draw(tree, (50, 150, 150))
    mask, where = whole.copy(), np.argwhere(whole)
    for node in np.random.default_rng(0).choice(len(tree.xyz), 6, replace=False):
        hole = np.linalg.norm(where - tree.xyz[node][::-1], axis=1) <= 3.5
        mask[tuple(where[hole].T)] = False
    forest, joined = trace(mask, bridge=0), trace(mask)
    apart, together = tree_scores(forest, tree), tree_scores(joined, tree)
    assert 0.85 < apart.recall <= together.recall
    assert count(joined) < count(forest)
    assert together.precision > 0.95


def test_stages_are_what_trace_does():
    mask = cut_bar(8)
    foreground = find_foreground(mask)
    radius, _, paths = drawn_paths(foreground)
    tree, bridges = bridge_gaps(tracing.paths_to_tree(paths, foreground, radius), mask)
    assert len(bridges) == 1
    smooth = tracing.smooth_tree(tree, tracing.background_shell(foreground), foreground.scale, 2.0)
    assert np.array_equal(smooth.xyz, trace(mask).xyz)


# --- In parts ------------------------------------------------------------------------------------


class Slices:
    """A volume that can only be sliced; it knows the largest part read at once."""

    def __init__(self, data):
        self._data, self.shape, self.dtype = data, data.shape, data.dtype
        self.most = self.total = 0

    def __getitem__(self, box):
        part = self._data[box]
        self.most, self.total = max(self.most, part.size), self.total + part.size
        return part


def check_same(one: Tree, two: Tree) -> None:
    for name in ("xyz", "radius", "type", "parent"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([0.03, 0.1, 0.3, 0.8]),
    *[st.tuples(*[st.integers(1, 14)] * 3)] * 2,
    st.sampled_from([(1, 1, 1), (3, 1, 1), (0.5, 0.2, 0.3)]),
    st.integers(1, 6),
)
def test_the_tree_does_not_depend_on_how_the_volume_is_cut(
    seed, density, shape, region, spacing, min_size
):
    rng = np.random.default_rng(seed)
    probability = rng.random(shape).astype(np.float32)
    options = {"spacing": spacing, "threshold": 1 - density, "min_size": min_size}
    options["seed"] = tuple(rng.random(3) * shape - 0.5) if seed % 2 else None
    cut = functools.partial(boxes, (0, 0, 0), shape, region)
    try:
        whole = trace(probability, **options)
    except VolumeError as error:
        with pytest.raises(VolumeError, match=re.escape(str(error))):
            trace(Slices(probability), regions=cut(), **options)
    else:
        check_same(trace(Slices(probability), regions=cut(), **options), whole)


@pytest.mark.parametrize("region", [(40, 90, 100), (16, 16, 16), (7, 90, 13), (1, 33, 100)])
@pytest.mark.parametrize("spacing", [(1, 1, 1), (2.5, 1, 1)])
def test_neurons_with_gaps_in_parts(region, spacing):
    shape = (40, 90, 100)
    mask = neuron(0) | neuron(7)
    mask[3:6, 3:6, 2:98] = mask[30:34, 84:87, 2:98] = True
    mask[:, :, 35:39] = mask[:, :, 71:78] = False
    probability = np.where(mask, 0.8, 0.2).astype(np.float32)
    bridges, traced = [], []
    whole = trace(probability, spacing, log=bridges)
    parts = Slices(probability)
    check_same(trace(parts, spacing, log=traced, regions=boxes((0, 0, 0), shape, region)), whole)
    assert traced == bridges
    assert bridges
    # Each voxel once, and the surroundings of gaps.
    assert parts.most <= max(np.prod(region), 16**3)
    assert parts.total < probability.size + 1000 * 16**2
    # Empty regions need not be read.
    box = tuple(slice(a.min(), a.max() + 1) for a in mask.nonzero())
    check_same(trace(Slices(probability), spacing, regions=[box]), whole)


def test_a_foreground_beyond_memory_is_refused_before_it_is_there(monkeypatch):
    free = 70_000 * tracing.GRAPH_BYTES
    monkeypatch.setattr(tracing.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    full = Slices(np.ones((64, 128, 128), bool))
    words = r"131072 .*threshold 0\.5.*70000 .*raise the thr"
    with pytest.raises(VolumeError, match=words) as error:
        trace(full, regions=boxes((0, 0, 0), full.shape, (4, 128, 128)))
    assert "\n" not in str(error.value)
    assert full.total == 2 * full.most
    # Twice as many as could be traced, but most are dropped at once.
    specks = np.zeros((64, 128, 128), bool)
    specks[::2, ::2, ::2] = True
    specks[:, 60:63, 60:63] = True
    assert specks.sum() > 120_000
    regions = boxes((0, 0, 0), specks.shape, (4, 128, 128))
    check_is_forest(trace(specks, min_size=2, regions=regions), specks)


# --- Adversarial ---------------------------------------------------------------------------------


def ball(radius: int) -> np.ndarray:
    return ((np.indices((40, 40, 40)) - 20) ** 2).sum(axis=0) <= radius**2


ODD = {
    "full": np.ones((20, 22, 24), bool),
    "ball": ball(12),
    "shell": ball(14) & ~ball(12),
    "slice": np.pad(np.ones((1, 5, 40), bool), ((0, 0), (5, 5), (3, 3))),
    "full slice": np.ones((1, 30, 30), bool),
    "column": np.ones((30, 1, 1), bool),
    "line": np.eye(40, dtype=bool)[None],
    "checkerboard": np.indices((14, 14, 14)).sum(axis=0) % 2 == 0,
    "sheet": np.pad(np.ones((1, 40, 40), bool), 2),
    "noise": np.random.default_rng(0).random((30, 30, 30)) < 0.2,
    "at the border": np.pad(np.ones((3, 3, 40), bool), ((0, 20), (20, 0), (0, 0))),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_masks_give_a_forest(name):
    check_is_forest(trace(ODD[name]), ODD[name])


def test_a_loop_is_traced_round_but_not_closed():
    angle = np.linspace(0, 2 * np.pi, 200)
    ring = line(*np.stack([30 + 20 * np.cos(angle), 30 + 20 * np.sin(angle), 10 + 0 * angle], 1))
    mask = draw(ring, (20, 60, 60))
    tree = trace(mask)
    check_is_forest(tree, mask)
    assert tree_scores(tree, ring).recall > 0.9


def test_a_single_voxel_is_one_node():
    mask = np.zeros((5, 6, 7), bool)
    mask[1, 2, 3] = True
    tree = trace(mask, min_size=1)
    assert tree.xyz.tolist() == [[3, 2, 1]]
    assert tree.parent.tolist() == [-1]
    assert trace(mask, min_size=0).xyz.tolist() == tree.xyz.tolist()
    assert trace(np.ones((1, 1, 1), bool), min_size=1).xyz.tolist() == [[0, 0, 0]]


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10_000),
    st.floats(0.05, 0.95),
    st.tuples(*[st.integers(1, 14)] * 3),
    st.sampled_from([(1, 1, 1), (3, 1, 1), (0.5, 0.2, 0.2)]),
)
@example(339, 0.4, (1, 6, 7), (1, 1, 1))  # a third piece lies between two that face each other
def test_any_mask_gives_a_forest(seed, density, shape, spacing):
    mask = np.random.default_rng(seed).random(shape) < density
    mask.flat[seed % mask.size] = True
    check_is_forest(trace(mask, spacing, min_size=1), mask)


@pytest.mark.parametrize(
    ("volume", "options", "error", "words"),
    [
        (np.zeros((5, 5, 5), bool), {}, VolumeError, "lower the threshold"),
        (np.full((5, 5, 5), 0.4), {}, VolumeError, "0 voxels reach the threshold 0.5"),
        (ODD["line"], {"min_size": 41}, VolumeError, "40 voxels"),
        (np.full((3, 3, 3), np.nan), {}, VolumeError, "nan"),
        (np.full((3, 3, 3), 1.5), {}, VolumeError, r"in \[0, 1\]"),
        (np.full((3, 3, 3), -0.5), {}, VolumeError, r"in \[0, 1\]"),
        (np.ones((3, 3, 3), np.uint8), {}, VolumeError, "uint8"),
        (np.ones((9, 9), bool), {}, VolumeError, "3D"),
        (np.ones((0, 9, 9), bool), {}, VolumeError, "3D"),
        (ODD["full"], {"spacing": (1, 1)}, VolumeError, "three positive"),
        (ODD["full"], {"spacing": (1, -1, 1)}, VolumeError, "three positive"),
        (ODD["full"], {"seed": (0, 0, 24)}, VolumeError, "outside"),
        (ODD["full"], {"seed": (0, np.nan, 0)}, VolumeError, "outside"),
        (ODD["full"], {"seed": (0, 1)}, VolumeError, "outside"),
        (ODD["full"], {"threshold": 0}, SettingsError, "threshold"),
        (ODD["full"], {"min_size": -1}, SettingsError, "min_size"),
        (ODD["full"], {"step": 0}, SettingsError, "step"),
        (ODD["full"], {"bridge": -1}, SettingsError, "bridge"),
        (ODD["full"], {"bridge": np.float32("nan")}, SettingsError, "bridge"),
    ],
)
def test_errors_are_one_line_of_ours(volume, options, error, words):
    with pytest.raises(NeurolibError, match=words) as caught:
        trace(volume, **options)
    assert issubclass(caught.type, error)
    assert "\n" not in str(caught.value)


def test_stages_are_projected_without_their_background():
    mask = np.zeros((5, 9, 30), bool)
    mask[1:4, 3:6, 2:28] = True
    foreground = find_foreground(mask)
    depth = foreground.voxels[:, 0]
    for keep, value in ((np.fmax, 3), (np.fmin, 1)):
        flat = tracing.project(foreground, depth, keep)
        assert np.array_equal(np.isnan(flat), ~mask.any(axis=0))
        assert (flat[mask.any(axis=0)] == value).all()
