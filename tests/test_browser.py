"""JupyterLab from end to end: open a notebook, run it, move a slider, answer a question.

Without ``NOTEBOOKS=all`` only those of `ALWAYS` are opened: nbval runs the cells of the others.
Screenshots are in build/screenshots.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import nbformat
import pytest
from browser import chromium, keep, needs_chromium, new_page

from neurolib.course.runs import NOTEBOOKS, REPOSITORY

pytestmark = needs_chromium
# Seconds. Machines are shared, so a page may be slow without hanging.
START, RUN, ANSWER = 180, 900, 180
ALWAYS = ("00_start_here", "01_data_blocking", "02_weight_inflation")
SOURCES = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
# JupyterLab would fetch news for every new settings folder.
NEWS = {"fetchNews": "false", "checkForUpdates": False}
# JupyterLab keeps cells that are out of sight out of the document.
CELLS = "jupyterapp.shell.currentWidget.content.widgets"
STATE = f"""() => {CELLS}.map(cell => cell.model.toJSON())"""
IS_DONE = f"() => {CELLS}.every(c => c.model.type !== 'code' || c.model.executionCount > 0)"
OPENING = f"{CELLS}[0].node.querySelector('img[src^=data]')"
IDLE = ".jp-StatusBar-TextItem:has-text('Idle')"
HAS_RUN = f"([i, before]) => {CELLS}[i].model.executionCount > before"
SLIDER = f"() => {CELLS}.findIndex(cell => cell.node.querySelector('.noUi-handle'))"
HAS_CHANGED = f"([i, src]) => {CELLS}[i].node.querySelector('.widget-image').src !== src"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab without settings of this machine; its address and token."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "notebooks").mkdir()
    for path in SOURCES:
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":  # stored outputs must not look new
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, folder / "notebooks" / path.name)
    shutil.copytree(REPOSITORY / "data/results", folder / "data/results")
    settings = folder / "settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps(NEWS))
    places = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data/jupyter",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
    }
    env = os.environ | {name: str(folder / place) for name, place in places.items()}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1"]
    command += ["--ServerApp.port=0", "--allow-root", "--expose-app-in-browser"]
    command += ["--LabApp.extension_manager=readonly", str(folder / "notebooks")]
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
    try:
        yield address(folder, server)
    finally:
        server.terminate()
        server.wait(60)


def address(folder, server):
    """Address and token of a server, which it writes down when it listens."""
    for _ in range(2 * START):
        for path in (folder / "runtime").glob("jpserver-*.json"):
            facts = json.loads(path.read_text())
            return facts["url"], facts["token"]
        assert server.poll() is None, (folder / "log").read_text()
        time.sleep(0.5)
    raise AssertionError((folder / "log").read_text())


@pytest.fixture(scope="module")
def browser():
    with chromium() as program:
        yield program


def menu(page, name, entry):
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile(f"^{name}$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{entry}$")).click()


def show(page, number):
    """Scroll to a cell; return its element."""
    page.evaluate(f"i => {CELLS}[i].parent.scrollToItem(i, 'center')", number)
    cell = page.evaluate_handle(f"i => {CELLS}[i].node", number).as_element()
    cell.wait_for_element_state("visible")
    return cell


def printed(page, number):
    """The text that a code cell printed."""
    outputs = page.evaluate(STATE)[number]["outputs"]
    return "".join("".join(out["text"]) for out in outputs if out["output_type"] == "stream")


def answer(page, number, text):
    """Type into a code cell and run it; return the text that it prints."""
    before = page.evaluate(f"i => {CELLS}[i].model.executionCount", number)
    show(page, number).query_selector(".cm-content").click()
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.insert_text(text)
    page.keyboard.press("Shift+Enter")
    wait(page, HAS_RUN, [number, before], ANSWER)
    show(page, number)
    return printed(page, number)


def wait(page, what, value, seconds):
    page.wait_for_function(what, arg=value, timeout=1000 * seconds, polling=500)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_reader_runs_moves_and_answers(path, lab, browser):
    if path.stem not in ALWAYS and os.environ.get("NOTEBOOKS") != "all":
        pytest.skip("nbval runs it; NOTEBOOKS=all opens it here too")
    url, token = lab
    with new_page(browser, START) as (page, errors):
        page.goto(f"{url}lab/tree/{path.name}?token={token}&reset")
        page.wait_for_selector(".jp-Notebook .jp-Cell")
        page.wait_for_selector(IDLE)
        page.wait_for_function(f"() => {OPENING}?.naturalWidth > 200")

        menu(page, "Run", "Run All Cells")
        try:
            wait(page, IS_DONE, None, RUN)
        finally:
            keep(page, f"{path.stem}-run")
        cells = page.evaluate(STATE)
        for cell in cells:
            failures = [out for out in cell.get("outputs", []) if out["output_type"] == "error"]
            assert not failures, cell["source"]

        stored = nbformat.read(path, as_version=4).cells
        number = page.evaluate(SLIDER)
        assert (number >= 0) == any("Slider(" in cell.source for cell in stored)
        if number >= 0:
            cell = show(page, number)
            source = cell.query_selector(".widget-image").get_attribute("src")
            cell.query_selector(".noUi-handle").focus()
            for _ in range(3):
                page.keyboard.press("ArrowRight")
            wait(page, HAS_CHANGED, [number, source], ANSWER)
            page.wait_for_selector(IDLE)
            assert "not drawn" not in cell.inner_text()
            keep(page, f"{path.stem}-slider")

        if failures := exercise(stored):
            number, stub, solution = failures
            question = stub.splitlines()[-1]
            assert printed(page, number).startswith("○")
            assert answer(page, number, stub.replace("...", "0")).startswith("✗")
            keep(page, f"{path.stem}-wrong")
            assert "● right" in answer(page, number, f"{solution}\n\n{question}")
            keep(page, f"{path.stem}-right")
        assert errors == []


def exercise(cells):
    """Number, stub and solution of the first exercise; none if there is no exercise."""
    for number, cell in enumerate(cells):
        if "exercise" in cell.metadata.get("tags", []):
            text = cells[number + 1].source
            return number, cell.source, re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    return None
