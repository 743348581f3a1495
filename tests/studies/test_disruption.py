"""Disruption: every arm does what it says, by hand-written hooks; and the study says on planted models what is true."""

import functools
import importlib

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_lens import Apply, Zero
from dit_lens.analysis.metrics import paired_difference_ci, rmse
from dit_lens.errors import OpError, PromptError
from dit_lens.studies import Result, disruption
from dit_lens.studies.parts import confounds, norms
from dit_lens.studies.shared.arms import average_scores, make_score_reads, select_top_channels
from dit_lens.studies.shared.cells import Cell
from dit_lens.studies.shared.tables import compare_arms
from tests import oracle, pipelines, planted

module = importlib.import_module("dit_lens.studies.disruption")  # the function of this name hides it

PROMPTS = ["a cat", "two dogs", "red"]
K, SEED, STEPS = 4, 5, 2
SITES = [f"blocks.{i}.img" for i in range(pipelines.DEPTH)]


# The pure edits.


@st.composite
def hidden(draw):
    """Tokens whose first channels are massive, and which ones would be zeroed."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    x = torch.randn(2, 5, 16, generator=random)
    top = draw(st.lists(st.integers(0, 15), min_size=2, max_size=8, unique=True))
    x[..., top] = x[..., top] * 20 + 10
    return x, top, [c for c in range(16) if c not in top]


@settings(max_examples=30, deadline=None)
@given(hidden())
def test_filling_keeps_what_either_norm_makes_of_the_others(case):
    x, top, others = case
    before = x.clone()
    new = confounds.fill_top(x, top)
    assert torch.equal(x, before)
    assert torch.equal(new[..., others], x[..., others])
    assert not torch.allclose(new[..., top], x[..., top])
    for norm in (F.layer_norm, F.rms_norm):
        torch.testing.assert_close(norm(new, [16])[..., others], norm(x, [16])[..., others], rtol=1e-4, atol=1e-5)
    # Which top channel held what is gone; only a mean and a spread per token are left.
    shuffled = x.clone()
    shuffled[..., top] = x[..., top[::-1]]
    torch.testing.assert_close(confounds.fill_top(shuffled, top), new, rtol=1e-4, atol=1e-4)


def test_tokens_that_are_all_massive_stay_numbers():
    x = torch.tensor([[[3.0, 0.0], [0.0, 0.0]]])
    assert confounds.attenuate(x, [0], torch.tensor([5.0])).tolist() == [[[0.0, 0.0], [0.0, 0.0]]]
    assert torch.equal(confounds.attenuate(x, [1], torch.tensor([5.0])), x)
    assert torch.isfinite(confounds.fill_top(x, [0])).all()


@settings(max_examples=20, deadline=None)
@given(hidden(), st.integers(0, 100))
def test_a_push_moves_every_token_as_far_as_zeroing_in_one_direction(case, seed):
    x, top, _ = case
    shift = confounds.make_push(x, top, seed)
    torch.testing.assert_close(shift.norm(dim=-1), x[..., top].norm(dim=-1))
    directions = F.normalize(shift, dim=-1).reshape(-1, 16)
    torch.testing.assert_close(directions, directions[:1].expand_as(directions))
    assert not torch.allclose(directions[0], F.normalize(confounds.make_push(x, top, seed + 1), dim=-1)[0, 0])


# The edits inside a pipeline.


def sets_for(lens, prompts=PROMPTS, site="blocks.*.img", steps=STEPS):
    clean = lens.run(prompts, make_score_reads(site, "|mean|"), seed=SEED, num_inference_steps=steps)
    return select_top_channels(average_scores(clean), K, "|mean|")


def watched(lens, ops, sites, prompts=PROMPTS, steps=STEPS):
    """What row 1 holds at sites before and after the ops there: (step, branch, site) -> (before, after)."""
    before, after = {}, {}

    def into(seen):
        def keep(x, hook):
            seen[hook.step, hook.branch, hook.name] = x[0].clone()

        return keep

    watch = [[Apply(site, rows=1, fn=into(seen)) for site in sites] for seen in (before, after)]
    lens.run(prompts, [*watch[0], *ops, *watch[1]], seed=SEED, num_inference_steps=steps)
    return {key: (before[key], after[key]) for key in before}


def test_pushes_do_not_pile_up(lens, embedded):
    top = sets_for(lens)[1]
    seen = watched(lens, confounds.make_push_ops(top, 1, 0, None), SITES)
    assert len({branch for _, branch, _ in seen}) == (1 if embedded else 2)
    for step, branch in {key[:2] for key in seen}:
        carried = 0
        for site in SITES:
            raw, edited = seen[step, branch, site]
            wanted = raw - carried  # where the token would be, had its block's input not been pushed
            carried = edited - wanted
            torch.testing.assert_close(carried.norm(dim=-1), wanted[:, top[site]].norm(dim=-1), rtol=1e-4, atol=1e-5)
            assert carried.norm() > 0


def test_rescaling_shows_to_readers_and_stays_out_of_the_residual(lens, embedded):
    """No site is written: what blocks add differs, and what enters them but for that."""
    top = sets_for(lens)[1]
    readers = norms.find_readers(list(top), lens.anatomy)
    first = f"blocks.{min(range(1, pipelines.DEPTH))}.img.resid_pre"
    seen = watched(lens, norms.make_rescaled_ops(top, 1, None, readers, 0), [first, *SITES, "final.img"])
    assert len({branch for _, branch, _ in seen}) == (1 if embedded else 2)
    assert all(torch.equal(raw, edited) for raw, edited in seen.values())


def test_the_reader_is_the_next_block_with_the_stream():
    sites = ["blocks.0.img.resid_pre", "blocks.1.txt.resid_pre", "blocks.2.img.resid_pre", "blocks.2.txt.resid_pre"]
    assert norms.find_reader("blocks.0.img", [*sites, "final.img"])[:2] == ("blocks.2.img.resid_pre", "blocks.2.img")
    assert norms.find_reader("blocks.2.img", [*sites, "final.img"])[:2] == ("final.img", "velocity")
    assert norms.find_reader("blocks.2.txt", [*sites, "final.img"])[:2] == (None, None)


def test_attenuated_moves_tokens_as_far_as_energy_matched(toy):
    """At one site and one step, where the energies of the clean run are those that are edited."""
    site, prompts = "blocks.3.img", [scene.caption for scene in planted.SCENES[:2]]
    one = sets_for(toy, prompts, site, steps=1)[1]
    edits = {"top": Zero(site, channels=one, rows=1), "matched": Zero(site, channels=one.energy_matched(SEED), rows=1)}
    edits["attenuated"] = confounds.make_attenuated_ops(one, one.energy_matched(SEED), 1, None)[0]
    moved = {}
    for name, op in edits.items():
        raw, edited = watched(toy, [op], [site], prompts, steps=1)[0, "cond", site]
        moved[name] = (edited - raw).square().sum(-1).mean().sqrt().item()
    assert moved["attenuated"] == pytest.approx(moved["matched"], rel=1e-4)
    assert moved["attenuated"] < 0.8 * moved["top"]


# The arms, against hooks written by hand.


def call_of(lens):
    return {**lens.defaults, "num_inference_steps": STEPS}


def is_cond(call, embedded):
    return embedded or call % 2 == 0


def step_of(call, embedded):
    return call if embedded else call // 2


def by_hand(plain, lens, embedded, rows):
    """Per image and block the top and bottom channels, and per step their means over images, from bare hooks."""
    _, records = oracle.draw(plain, PROMPTS * (rows // len(PROMPTS)), [SEED] * rows, call_of(lens))
    cond = [record for call, record in enumerate(records) if is_cond(call, embedded)]
    means = torch.stack([torch.stack([record[i, "img", "post"].mean(1) for i in range(5)]) for record in cond])
    order = means.abs().mean(0).argsort(-1, descending=True)  # [block, row, channel]
    return order[:, :, :K].tolist(), order[:, :, -K:].tolist(), means.mean(2)  # [step, block, channel]


def hooks(name, channels, means, embedded):
    """fn(call, block, stream, tensor) for one arm."""

    def edit(call, block, stream, x):
        if stream == "txt":
            return None
        for row, chosen in enumerate(channels[block][: len(PROMPTS)]):
            if name == "mean":
                x[row, :, chosen] = means[step_of(call, embedded), block, chosen]
            elif name == "resample":
                x[row, :, chosen] = x[3 + (row + 1) % 3, :, chosen]
            elif name != "late" or step_of(call, embedded) == 1:
                x[row, :, chosen] = 0
        return x

    return edit


CHOICES = {"late": {"steps": [1]}, "mean": {"ablation": "mean"}, "resample": {"ablation": "resample"}}


@pytest.fixture(scope="module")
def disrupted(lens):
    """The study of a choice, which is drawn once."""
    how = {"k": K, "seeds": [SEED], "draws": 0, "confounds": False, "num_inference_steps": STEPS}
    return functools.cache(lambda choice: disruption(lens, PROMPTS, **how, **CHOICES.get(choice, {})))


@pytest.fixture(scope="module")
def seen_by_hand(plain, lens, embedded):
    return functools.cache(lambda rows: by_hand(plain, lens, embedded, rows))


@pytest.mark.parametrize("name", ["top", "bottom", "mean", "resample", "late"])
def test_an_arm_is_what_hooks_do(lens, plain, embedded, name, disrupted, seen_by_hand):
    arm = "bottom" if name == "bottom" else "top"
    result = disrupted(name if name in CHOICES else "zero")
    rows = 6 if name == "resample" else 3
    top, bottom, means = seen_by_hand(rows)
    edit = hooks(name, bottom if arm == "bottom" else top, means, embedded)
    images, _ = oracle.draw(plain, PROMPTS * (rows // 3), [SEED] * rows, call_of(lens), edit)
    for row in range(3):
        found = result.images[f"{row}/{SEED}/{K}/{arm}"]
        worst = np.abs(np.asarray(found, int) - np.asarray(images[row], int)).max()
        assert worst <= (1 if name == "mean" else 0)  # a mean is summed in another order
        untouched = result.images[f"{row}/{SEED}/0/untouched"]
        line = result.table.query("prompt == @PROMPTS[@row] and arm == @arm").iloc[0]
        assert line["rmse"] == rmse(untouched, found) > 0
    assert result.table.loc[result.table["arm"] == "no-op", "rmse"].tolist() == [0.0] * 3
    for row in range(3):
        untouched, same = (result.images[f"{row}/{SEED}/0/{arm}"] for arm in ("untouched", "no-op"))
        assert untouched.tobytes() == same.tobytes()


def test_means_are_over_all_prompts_and_seeds():
    values = np.random.default_rng(0).normal(size=(STEPS, 5, 8)).astype(np.float32)  # five images in two batches
    cells = [Cell(arrays={"all/mean/blocks.0.img": part}) for part in (values[:, :3], values[:, 3:])]
    np.testing.assert_allclose(module.average_means(cells)["blocks.0.img"].numpy(), values.mean(1), rtol=1e-5)


def test_a_batch_size_changes_no_arm(lens):
    """Images differ by rounding alone, since batches of other shapes are computed otherwise."""
    one, other = (
        disruption(lens, PROMPTS, k=K, seeds=[SEED], draws=2, batch_size=size, num_inference_steps=STEPS)
        for size in (None, 2)
    )
    assert set(one.images) == set(other.images)
    keys = ["prompt", "seed", "k", "arm", "draw"]
    both = one.table.merge(other.table, on=keys, suffixes=("", "_other"), validate="one_to_one")
    assert len(both) == len(one.table) == len(other.table)
    np.testing.assert_allclose(both["energy_share"], both["energy_share_other"], rtol=0.01)
    both = both[both["arm"] != "energy-matched"]  # rounding decides between two sets that match equally well
    np.testing.assert_allclose(both["rmse"], both["rmse_other"], atol=0.5)
    assert one.table["rmse"].max() > 2


def test_one_k_and_one_seed_may_be_numbers_of_numpy(lens):
    call = {"draws": 1, "confounds": False, "num_inference_steps": 1}
    one = disruption(lens, PROMPTS[0], k=np.int64(K), seeds=np.int64(SEED), **call)
    pd.testing.assert_frame_equal(one.table, disruption(lens, PROMPTS[:1], k=[K], seeds=[SEED], **call).table)


def test_late_edits_start_from_a_recorded_run_and_change_no_number(lens, monkeypatch):
    """Half of the steps, and the same table and images as when every run is computed whole."""
    call = {"k": K, "draws": 1, "steps": (0.5, 1.0), "num_inference_steps": 2}
    passes = []
    first = lens.pipe.transformer.transformer_blocks[0]
    handle = first.register_forward_hook(lambda *_: passes.append(1))
    try:
        quick = disruption(lens, PROMPTS[:2], **call)
        few = len(passes)
        monkeypatch.setattr(module, "skips_first_step", lambda *_: False)
        slow = disruption(lens, PROMPTS[:2], **call)
    finally:
        handle.remove()
    pd.testing.assert_frame_equal(quick.table, slow.table)
    assert all(quick.images[name].tobytes() == slow.images[name].tobytes() for name in slow.images)
    runs = 11  # of the study: clean, and ten arms; the quick one records another and halves the ten
    assert few / (len(passes) - few) == pytest.approx((2 + (runs - 1) / 2) / runs)


def test_confounds_run_where_they_mean_something(lens):
    arms = disruption(lens, "red", k=K, draws=1, num_inference_steps=1, site="blocks.*.img.resid_pre").summary["arm"]
    assert list(arms) == ["no-op", "top", "bottom", "random", "energy-matched"]
    result = disruption(lens, "red", k=2, draws=1, num_inference_steps=1, site="blocks[3:5].{img,txt}")
    assert {"norm-kept", "norm-frozen", "rescaled", "random-direction", "attenuated"} <= set(result.summary["arm"])
    assert any("take k >= 3" in note for note in result.notes)
    some = disruption(lens, "red", k=K, draws=1, num_inference_steps=1, confounds=["rescaled", "attenuated"])
    assert list(some.summary["arm"])[5:] == ["attenuated", "rescaled"]


# What is measured.


def test_distances_and_judges_get_columns(lens):
    def reddest(a, b):
        return float(np.asarray(b)[..., 0].max())

    def judge(image, prompt):
        return {"clip": 0.25}

    result = disruption(
        lens,
        PROMPTS[:2],
        k=K,
        draws=1,
        confounds=False,
        distances=["mean_abs", reddest],
        judge=judge,
        num_inference_steps=1,
    )
    assert result.settings["distances"] == ["rmse", "mean_abs", "reddest"]
    row = result.table.query("arm == 'top'").iloc[0]
    assert row["reddest"] == np.asarray(result.images[f"0/0/{K}/top"])[..., 0].max()
    assert row["clip"] == 0.25
    assert {"rmse", "mean_abs_low", "reddest", "clip", "rmse_top_minus"} <= set(result.summary)
    assert "psnr" not in result.table
    assert (result.table.query("k > 0")["k_share"] == K / pipelines.WIDTH).all()
    assert "CLIP score" in str(result.figure().to_json())


def nothing(a, b):
    return None


@pytest.mark.parametrize(
    ("choice", "error", "said"),
    [
        ({"ablation": "meen"}, OpError, r"'meen' is not a valid ablation\. Nearest: 'mean'"),
        ({"ablation": "resample", "batch_size": 1}, PromptError, "one batch has a single prompt"),
        ({"k": 17}, OpError, "Choose k from 1 to 16"),
        ({"k": []}, OpError, "no set of channels"),
        ({"distances": ["rmsee"]}, OpError, r"'rmsee' is not a valid distance\. Nearest: 'rmse'"),
        ({"distances": [nothing]}, OpError, "'nothing' of two images must be a number, but it returned None"),
        ({"seeds": []}, PromptError, "list of seeds is empty"),
        ({"seeds": [1, 2, 1]}, PromptError, "names a seed twice"),
        ({"seeds": [1.5]}, PromptError, "seed 1.5 is not a whole number"),
        ({"confounds": ["rescale"]}, OpError, r"'rescale' is not a valid confound\. Nearest: 'rescaled'"),
        ({"confounds": ["rescaled"], "ablation": "mean"}, OpError, "are of zeroing the output of blocks"),
        ({"k": "8"}, OpError, "k='8' is not a valid number of channels"),
    ],
)
def test_mistakes_raise_before_anything_is_drawn(lens, monkeypatch, choice, error, said):
    monkeypatch.setattr(lens, "run", lambda *args, **call: pytest.fail("it was drawn"))
    with pytest.raises(error, match=said):
        disruption(lens, PROMPTS, **choice)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 10**6))
def test_paired_differences_equal_the_loops(prompts, seeds, draws, seed):
    random = np.random.default_rng(seed)
    top, other = random.normal(size=(prompts, seeds)), random.normal(size=(prompts, seeds, draws))
    lines = [{"k": 4, "arm": "top", "prompt": f"{p}", "seed": s, "rmse": top[p, s]} for p, s in np.ndindex(top.shape)]
    lines += [
        {"k": 4, "arm": "random", "prompt": f"{p}", "seed": s, "draw": d, "rmse": other[p, s, d]}
        for p, s, d in np.ndindex(other.shape)
    ]
    lines.append({"k": 0, "arm": "no-op", "prompt": "0", "seed": 0, "rmse": 0.0})
    table = pd.DataFrame(lines).sample(frac=1, random_state=seed)
    found = compare_arms(table, ["k"], ["rmse"])
    assert found[["k", "arm"]].to_numpy().tolist() == [[4, "random"]]
    expected = paired_difference_ci(top, other.mean(2))
    assert found["rmse_top_minus"].item() == pytest.approx(expected.mean)
    for end in ("low", "high"):
        assert found[f"rmse_top_minus_{end}"].item() == pytest.approx(getattr(expected, end), nan_ok=True)


def test_unpaired_images_are_left_out_of_a_difference():
    table = pd.DataFrame({"k": 4, "arm": ["top", "top", "random"], "prompt": ["a", "b", "a"], "seed": 0})
    assert compare_arms(table.assign(rmse=[5.0, 100.0, 2.0]), ["k"], ["rmse"])["rmse_top_minus"].tolist() == [3.0]


# How it shows itself.


def test_a_result_is_readable_and_escaped():
    table = pd.DataFrame({"arm": ["<i>mine</i>", "none"], "n": [1200, 1], "rmse": [77.123, np.nan]})
    summary = table.assign(rmse_low=[75.04, np.nan], rmse_high=[82.4, np.nan])
    result = Result("disruption", table, summary, {}, notes=["k < 3 & more"])
    assert "disruption: 2 measurements" in repr(result)
    assert "77 (75 to 82)" in repr(result)
    assert "1200" in repr(result)
    assert "rmse_low" not in repr(result)
    assert "nan" not in repr(result).lower().replace("none", "")
    page = result._repr_html_()
    assert "k &lt; 3 &amp; more" in page
    assert "&lt;i&gt;mine" in page
    assert "<i>" not in page
    assert "77 (75 to 82)" in page
    long = Result("disruption", table, pd.concat([summary] * 100), {})
    assert len(repr(long).splitlines()) < 50
