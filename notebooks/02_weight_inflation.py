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
# # Weight inflation: a 2D transformer learns to see five slices
#
# *How can a transformer that knows only flat photographs look at five slices at once?*
#
# ![One kernel of the patch embedding, inflated in three ways: in five equal parts, in the middle slice alone, and as a bell curve.](attachment:kernels.png)
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/neurite-vit-course/neurite-vit-course/blob/main/notebooks/02_weight_inflation.ipynb)
# [![Open on Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/neurite-vit-course/neurite-vit-course/main?urlpath=lab/tree/notebooks/02_weight_inflation.ipynb)
#
# **You will be able to**
#
# - fold a colour patch embedding into a grey one, exactly
# - inflate it with the average and the center strategy, and say what each gains and ignores
# - prove that the inflated network is still the 2D one, and count what the third dimension costs
# - look at the tokens and at the attention of an encoder before any training
#
# **Before this:** [01 Data blocking](01_data_blocking.ipynb).
#
# **Takes** under a minute and 1.1 GB of memory on 2 cores, no GPU needed; 88 MB of weights, fetched once.

# %% jupyter={"source_hidden": true} tags=["parameters", "hide-input"]
run_dir = "../runs/small"  # folder in which the notebooks leave their results
data = "synthetic"  # "synthetic", "bigneuron-janelia", "rendered:FOLDER" of SWC files, or a folder of image/SWC pairs
encoder = "vit_small_patch14_dinov2.lvd142m"  # timm name of the pre-trained 2D encoder
weights_file = ""  # your own file of 2D weights; empty: cache, model hub, package index
depth = 5  # slices of a block, odd
size = 224  # rows and columns that the encoder sees
seed = 0  # of the random initialisations
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
import ipywidgets
import numpy as np
import torch
import torch.nn.functional as F
from IPython.display import Markdown, display
from skimage.data import chelsea  # a photograph

from neurolib import blocking, inflation, network, weights
from neurolib.course import plotting, runs, widgets
from neurolib.data import datasets
from neurolib.course.exercises import inflation as exercises

run = runs.open_run(run_dir, "02_weight_inflation", globals())

# %% [markdown]
# ## A vision transformer in one paragraph
#
# A vision transformer cuts an image into patches of $p \times p$ pixels and maps each to a vector, a
# *token*, with one linear layer, the *patch embedding*: $E$ kernels of shape $(3, p, p)$. It adds a
# *position embedding* to each token, since nothing else says where a patch was, and puts one more token
# in front, the *class token*, which stands for the whole image. Then come a dozen *blocks* (of layers,
# not of slices), all of the same form. In each, *attention* lets every token consult all the others.
# Three linear maps turn the tokens into queries $Q$, keys $K$ and values $V$, and each token receives
#
# $$ \operatorname{softmax}\big( Q K^T / \sqrt{d} \big) \, V, $$
#
# that is, much of the value of any token whose key resembles its query, and little of the rest. This
# happens in several *heads* side by side, each with $d$ numbers of its own (here six heads of 64). A
# small network of two linear layers (MLP) then works on each token by itself. Attention and MLP each see
# normalised tokens, and add their result to the token (DINOv2 first multiplies it by learnt factors,
# *LayerScale*). Below, one such layer is written out in seven lines.
#
# If you have never met one, [Vaswani et al. 2017](https://arxiv.org/abs/1706.03762) explain attention,
# [Dosovitskiy et al. 2021](https://arxiv.org/abs/2010.11929) bring it to images, and [The Illustrated
# Transformer](https://jalammar.github.io/illustrated-transformer/) draws every step.
#
# ### What DINO learns from
#
# DINO learns from unlabelled photographs. Two copies of the network, a student and a teacher, see
# different crops of one photograph, and the student learns to give the same description as the teacher.
# The teacher is a running average of the student, and its answers are centred and sharpened, so that the
# two cannot agree on one answer for everything. To describe a small crop as the teacher describes the
# whole, the student must recognise what the crop belongs to, and its attention learns to follow objects.
# DINOv2, which this course uses, adds a second task: some patches are hidden, and their tokens must be
# guessed.

