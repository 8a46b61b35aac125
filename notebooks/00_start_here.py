# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Start here: neurons, transformers, and this course
#
# *What must a computer learn to find a neuron in a stack of images, and is your machine ready to try?*
#
# ![A block of five slices, an inflated kernel, a probability map, and a traced tree, joined by arrows.](attachment:pipeline.png)
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/neurite-vit-course/neurite-vit-course/blob/main/notebooks/00_start_here.ipynb)
# [![Open on Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/neurite-vit-course/neurite-vit-course/main?urlpath=lab/tree/notebooks/00_start_here.ipynb)
#
# **You will be able to**
#
# - say what the paper claims and what the course checks
# - tell whether this machine can run the course
# - say what a block is, and why nobody here counts correct voxels
# - find the notebook that you need
#
# **Before this:** nothing but some Python.
#
# **Takes** under a minute and 0.7 GB of memory on 2 cores, no GPU needed; 88 MB of weights, fetched once.

# %% jupyter={"source_hidden": true} tags=["parameters", "hide-input"]
run_dir = "../runs/small"  # folder in which this and the following notebooks leave their results
data = "synthetic"  # "synthetic", "bigneuron-janelia", "rendered:FOLDER" of SWC files, or a folder of image/SWC pairs
channel = -1  # the channel of multi-channel images, counted from 0; -1: they have only one
spacing = ""  # edge lengths of a voxel, Z,Y,X in µm; empty: as the images say

# %% jupyter={"source_hidden": true} tags=["bootstrap", "hide-input"]
import os
import sys
from pathlib import Path

if "google.colab" in sys.modules and not Path("../neurolib").is_dir():  # on Colab, and once
    clone = "neurite-vit-course/notebooks"  # here or further up
    os.chdir(next((folder for folder in Path.cwd().parents if (folder / clone).is_dir()), "."))
    # !test -d {clone} || git clone -q --depth 1 https://github.com/neurite-vit-course/neurite-vit-course
    os.chdir(clone)
    # %pip install -q -e ..
    import site

    site.main()  # lets this running Python see the package just installed

# %% jupyter={"source_hidden": true} tags=["hide-input"]
import numpy as np

from neurolib import blocking, inference, tracing, training
from neurolib.course import plotting, runs
from neurolib.course.exercises import start_here as exercises
from neurolib.course.cli import check_environment
from neurolib.data.datasets import load_dataset

run = runs.open_run(run_dir, "00_start_here", globals())

# %% [markdown]
# ## The question
#
# Under a light microscope, a neuron is a tree of thin threads, *neurites*. They are a few *voxels* wide
# (a voxel is the pixel of a volume) and fill a few thousandths of the volume. Can a computer learn to
# find them from a handful of examples? Below is one of the volumes of this course (a generated one,
# unless you change `data`) in three maximum projections, each of which keeps the brightest voxel along
# one axis, and the tree that we want to find in it. Such trees are stored in *SWC* files.

# %%
sample = blocking.read_sample(load_dataset(data, channel, spacing)[0])
figure = plotting.projections({sample.pair.name: sample.image}, {"reference tree": sample.tree})
alt = "Three maximum projections of a volume; the reference tree follows its bright threads."
plotting.show(figure, "neuron", alt, run.figures)

# %% [markdown]
# The bright ball at the root of the tree is the cell body, the *soma*. No part of the image is brighter,
# and yet most of the soma is *not* what we are looking for: the target is a tube of constant width along
# the tree, through the soma as well. A threshold on brightness finds the soma and the specks along with
# the neurites.
#
# Few volumes come with a tree that somebody has traced by hand, far fewer than a deep network needs. The
# paper *Boosting 3D Neuron Segmentation with 2D Vision Transformer Pre-trained on Natural Images* (Cheng
# et al.) therefore borrows. It takes a vision transformer that has learnt from unlabelled photographs (a
# million for DINO, Caron et al. 2021; 142 million for DINOv2, which this course uses) and *inflates* the
# one layer that touches the pixels, the *patch embedding*: its 2D kernels are spread over several slices,
# so that the transformer reads small stacks. These are the paper's results:
#
# | network | pre-trained | transfer | Dice | Hd95 |
# |---|---|---|---|---|
# | 2D ViT | no | | 0.4469 | 7.649 |
# | 2D ViT | yes | | 0.4876 | 2.893 |
# | 3D ViT | no | | 0.4174 | 37.943 |
# | 3D ViT | yes | average | 0.4942 | 2.863 |
# | 3D ViT | yes | center | 0.5045 | 2.810 |
#
# *Transfer* says how a 2D kernel is spread: in equal parts (`average`) or into the middle slice alone
# (`center`). *Dice* says how much a predicted mask and the true one overlap (1 is perfect). *Hd95* is how
# far apart the two surfaces are, in voxels, leaving out the worst twentieth. The paper tests on four
# neurons and reports one number for all of them. We repeat the experiment, put intervals beside the
# numbers, and say where the gain holds and where it does not.
#
# ## Is this machine ready?

