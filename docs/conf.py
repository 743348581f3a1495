"""How Sphinx builds the documentation: `python3 dev.py docs` writes build/docs, which asks the network for nothing."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE / "extensions"), str(ROOT / "notebooks"), str(ROOT)]

import plotly
import sphinxcontrib.katex
from sphinx.application import Sphinx

import dit_lens

project = "dit_lens"
author = copyright = "The dit_lens authors"
release = version = dit_lens.__version__

extensions = [
    "docstrings",
    "lessons",
    "llms",
    "myst_nb",
    "names",
    "sphinx.ext.autodoc",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.katex",
]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb", ".rst": "restructuredtext"}
exclude_patterns = ["findings/**/*.csv"]

# Markdown and notebooks

myst_enable_extensions = ["attrs_block", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # lessons come executed
nb_merge_streams = True
nb_ipywidgets_js = {}  # else a content delivery network
nb_mime_priority_overrides = [("html", "text/html", 0)]

# The reference

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
maximum_signature_line_length = 84
python_display_short_literal_types = True
toc_object_entries_show_parents = "hide"
nitpick_ignore_regex = [
    # Types of other projects, whose inventories are on the network; t is traitlets.
    ("py:class", r"(torch|nn|np|numpy|pd|pandas|xarray|go|plotly|t|collections\.abc|pathlib|types)\..*"),
    ("py:class", r"Tensor|NDArray|(Image\.)?Image|Path|SimpleNamespace"),
    ("py:class", r"DiffusionPipeline|ModelMixin|CLIPModel|CLIPProcessor"),
    # What the library uses between its own modules and promises to nobody.
    ("py:class", r"(dit_lens\.core\.[a-z_.]+\.)?(Engine|Plan|Recording|RemoteEngine|Reruns|Session|StreamText)"),
    ("py:class", r"(dit_lens\.families\.locations\.)?(Grid|Readout|Text|Time)Rule"),
    ("py:class", r"(dit_lens\.families\.locations\.)?(ImageTokens|TensorLocation)"),
    ("py:class", r"ModelRow"),  # shown as the table protocols.Protocol.models
    ("py:class", r"(dit_lens\.families\.schedulers\.)?(Noise|Removal)"),
    ("py:class", r"TransferResult|Study"),  # a protocol, and a type variable
    ("py:class", r"(Run \| )?Mapping\[(str|int)"),  # half of a type: Sphinx cuts a quoted one at its comma
]

# Pages

html_theme = "pydata_sphinx_theme"
html_title = "dit_lens"
html_favicon = "static/favicon.svg"
html_theme_options = {
    "logo": {"text": "dit_lens"},
    "header_links_before_dropdown": 7,
    "navigation_with_keys": False,
    "show_prev_next": True,
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_copy_source = html_show_sourcelink = False
# Pages that have no others below them need no list of pages.
ALONE = ("index", "install", "models", "errors", "guarantees", "performance", "scaling", "contributing", "changelog")
html_sidebars = {page: [] for page in ALONE}
html_css_files = ["site.css"]
html_js_files = ["plotly.min.js", "figures.js"]
copybutton_exclude = ".linenos, .gp, .go"

# Scripts out of installed packages: once for the whole site, and part of no commit.
MADE = ROOT / "build" / "docs-static"
MADE.mkdir(parents=True, exist_ok=True)
shutil.copy(Path(plotly.__file__).parent / "package_data" / "plotly.min.js", MADE)
for name in ("katex.min.js", "auto-render.min.js"):
    shutil.copy(Path(sphinxcontrib.katex.__file__).parent / name, MADE)
(MADE / "katex.css").write_text("")  # MathML needs neither KaTeX's styles nor its fonts
html_static_path = ["static", str(MADE)]
katex_js_path, katex_autorender_path, katex_css_path = "katex.min.js", "auto-render.min.js", "katex.css"
katex_options = "output: 'mathml'"


def list_toys(_: object, page: str, source: list[str]) -> None:
    """Gives the findings, which a command writes for readers of plain Markdown, a list of the pages below them."""
    if page == "findings/index":
        toys = sorted(file.parent.name for file in HERE.glob("findings/*/index.md"))
        source[0] += "\n".join(["", "```{toctree}", ":hidden:", "", *(f"{toy}/index" for toy in toys), "```", ""])


def setup(app: Sphinx) -> None:
    app.connect("source-read", list_toys)
