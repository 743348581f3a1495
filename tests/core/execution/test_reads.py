"""Reads are what plain torch hooks see, bit for bit."""

import numpy as np
import pytest
import torch

from dit_lens import Read
from dit_lens.core.request import reduce
from dit_lens.errors import NotYetError, OpError
from tests import oracle, pipelines

PROMPTS = ["red", "a blue one"]
SEEDS = [3, 3]


def branches(embedded):
    return ["cond"] if embedded else ["cond", "uncond"]


def truth(records, embedded, step, branch, key):
    return records[step * len(branches(embedded)) + branches(embedded).index(branch)][key]


@pytest.fixture(scope="module")
def seen(plain, embedded):
    return oracle.draw(plain, PROMPTS, SEEDS, pipelines.call_for(embedded))


def test_no_ops_is_the_plain_pipeline(lens, seen):
    run = lens.run(PROMPTS, seed=3)
    for ours, theirs in zip(run.images, seen[0], strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert run.grid == pipelines.GRID


def test_every_site_at_every_step_and_branch(lens, seen, embedded):
    wanted = branches(embedded)
    sites = lens.sites(["blocks.*.*.{resid_pre,resid_post}", "final.img", "velocity"])
    ops = [Read(sites, branch=branch, name=branch) for branch in wanted]
    run = lens.run(PROMPTS, ops, seed=3)
    for branch in wanted:
        for name, value in run[branch].items():
            site = lens.anatomy.site(name)
            for step in range(pipelines.STEPS):
                key = (
                    (site.block, site.stream, site.point.removeprefix("resid_"))
                    if site.block is not None
                    else site.point
                )
                assert torch.equal(value[step], truth(seen[1], embedded, step, branch, key)), (name, step, branch)


def test_selections_and_the_grid(lens, seen, embedded):
    ops = [
        Read("blocks.1.img", channels=[5, 2], tokens=[0, 13], steps=[1], rows=1, name="some"),
        Read("blocks.-1.img", rows=[1]),
        Read("blocks.0.{img,txt}", name="both"),
    ]
    run = lens.run(PROMPTS, ops, seed=3)
    whole = truth(seen[1], embedded, 1, "cond", (1, "img", "post"))
    assert torch.equal(run["some"].tensor[0, 0], whole[1][[0, 13]][:, [5, 2]])
    last = run["blocks.4.img"]
    h, w = pipelines.GRID
    assert last.grid().shape == (2, 1, h, w, pipelines.WIDTH)
    assert torch.equal(last.grid()[1, 0, 3, 7], truth(seen[1], embedded, 1, "cond", (4, "img", "post"))[1, 3 * w + 7])
    assert type(last * 2) is torch.Tensor
    assert run["both"]["blocks.0.img"].grid().shape == (2, 2, h, w, pipelines.WIDTH)
    for without in (run["some"].tensor, run["both"]["blocks.0.txt"]):
        with pytest.raises(OpError, match="no token grid"):
            without.grid()


@pytest.mark.parametrize(
    "name", ["mean", "|mean|", "mean|x|", "rms", "max", "p99.9", "quantile(0.1,0.9)", "histogram(-4,4,8)", "topk(3)"]
)
def test_reductions_at_the_source_equal_reductions_afterwards(lens, seen, embedded, name):
    run = lens.run(PROMPTS, [Read("blocks.2.img", reduce=name)], seed=3)
    for step in range(pipelines.STEPS):
        whole = truth(seen[1], embedded, step, "cond", (2, "img", "post"))
        assert torch.equal(run["blocks.2.img"][step], reduce.reduce_tokens(whole, reduce.parse(name)))


def test_both_branches_cond_first(cfg_lens):
    run = cfg_lens.run(
        PROMPTS,
        [
            Read("blocks.0.img", branch="both"),
            Read("blocks.0.img", branch="uncond", name="u"),
            Read("blocks.0.img", name="c"),
        ],
        seed=3,
    )
    assert run["blocks.0.img"].shape == (2, 2, 2, 96, 32)
    assert torch.equal(run["blocks.0.img"][:, 0], run["c"].tensor)
    assert torch.equal(run["blocks.0.img"][:, 1], run["u"].tensor)
    assert not torch.equal(run["c"].tensor, run["u"].tensor)


def test_words_of_the_text_stream(cfg_lens):
    tokens = cfg_lens.to_str_tokens("a blue one")
    assert len(tokens) == pipelines.LENGTH
    assert tokens[:10] == list("a blue one")
    assert tokens[10] == "</s>"
    assert set(tokens[11:]) == {"<pad>"}
    run = cfg_lens.run(
        ["a blue one", "blue"], [Read("blocks.1.txt"), Read("blocks.1.txt", tokens="blue", name="word")], seed=0
    )
    assert torch.equal(run["word"].tensor[:, 0], run["blocks.1.txt"][:, 0, 2:6])
    assert torch.equal(run["word"].tensor[:, 1], run["blocks.1.txt"][:, 1, 0:4])


def test_several_images_per_prompt_and_batches(cfg_lens):
    op = Read("blocks.3.img", reduce="mean")
    run = cfg_lens.run(PROMPTS, [op], seed=5, num_images_per_prompt=2)
    assert run.spec["seed"] == [5, 6, 5, 6]
    assert len(run.images) == 4
    split = cfg_lens.run(PROMPTS, [op], seed=5, num_images_per_prompt=2, batch_size=1)
    torch.testing.assert_close(split["blocks.3.img"], run["blocks.3.img"], atol=1e-5, rtol=1e-4)
    alone = [cfg_lens.run(prompt, [op], seed=5, num_images_per_prompt=2) for prompt in PROMPTS]
    assert torch.equal(split["blocks.3.img"], torch.cat([one["blocks.3.img"] for one in alone], 1))


def test_the_clock(cfg_lens):
    run = cfg_lens.run("red", seed=0)
    scheduler = pipelines.flux().scheduler
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / pipelines.STEPS, pipelines.STEPS))
    assert run.sigmas == pytest.approx(scheduler.sigmas[:-1].tolist())


