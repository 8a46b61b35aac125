"""From a probability or a mask to trees: the TEASAR idea on a sparse graph, stage by stage.

The stages, in the order in which `trace` calls them:

1. `find_foreground`: voxels above the threshold and their 26-neighbour graph, without small parts;
2. `measure_radius`: distance of each voxel to the background;
3. `path_cost`: cheap along the middle of a neurite, expensive at its edge;
4. `find_paths`: cheapest paths from the root to the farthest voxel not yet explained, repeatedly;
5. `prune_paths`: drop paths too short to be branches;
6. `bridge_gaps`: join ends that face each other across a gap;
7. `smooth_tree`: move nodes off the voxel grid, draw ends back, sample evenly, measure radii.

Stage 1 reads the volume box by box, so that it need not be in memory. Later stages hold only the
foreground; stages 2 to 5 see one connected component at a time.

Lengths, radii and distances are in voxels of the finest axis: with spacing (2, 0.5, 0.5) a step
of one slice has length 4. `Tree.xyz` stays in voxel indices along each axis, and the radii that
`trace` returns are in voxels of the plane, as in every `Tree`.

Sato et al., "TEASAR: tree-structure extraction algorithm for accurate and robust skeletons",
Pacific Graphics 2000. Constants without a source are ours.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count

import numpy as np
import psutil
from scipy import ndimage, sparse
from scipy.sparse import csgraph
from scipy.spatial import KDTree

from neurolib.data.formats import Box, check_spacing
from neurolib.errors import NothingFoundError, VolumeError
from neurolib.parameters import check_range
from neurolib.swc import SOMA, Tree, Zyx, components, densify, length, resample, take, tips
from neurolib.swc import edges as tree_edges
from neurolib.volume import pieces

SOMA_RATIO = 2.5  # a soma is at least this many times as thick as the median neurite
SOMA_NEURITES = 4.0  # and its tree this many times as long as its radius, unlike a thick fragment
HALF_VOXEL = 0.5
DENSE = 0.05  # share of its bounding box above which a dense distance transform is faster
CENTRING = 10.0  # weight of the radius in the cost of a path
CERTAINTY = 2.0  # weight of the probability in the cost of a path
EXPLAINED_SCALE, EXPLAINED_MARGIN = 1.5, 3.0  # a path explains voxels within 1.5 r + 3 of it
DETOUR = 2.0  # unless the way to the path is twice as long: another neurite, a loop
BRANCH_MARGIN = 6.0  # a branch is longer than 6 + r, from the middle of its parent
# Degrees by which one end, and both together, may point away from the bridge. For 600 random cuts
# in six real neurons, a limit of 60 alone closes as many and joins twice as many wrong ends.
BRIDGE_ANGLE, BRIDGE_BEND = 60.0, 80.0
END_LENGTH = 10.0  # length of the stretch that gives an end its direction
MOVES = np.array([move for move in np.ndindex(3, 3, 3) if move != (1, 1, 1)]) - 1
# Share of the radius nearby; with it, tubes of radius 1.5 to 3.5 end in the right place on average.
FULL_THICKNESS = 0.7
SMOOTHING_PASSES = 2  # of weight 1/2: a Gaussian of standard deviation 1 node; more cuts corners
UNDEFINED = 0  # SWC type; a tracer cannot tell axon from dendrite
# Peak memory in bytes per foreground voxel, and per voxel of the current component: measured 670 in
# tubes of radius 1.9 and 1650 in a cube, each of a million voxels or more.
VOXEL_BYTES, GRAPH_BYTES = 200, 1700


@dataclass(frozen=True)
class Foreground:
    """Foreground voxels of a volume and their graph; n voxels, the largest component first.

    number (n,): `_number` of each voxel, ascending in each component; values (n,): probabilities
    in [0, 1] or True; start (components + 1,): row at which each component begins; shape (z, y, x)
    of the volume; scale (z, y, x): voxel edges in units of the shortest.
    """

    number: np.ndarray
    values: np.ndarray
    start: np.ndarray
    shape: tuple[int, int, int]
    scale: np.ndarray

    @cached_property
    def voxels(self) -> np.ndarray:
        """Indices (n, 3), z, y, x."""
        return _voxels(self.number, self.shape)

    @property
    def points(self) -> np.ndarray:
        """Voxel centres (n, 3), z, y, x, in units of the finest axis."""
        return self.voxels * self.scale

    @property
    def component(self) -> np.ndarray:
        """Number (n,) of the connected component of each voxel, 0 for the largest."""
        return np.repeat(np.arange(len(self.start) - 1), np.diff(self.start))

    @cached_property
    def neighbours(self) -> sparse.csr_array:
        """Sparse (n, n) matrix of the distances of 26-neighbours."""
        if len(self.start) == 2:
            return _neighbour_graph(self.number, self.shape, self.scale)
        parts = [self.part(number)[1].neighbours for number in range(len(self.start) - 1)]
        return sparse.block_diag(parts, format="csr")

    def part(self, component: int) -> tuple[slice, "Foreground"]:
        """The rows of a component, and the component as a separate foreground."""
        rows = slice(*self.start[component : component + 2].tolist())
        if len(self.start) == 2:
            return rows, self
        number, values = self.number[rows], self.values[rows]
        return rows, replace(self, number=number, values=values, start=np.array([0, len(number)]))

    def numbers(self, seed: Zyx | None) -> list[tuple[int, int | None]]:
        """Numbers of the components, starting with the one nearest to a point (z, y, x).

        That one comes with the row of its nearest voxel within it, the others with None.
        """
        numbers = [(number, None) for number in range(len(self.start) - 1)]
        if seed is None:
            return numbers
        point, size = np.asarray(seed, dtype=float), np.array(self.shape)
        if point.shape != (3,) or not np.all((point >= -0.5) & (point <= size - 0.5)):
            raise VolumeError(f"seed {seed} lies outside the volume; expected z, y, x in {size}")
        row = np.argmin(((self.points - point * self.scale) ** 2).sum(axis=1))
        number = self.component[row]
        del numbers[number]
        return [(int(number), int(row - self.start[number])), *numbers]


@dataclass(frozen=True)
class Bridge:
    """A closed gap: xyz of both ends in voxels, length in finest voxels, mean probability."""

    start: tuple[float, float, float]
    end: tuple[float, float, float]
    length: float
    probability: float


def trace(
    probability: np.ndarray,
    spacing: Zyx = (1.0, 1.0, 1.0),
    seed: Zyx | None = None,
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
        It need not be in memory: it is sliced once per region and per gap that may be closed.
    spacing : (dz, dy, dx), edge lengths of a voxel in any unit
    seed : (z, y, x) in voxels; root of the nearest component (or the centre of the soma around
        it). Without a soma or seed the root is an end, far from the thickest voxel
    threshold : voxels of at least this probability are foreground
    min_size : components of fewer voxels are dropped
    bridge : longest gap to close, in voxels of the finest axis; 0 keeps the forest
    step : distance between nodes, in voxels of the finest axis
    log : a list that receives a `Bridge` for every closed gap
    regions : disjoint boxes (three slices each) that hold all the foreground; nothing else is
        read. By default the whole volume. The tree does not depend on the boxes

    Returns
    -------
    Tree
        Parents before children, one root per tree. The tree with the seed comes first, the rest by
        the size of their largest connected component. Radii are in voxels of the plane, the
        geometric mean of dy and dx being 1; the type is 1 for the soma, else 0. There is at most
        one soma: the thickest candidate (`find_soma`) whose tree is not a mere fragment; with a
        seed, only a soma that contains the seed.

        If nothing reaches the threshold, `trace` raises a `NothingFoundError`.
    """
    check_range("step", step)
    check_range("bridge", bridge)
    foreground = find_foreground(probability, spacing, threshold, min_size, regions)
    trees, shells = [], []
    for number, at in foreground.numbers(seed):
        _, part = foreground.part(number)
        shells.append(background_shell(part).astype(np.int32))
        radius = measure_radius(part, shell=shells[-1])
        cost = path_cost(part, radius)
        paths = find_paths(part, radius, cost, None if at is None else seed)
        trees.append(paths_to_tree(prune_paths(paths, part, radius), part, radius))
    trees = _one_soma(trees, foreground.scale, seed is not None)
    tree, shell = _side_by_side(trees), np.concatenate(shells)
    if bridge > 0:
        tree, bridges = bridge_gaps(tree, probability, spacing, bridge, seed)
        if log is not None:
            log.extend(bridges)
    return smooth_tree(tree, shell, foreground.scale, step)


