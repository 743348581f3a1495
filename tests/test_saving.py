"""``.save`` of what is public writes a file, or says what does: never what nnsight says, of traces."""

import inspect

import pytest

import dit_lens as dl
from dit_lens.core.runs.reading import Reading
from dit_lens.core.trace import Handle
from dit_lens.errors import StoreError
from dit_lens.instruments.attention_patterns import Attention
from dit_lens.instruments.gradients import Gradients
from dit_lens.instruments.word_maps import WordMap
from dit_lens.instruments.x0_lens import X0

ROWS = (dl.Family, dl.Grid, dl.Guidance, dl.PointSpec, dl.Readout, dl.Stack, dl.Time)  # code, as their users write it
MADE = [one for one in vars(dl).values() if inspect.isclass(one) and one in map(vars(dl).get, dl.__all__)]
FOUND = [Attention, Gradients, Handle, Reading, WordMap, X0]


@pytest.mark.parametrize("kind", [*(one for one in MADE if one not in ROWS), *FOUND], ids=lambda kind: kind.__name__)
def test_what_save_does_is_its_own(kind):
    own = next(vars(one)["save"] for one in kind.__mro__ if "save" in vars(one))
    assert own.__module__.startswith("dit_lens.")
    if own.__module__ != "dit_lens.arguments.saving":
        assert "folder" in inspect.signature(own).parameters or "file" in inspect.signature(own).parameters
        return
    with pytest.raises(StoreError, match=rf"a {kind.__name__} has no file of its own\. .*[a-z]") as told:
        object.__new__(kind).save("x")
    assert "trace" not in str(told.value).replace("t.run", "")
