"""What leaving half of each training tree untraced costs, and what `ignore_untraced` saves.

    python benchmarks/untraced.py FOLDER [--out data/results/untraced.csv]

FOLDER holds the pairs of `neurolib fetch fly-larva`. From each training tree, branches are cut off
until half of its length is left. The network of `profiles/ours-cpu.yaml` is trained for some steps
on the whole trees, on the halves, and on the halves with `ignore_untraced`; whole trees choose the
threshold and judge the masks, as in fold 0 of that profile.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from neurolib import blocking, evaluation, inference, network, training
from neurolib.course.runs import table
from neurolib.data import datasets
from neurolib.files import write_text
from neurolib.swc import Tree

TEST, VALIDATION = ("class1_sn23", "sensory_I4-2"), ("sensory_M4-4",)
KEPT = 0.5  # share of a tree's length


def cut(tree: Tree, kept: float, seed: int) -> Tree:
    """A tree without some of its branches, so that about a share `kept` of its length is left."""
    parent = tree.parent  # a parent comes before its children
    edge = np.linalg.norm(tree.xyz - tree.xyz[np.maximum(parent, 0)], axis=1) * (parent >= 0)
    left, alive = edge / edge.sum(), np.ones(len(parent), bool)
    for first in np.random.default_rng(seed).permutation(len(parent)):
        branch = np.zeros(len(parent), bool)
        branch[first] = True
        for node in range(first + 1, len(parent)):
            branch[node] = parent[node] >= 0 and branch[parent[node]]
        rest = alive & ~branch
        # Cutting twigs alone would spare all long branches; cutting trunks would leave too little.
        if left[alive & branch].sum() > 0.02 and left[rest].sum() > kept - 0.05:
            alive = rest
        if left[alive].sum() < kept + 0.05:
            break
    number = np.cumsum(alive) - 1
    parent = np.where(parent >= 0, number[parent], -1)[alive]
    return Tree(tree.xyz[alive], tree.radius[alive], tree.type[alive], parent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--out", type=Path, default=Path("data/results/untraced.csv"))
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    samples = [blocking.read_sample(pair) for pair in datasets.load_dataset(arguments.folder)]
    by_name = {sample.pair.name: sample for sample in samples}
    tests, held = ([by_name[name] for name in names] for names in (TEST, VALIDATION))
    whole = [sample for name, sample in by_name.items() if name not in TEST + VALIDATION]
    halves = []
    for number, sample in enumerate(whole):
        tree = cut(sample.tree, KEPT, number)
        response, mask = blocking.make_target(tree, sample.image.shape, sample.spacing)
        halves.append(replace(sample, tree=tree, response=response, mask=mask))
    ignored = [blocking.ignore_untraced(sample) for sample in halves]
    ways = {
        "whole trees": whole,
        "half of each tree": halves,
        "half with untraced ignored": ignored,
    }
    settings = training.TrainingSettings(
        steps=arguments.steps, batch=8, validate_every=50, validation_blocks=64
    )
    rows = []
    for way, train in ways.items():
        net, _ = network.build(network.NetworkSettings(stem=True, contrast=True), "center")
        with TemporaryDirectory() as folder:
            result = training.train(net, train, held, folder, settings)
            cut_at = inference.calibrate(result.checkpoint, held)
            net, _ = training.load_checkpoint(result.checkpoint)
        for sample in tests:
            chance = inference.predict_volume(
                net, sample.image, filter_weight=cut_at["filter_weight"]
            )
            mask = evaluation.drop_small(chance >= cut_at["threshold"], cut_at["min_size"])
            share = np.count_nonzero(mask & sample.mask)
            rows.append(
                {
                    "training trees": way,
                    "volume": sample.pair.name,
                    "dice": f"{evaluation.dice(mask, sample.mask):.4f}",
                    "precision": f"{share / max(1, mask.sum()):.4f}",
                    "recall": f"{share / sample.mask.sum():.4f}",
                    "steps": settings.steps,
                    "validation_dice": f"{cut_at['calibrated']:.4f}",
                }
            )
            lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
            write_text(arguments.out, "\n".join(lines) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
