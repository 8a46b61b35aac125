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
# # Data blocking: from a stack and a tree to training blocks
#
# *How a volume and its SWC become targets and blocks, and which choices decide the Dice.*
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/neurite-vit-course/neurite-vit-course/blob/main/notebooks/01_data_blocking.ipynb)
# [![Open on Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/neurite-vit-course/neurite-vit-course/main?urlpath=lab/tree/notebooks/01_data_blocking.ipynb)
#
# **You will be able to**
#
# - read volumes and SWC files and see whether they belong together
# - turn a tree into a target, and say what its threshold does
# - cut a volume into blocks without copying it
# - split a data set so that no neuron is on both sides
#
# **Before this:** [00 Start here](00_start_here.ipynb).

# %% tags=["parameters"]
run_dir = "../runs/small"  # folder in which the notebooks leave their results
data = "synthetic"  # "synthetic", "bigneuron-janelia", or a folder of image/SWC pairs
test_neurons = 1  # neurons held out for the final numbers
validation_neurons = 1  # neurons held out to choose the checkpoint and its threshold
held_out = ""  # names of the test neurons, comma-separated, instead of a draw
seed = 0  # of the split
target = "sironi"  # "sironi", "scale_space" or "radius"
tau = 0.1  # threshold of the target's response

# %% tags=["bootstrap"]
import sys

if "google.colab" in sys.modules:  # in JupyterLab and on Binder there is nothing to do
    # !git clone -q --depth 1 https://github.com/neurite-vit-course/neurite-vit-course
    # %cd neurite-vit-course/notebooks
    # %pip install -q -e ..
    import site

    site.main()  # lets this running Python see the package just installed

# %%
import numpy as np

from neurolib import blocking, datasets, plotting, runs, swc

run = runs.open_run(run_dir)

# %% [markdown]
# ## A stack and a tree
#
# A *stack* is an array of intensities `(z, y, x)`: slice, row, column. Its *spacing* says how many
# micrometres lie between neighbours along each axis. An *SWC* file is a tree: one node a line, with
# its x, y, z, a radius, and the line of its parent. We keep x, y, z in voxels, voxel centres at
# whole numbers. SWC files from elsewhere may be in micrometres, start to count at one, or be
# flipped in y: the classic mistake, and one that no error message will tell you about.

# %%
pairs = datasets.load_dataset(data)
sample = datasets.read_sample(pairs[0], target, tau)
print(f"{len(pairs)} pairs; {sample.pair.name}: {sample.pair.style}, shape {sample.image.shape}")
print(f"{len(sample.tree.xyz)} nodes, {swc.length(sample.tree):.0f} voxels of neurite")

# %% [markdown]
# The same tree flipped in y: it still lies inside the image, and it is wrong. Look at it once,
# so that you know it when you meet it.

# %%
flipped = swc.transform(sample.tree, flip_y=sample.image.shape[1])
trees = {"as it is": sample.tree, "flipped in y": flipped}
figure = plotting.projections({sample.pair.name: sample.image}, trees)
alt = "Projections of the volume: the true tree follows the neurites, the flipped one does not."
plotting.show(figure, "frames", alt, run.figures)

# %% [markdown]
# A number sees it, too: the image is brighter on a tree than beside it, if the tree is its own.

# %%
for name, tree in trees.items():
    z, y, x = np.round(tree.xyz[:, ::-1]).astype(int).T
    print(f"{name}: mean intensity on the tree {sample.image[z, y, x].mean():.2f}")

# %% [markdown]
# ## The target
#
# A tree has no thickness that a network could be asked for: the radii in SWC files are rough. We
# follow Sironi et al. (2016) and ask for a *response* that falls with the distance $D$ from the
# centreline,
#
# $$ y(D) = \frac{e^{a (1 - D / d_M)} - 1}{e^{a} - 1} \quad (D < d_M), \qquad a = 6, \; d_M = 5
# \text{ voxels}, $$
#
# and call foreground what has $y \ge \tau$. The paper does not print these constants; they are
# our choice. The threshold is one, too, and it is the radius of the tube that we ask for:

# %%
taus = [0.5, 0.1, 0.05, 0.01]
for value in taus:
    print(f"threshold {value}: a tube of radius {blocking.tube_radius(value):.2f} voxels")

