"""A report as one HTML file that needs no network: figures to explore, images, tables, and the code behind them."""

from __future__ import annotations

import html
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from PIL.Image import Dither, Image, Quantize
from PIL.Image import open as open_image

from dit_lens.arguments.checks import checked
from dit_lens.core.runs.files import write_text
from dit_lens.core.runs.html import data_url
from dit_lens.errors import OpError
from dit_lens.old_names import find_old_names

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")


@dataclass(frozen=True)
class Section:
    """One finding: a heading, the sentence that states it, and what shows it.

    >>> Section("Spectrum", "Three channels stand out.").figures
    ()

    heading: title of the section.
    sentence: the sentence that states the finding.
    figures: plotly figures and PIL images, in reading order; neighbouring images share a row.
    table: numbers, with the units of columns in ``table.attrs["units"]``, a dict, if the names do not say them.
    code: what made this, shown to be copied.
    captions: one per figure, or none; that of an image is also its alternative text.
    """

    heading: str
    sentence: str
    figures: tuple[go.Figure | Image, ...] = ()
    table: pd.DataFrame | None = None
    code: str = ""
    captions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for figure in self.figures:
            if not isinstance(figure, Image) and not hasattr(figure, "to_plotly_json"):
                raise OpError(
                    f"Section {self.heading!r} takes plotly figures and PIL images, and got {type(figure).__name__}."
                )
        if self.captions and len(self.captions) != len(self.figures):
            raise OpError(
                f"Section {self.heading!r} has {len(self.figures)} figures and {len(self.captions)} captions. "
                "Give one each, or no captions."
            )


@checked
def write_page(path: str | Path, *, title: str, lead: str, sections: Sequence[Section]) -> Path:
    """Writes one self-contained HTML page and returns its path.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> page = write_page(
    ...     folder / "index.html", title="A page", lead="What it says.", sections=[Section("One", "It is.")]
    ... )
    >>> page.name, page.read_text("utf-8").count("<h2")
    ('index.html', 1)

    The file is written whole or not at all, folders included; plotly.js is inside, once, if there is a plotly figure
    (5 MB). The page loads nothing: its own security policy forbids it. It follows the reader's light or dark setting.

    Nothing in a text is read as HTML.

    path: path of the file.
    title: heading of the page.
    lead: paragraph under the heading.
    sections: sections in order; each is in the table of contents.
    """
    path = Path(path)
    page = _page(title, lead, sections)
    return write_text(path, page)


@checked
def write_figures(figures: Mapping[Path, go.Figure], *, width: int = 760, scale: float = 2) -> list[Path]:
    """Writes plotly figures as image files, dark on white; returns their paths, or [] if none can be drawn here.

    The suffix of a path chooses the format: .png, .svg, .pdf, or .webp, which is a sixth as large as PNG: it has
    the 256 colours that come nearest to those of the figure, and loses nothing else.
    It takes the package kaleido (``pip install 'dit-lens[png]'``) and a browser that ``find_browser`` finds, which is
    started once for all figures. If both are there and drawing fails, that is an error.

    figures: path -> figure.
    width: width in CSS pixels; a figure keeps its own height.
    scale: image pixels per CSS pixel.
    """
    browser = find_browser()
    if browser is None or find_spec("kaleido") is None or not figures:
        return []
    import kaleido

    with TemporaryDirectory() as folder:
        # The WebP of a browser has losses, which show around letters; so it draws PNG, and PIL writes WebP.
        files = {path: Path(folder) / f"{i}.png" if path.suffix == ".webp" else path for i, path in enumerate(figures)}
        drawings = [_drawing(figure, files[path], width, scale) for path, figure in figures.items()]
        # kaleido would fetch MathJax from the network.
        kaleido.write_fig_from_object_sync(drawings, cancel_on_error=True, kopts={"path": browser, "mathjax": False})
        for path, file in files.items():
            if file != path:
                few = open_image(file).convert("RGB").quantize(256, Quantize.MEDIANCUT, dither=Dither.NONE)
                few.convert("RGB").save(path, lossless=True, quality=75, method=4)
    return list(figures)


def _drawing(figure: go.Figure, path: Path, width: int, scale: float) -> dict[str, Any]:
    """What kaleido draws: the figure, dark on white, and the file it writes.

    figure: the figure.
    path: path of the file; its suffix is the format.
    width: width in CSS pixels.
    scale: image pixels per CSS pixel.
    """
    import plotly.graph_objects as go

    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = go.Figure(figure).update_layout(paper_bgcolor="white", font_color="#222222")
    size = {"format": path.suffix[1:], "width": width, "height": drawn.layout.height or 420, "scale": scale}
    return {"fig": drawn.to_plotly_json(), "path": path, "opts": size}


__getattr__ = find_old_names(__name__, {"write_pngs": "write_figures"})


