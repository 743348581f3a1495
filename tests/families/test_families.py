"""The check at load: true rows pass, and a mutated row is caught, whatever is wrong with it."""

import random
from dataclasses import fields, is_dataclass, replace

import pytest
import torch

import dit_lens as dl
from dit_lens.errors import DitLensError, ExecutionError, FamilyError
from dit_lens.families import Anatomy, Final, Prediction, Stack
from dit_lens.families.checks import check
from dit_lens.families.table.flux import FLUX1 as ROW
from tests import pipelines

DOUBLE, SINGLE = ROW.stacks
SWAPPED = {"txt": 1, "img": 0}


def stacks(**changes):
    return replace(ROW, stacks=(replace(DOUBLE, **changes), SINGLE))


MUTATIONS = {
    "slots swapped": stacks(outputs=SWAPPED),
    "slots of the other stack swapped": replace(ROW, stacks=(DOUBLE, replace(SINGLE, outputs=SWAPPED))),
    "both swapped": replace(ROW, stacks=(replace(DOUBLE, outputs=SWAPPED), replace(SINGLE, outputs=SWAPPED))),
    "one tensor for two": stacks(outputs={"img": None}),
    "slot too high": stacks(outputs={"txt": 0, "img": 2}),
    "inputs swapped": stacks(inputs={"img": "encoder_hidden_states", "txt": "hidden_states"}),
    "unknown argument": stacks(inputs={"img": "x"}),
    "order": replace(ROW, stacks=(SINGLE, DOUBLE)),
    "a stack missing": replace(ROW, stacks=(DOUBLE,)),
    "unknown path": replace(ROW, stacks=(Stack("double", "blocks", DOUBLE.inputs, DOUBLE.outputs), SINGLE)),
    "no list of blocks": replace(ROW, stacks=(Stack("double", "norm_out", DOUBLE.inputs, DOUBLE.outputs), SINGLE)),
    "another norm": replace(ROW, final=Final("proj_out")),
    "no such norm": replace(ROW, final=Final("final_norm")),
    "width of a token": replace(ROW, prediction=Prediction("inner_dim")),
}


def test_the_row_passes():
    found = check(Anatomy(ROW, pipelines.flux().transformer))
    assert [one.name for one in found] == [
        "structure",
        "sizes",
        "chain",
        "residual",
        "inputs",
        "final",
        "modulation",
        "grid",
        "write",
        "readout",
    ]


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutated_row_is_caught(name):
    with pytest.raises(FamilyError, match=r"FLUX\.1"):
        check(Anatomy(MUTATIONS[name], pipelines.flux().transformer))


def test_checking_leaves_the_random_numbers_alone(monkeypatch):
    """Those of this process and, though nothing is drawn there, those of its GPUs."""
    transformer, seeded = pipelines.flux().transformer, []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    check(Anatomy(replace(ROW, name="never tried"), transformer))
    assert torch.equal(before, torch.get_rng_state())
    assert not seeded


def test_a_family_can_be_registered(monkeypatch):
    monkeypatch.setattr("dit_lens.families.registry.REGISTERED", [])
    mine = replace(ROW, name="mine")
    dl.register_family(mine)
    lens = dl.DiTLens(pipelines.flux())
    assert lens.family is mine
    assert "mine" in repr(lens)


def leaves(value, path=()):
    """The paths of all texts and sequences in a row."""
    if is_dataclass(value):
        for one in fields(value):
            yield from leaves(getattr(value, one.name), (*path, one.name))
    elif isinstance(value, tuple | dict):
        yield path
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(one, (*path, key))
    elif isinstance(value, str):
        yield path


def changed(value, path, new):
    """A copy of a row with another value at one path."""
    if not path:
        return new
    first, *rest = path
    if is_dataclass(value):
        return replace(value, **{first: changed(getattr(value, first), rest, new)})
    if isinstance(value, dict):
        return {**value, first: changed(value[first], rest, new)}
    return (*value[:first], changed(value[first], rest, new), *value[first + 1 :])


def test_a_row_that_does_not_fit_is_told_whatever_is_wrong_in_it(monkeypatch):
    pipe, bad = pipelines.flux(), []
    paths = random.Random(0).sample([path for path in leaves(ROW) if path], 30)
    wrong = [(path, new) for path in paths for new in ("zz", (), (3,), "inner_dim * zz")[:3]]
    wrong += [(("pipelines",), ()), (("pipelines",), [3]), (("width",), "zz"), (("guidance_flag",), "zz")]
    for path, new in wrong:
        monkeypatch.setattr("dit_lens.families.registry.REGISTERED", [])
        try:
            dl.register_family(changed(ROW, path, new))
            dl.DiTLens(pipe)
        except DitLensError:
            continue
        except Exception as problem:  # noqa: BLE001 what else it may be is the question
            bad.append(f"{path} {new!r}: {problem!r}"[:200])
    assert not bad, "\n".join(bad)


