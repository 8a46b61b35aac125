"""Synthetic neurons with an exact answer: a grown tree, and how a microscope would show it.

Growth follows the idea of Cuntz et al., PLoS Comput. Biol. 6 (2010) e1000877: points are scattered
through the arbor's territory and connected one by one to where the tree can reach them with little
cable and a short way to the root. Rendering takes any tree and adds what a microscope adds: stained
tubes, blur, unrelated structures, photon and read-out noise.

Growth is calibrated on the gold-standard SWCs of 32 Janelia FlyLight neurons (BigNeuron gold166,
voxel 0.38 µm), style ``confocal`` on six confocal stacks of Drosophila larval neurons
(TuFF_toolkit), style ``flylight`` on 30 maximum projections of the same Janelia neurons and the
masked stack of rivuletpy. "Measured" below refers to these. `GOLD_RANGES` and `REAL_RANGES` hold
the smallest and largest measured values, under the names that `statistics` and `image_statistics`
use.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.ndimage import distance_transform_edt, gaussian_filter
from scipy.spatial import cKDTree

from neurolib.errors import SettingsError, SwcError
from neurolib.swc import Tree, branch_points, densify, length, tips, topological_order
from neurolib.volume import Volume

# Measured with `statistics`, n = 32 gold trees. Lengths and radii in voxels.
GOLD_RANGES = {
    "length": (296.0, 7200.0),
    "tips": (8.0, 316.0),
    "branches": (6.0, 301.0),
    "segment_median": (7.06, 15.9),
    "segment_mean": (8.43, 34.5),
    "tortuosity": (1.04, 1.13),
    "radius_mean": (1.01, 1.6),
    "radius_median": (1.0, 1.0),
    "radius_95": (1.0, 3.66),
    "radius_max": (2.64, 5.15),
}

# Measured with `image_statistics`, n = 6 confocal stacks.
REAL_RANGES = {
    "foreground": (0.00075, 0.00203),
    "zeros": (0.0, 0.101),
    "saturated": (0.0, 0.000248),
    "contrast": (2.29, 18.7),
    "dice": (0.241, 0.395),
    "threshold": (76.0, 164.0),
    "axis_5": (46.0, 71.0),
    "axis_50": (81.0, 183.0),
    "axis_95": (126.0, 255.0),
    "near_50": (27.0, 68.0),
    "near_95": (92.0, 234.0),
    "far_50": (6.0, 52.0),
    "far_95": (23.0, 96.0),
    "far_99": (39.0, 117.0),
}

# --------------------------------------------------------------------------------------------
# Growth

MARGIN = 6  # voxels kept free at every face, room for a soma and its blur as in the gold extracts
SMALLEST = (24, 64, 64)  # in smaller volumes, the margin leaves no room for an arbor
STEP = 2.0  # voxels between nodes; the gold trees are resampled at 3, the walk needs finer steps
# Cable per voxel of an arbor's territory, drawn log-uniformly. It also determines the mean length
# of a twig (about half of density^-1/2).
DENSITY = (2e-3, 6e-3)
CABLE = (300.0, 7200.0)  # measured: the range of total lengths, n = 32
# Largest semi-axes of an arbor. Measured: half the side of a tree's bounding box is 27 to 170,
# median 74, and most trees have more than one arbor.
LOBE = (30.0, 110.0)
BEND = 0.125  # deviation of the trunk halfway to an arbor, as a share of the way; chosen by eye
TWIG = 6.0  # voxels; measured: the 5th percentile of a tree's end segments, median of 32
MISSES = 100  # unreachable targets in a row after which a territory counts as full
BALANCE = 0.3  # weight of the way to the root against new cable; Cuntz et al. use 0.2 to 0.7
CLEARANCE = 5.0  # voxels between the neurites of a cell, which avoid each other
# Weights of the last direction, the way to the target and chance in the direction of a step. They
# determine the tortuosity of segments.
MOMENTUM, PULL, WANDER = 0.5, 0.35, 0.18
SOMA_RADIUS = (3.0, 5.0)  # measured: 10th to 90th percentile of the largest radius of a tree
THIN, TAPER = 0.75, 0.16  # radius = max(1, THIN * tips below ** TAPER): median 1, trunk to 2
SWELLINGS, SWELLING_RADIUS = 0.06, 2.0  # varicosities; measured: 95th percentile of radius is 2


def grow(seed: int, shape: Sequence[int] = (48, 192, 192)) -> Tree:
    """Grow a fly-like neuron: soma, bare primary neurite, one to three arbors.

    Segment lengths, tortuosity and radii (in voxels) are those of real trees, whatever the shape;
    the number of branches grows with the volume. The same seed and shape give exactly the same
    tree.

    Parameters
    ----------
    seed : int
    shape : (int, int, int)
        Volume shape (z, y, x) that the tree must fit into, at least (24, 64, 64).

    Returns
    -------
    Tree
        One root (the soma, type 1), parents first, at least 6 voxels from every face.
    """
    rng = _generator(seed, "grow")
    shape = _checked_shape(shape, SMALLEST)
    low, high = np.full(3, float(MARGIN)), np.array(shape[::-1]) - 1.0 - MARGIN
    soma, lobes = _territories(rng, (low + high) / 2, (high - low) / 2)
    volumes = np.array([4 / 3 * np.pi * np.linalg.det(axes) for _, axes in lobes])
    density = np.exp(rng.uniform(*np.log(DENSITY)))
    cable = float(np.clip(volumes.sum() * density, *CABLE))

    # Each walk becomes a run of rows behind the row at which it starts, so parents come first.
    xyz, parent = soma[None], np.array([-1])
    way, children = np.zeros(1), np.zeros(1, dtype=int)

    def append(start: int, path: np.ndarray) -> None:
        nonlocal xyz, parent, way, children
        n, new = len(xyz), np.arange(len(path))
        xyz = np.concatenate([xyz, path])
        parent = np.concatenate([parent, np.where(new == 0, start, n + new - 1)])
        way = np.concatenate([way, way[start] + STEP * (new + 1)])
        children[start] += 1
        children = np.concatenate([children, np.where(new == len(path) - 1, 0, 1)])

    for centre, _ in lobes:
        start = int(np.argmin(np.linalg.norm(xyz - centre, axis=1)))
        detour = rng.normal(0, BEND, 3) * np.linalg.norm(centre - xyz[start]) * (1, 1, 0.3)
        for target in ((xyz[start] + centre) / 2 + detour, centre):
            path = _walk(rng, xyz[start], target, np.zeros(3), xyz[:0], low, high)
            if len(path):
                append(start, path)
                start = len(xyz) - 1
    misses = 0
    while len(xyz) * STEP < cable and misses < MISSES:
        misses += 1
        centre, axes = lobes[rng.choice(len(lobes), p=volumes / volumes.sum())]
        direction = rng.normal(size=3)
        direction *= rng.uniform() ** (1 / 3) / np.linalg.norm(direction)
        target = np.clip(centre + axes @ direction, low, high)
        distance = np.linalg.norm(xyz - target, axis=1)
        free = _free(xyz, parent, children, lobes)
        if distance.min() < CLEARANCE or not free.any():
            continue
        start = int(np.argmin(np.where(free, distance + BALANCE * way, np.inf)))
        others = xyz[np.linalg.norm(xyz - xyz[start], axis=1) > CLEARANCE]
        heading = xyz[start] - xyz[parent[start]]
        path = _walk(rng, xyz[start], target, heading / STEP, others, low, high)
        if len(path) * STEP >= TWIG:
            append(start, path)
            misses = 0
    return Tree(xyz, _radii(rng, parent), np.where(parent < 0, 1, 3), parent)


def _territories(rng, middle: np.ndarray, half: np.ndarray) -> tuple[np.ndarray, list]:
    """Place of the soma, and centre and axes of one to three ellipsoids, x, y, z."""
    # The soma lies at the rim of the field and the arbors across the middle, as in the fly's brain,
    # where the cell bodies surround the neuropil.
    angle = rng.uniform(0, 2 * np.pi)
    rim = np.array([np.cos(angle), np.sin(angle), rng.uniform(-0.6, 0.6)])
    lobes = []
    for _ in range(rng.integers(1, 4)):
        # An ellipsoid, turned in the plane: the unit ball times `axes`.
        share = rng.uniform((0.25, 0.35, 0.5), (0.5, 0.8, 0.9))
        size = np.minimum(half * share, rng.uniform(*LOBE))
        turn = rng.uniform(0, np.pi)
        axes = np.diag(size)
        axes[:2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]] @ axes[:2]
        room = np.maximum(half - np.linalg.norm(axes, axis=1), 0)
        place = rng.uniform(-1, 1, 3) * room
        # Away from the soma, so that the primary neurite has some length.
        place[:2] -= 0.3 * room[:2] * rim[:2]
        lobes.append((middle + np.clip(place, -room, room), axes))
    return middle + half * rim * 0.9, lobes


def _free(xyz, parent, children, lobes) -> np.ndarray:
    """Nodes (n,) at which a branch may start: tips, and nodes two steps or more from branch points.

    They lie in a territory, because the primary neurite of a fly neuron is bare.
    """
    depth = [np.linalg.norm((xyz - c) @ np.linalg.inv(a).T, axis=1) for c, a in lobes]
    key = children != 1
    taken = key | key[parent]
    taken[parent[key]] = True
    return (np.min(depth, axis=0) < 1) & (parent >= 0) & (~taken | (children == 0))


def _walk(rng, start, target, heading, others, low, high) -> np.ndarray:
    """Nodes (m, 3) from `start` (excluded) towards `target`, stopping before any of `others`."""
    path = [start]
    for _ in range(int(2 * np.linalg.norm(target - start) / STEP)):
        ahead = target - path[-1]
        distance = np.linalg.norm(ahead)
        if distance < STEP:
            break
        heading = MOMENTUM * heading + PULL * ahead / distance + rng.normal(0, WANDER, 3)
        heading /= np.linalg.norm(heading)
        point = np.clip(path[-1] + STEP * heading, low, high)
        gaps = others - point
        if len(gaps) and np.einsum("ij,ij->i", gaps, gaps).min() < (CLEARANCE / 2) ** 2:
            break
        path.append(point)
    return np.array(path[1:]).reshape(-1, 3)


def _radii(rng, parent) -> np.ndarray:
    """Radius of each node (n,), with varicosities: it tapers with the number of tips beyond."""
    feeds = np.zeros(len(parent))
    feeds[np.bincount(parent[1:], minlength=len(parent)) == 0] = 1
    for row in range(len(parent) - 1, 0, -1):
        feeds[parent[row]] += feeds[row]
    radius = np.maximum(1.0, THIN * feeds**TAPER)
    swollen = rng.uniform(size=len(parent)) < SWELLINGS
    radius[swollen] = np.maximum(radius[swollen], SWELLING_RADIUS)
    radius[0] = rng.uniform(*SOMA_RADIUS)
    return radius


# --------------------------------------------------------------------------------------------
# Rendering


@dataclass(frozen=True)
class Style:
    """What a stack looks like, in grey levels of 0 to 255. Ranges are drawn once per stack.

    neurite: median level on the centreline; background: level far from the neurite; psf: standard
    deviations (z, y, x) of the blur in voxels; unevenness: standard deviation of the logarithm of
    the stain along neurites; photons: number per grey level, fewer mean more noise; halo: distance
    from the neurite in voxels beyond which the stack is exactly zero, or None; slimmer: voxels by
    which `render_extract` draws tubes thinner than the radii of a gold tree.
    """

    neurite: tuple[float, float]
    background: tuple[float, float]
    psf: tuple[float, float, float]
    unevenness: float
    photons: float
    halo: float | None = None
    slimmer: float = 0.0


STYLES = {
    # Measured: the median is 81 to 183 on the centreline and 6 to 52 elsewhere. Specks have
    # standard deviations of 0.9 to 1.3 voxels in the plane and 2 to 4 along z. The blur is at the
    # upper end of this, because larval neurites are thicker than the gold radii (half the height
    # at 2.5 voxels across). The standard deviation between neighbouring background voxels is 2.6
    # to 4.9.
    "confocal": Style((85, 180), (12, 60), (3.8, 1.4, 1.4), 0.45, 3.0),
    # Measured in the projections: the median is 122 to 198 on thin neurites and 1 to 17 elsewhere
    # inside the mask. The extracts are cut from blocks, so the outline of the mask has steps. Gold
    # radii are at least 1 voxel, but the light is thinner: it falls to half its height 0.7 voxels
    # beside thin gold neurites (median of 30; 0.55 to 0.87). In renderings of the same trees this
    # distance is 1.22 with the radii as they are and 0.95 with half a voxel less. That keeps the
    # size of somata and also improves the levels 1 to 3 voxels beside the neurite.
    "flylight": Style((100, 180), (0.3, 2), (1.5, 0.7, 0.7), 0.9, 2.5, halo=10.0, slimmer=0.5),
}
# Median on the centreline / median elsewhere. Measured: 2.6 to 4.0 in five stacks, 30 in one.
CONTRAST = (2.5, 5.0)
# Staining along the path: the lengths in voxels over which the two halves of its variance decay.
# Measured: half of the correlation is lost within 5 voxels, the rest within 50.
STAINING = (5.0, 40.0)
# The label sits in the membrane (mCD8::GFP), so thick parts are less bright per volume: stain /
# radius ** MEMBRANE. With 1/4, the soma is the brightest part in flylight, as measured, and trunks
# do not saturate.
MEMBRANE = 0.25
# Gaps: stretches of about this length in which the stain falls to a fifth, on 4 % of the path.
GAP_LENGTH, GAP_LEVEL, GAP_THRESHOLD = 12.0, 0.2, 1.75
# Specks per voxel, and the mean of their exponentially distributed brightness (in units of the
# neurite's contrast). Measured: 65 to 417 per million voxels above 0.2, 14 to 84 above 0.4, and
# 0.7 to 8 above 0.8.
SPECKS, SPECK_LEVEL = 400e-6, 0.28
# A third of the specks form clouds: voxels of the stack per cloud, and the deviation of a cloud.
CLOUD_EVERY, CLOUD_SIZE = 2e6, 30.0
# Standard deviations of unresolved tissue and of slow variations, relative to the background.
# Measured: 0.16 to 0.26 (with the noise) and 0.22 to 0.35; 0.8 each in the darkest stack.
TEXTURE, HAZE = 0.17, 0.3
# The tail of a line is 0.1 of its peak. Measured: 0.05 to 0.1, 8 voxels off the neurite.
TAIL, TAIL_PSF = 1.0, (8.0, 5.0, 5.0)  # out-of-focus light: share of the light, its blur in voxels
READ_NOISE = 1.0  # grey levels
# Fragments of other neurites, seen in three of the six stacks: mean number per million voxels,
# length in voxels, and level (in units of the neurite's contrast).
FRAGMENTS, FRAGMENT_LENGTH, FRAGMENT_LEVEL = 1.0, (15.0, 60.0), (0.2, 0.8)
SLIMMEST = 0.25  # voxels; with the soft edge of half a voxel, the thinnest tube that hits a voxel
COARSE = 4  # voxels of the stack per voxel of the grid of blurred light, which saves time


def render(
    tree: Tree, shape: Sequence[int], style: str = "confocal", seed: int = 0, slimmer: float = 0.0
) -> Volume:
    """Render a tree as a fluorescence microscope would show it.

    Parameters
    ----------
    tree : Tree
        Any forest, in voxels; parts outside the volume are left out.
    shape : (int, int, int)
        Shape (z, y, x) of the stack.
    style : {"confocal", "flylight"}
        A plain stack, or one masked to the neurite's surroundings like the Janelia extracts.
    seed : int
        For the staining, the surroundings and the noise.
    slimmer : float
        Voxels by which tubes are drawn thinner than their radii, down to `SLIMMEST`.

    Returns
    -------
    Volume
        uint8, with spacing 1. Voxel centres lie at integer coordinates, so the centreline is not
        shifted.
    """
    rng, shape, look = _generator(seed, "render"), _checked_shape(shape, (1, 1, 1)), _look(style)
    _check_tree(tree)
    nodes = np.rint(tree.xyz[:, ::-1]).astype(int)
    nodes = nodes[((nodes >= 0) & (nodes < shape)).all(axis=1)]
    if not len(nodes):
        raise SwcError(f"no node of the tree lies inside the shape {shape}; check its frame")

    neurite = rng.uniform(*look.neurite)
    background = rng.uniform(*look.background)
    if look.halo is None:
        levels = np.divide(neurite, CONTRAST[::-1])
        background = float(np.clip(np.exp(rng.uniform(*np.log(levels))), *look.background))
    contrast = neurite - background

    tree = replace(tree, radius=_slim(tree.radius, slimmer))
    light = _tubes(tree, _staining(rng, tree, look.unevenness), shape)
    wide = _shrink(light)
    gaussian_filter(light, look.psf, output=light)
    gain = contrast / np.median(light[tuple(nodes.T)])
    light *= gain

    # The neurite's light from other planes that passes the pinhole, and the surroundings.
    tail = gaussian_filter(wide, np.array(TAIL_PSF) / COARSE)
    wide_field = gain * TAIL * tail + _surroundings(rng, tail.shape, contrast, background)

    # Specks and texture are points, blurred like everything else. 1 / peak is the blur's height.
    grain = rng.standard_normal(shape, dtype=np.float32)
    peak = (2 * np.pi) ** 1.5 * np.prod(look.psf)
    grain *= TEXTURE * background * np.sqrt(8 * np.pi**1.5 * np.prod(look.psf))
    specks = _specks(rng, shape)
    bright = rng.exponential(SPECK_LEVEL, len(specks))
    np.add.at(grain, tuple(specks.T), peak * contrast * bright)
    grain += gain * _fragments(rng, shape, look.unevenness, slimmer)
    gaussian_filter(grain, look.psf, output=grain)
    light += grain
    del grain
    keep = None
    if look.halo is not None:
        keep = distance_transform_edt(wide == 0, sampling=COARSE) <= look.halo
    return Volume(_expose(rng, light, wide_field, look.photons, keep))


def _expose(rng, light, wide_field, photons: float, keep) -> np.ndarray:
    """The camera's image (z, y, x) uint8 of light and, on the coarse grid, wide-field light."""
    z, y, x = (_hat(size) for size in light.shape)
    data = np.zeros(light.shape, dtype=np.uint8)
    for k in range(len(light)):
        level = light[k] + y @ np.tensordot(z[k], wide_field, 1) @ x.T
        counts = rng.poisson(np.maximum(level, 0) * photons) / photons
        counts += rng.normal(0, READ_NOISE, counts.shape)
        data[k] = np.clip(np.rint(counts), 0, 255)
        if keep is not None:
            mask = keep[k // COARSE].repeat(COARSE, axis=0).repeat(COARSE, axis=1)
            data[k][~mask[: light.shape[1], : light.shape[2]]] = 0
    return data


# Voxels between the tubes and every face of an extract: room for flylight's halo of 10 and for its
# outline in steps of 4, and for the out-of-focus light of confocal to fade.
ROOM = 16
# Largest extract. The largest of the 32 gold trees needs 24 million voxels, a whole Janelia field
# 134 million; rendering takes about 20 bytes per voxel.
MAX_VOXELS = 2**28


def extract_box(tree: Tree) -> tuple[np.ndarray, tuple[int, int, int]]:
    """The box that `render_extract` cuts out of the microscope's field for a tree.

    Returns x, y, z (3,) of its first voxel in the frame of `tree`, and its shape (z, y, x), at most
    `MAX_VOXELS` voxels. `ROOM` voxels lie between the tubes (nodes with their radii) and each face.
    """
    _check_tree(tree)
    if not len(tree.parent):
        raise SwcError("the tree has no node, expected at least one")
    lower = np.floor((tree.xyz - tree.radius[:, None]).min(axis=0)).astype(int) - ROOM
    upper = np.ceil((tree.xyz + tree.radius[:, None]).max(axis=0)).astype(int) + ROOM
    shape = tuple(int(n) for n in (upper - lower + 1)[::-1])
    if np.prod(shape, dtype=float) > MAX_VOXELS:
        raise SwcError(
            f"the tree needs a stack of {' x '.join(map(str, shape))} voxels (z, y, x), expected "
            f"{MAX_VOXELS} at most; if it is not in voxels, bring it there with swc.transform, "
            "else keep a part of it"
        )
    return lower, shape


def render_extract(tree: Tree, style: str = "flylight", seed: int = 0) -> tuple[Volume, Tree]:
    """Render a whole tree, wherever it lies, in the smallest stack that holds it with some room.

    `style` and `seed` are as in `render`; tubes are thinner by `Style.slimmer`. The stack is uint8,
    with spacing 1 and the shape of `extract_box`. The tree is returned in the frame of the stack:
    moved by whole voxels, so that it lies on the grid as it did in the field.
    """
    lower, shape = extract_box(tree)
    tree = replace(tree, xyz=tree.xyz - lower)
    return render(tree, shape, style, seed, slimmer=_look(style).slimmer), tree


def _slim(radius: np.ndarray, by: float) -> np.ndarray:
    # Radii that are already below SLIMMEST do not change.
    return np.maximum(radius - by, np.minimum(radius, SLIMMEST))


def _staining(rng, tree: Tree, unevenness: float) -> np.ndarray:
    """Stain of each node (n,), smooth along the path, around 1."""
    # Strategy: an Ornstein-Uhlenbeck process for each length scale runs from the roots outwards.
    # The last one makes the gaps, where it exceeds a threshold.
    lengths = np.array([*STAINING, GAP_LENGTH])
    child = tree.parent >= 0
    edges = np.where(child, np.linalg.norm(tree.xyz - tree.xyz[tree.parent], axis=1), np.inf)
    memory = np.exp(-edges[:, None] / lengths)
    state = rng.normal(size=memory.shape) * np.sqrt(1 - memory**2)
    for row in topological_order(tree):
        if child[row]:
            state[row] += memory[row] * state[tree.parent[row]]
    gap = 1 / (1 + np.exp((GAP_THRESHOLD - state[:, -1]) / 0.15))
    return np.exp(unevenness * state[:, :-1].sum(axis=1) / np.sqrt(len(STAINING))) * (
        1 - (1 - GAP_LEVEL) * gap
    )


def _tubes(tree: Tree, stain: np.ndarray, shape) -> np.ndarray:
    """Stain (z, y, x) float32 of the union of balls along the tree, edges softened by a voxel."""
    # Strategy: a voxel is inside the union if and only if the smallest power d² - r² of all balls
    # is negative. An ordinary KD-tree finds it as a distance in four dimensions, d² + (R² - r²),
    # where R is the largest radius.
    points, radius = densify(tree, 0.25)
    _, stained = densify(replace(tree, radius=stain), 0.25)
    largest = radius.max()
    # NumPy's square of a number and of an array may differ in the last digit.
    lift = np.sqrt(np.maximum(largest**2 - radius**2, 0))
    index = cKDTree(np.column_stack([points, lift]))
    volume = np.zeros(shape, dtype=np.float32)
    near = np.zeros(shape, dtype=bool)
    for low in range(int(largest) + 1):
        some = (radius >= low) & (radius < low + 1)
        _mark(near, points[some], low + 1.5)
    voxels = np.argwhere(near)
    distance, ball = index.query(np.column_stack([voxels[:, ::-1], 0 * voxels[:, 0]]))
    distance = np.sqrt(np.maximum(distance**2 - lift[ball] ** 2, 0))
    radius = radius[ball]
    volume[tuple(voxels.T)] = np.clip(radius - distance + 0.5, 0, 1) * stained[ball]
    volume[tuple(voxels.T)] /= np.maximum(radius, 1) ** MEMBRANE
    return volume


def _mark(near: np.ndarray, points: np.ndarray, reach: float, scale=(1.0, 1.0, 1.0)) -> None:
    """Set `near` (z, y, x) to True for all voxels within `reach` of a point, and a few more."""
    centres = np.unique(np.rint(points[:, ::-1] / scale).astype(int), axis=0)
    # Centres are rounded by at most half a voxel's diagonal.
    reach = reach + np.linalg.norm(scale) / 2
    span = [np.arange(-int(reach / s) - 1, int(reach / s) + 2) for s in scale]
    ball = np.stack(np.meshgrid(*span, indexing="ij"), axis=-1).reshape(-1, 3)
    ball = ball[np.linalg.norm(ball * scale, axis=1) <= reach]
    # A million voxels at a time, so that temporary arrays stay small.
    for part in np.array_split(centres, len(centres) * len(ball) // 1_000_000 + 1):
        voxels = (part[:, None] + ball).reshape(-1, 3)
        voxels = voxels[((voxels >= 0) & (voxels < near.shape)).all(axis=1)]
        near[tuple(voxels.T)] = True


def _hat(size: int) -> np.ndarray:
    """Weights (size, coarse) of linear interpolation from the coarse grid to `size` voxels."""
    coarse = -(-size // COARSE)
    place = np.clip((np.arange(size) + 0.5) / COARSE - 0.5, 0, coarse - 1)
    return np.maximum(1 - np.abs(place[:, None] - np.arange(coarse)), 0).astype(np.float32)


def _shrink(volume: np.ndarray) -> np.ndarray:
    """Means over the cells of the coarse grid."""
    for axis in range(3):
        starts = np.arange(0, volume.shape[axis], COARSE)
        volume = np.add.reduceat(volume, starts, axis=axis) / COARSE
    return volume


def _surroundings(rng, shape, contrast: float, background: float) -> np.ndarray:
    """Blurred light from outside this neuron, on the coarse grid: haze and other cell bodies."""
    haze = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), (4, 8, 8), mode="wrap")
    haze -= haze.mean()
    haze *= HAZE / max(float(haze.std()), 1e-6)
    light = background * np.exp(haze - HAZE**2 / 2)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    # Measured: three of the six stacks show unrelated cell bodies of 15 to 35 voxels in radius and
    # 0.2 to 0.5 of the neurite's contrast.
    for _ in range(rng.poisson(1.0)):
        centre, radius = rng.uniform(0, shape), rng.uniform(12, 25) / COARSE
        inside = np.linalg.norm(grid - centre, axis=-1) < radius
        mottle = rng.uniform(0.6, 1.4, shape) * inside * contrast * rng.uniform(0.15, 0.4)
        light += gaussian_filter(mottle, 0.8)
    return light.astype(np.float32)


def _specks(rng, shape) -> np.ndarray:
    """Voxels (n, 3) of bright specks, some scattered, some in clouds."""
    places = rng.uniform(0, shape, (rng.poisson(SPECKS * np.prod(shape)), 3))
    clouds = rng.uniform(0, shape, (1 + int(np.prod(shape) / CLOUD_EVERY), 3))
    some = len(places) // 3
    places[:some] = clouds[rng.integers(0, len(clouds), some)]
    places[:some] += rng.normal(0, CLOUD_SIZE, (some, 3))
    voxels = places.astype(int)
    return voxels[((places >= 0) & (voxels < shape)).all(axis=1)]


def _fragments(rng, shape, unevenness: float, slimmer: float) -> np.ndarray:
    """Stain (z, y, x) of fragments of other neurites."""
    size = np.array(shape[::-1], dtype=float)
    xyz, parent, stain = [np.zeros((0, 3))], [np.zeros(0, dtype=int)], [np.zeros(0)]
    for _ in range(rng.poisson(FRAGMENTS * np.prod(shape) * 1e-6)):
        start, way = rng.uniform(0, size), rng.normal(size=3) * (1, 1, 0.3)
        target = start + way / np.linalg.norm(way) * rng.uniform(*FRAGMENT_LENGTH)
        path = _walk(rng, start, target, np.zeros(3), xyz[0], -np.inf, np.inf)
        parent.append(np.arange(len(path)) - 1 + (np.arange(len(path)) > 0) * sum(map(len, xyz)))
        xyz.append(path)
        stain.append(np.full(len(path), rng.uniform(*FRAGMENT_LEVEL)))
    xyz, parent, stain = map(np.concatenate, (xyz, parent, stain))
    if not len(xyz):
        return np.zeros(shape, dtype=np.float32)
    tree = Tree(xyz, _slim(np.ones(len(xyz)), slimmer), np.full(len(xyz), 3), parent)
    return _tubes(tree, stain * _staining(rng, tree, unevenness), shape)


# --------------------------------------------------------------------------------------------
# Measurement


def statistics(tree: Tree) -> dict[str, float]:
    """Shape of a tree, as calibrated against `GOLD_RANGES`, in voxels.

    Returns
    -------
    dict
        length; tips and branches (counts); segment_median and segment_mean, the length between
        neighbouring branch points or tips; tortuosity, the median over segments longer than 5
        voxels of length along the path / straight distance; radius_mean, radius_median,
        radius_95 (percentile) and radius_max.
    """
    n, child = len(tree.parent), tree.parent >= 0
    if not child.any():
        raise SwcError("the tree has no edge; expected at least two connected nodes")
    ends = (np.bincount(tree.parent[child], minlength=n) != 1) | ~child
    # Of each segment, the row at which it begins, and its length up to each row.
    start, run = np.arange(n), np.zeros(n)
    for row in topological_order(tree):
        above = tree.parent[row]
        if above >= 0:
            run[row] = np.linalg.norm(tree.xyz[row] - tree.xyz[above])
            start[row] = above
            if not ends[above]:
                run[row] += run[above]
                start[row] = start[above]
    last = np.flatnonzero(ends & child)
    segments = run[last]
    chord = np.linalg.norm(tree.xyz[last] - tree.xyz[start[last]], axis=1)
    long = chord > 5
    return {
        "length": length(tree),
        "tips": float(len(tips(tree))),
        "branches": float(len(branch_points(tree))),
        "segment_median": float(np.median(segments)),
        "segment_mean": float(segments.mean()),
        "tortuosity": float(np.median(segments[long] / chord[long])) if long.any() else 1.0,
        "radius_mean": float(tree.radius.mean()),
        "radius_median": float(np.median(tree.radius)),
        "radius_95": float(np.percentile(tree.radius, 95)),
        "radius_max": float(tree.radius.max()),
    }


def image_statistics(volume: Volume, tree: Tree) -> dict[str, float]:
    """How a stack shows a tree, as calibrated against `REAL_RANGES`.

    The tube is all voxels within 2 voxels of the centreline; elsewhere is farther than 10.

    Parameters
    ----------
    volume : Volume
        uint8.
    tree : Tree

    Returns
    -------
    dict
        foreground, zeros, saturated: shares of the stack's voxels in the tube, exactly 0, and
        255; contrast: mean in the tube / mean elsewhere; axis_5, axis_50, axis_95: percentiles
        within half a voxel of the centreline; near_50, near_95: from 2 to 6 voxels; far_50,
        far_95, far_99: elsewhere; dice: the best that any single threshold reaches against the
        tube; threshold: that one.
    """
    data = np.asarray(volume.data)
    if data.dtype != np.uint8:
        raise SettingsError(f"volume of type {data.dtype}: expected uint8; rescale it to 0 to 255")
    scale = np.array(volume.spacing) / np.sqrt(volume.spacing[1] * volume.spacing[2])
    points, _ = densify(tree, 0.5, scale)
    near = np.zeros(data.shape, dtype=bool)
    _mark(near, points[::4], 12.0, scale)
    voxels = np.argwhere(near)
    distance, _ = cKDTree(points).query(voxels[:, ::-1] * scale[::-1], distance_upper_bound=10.0)
    near[tuple(voxels[distance > 10].T)] = False
    values, far = data[tuple(voxels.T)], data[~near]
    tube, axis = values[distance <= 2], values[distance <= 0.5]
    if not len(axis) or not len(far):
        raise SwcError(f"the tree does not lie inside the volume {data.shape}, or fills it")
    beside = values[(distance > 2) & (distance <= 6)]
    above = np.bincount(data.ravel(), minlength=256)[::-1].cumsum()[::-1]
    hits = np.bincount(tube, minlength=256)[::-1].cumsum()[::-1]
    dice = 2 * hits / (above + len(tube))
    out = {
        "foreground": len(tube) / data.size,
        "zeros": float((data == 0).mean()),
        "saturated": float((data == 255).mean()),
        "contrast": float(tube.mean() / max(far.mean(), 1e-3)),
        "dice": float(dice.max()),
        "threshold": float(dice.argmax()),
    }
    for name, part, levels in (
        ("axis", axis, (5, 50, 95)),
        ("near", beside, (50, 95)),
        ("far", far, (50, 95, 99)),
    ):
        out |= {f"{name}_{q}": float(np.percentile(part, q)) for q in levels}
    return out


def calibration(
    generated: Sequence[Mapping[str, float]], real: Sequence[Mapping[str, float]] = ()
) -> list[dict[str, str]]:
    """Compare generated neurons with real ones, statistic by statistic.

    This compares ranges and is not a test: with few neurons, being inside is easy and does not
    mean being alike. The embedded data set is known to be easier than the six real stacks: a
    threshold finds more of it (`dice`), its dimmest stretches are brighter (`axis_5`), and a larger
    share of its small volume is neurite (`foreground`).

    Parameters
    ----------
    generated, real : sequence of mapping
        The results of `neurolib.data.datasets.measure` for each generated and each real neuron.
        Statistics that no real neuron has are compared with `GOLD_RANGES` (trees) and
        `REAL_RANGES` (confocal stacks; for ``flylight``, give real stacks of its kind).

    Returns
    -------
    list of dict
        One row per statistic, for `neurolib.course.runs.table`: its name; the ranges in
        ``generated`` and ``real`` neurons; where the real range comes ``from`` (values recorded
        here, or n neurons measured now); how many generated neurons lie ``inside`` it; and in
        ``outside`` whether the others lie ``below``, ``above`` or both.
    """
    if not generated:
        raise SettingsError("no generated neuron to compare, expected at least one")
    recorded = GOLD_RANGES | REAL_RANGES
    rows = []
    for name in dict.fromkeys(name for row in generated for name in row):
        # The recorded ranges have three digits, so further digits must not decide.
        values, measured = (
            [float(f"{row[name]:.3g}") for row in neurons if name in row]
            for neurons in (generated, real)
        )
        if not measured and name not in recorded:
            raise SettingsError(
                f"statistic {name!r}: no real range, expected one of {', '.join(recorded)}"
            )
        low, high = (min(measured), max(measured)) if measured else recorded[name]
        sides = {"below": min(values) < low, "above": max(values) > high}
        rows.append(
            {
                "statistic": name,
                "generated": f"{_digits(min(values))} to {_digits(max(values))}",
                "real": f"{_digits(low)} to {_digits(high)}",
                "from": f"measured, n = {len(measured)}" if measured else "recorded",
                "inside": f"{sum(low <= v <= high for v in values)} of {len(values)}",
                "outside": " and ".join(side for side, is_so in sides.items() if is_so),
            }
        )
    return rows


def _digits(value: float) -> str:
    """Three digits without an exponent."""
    return np.format_float_positional(value, 3, fractional=False, trim="-")


# --------------------------------------------------------------------------------------------


def _look(style: str) -> Style:
    if style not in STYLES:
        raise SettingsError(f"style {style!r}: expected one of {', '.join(STYLES)}")
    return STYLES[style]


def _check_tree(tree: Tree) -> None:
    if not (np.isfinite(tree.xyz).all() and ((tree.radius > 0) & (tree.radius < np.inf)).all()):
        raise SwcError("the tree has coordinates not finite or radii not positive; repair it")


def _generator(seed: int, purpose: str) -> np.random.Generator:
    """A random generator; growth and rendering with one seed must not share their numbers."""
    if not isinstance(seed, (int, np.integer)) or seed < 0:
        raise SettingsError(f"seed {seed}: expected an integer that is not negative")
    return np.random.default_rng([int(seed), *purpose.encode()])


def _checked_shape(shape: Sequence[int], smallest: Sequence[int]) -> tuple[int, int, int]:
    sizes = np.asarray(shape)
    if sizes.shape != (3,) or sizes.dtype.kind not in "iu" or (sizes < smallest).any():
        raise SettingsError(f"shape {shape}: expected (z, y, x), at least {smallest}")
    return tuple(int(n) for n in shape)
