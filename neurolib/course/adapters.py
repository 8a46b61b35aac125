"""Other people's segmentations and tracers, in the frame of the course.

A segmentation may come from any program, as a mask, labels or a probability (`as_probability`).
`TRACERS` are functions that are called like `neurolib.tracing.trace` and give the same kind of
`Tree`: x, y, z in voxels, centres at whole numbers, parents first. kimimaro is no part of this
package (``pip install kimimaro``, GPL).
"""

from collections.abc import Callable

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph
from scipy.spatial import KDTree

from neurolib.errors import SettingsError, VolumeError
from neurolib.evaluation import skeleton
from neurolib.swc import Tree
from neurolib.tracing import (
    BRANCH_MARGIN,
    EXPLAINED_MARGIN,
    EXPLAINED_SCALE,
    HALF_VOXEL,
    UNDEFINED,
    find_foreground,
    measure_radius,
    nearest_voxel,
    rooted,
    trace,
)

FULL_SCALE = {"uint8": 255, "uint16": 65535}  # the whole number that stands for probability 1
# --- Segmentations -----------------------------------------------------------------------------


def as_probability(
    data: np.ndarray, label: int | None = None, threshold: float | None = None, name: str = "volume"
) -> tuple[np.ndarray, str]:
    """What other programs write as a segmentation, as a mask or a probability.

    ================  ============  ===========================================================
    voxels            threshold     meaning
    ================  ============  ===========================================================
    bool              any           a mask
    floats in [0, 1]  any           a probability
    whole numbers     none          labels: all but 0 are foreground, or `label` alone
    uint8, uint16     given         a probability, 1 being 255 or 65535
    ================  ============  ===========================================================

    Parameters
    ----------
    data : (z, y, x)
    label : int, optional
        The only label that is foreground.
    threshold : float, optional
        As given to a tracer; here it only says that whole numbers are no labels.
    name : str
        Of the file, for errors.

    Returns
    -------
    data : (z, y, x) bool, or float32 in [0, 1]
    meaning : str
        What it was taken for, in words.

    Raises
    ------
    VolumeError
        If it is not 3D, has NaN, values outside [0, 1] or below 0, lacks the label, or has no
        background.
    SettingsError
        If label and threshold are both given, or do not fit the type.
    """
    data = np.asarray(data)
    if data.ndim != 3 or not data.size:
        raise VolumeError(f"{name}: expected a 3D stack (z, y, x), got shape {data.shape}")
    if label is not None and threshold is not None:
        raise SettingsError("label and threshold: give one; labels have no threshold")
    kind = data.dtype.kind
    if kind == "b":
        found, meaning = data, "a mask"
    elif kind == "f":
        if label is not None:
            raise SettingsError(f"label={label}: {name} holds {data.dtype}, expected whole numbers")
        low, high = float(data.min()), float(data.max())
        if not (low >= 0 and high <= 1):  # NaN fails too
            raise VolumeError(
                f"{name}: found values from {low:g} to {high:g}, expected probabilities in "
                "[0, 1]; divide by the value of a certain voxel, or save labels as integers"
            )
        found, meaning = data, "a probability"
    elif kind not in "iu":
        raise VolumeError(f"{name}: found {data.dtype}, expected a mask, labels or probabilities")
    elif threshold is not None:
        found, meaning = _scaled(data, name)
    else:
        found, meaning = _labelled(data, label, name)
    if found.dtype == bool and found.all():
        raise VolumeError(
            f"{name}: every voxel is foreground, expected some that are 0; choose one label, or "
            "give a threshold if these are probabilities"
        )
    return found, meaning


def _scaled(data: np.ndarray, name: str) -> tuple[np.ndarray, str]:
    top = FULL_SCALE.get(data.dtype.name)
    if top is None:
        raise SettingsError(
            f"threshold: {name} holds {data.dtype}; probabilities are floats in [0, 1], "
            f"{' or '.join(FULL_SCALE)}"
        )
    return data / np.float32(top), f"a probability, {top} being 1"


def _labelled(data: np.ndarray, label: int | None, name: str) -> tuple[np.ndarray, str]:
    labels = np.unique(data)
    if labels[0] < 0:
        raise VolumeError(f"{name}: found the label {labels[0]}, expected whole numbers from 0")
    if label is None:
        count = np.count_nonzero(labels)
        words = "a mask" if count == 1 else f"{count} labels, all but 0 taken as foreground"
        return data != 0, words
    if label not in labels:
        some = ", ".join(map(str, labels[:8])) + (" ..." if len(labels) > 8 else "")
        raise VolumeError(f"{name}: no voxel has the label {label}; found {some}")
    return data == label, f"label {label} of {', '.join(map(str, labels[:8]))}"


# --- kimimaro ----------------------------------------------------------------------------------


