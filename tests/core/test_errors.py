"""Bad input is refused before any denoising, and told what was asked, what exists and what to do."""

import json

import numpy as np
import pytest
import torch

import dit_lens as dl
from dit_lens import Add, Apply, DiTLens, MeanAblate, Read, Resample, Run, Scale, Swap, TokenMean, Zero, sigma
from dit_lens.errors import DitLensError, FamilyError, OpError, PromptError, SiteError, StoreError
from tests import pipelines


@pytest.fixture(autouse=True)
def calls(cfg_lens):
    """Fails a test in which the transformer was called."""
    count = []
    handle = cfg_lens.pipe.transformer.register_forward_pre_hook(lambda *_: count.append(1))
    yield count
    handle.remove()
    assert not count, "the error came after denoising had begun"


OPS = {
    "unknown site": (
        lambda: Read("block.3.img"),
        SiteError,
        r"'block.3.img'.*Nearest: 'blocks.3.img'.*There are: blocks",
    ),
    "misspelt stream": (
        lambda: Zero("blocks.*.imgs"),
        SiteError,
        r"no stream 'imgs'\. Nearest: 'img'\. There are: txt, img",
    ),
    "no stream": (lambda: Zero("blocks.3"), SiteError, r"names no stream.*blocks\.3\.txt, blocks\.3\.img"),
    "unknown point": (lambda: Read("blocks.3.img.resid_med"), SiteError, r"no point 'resid_med'.*resid_mid"),
    "point that these blocks lack": (
        lambda: Read("blocks.3.img.resid_mid"),
        SiteError,
        r"single blocks of FLUX\.1 have no resid_mid: attention and MLP run side by side\. Other blocks have",
    ),
    "writing what is computed": (
        lambda: Zero("blocks.0.img.resid_mid"),
        OpError,
        r"can only be read\. Write blocks\.0",
    ),
    "swap under a gate": (
        lambda: Swap("blocks.0.img.attn_out", source="row:0", rows=1),
        OpError,
        r"multiplied by a gate.*only Zero and Scale are exact.*or write blocks\.0\.img\.attn\.o",
    ),
    "block out of range": (lambda: Read("blocks.5.img"), SiteError, r"block 5, but blocks has 5: 0 to 4, or -1"),
    "empty slice": (lambda: Read("blocks[7:9].img"), SiteError, r"selects no block; blocks has 5"),
    "no site": (lambda: Read([]), SiteError, r"no site was named.*blocks\.\*\.img"),
    "unknown stack": (lambda: Read("triple.0.img"), SiteError, r"no site is called 'triple\.0\.img'.*double.*single"),
    "channel out of range": (
        lambda: Zero("blocks.0.img", channels=[32]),
        OpError,
        r"channel 32 does not exist: blocks\.0\.img has 32 channels, 0 to 31",
    ),
    "channel of the prediction": (lambda: Zero("velocity", channels=[16]), OpError, r"velocity has 16 channels"),
    "channel twice": (lambda: Zero("blocks.0.img", channels=[1, -31]), OpError, r"named twice"),
    "channel no integer": (lambda: Zero("blocks.0.img", channels=[1.5]), OpError, r"channel 1\.5 is not an index"),
    "bool channels": (lambda: Zero("blocks.0.img", channels=np.ones(32, bool)), OpError, r"is not an index"),
    "channels lack a site": (
        lambda: Zero("blocks.*.img", channels={"blocks.0.img": [1]}),
        OpError,
        r"no entry for blocks\.1\.img.*It has blocks\.0\.img",
    ),
    "step out of range": (
        lambda: Zero("blocks.0.img", steps=3),
        OpError,
        r"step 3 does not exist: this run has 3 steps, 0 to 2",
    ),
    "no steps": (lambda: Zero("blocks.0.img", steps=[]), OpError, r"selects none of the 3 steps"),
    "fraction": (lambda: Zero("blocks.0.img", steps=(0.5, 0.2)), OpError, r"\(0\.0, 0\.5\)"),
    "narrow fraction": (lambda: Zero("blocks.0.img", steps=(0.4, 0.5)), OpError, r"selects none"),
    "noise level": (
        lambda: Zero("blocks.0.img", steps=sigma(0.2, 0.1)),
        OpError,
        r"selects none.*noise levels 1\.000, 0\.667, 0\.333",
    ),
    "step no number": (
        lambda: Zero("blocks.0.img", steps="first"),
        OpError,
        r"'first' is not a valid step.*dit_lens\.sigma",
    ),
    "branch": (lambda: Zero("blocks.0.img", branch="conditional"), OpError, r"Nearest: 'cond'"),
    "row": (lambda: Zero("blocks.0.img", rows=1), OpError, r"row 1 does not exist: this run has 1 images"),
    "token": (
        lambda: Zero("blocks.0.img", tokens=96),
        OpError,
        r"token 96 does not exist: the img stream has 96 tokens",
    ),
    "text token": (lambda: Zero("blocks.0.txt", tokens=[24]), OpError, r"the txt stream has 24 tokens"),
    "word": (lambda: Read("blocks.0.txt", tokens="green"), OpError, r"'green' is not in 'red'.*to_str_tokens"),
    "word on img": (lambda: Read("blocks.0.img", tokens="red"), OpError, r"only the txt stream has"),
    "mask of the wrong grid": (
        lambda: Zero("blocks.0.img", mask=np.ones((8, 8))),
        OpError,
        r"the mask is 8 x 8, but this run has a grid of 8 x 12",
    ),
    "mask of floats": (lambda: Zero("blocks.0.img", mask=np.full((8, 12), 0.5)), OpError, r"must be a bool array"),
    "mask on text": (lambda: Zero("blocks.0.txt", mask=np.ones((8, 12), bool)), OpError, r"on the img stream"),
    "mask and tokens": (
        lambda: Zero("blocks.0.img", mask=np.ones((8, 12), bool), tokens=[1]),
        OpError,
        r"without tokens=",
    ),
    "reduction": (lambda: Read("blocks.0.img", reduce="median"), OpError, r"reduce='median'.*\|mean\|"),
    "reduction's argument": (lambda: Read("blocks.0.img", reduce="topk(0)"), OpError, r"reduce='topk\(0\)'"),
    "source row": (lambda: Swap("blocks.0.img", source="row:4"), OpError, r"row 4 does not exist"),
    "source": (lambda: Swap("blocks.0.img", source="first"), OpError, r"Write 'row:0'"),
    "no source": (lambda: Swap("blocks.0.img"), OpError, r"Write 'row:0'"),
    "source of numbers": (lambda: Swap("blocks.0.img", source=3), OpError, r"int is not a valid source"),
    "source lacks the site": (
        lambda: Swap("blocks.0.img", source={"blocks.1.img": torch.zeros(32)}),
        OpError,
        r"no tensor for blocks\.0\.img",
    ),
    "source shape": (
        lambda: Swap("blocks.0.img", source=torch.zeros(3, 1, 95, 32)),
        OpError,
        r"tokens may be 1 or 96, not 95",
    ),
    "source width": (
        lambda: Swap("blocks.0.img", source=torch.zeros(96, 31)),
        OpError,
        r"channels may be 1 or 32, not 31",
    ),
    "source axes": (lambda: Swap("blocks.0.img", source=torch.zeros(1, 1, 1, 1, 1)), OpError, r"this one has 5"),
    "strength": (lambda: Swap("blocks.0.img", source="row:0", strength=1.5), OpError, r"outside \[0, 1\]"),
    "added vector": (
        lambda: Add("blocks.0.img", value=torch.zeros(3), channels=[1, 2]),
        OpError,
        r"vector over the 2 chosen channels",
    ),
    "part of a channel": (lambda: TokenMean("blocks.0.img", keep="media"), OpError, r"Nearest: 'mean'"),
    "function": (lambda: Apply("blocks.0.img"), OpError, r"needs a function"),
    "two reads of one name": (
        lambda: [Read("blocks.0.img"), Read("blocks.*.img")],
        OpError,
        r"two reads are called 'blocks\.0\.img'.*name=",
    ),
    "no op": (lambda: ["blocks.0.img"], OpError, r"ops\[0\] is a str, not an op"),
}


