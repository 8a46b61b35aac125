"""How good a mask or a tree is: overlap, surface distance, topology, tree distance.

Masks are boolean arrays (z, y, x), trees are in voxels. Distances, tolerances and lengths are in
the unit of `spacing`: µm, or voxels with the default (`length_unit` chooses one for a table).
Each function says what it gives where a score is undefined (empty mask, no edges). Masks that
are not boolean, or differ in shape, are a VolumeError; trees without nodes are a SwcError, except
in `compare` and `distance_to_tree`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

from neurolib.data.formats import check_spacing
from neurolib.errors import SettingsError, SwcError, VolumeError
from neurolib.parameters import check_range
from neurolib.swc import Tree, Zyx, edges, repeated
from neurolib.volume import bounding_box

if TYPE_CHECKING:
    from neurolib.blocking import Sample
    from neurolib.volume import Volume

DISTANCES = ("Hd95", "ESA", "DSA")
# Sizes tried for the smallest piece to keep, in voxels; 1 keeps all.
SIZES = (1, 50, 200, 800)
# Number of thresholds at which they are tried.
TRIED = 32
FULL_CONNECTIVITY = np.ones((3, 3, 3), dtype=bool)  # 26 neighbours: a neurite may run diagonally


# --- Units -------------------------------------------------------------------------------------


def length_unit(stacks: "Iterable[Volume | Sample]") -> str:
    """The unit of a table: "µm" if the spacing of every stack is known, else "voxels".

    If a stack has voxels of 1 µm, as all generated ones do, the unit is voxels.
    """
    known = (not stack.unknown and tuple(stack.spacing) != (1, 1, 1) for stack in stacks)
    return "µm" if all(known) else "voxels"


def in_unit(spacing: Zyx, unit: str) -> Zyx:
    """The spacing for the scores of a table: in µm, or in voxels of the finest axis."""
    scale = check_spacing(spacing)
    return tuple((scale if unit == "µm" else scale / scale.min()).tolist())


def name_unit(row: Mapping) -> dict:
    """A row of a table, its ``unit`` moved into the headings of the distances."""
    unit = f" ({row['unit']})" if "unit" in row else ""
    heads = {key: key + unit if key in DISTANCES else key for key in row if key != "unit"}
    return {head: row[key] for key, head in heads.items()}


# --- Masks -------------------------------------------------------------------------------------


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Dice coefficient 2 |a ∩ b| / (|a| + |b|) of two masks of any shape; 1 if both are empty."""
    a, b = _check_masks(a, b, dimensions=None)
    total = np.count_nonzero(a) + np.count_nonzero(b)
    return 2 * np.count_nonzero(a & b) / total if total else 1.0


def hd95(
    a: np.ndarray, b: np.ndarray, spacing: Zyx = (1.0, 1.0, 1.0), method: str = "monai"
) -> float:
    """95th percentile of the distances between the surfaces of two masks (z, y, x).

    A surface is the set of foreground voxels with a background voxel among their six neighbours;
    what lies outside the volume is background. Both reference implementations do the same. The
    `method` "monai" takes the larger of the two directed 95th percentiles, "medpy" the 95th
    percentile of both directions pooled (larger only by interpolation).

    The result is in the unit of `spacing` (dz, dy, dx); 0 if both masks are empty, inf if only one
    is. `statistics.aggregate` averages such values.
    """
    a, b = _check_masks(a, b)
    spacing = check_spacing(spacing)
    if method not in ("monai", "medpy"):
        raise SettingsError(f'hd95: method is "monai" or "medpy", got {method!r}')
    one, two = (surface_voxels(mask) * spacing for mask in (a, b))
    if not len(one) or not len(two):
        return 0.0 if len(one) == len(two) else float("inf")
    # Voxels on both surfaces are at distance 0, and the search, which is fast for small distances,
    # is done with them at once. Most of the time goes into building the trees; an unbalanced one
    # takes half as long.
    quick = {"balanced_tree": False, "compact_nodes": False}
    there = KDTree(two, **quick).query(one, workers=-1)[0]
    back = KDTree(one, **quick).query(two, workers=-1)[0]
    if method == "monai":
        return float(max(np.percentile(there, 95), np.percentile(back, 95)))
    return float(np.percentile(np.concatenate([there, back]), 95))


