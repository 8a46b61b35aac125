"""From a tree and a volume to training blocks.

Target: a traced tree becomes a response that falls off with the distance to the centreline, and
a mask. Blocks: five slices of 100 x 100, named by (centre slice z, first row y, first column x).
Stacking, the way back from predictions of blocks to a volume, is a part of `neurolib.inference`.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from neurolib.data.formats import check_spacing
from neurolib.data.pairs import Pair, read_pair
from neurolib.errors import DataError, NeurolibWarning, SettingsError, VolumeError
from neurolib.swc import Tree, check_pair
from neurolib.volume import empty_level, normalise, standing_out

BLOCK = (5, 100, 100)
STRIDE = (1, 100, 100)
KINDS = ("sironi", "scale_space", "radius")
# An edge is cut into pieces no longer than this, each compared with a ball of voxels around its
# middle: shorter pieces mean more balls, longer ones bigger balls. For balls of 5 voxels around
# the centreline the work per voxel of neurite is flat between 4 and 6.
PIECE = 4.0
# Piece-voxel pairs computed at a time: temporaries of 0.5 MB each, small beside any volume.
PAIRS = 1 << 16
# Distances are computed in float64; a voxel exactly on a radius must not fall out by rounding.
ROUNDING = 1e-9
# Halvings of a piece until the place nearest to a voxel's extent is as exact.
HALVINGS = 36


@dataclass(frozen=True)
class Sample:
    """A pair, read: normalised image (z, y, x), spacing (dz, dy, dx) µm, tree and target.

    unknown: why the spacing is not known in µm; see `neurolib.volume.Volume`.
    """

    pair: Pair
    image: np.ndarray
    spacing: tuple[float, float, float]
    tree: Tree
    response: np.ndarray
    mask: np.ndarray
    unknown: str = ""


def read_sample(pair: Pair, kind: str = "sironi", tau: float = 0.1) -> Sample:
    """Read a pair: normalised image, tree, response and mask of the target.

    Raises
    ------
    VolumeError, SwcError, DataError
        If a file is unusable, or most of the tree lies outside the image.
    """
    volume, tree = read_pair(pair)
    if told := "; ".join(repair for repair in tree.repairs if "reordered" not in repair):
        warnings.warn(f"{pair.swc.name}: {told}", NeurolibWarning, stacklevel=2)
    check_pair(tree, volume.data.shape, pair.name)
    response, mask = make_target(tree, volume.data.shape, volume.spacing, kind, tau=tau)
    image, unknown = normalise(volume.data), volume.unknown
    return Sample(pair, image, volume.spacing, tree, response, mask, unknown)


def ignore_untraced(sample: Sample) -> Sample:
    """A sample whose tree may lack branches: what looks like neurite far from it is unknown.

    The response becomes NaN, which no loss counts, where the image stands out as neurites do (see
    `neurolib.volume.empty_level`) and the tree is further away than the response reaches. Bright
    specks that are no neurites are then not learnt as background either.
    """
    bright = standing_out(sample.image) > empty_level(sample.image)
    unknown = bright & (sample.response == 0)
    return replace(sample, response=np.where(unknown, np.float32(np.nan), sample.response))


def every_slice(sample: Sample, every: int) -> Sample:
    """Slices 0, every, 2 every ... of a sample; views, the tree stays in the frame of the whole."""
    if every == 1:
        return sample
    dz, dy, dx = sample.spacing
    return replace(
        sample,
        image=sample.image[::every],
        response=sample.response[::every],
        mask=sample.mask[::every],
        spacing=(dz * every, dy, dx),
    )


def tube_radius(tau: float = 0.1, *, a: float = 6.0, d_max: float = 5.0) -> float:
    """Radius of the tube that `make_target` marks around a centreline.

    The response y(D) = (exp(a (1 - D / d_max)) - 1) / (exp(a) - 1) solved for y = tau.

    Parameters
    ----------
    tau : float
        Threshold on the response, in (0, 1].
    a, d_max : float
        Steepness and range of the response, as in `make_target`.

    Returns
    -------
    float
        Radius in pixels (voxels of the finer of dy and dx): 0.58, 1.90, 2.46, 3.65 for tau = 0.5,
        0.1, 0.05, 0.01 and the default a, d_max.

    Raises
    ------
    SettingsError
        If a parameter is out of range.
    """
    _check_response(tau, a, d_max)
    return float(distance_of(tau, a, d_max))


def make_target(
    tree: Tree,
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    kind: str = "sironi",
    *,
    tau: float = 0.1,
    a: float = 6.0,
    d_max: float = 5.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Turn a traced tree into a response and a mask on the grid of its volume.

    Parameters
    ----------
    tree : Tree
        Nodes in voxel coordinates, radii in voxels of the plane (see `Tree`). Parts of the tree
        outside the volume mark what they reach inside; a tree without nodes marks nothing.
    shape : (int, int, int)
        Volume shape (z, y, x).
    spacing : (float, float, float)
        Voxel size (dz, dy, dx) in any one unit; only the ratios matter.
    kind : {"sironi", "scale_space", "radius"}
        "sironi": y = (exp(a (1 - D / d_max)) - 1) / (exp(a) - 1) for D < d_max, else 0, with D
        the distance to the nearest edge (see Notes); the mask is y >= tau.
        "scale_space": another name for the same target (see Notes).
        "radius": the union of the balls of radius max(r, 1 pixel) along all edges, r interpolated
        between the nodes; the response is the mask as 0 or 1, and tau, a, d_max do not matter.
    tau : float
        Threshold on the response, in (0, 1]; `tube_radius` gives the tube that it cuts out.
    a, d_max : float
        Steepness and range of the response; d_max in pixels (voxels of the finer of dy and dx).

    Returns
    -------
    response : (z, y, x) float32 array in [0, 1]
    mask : (z, y, x) bool array

    Raises
    ------
    VolumeError
        If shape or spacing is not three positive numbers.
    SettingsError
        If kind is unknown or tau, a, d_max are out of range.
    DataError
        If the tree has coordinates or radii that are not finite, or kind is "radius" and a
        radius is larger than the volume.

    Notes
    -----
    Distances are exact, to the edge and not to samples of it, so that a slanted neurite is as
    wide as a straight one. A voxel that is longer than a pixel along an axis counts with its
    extent: D is the distance to the nearest of the pixel-sized cubes that fill it. So the voxels
    that an edge passes through lie within sqrt(3) / 2 pixels of it, and the mask of a connected
    tree is connected, whatever the spacing. Only voxels near the tree are visited.

    The form of the response is that of Sironi, Türetken, Lepetit and Fua, "Multiscale Centerline
    Detection", TPAMI 2016; a, d_max and tau are choices of this course. They define it in scale
    space: at voxel x and radius r, D² = |x - c|² + (r - r_c)² to a point c of the centreline with
    radius r_c. The largest value over all r is at r = r_c, where D = |x - c|; so the two names
    stand for one target.
    """
    if kind not in KINDS:
        raise SettingsError(f"kind: unknown target {kind!r}; choose one of {', '.join(KINDS)}")
    _check_response(tau, a, d_max)
    shape, scale = _check_frame(shape, spacing)
    start, end = _pieces(tree, scale)
    if kind == "radius":
        # max(r, 1): the union of all pieces with radius 1 and of the thicker with their own.
        thick = np.flatnonzero(np.maximum(start[:, 3], end[:, 3]) > 1)
        which = np.append(np.arange(len(start)), thick)
        radius = np.append(np.ones(len(start)), start[thick, 3])
        growth = np.append(np.zeros(len(start)), end[thick, 3] - start[thick, 3])
        start, end, reach = start[which, :3], end[which, :3], np.maximum(radius, radius + growth)
        if reach.max(initial=0) > (shape * scale).max():
            raise DataError(
                f"tree: radius {reach.max() / _plane(scale):.4g} is larger than the volume of "
                f"shape {shape}; radii are in voxels of the plane, convert them first"
            )
        mask = np.zeros(shape, bool)
        for voxel, piece, along, distance in _near(start, end, reach, scale, shape, growth):
            inside = distance <= radius[piece] + along * growth[piece] + ROUNDING
            mask.reshape(-1)[voxel[inside]] = True
        return mask.astype(np.float32), mask

    response, reach = np.zeros(shape, np.float32), np.full(len(start), d_max)
    for voxel, _, _, distance in _near(start[:, :3], end[:, :3], reach, scale, shape):
        np.maximum.at(response.reshape(-1), voxel, response_at(distance, a, d_max))
    return response, response >= np.float32(tau)


