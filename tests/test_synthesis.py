"""Synthetic neurons: valid, reproducible, rendered in place, and like the measured ones."""

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from scipy.ndimage import map_coordinates

from neurolib.data import datasets
from neurolib.data.synthesis import (
    GOLD_RANGES,
    MARGIN,
    MAX_VOXELS,
    REAL_RANGES,
    ROOM,
    STYLES,
    calibration,
    extract_box,
    grow,
    image_statistics,
    render,
    render_extract,
    statistics,
)
from neurolib.errors import NeurolibError, SettingsError, SwcError
from neurolib.swc import Tree, components, length, read_swc, take
from neurolib.volume import Volume

DATA = Path(__file__).parents[1].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}")
SHAPE = (48, 192, 192)
SMALL = (32, 80, 80)
BLACK = Volume(np.zeros(SMALL, np.uint8))


def line(start, stop, radius=1.0, n=40):
    """A straight neurite between two points (x, y, z)."""
    xyz = np.linspace(start, stop, n)
    return Tree(xyz, np.full(n, radius), np.full(n, 3), np.arange(n) - 1)


def fingerprint():
    tree = grow(3, SMALL)
    parts = [tree.xyz, tree.radius, tree.type, tree.parent, render(tree, SMALL, seed=3).data]
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def test_same_seed_same_bits_in_another_process():
    code = "from tests.test_synthesis import fingerprint; print(fingerprint())"
    # Probably another hash seed and thread count than here.
    env = os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"}
    command, folder = [sys.executable, "-c", code], Path(__file__).parents[1]
    out = subprocess.check_output(command, cwd=folder, env=env, text=True)
    assert out.strip() == fingerprint()


def test_seeds_differ():
    tree = grow(0, SMALL)
    assert tree.xyz.tobytes() != grow(1, SMALL).xyz.tobytes()
    assert (render(tree, SMALL, seed=0).data != render(tree, SMALL, seed=1).data).any()


@pytest.mark.parametrize("shape", [(24, 64, 64), SHAPE, (100, 96, 300)])
@pytest.mark.parametrize("seed", range(4))
def test_grown_tree_is_valid(seed, shape):
    tree = grow(seed, shape)
    n = len(tree.parent)
    assert tree.xyz.shape == (n, 3)
    assert tree.xyz.dtype == tree.radius.dtype == np.float64
    assert tree.parent.dtype.kind == tree.type.dtype.kind == "i"
    assert (tree.type[0], tree.parent[0], (tree.parent < 0).sum()) == (1, -1, 1)
    assert (tree.parent < np.arange(n)).all()
    assert components(tree).max() == 0
    assert (tree.radius >= 1).all()
    upper = np.array(shape[::-1]) - 1 - MARGIN
    assert ((tree.xyz >= MARGIN) & (tree.xyz <= upper)).all()
    # Only bifurcations, and no two nodes in one place.
    assert np.bincount(tree.parent[1:]).max() <= 2
    assert len(np.unique(tree.xyz.round(3), axis=0)) == n


def test_statistics_within_the_gold_ranges():
    rows = [statistics(grow(seed, SHAPE)) for seed in range(12)]
    rows += [statistics(grow(seed, (64, 320, 320))) for seed in range(3)]
    # In small volumes a tree has few segments, and its medians scatter: the typical neuron must
    # be a typical one, and none may be far outside.
    for name, (low, high) in GOLD_RANGES.items():
        values = [row[name] for row in rows]
        assert low <= np.median(values) <= high, name
        assert min(values) >= 0.5 * low, name
        assert max(values) <= 3.0 * high, name


def test_statistics_of_a_known_tree():
    # A trunk of 20, two branches of 10, one of them with a detour.
    xyz = np.array([[0, 0, 0], [20, 0, 0], [30, 0, 0], [20, 5, 3], [20, 10, 0]], dtype=float)
    tree = Tree(xyz, np.array([3.0, 1, 1, 1, 1]), np.full(5, 3), np.array([-1, 0, 1, 1, 3]))
    measured = statistics(tree)
    detour = 2 * np.hypot(5, 3)
    assert measured["length"] == pytest.approx(length(tree))
    assert (measured["tips"], measured["branches"]) == (3, 1)
    assert measured["segment_median"] == pytest.approx(detour)
    assert measured["segment_mean"] == pytest.approx((30 + detour) / 3)
    assert measured["tortuosity"] == pytest.approx(1.0)
    assert measured["radius_max"] == 3
    # The order of the nodes must not matter.
    shuffled = take(tree, np.array([4, 2, 0, 3, 1]))
    assert statistics(shuffled) == pytest.approx(measured)


