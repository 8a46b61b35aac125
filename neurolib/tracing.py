"""From a probability or a mask to trees: the TEASAR idea on a sparse graph, stage by stage.

The stages, in the order in which `trace` calls them:

1. `find_foreground`: voxels above the threshold, their 26-neighbour graph, small parts dropped;
2. `measure_radius`: distance of each voxel to the background;
3. `path_cost`: cheap along the middle of a neurite, expensive at its edge;
4. `find_paths`: from the root, the cheapest path to the farthest voxel not yet explained, and on;
5. `prune_paths`: paths too short to be branches go;
6. `bridge_gaps`: ends that face each other across a gap are joined;
7. `smooth_tree`: off the voxel grid, ends drawn back into the neurite, even steps, radii.

Stage 1 reads the volume box by box, so that it need not be in memory; from there on only the
foreground is held, of which stages 2 to 5 see one connected component at a time.

Lengths, radii and distances are in voxels of the finest axis: with spacing (2, 0.5, 0.5) a step
of one slice has length 4. With isotropic spacing they are plain voxels. `Tree.xyz` stays in voxel
indices along each axis, whatever the spacing, and the radii of the result of `trace` are in voxels
of the plane, as in every `Tree`.

Sato et al., "TEASAR: tree-structure extraction algorithm for accurate and robust skeletons",
Pacific Graphics 2000. The constants are ours, where no source is named.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import psutil
from scipy import ndimage, sparse
from scipy.sparse import csgraph
from scipy.spatial import KDTree

from neurolib.data.formats import check_spacing
from neurolib.errors import NothingFoundError, SettingsError, VolumeError
from neurolib.swc import SOMA, Tree, components, length, resample, take, tips
from neurolib.swc import edges as tree_edges
from neurolib.volume import pieces

SOMA_RATIO = 2.5  # a soma is this many times thicker than the median foreground voxel
SOMA_NEURITES = 4.0  # and its tree this many times longer than its radius, unlike a thick fragment
HALF_VOXEL = 0.5
DENSE = 0.05  # share of its bounding box from which a foreground is better transformed densely
CENTRING = 10.0  # weight of the radius in the cost of a path
CERTAINTY = 2.0  # weight of the probability in the cost of a path
EXPLAINED_SCALE, EXPLAINED_MARGIN = 1.5, 3.0  # a path explains what lies within 1.5 r + 3 of it
DETOUR = 2.0  # unless its way to the path is twice as long: a neurite beside it, a loop
BRANCH_MARGIN = 6.0  # a branch is longer than 6 + r, counted from the middle of its parent
# Degrees by which an end may point away from the bridge, and both ends together. Over 600 random
# cuts in six real neurons, 60 alone closes as many of them, and joins twice as many wrong ends.
BRIDGE_ANGLE, BRIDGE_BEND = 60.0, 80.0
END_LENGTH = 10.0  # the stretch at an end that gives its direction
MOVES = np.array([move for move in np.ndindex(3, 3, 3) if move != (1, 1, 1)]) - 1
# Share of the radius nearby; on tubes of radius 1.5 to 3.5, ends fit on average.
FULL_THICKNESS = 0.7
SMOOTHING_PASSES = 2  # of weight 1/2 each: a Gaussian of standard deviation 1 node; more cuts bends
UNDEFINED = 0  # SWC type; a tracer cannot tell axon from dendrite
# Most memory in bytes of a foreground voxel, and on top of that of one of the component in hand:
# measured 670 in tubes of radius 1.9, 1650 in a cube, each of a million voxels or more.
VOXEL_BYTES, GRAPH_BYTES = 200, 1700

Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Foreground:
    """Foreground voxels of a volume and their graph; n voxels, in raster order per component.

    voxels (n, 3): indices z, y, x; probability (n,) in [0, 1]; component (n,): number of the
    connected component, 0 the largest; neighbours: sparse (n, n), the distances of
    26-neighbours; shape (z, y, x) of the volume; scale (z, y, x): edge lengths of a voxel in units
    of its shortest edge.
    """

    voxels: np.ndarray
    probability: np.ndarray
    component: np.ndarray
    neighbours: sparse.csr_array
    shape: tuple[int, int, int]
    scale: np.ndarray

    @property
    def points(self) -> np.ndarray:
        """Voxel centres (n, 3), z, y, x, in units of the finest axis."""
        return self.voxels * self.scale


@dataclass(frozen=True)
class Bridge:
    """A gap that was closed: xyz of both ends in voxels, length (finest voxels), mean p in it."""

    start: tuple[float, float, float]
    end: tuple[float, float, float]
    length: float
    probability: float


def trace(
    probability: np.ndarray,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    seed: tuple[float, float, float] | None = None,
    threshold: float = 0.5,
    min_size: int = 20,
    bridge: float = 15.0,
    step: float = 2.0,
    log: list[Bridge] | None = None,
    regions: Iterable[Box] | None = None,
) -> Tree:
    """Trace the neurites of a probability volume or a mask.

    Parameters
    ----------
    probability : (z, y, x), floats in [0, 1] or booleans
        Need not be in memory: it is sliced, once per region and once per gap that may be closed.
    spacing : (dz, dy, dx), physical edge lengths of a voxel in any one unit
    seed : (z, y, x) in voxels; the root of the component nearest to it is there, or at the centre
        of the soma that it lies in. Without a soma or seed the root is an end of the longest path
    threshold : voxels of at least this probability are foreground
    min_size : components of fewer voxels are dropped
    bridge : longest gap to be closed, in voxels of the finest axis; 0 keeps the forest
    step : distance of the nodes of the result, in voxels of the finest axis
    log : a list that receives a `Bridge` for every gap closed
    regions : boxes (three slices each) that do not overlap and hold all the foreground; what is
        outside of them is not read. By default all of the volume, in boxes of whole chunks.
        The tree does not depend on how the volume is cut

    Returns
    -------
    Tree
        Parents before children, no cycle, one root per tree. The tree with the seed comes first,
        then by size. `radius` in voxels of the plane, the geometric mean of dy and dx being 1;
        type 1 for the soma, else 0. There is one soma at most: the thickest candidate (see
        `find_soma`) whose tree is not a mere fragment, or with a seed only one that the seed
        lies in.

    Raises
    ------
    NothingFoundError
        If nothing reaches the threshold.
    VolumeError, SettingsError
        If the volume, the seed or an option is unusable.
    """
    if step <= 0 or bridge < 0:
        raise SettingsError(f"step must be positive and bridge at least 0, got {step} and {bridge}")
    voxels = _collect(probability, spacing, threshold, min_size, regions)
    first = None if seed is None else voxels.nearest(seed)
    trees, shells = [], []
    for number in sorted(range(voxels.components), key=lambda number: number != first):
        part = voxels.component(number)
        shells.append(background_shell(part).astype(np.int32))
        radius = measure_radius(part, shell=shells[-1])
        cost = path_cost(part, radius)
        paths = find_paths(part, radius, cost, seed if number == first else None)
        trees.append(paths_to_tree(prune_paths(paths, part, radius), part, radius))
    trees = _one_soma(trees, voxels.scale, seed is not None)
    tree, shell = _side_by_side(trees), np.concatenate(shells)
    if bridge > 0:
        tree, bridges = bridge_gaps(tree, probability, spacing, bridge, seed)
        if log is not None:
            log.extend(bridges)
    return smooth_tree(tree, shell, voxels.scale, step)


# Where nothing is found.
NOTHING = Tree(np.zeros((0, 3)), np.zeros(0), np.zeros(0, int), np.zeros(0, int))


def attempt(probability: np.ndarray, *arguments: object, **options: object) -> Tree:
    """As `trace`; where nothing is found, say so and return a tree without nodes.

    To find nothing is a result, of a weak network or of a volume that is empty: it is reported, and
    the work goes on.
    """
    try:
        return trace(probability, *arguments, **options)
    except NothingFoundError as error:
        print(error)
        return NOTHING


# --- 1. Foreground -----------------------------------------------------------------------------


def find_foreground(
    probability: np.ndarray,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    threshold: float = 0.5,
    min_size: int = 20,
    regions: Iterable[Box] | None = None,
) -> Foreground:
    """Voxels above the threshold in components of at least `min_size`, with their graph.

    Parameters and errors are those of `trace`.
    """
    found = _collect(probability, spacing, threshold, min_size, regions)
    parts = [found.component(number) for number in range(found.components)]
    return replace(
        parts[0],
        voxels=np.concatenate([part.voxels for part in parts]),
        probability=np.concatenate([part.probability for part in parts]),
        component=np.repeat(np.arange(len(parts)), [len(part.voxels) for part in parts]),
        neighbours=sparse.block_diag([part.neighbours for part in parts], format="csr"),
    )


@dataclass(frozen=True)
class _Collected:
    """All that is known of a foreground before its graph is made, by components.

    number (n,): of the voxels (`_number`), ascending in each component, the largest component
    first; probability (n,); start (components + 1,): where in these each component begins; shape
    and scale as in `Foreground`.
    """

    number: np.ndarray
    probability: np.ndarray
    start: np.ndarray
    shape: tuple[int, int, int]
    scale: np.ndarray

    @property
    def components(self) -> int:
        return len(self.start) - 1

    def component(self, number: int) -> Foreground:
        """One component as a foreground of its own."""
        part = slice(self.start[number], self.start[number + 1])
        return Foreground(
            voxels=_voxels(self.number[part], self.shape),
            probability=self.probability[part].astype(float),
            component=np.zeros(part.stop - part.start, dtype=int),
            neighbours=_neighbour_graph(self.number[part], self.shape, self.scale),
            shape=self.shape,
            scale=self.scale,
        )

    def nearest(self, seed: tuple[float, float, float]) -> int:
        """Number of the component nearest to a point (z, y, x) in the volume."""
        point = _check_seed(seed, self.shape) * self.scale
        away = []
        for first, last in pairwise(self.start):
            points = _voxels(self.number[first:last], self.shape) * self.scale
            away.append(((points - point) ** 2).sum(axis=1).min())
        return int(np.argmin(away))


def _collect(
    probability: np.ndarray,
    spacing: tuple[float, float, float],
    threshold: float,
    min_size: int,
    regions: Iterable[Box] | None,
) -> _Collected:
    """Read the foreground of a volume box by box; see `find_foreground`."""
    # Strategy: components are found in each box by itself. One that is too small and touches no
    # other box goes at once, so that specks never pile up. At the end, neighbours among the
    # voxels at the faces of boxes tell which components are one.
    probability, scale = _check_volume(probability), _scale(spacing)
    if not 0 < threshold <= 1 or min_size < 0:
        raise SettingsError(
            f"threshold must lie in (0, 1] and min_size be at least 0, got {threshold} and "
            f"{min_size}"
        )
    min_size = max(1, min_size)  # 0 keeps all pieces, too
    shape = tuple(probability.shape)
    total, held, labels = 0, 0, 0
    found: list[tuple[np.ndarray, ...]] = []
    for box in pieces(probability) if regions is None else regions:
        part = _check_range(probability[box])
        # Of one axis, NumPy finds what is set six times faster than of three.
        inside = np.flatnonzero(part if part.dtype == bool else part >= threshold)
        if not len(inside):
            continue
        inside = np.stack(np.unravel_index(inside, part.shape), axis=1)
        total += len(inside)
        _check_memory(held, len(inside), threshold)
        number = _number(inside + [side.start or 0 for side in box], shape)
        label = _label(number, shape)
        rim = ((inside == 0) | (inside == np.array(part.shape) - 1)).any(axis=1)
        kept = np.bincount(label) >= min_size
        kept[label[rim]] = True
        label, kept = (np.cumsum(kept) - 1 + labels)[label], kept[label]
        found.append((number[kept], part[tuple(inside[kept].T)], label[kept], rim[kept]))
        held += len(found[-1][0])
        labels = max(labels, int(label.max()) + 1)
    number, values, label, rim = (
        map(np.concatenate, zip(*found, strict=True)) if found else [[]] * 4
    )
    if len(found) > 1:
        label = _joined(number[rim], label[rim], labels, shape)[label]
    size = np.bincount(label) if held else np.zeros(0, dtype=int)
    large = size >= min_size
    if not large.any():
        raise NothingFoundError(
            f"nothing to trace: {total} voxels reach the threshold {threshold:g} and no "
            f"component has {min_size}; lower the threshold or min_size"
        )
    first = np.full(len(size), np.iinfo(np.int64).max)
    np.minimum.at(first, label, number)
    rank = np.empty(len(size), dtype=int)
    rank[np.lexsort([first, -size])] = np.arange(len(size))
    order = np.lexsort([number, rank[label]])[: size[large].sum()]
    _check_memory(len(order), int(size.max()), threshold)
    start = np.concatenate([[0], np.cumsum(np.sort(size[large])[::-1])])
    return _Collected(number[order], values[order], start, shape, scale)


def _check_memory(held: int, graph: int, threshold: float) -> None:
    """Refuse voxels that would not fit in memory: `held` as such, and `graph` as a graph, too."""
    free = psutil.virtual_memory().available
    if held * VOXEL_BYTES + graph * GRAPH_BYTES > free:
        raise VolumeError(
            f"{held + graph} connected voxels or more reach the threshold {threshold:g}, but about "
            f"{free // GRAPH_BYTES} can be traced in the {free / 2**30:.1f} GiB of memory that are "
            "free; raise the threshold, or min_size where most are specks"
        )


def _joined(number: np.ndarray, label: np.ndarray, labels: int, shape: tuple) -> np.ndarray:
    """New labels (labels,) after voxels with these labels, of several boxes, met each other."""
    order = np.argsort(number)
    number, label = number[order], label[order]
    edges = [(label[row], label[other]) for row, other in _backward(number, shape)]
    graph = sparse.csr_array(
        (np.ones(sum(len(row) for row, _ in edges)), np.concatenate(edges, axis=1)),
        shape=(labels, labels),
    )
    return csgraph.connected_components(graph, directed=False)[1]


def _label(number: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Number of the connected component of each voxel; voxels by ascending number."""
    n = len(number)
    edges = np.concatenate(list(_backward(number, shape)), axis=1)
    graph = sparse.csr_array((np.ones(edges.shape[1], np.int8), edges), shape=(n, n))
    return csgraph.connected_components(graph, directed=False)[1]


