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
# *How does a map of probabilities become a tree that other programs can open?*
#
# ![A traced tree over the reference tree in three dimensions.](attachment:tree-3d.png)
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/neurite-vit-course/neurite-vit-course/blob/main/notebooks/05_swc_tracing.ipynb)
# [![Open on Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/neurite-vit-course/neurite-vit-course/main?urlpath=lab/tree/notebooks/05_swc_tracing.ipynb)
#
# **You will be able to**
#
# - follow a tracer from a mask to a tree
# - say what makes a tracer fail, and which number shows it
# - compare two trees with ESA, DSA and PDS
# - tell the tracer's errors from the network's
# - trace segmentations that other programs made
#
# **Before this:** [04 Evaluation](04_evaluation.ipynb).
#
# **Takes** under a minute and 1.0 GB of memory on 2 cores, no GPU needed; 88 MB of weights, fetched once.

# %% jupyter={"source_hidden": true} tags=["parameters", "hide-input"]
run_dir = "../runs/small"  # folder in which the notebooks leave their results
data = "synthetic"  # "synthetic", "bigneuron-janelia", "rendered:FOLDER" of SWC files, or a folder of image/SWC pairs
overlap = 0.25  # share by which neighbouring tiles overlap, as in notebook 04
flips = False  # average the predictions of four mirrored copies, as in notebook 04
device = "auto"  # "auto", "cpu" or "cuda"
min_size = 0  # voxels; smaller pieces are dropped; 0: as chosen on validation neurons
bridge = 15.0  # longest gap that is closed, in voxels of the finest axis
real = "../data/results/ours.csv"  # tidy file that a sweep over real neurons has written

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
import heapq

import ipywidgets
import numpy as np
from IPython.display import Markdown, display
from scipy.spatial import KDTree

from neurolib import blocking, evaluation, inference, swc, tracing, training
from neurolib.course import baselines, plotting, robustness, runs, sweeps, widgets
from neurolib.course.exercises import tracing as exercises

run = runs.open_run(run_dir, "05_swc_tracing", globals())
target = runs.target_of(run)

# %% jupyter={"source_hidden": true} tags=["nbval-ignore-output", "hide-input"]
checkpoint = runs.checkpoint_of(run)
_, facts = training.load_checkpoint(checkpoint)
tests = [blocking.read_sample(pair, **target) for pair in runs.split_of(run, data).test]
options = {"overlap": overlap, "device": device, "flips": flips}
probability = {
    s.pair.name: inference.predicted(
        run.path("probability"), s.pair.name, checkpoint, s.image, **options
    )
    for s in tests
}

# %% [markdown]
# ## The tracer in six pictures
#
# How does a cloud of voxels become a tree that a neuroscientist can measure? A network makes mistakes of
# its own, so to see what the tracer does, we give it a mask that is perfect except for one flaw that most
# masks have, gaps: the target of the test neuron, with ten gaps cut into it. Each picture shows the whole
# neuron, where you see what is missing, and an enlarged window, where you see what is crooked.

# %%
sample, cut = tests[0], facts["threshold"]
smallest = {s.pair.name: min_size or inference.smallest_piece(facts, s.spacing) for s in tests}
mask, _ = robustness.degrade(sample.mask, sample.tree, "cuts", 10)
xy = sample.tree.xyz[:, :2]
crowd = KDTree(xy).query_ball_point(xy, 20, return_length=True)
centre = xy[crowd.argmax()][::-1]

# %% [markdown]
# ### 1. Mask
#
# The mask holds the voxels above the threshold. Voxels that touch, even if only at a corner, form a
# piece. Small pieces are dropped, here those of fewer than 20 voxels; where a network leaves larger
# specks, the limit has to be higher.

# %%
foreground = tracing.find_foreground(mask, sample.spacing, min_size=20)
pieces = plotting.categories(tracing.project(foreground, foreground.component))
alt = "The mask in pieces, separated by gaps; neighbouring pieces differ in colour."
plotting.show(plotting.zoomed(pieces, centre), "pieces", alt, run.figures)

# %% [markdown]
# ### 2. Radius
#
# The radius of a voxel is its distance to the background; it is large in the middle of a neurite. A step
# along z may be longer than one along x, so distances are physical, in units of the finest axis.

