"""Patches one by one, by hand, are the cells of the map; on planted models the map points where the truth is."""

import functools

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from dit_lens import DiTLens, Swap, studies
from dit_lens.analysis.channels import top_channels
from dit_lens.errors import FamilyError, OpError, PromptError, SiteError
from dit_lens.instruments.gradients import nearness
from dit_lens.plots import patching_figure
from dit_lens.studies.parts.patches import chunk_patches, patch_groups, patch_regions, patch_steps
from dit_lens.studies.patching import OVER, agreement
from dit_lens.studies.shared.judges import scene_judge
from tests import pipelines, planted
from tests.zoo import truth

PAIR = ("a cat", "two dogs")
SCENES = [scene.caption for scene in planted.SCENES]
TOLERANCE = 1e-5  # of an effect, between a row of a batch and the same patch in a batch of two


@pytest.fixture(scope="module")
def tiny():
    return DiTLens(pipelines.flux(), defaults=dict(pipelines.CALL))


def cells(result):
    return result.table[result.table["row"] != "untouched"]


@functools.cache
def draw_pair(lens):
    return lens.run(PAIR, seed=0, output_type="latent").latents


@functools.cache
def swap_by_hand(lens, site, step):
    return by_hand(lens, Swap(site, source="row:0", rows=1, steps=step, branch="cond"))


def by_hand(lens, patch):
    """The effect of one swap, in a batch of source and target."""
    how = {"seed": 0, "output_type": "latent"}
    source, target = draw_pair(lens)
    latents = lens.run(PAIR, patch, **how).latents
    return 1 - float((latents[1] - source).norm() / (target - source).norm())


@pytest.mark.parametrize("batch_size", [3, 16])
def test_rows_of_a_batch_are_patches_one_by_one(tiny, batch_size):
    result = studies.patching(tiny, [PAIR], batch_size=batch_size, attribute=())
    found = cells(result).set_index(["row", "column"])["effect"]
    assert len(found) == pipelines.DEPTH * pipelines.STEPS
    assert found.nunique() == len(found)
    for (site, step), effect in found.items():
        assert effect == pytest.approx(swap_by_hand(tiny, site, step), abs=TOLERANCE)


def test_a_patch_is_of_its_tokens_and_channels(tiny):
    heads = studies.patching(tiny, [PAIR], over="block x head", attribute=())
    assert set(cells(heads)["column"]) == {0, 1}
    site = "blocks.2.img.attn.z"
    swap = Swap(site, source="row:0", rows=1, channels=range(16, 32), branch="cond")
    found = cells(heads).set_index(["row", "column"])["effect"]
    assert found[site, 1] == pytest.approx(by_hand(tiny, swap), abs=TOLERANCE)
    regions = studies.patching(tiny, [PAIR], over="token region", tiles=2, k=4, steps=[1], attribute=())
    found = cells(regions).set_index(["row", "column"])["effect"]
    mask = np.zeros(pipelines.GRID, bool)
    mask[:4, 6:] = True
    swap = Swap("blocks.*.img", source="row:0", rows=1, mask=mask, steps=1, branch="cond")
    assert found[0, 1] == pytest.approx(by_hand(tiny, swap), abs=TOLERANCE)
    swap = Swap("blocks.*.img", source="row:0", rows=1, mask=regions.masks["0/0"], steps=1, branch="cond")
    assert found["subject", "inside"] == pytest.approx(by_hand(tiny, swap), abs=TOLERANCE)


def test_attribution_is_the_slope_of_the_effect(tiny):
    """Cell by cell: a swap of a small strength has the effect that attribution predicts."""
    strength = 1e-2
    result = studies.patching(tiny, [PAIR], steps=[0, -1])
    for line in cells(result).itertuples():
        swap = functools.partial(Swap, line.row, source="row:0", rows=1, steps=line.column, branch="cond")
        slope = by_hand(tiny, swap(strength=strength)) / strength
        assert line.attribution_run == pytest.approx(slope, rel=0.05, abs=2e-3)


