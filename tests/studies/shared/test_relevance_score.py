"""Every study that ranks channels ranks them by relevance too, and tells names that are none."""

import numpy as np
import pytest
import torch
from PIL import Image

from dit_lens import DiTLens, Zero, studies
from dit_lens.errors import ExecutionError, OpError, StudyInterrupted
from dit_lens.instruments.relevance import read_relevance, take_relevance
from tests import pipelines

PROMPTS = ["a cat", "two dogs"]
K, SEED = 3, 1
CALL = {**pipelines.CALL, "num_inference_steps": 2}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3)).astype(np.uint8))
FEW = {"k": K, "seeds": SEED, "draws": 1}
PAIRS = {"pairs": [tuple(PROMPTS)], **FEW}
MOVED = {"strengths": 1.0, "mask_from": None}
ATTRIBUTES = {
    "judge": lambda image, _: {"fidelity": np.asarray(image).mean() / 255},
    "attributes": lambda p: {"what": p},
}
STUDIES = {
    "disruption": {"prompts": PROMPTS, "confounds": False, **FEW},
    "transfer": {**PAIRS, **MOVED},
    "transfer_image": {**PAIRS, **MOVED, "pairs": [(PICTURE, PROMPTS[1])], "captions": [PROMPTS[0]]},
    "patching": {**PAIRS, "over": "block x channel group", "attribute": ()},
    "carrier_or_detail": {"prompts": PROMPTS, **FEW, **ATTRIBUTES},
    "organisation": {"prompts": PROMPTS, **FEW, "draws": 0, "masks": lambda *_: np.eye(32, 48, dtype=bool)},
}


@pytest.fixture(scope="module")
def lens():
    return DiTLens(pipelines.flux(), defaults=CALL)


def sets_of(ops):
    """Every site's channels in some ops, as sets."""
    for op in ops if isinstance(ops, list | tuple) else [ops]:
        channels = getattr(op, "channels", None)
        if hasattr(channels, "items"):
            yield from ((site, frozenset(some)) for site, some in channels.items())
        elif channels is not None:
            yield from ((site, frozenset(channels)) for site in op.site)


@pytest.mark.parametrize("name", ["disruption", "transfer", "patching", "carrier_or_detail"])
def test_the_channels_of_a_study_are_the_relevant_ones(lens, monkeypatch, name):
    whom = PROMPTS if name == "carrier_or_detail" else PROMPTS[0]
    relevant, by_mean = (lens.massive_channels(whom, K, score=score, seed=SEED) for score in ("relevance", "|mean|"))
    wanted, used, run = {(site, frozenset(some)) for site, some in relevant.items()}, set(), DiTLens.run

    def spy(self, *prompt, ops=(), **call):
        used.update(sets_of(prompt[1] if len(prompt) > 1 else ops))
        if wanted <= used:
            raise KeyboardInterrupt  # what else the study draws is not looked at
        return run(self, *prompt, **({"ops": ops} if ops else {}), **call)

    monkeypatch.setattr(DiTLens, "run", spy)
    with pytest.raises(StudyInterrupted):
        getattr(studies, name)(lens, score="relevance", **STUDIES[name])
    assert any(frozenset(relevant[site]) != frozenset(by_mean[site]) for site in relevant)


def test_relevance_is_that_of_the_run_under_edits(lens):
    ops = [Zero("blocks.1.img", channels=[3, 5], rows=1)]
    found = take_relevance(lens, PROMPTS, "blocks[1:3].img", ops, seed=SEED)
    plain = read_relevance(lens, PROMPTS, "blocks[1:3].img", seed=SEED)
    assert (found["blocks.1.img"] == 0).nonzero().tolist() == [[s, 1, c] for s in range(2) for c in (3, 5)]
    assert torch.equal(found["blocks.2.img"][:, 0], plain["blocks.2.img"][:, 0])
    assert not torch.equal(found["blocks.2.img"][:, 1], plain["blocks.2.img"][:, 1])


def test_organisation_and_stability_by_relevance(lens):
    sets = [lens.massive_channels(one, K, score="relevance", seed=SEED, steps=-1) for one in PROMPTS]
    table = studies.organisation(lens, score="relevance", **STUDIES["organisation"]).table
    found = table[(table["arm"] == "top")].set_index(["prompt", "block"])["energy_share"]
    for prompt, one in zip(PROMPTS, sets, strict=True):
        for site, share in one.energy_share().items():
            assert found[prompt, int(site.split(".")[1])] == pytest.approx(share, rel=1e-4)
    stable = studies.stability(lens, PROMPTS, k=K, seeds=SEED, scores=["relevance", "|mean|"])
    whole = {s: [lens.massive_channels(p, K, score=s, seed=SEED) for p in PROMPTS] for s in ("relevance", "|mean|")}
    overlaps = [
        len(set(a[site]) & set(b[site])) / len(set(a[site]) | set(b[site]))
        for a, b in zip(*whole.values(), strict=True)
        for site in a
    ]
    found = stable.table[stable.table["over"] == "scores"]["jaccard"].mean()
    assert found == pytest.approx(np.mean(overlaps))


@pytest.mark.parametrize("name", [*STUDIES, "basis"])
def test_a_name_that_is_no_score_is_told_before_anything_runs(lens, monkeypatch, name):
    given = STUDIES.get(name, {"prompts": PROMPTS})
    monkeypatch.setattr(DiTLens, "run", lambda *_, **__: pytest.fail("something ran"))
    with pytest.raises(OpError, match=r"'relevence' is not a valid reduction"):
        getattr(studies, name)(lens, score="relevence", **given)


def test_what_has_no_gradients_is_told_before_anything_runs(lens, monkeypatch):
    monkeypatch.setattr(DiTLens, "run", lambda *_, **__: pytest.fail("something ran"))
    with pytest.raises(OpError, match=r"arm of their own: bases=\[..., 'relevant'\]"):
        studies.basis(lens, PROMPTS, score="relevance")
    with pytest.raises(OpError, match="Beside them there is 'relevance', by gradients"):
        studies.disruption(lens, score="relevant", **STUDIES["disruption"])
    monkeypatch.setattr(lens.engine, "server", {"there": "far"})
    with pytest.raises(ExecutionError, match="score='relevance' takes gradients"):
        studies.disruption(lens, score="relevance", **STUDIES["disruption"])
