"""Targets against brute force; blocks and stacking against counting by hand."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import label
from scipy.spatial.distance import cdist

from neurolib import blocking
from neurolib.blocking import (
    KINDS,
    block_grid,
    block_starts,
    choose_blocks,
    gaussian_window,
    make_target,
    read_block,
    salient,
    tube_radius,
)
from neurolib.data.pairs import Pair
from neurolib.errors import DataError, SettingsError, VolumeError
from neurolib.swc import Tree

REAL = Path(__file__).parents[1].parent / "shared" / "data" / "real3d"
steady = settings(deadline=None, max_examples=40, derandomize=True)


def tree_of(xyz, parent, radius=1.0):
    xyz = np.asarray(xyz, float).reshape(-1, 3)
    n = len(xyz)
    return Tree(
        xyz, np.broadcast_to(radius, n).astype(float), np.full(n, 3), np.asarray(parent, int)
    )


def random_tree(rng, shape, n=7):
    """Edges across the whole volume and beyond it, several roots, radii from 0.2 to 4."""
    xyz = rng.uniform(-3, np.array(shape[::-1]) + 3, (n, 3))
    parent = [-1] + [int(rng.integers(-1, i)) for i in range(1, n)]
    return tree_of(xyz, parent, rng.uniform(0.2, 4, n))


def dense_samples(tree, scale, step=0.01):
    """Points (z, y, x) and radii in pixels, so close that they are the edges."""
    nodes = np.column_stack([tree.xyz[:, ::-1] * scale, tree.radius * np.sqrt(scale[1] * scale[2])])
    samples = [nodes]
    for child, parent in enumerate(tree.parent):
        if parent >= 0:
            n = int(np.linalg.norm(nodes[child] - nodes[parent]) / step) + 2
            samples.append(np.linspace(nodes[parent], nodes[child], n))
    return np.concatenate(samples)


def brute_force(tree, shape, spacing, kind, radii=None, a=6.0, d_max=5.0):
    """Response by comparing every voxel, at every radius, with every sample."""
    scale = np.asarray(spacing, float) / min(spacing[1:])
    voxels = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, 3)
    samples = dense_samples(tree, scale)
    # A voxel longer than a pixel is a row of pixel-sized cubes.
    extent = np.maximum(scale - 1, 0) / 2
    distance = cdist(voxels * scale, samples[:, :3])
    for row, voxel in enumerate(voxels * scale if extent.any() else ()):
        apart = (samples[:, :3] - voxel).T
        apart -= np.clip(apart, -extent[:, None], extent[:, None])
        distance[row] = np.sqrt((apart**2).sum(axis=0))
    if kind == "radius":
        return (distance <= np.maximum(samples[:, 3], 1)).any(1).reshape(shape)
    best = distance.min(1)
    if kind == "scale_space":
        levels = radii * np.sqrt(scale[1] * scale[2])
        each = [np.sqrt(distance**2 + (r - samples[:, 3]) ** 2).min(1) for r in levels]
        best = np.min(each, axis=0)
    y = np.where(best < d_max, (np.exp(a * (1 - best / d_max)) - 1) / (np.exp(a) - 1), 0)
    return y.reshape(shape)


# Targets


@pytest.mark.parametrize(
    "spacing", [(1, 1, 1), (2.5, 1, 1), (0.3, 0.6, 0.45), (6, 1, 1), (0.2, 1, 1), (2, 3, 1)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_sironi_equals_brute_force(seed, spacing):
    shape = (7, 19, 23)
    tree = random_tree(np.random.default_rng(seed), shape)
    response, mask = make_target(tree, shape, spacing)
    expected = brute_force(tree, shape, spacing, "sironi")
    assert response.dtype == np.float32
    assert mask.dtype == bool
    assert response.shape == mask.shape == shape
    # Samples 0.01 apart are at most 0.005 from the nearest point of the edge.
    assert np.all(response - expected > -1e-6)
    assert np.abs(response - expected).max() < 0.007
    clear = np.abs(expected - 0.1) > 1e-3
    assert np.array_equal(mask[clear], expected[clear] >= 0.1)
    assert 0 < mask.mean() < 1


@pytest.mark.parametrize("spacing", [(1, 1, 1), (2.5, 1, 1), (0.5, 1, 1)])
def test_the_maximum_over_all_radii_is_the_same_target(spacing):
    shape = (7, 15, 17)
    tree = random_tree(np.random.default_rng(3), shape, 5)
    response, mask = make_target(tree, shape, spacing, "scale_space")
    # Radii 0.1 apart are at most 0.05 from that of the nearest point, and the response falls by
    # at most 1.2 per pixel.
    radii = np.arange(0, tree.radius.max() + 0.1, 0.1)
    expected = brute_force(tree, shape, spacing, "scale_space", radii)
    assert np.all(response - expected > -1e-6)
    assert np.abs(response - expected).max() < 1.2 * 0.06
    for one, other in zip((response, mask), make_target(tree, shape, spacing), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("spacing", [(1, 1, 1), (2.5, 1, 1), (5, 1, 1), (0.5, 1, 1), (1, 3, 1)])
@pytest.mark.parametrize("seed", [0, 1])
def test_radius_equals_brute_force(seed, spacing):
    shape = (7, 19, 23)
    tree = random_tree(np.random.default_rng(seed), shape)
    response, mask = make_target(tree, shape, spacing, "radius")
    expected = brute_force(tree, shape, spacing, "radius")
    assert np.array_equal(response, mask)
    assert np.all(mask >= expected)  # the samples can only miss a voxel, within 0.005
    assert np.count_nonzero(mask != expected) <= 3


def test_radius_of_single_nodes_flat_cones_and_coincident_nodes():
    ball = tree_of([[8, 8, 8]], [-1], 3.0)
    z, y, x = np.ogrid[:17, :17, :17]
    distance = np.sqrt((z - 8) ** 2 + (y - 8) ** 2 + (x - 8) ** 2)
    assert np.array_equal(make_target(ball, (17, 17, 17), kind="radius")[1], distance <= 3)
    # The large ball holds the small one, so the cone adds nothing.
    held = tree_of([[8, 8, 8], [9, 8, 8]], [-1, 0], [3.0, 0.5])
    assert np.array_equal(make_target(held, (17, 17, 17), kind="radius")[1], distance <= 3)
    for radius in ([3.0, 1.0], [1.0, 3.0]):
        same = tree_of([[8, 8, 8], [8, 8, 8]], [-1, 0], radius)
        assert np.array_equal(make_target(same, (17, 17, 17), kind="radius")[1], distance <= 3)
    thin = make_target(tree_of([[2, 8, 8], [14, 8, 8]], [-1, 0], 0.0), (17, 17, 17), kind="radius")
    assert thin[1].sum() == 5 * 13 + 2


@pytest.mark.parametrize("end", [(60, 30, 12), (60, 11, 17), (57, 53, 15), (60, 11.3, 12.2)])
def test_a_slanted_line_has_no_staircase_and_no_bias(end):
    start, end = np.array([4, 10.3, 10.2]), np.array(end, float)
    response, mask = make_target(tree_of([start, end], [-1, 0]), (28, 64, 64))
    z, y, x = np.nonzero(mask)
    offset = np.stack([x, y, z], 1) - start
    axis = (end - start) / np.linalg.norm(end - start)
    along = offset @ axis
    across = offset - along[:, None] * axis
    middle = (along > 3) & (along < np.linalg.norm(end - start) - 3)
    # It depends on the true distance alone, without a staircase along the line.
    distance = np.linalg.norm(across[middle], axis=1)
    expected = np.expm1(6 * (1 - distance / 5)) / np.expm1(6)
    assert np.abs(response[z, y, x][middle] - expected).max() < 1e-5
    # Along a line that sweeps whole voxels in y and z, the positions within a voxel average out:
    # the mask's centre is on the line and its cross section is that of the tube.
    assert np.abs(across[middle].mean(0)).max() < 0.06
    area = middle.sum() / np.ptp(along[middle])
    assert np.sqrt(area / np.pi) == pytest.approx(tube_radius(0.1), rel=0.04)


def test_a_large_soma_is_a_ball_without_much_memory():
    tree = tree_of([[60, 50, 40], [65, 55, 40]], [-1, 0], [38.0, 1.0])
    tracemalloc.start()
    mask = make_target(tree, (81, 101, 121), kind="radius")[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    z, y, x = np.ogrid[:81, :101, :121]
    assert np.array_equal(mask, (z - 40) ** 2 + (y - 50) ** 2 + (x - 60) ** 2 <= 38**2)
    assert peak < 5 * mask.size + 16e6


@pytest.mark.parametrize("spacing", [(1, 1, 1), (3.7, 1, 1), (2, 1, 5), (0.4, 1, 1)])
def test_no_voxel_within_reach_of_an_edge_is_missed(spacing, monkeypatch):
    monkeypatch.setattr(blocking, "STEEPNESS", 0.1)
    monkeypatch.setattr(blocking, "REACH", 4.0)
    scale, rng = np.array(spacing), np.random.default_rng(0)
    shape = (21, 25, 25)
    voxels = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) * scale
    extent, places = np.maximum(scale - 1, 0) / 2, np.linspace(-0.5, 0.5, 65)
    for _ in range(12):
        # As long as a piece can be and half a voxel off: the largest distance of a voxel from the
        # middle of a piece and still be near one of its ends.
        direction = rng.normal(size=3)
        step = 3.99 * np.maximum(scale, 1) * direction / np.linalg.norm(direction)
        middle = (np.array([10, 12, 12]) + rng.choice([-0.49, 0.49], 3)) * scale
        ends = np.array([middle - step / 2, middle + step / 2]) / scale
        apart = (middle + at * step - voxels for at in places)
        distance = np.min(
            [np.linalg.norm(a - np.clip(a, -extent, extent), axis=-1) for a in apart], axis=0
        )
        response, _ = make_target(tree_of(ends[:, ::-1], [-1, 0]), shape, spacing)
        expected = np.where(distance < 4, np.expm1(0.1 * (1 - distance / 4)) / np.expm1(0.1), 0)
        # The places are up to 0.3 pixels apart; those between are at most so much nearer.
        assert np.all(response - expected > -1e-6)
        assert np.abs(response - expected).max() < 0.04


def test_an_edge_in_pieces_equals_the_edge():
    ends = np.array([[1.5, 2, 3], [50.2, 40, 20]])
    whole = tree_of(ends, [-1, 0], [1, 5])
    share = np.linspace(0, 1, 60)[:, None]
    cut = tree_of(ends[0] + share * (ends[1] - ends[0]), range(-1, 59), 1 + 4 * share[:, 0])
    for kind in KINDS:
        one, other = (make_target(tree, (24, 48, 56), kind=kind)[0] for tree in (whole, cut))
        assert np.abs(one - other).max() < 1e-5


def test_axes_are_x_y_z_in_the_tree_and_z_y_x_in_the_array():
    response, mask = make_target(tree_of([[30, 20, 10]], [-1]), (15, 28, 40))
    assert np.unravel_index(response.argmax(), response.shape) == (10, 20, 30)
    assert response[10, 20, 30] == 1
    assert mask[10, 20, 31]
    assert response[10, 20, 35] == 0


def test_isotropic_voxels_are_measured_at_their_centres(monkeypatch):
    tree = random_tree(np.random.default_rng(0), (9, 31, 27))
    monkeypatch.setattr(blocking, "_to_extents", None)
    for kind in KINDS:
        assert make_target(tree, (9, 31, 27), (0.3,) * 3, kind)[1].any()


def test_anisotropic_voxels_give_a_physical_tube():
    _, mask = make_target(tree_of([[20, 20, 10]], [-1]), (21, 41, 41), (0.9, 0.3, 0.3), tau=0.01)
    extent = np.abs(np.argwhere(mask) - (10, 20, 20)).max(0)
    # Radius 3.65 pixels of 0.3; a slice of 0.9 begins one pixel before its middle.
    assert extent.tolist() == [1, 3, 3]


SPACINGS = st.tuples(*[st.sampled_from([1 / 8, 0.3, 0.7, 1, 2, 4, 5.5, 8])] * 3)


@settings(deadline=None, max_examples=120, derandomize=True)
@given(spacing=SPACINGS, seed=st.integers(0, 999), kind=st.sampled_from(KINDS))
def test_the_target_of_a_connected_tree_is_connected(spacing, seed, kind):
    """For any spacing; two trees that lie far apart are two pieces."""
    rng, shape, edges = np.random.default_rng(seed), np.array((12, 40, 50)), 6
    parent = [-1, *(int(rng.integers(0, i)) for i in range(1, edges))]
    xyz = rng.uniform(0, shape[::-1] - 1, (edges, 3))
    mask = make_target(tree_of(xyz, parent, 0.5), tuple(shape), spacing, kind)[1]
    assert label(mask, np.ones((3, 3, 3)))[1] == 1
    # It holds every voxel that an edge passes through.
    share = np.linspace(0, 1, 500)[:, None, None]
    passed = np.rint(xyz[parent[1:]] * share + xyz[1:] * (1 - share)).astype(int).reshape(-1, 3)
    assert mask[tuple(passed.T[::-1])].all()
    # In-plane copies, apart by more than a tube and a voxel of any of these spacings.
    far = np.vstack([xyz, xyz + np.array([130, 0, 0])])
    both = tree_of(far, [*parent, *(p + edges if p >= 0 else -1 for p in parent)], 0.5)
    mask = make_target(both, (12, 40, 180), spacing, kind)[1]
    assert label(mask, np.ones((3, 3, 3)))[1] == 2


@pytest.mark.parametrize("dz", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("height", [5.0, 5.5, 5.25])
def test_a_flat_neurite_between_two_slices_is_marked(dz, height):
    tree = tree_of([[5, 10, height], [60, 22, height]], [-1, 0])
    mask = make_target(tree, (12, 32, 66), (dz, 1, 1))[1]
    slices = np.flatnonzero(mask.any(axis=(1, 2)))
    assert round(height) in slices
    assert label(mask)[1] == 1
    assert len(slices) <= 3


@pytest.mark.parametrize(
    "spacing", [(300, 0.1, 0.1), (0.1, 300, 0.1), (1e-4, 1, 1), (1, 1, 1e-4), (1e4, 1, 1e4)]
)
def test_extreme_spacings_take_no_more_work(spacing, monkeypatch):
    tree, work = tree_of([[3, 4, 2], [90, 80, 30]], [-1, 0]), []
    spy = blocking._balls
    monkeypatch.setattr(
        blocking, "_balls", lambda *a: ((work.append(len(ball)), ball)[1] for ball in spy(*a))
    )
    mask = make_target(tree, (32, 96, 96), spacing)[1]
    assert label(mask, np.ones((3, 3, 3)))[1] == 1
    assert sum(work) < 100_000


def test_tube_radius_is_where_the_mask_ends():
    radii = [tube_radius(tau) for tau in (0.5, 0.1, 0.05, 0.01)]
    assert np.round(radii, 2).tolist() == [0.58, 1.90, 2.46, 3.65]
    assert tube_radius(1.0) == 0
    for tau in (0.5, 0.1, 0.01):
        for nudge, inside in ((-1e-3, True), (1e-3, False)):
            at = 10 + tube_radius(tau) + nudge
            _, mask = make_target(tree_of([[10, at, 10]], [-1]), (20, 20, 20), tau=tau)
            assert mask[10, 10, 10] == inside


def test_trees_outside_and_empty_trees_mark_nothing():
    for tree in (tree_of([[500, 9, 9], [600, 9, 9]], [-1, 0]), tree_of([], [])):
        for kind in KINDS:
            response, mask = make_target(tree, (9, 9, 9), kind=kind)
            assert not response.any()
            assert not mask.any()


@pytest.mark.parametrize("kind", ["sironi", "radius"])
def test_a_branch_that_nobody_traced_is_unknown_and_its_surroundings_are_background(kind):
    nodes = tree_of([(5, 20, 6), (75, 20, 6), (5, 60, 6), (75, 60, 6)], [-1, 0, -1, 2])
    shape = 13, 80, 80
    _, both = make_target(nodes, shape)
    noise = np.random.default_rng(0).normal(0.1, 0.02, shape)
    image = np.clip(0.5 * both + noise, 0, 1).astype(np.float32)
    half = tree_of([(5, 20, 6), (75, 20, 6)], [-1, 0])
    response, mask = make_target(half, shape, kind=kind)
    pair = Pair("a", "a", Path("a.tif"), Path("a.swc"), "synthetic")
    sample = blocking.Sample(pair, image, (1.0, 1.0, 1.0), half, response, mask, kind=kind)
    told = blocking.ignore_untraced(sample)
    unknown = np.isnan(told.response)
    assert unknown[6, 60, 8:73].all()
    assert not unknown[:, 16:25].any()  # beside the traced one
    assert unknown[~both].mean() < 0.01
    assert np.array_equal(told.response[~unknown], response[~unknown])
    assert np.array_equal(told.mask, mask)
    assert not np.isnan(response).any()


def test_target_needs_little_more_memory_than_its_output():
    tree = random_tree(np.random.default_rng(0), (40, 256, 256), 30)
    tracemalloc.start()
    response, mask = make_target(tree, (40, 256, 256))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < response.nbytes + mask.nbytes + 16e6


# Blocks


@steady
@given(st.integers(1, 60), st.integers(1, 20), st.data())
def test_starts_cover_the_axis_and_stay_inside(size, block, data):
    stride = data.draw(st.integers(1, block))
    starts = block_starts(size, block, stride)
    covered = np.zeros(max(size, block), bool)
    for start in starts:
        covered[start : start + block] = True
    assert covered.all()
    assert starts[0] == 0
    assert starts[-1] == max(size - block, 0)
    assert np.all(np.diff(starts) > 0)
    assert np.all(np.diff(starts) <= stride)


def test_the_last_block_shifts_inward_and_every_slice_is_a_centre():
    assert block_starts(512, 100, 100).tolist() == [0, 100, 200, 300, 400, 412]
    assert block_starts(500, 100, 100).tolist() == [0, 100, 200, 300, 400]
    grid = block_grid((7, 250, 30))
    assert grid.shape == (7 * 3, 3)
    assert np.unique(grid[:, 0]).tolist() == list(range(7))
    assert np.unique(grid[:, 1]).tolist() == [0, 100, 150]
    assert np.unique(grid[:, 2]).tolist() == [0]


shapes = st.tuples(st.integers(1, 9), st.integers(1, 15), st.integers(1, 15))
blocks = st.tuples(st.sampled_from([1, 3, 5]), st.integers(1, 8), st.integers(1, 8))


@steady
@given(shapes, blocks, st.data())
def test_blocks_equal_those_of_the_padded_volume(shape, block, data):
    volume = np.random.default_rng(0).random(shape)
    stride = tuple(data.draw(st.integers(1, 9)) for _ in range(3))
    half = block[0] // 2
    padded = np.pad(volume, ((half, half), (0, 0), (0, 0)), mode="edge")
    # numpy repeats the reflection as often as needed, but cannot reflect a single voxel.
    for axis in (1, 2):
        pad = [(0, 0)] * 3
        pad[axis] = (0, max(block[axis] - shape[axis], 0))
        padded = np.pad(padded, pad, mode="edge" if shape[axis] == 1 else "reflect")
    for z, y, x in block_grid(shape, block, stride):
        expected = padded[z : z + block[0], y : y + block[1], x : x + block[2]]
        assert np.array_equal(read_block(volume, (z, y, x), block), expected)


def test_reflection_repeats_in_volumes_smaller_than_half_a_block():
    volume = np.arange(3, dtype=np.uint8).reshape(1, 1, 3)
    block = read_block(volume, (0, 0, 0))
    assert block.shape == (5, 100, 100)
    assert block[4, 99, :9].tolist() == [0, 1, 2, 1, 0, 1, 2, 1, 0]
    assert read_block(volume, (0, 0, -2), (1, 1, 5))[0, 0].tolist() == [2, 1, 0, 1, 2]


def test_blocks_inside_are_views_and_make_no_copy():
    volume = np.zeros((40, 300, 300), np.float32)
    grid = block_grid(volume.shape, stride=(1, 50, 50))
    inside = [tuple(p) for p in grid if 2 <= p[0] < 38]
    assert all(np.shares_memory(read_block(volume, p), volume) for p in inside[::50])
    assert not np.shares_memory(read_block(volume, (0, 0, 0)), volume)
    tracemalloc.start()
    for position in grid:
        read_block(volume, position)
    salient(volume, grid)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < volume.nbytes / 8


def test_blocks_come_out_of_memory_mapped_files(tmp_path):
    volume = np.random.default_rng(0).random((6, 20, 30)).astype(np.float32)
    np.save(tmp_path / "volume.npy", volume)
    mapped = np.load(tmp_path / "volume.npy", mmap_mode="r")
    for position in block_grid(volume.shape, (5, 12, 40), (1, 7, 7)):
        one, other = (read_block(data, position, (5, 12, 40)) for data in (mapped, volume))
        assert np.array_equal(one, other)


# Choice of blocks


@steady
@given(shapes, blocks, st.floats(0, 0.5), st.sampled_from([0.001, 0.1, 0.5]), st.data())
def test_salience_equals_counting(shape, block, density, minimum, data):
    mask = np.random.default_rng(data.draw(st.integers(0, 9))).random(shape) < density
    grid = block_grid(shape, block, (1, 3, 3))
    centre = block[0] // 2
    expected = [read_block(mask, p, block)[centre].mean() >= minimum for p in grid]
    assert salient(mask, grid, minimum, block).tolist() == expected
    grid = np.concatenate([grid, [np.array(shape) - 1]])  # a block that overhangs counts too
    expected.append(read_block(mask, grid[-1], block)[centre].mean() >= minimum)
    order = np.random.default_rng(0).permutation(len(grid))
    shuffled = salient(mask, grid[order], minimum, block)
    assert np.array_equal(shuffled, np.array(expected)[order])


def test_the_limit_itself_is_salient():
    mask = np.zeros((1, 100, 100), bool)
    mask.flat[:9] = True
    assert not salient(mask, block_grid(mask.shape))[0]
    mask.flat[9] = True
    assert salient(mask, block_grid(mask.shape))[0]
    assert salient(mask, np.empty((0, 3), int)).shape == (0,)


def test_choice_is_salient_blocks_and_a_share_of_others():
    mask = np.zeros((10, 400, 400), bool)
    mask[4:6, :, 120:125] = True
    grid = block_grid(mask.shape)
    wanted = np.flatnonzero(salient(mask, grid))
    assert len(wanted) == 8
    chosen = choose_blocks(mask, grid, 0.25, seed=1)
    assert len(chosen) == 10
    assert np.isin(wanted, chosen).all()
    assert np.all(np.diff(chosen) > 0)
    assert np.array_equal(chosen, choose_blocks(mask, grid, 0.25, seed=1))
    assert not np.array_equal(chosen, choose_blocks(mask, grid, 0.25, seed=2))
    assert np.array_equal(choose_blocks(mask, grid, 0), wanted)
    assert len(choose_blocks(mask, grid, 1000)) == len(grid)
    assert len(choose_blocks(np.zeros_like(mask), grid, 1)) == 0


# Window


def test_gaussian_window_is_symmetric_positive_and_highest_in_the_middle():
    window = gaussian_window((100, 60))
    assert window.dtype == np.float32
    assert window.shape == (100, 60)
    assert np.array_equal(window, window[::-1, ::-1])
    assert window.min() > 0
    assert np.unravel_index(window.argmax(), window.shape) == (49, 29)
    assert gaussian_window((1, 1)).tolist() == [[1]]


# Bad input

TREE, HUGE, LOST = (tree_of([[4, 4, x]], [-1], r) for x, r in ((4, 1), (4, 99), (np.nan, 1)))
NONE = np.zeros((2, 9, 9), bool)
BAD = [
    (SettingsError, "sironi, scale_space, radius", lambda: make_target(TREE, (9, 9, 9), kind="x")),
    (VolumeError, "shape: expected three", lambda: make_target(TREE, (9, 9))),
    (VolumeError, "shape: expected three", lambda: make_target(TREE, (9, 0, 9))),
    (VolumeError, "spacing", lambda: make_target(TREE, (9, 9, 9), (1, 0, 1))),
    (VolumeError, "spacing", lambda: make_target(TREE, (9, 9, 9), (1, float("nan"), 1))),
    (VolumeError, "10000 times", lambda: make_target(TREE, (9, 9, 9), (1e-6, 1, 1))),
    (VolumeError, "spacing", lambda: make_target(TREE, (9, 9, 9), (1e-300,) * 3)),
    (SettingsError, "tau", lambda: make_target(TREE, (9, 9, 9), tau=0)),
    (SettingsError, "tau", lambda: tube_radius(1.5)),
    (DataError, "node 0", lambda: make_target(LOST, (9, 9, 9))),
    (DataError, "larger than the volume", lambda: make_target(HUGE, (9, 9, 9), kind="radius")),
    (SettingsError, "odd depth", lambda: block_grid((9, 9, 9), (4, 3, 3))),
    (SettingsError, "block", lambda: block_grid((9, 9, 9), (3, 3))),
    (SettingsError, "stride", lambda: block_grid((9, 9, 9), (3, 3, 3), (1, 0, 1))),
    (SettingsError, "stride 0", lambda: block_starts(9, 3, 0)),
    (VolumeError, "slices 0 to 8", lambda: read_block(np.zeros((9, 9, 9)), (9, 0, 0))),
    (VolumeError, "shape", lambda: read_block(np.zeros((9, 9)), (0, 0, 0))),
    (VolumeError, "positions", lambda: salient(NONE, np.zeros((3, 2)))),
    (VolumeError, r"\[5, 0, 0\] lies outside", lambda: salient(NONE, [[5, 0, 0]])),
    (SettingsError, "negatives", lambda: choose_blocks(NONE, block_grid((2, 9, 9)), -1)),
]


@pytest.mark.parametrize(("error", "words", "call"), BAD)
def test_bad_input_is_one_clear_line(error, words, call):
    with pytest.raises(error, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


# Real neurons


@pytest.mark.parametrize("name", ["sensory_I4-2", "class1_sn23"])
def test_real_neurons(name):
    if not (REAL / f"{name}.tif").exists():
        pytest.skip(f"the real image {name} is not in {REAL}")
    tifffile = pytest.importorskip("tifffile")
    volume = tifffile.imread(REAL / f"{name}.tif")
    table = np.loadtxt(REAL / f"{name}.swc", ndmin=2)
    row = {int(identity): i for i, identity in enumerate(table[:, 0])}
    parent = [row.get(int(p), -1) for p in table[:, 6]]
    tree = Tree(table[:, 2:5], table[:, 5], table[:, 1].astype(int), np.array(parent))
    response, mask = make_target(tree, volume.shape)
    nodes = tuple(np.rint(tree.xyz[:, ::-1]).astype(int).clip(0, np.array(volume.shape) - 1).T)
    assert mask[nodes].all()
    assert 1e-4 < mask.mean() < 0.02
    # The neurite is bright where the target says it is: it lies on the image, in its frame.
    assert volume[mask].mean() > 3 * volume[response == 0].mean()

    grid = block_grid(volume.shape)
    chosen = choose_blocks(mask, grid, 0.25)
    share = np.array([read_block(mask, p)[2].mean() for p in grid[chosen]])
    positives = np.count_nonzero(share >= 0.001)
    assert positives == salient(mask, grid).sum()
    assert len(chosen) == positives + np.ceil(positives / 4)
