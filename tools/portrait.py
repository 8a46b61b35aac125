"""Draw the first picture of the README: a neuron, and the tree that the shipped network finds.

    python tools/portrait.py FOLDER

FOLDER holds ``54.swc``, a gold-standard tree of BigNeuron's Janelia neurons in voxels. The shipped
network has not seen this neuron (`data/neurite.md`); its stack is rendered in confocal style.
"""

import sys

import matplotlib.pyplot as plt
import numpy as np

from neurolib import segment
from neurolib.course.plotting import ORANGE, draw_tree
from neurolib.course.runs import REPOSITORY
from neurolib.data.datasets import load_dataset
from neurolib.volume import read_volume

PICTURE = REPOSITORY / "data" / "results" / "traced.png"


def main(folder: str) -> None:
    pairs = {pair.name: pair for pair in load_dataset(f"rendered-confocal:{folder}")}
    stack = read_volume(pairs["54"].image)
    tree = segment(stack)
    seen = stack.data.max(axis=0)
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.4), layout="constrained")
    for axes in (left, right):
        axes.imshow(seen, cmap="gray", vmax=np.percentile(seen, 99.7))
        axes.axis("off")
    draw_tree(right, tree, 1, 2, ORANGE, "", 1.8)
    figure.savefig(PICTURE, dpi=80)


if __name__ == "__main__":
    main(*sys.argv[1:])