# %%
figure = plotting.distillation(chelsea(), (90, 10, 240), (170, 40, 110))
alt = "Two crops of a cat photograph, one for the teacher, one for the student: both must agree."
plotting.show(figure, "dino", alt, run.figures)

# %% [markdown]
# ## The only layer that knows about pixels
#
# Everything after the patch embedding works on tokens. For a block of $D$ grey slices, only the patch
# embedding has to change: its kernels must add up $D$ slices instead of three colours.

# %%
state = weights.load_pretrained(encoder, weights_file or None)
weight = state[inflation.PATCH_WEIGHT]
bias = state.get(inflation.PATCH_BIAS, torch.zeros(len(weight)))  # CLIP has none
for key in (inflation.PATCH_WEIGHT, inflation.PATCH_BIAS, inflation.POSITION):
    print(key, tuple(state[key].shape) if key in state else "none")

# %% tags=["nbval-ignore-output"]
print(weights.provenance(encoder, weights_file or None))

# %% [markdown]
# You can choose other encoders by their timm names; the table at the end of this notebook lists them.
#
# ## Colour to grey, exactly
#
# The 2D model expects three channels, normalised: $(g - \mu_c) / \sigma_c$. Shown the same grey
# slice $g$ three times, it computes $\sum_c w_c * (g - \mu_c)/\sigma_c + b$. That is linear in $g$:
#
# $$ w' = \sum_c \frac{w_c}{\sigma_c}, \qquad b' = b - \sum_c \frac{\mu_c}{\sigma_c} \sum_{u,v}
# w_c(u, v). $$
#
# With $w'$ and $b'$, a grey slice in [0, 1] gives exactly the tokens of the 2D model. (The code that the
# paper builds on just adds up the channels and leaves out $\mu$ and $\sigma$; that is `fold="sum"` here.)

# %%
mean, std = network.normalisation(encoder)
grey, grey_bias = inflation.fold_rgb(weight, bias, mean, std)
slice_2d = torch.rand(1, 1, size, size, generator=torch.Generator().manual_seed(0))
mu, sigma = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
colour = (slice_2d.repeat(1, 3, 1, 1) - mu) / sigma
of_colour = F.conv2d(colour, weight, bias, stride=weight.shape[-1])
of_grey = F.conv2d(slice_2d, grey, grey_bias, stride=weight.shape[-1])
print(f"same tokens to 1e-4: {bool((of_colour - of_grey).abs().max() < 1e-4)}")

# %% [markdown]
# ### Exercise 1: fold the colours yourself
#
# You are given kernels `weight` (E, 3, p, p), their `bias` (E,), and two tensors (3,), `mean` and `std`.
# Return the grey kernels $w'$ (E, 1, p, p) and their bias $b'$ (E,).


# %% tags=["exercise"]
def fold(weight, bias, mean, std):
    return ...


exercises.q1(fold)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def fold(weight, bias, mean, std):
#     mean, std = mean.view(1, 3, 1, 1), std.view(1, 3, 1, 1)
#     grey = (weight / std).sum(1, keepdim=True)
#     return grey, bias - (weight * mean / std).sum((1, 2, 3))
# ```
#
# Divide before you sum: each channel has its own σ. The bias makes up for what the 2D model sees where
# the slice is black: after normalisation, black is -µ/σ and not 0.
# </details>

# %% [markdown]
# ## Inflation along z
#
# A kernel for $D$ slices, $(E, 1, D, p, p)$, is made from $w'$ by giving each slice a share. A block is
# as deep as its kernels, so they move in y and x only: the layer is a 2D convolution whose $D$ input
# channels are the slices.
#
#
# - **average**: every slice is $w' / D$. A block of equal slices gives the 2D tokens; a block of
#   different slices is blurred along z.
# - **center**: the middle slice is $w'$, the others are zero. *Any* block gives the tokens of its middle
#   slice: the other slices are ignored until training finds a use for them.
#
# Two more strategies go beyond the paper: `gaussian` lies between the two, and `random` replaces $w'$
# with random numbers. The latter is a control for what the pre-trained patch embedding is worth; try it
# with `initialisation` in notebook 03.
#
# ### Exercise 2: inflate a kernel
#
# Write the center strategy: grey kernels (E, 1, p, p) and an odd depth $D$ give (E, 1, D, p, p).


