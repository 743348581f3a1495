"""The study of claim 2, its baselines and its nulls; on planted models the answers are opposite."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.decomposition import PCA

from dit_lens import DiTLens, Read, plots, studies
from dit_lens.analysis.clusters import chance_iou, iou, segment, upsample
from dit_lens.errors import OpError, PromptError, StudyInterrupted
from dit_lens.studies.parts.saliency import (
    centred_disc,
    count_heads,
    first_component,
    noisy_latent,
    read_word_attention,
    select_largest,
    token_norm,
)
from dit_lens.toys.scenes import Recognition, Scene
from tests import planted

PROMPTS = [scene.caption for scene in planted.SCENES]
MASKS = planted.masks()
K = 16
SCENE = "a big red circle left on a plain blue background"
OTHER = "a small white cross right on a plain green background"
seeds = st.integers(0, 10**6)


@pytest.fixture(scope="module")
def carrier(toy):
    return DiTLens(planted.pipeline(toy, planted.Carrier), defaults=planted.CALL)


@pytest.fixture(scope="module")
def detail(toy):
    return DiTLens(planted.pipeline(toy, planted.DetailOnly), defaults=planted.CALL)


@pytest.fixture(scope="module", params=["border", "distance"])
def polarity(request):
    return request.param


@pytest.fixture(scope="module")
def carried(carrier, polarity):
    return studies.organisation(carrier, PROMPTS, k=K, draws=2, masks=MASKS, polarity=polarity, steps=[0, -1])


@pytest.fixture(scope="module")
def detailed(detail, polarity):
    return studies.organisation(detail, PROMPTS, k=K, draws=2, masks=MASKS, polarity=polarity, steps=[0, -1])


def last(result, block=3):
    summary = result.summary
    return summary[(summary["block"] == block) & (summary["step"] == summary["step"].max())].set_index("arm")


# The two models


def test_a_carrier_is_organised_by_its_massive_channels(carried):
    rows = last(carried)
    top = rows.loc["top"]
    assert top["iou"] > 0.6
    assert rows.loc[["bottom", "random", "energy-matched"], "iou_gap_low"].min() > 0.3
    assert top["iou"] > max(top["iou_other_prompts"], rows.loc["centre", "iou"], top["chance"]) + 0.3
    assert top["p"] == pytest.approx(1 / 24)  # the true order alone, of 4 prompts


def test_a_detail_model_is_not(detailed):
    rows = last(detailed)
    top = rows.loc["top"]
    assert top["iou"] < top["chance"] + 0.1
    assert abs(top["iou"] - top["iou_other_prompts"]) < 0.05
    assert top["p"] > 0.5
    assert rows.loc["random", "iou_gap_high"] < -0.3
    assert rows.loc["random", "p"] == pytest.approx(1 / 24)


def test_blocks_steps_arms_and_prompts_are_all_there(carried):
    table = carried.table
    assert sorted(table["step"].unique()) == [0, planted.STEPS - 1]
    arms = {"top", "bottom", "random", "energy-matched", "all", "norm", "component", "centre", "noisy latent", "x0"}
    assert set(table["arm"]) == arms
    assert len(table) == len(PROMPTS) * 2 * 4 * (len(arms) + 2)  # random and energy-matched twice
    assert not table[["prompt", "seed", "step", "block", "arm", "draw"]].duplicated().any()
    assert any(note.startswith("left out: attention") for note in carried.notes)


def test_what_a_line_says_follows_from_its_mask(carried):
    for line in carried.table.sample(12, random_state=0).itertuples():
        row = PROMPTS.index(line.prompt)
        name = f"{line.arm}/{line.draw}" if line.draw else line.arm
        mask = carried.masks[f"{row}/0/{line.step}/{line.block}/{name}"]
        large = upsample(mask, (64, 64))
        assert line.iou == pytest.approx(iou(large, MASKS[row]))
        assert line.chance == pytest.approx(chance_iou(MASKS[row], int(large.sum())))
        assert line.iou_other_prompts == pytest.approx(np.mean([iou(large, MASKS[i]) for i in range(4) if i != row]))
        assert line.size == mask.mean()
        assert sum(line.clusters) == mask.size


def test_masks_of_maps_are_as_large_as_that_of_the_top_channels(carried):
    table = carried.table.set_index(["prompt", "step", "block", "arm"])["size"]
    for arm in ("norm", "component", "centre"):
        assert table.xs(arm, level="arm").equals(table.xs("top", level="arm"))


def test_several_steps_are_mapped_and_the_last_is_drawn(carried):
    figure = carried.figure()
    (heat,) = [trace for trace in figure.data if trace.type == "heatmap"]
    assert np.shape(heat.z) == (2, 4)
    names = [trace.name for trace in figure.data]
    assert names.count("top (massive)") == 2
    assert {"norm of the token", "centred disc", "predicted x0", "top, subjects of other prompts"} <= set(names)
    drawn = next(trace for trace in figure.data if trace.name == "norm of the token")
    assert list(drawn.y) == [last(carried, block).loc["norm", "iou"] for block in range(4)]
    assert "step 2" in figure.layout.title.subtitle.text


# Polarity, clusters, masks


def test_an_oracle_takes_the_better_half_and_says_so(carrier):
    outside = [~mask for mask in MASKS[:2]]  # so that the hot cluster is the wrong one
    call = {"k": K, "draws": 1, "masks": outside, "site": "blocks.3.img"}
    plain, oracle = (studies.organisation(carrier, PROMPTS[:2], polarity=one, **call) for one in ("heat", "oracle"))
    both = plain.table.merge(oracle.table, on=["prompt", "block", "arm", "draw"], suffixes=("", "_oracle"))
    assert (both["iou_oracle"] >= both["iou"]).all()
    assert (both["iou_oracle"] > both["iou"]).any()
    assert (both["chance_oracle"] >= both["chance"]).all()
    assert any(note.startswith("polarity oracle") for note in oracle.notes)
    line = oracle.table[oracle.table["arm"] == "top"].iloc[0]
    mask = upsample(oracle.masks["0/0/2/3/top"], (64, 64))
    assert line["iou"] == pytest.approx(max(iou(half, outside[0]) for half in (mask, ~mask)))
    assert line["chance"] == pytest.approx(chance_iou(outside[0], int(mask.sum()), oracle=True))


def test_more_clusters(carrier):
    result = studies.organisation(
        carrier, PROMPTS[:1], k=K, draws=1, masks=MASKS[:1], n_clusters=4, polarity="border", site="blocks.3.img"
    )
    assert {len(sizes) for sizes in result.table.loc[result.table["arm"] == "top", "clusters"]} == {4}
    assert result.summary["p"].isna().all()  # of a single prompt
    assert result.figure().data


def test_masks_come_as_arrays_images_and_functions(carrier):
    def known(image, prompt):
        return MASKS[PROMPTS.index(prompt)]

    painted = [Image.fromarray(mask).resize((128, 128)) for mask in MASKS[:2]]
    tables = [
        studies.organisation(
            carrier, PROMPTS[:2], k=K, draws=1, masks=masks, batch_size=size, site="blocks.3.img"
        ).table
        for masks, size in ((MASKS[:2], None), (painted, 1), (known, 1))
    ]
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])


def part(x, grid, polarity):
    """Tokens in two parts, by hand where the rule is the distance from the border."""
    if polarity == "border":
        return segment(x, grid, polarity="border").mask
    x = np.asarray(x, np.float64)
    x = (x - x.min(0)) / (x.max(0) - x.min(0))
    edge = np.pad(np.zeros((grid[0] - 2, grid[1] - 2), bool), 1, constant_values=True).ravel()
    far = (((x - x[edge].mean(0)) / (x[edge].std(0) + 0.05)) ** 2).mean(1) ** 0.5
    ranked = np.sort(far)  # the cut that leaves the least variance within both parts
    spread = [ranked[:i].var() * i + ranked[i:].var() * (len(far) - i) for i in range(1, len(far))]
    return (far >= ranked[np.argmin(spread) + 1]).reshape(grid)


def stand_out(values, size, grid, polarity):
    edge = np.pad(np.zeros((grid[0] - 2, grid[1] - 2), bool), 1, constant_values=True).ravel()
    away = np.abs(values - values[edge].mean())
    if polarity == "distance":
        return (away >= np.sort(away)[-size]).reshape(grid)
    return select_largest(values, size, grid, "border")


@pytest.mark.parametrize(("polarity", "batch_size"), [("border", None), ("distance", 1)])
def test_masks_are_made_of_what_the_run_had(toy, polarity, batch_size):
    call = {"seed": 0, "num_inference_steps": 2}
    result = studies.organisation(
        toy, [SCENE, OTHER], k=4, draws=1, steps=[0, 1], site="blocks.5.img", masks=MASKS[:2],
        num_inference_steps=2, batch_size=batch_size, polarity=polarity,
    )  # fmt: skip
    run = toy.run([SCENE, OTHER], [Read("blocks.5.img"), Read("x0"), Read("velocity")], **call)
    words = [[SCENE.split().index("circle")], [OTHER.split().index("cross")]]
    attention = read_word_attention(toy, [SCENE, OTHER], words, {5: 4}, [0, 1], run.grid, **call)[5]
    for step, row in itertools.product((0, 1), (0, 1)):
        x, clean = run["blocks.5.img"][step, row].numpy(), run["x0"][step, row]
        noisy = clean + run.sigmas[step] * run["velocity"][step, row]
        expected = {
            "top": part(x[:, np.abs(x.mean(0)).argsort()[-4:]], run.grid, polarity),
            "all": part(x, run.grid, polarity),
            "x0": part(clean, run.grid, polarity),
            "noisy latent": part(noisy, run.grid, polarity),
        }
        size = int(expected["top"].sum())
        expected["norm"] = stand_out(token_norm(x), size, run.grid, polarity)
        expected["attention"] = stand_out(attention[step, row], size, run.grid, polarity)
        for arm, mask in expected.items():
            found = result.masks[f"{row}/0/{step}/5/{arm}"]
            assert (found == mask).mean() > 0.98, (step, row, arm)  # batches of one differ in the last bit


# Baselines and nulls


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 30), st.integers(1, 12), seeds)
def test_the_first_component_equals_sklearn(n, d, seed):
    x = np.random.default_rng(seed).normal(size=(n, d)) * np.arange(1, d + 1) ** 2
    pca = PCA(1, svd_solver="full").fit(x)
    expected = pca.transform(x)[:, 0] * (1 if pca.components_[0].sum() >= 0 else -1)
    np.testing.assert_allclose(first_component(x), expected, atol=1e-6 * np.abs(x).max())


def test_equal_tokens_have_no_component():
    assert not first_component(np.full((9, 4), 3.0, np.float32)).any()


@settings(max_examples=20, deadline=None)
@given(st.tuples(*[st.integers(1, 8)] * 2), st.data(), st.sampled_from(["heat", "border", "distance"]))
def test_a_threshold_keeps_the_size_and_the_order(grid, data, polarity):
    n = grid[0] * grid[1]
    size = data.draw(st.integers(0, n))
    values = np.random.default_rng(data.draw(seeds)).integers(0, 5, n).astype(float)
    mask = select_largest(values, size, grid, polarity).ravel()
    assert mask.sum() == size
    if 0 < size < n:
        if polarity == "distance":
            edge = [min(i, j, grid[0] - 1 - i, grid[1] - 1 - j) == 0 for i, j in np.ndindex(*grid)]
            values = np.abs(values - values[edge].mean())
        inside, outside = values[mask], values[~mask]
        assert inside.min() >= outside.max() or (polarity == "border" and inside.max() <= outside.min())


def test_the_border_is_never_in_front():
    values = np.zeros((6, 6))
    values[2:4, 2:4] = 1
    for sign, polarity in itertools.product((1, -1), ("border", "distance")):
        found = select_largest(sign * values.ravel(), 4, (6, 6), polarity)
        np.testing.assert_array_equal(found, values > 0)
    assert not select_largest(-values.ravel(), 4, (6, 6))[2:4, 2:4].any()
    with pytest.raises(OpError, match=r"'boarder' is not a valid polarity\. Nearest: 'border'"):
        select_largest(values.ravel(), 4, (6, 6), "boarder")


def test_a_centred_disc_is_round_and_in_the_centre():
    rows, columns = np.nonzero(centred_disc(60, (16, 16)))
    assert rows.mean() == columns.mean() == 7.5
    assert np.hypot(rows - 7.5, columns - 7.5).max() < 5.2


def test_norms():
    x = np.random.default_rng(0).normal(size=(5, 3))
    np.testing.assert_allclose(token_norm(x) ** 2, (x**2).sum(1))


def test_the_noisy_latent_is_what_entered_the_transformer(toy):
    entered = []
    hook = toy.pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: entered.append(kwargs["hidden_states"].clone()), with_kwargs=True
    )
    try:
        run = toy.run(SCENE, [Read("x0"), Read("velocity")], seed=0, num_inference_steps=3)
    finally:
        hook.remove()
    outline = toy.outline(SCENE, num_inference_steps=3)
    assert outline.branches == ("cond", "uncond")  # in two calls, which are given the same
    for step in range(3):
        predicted = toy.family.prediction.sign * run["velocity"][step]
        found = noisy_latent(run["x0"][step], predicted, run.sigmas[step], outline.kind)
        torch.testing.assert_close(torch.as_tensor(found), entered[2 * step], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_noisy_latent_of_other_predictions(kind):
    clean, noise, sigma = np.array([0.3, -2.0]), np.array([1.5, 0.2]), 0.6
    noisy = 0.8 * clean + sigma * noise
    predicted = noise if kind == "epsilon" else 0.8 * noise - sigma * clean
    np.testing.assert_allclose(noisy_latent(clean, predicted, sigma, kind), noisy)


def test_attention_to_a_word_is_its_share_of_attention_to_text(toy, monkeypatch):
    call = {"seed": 0, "num_inference_steps": 2}
    heads = count_heads(toy, [2, 5])
    assert heads == {2: 4, 5: 4}
    words = [[2], [1, 2]]
    maps = read_word_attention(toy, [SCENE, OTHER], words, heads, [0, 1], (16, 16), **call)
    found = toy.read_pattern([SCENE, OTHER], [2, 5], heads=range(4), steps=[0, 1], **call)
    for block in (2, 5):
        text = found.between(block, "img", "txt")
        share = (text / text.sum(-1, keepdim=True)).mean(2)
        np.testing.assert_allclose(maps[block][:, 1], share[:, 1, :, 1:3].mean(-1), rtol=1e-6)
        assert maps[block].shape == (2, 2, 256)
    monkeypatch.setattr("dit_lens.studies.parts.saliency.PATTERN_BYTES", 1)  # a run for each block
    apart = read_word_attention(toy, [SCENE, OTHER], words, heads, [0, 1], (16, 16), **call)
    assert all(np.array_equal(apart[block], maps[block]) for block in maps)


def test_words_that_enter_by_cross_attention_are_mapped_prompt_by_prompt():
    """Each prompt's own word, whichever others run beside it."""
    sana, block = DiTLens.toy("sana"), 3
    call = {"site": f"blocks.{block}.img", "num_inference_steps": 1}
    result = studies.organisation(sana, [SCENE, OTHER], k=4, draws=0, masks=MASKS[:2], **call)
    found = sana.word_map(OTHER, "cross", blocks=block, seed=0, num_inference_steps=1)
    top = result.masks[f"1/0/0/{block}/top"]
    wanted = select_largest(found["cross"][0, 0].flatten().numpy(), int(top.sum()), top.shape, "distance")
    assert np.mean(result.masks[f"1/0/0/{block}/attention"] == wanted) > 0.98  # of batches of one and two
    assert not any("left out: attention" in note for note in result.notes)
    with pytest.raises(OpError, match="the word 'triangle' is not in"):
        studies.organisation(sana, [SCENE, OTHER], words="triangle", masks=MASKS[:2], **call)


