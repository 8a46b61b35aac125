"""Pictures with sliders, and a still picture where no kernel runs.

A widget needs a kernel: JupyterLab, Binder, Colab. On a page (nbviewer, HTML, a report) the same
output shows a still picture, drawn at the first values of the controls.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from neurolib.course.plotting import keep, markup, png
from neurolib.course.runs import WIDGET

# Seconds for which a control must rest before the picture is drawn.
REST = 0.05


def live(draw: Callable[[list], Figure], alt: str, every: int = 10) -> Callable[[dict], None]:
    """Display a picture that grows, and return the function that adds a row to it.

    Pass that function to `neurolib.training.train` as `on_step`. `draw` makes a figure of all rows
    so far; it is called every few rows. `alt` is for front ends without widgets. A stored notebook
    does not keep the picture: show the figure once more at the end.
    """
    import ipywidgets
    from IPython.display import display

    picture = ipywidgets.Image(format="png")
    rows: list[dict] = []

    def add(row: dict) -> None:
        rows.append(row)
        if len(rows) % every == 0:
            picture.value = png(draw(rows))

    display({**_view(picture), "text/plain": alt}, raw=True)
    return add


def _view(widget: Any) -> dict[str, dict]:
    """A widget as part of an output."""
    return {WIDGET: {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}}


def explore(
    draw: Callable[..., Figure], name: str, alt: str, folder: str | Path | None = None, **controls
) -> None:
    """Display a figure that is redrawn whenever one of its controls changes.

    `draw` takes the value of each control by its name and returns a figure. Controls are widgets
    with a ``value``: sliders, drop-down lists. The other parameters, for the still picture, are
    those of `neurolib.course.plotting.show`.
    """
    import ipywidgets
    from IPython.display import display

    def picture() -> bytes:
        return png(draw(**{key: control.value for key, control in controls.items()}))

    still = picture()
    keep(still, name, folder)
    live = ipywidgets.Image(value=still, format="png")
    problem = ipywidgets.Label()

    def update() -> None:
        # Nobody sees an error in a callback, so it is shown beside the old picture.
        try:
            live.value, problem.value = picture(), ""
        except Exception as error:
            problem.value = f"not drawn: {type(error).__name__}: {error}; run the cell again"

    waiting: list[asyncio.TimerHandle] = []

    def changed(_) -> None:
        # A moving slider reports every place; draw only the one where it rests.
        for handle in waiting:
            handle.cancel()
        try:
            waiting[:] = [asyncio.get_running_loop().call_later(REST, update)]
        except RuntimeError:  # without a loop, no slider moves
            update()

    for key, control in controls.items():
        control.description = control.description or key
        control.observe(changed, "value")
    box = ipywidgets.VBox([*controls.values(), problem, live])
    # A front end takes the richest format that it knows.
    page = {"text/html": markup(still, name, alt), "text/plain": alt}
    display(_view(box) | page, raw=True)
