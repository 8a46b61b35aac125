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
# *How do a stack of images and a hand-traced tree become something that a network can learn from?*
#
# ![A slice of a volume, and beside it the target at four thresholds, from too thin to too wide.](attachment:thresholds.png)
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
#
# **Takes** under a minute and 0.3 GB of memory on 2 cores, no GPU needed; nothing to download.

# %% jupyter={"source_hidden": true} tags=["parameters", "hide-input"]
run_dir = "../runs/small"  # folder in which the notebooks leave their results
data = (
    "synthetic"  # "synthetic", "bigneuron-janelia", "rendered:FOLDER" of trees, a folder of pairs
)
test_neurons = 1  # neurons held out for the final numbers
train_neurons = 0  # neurons to train on; 0: all that are left
validation_neurons = 1  # neurons held out to choose the checkpoint and its threshold
held_out = ""  # names of the test neurons, comma-separated; empty: drawn at random
validate_on = ""  # names of the validation neurons, comma-separated; empty: drawn
seed = 0  # of the split
target = "sironi"  # or "scale_space", its other name; or "radius"
tau = 0.1  # threshold on the target's response
gold = ""  # folder of gold-standard SWC files, to compare the synthetic trees with
stacks = ""  # folder of real image/SWC pairs, to compare the synthetic stacks with
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
from pathlib import Path

import ipywidgets
import numpy as np
import tifffile
from IPython.display import Markdown, display
from scipy.spatial.distance import cdist

from neurolib import blocking, swc
from neurolib.course import plotting, runs, widgets
from neurolib.data import datasets, inspection, synthesis
from neurolib.course.exercises import blocking as exercises
from neurolib.volume import Volume

run = runs.open_run(run_dir, "01_data_blocking", globals())

# %% [markdown]
# ## A stack and a tree
#
# What exactly should the network learn, and from which pieces of which volumes? This notebook answers
# with arrays. Much of the final score is decided here, before any network is trained.
#
# A *stack* is an array of intensities `(z, y, x)`: slice, row, column. Its *spacing* says how many
# micrometres lie between neighbouring voxels along each axis. An *SWC* file holds a tree, with one *node*
# per line: its number, its type, x, y and z, a radius, and the number of its parent. A node without a
# parent is a *root*, one without children a *tip*, and one with several children a *branch point*. We
# keep x, y and z in voxels, with voxel centres at whole numbers. SWC files from elsewhere may be in
# micrometres, may count from one, or may be flipped in y. These are the classic mistakes, and no error
# message will tell you about them.

# %%
pairs = datasets.load_dataset(data, channel, spacing)
sample = blocking.read_sample(pairs[0], target, tau)
print(f"{len(pairs)} pairs; {sample.pair.name}: {sample.pair.style}, shape {sample.image.shape}")
print(f"{len(sample.tree.xyz)} nodes, {swc.length(sample.tree):.0f} voxels of neurite")

# %% [markdown]
# Here is the same tree flipped in y. It still lies inside the image, but it is wrong. Take a good look,
# so that you recognise this mistake when you meet it.

# %%
flipped = swc.transform(sample.tree, flip_y=sample.image.shape[1])
trees = {"original": sample.tree, "flipped in y": flipped}
figure = plotting.projections({sample.pair.name: sample.image}, trees)
alt = "Projections of the volume: the true tree follows the neurites, the flipped one does not."
plotting.show(figure, "frames", alt, run.figures)

# %% [markdown]
# A number shows this, too: if the tree belongs to the image, the image is brighter on the tree than
# on average. `swc.fit` measures this contrast. It also tries other coordinate frames, and names one that
# fits clearly better.

# %%
volume = Volume(sample.image, sample.spacing)
for name, tree in trees.items():
    found = swc.fit(tree, volume)
    print(f"{name}: contrast {found.contrast:.1f}, {found.hint or 'no other frame fits better'}")

# %% [markdown]
# The command `neurolib inspect cell.tif cell.swc` tells you the same about your own files, and what is in
# them:

# %% tags=["nbval-ignore-output"]
for text in inspection.inspect_files([sample.pair.image, sample.pair.swc]):
    print(text.replace(str(sample.pair.image.parent), "..."))

# %% [markdown]
# ### Exercise 1: micrometres
#
# Suppose that an SWC file from another program is in micrometres. Write the function that converts its
# points `(n, 3)`, each x, y, z, into voxels, for a spacing (dz, dy, dx) in µm.


