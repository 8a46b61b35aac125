"""The site: it builds without a warning; links, pictures, sources; two pages in a browser."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urldefrag

import nbformat
import pytest
import yaml
from browser import chromium, keep, needs_chromium, new_page

from neurolib.course.runs import NOTEBOOKS, REPOSITORY

# Elements that a browser fetches by itself, and the attribute with the address.
FETCHED = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src"}


class Page(HTMLParser):
    """Ids, links, pictures and fetched addresses of an HTML page."""

    def __init__(self, path):
        super().__init__()
        self.path, self.ids, self.links, self.fetched, self.images = path, set(), [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids.add(attributes.get("id"))
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        if tag == "img":
            self.images.append(attributes)
        if tag in FETCHED and FETCHED[tag] in attributes:
            self.fetched.append(attributes[FETCHED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going"]
    command += ["-d", folder / "doctrees", REPOSITORY / "docs", folder / "html"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "html"


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html")}


def test_every_notebook_and_module_has_a_page_with_its_figures(site):
    for path in NOTEBOOKS.glob("[0-9]*.ipynb"):
        page = (site / f"notebooks/{path.stem}.html").read_text(encoding="utf-8")
        figures = set(re.findall(r'<figure id=\\"([^"]*)\\"', path.read_text(encoding="utf-8")))
        assert figures == set(re.findall(r'<figure id="([^"]*)"', page))
        shown = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
        assert shown.index(shown[0], 1), "the picture at the top is one of the figures"
        assert "google.colab" not in page
        assert "<p>| " not in page, "a table that a cell displays is no table on its page"
    for path in (REPOSITORY / "neurolib").rglob("[!_]*.py"):
        name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        assert f'id="module-{name}"' in (site / f"api/{name}.html").read_text(encoding="utf-8")


def test_every_link_inside_the_site_leads_somewhere(pages):
    checked = 0
    for page in pages.values():
        for link in page.links:
            address, place = urldefrag(link)
            if re.match(r"[a-z]+:", address):
                continue
            target = (page.path.parent / unquote(address)).resolve() if address else page.path
            assert target.is_file(), f"{page.path.name}: {link}"
            if place and target in pages:
                assert unquote(place) in pages[target].ids, f"{page.path.name}: {link}"
            checked += 1
    assert checked > 1000


def test_no_page_names_a_folder_of_the_machine_that_built_it(site):
    assert str(REPOSITORY) not in (site / "own_data.html").read_text(encoding="utf-8")


def test_every_picture_has_words(pages):
    for page in pages.values():
        for image in page.images:
            assert image.get("alt", "").strip(), f"{page.path.name}: {image.get('src', '')[:80]}"


def test_nothing_is_fetched_from_elsewhere(site, pages):
    for page in pages.values():
        for address in page.fetched:
            assert not re.match(r"(https?:)?//", address), f"{page.path.name}: {address}"
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", text), style.name


def test_timetables_add_up_and_take_the_minutes_of_the_notebooks(site):
    text = (site / "teaching.html").read_text(encoding="utf-8")
    tables = re.findall(r"<tbody>(.*?)</tbody>", text, re.DOTALL)
    tables = [table for table in tables if re.search(r"<p>\d\d:\d\d</p>", table)]
    assert len(tables) == 4
    for rows in tables:
        rows = [re.findall(r"<td>(.*?)</td>", row, re.DOTALL) for row in rows.split("</tr>")[:-1]]
        rows = [[re.sub(r"<[^>]*>|\s", "", cell) for cell in row] for row in rows]
        clock = [60 * int(row[0][:2]) + int(row[0][3:]) for row in rows]
        assert [b - a for a, b in pairwise(clock)] == [int(row[1]) for row in rows[:-1]]
    for path in NOTEBOOKS.glob("[0-9]*.ipynb"):
        first = nbformat.read(path, as_version=4).cells[0].source
        minutes = re.search(r"\*\*Takes\*\* (.*?) and ", first)[1]
        assert re.search(rf"notebooks/{path.stem}\.html(?:(?!</tr>).)*{minutes}", text, re.DOTALL)


@needs_chromium
def test_every_slide_fits_its_screen_and_keys_turn_it(site):
    with chromium() as browser, new_page(browser) as (page, errors):
        page.set_viewport_size({"width": 1280, "height": 720})
        page.goto((site / "slides.html").as_uri())
        sections = page.query_selector_all("section")
        over = [s.evaluate("s => s.scrollHeight - s.clientHeight") for s in sections]
        assert len(over) > 15
        assert max(over) <= 1, over
        pictures = page.query_selector_all("img")
        assert min(picture.bounding_box()["height"] for picture in pictures) > 200
        page.keyboard.press("ArrowRight")
        page.wait_for_function("Math.abs(scrollY - innerHeight) < 2")
        keep(page, "slides")
        assert errors == []


@needs_chromium
def test_two_pages_open_without_an_error(site):
    with chromium() as browser:
        for name in ("notebooks/01_data_blocking", "teaching"):
            with new_page(browser) as (page, errors):
                page.goto((site / f"{name}.html").as_uri())
                keep(page, f"site-{Path(name).name}")
                assert errors == []
                broken = "() => [...document.images].filter(i => !i.naturalWidth).length"
                assert page.evaluate(broken) == 0
                for equation in page.query_selector_all("div.math math"):
                    assert equation.bounding_box()["height"] > 20


def test_the_workflow_publishes_what_make_builds():
    workflow = (REPOSITORY / ".github/workflows/site.yml").read_text(encoding="utf-8")
    (job,) = yaml.safe_load(workflow)["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    (folder,) = [s["with"]["path"] for s in job["steps"] if "upload-pages" in s.get("uses", "")]
    assert [command.split()[:2] for command in commands] == [["make", "site"]]
    assert re.search(rf"docs {folder}$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
