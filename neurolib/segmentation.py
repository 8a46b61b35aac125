"""From an image to a tree, in one call: read, normalise, predict, trace."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from math import prod
from pathlib import Path

import numpy as np
import psutil

from neurolib.data.formats import check_spacing
from neurolib.errors import NeurolibWarning, SettingsError, VolumeError
from neurolib.evaluation import label_pieces
from neurolib.files import SHIPPED, checkpoint_file, naming
from neurolib.inference import Tiling, predict_volume, smallest_piece
from neurolib.network import Segmenter
from neurolib.parameters import check_range
from neurolib.swc import Tree
from neurolib.tracing import trace
from neurolib.training import load_checkpoint
from neurolib.volume import INVERT, Volume, check_values, inverted, normalise, read_volume


def segment(
    image: str | Path | Volume | np.ndarray,
    checkpoint: str | Path = SHIPPED,
    threshold: float | None = None,
    min_size: int | None = None,
    bridge: float = 15.0,
    seed: Sequence[float] | None = None,
    progress: bool = True,
    **tiling: object,
) -> Tree:
    """Segment an image and trace it.

    Parameters
    ----------
    image : path, Volume, or (z, y, x) array
        An array has cubic voxels; give a `neurolib.volume.Volume` for others.
    checkpoint : path
        File of a trained network, or folder of a run; by default the shipped network.
    threshold : float, optional
        Threshold on the probability; by default the one chosen on the validation neurons.
    min_size : int, optional
        Pieces of fewer voxels are dropped; by default the size chosen on the validation neurons.
    bridge, seed
        As in `neurolib.tracing.trace`; the seed is (z, y, x).
    progress : bool
        Show a progress bar over tiles.
    **tiling
        Attributes of `neurolib.inference.Tiling`, such as ``overlap`` and ``device``;
        ``filter_weight`` is by default the one chosen on the validation neurons.

    Returns
    -------
    Tree
        In voxels of the image; see `neurolib.tracing.trace`.

    Examples
    --------
    >>> tree = neurolib.segment("cell.tif", "runs/mine")  # doctest: +SKIP
    """
    given = {"threshold": threshold, "min_size": min_size, "bridge": bridge}
    for name, value in given.items():
        check_range(name, value)
    tiles = Tiling(**tiling)
    if tiles.every > 1:
        raise SettingsError(f"every={tiles.every}: expected 1, because a tree needs all slices")
    network, facts = load_checkpoint(checkpoint_file(checkpoint))
    if "filter_weight" not in tiling:
        tiles = replace(tiles, filter_weight=facts.get("filter_weight", 0.0))
    volume = predict_image(image, network, tiles, progress)
    cut = facts["threshold"] if threshold is None else threshold
    if min_size is None:
        min_size = choose_size(facts, volume, cut, _name(image))
    return trace(volume.data, volume.spacing, seed, cut, min_size, bridge)


def predict_image(
    image: str | Path | Volume | np.ndarray,
    network: Segmenter,
    tiling: Tiling,
    progress: bool = True,
    **reading: object,
) -> Volume:
    """The probability of neurite in an image (path, `Volume` or array), with the image's spacing.

    `progress` shows a progress bar over tiles; `reading` are options of
    `neurolib.volume.read_volume`, such as ``channel``.
    """
    name = _name(image)
    if isinstance(image, np.ndarray):
        image = Volume(image)
    if isinstance(image, Volume):
        volume = image
        _check_image(name, volume)
    else:
        volume = read_volume(image, **reading)
    with naming(name):
        check_spacing(volume.spacing)
    _check_fits(name, volume.data.shape)
    scaled = normalise(volume.data)
    if inverted(scaled):
        warnings.warn(f"{name}: {INVERT}", NeurolibWarning, stacklevel=3)
    probability = predict_volume(network, scaled, progress=progress, **asdict(tiling))
    return replace(volume, data=probability)


def choose_size(facts: dict, volume: Volume, cut: float, name: str) -> int:
    """Voxels below which pieces are dropped: `smallest_piece`, or less in a small stack.

    `facts` are the checkpoint's; the size in them was chosen on whole neurons. If no piece of
    `volume`, a probability, is that large, this size would drop everything, which is checked only
    if the volume is in memory.
    """
    size, least = (smallest_piece(values, volume.spacing) for values in (facts, {}))
    if size <= least or not isinstance(volume.data, np.ndarray):
        return size
    if label_pieces(volume.data >= cut)[1].max() >= size:
        return size
    told = f"{name}: no piece has {size} voxels; those of at least {least} are kept"
    warnings.warn(told, NeurolibWarning, stacklevel=3)
    return least


def _name(image: object) -> str:
    return Path(image).name if isinstance(image, str | Path) else "image"


def _check_image(name: str, image: Volume) -> None:
    """Refuse an image that is no stack (one slice is enough), or values that are no image."""
    shape = tuple(image.data.shape)
    if len(shape) != 3 or 0 in shape:
        raise VolumeError(
            f"{name}: expected a 3D stack (z, y, x), got shape {shape}; pass a single slice as "
            "image[None], and one channel of several"
        )
    check_values(image, name)


def _check_fits(name: str, shape: tuple[int, int, int]) -> None:
    """Refuse an image too large to segment in memory: image and probability, both float32."""
    needed, free = 8 * prod(shape), psutil.virtual_memory().available
    if needed > free:
        raise SettingsError(
            f"{name}: {tuple(shape)} voxels take {needed / 2**30:.1f} GiB of memory, found "
            f"{free / 2**30:.1f} GiB free; work part by part, from OME-Zarr to --probability "
            "NAME.zarr"
        )
