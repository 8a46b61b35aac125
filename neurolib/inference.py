"""From a trained network and a volume to a probability for every voxel.

Overlapping tiles cover the volume; each tile's probabilities become votes with Gaussian weights,
summed slice by slice. Slices are finished in order, so only the few that still wait for votes are
in memory. Memory use grows with the size of a slice and of the batch, not of the volume.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from neurolib.blocking import Sample, block_grid, block_starts, gaussian_window, read_block
from neurolib.data.formats import Box
from neurolib.devices import autocast, pick_device, pick_precision
from neurolib.errors import DataError, SettingsError, VolumeError
from neurolib.evaluation import choose_cut, in_voxels
from neurolib.files import content_key, sha256, text_key
from neurolib.network import NetworkSettings, Segmenter
from neurolib.parameters import check_range
from neurolib.training import load_checkpoint, names_by_content, save_checkpoint
from neurolib.volume import empty_level, pieces, read_volume, standing_out, write_volume

# Axes of a batch of blocks (n, 1, z, y, x), or of its logits (n, z, y, x), that flips mirror: x, y,
# both.
FLIPS = ((-1,), (-2,), (-2, -1))

# Smallest piece, in voxels, for a checkpoint without a chosen one.
MIN_SIZE = 200
# Weights of the filter that `calibrate` tries.
FILTER_WEIGHTS = (0.0, 2.0, 4.0, 8.0)
# Modules that a prediction depends on.
CODE = ("inference", "network", "blocking", "volume", "devices")


@dataclass(frozen=True)
class Tiling:
    """How tiles cover a volume, and how they are run."""

    overlap: float = 0.25  # fraction of a tile that neighbours share in y and x, 0 to 0.9
    batch: int = 8  # tiles per forward pass
    device: str = "auto"  # a GPU if there is one; or cpu, cuda, cuda:1 ...
    # Average the probabilities of each tile as it is and mirrored in y, x and both (test-time
    # augmentation), which takes four times as long.
    flips: bool = False
    # Run only tiles in which something stands out (`empty_level`); where no tile is run, the
    # probability is 0. Tiles that are exactly zero, as outside a mask, are never run.
    skip_empty: bool = True
    filter_weight: float = 0.0  # weight of a filter beside the network (`fuse`), see `calibrate`
    # Predict only slices 0, every, 2 every ..., each from its whole block: a sample of the volume
    # in a fraction of the time, for networks that predict their centre slice.
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
    """A checkpoint's probabilities for a volume, read from `folder` if predicted before.

    `folder` holds one TIFF (float32) per volume, named after the volume and a hash of everything
    that decides the result: image, checkpoint, tiling, precision and the code that predicts. A
    result of one slice is not stored. The weight of the filter is the checkpoint's, unless given.
    """
    settings, weight = Tiling(**tiling), tiling.get("filter_weight")
    precision = pick_precision("auto", pick_device(settings.device).type)
    code = [sha256(Path(__file__).with_name(f"{module}.py")) for module in CODE]
    facts = [content_key(image), sha256(checkpoint), precision, *code]
    facts += [replace(settings, device=""), weight]
    path = Path(folder) / f"{name}-{text_key(repr(facts))}.tif"
    if path.exists():
        return read_volume(path, check=False).data
    network, facts = load_checkpoint(checkpoint)
    options = {"filter_weight": facts.get("filter_weight", 0.0)} | tiling
    probability = predict_volume(network, image, progress=progress, **options)
    if len(probability) > 1:  # `read_volume` takes no single slice
        write_volume(path, probability)
    return probability


def calibrate(
    checkpoint: str | Path, samples: Sequence[Sample], fused: bool = True, device: str = "auto"
) -> dict:
    """Choose, on whole volumes, how to cut a checkpoint's probabilities; store the choice in it.

    Training validates on blocks, which estimate a volume's Dice to about ± 0.04 and know nothing
    of the size of pieces; here, every voxel of the validation volumes counts. `fused`: a
    filter may correct the network (`fuse`).

    Returns ``threshold``; ``min_size``, below which pieces are dropped (`smallest_piece`);
    ``filter_weight``; and ``calibrated``, the best mean Dice of all volumes, at these values.
    """
    if not samples:
        raise DataError("no validation volume; hold out at least one neuron for validation")
    network, facts = load_checkpoint(checkpoint)
    tiling, masks = Tiling(device=device), [sample.mask for sample in samples]
    spacings = [sample.spacing for sample in samples]
    predictions = []
    for sample in samples:
        stream = _whole(network, sample.image, tiling)
        _, *both = zip(*stream, strict=True)
        predictions.append([np.concatenate(slices) for slices in both])
    best = {"calibrated": -1.0}
    for weight in FILTER_WEIGHTS if fused else (0.0,):
        chances = [fuse(*both, weight) for both in predictions]
        chosen = choose_cut(chances, masks, np.arange(1, 100) / 100, spacings)
        if chosen[2] > best["calibrated"]:
            best = dict(zip(("threshold", "min_size", "calibrated"), chosen, strict=True))
            best["filter_weight"] = weight
    facts |= best
    facts["chosen_on"] = names_by_content(samples)
    save_checkpoint(checkpoint, network, network.state_dict(), facts)
    return best


def smallest_piece(facts: dict, spacing: Sequence[float]) -> int:
    """Voxels below which pieces are dropped at this spacing, according to a checkpoint's facts."""
    return in_voxels(facts.get("min_size", MIN_SIZE), spacing)


