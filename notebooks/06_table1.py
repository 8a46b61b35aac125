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
# # Table 1: does pre-training on photographs help?
#
# *The paper's experiment as a sweep of notebooks, with every neuron shown and intervals on the differences.*
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/neurite-vit-course/neurite-vit-course/blob/main/notebooks/06_table1.ipynb)
# [![Open on Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/neurite-vit-course/neurite-vit-course/main?urlpath=lab/tree/notebooks/06_table1.ipynb)
#
# **You will be able to**
#
# - read a comparison of methods neuron by neuron
# - put an interval on a paired difference
# - run the experiment on your own volumes
#
# **Before this:** [03 Training](03_training.ipynb) and [04 Evaluation](04_evaluation.ipynb).
#
# **Takes** under a minute and 0.4 GB of memory on 2 cores, no GPU needed; nothing to download.

# %% tags=["parameters"]
run_dir = "../runs/small"  # folder in which the notebooks leave their results
results = "../data/results/table1.csv"  # tidy file that a sweep has written
baseline = "2D scratch"  # row that the others are compared with, as "3D scratch"

# %% tags=["bootstrap"]
import sys

if "google.colab" in sys.modules:  # in JupyterLab and on Binder there is nothing to do
    # !git clone -q --depth 1 https://github.com/neurite-vit-course/neurite-vit-course
    # %cd neurite-vit-course/notebooks
    # %pip install -q -e ..
    import site

    site.main()  # lets this running Python see the package just installed

# %%
from neurolib import evaluation, plotting, runs, sweeps

run = runs.open_run(run_dir)
rows = sweeps.read_results(results)
print(f"{len(rows)} measurements: {', '.join(sorted({row['neuron'] for row in rows}))}")

# %% [markdown]
# ## The experiment
#
# The paper's rows: the 2D transformer (a block of one slice) and the 3D one (five), from scratch or
# pre-trained, with the two ways to inflate. A row that was not run is not in the table. All else is equal: decoder and its first
# weights, blocks, augmentation, steps, the way the threshold is chosen. No stem: that is ours.
# Nothing is chosen on a held-out neuron. All networks share one learning rate, which was not searched
# for any of them: a scratch network may want another.
#
# A sweep runs notebooks 03 and 04 once per network, seed and fold, and writes one tidy file,
# one line per measurement:
#
# `neurolib sweep profiles/table1-cpu.yaml`

# %%
for line in sweeps.describe_results(rows):
    print(line)

# %% [markdown]
# ## Every neuron
#
# A line per neuron, its mean over the seeds; a bar for the mean over neurons.

# %%
dice = sweeps.by_network(rows, "dice")
means = {n: evaluation.bootstrap_interval(list(v.values())) for n, v in dice.items()}
intervals = {name: (found.low, found.high) for name, found in means.items()}
figure = plotting.dots(dice, "Dice", intervals)
alt = "Dice of each neuron under five networks; lines join the values of one neuron."
plotting.show(figure, "dice", alt, run.figures)

# %%
figure = plotting.dots(sweeps.by_network(rows, "hd95"), "Hd95 (voxels)")
alt = "Hd95 of each neuron under five networks; lines join the values of one neuron."
plotting.show(figure, "hd95", alt, run.figures)

# %% [markdown]
# ## The differences
#
# All networks saw the same neurons: what counts is the difference on each neuron. Its interval comes
# from drawing neurons with replacement, its p-value from flipping signs, all of them.

# %%
print(runs.table(evaluation.compare_networks(dice, baseline)))

# %% [markdown]
# **Read it with care.** With few neurons the smallest p that flipping signs can give is $2 / 2^n$,
# and a bootstrap over few neurons is too narrow. Both numbers say what these neurons say, no more.
#
# ## Beside the paper
#
# | network | Dice, paper (n = 4) | Hd95, paper |
# |---|---|---|
# | 2D scratch | 0.4469 | 7.649 |
# | 2D pre-trained | 0.4876 | 2.893 |
# | 3D scratch | 0.4174 | 37.943 |
# | 3D average | 0.4942 | 2.863 |
# | 3D center | 0.5045 | 2.810 |
#
# Not comparable number by number: other volumes, another target (its threshold decides the Dice, see
# notebook 01), a network trained for minutes on two cores instead of hours on a GPU. What can be
# compared is the order of the rows, and the size of the differences against their spread.
#
# ## Checkpoint
#
# You now have a comparison that shows its neurons, its intervals and its n.

# %%
summary = {name: {"dice": found.mean, "n": found.n} for name, found in means.items()}
run.record("table1", summary)
print(f"metrics.json: {len(summary)} networks")

# %% [markdown]
# **Summary.** The question is whether what a transformer has learnt from photographs helps it on
# neurons it has not seen. The table above answers it for these volumes and this budget.
#
# On your own volumes: copy `profiles/table1-cpu.yaml`, name your folder in it, and run the sweep.
#
# **References.** Cheng et al. (Table 1). Bouthillier et al., *Accounting for Variance in Machine
# Learning Benchmarks*, MLSys 2021.
