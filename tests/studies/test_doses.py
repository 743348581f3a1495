"""Doses: every arm moves tokens as far as plain torch hooks say, and says so; nothing piles up from block to block."""

import importlib
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_lens import Apply, Scale, Zero, toys
from dit_lens.studies import disruption, transfer
from dit_lens.studies.parts import confounds, doses, norms
from dit_lens.studies.shared.arms import average_scores, make_score_reads, select_top_channels
from dit_lens.studies.shared.streams import make_stream
from tests import oracle, pipelines, planted

module = importlib.import_module("dit_lens.studies.disruption")  # the function of this name hides it

SEED, STEPS, K = 5, 2, 4
ARMS = ("top", "energy-matched", "attenuated", "norm-kept", "random-direction", "norm-frozen", "rescaled")


# Every arm by plain torch hooks, which share nothing with the library but the channels that were chosen.


class Hand:
    """One arm on a plain FLUX pipeline.

    sets: for every row, block -> channels; of the top, and of the energy-matched control.
    """

    def __init__(self, pipe, arm, top, matched, embedded):
        self.pipe, self.arm, self.embedded = pipe, arm, embedded
        self.top, self.matched, self.rows = top, matched, range(len(top))
        self.state, self.found = {}, []  # by row; (row, dose) of the first conditional pass

    def draw(self, prompts, call):
        """The images, and the dose of every row."""
        edited = self.arm in ("norm-frozen", "rescaled")
        handles = [m.register_forward_hook(self.norm(*where)) for m, where in self.norms().items()] if edited else []
        try:
            images, _ = oracle.draw(self.pipe, prompts, [SEED] * len(prompts), call, self.block)
        finally:
            for handle in handles:
                handle.remove()
        return images, [np.mean([dose for row, dose in self.found if row == one]) for one in self.rows]

    def norms(self):
        """Norm -> (block whose output it reads, whether it reads it as it is)."""
        double, single = self.pipe.transformer.transformer_blocks, self.pipe.transformer.single_transformer_blocks
        found = {}
        for i, block in enumerate(double):
            found |= {block.norm1.norm: (i - 1, True), block.norm2: (i - 1, False)}
        found |= {block.norm.norm: (len(double) + i - 1, True) for i, block in enumerate(single)}
        found[self.pipe.transformer.norm_out.norm] = (len(double) + len(single) - 1, True)
        return {norm: where for norm, where in found.items() if where[0] >= 0}

    def weigh(self, call, row, part, whole):
        if call == 0:
            self.found.append((row, (part.square().sum() / whole.square().sum()).item()))

    def block(self, call, block, stream, x):
        if stream == "txt" or self.arm == "rescaled":
            return None
        for row in self.rows:
            top, matched = self.top[row][block], self.matched[row][block]
            carried = self.state.get(row, 0) if block else 0  # what the blocks before were moved by, all together
            whole = x[row] - carried  # where the tokens would be
            if self.arm == "attenuated":
                lost = torch.zeros_like(whole) if not block else self.state["lost", row].clone()
                lost[:, matched] = whole[:, matched]
                self.state["lost", row] = lost
                new = whole.clone()
                new[:, top] *= 1 - min(1, (lost.norm() / whole[:, top].norm()).item())
            elif self.arm == "norm-kept":
                pattern = torch.linspace(-1, 1, len(top))[
                    torch.randperm(len(top), generator=torch.Generator().manual_seed(self.streams[row]))
                ]
                old, new = whole[:, top], whole.clone()
                new[:, top] = (
                    old.mean(-1, keepdim=True)
                    + old.std(-1, keepdim=True, correction=0) * pattern / pattern.square().mean().sqrt()
                )
            elif self.arm == "random-direction":
                way = F.normalize(
                    torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(self.streams[row])), dim=0
                )
                new = whole + whole[:, top].norm(dim=-1, keepdim=True) * way
            else:
                new = x[row].clone()
                new[:, matched if self.arm == "energy-matched" else top] = 0
            self.state[row] = new - whole
            if self.arm != "norm-frozen":
                self.weigh(call, row, new - whole, whole)
            x[row] = new
        self.call, self.tokens = call, x.shape[1]
        return x

    def norm(self, block, as_it_is):
        """Puts together what a LayerNorm without weights gives out, of parts of its own and of other statistics."""

        def hook(norm, args, given):
            new = given.clone()
            for row in self.rows:
                x = args[0][row, -self.images :]
                if self.arm == "norm-frozen":
                    whole = x - self.state[row]
                    wanted = (x - whole.mean(-1, keepdim=True)) / (
                        whole.var(-1, keepdim=True, correction=0) + norm.eps
                    ).sqrt()
                    dose = self.state[row], whole
                else:
                    top = self.top[row][block]
                    rest = [c for c in range(x.shape[-1]) if c not in top]
                    zeroed, wanted = x.clone(), given[row, -self.images :].clone()
                    zeroed[:, top] = 0
                    before = wanted[:, rest].square().sum()
                    wanted[:, rest] = F.layer_norm(zeroed, zeroed.shape[-1:], eps=norm.eps)[:, rest]
                    gain = wanted[:, rest].square().sum() / before
                    dose = (1 - 1 / gain).sqrt(), torch.ones(())
                new[row, -self.images :] = wanted
                if as_it_is:
                    self.weigh(self.pass_number(norm), row, *dose)
            return new

        return hook

    images = 0  # image tokens
    streams = ()  # for every row a seed

    def pass_number(self, norm):
        """How often this norm has run."""
        self.state["runs", norm] = self.state.get(("runs", norm), -1) + 1
        return self.state["runs", norm] // len(self.rows)