def _neighbour_graph(number: np.ndarray, shape: tuple, scale: np.ndarray) -> sparse.csr_array:
    """Sparse (n, n) matrix of the distances between 26-neighbours; voxels by ascending number."""
    # Filling one column per offset, in ascending order, gives the rows of a CSR matrix.
    n = len(number)
    table = np.full((n, len(MOVES)), -1, dtype=np.int32)
    for column, (row, other) in enumerate(_backward(number, shape)):
        table[row, column] = other
        table[other, len(MOVES) - 1 - column] = row  # the same edge from its other end
    there = table >= 0
    indices = table[there]
    del table  # the largest array of all
    lengths = np.linalg.norm(MOVES * scale, axis=1)
    data = np.broadcast_to(lengths, there.shape)[there]
    start = np.concatenate([[0], np.cumsum(there.sum(axis=1))])
    return sparse.csr_array((data, indices, start), shape=(n, n))


def _backward(number: np.ndarray, shape: tuple) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows of neighbours, (m,) and (m,), for each of the 13 moves to a smaller number."""
    # A neighbour is a number at a fixed offset: a binary search finds it without a table of the
    # volume's size.
    strides = _strides(shape)
    for move in MOVES[: len(MOVES) // 2]:
        wanted = number + move @ strides
        place = np.searchsorted(number, wanted)
        # A smaller number than one of `number` is never beyond its end.
        row = np.flatnonzero(number[place] == wanted).astype(np.int32)
        yield row, place[row].astype(np.int32)


def _strides(shape: tuple[int, int, int]) -> np.ndarray:
    """Steps (3,) of a numbering of voxels in raster order with a margin of one on each side.

    With the margin no row runs into the next.
    """
    return np.array([(shape[1] + 2) * (shape[2] + 2), shape[2] + 2, 1])


def _number(voxels: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Numbers (n,) of voxels (n, 3); those of the margin have the index -1 or that of the end."""
    return voxels @ _strides(shape)


