"""Directions of tokens by plain torch, for the tests of ``studies.basis``."""

import torch

from tests import oracle, pipelines

K, SEED, STEPS = 6, 5, 2
CALL = {**pipelines.CALL, "num_inference_steps": STEPS}


def draw_tokens(pipe, prompts):
    """The plain pipeline's images, and its tokens at every block: block -> [s, b, n, d], float64."""
    images, records = oracle.draw(pipe, prompts, [SEED] * len(prompts), CALL)
    return images, {
        block: torch.stack([record[block, "img", "post"] for record in records]).double()
        for block in range(pipelines.DEPTH)
    }


def directions_by_hand(name, x):
    """An arm's directions [s, d, m] for one image at one block, x [s, n, d]."""
    if name == "mean-direction":
        mean = x.mean(1)
        return (mean / mean.norm(dim=-1, keepdim=True))[..., None]
    if name == "components":
        found = torch.linalg.svd(x.flatten(0, 1), full_matrices=False)[2].T[:, :K]
    else:
        found = torch.eye(x.shape[-1]).double()[:, x.mean(1).abs().mean(0).argsort(descending=True)[:K]]
    return found.expand(len(x), -1, -1)
