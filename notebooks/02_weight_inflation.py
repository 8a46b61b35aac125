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
# *How the one layer that touches the pixels is made 3D, what each strategy keeps, and proof that nothing else changed.*
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/neurite-vit-course/neurite-vit-course/blob/main/notebooks/02_weight_inflation.ipynb)
# [![Open on Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/neurite-vit-course/neurite-vit-course/main?urlpath=lab/tree/notebooks/02_weight_inflation.ipynb)
#
# **You will be able to**
#
# - fold a colour patch embedding into a grey one, exactly
# - inflate it with the average and the center strategy, and say what each ignores
# - prove that the inflated network still is the 2D one
#
# **Before this:** [01 Data blocking](01_data_blocking.ipynb), and having met a vision transformer.
#
# **Takes** under a minute and 1.0 GB of memory on 2 cores, no GPU needed; 88 MB of weights, fetched once.

# %% tags=["parameters"]
run_dir = "../runs/small"  # folder in which the notebooks leave their results
data = "synthetic"  # "synthetic", "bigneuron-janelia", "rendered:FOLDER" of SWC files, or a folder of image/SWC pairs
encoder = "vit_small_patch14_dinov2.lvd142m"  # timm name of the pre-trained 2D encoder
weights_file = ""  # your own file of 2D weights; empty: cache, model hub, package index
depth = 5  # slices of a block, odd
size = 224  # rows and columns that the encoder sees
seed = 0  # of the random initialisations

# %% tags=["bootstrap"]
import sys

if "google.colab" in sys.modules:  # in JupyterLab and on Binder there is nothing to do
    # !git clone -q --depth 1 https://github.com/neurite-vit-course/neurite-vit-course
    # %cd neurite-vit-course/notebooks
    # %pip install -q -e ..
    import site

    site.main()  # lets this running Python see the package just installed

# %%
import torch
import torch.nn.functional as F

from neurolib import blocking, datasets, inflation, network, plotting, runs, weights

run = runs.open_run(run_dir)

# %% [markdown]
# ## The only layer that knows about pixels
#
# A vision transformer cuts an image into patches of $p \times p$ pixels and maps each to a vector, a
# *token*, with one linear layer, the *patch embedding*: $E$ kernels of shape $(3, p, p)$. Everything
# behind it works on tokens. To read a block of $D$ grey slices, only the patch embedding has to
# change.

# %%
state = weights.load_pretrained(encoder, weights_file or None)
weight, bias = state[inflation.PATCH_WEIGHT], state[inflation.PATCH_BIAS]
print(
    f"patch embedding {tuple(weight.shape)}, position embedding {tuple(state['pos_embed'].shape)}"
)

# %% tags=["nbval-ignore-output"]
print(weights.provenance(encoder, weights_file or None))

# %% [markdown]
# ## Colour to grey, exactly
#
# The 2D model expects three channels, normalised: $(g - \mu_c) / \sigma_c$. Shown the same grey
# slice $g$ three times, it computes $\sum_c w_c * (g - \mu_c)/\sigma_c + b$. That is linear in $g$:
#
# $$ w' = \sum_c \frac{w_c}{\sigma_c}, \qquad b' = b - \sum_c \frac{\mu_c}{\sigma_c} \sum_{u,v}
# w_c(u, v). $$
#
# With $w'$ and $b'$, a grey slice in [0, 1] gives exactly the tokens of the 2D model. (The code that
# the paper builds on adds the channels and leaves out $\mu$ and $\sigma$; that is `fold="sum"` here.)

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
# ## Inflation along z
#
# A kernel for $D$ slices, $(E, 1, D, p, p)$, is made from $w'$ by giving each slice a share:
#
# - **average**: every slice $w' / D$. A block of equal slices gives the 2D tokens; a block of
#   different slices is blurred along z first.
# - **center**: the middle slice $w'$, the others zero. *Any* block gives the tokens of its middle
#   slice: the other slices are ignored until training finds a use for them.

# %%
kernels = {s: inflation.inflate(grey, depth, s) for s in ("average", "center", "gaussian")}
strongest = int(F.avg_pool2d(grey, 5).flatten(1).norm(dim=1).argmax())
panels = {"colour": plotting.colour_kernel(weight[strongest]), "grey": grey[strongest, 0]}
alt = "A patch kernel in colour, with fine structure, and the grey kernel folded from it."
plotting.show(plotting.images(panels, cmap="viridis"), "folding", alt, run.figures)

# %%
panels = {
    f"{name} {i - depth // 2:+d}": kernel[strongest, 0, i]
    for name, kernel in kernels.items()
    for i in range(depth)
}
figure = plotting.images(panels, columns=depth, cmap="viridis", shared=True)
alt = "Three rows of slices: average repeats a faint kernel, center has it in the middle alone."
plotting.show(figure, "kernels", alt, run.figures)

# %% [markdown]
# ### What average blurs and center ignores
#
# A thin bright tube passes the block at different depths. The response of `average` does not care at
# which depth; `center` sees it in the middle slice only.

# %%
response = inflation.tube_response(kernels, size)
lines = {name: (range(-(depth // 2), depth // 2 + 1), values) for name, values in response.items()}
figure = plotting.curves(lines, "depth of the tube in the block", "change of the tokens (norm)")
alt = "Token change against tube depth: flat for average, a single peak at zero for center."
plotting.show(figure, "depths", alt, run.figures)

# %% [markdown]
# ## The whole network, inflated
#
# The same through all layers: two identities that must hold to rounding, or something else than the
# patch embedding was changed.


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
# And it costs next to nothing: the patch embedding grows from 1 to 5 input slices, all else stays.

# %%
for name, net in (("2D", flat), ("3D", center)):
    count = sum(p.numel() for p in net.encoder.parameters())
    print(f"{name} encoder: {count / 1e6:.2f} million parameters")

# %% [markdown]
# ## What the tokens know before any training
#
# A slice of a neuron through the encoder, with random weights and with pre-trained ones. The three
# strongest directions among the tokens are shown as red, green and blue.

# %%
sample = datasets.read_sample(datasets.load_dataset(data)[0])
grid = blocking.block_grid(sample.image.shape, (depth, 100, 100))
fullest = max(grid, key=lambda at: blocking.read_block(sample.mask, at, (1, 100, 100)).sum())
real = torch.from_numpy(blocking.read_block(sample.image, fullest, (depth, 100, 100)).copy())[None]
panels = {"slice": real[0, depth // 2].numpy()}
for name, net in (("random", build("scratch", depth)), ("center", center), ("average", average)):
    panels[f"tokens, {name}"] = network.token_colours(net, real)
alt = "A slice and its tokens in colour: random weights show little of it, pre-trained ones more."
plotting.show(plotting.images(panels, columns=4), "tokens", alt, run.figures)

# %% [markdown]
# ## Checkpoint
#
# You now have a network whose encoder is the pre-trained one to the last bit but for its first layer,
# and a report that says which keys were filled:

# %%
_, report = network.build(network.NetworkSettings(encoder=encoder), "center", weights_file)
print(report)
run.record("inflation", {"encoder": encoder, "matched": report.share})

# %% [markdown]
# **Summary.** Folding is exact; `average` equals 2D on equal slices; `center` equals 2D on every
# block. Neither knows anything about z yet: that is left to training. The paper found `center` the
# better of the two (Dice 0.5045 against 0.4942).
#
# **Next:** [03 Training](03_training.ipynb).
#
# **References.** Zhang et al. 2022 (TransSeg). Caron et al. 2021 (DINO). Oquab et al., *DINOv2:
# Learning Robust Visual Features without Supervision*, 2023.
