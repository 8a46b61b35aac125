"""From a probability or a mask to trees: the TEASAR idea on a sparse graph, stage by stage.

The stages, in the order in which `trace` calls them:

1. `find_foreground`: voxels above the threshold, their 26-neighbour graph, small parts dropped;
2. `measure_radius`: distance of each voxel to the background;
3. `path_cost`: cheap along the middle of a neurite, dear at its edge;
4. `find_paths`: from the root, the cheapest path to the farthest voxel not yet explained, and on;
5. `prune_paths`: paths too short to be branches go;
6. `bridge_gaps`: ends that face each other across a gap are joined;
7. `smooth_tree`: off the voxel grid, ends drawn back into the neurite, even steps, radii.

Stages 1 to 5 see only the foreground: time and memory grow with it, not with the volume.

Lengths, radii and distances are in voxels of the finest axis: with spacing (2, 0.5, 0.5) a step
of one slice has length 4. With isotropic spacing they are plain voxels. `Tree.xyz` stays in voxel
indices along each axis, whatever the spacing.

Sato et al., "TEASAR: tree-structure extraction algorithm for accurate and robust skeletons",
Pacific Graphics 2000. The constants are ours, where no source is named.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from scipy import ndimage, sparse
from scipy.sparse import csgraph
from scipy.spatial import KDTree

from neurolib.errors import SettingsError, VolumeError
from neurolib.swc import Tree, components, resample, take, tips

SOMA_RATIO = 2.5  # a soma is this many times thicker than the median foreground voxel
HALF_VOXEL = 0.5
DENSE = 0.05  # share of its bounding box from which a foreground is better transformed densely
CENTRING = 10.0  # weight of the radius in the cost of a path
CERTAINTY = 2.0  # weight of the probability in the cost of a path
EXPLAINED_SCALE, EXPLAINED_MARGIN = 1.5, 3.0  # a path explains what lies within 1.5 r + 3 of it
DETOUR = 2.0  # unless its way to the path is twice as long: a neurite beside it, a loop
BRANCH_MARGIN = 6.0  # a branch is longer than 6 + r, counted from the middle of its parent
BRIDGE_ANGLE = 60.0  # degrees by which an end may point away from the bridge
END_LENGTH = 10.0  # the stretch at an end that gives its direction
FULL_THICKNESS = (
    0.7  # share of the radius nearby; on tubes of radius 1.5 to 3.5 ends fit on average
)
SMOOTHING_PASSES = 2  # of weight 1/2 each: a Gaussian of standard deviation 1 node; more cuts bends
UNDEFINED, SOMA = 0, 1  # SWC types; a tracer cannot tell axon from dendrite


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
) -> Tree:
    """Trace the neurites of a probability volume or a mask.

    Parameters
    ----------
    probability : (z, y, x), floats in [0, 1] or booleans
    spacing : (dz, dy, dx), physical edge lengths of a voxel in any one unit
    seed : (z, y, x) in voxels; the root of the component nearest to it, unless that component
        has a soma. Without a soma or seed the root is an end of the longest path
    threshold : voxels of at least this probability are foreground
    min_size : components of fewer voxels are dropped
    bridge : longest gap to be closed, in voxels of the finest axis; 0 keeps the forest
    step : distance of the nodes of the result, in voxels of the finest axis
    log : a list that receives a `Bridge` for every gap closed

    Returns
    -------
    Tree
        Parents before children, no cycle, one root per tree. The tree with the seed comes first,
        then by size. `radius` in voxels of the finest axis; type 1 for a soma, else 0.

    Raises
    ------
    VolumeError
        If the volume is not 3D, has values outside [0, 1] or NaN, or nothing reaches the
        threshold, or the seed lies outside.
    SettingsError
        If threshold, min_size, bridge or step is out of its range.
    """
    if step <= 0 or bridge < 0:
        raise SettingsError(f"step must be positive and bridge at least 0, got {step} and {bridge}")
    foreground = find_foreground(probability, spacing, threshold, min_size)
    radius = measure_radius(foreground)
    cost = path_cost(foreground, radius)
    paths = prune_paths(find_paths(foreground, radius, cost, seed), foreground, radius)
    tree = paths_to_tree(paths, foreground, radius)
    if bridge > 0:
        tree, bridges = bridge_gaps(tree, probability, spacing, bridge, seed)
        if log is not None:
            log.extend(bridges)
    return smooth_tree(tree, foreground, step)


# --- 1. Foreground -----------------------------------------------------------------------------


def find_foreground(
    probability: np.ndarray,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    threshold: float = 0.5,
    min_size: int = 20,
) -> Foreground:
    """Voxels above the threshold in components of at least `min_size`, with their graph.

    Parameters and errors are those of `trace`.
    """
    probability, scale = _check_volume(probability, spacing), _scale(spacing)
    if not 0 < threshold <= 1 or min_size < 1:
        raise SettingsError(
            f"threshold must lie in (0, 1] and min_size be at least 1, got {threshold} and "
            f"{min_size}"
        )
    mask = probability if probability.dtype == bool else probability >= threshold
    voxels = np.argwhere(mask)
    neighbours = _neighbour_graph(voxels, mask.shape, scale)
    _, label = csgraph.connected_components(neighbours, directed=False)
    size = np.bincount(label)
    kept = np.flatnonzero(size[label] >= min_size) if len(voxels) else np.zeros(0, dtype=int)
    if len(kept) == 0:
        raise VolumeError(
            f"nothing to trace: {len(voxels)} voxels reach the threshold {threshold:g} and no "
            f"component has {min_size}; lower the threshold or min_size"
        )
    kept = kept[np.lexsort([label[kept], -size[label[kept]]])]
    voxels, label = voxels[kept], label[kept]
    return Foreground(
        voxels=voxels,
        probability=probability[tuple(voxels.T)].astype(float),
        component=np.cumsum(np.diff(label, prepend=label[0]) != 0),
        neighbours=neighbours[kept][:, kept],
        shape=mask.shape,
        scale=scale,
    )


def _neighbour_graph(voxels: np.ndarray, shape: tuple, scale: np.ndarray) -> sparse.csr_array:
    """Sparse (n, n) matrix of the distances between 26-neighbours among `voxels`."""
    # Strategy: number the voxels of the volume, with a margin so that no row runs into the next.
    # The foreground's numbers are sorted, since it is in raster order, and a neighbour is a
    # number at a fixed offset: a binary search finds it without a table of the volume's size.
    # Filling one column per offset, in ascending order, gives the rows of a CSR matrix.
    strides = _strides(shape)
    number = voxels @ strides
    moves = np.array([m for m in np.ndindex(3, 3, 3) if m != (1, 1, 1)]) - 1
    n, backward = len(voxels), len(moves) // 2
    table = np.full((n, len(moves)), -1, dtype=np.int32)
    for column in range(backward):
        wanted = number + moves[column] @ strides
        place = np.searchsorted(number, wanted)
        found = np.flatnonzero(number[np.minimum(place, n - 1)] == wanted) if n else place
        table[found, column] = place[found]
        table[place[found], len(moves) - 1 - column] = found  # the same edge from its other end
    there = table >= 0
    lengths = np.linalg.norm(moves * scale, axis=1)
    data = np.broadcast_to(lengths, table.shape)[there]
    start = np.concatenate([[0], np.cumsum(there.sum(axis=1))])
    return sparse.csr_array((data, table[there], start), shape=(n, n))


def _strides(shape: tuple[int, int, int]) -> np.ndarray:
    """Steps (3,) of a numbering of voxels in raster order with a margin of one on each side."""
    return np.array([(shape[1] + 2) * (shape[2] + 2), shape[2] + 2, 1])


# --- 2. Radius ---------------------------------------------------------------------------------


def measure_radius(foreground: Foreground, points: np.ndarray | None = None) -> np.ndarray:
    """Distance r from foreground voxels, or from any points, to the edge of the foreground.

    The edge lies half a voxel before the nearest background voxel. Outside of the volume is
    background, except along an axis of a single slice, where nothing is known.

    Parameters
    ----------
    foreground : result of `find_foreground`
    points : (m, 3), z, y, x in units of the finest axis; all foreground voxels by default

    Returns
    -------
    ndarray
        (n,) or (m,), in voxels of the finest axis, at least 0 (0.5 in the foreground).
    """
    if points is None and len(foreground.voxels) > DENSE * np.prod(
        np.ptp(foreground.voxels, 0) + 1
    ):
        distance = _distance_transform(foreground)
    else:
        points = foreground.points if points is None else points
        distance = KDTree(background_shell(foreground) * foreground.scale).query(points)[0]
    return np.maximum(distance - HALF_VOXEL, 0)


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
    return ndimage.distance_transform_edt(box, sampling=foreground.scale)[inside]


def background_shell(foreground: Foreground) -> np.ndarray:
    """Indices (m, 3) of the background voxels with a face neighbour in the foreground.

    The background voxel nearest to any foreground voxel is one of them: a step from it towards
    that foreground voxel comes nearer, so it must end in the foreground.
    """
    moves = np.eye(3, dtype=int)[_open_axes(foreground.shape)]
    around = (foreground.voxels[None] + np.concatenate([moves, -moves])[:, None]).reshape(-1, 3)
    strides = _strides(foreground.shape)
    number, inside = around @ strides, np.sort(foreground.voxels @ strides)
    place = np.minimum(np.searchsorted(inside, number), len(inside) - 1)
    outside = inside[place] != number
    return around[outside][np.unique(number[outside], return_index=True)[1]]


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

    Raises
    ------
    VolumeError
        If the seed is not a point in the volume.
    """
    seed_voxel = None if seed is None else nearest_voxel(foreground, seed)
    bounds = np.searchsorted(foreground.component, np.arange(foreground.component[-1] + 2))
    points, paths = foreground.points, []
    ranges = list(pairwise(bounds))
    if seed_voxel is not None:
        ranges.insert(0, ranges.pop(foreground.component[seed_voxel]))
    for first, last in ranges:
        part = slice(first, last)
        lengths = foreground.neighbours[part, part]
        in_part = seed_voxel is not None and first <= seed_voxel < last
        root = find_root(lengths, radius[part], seed_voxel - first if in_part else None)
        found = _component_paths(lengths, points[part], radius[part], cost[part], root)
        paths += [first + path for path in found]
    return paths


