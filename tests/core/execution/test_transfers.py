"""Nothing in the loop of a run asks a device for numbers; what is on its way is waited for once, before it is used.

A GPU is played: copies stay undone until somebody waits, so that values which are used too early are NaN.
"""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dit_lens import Add, Apply, DiTLens, Read, Scale, Swap, Zero, sigma
from dit_lens.errors import ExecutionError
from dit_lens.families import transfers
from dit_lens.families.layout import ImageFinder, find_image_tokens
from dit_lens.families.transfers import Transfers, fetch_numbers
from tests import pipelines

EVERY = "blocks.*.img"
OPS = {
    "none": [],
    "means": [Read(EVERY, reduce="|mean|")],
    "tokens": [Read(EVERY, channels=[3, 1]), Read("blocks.2.img", tokens=[5], name="one"), Read("velocity")],
    "x0": [Read("blocks.1.img.x0")],
    "edits": [Zero(EVERY, channels=[0, 4]), Scale("blocks.1.img.attn_out", factor=0.5, channels=[2])],
    "by noise": [Zero("blocks.2.img", channels=[1], steps=sigma(0.9, 0.4)), Read("blocks.3.img", reduce="rms")],
    "added": [Add("blocks.3.img", value=torch.ones(2), channels=[1, 7]), Read("blocks.3.img", reduce="mean")],
}


@pytest.fixture(scope="module")
def lens():
    return DiTLens(pipelines.flux(embedded=True), defaults=dict(pipelines.EMBEDDED))


@pytest.fixture
def waits(monkeypatch):
    """Plays a GPU on which copies take place when they are waited for; lists the waits."""
    late, waited = [], []

    def start(tensor):
        there = torch.full_like(tensor, float("nan") if tensor.is_floating_point() else 0)
        late.append((there, tensor.clone()))
        return there

    def finish(device):
        waited.append(device)
        for there, tensor in late:
            there.copy_(tensor)
        late.clear()

    monkeypatch.setattr(transfers, "is_queued", lambda _: True)
    monkeypatch.setattr("dit_lens.core.execution.clock.is_queued", lambda _: True)
    monkeypatch.setattr(transfers, "start_copy", start)
    monkeypatch.setattr(transfers, "finish_copies", finish)
    return waited


@pytest.mark.parametrize("name", OPS)
def test_a_run_that_waits_once_is_that_which_waits_always(lens, name, request):
    prompts = ["a cat", "a dog"]
    before = lens.run(prompts, OPS[name], seed=3)
    waited = request.getfixturevalue("waits")
    after = lens.run(prompts, OPS[name], seed=3)
    assert after.clock == before.clock
    assert [image.tobytes() for image in after.images] == [image.tobytes() for image in before.images]
    assert after.receipt.entries == before.receipt.entries
    for read, other in zip(before.readings, after.readings, strict=True):
        for site in read.tensors:
            assert torch.equal(read.tensors[site], other.tensors[site])
    assert len(waited) == any(isinstance(op, Read) for op in OPS[name])


def test_a_swap_between_runs_takes_what_has_arrived(lens, waits):
    source = lens.run("a cat", Read(EVERY, channels=[0, 1]), seed=3)
    assert waits
    swapped = lens.run("a dog", [Swap(EVERY, source=source, channels=[0, 1]), Read(EVERY, channels=[0, 1])], seed=3)
    assert torch.equal(swapped["blocks.4.img"], source["blocks.4.img"])


def test_a_function_that_asks_for_the_time_is_told_it(lens, request):
    def look(seen):
        return Apply("blocks.2.img", fn=lambda x, hook: seen.append((hook.step, hook.timestep, hook.sigma)))

    before, after = [], []
    lens.run("a cat", look(before), seed=3)
    request.getfixturevalue("waits")
    run = lens.run("a cat", look(after), seed=3)
    assert after == before
    assert [(step, time, level) for step, time, level in run.clock] == after


def test_a_pass_too_many_is_told_at_the_end(lens, waits):
    levels = iter([1.0, 1.0, 0.5])

    def enter(_, args, kwargs):
        return args, {**kwargs, "timestep": torch.full_like(kwargs["timestep"], next(levels))}

    handle = lens.pipe.transformer.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with pytest.raises(ExecutionError, match="another number of forward passes per step"):
            lens.run("a cat", Zero("blocks.2.img", channels=[0]), seed=3)
    finally:
        handle.remove()


class Asked(TorchDispatchMode):
    """Counts how often Python asks a tensor for a number."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name() == "aten::_local_scalar_dense"
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def asked_plainly(lens):
    """The same of the plain pipeline, in three steps."""

    def ask(steps):
        call = {**pipelines.EMBEDDED, "num_inference_steps": steps, "generator": torch.Generator().manual_seed(3)}
        with Asked() as asked:
            lens.pipe("a cat", **call)
        return asked.count

    return ask(5) - ask(2)


@pytest.mark.parametrize("name", ["means", "tokens", "edits"])
def test_steps_ask_for_no_numbers(lens, name, waits, asked_plainly):
    def ask(steps):
        lens.run("a cat", OPS[name], seed=3, num_inference_steps=steps)
        with Asked() as asked:
            lens.run("a cat", OPS[name], seed=3, num_inference_steps=steps)
        return asked.count

    assert ask(5) - ask(2) == asked_plainly
    assert ask(2) > 0  # it counts


def test_copies_beyond_the_bound_are_waited_for(waits, monkeypatch):
    monkeypatch.setattr(transfers, "MOST_PINNED", 40)
    on_the_way = Transfers()
    first, second = on_the_way.bring(torch.ones(10)), on_the_way.bring(torch.ones(10))
    assert first.isnan().all()
    assert (second == 1).all()
    on_the_way.wait()
    assert (first == 1).all()
    assert len(waits) == 1


def test_a_patient_transfer_is_there_at_once(waits):
    assert (Transfers(patient=True).bring(torch.ones(3)) == 1).all()
    assert not waits


def test_reads_that_go_to_files_are_waited_for(lens, waits, monkeypatch):
    expected = lens.run("a cat", Read(EVERY), seed=3)["blocks.1.img"]
    monkeypatch.setattr("psutil.virtual_memory", type("Memory", (), {"available": 1000}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spilled = lens.run("a cat", Read(EVERY), seed=3)["blocks.1.img"]
    assert torch.equal(spilled, expected)


def test_numbers_keep_their_order():
    numbers = [torch.tensor(1.5), torch.tensor([2]), torch.tensor([[0.1]], dtype=torch.float64)]
    assert fetch_numbers(numbers) == [1.5, 2.0, 0.1]
    assert fetch_numbers([]) == []


def test_image_tokens_are_found_anew_when_what_tells_them_changes(lens):
    rule = lens.anatomy.grid_rule
    finder = ImageFinder(rule)

    def ids(h, w):
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        return torch.stack([torch.zeros(h * w), y.flatten(), x.flatten()], 1)

    def given(told):
        return (), {rule["argument"]: told, rule["latents"]: torch.zeros(1, len(told), 4)}

    first = ids(2, 3)
    for told in (first, first, ids(3, 2), first):
        assert vars(finder.find(given(told))) == vars(find_image_tokens(given(told), rule))
    first[:, 1:] = ids(3, 2)[:, 1:]  # written in place
    assert finder.find(given(first)).grid == (3, 2)
