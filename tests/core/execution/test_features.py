"""Features of a dictionary, scaled and read: against plain hooks with an encoder of their own."""

import json

import pytest
import torch

import dit_lens as dl
from dit_lens import DiTLens, Feature, Read, ReadFeatures, Swap, dictionaries
from dit_lens.errors import OpError, StoreError
from dit_lens.ops import from_json, to_json
from tests import pipelines
from tests.dictionaries import COUNT, diffract, overcomplete, saelens

SITE = "blocks.1.img"
CALL = {**pipelines.CALL, "output_type": "latent"}
KINDS = {
    "relu": {},
    "topk": {"architecture": "topk", "k": 5},
    "jumprelu": {"architecture": "jumprelu"},
    "layer norm": {"normalize_activations": "layer_norm"},
    "constant norm": {"normalize_activations": "constant_norm_rescale"},
}


@pytest.fixture(scope="module")
def lens():
    return DiTLens(pipelines.flux(), defaults=CALL)


def drawn_with(lens, change, *, block=1):
    """Latents of the plain pipeline where a function changes the image tokens of a block."""
    module = [*lens.pipe.transformer.transformer_blocks, *lens.pipe.transformer.single_transformer_blocks][block]
    hook = module.register_forward_hook(lambda _, __, out: (out[0], change(out[1]), *out[2:]))
    try:
        return lens.pipe(prompt="red", generator=torch.Generator().manual_seed(3), **CALL).images
    finally:
        hook.remove()


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_it_changes_the_share_of_features_and_nothing_else(lens, settings, tmp_path):
    """h + ((scale - 1) a + add) d, where a and d are computed by a hook after the sources of SAELens."""
    encode, decode = saelens(tmp_path, pipelines.WIDTH, **settings)
    sae, chosen = dictionaries.load(tmp_path), [7, 30, 2]
    read = []

    def change(h):
        read.append(encode(h))
        changed = torch.zeros_like(read[-1])
        changed[..., chosen] = -1.5 * read[-1][..., chosen] + 0.25
        return h + decode(changed, h, bias=0)

    truth = drawn_with(lens, change)
    ops = [
        ReadFeatures(SITE, sae),
        ReadFeatures(SITE, sae, chosen, name="some"),
        Feature(SITE, sae, chosen, -0.5, 0.25),
    ]
    run = lens.run("red", ops, seed=3)
    torch.testing.assert_close(run.latents, truth, rtol=1e-4, atol=1e-4)
    found = run.readings[0]
    torch.testing.assert_close(found.tensor[:, 0], torch.cat(read), rtol=1e-3, atol=1e-4)
    assert torch.equal(run["some"].tensor, found.tensor[..., chosen]) or settings.get("architecture") != "topk"
    assert (run["some"].channels, run["some"].features) == ({SITE: tuple(chosen)}, True)
    assert found[SITE].grid().shape == (pipelines.STEPS, 1, *pipelines.GRID, COUNT)
    (entry,) = run.receipt.entries
    assert (entry.kind, entry.site, entry.steps) == ("Feature", SITE, tuple(range(pipelines.STEPS)))


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sae")
    saelens(folder, pipelines.WIDTH)
    return dictionaries.load(folder)


def test_what_is_not_in_a_token_changes_nothing_there(lens, sae):
    before, op, after = Read(SITE, name="before"), Feature(SITE, sae, 4, 0), Read(SITE, name="after")
    run = lens.run("red", [ReadFeatures(SITE, sae, 4, name="a"), before, op, after], seed=3)
    active = run["a"].tensor[..., 0] > 0
    assert 0 < active.float().mean() < 1
    changed = (run["before"].tensor != run["after"].tensor).any(-1)
    assert torch.equal(changed, active)
    left = run["after"].tensor - run["before"].tensor
    direction = torch.nn.functional.normalize(sae.decoder[4], dim=0)
    torch.testing.assert_close(left, (left @ direction)[..., None] * direction, rtol=1e-3, atol=1e-5)
    same = lens.run("red", [Feature(SITE, sae, [1, 2], scale=1)], seed=3)
    assert torch.equal(same.latents, lens.run("red", seed=3).latents)
    assert not same.receipt.entries


def test_what_is_not_given_changes_nothing(lens, sae):
    """Of scale= and add= either alone: h + (scale - 1) a d, and h + add d, which are what both together say."""
    for alone, both in (({"scale": 2}, (2, 0)), ({"add": 0.5}, (1, 0.5))):
        one, other = (
            lens.run("red", op, seed=3) for op in (Feature(SITE, sae, 4, **alone), Feature(SITE, sae, 4, *both))
        )
        assert torch.equal(one.latents, other.latents)
    direction, before, after = sae.decoder[4], Read(SITE, name="before"), Read(SITE, name="after")
    run = lens.run("red", [before, Feature(SITE, sae, 4, add=0.5), after], seed=3)
    moved = run["after"].tensor - run["before"].tensor
    torch.testing.assert_close(moved, (0.5 * direction).expand_as(moved), rtol=1e-3, atol=1e-5)


