"""Pictures that answer to sliders, with a still picture where nothing can answer.

A widget works where a kernel runs: JupyterLab, Binder, Colab. On a page (nbviewer, HTML, a report)
the same output shows its still picture, drawn at the controls' first values.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from neurolib.course.plotting import keep, markup, png
from neurolib.course.runs import WIDGET

# Seconds for which a control must rest before its picture is drawn.
REST = 0.05


def live(draw: Callable[[list], Figure], alt: str, every: int = 10) -> Callable[[dict], None]:
    """Display a picture of something that grows, and return what makes it grow by one row.

    Nothing of it is kept in a stored notebook: when all is done, show the figure once more.

    Parameters
    ----------
    draw : callable
        Takes all rows so far and gives a figure.
    alt : str
        For front ends that show no widgets.
    every : int
        Rows between two drawings.

    Returns
    -------
    callable
        Takes one row, as `neurolib.training.train` gives it to `on_step`.
    """
    import ipywidgets
    from IPython.display import display

    picture = ipywidgets.Image(format="png")
    rows: list[dict] = []

    def add(row: dict) -> None:
        rows.append(row)
        if len(rows) % every == 0:
            picture.value = png(draw(rows))

    display(
        {
            WIDGET: {"version_major": 2, "version_minor": 0, "model_id": picture.model_id},
            "text/plain": alt,
        },
        raw=True,
    )
    return add


def explore(
    draw: Callable[..., Figure], name: str, alt: str, folder: str | Path | None = None, **controls
) -> None:
    """Display a figure that is drawn anew whenever one of its controls changes.

    Parameters
    ----------
    draw : callable
        Takes the value of each control by its name and gives a figure.
    name, alt, folder
        As in `neurolib.course.plotting.show`; of the still picture.
    **controls : ipywidgets
        Sliders, drop-down lists: anything with a ``value``.
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
        # An error in a callback reaches nobody: it must be seen where the picture stays as it was.
        try:
            live.value, problem.value = picture(), ""
        except Exception as error:
            problem.value = f"not drawn: {type(error).__name__}: {error}; run the cell again"

    waiting: list[asyncio.TimerHandle] = []

    def changed(_) -> None:
        # A slider in motion tells every place it passes: only the one where it rests is drawn.
        for handle in waiting:
            handle.cancel()
        try:
            waiting[:] = [asyncio.get_running_loop().call_later(REST, update)]
        except RuntimeError:  # no loop, no slider in motion
            update()

    for key, control in controls.items():
        control.description = control.description or key
        control.observe(changed, "value")
    box = ipywidgets.VBox([*controls.values(), problem, live])
    # Front ends take the richest format they know: the widget, else the picture, else the words.
    display(
        {
            WIDGET: {"version_major": 2, "version_minor": 0, "model_id": box.model_id},
            "text/html": markup(still, name, alt),
            "text/plain": alt,
        },
        raw=True,
    )