# %% tags=["nbval-ignore-output"]
problems = check_environment()
print("ready" if not problems else "\n".join(problems))

# %% [markdown]
# ## The course in one picture
#
# Here are the stages of the course for a piece of the volume above: the five slices of a *block*; one
# kernel of the inflated patch embedding, which sees the middle slice alone (the paper's `center`); the
# probability of neurite, predicted by the network that comes with the course (it was trained on images
# rendered from the trees of real neurons); and the tree traced through this probability, here in several
# pieces. Nothing is drawn by hand.

# %%
network, facts = training.load_checkpoint(runs.REPOSITORY / "data/neurite.safetensors")
depth, size = network.settings.depth, network.settings.block
grid = blocking.block_grid(sample.image.shape, (depth, size, size))
foreground = [blocking.read_block(sample.mask, at, (17, size, size)).sum() for at in grid]
place = grid[int(np.argmax(foreground))]
piece = blocking.read_block(sample.image, place, (17, size, size))

# %% tags=["nbval-ignore-output"]
options = {"overlap": 0.0, "filter_weight": facts["filter_weight"], "progress": False}
probability = inference.predict_volume(network, piece, **options)
tree = tracing.attempt(probability, threshold=facts["threshold"], min_size=50)
print(f"{len(tree.xyz)} nodes")

# %%
kernels = network.encoder.patch_embed.proj.weight.detach().numpy()
strongest = kernels[np.abs(kernels).sum((1, 2, 3)).argmax()]
middle = len(piece) // 2
block = piece[middle - depth // 2 : middle + depth // 2 + 1]
figure = plotting.pipeline(block, strongest, probability.max(axis=0), tree)
alt = "Four stages: a stack of five slices, a stack of kernels, a probability map, a traced tree."
plotting.show(figure, "pipeline", alt, run.figures)

# %% [markdown]
# ## The notebooks
#
# | notebook | from | to |
# |---|---|---|
# | [01 Data blocking](01_data_blocking.ipynb) | volume and SWC | target, blocks, a split by neuron |
# | [02 Weight inflation](02_weight_inflation.ipynb) | 2D weights | a 3D patch embedding |
# | [03 Training](03_training.ipynb) | blocks | a checkpoint |
# | [04 Evaluation](04_evaluation.ipynb) | checkpoint | predicted volumes, Dice, Hd95 |
# | [05 SWC tracing](05_swc_tracing.ipynb) | predicted volumes | trees, ESA, DSA, PDS |
# | [06 Table 1](06_table1.ipynb) | many runs | the paper's table, with intervals |
#
# A checkpoint is a file of trained weights; ESA, DSA and PDS say how far apart two trees are. Two terms
# come up often: the *stored run* is the one whose outputs you see before you run a cell yourself, and the
# *embedded data set* is the six generated neurons that come with the course (`synthetic`). Work through
# the notebooks in this order, or start anywhere: a notebook that lacks the result of the one before makes
# a small one for itself. To run all of them on your own volumes, put images and SWC files with the same
# names into a folder and call `make course DATA=folder`.
#
#
# ## Two small exercises
#
# In every exercise, you put your answer in place of the dots and run the cell. It tells you that your
# answer is right, or what is wrong with it. The solution is folded below the cell.
#
# ### Exercise 1: how little there is to find
#
# A tree is `length` voxels long, its neurites have the given `radius`, and the volume has the `shape`
# `(z, y, x)`. What share of the volume is neurite? Make a guess first, and then compare: what does your
# function say about the volume above, whose tree is 298 voxels long, for a radius of 1.9 voxels?


# %% tags=["exercise"]
def share(length, radius, shape):
    return ...


exercises.q1(share)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def share(length, radius, shape):
#     return length * np.pi * radius**2 / np.prod(shape)
# ```
#
# Two voxels in a thousand. In the mask that you meet in the next notebook, it is 1.8 in a thousand: where
# branches meet, tubes overlap.
# </details>

# %% [markdown]
# ### Exercise 2: a network that finds nothing
#
# Suppose that a network answers "no neurite" everywhere. What share of the voxels does it get right?
# `mask` is a Boolean array, True in the neurite.


# %% tags=["exercise"]
def accuracy(mask):
    return ...


exercises.q2(accuracy)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def accuracy(mask):
#     return (~mask).mean()
# ```
#
# For the volume above, that is more than 99 %, and yet the network's Dice is 0.
# </details>

# %% [markdown]
# ## Checkpoint
#
# You have a machine that can run the course, and you have seen all its stages once.
#
# **Next:** [01 Data blocking](01_data_blocking.ipynb), where a volume and a tree become something
# that a network can learn from.
#
# **References.** Cheng, Zhao, Wang, Peng, Cai, *Boosting 3D Neuron Segmentation with 2D Vision
# Transformer Pre-trained on Natural Images*. Caron et al., *Emerging Properties in Self-Supervised
# Vision Transformers*, ICCV 2021. Zhang et al., *Adapting Pre-trained Vision Transformers from 2D
# to 3D through Weight Inflation Improves Medical Image Segmentation*, 2022.
