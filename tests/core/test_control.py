"""What a ControlNet adds after blocks has a name, and the residual stream adds up with it."""

import diffusers
import pytest
import torch
from PIL import Image

import dit_lens as dl
from dit_lens import Read, Zero
from dit_lens.errors import FamilyError, OpError, SiteError
from tests import pipelines
from tests.zoo.truth import ENTRIES

CALL = {**pipelines.TRUE_CFG, "num_inference_steps": 2, "output_type": "latent", "controlnet_conditioning_scale": 0.8}


@pytest.fixture(scope="module")
def pipe():
    """Two residuals for three single blocks, one for two double blocks: blocks share."""
    parts = pipelines.flux().components
    config = {name: value for name, value in parts["transformer"].config.items() if name != "out_channels"}
    torch.manual_seed(5)
    wanted = {**config, "num_layers": 1, "num_single_layers": 2}
    controlnet = diffusers.FluxControlNetModel.from_config(wanted).eval()
    for name, parameter in controlnet.named_parameters():
        if "controlnet" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    pipe = diffusers.FluxControlNetPipeline(**parts, controlnet=controlnet)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def call():
    return {**CALL, "control_image": Image.linear_gradient("L").convert("RGB").resize((48, 32))}


def test_what_a_controlnet_adds_has_a_name(pipe, call):
    lens = dl.DiTLens(pipe, defaults=call)
    sites = lens.sites("blocks.*.img.control_out")
    assert sites == [f"blocks.{block}.img.control_out" for block in range(5)]
    given, entered, left = [], {block: [] for block in range(5)}, {block: [] for block in range(5)}
    transformer = pipe.transformer
    handles = [transformer.register_forward_pre_hook(lambda _m, _a, kw: given.append(kw), with_kwargs=True)]
    for block, module in enumerate([*transformer.transformer_blocks, *transformer.single_transformer_blocks]):
        handles += [
            module.register_forward_pre_hook(
                lambda _m, _a, kw, block=block: entered[block].append(kw["hidden_states"]), with_kwargs=True
            ),
            module.register_forward_hook(lambda _m, _a, out, block=block: left[block].append(out[1])),
        ]
    drawn = pipe("red", generator=torch.Generator().manual_seed(0), **call).images
    [handle.remove() for handle in handles]
    run = lens.run("red", [Read(sites, name="control"), Read("blocks.*.img", name="after")], seed=0)
    assert torch.equal(run.latents, drawn)
    for block in range(5):
        added = run["control"][f"blocks.{block}.img.control_out"].as_subclass(torch.Tensor)
        names = ["controlnet_block_samples"] if block < 2 else ["controlnet_single_block_samples"]
        samples = given[0][names[0]]
        which = 0 if block < 2 else (block - 2) // 2
        assert len(samples) == (1 if block < 2 else 2)
        assert torch.equal(added, torch.stack([one[names[0]][which] for one in given[::2]]))
        if block < 4:
            after = torch.stack(left[block][::2])
            assert torch.equal(run["after"][f"blocks.{block}.img"].as_subclass(torch.Tensor), after)
            assert torch.equal(after + added, torch.stack(entered[block + 1][::2]))
        assert added.abs().max() > 0.01


def test_control_is_read_only_and_absent_without_a_controlnet(pipe, call):
    lens = dl.DiTLens(pipe, defaults=call)
    with pytest.raises(OpError, match="several blocks may share one, so they can only be read"):
        lens.run("red", [Zero("blocks.0.img.control_out")], seed=0)
    with pytest.raises(SiteError, match="no ControlNet is in this pipeline"):
        dl.DiTLens(pipelines.flux()).sites("blocks.0.img.control_out")


def test_a_controlnet_whose_residuals_have_no_name_is_refused(pipe, monkeypatch):
    other = ENTRIES["hunyuan_dit"].build()
    monkeypatch.setattr(other, "controlnet", pipe.controlnet, raising=False)
    with pytest.raises(FamilyError, match="has no name here"):
        dl.DiTLens(other)


# Zoo entry -> the stack that is controlled, the argument, and which of two residuals are added after blocks 0, 1, ...
LISTS = {
    "sd3": ("transformer_blocks", "block_controlnet_hidden_states", {0: 0, 1: 0}),
    "qwen": ("transformer_blocks", "controlnet_block_samples", {0: 0, 1: 0}),
    "sana": ("transformer_blocks", "controlnet_block_samples", {1: 0, 2: 1}),
    "zimage": ("layers", "controlnet_block_samples", {0: 0}),
}


@pytest.mark.parametrize("name", LISTS)
def test_residuals_of_every_list_add_up(name, monkeypatch):
    """Residuals of one's own are given to the transformer, as a ControlNet's would be."""
    path, argument, added = LISTS[name]
    pipe, call = ENTRIES[name].build(), ENTRIES[name].call(1)
    monkeypatch.setattr(pipe, "controlnet", torch.nn.Identity(), raising=False)
    transformer = pipe.transformer
    shapes, image = [], 1 if name in ("sd3", "qwen") else None
    blocks = list(transformer.get_submodule(path))
    handle = blocks[0].register_forward_hook(
        lambda _m, _a, out: shapes.append((out if image is None else out[1]).shape)
    )

    def give(_module, args, kwargs):
        torch.manual_seed(7)
        listed = [torch.randn(shapes[0]), torch.randn(shapes[0])]
        return args, {**kwargs, argument: {0: listed[0]} if name == "zimage" else listed}

    lens = dl.DiTLens(pipe, defaults={})
    prompt = call.pop("prompt", None)
    lens.run(prompt, seed=0, **call)
    handle.remove()
    handle = transformer.register_forward_pre_hook(give, with_kwargs=True)
    start = lens.anatomy.depth - len(blocks)
    for index in range(len(blocks) - 1):
        here, after = f"blocks.{start + index}.img", f"blocks.{start + index + 1}.img"
        sites = [here, f"{after}.resid_pre", *([f"{here}.control_out"] if index in added else [])]
        run = lens.run(prompt, [Read(sites, name="found")], seed=0, **call)
        found = {site: run["found"][site].as_subclass(torch.Tensor) for site in sites}
        wanted = found[here] + found[f"{here}.control_out"] if index in added else found[here]
        assert torch.equal(wanted, found[f"{after}.resid_pre"])
        assert (index in added) is not torch.equal(found[here], found[f"{after}.resid_pre"])
    handle.remove()
