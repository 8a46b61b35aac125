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
# # SWC tracing: from a probability to a tree
#
# *A tracer built in six pictures, and an SWC file that other programs can open.*
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/neurite-vit-course/neurite-vit-course/blob/main/notebooks/05_swc_tracing.ipynb)
# [![Open on Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/neurite-vit-course/neurite-vit-course/main?urlpath=lab/tree/notebooks/05_swc_tracing.ipynb)
#
# **You will be able to**
#
# - follow a tracer from a mask to a tree
# - compare two trees with ESA, DSA and PDS
# - tell the tracer's errors from the network's
#
# **Before this:** [04 Evaluation](04_evaluation.ipynb).
#
# **Takes** under a minute and 0.7 GB of memory on 2 cores, no GPU needed; 88 MB of weights, fetched once.

# %% tags=["parameters"]
run_dir = "../runs/small"  # folder in which the notebooks leave their results
data = "synthetic"  # "synthetic", "bigneuron-janelia", "rendered:FOLDER" of SWC files, or a folder of image/SWC pairs
overlap = 0.0  # share by which neighbouring tiles overlap, as in notebook 04
device = "auto"  # "auto", "cpu" or "cuda"
min_size = 200  # voxels; smaller pieces are dropped: a tube of radius 1.9 and length 18 has 200
bridge = 15.0  # longest gap that is closed, in voxels of the finest axis

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

from neurolib import datasets, evaluation, inference, plotting, runs, swc, tracing, training

run = runs.open_run(run_dir)
target = runs.target_of(run)

# %% tags=["nbval-ignore-output"]
checkpoint = runs.checkpoint_of(run)
_, facts = training.load_checkpoint(checkpoint)
tests = [datasets.read_sample(pair, **target) for pair in runs.split_of(run, data).test]
probability = {
    s.pair.name: inference.predicted(
        run.path("probability"), s.pair.name, checkpoint, s.image, overlap=overlap, device=device
    )
    for s in tests
}

# %% [markdown]
# ## The tracer in six pictures
#
# **1. Mask.** What is above the threshold, in pieces that touch. Small pieces are dropped: a speck is
# a few voxels wide, a neurite of the target's radius that is 18 voxels long has 200. (The tracer's own
# default is 20, for masks made by hand.)

# %%
sample, cut = tests[0], facts["threshold"]
found = probability[sample.pair.name]
foreground = tracing.find_foreground(found, sample.spacing, cut, min_size)

# %% [markdown]
# **2. Radius.** The distance of each voxel to the background: large in the middle of a neurite.

# %%
radius = tracing.measure_radius(foreground)

# %% [markdown]
# **3. Cost.** A path is to run along the middle, and through voxels the network is sure of: with the
# radius $r$ and the probability $p$, a step costs its length times
#
# $$ c = e^{10 (1 - r / r_{max})^2} \; e^{2 (1 - p)}. $$

# %%
cost = tracing.path_cost(foreground, radius)

# %% [markdown]
# **4. Paths.** From the root (a soma if there is one, else an end of the longest path), the cheapest
# path to the farthest voxel; what lies near it is explained; then the next farthest, until all is.

# %%
paths = tracing.find_paths(foreground, radius, cost)

# %% [markdown]
# **5. Pruning.** Thick neurites have bumps; a path shorter than 6 voxels beyond its parent's surface
# is no branch.

# %%
kept = tracing.prune_paths(paths, foreground, radius)

# %%
volumes = {
    "1 mask": tracing.paint(foreground, np.ones(len(radius))),
    "2 radius": tracing.paint(foreground, radius),
    "3 cost (log)": tracing.paint(foreground, 1 + np.log(cost)),
    "4 paths": tracing.paint(foreground, tracing.path_order(foreground, paths)),
    "5 pruned": tracing.paint(foreground, tracing.path_order(foreground, kept)),
}
panels = {name: volume.max(axis=0) for name, volume in volumes.items()}
alt = "Five projections: mask, radius, cost, all paths, and the paths left after pruning."
figure = plotting.images(panels, columns=3, cmap="viridis", bar=True)
plotting.show(figure, "tracer", alt, run.figures)

