"""Facts about images and trees, and whether the two fit together."""

from collections.abc import Iterator, Sequence
from math import prod
from operator import attrgetter
from pathlib import Path

import numpy as np

from neurolib import swc
from neurolib.data.formats import LazyStack
from neurolib.data.pairs import TREES, alone, files_of, same_name, stem
from neurolib.errors import NeurolibError
from neurolib.volume import (
    INVERT,
    LEVELS,
    POLARITY,
    SUFFIXES,
    Volume,
    check_values,
    inverted,
    is_image,
    normalise,
    read_volume,
)

# The most voxels to read. From a larger volume, only evenly spaced slices are read, or evenly
# spaced chunks of OME-Zarr, where one slice touches many chunks.
WHOLE, WHOLE_ZARR = 1 << 27, 1 << 25


def inspect_files(
    paths: Sequence[str | Path], channel: int | None = None, spacing: Sequence[float] | None = None
) -> Iterator[str]:
    """Facts about images and SWC files, or folders of them, and about each image with its tree.

    An image and a tree of the same name (`pairs.pair_files`) belong together, and so do the only
    image and the only tree. `channel` and `spacing` are as in `neurolib.volume.read_volume`.

    Yields
    ------
    str
        One block per file or pair, and one for the files in no pair. If some files could not be
        read, a `NeurolibError` follows.
    """
    files = list(dict.fromkeys(file for path in paths for file in _expand(Path(path))))
    images, trees, unusable = [], {}, []
    for file in files:
        try:
            if file.suffix.lower() in TREES:
                trees[file] = swc.read_swc(file)
                facts = tree_facts(trees[file])
            else:
                volume = read_volume(file, channel, check=False, spacing=spacing)
                facts = volume_facts(volume, file.name)
                images.append(file)
        except NeurolibError as error:
            unusable.append(file.name)
            facts = {"unusable": str(error)}
        yield block(str(file), facts)
    pairs = _pairs(images, trees, len(files) == 2)
    for image, tree in pairs:
        # Read again, because all images together may not fit in memory.
        volume = read_volume(image, channel, check=False, spacing=spacing)
        facts = fit_facts(swc.read_swc(tree, volume.known_spacing), volume)
        yield block(f"{image.name} with {tree.name}", facts)
    if images and trees and (left := alone(images, trees, pairs)):
        broken = {same_name(name): name for name in unusable}
        for file in left:
            if other := broken.get(same_name(file.name)):
                left[file] = f"{other} cannot be used"
        yield block("in no pair", {file.name: why for file, why in left.items()})
    if unusable:
        raise NeurolibError(
            f"{len(unusable)} of {len(files)} files cannot be used, expected images "
            f"({', '.join(SUFFIXES)}) and SWC files; the reasons are above"
        )


def _expand(path: Path) -> list[Path]:
    if not path.is_dir() or is_image(path):
        return [path]
    if files := files_of(path, (*SUFFIXES, *TREES)):
        return files
    raise NeurolibError(
        f"{path}: no images ({', '.join(SUFFIXES)}) and no trees; name another folder"
    )


def _pairs(images: list[Path], trees: dict[Path, swc.Tree], only: bool) -> list[tuple[Path, Path]]:
    """Images with the trees of their names, or the `only` image with the only tree."""
    if only and len(images) == len(trees) == 1:
        return [(images[0], next(iter(trees)))]
    pairs = [(i, t) for i in images for t in trees if same_name(i.name) == same_name(t.name)]
    # If several trees have that name, prefer those in the image's folder, then those whose names
    # agree in case and further suffixes.
    for key in (attrgetter("parent"), lambda file: stem(file.name), attrgetter("stem")):
        agreeing = [pair for pair in pairs if key(pair[0]) == key(pair[1])]
        paired = {file for pair in agreeing for file in pair}
        pairs = [pair for pair in pairs if pair in agreeing or not paired.intersection(pair)]
    return pairs


def block(title: str, facts: dict[str, str]) -> str:
    """A title and, indented below it, one fact per line."""
    return "\n".join([title, *(f"  {key:<10} {value}" for key, value in facts.items())])


