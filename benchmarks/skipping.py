"""What is saved and lost by skipping tiles in which nothing stands out, on a folder of pairs.

    python benchmarks/skipping.py FOLDER [--out data/results/skipping.csv]

No network is run. Tiles of 5 x 100 x 100, with the default overlap of
`neurolib.inference.Tiling`; target "sironi" at 0.1.
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
    """Share of the tiles that are skipped, and share of the foreground that no tile then covers."""

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
    settings: NetworkSettings,
    overlap: float = inference.Tiling.overlap,
) -> Skipping:
    """What is saved and lost by skipping the tiles in which nothing stands out."""
    every, some = Certain(settings), Certain(settings)
    options = {"overlap": overlap, "device": "cpu", "progress": False}
    whole = np.maximum(image, 1e-6)  # not even tiles that are exactly zero are skipped
    inference.predict_volume(every, whole, skip_empty=False, **options)
    live = inference.predict_volume(some, image, **options)
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
        cost = skipping(sample.image, sample.mask, NetworkSettings())
        rows.append({"volume": pair.name, "tiles": cost.tiles, "foreground": cost.foreground})
    lines = [",".join(rows[0])]
    lines += [
        ",".join(f"{v:.4f}" if isinstance(v, float) else v for v in row.values()) for row in rows
    ]
    write_text(arguments.out, "\n".join(lines) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
