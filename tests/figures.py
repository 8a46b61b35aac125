"""Compare figures of executed notebooks with stored ones; nbval itself compares only text."""

import base64
import io
import re
from collections.abc import Iterable, Mapping

import numpy as np
import pytest
from PIL import Image

FIGURE = re.compile(r'<figure id="([^"]+)">.*?;base64,([A-Za-z0-9+/=]+)', re.DOTALL)
# Limit of `difference`: another font stays far below, a moved curve does not.
LIMIT = 0.15


def figures(outputs: Iterable[Mapping]) -> dict[str, bytes]:
    """PNGs of a cell's outputs by their ids; the last one if a figure was drawn again."""
    pages = (output.get("data", {}).get("text/html", "") for output in outputs)
    pages = (page if isinstance(page, str) else "".join(page) for page in pages)
    return {name: base64.b64decode(code) for page in pages for name, code in FIGURE.findall(page)}


def difference(one: bytes, other: bytes) -> float:
    """Mean difference of two pictures as a share of the first one's contrast, seen at 64 x 64.

    Infinite if their sizes differ by more than a tenth.
    """
    first, second = (Image.open(io.BytesIO(data)).convert("RGB") for data in (one, other))
    ratios = np.divide(first.size, second.size)
    if np.abs(np.log(ratios)).max() > np.log(1.1):
        return np.inf
    a, b = (np.asarray(p.resize((64, 64), Image.Resampling.BOX), float) for p in (first, second))
    contrast = np.abs(a - np.median(a, axis=(0, 1))).mean()
    return np.abs(a - b).mean() / max(contrast, 1.0)


class Comparison:
    """A plugin that also compares the figures of each cell that nbval compares."""

    def __init__(self):
        self.compared = 0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item):
        result = yield
        if getattr(item, "test_outputs", None) is None or not item.options["check"]:
            return result
        drawn = figures(item.test_outputs)
        for name, stored in figures(item.cell.outputs).items():
            assert name in drawn, f"figure {name}: stored in the notebook, not drawn"
            apart = difference(stored, drawn[name])
            assert apart < LIMIT, (
                f"figure {name}: differs from the stored one by {apart:.2f} of its contrast; if it "
                "is to, run make notebooks"
            )
            self.compared += 1
        return result

    def pytest_terminal_summary(self, terminalreporter):
        if self.compared:
            terminalreporter.write_line(f"figures: {self.compared} like the stored ones")