# %% tags=["exercise"]
def inflate(grey, depth):
    return ...


exercises.q2(inflate)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def inflate(grey, depth):
#     kernel = torch.zeros(len(grey), 1, depth, *grey.shape[2:])
#     kernel[:, :, depth // 2] = grey
#     return kernel
# ```
#
# The check looks first at the tokens that your kernel gives, and only then at the kernel: the tokens of a
# random block must be the 2D tokens of the block's middle slice.
# </details>

# %% [markdown]
# Here are both of the paper's strategies in six lines. They agree with the library to the last bit:


# %% tags=["method"]
def inflate_by_hand(grey, depth, strategy):
    share = torch.full((depth,), 1 / depth)
    if strategy == "center":
        share = torch.zeros(depth)
        share[depth // 2] = 1
    return grey[:, :, None] * share.view(1, 1, depth, 1, 1)


for strategy in ("average", "center"):
    of_library = inflation.inflate(grey, depth, strategy)
    assert torch.equal(inflate_by_hand(grey, depth, strategy), of_library)
    print(f"{strategy}: {tuple(grey.shape)} -> {tuple(of_library.shape)}")

# %% [markdown]
# Now the pictures. First, one kernel in colour, and the grey kernel folded from it:

# %%
kernels = {s: inflation.inflate(grey, depth, s) for s in ("average", "center", "gaussian")}
strongest = int(F.avg_pool2d(grey, 5).flatten(1).norm(dim=1).argmax())
panels = {"colour": plotting.colour_kernel(weight[strongest]), "grey": grey[strongest, 0]}
alt = "A patch kernel in colour, and the grey kernel folded from it: blue above zero, red below."
plotting.show(plotting.images(panels, shared=True, label="weight"), "folding", alt, run.figures)

# %% [markdown]
# Then the same kernel, inflated in three ways:

# %%
panels = {
    f"{name} {i - depth // 2:+d}": kernel[strongest, 0, i]
    for name, kernel in kernels.items()
    for i in range(depth)
}
figure = plotting.images(panels, columns=depth, shared=True, label="weight")
alt = "Slices of three inflated kernels: all alike, the middle one alone, and fading from it."
plotting.show(figure, "kernels", alt, run.figures)

# %% [markdown]
# ### What average blurs and center ignores
#
# Suppose that a thin bright tube lies in one slice of the block. `average` responds equally whichever
# slice that is, with a fifth of the 2D response; `center` responds in full, but only if it is the middle
# slice.

# %%
response = inflation.tube_response(kernels, size)
lines = {name: (range(-(depth // 2), depth // 2 + 1), values) for name, values in response.items()}
panels = {"change of the tokens (largest: 1)": lines}
figure = plotting.curves(panels, "depth of the tube in the block")
alt = "Token change against tube depth: flat for average, a single peak at zero for center."
plotting.show(figure, "depths", alt, run.figures)

# %% [markdown]
# Choose a strategy and a depth. At the top, you see one kernel, slice by slice; at the bottom, the
# response of all tokens to a tube in each slice. The deeper the block, the more weakly `average` responds
# to a single slice.

# %% tags=["nbval-ignore-output"]
strategies = ipywidgets.Dropdown(options=inflation.STRATEGIES, value="center")
slices = ipywidgets.IntSlider(depth, 1, 9, 2, description="depth")
alt = f"Center, depth {depth}: kernel and response in the middle slice only; choose others."


def draw(strategy, depth):
    kernel = inflation.inflate(grey, depth, strategy, torch.Generator().manual_seed(seed))
    found = inflation.tube_response({"2D": grey[:, :, None], "3D": kernel}, size)
    relative = [value / found["2D"][0] for value in found["3D"]]
    limit = float(grey[strongest].abs().max())
    return plotting.inflated(kernel[strongest, 0], relative, limit)


widgets.explore(draw, "inflated", alt, run.figures, strategy=strategies, depth=slices)

# %% [markdown]
# ### Exercise 3: when does averaging pay?
#
# Slices are noisy, each with noise of its own. A neurite that lies flat is in one slice of a block, a
# steep one in all of them. Predict the signal-to-noise ratio of the `average` tokens for a tube in $n$ of
# $D$ slices, relative to that of a 2D model that looks at one slice with the tube in it.


# %% tags=["exercise"]
def gain(depth, n):
    return ...


exercises.q3(gain)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def gain(depth, n):
#     return n / depth**0.5
# ```
#
# A share n/D of the signal is left. The mean of D independent noises has 1/√D of their standard
# deviation. The ratio is n/√D: averaging five slices pays if the tube is in at least three.
# </details>

# %% [markdown]
# We measure the same with the kernels above, on pure noise and on tubes, relative to `center` with the
# tube in its middle slice:

# %%
noise = torch.randn(16, depth, size, size, generator=torch.Generator().manual_seed(seed))


def spread(kernel):
    return F.conv2d(noise, kernel[:, 0], stride=kernel.shape[-1]).std()


left = spread(kernels["average"]) / spread(kernels["center"])
for n in range(1, depth + 1):
    signal = sum(response["average"][:n]) / response["center"][depth // 2]
    print(
        f"tube in {n} of {depth}: signal {signal:.2f}, noise {left:.2f}, ratio {signal / left:.2f}"
    )

# %% [markdown]
# As predicted, `average` passes 1 when the tube is in three slices. `center` has the 2D model's ratio, 1,
# if its middle slice, the one that it must label, shows the tube. Where slices are far apart, a neurite
# is in few of them, which favours `center`; finer steps in z favour `average`.

# %% [markdown]
# ## The whole network, inflated
#
# Now we go through all the layers. Two identities must hold up to rounding; if they fail, something other
# than the patch embedding was changed.


# %%
def build(strategy, slices):
    settings = network.NetworkSettings(encoder=encoder, depth=slices, size=size)
    return network.build(settings, strategy, weights_file, seed)[0].eval()


flat, average, center = build("center", 1), build("average", depth), build("center", depth)
block = torch.rand(1, depth, 100, 100, generator=torch.Generator().manual_seed(1))
middle = block[:, depth // 2 : depth // 2 + 1]

# %%
with torch.inference_mode():
    tokens = flat.encode(middle)[-1]
    same = average.encode(middle.repeat(1, depth, 1, 1))[-1]
    any_block = center.encode(block)[-1]
for name, found in (("average on a repeated slice", same), ("center on any block", any_block)):
    error = (found - tokens).abs().max() / tokens.abs().max()
    print(f"{name} equals 2D to 1e-4: {bool(error < 1e-4)}")

# %% [markdown]
# ### Where a patch was
#
# One more tensor had to be adapted: the position embedding. It was learnt for the larger images of the
# pre-training and is *resized* to the patches that we have, as one resizes an image (bicubic). The
# picture shows how similar the embedding of one place is to those of all other places, before and after:


# %%
def likeness(positions):
    side = int(positions.shape[1] ** 0.5)  # after the class token, a square
    grid = F.normalize(positions[0, -(side**2) :], dim=1).reshape(side, side, -1)
    return grid @ grid[side // 3, side // 3]


before, after = state.get(inflation.POSITION), center.encoder.pos_embed
if before is not None and after is not None:  # DINOv3 has rotary positions
    found = [likeness(part.detach()) for part in (before, after)]
    panels = {f"{len(part)} x {len(part)} places": part for part in found}
    alt = "Likeness of one place to all others, before and after resizing: neighbours are alike."
    figure = plotting.images(panels, cmap="viridis", shared=True, label="cosine similarity")
    plotting.show(figure, "positions", alt, run.figures)

# %% [markdown]
# A place is most like its neighbours, and resizing preserves that: the network still knows what is next
# to what. The identities above hold because both networks, 2D and 3D, have the same resized positions.
#
# ### One layer by hand
#
# Twelve layers like the following come next, and inflation leaves them unchanged. This is all that
# happens in one of them; the result must match that of timm's layer:


# %% tags=["method"]
def layer_by_hand(layer, tokens):
    """From tokens (257, 384), a class token and 16 x 16 patches, to tokens (257, 384)."""
    qkv = layer.attn.qkv(layer.norm1(tokens)).reshape(len(tokens), 3, layer.attn.num_heads, -1)
    q, k, v = qkv.permute(1, 2, 0, 3)  # (heads, tokens, d) each
    alike = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5  # each query with every key
    taken = alike.softmax(dim=-1) @ v
    tokens = tokens + layer.ls1(layer.attn.proj(taken.transpose(0, 1).flatten(1)))
    return tokens + layer.ls2(layer.mlp(layer.norm2(tokens)))


# %%
vit = center.encoder
if after is not None:  # DINOv3's attention turns queries and keys by their position
    with torch.inference_mode():
        tokens = vit._pos_embed(vit.patch_embed(center.resize(block)))
        theirs = vit.blocks[0](tokens)[0]
        assert torch.allclose(layer_by_hand(vit.blocks[0], tokens[0]), theirs, atol=1e-4)
    print(f"one layer by hand equals timm's: tokens {tuple(theirs.shape)}")

# %% [markdown]
# ## What it costs
#
# The inflated patch embedding has $D$ times the weights and $D$ times the products; everything after it
# is the same. A floating-point operation (FLOP) is one multiplication or one addition. For one block,
# PyTorch counts the FLOPs of all matrix products and convolutions, in the encoder and in the network with
# its decoder (but without the stem, which notebook 03 adds):

# %%
settings = network.NetworkSettings(encoder=encoder, depth=depth, size=size)
display(Markdown(runs.table(network.costs(settings))))

# %% [markdown]
# This is why inflation adds hardly any cost: five slices give as many tokens as one. A transformer that
# gave every slice its own tokens would have five times as many; its linear layers would cost five times
# as much, and the products inside its attention 25 times as much.
#
# ## What the tokens know before any training
#
# We send a block with a neuron through three encoders: one with random weights and two with pre-trained
# ones. The three strongest directions among the tokens of all three are shown as red, green and blue:
# equal colours mean equal directions.

# %%
sample = blocking.read_sample(datasets.load_dataset(data, channel, spacing)[0])
grid = blocking.block_grid(sample.image.shape, (depth, 100, 100))
fullest = max(grid, key=lambda at: blocking.read_block(sample.mask, at, (1, 100, 100)).sum())
real = torch.from_numpy(blocking.read_block(sample.image, fullest, (depth, 100, 100)).copy())[None]
target = blocking.read_block(sample.mask, fullest, (1, 100, 100))[0]

# %%
networks = {"random": build("scratch", depth), "center": center, "average": average}
panels = {"slice": real[0, depth // 2].numpy(), "target": target}
colours = network.token_colours(networks, real)
panels |= {f"tokens, {name}": found for name, found in colours.items()}
figure = plotting.images(panels, columns=5)
plotting.scale_bar(figure.axes[0], real.shape[-1])
alt = "A slice, its target, and the tokens of three networks in colours that they share."
plotting.show(figure, "tokens", alt, run.figures)

# %% [markdown]
# The neuron stands out in all three, even with random weights, because bright patches give different
# tokens from dark ones. But only the random tokens also follow the uneven background; the pre-trained
# ones give all of it one colour.
#
# Below is the *attention* of the last layer: how much the class token, which had to describe the whole
# image in pre-training, takes from each patch. All three maps share one scale.

# %%
maps = {name: network.class_attention(net, real) for name, net in networks.items()}
panels = {name: found.mean(0) for name, found in maps.items()}
alt = "Attention to each patch: uniform with random weights, in spots with pre-trained ones."
figure = plotting.images(panels, cmap="viridis", shared=True, label="attention")
plotting.show(figure, "attention", alt, run.figures)

# %% [markdown]
# With random weights, the class token attends to all patches alike; with pre-trained ones, it attends to
# some more than to others. Does it attend to the neurite, or merely to what is bright? To tell, we need a
# control: for each patch on the target, we take a patch off the target whose brightest voxel is equally
# bright.

# %%
grid = maps["center"].shape[1:]
touched = F.adaptive_max_pool2d(torch.from_numpy(target)[None].float(), grid)
on_target = touched[0].numpy() > 0
bright = F.adaptive_max_pool2d(real[:, depth // 2], grid)[0].numpy()

# %%
off_target = ~on_target if not on_target.all() else on_target  # a stack full of neurite
apart = np.abs(bright[on_target][:, None] - bright[off_target])
print(f"patches on the target: {on_target.mean():.0%} of all")
print(f"mean difference in brightness: {apart.min(axis=1).mean():.3f}")
for name, found in maps.items():
    look = found.mean(0) / found.mean()
    twins = look[off_target][apart.argmin(axis=1)].mean()
    print(f"{name}: on it {look[on_target].mean():.2f}, off it but as bright {twins:.2f}")

# %% [markdown]
# A value of 1 is the mean of all patches. In the stored run, the pre-trained networks attend to patches
# with neurite about four times as much as to the average patch. To equally bright patches without
# neurite, they attend less than to the average patch. So a bright voxel alone does not draw attention.
# But any bright thread might; one image and one control cannot tell us.
#
# The maps above are means over the *heads*, and the heads do not all attend to the same patches:

# %%
heads = {f"head {i}": head for i, head in enumerate(maps["center"])}
alt = "Attention of each head of the pre-trained encoder, on one scale: each has its own spots."
figure = plotting.images(heads, columns=6, cmap="viridis", shared=True, label="attention")
plotting.show(figure, "heads", alt, run.figures)

# %% [markdown]
# A patch of 14 pixels spans 6 voxels of the block, and a neurite is 2 to 4 voxels wide: whatever
# attention knows, it does not draw the neurite. That is left to the decoder and to training.

# %% [markdown]
# ## Checkpoint
#
# You now have a network whose encoder is the pre-trained one to the last bit, except for two parts: the
# patch embedding, which was folded and inflated, and the position embedding, which was resized. A report
# says how many of the encoder's tensors (*keys*) were filled:

# %% jupyter={"source_hidden": true} tags=["hide-input"]
_, report = network.build(network.NetworkSettings(encoder=encoder), "center", weights_file)
print(report)
run.record("inflation", {"encoder": encoder, "matched": report.share})

# %% [markdown]
# ## Appendix: encoders that fit
#
# All this works for every plain vision transformer whose patch embedding is one convolution. Set
# `encoder` to its name. The weights come from the model hub, or from your own file (`weights_file`):
# timm's, or a `.pth` from the authors of DINO or DINOv2. The licences are those that timm records with
# the weights; read the authors' own before you publish or sell anything. `cc-by-nc-4.0` forbids
# commercial use; DINOv3 has a licence of its own.

# %%
display(Markdown(runs.table(network.describe_encoders())))

# %% [markdown]
# `image` is the side of the images that an encoder gets in timm; here, the parameter `size` takes its
# place, and position embeddings are resized to it. The paper uses DINO's encoders. DINOv3 has rotary
# positions and needs no resizing; CLIP's patch embedding has no bias, and folding gives it one. Networks
# that are not plain vision transformers (Swin, SAM, hybrids that begin with a CNN) are refused.

# %% [markdown]
# **Summary.** Folding is exact; `average` equals 2D on equal slices; `center` equals 2D on every block.
# Neither knows anything about z yet: that is left to training. Five slices cost about 1 % more than one.
# The paper found `center` the better of the two (Dice 0.5045 against 0.4942).
#
# **Next:** [03 Training](03_training.ipynb).
#
# **References.** Zhang et al. 2022 (TransSeg). Caron et al. 2021 (DINO). Oquab et al., *DINOv2:
# Learning Robust Visual Features without Supervision*, 2023. The cat is Chelsea, photographed by Stéfan
# van der Walt (CC0), from scikit-image.