def test_handles_wait_for_the_run(cfg_lens):
    with cfg_lens.trace("red", seed=0) as t:
        h = t.read("blocks.*.img", reduce="mean", name="m")
        with pytest.raises(NotYetError, match=r"t\.apply"):
            h["blocks.0.img"]
        with pytest.raises(NotYetError):
            t.images  # noqa: B018
    assert list(h) == [f"blocks.{i}.img" for i in range(pipelines.DEPTH)]
    assert torch.equal(h["blocks.3.img"], t.run["m"]["blocks.3.img"])


def test_nothing_runs_when_the_block_raises(cfg_lens):
    with pytest.raises(ZeroDivisionError), cfg_lens.trace("red", seed=0) as t:
        1 / 0  # noqa: B018
    assert t.finished is None


def test_habits_from_transformer_lens(cfg_lens):
    images, cache = cfg_lens.run_with_cache("red", "blocks.*.img", seed=0)
    assert len(images) == 1
    assert cache["blocks.2.img"].shape == (2, 1, 96, 32)
    seen = []

    def double(tensor, hook):
        seen.append((hook.name, hook.step, hook.branch, round(hook.sigma, 3)))
        return tensor * 2

    hooked = cfg_lens.run_with_hooks("red", [("blocks.2.img", double)], seed=0)
    assert seen[:2] == [("blocks.2.img", 0, "cond", 1.0), ("blocks.2.img", 0, "uncond", 1.0)]
    assert not np.array_equal(np.asarray(hooked.images[0]), np.asarray(images[0]))


def test_latents(cfg_lens):
    run = cfg_lens.run(PROMPTS, seed=3, output_type="latent")
    assert run.images == []
    assert run.latents.shape == (2, 96, 16)


def test_embeddings_in_place_of_prompts(cfg_lens):
    pipe = cfg_lens.pipe
    with torch.no_grad():
        embeds, pooled, _ = pipe.encode_prompt(["red"], ["red"], max_sequence_length=pipelines.LENGTH)
        bad, bad_pooled, _ = pipe.encode_prompt(["bad"], ["bad"], max_sequence_length=pipelines.LENGTH)
    told = cfg_lens.run("red", [Read("blocks.0.img")], seed=0)
    run = cfg_lens.run(
        None,
        [Read("blocks.0.img")],
        seed=0,
        prompt_embeds=embeds,
        pooled_prompt_embeds=pooled,
        negative_prompt=None,
        negative_prompt_embeds=bad,
        negative_pooled_prompt_embeds=bad_pooled,
    )
    assert torch.equal(run["blocks.0.img"], told["blocks.0.img"])
