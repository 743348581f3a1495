"""The gallery: short pages whose code runs, answers and costs as they say, and an index that has them all."""

from __future__ import annotations

import re

import pytest
from PIL.Image import Image

from docs import blocks, gallery


@pytest.mark.slow
@pytest.mark.xdist_group("gallery")  # which shares its toys
@pytest.mark.parametrize("page", gallery.PAGES, ids=lambda page: page.stem)
def test_a_page_runs_and_costs_what_it_says(page, tmp_path, monkeypatch, declared):
    monkeypatch.chdir(tmp_path)
    with gallery.share_toys() as drawn:
        for image, shown in blocks.run(page):
            assert image.is_file(), f"python -m docs.gallery {page.stem} draws it"
            assert isinstance(shown, Image) or hasattr(shown, "to_plotly_json")
    assert gallery.describe_cost(page, drawn) in page.read_text("utf-8"), f"run python -m docs.gallery {page.stem}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("page", gallery.PAGES, ids=lambda page: page.stem)
def test_a_page_is_short_and_has_its_parts(page):
    text = page.read_text("utf-8")
    assert 0 < gallery.count_lines(text) <= gallery.LINES
    paper, _, rest = text.partition("```python")
    assert re.search(r"\]\(https://arxiv\.org/abs/\d{4}\.\d{5}\)", paper)
    assert re.search(r"^```pycon.*^\*\*On the toy\*\* .*^\*\*On FLUX\.1-dev\*\* ", rest, re.MULTILINE | re.DOTALL)


def test_the_index_has_every_page_once_and_its_figure():
    text = gallery.INDEX.read_text("utf-8")
    names = [page.stem for page in gallery.PAGES]
    cards = re.findall(r"^:link: (\S+)$", text, re.MULTILINE)
    assert text.split(":hidden:\n\n")[1].split("\n```")[0].split() == cards
    assert sorted(cards) == names
    figures = {image.stem for image in (gallery.HERE / "images").iterdir()}
    assert set(re.findall(r"^:img-top: images/(\S+)\.webp$", text, re.MULTILINE)) == figures


def test_costs_count_rows_steps_and_reads():
    with gallery.share_toys() as drawn:
        lens = gallery.dl.DiTLens.toy()
        lens.run(["", ""], gallery.dl.Read("blocks.*.img", reduce="mean"), seed=0, num_inference_steps=2)
    said = gallery.describe_cost(gallery.PAGES[0], drawn)
    kept = 57 * 28 * 2 * 3072 * 4  # blocks, steps, rows, channels, bytes
    assert said.endswith(f"2 images (56 forward passes); reads keep {kept / 1e6:.4g} MB.")