def choose(lens, prompts, k):
    """For every row, block -> channels: the top, and their energy-matched controls."""
    clean = lens.run(prompts, make_score_reads("blocks.*.img", "|mean|"), seed=SEED, num_inference_steps=STEPS)
    top = select_top_channels(average_scores(clean), k, "|mean|")
    matched = [one.energy_matched(seed) for one, seed in zip(top, seeds_of(prompts, k, "energy-matched"), strict=True)]
    return [[list(one.values()) for one in sets] for sets in (top, matched)]


def seeds_of(prompts, k, arm):
    """The seed of an arm's first draw, for every prompt."""
    return [make_stream(SEED, prompt, k, arm, 0) for prompt in prompts]


def check_arms(lens, plain, prompts, k, embedded):
    result = disruption(lens, prompts, k=k, seeds=[SEED], draws=1, num_inference_steps=STEPS)
    call = {**lens.defaults, "num_inference_steps": STEPS}
    sets = choose(lens, prompts, k)
    tokens = lens.outline(prompts, num_inference_steps=STEPS).grid
    for arm in ARMS:
        hand = Hand(plain, arm, *sets, embedded)
        hand.images, hand.streams = int(np.prod(tokens)), seeds_of(prompts, k, arm)
        images, given = hand.draw(prompts, call)
        lines = result.table[result.table["arm"] == arm].set_index("prompt")
        for row, prompt in enumerate(prompts):
            found = np.asarray(result.images[f"{row}/{SEED}/{k}/{arm}"], int)
            assert np.abs(found - np.asarray(images[row], int)).max() <= 1, arm  # sums are rounded in another order
            assert lines.loc[prompt, "rmse"] > 0
            assert lines.loc[prompt, "dose"] == pytest.approx(given[row], rel=2e-3), arm
    return result


def test_arms_and_doses_are_what_hooks_do(lens, plain, embedded):
    check_arms(lens, plain, ["a cat", "red"], K, embedded)


