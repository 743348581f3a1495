"""What belongs to each prompt goes with it into its batch, and what a study cannot count by is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dit_lens import DiTLens, studies
from dit_lens.errors import CallError, DitLensError, PromptError
from tests import pipelines

SIZE = {**pipelines.CALL, "num_inference_steps": 2}
GUIDED = {**SIZE, "true_cfg_scale": 4.0}
PROMPTS = ["a red circle", "two dogs", "x"]
AVOIDED = ["bad", "a very long text", "q"]


@pytest.fixture(scope="module")
def lens():
    return DiTLens(pipelines.flux())


def judge(image, prompt):
    return {"fidelity": np.asarray(image).mean() / 255}


STUDIES = {
    "disruption": lambda lens, /, **how: studies.disruption(lens, PROMPTS[:2], k=2, draws=1, **how),
    "resampled": lambda lens, /, **how: studies.disruption(lens, PROMPTS[:2], k=2, ablation="resample", **how),
    "stability": lambda lens, /, **how: studies.stability(lens, PROMPTS[:2], k=2, **how),
    "basis": lambda lens, /, **how: studies.basis(lens, PROMPTS[:2], k=2, **how),
    "organisation": lambda lens, /, **how: studies.organisation(
        lens, PROMPTS[:2], k=2, masks=lambda *_: np.ones((8, 12), bool), **how
    ),
    "write_attribution": lambda lens, /, **how: studies.write_attribution(lens, PROMPTS[:2], k=2, **how),
    "carrier_or_detail": lambda lens, /, **how: studies.carrier_or_detail(lens, PROMPTS[:2], k=2, judge=judge, **how),
    "patching": lambda lens, /, **how: studies.patching(lens, [PROMPTS[:2]], **how),
    "transfer": lambda lens, /, **how: studies.transfer(lens, [PROMPTS[:2]], k=2, **how),
    "transfer_image": lambda lens, /, **how: studies.transfer_image(
        lens, [(np.zeros((32, 48, 3), np.uint8), PROMPTS[0])], k=2, **how
    ),
    "sweep": lambda lens, /, **how: studies.sweep("stability", lens, PROMPTS[:2], over={"k": [2, 3]}, **how),
}
REFUSED = {
    "num_images_per_prompt": (2, PromptError, "one latent of one prompt"),
    "latents": (torch.zeros(2, 96, 16), PromptError, "choose seeds="),
    "generator": (torch.Generator(), PromptError, "choose seeds="),
    "seed": (1, CallError, "it takes seeds="),
    "ops": ([], CallError, "no argument 'ops': it sets this itself"),
    "record": (True, CallError, "no argument 'record'"),
    "prefix": (None, CallError, "no argument 'prefix'"),
    "self": (None, CallError, "no argument 'self'"),
}


@pytest.mark.parametrize("name", STUDIES)
def test_what_a_study_sets_or_cannot_count_by_is_refused_before_any_step(lens, name, tmp_path):
    passes = []
    handle = lens.pipe.transformer.register_forward_pre_hook(lambda *_: passes.append(1))
    cases = {key: case for key, case in REFUSED.items() if key != "latents" or name != "transfer_image"}
    if name not in ("stability", "write_attribution", "sweep"):
        cases["output_type"] = ("latent", PromptError, "output_type=")
    try:
        for argument, (value, error, match) in cases.items():
            with pytest.raises(error, match=match):
                STUDIES[name](lens, **SIZE, **{argument: value}, out=tmp_path / "study")
        with pytest.raises(DitLensError, match="3 texts for"):
            STUDIES[name](lens, **GUIDED, negative_prompt=AVOIDED, out=tmp_path / "study")
    finally:
        handle.remove()
    assert not passes
    assert not (tmp_path / "study").exists()


def pixels(images):
    return [np.asarray(image).tolist() for image in images]


@pytest.mark.parametrize(("size", "ablation"), [(2, "zero"), (3, "resample")])
def test_untouched_images_are_those_of_the_plain_pipeline(lens, size, ablation):
    """Each prompt with the text that is listed for it; to resample, prompts are drawn twice."""
    how = {"k": 2, "draws": 0, "confounds": False, "batch_size": size, "ablation": ablation}
    found = studies.disruption(lens, PROMPTS[:size], **how, **GUIDED, negative_prompt=tuple(AVOIDED[:size])).images
    rows = [*range(size)] * (2 if ablation == "resample" else 1)
    call = {"prompt": [PROMPTS[i] for i in rows], "negative_prompt": [AVOIDED[i] for i in rows]}
    plain = lens.pipe(**call, **GUIDED, generator=[torch.Generator().manual_seed(0) for _ in rows]).images
    assert pixels(found[f"{i}/0/0/untouched"] for i in range(size)) == pixels(plain[:size])


ONCE = {**SIZE, "num_inference_steps": 1, "true_cfg_scale": 4.0}
FEW = {"k": 2, "draws": 0, "strengths": 1.0, "mask_from": None, "site": "blocks.3.img"}
PAIRS = [(PROMPTS[0], PROMPTS[1]), (PROMPTS[2], PROMPTS[0])]
IMAGES = [(np.zeros((32, 48, 3), np.uint8), PROMPTS[0]), (np.ones((32, 48, 3), np.uint8), PROMPTS[2])]
LISTED = {
    "disruption": lambda lens, **how: studies.disruption(
        lens, PROMPTS, k=2, draws=0, confounds=False, batch_size=2, **how
    ),
    "resampled": lambda lens, **how: studies.disruption(lens, PROMPTS, k=2, draws=0, ablation="resample", **how),
    "stability": lambda lens, **how: studies.stability(lens, PROMPTS, k=2, batch_size=2, **how),
    "basis": lambda lens, **how: studies.basis(lens, PROMPTS, k=2, draws=0, bases=["relevant"], batch_size=1, **how),
    "organisation": lambda lens, **how: studies.organisation(
        lens, PROMPTS, k=2, draws=0, masks=lambda *_: np.eye(8, 12) > 0, words=["red", "dogs", "x"], batch_size=2, **how
    ),
    "write_attribution": lambda lens, **how: studies.write_attribution(lens, PROMPTS, k=2, batch_size=1, **how),
    "carrier_or_detail": lambda lens, **how: studies.carrier_or_detail(
        lens, PROMPTS, k=2, draws=0, seeds=0, site="blocks.3.img", judge=judge, **how
    ),
    "patching": lambda lens, **how: studies.patching(lens, PAIRS, site="blocks.3.img", batch_size=2, **how),
    "transfer": lambda lens, **how: studies.transfer(lens, PAIRS, batch_size=1, **FEW, **how),
    "noised": lambda lens, **how: studies.transfer_image(lens, IMAGES, batch_size=1, **FEW, **how),
}


@pytest.mark.parametrize("name", LISTED)
def test_in_every_run_each_prompt_has_what_is_listed_for_it(lens, monkeypatch, name):
    seen, run, texts = [], lens.run, dict(zip(PROMPTS, AVOIDED, strict=True))
    order = {"patching": [0, 1, 2, 0], "transfer": [0, 1, 2, 0], "noised": [None, 0, None, 2]}.get(name, [0, 1, 2])

    def spy(prompt=None, *args, **call):
        listed = call["negative_prompt"]
        rows = list(prompt or ())
        listed = [listed] * len(rows) if isinstance(listed, str) else listed
        seen.extend(zip(rows, listed or (), strict=True))
        return run(prompt, *args, **call)

    monkeypatch.setattr(lens, "run", spy)
    listed = ["of an image" if i is None else AVOIDED[i] for i in order]
    LISTED[name](lens, **ONCE, negative_prompt=listed)
    assert {prompt for prompt, _ in seen} >= ({PROMPTS[0], PROMPTS[2]} if name == "noised" else {*PROMPTS})
    assert set(seen) <= {*texts.items(), ("", "of an image")}


def test_image_counts_of_one_and_defaults_count(lens):
    one = studies.stability(lens, PROMPTS[:2], k=2, num_images_per_prompt=1, **SIZE)
    assert one.table.equals(studies.stability(lens, PROMPTS[:2], k=2, **SIZE).table)
    with pytest.raises(PromptError, match="one latent of one prompt"):
        studies.stability(DiTLens(lens.pipe, defaults={"num_images_per_prompt": 2}), PROMPTS[:2], k=2, **SIZE)