@pytest.mark.parametrize("case", OPS)
def test_ops(case, cfg_lens):
    make, kind, message = OPS[case]
    ops = make()
    with pytest.raises(kind, match=message):
        cfg_lens.run("red", ops, seed=0, num_inference_steps=3)


CALLS = {
    "empty list": (lambda: {"prompt": []}, r"the list of prompts is empty"),
    "nothing": (dict, r"pass a prompt"),
    "no string": (lambda: {"prompt": [3]}, r"must be a string; one is 3 \(int\)"),
    "a number": (lambda: {"prompt": 3}, r"must be a string; one is 3 \(int\)"),
    "no size": (lambda: {"prompt": "red", "height": 0}, "height=0 must be a whole number of at least 1"),
    "a size in words": (lambda: {"prompt": "red", "width": "64"}, "width='64' must be a whole number of at least 1"),
    "both": (lambda: {"prompt": "red", "prompt_embeds": torch.zeros(1, 4, 16)}, r"Pass one of them"),
    "misspelt argument": (
        lambda: {"prompt": "red", "guidance_skale": 2.0},
        r"no argument 'guidance_skale'\. Nearest: 'guidance_scale'",
    ),
    "return_dict": (lambda: {"prompt": "red", "return_dict": False}, r"always returns a Run"),
    "seed and generator": (lambda: {"prompt": "red", "seed": 1, "generator": torch.Generator()}, r"Pass one of them"),
    "seeds": (lambda: {"prompt": ["red", "blue"], "seed": [1]}, r"1 seeds for 2 images"),
    "negative seed": (lambda: {"prompt": "red", "seed": -1}, r"not a whole number from 0 up"),
    "large seed": (lambda: {"prompt": "red", "seed": 2**63}, r"not a whole number from 0 up to 2\*\*63 - 1"),
    "no mapping": (
        lambda: {"prompt": "red", "joint_attention_kwargs": "x"},
        r"joint_attention_kwargs='x' must be a mapping from names to values",
    ),
    "steps": (lambda: {"prompt": "red", "num_inference_steps": 0}, r"at least 1"),
    "no images": (lambda: {"prompt": "red", "num_images_per_prompt": 0}, r"at least 1"),
    "texts": (lambda: {"prompt": "red", "negative_prompt": ["bad", "worse"]}, r"lists 2 texts for 1 prompts"),
    "output": (lambda: {"prompt": "red", "output_type": "jpeg"}, r"numpy\.asarray\(run\.images\[0\]\)"),
    "batch size": (lambda: {"prompt": ["red", "blue"], "batch_size": 0}, r"at least 1"),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls(case, cfg_lens):
    make, message = CALLS[case]
    with pytest.raises(PromptError, match=message):
        cfg_lens.run(**make())


def test_no_number_of_images_is_the_pipelines_own(cfg_lens):
    assert cfg_lens.outline("red", num_images_per_prompt=None).rows == 1


def test_a_branch_that_guidance_did_not_make(cfg_lens):
    for branch in ("uncond", "both"):
        with pytest.raises(OpError, match="guidance is off"):
            cfg_lens.run("red", [Read("blocks.0.img", branch=branch)], true_cfg_scale=1.0)


class TestSources:
    """Runs that do not fit. They are made once, by a lens of their own, so that no call of theirs is counted."""

    @pytest.fixture(scope="class")
    def runs(self):
        lens = DiTLens(pipelines.flux(), defaults=dict(pipelines.TRUE_CFG))
        ops = [Read("blocks.1.img"), Read("blocks.2.img", reduce="mean"), Read("blocks.3.img", channels=[1], steps=[0])]
        return {
            "same": lens.run("red", ops, seed=0, num_inference_steps=3),
            "grid": lens.run("red", ops, seed=0, width=32, num_inference_steps=3),
            "steps": lens.run("red", ops, seed=0, num_inference_steps=4),
        }

    @pytest.mark.parametrize(
        ("which", "op", "message"),
        [
            ("grid", lambda run: Swap("blocks.1.img", source=run), r"grid of 8 x 8 tokens, this one 8 x 12"),
            ("steps", lambda run: Swap("blocks.1.img", source=run), r"4 steps, this one 3"),
            (
                "same",
                lambda run: Swap("blocks.0.img", source=run),
                r"never read blocks\.0\.img.*Read\('blocks\.0\.img'\)",
            ),
            ("same", lambda run: Swap("blocks.2.img", source=run), r"only as reduce='mean'"),
            ("same", lambda run: Swap("blocks.3.img", source=run, steps=0), r"without channels 0, 2"),
            ("same", lambda run: Swap("blocks.3.img", source=run, channels=[1]), r"without steps 1, 2"),
            ("same", lambda run: Swap("blocks.1.img", source=run, branch="uncond"), r"not the 'uncond' branch"),
            ("same", lambda run: MeanAblate("blocks.1.img", mean=run), r"with reduce='mean'"),
            ("same", lambda run: Resample("blocks.9.img", source=run), r"block 9"),
        ],
    )
    def test_refused(self, runs, cfg_lens, which, op, message):
        with pytest.raises(DitLensError, match=message):
            cfg_lens.run("red", [op(runs[which])], seed=0, num_inference_steps=3)

    def test_another_family(self, runs, cfg_lens):
        runs["same"].provenance["family"] = "SD3"
        try:
            with pytest.raises(OpError, match=r"of SD3, this model is FLUX\.1"):
                cfg_lens.run("red", [Swap("blocks.1.img", source=runs["same"])], seed=0)
        finally:
            runs["same"].provenance["family"] = "FLUX.1"


def test_k_larger_than_the_width(cfg_lens):
    for rule, complaint in (
        ({"k": 3, "share": 0.5}, "k=3 and share=0.5 are different rules"),
        ({"share": 1.5}, r"share=1\.5 must be in \(0, 1\]"),
        ({"mad": 0}, "mad=0 must be above 0"),
        ({"k": 2.5}, r"k=2\.5 channels.*whole number from 1 to 32"),
    ):
        with pytest.raises(OpError, match=complaint):
            cfg_lens.massive_channels("red", **rule)
    with pytest.raises(OpError, match=r"k=33 channels were asked for, but blocks\.0\.img has 32"):
        cfg_lens.massive_channels("red", k=33)
    with pytest.raises(OpError, match=r"k=17 leaves no control of equal size"):
        dl.studies.disruption(cfg_lens, "red", k=17)


def test_studies_of_nothing(cfg_lens):
    with pytest.raises(PromptError, match="empty"):
        dl.studies.disruption(cfg_lens, [], k=2)
    with pytest.raises(OpError, match="no pairs"):
        dl.studies.transfer(cfg_lens, [], k=2)
    with pytest.raises(OpError, match="pass masks="):
        dl.studies.organisation(cfg_lens, "red", k=2)


def test_reads_that_cannot_fit(cfg_lens, monkeypatch):
    import shutil

    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", type("Memory", (), {"available": 10_000}))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Disk", (), {"free": 20_000}))
    with pytest.raises(OpError, match=r"would keep 24\.58 kB, but only 10 kB of memory and 20 kB of disk.*TMPDIR"):
        cfg_lens.run("red", [Read("blocks.0.img")], seed=0)
    assert cfg_lens.cost("red", [Read("blocks.0.img")]).bytes == 2 * 96 * 32 * 4