def find_browser() -> str | None:
    """This machine's Chromium or Chrome: what CHROMIUM or BROWSER_PATH name, else the first on PATH; None without."""
    named = [os.environ[name] for name in ("CHROMIUM", "BROWSER_PATH") if os.environ.get(name)]
    return next((found for name in [*named, *_BROWSERS] if (found := shutil.which(name))), None)


def _page(title: str, lead: str, sections: Sequence[Section]) -> str:
    names = _anchors([section.heading for section in sections])
    contents = "".join(
        f'<li><a href="#{name}">{_text(section.heading)}</a></li>'
        for name, section in zip(names, sections, strict=True)
    )
    body = "\n".join(_section(name, section) for name, section in zip(names, sections, strict=True))
    script = ""
    if any(not isinstance(figure, Image) for section in sections for figure in section.figures):
        from plotly.offline import get_plotlyjs

        script = f"<script>{get_plotlyjs()}</script>\n<script>{_DRAW}</script>"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{_text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{_text(title)}</h1>
<p class="lead">{_text(lead)}</p>
</header>
<nav aria-label="Contents"><ul>{contents}</ul></nav>
<noscript><p>The figures are drawn by JavaScript inside this file; images and tables show without it.</p></noscript>
{body}
<footer>Made with dit_lens {version("dit-lens")}. This file is complete: it loads nothing from elsewhere.</footer>
</main>
<script>{_COPY}{_WIDE}</script>
{script}
</body>
</html>
"""


def _section(name: str, section: Section) -> str:
    captions = section.captions or ("",) * len(section.figures)
    parts, row = [], []
    for i, (figure, caption) in enumerate(zip(section.figures, captions, strict=True)):
        if isinstance(figure, Image):
            count = f"image {i + 1} of {len(section.figures)}"
            row.append(_image(figure, caption, caption or f"{section.heading}, {count}"))
            continue
        parts += _row(row)
        row = []
        parts.append(_plot(figure, caption, f"{name}-{i + 1}"))
    parts += _row(row)
    if section.table is not None:
        parts.append(_table(section.table))
    if section.code:
        code = _text(section.code.strip("\n"))
        parts.append(
            '<div class="code"><div class="bar"><span>The code that made this</span>'
            f'<button type="button">Copy</button></div><pre tabindex="0"><code>{code}</code></pre></div>'
        )
    head = f"<h2>{_text(section.heading)}</h2>\n<p>{_text(section.sentence)}</p>"
    return "\n".join([f'<section id="{name}">', head, *parts, "</section>"])


def _row(images: list[str]) -> list[str]:
    return [f'<div class="images">{"".join(images)}</div>'] if images else []


def _image(image: Image, caption: str, alternative: str) -> str:
    # Small images are enlarged by a whole number, so that their pixels stay square.
    width = image.width * max(1, 192 // image.width)
    below = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
    return (
        f'<figure><img src="{data_url(image)}" alt="{_text(alternative)}" width="{width}" '
        f'height="{image.height * width // image.width}">{below}</figure>'
    )


def _plot(figure: go.Figure, caption: str, name: str) -> str:
    layout = figure.layout
    label = re.sub(r"<[^>]*>", " ", f"{layout.title.text or ''}. {layout.title.subtitle.text or ''}").strip(" .")
    # Inside a script element only "<" could end the element.
    data = figure.to_json().replace("<", "\\u003c")
    below = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
    height = int(layout.height or 420)
    return (
        f'<figure><div class="plot" tabindex="0"><div id="{name}" role="group" '
        f'aria-label="{_text(label or "figure")}" style="height:{height}px"></div></div>{below}'
        f'<script type="application/json" data-for="{name}">{data}</script></figure>'
    )


def _table(table: pd.DataFrame) -> str:
    units = table.attrs.get("units", {})
    numeric = {column: table[column].dtype.kind in "iuf" for column in table}
    heads = "".join(
        f"<th scope='col'{_right(numeric[column])}>{_text(column)}"
        + (f" <small>({_text(units[column])})</small>" if column in units else "")
        + "</th>"
        for column in table
    )
    rows = "".join(
        "<tr>"
        + "".join(f"<td{_right(numeric[column])}>{_text(_cell(value))}</td>" for column, value in row.items())
        + "</tr>"
        for row in table.to_dict("records")
    )
    return f'<div class="table" tabindex="0"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


def _right(numeric: bool) -> str:
    return " class='number'" if numeric else ""


def _cell(value: Any) -> str:
    """A number to three figures, a missing one as a dash, anything else as it is."""
    if value is None or value != value:  # noqa: PLR0124 - NaN alone is not itself
        return "–"
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _anchors(headings: Sequence[str]) -> list[str]:
    """One name per heading that is fit for an address, no two alike."""
    found: list[str] = []
    for i, heading in enumerate(headings, start=1):
        name = re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-")
        found.append(f"s{i}-{name}" if name else f"s{i}")
    return found


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


# Nothing from anywhere: scripts and styles are those in the file, images are data. WebGL traces of plotly.js compile
# code at run time, hence unsafe-eval; blob: is its "download as PNG".
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --page: #ffffff; --panel: #f6f8fa; --line: #d1d9e0;
  --link: #0969da; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --page: #0d1117; --panel: #161b22; --line: #3d444d; --link: #4493f8; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 2rem 1.25rem 3rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.35rem; line-height: 1.3; margin: 0 0 .4rem; padding-top: 2.2rem; }
p { margin: 0 0 1rem; max-width: 46rem; overflow-wrap: break-word; }
.lead { font-size: 1.12rem; color: var(--soft); }
a { color: var(--link); }
nav { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: .7rem 1rem; }
nav ul { margin: 0; padding: 0; list-style: none; columns: 18rem; }
figure { margin: 0 0 1rem; min-width: 0; }
figcaption { color: var(--soft); font-size: .85rem; max-width: 46rem; }
.plot { overflow-x: auto; }
.plot > div { width: 100%; min-width: 620px; }
.more { mask-image: linear-gradient(to left, transparent, #000 2.5rem); }
@media (max-width: 660px) {
  .plot::before { content: 'Scroll sideways to see all of this figure →'; position: sticky; left: 0; display: block;
    width: fit-content; visibility: hidden; color: var(--link); font-size: .8rem; }
  .plot.more::before { visibility: visible; }
}
.images { display: flex; flex-wrap: wrap; gap: 1rem; }
.images img { display: block; max-width: 100%; height: auto; image-rendering: pixelated;
  border: 1px solid var(--line); }
.images figcaption { max-width: 192px; margin-top: .3rem; }
.table { overflow-x: auto; max-height: 28rem; margin: 0 0 1rem; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; font-size: .83rem; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .6rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { position: sticky; top: 0; background: var(--panel); }
th small { font-weight: 400; color: var(--soft); }
tr:last-child td { border-bottom: 0; }
.number { text-align: right; }
.code { border: 1px solid var(--line); border-radius: 8px; overflow: hidden; margin: 0 0 1rem; }
.bar { display: flex; justify-content: space-between; align-items: center; background: var(--panel);
  color: var(--soft); font-size: .82rem; padding: .3rem .4rem .3rem .9rem; border-bottom: 1px solid var(--line); }
button { font: inherit; color: var(--ink); background: var(--page); border: 1px solid var(--line); border-radius: 6px;
  padding: .12rem .7rem; cursor: pointer; }
pre { margin: 0; padding: .8rem .9rem; overflow-x: auto; font-size: .84rem; line-height: 1.5; }
code { font-family: ui-monospace, 'SFMono-Regular', Menlo, Consolas, 'DejaVu Sans Mono', monospace; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 1px; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); color: var(--soft);
  font-size: .85rem; }
@media print { nav, button { display: none; } section, figure { break-inside: avoid; } .table { max-height: none; } }
"""

_DRAW = """
(() => {
  const dark = matchMedia('(prefers-color-scheme: dark)');
  const style = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  // plotly offers to send a figure to its own server unless told not to.
  const config = {responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: ''};
  const plots = [...document.querySelectorAll('script[data-for]')].map(source => {
    const {data, layout} = JSON.parse(source.textContent);
    delete layout.width;
    Object.assign(layout, {autosize: true, paper_bgcolor: style('--page')});
    if (matchMedia('(max-width: 660px)').matches) layout.dragmode = false;  // a finger scrolls
    layout.font = {...layout.font, color: style('--ink')};
    const div = document.getElementById(source.dataset.for);
    Plotly.newPlot(div, data, layout, config);
    return div;
  });
  dark.addEventListener('change', () => plots.forEach(div => Plotly.relayout(div, {
    'font.color': style('--ink'), 'paper_bgcolor': style('--page'),
  })));
})();
"""

_WIDE = """
const boxes = [...document.querySelectorAll('.plot, .table, pre')];
const look = box => box.classList.toggle('more', box.scrollLeft + box.clientWidth < box.scrollWidth - 2);
boxes.forEach(box => box.addEventListener('scroll', () => look(box), {passive: true}));
addEventListener('resize', () => boxes.forEach(look));
boxes.forEach(look);
"""

_COPY = """
document.querySelectorAll('.code').forEach(block => {
  const button = block.querySelector('button'), code = block.querySelector('code');
  button.addEventListener('click', async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = 'Copied';
    } catch {
      // Without leave to write to the clipboard the code is at least selected.
      getSelection().selectAllChildren(code);
      button.textContent = 'Selected';
    }
    setTimeout(() => { button.textContent = 'Copy'; }, 1500);
  });
});
"""
