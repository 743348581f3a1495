"""Steering: directions, images and doses by plain hooks; what changed and was kept by hand."""

import numpy as np
import pytest
import torch

from dit_lens import DiTLens, Steering, studies
from dit_lens.analysis.metrics import rmse
from dit_lens.errors import OpError, PromptError
from dit_lens.studies.parts.steered_images import turn
from tests import oracle, pipelines

PAIRS = [("a cat", "a dog"), ("red", "blue"), ("two", "ten")]
CALL = {**pipelines.CALL, "num_inference_steps": 2}
SEED, STRENGTH, BLOCKS = 3, 4.0, (1, 2)


@pytest.fixture(scope="module")
def lens():
    return DiTLens(pipelines.flux(), defaults=dict(CALL))


def judge(image, prompt):
    """Numbers that tell prompts and images apart."""
    value = np.asarray(image, dtype=float).mean() / 255
    return {"fidelity": value, "readable": 1.0, "first": value if prompt[0] in "abrt" else 0.0, "last": value / 2}


def attributes(prompt):
    """Of the pairs, a cat and a dog, and two and ten, begin alike; none ends alike."""
    return {"first": prompt[0], "last": prompt[-1], "unjudged": "x"}


@pytest.fixture(scope="module")
def result(lens):
    return studies.steering(
        lens,
        PAIRS,
        sites="blocks[1:3].img",
        strengths=STRENGTH,
        seeds=SEED,
        draws=1,
        judge=judge,
        attributes=attributes,
    )


def draw_plain(pipe, side, edit=None):
    return oracle.draw(pipe, [pair[side] for pair in PAIRS], [SEED] * 3, CALL, edit)


def test_directions_are_of_the_other_half_and_added_everywhere(lens, result):
    (images, start), (edited, end) = draw_plain(lens.pipe, 0), draw_plain(lens.pipe, 1)

    def difference(call, block, rows):
        means = [records[call][block, "img", "post"].mean(1) for records in (start, end)]
        return (means[1] - means[0])[rows].mean(0)

    def add(call, block, stream, x):
        if stream == "txt" or block not in BLOCKS:
            return None
        even, odd = difference(call, block, [0, 2]), difference(call, block, [1])
        return x + STRENGTH * torch.stack([odd, even, odd])[:, None]

    steered, _ = draw_plain(lens.pipe, 0, add)
    rows = result.table.set_index(["arm", "prompt"])
    energy = [start[0][block, "img", "post"].square().sum(-1).mean(1) for block in BLOCKS]
    for i, pair in enumerate(PAIRS):
        name = f"{pair[0]} -> {pair[1]}"
        found = result.image(i, SEED, arm="steering", part=f"strength {STRENGTH:g}")
        assert rmse(found, steered[i]) < 0.1
        assert rmse(found, images[i]) > 0.5
        line = rows.loc[("steering", name)]
        assert line["rmse"] == rmse(images[i], found)
        assert line["to_prompt"] == rmse(edited[i], found)
        half = [0, 2] if i % 2 else [1]
        moved = [STRENGTH * sum(difference(0, b, half) for b in BLOCKS[: n + 1]) for n in range(2)]
        wanted = np.mean([float(one.square().sum() / e[i]) for one, e in zip(moved, energy, strict=True)])
        assert line["dose_intended"] == pytest.approx(wanted, rel=1e-3)
        assert line["dose"] == pytest.approx(wanted, rel=0.1)
        random = rows.loc[("random", name)]
        assert random["dose_intended"] == pytest.approx(wanted, rel=1e-3)
        assert random["rmse"] != line["rmse"]


def test_what_changed_and_what_was_kept_are_of_other_attributes(result):
    rows = result.table[result.table["arm"] == "steering"].set_index("prompt")
    for i, (start, end) in enumerate(PAIRS):
        image = result.image(i, SEED, arm="steering", part=f"strength {STRENGTH:g}")
        to, own = judge(image, end), judge(image, start)
        line = rows.loc[f"{start} -> {end}"]
        if start[0] == end[0]:
            assert (line["changed"], line["kept"]) == (to["last"], own["first"])
        else:
            assert line["changed"] == (to["first"] + to["last"]) / 2
            assert np.isnan(line["kept"])
        assert (line["fidelity_to"], line["fidelity_from"]) == (to["fidelity"], own["fidelity"])
    nothing = result.table[result.table["arm"] == "no-op"]
    assert (nothing["rmse"] == 0).all()


def half_known(image, prompt):
    """As ``judge``, but nothing of the last letter of a dog, nor of the first of what is blue."""
    lacking = {"a dog": "last", "blue": "first"}.get(prompt)
    return {name: None if name == lacking else value for name, value in judge(image, prompt).items()}


def test_what_a_judge_does_not_know_takes_no_image_away(lens):
    result = studies.steering(
        lens,
        PAIRS,
        sites="blocks.1.img",
        strengths=STRENGTH,
        seeds=SEED,
        draws=1,
        judge=half_known,
        attributes=attributes,
        num_inference_steps=1,
    )
    rows = result.table.set_index(["arm", "prompt"])
    image = result.image(1, SEED, arm="steering", part=f"strength {STRENGTH:g}")
    assert rows.loc[("steering", "red -> blue"), "changed"] == half_known(image, "blue")["last"]
    assert np.isnan(rows.loc[("steering", "a cat -> a dog"), "changed"])
    summary = result.summary.set_index("arm")
    assert summary["n"].eq(3).all()
    assert summary["changed_n"].eq(2).all()
    assert summary["kept_n"].eq(2).all()
    assert summary.loc["random", "changed_steering_minus_n"] == 2
    both = rows.loc["steering", "changed"] - rows.loc["random", "changed"]
    assert summary.loc["random", "changed_steering_minus"] == pytest.approx(both.mean())
    assert [note for note in result.notes if "more than random over 2 pairs of prompt and seed" in note]