@pytest.fixture(scope="module", params=["carrier", "detail"])
def model(request, toy):
    kind = {"carrier": planted.Carrier, "detail": planted.DetailOnly}[request.param]
    return request.param, DiTLens(planted.pipeline(toy, kind), defaults=planted.CALL)


@pytest.fixture(scope="module")
def groups(model):
    pairs = [(SCENES[0], SCENES[1]), (SCENES[2], SCENES[3])]
    return studies.patching(
        model[1], pairs, over="block x channel group", k=16, draws=2, judge=scene_judge, batch_size=9
    )


def test_the_map_points_to_the_massive_channels_of_a_carrier_only(model, groups):
    name, _ = model
    rows = groups.summary.set_index("column")
    carried, idle = ("top", ("bottom", "random")) if name == "carrier" else ("rest", ("top",))
    for measure in ("effect", "attribution_run"):
        assert rows.loc[carried, measure].min() > 0.9
        assert rows.loc[list(idle), measure].max() < 0.3
    assert rows.loc[carried, "fidelity_source"].min() == 1
    assert not (rows.loc["top", "effect_low"] <= 0.9).any() or name == "detail"  # equal effects have no interval
    found = agreement(groups.table).set_index("attribution")
    assert found.loc["run", "cells"] == 4 * 5
    assert found.loc["run", "pearson"] > 0.95  # equal correlations have no interval
    assert any(
        "agrees with patching over 20 cells: Pearson 0.9" in note or "Pearson 1" in note for note in groups.notes
    )


def test_blocks_and_steps_of_a_carrier(model):
    """Only the last step decides what a planted model draws, in whichever block it is changed."""
    result = studies.patching(model[1], [(SCENES[0], SCENES[1])], judge=scene_judge)
    for measure in ("effect", "attribution_run"):
        values = result.summary.pivot(index="row", columns="column", values=measure)
        assert values.iloc[:, :-1].abs().max(axis=None) < 0.1
        assert values.iloc[:, -1].to_numpy() == pytest.approx(1, abs=1e-3)
    # Each step's velocity is (x - clean) / sigma; clean latents as far apart as the trajectories would be sigma closer.
    steps = result.summary.pivot(index="row", columns="column", values="attribution_step")
    assert steps.to_numpy() == pytest.approx(np.tile([1, 3 / 2, 3], (4, 1)), abs=1e-2)
    untouched = result.table[result.table["row"] == "untouched"].set_index("column")
    assert untouched.loc["source", ["effect", "fidelity_source"]].tolist() == [1, 1]
    assert untouched.loc["target", "effect"] == 0
    assert len(result.images) == 4


def test_the_extreme_images_are_those_of_the_table(groups):
    patched = cells(groups)
    for pair in (0, 1):
        one = patched[patched["pair"] == pair]
        best = one.loc[one["effect"].idxmax()]
        key = f"{pair}/0/{best['row']}/{best['column']}/{best['draw']}"
        said = scene_judge(groups.images[key], best["prompt"].split(" -> ")[0])["fidelity"]
        assert said == best["fidelity_source"]
    assert len(groups.images) == 2 * 4


def test_it_goes_on_from_its_folder_and_is_loaded_without_the_model(tiny, tmp_path, monkeypatch):
    how = {"over": "block x channel group", "k": 4, "draws": 1, "batch_size": 6, "seeds": [0, 1]}
    how |= {"num_inference_steps": 1}
    whole = studies.patching(tiny, [PAIR], **how)
    count = []

    def failing(self, *args, **kwargs):
        count.append(1)
        if len(count) == 6:
            raise KeyboardInterrupt
        return run(self, *args, **kwargs)

    run = DiTLens.run
    monkeypatch.setattr(DiTLens, "run", failing)
    with pytest.raises(KeyboardInterrupt):
        studies.patching(tiny, [PAIR], out=tmp_path / "study", **how)
    part = studies.Result.load(tmp_path / "study")
    assert 0 < len(part.table) < len(whole.table)
    again = studies.patching(tiny, [PAIR], out=tmp_path / "study", **how)
    loaded = studies.Result.load(tmp_path / "study")
    for found in (again, loaded):
        assert found.summary.astype(str).equals(whole.summary.astype(str))
        assert found.notes == whole.notes
        assert {key: image.tobytes() for key, image in found.images.items()} == {
            key: image.tobytes() for key, image in whole.images.items()
        }
    assert loaded.figure().data


