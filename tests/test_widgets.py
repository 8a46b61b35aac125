"""Pictures with sliders, live and still."""

import asyncio
import base64
import io
import re

import ipywidgets
import nbformat
import numpy as np
import pytest
from ipywidgets.widgets.widget import _instances
from PIL import Image

from neurolib.course import plotting, runs, widgets


@pytest.fixture
def shown(monkeypatch):
    """Displayed outputs, as bundles of formats."""
    bundles = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw=False: bundles.append(data))
    return bundles


def child(bundle, place):
    """A part of a displayed widget, by its model's id, like in a front end."""
    state = ipywidgets.Widget.get_manager_state()["state"]
    box = state[bundle[runs.WIDGET]["model_id"]]["state"]
    return _instances[box["children"][place].removeprefix("IPY_MODEL_")]


def live_picture(bundle):
    return np.asarray(Image.open(io.BytesIO(child(bundle, -1).value)).convert("RGB")).astype(int)


def label(bundle):
    return child(bundle, -2).value


def still_picture(bundle):
    data = re.search(r"base64,([^\"]+)", bundle["text/html"])[1]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)


def test_a_slider_changes_the_live_picture_and_not_the_still_one(shown, tmp_path):
    image = np.zeros((3, 20, 20), np.float32)
    image[2] = 1.0
    slider = ipywidgets.IntSlider(0, 0, 2)
    mask = {"target": np.zeros(image.shape, bool)}
    widgets.explore(lambda z: plotting.layered(image, mask, z), "v", "words", tmp_path, z=slider)
    (bundle,) = shown
    assert bundle["text/plain"] == "words"
    assert 'alt="words"' in bundle["text/html"]
    assert slider.description == "z"
    before = live_picture(bundle)
    assert np.array_equal(before, still_picture(bundle))
    assert np.array_equal(before, np.asarray(Image.open(tmp_path / "v.png").convert("RGB")))
    slider.value = 2
    after = live_picture(bundle)
    assert after.mean() > before.mean() + 50
    assert np.array_equal(before, still_picture(bundle))


def test_of_a_slider_in_motion_only_its_last_place_is_drawn(shown):
    drawn = []

    def draw(z):
        drawn.append(z)
        return plotting.images({"a": np.eye(2 + z)})

    slider = ipywidgets.IntSlider(0, 0, 9)
    widgets.explore(draw, "v", "words", z=slider)

    async def move():
        for z in range(1, 8):
            slider.value = z
        await asyncio.sleep(10 * widgets.REST)

    asyncio.run(move())
    assert drawn == [0, 7]


def test_a_drawing_that_fails_says_so_and_keeps_the_picture(shown):
    def draw(z):
        return plotting.images({"a": np.eye(4)[: 4 - z]}) if z < 2 else None

    slider = ipywidgets.IntSlider(0, 0, 3)
    widgets.explore(draw, "v", "words", z=slider)
    before = live_picture(shown[0])
    slider.value = 3
    assert "not drawn: AttributeError" in label(shown[0])
    assert np.array_equal(live_picture(shown[0]), before)
    slider.value = 1
    assert label(shown[0]) == ""
    assert live_picture(shown[0]).shape != before.shape


def test_a_live_picture_is_drawn_anew_every_few_rows(shown):
    drawn = []

    def draw(rows):
        drawn.append(len(rows))
        return plotting.images({"a": np.eye(len(rows))})

    add = widgets.live(draw, "words", every=3)
    for step in range(7):
        add({"step": step})
    assert drawn == [3, 6]
    (bundle,) = shown
    assert "text/html" not in bundle
    assert bytes(_instances[bundle[runs.WIDGET]["model_id"]].value).startswith(b"\x89PNG")
    output = nbformat.v4.new_output("display_data", bundle)
    assert list(runs.strip_live_outputs([output])) == []


def test_layers_are_drawn_over_the_slice_they_belong_to():
    image = np.full((2, 30, 40), 0.5, np.float32)
    mask = np.zeros(image.shape, bool)
    mask[1, 10:20, 10:30] = True
    figures = {z: plotting.layered(image, {"target": mask}, z) for z in (0, 1)}
    panels = {z: [a.images[0].get_array() for a in figure.axes] for z, figure in figures.items()}
    assert np.allclose(panels[0][0], panels[0][1])
    assert not np.allclose(panels[1][1][mask[1]], 0.5)
    assert np.allclose(panels[1][1][~mask[1]], 0.5)
    for figure in figures.values():
        plotting.png(figure)


def test_kept_outputs_have_the_still_picture_only():
    live = {runs.WIDGET: {"model_id": "1"}, "text/html": "<figure>", "text/plain": "words"}
    bar = {runs.WIDGET: {"model_id": "2"}, "text/plain": " 50%|#####     | 5/10 [00:01]"}
    outputs = [nbformat.v4.new_output("display_data", data) for data in (live, bar)]
    (kept,) = runs.strip_live_outputs(outputs)
    assert kept.data == {"text/html": "<figure>", "text/plain": "words"}
    assert list(runs.strip_live_outputs([kept])) == [kept]
