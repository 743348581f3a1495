"""The explorer has the values that the run read, and the browser draws these values."""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
import runpy

import numpy as np
import pandas as pd
import pytest
import torch
from IPython.core.formatters import DisplayFormatter
from PIL import Image

import dit_lens as dl
from dit_lens.analysis.clusters import cluster
from dit_lens.commands.cli import main
from dit_lens.errors import OpError, SiteError
from dit_lens.explorer import explorer as module
from dit_lens.explorer.atlas import Extent, fit_extent
from dit_lens.explorer.colours import CLUSTER_COLOURS, parse_colour, read_palette
from dit_lens.studies import Result
from tests import browser

CIRCLE = "a big red circle left on a checkered blue background"
CROSS = "a small white cross right on a plain green background"
CALL = {"seed": 0, "num_inference_steps": 3, "true_cfg_scale": 1.0}


@pytest.fixture(scope="module")
def run(toy):
    return toy.run([CIRCLE, CROSS], [dl.Read("blocks[3:6].img")], **CALL)


@pytest.fixture(scope="module")
def edited(toy):
    ops = [dl.Zero("blocks[2:4].img", channels=[1, 2], rows=0), dl.Read("blocks[3:6].img")]
    return toy.run([CIRCLE, CROSS], ops, **CALL)


@pytest.fixture(scope="module")
def words(toy):
    return toy.word_map([CIRCLE, CROSS], ["on", "background"], blocks=[3, 4], **CALL)


@pytest.fixture(scope="module")
def x0(toy):
    return toy.read_x0([CIRCLE, CROSS], "x0", steps=[0, 2], **CALL)


def values_of(explorer):
    """[l, e, s, g, k, h, w], computed from what is sent to the browser."""
    views = explorer.views
    low, high = views.ranges[..., 0], views.ranges[..., 1]
    maps = np.frombuffer(explorer.data_maps, np.uint8).reshape(*low.shape, *views.grid)
    return low[..., None, None] + (high - low)[..., None, None] * (maps / 255.0)


def test_maps_are_the_values_that_were_read(run):
    explorer = dl.explore(run, k=5)
    views, found = explorer.views, values_of(explorer)
    for block, site in enumerate(views.blocks):
        for group in range(3):
            channels = views.channels[block, group]
            read = run[site].grid()[..., channels.tolist()].permute(1, 0, 4, 2, 3).numpy()  # [e, s, k, h, w]
            error = np.abs(found[block, :, :, group] - read)
            assert (error <= (read.max((-2, -1)) - read.min((-2, -1)))[..., None, None] / 255 * 0.501).all()
            np.testing.assert_allclose(views.means[block, :, :, group], read.mean((-2, -1)), rtol=1e-4, atol=1e-5)
            low, high = (one[..., None, None] for one in (read.min((-2, -1)), read.max((-2, -1))))
            pooled = read.reshape(*read.shape[:-2], 8, 2, 8, 2).mean((-3, -1))
            assert np.abs(views.thumbs[block, :, :, group] - 255 * (pooled - low) / (high - low)).max() < 0.51


def test_groups_are_the_channels_with_the_highest_and_the_lowest_scores(run):
    explorer = dl.explore(run, k=5)
    for block, site in enumerate(explorer.views.blocks):
        scores = run[site].mean(2).abs().mean((0, 1))
        np.testing.assert_allclose(explorer.views.scores[block], scores.numpy(), rtol=1e-5)
        top, bottom, random = explorer.views.channels[block].tolist()
        assert top == scores.argsort(descending=True)[:5].tolist()
        assert set(bottom) == set(scores.argsort()[:5].tolist())
        assert not set(random) & set(top)


def test_labels_are_the_clusters_of_the_group(run):
    explorer = dl.explore(run, k=4, clusters=3)
    labels = explorer.views.labels(1)
    tokens = run["blocks.4.img"][2, 1][:, explorer.views.channels[1, 0].tolist()].numpy()
    assert (labels[1, 2, 0].ravel() == cluster(tokens, 3)).all()