def surface_dice(
    a: np.ndarray, b: np.ndarray, tolerance: float | None = None, spacing: Zyx = (1.0, 1.0, 1.0)
) -> float:
    """Share of the surfaces of two masks (z, y, x) that lies within a tolerance of the other.

    Nikolov et al., "Deep learning to achieve clinically applicable segmentation of head and neck
    anatomy for radiotherapy", 2018 (arXiv:1809.04430), with surfaces as in its published code: one
    element for each corner where eight voxels meet that are not all alike, weighted by the area of
    the triangles that marching cubes puts there. (A few corners are ambiguous, and the published
    table has other triangles for some of them.) A trace that runs one voxel to the side of a thin
    neurite loses a third of its Dice or more, but nothing here.

    `tolerance` is in the unit of `spacing` (dz, dy, dx), by default 2 voxels of the finest axis.
    The result is 1 if both masks are empty, 0 if only one is.
    """
    a, b = _check_masks(a, b)
    spacing = check_spacing(spacing)
    check_range("tolerance", tolerance)
    tolerance = 2 * np.min(spacing) if tolerance is None else tolerance
    reach = float(tolerance * (1 + 1e-9))  # rounding must not separate equal distances
    if not a.any() or not b.any():
        return 1.0 if a.any() == b.any() else 0.0
    (points_a, areas_a), (points_b, areas_b) = (_surface_elements(m, spacing) for m in (a, b))
    far_a = KDTree(points_b).query(points_a, workers=-1)[0] > reach
    far_b = KDTree(points_a).query(points_b, workers=-1)[0] > reach
    return float(1 - (areas_a @ far_a + areas_b @ far_b) / (areas_a.sum() + areas_b.sum()))


