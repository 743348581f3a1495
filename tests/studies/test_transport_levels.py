"""What nearness to a source is worth: a collapse comes nearer to every source, and is no transport."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from dit_lens import DiTLens, studies
from dit_lens.commands.sentences import compare_distance, describe_transfer
from dit_lens.studies import Result
from dit_lens.studies.parts.transport_levels import LEAST_CEILING, add_shares, find_levels
from dit_lens.studies.shared.tables import summarise
from tests import pipelines, planted

PROMPTS = [scene.caption for scene in planted.SCENES]
RING = list(zip(PROMPTS, [*PROMPTS[1:], PROMPTS[0]], strict=True))


# Pictures without a model


def picture(rng, size=12):
    """A few flat colours, as different from others as scenes are."""
    return rng.integers(0, 256, (2, 2, 3)).repeat(size // 2, 0).repeat(size // 2, 1).astype(float)


def as_image(pixels):
    return Image.fromarray(np.clip(pixels, 0, 255).round().astype(np.uint8))


def simulate(editor, pairs=12, seed=0):
    """The table of a transport whose top arm does what ``editor`` does, and whose controls do next to nothing."""
    rng = np.random.default_rng(seed)
    sources, targets = ([picture(rng) for _ in range(pairs)] for _ in range(2))
    ends = {f"{i}/0/{arm}": as_image(one) for arm, some in (("source", sources), ("target", targets)) for i, one in
            enumerate(some)}  # fmt: skip
    levels, lines = find_levels(ends, 0), []
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        arms = {
            "untouched": (target, 0.0),
            "top": (editor(source, target, np.asarray(levels.mean, float)), 1.0),
            **dict.fromkeys(("bottom", "random", "energy-matched"), (target, 1.0)),
            "mean-picture": (np.asarray(levels.mean, float), 1.0),
            "grey": (np.asarray(levels.grey, float), 1.0),
            "ceiling": (source, 1.0),
        }
        for arm, (pixels, strength) in arms.items():
            image = as_image(pixels + 3 * rng.normal(size=pixels.shape) * (arm not in ("untouched", "ceiling")))
            away = {side: rms(image, one) for side, one in (("to_source", source), ("to_target", target))}
            about = {"prompt": f"pair {i}", "seed": 0, "k": 4, "arm": arm, "draw": 0, "masked": False}
            lines.append({**about, "strength": strength, **away, **levels.measure(image, i), "fidelity_source": 0.0})
    return add_shares(pd.DataFrame(lines))


def rms(image, pixels):
    return float(np.sqrt(np.mean((np.asarray(image, float) - pixels.round()) ** 2)))


EDITORS = {
    "transport": lambda source, target, mean: 0.5 * source + 0.5 * target,
    "faint transport": lambda source, target, mean: 0.25 * source + 0.75 * target,
    "collapse to the mean": lambda source, target, mean: mean,
    "collapse to grey": lambda source, target, mean: np.full_like(source, 128.0),
    "halfway to the mean": lambda source, target, mean: 0.5 * mean + 0.5 * target,
    "less contrast": lambda source, target, mean: 128 + 0.3 * (target - 128),
    "nothing": lambda source, target, mean: target,
}


def verdict(table):
    means = table.groupby("arm").mean(numeric_only=True)
    summary = means.reset_index().assign(masked=False, strength=1.0)
    return compare_distance(Result("transfer", table, summary, {})).verdict


@pytest.mark.parametrize("name", EDITORS)
def test_only_what_shows_its_own_source_is_transport(name):
    table = simulate(EDITORS[name])
    moved, before = (table[table["arm"] == arm].set_index("prompt") for arm in ("top", "untouched"))
    nearer = (before["to_source"] - moved["to_source"]).mean()
    assert (nearer > 10) == (name != "nothing")  # by nearness alone, all of them were transports
    assert (verdict(table) == "holds") == ("transport" in name)


def test_a_collapse_is_called_transport_no_more_often_than_by_chance():
    rates = {name: np.mean([verdict(simulate(EDITORS[name], seed=seed)) == "holds" for seed in range(12)]) for name in
             ("collapse to the mean", "less contrast", "transport")}  # fmt: skip
    assert rates["collapse to the mean"] == rates["less contrast"] == 0
    assert rates["transport"] == 1


def test_others_are_the_sources_of_other_pairs():
    rng = np.random.default_rng(1)
    one, two, three, four = (as_image(picture(rng)) for _ in range(4))
    ends = {
        "0/5/source": one,
        "0/5/target": two,
        "1/5/source": two,
        "1/5/target": three,
        "2/5/source": one,
        "2/5/target": four,
        "3/5/source": four,
        "3/5/target": one,
        "0/6/source": three,
        "0/6/target": four,
    }
    levels = find_levels(ends, 5)
    shown = {number: [image.tobytes() for image in images] for number, images in levels.others.items()}
    assert shown[0] == [four.tobytes()]  # not pair 1, whose source is its target, nor pair 2, of the same source
    assert shown[1] == [one.tobytes(), one.tobytes(), four.tobytes()]
    by_hand = np.mean([np.asarray(image, float) for text, image in ends.items() if "/5/" in text], 0)
    assert np.abs(np.asarray(levels.mean, float) - by_hand).max() <= 0.5
    assert np.isnan(find_levels(ends, 6).measure(one, 0)["to_others"])


def test_shares_and_gains_by_hand():
    about = {"prompt": "p", "seed": 0, "fidelity_source": 0.25}
    table = pd.DataFrame(
        [
            {**about, "arm": "untouched", "to_source": 100.0, "to_others": 90.0, "readable": 1.0},
            {**about, "arm": "ceiling", "to_source": 20.0, "to_others": 95.0, "readable": 1.0, "fidelity_source": 1.0},
            {**about, "arm": "top", "to_source": 60.0, "to_others": 80.0, "readable": 0.0},
            {**about, "arm": "top", "to_source": 110.0, "to_others": 90.0, "readable": np.nan, "fidelity_source": 0.5},
        ]
    )
    found = add_shares(table)
    assert found["specificity"].tolist() == [-10, 75, 20, -20]
    assert found["share"].tolist() == [0, 1, 0.5, -0.125]
    assert found["fidelity_gain"].tolist()[:2] == [0, 0.75]
    assert np.isnan(found["fidelity_gain"][2])  # nobody can read it
    assert found["fidelity_gain"][3] == 0.25  # the judge does not say whether it can
    low = table.assign(to_source=[100.0, 100 - 99 * LEAST_CEILING, 60.0, 110.0])
    assert add_shares(low)["share"].isna().all()


# Models whose truth is known


class Collapse(planted.Planted):
    """The massive channels say which scene the others hold; where both disagree, the mean of all scenes is drawn."""

    def code(self, image):
        told = 1 + 0.1 * self.which(image).float()[:, None, None]
        massive = planted.AMPLITUDE * told.expand(*image.shape[:2], self.massive)
        return torch.cat([massive, image @ self.spread.T], -1)

    def read(self, x):
        image, told = x[..., self.massive :] @ self.spread, x[..., : self.massive].mean((1, 2)) / planted.AMPLITUDE
        if self.images is None:
            return image
        agrees = ((told - 1) / 0.1).round() == self.which(image)
        return torch.where(agrees[:, None, None], image, self.images.mean(0))

    def which(self, image):
        if self.images is None:
            return torch.zeros(len(image))
        return torch.cdist(image.flatten(1), self.images.flatten(1)).argmin(1)


def test_a_planted_collapse_and_a_planted_carrier(toy):
    choices = {"k": 16, "strengths": [1.0], "draws": 1, "mask_from": None, "num_inference_steps": 1}
    arms, results = {}, {}
    for kind in (Collapse, planted.Carrier):
        lens = DiTLens(planted.pipeline(toy, kind), defaults=planted.CALL)
        results[kind] = studies.transfer(lens, RING, **choices)
        arms[kind] = results[kind].summary.set_index("arm")
    collapse, carrier = arms[Collapse], arms[planted.Carrier]
    assert collapse.loc["top", "to_source"] < collapse.loc["random", "to_source"] - 10  # nearer, and yet no transport
    assert abs(collapse.loc["top", "specificity"]) < 0.05 * carrier.loc["top", "specificity"]
    assert collapse.loc["top", "to_mean"] < 0.6 * collapse.loc["untouched", "to_mean"]
    assert compare_distance(results[Collapse]).verdict != "holds"
    for found in (collapse, carrier):
        assert found.loc["ceiling", ["to_source", "share"]].tolist() == [pytest.approx(0, abs=1e-3), 1]
        assert abs(found.loc["mean-picture", "specificity"]) < 1e-9
    assert carrier.loc["top", "share"] > 0.9
    assert "collapse would lie as near as this: mean-picture" in describe_transfer(results[planted.Carrier])


# A random model, in which text enters the final norm once more


@pytest.fixture(scope="module")
def tiny():
    return DiTLens(pipelines.flux(), defaults={**pipelines.TRUE_CFG, "num_inference_steps": 2})


FEW = {"k": 3, "draws": 1, "strengths": [0.5], "mask_from": None, "site": "blocks.*.img"}
LETTERS = [("red", "blue"), ("green", "white"), ("black", "pink")]


@pytest.fixture(scope="module")
def few(tiny):
    return studies.transfer(tiny, LETTERS, **FEW)


def test_the_ceiling_is_the_source_and_all_channels_are_not(few):
    at = few.table[few.table["arm"] == "ceiling"]
    assert (at["to_source"] == 0).all()
    assert (at["share"] == 1).all()
    assert len(at) == len(LETTERS)
    assert (few.table.loc[few.table["arm"] == "all", "to_source"] > 0).all()
    assert np.allclose(at["dose"], 1)


def test_batches_are_compared_with_the_sources_of_all(tiny, few):
    one = studies.transfer(tiny, LETTERS, **FEW, batch_size=1).table
    both = few.table.merge(one, on=["prompt", "arm", "draw"], suffixes=("", "_one"))
    assert len(both) == len(few.table)
    for name in ("to_others", "to_mean", "to_grey", "specificity"):
        assert np.allclose(both[name], both[f"{name}_one"], atol=1.5, equal_nan=True), name
    assert few.table["to_others"].notna().all()


def test_one_pair_has_no_others_and_says_so(tiny):
    result = studies.transfer(tiny, LETTERS[:1], **FEW, num_inference_steps=1)
    assert result.table["specificity"].isna().all()
    assert any("nothing tells a transport from a collapse" in note for note in result.notes)
    assert compare_distance(result).verdict == "is undecided"
    assert not any(trace.yaxis == "y4" for trace in result.figure().data)


def test_the_figure_shows_levels_and_specificity(few):
    figure = few.figure()
    texts = {one.text for one in figure.layout.annotations}
    assert texts >= {"all that can be moved", "mean picture", "mid grey"}
    assert figure.layout.yaxis4.title.text == "RMSE nearer to its own<br>source than to others"
    drawn = [trace for trace in figure.data if trace.yaxis == "y4" and trace.name == "top (massive)"]
    at = few.summary.set_index("arm").loc["top"]
    assert [list(trace.y) for trace in drawn] == [[at["specificity"]]]
    assert not any(trace.name in ("ceiling", "grey", "mean-picture") for trace in figure.data)


def test_distances_have_no_bound_below_zero():
    table = pd.DataFrame({"prompt": list("abcd"), "arm": "top", "to_source": [0.0, 40.0, 1.0, 60.0]})
    table["specificity"] = table["to_source"]
    found = summarise(table, ["arm"], ["to_source", "specificity"]).iloc[0]
    assert found["specificity_low"] < 0 == found["to_source_low"]
    assert found["specificity_high"] == found["to_source_high"]