def test_named_reads_are_groups_and_a_set_of_channels_can_be_given(toy, run):
    massive = toy.massive_channels(CIRCLE, 3, site="blocks[3:6].img", **CALL)
    few = toy.run(CIRCLE, dl.explorer_reads(massive), **CALL)
    explorer = dl.explore(few)
    assert explorer.views.groups == ("top", "bottom", "random")
    assert explorer.views.scores.size == 0, "channels that were not read have no score"
    assert explorer.views.channels[0, 0].tolist() == list(massive["blocks.3.img"])
    given = dl.explore(run, channels=massive)
    assert (given.views.channels == explorer.views.channels).all()
    np.testing.assert_array_equal(given.views.maps(0)[:9], explorer.views.maps(0)[:9])


def test_an_edited_run_stands_beside_the_first(run, edited, toy):
    explorer = dl.explore(run, edited, k=4)
    names = [pane.name for pane in explorer.views.panes]
    assert names == [f"{CIRCLE}, seed 0", f"{CROSS}, seed 0", f"{CIRCLE}, seed 0 [Zero]", f"{CROSS}, seed 0"]
    assert explorer.right == 2
    channels = explorer.views.channels[0, 0].tolist()
    read = edited["blocks.3.img"].grid()[-1, 0, ..., channels].permute(2, 0, 1).numpy()
    np.testing.assert_allclose(values_of(explorer)[0, 2, -1, 0], read, atol=np.ptp(read) / 250)
    bare = dl.explore(run, toy.run(CIRCLE, [dl.Zero("blocks.3.img")], **CALL))
    assert [pane.map_index for pane in bare.views.panes] == [0, 1, None]


def test_of_both_branches_the_conditional_one_is_shown(toy):
    guided = {**CALL, "true_cfg_scale": 3.0}
    both = toy.run(CIRCLE, [dl.Read("blocks.3.img", branch="both")], **guided)
    one = toy.run(CIRCLE, [dl.Read("blocks.3.img")], **guided)
    np.testing.assert_array_equal(dl.explore(both).views.maps(0), dl.explore(one).views.maps(0))


def test_of_a_read_of_both_streams_the_image_is_shown(toy, run):
    """Whether all channels were read or some; the text is left out."""
    both = toy.run(CIRCLE, [dl.Read("blocks[3:5].{img,txt}")], **CALL)
    alone = toy.run(CIRCLE, [dl.Read("blocks[3:5].img")], **CALL)
    assert dl.explore(both).views.blocks == ("blocks.3.img", "blocks.4.img")
    np.testing.assert_array_equal(dl.explore(both).views.maps(1), dl.explore(alone).views.maps(1))
    some = toy.run(CIRCLE, [dl.Read("blocks.3.{img,txt}", channels=[5, 7], name="two")], **CALL)
    assert dl.explore(some).views.channels.tolist() == [[[5, 7]]]


def test_maps_of_words_and_images_at_steps_are_shown_with_their_run(toy, run, edited, words, x0):
    explorer = dl.explore(run, k=4, words=words, x0=x0, group="words", site="blocks.4.img", channel=1)
    views, found = explorer.views, values_of(explorer)
    assert repr(explorer).endswith("top, bottom and random 4 channels, maps of 2 words")
    for rank, word in enumerate(("on", "background")):
        expected = words.tensors[word].permute(0, 2, 1, 3, 4).numpy()  # [l, e, s, h, w]
        np.testing.assert_allclose(found[:2, :, :, 3, rank], expected, atol=np.ptp(expected) / 250)
    assert views.channels[:, 3, :3].tolist() == [[0, 1, -1], [0, 1, -1], [-1, -1, -1]], "block 5 has no maps of words"
    assert [sorted(pane.frames) for pane in views.panes] == [[0, 2]] * 4
    assert views.panes[3].frames[2] is x0.images["x0"][1][1]
    assert (explorer.right, explorer.under) == (2, "step")
    with pytest.raises(OpError, match=r"words= is of another run: its prompt is"):
        dl.explore(toy.run(CIRCLE, [dl.Read("blocks.3.img")], **CALL), words=words)
    with pytest.raises(OpError, match=r"x0= is of another run: its image 0 differs"):
        dl.explore(toy.run([CIRCLE, CROSS], [dl.Skip("blocks.4.img"), dl.Read("blocks.3.img")], **CALL), x0=x0)
    few = toy.word_map([CIRCLE, CROSS], "background", steps=[0], **CALL)
    with pytest.raises(OpError, match=r"words= has no maps at step 1"):
        dl.explore(run, words=few)
    with pytest.raises(OpError, match=r"no channel 2 in the group 'words'"):
        dl.explore(run, words=words, group="words", site="blocks.3.img", channel=2)