# %% tags=["exercise"]
def to_voxels(points, spacing):
    return ...


exercises.q1(to_voxels)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def to_voxels(points, spacing):
#     return points / np.array(spacing)[::-1]
# ```
#
# Points are (x, y, z) and spacings (dz, dy, dx): one of the two has to be reversed. `swc.transform` does
# this; it also subtracts an origin and mirrors y if you ask it to.
# </details>

# %% [markdown]
# ## The target
#
# We cannot ask a network for the thickness of a neurite, because the radii in SWC files are only rough.
# We follow Sironi et al. (2016) and ask for a *response* that falls with the distance $D$ from the
# centreline,
#
# $$ y(D) = \frac{e^{a (1 - D / d_M)} - 1}{e^{a} - 1} \quad (D < d_M), \qquad a = 6, \; d_M = 5
# \text{ voxels}, $$
#
# and is 0 farther away. We call a voxel *foreground* where $y \ge \tau$. The paper does not print these
# constants; they are our choice. The resulting tube is equally wide everywhere. So most of the soma, the
# brightest part of the image, is background, and a network has to learn that brightness is not enough.
#
# The paper speaks of a *scale-space* distance transform. There the response has a fourth coordinate, the
# radius $r$. The distance of a voxel $x$ from a point $c$ of the centreline with radius $r_c$ is then
# given by $D^2 = \lVert x - c \rVert^2 + (r - r_c)^2$, and the target is the largest response over all
# $r$. It is reached at $r = r_c$, where the second term vanishes and $D$ is the distance in space. So
# `"sironi"` and `"scale_space"` are two names for one target.
#
# The threshold is our choice, too, and it sets the radius of the tube that we ask for:

# %%
taus = [0.5, 0.1, 0.05, 0.01]
for value in taus:
    print(f"threshold {value}: a tube of radius {blocking.tube_radius(value):.2f} voxels")

# %% [markdown]
# ### Exercise 2: a tube of your own
#
# Now the other way round: which threshold gives a tube of a given radius in voxels?


# %% tags=["exercise"]
def threshold(radius):
    return ...


exercises.q2(threshold)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def threshold(radius):
#     return (np.exp(6 * (1 - radius / 5)) - 1) / (np.exp(6) - 1)
# ```
#
# The tube ends where y(D) equals the threshold: at D = radius.
# </details>

# %%
z = int(np.median(sample.tree.xyz[:, 2]))
masks = {f"y ≥ {value}": sample.response[z] >= value for value in taus}
figure = plotting.images({"image": sample.image[z], **masks}, bar=True)
alt = "One slice and its target at four thresholds: the lower the threshold, the wider the tubes."
plotting.show(figure, "thresholds", alt, run.figures)

# %% [markdown]
# Move through the stack; the target of this course is laid over it.

# %% tags=["nbval-ignore-output"]
slider = ipywidgets.IntSlider(z, 0, len(sample.image) - 1, description="slice")
alt = f"Slice {z} of the volume, alone and with the target laid over it; a slider moves through z."


def draw(z):
    return plotting.layered(sample.image, {"target": sample.mask}, z, sample.spacing)


widgets.explore(draw, "viewer", alt, run.figures, z=slider)

# %% [markdown]
# ### Why the threshold decides the Dice
#
# Suppose that somebody traces the same neuron again and is one voxel off in x. This tree is as good as
# the first one, but the Dice of the two targets is not 1, and it depends on the radius of the tube:

# %%
shifted = swc.transform(sample.tree, origin=(-1.0, 0.0, 0.0))
response, _ = blocking.make_target(shifted, sample.image.shape, sample.spacing, "sironi")
for value in taus:
    a, b = sample.response >= value, response >= value
    print(f"threshold {value}: Dice {2 * (a & b).sum() / (a.sum() + b.sum()):.2f}")

# %% [markdown]
# The wider the tube, the less one voxel costs. So a Dice of 0.5 says nothing until you know the target.
# The threshold of this course is 0.1 unless stated otherwise, and we never compare numbers that come from
# different targets.
#
# ## Blocks
#
# A block is five slices of 100 × 100 voxels. Blocks lie on a grid. In y and x, the last one is moved
# inward, so that it ends where the volume ends; in z, every slice is the centre of its own blocks, and
# the outermost slices are repeated. Inside the volume, a block is a view, not a copy. Most blocks are
# empty. We train on the *salient* ones, in whose centre slice at least 0.1 % of the voxels are
# foreground, and on some others.

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
# Here is one block, as the network gets it, and the target of its centre slice:

