"""What a run can be asked for, and is told before it starts that it cannot have."""

from __future__ import annotations

import numpy as np
import pytest

from dit_lens import Read, Zero
from dit_lens.errors import ExecutionError, OpError, PromptError, SiteError
from tests.zoo.truth import zoo_of


def test_words_cannot_be_looked_up_without_text_encoders():
    with pytest.raises(PromptError, match=r"could not be followed \(AttributeError.*Use token indices"):
        zoo_of("qwen").lens.to_str_tokens("a house")


def test_a_text_token_that_only_the_run_can_miss():
    with pytest.raises(ExecutionError, match=r"token 7 does not exist at blocks\.0\.txt, which has 7, 0 to 6"):
        zoo_of("lumina2-ragged").run([Read("blocks.0.txt", tokens=[7])])
    with pytest.raises(ExecutionError, match=r"token 6 does not exist at blocks\.4\.txt, which has 6, 0 to 5"):
        zoo_of("lumina2-ragged").run([Read("blocks.4.txt", tokens=[6])])  # the second row has 6, the first 7


def test_text_tokens_are_counted_before_the_run():
    with pytest.raises(OpError, match="token 7 does not exist: the txt stream has 7 tokens, 0 to 6"):
        zoo_of("qwen").run([Read("blocks.0.txt", tokens=[7])])
    run = zoo_of("qwen").run([Read("blocks.0.txt", tokens=[-1], name="last"), Read("blocks.0.txt")])
    assert np.array_equal(run["last"].tensor, run["blocks.0.txt"][:, :, 6:])


def test_videos_are_kept_as_latents():
    zoo = zoo_of("wan")
    call = {**zoo.call, "output_type": "pil"}
    with pytest.raises(PromptError, match="output_type='latent'"):
        zoo.lens.run(None, **call)


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        (lambda: Zero("blocks.1.img.mod.attn.gate", tokens=[0]), "one vector for each image, not tokens"),
        (lambda: Zero("blocks.1.img", mask=np.zeros((4, 6), bool)), "chooses no token"),
    ],
)
def test_selections_that_cannot_be_meant(op, reason):
    with pytest.raises(OpError, match=reason):
        zoo_of("sd3").run([op()])


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [([-1], "only the run can tell. Count from 0"), (slice(2, None), "a slice that says where it ends")],
)
def test_selections_by_a_number_that_only_the_run_knows(tokens, reason):
    with pytest.raises(OpError, match=reason):
        zoo_of("lumina2-ragged").run([Zero("blocks.1.txt", tokens=tokens)])


def test_a_slice_of_text_tokens_whose_number_only_the_run_knows():
    run = zoo_of("lumina2-ragged").run([Read("blocks.1.txt", tokens=slice(0, 3))])
    assert run["blocks.1.txt"].shape[2] == 3


def test_what_a_model_of_classes_is_asked():
    lens = zoo_of("dit").lens
    with pytest.raises(PromptError, match=r"takes no prompt.*class_labels"):
        lens.run("cat")
    with pytest.raises(PromptError, match="class 5000 does not exist: this model has 1000"):
        lens.run(class_labels=[5000])
    with pytest.raises(SiteError, match="means 3 sites"):
        lens.heads("blocks.*.img.attn.z")
    with pytest.raises(PromptError, match=r"takes no prompt.*class_labels"):
        lens.to_str_tokens("cat")