def test_a_toy_knows_its_word_and_another_can_be_named(toy):
    call = {"k": 4, "draws": 1, "num_inference_steps": 1, "site": "blocks.2.img", "masks": MASKS[:2]}
    given, own, other = (
        studies.organisation(toy, [SCENE, OTHER], words=words, **call).masks
        for words in (["circle", "cross"], None, "background")
    )
    assert all(np.array_equal(mask, own[key]) for key, mask in given.items())
    assert not np.array_equal(given["0/0/0/2/attention"], other["0/0/0/2/attention"])
    assert np.array_equal(given["0/0/0/2/top"], other["0/0/0/2/top"])
    with pytest.raises(OpError, match="the word 'triangle' is not in"):
        studies.organisation(toy, [SCENE, OTHER], words="triangle", **call)


# Going on, and mistakes


def test_a_study_goes_on_where_it_was_stopped(carrier, tmp_path, monkeypatch):
    call = {"k": K, "draws": 1, "masks": MASKS, "seeds": [0, 1], "batch_size": 2, "site": "blocks.3.img"}
    out = tmp_path / "study"
    run, calls = DiTLens.run, []

    def stopped(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(self, *args, **kwargs)

    monkeypatch.setattr(DiTLens, "run", stopped)
    with pytest.raises(StudyInterrupted):
        studies.organisation(carrier, PROMPTS, out=out, **call)
    result = studies.organisation(carrier, PROMPTS, out=out, **call)
    assert len(calls) == 3 + 2
    monkeypatch.undo()
    whole = studies.organisation(carrier, PROMPTS, **call)
    loaded = studies.Result.load(out)
    for other in (result, loaded):
        assert other.table.equals(whole.table)
        assert other.summary.equals(whole.summary)
        assert other.masks.keys() == whole.masks.keys()
    assert set(whole.table["seed"]) == {0, 1}


def test_images_that_cannot_be_read_are_left_out(toy, monkeypatch):
    call = {"k": 4, "draws": 1, "num_inference_steps": 1, "site": "blocks.2.img", "words": []}
    answers = [Recognition(None, 0.1, np.zeros((64, 64), bool)), Recognition(Scene.parse(OTHER), 0.9, MASKS[0])]
    monkeypatch.setattr("dit_lens.toys.scenes.recognise_scene", lambda image: answers[0])
    with pytest.raises(OpError, match="no image could be read back"):
        studies.organisation(toy, SCENE, **call)
    monkeypatch.setattr("dit_lens.toys.scenes.recognise_scene", lambda image: answers.pop(0))
    result = studies.organisation(toy, [SCENE, OTHER], **call)
    assert set(result.table["prompt"]) == {OTHER}
    assert "1 images were unreadable and are left out" in result.notes
    assert len(result.images) == 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": "min-max"}, OpError, r"'min-max' is not a valid method\. Nearest: 'minmax'"),
        ({"polarity": "oracel"}, OpError, r"'oracel' is not a valid polarity\. Nearest: 'oracle'"),
        ({"n_clusters": 1}, OpError, "n_clusters=1 separates nothing"),
        ({"n_clusters": 3}, OpError, "polarity='distance' parts the tokens in two, and n_clusters=3 is of K-means"),
        ({"masks": MASKS}, OpError, "got 4 for 1 prompts"),
        ({"masks": [np.ones((4, 4))]}, OpError, r"masks\[0\] must be a bool array \[H, W\] or a PIL image"),
        ({"words": ["circle", "cross"]}, OpError, "got 2 for 1 prompts"),
        ({"site": "velocity"}, OpError, "velocity is clustered by image tokens"),
        ({"site": "blocks.0.txt"}, OpError, "which it does not hold"),
        ({"site": ["blocks.0.img", "blocks.0.img.attn_out"]}, OpError, "second site of block 0"),
        ({"seeds": []}, PromptError, "list of seeds is empty"),
        ({"steps": 99}, OpError, "step 99 does not exist"),
        ({"k": 100}, OpError, "k=100 leaves no control"),
    ],
)
def test_mistakes_are_told_before_anything_is_drawn(toy, monkeypatch, change, error, message):
    monkeypatch.setattr(toy.engine, "generate", lambda *_: pytest.fail("it was drawn"))
    with pytest.raises(error, match=message):
        studies.organisation(toy, SCENE, **{"k": 4, "draws": 1, **change})


def test_the_masks_lie_over_the_image(carried):
    key = "0/0"
    masks = {f"block {block}": carried.masks[f"{key}/2/{block}/top"] for block in range(4)}
    figure = plots.overlay_grid(carried.images[key], masks, truth=carried.masks[f"{key}/truth"])
    assert figure.layout.annotations[3].text.startswith("block 3<br>IoU")
