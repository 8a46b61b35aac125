"""Figures: everything is in its place, nothing is mirrored, and alternative texts survive."""

import base64
import itertools
import re

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

from neurolib.course import plotting
from neurolib.swc import Tree

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def one_voxel(shape=(6, 20, 30), at=(1, 4, 25)):
    """A volume with a single bright voxel, and a tree of one short edge through it."""
    volume = np.zeros(shape, np.float32)
    volume[at] = 1
    z, y, x = at
    xyz = np.array([[x, y, z], [x + 1, y, z]], float)
    return volume, Tree(xyz, np.ones(2), np.ones(2, int), np.array([-1, 0])), at


def test_image_and_tree_lie_on_each_other_in_every_view():
    volume, tree, (z, y, x) = one_voxel()
    figure = plotting.projections({"image": volume}, {"tree": tree})
    wanted = {(y, x), (y, z), (z, x)}  # (row, column) of the bright pixel in xy, zy, xz
    seen = set()
    for axes in figure.get_axes():
        image = axes.images[0].get_array()
        row, column = np.unravel_index(image.argmax(), image.shape)
        start = axes.collections[0].get_segments()[0][1]
        assert (start[0], start[1]) == (column, row)
        seen.add((int(row), int(column)))
    assert seen == wanted


def test_overlay_colours_what_was_found_added_and_missed():
    image = np.zeros((3, 10, 12), np.float32)
    mask, target = np.zeros_like(image, bool), np.zeros_like(image, bool)
    mask[1, 2, 3] = target[1, 2, 3] = True
    mask[1, 5, 6] = True
    target[1, 8, 9] = True
    figure = plotting.overlay(image, mask, target)
    rgb = figure.get_axes()[0].images[0].get_array()
    for place, colour in (((2, 3), "BLUE"), ((5, 6), "ORANGE"), ((8, 9), "PURPLE")):
        expected = matplotlib.colors.to_rgb(getattr(plotting, colour))
        assert tuple(rgb[place]) == pytest.approx(expected)
    assert not rgb[0, 0].any()


@pytest.mark.parametrize(("pixels", "length"), [(100, 20), (114, 20), (1024, 200), (30, 5)])
def test_scale_bar_is_as_long_as_it_says(pixels, length):
    _, axes = plt.subplots()
    plotting.scale_bar(axes, pixels)
    (start, end) = axes.lines[0].get_xdata()
    assert axes.texts[0].get_text() == f"{length} voxels"
    assert end - start == pytest.approx(length)