def test_any_channel_of_a_whole_read_can_be_shown(toy, run, monkeypatch):
    explorer, sent = dl.explore(run, k=2, channel=100, site="blocks.4.img", palette="Cividis", opacity=1.0), []
    monkeypatch.setattr(explorer, "send", lambda message, buffers: sent.append(bytes(buffers[0])))
    browser.send_to_widget(explorer, {"kind": "channel", "block": 100})
    values = np.stack([run[f"blocks.{i}.img"].grid()[..., 100].permute(1, 0, 2, 3).numpy() for i in (3, 4, 5)])
    count = values[..., 0, 0].size
    ranges = np.frombuffer(sent[0], np.float32, 2 * count).reshape(*values.shape[:3], 2)
    np.testing.assert_allclose(ranges, np.stack([values.min((-2, -1)), values.max((-2, -1))], -1), rtol=1e-5)
    maps = np.frombuffer(sent[0][-values.size :], np.uint8).reshape(values.shape)
    scaled = (values - ranges[..., :1, None]) / np.ptp(ranges, -1)[..., None, None] * 255
    assert np.abs(maps - scaled).max() < 0.51
    colours = np.asarray(explorer.preview())[2::4, 2::4].astype(int)
    expected = np.moveaxis(colour_of(scaled[1, 0, -1]), 0, -1)
    assert np.abs(colours - expected).max() <= 2
    assert explorer.whole_state()["data_info"]["kept"] == [100]
    chosen = dl.explore(toy.run(CIRCLE, [dl.Read("blocks[3:6].img", channels=[5, 9], name="two")], **CALL))
    with pytest.raises(OpError, match="no channel 100 in this explorer"):
        chosen.channel = 100


def test_what_cannot_be_shown_raises(toy, run):
    reduced = toy.run(CIRCLE, [dl.Read("blocks.*.img", reduce="mean")], **CALL)
    with pytest.raises(OpError, match=r"this run kept blocks.*Read whole tokens"):
        dl.explore(reduced)
    with pytest.raises(OpError, match=r"takes a run or the result of a study, and got a DiTLens\. Run first"):
        dl.explore(toy)
    with pytest.raises(OpError, match="k=200 channels were asked for"):
        dl.explore(run, k=200)
    with pytest.raises(OpError, match="no attribute 'blok' to start from"):
        dl.explore(run, blok=3)
    with pytest.raises(SiteError, match=r"no site 'blocks.9.img' in this explorer.*blocks.3.img"):
        dl.explore(run, site="blocks.9.img")
    explorer = dl.explore(run)
    with pytest.raises(OpError, match=r"no palette 'Viridian' in this explorer. Nearest: 'Viridis'"):
        explorer.palette = "Viridian"
    result = Result("stability", table=None, summary=None, settings={})
    with pytest.raises(OpError, match="keeps no images"):
        dl.explore(result)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"channel": 999}, "no channel 999 in the group 'top'"),
        ({"channel": -1}, "no channel -1"),
        ({"channel": torch.ones(2)}, r"channel=Tensor of shape \[2\] is not a number or a name"),
        ({"group": np.array(["top", "top"])}, "is not a number or a name"),
        ({"step": [1]}, "is not a number or a name"),
        ({"token": 9999}, r"no token 9999 in this explorer\. Choose -1 to 255\."),
        ({"token": -2}, "no token -2"),
        ({"left": 9}, r"no left 9 in this explorer\. Choose 0 to 1\."),
        ({"opacity": 5.0}, "opacity=5.0 is out of range"),
        ({"clusters": 0}, r"clusters=0 was asked for, but the maps have 256 tokens\. Choose 2 to 255\."),
        ({"clusters": 999}, "clusters=999"),
    ],
)
def test_a_state_that_a_view_cannot_have_is_told(run, state, said):
    with pytest.raises(OpError, match=said):
        dl.explore(run, k=4, **state)


