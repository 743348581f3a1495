"""The key of an image is its text, and the text its key."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_lens.studies import ImageKey

numbers = st.integers(0, 10**4)
arms = st.sampled_from(["top", "top-early", "energy-matched", "noisy latent", "x0", "untouched"])
places = st.one_of(numbers, st.sampled_from(["blocks.3.img", "blocks.12.img.attn.z", "subject", "inside", "rest"]))
FORMS = [
    {},
    {"arm": arms},
    {"k": numbers, "arm": arms},
    {"k": numbers, "arm": arms, "part": st.sampled_from(["masked", "whole"]), "strength": st.floats(0, 1)},
    {"step": numbers, "block": numbers, "arm": arms},
    {"step": numbers, "block": numbers, "arm": arms, "draw": st.integers(1, 9)},
    {
        "edit": st.sampled_from(["ablation", "transport"]),
        "arm": arms,
        "part": st.sampled_from(["mean", "residual", "whole"]),
    },
    {"row": places, "column": places, "draw": st.integers(0, 9)},
]


@given(st.data(), numbers, numbers)
def test_a_key_is_read_back_from_its_text(data, item, seed):
    values = {name: data.draw(values) for name, values in data.draw(st.sampled_from(FORMS)).items()}
    if "strength" in values:
        values["strength"] = float(f"{values['strength']:g}")
    key = ImageKey(item, seed, **values)
    assert ImageKey.parse(str(key)) == key


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (ImageKey(0, 0), "0/0"),
        (ImageKey(1, 7, k=0, arm="untouched"), "1/7/0/untouched"),
        (ImageKey(0, 0, k=4, arm="top", part="whole", strength=1.0), "0/0/4/top/whole/1"),
        (ImageKey(0, 0, step=2, block=3, arm="random", draw=5), "0/0/2/3/random/5"),
        (ImageKey(0, 0, edit="ablation", arm="top", part="mean"), "0/0/ablation/top/mean"),
        (ImageKey(0, 0, row="blocks.3.img", column="rest", draw=0), "0/0/blocks.3.img/rest/0"),
        (ImageKey(0, 0, row=0, column=1, draw=0), "0/0/0/1/0"),
    ],
)
def test_the_texts_of_studies(key, text):
    assert str(key) == text
    assert ImageKey.parse(text) == key


@given(st.text(min_size=1))
def test_a_text_of_no_known_form_is_kept_as_it_is(rest):
    assert str(ImageKey.parse(f"0/1/{rest}")) == f"0/1/{rest}"


def test_a_text_without_item_and_seed_is_not_a_key():
    assert ImageKey.parse("site=blocks.0.img, k=4/0/0/4/top") is None
    assert ImageKey.parse("") is None