def block_starts(size: int, block: int, stride: int) -> np.ndarray:
    """First voxels of the blocks along one axis; the last block shifts inward to end with it.

    Parameters
    ----------
    size, block, stride : int
        Voxels of the axis, of a block, and between blocks; all at least 1. An axis shorter than
        a block has one block, at 0.

    Returns
    -------
    (k,) int array
        Increasing; with stride <= block the blocks cover the axis.

    Raises
    ------
    SettingsError
        If a number is less than 1.
    """
    if min(size, block, stride) < 1:
        raise SettingsError(f"size {size}, block {block}, stride {stride}: each must be at least 1")
    last = max(size - block, 0)
    return np.append(np.arange(0, last, stride), last)


def block_grid(
    shape: tuple[int, int, int],
    block: tuple[int, int, int] = BLOCK,
    stride: tuple[int, int, int] = STRIDE,
) -> np.ndarray:
    """Positions of all blocks of a volume.

    Parameters
    ----------
    shape : (int, int, int)
        Volume shape (z, y, x).
    block : (int, int, int)
        Block shape; the depth is odd, so that there is a centre slice.
    stride : (int, int, int)
        Steps between blocks. With stride 1 in z every slice is the centre of blocks; a network
        that predicts all slices of a block covers the volume with a stride of the depth too.

    Returns
    -------
    (n, 3) int array
        Centre slice z, first row y, first column x; ordered by z, then y, then x.

    Raises
    ------
    VolumeError, SettingsError
        If shape, block or stride are not three integers of at least 1, or the depth is even.
    """
    shape = _triple("shape", shape, VolumeError)
    block, stride = _check_block(block), _triple("stride", stride, SettingsError)
    axes = (
        block_starts(shape[0], 1, stride[0]),
        block_starts(shape[1], block[1], stride[1]),
        block_starts(shape[2], block[2], stride[2]),
    )
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)


