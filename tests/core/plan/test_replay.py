"""A run that starts from a recorded one gives the numbers of the whole run, bit for bit, and computes less."""

import pytest
import torch

from dit_lens import DiTLens, Read, Scale, Zero
from dit_lens.errors import OpError
from tests import pipelines
from tests.zoo import truth

PROMPTS = ["a cat", "two dogs"]


def calls_of(lens):
    """Counts real forward passes of the first block."""
    count = []
    first = next(m for name, m in lens.pipe.transformer.named_modules() if name.endswith("blocks.0"))
    handle = first.register_forward_hook(lambda *_: count.append(1))
    return count, handle


@pytest.mark.parametrize("step", [1, 2])
def test_an_edit_after_a_prefix_is_the_edit_alone(lens, step):
    steps = 4
    op = [Zero("blocks.1.img", channels=[0, 3], steps=slice(step, None)), Read("blocks.*.img", steps=[step, -1])]
    count, handle = calls_of(lens)
    try:
        base = lens.run(PROMPTS, seed=3, num_inference_steps=steps, record=True)
        whole = lens.run(PROMPTS, op, seed=3, num_inference_steps=steps)
        count.clear()
        part = lens.run(PROMPTS, op, seed=3, num_inference_steps=steps, prefix=base)
    finally:
        handle.remove()
    assert len(count) == (steps - step) * len(base.recording.answers) // steps
    assert [a.tobytes() for a in part.images] == [b.tobytes() for b in whole.images]
    assert part.images[0].tobytes() != base.images[0].tobytes()
    assert all(torch.equal(part[site], whole[site]) for site in ("blocks.0.img", "blocks.3.img"))
    assert part.clock == whole.clock


@pytest.mark.parametrize("name", sorted(truth.ENTRIES))
def test_every_family_and_its_scheduler(name):
    """Multistep schedulers remember what they were given; promptless pipelines go another way through nnsight.

    What runs before and after the recorded one leave in a pipeline is no change of it.
    """
    zoo = truth.zoo_of(name)
    call = {**zoo.call, "seed": truth.SEED, "num_inference_steps": 3}
    zoo.lens.run(**call)
    op = Scale(zoo.lens.sites("blocks.*.img")[0], factor=0.5, steps=slice(1, None))
    base = zoo.lens.run(**call, record=True)
    zoo.lens.run(**{**call, "num_inference_steps": 2})
    whole, part = (zoo.lens.run(**call, ops=op, prefix=prefix) for prefix in (None, base))
    assert torch.equal(zoo.drawn(part), zoo.drawn(whole))
    assert not torch.equal(zoo.drawn(part), zoo.drawn(base))


def test_nothing_to_do_replays_everything(lens):
    count, handle = calls_of(lens)
    base = lens.run(PROMPTS, seed=3, num_inference_steps=2, record=True)
    count.clear()
    again = lens.run(PROMPTS, seed=3, num_inference_steps=2, prefix=base)
    handle.remove()
    assert not count
    assert [a.tobytes() for a in again.images] == [b.tobytes() for b in base.images]


def test_a_prefix_of_another_run_is_refused(lens, tmp_path):
    base = lens.run(PROMPTS, seed=3, num_inference_steps=2, record=True)
    with pytest.raises(OpError, match="other seeds"):
        lens.run(PROMPTS, seed=4, num_inference_steps=2, prefix=base)
    with pytest.raises(OpError, match="other prompts"):
        lens.run(PROMPTS[::-1], seed=3, num_inference_steps=2, prefix=base)
    with pytest.raises(OpError, match="other num_inference_steps"):
        lens.run(PROMPTS, seed=3, num_inference_steps=3, prefix=base)
    with pytest.raises(OpError, match="without edits"):
        lens.run(PROMPTS, Zero("blocks.0.img", channels=[1]), seed=3, num_inference_steps=2, record=True)
    with pytest.raises(OpError, match="recorded in this session"):
        lens.run(PROMPTS, seed=3, num_inference_steps=2, prefix=type(base).load(base.save(tmp_path / "run")))
    with pytest.raises(OpError, match="one batch"):
        lens.run(PROMPTS, seed=3, num_inference_steps=2, prefix=base, batch_size=1, ops=Read("blocks.0.img", steps=1))
    other = DiTLens(pipelines.flux(), defaults=dict(pipelines.TRUE_CFG))
    with pytest.raises(OpError, match="another transformer"):
        other.run(PROMPTS, seed=3, num_inference_steps=2, prefix=base)