EMPTY_TREE = Tree(np.zeros((0, 3)), np.zeros(0), np.zeros(0, int), np.zeros(0, int))


def attempt(probability: np.ndarray, *arguments: object, **options: object) -> Tree:
    """Like `trace`, but if there is nothing to trace, print that and return an empty tree."""
    try:
        return trace(probability, *arguments, **options)
    except NothingFoundError as error:
        print(error)
        return EMPTY_TREE


# --- 1. Foreground -----------------------------------------------------------------------------


def find_foreground(
    probability: np.ndarray,
    spacing: Zyx = (1.0, 1.0, 1.0),
    threshold: float = 0.5,
    min_size: int = 20,
    regions: Iterable[Box] | None = None,
) -> Foreground:
    """Voxels above the threshold in components of at least `min_size`, read box by box.

    Parameters are those of `trace`.
    """
    # Strategy: find the components of each box. Drop one at once if it is too small and touches no
    # other box, so that specks never pile up. At the end, join components across the faces of
    # boxes.
    probability, scale = _check_volume(probability), _scale(spacing)
    check_range("threshold", threshold)
    check_range("min_size", min_size)
    min_size = max(1, min_size)  # 0 also keeps all pieces
    shape = tuple(probability.shape)
    total, held, labels = 0, 0, 0
    parts: list[tuple[np.ndarray, ...]] = []
    for box in pieces(probability) if regions is None else regions:
        part = _check_range(probability[box])
        # NumPy's search is six times faster along one axis than along three.
        inside = np.flatnonzero(part if part.dtype == bool else part >= threshold)
        if not len(inside):
            continue
        inside = np.stack(np.unravel_index(inside, part.shape), axis=1)
        total += len(inside)
        _check_memory(held, len(inside), threshold)
        number = _number(inside + [side.start or 0 for side in box], shape)
        label = _connect(number, np.arange(len(number)), shape)
        rim = ((inside == 0) | (inside == np.array(part.shape) - 1)).any(axis=1)
        kept = np.bincount(label) >= min_size
        kept[label[rim]] = True
        label, kept = (np.cumsum(kept) - 1 + labels)[label], kept[label]
        parts.append((number[kept], part[tuple(inside[kept].T)], label[kept], rim[kept]))
        held += len(parts[-1][0])
        labels = max(labels, int(label.max()) + 1)
    number, values, label, rim = (
        map(np.concatenate, zip(*parts, strict=True)) if parts else [[]] * 4
    )
    if len(parts) > 1:
        order = np.argsort(number[rim])
        label = _connect(number[rim][order], label[rim][order], shape, labels)[label]
    size = np.bincount(label) if held else np.zeros(0, dtype=int)
    large = size >= min_size
    if not large.any():
        raise NothingFoundError(
            f"nothing to trace: {total} voxels reach the threshold {threshold:g} and no "
            f"component has {min_size}; lower the threshold or min_size"
        )
    first = np.full(len(size), np.iinfo(np.int64).max)
    np.minimum.at(first, label, number)
    order = np.lexsort([number, first[label], -size[label]])[: size[large].sum()]
    _check_memory(len(order), int(size.max()), threshold)
    start = np.concatenate([[0], np.cumsum(np.sort(size[large])[::-1])])
    return Foreground(number[order], values[order], start, shape, scale)