def test_a_metric_of_ones_own_is_scaled_to_the_pair(tiny):
    def red(latents, source, target):
        return latents[..., 0].mean(1) * 7 + 3

    result = studies.patching(tiny, [PAIR], metric=red, steps=[1])
    found = cells(result).set_index("row")["effect"]
    how = {"seed": 0, "output_type": "latent"}
    ends = tiny.run(PAIR, **how).latents[..., 0].mean(1)
    swap = Swap("blocks.3.img", source="row:0", rows=1, steps=1, branch="cond")
    value = tiny.run(PAIR, swap, **how).latents[1, :, 0].mean()
    assert found["blocks.3.img"] == pytest.approx(float((value - ends[1]) / (ends[0] - ends[1])), abs=1e-4)
    with pytest.raises(OpError, match="tell the source from the target"):
        studies.patching(tiny, [PAIR], metric=lambda x, s, t: torch.zeros(len(x)))


def test_another_family_with_guidance_in_one_call():
    """OmniGen: joint attention alone, latents that are images, three branches' worth of guidance."""
    zoo = truth.zoo_of("omnigen")
    call = {key: value for key, value in zoo.call.items() if key not in ("output_type", "prompt")}
    result = studies.patching(zoo.lens, [tuple(zoo.call["prompt"][:2])], **call)
    assert np.isfinite(cells(result)[["effect", "attribution_run", "attribution_step"]].to_numpy()).all()
    assert cells(result)["effect"].abs().min() > 0


def test_agreement_is_scipys():
    rng = np.random.default_rng(0)
    effect, other = rng.normal(size=(2, 30))
    table = pd.DataFrame({"prompt": "a", "seed": 0, "row": range(30), "effect": effect, "attribution_run": other})
    found = agreement(table.assign(attribution_step=1.0)).set_index("attribution")
    assert found.loc["run", "pearson"] == pytest.approx(stats.pearsonr(effect, other)[0])
    assert found.loc["run", "spearman"] == pytest.approx(stats.spearmanr(effect, other)[0])
    assert found.loc["step", ["pearson", "spearman"]].isna().all()
    assert agreement(table[["prompt", "seed", "row", "effect"]]).empty


def test_groups_share_out_the_channels():
    energy = {site: torch.rand(12, generator=torch.Generator().manual_seed(i)) for i, site in enumerate("ab")}
    top = top_channels(energy, energy, k=3)
    found = {(p.row, p.column, p.draw): set(p.channels) for p in patch_groups(top, ["a", "b"], [0, 1], 2, seed=0)}
    for site in "ab":
        assert found[site, "top", 0] == set(top[site])
        assert found[site, "top", 0] | found[site, "rest", 0] == set(range(12))
        assert not found[site, "top", 0] & found[site, "rest", 0]
        assert {len(found[site, name, 0]) for name in ("top", "bottom", "random")} == {3}
    assert found["a", "random", 0] != found["a", "random", 1]
    assert len(patch_groups(None, ["a", "b"], [0, 1], 2, seed=0)) == len(found)


def test_regions_share_out_the_tokens():
    subject = np.zeros((5, 6), bool)
    subject[1:3, 2:4] = True
    *tiles, inside, outside = patch_regions(["a"], [0], subject, 2)
    assert sorted(token for tile in tiles for token in tile.tokens) == list(range(30))
    assert [len(tile.tokens) for tile in tiles] == [9, 9, 6, 6]
    assert set(inside.tokens) == {8, 9, 14, 15}
    assert sorted(inside.tokens + outside.tokens) == list(range(30))


