"""The picture of a model names every site that there is, and no other; what is not there has its reason."""

from html.parser import HTMLParser

import pytest

from dit_lens import DiTLens, Read
from tests.zoo.truth import ENTRIES

VOID = {"br", "img", "rect"}


class Picture(HTMLParser):
    """Patterns with the number beside them, reasons of dashes, squares; tags are checked to be closed in order."""

    def __init__(self, text):
        super().__init__()
        self.patterns, self.reasons, self.squares, self.open = {}, [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "s":
            self.reasons.append(dict(attrs)["title"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["code"]:
            self.last = data
        elif self.open[-1:] == ["title"]:
            self.squares.append(data)
        elif data.replace(",", "").isdecimal() and self.open[-1] == "span":
            self.patterns[self.last] = int(data.replace(",", ""))


@pytest.fixture(params=["flux", "sana", "sd3", "wan", "klein"])
def lens(request):
    return DiTLens(ENTRIES[request.param].build())


def test_it_names_every_site_once(lens):
    found = Picture(lens._repr_html_())
    named = [site for pattern in found.patterns for site in lens.sites(pattern)]
    assert sorted(named) == sorted(lens.sites())
    assert sorted(found.squares) == sorted(site for site in lens.sites() if site.count(".") == 2 and site[0] == "b")
    for pattern, channels in found.patterns.items():
        assert {lens.anatomy.channels(lens.anatomy.site(site)) for site in lens.sites(pattern)} == {channels}
    assert all(reason for reason in found.reasons)


def test_its_numbers_are_those_of_a_run():
    lens = DiTLens.toy()
    found = Picture(lens._repr_html_())
    read = [Read(lens.sites(pattern)[0], steps=0) for pattern in found.patterns]
    run = lens.run("a big red circle left on a plain blue background", read, seed=0, num_inference_steps=1)
    assert [run[one.site].shape[-1] for one in read] == list(found.patterns.values())


def test_a_long_stack_has_a_square_for_every_few_blocks(monkeypatch):
    monkeypatch.setattr("dit_lens.instruments.picture.WIDEST", 2)
    text = DiTLens(ENTRIES["flux"].build())._repr_html_()
    assert "3 blocks with txt and img, a square for 2" in text
    assert [one for one in Picture(text).squares if one.endswith("img")] == [f"blocks.{i}.img" for i in (0, 1, 2, 4)]
