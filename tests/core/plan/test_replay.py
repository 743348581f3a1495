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
    base = lens.run(PROMPTS, seed=3, num_inference_steps=steps, record=True)
    whole = lens.run(PROMPTS, op, seed=3, num_inference_steps=steps)
    count, handle = calls_of(lens)
    try:
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
    """Multistep schedulers remember what they were given; promptless pipelines go another way through nnsight."""
    zoo = truth.zoo_of(name)
    call = {**zoo.call, "seed": truth.SEED}
    op = Scale(zoo.lens.sites("blocks.*.img")[0], factor=0.5, steps=slice(1, None))
    base = zoo.lens.run(**call, record=True)
    whole, part = (zoo.lens.run(**call, ops=op, prefix=prefix) for prefix in (None, base))
    assert torch.equal(zoo.drawn(part), zoo.drawn(whole))
    assert not torch.equal(zoo.drawn(part), zoo.drawn(base))


def test_nothing_to_do_replays_everything(lens):
    base = lens.run(PROMPTS, seed=3, num_inference_steps=2, record=True)
    count, handle = calls_of(lens)
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
