"""A batch that runs out of memory is halved; reads that do not fit there go to files; errors say what helps."""

import gc
import tempfile

import psutil
import pytest
import torch

from dit_lens import Apply, DiTLens, Read, Run, Swap, Zero
from dit_lens.errors import DitLensError, ExecutionError
from tests import pipelines

FIVE = ["a", "b", "c", "d", "e"]


@pytest.fixture
def small():
    """A lens over a transformer that takes no more than two rows; calls: the rows of every call."""
    pipe = pipelines.flux()
    calls = []

    def limit(transformer, args, kwargs):
        calls.append(len(kwargs["hidden_states"]))
        if calls[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    pipe.transformer.register_forward_pre_hook(limit, with_kwargs=True)
    lens = DiTLens(pipe, defaults=dict(pipelines.TRUE_CFG))
    lens.calls = calls
    return lens


def test_batches_are_halved_until_they_fit(small):
    ops = [Zero("blocks.2.img", channels=[3], rows=[1, 4]), Read("blocks.3.img", reduce="mean")]
    with pytest.warns(UserWarning, match=r"memory ran out with 5 prompts in a batch; 2 fitted\. Pass batch_size=2"):
        run = small.run(FIVE, ops, seed=3)
    whole = small.run(FIVE, ops, seed=3, batch_size=2)
    assert torch.equal(run["blocks.3.img"], whole["blocks.3.img"])
    assert [a.tobytes() for a in run.images] == [b.tobytes() for b in whole.images]
    assert run.receipt.entries[0].rows == (1, 4)
    assert small.calls[0] == 5
    assert small.calls.count(5) == 1


def test_batches_that_are_done_stay_done(small):
    """Memory runs out in the second batch: the first is not drawn again."""
    taken = []

    def greedy(tensor, hook):
        taken.append(len(tensor))
        if len(taken) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.warns(UserWarning, match="1 fitted"):
        run = small.run(FIVE[:4], Apply("blocks.0.img", fn=greedy, steps=0, branch="cond"), seed=3, batch_size=2)
    assert taken == [2, 2, 1, 1]
    assert len(run.images) == 4


def test_a_function_is_called_for_a_batch_that_is_given_up(cfg_lens):
    """As its documentation says: four rows are tried at the first block, then two and two."""
    taken = []

    def full(tensor, hook):
        taken.append(len(tensor))
        if hook.name == "blocks.1.img" and len(tensor) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.warns(UserWarning, match="2 fitted"):
        cfg_lens.run(FIVE[:4], Apply("blocks[0:2].img", fn=full, steps=0, branch="cond"), seed=3)
    assert taken == [4, 4, 2, 2, 2, 2]
    assert "nobody can take back" in (Apply.__doc__ or "")


def test_embeddings_are_halved_too(small):
    texts = small.encode(FIVE[:4])
    with pytest.warns(UserWarning, match="2 fitted"):
        run = small.run(**texts, seed=3)
    assert len(run.images) == 4


def test_one_prompt_that_does_not_fit(small):
    with pytest.raises(ExecutionError, match=r"one prompt at a time .*height=.*reduce=.*encode.*recommend") as caught:
        small.run("a", seed=3, num_images_per_prompt=3)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_rows_that_exchange_values_stay_together(small):
    with pytest.raises(ExecutionError, match=r"cannot be made smaller: .*must run together"):
        small.run(FIVE, Swap("blocks.2.img", source="row:0", rows=4), seed=3)


def test_a_generator_cannot_be_split(small):
    with pytest.raises(ExecutionError, match=r"cannot be made smaller: .*generator="):
        small.run(FIVE, generator=[torch.Generator().manual_seed(0) for _ in FIVE])


WHOLE = {
    "generator": lambda: {"generator": [torch.Generator().manual_seed(0) for _ in FIVE]},
    "callback": lambda: {"seed": 3, "callback_on_step_end": lambda pipe, step, time, given: given},
    "record": lambda: {"seed": 3, "record": True},
    "swap": lambda: {"seed": 3, "ops": Swap("blocks.2.img", source="row:0", rows=4)},
}


@pytest.mark.parametrize("name", WHOLE)
def test_advice_names_only_what_was_passed(small, name):
    """Nobody passed batch_size= where memory alone makes batches smaller; where somebody did, it is named."""
    with pytest.raises(ExecutionError, match=r"cannot be made smaller: .*(seed=|fewer prompts|own callback)") as caught:
        small.run(FIVE, **WHOLE[name]())
    assert "batch_size" not in str(caught.value)
    if name == "swap":
        return
    with pytest.raises(DitLensError, match=r"batch_size="):
        small.run(FIVE, batch_size=2, **WHOLE[name]())


def test_nothing_is_said_where_all_fits(small, recwarn):
    small.run(FIVE[:2], seed=3)
    assert not recwarn.list


def test_reads_larger_than_memory_lie_in_files(small, monkeypatch, tmp_path):
    """The same values from files, which go with the run; saving does not need them in memory either."""
    ops = [Read("blocks.*.{img,txt}", branch="both"), Read("blocks.*.img", reduce="|mean|", name="spectrum")]
    held = small.run(FIVE, ops, seed=3, batch_size=2)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(psutil, "virtual_memory", type("Memory", (), {"available": 10_000}))
    mappings = len(_mappings(tmp_path))
    with pytest.warns(UserWarning, match=r"they go to files in .*\(TMPDIR\)"):
        spilled = small.run(FIVE, ops, seed=3, batch_size=2)
    assert len(_mappings(tmp_path)) > mappings
    assert not list(tmp_path.iterdir())
    for key in ("blocks.2.img", "blocks.0.txt"):
        assert torch.equal(spilled[key], held[key])
    assert torch.equal(spilled["spectrum"]["blocks.3.img"], held["spectrum"]["blocks.3.img"])
    saved = Run.load(spilled.save(tmp_path / "run"))
    assert torch.equal(saved["blocks.2.img"], held["blocks.2.img"])
    del spilled, saved
    gc.collect()
    assert len(_mappings(tmp_path)) == mappings


def _mappings(folder):
    """The files of a folder, deleted ones included, that this process has mapped into memory."""
    return [path for mapping in psutil.Process().memory_maps() if (path := mapping.path).startswith(str(folder))]