def test_what_is_no_pipeline():
    with pytest.raises(FamilyError, match="not a diffusers pipeline"):
        DiTLens(torch.nn.Linear(2, 2))


def test_unknown_transformer():
    from diffusers import ConfigMixin, ModelMixin

    class FluxierTransformer2DModel(ModelMixin, ConfigMixin):
        config_name = "config.json"

    pipe = pipelines.flux()
    pipe.register_modules(transformer=FluxierTransformer2DModel())
    with pytest.raises(
        FamilyError,
        match=r"(?s)no family describes FluxierTransformer2DModel.*FLUX\.1 \(FluxTransformer2DModel\).*register_family"
        r".*transformer='FluxierTransformer2DModel'.*name='double'",
    ):
        DiTLens(pipe)


def test_modular_pipelines():
    from diffusers import Flux3ModularPipeline

    with pytest.raises(FamilyError, match=r"Flux3ModularPipeline is a modular pipeline.*ordinary pipeline"):
        DiTLens(Flux3ModularPipeline())


def test_a_pipeline_without_a_transformer():
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=2,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    with pytest.raises(FamilyError, match=r"DDPMPipeline has no transformer.*not a DiT pipeline"):
        DiTLens(DDPMPipeline(unet, DDPMScheduler()))


def test_what_would_skip_or_repeat_calls():
    from diffusers import FirstBlockCacheConfig

    pipe = pipelines.flux()
    lens = DiTLens(pipe, defaults=dict(pipelines.TRUE_CFG))
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(FamilyError, match=r"disable_cache\(\)"):
        lens.run("red")
    with pytest.raises(FamilyError, match="step cache"):
        DiTLens(pipe)
    pipe.transformer.disable_cache()
    pipe.transformer.compile(backend="eager")
    with pytest.raises(FamilyError, match="compiled"):
        lens.run("red")


