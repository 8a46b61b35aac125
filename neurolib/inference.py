"""From a trained network and a volume to a probability for every voxel.

Overlapping tiles cover the volume; each tile's probabilities become votes with Gaussian weights,
summed slice by slice. Slices are finished in order, so that only the few that still wait for
votes are in memory, which grows with a slice and with the batch, not with the volume.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from neurolib.blocking import Sample, block_grid, block_starts, gaussian_window, read_block
from neurolib.devices import autocast, pick_device, pick_precision
from neurolib.errors import SettingsError, VolumeError
from neurolib.evaluation import choose_cut
from neurolib.files import content_key, sha256, text_key
from neurolib.network import NetworkSettings, Segmenter
from neurolib.training import load_checkpoint, save_checkpoint
from neurolib.volume import pieces, read_volume, write_volume

# Axes of a batch of blocks (n, 1, z, y, x), or of its logits (n, z, y, x), that flips mirror: x, y,
# both.
FLIPS = ((-1,), (-2,), (-2, -1))

# Fraction by which neighbouring tiles overlap in y and x, in all commands and notebooks.
OVERLAP = 0.25
# Smallest piece, in voxels, for a checkpoint for which none was chosen.
MIN_SIZE = 200
# Bins of the histogram for `empty_level`'s percentile; a 16-bit image has no more values.
BINS = 1 << 16

Box = tuple[slice, slice, slice]


def predict_volume(
    network: Segmenter,
    image: np.ndarray,
    overlap: float = OVERLAP,
    batch: int = 8,
    device: str = "auto",
    progress: bool = True,
    out: np.ndarray | None = None,
    every: int = 1,
    flips: bool = False,
    skip_below: float = 0.0,
) -> np.ndarray:
    """Predict the probability of neurite for every voxel, or for every voxel of some slices.

    Parameters
    ----------
    network : Segmenter
    image : (z, y, x) array
        Normalised to [0, 1] (`neurolib.volume.normalise`). It need not be in memory: it is
        read once for its range, then tile by tile (`course.large` reads chunks less often).
    overlap : float
        Fraction of a tile that neighbours share in y and x, 0 to 0.9.
    batch : int
        Tiles per forward pass.
    device : str
        ``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ``cuda:1`` ...
    progress : bool
        Show a progress bar over tiles.
    out : (z, y, x) float32 array, optional
        Receives the result instead of a new array (a memory map, for example).
    every : int
        Predict slices 0, every, 2 every ... only, each from its whole block: a sample of the
        volume at a fraction of the time, for networks that predict their centre slice.
    flips : bool
        Average the probabilities of each tile, mirrored in neither, either and both of y and x
        (test-time augmentation), at four times the time.
    skip_below : float
        Tiles with no voxel above this intensity are skipped (`empty_level` proposes a value,
        `skipping` says what is lost).

    Returns
    -------
    (z / every rounded up, y, x) float32 array
        A skipped tile votes 0. By default these are the tiles whose slices are all exactly zero, as
        outside the mask of a masked volume.

    Raises
    ------
    VolumeError
        If the image is not 3D or not in [0, 1].
    SettingsError
        If the overlap or `skip_below` is out of range or the device does not exist.
    """
    if image.ndim != 3 or min(image.shape) < 1:
        raise VolumeError(f"expected a volume (z, y, x), got shape {image.shape}")
    _check_range(image)
    check_options(overlap, batch, skip_below)
    if every < 1:
        raise SettingsError(f"every={every}: expected at least 1")
    if every > 1 and network.settings.predict == "all":
        raise SettingsError(f"every={every}: expected 1 for a network that predicts all slices")
    depth = -(-image.shape[0] // every)
    out = np.zeros((depth, *image.shape[1:]), np.float32) if out is None else out
    options = (overlap, batch, device, progress, every, flips, skip_below)
    for first, slices in predict_slices(network, image, *options):
        out[first : first + len(slices)] = slices
    return out


def check_options(overlap: float, batch: int, skip_below: float) -> None:
    """Refuse options of a prediction that are out of range (SettingsError)."""
    if not 0 <= overlap <= 0.9:
        raise SettingsError(f"overlap={overlap}: expected 0 to 0.9")
    if batch < 1:
        raise SettingsError(f"batch={batch}: expected at least 1")
    if not 0 <= skip_below < 1:
        raise SettingsError(
            f"skip_below={skip_below}: expected an intensity of the normalised image, 0 to 1"
        )


def _check_range(image: np.ndarray) -> None:
    low, high = np.inf, -np.inf
    for box in pieces(image):
        piece = image[box]
        # NumPy's min and max pass NaN on, Python's do not.
        low, high = np.minimum(low, piece.min()), np.maximum(high, piece.max())
    if not (low >= 0 and high <= 1):
        raise VolumeError(f"expected intensities in [0, 1], got {low:g} to {high:g}; normalise")


DEFAULTS = {
    key: p.default
    for key, p in inspect.signature(predict_volume).parameters.items()
    if key not in ("network", "image")
}
# Modules that a prediction depends on.
CODE = ("inference", "network", "blocking", "devices")


def predicted(
    folder: str | Path, name: str, checkpoint: str | Path, image: np.ndarray, **options
) -> np.ndarray:
    """The probability of a volume by a checkpoint, read from `folder` if it was predicted before.

    Parameters
    ----------
    folder : path
        Holds one TIFF (float32) per volume, named after the volume and a hash of everything that
        decides the result: image, checkpoint, options, precision and the code that predicts.
    name : str
        Of the volume.
    checkpoint : path
    image : (z, y, x) array
    **options
        Of `predict_volume`; options at their defaults may be given or not, the file is the same.
    """
    options = DEFAULTS | options
    precision = pick_precision("auto", pick_device(options["device"]).type)
    code = [sha256(Path(__file__).with_name(f"{module}.py")) for module in CODE]
    decide = [(k, v) for k, v in sorted(options.items()) if k not in ("progress", "out", "device")]
    facts = [content_key(image), sha256(checkpoint), precision, *code, *decide]
    key = text_key(repr(facts))
    path = Path(folder) / f"{name}-{key}.tif"
    if path.exists():
        return read_volume(path, check=False).data
    network, _ = load_checkpoint(checkpoint)
    probability = predict_volume(network, image, **options)
    write_volume(path, probability)
    return probability


def calibrate(
    checkpoint: str | Path, samples: Sequence[Sample], **options
) -> tuple[float, int, float]:
    """Choose a checkpoint's threshold and smallest piece on whole volumes, and store them.

    Training validates on blocks, which estimate a volume's Dice to about ± 0.04 and know nothing
    of the size of pieces; here, every voxel of the validation volumes counts.

    Parameters
    ----------
    checkpoint : path
        It is rewritten with both.
    samples : sequence of Sample
        The validation volumes.
    **options
        Of `predict_volume`.

    Returns
    -------
    threshold : float
    min_size : int
        Pieces of fewer voxels are dropped.
    dice : float
        Mean over the volumes, at the one pair of values that is best for all of them.
    """
    network, facts = load_checkpoint(checkpoint)
    found = [predict_volume(network, s.image, **options) for s in samples]
    chosen = choose_cut(found, [s.mask for s in samples], np.arange(1, 100) / 100)
    facts |= dict(zip(("threshold", "min_size", "calibrated"), chosen, strict=True))
    save_checkpoint(checkpoint, network, network.state_dict(), facts)
    return chosen


def predict_slices(
    network: Segmenter,
    image: np.ndarray,
    overlap: float,
    batch: int,
    device: str = "auto",
    progress: bool = True,
    every: int = 1,
    flips: bool = False,
    skip_below: float = 0.0,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first slice, probabilities (k, y, x)) in order of z; see `predict_volume`."""
    shape, stride = _tiling(network.settings, overlap)
    grid = block_grid(image.shape, shape, stride)
    if every > 1:
        grid = grid[grid[:, 0] % every == 0]
    span = 0, -(-image.shape[0] // every)
    run = (batch, device, progress, every, flips, skip_below)
    yield from _stream(network, image, grid, span, *run)


def predict_box(
    network: Segmenter,
    image: np.ndarray,
    box: Box,
    overlap: float = OVERLAP,
    batch: int = 8,
    device: str = "auto",
    flips: bool = False,
    skip_below: float = 0.0,
) -> np.ndarray:
    """The part of the result of `predict_volume` that lies in a box.

    All tiles that vote in the box are run, so the result does not depend on how a volume is cut
    into boxes. The box and the margin that these tiles need, `box_of_tiles`, are read at once.

    Parameters
    ----------
    image : (z, y, x) array
        Normalised to [0, 1]; its range is not checked.
    box : three slices
        Inside the volume, none empty.
    network, overlap, batch, device, flips, skip_below
        As in `predict_volume`.

    Returns
    -------
    float32 array of the shape of the box
    """
    around, grid = box_of_tiles(network.settings, image.shape, box, overlap)
    origin = [part.start for part in around]
    part = np.asarray(image[around], np.float32)
    span = box[0].start - origin[0], box[0].stop - origin[0]
    rows, columns = (
        slice(b.start - o, b.stop - o) for b, o in zip(box[1:], origin[1:], strict=True)
    )
    run = (batch, device, False, 1, flips, skip_below)
    out = np.empty([b.stop - b.start for b in box], np.float32)
    for first, slices in _stream(network, part, grid - origin, span, *run):
        first -= span[0]
        out[first : first + len(slices)] = slices[:, rows, columns]
    return out


def box_of_tiles(
    settings: NetworkSettings, shape: tuple[int, int, int], box: Box, overlap: float
) -> tuple[Box, np.ndarray]:
    """What the tiles that vote in a box see of a volume, and the places (n, 3) of the tiles."""
    tile, stride = _tiling(settings, overlap)
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


def _tiling(
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
    batch: int,
    device: str,
    progress: bool,
    every: int,
    flips: bool,
    skip_below: float,
) -> Iterator[tuple[int, np.ndarray]]:
    """Run the tiles of a grid in order of z; yield the slices of a span as they are finished."""
    settings = network.settings
    shape, _ = _tiling(settings, 0)
    reach = settings.depth // 2 if settings.predict == "all" else 0
    first, depth = span
    where = pick_device(device)
    network = network.to(where).eval()
    window = torch.from_numpy(gaussian_window(shape[1:])).to(where)
    weights, voting = _weights(grid // (every, 1, 1), image.shape[1:], window, reach, depth)

    numerator = np.zeros((0, *image.shape[1:]), np.float32)
    bar = tqdm(total=len(grid), desc="segmenting", mininterval=2, disable=not progress)
    for start in range(0, len(grid), batch):
        tiles = grid[start : start + batch]
        # Where the votes go, as an index into the predicted slices.
        places = tiles // (every, 1, 1)
        last = min(depth, int(places[-1, 0]) + reach + 1)
        numerator = _grow(numerator, last - first)
        live, votes = _run(network, image, tiles, shape, window, flips, skip_below)
        _add(numerator, votes, places[live] - (first + reach, 0, 0))
        bar.update(len(places))
        # All later places are at this z or deeper, so the slices above their reach are complete.
        rest = grid[start + batch :]
        done = min(depth, int(rest[0, 0]) // every - reach) if len(rest) else depth
        if done > first:
            finished, numerator = np.split(numerator, [done - first])
            finished /= weights
            if reach:
                finished /= voting[first:done, None, None]
            yield first, finished
            first = done
    bar.close()


def empty_level(image: np.ndarray, percentile: float = 95.0) -> float:
    """An intensity below which a tile holds only background: a percentile of the volume.

    Neurites fill few voxels, so every tile with a neurite has voxels above this level, unless
    other things in the volume are far brighter. `skipping` says what is lost.

    Parameters
    ----------
    image : (z, y, x) array
        Normalised to [0, 1]; need not be in memory.
    percentile : float
        0 to 100. In a masked volume, most of whose voxels are zero, the result is 0.

    Returns
    -------
    float
        The lower edge of its histogram bin, 1 / 65536 wide: never above the percentile.

    Raises
    ------
    SettingsError
        If the percentile is out of range.
    """
    if not 0 <= percentile <= 100:
        raise SettingsError(f"percentile={percentile}: expected 0 to 100")
    counts = np.zeros(BINS + 1, np.int64)
    for box in pieces(image):
        counts += np.bincount((image[box].ravel() * BINS).astype(np.intp), minlength=BINS + 1)
    total = np.cumsum(counts)
    return float(np.searchsorted(total, percentile / 100 * (total[-1] - 1), "right")) / BINS


@dataclass(frozen=True)
class Skipping:
    """Share of the tiles that are skipped, and share of the foreground's votes lost with them."""

    tiles: float
    foreground: float


def skipping(
    image: np.ndarray,
    mask: np.ndarray,
    skip_below: float,
    settings: NetworkSettings,
    overlap: float = OVERLAP,
) -> Skipping:
    """What is saved and lost by skipping the tiles that have no voxel above an intensity.

    Parameters
    ----------
    image : (z, y, x) array
        Normalised to [0, 1].
    mask : (z, y, x) bool array
        The true foreground. Each voxel counts by the share of its votes, weighted as in a
        prediction, that come from skipped tiles.
    skip_below : float
    settings : NetworkSettings
        For the tiles; no network is run.
    overlap : float
    """
    certain = _Certain(settings)
    live = predict_volume(
        certain, image, overlap, device="cpu", progress=False, flips=False, skip_below=skip_below
    )
    total = len(block_grid(image.shape, *_tiling(settings, overlap)))
    lost = 1 - live[mask].mean(dtype=float) if mask.any() else 0.0
    return Skipping(1 - certain.tiles / total, float(lost))


class _Certain(torch.nn.Module):
    """Predicts 1 everywhere, and counts the tiles that it is given."""

    def __init__(self, settings: NetworkSettings) -> None:
        super().__init__()
        self.settings, self.tiles = settings, 0

    def forward(self, blocks: torch.Tensor) -> torch.Tensor:
        self.tiles += len(blocks)
        slices = blocks[:, 0] if self.settings.predict == "all" else blocks[:, 0, :1]
        return torch.full_like(slices, torch.inf)


def _weights(
    places: np.ndarray,
    plane: tuple[int, int],
    window: torch.Tensor,
    reach: int,
    depth: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the windows over a slice (y, x), and how many z vote for each slice (depth,).

    The places are all pairs of some z with some (y, x): their product is the sum of all weights.
    """
    z = np.unique(places[:, 0])
    around = places[places[:, 0] == z[0]] * (0, 1, 1)
    weights = np.zeros((1, *plane), np.float32)
    _add(weights, window.cpu().expand(len(around), 1, -1, -1).numpy(), around)
    slices = np.arange(depth)
    voting = np.searchsorted(z, slices + reach, "right") - np.searchsorted(z, slices - reach)
    return weights[0], voting.astype(np.float32)


def _add(sums: np.ndarray, votes: np.ndarray, corners: np.ndarray) -> None:
    """Add votes (n, slices, rows, columns) at their corners (z, y, x); drop those outside."""
    depth, height, width = sums.shape
    for vote, (z, y, x) in zip(votes, corners.tolist(), strict=True):
        slices, rows, columns = vote.shape
        there = sums[max(z, 0) : max(z + slices, 0), y : y + rows, x : x + columns]
        there += vote[max(-z, 0) : max(depth - z, 0), : height - y, : width - x]


@torch.inference_mode()
def _run(
    network: Segmenter,
    image: np.ndarray,
    places: np.ndarray,
    shape: tuple[int, int, int],
    window: torch.Tensor,
    flips: bool,
    skip_below: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Which tiles have a voxel above `skip_below`, and their votes (n, slices, y, x).

    A vote is the probability times the window.
    """
    tiles = [read_block(image, place, shape) for place in places]
    live = np.array([tile.max() > skip_below for tile in tiles])
    if not live.any():
        return live, np.empty((0, 1, *shape[1:]), np.float32)
    chosen = np.stack([tiles[i] for i in np.flatnonzero(live)])
    blocks = torch.from_numpy(chosen[:, None]).float().to(window.device)
    with autocast("auto", window.device.type):
        found = network(blocks).float().sigmoid()
        if flips:
            for axes in FLIPS:
                found = found + network(blocks.flip(axes)).float().sigmoid().flip(axes)
            found = found / (1 + len(FLIPS))
    return live, (found * window).cpu().numpy()


def _grow(array: np.ndarray, slices: int) -> np.ndarray:
    """`array` (k, y, x) with zero slices appended up to `slices`."""
    if slices <= len(array):
        return array
    return np.concatenate([array, np.zeros((slices - len(array), *array.shape[1:]), array.dtype)])