# %%
radius = tracing.measure_radius(foreground)
thick = tracing.project(foreground, radius)
alt = "The radius: neurites are bright in their middle and dark at their edges."
plotting.show(plotting.zoomed(thick, centre, label="radius, voxels"), "radius", alt, run.figures)

# %% [markdown]
# ### 3. Cost
#
# A path should run along the middle, and through voxels that the network is sure of. With the radius $r$,
# the largest radius of its piece $r_{max}$ and the probability $p$, a step costs its length times
#
# $$ c = e^{10 (1 - r / r_{max})^2} \; e^{2 (1 - p)}. $$
#
# The picture shows the cheapest voxel along each line of sight. Following the edge of a neurite costs
# about a hundred times as much as following its middle, so no short cut pays off.

# %%
cost = tracing.path_cost(foreground, radius)
cheap = tracing.project(foreground, np.log10(cost), np.fmin)
alt = "The cost: valleys along the middle of neurites, walls at their edges."
figure = plotting.zoomed(cheap, centre, label="cost, powers of ten")
plotting.show(figure, "cost", alt, run.figures)

# %% [markdown]
# ### 4. Paths
#
# Voxels that touch are neighbours in a graph. From the root (a cell body if there is one, otherwise an end
# far from the thickest place) the tracer takes the cheapest path to the farthest voxel. It counts everything
# within $1.5 r + 3$ of that path as explained, moves on to the farthest voxel that remains, and stops when
# none remains. This is TEASAR (Sato et al., 2000), applied to each piece separately.

# %%
paths = tracing.find_paths(foreground, radius, cost)
flat = [foreground.voxels[path][:, 1:] for path in paths]
lines = {"first path": flat[:1], "all others": flat[1:]}
alt = f"{len(paths)} paths over the mask, the first and longest in blue."
figure = plotting.zoomed(mask.max(axis=0), centre, lines)
plotting.show(figure, "paths", alt, run.figures)

# %% [markdown]
# The heart of the method fits on a page. *Dijkstra's algorithm* visits voxels in order of the cost of
# reaching them from the root, and for each one remembers the voxel before it:


# %% tags=["method"]
def dijkstra(graph, toll, root):
    """Cost of the cheapest way from the root to each voxel, and the voxel before it."""
    price = np.full(graph.shape[0], np.inf)
    home = np.full(graph.shape[0], root)
    price[root], queue = 0, [(0.0, root)]
    while queue:
        so_far, here = heapq.heappop(queue)
        if so_far > price[here]:
            continue  # a cheaper way has been found since
        for edge in range(*graph.indptr[here : here + 2]):
            there, total = graph.indices[edge], so_far + toll[edge]
            if total < price[there]:
                price[there], home[there] = total, here
                heapq.heappush(queue, (total, there))
    return price, home


# %% [markdown]
# *Backtracking* follows `home` from the farthest voxel until it meets an earlier path. *Invalidation*
# strikes out what the new path explains:


# %% tags=["method"]
def paths_by_hand(piece, radius, cost, root):
    graph, points = piece.neighbours, piece.points
    start = np.repeat(np.arange(len(points)), np.diff(graph.indptr))
    toll = graph.data * (cost[start] + cost[graph.indices]) / 2
    price, home = dijkstra(graph, toll, root)
    way = np.zeros(len(points))  # length of the way home
    for voxel in np.argsort(price)[1:]:
        step = np.linalg.norm(points[voxel] - points[home[voxel]])
        way[voxel] = way[home[voxel]] + step
    live, on_path, paths = np.ones(len(points), bool), {root}, []
    nearby = KDTree(points)
    for tip in np.argsort(-way, kind="stable"):
        if live[tip]:
            path = [tip]
            while path[-1] not in on_path:  # backtracking
                path.append(home[path[-1]])
            reach = 1.5 * radius[path] + 3
            for ball in nearby.query_ball_point(points[path], reach):
                live[ball] = False  # invalidation
            on_path.update(path)
            paths.append(path[::-1])
    return paths


# %%
alone = np.zeros(mask.shape, bool)
alone[tuple(foreground.voxels[foreground.component == 0].T)] = True
piece = tracing.find_foreground(alone, sample.spacing)

