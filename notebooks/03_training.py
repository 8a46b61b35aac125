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
# # Training: from blocks to a checkpoint
#
# *How does a network learn what a neurite is, and how do you know when it has learnt enough?*
#
# ![The network: an inflated patch embedding, twelve transformer layers with four taps, a decoder, and a stem beside them.](attachment:network.png)
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/neurite-vit-course/neurite-vit-course/blob/main/notebooks/03_training.ipynb)
# [![Open on Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/neurite-vit-course/neurite-vit-course/main?urlpath=lab/tree/notebooks/03_training.ipynb)
#
# **You will be able to**
#
# - say what each term of a loss asks for, and which answers would satisfy it
# - set the learning rate of every layer and every step
# - train the network on two cores or on a GPU, and resume a run that was stopped
# - read a learning curve without being fooled by the training loss
#
# **Before this:** [02 Weight inflation](02_weight_inflation.ipynb).
#
# **Takes** 3 minutes and 1.6 GB of memory on 2 cores, no GPU needed; 88 MB of weights, fetched once.

# %% jupyter={"source_hidden": true} tags=["parameters", "hide-input"]
# Training data, and where results go
run_dir = "../runs/small"  # folder in which the notebooks leave their results
data = "synthetic"  # "synthetic", "bigneuron-janelia", "rendered:FOLDER" of SWC files, or a folder of image/SWC pairs
# The network
encoder = (
    "vit_small_patch14_dinov2.lvd142m"  # timm name of the 2D encoder, or "monai_unet", the peer
)
weights_file = ""  # your own file of 2D weights; empty: cache, model hub, package index
initialisation = "center"  # "center", "average", "gaussian", "random" or "scratch"
start_from = ""  # a checkpoint to continue from, or "shipped"; empty: the initialisation
depth = 5  # slices of a block; 1 is the 2D network
size = 224  # rows and columns that the encoder sees
predict = "center"  # slices that a block predicts: "center" or "all"
stem = True  # small U-Net at full resolution: ours, not the paper's
contrast = True  # local contrast instead of brightness: ours, not the paper's
fused = True  # a filter may support the network (see 04): ours, not the paper's
# Training
frozen = True  # train decoder and stem only; False trains the encoder, too, as the paper does
steps = 200  # of the optimiser
batch = 4  # blocks per pass
seed = 0  # for everything random
encoder_rate = 1e-4  # peak learning rate at the top of the encoder
decoder_rate = 1e-3  # peak learning rate of decoder and stem
layer_decay = 0.75  # rate of each encoder layer relative to the one above it; 1 for equal rates
loss = "dice+focal"  # or "dice+ce", "dice+ce+skeleton", "dice+ce+cldice"
negatives = 1.0  # other blocks, with little or no foreground, per salient block
ignore_untraced = False  # for partly traced trees: ignore bright voxels far from the tree
# For small devices
accumulate = 1  # passes per step: many blocks per step on a small device
checkpointing = False  # less memory, a third slower
device = "auto"  # "auto", "cpu" or "cuda"
precision = "auto"  # bfloat16 where the hardware has it, else "32-true"
# Validation
validate_every = 25  # steps
validation_blocks = 32  # per validation volume
patience = 0  # stop after this many validations without improvement; 0: never

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
from dataclasses import replace
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from IPython.display import Markdown, display
from safetensors.torch import load_file

from neurolib import blocking, inference, network, training, weights
from neurolib.course import plotting, runs, widgets
from neurolib.course.exercises import training as exercises

run = runs.open_run(run_dir, "03_training", globals())
target = runs.target_of(run)

# %% [markdown]
# ## Blocks of a step
#
# How does a network that knows photographs learn to see neurites, in two hundred steps? It starts
# with what it is shown. Training blocks come only from the training neurons. Here the grid is finer
# than in notebook 01, with a block every 50 voxels. From it, we take all the salient blocks and, for
# each of them, `negatives` others, with little or no foreground, so that the network also meets things
# that are bright but not neurite (*What salient blocks leave out*, in notebook 01). Each block is changed at
# random, as if another microscope had taken it (*augmentation*): flipped and turned, zoomed by 0.8 to
# 1.25 (three blocks in ten), made brighter or darker (gamma 0.7 to 1.5), noisier (standard deviation
# up to 0.05), and robbed of a slice (one block in ten). Block and target move together.