def trace_kimimaro(
    probability: np.ndarray,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    seed: tuple[float, float, float] | None = None,
    threshold: float = 0.5,
    min_size: int = 20,
    bridge: float = 15.0,
) -> Tree:
    """Trace with kimimaro (Silversmith et al., 2021), a TEASAR for electron microscopy.

    Its own constants are nanometres; here paths explain what lies within 1.5 r + 3 voxels and
    branches below 6 voxels are dropped, as in `neurolib.tracing`. It joins the nearest pieces up
    to `bridge` apart, wherever they point.

    Parameters
    ----------
    probability, spacing, threshold, min_size, bridge
        As in `neurolib.tracing.trace`.
    seed : (z, y, x) in voxels, optional
        The node nearest to it becomes the root of its tree.

    Returns
    -------
    Tree
        As of `neurolib.tracing.trace`.

    Raises
    ------
    SettingsError
        If kimimaro is not installed, or a setting is out of its range.
    VolumeError
        As `neurolib.tracing.trace`, or if kimimaro finds nothing.
    """
    try:
        import kimimaro
    except ImportError:
        raise SettingsError("tracer kimimaro: not installed; pip install kimimaro") from None
    foreground = find_foreground(probability, spacing, threshold, min_size)
    if seed is not None:
        nearest_voxel(foreground, seed)
    labels = np.zeros(foreground.shape, np.uint8)
    labels[tuple(foreground.voxels.T)] = 1
    found = kimimaro.skeletonize(
        labels,
        {"scale": EXPLAINED_SCALE, "const": EXPLAINED_MARGIN},
        anisotropy=tuple(foreground.scale.tolist()),
        dust_threshold=0,
        progress=False,
    )
    if 1 not in found:
        raise VolumeError("kimimaro found nothing to trace; lower the threshold or min_size")
    skeleton = kimimaro.postprocess(found[1], dust_threshold=0, tick_threshold=BRANCH_MARGIN)
    if bridge > 0:
        skeleton = kimimaro.join_close_components(skeleton, radius=bridge)
    # Its vertices are in the order of the array's axes, times their anisotropy.
    edges = np.asarray(skeleton.edges, int).reshape(-1, 2)
    return _forest(skeleton.vertices, edges, skeleton.radii, foreground.scale, seed)


def _forest(
    points: np.ndarray, edges: np.ndarray, radius: np.ndarray, scale: np.ndarray, seed
) -> Tree:
    """A forest from points (n, 3), z, y, x times `scale`, and edges (m, 2) of any graph.

    Loops are opened at their longest edge. Roots are an end of their tree; the first is the node
    nearest to the seed (z, y, x) in voxels.
    """
    n = len(points)
    length = np.linalg.norm(points[edges[:, 0]] - points[edges[:, 1]], axis=1)
    length = np.maximum(length, 1e-9)  # a stored zero would be no edge
    graph = sparse.csr_array((length, tuple(edges.T)), shape=(n, n))
    graph = csgraph.minimum_spanning_tree(graph)
    _, group = csgraph.connected_components(graph, directed=False)
    degree = np.bincount(np.concatenate(graph.nonzero()), minlength=n)
    order = np.lexsort([degree, group])
    roots = order[np.flatnonzero(np.diff(group[order], prepend=-1))]
    if seed is not None:
        nearest = int(KDTree(points).query(np.asarray(seed) * scale)[1])
        roots = np.append(nearest, roots[group[roots] != group[nearest]])
    xyz = (points / scale)[:, ::-1].astype(float)
    radius = np.asarray(radius, float) / np.sqrt(scale[1] * scale[2])
    tree = Tree(xyz, radius, np.full(n, UNDEFINED), np.full(n, -1))
    return rooted(tree, np.stack(graph.nonzero()), roots)


# --- Skeleton ----------------------------------------------------------------------------------


def trace_skeleton(
    probability: np.ndarray,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    seed: tuple[float, float, float] | None = None,
    threshold: float = 0.5,
    min_size: int = 20,
    bridge: float = 0.0,
) -> Tree:
    """The simplest tracer: scikit-image's thinning (Lee et al., 1994), its voxels joined to trees.

    A minimum spanning tree over neighbouring voxels opens loops; nothing is pruned and no gap
    closed, whatever `bridge` says. Thinning ignores the spacing (`neurolib.evaluation.skeleton`).

    Parameters, result and errors are those of `trace_kimimaro`.
    """
    foreground = find_foreground(probability, spacing, threshold, min_size)
    if seed is not None:
        nearest_voxel(foreground, seed)
    mask = np.zeros(foreground.shape, bool)
    mask[tuple(foreground.voxels.T)] = True
    thin = find_foreground(skeleton(mask), spacing, min_size=1)
    radius = measure_radius(foreground, thin.points) + HALF_VOXEL
    edges = np.stack(sparse.triu(thin.neighbours).nonzero(), axis=1)
    return _forest(thin.points, edges, radius, thin.scale, seed)


TRACERS: dict[str, Callable[..., Tree]] = {"neurolib": trace, "kimimaro": trace_kimimaro}