# %%
inner = tracing.measure_radius(piece)
tolls = tracing.path_cost(piece, inner)
theirs = tracing.find_paths(piece, inner, tolls)
by_hand = paths_by_hand(piece, inner, tolls, theirs[0][0])

# %%
equal = [np.array_equal(a, b) for a, b in zip(by_hand, theirs, strict=False)]
if not equal[0]:  # two paths may cost the same; either is then right
    assert np.isclose(tolls[by_hand[0]].sum(), tolls[theirs[0]].sum(), rtol=0.01)
print(f"{sum(equal)} of {len(theirs)} paths match the library's, voxel for voxel")

# %% [markdown]
# The library adds two rules. First, a path does not explain a voxel if the way from it to the path,
# through the mask, is more than twice that reach, so a neurite that runs close beside another is still
# traced. Second, where slices are further apart than pixels, the reach along z grows with the height of
# the mask (`tracing.measure_extent`): a microscope draws neurites taller than they are wide.

# %% [markdown]
# ### 5. Pruning
#
# Some paths lead only to a bump on the mask. This mask has no bumps, so we create some by deleting three
# in ten of its voxels at random. A path that reaches no more than 6 voxels beyond the surface of its
# parent is taken for a bump and dropped. The price is that equally short true branches are lost as well.

# %%
rough, _ = robustness.degrade(mask, sample.tree, "noise", 0.3)
rugged = tracing.find_foreground(rough, sample.spacing)
depth = tracing.measure_radius(rugged)
many = tracing.find_paths(rugged, depth, tracing.path_cost(rugged, depth))
kept = tracing.prune_paths(many, rugged, depth)

# %%
tips = {path[-1] for path in kept}
lines = {"kept": [], "dropped": []}
for path in many:
    lines["kept" if path[-1] in tips else "dropped"].append(rugged.voxels[path][:, 1:])
place = lines["dropped"][0][0] if lines["dropped"] else centre
alt = "Paths over a rough mask: branches are kept, short paths to bumps dropped."
figure = plotting.zoomed(rough.max(axis=0), place, lines, size=40)
plotting.show(figure, "pruning", alt, run.figures)
print(f"{len(many)} paths, {len(kept)} kept")

# %% [markdown]
# ### 6. Bridging
#
# The ends of two pieces are joined if they are close (within 15 voxels) and point at each other: each end
# may deviate by up to 60 degrees, and the two deviations may add up to at most 80. The cheapest bridges
# come first, and none may close a loop. Each bridge is a guess, so `trace` and `segment` print how many
# there are. All other gaps stay open, and the result is a forest: it does not claim what it does not know.
# (Ten cuts can leave fewer than eleven pieces: two cuts may overlap, or the piece between them may be too
# small to keep.)

# %%
kept = tracing.prune_paths(paths, foreground, radius)
pieces = tracing.paths_to_tree(kept, foreground, radius)
joined, bridges = tracing.bridge_gaps(pieces, mask, sample.spacing, bridge)
guesses = [np.array([item.start[1::-1], item.end[1::-1]]) for item in bridges]
place = guesses[0].mean(axis=0) if guesses else centre
lines = {"paths": flat, "bridges": guesses}
alt = f"{len(bridges)} bridges between pieces; the window shows the cheapest."
figure = plotting.zoomed(mask.max(axis=0), place, lines, size=40)
plotting.show(figure, "bridging", alt, run.figures)
print(f"{np.sum(pieces.parent < 0)} trees before, {np.sum(joined.parent < 0)} after bridging")

# %% [markdown]
# ### Exercise 1: a cut that the tracer cannot mend
#
# A neurite of radius 2 comes from (x, y) = (10, 10), runs along x to (60, 10), turns there, and runs along
# y to (60, 60). You cut one ball of radius 4 out of it. Where must its centre be for the traced neurite to
# stay in two pieces? Predict `(x, y)`: the check makes the cut, traces, and tells you what happened.

# %% tags=["exercise"]
place = ...

exercises.q1(place)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# place = (60, 10)
# ```
#
# At the turn, each end points 45 degrees past the other. Either deviation alone would be allowed, but
# together they make 90 degrees, and the tracer accepts 80. Far from the turn, the ends face each other. On
# your own data, look at turns and branching points first: that is where cuts stay open.
# </details>