def test_a_view_begins_with_a_channel_of_its_group_and_site(run):
    for site in ("blocks.3.img", "blocks.4.img", "blocks.5.img"):
        for group in ("top", "bottom", "random"):
            explorer = dl.explore(run, k=4, site=site, group=group)
            shown = explorer.views.channels[explorer.views.blocks.index(site), explorer.views.groups.index(group)]
            assert explorer.channel == shown[0]
            other = int(shown[2])
            assert dl.explore(run, k=4, site=site, group=group, channel=np.int64(other)).channel == other
    explorer.channel, explorer.token = int(shown[1]), 255
    with pytest.raises(OpError, match=r"no channel 128 in this explorer\. Choose -1 to 127"):
        explorer.channel = 128
    with pytest.raises(OpError, match="no token"):
        explorer.token = 256
    explorer.site = "blocks.3.img"  # which may not have the channel; the picture shows the first one, as the page does
    assert explorer.preview().size == explorer.views.panes[0].image.size


def test_a_state_is_any_number(run):
    given = dl.explore(
        run, step=torch.tensor(1), token=np.int64(3), opacity=np.float32(0.5), palette=np.str_("Cividis")
    )
    assert (given.step, given.token, given.opacity, given.palette) == (1, 3, 0.5, "Cividis")
    plain = dl.explore(run, step=1, token=3, opacity=0.5)
    assert plain.whole_state()["data_info"] == given.whole_state()["data_info"]


def test_what_a_result_does_not_show_is_told():
    image = Image.new("RGB", (4, 4))
    empty = pd.DataFrame()
    result = Result("disruption", empty, empty, {"prompts": ["red"]}, {"0/0/0/untouched": image})
    assert len(dl.explore(result).views.panes) == 1
    for given in ({"k": 3}, {"clusters": 4}):
        with pytest.raises(OpError, match="are for runs"):
            dl.explore(result, **given)


def test_beyond_the_budget_blocks_are_sent_when_they_are_requested(run, monkeypatch):
    monkeypatch.setattr(module, "BUDGET", 0)
    explorer, sent = dl.explore(run), []
    assert explorer.data_maps == b""
    monkeypatch.setattr(explorer, "send", lambda message, buffers: sent.append((message, bytes(buffers[0]))))
    for kind in ("maps", "labels"):
        browser.send_to_widget(explorer, {"kind": kind, "block": 2})
        assert sent[-1] == ({"kind": kind, "block": 2}, getattr(explorer.views, kind)(2).tobytes())


def test_if_no_widget_can_be_shown_there_is_an_image(run):
    explorer = dl.explore(run, k=4)
    data, _ = DisplayFormatter().format(explorer)
    assert set(data) == {"text/plain", "text/html", "application/vnd.jupyter.widget-view+json"}
    assert "data:image/png;base64" in data["text/html"]
    assert len(data["text/html"]) < 60_000
    assert data["text/plain"].startswith("Explorer: 2 images, 3 sites x 3 steps")


def test_a_documentation_page_gets_the_whole_view(run, monkeypatch):
    monkeypatch.setenv("DIT_LENS_RENDER", "static")
    data, _ = DisplayFormatter().format(dl.explore(run, k=4))
    assert 'data-name="data_maps"' in data["text/html"]
    assert "application/vnd.jupyter.widget-view+json" not in data


def test_a_page_holds_maps_and_clusters_block_by_block(run, tmp_path):
    explorer = dl.explore(run, k=4)
    page = explorer.to_html(tmp_path / "page.html").read_text("utf-8")
    found = re.findall(r'data-name="data_(maps|labels)" data-block="(\d+)">([^<]*)<', page)
    assert sorted((kind, int(block)) for kind, block, _ in found) == [
        (k, b) for k in ("labels", "maps") for b in range(3)
    ]
    for kind, block, text in found:
        assert gzip.decompress(base64.b64decode(text)) == getattr(explorer.views, kind)(int(block)).tobytes()