def _surface_elements(mask: np.ndarray, spacing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions (m, 3) of a surface's elements, in the unit of the spacing, and their areas."""
    box = bounding_box(mask)
    crop = np.pad(mask[box], 1)
    # The eight voxels that meet at a corner are the bits of its number.
    number = np.zeros([n - 1 for n in crop.shape], dtype=np.uint8)
    for bit, corner in enumerate(np.ndindex(2, 2, 2)):
        ends = (slice(i, n - 1 + i) for i, n in zip(corner, crop.shape, strict=True))
        number |= crop[tuple(ends)].astype(np.uint8) << bit
    corners = np.argwhere((number > 0) & (number < 255))
    areas = _corner_areas(tuple(spacing.tolist()))[number[tuple(corners.T)]]
    return (corners + [part.start for part in box]) * spacing, areas


@cache
def _corner_areas(spacing: Zyx) -> np.ndarray:
    """Area (256,) of the triangles that marching cubes puts into each pattern of eight voxels."""
    from skimage.measure import marching_cubes, mesh_surface_area

    areas = np.zeros(256)
    for number in range(1, 255):
        cube = (number >> np.arange(8) & 1).reshape(2, 2, 2).astype(np.float32)
        vertices, faces, *_ = marching_cubes(cube, 0.5, spacing=spacing, method="lorensen")
        areas[number] = mesh_surface_area(vertices, faces)
    return areas


def surface_shares(mask: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ascending distances (n,) in voxels, from 0, and the share of a mask's surface within each.

    The distances run from the mask's surface to that of `truth`. The share passes 0.95 at the
    directed 95th percentile, one of the two that `hd95` compares.
    """
    mask, truth = _check_masks(mask, truth)
    if not mask.any() or not truth.any():
        raise VolumeError("an empty mask has no surface; expected two masks with foreground")
    distances = KDTree(surface_voxels(truth)).query(surface_voxels(mask))[0]
    values, counts = np.unique(np.append(0.0, distances), return_counts=True)
    counts[0] -= 1
    return values, np.cumsum(counts) / len(distances)


def surface_voxels(mask: np.ndarray) -> np.ndarray:
    """Indices (n, 3) of the foreground voxels with a face neighbour that is not foreground.

    What lies outside the mask (z, y, x) is background.
    """
    (mask,) = _check_masks(mask)
    box = bounding_box(mask)
    if box is None:
        return np.zeros((0, 3), dtype=np.intp)
    # Looking at the six neighbours of the foreground alone is many times faster on a sparse
    # volume than eroding all of it; the margin keeps neighbours from wrapping to the next row.
    crop = np.pad(mask[box], 1)
    flat, foreground = crop.ravel(), np.flatnonzero(crop)
    steps = np.array([crop.shape[1] * crop.shape[2], crop.shape[2], 1])
    inside = np.ones(len(foreground), dtype=bool)
    for step in (*steps, *-steps):
        inside &= flat[foreground + step]
    surface = np.unravel_index(foreground[~inside], crop.shape)
    return np.stack(surface, axis=1) - 1 + [part.start for part in box]


def cl_dice(a: np.ndarray, b: np.ndarray) -> float:
    """Centre-line Dice: harmonic mean of each skeleton's share inside the other mask.

    Shit et al., "clDice: a novel topology-preserving loss function for tubular structure
    segmentation", CVPR 2021; skeletons by Lee's 3D thinning (scikit-image). 1 if both masks are
    empty, 0 if only one is.
    """
    a, b = _check_masks(a, b)
    if not a.any() or not b.any():
        return 1.0 if a.any() == b.any() else 0.0
    thin_a, thin_b = skeleton(a), skeleton(b)
    precision = np.count_nonzero(thin_a & b) / np.count_nonzero(thin_a)
    recall = np.count_nonzero(thin_b & a) / np.count_nonzero(thin_b)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def skeleton(mask: np.ndarray) -> np.ndarray:
    """Skeleton of a mask by Lee's 3D thinning, in which every connected piece keeps a voxel.

    Lee, Kashyap and Chu, "Building skeleton models via 3-D medial surface/axis thinning
    algorithms", CVGIP 1994, as in scikit-image. Its thinning removes some pieces altogether,
    among them all tubes of 2 × 2 and 4 × 4 voxels; those are thinned once more on a finer grid.
    """
    from skimage.morphology import skeletonize  # half a second to import: only where it is used

    (mask,) = _check_masks(mask)
    thin = np.zeros_like(mask)
    box = bounding_box(mask)
    if box is None:
        return thin
    thin[box] = skeletonize(mask[box])
    label, count = ndimage.label(mask[box], structure=FULL_CONNECTIVITY)
    lost = np.setdiff1d(np.arange(1, count + 1), label[thin[box]])
    boxes = ndimage.find_objects(label)
    for number in lost:
        part = boxes[number - 1]
        piece = label[part] == number
        # A piece two voxels thick has no middle voxel. With a voxel inserted between each pair,
        # every run of n voxels becomes one of 2n - 1, which has a middle.
        fine = np.zeros([2 * n - 1 for n in piece.shape], dtype=bool)
        fine[::2, ::2, ::2] = piece
        for axis in range(3):
            view = np.moveaxis(fine, axis, 0)
            view[1::2] = view[:-1:2] & view[2::2]
        middle = np.argwhere(skeletonize(fine)) // 2
        if not len(middle):  # its deepest voxel
            depth = ndimage.distance_transform_edt(np.pad(piece, 1))[1:-1, 1:-1, 1:-1]
            middle = np.argwhere(depth == depth.max())[:1]
        thin[box][part][tuple(middle.T)] = True
    return thin


def betti0_error(a: np.ndarray, b: np.ndarray) -> int:
    """Difference between the numbers of connected components (26 neighbours) of two masks."""
    a, b = _check_masks(a, b)
    one, two = (ndimage.label(mask, FULL_CONNECTIVITY)[1] for mask in (a, b))
    return abs(one - two)


def volume_diagonal(shape: tuple[int, int, int], spacing: Zyx = (1.0, 1.0, 1.0)) -> float:
    """Length of the diagonal of a volume, edge to edge: no two voxels of it are farther apart.

    It replaces an infinite `hd95` in a mean (`neurolib.course.statistics.aggregate`).
    """
    return float(np.linalg.norm(np.multiply(shape, check_spacing(spacing))))


def _check_masks(*masks: np.ndarray, dimensions: int | None = 3) -> list[np.ndarray]:
    masks = [np.asarray(mask) for mask in masks]
    for mask in masks:
        if mask.dtype != bool:
            raise VolumeError(f"expected a boolean mask, got {mask.dtype}; threshold it (p >= 0.5)")
        if dimensions is not None and mask.ndim != dimensions:
            raise VolumeError(f"expected a {dimensions}D mask (z, y, x), got shape {mask.shape}")
    shapes = [mask.shape for mask in masks]
    if len(set(shapes)) > 1:
        found = " and ".join(map(str, shapes))
        raise VolumeError(f"two masks of one volume must have the same shape, got {found}")
    return masks


# --- Trees -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TreeDistance:
    """Distances of two trees (esa, dsa) and a share (pds); see `tree_distance`."""

    esa: float
    dsa: float
    pds: float


def tree_distance(
    tree: Tree, reference: Tree, threshold: float | None = None, spacing: Zyx = (1.0, 1.0, 1.0)
) -> TreeDistance:
    """Distances between two trees as Vaa3D's "neuron distance" defines them.

    Every edge of one tree is sampled with int(1 + length + 0.5) points, where the length is in
    voxels of the finest axis. Both its nodes are among them, so a node counts once for each of its
    edges. The distance of a point is its distance to the nearest edge of the other tree.

    - esa, "entire structure average": mean distance, averaged over the two directions;
    - dsa, "different structure average": mean over the points at a distance of `threshold` or
      more, averaged over the directions that have such points; 0 if neither has;
    - pds, "percentage of different structures": share of such points (0 to 1), averaged.

    Peng et al., "V3D enables real-time 3D visualization and quantitative analysis of large-scale
    biological image data sets", Nature Biotechnology 2010.

    `threshold` is the distance from which a point counts as different, by default Vaa3D's: 2 voxels
    of the finest axis. It is in the unit of `spacing` (dz, dy, dx), and so are esa and dsa.
    """
    tree, reference, voxel, threshold = _comparable(tree, reference, spacing, threshold)
    threshold *= 1 - 1e-9  # equal distances are equal, whatever the unit
    there = distance_to_tree(sample_edges(tree), reference)
    back = distance_to_tree(sample_edges(reference), tree)
    apart = [distances[distances >= threshold] for distances in (there, back)]
    means = [distances.mean() for distances in apart if len(distances)]
    return TreeDistance(
        esa=float(there.mean() + back.mean()) / 2 * voxel,
        dsa=float(np.mean(means)) * voxel if means else 0.0,
        pds=(len(apart[0]) / len(there) + len(apart[1]) / len(back)) / 2,
    )


def _comparable(tree: Tree, reference: Tree, spacing: tuple, threshold: float | None) -> tuple:
    """Two trees in voxels of the finest axis, a voxel's edge, and the threshold in voxels."""
    if not (len(tree.parent) and len(reference.parent)):
        raise SwcError("a tree without nodes cannot be compared; expected at least one node")
    check_range("tolerance", threshold, "threshold=")
    tree, reference, voxel = finest_voxels(spacing, tree, reference)
    return tree, reference, voxel, 2.0 if threshold is None else threshold / voxel


def finest_voxels(spacing: Zyx, *trees: Tree) -> tuple:
    """Trees in voxels of the finest axis, as all sampling needs them, and the edge of a voxel."""
    scale = check_spacing(spacing)
    scaled = (replace(tree, xyz=tree.xyz * (scale / scale.min())[::-1]) for tree in trees)
    return *scaled, float(scale.min())


def _cut_edges(tree: Tree, count_of: Callable[[np.ndarray], np.ndarray]) -> tuple:
    """Edges from child to parent, each repeated as often as `count_of` says for its length.

    Returns, for each repetition, start and step (m, 3) of the edge, its number within the edge, how
    many there are, the edge's length and the row of its child.
    """
    child, parent = edges(tree)
    start, step = tree.xyz[child], tree.xyz[parent] - tree.xyz[child]
    length = np.linalg.norm(step, axis=1)
    count = count_of(length)
    edge, number = repeated(count)
    return start[edge], step[edge], number, count[edge], length[edge], child[edge]


def sample_edges(tree: Tree) -> np.ndarray:
    """Points (m, 3), as x, y, z: int(1 + length + 0.5) per edge, from the child to the parent.

    A tree without edges gives its nodes.
    """
    if (tree.parent < 0).all():
        return tree.xyz
    start, step, number, count, *_ = _cut_edges(tree, lambda x: (1 + x + 0.5).astype(int))
    return start + step * (number / np.maximum(count - 1, 1))[:, None]


def distance_to_tree(points: np.ndarray, tree: Tree) -> np.ndarray:
    """Exact distance (m,) of points (m, 3), as x, y, z, to the nearest edge of a tree, in voxels.

    A tree without edges is taken as its nodes; without nodes, all distances are infinite.
    """
    # Strategy: cut the edges into pieces no longer than `longest` and put the middles into a
    # KD-tree. No point of a piece is farther than longest / 2 from its middle, so a piece whose
    # middle is at distance d is at least d - longest / 2 away. Look at the k pieces with the
    # nearest middles and take the best exact distance; if the k-th middle is at least
    # best + longest / 2 away, no piece left out can be better and the result is proved. The few
    # points for which it is not are queried again with more pieces.
    if not len(tree.parent):
        return np.full(len(points), np.inf)
    start, step = _edge_pieces(tree)
    longest = np.sqrt((step**2).sum(axis=1).max())
    middles = KDTree(start + step / 2)
    distances = np.empty(len(points))
    open_points, k = np.arange(len(points)), min(8, len(start))
    while len(open_points):
        unproved = [open_points[:0]]
        for part in np.array_split(open_points, -(-len(open_points) * k // 1_000_000)):
            to_middle, piece = middles.query(points[part], k=np.arange(1, k + 1))
            best = _distance_to_pieces(points[part, None], start[piece], step[piece]).min(axis=1)
            distances[part] = best
            if k < len(start):
                unproved.append(part[to_middle[:, -1] < best + longest / 2])
        open_points = np.concatenate(unproved)
        k = min(4 * k, len(start))
    return distances


def _edge_pieces(tree: Tree) -> tuple[np.ndarray, np.ndarray]:
    """Start and step (p, 3) of the edges, those longer than the mean cut into equal pieces."""
    if (tree.parent < 0).all():
        return tree.xyz, np.zeros_like(tree.xyz)
    # Pieces of the mean length at most double the number of edges, whatever the unit.
    start, step, number, count, *_ = _cut_edges(
        tree, lambda x: np.maximum(np.ceil(x / (x.mean() or 1)), 1).astype(int)
    )
    step = step / count[:, None]
    return start + step * number[:, None], step


def _distance_to_pieces(points: np.ndarray, start: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Distance of points to straight pieces start + t * step, t in [0, 1], by broadcasting."""
    square = np.maximum((step**2).sum(axis=-1), np.finfo(float).tiny)
    along = np.clip(((points - start) * step).sum(axis=-1) / square, 0, 1)
    return np.sqrt(((points - start - along[..., None] * step) ** 2).sum(axis=-1))


@dataclass(frozen=True)
class TreeScores:
    """Shares of the lengths of two trees; see `tree_scores`."""

    precision: float
    recall: float


def tree_scores(
    tree: Tree, reference: Tree, threshold: float | None = None, spacing: Zyx = (1.0, 1.0, 1.0)
) -> TreeScores:
    """Length-weighted precision and recall of a tree.

    Precision is the share of the length of `tree` that lies within `threshold` of the reference,
    recall the share of the reference's length within `threshold` of `tree`. A tree without
    edges is scored by its nodes.

    `threshold` is in the unit of `spacing` (dz, dy, dx), by default 2 voxels of the finest axis.
    """
    tree, reference, _, threshold = _comparable(tree, reference, spacing, threshold)
    threshold = threshold * (1 + 1e-9) + 1e-9  # rounding decides nothing
    precision = _share_within(tree, reference, threshold)
    return TreeScores(precision, _share_within(reference, tree, threshold))


def _share_within(tree: Tree, other: Tree, threshold: float) -> float:
    points, lengths, _ = short_pieces(tree)
    if not lengths.any():
        return float((distance_to_tree(tree.xyz, other) <= threshold).mean())
    return float(np.average(distance_to_tree(points, other) <= threshold, weights=lengths))


def short_pieces(tree: Tree) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges cut into equal pieces of at most half a voxel: middles (m, 3) x, y, z, lengths, rows.

    Each row (m,) is that of a node: the piece belongs to the edge from this node to its parent.
    """
    start, step, number, count, length, child = _cut_edges(
        tree, lambda x: np.maximum(np.ceil(2 * x), 1).astype(int)
    )
    return start + step * ((number + 0.5) / count)[:, None], length / count, child


def compare(
    tree: Tree, reference: Tree, spacing: Zyx = (1.0, 1.0, 1.0), threshold: float | None = None
) -> dict[str, float]:
    """The scores of a tree that a table of neurons shows: ESA, DSA, PDS, precision, recall, trees.

    See `tree_distance` and `tree_scores`, also for `threshold`; distances in the unit of `spacing`.
    If only one tree has nodes, as where nothing was found, distances are infinite, PDS is 1, and
    precision and recall are 0. If neither has, distances and PDS are 0, precision and recall 1.
    """
    if len(tree.parent) and len(reference.parent):
        distance = tree_distance(tree, reference, threshold, spacing)
        scores = tree_scores(tree, reference, threshold, spacing)
    else:
        apart = len(tree.parent) != len(reference.parent)
        away, agree = (np.inf, 0.0) if apart else (0.0, 1.0)
        distance, scores = TreeDistance(away, away, 1 - agree), TreeScores(agree, agree)
    return {
        "ESA": distance.esa,
        "DSA": distance.dsa,
        "PDS": distance.pds,
        "precision": scores.precision,
        "recall": scores.recall,
        "trees": int((tree.parent < 0).sum()),
    }


def choose_cut(
    responses: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    candidates: Sequence[float],
    spacings: Sequence[Sequence[float]] = (),
) -> tuple[float, int, float]:
    """Choose one threshold and one smallest piece for all volumes, by their mean Dice.

    `responses` and `masks` are (z, y, x); `candidates` are thresholds, ascending. Pieces are
    counted at up to `TRIED` of them, spread over those whose Dice with all pieces is at least 0.8
    of the best. Returns the threshold, the size of the smallest piece that is kept (one of `SIZES`,
    which `in_voxels` converts for each of the `spacings`), and their Dice.
    """
    candidates = np.asarray(candidates)
    spacings, curves = spacings or [(1, 1, 1)] * len(masks), []
    for response, mask in zip(responses, masks, strict=True):
        # A voxel that reaches k thresholds is foreground at the first k of them.
        reached = np.searchsorted(candidates, response.ravel(), "right")
        counts = np.bincount(reached, minlength=len(candidates) + 1)
        hits = np.bincount(reached[mask.ravel()], minlength=len(candidates) + 1)
        marked, both = counts[::-1].cumsum()[-2::-1], hits[::-1].cumsum()[-2::-1]
        curves.append(2 * both / np.maximum(marked + np.count_nonzero(mask), 1))
    curve = np.mean(curves, axis=0)
    near = np.flatnonzero(curve >= 0.8 * curve.max())
    spread = near[np.linspace(0, len(near) - 1, min(TRIED, len(near))).round().astype(int)]
    tried = np.union1d(spread, curve.argmax())
    scores = np.zeros((len(tried), len(SIZES)))
    for response, mask, spacing in zip(responses, masks, spacings, strict=True):
        for row, at in zip(scores, tried, strict=True):
            label, voxels = label_pieces(response >= candidates[at])
            hits = np.bincount(label[mask], minlength=len(voxels))
            for i, size in enumerate(SIZES):
                kept = voxels >= in_voxels(size, spacing)
                total = voxels[kept].sum() + np.count_nonzero(mask)
                row[i] += 2 * hits[kept].sum() / max(total, 1) / len(masks)
    best, size = np.unravel_index(scores.argmax(), scores.shape)
    return float(candidates[tried[best]]), SIZES[size], float(scores[best, size])


def in_voxels(size: int, spacing: Sequence[float]) -> int:
    """A piece's size, given in cubes of the shortest voxel edge, converted to voxels (at least 1).

    A neurite has fewer voxels where slices are far apart; without conversion, a size chosen on one
    stack would drop it in another.
    """
    edges = check_spacing(spacing)
    return max(1, round(size * edges.min() ** 3 / edges.prod()))


def drop_small(mask: np.ndarray, size: int) -> np.ndarray:
    """A mask without its connected pieces (26 neighbours) of fewer than `size` voxels."""
    if size <= 1:
        return mask
    label, voxels = label_pieces(mask)
    return (voxels >= size)[label]


def label_pieces(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The connected piece (26 neighbours) of each voxel, from 1, and the voxels in each piece.

    Piece 0 is the background, and counts as having no voxels.
    """
    label, _ = ndimage.label(mask, FULL_CONNECTIVITY)
    voxels = np.bincount(label.ravel())
    voxels[0] = 0
    return label, voxels