def test_what_is_attributed_to_a_patch_is_the_sum_of_its_elements():
    rng = np.random.default_rng(0)
    shares = {f"{axis}/{site}": rng.normal(size=(2, 4)) for axis in ("channels", "tokens") for site in "ab"}
    whole, *_ = patch_steps(["a"], [5])
    assert whole.sum_attribution(shares, [3, 5]) == pytest.approx(shares["channels/a"][1].sum())
    region = patch_regions(["a", "b"], [3, 5], np.eye(2, dtype=bool), 1)[1]
    total = sum(shares[f"tokens/{site}"][:, [0, 3]].sum() for site in "ab")
    assert region.sum_attribution(shares, [3, 5]) == pytest.approx(total)


def test_chunks_keep_steps_apart():
    found = list(chunk_patches(patch_steps(["a", "b", "c"], [0, 1]), 2))
    assert [len({patch.steps for patch in some}) for some in found] == [1, 1, 1, 1]
    assert [patch for some in found for patch in some] == patch_steps(["a", "b", "c"], [0, 1])


@pytest.mark.parametrize(
    ("error", "match", "how"),
    [
        (OpError, "Nearest: 'block x step'", {"over": "block x steps"}),
        (OpError, "attribute= knows no 'loop'", {"attribute": ["loop"]}),
        (OpError, "no pairs", {"pairs": []}),
        (PromptError, "both 'a cat'", {"pairs": [("a cat", "a cat")]}),
        (PromptError, "seeds is empty", {"seeds": []}),
        (OpError, "room for the source", {"batch_size": 1}),
        (OpError, "step 9 does not exist", {"steps": 9}),
        (SiteError, "block 9", {"site": "blocks.9.img"}),
        (OpError, "one branch", {"branch": "both"}),
        (OpError, "no 'uncond' branch", {"branch": "uncond", "attribute": ()}),
        (OpError, "no control of equal size", {"over": "block x channel group", "k": 20}),
        (OpError, "no random channels", {"over": "block x channel group", "k": 2, "draws": 0}),
        (SiteError, "not made of heads", {"over": "block x head", "site": "blocks.*.img"}),
        (OpError, "fewer tiles", {"over": "token region", "tiles": 9, "k": 2}),
        (OpError, "divides nothing", {"over": "token region", "tiles": 0}),
        (OpError, "only be read", {"site": "blocks.*.img.resid_mid"}),
        (PromptError, "takes no argument", {"hight": 32}),
        (PromptError, "one latent of one prompt", {"num_images_per_prompt": 2}),
    ],
)
def test_mistakes_raise_before_any_step(tiny, error, match, how, tmp_path):
    count = []
    handle = tiny.pipe.transformer.register_forward_pre_hook(lambda *_: count.append(1))
    try:
        with pytest.raises(error, match=match):
            studies.patching(tiny, **{"pairs": [PAIR], **how}, out=tmp_path / "study")
    finally:
        handle.remove()
    assert not count
    assert not (tmp_path / "study").exists()


def test_models_without_gradients_can_be_patched():
    zoo = truth.zoo_of("hidream")
    with pytest.raises(FamilyError, match=r"attribute=\(\)"):
        studies.patching(zoo.lens, [PAIR])


def test_figures(groups):
    figure = groups.figure()
    assert [trace.type for trace in figure.data] == ["heatmap"] * 3
    assert list(figure.data[0].x) == ["top", "bottom", "random", "rest"]
    wide = groups.summary.pivot(index="row", columns="column", values="effect")
    assert np.allclose(figure.data[0].z, wide.loc[list(figure.data[0].y), list(figure.data[0].x)])
    assert figure.data[1].zmin == -figure.data[1].zmax
    with pytest.raises(OpError, match="lacks over"):
        patching_figure(groups.summary.drop(columns="over"))
    assert set(OVER) >= set(groups.summary["over"])
    assert nearness(torch.zeros(1, 2), torch.zeros(2), torch.ones(2)) == 1