def test_the_code_makes_the_view_again(run, tmp_path):
    explorer = dl.explore(run, k=4)
    code = explorer.views.code.replace("{state}", "")
    (tmp_path / "again.py").write_text(code.replace("dl.explore", "explorer = dl.explore"))
    again = runpy.run_path(str(tmp_path / "again.py"))["explorer"]
    assert again.data_maps == explorer.data_maps


# In a browser


def pixels(locator):
    return np.asarray(Image.open(io.BytesIO(locator.screenshot())).convert("RGB")).astype(int)


def colour_at(locator, row, column, grid):
    """The colour in the middle of a token."""
    shown = pixels(locator)
    y, x = (
        int((index + 0.5) * side / cells) for index, side, cells in zip((row, column), shown.shape, grid, strict=False)
    )
    return shown[y, x]


def colour_of(value):
    """The colour of Cividis for a value of 0 to 255."""
    palette = np.array(read_palette("Cividis"))
    return np.array([np.interp(value / 255 * (len(palette) - 1), range(len(palette)), part) for part in palette.T])


@pytest.mark.browser
def test_the_page_draws_the_map_that_its_sliders_select(run, tmp_path):
    explorer = dl.explore(run, k=4, opacity=1.0, palette="Cividis")
    views = explorer.views
    path = explorer.to_html(tmp_path / "page.html")
    with browser.page() as page:
        page.goto(path.as_uri())
        view, canvas = page.locator(".dit-lens"), page.locator("canvas[data-side=left]")
        view.wait_for()
        page.get_by_label("image").first.select_option("1")
        page.get_by_role("slider", name="step").press("Home")
        page.get_by_role("slider", name="step").press("End")
        page.get_by_role("slider", name="block").press("End")
        channel = int(views.channels[2, 0, 3])
        page.get_by_role("button", name=f"channel {channel} ").click()
        assert view.get_attribute("data-view") == f"2/blocks.5.img/{channel}"
        page.mouse.move(5, 5)
        maps = views.maps(2).reshape(2, 3, 3, 4, 16, 16)[1, 2, 0, 3]
        for row, column in ((0, 0), (5, 7), (15, 15), (8, 3)):
            found = colour_at(canvas, row, column, (16, 16))
            assert np.abs(found - colour_of(maps[row, column])).max() <= 6
        page.get_by_role("button", name="clusters").click()
        labels = views.labels(2)[1, 2, 0]
        colours = {label: tuple(parse_colour(colour)) for label, colour in enumerate(CLUSTER_COLOURS)}
        for row, column in ((0, 0), (5, 7), (15, 15), (8, 3)):
            found = colour_at(canvas, row, column, (16, 16))
            assert np.abs(found - colours[int(labels[row, column])]).max() <= 6


@pytest.mark.browser
def test_pointer_and_keys_show_the_values_of_a_token(run, tmp_path):
    explorer = dl.explore(run, k=4)
    path = explorer.to_html(tmp_path / "page.html")
    with browser.page() as page:
        page.goto(path.as_uri())
        canvas, status = page.locator("canvas[data-side=left]"), page.locator(".token").first
        canvas.wait_for()
        box = canvas.bounding_box()
        canvas.click(position={"x": box["width"] * 3.5 / 16, "y": box["height"] * 5.5 / 16})
        assert "Token 83 (row 5, column 3)" in status.inner_text()
        canvas.press("ArrowRight")
        canvas.press("ArrowUp")
        assert "Token 68 (row 4, column 4)" in status.inner_text()
        value = values_of(explorer)[2, 0, -1, 0, 0, 4, 4]
        shown = float(page.locator(".bar b").first.inner_text())
        assert shown == pytest.approx(value, rel=0.01)
        canvas.press("Escape")
        page.mouse.move(5, 5)
        assert "Point at a token" in status.inner_text()
        assert page.locator(".heading").inner_text() == "means over tokens"
        page.locator(".overview canvas").press("ArrowUp")
        assert page.locator(".dit-lens").get_attribute("data-view").split("/")[1] == "blocks.4.img"