def find_root(lengths: sparse.csr_array, radius: np.ndarray, seed: int | None = None) -> int:
    """Number of the root voxel of one component.

    The soma, if there is one (the largest radius, where it is at least 2.5 times the median);
    else the seed, if given; else an end of the longest path.

    Parameters
    ----------
    lengths : sparse (n, n), distances of neighbours
    radius : (n,)
    seed : number of a voxel, or None
    """
    soma = find_soma(lengths, radius)
    if soma is not None:
        return soma
    if seed is not None:
        return int(seed)
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
    row = np.repeat(np.arange(len(radius)), np.diff(lengths.indptr))
    np.maximum.at(thickest_neighbour, row, radius[lengths.indices])
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
    row = np.repeat(np.arange(n), np.diff(lengths.indptr))
    weight = lengths.data * (cost[row] + cost[lengths.indices]) / 2
    graph = sparse.csr_array((weight, lengths.indices, lengths.indptr), shape=(n, n))
    _, home = csgraph.dijkstra(graph, indices=root, return_predecessors=True)
    home[root] = root
    way = np.linalg.norm(points - points[home], axis=1)
    ancestor = home
    while np.any(ancestor != root):  # pointer doubling: way[i] reaches up to ancestor[i]
        way, ancestor = way + way[ancestor], ancestor[ancestor]

    nearby = KDTree(points)
    reach = EXPLAINED_SCALE * radius + EXPLAINED_MARGIN
    live, on_path = np.ones(n, dtype=bool), np.zeros(n, dtype=bool)
    paths = []
    for tip in np.argsort(-way, kind="stable"):
        if not live[tip]:
            continue
        path = [tip]
        while not on_path[path[-1]] and path[-1] != root:
            path.append(home[path[-1]])
        path = np.array(path[::-1])
        on_path[path] = True
        live[_explained(path, way, reach, lengths, nearby)] = False
        paths.append(path)
    return paths


