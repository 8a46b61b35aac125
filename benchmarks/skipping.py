"""What it saves and costs not to run tiles without bright voxels, counted on a folder of pairs.

    python benchmarks/skipping.py FOLDER [--out data/results/skipping.csv]

No network is run. Tiles of 5 x 100 x 100 without overlap, target "sironi" at 0.1; the level is the
95th percentile of each volume (`neurolib.inference.empty_level`).
"""

import argparse
from pathlib import Path

from neurolib import blocking, inference
from neurolib.course.runs import table
from neurolib.data import datasets
from neurolib.files import write_text
from neurolib.network import NetworkSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--out", type=Path, default=Path("data/results/skipping.csv"))
    arguments = parser.parse_args()
    rows = []
    for pair in datasets.load_dataset(arguments.folder):
        sample = blocking.read_sample(pair)
        row = {"volume": pair.name}
        for name, level in (("zero", 0.0), ("p95", inference.empty_level(sample.image))):
            cost = inference.skipping(sample.image, sample.mask, level, NetworkSettings(), 0.0)
            row |= {f"{name}_level": level, f"{name}_tiles": cost.tiles}
            row[f"{name}_foreground"] = cost.foreground
        rows.append(row)
    lines = [",".join(rows[0])]
    lines += [
        ",".join(f"{v:.4f}" if isinstance(v, float) else v for v in row.values()) for row in rows
    ]
    write_text(arguments.out, "\n".join(lines) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
