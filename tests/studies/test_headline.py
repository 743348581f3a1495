"""The kinds of number in the headline of the findings, made again by plain torch: no op, plan or read of the library.

The pipeline is diffusers' own, activations are taken and changed by hooks, and shares, distances and overlaps are
written out by hand. Of the library there are the toy's weights, its reader of scenes, and the random choice of
control channels.
"""

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from dit_lens import studies, toys
from dit_lens.analysis.channels import top_channels
from dit_lens.core.runs.files import read_json
from dit_lens.studies.shared.arms import add_controls
from dit_lens.toys.scenes import recognise_scene, sample_scenes
from tests import oracle

PROMPTS = [scene.caption for scene in sample_scenes(2, seed=100, held_out=True, distinct=True)]
K, STEPS, SEEDS = 8, 2, [0, 0]
CALL = {"num_inference_steps": STEPS}


@pytest.fixture(scope="module")
def plain():
    """diffusers' pipeline of the toy, and the arguments of its call."""
    pipe = FluxPipeline.from_pretrained(toys.path("flux"), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**read_json(toys.path("flux") / "dit_lens.json", "card")["call"], **CALL}


@pytest.fixture(scope="module")
def untouched(plain):
    """Images and what passed the blocks in the conditional passes: [step, block, row, token, channel]."""
    pipe, call = plain
    images, records = oracle.draw(pipe, PROMPTS, SEEDS, call)
    blocks = range(len(oracle.blocks_of(pipe)))
    conditional = [records[2 * step] for step in range(STEPS)]  # each is followed by the one without a prompt
    return images, torch.stack([torch.stack([one[i, "img", "post"] for i in blocks]) for one in conditional])


@pytest.fixture(scope="module")
def disrupted(toy):
    return studies.disruption(toy, PROMPTS, k=K, seeds=[0], draws=1, confounds=False, **CALL)


def choose_sets(x):
    """Every image's top channels at each block, [row, block, k], by |mean over tokens|; and energies [row, block, d].

    x: [step, block, row, token, channel].
    """
    score = x.mean(3).abs().mean(0).transpose(0, 1)
    return score.argsort(dim=-1, descending=True)[..., :K], (x**2).mean(3).mean(0).transpose(0, 1), score


def draw_zeroed(plain, sets):
    """Images with channels of every block set to 0 at all steps, in both passes. sets: [row, block, k]."""

    def zero(_call, block, stream, tensor):
        if stream == "txt":
            return None
        for row, channels in enumerate(sets[:, block]):
            tensor[row][:, channels] = 0
        return tensor

    pipe, call = plain
    return oracle.draw(pipe, PROMPTS, SEEDS, call, zero)[0]


def root_mean_square(a, b):
    return float(np.sqrt(((np.asarray(a, float) - np.asarray(b, float)) ** 2).mean()))


def of(result, arm, column):
    table = result.table[result.table["arm"] == arm].set_index("prompt")
    return table.loc[PROMPTS, column].tolist()


def test_the_energy_share_of_the_top_channels(untouched, disrupted):
    top, energy, _ = choose_sets(untouched[1])
    share = energy.gather(2, top).sum(2) / energy.sum(2)  # [row, block]
    assert of(disrupted, "top", "energy_share") == pytest.approx(share.mean(1).tolist(), abs=1e-4)


def test_the_damage_of_zeroing_the_top_channels_and_energy_matched_ones(plain, untouched, disrupted):
    images, x = untouched
    top, energy, score = choose_sets(x)
    names = [f"blocks.{i}.img" for i in range(x.shape[1])]
    chosen = [
        top_channels(dict(zip(names, score[row], strict=True)), dict(zip(names, energy[row], strict=True)), K, "|mean|")
        for row in range(len(PROMPTS))
    ]
    (matched,) = [arm.sets for arm in add_controls(chosen, 1, 0, PROMPTS, K) if arm.name == "energy-matched"]
    other = torch.tensor([[list(one[name]) for name in names] for one in matched])
    assert not (other[..., None] == top[:, :, None]).any()  # none of the top is among them
    for arm, sets in (("top", top), ("energy-matched", other)):
        edited = draw_zeroed(plain, sets)
        found = [root_mean_square(a, b) for a, b in zip(edited, images, strict=True)]
        assert of(disrupted, arm, "rmse") == pytest.approx(found, abs=1e-4), arm
        share = energy.gather(2, sets).sum(2) / energy.sum(2)
        assert of(disrupted, arm, "energy_share") == pytest.approx(share.mean(1).tolist(), abs=1e-4)
    assert min(of(disrupted, "top", "rmse")) > 5  # it is no comparison of zeros


def test_the_fidelity_of_untouched_images(untouched, disrupted):
    found = []
    for prompt, image in zip(PROMPTS, untouched[0], strict=True):
        scene = recognise_scene(image).scene
        said = scene.caption.split() if scene else [""] * 10
        found.append(np.mean([said[i] == prompt.split()[i] for i in (1, 2, 3, 4, 7, 8)]))
    assert of(disrupted, "untouched", "fidelity") == pytest.approx(found)
    assert max(found) > 0.5


def test_the_overlap_with_the_subject(toy, untouched):
    images, x = untouched
    result = studies.organisation(toy, PROMPTS, k=K, seeds=[0], draws=1, words=[], **CALL)
    border = np.ones((16, 16), bool)
    border[1:-1, 1:-1] = False
    for row, (prompt, image) in enumerate(zip(PROMPTS, images, strict=True)):
        truth = recognise_scene(image).mask
        for block in range(x.shape[1]):
            last = x[-1, block, row].double().numpy()
            tokens = last[:, np.abs(last.mean(0)).argsort()[-K:]]
            tokens = (tokens - tokens.min(0)) / (tokens.max(0) - tokens.min(0))
            edge = tokens[border.ravel()]
            far = np.sqrt((((tokens - edge.mean(0)) / (edge.std(0) + 0.05)) ** 2).mean(1))
            cuts = np.sort(far)
            spread = [cuts[:i].var() * i + cuts[i:].var() * (256 - i) for i in range(1, 256)]
            mask = (far > cuts[np.argmin(spread)]).reshape(16, 16).repeat(4, 0).repeat(4, 1)
            iou = (mask & truth).sum() / (mask | truth).sum()
            table = result.table.query("prompt == @prompt and block == @block and arm == 'top'")
            assert table["iou"].item() == pytest.approx(iou, abs=1e-4), (prompt, block)
