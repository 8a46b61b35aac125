"""Every figure of the course, with one look: what to draw comes in as arrays, figures come out.

Colours are those of Okabe and Ito (2008), told apart by colour-blind readers; images use grey
and *viridis*. `show` displays a figure with its id and a text for those who cannot see it.
"""

import base64
import html
import importlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from neurolib.files import atomic_path
from neurolib.swc import Tree

BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
RED, PURPLE, SKY, BLACK = "#D55E00", "#CC79A7", "#56B4E9", "#000000"
CYCLE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK)
DPI = 80

# Three projections of a (z, y, x) volume: the axes that go down, across, and into the page.
VIEWS = {"xy": (1, 2, 0), "zy": (1, 0, 2), "xz": (0, 2, 1)}


def show(figure: Figure, name: str, alt: str, folder: str | Path | None = None) -> None:
    """Display a figure with an id and an alternative text; keep it as PNG where asked.

    Parameters
    ----------
    figure : matplotlib Figure
        Closed afterwards.
    name : str
        Id of the figure, unique in its notebook; also its file name.
    alt : str
        What the figure shows, for readers who cannot see it. Unlike the metadata of an image
        output it survives the conversion of a notebook to HTML.
    folder : path, optional
        Where ``<name>.png`` is written.
    """
    from IPython.display import HTML, display

    data = png(figure)
    keep(data, name, folder)
    display(HTML(markup(data, name, alt)))


def png(figure: Figure) -> bytes:
    """A figure as PNG; the figure is closed."""
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
    """A PNG as HTML that needs no other file, with id and alternative text."""
    return (
        f'<figure id="{html.escape(name)}"><img style="max-width:100%" alt="{html.escape(alt)}" '
        f'src="data:image/png;base64,{base64.b64encode(data).decode()}"></figure>'
    )


def projections(
    layers: Mapping[str, np.ndarray],
    trees: Mapping[str, Tree] | None = None,
) -> Figure:
    """Maximum projections of volumes along z, x and y, with trees drawn over them.

    Parameters
    ----------
    layers : mapping of title to (z, y, x) array
        Side by side, grey values in [0, 1] or bool, all of one shape.
    trees : mapping of label to Tree, optional
        Drawn over every layer, each in a colour of its own.
    """
    trees = trees or {}
    shape = next(iter(layers.values())).shape
    figure, panels = _views(shape, (1.0, 1.0, 1.0), len(layers))
    for (title, volume), views in zip(layers.items(), panels, strict=True):
        for view, axes in views.items():
            down, across, along = VIEWS[view]
            image = _project(volume.max(axis=along), view)
            _draw_image(axes, image.astype(np.float32), 1.0)
            for (label, tree), colour in zip(trees.items(), CYCLE[1:], strict=False):
                draw_tree(axes, tree, down, across, colour, label)
        views["xy"].set_title(title, fontsize=9)
        scale_bar(views["xy"], shape[2], 1.0, "voxels")
        if trees:
            views["xy"].legend(loc="lower right", fontsize=7, framealpha=0.8)
    return figure


def _views(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], count: int
) -> tuple[Figure, list[dict[str, Axes]]]:
    """A figure with `count` groups of three views: xy, zy right of it, xz below it."""
    z, y, x = (size * step for size, step in zip(shape, spacing, strict=True))
    scale = (5.2 if count == 1 else 4.2) / max(x + z, y + z)
    figure = plt.figure(figsize=(count * (scale * (x + z) + 0.4), scale * (y + z) + 0.6))
    groups = []
    for part in np.atleast_1d(figure.subfigures(1, count)):
        grid = part.add_gridspec(
            2, 2, width_ratios=(x, z), height_ratios=(y, z), wspace=0.03, hspace=0.03
        )
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


def _draw_image(axes: Axes, image: np.ndarray, aspect: float) -> None:
    top = max(1e-6, float(image.max()))
    axes.imshow(image, cmap="gray", vmin=0, vmax=top, aspect=aspect, interpolation="nearest")


def draw_tree(
    axes: Axes, tree: Tree, down: int, across: int, colour: str, label: str = "", width: float = 1.0
) -> None:
    """Draw a tree's edges into a projection; `down`, `across` are axes of (z, y, x)."""
    child = np.flatnonzero(tree.parent >= 0)
    flat = tree.xyz[:, [2 - across, 2 - down]]
    lines = np.stack([flat[child], flat[tree.parent[child]]], axis=1)
    axes.add_collection(LineCollection(lines, colors=colour, linewidths=width, label=label))