# %%
split = runs.split_of(run, data)
train = [blocking.read_sample(pair, **target) for pair in split.train]
validation = [blocking.read_sample(pair, **target) for pair in split.validation]
print(f"{len(train)} training volumes, {len(validation)} for validation")

# %%
if ignore_untraced:
    train = [blocking.ignore_untraced(sample) for sample in train]

# %% [markdown]
# ### Brightness or contrast
#
# A neurite need not be bright, only brighter than its surroundings. With `contrast`, the encoder
# sees by how much: each voxel minus the mean around it, divided by the typical deviation from that
# mean. Differences in exposure and uneven background disappear: the same number means the same
# prominence everywhere. The price: where there is nothing else, noise is amplified. The paper shows
# the network brightness; contrast is our addition.

# %%
volume, half = train[0], depth // 2
middle = len(volume.image) // 2
slices = torch.from_numpy(volume.image[None, middle - half : middle + half + 1])
panels = {"brightness": slices[0, half], "contrast": network.local_contrast(slices)[0, half]}
panels["target"] = volume.mask[middle]
alt = "A slice as the microscope saw it, its local contrast, and the target."
plotting.show(plotting.images(panels, columns=3), "contrast", alt, run.figures)

# %%
source = training.BlockSource(train, depth, negatives=negatives, seed=seed)
print(f"{len(source)} blocks")
blocks, responses = source.batch(0, 4)
changed, moved = training.augment(blocks, responses, torch.Generator().manual_seed(seed))
panels = {f"block {i}": blocks[i, 0, depth // 2] for i in range(4)}
panels |= {f"augmented {i}": changed[i, 0, depth // 2] for i in range(4)}
panels |= {f"its target {i}": moved[i, depth // 2] for i in range(4)}
alt = "Four blocks, the same blocks augmented, and the targets that moved with them."
plotting.show(plotting.images(panels, columns=4, bar=True), "batch", alt, run.figures)

# %% [markdown]
# ### Exercise 1: numbers that do not depend on the past
#
# The blocks of step $k$ and their augmentations are drawn at random. A run that was killed after 25
# steps knows only that it must continue with step 25 (the first step is 0). There it must draw the
# same numbers as if it had never been killed. Return three random numbers for a seed and a step.


# %% tags=["exercise"]
def draw(seed, step):
    return ...


exercises.q1(draw)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def draw(seed, step):
#     return np.random.default_rng([seed, step]).random(3)
# ```
#
# One generator for the whole run would have to be saved and restored; a new one for each step
# depends on nothing but seed and step. `seed + step` would work, too, but then seed 1 draws at each
# step what seed 0 draws at the next.
# </details>

# %% [markdown]
# ## What the loss asks for
#
# In a salient block, about one voxel in a hundred is foreground. The network gives each voxel a
# *logit*, and its sigmoid is the probability $p$. The mask is $y$, and each *term* of the loss sees
# a different failure. Sums run over all voxels of a batch:
#
# | term | | asks |
# |---|---|---|
# | soft Dice | $1 - (2 \sum p\,y + 1) / (\sum p + \sum y + 1)$ | that answer and target overlap, whatever the share of foreground (Milletari et al. 2016) |
# | cross-entropy | mean of $-\log p_{true}$ | that every voxel be right, with $p_{true}$ the probability of its true class |
# | focal | mean of $-(1 - p_{true})^2 \log p_{true}$ | the same, above all for voxels that are still wrong (Lin et al. 2017) |
# | skeleton recall | $1 - (\sum p\,s + 1) / (\sum s + 1)$ | that the middle $s$ of every neurite be found: one voxel missing there cuts a tree in two (Kirchhoff et al. 2024). $s$ marks the voxels at most one voxel from the centreline |
# | soft clDice | 1 - harmonic mean of two shares: that of the answer's skeleton lying on the target, and that of the target's skeleton lying on the answer | that both have the same branches, however thick (Shit et al. 2021) |
#
# The skeleton of an answer comes from repeated minimum and maximum filters, which have a gradient.
# You can choose among four sums of terms: `dice+ce`, `dice+ce+skeleton`, `dice+ce+cldice`, and
# `dice+focal`, a pair that is common in the paper's field. The paper does not state its loss.
#
# ### One picture per term
#
# Take an answer that is right except for two confident mistakes: a gap in the neurite, and a blob where
# there is no neurite. Each picture shows where one term pulls: minus its gradient with respect to the
# logit, divided by its largest pull.

# %%
batches = (source.batch(number, 16) for number in range(len(source)))
blocks, responses = next(b for b in batches if (b[1][:, depth // 2] >= target["tau"]).any())
middle = responses[:, depth // 2, None]
fullest = int((middle >= target["tau"]).flatten(1).sum(1).argmax())
wanted = middle[[fullest]]
mask = wanted >= target["tau"]
at = np.argwhere(mask[0, 0].numpy())
grid = np.indices(mask.shape[2:])


# %%
def disk(y, x, radius):
    return torch.from_numpy((grid[0] - y) ** 2 + (grid[1] - x) ** 2 <= radius**2)[None, None]


gap = at[len(at) // 2]
blob = np.clip(100 - gap, 10, 89)
answer = torch.where((mask & ~disk(*gap, 6)) | disk(*blob, 4), 0.8, 0.05)

# %%
names = {"ce": "cross-entropy", "skeleton": "skeleton recall"}
names |= {"dice": "soft Dice", "cldice": "soft clDice"}
pulls = training.pulls(answer.logit(), wanted, target["tau"])

# %%
panels = {"target": mask[0, 0], "answer": answer[0, 0]}
panels = {name: plotting.grey(part.numpy()) for name, part in panels.items()}
for name, pull in pulls.items():
    panels[names.get(name, name)] = pull[0, 0] / pull.abs().max()

# %%
alt = "Target, answer with a gap and a blob, and where each of five terms wants more or less."
scale = "less wanted (red), more wanted (blue)"
figure = plotting.images(panels, columns=4, shared=True, label=scale)
plotting.show(figure, "terms", alt, run.figures)

# %% [markdown]
# Cross-entropy and focal loss pull hardest at the two mistakes. Dice pulls at the whole neurite,
# but only weakly where $p$ is near 0: there the logit hardly moves $p$. Skeleton recall sees the
# thin middle and nothing else; it ignores the blob. Soft clDice looks at the same places. It would
# notice a thin false branch, but this blob is so thick that three erosions do not reach its
# skeleton. No term is enough by itself, as the answers of lazy networks also show:

# %%
lazy = {"nothing anywhere": torch.full(mask.shape, -4.6), "everything": torch.full(mask.shape, 4.6)}
lazy |= {"the answer above": answer.logit(), "the target": 9.2 * mask - 4.6}
table = []
for said, logits in lazy.items():
    terms = {}
    for name in training.LOSSES:
        terms |= training.loss_terms(name, logits, wanted, target["tau"])
    table.append({"answer": said} | {term: f"{float(value):.2f}" for term, value in terms.items()})
display(Markdown(runs.table(table)))

# %% [markdown]
# "Nothing anywhere" costs cross-entropy and focal loss a thirtieth of what "everything" costs them:
# that is how training collapses on sparse foreground. "Everything" costs skeleton recall and soft
# clDice next to nothing: an answer that is the same everywhere has no skeleton that could be wrong.
# Dice rejects both. (Even the target costs Dice 0.15 here, because a probability of 0.01 on all of
# the background adds up.)
#
# ### Exercise 2: soft Dice
#
# Write it as in the table, for probabilities `p` and masks `y`, both tensors of shape (n, 1, h, w).
# The two ones keep the fraction defined where neither the answer nor the target has any foreground.


# %% tags=["exercise"]
def soft_dice(p, y):
    return ...


exercises.q2(soft_dice)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def soft_dice(p, y):
#     return 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
# ```
#
# It contains no threshold, so it has a gradient everywhere. If the target is empty, the loss is
# $1 - 1 / (\sum p + 1)$: whatever the network finds is too much.
# </details>

# %% [markdown]
# ## The network
#
# Five slices of 100 × 100 voxels go in, and one mask comes out. In between, their contrast is enlarged
# to 224 × 224 and becomes *tokens*: each patch of 14 × 14 pixels, in all five slices, turns into 384
# numbers, and twelve transformer layers let the patches tell each other what they see
# ([02](02_weight_inflation.ipynb) has a recap). At four *taps*, after layers 3, 6, 9 and 12, the tokens
# are taken out.
#
# The *decoder* treats the four taps as a pyramid. It resizes them to 4, 2, 1 and 1/2 times their
# grid of 16 × 16, with 64 features each, pools the coarsest at four sizes for an overview, adds
# each coarser map to the next finer one, and fuses all four into 32 features, on 128 × 128 and then
# on 100 × 100. A *head* of two convolutions (it has nothing to do with the heads of attention)
# turns the features into logits. The drawing below is made from the shapes of a real forward pass.
#
# A token is 6 voxels wide at this scale, and a neurite 2 to 4. So a small U-Net at full resolution,
# the *stem*, reads the block itself, as brightness and as contrast (ten slices in all). It halves
# rows and columns three times and enlarges them again, with the features of the same size from the way
# down as further channels, and so locates what the tokens have recognised. It is our addition; the
# paper's rows in [06 Table 1](06_table1.ipynb) do without it.
#
# The details needed to rebuild it: blocks are enlarged bicubically, maps bilinearly. The convolutions of
# decoder, stem and head have 3 × 3 kernels, each followed by GroupNorm (groups of eight features) and
# GELU; only three kinds are 1 × 1, with neither: from the taps to 64 features, from the pools (1, 2, 3 and
# 6 cells a side) to 16, and the last of the head. Its bias starts at -4, as nearly all voxels are background.
# The stem has 16, 32, 64 and 128 features, and the transformer's MLP widens 384 numbers to 1536.

# %%
shape = network.NetworkSettings(encoder, depth, 100, size, predict, stem, contrast=contrast)
net, report = network.build(shape, initialisation, weights_file, seed)
# %%
print(report or "scratch: random weights, as requested")
if start_from:
    training.restore(net, start_from)

# %%
for name in ("encoder", "decoder", "stem", "head"):
    part = getattr(net, name, None)
    if part is not None:
        print(f"{name}: {sum(p.numel() for p in part.parameters()):,} weights")

# %% [markdown]
# ### One block, stage by stage
#
# We push the fullest block of the batch through the network. This is the whole forward pass, the
# decoder included. Only the individual layers (convolutions, and the transformer's layer, which
# notebook 02 wrote out), `local_contrast` and the stem's U-Net stay hidden. The result must equal
# that of the library's network.


# %% tags=["method"]
def encode(net, slices):
    """Tokens (B, 384, rows, columns): embedded patches, and after four of the encoder's layers."""
    vit, taps = net.encoder, []
    rows, columns = (side // net.patch for side in slices.shape[-2:])

    def grid(tokens):  # (B, rows * columns, 384)
        return tokens.transpose(1, 2).contiguous().reshape(len(tokens), -1, rows, columns)

    embedded = vit.patch_embed(slices)
    x = vit._pos_embed(embedded)  # (B, 1 + 256, 384): a class token, then patches
    for number, block in enumerate(vit.blocks):
        x = block(vit.norm_pre(x) if number == 0 else x)
        if number in net.taps:
            taps.append(grid(x[:, vit.num_prefix_tokens :]))
    return grid(embedded), taps


# %% tags=["method"]
def resized(level, like):
    return F.interpolate(level, like.shape[-2:], mode="bilinear", align_corners=False)


def decode(decoder, taps):
    """Features (B, 32, 128, 128) from four taps (B, 384, 16, 16), and the pyramid on the way."""
    pyramid = []
    for tap, lateral, scale in zip(taps, decoder.laterals, decoder.scales, strict=True):
        level = lateral(tap)  # 64 features
        pyramid.append(network.resize_to(level, [side * scale for side in level.shape[-2:]]))
    top = pyramid[-1]
    overview = [
        resized(project(F.adaptive_avg_pool2d(top, cells)), top)
        for cells, project in zip(decoder.pools, decoder.pooled, strict=True)
    ]
    pyramid[-1] = decoder.bottleneck(torch.cat([top, *overview], dim=1))
    for i in (2, 1, 0):  # from coarse to fine
        pyramid[i] = decoder.smooth[i](pyramid[i] + resized(pyramid[i + 1], pyramid[i]))
    fused = decoder.fuse(torch.cat([resized(level, pyramid[0]) for level in pyramid], dim=1))
    finest = [2 * side for side in fused.shape[-2:]]
    return decoder.refine(network.resize_to(fused, finest)), pyramid


# %% tags=["method"]
def forward(net, blocks, stages):
    stages["slices"] = slices = blocks[:, 0]  # (B, D, 100, 100)
    views = [slices]
    if net.settings.contrast:
        stages["contrast"] = network.local_contrast(slices)
        views.append(stages["contrast"])
    stages["enlarged"] = enlarged = net.resize(views[-1])
    stages["patch embedding"], taps = encode(net, enlarged)
    stages |= {f"tokens after layer {n + 1}": t for n, t in zip(net.taps, taps, strict=True)}
    features, pyramid = decode(net.decoder, taps)
    print("pyramid:", *(tuple(level.shape) for level in pyramid))
    area = [side + pad for side, pad in zip(slices.shape[-2:], net.padding(slices), strict=True)]
    features = F.interpolate(features, area, mode="bilinear", align_corners=False)
    stages["decoder"] = features = features[..., : slices.shape[-2], : slices.shape[-1]]
    if net.stem is not None:
        stages["stem"] = net.stem(torch.cat(views, dim=1))
        features = torch.cat([features, stages["stem"]], dim=1)
    stages["logits"] = net.head(features)
    return stages["logits"]


# %%
stages, one = {}, blocks[[fullest]]
if net.encoder is not None:  # the peer's U-Net has none
    with torch.inference_mode():
        by_hand = forward(net.eval(), one, stages)
        torch.testing.assert_close(by_hand, net(one), rtol=1e-4, atol=1e-4)
for name, value in stages.items():
    print(f"{name}: {tuple(value.shape)}")

# %%
if stages:
    shapes = {name: value.shape[1:] for name, value in stages.items()}
    shapes["tokens"] = shapes[f"tokens after layer {net.taps[-1] + 1}"]
    figure = plotting.architecture(shapes, net.taps)
    alt = "The network as boxes and arrows: a block is enlarged, embedded and passed through the "
    alt += "transformer; its four taps feed the decoder, and decoder and stem feed the head."
    plotting.show(figure, "network", alt, run.figures)

# %%
panels = {name: value[0, depth // 2] for name, value in stages.items() if value.shape[1] == depth}
panels |= {name: v[0].std(dim=0) for name, v in stages.items() if v.shape[1] > depth}
panels |= {"probability": stages["logits"][0, 0].sigmoid()} if stages else {"block": one[0, 0, 0]}
alt = "A block through the network: slice, enlarged slice, tokens, features, an untrained output."
plotting.show(plotting.images(panels, columns=5), "stages", alt, run.figures)

# %% [markdown]
# Tokens and features hold many numbers at each place; the picture shows their standard deviation.
# Up to the enlarged block, anybody can see the neuron. Tokens are descriptions, no longer pictures:
# [02](02_weight_inflation.ipynb) colours them by what they say. Decoder, stem and head still have
# random weights, so the output means nothing yet.
#
# ## A rate for every layer and every step
#
# We use AdamW. Its *weight decay* shrinks matrices (not norms, biases, position embeddings or class tokens) by
# 0.05 times the rate in every step. We also follow three habits of people who fine-tune
# transformers. First, the decoder starts from random weights and has ten times the encoder's peak
# rate. Second, the encoder's rate falls layer by layer towards the pixels, since the first layers
# already know edges, while the last ones are specialised for photographs: layer $i$ of $0 \dots n$ has
# $r\,d^{\,n - i}$, with $d$ = `layer_decay` (Clark et al. 2020). Layer 0 is the patch embedding,
# layers 1 to 12 are the transformer's, and 13 is its last norm, which is not used here. Third, all
# rates warm up in a straight line (for the first twentieth of the steps), so that the random
# decoder cannot spoil the encoder, and then fall along half a cosine to one per cent. By default,
# this notebook keeps the encoder *frozen* and trains decoder, stem and head alone; the picture on
# the right shows the rates that the encoder would have.

# %% tags=["nbval-ignore-output"]
rates = {"encoder_rate": encoder_rate, "decoder_rate": decoder_rate, "layer_decay": layer_decay}
passes = {"steps": steps, "batch": batch, "accumulate": accumulate, "precision": precision}
checks = {"validate_every": validate_every, "validation_blocks": validation_blocks}
chosen = {"loss": loss, "negatives": negatives, "frozen": frozen, "seed": seed}
other = {"checkpointing": checkpointing, "patience": patience}
settings = training.TrainingSettings(**rates, **passes, **checks, **chosen, **other)

# %%
shares = [training.schedule(step, settings) for step in range(steps)]
panels = {"share of the peak rate": {"": (range(steps), shares)}}
layers = training.layer_rates(net, replace(settings, frozen=False))
panels |= {"peak rate of an encoder that is trained": {"": (range(len(layers)), layers)}}
alt = "Left: the share of the rate rises, then falls as a cosine; right: rates grow with the layer."
figure = plotting.curves(panels, ["step", "layer, from the pixels up"])
plotting.show(figure, "rates", alt, run.figures)

# %% [markdown]
# ### Exercise 3: the laziest network
#
# Suppose that a network gives the same probability $p$ to every voxel, and that a `share` of the
# voxels is foreground. Which $p$ has the lowest cross-entropy, and which the lowest soft Dice loss
# (without the two ones)? Predict, then try it: change the numbers of *nothing anywhere* and
# *everything* in the cell that makes the table above, and run it again.


# %% tags=["exercise"]
def laziest(share):
    return ...


exercises.q3(laziest)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def laziest(share):
#     return share, 1.0
# ```
#
# Cross-entropy is lowest where $p$ is the share $f$ of foreground: at 1 %, that is almost *nothing
# anywhere*. Soft Dice is $1 - 2 p f / (p + f)$, which falls all the way to $p = 1$: it would rather
# paint everything. Together they leave no lazy way out.
# </details>

# %% [markdown]
# ### Exercise 4: the rate of a step
#
# Return the share of the peak rate at `step`, counted from 0. Over the first `warm` steps it rises
# in a straight line and reaches 1 at the last of them. From step `warm`, where it is 1 again, it
# falls along half a cosine to 0.01 at `steps`.


# %% tags=["exercise"]
def share(step, steps, warm):
    return ...


exercises.q4(share)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def share(step, steps, warm):
#     if step < warm:
#         return (step + 1) / warm
#     progress = (step - warm) / (steps - warm)
#     return 0.01 + 0.99 * (1 + np.cos(np.pi * progress)) / 2
# ```
# </details>

# %% [markdown]
# ## The loop
#
# Training is no more than this: take blocks, compare the answer with the target, let the gradient
# flow back, shorten it if it is longer than `clip` (1), and take a step. You have met its parts
# above: the blocks, augmentation, the loss (here soft Dice + focal, written out), and the rates.
# The library's loop does the same and adds what long runs need: validation, and a state on disk
# from which a stopped run resumes. Ten steps of both must give the same weights, bit for bit.
#
# Single steps make the weights jitter, so we keep a running average of the weights (an exponential
# moving average, *EMA*). After step $k$, counted from 0, it keeps $\min(0.98, (1 + k) / (10 + k))$ of
# itself and takes the rest from the new weights: 90 % after the first step, 4 % after the 200th.


# %% tags=["method"]
def dice_and_focal(logits, response, tau):
    logits = logits.masked_fill(response.isnan(), -30.0)  # unknown: counts as correct background
    y = (response >= tau).float()
    p = logits.sigmoid()
    soft_dice = 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
    surprise = F.binary_cross_entropy_with_logits(logits, y, reduction="none")  # -log p_true
    return soft_dice + (surprise * (1 - torch.exp(-surprise)) ** 2).mean()


def loss_by_hand(name, logits, response, tau):
    if name == "dice+focal":
        return dice_and_focal(logits, response, tau)
    return sum(training.loss_terms(name, logits, response, tau).values())


# %% tags=["method"]
def train_by_hand(net, source, settings, tau):
    for name, weight in net.encoder.named_parameters():
        # Nothing reads the encoder's last norm.
        weight.requires_grad_(not (settings.frozen or name.startswith("norm.")))
    optimizer = torch.optim.AdamW(training.parameter_groups(net, settings), fused=True)
    average = {name: value.clone() for name, value in net.state_dict().items()}
    learning = [weight for group in optimizer.param_groups for weight in group["params"]]
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * training.schedule(step, settings)
        blocks, responses = source.batch(step, settings.batch)
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        blocks, responses = training.augment(blocks, responses, generator)
        wanted = responses if predict == "all" else responses[:, [depth // 2]]
        loss = loss_by_hand(settings.loss, net(blocks), wanted, tau)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, settings.clip)
        optimizer.step()
        keep = min(settings.average, (1 + step) / (10 + step))  # of the running average
        for name, value in net.state_dict().items():
            average[name].lerp_(value, 1 - keep)
    return average


# %% tags=["nbval-ignore-output"]
once = {"accumulate": 1, "checkpointing": False, "precision": "32-true", "patience": 0}
ten = replace(settings, steps=10, batch=2, validate_every=10, validation_blocks=2, **once)
if net.encoder is not None:
    by_hand, _ = network.build(shape, initialisation, weights_file, seed)
    average = train_by_hand(by_hand, source, ten, target["tau"])
    theirs, _ = network.build(shape, initialisation, weights_file, seed)
    with TemporaryDirectory() as folder:
        how = (ten, target["tau"], training.start_fabric("cpu", "32-true"))
        training.train(theirs, train, validation[:1], Path(folder), *how)
        after = load_file(Path(folder) / "resume.safetensors")
    assert all(torch.equal(v, after[f"network.{k}"]) for k, v in by_hand.state_dict().items())
    assert all(torch.equal(v, after[f"average.{k}"]) for k, v in average.items())
    print("ten steps by hand and by the library: the same weights, bit for bit")

# %% [markdown]
# ## Training
#
# We keep the running average from the step at which it did best on blocks of the validation
# neurons. Half of these blocks are salient and half are not; each half is weighted by its share of
# all the volume's blocks, so that a network that sees neurites everywhere cannot win.
#
# You can use the same cells in three ways:
#
# | way | what decides it |
# |---|---|
# | while you watch | `steps`: 200 by default |
# | continued | stop the cell and run it again: with the same parameters and `run_dir`, it continues where it stopped. `start_from` names a finished checkpoint to continue from, with new data or other training settings; `shipped` is the one that comes with the course, from which `make course` and `neurolib run` start |
# | full size, on a GPU | a profile: `papermill -f ../profiles/gpu.yaml 03_training.ipynb out.ipynb` |
#
# On a device that is too small for a batch, `accumulate` averages the gradients of several passes
# in one step, and `checkpointing` computes the encoder's activations twice instead of keeping them.
# With `patience`, training ends after that many validations without improvement. Where the hardware
# has bfloat16, a 16-bit number format with about three digits, the costly products run in it and
# the weights stay in float32; PyTorch calls this *autocast*, or automatic mixed precision.
#
# After training, three numbers are chosen on the whole validation volumes: the threshold on the
# probability, the size below which a piece is dropped, and the weight given to a filter beside the
# network (see [04](04_evaluation.ipynb)).

# %% tags=["nbval-ignore-output"]
fabric = training.start_fabric(device, precision)
watch = widgets.live(plotting.learning, "Loss and validation Dice so far.")
how = (settings, target["tau"], fabric, watch)
result = training.train(net, train, validation, run.folder, *how)
print(f"best validation Dice {result.dice:.3f} at step {result.step}")
# %% tags=["nbval-ignore-output"]
cut = inference.calibrate(result.checkpoint, validation, fused, device=device)
print(
    f"whole validation volumes: Dice {cut['calibrated']:.3f} at threshold {cut['threshold']:.2f},"
)
print(
    f"without pieces of fewer than {cut['min_size']} voxels; filter weight {cut['filter_weight']:g}"
)

# %%
figure = plotting.learning(result.history)
alt = "Left: the loss and its terms over the steps; right: Dice on the validation blocks."
plotting.show(figure, "learning", alt, run.figures)

# %% jupyter={"source_hidden": true} tags=["hide-input"]
names = {"step": "step", "training_loss": "loss", "dice": "validation_dice"}
rows = [row for row in result.history if "validation_dice" in row]
points = [{name: row[key] for name, key in names.items()} for row in rows]
run.record("validation", {"neurons": "+".join(s.pair.name for s in validation), "points": points})

# %% [markdown]
# The left curve is noisy, since each step sees different blocks, and it says how well the network knows
# *these* neurons. Its peaks near 1 are steps whose blocks hold little or no neurite: there, soft Dice
# is near 1 almost whatever the network does. The right curve asks about a neuron that the network has
# never seen, and it alone decides which weights are kept. In the stored run it rises until about step
# 150 and then levels off, as the learning rate falls to almost nothing: this plateau comes with
# the end of the schedule, and does not mean that more steps would not help. (The focal term is only
# about 0.02 by then, since nearly all voxels are easy background; most of the loss is soft Dice.) Where
# the right curve turns down while the loss still falls, the network is learning its neurons by heart:
# more neurons help, not more steps. For the same reason a lower training loss does not make one network
# better than another; [06 Table 1](06_table1.ipynb) compares networks on held-out neurons.
#
# ## What it has learnt
#
# These are three validation blocks, from the fullest one to an empty one, none of them trained on: image,
# target and probability. In the stored run, the network follows the bright stretches of the first block,
# even those whose middle lies in another slice, and misses dim ones. In the second, it marks the whole
# soma, where the target is only a thin tube. In the third, a bright speck is marked, too.

# %%
seen = training.validation_blocks(validation[0], shape, settings)
order = seen.responses[:, depth // 2].sum((1, 2)).argsort(descending=True)
shown = order[:30:10]
with torch.inference_mode():
    found = net.eval().cpu()(seen.blocks[shown]).sigmoid()
panels = {}
for i, at in enumerate(shown):
    panels[f"image {i}"] = seen.blocks[at, 0, depth // 2]
    panels[f"target {i}"] = seen.responses[at, depth // 2] >= target["tau"]
    panels[f"probability {i}"] = found[i, found.shape[1] // 2]
alt = "Three validation blocks, each as image, target and predicted probability."
plotting.show(plotting.images(panels, columns=3, bar=True), "blocks", alt, run.figures)

# %% [markdown]
# ## Checkpoint
#
# You now have weights, and with them everything needed to rebuild the network.

# %% jupyter={"source_hidden": true} tags=["nbval-ignore-output", "hide-input"]
run.record(
    "about",
    {
        "data": data,
        "style": train[0].pair.style,
        "target": f"{target['kind']}, threshold {target['tau']}",
        "encoder": f"{encoder}, {start_from or initialisation}",
        "weights": weights.provenance(encoder, weights_file or None),
        "training": f"{result.history[-1]['step']} steps of {batch * accumulate} blocks, stem={stem}, seed {seed}",
        "device": training.device_name(fabric),
        "validation": f"Dice {result.dice:.3f}, {len(validation)} volumes, step {result.step}",
    },
)
print(run.describe_file("checkpoint.safetensors"))

# %% [markdown]
# **Summary.** A loss is a sum of terms, each blind to something; rates differ by layer and by step;
# we keep the weights that do best on a neuron outside the training set. The paper trains for longer
# than two cores can, with a loss and a schedule that it does not state; ours are our own choices,
# and we say so.
#
# **Next:** [04 Evaluation](04_evaluation.ipynb).
#
# **References.** Loshchilov and Hutter, *Decoupled Weight Decay Regularization*, ICLR 2019. Clark et
# al., *ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators*, ICLR 2020. Xiao et
# al., *Unified Perceptual Parsing for Scene Understanding* (UPerNet), ECCV 2018. Milletari et al.,
# *V-Net*, 3DV 2016. Lin et al., *Focal Loss for Dense Object Detection*, ICCV 2017. Shit et al.,
# *clDice: a Novel Topology-Preserving Loss Function for Tubular Structure Segmentation*, CVPR 2021.
# Kirchhoff et al., *Skeleton Recall Loss*, ECCV 2024.