def read_block(
    data: np.ndarray, position: np.ndarray, block: tuple[int, int, int] = BLOCK
) -> np.ndarray:
    """Cut one block out of a volume.

    Parameters
    ----------
    data : (z, y, x) array
        The volume; anything that can be sliced (memory-mapped, zarr) will do.
    position : (int, int, int)
        Centre slice z and first row y, column x. Slices beyond the volume repeat the outermost
        one; rows and columns beyond it are reflected, as often as it takes.
    block : (int, int, int)
        Block shape.

    Returns
    -------
    array of shape `block`
        A view on `data` where the block lies inside it (do not write to it), else a copy of
        that block alone.

    Raises
    ------
    VolumeError
        If data is not 3D or z is not one of its slices.
    SettingsError
        If the block has no centre slice.
    """
    depth, rows, columns = _check_block(block)
    shape = data.shape
    if len(shape) != 3:
        raise VolumeError(f"shape: expected three integers (z, y, x), got {shape}")
    z, y, x = (int(value) for value in position)
    if not 0 <= z < shape[0]:
        raise VolumeError(f"block at slice {z}: the volume has slices 0 to {shape[0] - 1}")
    # Plain integers: this is called per block, and small arrays would cost more than the view.
    first = z - depth // 2, y, x
    last = first[0] + depth, y + rows, x + columns
    if min(first) >= 0 and all(end <= size for end, size in zip(last, shape, strict=True)):
        return data[first[0] : last[0], y : last[1], x : last[2]]
    index = (
        np.clip(np.arange(first[0], last[0]), 0, shape[0] - 1),
        _reflect(np.arange(y, last[1]), shape[1]),
        _reflect(np.arange(x, last[2]), shape[2]),
    )
    # Only plain slices touch `data`, so that arrays on disk need no fancy indexing.
    near = np.asarray(data[tuple(slice(i.min(), i.max() + 1) for i in index)])
    for axis, i in enumerate(index):
        if (np.diff(i) != 1).any():
            near = near.take(i - i.min(), axis)
    return near