# %% [markdown]
# Finally, smoothing moves the nodes off the voxel grid, the ends are drawn back from the surface, and one
# node is kept every two voxels. `tracing.trace` does all of this.
#
# ### Exercise 2: parents first
#
# Many programs read an SWC file line by line and need every parent before its children. You are given the
# row of each node's parent (-1 for a root). Return the rows in an order that works.


# %% tags=["exercise"]
def parents_first(parent):
    return ...


exercises.q2(parents_first)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def parents_first(parent):
#     depth, above = np.zeros(len(parent), int), np.array(parent)
#     while (above >= 0).any():
#         depth += above >= 0
#         above = np.where(above >= 0, parent[above], -1)
#     return np.argsort(depth, kind="stable")
# ```
#
# A parent is one step nearer to its root than its child. With a cycle in the tree, this `while` would
# never end, so `swc.read_swc` looks for cycles first.
# </details>

# %% [markdown]
# ## Where tracing fails
#
# Now we damage the perfect mask in five ways, more and more severely, and trace it each time. *Recall* is
# the share of the reference's length that is found, *precision* the share of the traced length that is
# right, both within 2 voxels; ESA, explained below, is the mean distance between the two trees. Each panel
# plots the measure that best shows its damage. We compare the tracer with a variant that drops pieces of
# fewer than 200 voxels, and with plain thinning (Lee et al., 1994), which joins the voxels of the skeleton
# into trees and does nothing else. You can add any function that takes the same arguments as
# `tracing.trace`; `benchmarks/trees.py` has one for kimimaro (Silversmith et al., 2021).


# %%
def strict(*arguments, **options):
    return tracing.trace(*arguments, **options, min_size=200)


tracers = {"neurolib": tracing.trace, "thinning": robustness.trace_skeleton}
tracers |= {"pieces ≥ 200": strict}
rows = robustness.robustness(sample.mask, sample.tree, tracers, sample.spacing)

# %% tags=["nbval-ignore-output"]
shown = {"cuts": "recall", "specks": "precision", "noise": "ESA"}
shown |= {"blur": "recall", "threshold": "recall"}


def line(kind, tracer):
    points = [r for r in rows if (r["damage"], r["tracer"]) == (kind, tracer)]
    return [r["amount"] for r in points], [r[shown[kind]] for r in points]


# %% tags=["nbval-ignore-output"]
panels = {f"{kind}: {shown[kind]}": {name: line(kind, name) for name in tracers} for kind in shown}
amounts = [robustness.DAMAGE[kind][0] for kind in shown]
alt = "One panel for each of five kinds of damage: the measure that it changes, by tracer."
plotting.show(plotting.curves(panels, amounts), "robustness", alt, run.figures)

# %% [markdown]
# *Cuts* cost recall. Bridges restore some of it, and dropping small pieces costs most, since the piece
# between two cuts is small. *Specks* cost precision, and only the size of a piece tells them apart from
# neurites: the rule that is wrong for cuts is right here. *Noise* costs little: even with 60 % of the
# voxels gone, the ESA is about one voxel (a little less for plain thinning). *Blur* and a *threshold* that
# is too high are harmless up to a point and then take nearly everything, because a neurite four voxels
# wide has nothing to spare. So look at the number of pieces before you choose `min_size`, and err on the
# side of a threshold that is too low.
#
# ## Two trees compared
#
# Both trees are sampled at about one point per voxel, and for each point we take the distance to the
# nearest segment of the other tree. **ESA** (*entire structure average*) is the mean distance, averaged
# over the two directions. Points two or more voxels (of the finest axis) away are "different". **PDS**
# (*percentage of different structure*) is their share, and **DSA** (*different structure average*) is
# their mean distance. ESA and DSA are in µm if the voxel size of every stack is known and none is 1 µm
# along all axes, as in generated stacks; otherwise they are in voxels of the finest axis. DSA says nothing
# about how many points differ, ESA nothing about where.
#
# We trace two trees, one from the prediction and one from the target itself. The second shows what the
# tracer alone gets wrong; the rest is the network's fault. In the prediction, pieces smaller than the size
# chosen on validation neurons are dropped.