def _voxels(number: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Indices (n, 3) of numbered voxels."""
    z, y, x = (n + 2 for n in shape)
    return np.stack(np.unravel_index(number + _strides(shape).sum(), (z, y, x)), axis=1) - 1


# --- 2. Radius ---------------------------------------------------------------------------------


def measure_radius(
    foreground: Foreground, points: np.ndarray | None = None, shell: np.ndarray | None = None
) -> np.ndarray:
    """Distance r from foreground voxels, or from any points, to the edge of the foreground.

    The edge lies half a voxel before the nearest background voxel. Outside of the volume is
    background, except along an axis of a single slice, where nothing is known.

    Parameters
    ----------
    foreground : result of `find_foreground`
    points : (m, 3), z, y, x in units of the finest axis; all foreground voxels by default
    shell : result of `background_shell`, if it is there already

    Returns
    -------
    ndarray
        (n,) or (m,), in voxels of the finest axis, at least 0 (0.5 in the foreground).
    """
    box = np.prod(np.ptp(foreground.voxels, axis=0) + 1)
    if points is None and len(foreground.voxels) > DENSE * box:
        return _distance_transform(foreground) - HALF_VOXEL
    points = foreground.points if points is None else points
    shell = background_shell(foreground) if shell is None else shell
    return _edge_distance(shell * foreground.scale, points)


def _edge_distance(shell: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Distance (m,) of points to the edge of the foreground, half a voxel before its shell."""
    # Voxels are spread evenly enough: a tree that is not balanced is built in half the time.
    nearby = KDTree(shell, balanced_tree=False, compact_nodes=False)
    return np.maximum(nearby.query(points, workers=-1)[0] - HALF_VOXEL, 0)


def _distance_transform(foreground: Foreground) -> np.ndarray:
    """Distance of each foreground voxel to the nearest background voxel, by a dense transform.

    The same as the search in the shell: slower where the foreground is sparse in its bounding
    box, many times faster where it fills it (a bulky cell body, a threshold too low).
    """
    low, size = foreground.voxels.min(axis=0), np.ptp(foreground.voxels, axis=0) + 1
    margin = np.zeros(3, dtype=int)
    margin[_open_axes(foreground.shape)] = 1
    box = np.zeros(size + 2 * margin, dtype=bool)
    inside = tuple((foreground.voxels - low + margin).T)
    box[inside] = True
    # Distances of all of the box would take five times the memory of the places.
    place = ndimage.distance_transform_edt(
        box, foreground.scale, return_distances=False, return_indices=True
    )
    nearest = np.stack([axis[inside] for axis in place], axis=1) + low - margin
    return np.linalg.norm((foreground.voxels - nearest) * foreground.scale, axis=1)


def background_shell(foreground: Foreground) -> np.ndarray:
    """Indices (m, 3) of the background voxels with a face neighbour in the foreground.

    The background voxel nearest to any foreground voxel is one of them: a step from it towards
    that foreground voxel comes nearer, so it must end in the foreground.
    """
    strides = _strides(foreground.shape)
    inside = np.sort(_number(foreground.voxels, foreground.shape))
    outside = []
    for stride in strides[_open_axes(foreground.shape)]:
        for number in (inside - stride, inside + stride):
            place = np.minimum(np.searchsorted(inside, number), len(inside) - 1)
            outside.append(number[inside[place] != number])
    return _voxels(np.unique(np.concatenate(outside)), foreground.shape)


def _open_axes(shape: tuple[int, int, int]) -> list[int]:
    """Axes along which outside counts as background: not a single slice, if anything else is."""
    return [axis for axis in range(3) if shape[axis] > 1] or [0, 1, 2]


# --- 3. Cost -----------------------------------------------------------------------------------


def path_cost(foreground: Foreground, radius: np.ndarray) -> np.ndarray:
    """Cost per unit length of passing each voxel: exp(10 (1 - r / r_max)²) exp(2 (1 - p)).

    r_max is the largest radius of the voxel's component.

    Parameters
    ----------
    foreground : result of `find_foreground`
    radius : (n,) of the foreground voxels

    Returns
    -------
    ndarray
        (n,), at least 1.
    """
    largest = np.zeros(foreground.component[-1] + 1)
    np.maximum.at(largest, foreground.component, radius)
    off_centre = 1 - radius / largest[foreground.component]
    return np.exp(CENTRING * off_centre**2 + CERTAINTY * (1 - foreground.probability))


# --- 4. Paths ----------------------------------------------------------------------------------


def find_paths(
    foreground: Foreground,
    radius: np.ndarray,
    cost: np.ndarray,
    seed: tuple[float, float, float] | None = None,
) -> list[np.ndarray]:
    """Paths that together explain the whole foreground, longest first in each component.

    Parameters
    ----------
    foreground : result of `find_foreground`
    radius, cost : (n,) of the foreground voxels
    seed : see `trace`

    Returns
    -------
    list of ndarray
        Voxel numbers along each path. The first path of a component starts at its root, every
        other one at a voxel of an earlier path; otherwise no voxel is on two paths.

    """
    seed_voxel = None if seed is None else nearest_voxel(foreground, seed)
    bounds = np.searchsorted(foreground.component, np.arange(foreground.component[-1] + 2))
    points, paths = foreground.points, []
    ranges = list(pairwise(bounds))
    if seed_voxel is not None:
        ranges.insert(0, ranges.pop(foreground.component[seed_voxel]))
    for first, last in ranges:
        part = slice(first, last)
        lengths = _block(foreground.neighbours, part)
        in_part = seed_voxel is not None and first <= seed_voxel < last
        root = find_root(lengths, radius[part], seed_voxel - first if in_part else None)
        found = _component_paths(lengths, points[part], radius[part], cost[part], root)
        paths += [first + path for path in found]
    return paths


def _block(neighbours: sparse.csr_array, part: slice) -> sparse.csr_array:
    """The graph of a component, without a copy where there is no other."""
    whole = part.stop - part.start == neighbours.shape[0]
    return neighbours if whole else neighbours[part, part]


def find_root(lengths: sparse.csr_array, radius: np.ndarray, seed: int | None = None) -> int:
    """Number of the root voxel of one component.

    The seed, if given, or the centre of the soma that it lies in; else the soma, if there is one
    (the largest radius, where it is at least 2.5 times the median); else an end of the longest
    path.

    Parameters
    ----------
    lengths : sparse (n, n), distances of neighbours
    radius : (n,)
    seed : number of a voxel, or None
    """
    soma = find_soma(lengths, radius)
    if seed is not None and soma is not None:
        reach = radius[soma] + HALF_VOXEL
        away = csgraph.dijkstra(lengths, indices=soma, limit=reach, min_only=True)
        return soma if away[seed] <= reach else int(seed)
    if seed is not None:
        return int(seed)
    if soma is not None:
        return soma
    # What is farthest from any place in a tree is an end of its longest path.
    start = int(np.argmax(radius))
    return int(csgraph.breadth_first_order(lengths, start, return_predecessors=False)[-1])


def find_soma(lengths: sparse.csr_array, radius: np.ndarray) -> int | None:
    """Number of the thickest voxel if it is 2.5 times thicker than the neurites, else None.

    The thickness of the neurites is the median over the voxels that are no thinner than any of
    their neighbours: over all voxels it would say how thin the rim of a neurite is.

    Parameters
    ----------
    lengths : sparse (n, n), distances of neighbours
    radius : (n,)
    """
    thickest_neighbour = np.zeros(len(radius))
    joined = np.flatnonzero(np.diff(lengths.indptr))
    if len(joined):
        start = lengths.indptr[joined]
        thickest_neighbour[joined] = np.maximum.reduceat(radius[lengths.indices], start)
    middle = radius[radius >= thickest_neighbour] + HALF_VOXEL
    thickest = int(np.argmax(radius))
    return thickest if radius[thickest] + HALF_VOXEL >= SOMA_RATIO * np.median(middle) else None


def _component_paths(
    lengths: sparse.csr_array, points: np.ndarray, radius: np.ndarray, cost: np.ndarray, root: int
) -> list[np.ndarray]:
    """Paths of one connected component; see `find_paths`."""
    # Strategy: one run of Dijkstra's algorithm from the root gives every voxel its cheapest way
    # home. The voxel with the longest way home that no path explains yet is the next tip: follow
    # its way home until it meets an earlier path, then mark as explained what is near the new
    # path. Voxels are visited once, in order of that length.
    n = len(radius)
    weight = np.repeat(cost, np.diff(lengths.indptr))
    weight += cost[lengths.indices]
    weight *= lengths.data
    weight /= 2
    graph = sparse.csr_array((weight, lengths.indices, lengths.indptr), shape=(n, n))
    _, home = csgraph.dijkstra(graph, indices=root, return_predecessors=True)
    del weight, graph
    home[root] = root
    way = np.linalg.norm(points - points[home], axis=1)
    ancestor = home
    while np.any(ancestor != root):  # pointer doubling: way[i] reaches up to ancestor[i]
        way, ancestor = way + way[ancestor], ancestor[ancestor]

    nearby = KDTree(points)
    reach = EXPLAINED_SCALE * radius + EXPLAINED_MARGIN
    live, on_path = np.ones(n, dtype=bool), np.zeros(n, dtype=bool)
    paths, place = [], np.full(n, -1, dtype=np.int32)
    for tip in np.argsort(-way, kind="stable"):
        if not live[tip]:
            continue
        path = [tip]
        while not on_path[path[-1]] and path[-1] != root:
            path.append(home[path[-1]])
        path = np.array(path[::-1])
        on_path[path] = True
        live[_explained(path, way, reach, lengths, nearby, place)] = False
        paths.append(path)
    return paths


def _explained(
    path: np.ndarray,
    way: np.ndarray,
    reach: np.ndarray,
    lengths: sparse.csr_array,
    nearby: KDTree,
    place: np.ndarray,
) -> np.ndarray:
    """Numbers of the voxels that a path explains, its own included.

    They lie within `reach` of a voxel of the path, and the way to it through the foreground is no
    longer than `DETOUR` times that: a neurite that runs beside this one, or the other side of a
    loop, is not explained by it. `place` (n,) is -1 everywhere, before and after: an array of the
    component's size is not made for each path.
    """
    # Balls a quarter of their radius apart cover the path's surroundings but for 1/128 of it.
    around, count, covered = [path], len(path), -np.inf
    place[path] = np.arange(count)
    for voxel in path:
        if way[voxel] >= covered or voxel == path[-1]:
            ball = np.array(nearby.query_ball_point(nearby.data[voxel], reach[voxel]))
            ball = ball[place[ball] < 0]
            place[ball] = np.arange(count, count + len(ball))
            around.append(ball)
            count += len(ball)
            covered = way[voxel] + reach[voxel] / 4
    around = np.concatenate(around)
    near = lengths[around]
    column = place[near.indices]
    place[around] = -1
    inside = column >= 0
    start = np.concatenate([[0], np.cumsum(inside, dtype=np.int32)])[near.indptr]
    near = sparse.csr_array((near.data[inside], column[inside], start), shape=(count, count))
    limit = DETOUR * reach[path]
    distance, _, source = csgraph.dijkstra(
        near,
        indices=np.arange(len(path)),
        min_only=True,
        limit=limit.max(),
        return_predecessors=True,
    )
    return around[(source >= 0) & (distance <= limit[np.maximum(source, 0)])]


def nearest_voxel(foreground: Foreground, seed: tuple[float, float, float]) -> int:
    """Number of the foreground voxel nearest to a point (z, y, x) in the volume."""
    point = _check_seed(seed, foreground.shape) * foreground.scale
    return int(np.argmin(((foreground.points - point) ** 2).sum(axis=1)))


def _check_seed(seed: tuple[float, float, float], shape: tuple[int, int, int]) -> np.ndarray:
    point, size = np.asarray(seed, dtype=float), np.array(shape)
    if point.shape != (3,) or not np.all((point >= -0.5) & (point <= size - 0.5)):
        raise VolumeError(f"seed {seed} lies outside of the volume; expected z, y, x in {size}")
    return point


# --- 5. Pruning --------------------------------------------------------------------------------


def prune_paths(
    paths: list[np.ndarray], foreground: Foreground, radius: np.ndarray
) -> list[np.ndarray]:
    """Drop paths shorter than 6 + r, r being the radius where they leave their parent.

    The first path of a component stays, however short. A path that leaves a dropped one is always
    dropped too: it reaches no farther from the parent than that one did, and r changes by no more
    than the distance.
    """
    points, kept, component = foreground.points, [], -1
    for path in paths:
        length = np.linalg.norm(np.diff(points[path], axis=0), axis=1).sum()
        is_first = foreground.component[path[0]] != component
        component = foreground.component[path[0]]
        # Like r, the length runs to the edge, half a voxel beyond the centre of the last voxel.
        if is_first or length + HALF_VOXEL >= BRANCH_MARGIN + radius[path[0]]:
            kept.append(path)
    return kept


def paths_to_tree(paths: list[np.ndarray], foreground: Foreground, radius: np.ndarray) -> Tree:
    """The tree whose nodes are the voxels of the paths; see `trace` for its order and units.

    Its radii are r + 0.5: a tube of radius R, drawn as the voxels whose centre lies within R of
    the axis, measures r = R - 0.5 there. Drawing a tree gives the mask that it was traced from.
    """
    voxels, parents, row = [], [], {}
    for path in paths:
        new = path if int(path[0]) not in row else path[1:]
        parents.append(-1 if len(new) == len(path) else row[int(path[0])])
        parents.extend(range(len(voxels), len(voxels) + len(new) - 1))
        row.update(zip(new.tolist(), range(len(voxels), len(voxels) + len(new)), strict=True))
        voxels.extend(new.tolist())
    voxels = np.array(voxels)
    parent = np.array(parents)
    types = np.full(len(voxels), UNDEFINED)
    bounds = np.searchsorted(foreground.component, np.arange(foreground.component[-1] + 2))
    for root in np.flatnonzero(parent < 0):
        first, last = bounds[foreground.component[voxels[root]] + np.arange(2)]
        part = slice(first, last)
        soma = find_soma(_block(foreground.neighbours, part), radius[part])
        if soma is not None and voxels[root] == first + soma:
            types[root] = SOMA
    xyz = foreground.voxels[voxels][:, ::-1].astype(float)
    return Tree(xyz, radius[voxels] + HALF_VOXEL, types, parent)


def _one_soma(trees: list[Tree], scale: np.ndarray, seeded: bool) -> list[Tree]:
    """Trees of which one at most has a soma; the others are rooted at an end, as if without.

    Programs that read SWC files take a second soma for an error.
    """
    middle = np.median(np.concatenate([tree.radius for tree in trees]))
    somas = [number for number, tree in enumerate(trees) if tree.type[0] == SOMA]
    likely = [
        number
        for number in somas
        if trees[number].radius[0] >= SOMA_RATIO * middle
        and length(trees[number], scale) >= SOMA_NEURITES * trees[number].radius[0]
        and not (seeded and number)
    ]
    best = max(likely, key=lambda number: trees[number].radius[0], default=None)
    trees = trees.copy()
    for number in set(somas) - {best}:
        plain = replace(trees[number], type=np.full_like(trees[number].type, UNDEFINED))
        # The seed stays the root, in a soma or not.
        trees[number] = plain if seeded and number == 0 else _rooted_at_an_end(plain, scale)
    return trees


def _rooted_at_an_end(tree: Tree, scale: np.ndarray) -> Tree:
    edges = np.stack(tree_edges(tree))
    points = tree.xyz[:, ::-1] * scale
    lengths = np.linalg.norm(points[edges[0]] - points[edges[1]], axis=1)
    graph = sparse.csr_array((lengths, tuple(edges)), shape=(len(points), len(points)))
    end = np.argmax(csgraph.dijkstra(graph, directed=False, indices=0))
    return rooted(tree, edges, [int(end)])


def _side_by_side(trees: Sequence[Tree]) -> Tree:
    """Several forests as one, in this order."""
    above = np.concatenate([[0], np.cumsum([len(tree.parent) for tree in trees])])
    parent = [np.where(t.parent < 0, -1, t.parent + n) for t, n in zip(trees, above, strict=False)]
    xyz, radius, types = (
        np.concatenate([getattr(tree, name) for tree in trees])
        for name in ("xyz", "radius", "type")
    )
    return Tree(xyz, radius, types, np.concatenate(parent))


# --- 6. Bridges --------------------------------------------------------------------------------


def bridge_gaps(
    tree: Tree,
    probability: np.ndarray,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    longest: float = 15.0,
    seed: tuple[float, float, float] | None = None,
) -> tuple[Tree, list[Bridge]]:
    """Join trees whose ends face each other across a gap.

    Two ends may be joined if they are at most `longest` apart and each points towards the other
    to within 60 degrees, both together to within 80. Of these, a minimum spanning tree over the
    trees is taken, in which a bridge costs its length times the mean of exp(2 (1 - p)) along it:
    trees never become a loop. No bridge passes through another tree or bridge.
    The root of a joined tree is the soma, the thickest if there are several, else the root at the
    seed, else an end of the longest path.

    Parameters
    ----------
    tree : Tree
        Result of `paths_to_tree`; its nodes are no more than a voxel apart.
    probability, spacing : ndarray, tuple
        As given to `trace`.
    longest : float
        Longest bridge, in voxels of the finest axis.
    seed : tuple, optional
        As given to `trace`: the tree with it comes first and keeps its root.

    Returns
    -------
    tree : Tree
        With nodes along the bridges.
    bridges : list of Bridge
        In order of their cost.
    """
    probability, scale = _check_volume(probability), _scale(spacing)
    points = tree.xyz[:, ::-1] * scale
    ends, centre, outward, thickness = _open_ends(tree, points)
    label = components(tree)
    candidates = []
    for a, b in KDTree(points[ends]).query_pairs(longest, output_type="ndarray"):
        start, end = points[ends[a]], points[ends[b]]
        gap, way = end - start, centre[b] - centre[a]
        off = _angle(outward[a], way), _angle(outward[b], -way)
        faces = max(off) <= BRIDGE_ANGLE and sum(off) <= BRIDGE_BEND
        if faces and label[ends[a]] != label[ends[b]]:
            line = start + np.linspace(0, 1, 2 + int(2 * np.linalg.norm(gap)))[:, None] * gap
            certainty = _values(probability, np.rint(line / scale).astype(int))
            price = np.linalg.norm(gap) * np.exp(CERTAINTY * (1 - certainty)).mean()
            candidates.append((float(price), int(a), int(b), float(certainty.mean())))

    # Kruskal's algorithm: the cheapest bridge first, unless both ends are joined already.
    group = np.arange(label.max() + 1)
    bridges, xyz, radius, edges = [], [tree.xyz], [tree.radius], [np.stack(tree_edges(tree))]
    count, taken = len(points), KDTree(points)
    for _, a, b, certainty in sorted(candidates):
        start, end = ends[a], ends[b]
        if group[label[start]] == group[label[end]]:
            continue
        length = float(np.linalg.norm(points[end] - points[start]))
        share = np.linspace(0, 1, int(np.ceil(length)) + 1)[1:-1]
        way = points[start] + share[:, None] * (points[end] - points[start])
        # What lies in between is no gap: another neurite, or another bridge.
        if len(way) and np.any(taken.query_ball_point(way, HALF_VOXEL, return_length=True)):
            continue
        taken = KDTree(np.concatenate([taken.data, way])) if len(way) else taken
        group[group == group[label[end]]] = group[label[start]]
        ends_xyz = tree.xyz[[start, end]].tolist()
        bridges.append(Bridge(tuple(ends_xyz[0]), tuple(ends_xyz[1]), length, certainty))
        xyz.append(tree.xyz[start] + share[:, None] * (tree.xyz[end] - tree.xyz[start]))
        radius.append(thickness[a] + share * (thickness[b] - thickness[a]))
        chain_of_nodes = [start, *range(count, count + len(share)), end]
        edges.append(np.stack([chain_of_nodes[:-1], chain_of_nodes[1:]]))
        count += len(share)
    if not bridges:
        return tree, []
    types = np.concatenate([tree.type, np.full(count - len(points), UNDEFINED)])
    joined = Tree(np.concatenate(xyz), np.concatenate(radius), types, np.full(count, -1))
    edges = np.concatenate(edges, axis=1)
    roots = _joined_roots(tree, joined.xyz[:, ::-1] * scale, edges, seed is not None)
    return rooted(joined, edges, roots), bridges


def _values(probability: np.ndarray, voxels: np.ndarray) -> np.ndarray:
    """Probability at voxels (n, 3) that lie close together; their bounding box is read."""
    low, high = voxels.min(axis=0), voxels.max(axis=0) + 1
    part = probability[tuple(map(slice, low.tolist(), high.tolist()))]
    return _check_range(part)[tuple((voxels - low).T)].astype(float)


def _joined_roots(tree: Tree, points: np.ndarray, edges: np.ndarray, keep_first: bool) -> list[int]:
    """Rows of the new roots, one per group of joined trees, in the order of the old ones."""
    old = np.flatnonzero(tree.parent < 0)
    lengths = np.linalg.norm(points[edges[0]] - points[edges[1]], axis=1)
    graph = sparse.csr_array((lengths, tuple(edges)), shape=(len(points), len(points)))
    _, group = csgraph.connected_components(graph, directed=False)
    _, first, members = np.unique(group[old], return_index=True, return_counts=True)
    # An old root may be in the middle of a joined tree: what is farthest from it is an end.
    away = csgraph.dijkstra(graph, directed=False, indices=old[first], min_only=True)
    farthest = np.lexsort([away, group])[np.cumsum(np.bincount(group)) - 1]
    roots = []
    for number in np.argsort(first):
        somas = old[(group[old] == number) & (tree.type[old] == SOMA)]
        if len(somas):
            roots.append(somas[np.argmax(tree.radius[somas])])
        elif members[number] == 1 or (keep_first and first[number] == 0):
            roots.append(old[first[number]])
        else:
            roots.append(farthest[number])
    return roots


def _open_ends(
    tree: Tree, points: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows (m,) of the ends that are not a soma, their centres, outward steps (m, 3), radii (m,).

    The voxel at the very end lies somewhere on the round surface, and is thin. The centre of an end
    is where the neurite has its full thickness; direction and radius come from the last
    `END_LENGTH`.
    """
    around = _adjacency(tree)
    ends, centre, outward, thickness = [], [], [], []
    for end in tips(tree):
        if tree.type[end] == SOMA:
            continue
        walk = _walk_inward(points, int(end), around, lambda walk: END_LENGTH)
        ends.append(end)
        centre.append(points[walk[_first_thick(tree.radius[walk])]])
        outward.append(centre[-1] - points[walk[-1]])
        thickness.append(np.median(tree.radius[walk]))
    centre, outward = (np.array(steps).reshape(-1, 3) for steps in (centre, outward))
    return np.array(ends, dtype=int), centre, outward, np.array(thickness)


def _first_thick(radius: np.ndarray) -> int:
    """Place of the first of the radii from an end inward that is full thickness."""
    return int(np.argmax(radius >= FULL_THICKNESS * radius.max()))


def _walk_inward(
    points: np.ndarray, end: int, around: sparse.csr_array, distance: Callable[[list[int]], float]
) -> list[int]:
    """Rows from an end along its unbranched neurite, to the first at `distance` from the end."""
    walk, last = [end], -1
    while np.linalg.norm(points[walk[-1]] - points[end]) < distance(walk):
        first, stop = around.indptr[walk[-1]], around.indptr[walk[-1] + 1]
        onward = [int(node) for node in around.indices[first:stop] if node != last]
        if len(onward) != 1:
            break
        last = walk[-1]
        walk.append(onward[0])
    return walk


def _angle(a: np.ndarray, b: np.ndarray) -> float:
    """Angle of two steps in degrees; 0 where one has no direction (a tree of one voxel)."""
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return float(np.degrees(np.arccos(np.clip(a @ b / lengths, -1, 1)))) if lengths else 0.0


def _adjacency(tree: Tree) -> sparse.csr_array:
    """Symmetric sparse (n, n) matrix with a 1 for every edge."""
    child, parent = tree_edges(tree)
    n = len(tree.parent)
    half = sparse.csr_array((np.ones(len(child)), (child, parent)), shape=(n, n))
    return half + half.T


def rooted(tree: Tree, edges: np.ndarray, roots: Sequence[int]) -> Tree:
    """The forest over the nodes of `tree` with these edges (2, m), parents first.

    There is one root per tree, and the trees come in the order of their roots.
    """
    # A node above all roots makes it one traversal.
    n = len(tree.xyz)
    edges = np.concatenate([edges, np.stack([roots, np.full(len(roots), n)])], axis=1)
    graph = sparse.csr_array((np.ones(edges.shape[1]), tuple(edges)), shape=(n + 1, n + 1))
    order, above = csgraph.breadth_first_order(graph, n, directed=False)
    tree, order = replace(tree, parent=np.where(above[:n] == n, -1, above[:n])), order[1:]
    label = components(tree)
    place = np.empty(len(roots), dtype=int)
    place[label[roots]] = np.arange(len(roots))
    return take(tree, order[np.argsort(place[label[order]], kind="stable")])


# --- 7. Smooth ---------------------------------------------------------------------------------


def smooth_tree(tree: Tree, shell: np.ndarray, scale: np.ndarray, step: float) -> Tree:
    """Take a tree off the voxel grid and sample it evenly, every `step` voxels of the finest axis.

    Nodes are averaged with their neighbours, ends and somas stay. Ends are then drawn back into
    the neurite: the voxel farthest out lies on the surface, the end of a tube is the centre of its
    last ball. Radii are those of the largest ball in the foreground around each node.
    """
    shell, scale = shell * scale, scale[::-1]
    around = _adjacency(tree)
    degree = np.diff(around.indptr)
    free = (degree > 1) & (tree.type != SOMA)
    mean = sparse.diags_array(1 / np.maximum(degree, 1)) @ around
    xyz, radius = tree.xyz * scale, tree.radius
    for _ in range(SMOOTHING_PASSES):
        xyz = np.where(free[:, None], (xyz + mean @ xyz) / 2, xyz)
        radius = np.where(free, (radius + mean @ radius) / 2, radius)
    # Both balls lie in the foreground; the second is the better one off the grid, the first the
    # only one on a bridge.
    radius = np.maximum(radius, _edge_distance(shell, xyz[:, ::-1]) + HALF_VOXEL)
    tree = resample(_draw_back(replace(tree, xyz=xyz, radius=radius), around), step)
    return replace(tree, xyz=tree.xyz / scale, radius=tree.radius / np.sqrt(scale[0] * scale[1]))


def _draw_back(tree: Tree, around: sparse.csr_array) -> Tree:
    """Remove from each end the nodes before the neurite has its full thickness."""
    kept = np.ones(len(tree.parent), dtype=bool)
    for end in tips(tree):
        if tree.type[end] == SOMA:
            continue
        walk = _walk_inward(tree.xyz, int(end), around, lambda walk: 1.5 * tree.radius[walk].max())
        kept[walk[: _first_thick(tree.radius[walk])]] = False
    # A ball-shaped tree may have lost all its nodes: its thickest one stays.
    label = components(tree)
    for number in np.flatnonzero(np.bincount(label, weights=kept) == 0):
        rows = np.flatnonzero(label == number)
        kept[rows[np.argmax(tree.radius[rows])]] = True
    return take(tree, np.flatnonzero(kept))


# --- Checks ------------------------------------------------------------------------------------


def _check_volume(probability: np.ndarray) -> np.ndarray:
    """Anything that can be sliced and has the shape and the type of a mask or a probability."""
    if not hasattr(probability, "dtype"):
        probability = np.asarray(probability)
    if len(probability.shape) != 3 or 0 in probability.shape:
        raise VolumeError(
            f"expected a 3D stack (z, y, x), got shape {tuple(probability.shape)}; a single slice "
            "is image[None]"
        )
    if not (probability.dtype == bool or np.issubdtype(probability.dtype, np.floating)):
        raise VolumeError(
            f"expected a boolean mask or probabilities, got {probability.dtype}; compare with a "
            "threshold or divide by the maximum"
        )
    return probability


def _check_range(part: np.ndarray) -> np.ndarray:
    """A part of a volume that was read, with values that a probability may have."""
    part = np.asarray(part)
    if part.dtype != bool:
        low, high = part.min(), part.max()
        if not (low >= 0 and high <= 1):  # NaN fails too
            raise VolumeError(f"expected probabilities in [0, 1], got values from {low} to {high}")
    return part


def _scale(spacing: tuple[float, float, float]) -> np.ndarray:
    """Edge lengths of a voxel in units of the shortest."""
    values = check_spacing(spacing)
    return values / values.min()


def project(foreground: Foreground, values: np.ndarray, keep: np.ufunc = np.fmax) -> np.ndarray:
    """A projection of one value per foreground voxel along z: to look at a stage.

    The largest value along z, or with ``keep=np.fmin`` the smallest; NaN where there is no
    foreground.
    """
    volume = np.full(foreground.shape, np.nan)
    volume[tuple(foreground.voxels.T)] = values
    return keep.reduce(volume, axis=0)
