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
# # Evaluation: whole volumes, two metrics, and how sure one can be
#
# *How good is a network on a neuron that it has never seen, and how sure can you be?*
#
# ![Projections of a test volume with voxels that were found, predicted only, and missed.](attachment:overlay.png)
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/neurite-vit-course/neurite-vit-course/blob/main/notebooks/04_evaluation.ipynb)
# [![Open on Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/neurite-vit-course/neurite-vit-course/main?urlpath=lab/tree/notebooks/04_evaluation.ipynb)
#
# **You will be able to**
#
# - predict a whole volume from overlapping blocks, and say what skipping empty ones costs
# - compute Dice and Hd95 and say when they disagree
# - take a mean that does not reward a network for finding nothing
# - put an interval beside a mean over a few neurons
#
# **Before this:** [03 Training](03_training.ipynb).
#
# **Takes** under a minute and 1.0 GB of memory on 2 cores, no GPU needed; 88 MB of weights, fetched once.

# %% jupyter={"source_hidden": true} tags=["parameters", "hide-input"]
run_dir = "../runs/small"  # folder in which the notebooks leave their results
data = "synthetic"  # "synthetic", "bigneuron-janelia", "rendered:FOLDER" of SWC files, or a folder of image/SWC pairs
overlap = 0.25  # share by which neighbouring tiles overlap in y and x
every = 1  # slices: 1 predicts all, 3 every third one, a sample of the volume
flips = False  # average the predictions of four mirrored copies: four times the time
device = "auto"  # "auto", "cpu" or "cuda"
min_size = (
    0  # voxels; smaller pieces of the prediction are dropped; 0: as chosen on validation neurons
)
filtered_too = True  # also try the filters, to compare with the network

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
import csv
from dataclasses import replace

import ipywidgets
import numpy as np
import torch
from IPython.display import Markdown, display
from scipy import ndimage, stats

from neurolib import blocking, devices, evaluation, inference, training, volume
from neurolib.course import baselines, plotting, runs, statistics, widgets
from neurolib.course.exercises import evaluation as exercises

run = runs.open_run(run_dir, "04_evaluation", globals())
target = runs.target_of(run)

# %% [markdown]
# ## A volume from blocks
#
# The network is trained. How good is it, on a neuron that it has never seen, and how sure can we be?
#
# The network predicts the centre slice of a block. Blocks are laid over every slice (laid out like this,
# a block is also called a *tile*); where they overlap, their votes are averaged,
#
# $$ p(v) = \frac{\sum_b g(v - b)\, p_b(v)}{\sum_b g(v - b)}, $$
#
# with Gaussian weights $g$ that fall off towards the border of a block, since a network knows least
# about what lies at the edge of a block. Every slice is predicted, or only some of them if `every`
# is above 1. With `flips`, $p_b$ is itself a mean over mirrored copies of the block.

# %% tags=["nbval-ignore-output"]
checkpoint = runs.checkpoint_of(run)
_, facts = training.load_checkpoint(checkpoint)
split = runs.split_of(run, data)
tests = [blocking.read_sample(pair, **target) for pair in split.test]
training.check_unseen(facts, tests, checkpoint)
smallest = {s.pair.name: min_size or inference.smallest_piece(facts, s.spacing) for s in tests}
print(f"{len(tests)} test volumes; chosen on validation neurons: threshold {facts['threshold']},")
weight = facts.get("filter_weight", 0.0)
sizes = " or ".join(map(str, sorted(set(smallest.values()))))
pieces = f"pieces of at least {sizes} voxels, " if every == 1 else ""
print(f"{pieces}filter weight {weight:g}")

# %% tags=["nbval-ignore-output"]
options = {"overlap": overlap, "device": device, "every": every, "flips": flips}
probability = {
    s.pair.name: inference.predicted(
        run.path("probability"), s.pair.name, checkpoint, s.image, **options
    )
    for s in tests
}

# %% [markdown]
# Here is the formula, written out for the middle slice. The library does the same for all of them,
# with less memory. Two additions are ours and not the paper's. First, blocks in which nothing
# stands out are skipped (more on that below), and a voxel that no block covers gets 0. Second, the
# filter that finds these blocks may support the network, with a weight $w$ that is chosen on the
# validation neurons (0: not at all):
#
# $$ \operatorname{logit} p' = \operatorname{logit} p + w \, (\min(h, 2) - 1) $$
#
# $h$ says how far a voxel stands out, in units of a level (`volume.empty_level`): the one that only 0.3 %
# of the volume's voxels reach or, if that is lower, 20 standard deviations of the background. A network
# that sees one block at a time cannot know that level, so its best threshold differs between volumes.