def _explained(
    path: np.ndarray,
    way: np.ndarray,
    reach: np.ndarray,
    lengths: sparse.csr_array,
    nearby: KDTree,
) -> np.ndarray:
    """Numbers of the voxels that a path explains, its own included.

    They lie within `reach` of a voxel of the path, and the way to it through the foreground is no
    longer than `DETOUR` times that: a neurite that runs beside this one, or the other side of a
    loop, is not explained by it.
    """
    # Balls a quarter of their radius apart cover the path's surroundings but for 1/128 of it.
    seen, covered = np.zeros(len(reach), dtype=bool), -np.inf
    seen[path] = True
    around = [path]
    for voxel in path:
        if way[voxel] >= covered or voxel == path[-1]:
            ball = np.array(nearby.query_ball_point(nearby.data[voxel], reach[voxel]))
            around.append(ball[~seen[ball]])
            seen[around[-1]] = True
            covered = way[voxel] + reach[voxel] / 4
    around = np.concatenate(around)
    near = lengths[around]
    column = np.full(len(reach), -1, dtype=np.int32)
    column[around] = np.arange(len(around))
    inside = column[near.indices] >= 0
    start = np.concatenate([[0], np.cumsum(inside)])[near.indptr]
    near = sparse.csr_array(
        (near.data[inside], column[near.indices[inside]], start), shape=(len(around), len(around))
    )
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
    point = np.asarray(seed, dtype=float)
    size = np.array(foreground.shape)
    if point.shape != (3,) or not np.all((point >= -0.5) & (point <= size - 0.5)):
        raise VolumeError(f"seed {seed} lies outside of the volume; expected z, y, x in {size}")
    return int(KDTree(foreground.points).query(point * foreground.scale)[1])


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
        if find_soma(foreground.neighbours[part, part], radius[part]) is not None:
            types[root] = SOMA
    xyz = foreground.voxels[voxels][:, ::-1].astype(float)
    return Tree(xyz, radius[voxels] + HALF_VOXEL, types, parent)


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
    to within 60 degrees. Of these, a minimum spanning tree over the trees is taken, in which a
    bridge costs its length times the mean of exp(2 (1 - p)) along it: trees never become a loop.
    The root of a joined tree follows the rule of `find_root`: the soma, the thickest if there are
    several, else the root at the seed, else an end of the longest path.

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
    probability, scale = _check_volume(probability, spacing), _scale(spacing)
    points = tree.xyz[:, ::-1] * scale
    ends, outward, thickness = _open_ends(tree, points)
    label = components(tree)
    candidates = []
    for a, b in KDTree(points[ends]).query_pairs(longest, output_type="ndarray"):
        start, end = points[ends[a]], points[ends[b]]
        gap = end - start
        faces = min(_cosine(outward[a], gap), _cosine(outward[b], -gap))
        if label[ends[a]] != label[ends[b]] and faces >= np.cos(np.radians(BRIDGE_ANGLE)):
            line = start + np.linspace(0, 1, 2 + int(2 * np.linalg.norm(gap)))[:, None] * gap
            certainty = probability[tuple(np.rint(line / scale).astype(int).T)].astype(float)
            price = np.linalg.norm(gap) * np.exp(CERTAINTY * (1 - certainty)).mean()
            candidates.append((float(price), int(a), int(b), float(certainty.mean())))

    # Kruskal's algorithm: the cheapest bridge first, unless both ends are joined already.
    group = np.arange(label.max() + 1)
    bridges, xyz, radius, edges = [], [tree.xyz], [tree.radius], [np.stack(_edges(tree))]
    count = len(points)
    for _, a, b, certainty in sorted(candidates):
        start, end = ends[a], ends[b]
        if group[label[start]] == group[label[end]]:
            continue
        group[group == group[label[end]]] = group[label[start]]
        length = float(np.linalg.norm(points[end] - points[start]))
        ends_xyz = tree.xyz[[start, end]].tolist()
        bridges.append(Bridge(tuple(ends_xyz[0]), tuple(ends_xyz[1]), length, certainty))
        share = np.linspace(0, 1, int(np.ceil(length)) + 1)[1:-1]
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


