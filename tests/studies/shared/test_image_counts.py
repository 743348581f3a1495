"""What a study says it will draw is what it draws."""

import numpy as np
import pytest

from dit_lens import DiTLens, studies
from dit_lens.studies.shared.checkpoints import check_arguments_only
from tests import pipelines

PROMPTS = ["a cat", "two dogs", "no bird", "a fish"]
PAIRS = [("a cat", "two dogs"), ("no bird", "a fish")]
CALL = {**pipelines.CALL, "num_inference_steps": 1}
FEW = {"k": 3, "draws": 1, "batch_size": 2}
JUDGED = {"judge": lambda image, _: {"fidelity": np.asarray(image).mean() / 255}, "attributes": lambda _: {}}
STUDIES = {
    "stability": {"prompts": PROMPTS, "k": 3, "seeds": [0, 1]},
    "disruption": {"prompts": PROMPTS[:2], **FEW, "ablation": "resample"},
    "blocks": {"prompts": PROMPTS[:2], "parts": "attention", "site": "blocks[1:3].img", "draws": 2, "batch_size": 1},
    "organisation": {"prompts": PROMPTS, **FEW, "masks": lambda *_: np.eye(32, 48, dtype=bool)},
    "steering": {"pairs": PAIRS, "sites": "blocks.1.img", "strengths": [1, 2], "draws": 1, "batch_size": 1},
    "transfer": {"pairs": PAIRS, **FEW, "draws": 0, "strengths": [0.5, 1.0], "mask_from": None},
    "patching": {"pairs": PAIRS, **FEW, "batch_size": 12, "over": "block x channel group"},
    "carrier_or_detail": {"prompts": PROMPTS[:2], **FEW, "draws": 0, **JUDGED},
}


@pytest.mark.parametrize("name", STUDIES)
def test_images_are_counted_before_they_are_drawn(name):
    lens, run = DiTLens(pipelines.flux(), defaults=CALL), getattr(studies, name)
    with check_arguments_only() as counts:
        run(lens, **STUDIES[name])
    drawn = []
    lens.pipe.transformer.register_forward_pre_hook(
        lambda module, args, given: drawn.append(len(given["hidden_states"])), with_kwargs=True
    )
    run(lens, **STUDIES[name])
    assert sum(drawn) == counts[0].images