@pytest.mark.browser
def test_two_runs_are_compared_and_the_view_is_kept(run, edited, words, x0, tmp_path):
    explorer = dl.explore(run, edited, k=4, opacity=1.0, words=words, x0=x0)
    path, views, found = explorer.to_html(tmp_path / "page.html"), explorer.views, values_of(explorer)
    with browser.page() as page:
        page.goto(path.as_uri())
        view, left, right = (page.locator(one) for one in (".dit-lens", "[data-side=left]", "[data-side=right]"))
        page.get_by_role("button", name="difference").click()
        page.mouse.move(5, 5)
        difference = found[2, 2, -1, 0, 0] - found[2, 0, -1, 0, 0]
        most = np.abs(difference).max()
        palette = np.array(read_palette("RdBu"))
        for row, column in ((0, 0), (5, 7), (15, 15)):
            position = (difference[row, column] + most) / (2 * most) * (len(palette) - 1)
            expected = [np.interp(position, range(len(palette)), part) for part in palette.T]
            assert np.abs(colour_at(right, row, column, (16, 16)) - expected).max() <= 6
        assert "right minus left" in page.locator(".heading").inner_text()
        low, high = page.locator(".legend .scale").last.inner_text().split()[-2:]
        assert float(high) == -float(low) == pytest.approx(most, rel=0.01)
        page.get_by_role("button", name="side by side").click()
        page.mouse.move(5, 5)
        colours = [colour_at(right, row, column, (16, 16)) for row, column in ((1, 1), (8, 8))]
        page.get_by_role("button", name="wipe").click()
        page.get_by_role("slider", name="wipe").press("Home")
        assert right.is_hidden()
        wiped = [colour_at(left, row, column, (16, 16)) for row, column in ((1, 1), (8, 8))]
        assert np.abs(np.subtract(colours, wiped)).max() <= 6
        # The address has the state, also for a page that is opened with it; what it cannot mean is left out.
        page.get_by_role("slider", name="step").press("Home")
        page.wait_for_url("**#compare=wipe&wipe=0&step=0")
        page.goto(f"{path.as_uri()}#step=1&group=words&channel=1&overlay=none&site=blocks.99.img&opacity=7")
        page.reload()
        page.locator(".dit-lens[data-overlay=none]").wait_for()
        assert view.get_attribute("data-view").startswith("1/blocks.5.img/")
        assert page.get_by_role("slider", name="opacity").input_value() == "0.7"
        # A channel is typed, and chosen in the spectrum.
        number = page.get_by_role("spinbutton", name="number of the channel")
        number.fill("127" if 127 not in views.channels else "126")
        number.press("Enter")
        assert "There is no map of channel 12" in page.get_by_role("alert").inner_text()
        number.fill(str(views.channels[2, 0, 2]))
        number.press("Enter")
        assert view.get_attribute("data-view").endswith(f"/{views.channels[2, 0, 2]}")
        page.locator(".spectrum").click(position={"x": 42, "y": 20})
        assert view.get_attribute("data-view").endswith(f"/{views.channels[2, 0, 0]}")
        # Steps are played, and the view is saved.
        page.get_by_role("button", name="play").click()
        page.locator(".dit-lens[data-view^='2/']").wait_for()
        page.locator(".dit-lens[data-view^='0/']").wait_for()
        page.get_by_role("button", name="pause").click()
        with page.expect_download() as download:
            page.get_by_role("button", name="PNG").click()
        assert download.value.suggested_filename.startswith("dit_lens-blocks.5.img-step-0")
        assert Image.open(download.value.path()).size[0] > 2 * 384
        # Beside another one, as in an HBox.
        page.evaluate("document.querySelector('.dit-lens-host').parentElement.style.display = 'flex'")
        assert view.bounding_box()["width"] > 900


@pytest.mark.browser
def test_the_code_can_be_copied_with_the_state_of_the_view(run, tmp_path):
    path = dl.explore(run, k=4).to_html(tmp_path / "page.html")
    with browser.page() as page:
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.goto(path.as_uri())
        page.get_by_text("The code that made this").click()
        page.get_by_role("slider", name="step").press("Home")
        page.get_by_role("button", name="Copy").click()
        code = page.evaluate("navigator.clipboard.readText()")
        assert code.startswith("import dit_lens as dl")
        assert code.endswith("dl.explore(run, k=4, step=0)")


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_in_light_and_dark(run, tmp_path, dark):
    path = dl.explore(run, k=4).to_html(tmp_path / "page.html")
    with browser.page(dark=dark, width=420) as page:
        page.goto(path.as_uri())
        page.locator(".dit-lens").wait_for()
        colours = page.evaluate(
            """() => { const style = getComputedStyle(document.querySelector('.dit-lens'));
            return [style.color, style.backgroundColor].map(c => c.match(/[0-9.]+/g).slice(0, 3).map(Number)); }"""
        )
        lights = [np.dot((np.array(colour) / 255) ** 2.2, [0.2126, 0.7152, 0.0722]) for colour in colours]
        assert (max(lights) + 0.05) / (min(lights) + 0.05) > 7
        assert (lights[1] < 0.1) == dark
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off at 420 pixels"