def _open_ends(tree: Tree, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows (m,) of the ends that are not a soma, their outward steps (m, 3), and radii (m,).

    Direction and radius come from the last `END_LENGTH` of the neurite: the voxel at its very end
    lies somewhere on the round surface, and is thin.
    """
    around = _adjacency(tree)
    ends, outward, thickness = [], [], []
    for end in tips(tree):
        if tree.type[end] == SOMA:
            continue
        walk = _walk_inward(points, int(end), around, lambda walk: END_LENGTH)
        ends.append(end)
        outward.append(points[end] - points[walk[-1]])
        thickness.append(np.median(tree.radius[walk]))
    return np.array(ends, dtype=int), np.array(outward).reshape(-1, 3), np.array(thickness)


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


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of the angle of two steps; 1 where one has no direction (a tree of one voxel)."""
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / lengths) if lengths else 1.0


def _edges(tree: Tree) -> tuple[np.ndarray, np.ndarray]:
    """Row indices (child, parent) of the edges of a tree, each (m,)."""
    child = np.flatnonzero(tree.parent >= 0)
    return child, tree.parent[child]


def _adjacency(tree: Tree) -> sparse.csr_array:
    """Symmetric sparse (n, n) matrix with a 1 for every edge."""
    child, parent = _edges(tree)
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


