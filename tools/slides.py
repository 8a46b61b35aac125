"""The lecture's slides: one HTML page from ``docs/slides.md`` and the stored notebooks' figures.

A slide ends at ``---``. ``![alt](02:kernels)`` is the figure *kernels* of notebook 02, and a
quotation (``>``) is a note for the lecturer, which is shown in print only.
"""

import html
import re
from pathlib import Path

import nbformat
from markdown_it import MarkdownIt

import build

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
html {{ scroll-snap-type: y mandatory; font: 3.3vmin/1.45 system-ui, sans-serif; color: #222; }}
body {{ margin: 0; counter-reset: slide; }}
section {{ box-sizing: border-box; height: 100vh; padding: 5vmin 8vmin; scroll-snap-align: start;
  display: flex; flex-direction: column; counter-increment: slide; position: relative; }}
section::after {{ content: counter(slide); position: absolute; right: 3vmin; bottom: 2vmin;
  color: #767676; }}
h1 {{ margin: 0 0 2vmin; font-size: 5vmin; line-height: 1.2; color: #0072B2; }}
p, ul, ol {{ margin: 0 0 1.5vmin; }}
p.figure {{ flex: 1; min-height: 0; text-align: center; }}
img {{ width: 100%; height: 100%; object-fit: contain; }}
blockquote {{ display: none; }}
@media print {{
  @page {{ size: landscape; margin: 0; }}
  section {{ break-after: page; }}
  blockquote {{ display: block; margin: 0; padding-left: 2vmin; border-left: 4px solid #E69F00;
    font-size: 2.4vmin; }}
}}
</style></head><body>
{slides}
<script>
addEventListener("keydown", event => {{
  const step = {{ArrowRight: 1, ArrowDown: 1, PageDown: 1, " ": 1, ArrowLeft: -1, ArrowUp: -1,
    PageUp: -1}}[event.key];
  if (step) {{ event.preventDefault(); scrollBy(0, step * innerHeight); }}
}});
</script></body></html>
"""


def figures(folder: Path = build.FOLDER) -> dict[str, str]:
    """The figures of the stored notebooks as base64 of PNG, by ``number:id``."""
    return {
        f"{path.name[:2]}:{name}": data
        for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))
        for name, data in build.drawn_figures(nbformat.read(path, as_version=4)).items()
    }


def slides(text: str, pictures: dict[str, str]) -> str:
    """The page of a Markdown text; a figure that no notebook draws raises a KeyError."""

    def picture(match: re.Match) -> str:
        source = f"data:image/png;base64,{pictures[match[2]]}"
        return f'<p class="figure"><img alt="{html.escape(match[1])}" src="{source}"></p>'

    text = re.sub(r"(?m)^!\[(.*)\]\((\d\d:[\w-]+)\)$", picture, text)
    render = MarkdownIt("commonmark").render
    parts = [f"<section>\n{render(part)}</section>" for part in text.split("\n---\n")]
    title = re.search(r"(?m)^# (.*)", text)[1]
    return PAGE.format(title=html.escape(title), slides="\n".join(parts))
