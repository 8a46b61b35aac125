"""All figures of the course: arrays go in, figures come out.

Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart; images use
grey and *viridis*. `show` displays a figure with its id and a text for those who cannot see it.
"""

import base64
import html
import importlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from neurolib.files import atomic_path
from neurolib.swc import Tree, edges

BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
RED, PURPLE, SKY, BLACK = "#D55E00", "#CC79A7", "#56B4E9", "#000000"
CYCLE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK)
DPI = 80
Spacing = tuple[float, float, float]

# Three projections of a (z, y, x) volume: the axes down, across, and into the page.
VIEWS = {"xy": (1, 2, 0), "zy": (1, 0, 2), "xz": (0, 2, 1)}


def show(figure: Figure, name: str, alt: str, folder: str | Path | None = None) -> None:
    """Display a figure with an id and an alternative text, write it as PNG, and close it.

    `name` is unique in its notebook; the PNG is ``<name>.png`` in `folder`, if given. `alt` says
    what the figure shows; unlike the metadata of an image output it survives conversion to HTML.
    """
    from IPython.display import HTML, display

    data = png(figure)
    keep(data, name, folder)
    display(HTML(markup(data, name, alt)))


def png(figure: Figure) -> bytes:
    """Turn a figure into PNG and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def keep(data: bytes, name: str, folder: str | Path | None) -> None:
    """Write a PNG to ``<folder>/<name>.png``, if a folder is given."""
    if folder is not None:
        with atomic_path(Path(folder) / f"{name}.png") as temporary:
            temporary.write_bytes(data)


def markup(data: bytes, name: str, alt: str) -> str:
    """A PNG as self-contained HTML, with id and alternative text."""
    return (
        f'<figure id="{html.escape(name)}"><img style="max-width:100%" alt="{html.escape(alt)}" '
        f'src="data:image/png;base64,{base64.b64encode(data).decode()}"></figure>'
    )


def projections(
    layers: Mapping[str, np.ndarray], trees: Mapping[str, Tree] | None = None
) -> Figure:
    """Maximum projections of volumes along z, x and y, with trees drawn over them.

    `layers` (title: array) are side by side; `trees` (label: Tree) are drawn over each.
    """
    groups = {title: trees or {} for title in layers}
    colours = dict(zip(trees or {}, CYCLE[1:], strict=False))
    return _trees_over(layers, groups, colours, (1.0, 1.0, 1.0), 1.0)


# The parts of `neurolib.course.robustness.agreement`, in the colours of `overlay`.
JUDGED = {"correct": SKY, "false": ORANGE, "missed": PURPLE}


def judged(
    image: np.ndarray, groups: Mapping[str, Mapping[str, Tree]], spacing: Spacing = (1.0, 1.0, 1.0)
) -> Figure:
    """Trees over three projections of their image: correct, false and missed parts.

    `groups` maps a title to a result of `neurolib.course.robustness.agreement`.
    """
    return _trees_over(dict.fromkeys(groups, image), groups, JUDGED, spacing, 0.5)


def _trees_over(layers, groups, colours, spacing: Spacing, brightness: float) -> Figure:
    shape = next(iter(layers.values())).shape
    figure, panels = _views(shape, spacing, len(layers))
    for (title, volume), views in zip(layers.items(), panels, strict=True):
        for view, axes in views.items():
            down, across, along = VIEWS[view]
            grey = _project(volume.max(axis=along), view).astype(np.float32)
            top = max(1e-6, float(grey.max())) / brightness
            aspect = spacing[down] / spacing[across]
            axes.imshow(grey, cmap="gray", vmin=0, vmax=top, aspect=aspect, interpolation="nearest")
            for label, tree in groups[title].items():
                draw_tree(axes, tree, down, across, colours[label], label, 1.5)
        views["xy"].set_title(title, fontsize=9)
        scale_bar(views["xy"], shape[2])
        if groups[title]:
            views["xy"].legend(loc="lower right", fontsize=7, framealpha=0.8)
    return figure


def _views(
    shape: tuple[int, int, int], spacing: Spacing, count: int
) -> tuple[Figure, list[dict[str, Axes]]]:
    """A figure with `count` groups of three views: xy, zy right of it, xz below it."""
    z, y, x = (size * step for size, step in zip(shape, spacing, strict=True))
    scale = (5.2 if count == 1 else 4.2) / max(x + z, y + z)
    figure = plt.figure(figsize=(count * (scale * (x + z) + 0.4), scale * (y + z) + 0.6))
    groups = []
    for part in np.atleast_1d(figure.subfigures(1, count)):
        ratios = {"width_ratios": (x, z), "height_ratios": (y, z)}
        grid = part.add_gridspec(2, 2, **ratios, wspace=0.03, hspace=0.03)
        places = {"xy": grid[0, 0], "zy": grid[0, 1], "xz": grid[1, 0]}
        views = {view: part.add_subplot(place) for view, place in places.items()}
        for view, axes in views.items():
            bare(axes)
            axes.set_anchor("NW")
            if view != "xy":
                axes.set_xlabel(view, fontsize=7, labelpad=1)
        groups.append(views)
    return figure, groups


def _project(image: np.ndarray, view: str) -> np.ndarray:
    """A projection (in the order of its volume's axes) with `down` first."""
    down, across, _ = VIEWS[view]
    return np.swapaxes(image, 0, 1) if down > across else image


def draw_tree(
    axes: Axes, tree: Tree, down: int, across: int, colour: str, label: str = "", width: float = 1.0
) -> None:
    """Draw a tree's edges into a projection; `down`, `across` are axes of (z, y, x)."""
    lines = tree.xyz[:, [2 - across, 2 - down]][np.stack(edges(tree), axis=1)]
    axes.add_collection(LineCollection(lines, colors=colour, linewidths=width, label=label))


def tree_3d(
    trees: Mapping[str, Tree], spacing: Spacing = (1.0, 1.0, 1.0), unit: str = "voxels"
) -> Figure:
    """Trees in a 3D box that fills the picture, with z upwards and equal scales.

    `spacing` (z, y, x) is in `unit`.
    """
    from mpl_toolkits.mplot3d.art3d import Line3DCollection

    figure = plt.figure(figsize=(8, 4.8))
    axes = figure.add_axes((0, 0, 1, 1), projection="3d", proj_type="ortho")
    points = {label: tree.xyz * np.asarray(spacing)[::-1] for label, tree in trees.items()}
    for (label, tree), colour in zip(trees.items(), CYCLE, strict=False):
        lines = points[label][np.stack(edges(tree), axis=1)]
        axes.add_collection(Line3DCollection(lines, colors=colour, linewidths=1.8, label=label))
    every = np.concatenate(list(points.values()))
    low, high = every.min(0), every.max(0)
    axes.set(xlim=(low[0], high[0]), ylim=(high[1], low[1]), zlim=(low[2], high[2]))
    axes.set_box_aspect(np.maximum(high - low, 1), zoom=1.25)
    axes.view_init(elev=40, azim=-70)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_major_locator(plt.MultipleLocator(20))
    axes.set(xlabel=f"x, {unit}", ylabel=f"y, {unit}", zlabel=f"z, {unit}")
    axes.legend(loc="upper left", fontsize=8)
    return figure


def overlay(
    image: np.ndarray, mask: np.ndarray, target: np.ndarray, spacing: Spacing = (1.0, 1.0, 1.0)
) -> Figure:
    """Prediction and target in three projections.

    A pixel has the most frequent colour along its line of sight.
    """
    classes = {
        "both": (mask & target, BLUE),
        "predicted only": (mask & ~target, ORANGE),
        "missed": (target & ~mask, PURPLE),
    }
    figure, (views,) = _views(image.shape, spacing, 1)
    for view, axes in views.items():
        down, across, along = VIEWS[view]
        grey = _project(image.max(axis=along), view).astype(float)
        rgb = np.repeat(0.6 * (grey / max(1e-6, grey.max()))[..., None], 3, axis=2)
        counts = np.stack([_project(part.sum(axis=along), view) for part, _ in classes.values()])
        for number, (_, colour) in enumerate(classes.values()):
            rgb[(counts.argmax(axis=0) == number) & counts.any(axis=0)] = to_rgb(colour)
        axes.imshow(rgb, interpolation="nearest", aspect=spacing[down] / spacing[across])
    scale_bar(views["xy"], image.shape[2])
    _squares(views["xy"], {name: colour for name, (_, colour) in classes.items()})
    return figure


def images(
    panels: Mapping[str, np.ndarray],
    columns: int = 5,
    cmap: str = "gray",
    shared: bool = False,
    bar: bool = False,
    label: str = "",
) -> Figure:
    """A row-wise grid of 2D arrays (y, x) or (y, x, 3) with titles.

    `shared`: one range of values and a colour bar, named `label`, for all arrays (y, x); it starts
    at zero, or is symmetric around zero on a diverging map if any value is negative. `bar`: a
    scale bar in voxels.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    size = (2.3 * columns, 2.5 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    limits = {}
    if shared:
        values = [np.asarray(panel) for panel in panels.values() if np.ndim(panel) == 2]
        top = max(float(np.abs(panel).max()) for panel in values)
        signed = min(float(panel.min()) for panel in values) < 0
        limits = {"vmin": -top if signed else 0, "vmax": top}
        cmap = "RdBu" if signed else cmap
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for axes, (title, panel) in zip(grid.flat, panels.items(), strict=False):
        drawn = axes.imshow(panel, cmap=cmap, interpolation="nearest", **limits)
        if np.ndim(panel) == 2:
            picture = drawn
        bare(axes, title)
        if bar:
            scale_bar(axes, panel.shape[1])
    if shared:
        figure.colorbar(picture, ax=grid, shrink=0.6, pad=0.02, aspect=30, label=label)
    return figure


def layered(
    image: np.ndarray, masks: Mapping[str, np.ndarray], z: int, spacing: Spacing = (1.0, 1.0, 1.0)
) -> Figure:
    """Slice z of a volume (z, y, x) in [0, 1], alone and under coloured masks."""
    size = (9, 4.7 * image.shape[1] / image.shape[2])
    figure, (left, right) = plt.subplots(1, 2, figsize=size, layout="constrained")
    colours = dict(zip(masks, (SKY, ORANGE, PURPLE), strict=False))
    plain, mixed = grey(image[z]), grey(image[z])
    for name, mask in masks.items():
        mixed[mask[z]] = 0.35 * mixed[mask[z]] + 0.65 * np.array(to_rgb(colours[name]))
    titles = (f"slice {z}", f"with {', '.join(masks)}")
    for axes, rgb, title in zip((left, right), (plain, mixed), titles, strict=True):
        axes.imshow(rgb, interpolation="nearest", aspect=spacing[1] / spacing[2])
        bare(axes, title)
        scale_bar(axes, image.shape[2])
    _squares(right, colours)
    return figure


def blocks(
    image: np.ndarray, mask: np.ndarray, grid: np.ndarray, chosen: np.ndarray, z: int
) -> Figure:
    """Slice z with its target in blue and outlines of its blocks, the chosen ones in orange.

    `grid` and `chosen` (n, 3): centre slice, first row and first column of each block.
    """
    figure, axes = plt.subplots(figsize=(5, 5 * image.shape[1] / image.shape[2]))
    rgb = grey(image[z])
    rgb[mask[z]] = to_rgb(SKY)
    axes.imshow(rgb, interpolation="nearest")
    for places, colour, width in ((grid, "white", 0.5), (chosen, ORANGE, 2.0)):
        for _, y, x in places[places[:, 0] == z]:
            # Slightly smaller than the block, because neighbours may overlap.
            _frame(axes, x + 1, y + 1, 97, 97, ec=colour, lw=width)
    bare(axes, f"slice {z}")
    scale_bar(axes, image.shape[2])
    return figure


ARROW = {"arrowstyle": "-|>", "color": BLACK, "shrinkA": 0, "shrinkB": 0}


def pipeline(block: np.ndarray, kernel: np.ndarray, probability: np.ndarray, tree: Tree) -> Figure:
    """The course in a row: block (D, h, w), inflated kernel (D, p, p), probability (y, x), tree.

    Block and kernel are piles of slices.
    """
    figure, panels = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained")
    limit = float(np.abs(kernel).max())
    figure.get_layout_engine().set(wspace=0.16)  # room for the arrows
    _pile(panels[0], block, "gray", 0, 1, 0.14)
    _pile(panels[1], kernel, "RdBu", -limit, limit, 0.4)
    panels[2].imshow(probability, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    panels[3].imshow(np.zeros_like(probability), cmap="gray", vmin=0, vmax=1)
    draw_tree(panels[3], tree, 1, 2, ORANGE, width=1.5)
    titles = ("01 block", "02 inflated kernel", "03 and 04 probability", "05 tree")
    for axes, title in zip(panels, titles, strict=True):
        bare(axes, title)
    for axes in panels[:3]:
        place = {"xycoords": "axes fraction", "annotation_clip": False}
        axes.annotate("", (1.14, 0.5), (1.02, 0.5), arrowprops=ARROW, **place)
    return figure


def _pile(axes: Axes, slices: np.ndarray, cmap: str, low: float, high: float, step: float) -> None:
    """Slices (D, h, w), the first in front, the others shifted up and right by `step` each."""
    depth, h, w = slices.shape
    for z in reversed(range(depth)):
        shift = step * z
        extent = (shift * w, (1 + shift) * w, (1 - shift) * h, -shift * h)
        look = {"cmap": cmap, "vmin": low, "vmax": high, "interpolation": "nearest"}
        axes.imshow(slices[z], extent=extent, **look)
        _frame(axes, extent[0], extent[3], w, h, ec="0.6", lw=1.2)
    top = step * (depth - 1)
    axes.set(xlim=(0, (1 + top) * w), ylim=(h, -top * h))
    axes.set_frame_on(False)


def architecture(shapes: Mapping[str, Sequence[int]], taps: Sequence[int]) -> Figure:
    """The network from a block to its logits, with the four taps and the shape of every stage.

    `shapes` has ``slices``, ``enlarged``, ``patch embedding``, ``tokens``, ``decoder``, ``logits``,
    and perhaps ``contrast`` and ``stem``; `taps` are the transformer blocks, from 0, whose tokens
    the decoder takes.
    """
    figure, axes = plt.subplots(figsize=(11, 4.6), layout="constrained")
    axes.set(xlim=(0, 110), ylim=(0, 46))
    axes.axis("off")

    def box(x: float, y: float, text: str, stage: str, colour: str, width: float = 13) -> None:
        axes.add_patch(plt.Rectangle((x, y), width, 9, fc=colour, ec=BLACK, alpha=0.35))
        shape = " × ".join(map(str, shapes[stage])) if stage in shapes else stage
        for line, height, size in ((text, 5.8, 9), (shape, 2.4, 8)):
            axes.text(x + width / 2, y + height, line, ha="center", va="center", fontsize=size)

    def arrows(*steps: tuple[float, float, float, float]) -> None:
        for x, y, to_x, to_y in steps:
            axes.annotate("", (to_x, to_y), (x, y), arrowprops=ARROW)

    box(0, 34, "block", "slices", "white")
    box(18, 34, "contrast,\nenlarged" if "contrast" in shapes else "enlarged", "enlarged", "white")
    box(36, 34, "inflated patch\nembedding", "patch embedding", ORANGE)
    arrows((13, 38.5, 18, 38.5), (31, 38.5, 36, 38.5), (49, 38.5, 53, 38.5))
    first = 0
    for number, tap in enumerate(taps):
        x = 53 + 14.5 * number
        box(x, 34, f"layers {first + 1} to {tap + 1}", "attention, MLP", SKY, 12)
        arrows((x + 6, 34, x + 6, 26))
        axes.text(x + 6.8, 30, f"tap {number + 1}", fontsize=8, va="center")
        if number:
            arrows((x - 2.5, 38.5, x, 38.5))
        first = tap + 1
    fused = "decoder: the taps at 4, 2, 1 and 1/2 times their grid, added and fused"
    box(53, 17, fused, "decoder", GREEN, 55.5)
    tokens = " × ".join(map(str, shapes["tokens"]))
    axes.text(80, 44.5, f"tokens at each tap: {tokens}", ha="center", fontsize=9)
    box(74, 2, "head", "two convolutions", PURPLE)
    box(95, 2, "logits", "logits", "white", 13.5)
    arrows((80.5, 17, 80.5, 11), (87, 6.5, 95, 6.5))
    if "stem" in shapes:
        box(18, 2, "stem: a small U-Net", "stem", BLUE, 20)
        arrows((6.5, 34, 6.5, 6.5), (6.5, 6.5, 18, 6.5), (38, 6.5, 74, 6.5))
    return figure


def distillation(photo: np.ndarray, large: Sequence[int], small: Sequence[int]) -> Figure:
    """How DINO learns from a photo (y, x, 3): two crops (x, y, side), two copies of a network."""
    figure, axes = plt.subplots(figsize=(10.5, 3.6), layout="constrained")
    axes.axis("off")

    def picture(pixels: np.ndarray, left: float, low: float, high: float, colour: str) -> None:
        width = (high - low) * pixels.shape[1] / pixels.shape[0]
        axes.imshow(pixels, extent=(left, left + width, low, high), aspect="equal", zorder=1)
        _frame(axes, left, low, width, high - low, ec=colour, lw=2, zorder=2)

    scale = 24 / photo.shape[0]
    picture(photo, 0, 6, 30, "white")
    rows = (
        (large, BLUE, 20, "teacher", "description\nof the large crop"),
        (small, ORANGE, 2, "student", "description\nof the small crop"),
    )
    for (x, y, side), colour, low, network, answer in rows:
        width = side * scale
        _frame(axes, x * scale, 30 - y * scale - width, width, width, ec=colour, lw=2, zorder=3)
        picture(photo[y : y + side, x : x + side], 43, low, low + 14, colour)
        axes.add_patch(plt.Rectangle((64, low + 3), 14, 8, fc=colour, ec=BLACK, alpha=0.35))
        axes.text(71, low + 7, network, ha="center", va="center", fontsize=9)
        axes.text(85, low + 7, answer, va="center", fontsize=9)
        for start, end in ((57.5, 63.5), (78.5, 84.5)):
            axes.annotate("", (end, low + 7), (start, low + 7), arrowprops=ARROW)
    axes.annotate("", (71, 22.5), (71, 13.5), arrowprops=ARROW | {"ls": "--"})
    axes.text(72, 18, "running average", va="center", fontsize=8)
    axes.annotate("", (92, 13.5), (92, 22.5), arrowprops=ARROW | {"color": RED})
    axes.text(93, 18, "must match", va="center", fontsize=8, color=RED)
    axes.set(xlim=(-0.5, 105), ylim=(0, 36))
    return figure


def colour_kernel(weight: np.ndarray) -> np.ndarray:
    """A patch kernel (3, p, p) as an RGB image (p, p, 3), zero in the middle of the range."""
    kernel = np.moveaxis(np.asarray(weight), 0, -1)
    return 0.5 + 0.5 * kernel / np.abs(kernel).max()


def curves(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    xlabel: str | Sequence[str],
    line: float | None = None,
) -> Figure:
    """Panels of lines side by side, with the same order of colours and marks in all of them.

    `panels` maps a y label to lines (label: (x, y)); `xlabel` may list one per panel. An axis
    begins at zero if no value is negative. A dashed `line` is drawn for comparison.
    """
    wide = {1: 6.5, 2: 5.0}.get(len(panels), 2.6)
    size = (wide * len(panels), 3.4)
    figure, grid = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    words = [xlabel] * len(panels) if isinstance(xlabel, str) else xlabel
    for axes, (ylabel, lines), under in zip(grid[0], panels.items(), words, strict=True):
        looks = zip(CYCLE, "os^DvPX", strict=True)
        for (label, (x, y)), (colour, mark) in zip(lines.items(), looks, strict=False):
            few = {"marker": mark, "ms": 4} if len(x) < 20 else {}
            axes.plot(x, y, color=colour, label=label, lw=1.5, **few)
        if line is not None:
            axes.axhline(line, color=BLACK, lw=1, ls="--")
        axes.set(xlabel=under, ylabel=ylabel)
        if all(float(at).is_integer() for x, _ in lines.values() for at in x):
            axes.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
        if axes.dataLim.ymin >= 0:
            axes.set_ylim(bottom=0)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    if len(panels) > 2:
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)
    elif any(labels):
        grid[0, 0].legend(frameon=False, fontsize=8)
    return _open(figure)


def learning(history: Sequence[Mapping[str, float]]) -> Figure:
    """Loss, its terms, and Dice on validation blocks, from rows of `neurolib.training.train`."""
    terms = [key for key in history[0] if key not in ("step", "validation_dice", "threshold")]
    steps = [row["step"] for row in history]
    losses = {term: (steps, [row[term] for row in history]) for term in terms}
    checks = [row for row in history if "validation_dice" in row]
    dice = [row["step"] for row in checks], [row["validation_dice"] for row in checks]
    return curves({"loss": losses, "Dice, validation blocks": {"": dice}}, "step")


def dots(
    groups: Mapping[str, Mapping[str, float]],
    ylabel: str,
    intervals: Mapping[str, tuple[float, float]] | None = None,
    line: float | None = None,
    references: Mapping[str, Mapping[str, float]] | None = None,
) -> Figure:
    """Methods side by side on each neuron, and their means with intervals.

    `groups` maps a method to its value on each neuron, drawn as a dot; `references` does so for
    methods to beat, drawn as lines. `intervals` belong to the methods' means. `line` is a value to
    compare with, such as zero for differences; without it, the axis begins at zero.
    """
    references = references or {}
    both = [*groups.values(), *references.values()]
    neurons = list(dict.fromkeys(n for values in groups.values() for n in values))
    figure, axes = plt.subplots(figsize=(1.5 * len(neurons) + 4.5, 3.8), layout="constrained")
    places = np.linspace(-1, 1, len(groups)) * min(0.28, 0.07 * len(groups) - 0.07)
    looks = zip(places, CYCLE * 3, "o" * 7 + "s" * 7 + "^" * 7, strict=False)
    for (name, values), (place, colour, mark) in zip(groups.items(), looks, strict=False):
        at = [neurons.index(neuron) + place for neuron in values]
        axes.plot(at, list(values.values()), mark, color=colour, ms=6, label=name)
        end, mean = len(neurons) + place, float(np.mean(list(values.values())))
        axes.plot([end], [mean], mark, color=colour, ms=8, mec=BLACK)
        if intervals and name in intervals:
            axes.vlines(end, *intervals[name], color=colour, lw=2, zorder=1)
    for (name, values), style in zip(references.items(), ("--", ":", "-."), strict=False):
        levels = [values.get(neuron, np.nan) for neuron in neurons]
        # The mean is NaN if a neuron has no value.
        for at, level in enumerate([*levels, np.mean(levels)]):
            if np.isfinite(level):
                axes.hlines(level, at - 0.4, at + 0.4, color="0.35", ls=style)
        axes.plot([], [], color="0.35", ls=style, label=name)
    axes.axvline(len(neurons) - 0.5, color="0.8", lw=0.8)
    if line is not None:
        axes.axhline(line, color="0.6", lw=0.8, zorder=0)
    elif all(value >= 0 for values in both for value in values.values()):
        axes.set_ylim(bottom=0)
    labels = [neuron.replace("_", "\n", 1) for neuron in neurons]
    axes.set_xticks(range(len(neurons) + 1), [*labels, "mean"], fontsize=8)
    axes.set(ylabel=ylabel, xlim=(-0.5, len(neurons) + 0.5))
    axes.legend(fontsize=8.5, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return _open(figure)


def _frame(axes: Axes, x: float, y: float, width: float, height: float, **look) -> None:
    """Draw an empty rectangle with its corner at (x, y)."""
    axes.add_patch(plt.Rectangle((x, y), width, height, fill=False, **look))


def bare(axes: Axes, title: str = "") -> None:
    """Remove the ticks and set a small title."""
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=9)


def _open(figure: Figure) -> Figure:
    """Remove the lines at the top and on the right of all axes."""
    for axes in figure.get_axes():
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _squares(axes: Axes, colours: Mapping[str, str]) -> None:
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    axes.legend(handles, colours, loc="lower right", fontsize=7)


def grey(plane: np.ndarray) -> np.ndarray:
    """A slice (y, x) with values in [0, 1] as RGB (y, x, 3)."""
    return np.repeat(np.clip(plane, 0, 1)[..., None].astype(float), 3, axis=2)


def scale_bar(axes: Axes, pixels: int, on_white: bool = False) -> None:
    """A labelled bar of a round length in voxels, about a fifth of the image."""
    power = 10.0 ** np.floor(np.log10(pixels / 5))
    length = max(step * power for step in (1, 2, 5) if step * power <= pixels / 5)
    start, across = axes.get_xlim()[0] + 0.04 * pixels, axes.get_xaxis_transform()
    colour, around = ("black", "white") if on_white else ("white", "0.3")
    rim = [patheffects.withStroke(linewidth=2, foreground=around)]
    look = {"color": colour, "transform": across, "path_effects": rim}
    axes.plot([start, start + length], [0.04, 0.04], lw=3, solid_capstyle="butt", **look)
    axes.text(start, 0.06, f"{length:g} voxels", fontsize=7, va="bottom", **look)


def inflated(kernel: np.ndarray, response: Sequence[float], limit: float) -> Figure:
    """The slices of an inflated kernel, and below each the response to a tube in that slice.

    A response of 1 equals the 2D kernel's; colours go from -limit to limit.
    """
    depth = len(kernel)
    # One size for all depths: a picture with a slider must not jump.
    figure = plt.figure(figsize=(8, 3.6), layout="constrained")
    grid = figure.add_gridspec(2, depth, height_ratios=(1, 1.4))
    for z, part in enumerate(kernel):
        axes = figure.add_subplot(grid[0, z])
        axes.imshow(part, cmap="RdBu", vmin=-limit, vmax=limit, interpolation="nearest")
        bare(axes, f"{z - depth // 2:+d}")
    axes = figure.add_subplot(grid[1, :])
    axes.bar(np.arange(depth) - depth // 2, response, width=0.5, color=BLUE)
    axes.axhline(1, color=BLACK, lw=1, ls="--")
    axes.text(0.01, 1, "2D", va="bottom", fontsize=8, transform=axes.get_yaxis_transform())
    axes.set(xlabel="slice in which the tube lies", ylabel="response", xlim=(-depth / 2, depth / 2))
    axes.set_ylim(0, 1.15 * max(1, *response))
    axes.set_xticks(np.arange(depth) - depth // 2)
    return _open(figure)


def categories(labels: np.ndarray) -> np.ndarray:
    """Integers (y, x) as colours (y, x, 3), different for successive numbers; NaN is white.

    The most frequent number has a colour of its own.
    """
    numbers = np.nan_to_num(labels, nan=-1).astype(int)
    counts = np.bincount(numbers[numbers >= 0], minlength=1)
    places = np.where(numbers == counts.argmax(), 0, 1 + numbers % 5)
    colours = np.array([*map(to_rgb, CYCLE[:6]), (1, 1, 1)])
    return colours[np.where(numbers < 0, 6, places)]


def zoomed(
    plane: np.ndarray,
    centre: tuple[float, float],
    lines: Mapping[str, Sequence[np.ndarray]] | None = None,
    label: str = "",
    size: int = 64,
) -> Figure:
    """A projection without its empty margin, an enlarged window of it, and lines over both.

    `plane` holds colours (y, x, 3), values with a colour bar if `label` names them, or a mask,
    drawn in light grey on white. `lines` maps a label to arrays (m, 2) of y, x.
    """
    figure, panels = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    look = {"cmap": plt.get_cmap("viridis").with_extremes(bad="white")}
    seen = np.isfinite(plane) if label else plane > 0
    if plane.ndim == 3:
        look, seen = {}, (plane < 1).any(axis=2)
    elif not label:
        look = {"cmap": "gray_r", "vmin": 0, "vmax": 4 * max(1e-6, float(plane.max()))}
    first = [
        float(np.clip(middle - size / 2, 0, max(0, side - size)))
        for middle, side in zip(centre, plane.shape[:2], strict=True)
    ]
    for axes, width in zip(panels, (1.5, 3.0), strict=True):
        picture = axes.imshow(plane, interpolation="nearest", **look)
        for (name, parts), colour in zip((lines or {}).items(), (BLUE, RED, GREEN), strict=False):
            flat = [part[:, ::-1] for part in parts]
            axes.add_collection(LineCollection(flat, colors=colour, linewidths=width, label=name))
    (whole, window), (top, left) = panels, first
    bare(whole, "whole")
    bare(window, "window")
    _frame(whole, left - 0.5, top - 0.5, size, size, ec="0.5", lw=1.5)
    rows, columns = np.nonzero(seen)
    if len(rows):
        low, high = np.minimum((rows.min(), columns.min()), first), (rows.max(), columns.max())
        high = np.maximum(high, np.add(first, size))
        whole.set(xlim=(low[1] - 3, high[1] + 3), ylim=(high[0] + 3, low[0] - 3))
    window.set(xlim=(left - 0.5, left + size - 0.5), ylim=(top + size - 0.5, top - 0.5))
    scale_bar(window, size, on_white=True)
    if lines:
        window.legend(loc="upper right", fontsize=8)
    if label:
        figure.colorbar(picture, ax=panels, label=label, shrink=0.8)
    return figure


def scene(image: np.ndarray, trees: Mapping[str, Tree], spacing: Spacing = (1.0, 1.0, 1.0)):
    """A volume (z, y, x) in [0, 1] and its trees in a k3d view; None if k3d is not installed."""
    try:
        k3d = importlib.import_module("k3d")
    except ImportError:
        return None
    step = np.asarray(spacing)[::-1]
    # From half a voxel before the first centre to half a voxel beyond the last one.
    bounds = np.stack([-step / 2, (np.array(image.shape[::-1]) - 0.5) * step], axis=1).ravel()
    plot = k3d.plot()
    plot += k3d.volume(
        image.astype(np.float16), bounds=bounds.tolist(), color_range=[0.15, 1], name="image"
    )
    for (label, tree), colour in zip(trees.items(), CYCLE[1:], strict=False):
        plot += k3d.lines(
            (tree.xyz * step).astype(np.float32),
            np.stack(edges(tree), axis=1).astype(np.uint32),
            indices_type="segment",
            color=int(colour[1:], 16),
            width=0.5 * min(spacing),
            name=label,
        )
    return plot