def smooth_tree(tree: Tree, foreground: Foreground, step: float = 2.0) -> Tree:
    """Take a tree off the voxel grid and sample it evenly.

    Nodes are averaged with their neighbours, ends and somas stay. Ends are then drawn back into
    the neurite: the voxel farthest out lies on the surface, the end of a tube is the centre of its
    last ball. Radii are those of the largest ball in the foreground around each node.

    Parameters
    ----------
    tree : Tree
        Nodes no more than a voxel apart, as from `paths_to_tree` and `bridge_gaps`.
    foreground : Foreground
        Result of `find_foreground`.
    step : float
        Distance of the nodes of the result, in voxels of the finest axis.
    """
    scale = foreground.scale[::-1]
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
    radius = np.maximum(radius, measure_radius(foreground, xyz[:, ::-1]) + HALF_VOXEL)
    tree = resample(_draw_back(replace(tree, xyz=xyz, radius=radius), around), step)
    return replace(tree, xyz=tree.xyz / scale)


def _draw_back(tree: Tree, around: sparse.csr_array) -> Tree:
    """Remove from each end the nodes before the neurite has its full thickness."""
    kept = np.ones(len(tree.parent), dtype=bool)
    for end in tips(tree):
        if tree.type[end] == SOMA:
            continue
        walk = _walk_inward(tree.xyz, int(end), around, lambda walk: 1.5 * tree.radius[walk].max())
        thick = tree.radius[walk] >= FULL_THICKNESS * tree.radius[walk].max()
        kept[walk[: np.argmax(thick)]] = False
    # A ball-shaped tree may have lost all its nodes: its thickest one stays.
    label = components(tree)
    for number in np.flatnonzero(np.bincount(label, weights=kept) == 0):
        rows = np.flatnonzero(label == number)
        kept[rows[np.argmax(tree.radius[rows])]] = True
    return take(tree, np.flatnonzero(kept))


# --- Checks ------------------------------------------------------------------------------------


def _check_volume(probability: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
    probability = np.asarray(probability)
    if probability.ndim != 3 or probability.size == 0:
        raise VolumeError(
            f"expected a 3D stack (z, y, x), got shape {probability.shape}; a single slice is "
            "image[None]"
        )
    if probability.dtype == bool:
        return probability
    if not np.issubdtype(probability.dtype, np.floating):
        raise VolumeError(
            f"expected a boolean mask or probabilities, got {probability.dtype}; compare with a "
            "threshold or divide by the maximum"
        )
    low, high = probability.min(), probability.max()
    if not (low >= 0 and high <= 1):  # NaN fails too
        raise VolumeError(f"expected probabilities in [0, 1], got values from {low} to {high}")
    return probability


def _scale(spacing: tuple[float, float, float]) -> np.ndarray:
    """Edge lengths of a voxel in units of the shortest."""
    values = np.asarray(spacing, dtype=float)
    if values.shape != (3,) or not np.all(np.isfinite(values) & (values > 0)):
        raise VolumeError(f"spacing must be three positive numbers (dz, dy, dx), got {spacing}")
    return values / values.min()


def project(
    foreground: Foreground, values: np.ndarray, keep: np.ufunc = np.fmax, axis: int = 0
) -> np.ndarray:
    """A projection of one value per foreground voxel along an axis: to look at a stage.

    The largest value along the axis, or with ``keep=np.fmin`` the smallest; NaN where there is no
    foreground.
    """
    volume = np.full(foreground.shape, np.nan)
    volume[tuple(foreground.voxels.T)] = values
    return keep.reduce(volume, axis=axis)