# %% tags=["method"]
def stack_by_hand(net, image, z, overlap, w):
    side, middle = net.settings.block, net.settings.depth // 2
    level = volume.empty_level(image)
    stride = round(side * (1 - overlap))
    window = blocking.gaussian_window((side, side))
    weights, p, h = sums = np.zeros((3, *image.shape[1:]))
    for y in blocking.block_starts(image.shape[1], side, stride):
        for x in blocking.block_starts(image.shape[2], side, stride):
            block = blocking.read_block(image, (z, y, x), (net.settings.depth, side, side))
            height = volume.standing_out(block)[middle] / level
            if height.max() <= 1:
                continue
            chance = net(torch.tensor(block)[None, None]).float().sigmoid()[0, 0].numpy()
            here = np.s_[:, y : y + side, x : x + side]
            rows, columns = sums[here].shape[1:]
            votes = window * np.stack([np.ones_like(chance), chance, height])
            sums[here] += votes[:, :rows, :columns]
    sums[1:] /= np.maximum(weights, 1e-9)
    p = np.clip(p, 1e-4, 1 - 1e-4)
    logit = np.log(p / (1 - p)) + w * (np.minimum(h, 2) - 1)
    return np.where(weights > 0, 1 / (1 + np.exp(-logit)), 0)