# %% [markdown]
# **6. Bridging.** Ends of two pieces that face each other across a short gap are joined. Each bridge
# is a guess and is reported as one.

# %%
bridges = []
options = {"spacing": sample.spacing, "threshold": cut, "min_size": min_size}
tree = tracing.trace(found, bridge=bridge, log=bridges, **options)
forest = tracing.trace(found, bridge=0.0, **options)
panels = {"before bridging": forest, "after": tree}
figure = plotting.tree_3d(panels, sample.spacing)
alt = "The traced trees before and after bridging, in a three-dimensional box."
plotting.show(figure, "bridging", alt, run.figures)

# %% tags=["nbval-ignore-output"]
print(f"{np.sum(forest.parent < 0)} trees before, {np.sum(tree.parent < 0)} after bridging")
for item in bridges:
    print(f"bridged {item.length:.1f} voxels, mean probability in the gap {item.probability:.2f}")

# %% [markdown]
# ## Two trees compared
#
# Both trees are sampled at about one point a voxel; for each point, the distance to the nearest
# segment of the other tree. **ESA** is the mean distance, averaged over the two directions. Points
# two or more voxels away are "different": **PDS** is their share, **DSA** their mean distance. Recall
# is the share of the reference's length that was found, precision the share of ours that is right.
#
# Two trees are traced: from the prediction, and from the target itself. The second shows what the
# tracer alone gets wrong; the rest is the network's.

# %% tags=["nbval-ignore-output"]
rows = {}
for s in tests:
    options["spacing"] = s.spacing
    from_network = tracing.trace(probability[s.pair.name], bridge=bridge, **options)
    swc.write_swc(run.path("swc") / f"{s.pair.name}.swc", from_network, "traced from a prediction")
    from_target = tracing.trace(s.mask, s.spacing, bridge=bridge)
    for origin, traced in (("prediction", from_network), ("target", from_target)):
        rows[s.pair.name, origin] = evaluation.compare(traced, s.tree)
header = [{"neuron": name, "traced from": origin, **row} for (name, origin), row in rows.items()]
print(runs.table(header))

# %%
trees = {"traced": tree, "reference": sample.tree}
figure = plotting.projections({sample.pair.name: sample.image}, trees, sample.spacing)
alt = "The traced tree and the reference over three projections of the image."
plotting.show(figure, "traced", alt, run.figures)

# %%
alt = "The traced tree and the reference in a three-dimensional box."
plotting.show(plotting.tree_3d(trees, sample.spacing), "tree-3d", alt, run.figures)

# %% [markdown]
# ## Checkpoint
#
# You now have an SWC file per test neuron: unique ids, parents first, no cycle, one root per tree.

# %% tags=["nbval-ignore-output"]
neurons = run.metrics().get("neurons", {})
for s in tests:
    neurons[s.pair.name] = neurons.get(s.pair.name, {}) | rows[s.pair.name, "prediction"]
    print(run.hand_over(f"swc/{s.pair.name}.swc"))
run.record("neurons", neurons)

# %% [markdown]
# **Summary.** A graph on the foreground, a cost that likes the middle, and shortest paths make a
# tree; its errors can be told from the network's by tracing the target. The paper stops at the mask;
# trees are what neuroscientists measure.
#
# **Next:** [06 Table 1](06_table1.ipynb).
#
# **References.** Sato et al., *TEASAR*, Pacific Graphics 2000. Peng et al., *V3D*, Nature
# Biotechnology 2010 (ESA, DSA, PDS). Cannon et al., *An on-line archive of reconstructed hippocampal
# neurons*, 1998 (SWC).
