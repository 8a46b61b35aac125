"""From a trained network and a volume to a probability for every voxel.

Overlapping tiles cover the volume; each tile's probabilities become votes with Gaussian weights,
summed slice by slice. Slices are finished in order, so that only the few that still wait for
votes are in memory, which grows with a slice and with the batch, not with the volume.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter, uniform_filter1d
from tqdm import tqdm

from neurolib.blocking import Sample, block_grid, block_starts, gaussian_window, read_block
from neurolib.devices import autocast, pick_device, pick_precision
from neurolib.errors import SettingsError, VolumeError
from neurolib.evaluation import choose_cut
from neurolib.files import content_key, sha256, text_key
from neurolib.network import NetworkSettings, Segmenter
from neurolib.parameters import check_range
from neurolib.training import load_checkpoint, save_checkpoint
from neurolib.volume import pieces, read_volume, write_volume

# Axes of a batch of blocks (n, 1, z, y, x), or of its logits (n, z, y, x), that flips mirror: x, y,
# both.
FLIPS = ((-1,), (-2,), (-2, -1))

# Smallest piece, in voxels, for a checkpoint for which none was chosen.
MIN_SIZE = 200
# Bins of the histogram of `standing_out`, which lies in [-1, 1].
BINS = 1 << 16
# What stands out by so many standard deviations of the background is never empty.
CERTAIN = 20.0
# Modules that a prediction depends on.
CODE = ("inference", "network", "blocking", "devices")

Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Tiling:
    """How tiles cover a volume, and how they are run.

    Attributes
    ----------
    overlap : float
        Fraction of a tile that neighbours share in y and x, 0 to 0.9.
    batch : int
        Tiles per forward pass.
    device : str
        ``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ``cuda:1`` ...
    flips : bool
        Average the probabilities of each tile, mirrored in neither, either and both of y and x
        (test-time augmentation), at four times the time.
    skip_empty : float
        Percentile of `standing_out` over the volume. Tiles in which nothing stands out as much are
        not run (`empty_level`); where none is run, the probability is 0. 0: only tiles that are
        exactly zero are skipped, as outside the mask of a masked volume.
    every : int
        Predict slices 0, every, 2 every ... only, each from its whole block: a sample of the
        volume at a fraction of the time, for networks that predict their centre slice.
    """

    overlap: float = 0.25
    batch: int = 8
    device: str = "auto"
    flips: bool = False
    skip_empty: float = 99.7
    every: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            check_range(field.name, getattr(self, field.name))


def predict_volume(
    network: Segmenter, image: np.ndarray, *, progress: bool = True, **tiling: object
) -> np.ndarray:
    """Predict the probability of neurite for every voxel, or for every voxel of some slices.

    Parameters
    ----------
    network : Segmenter
    image : (z, y, x) array
        Normalised to [0, 1] (`neurolib.volume.normalise`). It need not be in memory: it is
        read once for its range, then tile by tile (`course.large` reads chunks less often).
    progress : bool
        Show a progress bar over tiles.
    **tiling
        Attributes of `Tiling`.

    Returns
    -------
    (z / every rounded up, y, x) float32 array
    """
    tiling = Tiling(**tiling)
    if image.ndim != 3 or min(image.shape) < 1:
        raise VolumeError(f"expected a volume (z, y, x), got shape {image.shape}")
    low, high = np.inf, -np.inf
    for box in pieces(image):
        piece = image[box]
        # NumPy's min and max pass NaN on, Python's do not.
        low, high = np.minimum(low, piece.min()), np.maximum(high, piece.max())
    if not (low >= 0 and high <= 1):
        raise VolumeError(f"expected intensities in [0, 1], got {low:g} to {high:g}; normalise")
    out = np.zeros((-(-image.shape[0] // tiling.every), *image.shape[1:]), np.float32)
    for first, slices in predict_slices(network, image, tiling, progress):
        out[first : first + len(slices)] = slices
    return out


def predicted(
    folder: str | Path,
    name: str,
    checkpoint: str | Path,
    image: np.ndarray,
    progress: bool = True,
    **tiling: object,
) -> np.ndarray:
    """The probability of a volume by a checkpoint, read from `folder` if it was predicted before.

    Parameters
    ----------
    folder : path
        Holds one TIFF (float32) per volume, named after the volume and a hash of everything that
        decides the result: image, checkpoint, tiling, precision and the code that predicts.
    name : str
        Of the volume.
    checkpoint : path
    image, progress, **tiling
        As in `predict_volume`.
    """
    settings = Tiling(**tiling)
    precision = pick_precision("auto", pick_device(settings.device).type)
    code = [sha256(Path(__file__).with_name(f"{module}.py")) for module in CODE]
    facts = [content_key(image), sha256(checkpoint), precision, *code, replace(settings, device="")]
    path = Path(folder) / f"{name}-{text_key(repr(facts))}.tif"
    if path.exists():
        return read_volume(path, check=False).data
    network, _ = load_checkpoint(checkpoint)
    probability = predict_volume(network, image, progress=progress, **tiling)
    write_volume(path, probability)
    return probability


def calibrate(
    checkpoint: str | Path, samples: Sequence[Sample], **tiling: object
) -> tuple[float, int, float]:
    """Choose a checkpoint's threshold and smallest piece on whole volumes, and store them in it.

    Training validates on blocks, which estimate a volume's Dice to about ± 0.04 and know nothing
    of the size of pieces; here, every voxel of the validation volumes counts.

    Returns
    -------
    threshold : float
    min_size : int
        Pieces of fewer voxels are dropped.
    dice : float
        Mean over the volumes, at the one pair of values that is best for all of them.
    """
    network, facts = load_checkpoint(checkpoint)
    found = [predict_volume(network, s.image, **tiling) for s in samples]
    chosen = choose_cut(found, [s.mask for s in samples], np.arange(1, 100) / 100)
    facts |= dict(zip(("threshold", "min_size", "calibrated"), chosen, strict=True))
    facts["seen"] = facts.get("seen", {}) | {content_key(s.image): s.pair.name for s in samples}
    save_checkpoint(checkpoint, network, network.state_dict(), facts)
    return chosen


def predict_slices(
    network: Segmenter, image: np.ndarray, tiling: Tiling, progress: bool = False
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first slice, probabilities (k, y, x)) in order of z; see `predict_volume`."""
    if tiling.every > 1 and network.settings.predict == "all":
        raise SettingsError(
            f"every={tiling.every}: expected 1 for a network that predicts all slices"
        )
    grid = block_grid(image.shape, *_tiles(network.settings, tiling.overlap))
    grid = grid[grid[:, 0] % tiling.every == 0]
    span = 0, -(-image.shape[0] // tiling.every)
    level = empty_level(image, tiling.skip_empty)
    return _stream(network, image, grid, span, tiling, level, progress)


def predict_box(
    network: Segmenter, image: np.ndarray, box: Box, tiling: Tiling, level: float
) -> np.ndarray:
    """The part of the result of `predict_volume` that lies in a box, as float32.

    All tiles that vote in the box are run, so the result does not depend on how a volume is cut
    into boxes. The box and the margin that these tiles need, `box_of_tiles`, are read at once.
    The image, normalised to [0, 1], is not checked, and `Tiling.every` is 1; `level` is the
    `empty_level` of the whole image.
    """
    around, grid = box_of_tiles(network.settings, image.shape, box, tiling.overlap)
    origin = [part.start for part in around]
    part = np.asarray(image[around], np.float32)
    span, *plane = ((b.start - o, b.stop - o) for b, o in zip(box, origin, strict=True))
    rows, columns = (slice(*ends) for ends in plane)
    out = np.empty([b.stop - b.start for b in box], np.float32)
    for first, slices in _stream(network, part, grid - origin, span, tiling, level):
        first -= span[0]
        out[first : first + len(slices)] = slices[:, rows, columns]
    return out


def box_of_tiles(
    settings: NetworkSettings, shape: tuple[int, int, int], box: Box, overlap: float
) -> tuple[Box, np.ndarray]:
    """What the tiles that vote in a box see of a volume, and the places (n, 3) of the tiles."""
    tile, stride = _tiles(settings, overlap)
    reach = settings.depth // 2
    voting = reach if settings.predict == "all" else 0
    # How far a tile votes, and how far it sees, before and after its place.
    votes = ((voting, voting + 1), (0, tile[1]), (0, tile[2]))
    sees = ((reach, reach + 1), (0, tile[1]), (0, tile[2]))
    axes, around = [], []
    for axis, part in enumerate(box):
        starts = block_starts(shape[axis], 1 if axis == 0 else tile[axis], stride[axis])
        before, after = votes[axis]
        starts = starts[(starts - before < part.stop) & (starts + after > part.start)]
        before, after = sees[axis]
        low, high = max(0, int(starts[0]) - before), min(shape[axis], int(starts[-1]) + after)
        axes.append(starts)
        around.append(slice(low, high))
    return tuple(around), np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)


