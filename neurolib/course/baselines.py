"""What a few lines can do without learning: a filter, a threshold, and no small pieces.

A network that does not beat these was not worth training. Their parameters are chosen like a
network's threshold: on the validation neurons, one value for all volumes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from neurolib.errors import DataError, SettingsError
from neurolib.evaluation import choose_cut, drop_small, in_voxels

# The settings to try for each filter, in voxels. Ridge filter: Sato et al. 1998.
FILTERS: dict[str, tuple[tuple[float, ...], ...]] = {
    "threshold": ((),),
    "difference of Gaussians": ((1, 6), (1.5, 6), (1.5, 8)),
    "ridge filter": ((1, 2), (2, 3)),
}


@dataclass(frozen=True)
class Baseline:
    """A filter with its best settings, threshold and smallest piece on validation volumes."""

    name: str
    settings: tuple[float, ...]
    threshold: float
    min_size: int  # in cubes of the shortest voxel edge, see `neurolib.evaluation.in_voxels`
    dice: float  # mean over the validation volumes

    def mask(self, image: np.ndarray, spacing: Sequence[float] = (1, 1, 1)) -> np.ndarray:
        """The segmentation (z, y, x) of a normalised image with voxels of this spacing."""
        mask = respond(self.name, image, self.settings) >= self.threshold
        return drop_small(mask, in_voxels(self.min_size, spacing))


def respond(name: str, image: np.ndarray, settings: Sequence[float] = ()) -> np.ndarray:
    """Response (z, y, x) of a filter, higher where a bright thread is more likely.

    Parameters
    ----------
    name : {"threshold", "difference of Gaussians", "ridge filter"}
        The image itself; a narrow Gaussian minus a wide one; scikit-image's Sato filter.
    image : (z, y, x) float32 array
        Normalised to [0, 1].
    settings : sequence of float
        Standard deviations of the two Gaussians, or scales of the ridges, in voxels.
    """
    if name == "threshold":
        return image
    if name == "difference of Gaussians":
        narrow, wide = (ndimage.gaussian_filter(image, sigma, truncate=3) for sigma in settings)
        return narrow - wide
    if name == "ridge filter":
        from skimage.filters import sato  # half a second

        return sato(image, settings, black_ridges=False).astype(np.float32)
    raise SettingsError(f"filter {name!r}: expected one of {', '.join(FILTERS)}")


def choose(
    name: str,
    images: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    spacings: Sequence[Sequence[float]] = (),
) -> Baseline:
    """Choose settings, threshold and smallest piece of a filter (`FILTERS`) on validation volumes.

    `images` (z, y, x) are normalised; `masks` are those of their targets; `spacings` (dz, dy, dx)
    are those of their voxels, by default cubes.
    """
    if not len(masks):
        raise DataError("no validation volume; hold out at least one neuron for validation")
    best = None
    for settings in FILTERS[name]:
        responses = [respond(name, image, settings) for image in images]
        sample = np.concatenate([response.ravel()[::17] for response in responses])
        candidates = np.unique(np.quantile(sample, 1 - np.geomspace(1e-4, 0.5, 256)))
        cut = choose_cut(responses, masks, candidates, spacings)
        if best is None or cut[-1] > best.dice:
            best = Baseline(name, settings, *cut)
    return best


def describe(baselines: Mapping[str, Baseline]) -> list[dict]:
    """A row for each baseline: its choices, and its Dice on the validation volumes."""
    return [
        {
            "filter": one.name,
            "scales": ", ".join(f"{scale:g}" for scale in one.settings),
            "threshold": one.threshold,
            "smallest piece": one.min_size,
            "validation Dice": one.dice,
        }
        for one in baselines.values()
    ]
