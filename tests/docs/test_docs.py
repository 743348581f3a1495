"""The code of the pages runs and answers as they say; the site builds without a warning and works from disk."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from PIL.Image import Image

import dit_lens as dl
from docs import blocks, gallery
from notebooks.build import REPOSITORY
from tests.browser import page as opened

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
WRITTEN = [README, *sorted(DOCS.rglob("*.md"))]
RUN = [
    path
    for path in WRITTEN
    if path.parent != gallery.HERE and re.search(r"^```py", path.read_text("utf-8"), re.MULTILINE)
]
LESSON = next(path.stem for path in sorted((ROOT / "notebooks").glob("*.py")) if path.stem != "build")
ERRORS = {
    name: error
    for name, error in vars(dl.errors).items()
    if inspect.isclass(error) and issubclass(error, BaseException)
}


@pytest.mark.slow
@pytest.mark.parametrize("path", RUN, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_code_of_a_page_runs(path, tmp_path, monkeypatch, declared):
    monkeypatch.chdir(tmp_path)
    for image, shown in blocks.run(path):
        assert image.is_file(), f"python docs/blocks.py {path.relative_to(ROOT)} draws it"
        assert isinstance(shown, Image) or hasattr(shown, "to_plotly_json")
    assert not list(tmp_path.iterdir()), "what a page writes goes into a folder of its own"


def test_a_block_that_answers_otherwise_fails(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 2\n```\n\n```pycon\n>>> x + 1\n4\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md"):
        list(blocks.run(page))
    page.write_text("```python\nx = 2\nx / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as caught:
        list(blocks.run(page))
    assert caught.traceback[-1].path == page
    assert caught.traceback[-1].lineno + 1 == 3


def test_the_readme_leads_to_what_there_is():
    """Files by their paths, the quick start where the notebooks say they are, and as many lines as it counts."""
    text = README.read_text("utf-8")
    addresses = re.findall(r"\]\(([^)]+)\)", text)
    assert [one for one in addresses if not one.startswith("https://") and not (ROOT / one).exists()] == []
    assert f"github/{REPOSITORY}/blob/main/notebooks/quick_start.ipynb" in text
    by_hand = text.split("```python\n")[-1].split("assert")[0]
    assert f"| {sum(map(bool, by_hand.splitlines()))} |" in text


def test_a_block_that_is_not_run_says_so():
    for path in WRITTEN:
        text = path.read_text("utf-8")
        said = re.findall(r"```\{code-block\} (?:python|sh)\n:caption: .*not run", text)
        assert text.count("```{code-block}") == len(said)


def test_every_error_has_an_entry_that_raises_it():
    text = (DOCS / "errors.md").read_text("utf-8")
    _, *parts = re.split(r"^## (\w+)$", text, flags=re.MULTILINE)
    entries = dict(zip(parts[::2], parts[1::2], strict=True))
    assert ERRORS.keys() <= entries.keys()
    for name in ERRORS.keys() - {"DitLensError", "StudyInterrupted"}:
        assert f"\ndit_lens.errors.{name}: " in entries[name]


class Tags(HTMLParser):
    """The anchors of a page, and what it refers to: with a click, and by itself."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.loaded = set(), set(), set()
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        if given.get("href"):
            (self.links if tag == "a" else self.loaded).add(given["href"])
        if given.get("src"):
            self.loaded.add(given["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "-n", "--keep-going", "-q", DOCS, out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def tags(site):
    """The tags of every page; the theme keeps a template of its own among the static files."""
    return {path: Tags(path) for path in site.rglob("*.html") if "_static" not in path.parts}


@pytest.mark.slow
@pytest.mark.xdist_group("docs")
class TestSite:
    """One build for all; pages of every kind in a browser."""

    def test_links_lead_somewhere(self, tags):
        for path, page in tags.items():
            for link in page.links:
                address, anchor = urldefrag(unquote(link))
                if re.match(r"\w+:", address):
                    continue
                target = (path.parent / address).resolve() if address else path
                assert target.exists(), f"{path.name}: {link}"
                assert not anchor or target not in tags or anchor in tags[target].anchors, f"{path.name}: {link}"

    def test_pages_load_nothing_from_elsewhere(self, tags):
        for path, page in tags.items():
            for link in page.loaded:
                local = path.parent / unquote(link).split("?")[0].split("#")[0]
                assert link.startswith("data:") or local.exists(), f"{path.name}: {link}"

    def test_plotly_is_there_once(self, site):
        large = [
            path for path in site.rglob("*") if path.suffix in (".js", ".html") and path.stat().st_size > 3_000_000
        ]
        assert [path.name for path in large if "plotly.js v" in path.read_text("utf-8")] == ["plotly.min.js"]

    def test_llms_txt_names_every_page_and_public_name(self, site, tags):
        text = (site / "llms.txt").read_text("utf-8")
        assert text.startswith("# dit_lens\n")
        for name in dl.__all__:
            assert re.search(rf"^- `dit_lens\.{name}\b", text, re.MULTILINE)
        named = set(re.findall(r"^- \[.+\]\((.+\.html)\)", text, re.MULTILINE))
        made = {"genindex.html", "py-modindex.html", "search.html"}
        assert named == {str(path.relative_to(site)) for path in tags} - made

    @pytest.mark.browser
    @pytest.mark.parametrize(("width", "dark"), [(1400, False), (400, True)])
    @pytest.mark.parametrize("name", ["index", "how-to/zero-with-controls", f"lessons/{LESSON}", "api/lens"])
    def test_a_browser_shows_a_page(self, site, name, width, dark):
        with opened(width=width, dark=dark, noise=("Got invalid theme mode",)) as page:
            page.goto((site / f"{name}.html").as_uri())
            page.wait_for_load_state("load")
            figures = page.locator("script[data-plotly]").count()
            page.wait_for_function(f"document.querySelectorAll('.js-plotly-plot .main-svg').length >= {figures}")
            assert bool(figures) == name.startswith("lessons/")
            assert page.evaluate("[...document.querySelectorAll('.js-plotly-plot')].every(p => p.clientWidth > 250)")
            assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
            images = "[...document.querySelectorAll('article img')].every(image => image.naturalWidth > 0)"
            assert page.evaluate(images)

    @pytest.mark.browser
    def test_the_figure_of_a_study_gives_its_code(self, site):
        with opened(noise=("Got invalid theme mode",)) as page:
            page.context.grant_permissions(["clipboard-read", "clipboard-write"])
            page.goto((site / "lessons" / "lesson_3_breaking.html").as_uri())
            buttons = page.locator("[data-title='Copy the code that made this']")
            buttons.first.wait_for(state="attached")
            copied = []
            for button in buttons.all():
                button.dispatch_event("click")
                copied.append(page.evaluate("navigator.clipboard.readText()"))
            assert any("dl.studies.disruption(" in code for code in copied)
            assert any("dl.plots.strip(" in code for code in copied)