def test_show_keeps_id_and_alternative_text(capsys, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    figure, _ = plt.subplots()
    plotting.show(figure, "curve", 'a "curve" <rising>', tmp_path)
    text = shown[0].data
    assert 'id="curve"' in text
    assert "a &quot;curve&quot; &lt;rising&gt;" in text
    png = base64.b64decode(re.search(r"base64,([^\"]+)", text)[1])
    assert png == (tmp_path / "curve.png").read_bytes()
    assert png.startswith(b"\x89PNG")


def test_dots_stand_side_by_side_on_each_neuron_and_the_mean_has_its_interval():
    groups = {"a": {"n1": 0.1, "n2": 0.2}, "b": {"n1": 0.3, "n2": 0.4}}
    filters = {"threshold": {"n2": 0.25, "elsewhere": 0.9}}
    figure = plotting.dots(groups, "Dice", {"a": (0.05, 0.25)}, references=filters)
    axes = figure.get_axes()[0]
    for name, values in groups.items():
        (line,) = (line for line in axes.lines if line.get_label() == name)
        assert line.get_linestyle() == "None"  # methods and neurons have no order to join
        assert line.get_ydata().tolist() == list(values.values())
        assert np.rint(line.get_xdata()).tolist() == [0, 1]
    means = [line for line in axes.lines if len(line.get_xdata()) == 1]
    assert [line.get_ydata()[0] for line in means] == pytest.approx([0.15, 0.35])
    spans = [part.get_segments()[0] for part in axes.collections]
    interval, level = spans
    assert interval[:, 0].tolist() == [means[0].get_xdata()[0]] * 2  # at its mean
    assert interval[:, 1].tolist() == [0.05, 0.25]
    assert level[:, 1].tolist() == [0.25, 0.25]
    assert np.rint(level[:, 0].mean()) == 1
    assert axes.get_ylim()[0] == 0
    filters = {"threshold": {"n1": 0.35, "n2": 0.25}}
    *_, mean = plotting.dots(groups, "Dice", references=filters).get_axes()[0].collections
    assert mean.get_segments()[0] == pytest.approx(np.array([[1.6, 0.3], [2.4, 0.3]]))


def test_panels_begin_at_zero_and_a_label_has_one_colour_in_all():
    panels = {"Dice": {"a": ([0, 4], [1.0, 0.9])}, "Hd95": {"a": ([0, 4], [0.0, np.inf])}}
    panels |= {"gain": {"b": ([0, 4], [-1, 1]), "a": ([0, 4], [0, 1])}}
    grid = plotting.curves(panels, ["side", "side", "x"]).get_axes()
    for axes, (label, lines) in zip(grid, panels.items(), strict=True):
        assert axes.get_ylabel() == label
        assert [line.get_ydata().tolist() for line in axes.lines] == [y for _, y in lines.values()]
    assert [axes.get_ylim()[0] == 0 for axes in grid] == [True, True, False]
    assert [axes.get_xlabel() for axes in grid] == ["side", "side", "x"]


def test_curves_may_be_compared_with_a_line():
    axes = plotting.curves({"y": {"a": ([0, 1], [0.5, 1.0])}}, "x", line=0.95).get_axes()[0]
    assert [list(line.get_ydata()) for line in axes.lines] == [[0.5, 1.0], [0.95, 0.95]]


def test_learning_draws_all_terms_and_the_validation():
    history = [{"step": 1, "loss": 2.0, "dice": 1.0}, {"step": 2, "loss": 1.0, "dice": 0.5}]
    history[1] |= {"validation_dice": 0.4, "threshold": 0.5}
    left, right = plotting.learning(history).get_axes()
    assert [line.get_label() for line in left.lines] == ["loss", "dice"]
    assert right.lines[0].get_ydata().tolist() == [0.4]


def test_inflated_kernel_stands_over_its_response_slice_by_slice():
    kernel = np.zeros((3, 4, 4))
    kernel[1, 2, 2] = -0.5
    *slices, bars = plotting.inflated(kernel, [0.0, 0.8, 0.1], limit=2.0).get_axes()
    for axes, part, title in zip(slices, kernel, ("-1", "+0", "+1"), strict=True):
        assert np.array_equal(axes.images[0].get_array(), part)
        assert axes.images[0].get_clim() == (-2.0, 2.0)
        assert axes.get_title() == title
    assert [bar.get_height() for bar in bars.patches] == [0.0, 0.8, 0.1]
    assert [bar.get_x() + bar.get_width() / 2 for bar in bars.patches] == [-1, 0, 1]


def test_shared_panels_have_one_scale_with_white_at_zero_where_values_are_signed():
    kernel = np.array([[-1.0, 0.0], [0.5, 2.0]])
    *panels, bar = plotting.images({"a": kernel, "b": kernel / 4}, shared=True).get_axes()
    assert [axes.images[0].get_clim() for axes in panels] == [(-2, 2)] * 2
    assert min(panels[0].images[0].to_rgba(0.0)[:3]) > 0.95
    *panels, bar = plotting.images({"a": abs(kernel)}, shared=True, cmap="viridis").get_axes()
    assert panels[0].images[0].get_clim() == (0, 2)
    assert bar.get_ylim() == (0, 2)


def test_pieces_side_by_side_differ_in_colour_and_nothing_is_white():
    rgb = plotting.categories(np.array([[0.0, 1.0, 5.0, 6.0, np.nan]]))[0]
    assert len({tuple(colour) for colour in rgb}) == 4  # the seventh piece has the second's colour
    assert rgb[4].tolist() == [1, 1, 1]


@pytest.mark.parametrize("largest", range(12))
def test_the_largest_piece_shares_its_colour_with_no_other(largest):
    numbers = np.array([[*range(12), largest, np.nan]])
    rgb = plotting.categories(numbers)[0, :12].tolist()
    assert rgb.count(rgb[largest]) == 1
    assert all(a != b for a, b in itertools.pairwise(rgb))


def test_the_drawing_of_dino_shows_each_crop_twice():
    photo = np.arange(60 * 80 * 3).reshape(60, 80, 3).astype(np.uint8)
    axes = plotting.distillation(photo, (10, 5, 40), (20, 10, 15)).get_axes()[0]
    _, large, small = (picture.get_array() for picture in axes.images)
    assert (np.asarray(large) == photo[5:45, 10:50]).all()
    assert (np.asarray(small) == photo[10:25, 20:35]).all()
    frames = [patch for patch in axes.patches if patch.get_linewidth() == 2]
    scale = 24 / 60
    assert (10 * scale, 30 - 45 * scale) in {frame.get_xy() for frame in frames}


def test_the_drawing_of_the_network_names_every_shape_and_tap():
    shapes = {"slices": (5, 100, 100), "enlarged": (5, 224, 224), "tokens": (384, 16, 16)}
    shapes |= {"decoder": (32, 100, 100), "logits": (1, 100, 100)}
    shapes["patch embedding"] = (384, 16, 17)
    for stem in ({}, {"stem": (16, 100, 100)}):
        drawn = plotting.architecture(shapes | stem, [2, 5, 8, 11]).get_axes()[0]
        words = " ".join(text.get_text() for text in drawn.texts)
        for shape in (shapes | stem).values():
            assert " × ".join(map(str, shape)) in words
        assert all(f"tap {i}" in words for i in (1, 2, 3, 4))
        assert "layers 10 to 12" in words
        assert ("stem" in words) == bool(stem)


def test_pipeline_piles_the_slices_with_the_first_in_front():
    block, kernel = np.random.default_rng(0).random((2, 3, 8, 8))
    probability, tree, _ = one_voxel()
    panels = plotting.pipeline(block, kernel, probability.max(axis=0), tree).get_axes()
    for axes, slices in zip(panels, (block, kernel), strict=False):
        drawn = [image.get_array() for image in axes.images]  # the last one hides the others
        assert all(map(np.array_equal, drawn, slices[::-1]))
    assert panels[3].collections[0].get_segments()
