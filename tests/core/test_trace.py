"""The with block: one method for each op, those of a notebook included."""

from dataclasses import dataclass, field

import pytest
import torch

from dit_lens import Read
from dit_lens.core.request.ops import EDITS, OPS, Op
from dit_lens.core.trace import Trace
from dit_lens.errors import DitLensError, NotYetError, OpError


@pytest.fixture
def clamp(declared):
    """An op declared after everything was imported, as in a notebook."""

    @dataclass(frozen=True, eq=False, repr=False)
    class Clamp(Op):
        limit: float = field(default=1.0, kw_only=True)

        def lower(self, at):
            return at.on_branches(kind="Clamp", parameters={"limit": self.limit})

    return Clamp


def test_every_op_is_a_method():
    for name in ("read", "zero", "scale", "add", "swap", "resample", "token_mean", "mean_ablate", "apply"):
        assert callable(getattr(Trace, name))
    assert Trace.zero.__doc__.startswith("Sets the chosen elements to zero.")


def test_an_op_of_ones_own(cfg_lens, clamp):
    EDITS["Clamp"] = lambda edit: edit.old.clamp(
        -edit.action["parameters"]["limit"], edit.action["parameters"]["limit"]
    )
    with cfg_lens.trace("red", seed=1, output_type="latent") as t:
        before = t.read("blocks.2.img", branch="both", name="before")
        t.clamp("blocks.2.img", limit=0.3)
        after = t.read("blocks.2.img", branch="both", name="after")
    assert torch.equal(after["blocks.2.img"][0], before["blocks.2.img"][0].clamp(-0.3, 0.3))
    assert {entry.kind for entry in t.receipt.entries} == {"Clamp"}


def test_an_edit_that_is_not_there_is_told_before_a_run(cfg_lens, clamp, monkeypatch):
    monkeypatch.setattr(cfg_lens.engine, "generate", lambda *_: pytest.fail("it was drawn"))
    with pytest.raises(OpError, match=r"not in dit_lens\.ops\.EDITS"):
        cfg_lens.run("red", clamp("blocks.2.img"), seed=1)


def test_no_method_of_that_name(cfg_lens):
    with pytest.raises(AttributeError, match=r"'zeroo'.*Nearest: 'zero'"):
        cfg_lens.trace("red").zeroo("blocks.2.img")


def test_arguments_by_position(cfg_lens):
    with cfg_lens.trace(["red", "blue"], seed=1, output_type="latent") as t:
        t.swap("blocks.2.img", "row:0", 0.5, rows=1)
        t.read("blocks.2.img", "mean")
    assert [type(op) for op in t.ops] == [OPS["Swap"], Read]
    assert (t.ops[0].source, t.ops[0].strength, t.ops[1].reduce) == ("row:0", 0.5, "mean")
    with pytest.raises(TypeError, match="once each"):
        cfg_lens.trace("red").add("blocks.2.img", 1.0, value=2.0)


def forwards_of(lens):
    found = []
    return found, lens.pipe.transformer.register_forward_pre_hook(lambda *_: found.append(1))


def test_what_comes_after_the_block_is_told(cfg_lens):
    """It would not be carried out: the run is the one of the ops inside, and no pass is made for others."""
    with cfg_lens.trace("red", seed=1, output_type="latent") as t:
        before = t.read("blocks.2.img")
    plain = cfg_lens.run("red", Read("blocks.2.img"), seed=1, output_type="latent")
    found, handle = forwards_of(cfg_lens)
    for late in (
        lambda: t.zero("blocks.*.img"),
        lambda: t.read("velocity", name="late"),
        lambda: t.add("blocks.2.img", 1.0),
        t.__enter__,
    ):
        with pytest.raises(OpError, match=r"with lens\.trace"):
            late()
    handle.remove()
    assert not found
    assert len(t.ops) == 1
    assert torch.equal(before.tensor, plain["blocks.2.img"])


def test_what_is_added_by_the_run_itself_is_told(cfg_lens):
    with pytest.raises(DitLensError, match="comes too late"), cfg_lens.trace("red", seed=1) as t:
        t.apply("blocks.2.img", lambda x, hook: t.zero("blocks.3.img"))


@pytest.mark.parametrize("stop", [ZeroDivisionError, KeyboardInterrupt])
def test_a_block_that_raised_is_over(cfg_lens, stop):
    with pytest.raises(stop), cfg_lens.trace("red", seed=1) as t:  # noqa: PT012
        read = t.read("blocks.2.img")
        raise stop
    for asked in (lambda: t.run, lambda: t.images, lambda: read["blocks.2.img"]):
        with pytest.raises(NotYetError, match="stopped with an error"):
            asked()
    with pytest.raises(OpError, match="comes too late"):
        t.zero("blocks.2.img")


def test_ops_may_come_before_the_block(cfg_lens):
    trace = cfg_lens.trace("red", seed=1, output_type="latent")
    read = trace.read("blocks.2.img")
    with pytest.raises(NotYetError, match="starts when the with block ends"):
        read.tensor  # noqa: B018
    with trace as t:
        t.zero("blocks.1.img")
    assert torch.equal(read.tensor, t.run["blocks.2.img"])
    assert [entry.kind for entry in t.receipt.entries][:1] == ["Zero"]
