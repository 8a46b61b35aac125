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
# *A training loop that can be read, stopped and taken up again, and what its curves say.*
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/neurite-vit-course/neurite-vit-course/blob/main/notebooks/03_training.ipynb)
# [![Open on Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/neurite-vit-course/neurite-vit-course/main?urlpath=lab/tree/notebooks/03_training.ipynb)
#
# **You will be able to**
#
# - say what each part of the loss asks for
# - train the network on two cores or on a GPU, and take up a run that was stopped
# - read a learning curve without being fooled by the training loss
#
# **Before this:** [02 Weight inflation](02_weight_inflation.ipynb).
#
# **Takes** 3 minutes and 1.5 GB of memory on 2 cores, no GPU needed; 88 MB of weights, fetched once.

# %% tags=["parameters"]
run_dir = "../runs/small"  # folder in which the notebooks leave their results
data = "synthetic"  # "synthetic", "bigneuron-janelia", "rendered:FOLDER" of SWC files, or a folder of image/SWC pairs
encoder = (
    "vit_small_patch14_dinov2.lvd142m"  # timm name of the 2D encoder, or "monai_unet", the peer
)
weights_file = ""  # your own file of 2D weights; empty: cache, model hub, package index
initialisation = "center"  # "center", "average", "gaussian", "random" or "scratch"
depth = 5  # slices of a block; 1 is the 2D network
size = 224  # rows and columns that the encoder sees
predict = "center"  # slices that a block predicts: "center" or "all"
stem = True  # convolutional path at full resolution: ours, not the paper's
frozen = False  # train the decoder only
steps = 40  # of the optimiser: a taste, the course profile takes more
batch = 3  # blocks per step; with 4, this notebook needs more than 1.5 GB
encoder_rate = 1e-4  # peak learning rate of the encoder's last layer
decoder_rate = 1e-3  # peak learning rate of decoder and stem
layer_decay = 0.75  # rate of each encoder layer relative to the one above it; 1 for equal rates
loss = "dice+ce+skeleton"  # or "dice+focal", "dice+ce+cldice"
negatives = 1.0  # blocks without foreground per salient block
accumulate = 1  # passes per step: many blocks per step on a small device
checkpointing = False  # less memory, a third slower
validate_every = 20  # steps
validation_blocks = 32  # per validation volume
patience = 0  # validations without a better one after which to stop; 0: never
seed = 0  # of everything random
device = "auto"  # "auto", "cpu" or "cuda"
precision = "32-true"  # "bf16-mixed" on a GPU

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

from neurolib import datasets, network, plotting, runs, training, weights, widgets

run = runs.open_run(run_dir)
target = runs.target_of(run)

# %% [markdown]
# ## Blocks of a step
#
# Training blocks come from the training neurons alone, salient ones and as many others (with one
# other for four salient ones, a network on real stacks took specks for neurites: after 40 steps its
# whole-volume Dice was 0.23 instead of 0.42). They are changed as another microscope might have: flipped, turned, zoomed, brighter, noisier, with a slice missing.
# Block and target move together. Step $k$ of seed $s$ always gets the same blocks: that is what
# makes a run that was killed end in the same weights as one that was not.

# %%
split = runs.split_of(run, data)
train = [datasets.read_sample(pair, **target) for pair in split.train]
validation = [datasets.read_sample(pair, **target) for pair in split.validation]
source = training.BlockSource(train, depth, negatives=negatives, seed=seed)
print(f"{len(train)} training volumes, {len(source)} blocks; {len(validation)} for validation")