def test_what_is_added_is_strength_times_the_mean_difference_and_random_is_as_long(lens):
    """At every site and step, what leaves a block beyond what plain torch makes of what entered."""
    seen, steps, sites = [], [1], (1, 3)
    blocks = oracle.blocks_of(lens.pipe)
    plain = [type(block).forward for block in blocks]
    handles = [
        blocks[at].register_forward_hook(
            lambda module, args, kwargs, out, at=at: seen.append((at, args, dict(kwargs), [x.clone() for x in out])),
            with_kwargs=True,
        )
        for at in sites
    ]
    names = [f"blocks.{at}.img" for at in sites]
    try:
        result = studies.steering(
            lens, PAIRS[:2], sites=names, strengths=[0.5, 3.0], seeds=SEED, draws=1, steps=steps, batch_size=2
        )
    finally:
        for handle in handles:
            handle.remove()
    added = []
    for at, args, kwargs, (_, img) in seen:
        with torch.no_grad():
            added.append(img - plain[at](blocks[at], *args, **kwargs)[1])
    runs = [added[i : i + 4] for i in range(0, len(added), 4)]  # [step, site]: untouched, edited, no-op, and four more
    assert len(runs) == 7
    inputs = [draw_plain(lens.pipe, side)[1] for side in (0, 1)]
    for run in runs[:3]:
        assert max(float(one.abs().max()) for one in run) == 0
    for run, strength, random in zip(runs[3:], (0.5, 0.5, 3.0, 3.0), (False, True, False, True), strict=True):
        assert max(float(one.abs().max()) for one in run[:2]) == 0  # step 0 is not named
        for number, at in enumerate(sites):
            means = [records[1][at, "img", "post"].mean(1) for records in inputs]
            wanted = strength * (means[1] - means[0])[[1, 0]]  # of the other pair
            found = run[2 + number]
            torch.testing.assert_close(found, found[:, :1].expand_as(found), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(found[:, 0].norm(dim=1), wanted.norm(dim=1), rtol=1e-3, atol=1e-4)
            near = torch.allclose(found[:, 0], wanted, rtol=1e-3, atol=1e-4)
            assert near != random
    assert result.settings["sites"] == names


def test_without_random_directions_a_note_says_so(lens):
    one = Steering({"blocks.2.img": torch.ones(pipelines.WIDTH)}, family=lens.family.name)
    more = {"strengths": 0.5, "seeds": SEED, "num_inference_steps": 1}
    result = studies.steering(lens, PAIRS[:1], directions=one, draws=0, **more)
    assert [note for note in result.notes if "no random directions" in note and "draws=1" in note]
    result = studies.steering(lens, PAIRS[:1], directions=one, draws=1, **more)
    assert [note for note in result.notes if "over 1 pairs" in note and "undecided" in note]


def test_a_turned_direction_has_all_lengths_and_angles():
    random = torch.Generator().manual_seed(0)
    shapes = {"blocks.0.img": (3, 8), "blocks.1.img": (3, 8), "blocks.1.txt": (5,)}
    one = Steering({site: torch.randn(shape, generator=random) for site, shape in shapes.items()})
    new, again, other = (turn(one, seed) for seed in (1, 1, 2))
    for width, sites in ((8, list(shapes)[:2]), (5, list(shapes)[2:])):
        before, after = (torch.cat([some.vectors[site].reshape(-1, width) for site in sites]) for some in (one, new))
        torch.testing.assert_close(after @ after.T, before @ before.T, rtol=1e-4, atol=1e-4)
        assert (after - before).norm() > 0.2 * before.norm()
    assert all(torch.equal(new.vectors[site], again.vectors[site]) for site in shapes)
    assert not torch.equal(new.vectors["blocks.0.img"], other.vectors["blocks.0.img"])


def test_directions_that_are_given_are_tried(lens):
    one = Steering({"blocks.2.img": torch.ones(pipelines.WIDTH)}, family=lens.family.name)
    result = studies.steering(lens, PAIRS[:1], directions=one, strengths=[0.5], seeds=SEED, draws=0)
    image = lens.run(PAIRS[0][0], one.op(0.5), seed=SEED).images[0]
    assert result.image(0, SEED, arm="steering", part="strength 0.5").tobytes() == image.tobytes()
    assert result.settings["sites"] == ["blocks.2.img"]


def test_what_is_wrong_is_told_before_a_run(lens, forwards):
    with pytest.raises(PromptError, match="Give two pairs"):
        studies.steering(lens, PAIRS[:1])
    with pytest.raises(OpError, match="strengths"):
        studies.steering(lens, PAIRS, strengths=0)
    with pytest.raises(OpError, match="strengths=\\[\\]"):
        studies.steering(lens, PAIRS, strengths=[])
    with pytest.raises(OpError, match="can only be read"):
        studies.steering(lens, PAIRS, sites="blocks.0.img.resid_mid")
    assert not forwards


def test_it_is_loaded_without_the_model_and_drawn(result, tmp_path):
    loaded = studies.Result.load(result.save(tmp_path / "r"))
    assert loaded.summary.astype(str).equals(result.summary.astype(str))
    figure = loaded.figure()
    curves = {trace.name: trace for trace in figure.data if trace.showlegend}
    rows = result.summary.set_index("arm")
    assert curves["steering"].y.tolist() == [rows.loc["steering", "changed"]]
    assert curves["the edited prompt"].y.tolist() == [rows.loc["prompt", "changed"]] * 2