def _tiles(
    settings: NetworkSettings, overlap: float
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Shape of the tiles and steps between them."""
    stride = max(1, round(settings.block * (1 - overlap)))
    # A block that votes for all its slices is needed only every few; neighbours share two.
    z_stride = max(1, settings.depth - 2) if settings.predict == "all" else 1
    return (settings.depth, settings.block, settings.block), (z_stride, stride, stride)


def _stream(
    network: Segmenter,
    image: np.ndarray,
    grid: np.ndarray,
    span: tuple[int, int],
    tiling: Tiling,
    level: float,
    progress: bool = False,
) -> Iterator[tuple[int, np.ndarray]]:
    """Run the tiles of a grid in order of z; yield the slices of a span as they are finished.

    A tile's vote counts by a Gaussian in z, y and x around its middle.
    """
    settings, (first, depth) = network.settings, span
    where = pick_device(tiling.device)
    network = network.to(where).eval()
    shape, _ = _tiles(settings, tiling.overlap)
    slices = settings.depth if settings.predict == "all" else 1
    middle = slice(settings.depth // 2 - slices // 2, settings.depth // 2 + slices // 2 + 1)
    in_z, in_plane = gaussian_window((slices, 1)), gaussian_window(shape[1:])
    window = in_z[:, :, None] * in_plane
    # Where the votes begin, counted in predicted slices.
    places = grid // (tiling.every, 1, 1) - (slices // 2, 0, 0)
    # Votes, and their weights, of the slices that wait for more.
    sums = np.zeros((2, 0, *image.shape[1:]), np.float32)

    def extended(end: int) -> np.ndarray:
        missing = max(0, min(depth, end) - first - sums.shape[1])
        return np.pad(sums, ((0, 0), (0, missing), (0, 0), (0, 0)))

    waiting, corners = [], []
    bar = tqdm(grid, "segmenting", mininterval=2, disable=not progress)
    for i, place in enumerate(bar):
        tile = read_block(image, place, shape)
        if tile.max() > 0 and (not level or standing_out(tile)[middle].max() > level):
            waiting.append(tile)
            corners.append(places[i])
        # Only the tiles that wait for a full batch vote above this slice; they wait a few slices.
        last = i + 1 == len(grid)
        after = depth if last else min(depth, int(places[i + 1, 0]))
        late = waiting and (last or after - corners[0][0] > tiling.batch)
        if late or len(waiting) == tiling.batch:
            sums = extended(corners[-1][0] + slices)
            votes = _run(network, np.stack(waiting), window, tiling)
            here = np.array(corners) - (first, 0, 0)
            _add(sums[0], votes, here)
            _add(sums[1], [window] * len(here), here)
            waiting, corners = [], []
        done = int(corners[0][0]) if waiting else after
        if done > first:
            finished, sums = np.split(extended(done), [done - first], axis=1)
            yield first, finished[0] / np.maximum(finished[1], np.finfo(np.float32).tiny)
            first = done


def _add(sums: np.ndarray, votes: Sequence[np.ndarray], corners: np.ndarray) -> None:
    """Add votes (n, slices, rows, columns) at their corners (z, y, x); drop those outside."""
    depth, height, width = sums.shape
    for vote, (z, y, x) in zip(votes, corners.tolist(), strict=True):
        slices, rows, columns = vote.shape
        there = sums[max(z, 0) : max(z + slices, 0), y : y + rows, x : x + columns]
        there += vote[max(-z, 0) : max(depth - z, 0), : height - y, : width - x]


@torch.inference_mode()
def _run(network: Segmenter, tiles: np.ndarray, window: np.ndarray, tiling: Tiling) -> np.ndarray:
    """The votes (n, slices, y, x) of tiles (n, z, y, x): the probability times the window."""
    where = pick_device(tiling.device)
    blocks = torch.from_numpy(tiles[:, None]).float().to(where)
    with autocast("auto", where.type):
        chance = network(blocks).float().sigmoid()
        if tiling.flips:
            for axes in FLIPS:
                chance = chance + network(blocks.flip(axes)).float().sigmoid().flip(axes)
            chance = chance / (1 + len(FLIPS))
    return (chance * torch.from_numpy(window).to(where)).cpu().numpy()


def standing_out(slices: np.ndarray) -> np.ndarray:
    """How far voxels are brighter than what surrounds them: a difference of two Gaussians.

    Each of the slices (z, y, x) is averaged with its neighbours, then smoothed in the plane by
    σ = 1.5 voxels, less the same smoothed by 6: neurites remain, haze and broad background go.
    """
    mean = uniform_filter1d(np.asarray(slices, np.float32), 3, axis=0, mode="nearest")
    return gaussian_filter(mean, (0, 1.5, 1.5)) - gaussian_filter(mean, (0, 6, 6))


def empty_level(image: np.ndarray, percentile: float = Tiling.skip_empty) -> float:
    """What a voxel must exceed in `standing_out` for its tile to be run.

    A percentile over the volume, since neurites fill few voxels; at most 20 standard deviations of
    the background, so that dim neurites are not lost where bright ones fill much of the volume.
    `benchmarks/skipping.py` counts what is saved and lost.
    The image is normalised to [0, 1] and need not be in memory. Where most of it is exactly zero,
    the level is 0, as for percentile 0.
    """
    check_range("skip_empty", percentile, "percentile=")
    if not percentile:
        return 0.0
    counts = np.zeros(BINS, np.int64)
    for box in pieces(image):
        counts += np.histogram(standing_out(image[box]), BINS, (-1, 1))[0]
    ranks = np.array([25, 75, percentile]) / 100 * (counts.sum() - 1)
    low, high, level = np.searchsorted(np.cumsum(counts), ranks, "right") * 2 / BINS - 1
    # The interquartile range of a normal distribution is 1.349 standard deviations.
    return max(0.0, min(level, CERTAIN * (high - low) / 1.349))