def predict_slices(
    network: Segmenter, image: np.ndarray, tiling: Tiling, progress: bool = False
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first slice, probabilities (k, y, x)) in order of z; see `predict_volume`."""
    for first, chance, heights in _whole(network, image, tiling, progress):
        yield first, fuse(chance, heights, tiling.filter_weight)


def _whole(
    network: Segmenter, image: np.ndarray, tiling: Tiling, progress: bool = False
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """`_stream` over a whole volume."""
    if tiling.every > 1 and network.settings.predict == "all":
        raise SettingsError(
            f"every={tiling.every}: expected 1 for a network that predicts all slices"
        )
    grid = block_grid(image.shape, *_tiles(network.settings, tiling.overlap))
    grid = grid[grid[:, 0] % tiling.every == 0]
    span = 0, -(-image.shape[0] // tiling.every)
    level = empty_level(image) if tiling.skip_empty or tiling.filter_weight else 0.0
    return _stream(network, image, grid, span, tiling, level, progress)


def predict_box(
    network: Segmenter, image: np.ndarray, box: Box, tiling: Tiling, level: float
) -> np.ndarray:
    """The part of the result of `predict_volume` that lies in a box, as float32.

    All tiles that vote in the box are run, so the result does not depend on how a volume is cut
    into boxes. The box and the margin that these tiles need (`box_of_tiles`) are read in one go.
    The image must be normalised to [0, 1], which is not checked, and `Tiling.every` must be 1;
    `level` is the `empty_level` of the whole image.
    """
    around, grid = box_of_tiles(network.settings, image.shape, box, tiling.overlap)
    origin = [part.start for part in around]
    part = np.asarray(image[around], np.float32)
    span, *plane = ((b.start - o, b.stop - o) for b, o in zip(box, origin, strict=True))
    rows, columns = (slice(*ends) for ends in plane)
    out = np.empty([b.stop - b.start for b in box], np.float32)
    for first, *parts in _stream(network, part, grid - origin, span, tiling, level):
        slices, first = fuse(*parts, tiling.filter_weight), first - span[0]
        out[first : first + len(slices)] = slices[:, rows, columns]
    return out


def box_of_tiles(
    settings: NetworkSettings, shape: tuple[int, int, int], box: Box, overlap: float
) -> tuple[Box, np.ndarray]:
    """The part of a volume seen by the tiles that vote in a box, and the tiles' places (n, 3)."""
    tile, stride = _tiles(settings, overlap)
    sees = settings.depth // 2
    votes = sees if settings.predict == "all" else 0  # slices on either side of the centre
    axes, around = [], []
    for axis, part in enumerate(box):
        size, vote, see = (tile[axis], 0, 0) if axis else (1, votes, sees)
        starts = block_starts(shape[axis], size, stride[axis])
        starts = starts[(starts - vote < part.stop) & (starts + size + vote > part.start)]
        low, high = int(starts[0]) - see, int(starts[-1]) + size + see
        axes.append(starts)
        around.append(slice(max(0, low), min(shape[axis], high)))
    return tuple(around), np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)