def test_arms_and_doses_of_the_trained_toy_are_what_hooks_do(toy):
    plain = FluxPipeline.from_pretrained(toys.path("flux"))
    plain.set_progress_bar_config(disable=True)
    result = check_arms(toy, plain, [planted.SCENES[0].caption], 8, embedded=True)
    rows = result.summary.set_index("arm")
    assert rows.loc["attenuated", "dose_intended"] == pytest.approx(rows.loc["energy-matched", "dose_intended"])
    for arm in ("top", "energy-matched", "attenuated", "rescaled", "random-direction", "norm-frozen"):
        # Blocks answer to edits, so that what the streams would be is not what they are in the clean run.
        assert rows.loc[arm, "dose"] == pytest.approx(rows.loc[arm, "dose_intended"], rel=0.25), arm


@pytest.mark.parametrize("masked", [False, True])
def test_the_way_of_a_transport_is_what_hooks_do(cfg_lens, masked):
    """Half the strength at every block is most of the way, and the table says how much."""
    plain, pair, strength = pipelines.flux(), ("a cat", "red"), 0.5
    mask = np.zeros(pipelines.GRID, bool)
    mask[2:5, 3:7] = True
    tokens = torch.from_numpy(mask.ravel() if masked else np.ones(mask.size, bool)).nonzero()[:, 0]
    call = {"k": K, "strengths": strength, "seeds": [SEED], "draws": 1, "num_inference_steps": 1}
    result = transfer(cfg_lens, [pair], mask_from=mask if masked else None, **call)
    rows = result.table[(result.table["masked"] == masked) & (result.table["k"] == K)].set_index("arm")
    clean = cfg_lens.run(list(pair), make_score_reads("blocks.*.img", "|mean|"), seed=SEED, num_inference_steps=1)
    top = list(select_top_channels(average_scores(clean), K, "|mean|")[0].values())
    moved, found = torch.zeros(()), []

    def swap(call, block, stream, x):
        nonlocal moved
        if stream == "txt" or call != 0:  # the conditional pass alone
            return None
        whole, at = x[1] - moved, (tokens[:, None], torch.tensor(top[block]))
        x[1][at] = (1 - strength) * x[1][at] + strength * x[0][at]
        moved = x[1] - whole
        way = (x[0] - whole)[at]
        found.append(((moved[at] * way).sum() / way.square().sum()).item())
        return x

    oracle.draw(plain, pair, [SEED] * 2, {**cfg_lens.defaults, "num_inference_steps": 1}, swap)
    assert rows.loc["top", "dose"] == pytest.approx(np.mean(found), rel=1e-3)
    assert rows.loc["top", "dose_intended"] == strength
    assert rows.loc["top", "dose"] > 1.2 * strength
    assert rows.loc["top-readout", "dose"] == pytest.approx(strength, abs=1e-4)  # a single site
    if not masked:
        assert any("strengths are of every block" in note for note in result.notes)


# What piles up, in streams to which every block adds what it would add anyway.