@pytest.mark.browser
def test_masks_of_a_study_are_shown_over_its_images(toy, tmp_path):
    result = dl.studies.organisation(toy, [CIRCLE], k=4, site="blocks[4:6].img", draws=1, num_inference_steps=2)
    explorer = dl.explore(result)
    assert explorer.group == "top"
    assert explorer.overlay == "clusters"
    (key,) = [key for key in result.masks if key.endswith("/5/top")]
    np.testing.assert_array_equal(explorer.views.labels(1)[0, 0, 0], result.masks[key])
    with browser.page() as page:
        page.goto(explorer.to_html(tmp_path / "page.html").as_uri())
        page.get_by_text(f"inside: {int(result.masks[key].sum())} tokens").wait_for()


@pytest.mark.browser
def test_images_of_other_studies_stand_side_by_side(toy, tmp_path):
    result = dl.studies.disruption(toy, [CIRCLE], k=4, draws=1, num_inference_steps=1)
    explorer = dl.explore(result)
    names = [pane.name for pane in explorer.views.panes]
    assert names[0] == f"{CIRCLE}, seed 0, untouched"
    assert f"{CIRCLE}, seed 0, k 4, top" in names
    with browser.page() as page:
        page.goto(explorer.to_html(tmp_path / "page.html").as_uri())
        page.locator("canvas[data-side=right]").wait_for()
        bottom = names.index(f"{CIRCLE}, seed 0, k 4, bottom")
        page.get_by_label("beside it").select_option(str(bottom))
        assert "bottom" in page.locator("canvas[data-side=right]").get_attribute("aria-label")


# The atlas


def test_an_extent_fits_its_budget_and_reduces_steps_first():
    assert fit_extent(64, 8, (16, 16), 12, 20 * 2**20) == Extent(12, 16, 3)
    assert fit_extent(64, 8, (16, 16), 12, 3 * 2**20).steps == 8
    assert fit_extent(57, 8, (64, 64), 28, 10 * 2**20).groups == 1
    with pytest.raises(OpError, match="cannot hold one step of 640 maps"):
        fit_extent(640, 8, (64, 64), 28, 2**18)


@pytest.mark.browser
def test_an_atlas_opens_without_model_or_kernel(tmp_path, capsys, monkeypatch):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"id": str(i), "prompt": text}) + "\n" for i, text in enumerate((CIRCLE, CROSS)))
    )
    out = tmp_path / "atlas.html"
    command = ["atlas", "toy:flux", "--out", str(out), "--prompts", str(prompts), "-k", "3", "--steps", "3"]
    assert main([*command, "--device", "cpu", "--megabytes", "0.2"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert out.stat().st_size < 0.25 * 2**20
    with browser.page() as page:
        page.goto(out.as_uri())
        page.get_by_label("image").first.select_option("1")
        assert page.get_by_text("To keep this file small").count() == 1
        assert "rank 1" in page.locator(".spectrum").get_attribute("aria-label")


@pytest.mark.parametrize(
    ("name", "value"), [("step", "0"), ("site", None), ("channel", 1.5), ("opacity", "half"), ("data_maps", 3)]
)
def test_attributes_that_cannot_be_are_told(run, name, value):
    explorer = dl.explore(run, k=2)
    before = getattr(explorer, name)
    with pytest.raises(OpError, match=f"Explorer.{name}=.* cannot be used"):
        setattr(explorer, name, value)
    assert getattr(explorer, name) == before
    explorer.step = np.int64(1)
    assert explorer.step == 1