# %% tags=["nbval-ignore-output"]
net, _ = training.load_checkpoint(checkpoint)
sample, found = tests[0], probability[tests[0].pair.name]
if net.settings.predict == "center" and not flips:
    z = len(found) // 2 * every
    with torch.inference_mode(), devices.autocast("auto", "cpu"):
        by_hand = stack_by_hand(net, sample.image, z, overlap, weight)
    apart = np.abs(by_hand - found[z // every]).max()
    assert apart < 0.02, apart  # bfloat16 rounds to three digits, and batches round differently
    print(f"slice {z} by hand and by the library: {apart:.4f} apart at most")

# %%
figure = plotting.projections({"image": sample.image[::every], "probability": found})
alt = "Projections of a test volume and, below, of the predicted probability of neurite."
plotting.show(figure, "probability", alt, run.figures)

# %% [markdown]
# ## What five lines can do
#
# A network must beat methods that need no training. We try three filters: the image itself; a
# narrow Gaussian minus a wide one, which is bright where a thread is brighter than its
# surroundings; and Sato's ridge filter, made from second derivatives. Each has one threshold,
# chosen, like the network's, for the best mean Dice on the validation neurons. The scales are
# chosen in the same way, and so is the size below which a piece is dropped (in cubes of the shortest
# voxel edge). If `every` is above 1, all pieces are kept, the network's and the filters', because
# this size was chosen on whole volumes.

# %% tags=["nbval-ignore-output"]
held = [blocking.read_sample(pair, **target) for pair in split.validation]
known = [s.image for s in held], [s.mask for s in held], [s.spacing for s in held]
names = baselines.FILTERS if filtered_too and held else ()
filters = {name: baselines.choose(name, *known) for name in names}
display(Markdown(runs.table(baselines.describe(filters)) if filters else "none"))

# %%
keep_all = {"min_size": 1} if every > 1 else {}
tried = {name: replace(one, **keep_all) for name, one in filters.items()}
filtered = {
    s.pair.name: {name: one.mask(s.image, s.spacing)[::every] for name, one in tried.items()}
    for s in tests
}
unit = evaluation.length_unit(tests)
tests = [blocking.every_slice(s, every) for s in tests]  # compared on the predicted slices
sample = tests[0]

# %% [markdown]
# Move through the slices and look where prediction and target disagree. Is it at tips, at crossings, or
# beside the tube?

# %% tags=["nbval-ignore-output"]
z = len(sample.image) // 2
slider = ipywidgets.IntSlider(z, 0, len(sample.image) - 1, description="slice")
mask, wanted = found >= facts["threshold"], sample.mask
layers = {"both": mask & wanted, "predicted only": mask & ~wanted, "missed": wanted & ~mask}
alt = f"Slice {z} of the test volume, and what is found, false or missed; a slider selects it."


def draw(z):
    return plotting.layered(sample.image, layers, z, sample.spacing)


widgets.explore(draw, "viewer", alt, run.figures, z=slider)

# %% [markdown]
# ### Blocks that nobody needs to run
#
# Most blocks hold nothing, and the network is by far the slowest part. A cheap filter looks at
# every block first: the mean of three slices, smoothed by a Gaussian of 1.5 voxels, minus the same
# mean smoothed by one of 6 voxels. A block is skipped if, in the slice it votes for, this
# difference never exceeds the level above: its 99.7th percentile over the volume or, if that is
# less, 20 standard deviations of the background, so that dim neurites count even where bright ones
# fill much of the volume. What that costs can be counted without a network: a true voxel that no
# block covers any more is lost. The table gives the shares of blocks skipped and of true voxels
# lost for ten confocal stacks of *Drosophila* neurons (`benchmarks/skipping.py`):

# %%
with open(runs.REPOSITORY / "data" / "results" / "skipping.csv") as file:
    rows = list(csv.DictReader(file))
names = {"tiles": "blocks skipped", "foreground": "foreground lost"}
rows = [{"volume": r["volume"]} | {new: float(r[key]) for key, new in names.items()} for r in rows]
display(Markdown(runs.table(rows)))

# %% [markdown]
# Between a fifth and three quarters of the blocks are skipped, about half of them on average, and
# no stack loses more than one true voxel in a hundred. A dim neurite beside very bright ones is
# what this filter would miss first; `neurolib segment --all-tiles` runs every block.
#
# ## Two metrics
#
# $$ \mathrm{Dice} = \frac{2 |A \cap B|}{|A| + |B|}, \qquad \mathrm{Hd95} = \max\big( P_{95}(d(a,
# \partial B)), P_{95}(d(b, \partial A)) \big) $$
#
# Dice counts voxels. Hd95 takes the distances $d$ in both directions between the surfaces
# $\partial A$ and $\partial B$, and leaves out the worst twentieth ($P_{95}$ is the 95th
# percentile). It is in µm if the voxel size of every stack is known and none is 1 µm along all
# axes, as in generated stacks; otherwise it is in voxels of the finest axis. Three more numbers see
# what these two miss:
#
# - The **surface Dice** is the share of both surfaces that lies within 2 voxels of the other one. The
#   tree that notebook 01 moved by one voxel has a Dice of only 0.71, but a surface Dice of 1.
# - **clDice** compares skeletons. It is the harmonic mean of two shares: the part of the prediction's
#   skeleton that lies in the target, and the part of the target's skeleton that lies in the prediction.
#   Width hardly matters to it; a missing branch does.
# - The **Betti-0 error** is the difference in the number of connected pieces (topology calls this
#   number Betti-0). A gap of one voxel hardly changes Dice and Hd95, but it raises the Betti-0 error by
#   one, and it costs the tracer a branch. An error of 10 means ten gaps, or ten specks.
#
# Threshold and smallest piece were chosen together on validation neurons; nothing is chosen on the
# test neurons. (For scale: 18 voxels along a tube as thick as the target's hold 200 voxels.)


# %%
def score(mask, s):
    scale = evaluation.in_unit(s.spacing, unit)
    values = {"Dice": evaluation.dice(mask, s.mask), "Hd95": evaluation.hd95(mask, s.mask, scale)}
    if every == 1:  # surfaces, skeletons and pieces need every slice
        values["surface Dice"] = evaluation.surface_dice(mask, s.mask, spacing=scale)
        values["clDice"] = evaluation.cl_dice(mask, s.mask)
        values["Betti-0 error"] = evaluation.betti0_error(mask, s.mask)
    return {"style": s.pair.style, "unit": unit, **values}


# %% tags=["nbval-ignore-output"]
cut, scores, by_filter = facts["threshold"], {}, {}
for s in tests:
    name = s.pair.name
    mask = probability[name] >= cut
    scores[name] = score(evaluation.drop_small(mask, smallest[name]) if every == 1 else mask, s)
    by_filter[name] = {method: score(mask, s) for method, mask in filtered[name].items()}

# %% jupyter={"source_hidden": true} tags=["nbval-ignore-output", "hide-input"]
run.record("neurons", scores)
run.record("filters", by_filter)
run.record("chosen", {name: vars(one) for name, one in filters.items()})

# %% tags=["nbval-ignore-output"]
rows = []
for name, found_by in by_filter.items():
    for method, values in {**found_by, "network": scores[name]}.items():
        rows.append({"neuron": name, "method": method, **evaluation.name_unit(values)})
display(Markdown(runs.table(rows)))

# %% [markdown]
# Here are both, Dice in one line and Hd95 in four; the library computes the same Hd95 many times
# faster:


# %% tags=["method"]
def dice_by_hand(a, b):
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


def hd95_by_hand(a, b):
    edges = [mask & ~ndimage.binary_erosion(mask) for mask in (a, b)]
    away = [ndimage.distance_transform_edt(~edge) for edge in edges]
    there, back = away[1][edges[0]], away[0][edges[1]]
    return max(np.percentile(there, 95), np.percentile(back, 95))


wanted = sample.mask
mask = filtered[sample.pair.name].get("threshold", wanted)
mask = mask if mask.any() else wanted  # an empty mask has no surface
assert dice_by_hand(mask, wanted) == evaluation.dice(mask, wanted)
assert np.isclose(hd95_by_hand(mask, wanted), evaluation.hd95(mask, wanted))

# %%
figure = plotting.overlay(sample.image, found >= cut, sample.mask, sample.spacing)
alt = "Projections with voxels found (blue), predicted only (orange) and missed (purple)."
plotting.show(figure, "overlay", alt, run.figures)

# %% [markdown]
# Where is the network wrong? Look for four things. At the *soma* the image is bright and the target
# is a thin tube: orange around it means that the network took brightness for neurite. *Far specks*
# are orange away from the tree; each adds one to the Betti-0 error, and enough of them move Hd95.
# (The picture shows all specks; the table leaves out those below the smallest piece.) *Gaps* are
# purple on the tree, and *missing branches* are purple right to the tip.
#
# Read the network's row in the stored run. A Dice of 0.55: the shared voxels, counted twice, are
# 55 % of the sizes of the two masks added together. An Hd95 of 15.3: a twentieth of the target's
# surface lies further than that from the prediction, because whole branches are missing. (In the
# other direction, the same number is 3: little of the prediction lies far from the target.) A
# surface Dice of 0.85: most of both surfaces lie within 2 voxels of each other, so that much of
# what lowers Dice is width and not position. A Betti-0 error of 6: six pieces too many, nearly all
# of them stretches of neurite between gaps.
#
# On this generated neuron, the network beats every filter in Dice, Hd95, surface Dice and clDice. It
# does not win in the Betti-0 error: it leaves the most pieces. [06 Table 1](06_table1.ipynb) asks the same of real neurons. Never assume that a
# filter is beaten: measure it.
#
# ### Exercise 1: beat the threshold
#
# Write a function from an image in [0, 1] to a mask that beats *every* threshold on a volume of the
# embedded data set, by at least 0.05 in Dice. `ndimage.gaussian_filter` smooths, and
# `evaluation.drop_small(mask, size)` drops small pieces. Try it: the check tells you your Dice;
# change your function and run it again.


# %% tags=["exercise"]
def segment(image):
    return ...


exercises.q1(segment)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def segment(image):
#     narrow, wide = (ndimage.gaussian_filter(image, sigma) for sigma in (1, 3))
#     return evaluation.drop_small(narrow - wide > 0.15, 300)
# ```
#
# It reaches a Dice of 0.51 instead of 0.38. But its numbers were chosen on the very volume on which they
# are judged. On another one, they will probably do worse, and that is what validation neurons are for.
# </details>

# %% [markdown]
# ### One far speck
#
# Take the true mask as a prediction, and add a speck a few voxels wide in a far corner:


# %%
def speckled(side):
    mask = sample.mask.copy()
    mask[-side or len(mask) :, :side, :side] = True
    return mask


# %%
figure = plotting.overlay(sample.image, speckled(12), sample.mask, sample.spacing)
alt = "The true mask in blue and, in a far corner, an orange speck of 12 voxels a side."
plotting.show(figure, "speck", alt, run.figures)

# %% [markdown]
# The Dice falls slowly, with the speck's volume. Hd95 does not move at all until the speck's surface is
# more than a twentieth of the whole; from there on, it is the distance to the corner:

# %%
sides = list(range(0, 21, 2))
masks = [speckled(side) for side in sides]
values = {
    "Dice": [evaluation.dice(mask, sample.mask) for mask in masks],
    "Hd95, voxels": [evaluation.hd95(mask, sample.mask) for mask in masks],
}
# %%
panels = {name: {"": (sides, found)} for name, found in values.items()}
figure = plotting.curves(panels, "side of the speck, voxels")
alt = (
    "As the speck grows, Dice falls slowly; Hd95 is zero, then jumps to the distance of the corner."
)
plotting.show(figure, "disagreement", alt, run.figures)

# %% [markdown]
# The distances themselves show why. Each curve is the share of a prediction's surface within a distance
# of the true one; Hd95 is where it crosses the dashed line. Where a curve begins above the line, Hd95 is
# 0.

# %%
shares = {
    f"speck of {side}": evaluation.surface_shares(speckled(side), sample.mask) for side in (6, 18)
}
# %%
panels = {"share of the surface": shares}
figure = plotting.curves(panels, "distance, voxels", line=0.95)
alt = "Two step curves: one crosses 95 % at distance zero, the other only at the distance of the speck."
plotting.show(figure, "shares", alt, run.figures)

# %% [markdown]
# From scratch, the paper's 3D network has a Dice of 0.42 and an Hd95 of 37.9; pre-trained, it has
# 0.50 and 2.8. If pre-training removed specks far from the neuron, that would explain such numbers;
# the paper does not show whether this is the reason.
#
# ### Exercise 2: fool a metric
#
# Given a true mask, return two others: one with a Dice of 0.9 or more whose Hd95 is 20 voxels or more,
# and one with an Hd95 of 2 or less whose Dice is 0.6 or less. (The true mask is a straight neurite of 4
# × 4 × 70 voxels in a volume of 40 × 60 × 80.)


# %% tags=["exercise"]
def fool(truth):
    return ...


exercises.q2(fool)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def fool(truth):
#     specks = truth.copy()
#     specks[::13, 40::5, ::13] = True
#     return specks, ndimage.binary_dilation(truth, iterations=2)
# ```
#
# Single voxels weigh little and are all surface. A tube that is two voxels too thick all around has most
# of its voxels outside the truth, but its surface close to it.
# </details>

# %% [markdown]
# ### An empty prediction
#
# A network that finds nothing has a Dice of 0 and no surface: its Hd95 is infinite. In a mean over
# four volumes, how you treat the one that was missed decides who wins:

# %%
values = np.array([2.0, 3.0, 4.0, np.inf])
diagonal = evaluation.volume_diagonal(sample.image.shape, evaluation.in_unit(sample.spacing, unit))
print(f"miss left out: {values[:3].mean():.1f}, counted as 0: {(values[:3].sum()) / 4:.1f}")
print(f"counted as the diagonal: {statistics.aggregate(values, diagonal).mean:.1f}, one miss")

# %% [markdown]
# Leaving it out, or calling it 0 as some code does, rewards failure. Here a miss counts as the diagonal
# of its volume, the largest possible Hd95, and the number of misses is given beside the mean.
#
# ### Exercise 3: a mean with misses
#
# Given the Hd95 of each volume, infinite for a miss, and the diagonal of each volume, return the mean.


# %% tags=["exercise"]
def mean_hd95(values, diagonals):
    return ...


exercises.q3(mean_hd95)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def mean_hd95(values, diagonals):
#     return np.where(np.isinf(values), diagonals, values).mean()
# ```
#
# Volumes differ in size: each miss has its own price.
# </details>

# %% [markdown]
# ## How sure can one be with four neurons?
#
# The paper tests on four. Suppose that two methods reached the Dice below on four neurons (made up,
# with means near the paper's). The 95 % t interval of a mean is
#
# $$ \bar d \pm t_{n-1} \frac{s}{\sqrt{n}}, $$
#
# with the standard deviation $s$ of the $n$ values and $t_{n-1}$ from Student's distribution, 3.18
# for four values:

# %%
four = {"A": [0.41, 0.47, 0.53, 0.61], "B": [0.40, 0.45, 0.53, 0.58]}
groups = {name: dict(zip("1234", values, strict=True)) for name, values in four.items()}
found = {name: statistics.t_interval(values) for name, values in four.items()}
ends = {name: (interval.low, interval.high) for name, interval in found.items()}
# %%
figure = plotting.dots(groups, "Dice", ends)
alt = "Dice of two methods side by side on four neurons; the intervals of the means overlap."
plotting.show(figure, "four", alt, run.figures)

# %%
for name, interval in found.items():
    print(f"{name}: mean {interval.mean:.3f}, {interval.low:.3f} to {interval.high:.3f}, n = 4")
# %%
gain = statistics.t_interval(np.subtract(four["A"], four["B"]))
print(f"A - B: mean {gain.mean:.3f}, {gain.low:.3f} to {gain.high:.3f}")
print(f"smallest p that four neurons allow: {statistics.sign_flip_p(np.ones(4))}")

# %% [markdown]
# A bar for each mean would hide that neuron 4 is easy and neuron 1 hard for both. By their own
# intervals, the two methods cannot be told apart: each interval includes the spread of the *neurons*.
# The differences on each neuron vary less, and their interval is much shorter, but it still contains
# 0: four neurons show little. Nor can they reach p < 0.05: four differences have only 16 patterns of
# signs, and *p* is the share of patterns whose mean is at least as far from 0 as the one observed.
#
# ### Does a 95 % interval hold the truth in 95 % of all experiments?
#
# We can try it. Draw four values around a true mean of 0, compute the interval, see whether it
# contains 0, and repeat. Another common interval, the percentile bootstrap, draws again and again
# from the four values, with replacement, and takes the middle 95 % of the means:

# %%
experiments = np.random.default_rng(0).normal(size=(4000, 4))
draws = np.random.default_rng(1).integers(4, size=(1000, 4))
ends = np.percentile(experiments[:, draws].mean(axis=2), [2.5, 97.5], axis=1)
print(f"percentile bootstrap: {np.mean((ends[0] < 0) & (ends[1] > 0)):.0%}")
half = stats.t.ppf(0.975, 3) * experiments.std(axis=1, ddof=1) / np.sqrt(4)
print(f"t interval: {np.mean(np.abs(experiments.mean(axis=1)) < half):.0%}")

# %% [markdown]
# From four values, a bootstrap sees too little of the spread: in the experiments, its "95 %" interval
# holds the truth in only 80 % of cases. The t interval is wider, and right. It, too, fails if the
# values are far from normal, and four values cannot show whether they are. So we show every neuron.
#
# ### Exercise 4: the interval of a gain
#
# Write a function that takes the scores of two methods on the same n neurons and returns the low
# and the high end of the 95 % t interval of the first method's mean gain over the second.
# `stats.t.ppf(0.975, n - 1)` is $t_{n-1}$.


# %% tags=["exercise"]
def interval(a, b):
    return ...


exercises.q4(interval)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def interval(a, b):
#     gain = a - b
#     half = stats.t.ppf(0.975, len(gain) - 1) * gain.std(ddof=1) / np.sqrt(len(gain))
#     return gain.mean() - half, gain.mean() + half
# ```
#
# `statistics.t_interval` does this; given several seeds per neuron, it includes their spread, too.
# </details>

# %% [markdown]
# Notebook 06 does just this: it measures all methods on the same neurons and puts an interval on the
# differences.
#
# ## Checkpoint
#
# You now have a probability for every voxel of the test neurons, and you know what each of their
# scores hides.
#
# **Summary.** The paper reports a Dice of 0.4174 and an Hd95 of 37.9 from scratch, and 0.5045 and
# 2.81 with center inflation, on four neurons. Our numbers are above, beside what three filters
# reach on the same volume: a score means little until you know what a filter scores. Real neurons,
# and the comparison of initialisations, are in [06 Table 1](06_table1.ipynb).
#
# **Next:** [05 SWC tracing](05_swc_tracing.ipynb).
#
# **References.** Shit et al., *clDice*, CVPR 2021. Nikolov et al., *Deep learning to achieve
# clinically applicable segmentation*, 2018 (surface Dice). Maier-Hein et al., *Metrics Reloaded*, Nature
# Methods 2024. Student, *The probable error of a mean*, Biometrika 1908. Efron and Tibshirani, *An
# Introduction to the Bootstrap*, 1993.