def test_names_and_aliases(cfg_lens):
    assert cfg_lens.sites("single.*.img") == [f"blocks.{i}.img" for i in (2, 3, 4)]
    assert cfg_lens.sites("blocks[-2:].{txt,img}") == ["blocks.3.txt", "blocks.3.img", "blocks.4.txt", "blocks.4.img"]
    assert cfg_lens.sites(["velocity", "blocks.-1.img.resid_pre"]) == ["blocks.4.img.resid_pre", "velocity"]
    assert len(cfg_lens.sites("blocks.*.*")) == 5 * 2
    assert cfg_lens.sites()[-3:] == ["final.img", "velocity", "x0"]
    assert cfg_lens.sites("blocks[1].*") == ["blocks.1.txt", "blocks.1.img"]


def test_reference_tokens_are_not_part_of_the_image():
    from diffusers import FluxKontextPipeline
    from PIL import Image

    pipe = FluxKontextPipeline(**pipelines.flux().components)
    pipe.set_progress_bar_config(disable=True)
    lens = dl.DiTLens(pipe)
    call = {
        "image": Image.new("RGB", (48, 32), "red"),
        "height": 32,
        "width": 48,
        "max_area": 32 * 48,
        "_auto_resize": False,
    }
    call |= {"num_inference_steps": 2, "max_sequence_length": pipelines.LENGTH}
    seen = []
    handle = pipe.transformer.transformer_blocks[1].register_forward_hook(
        lambda m, a, output: seen.append(output[1].clone())
    )
    run = lens.run("red", [dl.Read("blocks.1.img"), dl.Zero("blocks.2.img", channels=[0])], seed=0, **call)
    handle.remove()
    assert seen[0].shape[1] == 2 * 96
    assert run["blocks.1.img"].shape == (2, 1, 96, 32)
    assert torch.equal(run["blocks.1.img"][1], seen[1][:, :96])
    assert run.grid == (8, 12)
    assert run.receipt.entries[0].elements == 96


@pytest.mark.parametrize("kind", ["FluxImg2ImgPipeline", "FluxInpaintPipeline"])
def test_part_of_a_run_from_a_image(kind):
    import diffusers
    from PIL import Image

    pipe = getattr(diffusers, kind)(**pipelines.flux().components)
    pipe.set_progress_bar_config(disable=True)
    call = {
        "image": Image.new("RGB", (48, 32), "red"),
        "height": 32,
        "width": 48,
        "strength": 0.5,
        "num_inference_steps": 4,
    }
    if kind == "FluxInpaintPipeline":
        call["mask_image"] = Image.new("L", (48, 32), 255)
    lens = dl.DiTLens(pipe)
    run = lens.run(
        "red", [dl.Read("blocks.1.img", steps=dl.sigma(0.6, 0.3))], seed=0, max_sequence_length=pipelines.LENGTH, **call
    )
    assert run.sigmas == pytest.approx([0.5, 0.25])
    assert run["blocks.1.img"].shape == (1, 1, 96, 32)


def test_a_guidance_that_the_pipeline_does_not_follow_is_noticed(monkeypatch):
    monkeypatch.setattr("dit_lens.families.registry.REGISTERED", [])
    usual = ROW.pipelines[0]
    wrong = replace(usual, guidance=replace(usual.guidance, forwards=(("cond",),)))
    dl.register_family(replace(ROW, pipelines=(wrong,)))
    lens = dl.DiTLens(pipelines.flux(), defaults=dict(pipelines.TRUE_CFG))
    with pytest.raises(ExecutionError, match="another number of forward passes per step than the plan"):
        lens.run("red", [dl.Read("blocks.0.img")])


def test_a_pass_after_the_last_that_was_planned_is_noticed():
    pipe = pipelines.flux()
    lens = dl.DiTLens(pipe, defaults=dict(pipelines.TRUE_CFG))
    seen = []
    handle = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)

    def look_once_more(pipe, step, timestep, tensors):
        if step == pipe.num_timesteps - 1:
            pipe.transformer(**seen[-1])
        return tensors

    with pytest.raises(ExecutionError, match=r"expects 4 forward passes of the transformer, but the pipeline made 5"):
        lens.run("red", [dl.Read("blocks.0.img")], callback_on_step_end=look_once_more)
    handle.remove()
    assert lens.run("red", [dl.Read("blocks.0.img")], seed=0).images


def test_a_run_that_is_cut_short_is_noticed():
    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = True  # noqa: SLF001
        return tensors

    lens = dl.DiTLens(pipelines.flux(), defaults=dict(pipelines.TRUE_CFG))
    with pytest.raises(ExecutionError, match=r"expects 4 forward passes of the transformer, but the pipeline made 2"):
        lens.run("red", [dl.Read("blocks.0.img")], callback_on_step_end=stop)
    assert lens.run("red", [dl.Read("blocks.0.img")], seed=0).images