# %% tags=["nbval-ignore-output"]
found = {"target": {}, "prediction": {}}
for s in tests:
    options = {"spacing": s.spacing, "bridge": bridge}
    found["target"][s.pair.name] = tracing.trace(s.mask, **options)
    options |= {"threshold": cut, "min_size": smallest[s.pair.name]}
    tree = tracing.attempt(probability[s.pair.name], **options)
    found["prediction"][s.pair.name] = tree
    if len(tree.xyz):
        swc.write_swc(run.path("swc") / f"{s.pair.name}.swc", tree, "traced from a prediction")

# %% tags=["nbval-ignore-output"]
unit = evaluation.length_unit(tests)


def compared(tree, s):
    return {"unit": unit} | evaluation.compare(tree, s.tree, evaluation.in_unit(s.spacing, unit))


scores = [
    {"neuron": s.pair.name, "traced from": origin} | compared(of[s.pair.name], s)
    for s in tests
    for origin, of in found.items()
]
display(Markdown(runs.table([evaluation.name_unit(row) for row in scores])))

# %% [markdown]
# In the stored run, hardly anything in the tree from the prediction is false, but three tenths of the
# neuron is missing (recall 0.69). The picture shows the same: blue is right, orange was traced where there
# is nothing, and purple was missed.

# %%
name = sample.pair.name
groups = {
    f"traced from the {origin}": robustness.agreement(of[name], sample.tree, sample.spacing)
    for origin, of in found.items()
}
# %%
alt = "Two trees over three projections each: correct parts blue, false orange, missed purple."
figure = plotting.judged(sample.image, groups, sample.spacing)
plotting.show(figure, "traced", alt, run.figures)

# %% [markdown]
# In the tree from the target, hardly anything is false or missed, so the errors on the right are mostly
# the network's. On this neuron, a perfect mask would fix nearly all of them; this does not show what a
# better tracer could do with the predicted mask. One number is biased all the same, the length: traces
# made from the targets of 32 gold-standard trees (Janelia) are 2 to 14 % shorter than the trees (median
# 7 %) at a recall of 0.96 to 1.00. Smoothing the trees themselves at two voxels takes off 2 to 6 % (median
# 4 %): that much is the zigzag of the hand that drew them, and the rest is the tracer's doing. Here are
# the same trees in 3D and, where k3d is installed, a view that you can rotate:

# %%
trees = {"traced": found["prediction"][name], "reference": sample.tree}
alt = "The traced tree and the reference in a three-dimensional box."
figure = plotting.tree_3d(trees, evaluation.in_unit(sample.spacing, unit), unit)
plotting.show(figure, "tree-3d", alt, run.figures)

# %% tags=["nbval-ignore-output"]
scene = plotting.scene(sample.image, trees, sample.spacing)
if scene is not None:
    scene.display()

# %% [markdown]
# ### Another threshold
#
# The threshold was chosen for the best Dice on a validation neuron. For a tree, another may be better:
# move its slider, and the one for the size below which pieces are dropped.


# %% tags=["nbval-ignore-output"]
def retrace(threshold, smallest):
    options = {"spacing": sample.spacing, "min_size": smallest, "bridge": bridge}
    tree = tracing.attempt(probability[name], threshold=threshold, **options)
    score = compared(tree, sample)
    words = ", ".join(f"{key} {score[key]:.2f}" for key in ("recall", "precision", "ESA"))
    parts = robustness.agreement(tree, sample.tree, sample.spacing)
    return plotting.judged(sample.image, {f"{words} {unit}": parts})


alt = "The tree traced at a threshold, judged against the reference; sliders move both settings."
low = ipywidgets.FloatSlider(round(cut, 2), min=0.05, max=0.95, step=0.05, description="threshold")
size = ipywidgets.IntSlider(smallest[name], 1, 3000, description="min_size")
widgets.explore(retrace, "retrace", alt, run.figures, threshold=low, smallest=size)

# %% [markdown]
# ## Real neurons
#
# The table shows the same for confocal volumes of *Drosophila* neurons, for three filters and for `ours`,
# the network of notebook 06, which was trained on other neurons. All slices were predicted, and the trees
# were traced with the settings of this notebook. One command writes the file that is read here:
# `neurolib sweep profiles/ours-cpu.yaml --rows ours`.

# %%
measured = sweeps.read_results(real, "tree") if Path(real).is_file() else []
columns = ("volume", "network", "dice", "precision", "recall", "esa", "pds")
lines = sorted(measured, key=lambda row: row["volume"])
display(Markdown(runs.table([{column: row[column] for column in columns} for row in lines])))