def test_missing_and_damaged_folders(tmp_path):
    with pytest.raises(StoreError, match="could not be loaded"):
        DiTLens.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match=r"no model_index\.json"):
        DiTLens.from_pretrained(tmp_path / "empty")
    (tmp_path / "empty" / "model_index.json").write_text("{")
    with pytest.raises(StoreError, match="could not be loaded"):
        DiTLens.from_pretrained(tmp_path / "empty")
    with pytest.raises(StoreError, match=r"no toy called 'fluks'\. Nearest: 'flux'"):
        DiTLens.toy("fluks")
    with pytest.raises(StoreError, match="a saved run cannot be read from there"):
        Run.load(tmp_path / "nowhere")


def test_damaged_runs(tmp_path):
    lens = DiTLens(pipelines.flux(), defaults=dict(pipelines.TRUE_CFG))
    folder = lens.run("red", [Read("blocks.0.img", reduce="mean")], seed=0).save(tmp_path / "run")
    with pytest.raises(StoreError, match="exists already"):
        Run.load(folder).save(folder)
    reads = (folder / "reads.safetensors").read_bytes()
    (folder / "reads.safetensors").write_bytes(reads[: len(reads) // 2])
    with pytest.raises(StoreError, match="incomplete or damaged"):
        Run.load(folder)
    (folder / "run.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(StoreError, match="no run of format 1"):
        Run.load(folder)


def test_a_word_the_toy_has_not_learned(toy):
    with pytest.raises(PromptError, match=r"'pink' in 'a big pink circle'.*It knows: a, small, big, red"):
        toy.run("a big pink circle", [Scale("blocks.0.img", factor=2.0)])