def test_rendering_is_centred():
    # Neurites at sub-voxel places along each axis: the centroid of the light across them, without
    # the background, is where the tree is.
    shape = (41, 61, 61)
    for axis, point in enumerate([(30.0, 30.3, 20.4), (29.6, 30.0, 19.7), (30.25, 29.75, 20.0)]):
        start, stop = np.array(point), np.array(point)
        start[axis], stop[axis] = -5, shape[::-1][axis] + 5
        tree = line(start, stop, n=200)
        data = np.mean([render(tree, shape, "flylight", s).data for s in range(4)], axis=0)
        across = data.mean(axis=2 - axis)
        others = [2 - k for k in range(3) if k != axis][::-1]
        across[across < 0.2 * across.max()] = 0
        grids = np.meshgrid(*map(np.arange, across.shape), indexing="ij")
        centroid = [(g * across).sum() / across.sum() for g in grids]
        expected = [point[2 - k] for k in others]
        assert np.abs(np.subtract(centroid, expected)).max() < 0.2


def test_ridge_lies_on_a_grown_tree():
    tree = grow(1, SHAPE)
    data = render(tree, SHAPE, "flylight", 1).data.astype(float)

    def brightness(shift):
        return map_coordinates(data, (tree.xyz[:, ::-1] + shift).T, order=1).mean()

    # A parabola through the mean brightness on the tree moved by -1, 0, 1 voxels has its top
    # where the ridge is.
    for axis in np.eye(3):
        low, middle, high = (brightness(k * axis) for k in (-1, 0, 1))
        top = 0.5 * (low - high) / (low - 2 * middle + high)
        assert abs(top) < 0.2


def test_intensity_falls_off_and_z_is_blurred_more():
    shape = (41, 61, 200)
    data = render(line((-5, 30, 20), (205, 30, 20), n=300), shape, "confocal", 5).data
    mean = data.astype(float).mean(axis=2)
    across = mean[20, 30:42]
    assert (np.diff(across[:5]) < 0).all()
    assert across[0] > 2 * across[10]
    assert mean[24, 30] > mean[20, 34]


def test_thick_parts_are_not_carved_by_thin_neighbours():
    # A ball of radius 8 on a thin neurite: a voxel at its flank is nearer to the neurite's
    # samples than to the ball's centre, and yet inside the ball.
    shape = (41, 61, 61)
    tree = line((10, 30, 20), (50, 30, 20), n=21)
    tree.radius[10] = 8.0
    data = render(tree, shape, "flylight", 0).data
    assert data[20, 30 + 6, 30] > 30
    assert data[20, 30 + 6, 10] < 30


def test_styles():
    tree = grow(2, SHAPE)
    plain, masked = (render(tree, SHAPE, style, 2) for style in STYLES)
    for volume in (plain, masked):
        assert volume.data.dtype == np.uint8
        assert volume.data.shape == SHAPE
    assert (plain.data == 0).mean() < 0.05
    assert (masked.data == 0).mean() > 0.7
    measured = image_statistics(masked, tree)
    assert measured["axis_50"] > 80
    assert measured["far_50"] == 0


def test_segmenting_the_default_stacks_is_no_toy():
    for seed in range(2):
        tree = grow(seed, SHAPE)
        measured = image_statistics(render(tree, SHAPE, seed=seed), tree)
        assert 0.3 < measured["dice"] < 0.65
        for name in ("axis_50", "far_50", "contrast", "near_50"):
            low, high = REAL_RANGES[name]
            assert 0.8 * low <= measured[name] <= 1.25 * high, name


def test_any_forest_renders():
    shape = (20, 50, 70)
    parts = [
        line((5, 5, 5), (60, 5, 5)),
        line((5, 40, 10), (60, 45, 30), radius=0.3),  # leaves the volume
        line((30, 20, 10), (30, 20, 10), radius=3.0, n=1),  # a single node
        line((-50, -50, -50), (-20, -20, -20)),  # outside
    ]
    xyz, radius, kind = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("xyz", "radius", "type")
    )
    parent = np.arange(len(xyz)) - 1
    parent[np.cumsum([0, *(len(part.parent) for part in parts[:-1])])] = -1
    trees = Tree(xyz, radius, kind, parent)
    for tree in (trees, take(trees, np.arange(len(xyz))[::-1])):
        measured = image_statistics(render(tree, shape, seed=4), tree)
        assert measured["contrast"] > 1.5