def test_a_transcoder_reads_before_an_mlp_and_writes_behind_it(lens, tmp_path):
    """DifFRACT: features of what enters the MLP, at the noise level; directions of what leaves it."""
    encode, decode = diffract(tmp_path / "transcoder_img_1.safetensors", pipelines.WIDTH)
    transcoder = dictionaries.load(tmp_path / "transcoder_img_1.safetensors")
    times, read = [], []
    block = lens.pipe.transformer.transformer_blocks[1]

    def change(_, args, out):
        read.append(encode(args[0], times[-1]))
        removed = torch.zeros_like(read[-1])
        removed[..., 5] = -read[-1][..., 5]
        return out + decode(removed, None, bias=0)

    hooks = [
        lens.pipe.transformer.register_forward_pre_hook(
            lambda _, __, kwargs: times.append(float(kwargs["timestep"][0])), with_kwargs=True
        ),
        block.ff.register_forward_hook(change),
    ]
    try:
        truth = lens.pipe(prompt="red", generator=torch.Generator().manual_seed(3), **CALL).images
    finally:
        for hook in hooks:
            hook.remove()
    ops = [ReadFeatures(f"{SITE}.mlp.in", transcoder), Feature(f"{SITE}.mlp.o", transcoder, 5, 0)]
    run = lens.run("red", ops, seed=3)
    torch.testing.assert_close(run.readings[0].tensor[:, 0], torch.cat(read), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(run.latents, truth, rtol=1e-4, atol=1e-4)
    for op in (Feature(SITE, transcoder, 5, 0), ReadFeatures(f"{SITE}.mlp.o", transcoder)):
        with pytest.raises(OpError, match=r"a transcoder (decodes|encodes) what"):
            lens.run("red", op, seed=3)


def test_reductions_are_over_tokens(lens, sae):
    ops = [ReadFeatures(SITE, sae, name="all"), ReadFeatures(SITE, sae, [3, 9], reduce="max", tokens=range(7))]
    run = lens.run("red", [*ops, ReadFeatures(SITE, sae, reduce="topk(4)", name="top")], seed=3)
    torch.testing.assert_close(run[SITE], run["all"].tensor[:, :, :7, [3, 9]].amax(2))
    assert run["top"].tensor.shape == (pipelines.STEPS, 1, 4, 2)
    cost = lens.cost("red", ops[0]).bytes
    assert cost == run["all"].tensor.nbytes
    assert run["all"].to_xarray()[SITE].dims[-1] == "feature"
    with pytest.raises(OpError, match=r"topk\(3\) at most"):
        lens.run("red", ReadFeatures(SITE, sae, [1, 2, 3], reduce="topk(4)"))
    with pytest.raises(OpError, match=r"features of a dictionary at blocks\.1\.img, which are no channels"):
        lens.run("red", Swap(SITE, source=run["all"]), seed=3)


def test_ops_in_json_name_the_file_and_find_another_in_its_place(lens, sae, tmp_path):
    own = dictionaries.load(sae.save(tmp_path / "own.safetensors"))
    loose = dictionaries.Dictionary(sae.encoder, sae.encoder_bias, sae.decoder, sae.decoder_bias)
    ops = [Feature(SITE, own, [4, 5], 0), ReadFeatures(SITE, own, 4)]
    again = [from_json(json.loads(json.dumps(to_json(op)))) for op in ops]
    one, other = (lens.run("red", some, seed=3) for some in (ops, again))
    assert torch.equal(one.latents, other.latents)
    one.save(tmp_path / "run")
    loaded = dl.Run.load(tmp_path / "run")
    assert loaded.readings[0].features
    assert torch.equal(lens.run_spec(loaded.spec).latents, one.latents)
    with pytest.raises(OpError, match=r"is in no file.*Save it: save\(file\)"):
        to_json(Feature(SITE, loose, 4, 0))
    overcomplete(tmp_path / "own.safetensors", pipelines.WIDTH)
    with pytest.raises(StoreError, match="holds another dictionary than the one"):
        lens.run_spec(loaded.spec)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda sae: Feature("blocks.1.img.mlp.post", sae, 1, 0), r"of 32 channels, and the site has \d+"),
        (lambda sae: Feature(SITE, sae, 48, 0), "feature 48 does not exist"),
        (lambda sae: Feature(SITE, sae, [], 0), r"features=\[\] chooses no feature"),
        (lambda sae: Feature(SITE, sae, 1, float("nan")), "scale=nan is not a finite number"),
        (lambda sae: Feature(SITE, sae, 1), r"takes scale= or add=, or both: scale=0 removes"),
        (lambda sae: Feature(SITE, sae, 1, add="much"), "add='much' is not a finite number"),
        (lambda sae: Feature(SITE, sae, 1, 0, channels=[1]), "takes no channels="),
        (lambda _: Feature(SITE, "sae", 1, 0), r"is not a Dictionary\. Load one"),
        (lambda sae: Feature("blocks.1.img.attn_out", sae, 1, 0), "Use those, or write blocks.1.img.attn.o"),
        (lambda sae: ReadFeatures("blocks.1.img.mlp.post", sae), "It was trained on another model"),
    ],
)
def test_what_does_not_fit_is_told_before_the_run(lens, sae, make, message, monkeypatch):
    monkeypatch.setattr(lens.engine, "generate", lambda *_: pytest.fail("it draws"))
    with pytest.raises(OpError, match=message):
        lens.run("red", make(sae), seed=3)