def salient(
    mask: np.ndarray,
    positions: np.ndarray,
    minimum: float = 0.001,
    block: tuple[int, int, int] = BLOCK,
) -> np.ndarray:
    """Which blocks have enough foreground in their centre slice.

    Parameters
    ----------
    mask : (z, y, x) bool array
    positions : (n, 3) int array
        From `block_grid`.
    minimum : float
        Least share of foreground in the centre slice, padding included. The paper asks for
        salient blocks without a number; 0.001 (10 voxels of 100 x 100) is ours.
    block : (int, int, int)
        Block shape.

    Returns
    -------
    (n,) bool array

    Raises
    ------
    VolumeError
        If mask is not 3D or a position lies outside it.
    SettingsError
        If the block has no centre slice.
    """
    shape = _triple("shape", mask.shape, VolumeError)
    _, rows, columns = _check_block(block)
    z, y, x = _check_positions(positions, shape).T
    share = np.zeros(len(z))
    # Strategy: in the table of sums over all rectangles that begin at the corner (0, 0), a box
    # is four entries. Only rows and columns where a box begins or ends are in the table, and it
    # is made slice by slice: it stays far smaller than one slice.
    ys, xs = np.unique([y, y + rows]), np.unique([x, x + columns])
    corners = [
        np.searchsorted(edges, ends)
        for edges, ends in ((ys, y), (ys, y + rows), (xs, x), (xs, x + columns))
    ]
    order = np.argsort(z, kind="stable")
    for which in np.split(order, np.flatnonzero(np.diff(z[order])) + 1) if len(z) else ():
        plane = np.asarray(mask[z[which[0]]], dtype=bool)
        if not plane.any():
            continue
        if ys[-1] > shape[1] or xs[-1] > shape[2]:
            inside = _reflect(np.arange(ys[-1]), shape[1]), _reflect(np.arange(xs[-1]), shape[2])
            plane = plane[np.ix_(*inside)]
        strips = np.add.reduceat(plane[: ys[-1], : xs[-1]], ys[:-1], axis=0, dtype=np.int32)
        cells = np.add.reduceat(strips, xs[:-1], axis=1, dtype=np.int64)
        table = np.zeros((len(ys), len(xs)), np.int64)
        table[1:, 1:] = cells.cumsum(axis=0).cumsum(axis=1)
        top, low, left, right = (corner[which] for corner in corners)
        count = table[low, right] - table[top, right] - table[low, left] + table[top, left]
        share[which] = count / (rows * columns)
    return share >= minimum


def choose_blocks(
    mask: np.ndarray,
    positions: np.ndarray,
    negatives: float = 0.25,
    seed: int = 0,
    *,
    minimum: float = 0.001,
    block: tuple[int, int, int] = BLOCK,
) -> np.ndarray:
    """Choose training blocks: all salient ones, and some others to learn the background from.

    Parameters
    ----------
    mask, positions, minimum, block
        As in `salient`.
    negatives : float
        Number of other blocks, as a share of the number of salient ones (rounded up); as many
        as there are if there are fewer.
    seed : int
        The same seed chooses the same blocks.

    Returns
    -------
    (k,) int array
        Increasing indices into `positions`; empty if no block is salient.

    Raises
    ------
    VolumeError, SettingsError
        As `salient`; also if negatives is below 0.
    """
    if not 0 <= negatives < np.inf:
        raise SettingsError(f"negatives: expected a share of at least 0, got {negatives}")
    chosen = salient(mask, positions, minimum, block)
    others = np.flatnonzero(~chosen)
    number = min(len(others), int(np.ceil(negatives * chosen.sum())))
    chosen[np.random.default_rng(seed).choice(others, number, replace=False)] = True
    return np.flatnonzero(chosen)