# %%
z = int(np.median(sample.tree.xyz[:, 2]))
masks = {f"y ≥ {value}": sample.response[z] >= value for value in taus}
figure = plotting.images({"image": sample.image[z], **masks}, bar=True)
alt = "One slice and its target at four thresholds: the lower the threshold, the wider the tubes."
plotting.show(figure, "thresholds", alt, run.figures)

# %% [markdown]
# ### Why the threshold decides the Dice
#
# Let somebody trace the same neuron again, with a hand that is one voxel off. The tree is as good as
# before, but the Dice of the two targets is not one, and it depends on the tube's radius:

# %%
shifted = swc.transform(sample.tree, origin=(-1.0, 0.0, 0.0))
response, _ = blocking.make_target(shifted, sample.image.shape, sample.spacing, "sironi")
for value in taus:
    a, b = sample.response >= value, response >= value
    print(f"threshold {value}: Dice {2 * (a & b).sum() / (a.sum() + b.sum()):.2f}")

# %% [markdown]
# A Dice of 0.5 says nothing until one knows the target. Every Dice of this course names it, and
# numbers made with different targets are never compared.
#
# ## Blocks
#
# A block is five slices of 100 × 100. Blocks lie on a grid: in y and x the last one moves inward, so
# that it ends with the volume; in z every slice is once the centre, and the outermost slices are
# repeated. No copy of the volume is made, a block is a view. Most blocks hold nothing: we train on
# the *salient* ones, whose centre slice is foreground for at least 0.1 %, and on some others.

# %%
grid = blocking.block_grid(sample.image.shape)
chosen = grid[blocking.salient(sample.mask, grid)]
print(f"{len(grid)} blocks, {len(chosen)} salient ({len(chosen) / len(grid):.0%})")
print(f"foreground: {sample.mask.mean():.2%} of the volume")

# %%
figure = plotting.blocks(sample.image, sample.mask, grid, chosen, z)
alt = "A slice with its grid of blocks; salient blocks are orange and contain the blue target."
plotting.show(figure, "blocks", alt, run.figures)

# %% [markdown]
# One block, as the network gets it, and the target of its centre slice:

# %%
position = chosen[len(chosen) // 2]
block = blocking.read_block(sample.image, position)
panels = {f"slice {i - 2:+d}": block[i] for i in range(5)}
panels["target of slice +0"] = blocking.read_block(sample.mask, position)[2]
alt = "Five slices of a block and the target of the middle one."
plotting.show(plotting.images(panels, columns=6, bar=True), "block", alt, run.figures)

# %% [markdown]
# What salient blocks leave out: training on them alone, a network never sees a dim cell body or a
# speck without a neurite beside it, and will call them neurite. That is why
# other blocks join; how many is a choice of notebook 03.
#
# ## Splits by neuron
#
# Neighbouring blocks show the same neurite, and two crops of one neuron share its brightness and
# its noise. A split by block would test on what was trained on. So whole neurons are held out; a
# part word at the end of a name (`in40_body`, `in40_tail`) marks crops of one neuron.

# %%
split = datasets.split_by_neuron(pairs, test_neurons, validation_neurons, seed, held_out)
for role, members in zip(("train", "validation", "test"), split, strict=True):
    print(f"{role}: {', '.join(pair.name for pair in members)}")

# %% [markdown]
# ## Checkpoint
#
# You now have a split with the hash of every file, so that nobody can change the data without
# the next notebooks noticing.

# %%
datasets.write_manifest(run.path("split.json"), split, seed)
run.record("target", {"kind": target, "tau": tau})
print(f"{run.path('split.json').name}: {len(pairs)} pairs, seed {seed}")

# %% [markdown]
# **Summary.** A tree became a target with a threshold that we chose; a volume became blocks that
# cost no memory; a data set was split by neuron. The paper works on 45 Janelia volumes, 38 for
# training, 3 for validation and 4 for test; which ones is not published.
#
# **Next:** [02 Weight inflation](02_weight_inflation.ipynb).
#
# **References.** Sironi et al., *Multiscale Centerline Detection*, TPAMI 2016. Manubens-Gil et al.,
# *BigNeuron: a resource to benchmark and predict performance of algorithms for automated tracing of
# neurons in light microscopy datasets*, Nature Methods 2023.
