"""The page is one file, whole or absent, that draws its figures in a real browser and asks the network for nothing."""

from __future__ import annotations

import subprocess
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from PIL import Image

from dit_lens.commands import page as module
from dit_lens.commands.page import Section, find_browser, write_figures, write_page
from dit_lens.errors import OpError
from dit_lens.plots import channel_spectrum, strip
from tests.browser import browser_or_skip, page


class Tags(HTMLParser):
    """Every start tag with its attributes; what is inside scripts is no tag."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def __call__(self, tag):
        return [attrs for name, attrs in self.found if name == tag]


@pytest.fixture
def sections():
    table = pd.DataFrame({"arm": ["top", "<b>"], "rmse": [51.23456, np.nan], "n": [8, 12000], "matched": [True, False]})
    table.attrs["units"] = {"rmse": "0 to 255"}
    image = Image.new("RGB", (16, 8), "navy")
    return [
        Section("Spectrum", "Two stand out.", (channel_spectrum([0.1, 5.0, 4.0], [1, 2]),), code="x < 1 & y"),
        Section("Images", "They move.", (strip([image], ["one"]), image, image), captions=("", "a cross", "")),
        Section("Spectrum", "Again.", table=table),
    ]


@pytest.fixture
def browser():
    return browser_or_skip()


def test_page_is_complete_without_a_network(tmp_path, sections):
    path = write_page(tmp_path / "new" / "index.html", title="A <title>", lead="Lead & more.", sections=sections)
    text = path.read_text("utf-8")
    tags = Tags(text)
    assert text.startswith("<!DOCTYPE html>")
    assert tags("html") == [{"lang": "en"}]
    assert "A &lt;title&gt;" in text
    assert not [
        a for _, a in tags.found for n, v in a.items() if n in ("src", "href") and not v.startswith(("data:", "#"))
    ]
    assert any(attrs.get("name") == "viewport" for attrs in tags("meta"))
    policy = next(attrs["content"] for attrs in tags("meta") if "http-equiv" in attrs)
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert text.count("plotly.js v") == 1
    assert list(tmp_path.joinpath("new").iterdir()) == [path]


def test_contents_lead_to_every_section(tmp_path, sections):
    tags = Tags(write_page(tmp_path / "p.html", title="t", lead="l", sections=sections).read_text("utf-8"))
    targets = [attrs["href"].removeprefix("#") for attrs in tags("a")]
    assert targets == [attrs["id"] for attrs in tags("section")]
    assert len(set(targets)) == 3
    assert len(tags("h1")) == 1
    assert len(tags("h2")) == 3


def test_images_are_sharp_and_told(tmp_path, sections):
    text = write_page(tmp_path / "p.html", title="t", lead="l", sections=sections).read_text("utf-8")
    first, second = Tags(text)("img")
    assert (first["alt"], second["alt"]) == ("a cross", "Images, image 3 of 3")
    assert (first["width"], first["height"]) == ("192", "96")
    assert first["src"].startswith("data:image/png;base64,")
    assert "image-rendering: pixelated" in text


def test_table_has_units_and_escapes(tmp_path, sections):
    text = write_page(tmp_path / "p.html", title="t", lead="l", sections=sections[2:]).read_text("utf-8")
    for wanted in ("rmse <small>(0 to 255)</small>", ">51.2<", ">–<", ">&lt;b&gt;<", ">12000<", ">True<"):
        assert wanted in text
    assert len(text) < 20_000, "plotly.js is for pages with plotly figures"


def test_code_is_shown_as_it_is(tmp_path, sections):
    text = write_page(tmp_path / "p.html", title="t", lead="l", sections=sections[:1]).read_text("utf-8")
    assert "<code>x &lt; 1 &amp; y</code>" in text


def test_a_figure_cannot_end_its_script(tmp_path):
    figure = go.Figure().update_layout(title_text="</script><img src=https://example.org/x>")
    text = write_page(tmp_path / "p.html", title="t", lead="l", sections=[Section("h", "s", (figure,))]).read_text(
        "utf-8"
    )
    assert not Tags(text)("img")


def test_a_page_that_fails_leaves_the_old_one(tmp_path, monkeypatch, sections):
    path = write_page(tmp_path / "p.html", title="old", lead="l", sections=[])
    before = path.read_bytes()

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(module.Path, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_page(path, title="new", lead="l", sections=sections)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_sections_take_figures_and_images_only():
    with pytest.raises(OpError, match="plotly figures and PIL images, and got ndarray"):
        Section("h", "s", (np.zeros((2, 2)),))


def test_captions_are_one_per_figure():
    with pytest.raises(OpError, match="1 figures and 2 captions"):
        Section("h", "s", (go.Figure(),), captions=("a", "b"))


def test_the_same_page_has_the_same_bytes(tmp_path, sections):
    one, two = (write_page(tmp_path / name, title="t", lead="l", sections=sections) for name in ("1.html", "2.html"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.browser
def test_a_browser_draws_the_figures_and_complains_of_nothing(tmp_path, browser, sections):
    path = write_page(tmp_path / "index.html", title="t", lead="l", sections=sections)
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000", "--window-size=1000,900"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--no-first-run", "--disable-background-networking"]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    tags = Tags(done.stdout)
    drawn = [attrs for attrs in tags("svg") if "main-svg" in attrs.get("class", "").split()]
    assert len(drawn) >= 2
    assert sum("js-plotly-plot" in attrs.get("class", "").split() for attrs in tags("div")) == 2
    assert any("errorbar" in attrs.get("class", "") for attrs in tags("g")), "the stems of massive channels"
    assert not [
        value
        for _, a in tags.found
        for name, value in a.items()
        if name.endswith(("src", "href")) and "//" in (value or "")
    ]
    assert "Share chart" not in [attrs.get("data-title") for attrs in tags("a") + tags("button")]
    assert "CONSOLE" not in done.stderr, done.stderr


@pytest.mark.browser
def test_what_is_wider_than_the_window_says_so(tmp_path, sections):
    """A figure keeps its width in a narrow window, and scrolls; its caption and the page do not."""
    path = write_page(tmp_path / "index.html", title="t", lead="l", sections=sections)
    hint = "box => getComputedStyle(box, '::before').visibility"
    with page(width=420) as shown:
        shown.goto(path.as_uri())
        box = shown.locator(".plot").first
        assert shown.evaluate("document.documentElement.scrollWidth") == 420
        assert shown.locator(".plot figcaption").count() == 0
        assert box.evaluate("box => box.classList.contains('more')")
        assert box.evaluate(hint) == "visible"
        box.evaluate("box => { box.scrollLeft = 9999 }")
        shown.wait_for_function("!document.querySelector('.plot').classList.contains('more')")
        assert box.evaluate(hint) == "hidden"
        shown.set_viewport_size({"width": 1400, "height": 900})
        shown.wait_for_function("!document.querySelector('.plot.more')")


@pytest.mark.browser
@pytest.mark.usefixtures("browser")
def test_figures_are_dark_on_white_and_webp_has_their_colours(tmp_path):
    pytest.importorskip("kaleido")
    figure = channel_spectrum([0.1, 5.0, 4.0], [1, 2])
    before = figure.to_json()
    paths = [tmp_path / "new" / f"figure.{suffix}" for suffix in ("png", "webp", "svg")]
    assert write_figures(dict.fromkeys(paths, figure), width=400, scale=1) == paths
    png, webp = (Image.open(path) for path in paths[:2])
    assert (png.format, webp.format) == ("PNG", "WEBP")
    image = png.convert("RGB")
    assert image.size == (400, figure.layout.height)
    assert image.getpixel((1, 1)) == (255, 255, 255)
    assert np.asarray(image).min() < 80
    few = webp.convert("RGB")
    assert len(few.getcolors()) <= 256
    assert np.abs(np.asarray(few, int) - np.asarray(image, int)).mean() < 1  # of 255
    assert few.getpixel((1, 1)) == (255, 255, 255)
    assert paths[1].stat().st_size < 0.6 * paths[0].stat().st_size
    assert paths[2].read_text("utf-8").startswith("<svg")
    assert figure.to_json() == before


@pytest.mark.parametrize("missing", ["find_browser", "find_spec"])
def test_without_browser_or_kaleido_there_is_no_file(tmp_path, monkeypatch, missing):
    monkeypatch.setattr(module, missing, lambda *_: None)
    monkeypatch.setattr(module, "find_browser" if missing == "find_spec" else "find_spec", lambda *_: "there")
    assert write_figures({tmp_path / "x.png": go.Figure()}) == []
    assert not list(tmp_path.iterdir())


def test_browser_is_the_named_one(monkeypatch, tmp_path):
    program = tmp_path / "mybrowser"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("CHROMIUM", str(program))
    assert find_browser() == str(program)
    monkeypatch.setenv("CHROMIUM", str(tmp_path / "absent"))
    monkeypatch.delenv("BROWSER_PATH", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_browser() is None
