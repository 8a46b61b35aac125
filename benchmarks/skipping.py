"""What it saves and costs not to run tiles without bright voxels, counted on a folder of pairs.

    python benchmarks/skipping.py FOLDER [--out data/results/skipping.csv]

No network is run. Tiles of 5 x 100 x 100 without overlap, target "sironi" at 0.1; the level is the
95th percentile of each volume (`neurolib.inference.empty_level`).
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from neurolib import blocking, inference
from neurolib.course.runs import table
from neurolib.data import datasets
from neurolib.files import write_text
from neurolib.network import NetworkSettings


@dataclass(frozen=True)
class Skipping:
    """Share of the tiles that are skipped, and share of the foreground's votes lost with them."""

    tiles: float
    foreground: float


class Certain(torch.nn.Module):
    """Predicts 1 everywhere, and counts the tiles that it is given."""

    def __init__(self, settings: NetworkSettings) -> None:
        super().__init__()
        self.settings, self.tiles = settings, 0

    def forward(self, blocks: torch.Tensor) -> torch.Tensor:
        self.tiles += len(blocks)
        slices = blocks[:, 0] if self.settings.predict == "all" else blocks[:, 0, :1]
        return torch.full_like(slices, torch.inf)


def skipping(
    image: np.ndarray,
    mask: np.ndarray,
    level: float,
    settings: NetworkSettings,
    overlap: float,
) -> Skipping:
    """What is saved and lost by skipping the tiles that have no voxel above an intensity.

    Each voxel of the true foreground, `mask`, counts by the share of its votes, weighted as in a
    prediction, that come from skipped tiles.
    """
    every, some = Certain(settings), Certain(settings)
    options = {"overlap": overlap, "device": "cpu", "progress": False}
    inference.predict_volume(every, np.maximum(image, 1e-6), **options)
    live = inference.predict_volume(some, image, skip_below=level, **options)
    lost = 1 - live[mask].mean(dtype=float) if mask.any() else 0.0
    return Skipping(1 - some.tiles / every.tiles, float(lost))


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
            cost = skipping(sample.image, sample.mask, level, NetworkSettings(), 0.0)
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