def gaussian_window(shape: tuple[int, int]) -> np.ndarray:
    """Weights of a block's pixels that fall off from its centre.

    The standard deviation is 1/8 of the side, as in nnU-Net (Isensee et al. 2021).

    Parameters
    ----------
    shape : (int, int)
        Rows and columns of a block.

    Returns
    -------
    (y, x) float32 array
        From about 1 in the middle to above 1e-7 in the corners.
    """
    offset = [(np.arange(n) - (n - 1) / 2) / (n / 8) for n in shape]
    y, x = (np.exp(-0.5 * values**2) for values in offset)
    return np.outer(y, x).astype(np.float32)


def response_at(distance: np.ndarray, a: float = 6.0, d_max: float = 5.0) -> np.ndarray:
    """The target's response (float32) at distances of at most d_max from the centreline."""
    return (np.expm1(a * (1 - distance / d_max)) / np.expm1(a)).astype(np.float32)


def distance_of(response: np.ndarray, a: float = 6.0, d_max: float = 5.0) -> np.ndarray:
    """The distance from the centreline at which the target has a response: d_max where it is 0."""
    # A Python number, so that a float32 response stays float32.
    return d_max * (1 - np.log1p(response * float(np.expm1(a))) / a)


def _pieces(tree: Tree, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the tree's edges, cut into short pieces: two (n, 4) arrays of z, y, x, radius.

    Lengths are in pixels; along a coarser axis, a piece may be as much longer as its voxels are. A
    root gives a piece of length 0, so that a node without any edge counts too.
    """
    nodes = np.column_stack([tree.xyz[:, ::-1] * scale, np.maximum(tree.radius, 0) * _plane(scale)])
    if not np.isfinite(nodes).all():
        bad = int(np.flatnonzero(~np.isfinite(nodes).all(axis=1))[0])
        raise DataError(f"tree: node {bad} has a coordinate or radius that is not finite")
    base = nodes[np.where(tree.parent >= 0, tree.parent, np.arange(len(nodes)))]
    step = nodes - base
    length = np.linalg.norm(step[:, :3] / np.maximum(scale, 1), axis=1)
    count = np.maximum(np.ceil(length / PIECE), 1).astype(int)
    edge, part = np.repeat(np.arange(len(nodes)), count), _counters(count)[:, None]
    step = step[edge] / count[edge, None]
    return base[edge] + part * step, base[edge] + (part + 1) * step


def _near(
    start: np.ndarray,
    end: np.ndarray,
    reach: np.ndarray,
    scale: np.ndarray,
    shape: tuple[int, int, int],
    growth: np.ndarray | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Find the voxels within `reach` of each piece, and where on the piece they are nearest.

    start, end: (n, 3); reach: (n,). With `growth` (n,), the change of radius from start to end,
    "nearest" is where distance minus radius is least. Yields flat voxel index, piece, place on
    it (0 start to 1 end) and distance, four (m,) arrays at a time; a voxel may come once for
    every piece.
    """
    # Strategy: around the middle of every piece lies the same ball of voxels (`ball`, offsets
    # to the voxel nearest to the middle), so that distances are computed for many pieces at a
    # time. Pieces are grouped by reach: one soma must not enlarge all balls.
    # The floor under the half length keeps a piece of length 0 a point without dividing by 0.
    middle, half = (start + end) / 2, np.maximum(np.linalg.norm(end - start, axis=1) / 2, ROUNDING)
    direction = (end - start) / (2 * half[:, None])
    slope = None if growth is None else growth / (2 * half)
    centre = np.rint(middle / scale).astype(np.int64)
    offset = middle - centre * scale
    level, longer = np.ceil(reach).astype(int), np.maximum(scale - 1, 0)
    for size in np.unique(level):
        radius = size + PIECE / 2 + np.linalg.norm(np.minimum(scale, 1)) / 2
        # Along a coarser axis, voxels may lie farther from the middle: by half their length for
        # their extent, as much for the rounding of the middle, and for the longer piece.
        slack = longer * (1 + PIECE / 2)
        extent = np.floor((radius + slack) / scale).astype(int)
        touching = ((centre >= -extent) & (centre < shape + extent)).all(axis=1)
        pieces = np.flatnonzero((level == size) & touching)
        for ball in _balls(centre[pieces], radius, slack, extent, scale, shape):
            place = (ball * scale).T
            step = max(1, PAIRS // max(1, len(ball)))
            for some in (pieces[i : i + step] for i in range(0, len(pieces), step)):
                piece = offset[some], direction[some], half[some]
                tilt = None if slope is None else slope[some]
                if longer.any():
                    square, nearest = _to_extents(place, longer / 2, *piece, tilt, reach[some])
                else:
                    square, nearest = _to_centres(place, *piece, tilt)
                hit = np.flatnonzero(square <= reach[some, None] ** 2 + ROUNDING)
                row, column = np.divmod(hit, len(ball))
                voxel = [centre[some, axis][row] + ball[column, axis] for axis in range(3)]
                inside = np.logical_and.reduce(
                    [(v >= 0) & (v < n) for v, n in zip(voxel, shape, strict=True)]
                )
                hit, piece = hit[inside], some[row[inside]]
                flat = np.ravel_multi_index([v[inside] for v in voxel], shape)
                where = (nearest.reshape(-1)[hit] / half[piece] + 1) / 2
                yield flat, piece, where, np.sqrt(square.reshape(-1)[hit])


def _balls(
    centre: np.ndarray,
    radius: float,
    slack: np.ndarray,
    extent: np.ndarray,
    scale: np.ndarray,
    shape: tuple[int, int, int],
) -> Iterator[np.ndarray]:
    """Offsets (n, 3) to the voxels of a ball, longer by `slack`; a large one (a soma) in slabs."""
    if not len(centre):
        return
    low, high = -extent, extent
    if (scale < 1).any():
        # A ball of thin slices may be many volumes deep: only offsets that lead into this one.
        low = np.maximum(low, -centre.max(axis=0))
        high = np.minimum(high, np.subtract(shape, 1) - centre.min(axis=0))
    sides = [np.arange(i, j + 1) for i, j in zip(low, high, strict=True)]
    slabs = min(len(sides[0]), -(-prod(map(len, sides)) // PAIRS))
    for slab in np.array_split(sides[0], slabs):
        ball = np.stack(np.meshgrid(slab, *sides[1:], indexing="ij"), -1).reshape(-1, 3)
        away = np.maximum(np.abs(ball * scale) - slack, 0)
        yield ball[(away**2).sum(axis=1) <= radius**2]


def _to_centres(
    place: np.ndarray,
    shift: np.ndarray,
    direction: np.ndarray,
    half: np.ndarray,
    slope: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Squared distance of pieces (n) to voxels `place` (3, m), and where on the piece it is least.

    Both are (n, m). The squared distance to the middle and the coordinate along the piece are two
    matrix products, and the distance to the segment follows by Pythagoras.
    """
    along = direction @ place
    along -= (direction * shift).sum(axis=1)[:, None]
    square = (place**2).sum(axis=0) - 2 * (shift @ place) + (shift**2).sum(axis=1)[:, None]
    square -= along**2
    np.maximum(square, 0, out=square)
    nearest = along
    if slope is not None:
        # A cone's nearest point lies ahead of the foot of the perpendicular, by a multiple of
        # the perpendicular's length; where the ball at one end holds all others, it is that end.
        cone = np.abs(slope) < 1
        ahead = np.where(cone, slope, 0) / np.sqrt(1 - np.where(cone, slope, 0) ** 2)
        beyond = np.where(cone, 0, np.copysign(np.inf, slope))
        nearest = along + ahead[:, None] * np.sqrt(square) + beyond[:, None]
    nearest = np.clip(nearest, -half[:, None], half[:, None])
    along -= nearest
    along *= along
    square += along
    return square, nearest


def _to_extents(
    place: np.ndarray,
    longer: np.ndarray,
    shift: np.ndarray,
    direction: np.ndarray,
    half: np.ndarray,
    slope: np.ndarray | None,
    reach: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """`_to_centres` for voxels that extend by `longer` (3,) on both sides; infinite beyond reach.

    The distance to a box, less a slope, is convex along a piece: halving the piece finds its least.
    """
    apart = shift[:, None] - place.T
    # A bound first: the piece lies within the box around it.
    least = np.maximum(np.abs(apart) - (half[:, None] * np.abs(direction))[:, None] - longer, 0)
    row, column = np.nonzero((least**2).sum(axis=-1) <= reach[:, None] ** 2 + ROUNDING)
    apart, direction = apart[row, column].T.copy(), direction[row].T.copy()
    low, high = -half[row], half[row]
    for _ in range(HALVINGS + 1):
        along = (low + high) / 2
        point = apart + along * direction
        excess = point - np.clip(point, -longer[:, None], longer[:, None])
        distance = (excess**2).sum(axis=0)
        rises = (excess * direction).sum(axis=0)
        if slope is not None:
            rises -= slope[row] * np.sqrt(distance)
        low, high = np.where(rises > 0, low, along), np.where(rises > 0, along, high)
    square, nearest = np.full(least.shape[:2], np.inf), np.zeros(least.shape[:2])
    square[row, column], nearest[row, column] = distance, along
    return square, nearest


def _counters(count: np.ndarray) -> np.ndarray:
    """0 .. count[0] - 1, then 0 .. count[1] - 1, and so on, in one array."""
    return np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)


def _reflect(index: np.ndarray, size: int) -> np.ndarray:
    """Indices mirrored at the first and last voxel (not repeating them) until they are inside."""
    if size == 1:
        return np.zeros_like(index)
    index = np.abs(index) % (2 * size - 2)
    return np.minimum(index, 2 * size - 2 - index)


def _triple(name: str, values: tuple, error: type[Exception]) -> tuple[int, int, int]:
    """Three integers of at least 1, or `error`."""
    values = tuple(values)
    if len(values) != 3 or any(int(v) != v or v < 1 for v in values):
        raise error(f"{name}: expected three integers (z, y, x) of at least 1, got {values}")
    return tuple(int(v) for v in values)


def _check_block(block: tuple) -> tuple[int, int, int]:
    block = _triple("block", block, SettingsError)
    if block[0] % 2 == 0:
        raise SettingsError(f"block: expected an odd depth (a centre slice), got {block[0]}")
    return block


def _check_positions(positions: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    positions = np.asarray(positions)
    if positions.ndim != 2 or positions.shape[1] != 3:
        raise VolumeError(f"positions: expected shape (n, 3), got {positions.shape}")
    if ((positions < 0) | (positions >= shape)).any():
        bad = positions[((positions < 0) | (positions >= shape)).any(axis=1)][0].tolist()
        raise VolumeError(f"positions: {bad} lies outside the volume of shape {shape}")
    return positions


def _check_frame(shape: tuple, spacing: tuple) -> tuple[tuple[int, int, int], np.ndarray]:
    """Volume shape, and voxel size in pixels (the finer of dy and dx)."""
    shape, scale = _triple("shape", shape, VolumeError), check_spacing(spacing)
    return shape, scale / scale[1:].min()


def _plane(scale: np.ndarray) -> float:
    """Pixels per voxel of the plane, the unit of a tree's radii: the geometric mean of dy, dx."""
    return float(np.sqrt(scale[1] * scale[2]))


def _check_response(tau: float, a: float, d_max: float) -> None:
    if not (0 < tau <= 1 and 0 < a < np.inf and 0 < d_max < np.inf):
        raise SettingsError(
            f"tau {tau}, a {a}, d_max {d_max}: expected 0 < tau <= 1 and positive a, d_max"
        )