def _check_memory(held: int, graph: int, threshold: float) -> None:
    """Refuse voxels that do not fit in memory: `held` of them, and the graph of `graph` more."""
    free = psutil.virtual_memory().available
    if held * VOXEL_BYTES + graph * GRAPH_BYTES > free:
        raise VolumeError(
            f"{held + graph} connected voxels or more reach the threshold {threshold:g}, but only "
            f"about {free // GRAPH_BYTES} can be traced in the {free / 2**30:.1f} GiB of free "
            "memory; raise the threshold or, if most are specks, min_size"
        )


def _connect(number: np.ndarray, label: np.ndarray, shape: tuple, labels: int = 0) -> np.ndarray:
    """New labels after joining those of neighbouring voxels; voxels by ascending number."""
    labels = labels or len(label)
    edges = [(label[row], label[other]) for row, other in _backward(number, shape)]
    edges = np.concatenate(edges, axis=1)
    graph = sparse.csr_array((np.ones(edges.shape[1], bool), edges), shape=(labels, labels))
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
    # Neighbours differ by a fixed number, so a binary search replaces a table of the volume's size.
    strides = _strides(shape)
    for move in MOVES[: len(MOVES) // 2]:
        wanted = number + move @ strides
        place = np.searchsorted(number, wanted)
        # A value smaller than one of `number` is never placed beyond its end.
        row = np.flatnonzero(number[place] == wanted).astype(np.int32)
        yield row, place[row].astype(np.int32)


def _strides(shape: tuple[int, int, int]) -> np.ndarray:
    """Strides (3,) that number voxels in raster order, with a margin that separates the rows."""
    return np.array([(shape[1] + 2) * (shape[2] + 2), shape[2] + 2, 1])


def _number(voxels: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Numbers (n,) of voxels (n, 3); indices in the margin are -1 or the length of the axis."""
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

    The edge lies half a voxel before the nearest background voxel. Outside the volume is
    background, except along an axis of a single slice. Distances are in voxels of the finest axis,
    at least 0, and at least 0.5 in the foreground.

    Parameters
    ----------
    foreground : result of `find_foreground`
    points : (m, 3), z, y, x in units of the finest axis; all foreground voxels by default
    shell : result of `background_shell`, if known
    """
    box = np.prod(np.ptp(foreground.voxels, axis=0) + 1)
    if points is None and len(foreground.voxels) > DENSE * box:
        return _distance_transform(foreground) - HALF_VOXEL
    points = foreground.points if points is None else points
    shell = background_shell(foreground) if shell is None else shell
    return _edge_distance(shell * foreground.scale, points)


def measure_extent(foreground: Foreground, radius: np.ndarray) -> np.ndarray:
    """Half widths (n, 3) of the foreground at its voxels along z, y, x, at least their `radius`.

    In a microscope, a neurite looks taller than it is wide. Along an axis with longer voxels, the
    width is that of the run of foreground voxels through a voxel, up to as many voxels as the
    neurite is wide, and one more at each end. A path must explain all of it, or its upper and lower
    rims would become branches.
    """
    voxels, extent = foreground.voxels, np.repeat(radius[:, None], 3, axis=1)
    for axis in np.flatnonzero(foreground.scale > 1):
        order = np.lexsort([voxels[:, axis], *np.delete(voxels, axis, axis=1).T])
        is_next = (np.diff(voxels[order], axis=0) == np.eye(3, dtype=int)[axis]).all(axis=1)
        run = np.cumsum(np.append(False, ~is_next))
        half = np.empty(len(voxels))
        half[order] = np.bincount(run)[run] * foreground.scale[axis] / 2 - HALF_VOXEL
        extent[:, axis] = np.clip(half, radius, (radius + 1) * foreground.scale[axis])
    return extent


def _edge_distance(shell: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Distance (m,) of points to the edge of the foreground, half a voxel before its shell."""
    # The voxels are spread evenly, so the tree need not be balanced, which halves the time.
    nearby = KDTree(shell, balanced_tree=False, compact_nodes=False)
    return np.maximum(nearby.query(points, workers=-1)[0] - HALF_VOXEL, 0)


def _distance_transform(foreground: Foreground) -> np.ndarray:
    """Distance of each foreground voxel to the nearest background voxel, by a dense transform.

    It gives the same as the search in the shell, and is much faster where the foreground fills its
    bounding box (a bulky cell body, a threshold that is too low).
    """
    low, size = foreground.voxels.min(axis=0), np.ptp(foreground.voxels, axis=0) + 1
    margin = np.zeros(3, dtype=int)
    margin[_open_axes(foreground.shape)] = 1
    box = np.zeros(size + 2 * margin, dtype=bool)
    inside = tuple((foreground.voxels - low + margin).T)
    box[inside] = True
    # Distances for the whole box would take five times the memory.
    place = ndimage.distance_transform_edt(
        box, foreground.scale, return_distances=False, return_indices=True
    )
    nearest = np.stack([axis[inside] for axis in place], axis=1) + low - margin
    return np.linalg.norm((foreground.voxels - nearest) * foreground.scale, axis=1)


def background_shell(foreground: Foreground) -> np.ndarray:
    """Indices (m, 3) of the background voxels with a face neighbour in the foreground.

    The background voxel nearest to a foreground voxel is one of them: one step from it towards that
    foreground voxel leads nearer, and so into the foreground.
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
    """Axes along which the outside is background: those of more than one slice, if any."""
    return [axis for axis in range(3) if shape[axis] > 1] or [0, 1, 2]


# --- 3. Cost -----------------------------------------------------------------------------------


def path_cost(foreground: Foreground, radius: np.ndarray) -> np.ndarray:
    """Cost (n,) per unit length of passing each voxel: exp(10 (1 - r / r_max)²) exp(2 (1 - p)).

    r_max is the largest `radius` in the voxel's component.
    """
    largest = np.maximum.reduceat(radius, foreground.start[:-1])
    off_centre = 1 - radius / np.repeat(largest, np.diff(foreground.start))
    probability = foreground.values.astype(float)
    return np.exp(CENTRING * off_centre**2 + CERTAINTY * (1 - probability))


# --- 4. Paths ----------------------------------------------------------------------------------


def find_paths(
    foreground: Foreground, radius: np.ndarray, cost: np.ndarray, seed: Zyx | None = None
) -> list[np.ndarray]:
    """Paths that together explain the foreground, farthest tip first in each component.

    Parameters
    ----------
    foreground : result of `find_foreground`
    radius, cost : (n,) of the foreground voxels
    seed : see `trace`

    Returns
    -------
    list of ndarray
        Voxel numbers along each path. The first path of a component starts at its root, every
        other one at a voxel of an earlier path. No other voxel is on two paths.
    """
    points, paths = foreground.points, []
    reach = EXPLAINED_SCALE * measure_extent(foreground, radius) + EXPLAINED_MARGIN
    for number, at in foreground.numbers(seed):
        rows, part = foreground.part(number)
        root = find_root(part.neighbours, radius[rows], at)
        own = _component_paths(part.neighbours, points[rows], reach[rows], cost[rows], root)
        paths += [rows.start + path for path in own]
    return paths


def find_root(lengths: sparse.csr_array, radius: np.ndarray, seed: int | None = None) -> int:
    """Number of the root voxel of one component, from its distances (n, n) and radii (n,).

    This is the voxel `seed` if given, or the centre of the soma around it; else the soma
    (`find_soma`); else an end: the voxel the most steps away from the thickest one.
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
    # Steps are counted, not their lengths, so it is not always an end of the longest path.
    start = int(np.argmax(radius))
    return int(csgraph.breadth_first_order(lengths, start, return_predecessors=False)[-1])


def find_soma(lengths: sparse.csr_array, radius: np.ndarray) -> int | None:
    """Number of the thickest voxel if it is at least 2.5 times as thick as the neurites.

    The thickness of the neurites is the median over voxels no thinner than their neighbours; other
    voxels lie at the rim of a neurite. `lengths` and `radius` are those of `find_root`.
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
    lengths: sparse.csr_array, points: np.ndarray, reach: np.ndarray, cost: np.ndarray, root: int
) -> list[np.ndarray]:
    """Paths of one connected component; see `find_paths` and, for `reach` (n, 3), `_explained`."""
    # Strategy: Dijkstra's algorithm gives every voxel its cheapest way home to the root. Visit
    # voxels from the longest way home to the shortest. A voxel not yet explained is the next tip:
    # follow its way home to an earlier path, and mark what is near the new path as explained.
    n = len(cost)
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


def _explained(path, way, reach, lengths, nearby: KDTree, place: np.ndarray) -> np.ndarray:
    """Numbers of the voxels that a path explains, including its own.

    Each lies in an ellipsoid with half axes `reach` (n, 3) around a voxel of the path, and its way
    to that voxel through the foreground is at most `DETOUR` times as long as the longest half axis,
    so a path does not explain a neurite beside it or the other side of a loop. `place` (n,) is
    working memory: -1 everywhere, before and after.
    """
    # Balls a quarter of their radius apart cover all but 1/128 of the path's surroundings.
    around, n, covered = [path], len(path), -np.inf
    axes = reach[path]
    least, most = axes.min(axis=1), axes.max(axis=1)
    place[path] = np.arange(n)
    for i, voxel in enumerate(path):
        if way[voxel] >= covered or voxel == path[-1]:
            ball = np.array(nearby.query_ball_point(nearby.data[voxel], most[i]))
            ball = ball[place[ball] < 0]
            if least[i] < most[i]:
                away = (nearby.data[ball] - nearby.data[voxel]) / axes[i]
                ball = ball[np.linalg.norm(away, axis=1) <= 1]
            place[ball] = np.arange(n, n + len(ball))
            around.append(ball)
            n += len(ball)
            covered = way[voxel] + least[i] / 4
    around = np.concatenate(around)
    near = lengths[around]
    column = place[near.indices]
    place[around] = -1
    inside = column >= 0
    start = np.concatenate([[0], np.cumsum(inside, dtype=np.int32)])[near.indptr]
    near = sparse.csr_array((near.data[inside], column[inside], start), shape=(n, n))
    limit = DETOUR * most
    sources, longest = np.arange(len(path)), limit.max()
    distance, _, source = csgraph.dijkstra(
        near, indices=sources, min_only=True, limit=longest, return_predecessors=True
    )
    return around[(source >= 0) & (distance <= limit[np.maximum(source, 0)])]


# --- 5. Pruning --------------------------------------------------------------------------------


def prune_paths(
    paths: list[np.ndarray], foreground: Foreground, radius: np.ndarray
) -> list[np.ndarray]:
    """Drop paths shorter than 6 + r, where r is the radius at which they leave their parent.

    The first path of a component stays. A path that leaves a dropped one is always dropped too: it
    reaches no farther from the parent, and r changes by no more than the distance.
    """
    points, component, kept, last = foreground.points, foreground.component, [], -1
    for path in paths:
        length = np.linalg.norm(np.diff(points[path], axis=0), axis=1).sum()
        is_first = component[path[0]] != last
        last = component[path[0]]
        # Like r, the length is measured to the edge, half a voxel beyond the last centre.
        if is_first or length + HALF_VOXEL >= BRANCH_MARGIN + radius[path[0]]:
            kept.append(path)
    return kept


def paths_to_tree(paths: list[np.ndarray], foreground: Foreground, radius: np.ndarray) -> Tree:
    """The tree whose nodes are the voxels of the paths; see `trace` for its order and units.

    Radii are r + 0.5, so that drawing the tree gives back the mask: a tube of radius R, drawn as
    the voxels whose centres lie within R of the axis, has a measured r of R - 0.5.
    """
    parent, row = [], {}
    for path in paths:
        first, *rest = path.tolist()
        new = rest if first in row else [first, *rest]
        parent += [row.get(first, -1), *range(len(row), len(row) + len(new) - 1)]
        row.update(zip(new, count(len(row)), strict=False))
    voxels, parent = np.array(list(row)), np.array(parent)
    types = np.full(len(voxels), UNDEFINED)
    for root in np.flatnonzero(parent < 0):
        rows, part = foreground.part(foreground.component[voxels[root]])
        soma = find_soma(part.neighbours, radius[rows])
        if soma is not None and voxels[root] == rows.start + soma:
            types[root] = SOMA
    xyz = foreground.voxels[voxels][:, ::-1].astype(float)
    return Tree(xyz, radius[voxels] + HALF_VOXEL, types, parent)


def _one_soma(trees: list[Tree], scale: np.ndarray, seeded: bool) -> list[Tree]:
    """Keep at most one soma, because other programs refuse a second one.

    Trees that lose theirs are rooted at an end.
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
    graph = _edge_graph(tree.xyz[:, ::-1] * scale, edges)
    end = np.argmax(csgraph.dijkstra(graph, directed=False, indices=0))
    return rooted(tree, edges, [int(end)])


def _edge_graph(points: np.ndarray, edges: np.ndarray) -> sparse.csr_array:
    """Sparse (n, n) matrix of the lengths of the edges (2, m) between points (n, 3)."""
    lengths = np.linalg.norm(points[edges[0]] - points[edges[1]], axis=1)
    return sparse.csr_array((lengths, tuple(edges)), shape=(len(points), len(points)))


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
    spacing: Zyx = (1.0, 1.0, 1.0),
    longest: float = 15.0,
    seed: Zyx | None = None,
) -> tuple[Tree, list[Bridge]]:
    """Join trees whose ends face each other across a gap.

    Candidates are at most `longest` apart, and each end points towards the other to within 60
    degrees, both together to within 80. A minimum spanning tree chooses among them, so that no
    loop arises; a bridge costs its length times the mean of exp(2 (1 - p)) along it. No bridge
    passes through another tree or bridge. The root of a joined tree is its thickest soma, else
    the root at the seed, else an end of the longest path.

    `tree` comes from `paths_to_tree`, whose neighbouring nodes are at most a voxel apart, with the
    tree of the seed first. `longest` is in voxels of the finest axis; the rest is as in `trace`.
    Returns the tree, with nodes along the bridges, and the bridges in order of their cost.
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

    # Kruskal's algorithm: the cheapest bridge first, unless its ends are already connected.
    group = np.arange(label.max() + 1)
    bridges, xyz, radius, edges = [], [tree.xyz], [tree.radius], [np.stack(tree_edges(tree))]
    n, taken = len(points), [KDTree(densify(replace(tree, xyz=points))[0])]
    for _, a, b, certainty in sorted(candidates):
        start, end = ends[a], ends[b]
        if group[label[start]] == group[label[end]]:
            continue
        length = float(np.linalg.norm(points[end] - points[start]))
        share = np.linspace(0, 1, int(np.ceil(length)) + 1)[1:-1]
        # Like the edges, the bridge is sampled every half voxel, between its first and last node.
        fine = np.linspace(0, 1, 2 * len(share) + 3)[2:-2, None]
        way = points[start] + fine * (points[end] - points[start])
        # Another neurite or bridge lies between.
        if any(part.query_ball_point(way, HALF_VOXEL, return_length=True).any() for part in taken):
            continue
        # A search tree takes in those that are no larger, so that none is rebuilt often.
        while taken and taken[-1].n <= len(way):
            way = np.concatenate([taken.pop().data, way])
        taken.append(KDTree(way))
        group[group == group[label[end]]] = group[label[start]]
        ends_xyz = tree.xyz[[start, end]].tolist()
        bridges.append(Bridge(tuple(ends_xyz[0]), tuple(ends_xyz[1]), length, certainty))
        xyz.append(tree.xyz[start] + share[:, None] * (tree.xyz[end] - tree.xyz[start]))
        radius.append(thickness[a] + share * (thickness[b] - thickness[a]))
        chain = [start, *range(n, n + len(share)), end]
        edges.append(np.stack([chain[:-1], chain[1:]]))
        n += len(share)
    if not bridges:
        return tree, []
    types = np.concatenate([tree.type, np.full(n - len(points), UNDEFINED)])
    joined = Tree(np.concatenate(xyz), np.concatenate(radius), types, np.full(n, -1))
    edges = np.concatenate(edges, axis=1)
    roots = _joined_roots(tree, joined.xyz[:, ::-1] * scale, edges, seed is not None)
    return rooted(joined, edges, roots), bridges


def _values(probability: np.ndarray, voxels: np.ndarray) -> np.ndarray:
    """Probability at voxels (n, 3), by reading their bounding box."""
    low, high = voxels.min(axis=0), voxels.max(axis=0) + 1
    part = probability[tuple(map(slice, low.tolist(), high.tolist()))]
    return _check_range(part)[tuple((voxels - low).T)].astype(float)


def _joined_roots(tree: Tree, points: np.ndarray, edges: np.ndarray, keep_first: bool) -> list[int]:
    """Rows of the new roots, one per group of joined trees, in the order of the old ones."""
    old = np.flatnonzero(tree.parent < 0)
    graph = _edge_graph(points, edges)
    _, group = csgraph.connected_components(graph, directed=False)
    _, first, members = np.unique(group[old], return_index=True, return_counts=True)
    # An old root may lie in the middle of a joined tree; the farthest node from it is an end.
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


def _open_ends(tree: Tree, points: np.ndarray) -> tuple[np.ndarray, ...]:
    """Rows (m,) of the ends that are not a soma, their centres, outward steps (m, 3), radii (m,).

    The last voxel lies on the round surface and is thin. So the centre of an end is where the
    neurite has its full thickness; direction and radius come from the last `END_LENGTH`.
    """
    walks = list(_walks_inward(tree, points, _adjacency(tree), lambda walk: END_LENGTH))
    # The last node, which may lie in a thicker neurite, gives only the direction.
    rows = [(w[0], w[_first_thick(tree.radius[w[:-1] or w])], w[-1]) for w in walks]
    first, thick, last = np.array(rows, dtype=int).reshape(-1, 3).T
    thickness = np.array([np.median(tree.radius[walk]) for walk in walks])
    return first, points[thick], points[thick] - points[last], thickness


def _first_thick(radius: np.ndarray) -> int:
    """Index of the first radius, from an end inward, that has full thickness."""
    return int(np.argmax(radius >= FULL_THICKNESS * radius.max()))


def _walks_inward(
    tree: Tree, points: np.ndarray, around: sparse.csr_array, reach: Callable[[list[int]], float]
) -> Iterator[list[int]]:
    """Rows from each end that is not a soma along its unbranched neurite, up to `reach` from it."""
    for end in tips(tree)[tree.type[tips(tree)] != SOMA]:
        walk, last = [int(end)], -1
        while np.linalg.norm(points[walk[-1]] - points[end]) < reach(walk):
            first, stop = around.indptr[walk[-1]], around.indptr[walk[-1] + 1]
            onward = [int(node) for node in around.indices[first:stop] if node != last]
            if len(onward) != 1:
                break
            last = walk[-1]
            walk.append(onward[0])
        yield walk


def _angle(a: np.ndarray, b: np.ndarray) -> float:
    """Angle between two steps in degrees; 0 if one has no length (a tree of one voxel)."""
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return float(np.degrees(np.arccos(np.clip(a @ b / lengths, -1, 1)))) if lengths else 0.0


def _adjacency(tree: Tree) -> sparse.csr_array:
    """Symmetric sparse (n, n) matrix with a 1 for every edge."""
    child, parent = tree_edges(tree)
    n = len(tree.parent)
    half = sparse.csr_array((np.ones(len(child)), (child, parent)), shape=(n, n))
    return half + half.T


def rooted(tree: Tree, edges: np.ndarray, roots: Sequence[int]) -> Tree:
    """The forest of the nodes of `tree` and these edges (2, m), parents first.

    Each tree has one root, and the trees are in the order of their roots.
    """
    # An extra node above all roots makes it one traversal.
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

    Nodes other than ends and somas are averaged with their neighbours. Then ends are drawn back
    from the surface of the tube to the centre of its last ball. A radius is that of the largest
    ball in the foreground around the node; on a bridge, it is the bridge's own.
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
    # Both balls lie in the foreground. The second is more accurate off the grid. In a gap it would
    # reach the two ends, so it exceeds the old radius by no more than its node has moved.
    moved = np.linalg.norm(xyz - tree.xyz * scale, axis=1)
    ball = np.minimum(_edge_distance(shell, xyz[:, ::-1]) + HALF_VOXEL, tree.radius + moved)
    radius = np.maximum(radius, ball)
    tree = resample(_draw_back(replace(tree, xyz=xyz, radius=radius), around), step)
    return replace(tree, xyz=tree.xyz / scale, radius=tree.radius / np.sqrt(scale[0] * scale[1]))


def _draw_back(tree: Tree, around: sparse.csr_array) -> Tree:
    """Remove the nodes at each end where the neurite is not yet fully thick."""
    kept = np.ones(len(tree.parent), dtype=bool)
    for walk in _walks_inward(tree, tree.xyz, around, lambda walk: 1.5 * tree.radius[walk].max()):
        kept[walk[: _first_thick(tree.radius[walk])]] = False
    # A ball-shaped tree keeps at least its thickest node.
    label = components(tree)
    for number in np.flatnonzero(np.bincount(label, weights=kept) == 0):
        rows = np.flatnonzero(label == number)
        kept[rows[np.argmax(tree.radius[rows])]] = True
    return take(tree, np.flatnonzero(kept))


# --- Checks ------------------------------------------------------------------------------------


def _check_volume(probability: np.ndarray) -> np.ndarray:
    """Check shape and type of a mask or a probability, which may be anything that can be sliced."""
    if not hasattr(probability, "dtype"):
        probability = np.asarray(probability)
    if len(probability.shape) != 3 or 0 in probability.shape:
        raise VolumeError(
            f"expected a 3D stack (z, y, x), got shape {tuple(probability.shape)}; pass a "
            "single slice as image[None]"
        )
    if not (probability.dtype == bool or np.issubdtype(probability.dtype, np.floating)):
        raise VolumeError(
            f"expected a boolean mask or probabilities, got {probability.dtype}; compare with a "
            "threshold or divide by the maximum"
        )
    return probability


def _check_range(part: np.ndarray) -> np.ndarray:
    """Check the values of a part of a probability."""
    part = np.asarray(part)
    if part.dtype != bool:
        low, high = part.min(), part.max()
        if not (low >= 0 and high <= 1):  # NaN fails too
            raise VolumeError(f"expected probabilities in [0, 1], got values from {low} to {high}")
    return part


def _scale(spacing: Zyx) -> np.ndarray:
    """Edge lengths of a voxel in units of the shortest."""
    values = check_spacing(spacing)
    return values / values.min()


def project(foreground: Foreground, values: np.ndarray, keep: np.ufunc = np.fmax) -> np.ndarray:
    """Project one value per foreground voxel along z, to look at a stage.

    This keeps the largest value, or with ``keep=np.fmin`` the smallest; NaN is background.
    """
    volume = np.full(foreground.shape, np.nan)
    volume[tuple(foreground.voxels.T)] = values
    return keep.reduce(volume, axis=0)
