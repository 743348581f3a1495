"""Transport: the maths of its measures, and a study whose answers are known beforehand."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dit_lens import DiTLens, Read, Swap, plots, studies
from dit_lens.analysis.channels import top_channels
from dit_lens.analysis.metrics import rmse
from dit_lens.errors import OpError, PromptError, StudyInterrupted
from dit_lens.studies import Result
from dit_lens.studies.parts.blends import blend_images, blend_texts
from dit_lens.studies.parts.transport import choose_channels, keep_readout
from dit_lens.studies.parts.transport_measures import (
    add_matched_measures,
    explained_share,
    interpolate_at_distance,
    measure_change,
)
from dit_lens.studies.shared.judges import scene_judge
from tests import pipelines, planted

PROMPTS = [scene.caption for scene in planted.SCENES]
PAIRS = [(PROMPTS[0], PROMPTS[1]), (PROMPTS[2], PROMPTS[3])]
K = 16
LETTERS = [("red", "blue"), ("green", "white")]
FEW = {"k": 3, "draws": 1, "strengths": [1.0], "channels_from": "union", "mask_from": "both"}
FEW |= {"batch_size": 1, "num_inference_steps": 2}

values = st.lists(st.floats(0, 100), min_size=2, max_size=6, unique=True)


# The maths


@given(values, values, st.floats(0, 100))
def test_a_falling_curve_is_read_as_numpy_does(near, kept, wanted):
    near = sorted(near[: len(kept)], reverse=True)
    kept = kept[: len(near)]
    found = interpolate_at_distance(near, kept, [wanted])[0]
    if wanted < near[-1]:
        assert np.isnan(found)
    else:
        assert np.isclose(found, np.interp(wanted, near[::-1], kept[::-1]), atol=1e-9)


def test_a_curve_that_turns_back_counts_where_it_first_comes_near():
    assert interpolate_at_distance([80, 40, 60, 20], [0, 10, 20, 30], [50, 30]).tolist() == [7.5, 27.5]
    with pytest.raises(OpError, match="two equal lists"):
        interpolate_at_distance([1.0], [1.0, 2.0], [1.0])


@given(st.integers(0, 100), st.floats(-2, 2))
def test_what_a_part_explains(seed, share):
    change = np.random.default_rng(seed).normal(size=(3, 4, 5))
    assert np.isclose(explained_share(change, change), 1)
    assert np.isclose(explained_share(change, 0 * change), 0, atol=1e-12)
    assert np.isclose(explained_share(change, share * change), 1 - (1 - share) ** 2)
    assert np.isnan(explained_share(0 * change, change))
    with pytest.raises(OpError, match="one shape"):
        explained_share(change, change[0])


def test_change_is_measured_where_the_mask_is():
    before = Image.new("RGB", (4, 2))
    after = Image.fromarray(np.pad(np.full((2, 2, 3), 30, np.uint8), ((0, 0), (0, 2), (0, 0))))
    assert measure_change(after, before, np.array([[True, False]])) == (30, 0)
    assert np.isnan(measure_change(after, before, np.array([[True, True]]))[1])


def test_arms_are_compared_where_they_are_as_near_as_top():
    line = {"prompt": "p", "seed": 0, "masked": False, "draw": 0}
    table = pd.DataFrame(
        [
            {**line, "k": 0, "arm": "untouched", "strength": 0.0, "to_source": 100.0, "to_target": 0.0},
            {**line, "k": 4, "arm": "top", "strength": 1.0, "to_source": 50.0, "to_target": 60.0},
            {**line, "k": 4, "arm": "random", "strength": 1.0, "to_source": 75.0, "to_target": 90.0},
            {**line, "k": 0, "arm": "pixel-blend", "strength": 1.0, "to_source": 0.0, "to_target": 100.0},
        ]
    )
    rows = add_matched_measures(table).set_index("arm")
    assert rows.loc["top", "matched_to_target"] == 60
    assert rows.loc["pixel-blend", "matched_to_target"] == 50
    assert np.isnan(rows.loc["random", "matched_to_target"])
    assert rows["reached"].tolist()[1:] == [1, 0, 1]
    alone = add_matched_measures(table[table["arm"] == "untouched"])  # a study that was interrupted at once
    assert alone["reached"].isna().all()


@given(st.floats(0, 1))
def test_no_image_keeps_more_in_rmse_than_a_pixel_blend(strength):
    rng = np.random.default_rng(0)
    source, target = (Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)) for _ in range(2))
    blend = blend_images(source, target, strength)
    apart = rmse(source, target)
    assert rmse(blend, source) + rmse(blend, target) <= apart + 1.1  # rounding to whole grey levels
    assert rmse(blend, target) == pytest.approx(strength * apart, abs=0.6)


def test_texts_are_blended_row_by_row():
    texts = {"prompt_embeds": torch.tensor([[[4.0]], [[0.0]]]), "prompt_embeds_mask": torch.tensor([[0, 1], [1, 0]])}
    found = blend_texts(texts, 0.5)
    assert found["prompt_embeds"].tolist() == [[[4.0]], [[2.0]]]
    assert found["prompt_embeds_mask"].tolist() == [[0, 1], [1, 1]]
    assert blend_texts(texts, 0.0)["prompt_embeds"].tolist() == texts["prompt_embeds"].tolist()
    with pytest.raises(PromptError, match="cannot be blended: prompt_embeds hold"):
        blend_texts({"prompt_embeds": [torch.ones(3), torch.ones(4)]}, 0.5)


def test_channels_of_source_target_and_both():
    scores = [{"a": torch.tensor(s), "b": torch.tensor(s)} for s in ([9.0, 1, 2, 3, 0, 0], [0.0, 9, 1, 2, 0, 0])]
    source, target = (top_channels(s, s, k=2) for s in scores)
    assert choose_channels(source, target, "source") == source
    assert choose_channels(source, target, "target") == target
    both = choose_channels(source, target, "union")
    assert both["a"] == (0, 3, 1)
    assert both.scores["a"].tolist() == [4.5, 5, 1.5, 2.5, 0, 0]
    assert dict(keep_readout(both)) == {"final.img": both["b"]}


# On models whose truth is known


@pytest.fixture(scope="module")
def lenses(toy):
    kinds = (planted.Carrier, planted.DetailOnly)
    return {kind.__name__: DiTLens(planted.pipeline(toy, kind), defaults=planted.CALL) for kind in kinds}


@pytest.fixture(scope="module")
def results(lenses):
    """With half of the strength and inside a mask as well, where the massive channels do something."""
    choices = {"k": K, "draws": 1, "judge": scene_judge, "num_inference_steps": 2}
    return {
        "Carrier": studies.transfer(lenses["Carrier"], PAIRS, strengths=[0.5, 1.0], **choices),
        "DetailOnly": studies.transfer(lenses["DetailOnly"], PAIRS, strengths=[1.0], mask_from=None, **choices),
    }


def rows(result, masked=False, strength=1.0):
    table = result.summary
    return table[(table["masked"] == masked) & (table["strength"] == strength)].set_index("arm")


def test_a_carrier_carries_and_a_detail_does_not(results):
    carrier, detail = rows(results["Carrier"]), rows(results["DetailOnly"])
    assert carrier.loc["top", "to_source"] < 0.1 * carrier.loc["top", "to_target"]
    assert carrier.loc["top", "fidelity_source"] == 1
    assert detail.loc["top", "to_target"] < 0.1 * detail.loc["top", "to_source"]
    assert detail.loc["top", "fidelity_target"] == 1
    assert carrier.loc["random", "to_target"] < 0.1 * carrier.loc["random", "to_source"]
    assert (detail["to_source"] > 5 * detail.loc["all", "to_source"]).loc[["top", "bottom"]].all()
    assert detail.loc["random", "to_target"] > 5 * detail.loc["top", "to_target"]
    for found in (carrier, detail):
        assert found.loc["all", "to_source"] < 1


def test_half_of_the_strength_goes_half_of_the_way(results):
    top, half = (rows(results["Carrier"], strength=strength).loc["top"] for strength in (1.0, 0.5))
    assert top["to_source"] < half["to_source"] < half["to_source"] + half["to_target"] < 1.2 * top["to_target"]


def test_baselines_reach_what_they_must(results):
    for result in results.values():
        full = rows(result)
        assert (full.loc[["pixel-blend", "latent-blend", "prompt-blend"], "to_source"] < 1).all()
        assert (full.loc[["pixel-blend", "latent-blend"], "reached"] == 1).all()
        assert full.loc["pixel-blend", "matched_to_target"] <= full.loc["top", "to_target"] + 1
        assert result.table["redrawn"].max() < 0.5


def test_half_strength_at_the_last_block_is_half_of_the_latents(lenses):
    """The carrier's last block is read out linearly, so that a transport there and a blend of latents are one."""
    result = studies.transfer(
        lenses["Carrier"], PAIRS, k=K, strengths=[0.5], draws=1, site="blocks.-1.img", mask_from=None,
        judge=scene_judge, num_inference_steps=2,
    )  # fmt: skip
    half = rows(result, strength=0.5)
    for side in ("to_source", "to_target"):
        assert half.loc["top", side] == pytest.approx(half.loc["latent-blend", side], rel=0.02)
    assert half.loc["prompt-blend", "to_target"] != pytest.approx(half.loc["latent-blend", "to_target"], rel=0.02)


