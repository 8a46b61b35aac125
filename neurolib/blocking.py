"""From a tree and a volume to training blocks.

Target: a traced tree becomes a response that falls off with distance from the centreline, and
a mask. Blocks: five slices of 100 x 100, named by (centre slice z, first row y, first column x).
`neurolib.inference` goes the other way and assembles predictions of blocks into a volume.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from neurolib.data.formats import check_spacing
from neurolib.data.pairs import Pair, read_pair
from neurolib.errors import DataError, NeurolibWarning, SettingsError, VolumeError
from neurolib.parameters import check_range
from neurolib.swc import Tree, check_pair, repeated
from neurolib.volume import empty_level, normalise, standing_out

Shape = tuple[int, int, int]  # z, y, x
BLOCK = (5, 100, 100)
STRIDE = (1, 100, 100)
KINDS = ("sironi", "scale_space", "radius")
# Steepness of the target's response, and the distance, in pixels, at which it ends.
STEEPNESS, REACH = 6.0, 5.0
# Edges are cut into pieces no longer than this, and each piece is compared with a ball of voxels
# around its middle: shorter pieces mean more balls, longer ones bigger balls. With a reach of 5
# pixels, the work per voxel of neurite is the same for pieces of 4 to 6.
PIECE = 4.0
# Pairs of a piece and a voxel computed at a time: temporary arrays take 0.5 MB each.
PAIRS = 1 << 16
# Distances are computed in float64; rounding must not lose a voxel that lies exactly on a radius.
ROUNDING = 1e-9
# Number of halvings of a piece that find its point nearest to a voxel's extent so precisely.
HALVINGS = 36


@dataclass(frozen=True)
class Sample:
    """A pair in memory: normalised image (z, y, x), spacing (dz, dy, dx) in µm, tree and target.

    unknown: why the spacing is not known in µm; see `neurolib.volume.Volume`. kind: of the target.
    """

    pair: Pair
    image: np.ndarray
    spacing: tuple[float, float, float]
    tree: Tree
    response: np.ndarray
    mask: np.ndarray
    unknown: str = ""
    kind: str = "sironi"


def read_sample(pair: Pair, kind: str = "sironi", tau: float = 0.1) -> Sample:
    """Read a pair: normalised image, tree, response and mask of the target.

    A tree that lies mostly outside the image is a `DataError`.
    """
    volume, tree = read_pair(pair)
    if repairs := "; ".join(repair for repair in tree.repairs if "reordered" not in repair):
        warnings.warn(f"{pair.swc.name}: {repairs}", NeurolibWarning, stacklevel=2)
    check_pair(tree, volume.data.shape, pair.name)
    response, mask = make_target(tree, volume.data.shape, volume.spacing, kind, tau=tau)
    image = normalise(volume.data)
    return Sample(pair, image, volume.spacing, tree, response, mask, volume.unknown, kind)


def ignore_untraced(sample: Sample) -> Sample:
    """Mark as unknown what looks like neurite but is far from the tree, which may lack branches.

    Where the image stands out as neurites do (`neurolib.volume.empty_level`) and the centreline is
    5 pixels away or more, the response becomes NaN, which every loss counts as correct background.
    As a side effect, the network does not learn that bright specks are background.
    """
    bright = standing_out(sample.image) > empty_level(sample.image)
    unknown = bright & (sample.response == 0)
    if sample.kind == "radius":  # its response is 0 right beside the neurite
        near, _ = make_target(sample.tree, sample.image.shape, sample.spacing)
        unknown &= near == 0
    return replace(sample, response=np.where(unknown, np.float32(np.nan), sample.response))


def every_slice(sample: Sample, every: int) -> Sample:
    """Slices 0, every, 2 every ... of a sample, as views; the tree keeps the frame of the whole."""
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


def tube_radius(tau: float = 0.1) -> float:
    """Radius of the tube that `make_target` marks around a centreline, in pixels.

    It is the distance at which the response equals `tau`, in (0, 1]: 0.58, 1.90, 2.46, 3.65 for
    tau = 0.5, 0.1, 0.05, 0.01. A pixel is the smaller of dy and dx.
    """
    check_range("tau", tau)
    return float(distance_of(tau))


def make_target(
    tree: Tree,
    shape: Shape,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    kind: str = "sironi",
    *,
    tau: float = 0.1,
) -> tuple[np.ndarray, np.ndarray]:
    """Turn a traced tree into a response and a mask on the grid of its volume.

    Parameters
    ----------
    tree : Tree
        Nodes in voxel coordinates, radii in voxels of the plane (see `Tree`). Parts of the tree
        outside the volume mark the voxels they reach inside; a tree without nodes marks none.
    shape : (int, int, int)
        Volume shape (z, y, x).
    spacing : (float, float, float)
        Voxel size (dz, dy, dx) in any one unit; only the ratios matter.
    kind : {"sironi", "scale_space", "radius"}
        "sironi": y = (exp(a (1 - D / d_max)) - 1) / (exp(a) - 1) for D < d_max, else 0, with D
        the distance to the nearest edge (see Notes), a = 6 and d_max = 5 pixels (a pixel is the
        smaller of dy and dx); the mask is y >= tau.
        "scale_space": another name for the same target (see Notes).
        "radius": the union of the balls of radius max(r, 1 pixel) along all edges, r interpolated
        between the nodes; the response is the mask as 0 or 1, and tau does not matter.
    tau : float
        Threshold on the response, in (0, 1]; `tube_radius` gives the radius of the tube.

    Returns
    -------
    response : (z, y, x) float32 array in [0, 1]
    mask : (z, y, x) bool array

    Notes
    -----
    Distances are exact. They are measured to the edge itself, not to samples of it, so a slanted
    neurite is as wide as a straight one. If a voxel is longer than a pixel along an axis, its
    extent matters: D is the distance to the nearest of the pixel-sized cubes that fill it. So the
    voxels that an edge passes through lie within sqrt(3) / 2 pixels of it, and for tau up to 0.35,
    where the tube's radius is at least that, the mask of a connected tree is connected, whatever
    the spacing. Only voxels near the tree are visited.

    The response has the form given by Sironi, Türetken, Lepetit and Fua, "Multiscale Centerline
    Detection", TPAMI 2016; a, d_max and tau are choices of this course. Their paper defines it in
    scale space: at voxel x and radius r, D² = |x - c|² + (r - r_c)² to a point c of the centreline
    with radius r_c. The largest value over all r is at r = r_c, where D = |x - c|; so the two
    names mean the same target.
    """
    if kind not in KINDS:
        raise SettingsError(f"kind: unknown target {kind!r}; choose one of {', '.join(KINDS)}")
    check_range("tau", tau)
    shape, scale = _triple("shape", shape, VolumeError), check_spacing(spacing)
    scale = scale / scale[1:].min()  # voxel size in pixels
    start, end = _pieces(tree, scale)
    if kind == "radius":
        # max(r, 1) is the union of all pieces with radius 1 and of the thicker ones with their own.
        thick = np.flatnonzero(np.maximum(start[:, 3], end[:, 3]) > 1)
        rows = np.append(np.arange(len(start)), thick)
        radius = np.append(np.ones(len(start)), start[thick, 3])
        growth = np.append(np.zeros(len(start)), end[thick, 3] - start[thick, 3])
        start, end, reach = start[rows, :3], end[rows, :3], np.maximum(radius, radius + growth)
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

    response, reach = np.zeros(shape, np.float32), np.full(len(start), REACH)
    for voxel, _, _, distance in _near(start[:, :3], end[:, :3], reach, scale, shape):
        np.maximum.at(response.reshape(-1), voxel, response_at(distance))
    return response, response >= np.float32(tau)


def block_starts(size: int, block: int, stride: int) -> np.ndarray:
    """First voxels (k,) of the blocks along one axis; the last block shifts inward to end with it.

    An axis shorter than a block has one block, at 0. If the stride is no longer than a block, the
    blocks cover the axis.
    """
    if min(size, block, stride) < 1:
        raise SettingsError(f"size {size}, block {block}, stride {stride}: each must be at least 1")
    last = max(size - block, 0)
    return np.append(np.arange(0, last, stride), last)


def block_grid(shape: Shape, block: Shape = BLOCK, stride: Shape = STRIDE) -> np.ndarray:
    """Positions of all blocks of a volume.

    Parameters
    ----------
    shape : (int, int, int)
        Volume shape (z, y, x).
    block : (int, int, int)
        Block shape; the depth is odd, so that there is a centre slice.
    stride : (int, int, int)
        Steps between blocks. With stride 1 in z every slice is the centre of blocks; for a network
        that predicts all slices of a block, a stride equal to the depth covers the volume too.

    Returns
    -------
    (n, 3) int array
        Centre slice z, first row y, first column x; ordered by z, then y, then x.
    """
    shape = _triple("shape", shape, VolumeError)
    block, stride = _check_block(block), _triple("stride", stride, SettingsError)
    axes = map(block_starts, shape, (1, *block[1:]), stride)
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)


def read_block(data: np.ndarray, position: np.ndarray, block: Shape = BLOCK) -> np.ndarray:
    """Cut one block out of a volume.

    Parameters
    ----------
    data : (z, y, x) array
        Anything that can be sliced (memory-mapped, zarr) will do.
    position : (int, int, int)
        Centre slice z and first row y, column x. Slices beyond the volume repeat the outermost
        one; rows and columns beyond it are reflected, as often as it takes.
    block : (int, int, int)
        Block shape.

    Returns
    -------
    array of shape `block`
        A view of `data` (do not write to it) where the block lies inside, else a copy.
    """
    depth, rows, columns = _check_block(block)
    shape = data.shape
    if len(shape) != 3:
        raise VolumeError(f"shape: expected three integers (z, y, x), got {shape}")
    z, y, x = (int(value) for value in position)
    if not 0 <= z < shape[0]:
        raise VolumeError(f"block at slice {z}: the volume has slices 0 to {shape[0] - 1}")
    # Plain integers, because this is called per block and small arrays cost more than the view.
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
    mask: np.ndarray, positions: np.ndarray, minimum: float = 0.001, block: Shape = BLOCK
) -> np.ndarray:
    """Which blocks (n,) have enough foreground in their centre slice.

    Parameters
    ----------
    mask : (z, y, x) bool array
    positions : (n, 3) int array
        From `block_grid`.
    minimum : float
        Least share of foreground in the centre slice, padding included. The paper asks for
        salient blocks but gives no number; 0.001 (10 of 100 x 100 voxels) is ours.
    block : (int, int, int)
        Block shape.
    """
    shape, positions = _triple("shape", mask.shape, VolumeError), np.asarray(positions)
    if positions.ndim != 2 or positions.shape[1] != 3:
        raise VolumeError(f"positions: expected shape (n, 3), got {positions.shape}")
    outside = ((positions < 0) | (positions >= shape)).any(axis=1)
    if outside.any():
        bad = positions[outside][0].tolist()
        raise VolumeError(f"positions: {bad} lies outside the volume of shape {shape}")
    plane = (1, *_check_block(block)[1:])
    counts = [np.count_nonzero(read_block(mask, position, plane)) for position in positions]
    return np.array(counts) / prod(plane) >= minimum


def choose_blocks(
    mask: np.ndarray, positions: np.ndarray, negatives: float, seed: int = 0, block: Shape = BLOCK
) -> np.ndarray:
    """Choose training blocks: all salient ones, and some others to learn the background from.

    Parameters
    ----------
    mask, positions, block
        As in `salient`.
    negatives : float
        Number of other blocks, as a share of the number of salient ones (rounded up); all of
        them if there are fewer.
    seed : int
        The same seed chooses the same blocks.

    Returns
    -------
    (k,) int array
        Increasing indices into `positions`; empty if no block is salient.
    """
    check_range("negatives", negatives)
    chosen = salient(mask, positions, block=block)
    others = np.flatnonzero(~chosen)
    number = min(len(others), int(np.ceil(negatives * chosen.sum())))
    chosen[np.random.default_rng(seed).choice(others, number, replace=False)] = True
    return np.flatnonzero(chosen)


def gaussian_window(shape: tuple[int, int]) -> np.ndarray:
    """Weights (y, x) of a block's pixels, as float32, that fall off from its centre.

    The standard deviation is 1/8 of the side, as in nnU-Net (Isensee et al. 2021): the weights go
    from about 1 in the middle to above 1e-7 in the corners. `shape` is (rows, columns).
    """
    offset = [(np.arange(n) - (n - 1) / 2) / (n / 8) for n in shape]
    y, x = (np.exp(-0.5 * values**2) for values in offset)
    return np.outer(y, x).astype(np.float32)


def response_at(distance: np.ndarray) -> np.ndarray:
    """The target's response (float32) at distances of at most `REACH` from the centreline."""
    return (np.expm1(STEEPNESS * (1 - distance / REACH)) / np.expm1(STEEPNESS)).astype(np.float32)


