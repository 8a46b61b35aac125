"""From a trained network and a volume to a probability for every voxel.

The volume is covered with overlapping tiles; each tile's logits become votes with Gaussian
weights, summed slice by slice. Slices are finished in order, so that only the few slices that
still wait for votes are held: memory grows with a slice and with the batch, not with the volume.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from neurolib.blocking import accumulate, block_grid, gaussian_window, normalise, read_block
from neurolib.errors import SettingsError, VolumeError
from neurolib.files import sha256
from neurolib.network import Segmenter
from neurolib.training import load_checkpoint
from neurolib.volume import read_volume, write_volume


def predict_volume(
    network: Segmenter,
    image: np.ndarray,
    overlap: float = 0.5,
    batch: int = 8,
    device: str = "auto",
    progress: bool = True,
    out: np.ndarray | None = None,
    every: int = 1,
) -> np.ndarray:
    """Predict the probability of neurite for every voxel, or for every voxel of some slices.

    Parameters
    ----------
    network : Segmenter
    image : (z, y, x) array
        Normalised to [0, 1] (`neurolib.volume.normalise`).
    overlap : float
        Share of a tile that neighbours overlap in y and x, 0 to 0.9.
    batch : int
        Tiles per forward pass.
    device : str
        ``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ``cuda:1`` ...
    progress : bool
        Show a progress bar over tiles.
    out : (z, y, x) float32 array, optional
        Written to instead of a new array (a memory map, say).
    every : int
        Predict slices 0, every, 2 every ... only, each from its whole block: a sample of the
        volume at a fraction of the time, for networks that predict their centre slice.

    Returns
    -------
    (z / every rounded up, y, x) float32 array
        Tiles without any signal (all their slices exactly zero, as outside the halo of a masked
        volume) are not run: their probability is 0.

    Raises
    ------
    VolumeError
        If the image is not 3D or not in [0, 1].
    SettingsError
        If the overlap is out of range or the device does not exist.
    """
    if image.ndim != 3 or min(image.shape) < 1:
        raise VolumeError(f"expected a volume (z, y, x), got shape {image.shape}")
    low, high = float(image.min()), float(image.max())
    if not (low >= 0 and high <= 1):
        raise VolumeError(f"expected intensities in [0, 1], got {low:g} to {high:g}; normalise")
    if not 0 <= overlap <= 0.9:
        raise SettingsError(f"overlap={overlap}: expected 0 to 0.9")
    if batch < 1 or every < 1:
        raise SettingsError(f"batch={batch}, every={every}: expected at least 1 of each")
    if every > 1 and network.settings.predict == "all":
        raise SettingsError(f"every={every}: expected 1 for a network that predicts all slices")
    depth = -(-image.shape[0] // every)
    out = np.zeros((depth, *image.shape[1:]), np.float32) if out is None else out
    for first, slices in predict_slices(network, image, overlap, batch, device, progress, every):
        out[first : first + len(slices)] = slices
    return out


def predicted(
    folder: str | Path, name: str, checkpoint: str | Path, image: np.ndarray, **options
) -> np.ndarray:
    """The probability of a volume under a checkpoint: read if predicted before, else predicted.

    Parameters
    ----------
    folder : path
        Holds one TIFF (float32) per volume and checkpoint, named by the checkpoint's hash.
    name : str
        Of the volume.
    checkpoint : path
    image : (z, y, x) array
    **options
        Of `predict_volume`.
    """
    options_key = "".join(f"-{key}{value}" for key, value in sorted(options.items()))
    path = Path(folder) / f"{name}-{sha256(checkpoint)[:8]}{options_key}.tif"
    if path.exists():
        return read_volume(path, check=False).data
    network, _ = load_checkpoint(checkpoint)
    probability = predict_volume(network, image, **options)
    write_volume(path, probability)
    return probability


def predict_slices(
    network: Segmenter,
    image: np.ndarray,
    overlap: float,
    batch: int,
    device: str = "auto",
    progress: bool = True,
    every: int = 1,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first slice, probabilities (k, y, x)) in order of z; see `predict_volume`."""
    settings = network.settings
    shape = (settings.depth, settings.block, settings.block)
    whole = settings.predict == "all"
    stride = max(1, round(settings.block * (1 - overlap)))
    # Five votes a slice need a block only every few slices; neighbours share two of them.
    z_stride = max(1, settings.depth - 2) if whole else 1
    grid = block_grid(image.shape, shape, (z_stride, stride, stride))
    grid = grid[np.argsort(grid[:, 0], kind="stable")]
    grid = grid[grid[:, 0] % every == 0] if every > 1 else grid
    reach = settings.depth // 2 if whole else 0
    depth = -(-image.shape[0] // every)
    window = gaussian_window(shape[1:])
    where = pick_device(device)
    network = network.to(where).eval()

    first, numerator = 0, np.zeros((0, *image.shape[1:]), np.float32)
    denominator = np.zeros_like(numerator)
    bar = tqdm(total=len(grid), desc="segmenting", mininterval=2, disable=not progress)
    for start in range(0, len(grid), batch):
        tiles = grid[start : start + batch]
        # Where the votes go: among the slices that are predicted.
        places = tiles // (every, 1, 1)
        last = min(depth, int(places[-1, 0]) + reach + 1)
        numerator = _grow(numerator, last - first)
        denominator = _grow(denominator, last - first)
        votes = _run(network, image, tiles, shape, where)
        accumulate(numerator, denominator, votes, places, window, first)
        bar.update(len(places))
        # Later places are at this z or deeper: slices above their reach are complete.
        rest = grid[start + batch :]
        done = int(rest[0, 0]) // every - reach if len(rest) else depth
        if done > first:
            k = done - first
            yield first, normalise(numerator[:k], denominator[:k])
            first, numerator, denominator = done, numerator[k:], denominator[k:]
    bar.close()


def pick_device(name: str) -> torch.device:
    """The device of that name; ``auto``: a GPU if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:100]
        raise SettingsError(f"device={name!r}: not usable here ({reason}); try 'cpu'") from None
    return device


@torch.inference_mode()
def _run(
    network: Segmenter,
    image: np.ndarray,
    places: np.ndarray,
    shape: tuple[int, int, int],
    device: torch.device,
) -> np.ndarray:
    """Probabilities (n, slices, y, x) at `places`; tiles without signal are not run."""
    tiles = np.stack([read_block(image, place, shape) for place in places])
    slices = 1 if network.settings.predict == "center" else shape[0]
    votes = np.zeros((len(places), slices, *shape[1:]), np.float32)
    live = tiles.any(axis=(1, 2, 3))
    if live.any():
        logits = network(torch.from_numpy(tiles[live][:, None]).float().to(device))
        votes[live] = logits.float().sigmoid().cpu().numpy()
    return votes


def _grow(array: np.ndarray, slices: int) -> np.ndarray:
    """`array` (k, y, x) with zero slices appended up to `slices`."""
    if slices <= len(array):
        return array
    return np.concatenate([array, np.zeros((slices - len(array), *array.shape[1:]), array.dtype)])