@st.composite
def streams(draw):
    """What enters and what each block adds [site, token, channel], and per site the top and other channels."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    depth, width, k = draw(st.integers(1, 6)), draw(st.integers(6, 12)), draw(st.integers(1, 3))
    writes = torch.randn(depth, 5, width, generator=random, dtype=torch.float64)
    orders = [torch.randperm(width, generator=random).tolist() for _ in range(depth)]
    sites = [f"blocks.{i}.img" for i in range(depth)]
    writes[:, :, 0] *= 30
    tops = {site: [0, *(c for c in order if c)][:k] for site, order in zip(sites, orders, strict=True)}
    others = {site: [c for c in order if c not in tops[site]][:k] for site, order in zip(sites, orders, strict=True)}
    return dict(zip(sites, writes, strict=True)), tops, others


def carry_out(ops, writes):
    """Runs ops through the stream: site -> tokens, and the doses they note."""
    x, seen, noted = 0, {}, {}
    for site, write in writes.items():
        x = x + write
        for op in ops:
            if op.site != site:
                continue
            hook = SimpleNamespace(name=site, branch="cond", step=0)
            chosen = (slice(None), *((slice(None) if one is None else one) for one in (op.tokens, op.channels)))
            old = x[None][chosen].clone()
            new = op.fn(old, hook) if isinstance(op, Apply) else old * (op.factor if isinstance(op, Scale) else 0)
            if new is None:
                continue
            if getattr(getattr(op, "fn", None), "func", None) is doses.write_dose:
                noted[site] = new.item()
            x = x.clone()
            x[None][chosen] = new
        seen[site] = x
    return seen, noted


def distances(seen, writes):
    clean, _ = carry_out([], writes)
    return {site: ((seen[site] - clean[site]).square().sum() / clean[site].square().sum()).item() for site in clean}


@settings(max_examples=40, deadline=None)
@given(streams())
def test_an_attenuated_stream_lies_as_far_off_as_a_zeroed_one_at_every_block(case):
    writes, top, others = case
    zeroed, _ = carry_out([Zero(site, channels=some) for site, some in others.items()], writes)
    seen, _ = carry_out(confounds.make_attenuated_ops(top, others, 0, None), writes)
    clean, _ = carry_out([], writes)
    for site, wanted in distances(zeroed, writes).items():
        held = (clean[site][:, top[site]].square().sum() / clean[site].square().sum()).item()
        assert distances(seen, writes)[site] == pytest.approx(min(wanted, held), rel=1e-4)
        rest = [c for c in range(clean[site].shape[-1]) if c not in top[site]]
        torch.testing.assert_close(seen[site][:, rest], clean[site][:, rest])


@settings(max_examples=40, deadline=None)
@given(streams(), st.sampled_from(["zero", "scale", "attenuated", "push"]))
def test_a_dose_is_how_far_the_stream_lies_off(case, name):
    writes, top, others = case
    edits = {
        "zero": [Zero(site, channels=some) for site, some in top.items()],
        "scale": [Scale(site, channels=some, factor=0.5) for site, some in top.items()],
        "attenuated": confounds.make_attenuated_ops(top, others, 0, None),
        "push": confounds.make_push_ops(top, 0, 0, None),
    }[name]
    plain, _ = carry_out(edits, writes)
    seen, noted = carry_out(doses.weigh(edits, list(writes), 0, 0), writes)
    assert all(torch.equal(seen[site], plain[site]) for site in writes)  # weighing changes nothing
    assert noted == pytest.approx(distances(plain, writes), rel=1e-6, abs=1e-8)
    if name == "zero":
        clean, _ = carry_out([], writes)
        energy = {site: x.square().mean(0).numpy() for site, x in clean.items()}
        assert doses.predict_zeroing(energy, top, carried=True) == pytest.approx(noted, rel=1e-6, abs=1e-8)
        held = {site: e[top[site]].sum() / e.sum() for site, e in energy.items()}
        assert doses.predict_share(energy, top) == pytest.approx(held)
        assert doses.predict_zeroing(energy, top, carried=False) == pytest.approx(held)


def test_a_scale_at_every_block_piles_up_and_its_dose_says_so():
    writes = {f"blocks.{i}.img": torch.zeros(1, 2) for i in range(4)}
    writes["blocks.0.img"] = torch.tensor([[1.0, 1.0]])
    scale = [Scale(site, channels=[0], factor=0.5) for site in writes]
    _, noted = carry_out(doses.weigh(scale, list(writes), 0, 0), writes)
    assert list(noted.values()) == pytest.approx([(1 - 0.5**n) ** 2 / 2 for n in range(1, 5)])
    _, alone = carry_out(doses.weigh(scale[3:], list(writes)[3:], 0, 0), writes)
    assert alone["blocks.3.img"] == 0.125


# Norms.


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["layer", "plain", "rms"]))
def test_statistics_of_other_tokens(seed, kind):
    torch.manual_seed(seed)
    norm = {
        "layer": torch.nn.LayerNorm(6),
        "plain": torch.nn.LayerNorm(6, elementwise_affine=False),
        "rms": torch.nn.RMSNorm(6, eps=1e-6),
    }[kind]
    if kind == "layer":
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    x, other = torch.randn(3, 6), torch.randn(3, 6) * 4 + 1
    torch.testing.assert_close(norms.normalise(norm, x, x), norm(x), rtol=1e-4, atol=1e-5)
    # A norm is linear once its statistics stand: of a (x + y) with the statistics of x it makes a (norm(x) + ...).
    whole, half = norms.normalise(norm, other, other), norms.normalise(norm, other / 2, other)
    none = norms.normalise(norm, torch.zeros(3, 6), other)
    torch.testing.assert_close(half, (whole + none) / 2, rtol=1e-4, atol=1e-5)
    assert norms.is_norm(norm)
    assert not norms.is_norm(torch.nn.Sequential(norm))


def test_no_hook_stays_behind_when_a_run_ends_early(cfg_lens):
    lens = cfg_lens

    def break_off(x, hook):
        raise ValueError("on purpose")

    top = select_top_channels(
        average_scores(lens.run("red", make_score_reads("blocks.*.img", "|mean|"), seed=0, num_inference_steps=1)),
        K,
        "|mean|",
    )[0]
    readers = norms.find_readers(list(top), lens.anatomy)
    ops = norms.make_frozen_ops(top, 0, None, readers, 0)

    def count():
        return sum(len(m._forward_hooks) for m in lens.pipe.transformer.modules())  # noqa: SLF001 torch's own

    before = count()
    with pytest.raises(Exception, match="on purpose"):
        lens.run("red", [*ops, Apply("blocks.3.img.attn.q", fn=break_off)], seed=0, num_inference_steps=1)
    del ops
    assert count() == before


# What is said.


def test_notes_name_the_arms_whose_dose_is_another():
    table = pd.DataFrame(
        {
            "k": [4, 4, 4, 4],
            "arm": ["top", "attenuated", "norm-kept", "bottom"],
            "dose_intended": [0.5, 0.12, np.nan, 0.01],
            "dose": [0.51, 0.37, 0.9, np.nan],
        }
    )
    assert module.describe_doses(table) == [
        "k=4: attenuated gave a dose of 0.37 where 0.12 was intended (+208%)",
        "doses were not weighed: bottom",
    ]
    assert module.describe_doses(table[:1])[0].startswith("every arm gave the dose it intended, within 5%")
    assert module.describe_doses(table.drop(columns="dose")) == []


def test_doses_are_weighed_at_the_first_edited_step_and_where_ops_may_act(cfg_lens):
    call = {"k": K, "draws": 1, "num_inference_steps": 2}
    late = disruption(cfg_lens, "red", steps=[1], confounds=["rescaled"], **call).table.set_index("arm")
    assert late.loc["top", "dose"] > 0
    assert late.loc["no-op", "dose"] == late.loc["no-op", "dose_intended"] == 0
    gated = disruption(cfg_lens, "red", site="blocks[0:2].img.attn_out", **(call | {"num_inference_steps": 1}))
    assert gated.table.set_index("arm").loc["top", ["dose"]].isna().all()
    assert any(note.startswith("doses were not weighed: top, bottom") for note in gated.notes)
    two, once = ["red", "a cat"], call | {"num_inference_steps": 1}
    mean = disruption(cfg_lens, two, ablation="mean", site="blocks.2.img", **once).table
    some = mean[mean["arm"] == "top"]
    np.testing.assert_allclose(some["dose"], some["dose_intended"], rtol=1e-3)


def test_readers_of_a_model(cfg_lens):
    depth = pipelines.DEPTH
    found = norms.find_readers([f"blocks.{i}.img" for i in range(depth)], cfg_lens.anatomy)
    assert found["blocks.0.img"] == ("blocks.1.img.resid_pre", "blocks.1.img", "norm2")
    assert found["blocks.1.img"] == ("blocks.2.img.resid_pre", "blocks.2.img", "")
    assert found[f"blocks.{depth - 1}.img"] == ("final.img", "velocity", "")
