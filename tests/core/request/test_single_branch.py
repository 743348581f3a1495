"""Why a branch is missing: guidance is off, or the transformer never computes it."""

import pytest

from dit_lens import DiTLens, Read
from dit_lens.errors import OpError
from tests.zoo.truth import ENTRIES


@pytest.mark.parametrize(
    ("branch", "match"), [("uncond", "never gives an unconditional"), ("both", "gives this transf")]
)
def test_a_second_model_is_not_guidance_that_is_off(branch, match):
    entry = ENTRIES["ideogram4"]
    call = entry.call(1)
    with pytest.raises(OpError, match=match) as told:
        DiTLens(entry.build()).run(ops=Read("blocks.0.img", branch=branch), seed=0, **call)
    assert "guidance is off" not in str(told.value)