def distance_of(response: np.ndarray) -> np.ndarray:
    """The distance from the centreline at which the target has a response: `REACH` where it is 0.

    A float32 response stays float32.
    """
    return REACH * (1 - np.log1p(response * float(np.expm1(STEEPNESS))) / STEEPNESS)


def _pieces(tree: Tree, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tree's edges, cut into short pieces: their starts and ends, (n, 4) z, y, x, radius.

    Lengths are in pixels; along a coarser axis, a piece may be longer, as its voxels are.
    A root gives a piece of length 0, so that a node without edges counts too.
    """
    nodes = np.column_stack([tree.xyz[:, ::-1] * scale, np.maximum(tree.radius, 0) * _plane(scale)])
    if not np.isfinite(nodes).all():
        bad = int(np.flatnonzero(~np.isfinite(nodes).all(axis=1))[0])
        raise DataError(f"tree: node {bad} has a coordinate or radius that is not finite")
    base = nodes[np.where(tree.parent >= 0, tree.parent, np.arange(len(nodes)))]
    step = nodes - base
    length = np.linalg.norm(step[:, :3] / np.maximum(scale, 1), axis=1)
    count = np.maximum(np.ceil(length / PIECE), 1).astype(int)
    edge, number = repeated(count)
    base, step, number = base[edge], step[edge] / count[edge, None], number[:, None]
    return base + number * step, base + (number + 1) * step


def _near(start, end, reach, scale, shape: Shape, growth=None) -> Iterator[tuple[np.ndarray, ...]]:
    """Find the voxels within `reach` of each piece, and the nearest place on the piece.

    start, end: (n, 3); reach: (n,). With `growth` (n,), the change of radius from start to end,
    "nearest" is where distance minus radius is least. Yields four (m,) arrays at a time: flat
    voxel index, piece, place on it (0 start to 1 end) and distance. A voxel may be yielded once
    for every piece.
    """
    # Strategy: the same ball of voxels (`ball`, offsets from the voxel nearest to the middle) is
    # placed around the middle of every piece, so distances are computed for many pieces at a time.
    # Pieces are grouped by reach, because a single soma must not enlarge every ball.
    # The lower bound on the half length avoids a division by 0 for a piece of length 0.
    middle, half = (start + end) / 2, np.maximum(np.linalg.norm(end - start, axis=1) / 2, ROUNDING)
    direction = (end - start) / (2 * half[:, None])
    slope = None if growth is None else growth / (2 * half)
    centre = np.rint(middle / scale).astype(np.int64)
    offset = middle - centre * scale
    level, longer = np.ceil(reach).astype(int), np.maximum(scale - 1, 0)
    for size in np.unique(level):
        radius = size + PIECE / 2 + np.linalg.norm(np.minimum(scale, 1)) / 2
        # Along a coarser axis, voxels may lie farther from the middle: by half their length for
        # their extent, by as much again because the middle is rounded, and more for longer pieces.
        slack = longer * (1 + PIECE / 2)
        extent = np.floor((radius + slack) / scale).astype(int)
        touching = ((centre >= -extent) & (centre < shape + extent)).all(axis=1)
        pieces = np.flatnonzero((level == size) & touching)
        for ball in _balls(centre[pieces], radius, slack, extent, scale, shape):
            place = (ball * scale).T
            step = max(1, PAIRS // max(1, len(ball)))
            for batch in (pieces[i : i + step] for i in range(0, len(pieces), step)):
                piece = offset[batch], direction[batch], half[batch]
                tilt = None if slope is None else slope[batch]
                if longer.any():
                    square, nearest = _to_extents(place, longer / 2, *piece, tilt, reach[batch])
                else:
                    square, nearest = _to_centres(place, *piece, tilt)
                hit = np.flatnonzero(square <= reach[batch, None] ** 2 + ROUNDING)
                row, column = np.divmod(hit, len(ball))
                voxel = [centre[batch, axis][row] + ball[column, axis] for axis in range(3)]
                inside = np.logical_and.reduce(
                    [(v >= 0) & (v < n) for v, n in zip(voxel, shape, strict=True)]
                )
                hit, piece = hit[inside], batch[row[inside]]
                flat = np.ravel_multi_index([v[inside] for v in voxel], shape)
                along = (nearest.reshape(-1)[hit] / half[piece] + 1) / 2
                yield flat, piece, along, np.sqrt(square.reshape(-1)[hit])


def _balls(centre, radius: float, slack, extent, scale, shape: Shape) -> Iterator[np.ndarray]:
    """Offsets (n, 3) to the voxels of a ball, longer by `slack`; a large ball (a soma) in slabs.

    centre: (m, 3), of all balls; slack, extent, scale: (3,).
    """
    if not len(centre):
        return
    low, high = -extent, extent
    if (scale < 1).any():
        # Thin slices can make a ball many volumes deep: keep the offsets that lead into this one.
        low = np.maximum(low, -centre.max(axis=0))
        high = np.minimum(high, np.subtract(shape, 1) - centre.min(axis=0))
    sides = [np.arange(i, j + 1) for i, j in zip(low, high, strict=True)]
    slabs = min(len(sides[0]), -(-prod(map(len, sides)) // PAIRS))
    for slab in np.array_split(sides[0], slabs):
        ball = np.stack(np.meshgrid(slab, *sides[1:], indexing="ij"), -1).reshape(-1, 3)
        away = np.maximum(np.abs(ball * scale) - slack, 0)
        yield ball[(away**2).sum(axis=1) <= radius**2]


def _to_centres(place, shift, direction, half, slope) -> tuple[np.ndarray, np.ndarray]:
    """Squared distances (n, m) of pieces to voxels `place` (3, m), and the nearest places.

    The pieces have `shift` and `direction` (n, 3), half their length and `slope` (n,).
    The places are coordinates (n, m) along the pieces. The squared distance to the middle and the
    coordinate along the piece are two matrix products; the distance to the segment follows by
    Pythagoras.
    """
    along = direction @ place
    along -= (direction * shift).sum(axis=1)[:, None]
    square = (place**2).sum(axis=0) - 2 * (shift @ place) + (shift**2).sum(axis=1)[:, None]
    square -= along**2
    np.maximum(square, 0, out=square)
    nearest = along
    if slope is not None:
        # The nearest point of a cone lies ahead of the foot of the perpendicular, by a multiple of
        # the perpendicular's length. If the ball at one end holds all others, take that end.
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
    place, longer, shift, direction, half, slope, reach
) -> tuple[np.ndarray, np.ndarray]:
    """`_to_centres` for voxels that extend by `longer` (3,) on both sides; infinite beyond reach.

    The distance to a box minus a slope is convex along a piece, so repeated halving finds
    its minimum.
    """
    apart = shift[:, None] - place.T
    # A lower bound first, from the box around the piece.
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


def _reflect(index: np.ndarray, size: int) -> np.ndarray:
    """Indices mirrored at the first and last voxel (not repeating them) until they are inside."""
    if size == 1:
        return np.zeros_like(index)
    index = np.abs(index) % (2 * size - 2)
    return np.minimum(index, 2 * size - 2 - index)


def _triple(name: str, values: tuple, error: type[Exception]) -> Shape:
    """Three integers of at least 1, or `error`."""
    values = tuple(values)
    if len(values) != 3 or any(int(v) != v or v < 1 for v in values):
        raise error(f"{name}: expected three integers (z, y, x) of at least 1, got {values}")
    return tuple(int(v) for v in values)


def _check_block(block: tuple) -> Shape:
    block = _triple("block", block, SettingsError)
    if block[0] % 2 == 0:
        raise SettingsError(f"block: expected an odd depth (a centre slice), got {block[0]}")
    return block


def _plane(scale: np.ndarray) -> float:
    """Pixels per unit of a tree's radii, which are in voxels of the plane: sqrt(dy dx)."""
    return float(np.sqrt(scale[1] * scale[2]))