def _checked_sample(volume: Volume, name: str) -> tuple[np.ndarray, str]:
    """Voxels (n, y, x) that represent a volume, checked by `check_values`; which part, in words."""
    data = volume.data
    if not isinstance(data, LazyStack) or prod(data.shape) <= WHOLE_ZARR:
        check_values(volume, name)
        step = max(1, -(-prod(data.shape) // WHOLE))
        return np.asarray(data[::step]), f"; every {step}th slice" if step > 1 else ""
    # Only whole chunks and, in a sparse volume, only stored ones.
    places, step, grid = data.stored_cells()
    chunk = np.minimum(data.chunks, data.shape)
    corners = np.array(places or [(0, 0, 0)]) * step
    whole = corners[(corners + chunk <= data.shape).all(axis=1)]
    corners = whole if len(whole) else np.zeros((1, 3), int)
    count = min(len(corners), max(1, WHOLE_ZARR // prod(chunk.tolist())))
    corners = corners[np.linspace(0, len(corners) - 1, count).astype(int)]
    chunks = [data[tuple(map(slice, corner, corner + chunk))] for corner in corners]
    values = np.concatenate(chunks)
    check_values(Volume(values), name)
    return values, f"; {count} of {len(places)}{' stored' * (len(places) < prod(grid))} chunks"


def volume_facts(volume: Volume, name: str) -> dict[str, str]:
    """Shape, type, spacing, intensities and oddities of a volume, in words."""
    shape, spacing = volume.data.shape, volume.spacing
    values, part = _checked_sample(volume, name)
    values = values.view(np.uint8) if values.dtype == bool else values
    # As in `normalise`, masked voxels are ignored.
    masked = (values == 0).mean() > 0.5 and values.any()
    kept = values[values != 0] if masked else values
    low, middle, high = np.percentile(kept, (LEVELS[0], 50, LEVELS[1]))
    size = prod(shape) * volume.data.dtype.itemsize / 2**20
    levels = "/".join(f"{q:g}" for q in (LEVELS[0], 50, LEVELS[1]))
    lengths = " × ".join(f"{d:g}" for d in spacing)
    remedy = "give spacing= (--spacing Z,Y,X in µm)"
    facts = {
        "shape": f"{' × '.join(map(str, shape))} (z, y, x), {volume.data.dtype}, {size:.1f} MiB",
        "spacing": f"{lengths} (z, y, x), not known in µm: {volume.unknown}; {remedy}"
        if volume.unknown
        else f"{lengths} µm (z, y, x)",
        "intensity": f"{values.min():g} to {values.max():g}; percentiles {levels}: {low:g}, "
        f"{middle:g}, {high:g}" + (" of the voxels that are not zero" if masked else "") + part,
        "zeros": f"{(values == 0).mean():.1%} of the voxels",
    }
    if volume.notes:
        facts["read"] = "; ".join(volume.notes)
    step = max(1, min(len(values), values.size // POLARITY))
    if inverted(normalise(values[step // 2 :: step])):
        facts["warning"] = INVERT
    return facts


def tree_facts(tree: swc.Tree) -> dict[str, str]:
    """Size, shape and repairs of a tree, in words."""
    if not len(tree.parent):
        return {"tree": "no nodes"}
    low, high = tree.xyz.min(axis=0), tree.xyz.max(axis=0)
    roots = int((tree.parent < 0).sum())
    spans = zip("xyz", low, high, strict=True)
    converted = tree.spacing or "converted to voxels" in str(tree.repairs)
    radius, unit = tree.radius, "voxels" if converted else "the file's units"
    return {
        "nodes": f"{len(tree.parent)} in {roots} {'tree' if roots == 1 else 'trees'}",
        "length": f"{swc.length(tree):.1f} in {unit}, {len(swc.tips(tree))} tips, "
        f"{len(swc.branch_points(tree))} branch points",
        "box": ", ".join(f"{k} {a:g} to {b:g}" for k, a, b in spans),
        "radius": f"{radius.min():g} to {radius.max():g}, median {np.median(radius):g}",
        "repairs": "; ".join(tree.repairs) or "none",
    }


def fit_facts(tree: swc.Tree, volume: Volume) -> dict[str, str]:
    """Whether a tree lies on the bright structures of a volume, in words."""
    if isinstance(volume.data, LazyStack) and prod(volume.data.shape) > WHOLE:
        return {"frame": "not compared: that would read the whole image; cut out a part"}
    fit, scale = swc.fit(tree, volume), volume.known_spacing or (1, 1, 1)
    return {
        "inside": f"{fit.inside:.1%} of the nodes lie in the image",
        "contrast": f"{fit.contrast:.2f} standard deviations brighter on the tree; "
        f"{fit.follows:.0%} of it brighter than its surroundings, {swc.AROUND:g} voxels away",
        "frame": str(fit),
        # In another frame, the length would be wrong.
        **({"length": swc.length_text(tree, scale)} if fit.fits else {}),
    }