def test_models_that_only_read_out_are_found_out(results):
    for result in results.values():
        full = rows(result)
        assert full.loc["top", "direct_share"] == pytest.approx(1, abs=1e-3)
        assert full.loc["top-readout", "to_target"] == pytest.approx(full.loc["top", "to_target"], abs=0.5)
        assert full.loc["top-early", "to_target"] == pytest.approx(full.loc["top", "to_target"], abs=0.5)


def test_change_stays_inside_the_mask(results):
    top = rows(results["Carrier"], masked=True).loc["top"]
    assert top["inside"] > 5 * top["outside"]


# On a tiny random model, whose blocks mix channels and tokens


@pytest.fixture(scope="module")
def tiny():
    return DiTLens(pipelines.flux(), defaults=dict(pipelines.TRUE_CFG))


@pytest.fixture(scope="module")
def found(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "out"
    return folder, studies.transfer(tiny, LETTERS, **FEW, out=folder)


def test_every_arm_is_measured_once(found):
    _, result = found
    counts = result.table.groupby(["arm", "masked"]).size()
    assert counts["untouched", False] == 2
    assert (counts[["top", "bottom", "random", "energy-matched", "all", "pixel-blend", "latent-blend"]] == 2).all()
    assert counts["prompt-blend"].to_dict() == {False: 2}
    top = result.table[result.table["arm"] == "top"]
    assert (top["distinct"] >= 3).all()
    assert (result.table.loc[result.table["arm"] == "top-readout", "distinct"] <= 6).all()
    assert result.settings["no_prompt_blend"] == ""


def test_strips_lead_from_target_to_source(found):
    _, result = found
    strips = plots.transfer_strips(result, pair=1, arms=("top", "prompt-blend"))
    assert len(strips.data) == 2 * 3
    inside = plots.transfer_strips(result, masked=True, arms=("top", "prompt-blend"))  # no prompts inside a mask
    assert len(inside.data) == 3
    for choice, words in (({"pair": 9}, "no images of pair 9"), ({"arms": ["up"]}, "no images of up")):
        with pytest.raises(OpError, match=words):
            plots.transfer_strips(result, **choice)


def test_blocks_that_mix_are_no_mere_read_out(found):
    _, result = found
    shares = result.table["direct_share"].dropna()
    assert len(shares) == 4  # top and random, of two pairs
    assert (shares < 0.999).all()


def test_a_study_goes_on_and_loads_without_its_model(found, tiny, monkeypatch):
    folder, result = found
    again = Result.load(folder)
    monkeypatch.setattr(type(tiny), "run", None)
    more = studies.transfer(tiny, LETTERS, **FEW, out=folder)
    for other in (again, more):
        pd.testing.assert_frame_equal(other.table, result.table, check_dtype=False)
        assert other.notes == result.notes
        assert {key: image.tobytes() for key, image in other.images.items()} == {
            key: image.tobytes() for key, image in result.images.items()
        }


def test_late_swaps_start_from_a_recorded_run_and_change_no_number(tiny, monkeypatch):
    choices = {"k": 3, "strengths": [1.0], "draws": 1, "mask_from": None, "steps": (0.5, 1.0), "num_inference_steps": 2}
    passes = []
    handle = tiny.pipe.transformer.transformer_blocks[0].register_forward_hook(lambda *_: passes.append(1))
    try:
        quick = studies.transfer(tiny, LETTERS, **choices)
        few = len(passes)
        monkeypatch.setattr("dit_lens.studies.parts.transport_cells.skips_first_step", lambda *_: False)
        slow = studies.transfer(tiny, LETTERS, **choices)
    finally:
        handle.remove()
    pd.testing.assert_frame_equal(quick.table, slow.table)
    assert all(quick.images[name].tobytes() == slow.images[name].tobytes() for name in slow.images)
    whole, moved, calls = 8, 8, 2  # runs that stay whole, of swaps, and the transformer's calls at a step
    assert len(passes) - few == (whole + moved) * 2 * calls
    assert few == (whole + 1 + moved / 2) * 2 * calls  # one more is recorded


def test_stored_activations_give_the_same_image(tiny):
    """Lockstep, against a source that was run before and kept."""
    source, target = LETTERS[0]
    sites, choice = "blocks.*.img", {"channels": [1, 5, 9], "rows": 1, "branch": "cond", "strength": 0.7}
    lockstep = tiny.run([source, target], Swap(sites, source="row:0", **choice), seed=0)
    kept = tiny.run([source, source], Read(sites), seed=0)
    stored = tiny.run([source, target], Swap(sites, source=kept, **choice), seed=0)
    untouched = tiny.run([source, target], seed=0)
    assert rmse(lockstep.images[1], stored.images[1]) < 0.5
    assert rmse(lockstep.images[1], untouched.images[1]) > 0.5


def test_masks_of_either_side_and_drawings(lenses, monkeypatch):
    run, runs = DiTLens.run, []

    def run_twice(*args, **call):
        if len(runs) == 2:
            raise KeyboardInterrupt
        runs.append(1)
        return run(*args, **call)

    monkeypatch.setattr(DiTLens, "run", run_twice)

    def masks(mask_from):
        """They are made of the untouched images; what is moved after these is not needed."""
        runs.clear()
        choices = {"k": K, "draws": 1, "strengths": [1.0], "site": "blocks.3.img", "num_inference_steps": 1}
        with pytest.raises(StudyInterrupted) as stop:
            studies.transfer(lenses["Carrier"], PAIRS[:1], mask_from=mask_from, **choices)
        return stop.value.result.masks["0/0"]

    source, target, both = (masks(side) for side in ("source", "target", "both"))
    assert (source & ~target).any()
    assert (target & ~source).any()
    assert np.array_equal(both, source | target)
    drawing = np.zeros((64, 64), bool)
    drawing[:, :32] = True
    assert np.array_equal(masks(drawing), np.arange(16)[None].repeat(16, 0) < 8)


def test_a_strength_may_be_a_number_of_any_type(tiny):
    choices = {"k": 3, "draws": 0, "site": "blocks.3.img", "mask_from": None, "num_inference_steps": 1}
    whole, one, more = (studies.transfer(tiny, LETTERS[:1], strengths=s, **choices) for s in ([1.0], 1, np.array([1])))
    for other in (one, more):
        assert other.table.equals(whole.table)


def test_the_share_that_is_read_out_is_what_two_swaps_say(tiny):
    """At the first step nothing has gone another way yet, so the velocities of plain runs can be compared."""
    pair, site, call = LETTERS[0], "blocks.*.img", {"seed": 0, "num_inference_steps": 2}
    massive = tiny.massive_channels(pair[0], k=3, **call)

    def velocity(*swaps):
        return tiny.run(pair, [*swaps, Read("velocity", steps=0)], **call)["velocity"][0, 1]

    clean, moved = velocity(), velocity(Swap(site, source="row:0", rows=1, channels=massive, steps=0, branch="cond"))
    last = massive["blocks.4.img"]
    read = velocity(Swap("final.img", source="row:0", rows=1, channels=last, steps=0, branch="cond"))
    by_hand = explained_share(moved - clean, read - clean)
    result = studies.transfer(
        tiny, [pair], k=3, draws=1, strengths=[1.0], steps=0, mask_from=None, num_inference_steps=2
    )
    assert rows(result).loc["top", "direct_share"] == pytest.approx(by_hand, abs=1e-3)
    assert 0.01 < by_hand < 0.999


def test_a_curve_over_k_up_to_the_width(tiny):
    result = studies.transfer(
        tiny, LETTERS[:1], k=[2, 8, 32], draws=1, strengths=[1.0], mask_from=None, branch="both", num_inference_steps=1
    )
    arms = result.table.groupby("k")["arm"].unique()
    assert "random" in arms[8]
    assert set(arms[32]) == {"top", "all"}  # no room for controls
    whole = result.table[result.table["k"] == 32].set_index("arm")["to_target"]
    assert whole["top"] == whole["all"]
    assert {trace.name for trace in result.figure().data} >= {"top (massive)", "all"}


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"k": 17}, "k=17 leaves no control of equal size"),
        ({"k": 9, "channels_from": "union"}, "k=18 leaves no control"),
        ({"k": [2, 33]}, "k=33 channels were asked for, but there are 32"),
        ({"channels_from": "sauce"}, "'sauce' is not a valid value of channels_from. Nearest: 'source'"),
        ({"mask_from": "goal"}, "'goal' is not a valid value of mask_from"),
        ({"mask_from": np.zeros((8, 12), bool)}, "covers half of no token"),
        ({"site": "blocks.0.txt"}, "which blocks.0.txt does not hold"),
        ({"strengths": [0.0]}, "must be numbers above 0"),
        ({"strengths": []}, "must be numbers above 0"),
        ({"steps": 99}, "step 99 does not exist"),
        ({"branch": "half"}, "branch='half' is not a valid branch"),
    ],
)
def test_mistakes_are_told_before_anything_runs(tiny, monkeypatch, choice, words):
    monkeypatch.setattr(type(tiny), "run", None)
    with pytest.raises(OpError, match=words):
        studies.transfer(tiny, LETTERS, **{"k": 3, **choice})


@pytest.mark.parametrize("study", [studies.transfer, studies.transfer_image, studies.patching])
def test_what_is_not_a_pair_is_told_before_anything_runs(tiny, study, monkeypatch):
    monkeypatch.setattr(DiTLens, "run", None)
    for pairs, words in (([], "there are no pairs"), (LETTERS[0], r"pairs\[0\] is '.*', which is not a valid pair")):
        with pytest.raises(OpError, match=words):
            study(tiny, pairs)