def tree_3d(trees: Mapping[str, Tree], spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)):
    """Trees in a 3D box, z upwards, equal scales on the three axes."""
    from mpl_toolkits.mplot3d.art3d import Line3DCollection

    figure = plt.figure(figsize=(7, 6), layout="constrained")
    axes = figure.add_subplot(projection="3d")
    scale = np.asarray(spacing)[::-1]
    points = []
    for (label, tree), colour in zip(trees.items(), CYCLE, strict=False):
        xyz = tree.xyz * scale
        child = np.flatnonzero(tree.parent >= 0)
        lines = np.stack([xyz[child], xyz[tree.parent[child]]], axis=1)
        axes.add_collection(Line3DCollection(lines, colors=colour, linewidths=1, label=label))
        points.append(xyz)
    low, high = np.concatenate(points).min(0), np.concatenate(points).max(0)
    axes.set(xlim=(low[0], high[0]), ylim=(high[1], low[1]), zlim=(low[2], high[2]))
    axes.set_box_aspect(np.maximum(high - low, 1))
    axes.set(xlabel="x", ylabel="y", zlabel="z")
    axes.legend(loc="upper left", fontsize=8)
    return figure


def overlay(
    image: np.ndarray,
    mask: np.ndarray,
    target: np.ndarray,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Figure:
    """Prediction against target in three projections.

    Blue: both; orange: predicted only; purple: missed. A projected pixel has the colour of which
    there is most along its line of sight.
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
            rgb[(counts.argmax(axis=0) == number) & counts.any(axis=0)] = _rgb(colour)
        axes.imshow(rgb, interpolation="nearest", aspect=spacing[down] / spacing[across])
    scale_bar(views["xy"], image.shape[2], 1.0, "voxels")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for _, colour in classes.values()]
    views["xy"].legend(handles, classes, loc="lower right", fontsize=7)
    return figure


def images(
    panels: Mapping[str, np.ndarray],
    columns: int = 5,
    cmap: str = "gray",
    shared: bool = False,
    bar: bool = False,
) -> Figure:
    """A row-wise grid of 2D arrays (y, x) or (y, x, 3) with titles.

    `shared`: one range of values for all panels, symmetric around zero if any is negative.
    `bar`: a scale bar in voxels, for panels that show tissue.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(2.3 * columns, 2.5 * rows), squeeze=False, layout="constrained"
    )
    limits = {}
    if shared:
        top = max(float(np.abs(panel).max()) for panel in panels.values())
        low = min(float(panel.min()) for panel in panels.values())
        limits = {"vmin": -top if low < 0 else 0, "vmax": top}
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for axes, (title, panel) in zip(grid.flat, panels.items(), strict=False):
        axes.imshow(panel, cmap=cmap, interpolation="nearest", **limits)
        bare(axes, title)
        if bar:
            scale_bar(axes, panel.shape[1], 1.0, "voxels")
    return figure


def layered(
    image: np.ndarray,
    masks: Mapping[str, np.ndarray],
    z: int,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Figure:
    """Slice z of a volume, alone and with masks laid over it, each in a colour of its own.

    Parameters
    ----------
    image : (z, y, x) array
        Grey values in [0, 1].
    masks : mapping of label to (z, y, x) bool array
    z : int
    spacing : (dz, dy, dx)
        For the aspect; the scale bar is in voxels.
    """
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 4.7 * image.shape[1] / image.shape[2]), layout="constrained"
    )
    rgb = np.repeat(np.clip(image[z], 0, 1)[..., None].astype(float), 3, axis=2)
    left.imshow(rgb, interpolation="nearest", aspect=spacing[1] / spacing[2])
    colours = (SKY, ORANGE, PURPLE)
    for mask, colour in zip(masks.values(), colours, strict=False):
        rgb[mask[z]] = 0.35 * rgb[mask[z]] + 0.65 * np.array(_rgb(colour))
    right.imshow(rgb, interpolation="nearest", aspect=spacing[1] / spacing[2])
    for axes, title in ((left, f"slice {z}"), (right, f"with {' and '.join(masks)}")):
        bare(axes, title)
        scale_bar(axes, image.shape[2], 1.0, "voxels")
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c, _ in zip(colours, masks, strict=False)]
    right.legend(handles, masks, loc="lower right", fontsize=7)
    return figure