def change_a_weight(pipe):
    weight = pipe.transformer.transformer_blocks[1].ff.net[2].weight
    weight.data[0, 0] = torch.nextafter(weight.data[0, 0], torch.tensor(9.0))


def change_a_text_encoder(pipe):
    with torch.no_grad():
        next(pipe.text_encoder.parameters())[0, 0] += 0.1


def change_the_schedule(pipe):
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=2.0)


def change_the_shift(pipe):
    pipe.scheduler.set_shift(2.0)


@pytest.mark.parametrize(
    "change",
    [change_a_weight, change_a_text_encoder, change_the_schedule, change_the_shift],
    ids=lambda fn: fn.__name__,
)
def test_a_model_that_changed_since_is_refused(change):
    lens = DiTLens(pipelines.flux(), defaults=dict(pipelines.TRUE_CFG))
    base = lens.run(PROMPTS, seed=3, num_inference_steps=2, record=True)
    change(lens.pipe)
    with pytest.raises(OpError, match="changed since the run of prefix= was recorded"):
        lens.run(PROMPTS, seed=3, num_inference_steps=2, prefix=base)


def test_an_adapter_that_was_added_rescaled_or_disabled_is_refused():
    from peft import LoraConfig

    lens = DiTLens(pipelines.flux(), defaults=dict(pipelines.TRUE_CFG))
    call = {"seed": 3, "num_inference_steps": 2}

    def record():
        return lens.run(PROMPTS, record=True, **call)

    def refused(base):
        with pytest.raises(OpError, match=r"changed since|another transformer"):
            lens.run(PROMPTS, prefix=base, **call)

    base = record()
    lens.pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "one")
    refused(base)
    base = record()
    assert lens.run(PROMPTS, prefix=base, **call).images
    lens.pipe.set_adapters("one", adapter_weights=[0.5])
    refused(base)
    base = record()
    lens.pipe.transformer.disable_adapters()
    refused(base)


@pytest.mark.parametrize("name", ["latents", "prompt_embeds", "pooled_prompt_embeds"])
def test_a_tensor_that_was_changed_in_place_is_refused(name):
    lens = DiTLens(pipelines.flux(), defaults=dict(pipelines.EMBEDDED))
    texts = lens.encode(PROMPTS)
    call = {**texts, "latents": torch.randn(2, 96, 16), "seed": 3, "num_inference_steps": 2}
    base = lens.run(**call, record=True)
    assert lens.run(**call, prefix=base).images
    call[name][0, 0] += 1
    with pytest.raises(OpError, match=f"other {name}"):
        lens.run(**call, prefix=base)


def test_a_generator_that_was_used_since_is_refused(cfg_lens):
    generators = pipelines_generators()
    call = {"generator": generators, "num_inference_steps": 2}
    base = cfg_lens.run(PROMPTS, **call, record=True)
    with pytest.raises(OpError, match="other generator"):
        cfg_lens.run(PROMPTS, **call, prefix=base)
    fresh = {**call, "generator": pipelines_generators()}
    again = cfg_lens.run(PROMPTS, **fresh, prefix=base)
    assert [a.tobytes() for a in again.images] == [b.tobytes() for b in base.images]


def pipelines_generators():
    return [torch.Generator().manual_seed(seed) for seed in (1, 2)]


def test_a_callback_is_refused(cfg_lens):
    call = {"seed": 3, "num_inference_steps": 2, "callback_on_step_end": lambda pipe, step, time, values: values}
    with pytest.raises(OpError, match="callback_on_step_end= cannot be followed"):
        cfg_lens.run(PROMPTS, record=True, **call)
    base = cfg_lens.run(PROMPTS, seed=3, num_inference_steps=2, record=True)
    with pytest.raises(OpError, match="callback_on_step_end= cannot be followed"):
        cfg_lens.run(PROMPTS, prefix=base, **call)
