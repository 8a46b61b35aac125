"""Segmentations from other programs: masks, labels and probabilities."""

import numpy as np

from neurolib.errors import SettingsError, VolumeError

FULL_SCALE = {"uint8": 255, "uint16": 65535}  # the value of probability 1


def as_probability(
    data: np.ndarray, label: int | None = None, threshold: float | None = None, name: str = "volume"
) -> tuple[np.ndarray, str]:
    """Turn a segmentation from another program into a mask or a probability.

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
        As given to a tracer; here it only means that whole numbers are probabilities.
    name : str
        Name of the file, for errors.

    Returns
    -------
    data : (z, y, x) bool, or float in [0, 1]
    meaning : str
        How the voxels were read, in words.
    """
    data = np.asarray(data)
    if data.ndim != 3 or not data.size:
        raise VolumeError(f"{name}: expected a 3D stack (z, y, x), got shape {data.shape}")
    if label is not None and threshold is not None:
        raise SettingsError("label and threshold: give one; labels have no threshold")
    kind = data.dtype.kind
    if kind == "b":
        result, meaning = data, "a mask"
    elif kind == "f":
        if label is not None:
            raise SettingsError(f"label={label}: {name} holds {data.dtype}, expected whole numbers")
        low, high = float(data.min()), float(data.max())
        if not (low >= 0 and high <= 1):  # NaN fails too
            raise VolumeError(
                f"{name}: found values from {low:g} to {high:g}, expected probabilities in "
                "[0, 1]; divide by the value that stands for 1, or save labels as integers"
            )
        result, meaning = data, "a probability"
    elif kind not in "iu":
        raise VolumeError(f"{name}: found {data.dtype}, expected a mask, labels or probabilities")
    elif threshold is not None:
        top = FULL_SCALE.get(data.dtype.name)
        if top is None:
            raise SettingsError(
                f"threshold: {name} holds {data.dtype}; probabilities are floats in [0, 1], "
                f"{' or '.join(FULL_SCALE)}"
            )
        result, meaning = data / np.float32(top), f"a probability, {top} being 1"
    else:
        result, meaning = _labelled(data, label, name)
    if result.dtype == bool and result.all():
        raise VolumeError(
            f"{name}: every voxel is foreground, expected some that are 0; choose one label, or "
            "give a threshold if these are probabilities"
        )
    return result, meaning


def _labelled(data: np.ndarray, label: int | None, name: str) -> tuple[np.ndarray, str]:
    labels = np.unique(data)
    if labels[0] < 0:
        raise VolumeError(f"{name}: found the label {labels[0]}, expected whole numbers from 0")
    if label is None:
        count = np.count_nonzero(labels)
        words = "a mask" if count == 1 else f"{count} labels, all but 0 taken as foreground"
        return data != 0, words
    if label not in labels:
        listed = ", ".join(map(str, labels[:8])) + (" ..." if len(labels) > 8 else "")
        raise VolumeError(f"{name}: no voxel has the label {label}; found {listed}")
    return data == label, f"label {label} of {', '.join(map(str, labels[:8]))}"