def blocks(
    image: np.ndarray, mask: np.ndarray, grid: np.ndarray, chosen: np.ndarray, z: int
) -> Figure:
    """Slice z with its target (blue) and the outlines of its blocks, the chosen ones in orange.

    Parameters
    ----------
    image, mask : (z, y, x) arrays
    grid, chosen : (n, 3) int arrays
        Block positions: centre slice, first row, first column; blocks of 100 x 100.
    z : int
    """
    figure, axes = plt.subplots(figsize=(5, 5 * image.shape[1] / image.shape[2]))
    rgb = np.repeat(np.clip(image[z], 0, 1)[..., None].astype(float), 3, axis=2)
    rgb[mask[z]] = _rgb(SKY)
    axes.imshow(rgb, interpolation="nearest")
    for places, colour, width in ((grid, "white", 0.5), (chosen, ORANGE, 2.0)):
        for _, y, x in places[places[:, 0] == z]:
            # Drawn a little inside: neighbours overlap where the last block moves inward.
            frame = plt.Rectangle((x + 1, y + 1), 97, 97, fill=False, ec=colour, lw=width)
            axes.add_patch(frame)
    bare(axes, f"slice {z}")
    scale_bar(axes, image.shape[2], 1.0, "voxels")
    return figure


def pipeline(block: np.ndarray, kernel: np.ndarray, probability: np.ndarray, tree: Tree) -> Figure:
    """The course in a row: a block, an inflated kernel, a probability, a tree, joined by arrows.

    Parameters
    ----------
    block : (D, h, w) array
        Values in [0, 1]; drawn as a pile of slices, as is the kernel.
    kernel : (D, p, p) array
        Of one token.
    probability : (y, x) array
        A projection, in [0, 1].
    tree : Tree
        Drawn over the frame of `probability`.
    """
    figure, panels = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained")
    limit = float(np.abs(kernel).max())
    figure.get_layout_engine().set(wspace=0.16)  # room for the arrows
    _pile(panels[0], block, "gray", 0, 1, 0.14)
    _pile(panels[1], kernel, "viridis", -limit, limit, 0.4)
    panels[2].imshow(probability, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    panels[3].imshow(np.zeros_like(probability), cmap="gray", vmin=0, vmax=1)
    draw_tree(panels[3], tree, 1, 2, ORANGE, width=1.5)
    titles = ("01 block", "02 inflated kernel", "03 and 04 probability", "05 tree")
    for axes, title in zip(panels, titles, strict=True):
        bare(axes, title)
    for axes in panels[:3]:
        axes.annotate(
            "",
            (1.14, 0.5),
            (1.02, 0.5),
            xycoords="axes fraction",
            arrowprops={"arrowstyle": "-|>", "color": BLACK},
            annotation_clip=False,
        )
    return figure


def _pile(axes: Axes, slices: np.ndarray, cmap: str, low: float, high: float, step: float) -> None:
    """Slices (D, h, w), the first in front, each by `step` of its size up and to the right."""
    depth, h, w = slices.shape
    for z in reversed(range(depth)):
        shift = step * z
        extent = (shift * w, (1 + shift) * w, (1 - shift) * h, -shift * h)
        axes.imshow(
            slices[z], cmap=cmap, vmin=low, vmax=high, extent=extent, interpolation="nearest"
        )
        corner = plt.Rectangle((extent[0], extent[3]), w, h, fill=False, ec="white", lw=1.5)
        axes.add_patch(corner)
    top = step * (depth - 1)
    axes.set(xlim=(0, (1 + top) * w), ylim=(h, -top * h))
    axes.set_frame_on(False)


def colour_kernel(weight: np.ndarray) -> np.ndarray:
    """A patch kernel (3, p, p) as an RGB image (p, p, 3), zero in the middle of the range."""
    kernel = np.moveaxis(np.asarray(weight), 0, -1)
    return 0.5 + 0.5 * kernel / np.abs(kernel).max()


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    line: float | None = None,
) -> Figure:
    """Lines over a common axis, one colour and label each; a dashed one at `line`, if given."""
    figure, axes = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    for (label, (x, y)), colour in zip(lines.items(), CYCLE, strict=False):
        axes.plot(x, y, color=colour, label=label, marker="o" if len(x) < 20 else None, ms=4)
    if line is not None:
        axes.axhline(line, color=BLACK, lw=1, ls="--")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure


