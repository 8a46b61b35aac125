"""What a few lines can do without learning: a filter, one threshold, and no small pieces.

A network that does not beat these has learnt nothing that is worth its training. Their parameters
are chosen as a network's threshold is: on the validation neurons, one value for all volumes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from neurolib.errors import DataError, SettingsError
from neurolib.evaluation import dice

# Each filter with the settings that are tried, in voxels. Ridges: Sato et al. 1998.
FILTERS: dict[str, tuple[tuple[float, ...], ...]] = {
    "threshold": ((),),
    "difference of Gaussians": ((1, 6), (1.5, 6), (1.5, 8)),
    "ridge filter": ((1, 2), (2, 3)),
}
# Smallest pieces that are tried, in voxels; 0 keeps all.
SIZES = (0, 50, 200, 800)


@dataclass(frozen=True)
class Baseline:
    """A filter with the settings, threshold and smallest piece that were best on validation."""

    name: str
    settings: tuple[float, ...]
    threshold: float
    min_size: int
    dice: float  # mean over the validation volumes

    def mask(self, image: np.ndarray) -> np.ndarray:
        """The segmentation (z, y, x) of a normalised image."""
        return drop_small(respond(self.name, image, self.settings) >= self.threshold, self.min_size)


def respond(name: str, image: np.ndarray, settings: Sequence[float] = ()) -> np.ndarray:
    """Response of a filter, higher where a bright thread is more likely.

    Parameters
    ----------
    name : {"threshold", "difference of Gaussians", "ridge filter"}
        The image itself; a narrow Gaussian minus a wide one; Sato's ridge filter of scikit-image.
    image : (z, y, x) array
        Normalised to [0, 1].
    settings : sequence of float
        Standard deviations of the two Gaussians, or scales of the ridges, in voxels.

    Returns
    -------
    (z, y, x) float32 array
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


def choose(name: str, images: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> Baseline:
    """Choose settings, threshold and smallest piece of a filter on validation volumes.

    Parameters
    ----------
    name : str
        One of `FILTERS`.
    images, masks : sequences of (z, y, x) arrays
        Normalised images and their targets.

    Returns
    -------
    Baseline

    Raises
    ------
    DataError
        If there is no validation volume.
    """
    best = None
    for settings in FILTERS[name]:
        found = [respond(name, image, settings) for image in images]
        threshold, score = best_threshold(found, masks)
        if best is None or score > best.dice:
            best = Baseline(name, settings, threshold, 0, score)
            found_by_best = [response >= threshold for response in found]
    scores = {
        size: float(
            np.mean(
                [dice(drop_small(f, size), m) for f, m in zip(found_by_best, masks, strict=True)]
            )
        )
        for size in SIZES
    }
    size = max(scores, key=scores.get)
    return Baseline(name, best.settings, best.threshold, size, scores[size])


def best_threshold(
    responses: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    candidates: Sequence[float] | None = None,
) -> tuple[float, float]:
    """The one threshold at which the mean Dice over some volumes is highest, and that Dice.

    Parameters
    ----------
    responses, masks : sequences of (z, y, x) arrays
    candidates : sequence of float, optional
        Ascending; by default 256 quantiles of the responses, finer towards the bright end.

    Raises
    ------
    DataError
        If there is no volume.
    """
    if not len(masks):
        raise DataError("no validation volume; hold out at least one neuron for validation")
    if candidates is None:
        some = np.concatenate([response.ravel()[::17] for response in responses])
        candidates = np.unique(np.quantile(some, 1 - np.geomspace(1e-4, 0.5, 256)))
    candidates = np.asarray(candidates)
    curves = []
    for response, mask in zip(responses, masks, strict=True):
        # A voxel that reaches k thresholds is foreground under the first k of them.
        reached = np.searchsorted(candidates, response.ravel(), "right")
        counts = np.bincount(reached, minlength=len(candidates) + 1)
        hits = np.bincount(reached[mask.ravel()], minlength=len(candidates) + 1)
        found, both = counts[::-1].cumsum()[-2::-1], hits[::-1].cumsum()[-2::-1]
        curves.append(2 * both / np.maximum(found + np.count_nonzero(mask), 1))
    mean = np.mean(curves, axis=0)
    return float(candidates[mean.argmax()]), float(mean.max())


def drop_small(mask: np.ndarray, size: int) -> np.ndarray:
    """A mask without its connected pieces (26 neighbours) of fewer than `size` voxels."""
    if size <= 1:
        return mask
    label, _ = ndimage.label(mask, np.ones((3, 3, 3)))
    keep = np.bincount(label.ravel()) >= size
    keep[0] = False
    return keep[label]


def describe(found: Mapping[str, Baseline]) -> list[dict]:
    """A row for each baseline: what was chosen, and its Dice on the validation volumes."""
    return [
        {
            "filter": one.name,
            "scales": ", ".join(f"{scale:g}" for scale in one.settings),
            "threshold": one.threshold,
            "smallest piece": one.min_size,
            "validation Dice": one.dice,
        }
        for one in found.values()
    ]
