"""Blocks: every arm does what it says, by hand-written hooks; and the summary says of made-up damage what is true."""

import contextlib

import numpy as np
import pandas as pd
import pytest
import torch

from dit_lens import Apply, DiTLens, studies
from dit_lens.analysis.metrics import rmse
from dit_lens.analysis.metrics.intervals import mean_p
from dit_lens.errors import OpError, SiteError
from dit_lens.studies.block_notes import describe_blocks
from dit_lens.studies.parts.block_damage import summarise_damage
from dit_lens.studies.parts.block_pieces import PARTS, find_pieces
from dit_lens.studies.shared.keys import ImageKey
from tests import oracle, pipelines
from tests.small_studies import judge

PROMPTS = ["a cat", "two dogs"]
CALL = {**pipelines.CALL, "num_inference_steps": 1}
SEED = 3


@pytest.fixture(scope="module")
def lens():
    return DiTLens(pipelines.flux(), defaults=dict(CALL))


@pytest.fixture(scope="module")
def result(lens):
    parts = [part for part in PARTS if part != "cross"]
    return studies.blocks(lens, PROMPTS, parts=parts, site="blocks[1:3].*", seeds=SEED, judge=judge, draws=0)


@contextlib.contextmanager
def hooked(*pairs):
    """Plain hooks: modules whose output, or by ("in", module) whose input, is changed by a function."""
    handles = []
    for module, change in pairs:
        if isinstance(module, tuple):
            handles.append(module[1].register_forward_pre_hook(lambda _, args, fn=change: (fn(args[0]), *args[1:])))
        else:
            handles.append(module.register_forward_hook(lambda _, args, out, fn=change: fn(out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def draw_plain(pipe, edit=None):
    return oracle.draw(pipe, PROMPTS, [SEED] * 2, CALL, edit)[0]


def hooks_of(pipe):
    """(part, block) -> hooks that take it out; block 1 is double, block 2 single, with a shared projection."""
    double, single = oracle.blocks_of(pipe)[1:3]
    zero, width, half = torch.zeros_like, pipelines.WIDTH, pipelines.WIDTH // 2

    def without(start, stop):
        def change(x):
            x = x.clone()
            x[..., start:stop] = 0
            return x

        return change

    attention, last = double.attn, without(half, None)
    return {
        ("attention", 1): [(attention.to_out[0], zero), (attention.to_add_out, zero)],
        ("mlp", 1): [(double.ff, zero), (double.ff_context, zero)],
        ("attention", 2): [(("in", single.proj_out), without(0, width))],
        ("mlp", 2): [(("in", single.proj_out), without(width, None))],
        ("head 1", 1): [(("in", attention.to_out[0]), last), (("in", attention.to_add_out), last)],
        ("head 0", 2): [(("in", single.proj_out), without(0, half))],
    }


def test_what_is_taken_out_is_what_plain_hooks_take_out(lens, result):
    images = _draw_skips(lens.pipe)
    for (part, block), hooks in hooks_of(lens.pipe).items():
        with hooked(*hooks):
            images[part, block] = draw_plain(lens.pipe)
    clean = draw_plain(lens.pipe)
    rows = result.table[result.table["arm"] == "skip"].set_index(["part", "block", "prompt"])
    for (part, block), drawn in images.items():
        for i, prompt in enumerate(PROMPTS):
            assert result.image(i, SEED, block=block, arm="skip", part=part).tobytes() == drawn[i].tobytes(), (
                part,
                block,
            )
            assert rows.loc[(part, block, prompt), "rmse"] == rmse(clean[i], drawn[i])
            assert rows.loc[(part, block, prompt), "fidelity"] == judge(drawn[i], prompt)["fidelity"]
    assert len({image.tobytes() for image in result.images.values()}) == len(result.images)


def _draw_skips(pipe):
    """Whole blocks, and single streams of them."""
    found = {}
    for block in (1, 2):
        entered = {}

        def enter(module, args, kwargs, entered=entered):
            entered.update(img=kwargs["hidden_states"], txt=kwargs["encoder_hidden_states"])

        handle = oracle.blocks_of(pipe)[block].register_forward_pre_hook(enter, with_kwargs=True)
        for part, streams in (("block", ("img", "txt")), ("img", ("img",)), ("txt", ("txt",))):

            def skip(_, at, stream, x, entered=entered, block=block, streams=streams):
                return entered[stream].clone() if at == block and stream in streams else None

            found[part, block] = draw_plain(pipe, skip)
        handle.remove()
    return found


def test_what_is_kept_is_told_from_what_is_measured(result):
    pieces = result.summary[["part", "block"]].drop_duplicates()
    drawn = len(PROMPTS) * (2 + len(pieces))
    assert len(result.table) == drawn
    assert len(result.images) == drawn - len(PROMPTS)
    assert f"{drawn} measurements, {len(result.images)} images kept" in repr(result)


def test_doses_are_all_of_what_is_added_and_nothing_changes_nothing(result):
    edited = result.table[result.table["part"].notna()]
    assert set(edited["arm"]) == {"skip"}
    assert edited["dose"].to_numpy() == pytest.approx(1, abs=1e-5)
    assert (edited["dose_intended"] == 1).all()
    nothing = result.table[result.table["arm"] == "no-op"]
    assert (nothing[["rmse", "dose"]] == 0).all(axis=None)
    assert "every arm moved as much as it intended, within 5%" in result.notes


def _watch(lens, ops, sites):
    """What is at sites after ops: site -> [token, channel] of row 1."""
    seen = {}
    watch = [Apply(site, rows=1, fn=lambda x, hook: seen.update({hook.name: x[0].clone()})) for site in sites]
    lens.run(PROMPTS, [*ops, *watch], seed=SEED)
    return seen


@pytest.mark.parametrize("part", ["block", "attention", "head"])
def test_noise_moves_every_element_as_far_as_taking_it_out(lens, part):
    piece = find_pieces(lens, "blocks.1.*", [part])[0]
    sites = list(piece.sites)
    outputs = [f"{site}.resid_pre" for site in sites] if part == "block" else []
    clean = _watch(lens, [], [*sites, *outputs])
    out = _watch(lens, piece.ablate(None, {}), sites)
    drawn = [_watch(lens, piece.disturb(1, [seed, seed + 1], None, {}), sites) for seed in (7, 7, 8)]
    for site in sites:
        added = clean[site] - clean[f"{site}.resid_pre"] if outputs else clean[site]
        some = list(piece.sites[site] or range(added.shape[-1]))
        torch.testing.assert_close(clean[site][:, some] - out[site][:, some], added[:, some])
        moved = [one[site] - clean[site] for one in drawn]
        torch.testing.assert_close(moved[0][:, some].abs(), added[:, some].abs(), rtol=1e-4, atol=1e-5)
        assert torch.equal(moved[0], moved[1])
        assert not torch.equal(moved[0], moved[2])
        signs = (moved[0] * added > 0)[:, some].float()
        assert 0.4 < signs.mean() < 0.6
        assert part != "head" or moved[0].count_nonzero() == moved[0][:, some].count_nonzero()


@pytest.mark.parametrize("part", ["block", "mlp"])
def test_the_mean_that_is_left_is_that_of_all_prompts_and_tokens(lens, part):
    result = studies.blocks(lens, PROMPTS, parts=part, site="blocks.1.img", seeds=SEED, ablation="mean", batch_size=1)
    _, records = oracle.draw(lens.pipe, PROMPTS, [SEED] * 2, CALL)
    added = records[0][1, "img", "post"] - records[0][1, "img", "pre"]
    given = []
    if part == "mlp":
        with hooked((oracle.blocks_of(lens.pipe)[1].ff, lambda x: given.append(x.clone()) or x)):
            draw_plain(lens.pipe)
        added = given[0]
    mean = added.mean((0, 1))
    moved = (added - mean).square().sum((1, 2)) / added.square().sum((1, 2))
    edited = result.table[result.table["part"].notna()]
    for arm in ("mean", "noise"):
        assert edited.loc[edited["arm"] == arm, "dose"].to_numpy() == pytest.approx(moved.numpy(), rel=1e-3)
    assert edited["dose_intended"].isna().all()
    entered = records[0][1, "img", "pre"]
    if part == "mlp":
        with hooked((oracle.blocks_of(lens.pipe)[1].ff, mean.expand_as)):
            drawn = draw_plain(lens.pipe)
    else:
        drawn = draw_plain(lens.pipe, lambda _, at, stream, x: entered + mean if (at, stream) == (1, "img") else None)
    images = [result.image(i, SEED, block=1, arm="mean", part=part) for i in range(2)]
    assert max(rmse(one, other) for one, other in zip(drawn, images, strict=True)) < 0.2  # in batches of one and two


def make_table(prompts=48, seed=0):
    """Three blocks: without block 1 the colour is lost, as by no noise; without block 2 all is, as by noise."""
    rng = np.random.default_rng(seed)
    lines = []
    for i in range(prompts):
        line = {"prompt": f"p{i}", "seed": 0, "draw": 0}
        lines.append({**line, "arm": "untouched", "colour": 1.0, "shape": 1.0, "readable": 1.0})
        for block in range(3):
            for arm in ("skip", "noise"):
                lost = {0: (0.05, 0.05), 1: (0.9 if arm == "skip" else 0.05, 0.05), 2: (0.9, 0.9)}[block]
                scores = {name: float(rng.random() > p) for name, p in zip(("colour", "shape"), lost, strict=True)}
                size = 10 * block + rng.normal() + (5 if arm == "skip" else 0)
                lines.append(
                    {**line, "part": "mlp", "block": block, "arm": arm, "rmse": size, "readable": 1.0, **scores}
                )
    return pd.DataFrame(lines)


def test_the_summary_is_of_paired_differences():
    table = make_table()
    summary = summarise_damage(table, ["rmse"], ["colour", "shape", "readable"], "skip")
    rows = summary.set_index(["measure", "block"])
    skip, noise = (table[table["arm"] == arm].set_index(["block", "prompt"]) for arm in ("skip", "noise"))
    for block in range(3):
        assert rows.loc[("colour", block), "damage"] == pytest.approx(1 - skip.loc[block, "colour"].mean())
        assert rows.loc[("colour", block), "noise"] == pytest.approx(1 - noise.loc[block, "colour"].mean())
        assert rows.loc[("rmse", block), "damage"] == pytest.approx(skip.loc[block, "rmse"].mean())
        rest = [skip.loc[other, "rmse"] for other in range(3) if other != block]
        excess = skip.loc[block, "rmse"] - (rest[0] + rest[1]) / 2
        assert rows.loc[("rmse", block), "beyond_blocks"] == pytest.approx(excess.mean())
        beyond = (1 - skip.loc[block, "colour"]) - (1 - skip.loc[block, "shape"])
        assert rows.loc[("colour", block), "beyond_attributes"] == pytest.approx(beyond.mean())
        spread = (skip.loc[block, "rmse"] - noise.loc[block, "rmse"]).std()
        assert rows.loc[("rmse", block), "spread"] == pytest.approx(spread)
    assert np.isnan(rows.loc[("rmse", 0), "untouched"])
    assert np.isnan(rows.loc[("readable", 0), "beyond_attributes"])
    assert rows.loc[("colour", 1), "untouched"] == 1


def test_p_values_are_corrected_for_the_comparisons_of_one_part_and_measure():
    table = make_table(prompts=8)
    rows = summarise_damage(table, [], ["colour", "shape"], "skip")
    colour = rows[rows["measure"] == "colour"]
    controls = ("beyond_noise", "beyond_blocks", "beyond_attributes")
    raw = [_p_of(table, control, block) for control in controls for block in range(3)]
    order = np.argsort(raw)
    largest, corrected = 0.0, [0.0] * len(raw)
    for rank, i in enumerate(order):
        largest = max(largest, (len(raw) - rank) * raw[i])
        corrected[i] = min(largest, 1.0)
    found = [p for control in controls for p in colour[f"{control}_p"]]
    assert found == pytest.approx(corrected)


def _p_of(table, control, block):
    scores = table[table["part"].notna()].set_index(["arm", "block", "prompt"]).sort_index()
    lost = 1 - scores.loc[("skip", block), "colour"]
    if control == "beyond_noise":
        other = 1 - scores.loc[("noise", block), "colour"]
    elif control == "beyond_attributes":
        other = 1 - scores.loc[("skip", block), "shape"]
    else:
        other = sum(1 - scores.loc[("skip", b), "colour"] for b in range(3) if b != block) / 2
    return mean_p((lost - other).to_numpy()[:, None], limits=(-2, 2))


def test_only_what_makes_an_attribute_is_said_to():
    for seed in range(2):
        summary = summarise_damage(make_table(seed=seed), [], ["colour", "shape"], "skip")
        rows = summary.set_index(["measure", "block"])
        assert rows.loc[("colour", 1), ["needed", "specific"]].tolist() == ["yes", "yes"]
        assert (rows.drop(("colour", 1))["needed"] != "yes").all()
        assert rows.loc[("shape", 1), "specific"] == "no"
        assert rows.loc[("colour", 0), "needed"] == "less than other blocks"
        assert rows.loc[("colour", 2), "specific"] == "undecided"


def describe(table, attributes=("colour", "shape")):
    summary = summarise_damage(table, ["rmse"], list(attributes), "skip")
    nothing = pd.DataFrame({"prompt": ["p0"], "arm": ["no-op"], "rmse": [0.0]})
    told = pd.concat([table.assign(dose=1.0, dose_intended=1.0), nothing])
    return summary, describe_blocks(told, summary, ["rmse"], list(attributes))


def test_one_block_has_no_others_and_says_that_it_cannot_be_needed():
    table = make_table()
    summary, notes = describe(table[table["block"].isin([1]) | table["part"].isna()])
    assert summary["beyond_blocks"].isna().all()
    assert (summary["beyond_blocks_n"] == 0).all()
    assert set(summary["needed"]) == {"undecided"}
    assert [note for note in notes if note.startswith("mlp: there is no other block") and "site=" in note]
    assert not [note for note in notes if "no noise" in note]


def test_without_noise_it_says_that_none_can_be_needed(result):
    table = make_table()
    summary, notes = describe(table[table["arm"] != "noise"])
    assert (summary["beyond_noise_n"] == 0).all()
    assert set(summary["needed"]) <= {"undecided", "less than other blocks"}
    parts = ", ".join(result.summary["part"].unique())
    for told, what in ((notes, "mlp"), (result.notes, parts)):
        assert f"{what}: no noise was drawn to compare with, so needed cannot be yes. Give draws=1 or more" in told
        assert [note for note in told if note.startswith("power (") and "as no noise was drawn" in note]


def test_damage_beyond_noise_is_no_less_than_it():
    rng, lines = np.random.default_rng(1), []
    for i in range(40):
        lines.append({"prompt": f"p{i}", "seed": 0, "arm": "untouched", "colour": 1.0, "shape": 1.0})
        for block, (without, noise) in enumerate(((0.4, 0.02), (0.97, 0.02), (0.97, 0.02), (0.05, 0.95))):
            for arm, p in (("skip", without), ("noise", noise)):
                lost = (rng.random(2) < p).astype(float)
                line = {"prompt": f"p{i}", "seed": 0, "part": "mlp", "block": block, "arm": arm, "rmse": rng.random()}
                lines.append({**line, "colour": 1 - lost[0], "shape": 1 - lost[1]})
    rows = summarise_damage(pd.DataFrame(lines), [], ["colour", "shape"], "skip").set_index(["measure", "block"])
    for name in ("colour", "shape"):
        assert rows.loc[name]["needed"].tolist() == ["less than other blocks", "yes", "yes", "less than noise"]
        assert rows.loc[(name, 0), "beyond_noise"] > 0.2
        assert rows.loc[(name, 0), "beyond_noise_p"] < 0.05


def test_none_is_found_only_where_all_is_decided():
    table, found = make_table(), "noise as large, other blocks and other attributes"
    summary, notes = describe(table)
    for name in ("colour", "shape"):
        rows = summary[summary["measure"] == name].to_dict("records")
        yes = [row for row in rows if row["needed"] == "yes" and row["specific"] == "yes"]
        less = [row for row in rows if row["needed"].startswith("less") or row["specific"] == "no"]
        told = [f"mlp {row['block']} ({row['damage']:.2f}, {row['noise']:.2f} under noise)" for row in yes]
        if unknown := 3 - len(yes) - len(less):
            told.append(f"undecided of {unknown} of 3 parts")
        assert f"damage ({name}) beyond {found}: {', '.join(told)}" in notes
    assert any("mlp 1 (" in note for note in notes)
    decided = summary.assign(needed="less than noise", specific="no")
    notes = describe_blocks(table.assign(dose=1.0, dose_intended=1.0), decided, ["rmse"], ["colour", "shape"])
    assert f"damage (colour, shape) beyond {found}: none" in notes
    few, notes = describe(make_table(prompts=2))
    assert set(few["needed"]) == {"undecided"}
    assert not [note for note in notes if "none" in note]
    assert f"damage (colour, shape) beyond {found}: undecided of 3 of 3 parts" in notes


@pytest.mark.parametrize(
    ("prompts", "change", "told"),
    [
        (48, {}, "48 prompts, whose damage beyond noise spreads by 0."),
        (1, {}, "not known, as one prompt"),
        (6, {"colour": 1.0, "shape": 1.0}, "does not spread over 6 prompts. What is lost in every image"),
        (2, {"arm": "skip"}, "as no noise was drawn"),
    ],
)
def test_power_is_stated_or_why_it_is_not(prompts, change, told):
    table = make_table(prompts)
    table.loc[table["part"].notna(), list(change)] = list(change.values())
    _, notes = describe(table)
    power = [note for note in notes if note.startswith("power (")]
    assert len(power) == 1
    assert told in power[0]
    _, notes = describe(table.drop(columns=["colour", "shape"]), attributes=())
    assert sum(note.startswith("power (rmse)") for note in notes) == 1


def test_an_image_is_compared_with_the_attributes_that_it_has():
    """A judge that gives a and b of even prompts, a and c of odd ones, and at times none of them."""
    rng = np.random.default_rng(0)
    table = make_table(prompts=9).drop(columns=["shape", "readable"]).rename(columns={"colour": "a"})
    odd = table["prompt"].str[1:].astype(int) % 2 == 1
    for name, there in (("b", ~odd), ("c", odd)):
        table[name] = np.where(there, rng.integers(0, 2, len(table)), np.nan)
    table.loc[(table["arm"] == "noise") & (table["prompt"] == "p4"), "a"] = np.nan
    table.loc[(table["arm"] == "skip") & (table["prompt"] == "p5"), "c"] = np.nan
    rows = summarise_damage(table, [], ["a", "b", "c"], "skip").set_index(["measure", "block"])
    values = table.set_index(["arm", "block", "prompt"]).sort_index()
    clean = table[table["arm"] == "untouched"].set_index("prompt")
    for name in "abc":
        for block in range(3):
            lost = {
                i: clean[list("abc")].loc[f"p{i}"] - values.loc[("skip", block, f"p{i}"), list("abc")] for i in range(9)
            }
            beyond = []
            for one in lost.values():
                others = [float(one[other]) for other in "abc" if other != name and not np.isnan(one[other])]
                if others and not np.isnan(one[name]):
                    beyond.append(float(one[name]) - sum(others) / len(others))
            row = rows.loc[(name, block)]
            assert row["beyond_attributes"] == pytest.approx(np.mean(beyond))
            assert row["beyond_attributes_n"] == len(beyond)
            assert row["n"] == sum(not np.isnan(one[name]) for one in lost.values())
            assert row["specific"] in ("yes", "no", "undecided")
    assert rows.loc[("a", 0), ["n", "beyond_noise_n", "beyond_blocks_n", "beyond_attributes_n"]].tolist() == [
        9,
        8,
        9,
        8,
    ]


def test_parts_that_are_not_there_are_told_before_a_run(lens, forwards):
    with pytest.raises(OpError, match="not a valid part of a block"):
        studies.blocks(lens, PROMPTS, parts="attn")
    with pytest.raises(OpError, match="names a part twice"):
        studies.blocks(lens, PROMPTS, parts=["mlp", "mlp"])
    with pytest.raises(OpError, match="takes nothing out"):
        studies.blocks(lens, PROMPTS, parts=[])
    with pytest.raises(OpError, match=r"outputs of blocks, .* and blocks\.0\.img\.attn\.z is none"):
        studies.blocks(lens, PROMPTS, site="blocks.0.img.attn.z")
    with pytest.raises(OpError, match="names the stream 'txt'"):
        studies.blocks(lens, PROMPTS, parts="txt", site="blocks.*.img")
    with pytest.raises(SiteError, match=r"cross\.o"):
        studies.blocks(lens, PROMPTS, parts="cross")
    with pytest.raises(OpError, match="ablation"):
        studies.blocks(lens, PROMPTS, ablation="zero")
    assert not forwards


def test_it_is_loaded_without_the_model_and_drawn(result, tmp_path):
    loaded = studies.Result.load(result.save(tmp_path / "r"))
    assert loaded.summary.astype(str).equals(result.summary.astype(str))
    pd.testing.assert_frame_equal(loaded.table, result.table)
    assert set(loaded.table["block"].dropna()) == {1, 2}
    assert all(type(block) is int for block in loaded.table["block"].dropna().tolist())
    keys = [ImageKey.parse(key) for key in loaded.images]
    assert {key.block for key in keys} == {None, 1, 2}
    figure = loaded.figure(measure="rmse")
    panel = figure.data[0]
    heads = [f"head {i}" for i in range(2)]
    assert list(panel.x) == ["block", "img", "txt", "attention", "mlp", *heads]
    rows = result.summary.query("measure == 'rmse' and part == 'mlp'").set_index("block")["damage"]
    assert panel.z[:, 4].tolist() == rows.loc[[1, 2]].tolist()
    assert not set(heads) & set(loaded.figure().data[0].x)
    with pytest.raises(OpError, match="is not a valid measure"):
        loaded.figure(measure="rms")
