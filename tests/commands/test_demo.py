"""The demo's page: complete, and its code gives its numbers wherever it is run."""

import html
import re

import pandas as pd
import pytest
from PIL import Image

from dit_lens.commands import cli, demo_sections
from dit_lens.commands.demo_sections import Asked
from dit_lens.lens import DiTLens
from dit_lens.studies import Result
from tests.commands.test_cli import sources

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("demo")]  # all of one demo
SEED = 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A demo of one step, without guidance; whoever makes the toy later gets it as the demo did."""
    load, place = DiTLens.toy, tmp_path_factory.mktemp("demo") / "demo"

    def quick(*args, **kwargs):
        lens = load(*args, **kwargs)
        lens.defaults |= {"true_cfg_scale": 1.0}
        return lens

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiTLens, "toy", quick)
        patch.setitem(demo_sections.CALL, "num_inference_steps", 1)
        patch.setattr("dit_lens.commands.page.find_browser", lambda: None)
        assert cli.main(["demo", "--out", str(place), "--seed", str(SEED)]) == 0
        yield place


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "index.html").read_text("utf-8")


@pytest.fixture(scope="module")
def boxes(page):
    return [html.unescape(code) for code in re.findall(r'<pre tabindex="0"><code>(.*?)</code></pre>', page, re.DOTALL)]


def test_the_page_is_complete(folder, page, capsys):
    for words in ("Massive channels", "Are they critical?", "organised in space?", "Can they be moved?"):
        assert words in page
    addresses = sources(page)
    assert addresses
    assert all(address.startswith(("data:image/", "#")) for address in addresses)
    assert len(re.findall(r"<figcaption>[^<]*[0-9]", page)) == page.count('class="plot"') == 11  # a number for each
    assert cli.main(["demo", "--out", str(folder), "--seed", "1", "--prompt", "a cat"]) == 2
    assert cli.main(["demo", "--out", str(folder), "-k", "65"]) == 2
    same = "a big red circle left on a checkered blue background"
    assert cli.main(["demo", "--out", str(folder), "--source", same]) == 2
    told = capsys.readouterr().err
    assert "not a sentence of the grammar" in told
    assert "k=65 leaves no control of equal size" in told
    assert "the prompt and the source are both" in told
    assert (folder / "index.html").read_text("utf-8") == page


@pytest.mark.parametrize("number", range(5), ids=["images", "massive", "disruption", "organisation", "transfer"])
def test_its_code_gives_its_numbers(folder, page, boxes, number):
    """Each box by itself: with nothing but Python, it says what the sentence above it says."""
    made = {}
    exec(compile(boxes[number], f"box {number}", "exec"), made)
    asked = Asked(tuple(made["prompts"]), SEED, 8)
    if number == 0:
        drawn = [Image.open(folder / f"image-{i}.png").tobytes() for i in range(4)]
        assert [image.tobytes() for image in made["run"].images] == drawn
        section = demo_sections.show_images(made["run"], asked)
    elif number == 1:
        section = demo_sections.show_massive(made["massive"], asked)
    else:
        found = made["result"]
        kept = Result.load(folder / found.study).table
        pd.testing.assert_frame_equal(found.table.fillna(0), kept.fillna(0), check_dtype=False)
        show = [demo_sections.show_disruption, None, demo_sections.show_transfer][number - 2]
        section = demo_sections.show_organisation(found, 8, asked) if show is None else show(found, asked)
    assert section.code == boxes[number]
    for text in (section.sentence, *section.captions):
        assert html.escape(text, quote=True) in page
