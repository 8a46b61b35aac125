"""Questions of notebook 01: frames, the target, blocks."""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.spatial.distance import cdist

from neurolib import blocking
from neurolib.blocking import block_starts, tube_radius
from neurolib.course.exercises import call, question
from neurolib.data.datasets import load_dataset

A, D_MAX = 6.0, 5.0  # of the response (Sironi et al.)


@question("points are (x, y, z) and spacings (dz, dy, dx): you reversed one of the two.")
def q1(to_voxels: Callable) -> str:
    """Coordinates (n, 3) x, y, z in µm and a spacing (dz, dy, dx) in µm give voxels."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        spacing = rng.uniform(0.1, 3, 3)
        voxels = rng.uniform(0, 400, (7, 3))
        microns = voxels * spacing[::-1]
        answer = np.asarray(call(to_voxels, microns.copy(), tuple(spacing)), float)
        if answer.shape != voxels.shape:
            return f"Seven points went in as an array (7, 3), but {answer.shape} came back."
        if np.allclose(answer, voxels):
            continue
        if np.allclose(answer, microns / spacing):
            return "The spacing is (dz, dy, dx) and a point is (x, y, z): reverse one of the two."
        if np.allclose(answer, microns * spacing[::-1]) or np.allclose(answer, microns * spacing):
            return "A point at 10 µm with 2 µm between voxels is at voxel 5: divide."
        if np.allclose(answer, np.rint(voxels)) or np.allclose(answer, np.floor(voxels)):
            return "A node may lie between voxels: do not round."
        if np.allclose(answer - voxels, (answer - voxels)[0]):
            return "Voxel centres are at whole numbers: there is nothing to add or subtract."
        return "With a spacing of (2, 1, 1), the point (8, 8, 8) µm is voxel (8, 8, 4)."
    return ""


@question("this threshold gives a tube of that radius.")
def q2(threshold: Callable) -> str:
    """A radius in voxels, below d_M, gives the threshold for a tube of that radius."""
    for radius in np.linspace(0.3, 4.8, 19):
        answer = float(call(threshold, float(radius)))
        exact = np.expm1(A * (1 - radius / D_MAX)) / np.expm1(A)
        if np.isclose(answer, exact, rtol=1e-3):
            continue
        if np.isclose(answer, np.exp(A * (1 - radius / D_MAX)) / np.exp(A), rtol=1e-3):
            return "Nearly: without the two -1 terms, the response does not fall to 0 at D = d_M."
        if np.isclose(answer, np.expm1(A * (1 - radius / D_MAX)), rtol=1e-3):
            return "The response must be 1 on the centreline: divide by its largest value."
        if np.isclose(answer, np.expm1(A * (1 - 2 * radius / D_MAX)) / np.expm1(A), rtol=1e-3):
            return "D is the distance from the centreline: the radius, not the diameter."
        if 0 < answer < 1:
            return (
                f"For radius {radius:.2f} your threshold {answer:.3g} gives a tube of radius "
                f"{tube_radius(answer):.2f}: put D = radius into the equation for y(D)."
            )
        return f"A threshold lies between 0 and 1; for radius {radius:.2f} you gave {answer:.3g}."
    return ""


@question("every voxel is covered, and no block extends beyond the volume.")
def q3(starts: Callable) -> str:
    """Size of an axis, of a block and a stride give the first voxels of all blocks."""
    rng = np.random.default_rng(3)
    cases = [(250, 100, 100), (300, 100, 100), (100, 100, 50)]
    cases += [
        (int(size), int(block), int(rng.integers(1, block + 1)))
        for block in rng.integers(1, 40, 40)
        for size in [block + rng.integers(0, 200)]
    ]
    for size, block, stride in cases:
        answer = np.asarray(call(starts, size, block, stride))
        about = f"(size {size}, block {block}, stride {stride})"
        if answer.ndim != 1 or not len(answer) or answer.dtype.kind not in "iu":
            return f"Return a list of whole numbers {about}."
        if len(set(answer.tolist())) < len(answer):
            return f"One start appears twice {about}: take care when the stride fits exactly."
        if answer.max() > size - block:
            return (
                f"The block that begins at {answer.max()} ends at {answer.max() + block} {about}: "
                "move the last one inward."
            )
        covered = np.zeros(size, bool)
        for start in answer:
            if start < 0:
                return f"A block begins at {start} {about}: the first voxel is number 0."
            covered[start : start + block] = True
        if not covered.all():
            return (
                f"Voxel {int(np.argmin(covered))} is in no block {about}: the last block must end "
                "where the volume ends."
            )
        if sorted(answer.tolist()) != block_starts(size, block, stride).tolist():
            return (
                f"Every voxel is covered, but not by the expected blocks {about}: begin at 0, "
                "advance by the stride, and move only the last block."
            )
    return ""


@question("the nearer the training blocks are to the test blocks, the better pure memory scores.")
def q4(order: Sequence[str]) -> str:
    """Names of four splits, ordered by the Dice that pure memory reaches on them."""
    names = ("random blocks", "alternate slices", "halves in z", "another neuron")
    if isinstance(order, str) or sorted(map(str, order)) != sorted(names):
        return f"Give a list of these four names, in your order: {', '.join(names)}."
    scores = _leaks()
    said = ", ".join(f"{name} {scores[name]:.2f}" for name in order)
    if order[-1] != "another neuron":
        return "Blocks of another neuron show nothing of the test blocks: no split flatters less."
    if list(order) != sorted(scores, key=scores.get, reverse=True):
        return f"Scores: {said}. In which split does a test block have the nearest training blocks?"
    print(said)
    return ""


def _leaks() -> dict[str, float]:
    """Dice of notebook 01's laziest learner on the synthetic data set, for each split."""

    def centres(number: int) -> tuple[np.ndarray, ...]:
        sample = blocking.read_sample(load_dataset("synthetic")[number])
        places = blocking.block_grid(sample.image.shape, stride=(1, 50, 50))
        places = places[blocking.salient(sample.mask, places)]
        images, masks = (
            np.array([blocking.read_block(volume, at)[2].ravel() for at in places])
            for volume in (sample.image, sample.mask)
        )
        return places[:, 0], images, masks

    z, images, masks = centres(0)
    _, others, other_masks = centres(1)
    known = {
        "random blocks": np.random.default_rng(0).random(len(z)) < 0.5,
        "alternate slices": z % 2 == 0,
        "halves in z": z < np.median(z),
    }
    splits = {name: (images[k], masks[k], images[~k], masks[~k]) for name, k in known.items()}
    splits["another neuron"] = (others, other_masks, images, masks)
    scores = {}
    for name, (seen, answers, asked, truth) in splits.items():
        guess = answers[cdist(asked, seen, "sqeuclidean").argmin(axis=1)]
        scores[name] = float(2 * (guess & truth).sum() / (guess.sum() + truth.sum()))
    return scores
