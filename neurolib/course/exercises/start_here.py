"""Questions of notebook 00: the share of neurites in a volume, and why accuracy misleads."""

from collections.abc import Callable

import numpy as np

from neurolib.course.exercises import call, question, recognise


@question("in this course, a tube of that radius around the tree is what a network must find.")
def q1(share: Callable) -> str:
    """Length and radius of neurites and a shape (z, y, x) give their share of the volume."""
    for length, radius, shape in [(298.0, 1.9, (48, 192, 192)), (780.0, 2.5, (40, 100, 150))]:
        answer = float(call(share, length, radius, shape))
        volume, exact = np.prod(shape), length * np.pi * radius**2 / np.prod(shape)
        about = f"{length:g} voxels of neurite, radius {radius:g}, in {shape}: {answer:.3g}. "
        mistakes = [
            (length / volume, "That is a thread one voxel wide: a tube has a cross-section."),
            (length * radius**2 / volume, "The cross-section is a circle: π is missing."),
            (4 * exact, "The radius is half the width."),
            (exact * volume, "That is a number of voxels; divide it by the size of the volume."),
            (100 * exact, "A share lies between 0 and 1."),
            (length * 2 * np.pi * radius / volume, "That is the surface of the tube."),
        ]
        if np.isclose(answer, exact, rtol=0.03):
            continue
        hint = recognise(answer, mistakes)
        return about + (hint or "Think of the tree as one long straight tube.")
    return ""


@question("nearly every voxel is right, yet nothing is found: measure overlap, as Dice does.")
def q2(accuracy: Callable) -> str:
    """A mask gives the accuracy of the answer "no neurite anywhere"."""
    rng = np.random.default_rng(2)
    for share in (0.001, 0.02, 0.3):
        mask = rng.random((9, 20, 30)) < share
        mask[0, 0, 0] = True
        answer, exact = float(call(accuracy, mask.copy())), float((~mask).mean())
        about = f"{mask.mean():.1%} foreground: {answer:.4g}. "
        mistakes = [
            (mask.mean(), "That is the share that the network gets wrong."),
            (100 * exact, "A share lies between 0 and 1."),
            ((~mask).sum(), "That is a number of voxels; divide it by the size of the mask."),
            (0, "That is the network's Dice; it does get most voxels right."),
            (1, "Not all of them: the network gets the neurite wrong."),
        ]
        if np.isclose(answer, exact, rtol=1e-9):
            continue
        hint = recognise(answer, mistakes, 1e-6)
        return about + (hint or "Count the voxels that are False in the mask.")
    return ""
