"""Questions of notebook 00: a block in a volume, and why not to count right answers."""

from collections.abc import Callable

import numpy as np

from neurolib.course.exercises import call, question


@question("z comes first, and the centre slice is in the middle of its five.")
def q1(block: Callable) -> str:
    """A volume (z, y, x), a centre slice and a first row and column give a block (5, 100, 100)."""
    rng = np.random.default_rng(1)
    volume = rng.integers(0, 60_000, (130, 125, 140))
    for z, y, x in [(20, 5, 30), (12, 25, 0), (2, 0, 40)]:
        found = np.asarray(call(block, volume, z, y, x))
        exact = volume[z - 2 : z + 3, y : y + 100, x : x + 100]
        about = f"Centre slice {z}, row {y}, column {x}: "
        if np.array_equal(found, exact):
            continue
        if np.array_equal(found, volume[z : z + 5, y : y + 100, x : x + 100]):
            return f"{about}slice {z} is your first one; it is to be the third of five."
        if np.array_equal(found, volume[z - 2 : z + 2, y : y + 100, x : x + 100]):
            return f"{about}four slices: the end of a Python slice is left out, go to z + 3."
        if np.array_equal(found, volume[z - 2 : z + 3, x : x + 100, y : y + 100]):
            return f"{about}rows are y and columns are x: the axes are (z, y, x)."
        if found.ndim == 3 and found.shape == (100, 100, 5):
            return f"{about}your slices are the last axis; volumes here are (z, y, x)."
        if found.shape != (5, 100, 100):
            return f"{about}expected the shape (5, 100, 100), got {found.shape}."
        return f"{about}the right shape, from another place. Print its first voxel's place."
    return ""


@question("nearly everything is right, and nothing is found: count overlap instead, as Dice does.")
def q2(accuracy: Callable) -> str:
    """A mask gives the share of voxels that the answer "no neurite anywhere" gets right."""
    rng = np.random.default_rng(2)
    for share in (0.001, 0.02, 0.3):
        mask = rng.random((9, 20, 30)) < share
        mask[0, 0, 0] = True
        found, exact = float(call(accuracy, mask.copy())), float((~mask).mean())
        about = f"{mask.mean():.1%} foreground: {found:.4g}. "
        mistakes = [
            (mask.mean(), "That is the share that it gets wrong."),
            (100 * exact, "A share lies between 0 and 1."),
            ((~mask).sum(), "That is a number of voxels; divide by all of them."),
            (0, "That is its Dice; of all voxels it gets most right."),
            (1, "Not all of them: the voxels of the neurite are wrong."),
        ]
        if np.isclose(found, exact, rtol=1e-9):
            continue
        for wrong, hint in mistakes:
            if np.isclose(found, wrong, rtol=1e-6):
                return about + hint
        return f"{about}Count the voxels that are False in the mask."
    return ""