# %%
blocks, responses = source.batch(0, 4)
changed, moved = training.augment(blocks, responses, torch.Generator().manual_seed(seed))
panels = {f"block {i}": blocks[i, 0, depth // 2] for i in range(4)}
panels |= {f"augmented {i}": changed[i, 0, depth // 2] for i in range(4)}
panels |= {f"its target {i}": moved[i, depth // 2] for i in range(4)}
alt = "Four blocks, the same blocks augmented, and the targets that moved with them."
plotting.show(plotting.images(panels, columns=4, bar=True), "batch", alt, run.figures)

# %% [markdown]
# ## What the loss asks for
#
# Foreground is one voxel in a hundred of a salient block. Cross-entropy alone is content with an
# empty answer; *soft Dice* asks for overlap, whatever the share; *skeleton recall* (Kirchhoff et al.
# 2024) asks that the thin middle of every neurite be found, since one missing voxel there cuts a
# tree in two:
#
# $$ \mathcal{L} = 1 - \frac{2 \sum p\,y}{\sum p + \sum y} \; + \; \mathrm{CE}(p, y) \; + \; 1 -
# \frac{\sum p\,s}{\sum s}. $$
#
# The paper does not print its loss; `dice+focal` is the pair usual in its field.
#
# ## The network
#
# The inflated encoder, a light decoder on the tokens of four layers, and, if `stem` is on, two
# convolutions at full resolution. A token is 6 voxels wide at this scale and a neurite 2 to 4: the
# stem can place what the tokens have recognised. It is our addition and no part of the paper's
# rows in [06 Table 1](06_table1.ipynb).

# %%
shape = network.NetworkSettings(encoder, depth, 100, size, predict, stem)
net, report = network.build(shape, initialisation, weights_file, seed)
print(report or "scratch: random weights, asked for by name")

# %%
for name in ("encoder", "decoder", "stem", "head"):
    part = getattr(net, name, None)
    if part is not None:
        print(f"{name}: {sum(p.numel() for p in part.parameters()) / 1e6:.2f} million weights")

# %% [markdown]
# ## Training
#
# AdamW; the encoder's rate falls by a quarter per layer towards the pixels; five per cent of the
# steps warm up, a cosine brings the rate down. What is kept is a running average of the weights, at
# the step where it did best on the validation neurons: salient blocks and empty ones, weighted as
# they occur in the whole volume, since a network that sees neurites everywhere must not win. Stop the cell and run it again: it goes on.

# %% tags=["nbval-ignore-output"]
rates = {"encoder_rate": encoder_rate, "decoder_rate": decoder_rate, "layer_decay": layer_decay}
passes = {"steps": steps, "batch": batch, "accumulate": accumulate, "precision": precision}
check = {"validate_every": validate_every, "validation_blocks": validation_blocks}
chosen = {"loss": loss, "negatives": negatives, "frozen": frozen, "seed": seed}
other = {"checkpointing": checkpointing, "patience": patience}
settings = training.TrainingSettings(**rates, **passes, **check, **chosen, **other)

# %% tags=["nbval-ignore-output"]
fabric = training.start(device, precision)
watch = widgets.live(plotting.learning, "Loss and validation Dice, growing.")
how = (settings, target["tau"], fabric, watch)
result = training.train(net, train, validation, run.folder, *how)
print(f"best validation Dice {result.dice:.3f} at step {result.step}")

# %%
figure = plotting.learning(result.history)
alt = "Left: the loss and its terms over the steps; right: Dice on the validation blocks."
plotting.show(figure, "learning", alt, run.figures)

# %%
names = {"step": "step", "training_loss": "loss", "dice": "validation_dice"}
rows = [row for row in result.history if "validation_dice" in row]
points = [{name: row[key] for name, key in names.items()} for row in rows]
run.record("validation", {"neurons": "+".join(s.pair.name for s in validation), "points": points})

# %% [markdown]
# The training loss says how well the network knows *these* neurons. A network trained from scratch
# can have the lower training loss and be the worse one on a neuron that it has not seen: look at
# the right curve.
#
# ## What it has learnt
#
# Validation blocks, never trained on: image, target, probability.

# %%
check = training.validation_blocks(validation[0], shape, settings)
fullest = check.responses[:, depth // 2].sum((1, 2)).topk(3).indices
with torch.inference_mode():
    found = net.eval().cpu()(check.blocks[fullest]).sigmoid()
panels = {}
for i, at in enumerate(fullest):
    panels[f"image {i}"] = check.blocks[at, 0, depth // 2]
    panels[f"target {i}"] = check.responses[at, depth // 2] >= target["tau"]
    panels[f"probability {i}"] = found[i, found.shape[1] // 2]
alt = "Three validation blocks, each as image, target and predicted probability."
plotting.show(plotting.images(panels, columns=3, bar=True), "blocks", alt, run.figures)

# %% [markdown]
# ## Checkpoint
#
# You now have weights, and with them everything needed to rebuild the network.

# %% tags=["nbval-ignore-output"]
run.record(
    "about",
    {
        "data": data,
        "style": train[0].pair.style,
        "target": f"{target['kind']}, threshold {target['tau']}",
        "encoder": f"{encoder}, {initialisation}",
        "weights": weights.provenance(encoder, weights_file or None),
        "training": f"{result.history[-1]['step']} steps of {batch * accumulate}, stem={stem}, seed {seed}",
        "device": training.device_name(fabric),
        "validation": f"Dice {result.dice:.3f}, {len(validation)} volumes, step {result.step}",
    },
)
print(run.hand_over("checkpoint.safetensors"))

# %% [markdown]
# **Summary.** A loop of forty lines trains an inflated transformer on the blocks of a few neurons
# and keeps what does best on neurons it was not trained on.
#
# On a GPU: `papermill -f ../profiles/gpu.yaml 03_training.ipynb out.ipynb`.
#
# **Next:** [04 Evaluation](04_evaluation.ipynb).
#
# **References.** Loshchilov and Hutter, *Decoupled Weight Decay Regularization*, ICLR 2019. Xiao et
# al., *Unified Perceptual Parsing for Scene Understanding* (UPerNet), ECCV 2018. Kirchhoff et al.,
# *Skeleton Recall Loss*, ECCV 2024.