def test_extract_is_the_microscopes_stack_of_the_tree_moved_into_its_box():
    tree = line((300.5, 211.25, 90.75), (350.5, 219.25, 95.75), radius=1.5)
    lower, shape = extract_box(tree)
    # 300.5 - 1.5 - 16 = 283, 350.5 + 1.5 + 16 = 368, and so on, rounded outwards.
    assert ROOM == 16
    assert lower.tolist() == [283, 193, 73]
    assert shape == (114 - 73 + 1, 237 - 193 + 1, 368 - 283 + 1)
    volume, moved = render_extract(tree, "confocal", 5)
    np.testing.assert_array_equal(moved.xyz, tree.xyz - (283, 193, 73))
    np.testing.assert_array_equal(volume.data, render(moved, shape, "confocal", 5).data)
    assert volume.spacing == (1.0, 1.0, 1.0)


def test_flylight_extracts_are_slimmer_than_gold_radii_and_centred():
    tree = line((0, 0, 0), (120, 0, 0), n=200)
    volume, moved = render_extract(tree, "flylight", 3)
    thick = render(moved, volume.data.shape, "flylight", 3)
    np.testing.assert_array_equal(moved.radius, tree.radius)
    y = int(moved.xyz[0, 1])
    profiles = []
    for data in (volume.data, thick.data):
        # Median along the neurite of the projection: its middle part, without the ends.
        across = np.median(data.max(axis=0)[:, 30:-30].astype(float), axis=1)
        assert across.argmax() == y
        assert abs(across[y - 1] - across[y + 1]) < 0.2 * across[y]
        profiles.append(across / across[y])
    assert profiles[0][y + 1] < 0.85 * profiles[1][y + 1]


def test_slimmer_tubes_are_those_of_smaller_radii():
    # A stack too small for fragments of other neurites, which would be thinner.
    tree = line((5, 20, 10), (50, 25, 12), radius=3.0)
    tree.radius[::2], tree.radius[5] = 0.7, 0.1
    smaller = np.where(tree.radius == 3, 2.4, np.where(tree.radius == 0.1, 0.1, 0.25))
    expected = render(replace(tree, radius=smaller), (20, 45, 60), seed=1).data
    np.testing.assert_array_equal(render(tree, (20, 45, 60), seed=1, slimmer=0.6).data, expected)


# 2.759² of a number and of an array differ in the last digit, on some machines.
@pytest.mark.parametrize("radius", [0.1, 1.0, 2.759, 5.3])
@pytest.mark.parametrize("nodes", [1, 2])
def test_trees_of_one_node_and_of_one_radius_are_rendered(radius, nodes):
    xyz = np.array([[3.0, -8.0, 500.0], [9.0, -8.0, 500.0]])[:nodes]
    tree = Tree(xyz, np.full(nodes, radius), np.zeros(nodes, int), np.arange(nodes) - 1)
    for style in STYLES:
        volume, moved = render_extract(tree, style, 1)
        assert volume.data.shape == extract_box(tree)[1]
        x, y, z = moved.xyz[0].astype(int)
        assert volume.data[z, y, x] > np.median(volume.data)


@needs_data
def test_the_thickest_part_of_every_gold_tree_is_rendered():
    paths = sorted((DATA / "janelia_gold").glob("*.swc"))
    assert len(paths) == 32
    for path in paths:
        tree = read_swc(path)
        middle = np.rint(tree.xyz[np.argmax(tree.radius)])[::-1]
        near = np.flatnonzero((np.abs(tree.xyz[:, ::-1] - middle) <= 8).all(axis=1))
        volume, _ = render_extract(take(tree, near), "flylight", 2)
        assert volume.data.max() > 0


def test_extracts_are_not_built_of_trees_in_other_units():
    side = int(np.cbrt(MAX_VOXELS))
    with pytest.raises(SwcError, match=r"swc\.transform"):
        extract_box(line((0, 0, 0), (side, side, side)))
    assert extract_box(line((0, 0, 0), (side, side, 9)))[1][2] == side + 2 * ROOM + 3
    with pytest.raises(SwcError, match="no node"):
        extract_box(line((0, 0, 0), (1, 1, 1), n=0))