# %%
position = chosen[len(chosen) // 2]
block = blocking.read_block(sample.image, position)
panels = {f"slice {i - 2:+d}": block[i] for i in range(5)}
panels["target of slice +0"] = blocking.read_block(sample.mask, position)[2]
alt = "Five slices of a block and the target of the middle one."
plotting.show(plotting.images(panels, columns=6, bar=True), "block", alt, run.figures)

# %% [markdown]
# ### Exercise 3: the last block
#
# An axis has 250 voxels, a block has 100, and the stride is 100: where do the blocks begin? Write a
# function for any size, block and stride. Every voxel must be in a block, and no block may extend beyond
# the volume.


# %% tags=["exercise"]
def starts(size, block, stride):
    return ...


exercises.q3(starts)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def starts(size, block, stride):
#     return [*range(0, size - block, stride), size - block]
# ```
#
# The last block ends where the volume ends, wherever the stride would have put it; `range` stops before
# that start, so that it appears only once.
# </details>

# %% [markdown]
# ### What salient blocks leave out
#
# A network trained on salient blocks alone never sees what lies elsewhere. We count the voxels that are
# as bright as the neurite but farther from it than the target reaches, and ask whether the centre slice
# of a salient block shows them:


# %%
def distractors(sample):
    bright = sample.image > np.median(sample.image[sample.mask])
    shown = np.zeros(sample.image.shape, bool)
    places = blocking.block_grid(shown.shape)
    for z, y, x in places[blocking.salient(sample.mask, places)]:
        shown[z, y : y + 100, x : x + 100] = True
    false = bright & (sample.response == 0)
    return (false & shown).sum(), (false & ~shown).sum()


for pair in pairs[:6]:
    shown, hidden = distractors(blocking.read_sample(pair, target, tau))
    print(f"{pair.name}: {shown} shown, {hidden} never shown")

# %% [markdown]
# Here, what is never shown is noise and specks; in real stacks it is other cells, and there can be far
# more of them. Nothing tells the network that they are not neurites. That is why we add other blocks;
# notebook 03 chooses how many.
#
# ## Splits by neuron
#
# Neighbouring blocks show the same neurite, so a split by block tests a network on what it was trained
# on. The laziest possible learner shows how flattering that can be. It remembers its training blocks.
# When it is asked about a block, it answers with the target of the training block that looks most like
# it. It is a straw man, and meant as one: it has understood nothing, so whatever it scores has leaked. It
# does not tell us how much a network would leak.


# %%
def centres(sample, most=400):
    places = blocking.block_grid(sample.image.shape, stride=(1, 50, 50))
    places = places[blocking.salient(sample.mask, places)]
    places = places[:: -(-len(places) // most)]
    return [
        np.array([blocking.read_block(volume, at)[2].ravel() for at in places])
        for volume in (sample.image, sample.mask)
    ]


other = next(pair for pair in pairs if pair.neuron != pairs[0].neuron)
images, masks = centres(sample)
other_images, other_masks = centres(blocking.read_sample(other, target, tau))


# %%
def dice_of_memory(known, answers, asked, truth):
    guess = answers[cdist(asked, known, "sqeuclidean").argmin(axis=1)]
    return 2 * (guess & truth).sum() / (guess.sum() + truth.sum())


half = np.random.default_rng(seed).random(len(images)) < 0.5
leaked = dice_of_memory(images[half], masks[half], images[~half], masks[~half])
honest = dice_of_memory(other_images, other_masks, images[~half], masks[~half])
print(f"split by block: Dice {leaked:.2f}; split by neuron: Dice {honest:.2f}")

# %% [markdown]
# The test blocks are the same, and so is the learner; only what it was allowed to remember differs.
#
# ### Exercise 4: break the split
#
# Predict first: with which split does this learner score highest, and with which lowest? Put the four
# names in order, the highest score first; the check then runs all four on the embedded data set. With
# `"random blocks"`, the learner remembers half of the blocks of one neuron, drawn at random; with
# `"alternate slices"`, the blocks of every other slice; with `"halves in z"`, the first half of the
# slices; with `"another neuron"`, the blocks of another neuron.

# %% tags=["exercise"]
order = ...

exercises.q4(order)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# order = ["alternate slices", "random blocks", "halves in z", "another neuron"]
# ```
#
# With alternate slices, every test block has a training block one slice away, which looks nearly the
# same. With random blocks, some have none. Halves in z leak only at the plane between them. Change
# `< 0.5` in the cell above to `< 0.9` and run it again: the more the learner remembers, the higher its
# leaked score, while the honest one stays where it is.
# </details>

# %% [markdown]
# So we hold out whole neurons. Two crops count as one neuron if their names differ only in a final word
# for the part (`in40_body`, `in40_tail`), or if a file `neurons.csv` says so.

# %%
named = {"held_out": held_out, "validate_on": validate_on, "train": train_neurons}
split = datasets.split_by_neuron(pairs, test_neurons, validation_neurons, seed, **named)
for role, members in zip(("train", "validation", "test"), split, strict=True):
    print(f"{role}: {', '.join(pair.name for pair in members)}")

# %% [markdown]
# ## Checkpoint
#
# You now have a split with the hash of every file, so that nobody can change the data without the
# following notebooks noticing.

# %% jupyter={"source_hidden": true} tags=["hide-input"]
datasets.write_manifest(run.path("split.json"), split, seed)
run.record("target", {"kind": target, "tau": tau})
print(f"{run.path('split.json').name}: {len(pairs)} pairs, seed {seed}")

# %% [markdown]
# ## Appendix: how real is the synthetic data?
#
# The trees and stacks of the embedded data set are generated; a result on them says what works, not how
# well it works on your microscope's images. Each row compares one statistic with that of real neurons:
# trees with 32 gold-standard SWCs of BigNeuron (trees on which several people agreed), stacks with six
# confocal stacks of *Drosophila* neurons (ranges recorded in `neurolib.data.synthesis`, or measured now
# if the parameters `gold` and `stacks` name folders). `axis`, `near` and `far` are percentiles of the
# intensity on the neurite, 2 to 6 voxels from it, and beyond 10. `foreground` is the share of voxels
# within 2 voxels of the tree, and `contrast` is their mean brightness divided by that of voxels far from
# it (not the contrast of `swc.fit`); `dice` is the best Dice that a threshold alone can reach.

# %%
generated = datasets.load_dataset("synthetic")
real = datasets.measure(gold) if gold else []
for row in datasets.measure(stacks) if stacks else []:
    # Only the stacks of these pairs: somebody else traced their trees.
    real.append({key: row[key] for key in synthesis.REAL_RANGES})
rows = synthesis.calibration(datasets.measure(generated), real)
display(Markdown(runs.table(rows)))

# %% [markdown]
# Read the last column: these stacks are easier than real ones. A threshold reaches a higher Dice than it
# does in real stacks, and the dimmest stretches of neurite are brighter. Every result of this course
# therefore names the style of its data: *synthetic*, *rendered from gold* (a real tree, its stack
# rendered: `data="rendered:FOLDER"`), or *real*.
#
# If `gold` names a folder, the picture shows a stack that was rendered from a real tree; if `stacks`
# does, a real stack; if neither does, a generated one:

# %%
found = datasets.load_dataset(f"rendered:{gold}")[:1] if gold else []
found += datasets.load_dataset(stacks)[:1] if stacks else []
for pair in found or generated[1:2]:
    shown = blocking.read_sample(pair)
    figure = plotting.projections({f"{pair.name}, {pair.style}": shown.image})
    alt = f"Projections of {pair.name}, {pair.style}."
    plotting.show(figure, f"style-{pair.name}", alt, run.figures)

# %%
projection = Path(gold) / f"{found[0].name}.mip.tif" if gold else Path()
if projection.is_file():
    rendered = blocking.read_sample(found[0]).image.max(axis=0)
    panels = {"real projection": tifffile.imread(projection), "rendered (cropped)": rendered}
    alt = "The real maximum projection of a neuron, and that of the stack rendered from its tree."
    plotting.show(plotting.images(panels, columns=2, bar=True), "rendered", alt, run.figures)

# %% [markdown]
# **Summary.** A tree became a target with a threshold that we chose; a volume became blocks that cost
# hardly any memory; a data set was split by neuron. The paper uses 45 Janelia volumes, 38 for training, 3
# for validation and 4 for testing; it does not say which ones.
#
# **Next:** [02 Weight inflation](02_weight_inflation.ipynb).
#
# **References.** Sironi et al., *Multiscale Centerline Detection*, TPAMI 2016. Manubens-Gil et al.,
# *BigNeuron: a resource to benchmark and predict performance of algorithms for automated tracing of
# neurons in light microscopy datasets*, Nature Methods 2023.