# %%
recall = sweeps.by_network(measured, "recall")
levels = {name: of for name, of in recall.items() if name in baselines.FILTERS}
learnt = {name: of for name, of in recall.items() if name not in levels}
alt = "Recall of each real neuron's tree: a dot for a network, lines for three filters."
if measured:
    figure = plotting.dots(learnt, "recall of the tree", references=levels)
    plotting.show(figure, "real-recall", alt, run.figures)

# %% [markdown]
# In the stored file, `ours` finds more of each tree than any filter, and its tree is the
# closest (ESA) on all but two neurons: on `class1_sn23` the threshold's is closest, on `sensory_I4-2` the
# ridge filter's. Still, its trees are far from complete: between a fifth and more than half of each neuron
# is missing. Given the targets of such neurons, the tracer reaches an ESA of 0.3 to 0.4 voxels: most of
# what is missing here is already missing from the mask.
#
# ## Your own segmentation
#
# The tracer does not care where a mask comes from. On the command line, you can give it masks, labels and
# probabilities from nnU-Net, ilastik or Cellpose:
#
# ```
# neurolib trace cell_labels.tif --out cell.swc --seed 120,88,14
# neurolib trace cell_probability.tif --out cell.swc --threshold 0.4 --spacing 0.5,0.2,0.2
# neurolib trace many_cells.tif --out-dir trees
# ```
#
# The last line writes a tree for every label. Whole numbers are read as labels, and all labels except 0 as
# foreground, unless `--label` picks one label or `--threshold` says that the numbers are probabilities.
# (ilastik numbers its classes from 1, so there you need `--label`.)
#
# ## Checkpoint
#
# You now have an SWC file for each test neuron, with unique ids, parents first, no cycles, and one root
# per tree. The last table scores the trees traced from the filters' masks of notebook 04; in the stored
# run, none of them is as close to the reference (ESA) as the network's tree.

# %% jupyter={"source_hidden": true} tags=["nbval-ignore-output", "hide-input"]
neurons = run.metrics().get("neurons", {})
for s in tests:
    score = compared(found["prediction"][s.pair.name], s)
    neurons[s.pair.name] = neurons.get(s.pair.name, {}) | score
    if len(found["prediction"][s.pair.name].xyz):
        print(run.describe_file(f"swc/{s.pair.name}.swc"))
run.record("neurons", neurons)

# %% jupyter={"source_hidden": true} tags=["nbval-ignore-output", "hide-input"]
by_filter, rows = run.metrics().get("filters", {}), []
for s in tests:
    for method, chosen in run.metrics().get("chosen", {}).items():
        mask = baselines.Baseline(**chosen).mask(s.image, s.spacing)
        tree = tracing.attempt(mask, s.spacing, bridge=bridge, min_size=1)
        score = compared(tree, s)
        by_filter[s.pair.name][method] |= score
        rows.append({"neuron": s.pair.name, "traced from": method, **evaluation.name_unit(score)})
run.record("filters", by_filter)
display(Markdown(runs.table(rows) if rows else "Filters: see notebook 04."))

# %% [markdown]
# **Summary.** A graph on the foreground, a cost that favours the middle, and shortest paths make a tree;
# tracing the target, too, tells the tracer's errors from the network's. Traced from the targets of six
# real confocal neurons of *Drosophila*, trees have an ESA of 0.32 to 0.42 voxels, a PDS of 0.007 to 0.025,
# a precision of 1.000 and a recall of 0.956 to 0.992. The paper stops at the mask (Dice 0.50 for center
# inflation, 0.42 from scratch); trees are what neuroscientists measure.
#
# **Next:** [06 Table 1](06_table1.ipynb).
#
# **References.** Sato et al., *TEASAR*, Pacific Graphics 2000. Peng et al., *V3D*, Nature
# Biotechnology 2010 (ESA, DSA, PDS). Lee, Kashyap and Chu, *Building skeleton models via 3-D medial
# surface/axis thinning algorithms*, CVGIP 1994.
# Silversmith et al., *Kimimaro*, Zenodo 2021. Cannon et al., *An on-line archive of reconstructed
# hippocampal neurons*, 1998 (SWC).