def _tiles(
    settings: NetworkSettings, overlap: float
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Shape of the tiles and steps between them."""
    stride = max(1, round(settings.block * (1 - overlap)))
    # Blocks that vote for all their slices are needed only every few slices; neighbours share two.
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
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Run the tiles of a grid in order of z; yield the slices of a span as they are finished.

    Each item holds the number of the first slice, the probabilities, and `standing_out` in units of
    `level`. A tile's vote is weighted by a Gaussian in z, y and x around its middle.
    """
    settings, (first, depth) = network.settings, span
    device = pick_device(tiling.device)
    network = network.to(device).eval()
    shape, _ = _tiles(settings, tiling.overlap)
    slices = settings.depth if settings.predict == "all" else 1
    middle = slice(settings.depth // 2 - slices // 2, settings.depth // 2 + slices // 2 + 1)
    in_z, in_plane = gaussian_window((slices, 1)), gaussian_window(shape[1:])
    window = in_z[:, :, None] * in_plane
    # Where the votes begin, counted in predicted slices.
    places = grid // (tiling.every, 1, 1) - (slices // 2, 0, 0)
    # For the slices that wait for more votes: weights, probabilities, heights if there is a level.
    sums = np.zeros((3 if level else 2, 0, *image.shape[1:]), np.float32)

    def extended(end: int) -> np.ndarray:
        missing = min(depth, end) - first - sums.shape[1]
        return np.pad(sums, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing > 0 else sums

    waiting, heights, corners = [], [], []
    bar = tqdm(grid, "segmenting", mininterval=2, disable=not progress)
    for i, place in enumerate(bar):
        tile = read_block(image, place, shape)
        seen = tile.max() > 0
        height = standing_out(tile, middle) / level if seen and level else None
        if seen and (height is None or height.max() > 1 or not tiling.skip_empty):
            waiting.append(tile)
            corners.append(places[i])
            if level:
                heights.append(height * window)
        # Before this slice, only tiles waiting for a full batch still vote; they wait a few slices.
        last = i + 1 == len(grid)
        after = depth if last else min(depth, int(places[i + 1, 0]))
        late = waiting and (last or after - corners[0][0] > tiling.batch)
        if late or len(waiting) == tiling.batch:
            sums = extended(corners[-1][0] + slices)
            chances = _run(network, np.stack(waiting), window, device, tiling.flips)
            votes = [window] * len(waiting), chances, heights
            for total, vote in zip(sums, votes, strict=False):
                _add(total, vote, np.array(corners) - (first, 0, 0))
            waiting, heights, corners = [], [], []
        done = int(corners[0][0]) if waiting else after
        if done > first:
            finished, sums = np.split(extended(done), [done - first], axis=1)
            finished[1:] /= np.maximum(finished[0], np.finfo(np.float32).tiny)
            flat = np.broadcast_to(np.float32(0), finished[1].shape)
            yield first, finished[1], finished[2] if level else flat
            first = done


def _add(sums: np.ndarray, votes: Sequence[np.ndarray], corners: np.ndarray) -> None:
    """Add votes (n, slices, rows, columns) at their corners (z, y, x); drop those outside."""
    depth, height, width = sums.shape
    for vote, (z, y, x) in zip(votes, corners.tolist(), strict=True):
        slices, rows, columns = vote.shape
        there = sums[max(z, 0) : max(z + slices, 0), y : y + rows, x : x + columns]
        there += vote[max(-z, 0) : max(depth - z, 0), : height - y, : width - x]


@torch.inference_mode()
def _run(
    network: Segmenter, tiles: np.ndarray, window: np.ndarray, device: torch.device, flips: bool
) -> np.ndarray:
    """The votes (n, slices, y, x) of tiles (n, z, y, x): the probability times the window."""
    blocks = torch.from_numpy(tiles[:, None]).float().to(device)
    with autocast("auto", device.type):
        chance = network(blocks).float().sigmoid()
        if flips:
            for axes in FLIPS:
                chance = chance + network(blocks.flip(axes)).float().sigmoid().flip(axes)
            chance = chance / (1 + len(FLIPS))
    return (chance * torch.from_numpy(window).to(device)).cpu().numpy()


def fuse(chance: np.ndarray, heights: np.ndarray, weight: float) -> np.ndarray:
    """A probability corrected by a filter: logit p + weight · (height - 1).

    `heights` are those of `standing_out` in units of `empty_level`: at 1 the filter changes
    nothing, and from 2 on its correction no longer grows. It knows how bright neurites are in this
    volume, which a network that sees one block does not, so a threshold chosen on one volume fits
    others better.
    """
    if not weight:
        return chance
    clipped = np.clip(chance, 1e-4, 1 - 1e-4)
    logits = np.log(clipped / (1 - clipped)) + weight * (np.minimum(heights, 2) - 1)
    with np.errstate(over="ignore"):  # far below what stands out, the probability is 0
        return np.where(chance > 0, 1 / (1 + np.exp(-logits)), 0).astype(np.float32)
