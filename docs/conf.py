"""Settings of the site: `make site` builds it, offline, from what is stored in the repository."""

import sys
from pathlib import Path

import neurolib

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

project = "3D neuron segmentation with 2D vision transformers"
author = "the authors of the course"
version = release = neurolib.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "pages",
]
exclude_patterns = ["**.ipynb_checkpoints", "slides.md"]  # slides: a page of their own

# Notebooks are shown as they are stored: `make notebooks` executes them, `make test` checks them.
nb_execution_mode = "off"
nb_render_markdown_format = "gfm"  # tables that a cell displays
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

add_module_names = False
smartquotes = False  # two dashes are an option of a command
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures stay short; docstrings have shapes and units
napoleon_google_docstring = False
napoleon_use_rtype = False
# `neurolib.swc` links where there is such an object; `spacing` is a word in italics.
default_role = "py:obj"

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["course.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
# MathJax would come from the network, or be larger than the site; browsers render MathML.
html_math_renderer = "mathml"