def test_calibration_tells_inside_from_outside():
    # Not at the top, because another process imports this file without notebooks.
    from neurolib.course.runs import table

    generated = [{"tips": 8.0, "dice": 0.39549, "length": 250.0}, {"tips": 400.0, "dice": 0.3}]
    rows = calibration(generated)
    assert [list(row.values()) for row in rows] == [
        ["tips", "8 to 400", "8 to 316", "recorded", "1 of 2", "above"],
        # 0.39549 is 0.395 to the recorded range's digits.
        ["dice", "0.3 to 0.395", "0.241 to 0.395", "recorded", "2 of 2", ""],
        ["length", "250 to 250", "296 to 7200", "recorded", "0 of 1", "below"],
    ]
    live = calibration(generated, [{"tips": 10.0, "mine": 1.0}, {"tips": 20.0}, {"tips": 1234.0}])
    assert list(live[0].values())[2:] == ["10 to 1230", "measured, n = 3", "1 of 2", "below"]
    assert live[1:] == rows[1:]
    both = calibration([{"dice": 0.0001234}, {"dice": 123456.0}])[0]
    assert both["generated"] == "0.000123 to 123000"
    assert both["outside"] == "below and above"
    printed = [[cell.strip() for cell in line.split("|")] for line in table(rows).splitlines()]
    assert ["", "dice", "0.3 to 0.395", "0.241 to 0.395", "recorded", "2 of 2", "", ""] in printed


@needs_data
def test_recorded_ranges_are_what_calibration_measures():
    gold = datasets.measure(DATA / "janelia_gold")
    rows = calibration(gold)
    assert {row["inside"] for row in rows} == {"32 of 32"}
    for recorded, measured in zip(rows, calibration(gold, gold), strict=True):
        assert measured["real"] == recorded["real"]
        assert measured["from"] == "measured, n = 32"


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda t: calibration([]), SettingsError),
        (lambda t: calibration([{"beauty": 1.0}]), SettingsError),
        (lambda t: render_extract(t, "cartoon"), SettingsError),
        (lambda t: render_extract(t, seed=-1), SettingsError),
        (lambda t: render_extract(replace(t, xyz=t.xyz * np.nan)), SwcError),
        (lambda t: render_extract(replace(t, radius=0 * t.radius)), SwcError),
        (lambda t: grow(-1), SettingsError),
        (lambda t: grow(0.5), SettingsError),
        (lambda t: grow("a"), SettingsError),
        (lambda t: grow(0, (10, 20, 20)), SettingsError),
        (lambda t: grow(0, (48, 192)), SettingsError),
        (lambda t: grow(0, 48), SettingsError),
        (lambda t: render(t, SMALL, "cartoon"), SettingsError),
        (lambda t: render(t, SMALL, seed=-2), SettingsError),
        (lambda t: render(t, (0, 80, 80)), SettingsError),
        (lambda t: render(replace(t, xyz=t.xyz + 1000), SMALL), SwcError),
        (lambda t: render(replace(t, xyz=t.xyz * np.nan), SMALL), SwcError),
        (lambda t: render(replace(t, radius=0 * t.radius), SMALL), SwcError),
        (lambda t: render(replace(t, parent=np.arange(len(t.parent))), SMALL), SwcError),
        (lambda t: statistics(line((0, 0, 0), (0, 0, 0), n=1)), SwcError),
        (lambda t: image_statistics(Volume(np.zeros(SMALL)), t), SettingsError),
        (lambda t: image_statistics(BLACK, replace(t, xyz=t.xyz + 1000)), SwcError),
    ],
)
def test_bad_arguments_are_one_line_errors(call, error):
    with pytest.raises(error) as caught:
        call(grow(0, SMALL))
    assert isinstance(caught.value, NeurolibError)
    assert "\n" not in str(caught.value)


@needs_data
def test_real_stack_and_its_synthetic_twin():
    path = DATA / "real3d" / "sensory_I4-2.tif"
    tree = read_swc(path.with_suffix(".swc"))
    real = Volume(tifffile.imread(path))
    twin = render(tree, real.data.shape, seed=1)
    expected, generated = image_statistics(real, tree), image_statistics(twin, tree)
    for key, (low, high) in REAL_RANGES.items():
        assert low * 0.99 - 1e-3 <= expected[key] <= high * 1.01 + 1e-3, key
    assert abs(generated["dice"] - expected["dice"]) < 0.15
    assert 0.5 < generated["contrast"] / expected["contrast"] < 2.0