def stacked(x: Sequence[float], rows: Mapping[str, Sequence[float]], xlabel: str) -> Figure:
    """Quantities of different units over one axis, a row each, from zero."""
    figure, grid = plt.subplots(
        len(rows), 1, figsize=(6.5, 1.8 * len(rows)), sharex=True, layout="constrained"
    )
    for axes, (label, values), colour in zip(
        np.atleast_1d(grid), rows.items(), CYCLE, strict=False
    ):
        axes.plot(x, values, color=colour, marker="o", ms=4)
        axes.set(ylabel=label, ylim=(0, 1.1 * max(1e-6, *values)), xticks=x)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(xlabel)
    return figure


def learning(history: Sequence[Mapping[str, float]]) -> Figure:
    """Learning curves: the loss and its terms per step, and the Dice of the validation blocks.

    Parameters
    ----------
    history : sequence of rows
        Of `neurolib.training.train`: ``step``, ``loss``, its terms, ``validation_dice`` where one
        was taken.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    terms = [key for key in history[0] if key not in ("step", "validation_dice", "threshold")]
    for term, colour in zip(terms, CYCLE, strict=False):
        left.plot(
            [r["step"] for r in history],
            [r[term] for r in history],
            color=colour,
            label=term,
            lw=2 if term == "loss" else 1,
        )
    checks = [row for row in history if "validation_dice" in row]
    right.plot(
        [r["step"] for r in checks],
        [r["validation_dice"] for r in checks],
        color=BLUE,
        marker="o",
        ms=4,
    )
    left.set(xlabel="step", ylabel="loss")
    right.set(xlabel="step", ylabel="Dice, validation blocks", ylim=(0, 1))
    left.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def rates(shares: Sequence[float], layers: Sequence[float], decoder: float) -> Figure:
    """Learning rates: the share of the peak at each step, and the peak of each layer.

    Parameters
    ----------
    shares : sequence of float
        Of the peak rate, step by step.
    layers : sequence of float
        Peak rates of the encoder from the pixels up; may be empty.
    decoder : float
        Peak rate of everything behind the encoder.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
    left.plot(range(1, len(shares) + 1), shares, color=BLUE)
    left.set(xlabel="step", ylabel="share of the peak rate", ylim=(0, 1.05))
    right.bar(range(len(layers)), layers, color=BLUE, label="encoder")
    right.bar([len(layers)], [decoder], color=ORANGE, label="decoder")
    right.set_yscale("log")
    right.set(xlabel="layer, from the pixels up", ylabel="peak rate")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def dots(
    groups: Mapping[str, Mapping[str, float]],
    ylabel: str,
    intervals: Mapping[str, tuple[float, float]] | None = None,
    line: float | None = None,
) -> Figure:
    """One dot per neuron and group, joined per neuron; a bar marks the mean, a line its interval.

    Parameters
    ----------
    groups : mapping of group to mapping of neuron to value
    ylabel : str
    intervals : mapping of group to (low, high), optional
    line : float, optional
        A value to compare with, as zero where the values are differences.
    """
    figure, axes = plt.subplots(figsize=(1.6 * len(groups) + 3, 3.8), layout="constrained")
    if line is not None:
        axes.axhline(line, color="0.6", lw=0.8, zorder=0)
    names = list(groups)
    neurons = list(dict.fromkeys(n for values in groups.values() for n in values))
    for neuron, colour in zip(neurons, CYCLE * (len(neurons) // len(CYCLE) + 1), strict=False):
        at = [i for i, name in enumerate(names) if neuron in groups[name]]
        values = [groups[names[i]][neuron] for i in at]
        axes.plot(at, values, color=colour, marker="o", ms=5, lw=0.7, alpha=0.8, label=neuron)
    for i, name in enumerate(names):
        mean = float(np.mean(list(groups[name].values())))
        axes.hlines(mean, i - 0.2, i + 0.2, color=BLACK, lw=2)
        if intervals and name in intervals:
            axes.vlines(i + 0.25, *intervals[name], color=BLACK, lw=1)
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel=ylabel, xlim=(-0.5, len(names) - 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8.5, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def bare(axes: Axes, title: str = "") -> None:
    """No ticks; a small title."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=9)


def scale_bar(axes: Axes, pixels: int, spacing: float, unit: str) -> None:
    """A bar of a round length, about a fifth of the image, with its length written over it."""
    wanted = pixels * spacing / 5
    power = 10.0 ** np.floor(np.log10(wanted))
    length = max(step * power for step in (1, 2, 5) if step * power <= wanted)
    end = length / spacing
    axes.plot(
        [0.04 * pixels, 0.04 * pixels + end],
        [0.04, 0.04],
        color="white",
        lw=3,
        transform=axes.get_xaxis_transform(),
        solid_capstyle="butt",
    )
    axes.text(
        0.04 * pixels,
        0.06,
        f"{length:g} {unit}",
        color="white",
        fontsize=7,
        ha="left",
        va="bottom",
        transform=axes.get_xaxis_transform(),
    )


def _rgb(colour: str) -> tuple[float, float, float]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def inflated(kernel: np.ndarray, response: Sequence[float], limit: float) -> Figure:
    """The slices of an inflated kernel, and under each what a tube in that slice evokes.

    Parameters
    ----------
    kernel : (D, p, p) array
        Of one token.
    response : D numbers
        Response of all tokens to a tube in each slice; 1 is that of the 2D kernel.
    limit : float
        Values from -limit to limit share the colours, so that a faint slice looks faint.
    """
    depth = len(kernel)
    # One size for all depths: a picture that answers to a slider must not jump.
    figure = plt.figure(figsize=(8, 3.6), layout="constrained")
    grid = figure.add_gridspec(2, depth, height_ratios=(1, 1.4))
    for z, part in enumerate(kernel):
        axes = figure.add_subplot(grid[0, z])
        axes.imshow(part, cmap="viridis", vmin=-limit, vmax=limit, interpolation="nearest")
        bare(axes, f"{z - depth // 2:+d}")
    axes = figure.add_subplot(grid[1, :])
    axes.bar(np.arange(depth) - depth // 2, response, width=0.5, color=BLUE)
    axes.axhline(1, color=BLACK, lw=1, ls="--")
    axes.text(0.01, 1, "2D", va="bottom", fontsize=8, transform=axes.get_yaxis_transform())
    axes.set(xlabel="slice in which the tube lies", ylabel="response", xlim=(-depth / 2, depth / 2))
    axes.set_ylim(0, 1.15 * max(1, *response))
    axes.set_xticks(np.arange(depth) - depth // 2)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def heat(values: np.ndarray) -> np.ndarray:
    """An array (y, x) from zero to its maximum as *viridis* colours (y, x, 3), for `images`."""
    return plt.get_cmap("viridis")(values / max(1e-12, float(values.max())))[..., :3]


def signed(values: np.ndarray) -> np.ndarray:
    """Array (y, x) as colours (y, x, 3) for `images`: blue above zero, white at it, red below."""
    limit = max(1e-12, float(np.abs(values).max()))
    return plt.get_cmap("RdBu")(0.5 + 0.5 * np.asarray(values) / limit)[..., :3]


def zoomed(
    plane: np.ndarray,
    centre: tuple[float, float],
    lines: Mapping[str, Sequence[np.ndarray]] | None = None,
    label: str = "",
    size: int = 64,
) -> Figure:
    """A projection, whole and with a window of it enlarged, and lines drawn over both.

    Parameters
    ----------
    plane : (y, x) array
        Values with a colour bar if `label` says what they are, else grey; NaN is black.
    centre : (y, x)
        Of the window, `size` voxels wide.
    lines : mapping of label to sequence of (m, 2) arrays
        Each y, x in voxels; one colour per label.
    label : str
    size : int
    """
    colours = (SKY, ORANGE, PURPLE)
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    cmap = plt.get_cmap("viridis" if label else "gray").with_extremes(bad="black")
    low = float(np.nanmin(plane)) if label else 0.0
    # Grey is half as bright as it could be, so that lines stand out.
    high = float(np.nanmax(plane)) if label else 2 * max(1e-6, float(np.nanmax(plane)))
    first = [
        float(np.clip(middle - size / 2, 0, max(0, side - size)))
        for middle, side in zip(centre, plane.shape, strict=True)
    ]
    for axes, title in zip(panels, ("whole", "window"), strict=True):
        picture = axes.imshow(plane, cmap=cmap, vmin=low, vmax=high, interpolation="nearest")
        for (name, parts), colour in zip((lines or {}).items(), colours, strict=False):
            flat = [part[:, ::-1] for part in parts]
            width = 1.0 if title == "whole" else 2.0
            axes.add_collection(LineCollection(flat, colors=colour, linewidths=width, label=name))
        bare(axes, title)
    whole, window = panels
    corner = (first[1] - 0.5, first[0] - 0.5)
    whole.add_patch(plt.Rectangle(corner, size, size, fill=False, ec="white", lw=1))
    scale_bar(whole, plane.shape[1], 1.0, "voxels")
    top, left = first
    window.set(xlim=(left - 0.5, left + size - 0.5), ylim=(top + size - 0.5, top - 0.5))
    if lines:
        window.legend(loc="upper right", fontsize=8)
    if label:
        figure.colorbar(picture, ax=panels, label=label, shrink=0.8)
    return figure


# What `neurolib.course.robustness.agreement` tells apart, in the colours of `overlay`.
JUDGED = {"correct": SKY, "false": ORANGE, "missed": PURPLE}


def judged(
    image: np.ndarray,
    groups: Mapping[str, Mapping[str, Tree]],
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Figure:
    """Trees over three projections of their image: what is correct, false and missed.

    Parameters
    ----------
    image : (z, y, x) array
        Shown at half its brightness.
    groups : mapping of title to mapping of ``correct``, ``false``, ``missed`` to Tree
        Side by side; see `neurolib.course.robustness.agreement`.
    spacing : (dz, dy, dx)
        For the aspect; the scale bar is in voxels.
    """
    figure, panels = _views(image.shape, spacing, len(groups))
    for (title, parts), views in zip(groups.items(), panels, strict=True):
        for view, axes in views.items():
            down, across, along = VIEWS[view]
            grey = _project(image.max(axis=along), view).astype(np.float32)
            top = 2 * max(1e-6, float(grey.max()))
            aspect = spacing[down] / spacing[across]
            axes.imshow(grey, cmap="gray", vmin=0, vmax=top, aspect=aspect, interpolation="nearest")
            for name, tree in parts.items():
                draw_tree(axes, tree, down, across, JUDGED[name], name, 1.5)
        views["xy"].set_title(title, fontsize=9)
        scale_bar(views["xy"], image.shape[2], 1.0, "voxels")
        views["xy"].legend(loc="lower right", fontsize=7, framealpha=0.8)
    return figure


def multiples(
    rows: Sequence[Mapping],
    titles: Mapping[str, str],
    values: Mapping[str, tuple[float, float]],
) -> Figure:
    """Small multiples of `robustness.robustness`: a column per damage, a row per value.

    Parameters
    ----------
    rows : sequence of rows
        ``damage``, ``amount``, ``tracer`` and the values; what is not finite leaves a gap.
    titles : mapping of damage to the name of its amount
    values : mapping of value to its limits
        The same in all columns, so that they can be compared.
    """
    figure, grid = plt.subplots(
        len(values),
        len(titles),
        figsize=(2.3 * len(titles), 1.8 * len(values)),
        sharex="col",
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    tracers = list(dict.fromkeys(row["tracer"] for row in rows))
    for (value, limits), line in zip(values.items(), grid, strict=True):
        for (damage, words), axes in zip(titles.items(), line, strict=True):
            for tracer, colour, mark in zip(tracers, CYCLE, "os^Dv", strict=False):
                chosen = [r for r in rows if r["damage"] == damage and r["tracer"] == tracer]
                heights = [r[value] if np.isfinite(r[value]) else np.nan for r in chosen]
                amounts = [r["amount"] for r in chosen]
                axes.plot(amounts, heights, color=colour, marker=mark, ms=4, lw=1.2, label=tracer)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_ylim(limits)
            if value == next(iter(values)):
                axes.set_title(damage, fontsize=9)
            if value == list(values)[-1]:
                axes.set_xlabel(words, fontsize=8)
        line[0].set_ylabel(value)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)
    return figure


def scene(
    image: np.ndarray,
    trees: Mapping[str, Tree],
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
):
    """A volume and its trees to turn with the mouse, by k3d; None where k3d is not installed.

    Parameters
    ----------
    image : (z, y, x) array
        In [0, 1].
    trees : mapping of label to Tree
    spacing : (dz, dy, dx)
    """
    try:
        k3d = importlib.import_module("k3d")
    except ImportError:
        return None
    # Half a voxel before the first centre to half a voxel behind the last one.
    bounds = [
        edge
        for n, d in zip(image.shape[::-1], spacing[::-1], strict=True)
        for edge in (-d / 2, (n - 0.5) * d)
    ]
    plot = k3d.plot()
    plot += k3d.volume(image.astype(np.float16), bounds=bounds, color_range=[0.15, 1], name="image")
    for (label, tree), colour in zip(trees.items(), CYCLE[1:], strict=False):
        child = np.flatnonzero(tree.parent >= 0)
        plot += k3d.lines(
            (tree.xyz * np.asarray(spacing)[::-1]).astype(np.float32),
            np.stack([child, tree.parent[child]], axis=1).astype(np.uint32),
            indices_type="segment",
            color=int(colour[1:], 16),
            width=0.5 * min(spacing),
            name=label,
        )
    return plot
