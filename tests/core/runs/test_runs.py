"""A saved run equals the loaded one, in a process without the model; runs are compared and repeated."""

import copy
import html
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig

import dit_lens as dl
from dit_lens import Read, Run, Swap, Zero
from dit_lens.core.request.ops import from_json, to_json
from dit_lens.core.runs.provenance import fingerprint, to_plain_data
from dit_lens.errors import DitLensError, PromptError, SiteError, StoreError
from tests import pipelines

OPS = [
    Read("blocks.*.img", reduce="|mean|", name="spectrum"),
    Read("blocks.1.img", branch="both", channels=[3, 1], steps=slice(1, None)),
    Zero("blocks.2.img", channels=[4], tokens=[0, 5]),
]


@pytest.fixture(scope="module")
def run(cfg_lens):
    return cfg_lens.run(["red", "a blue one"], OPS, seed=1, num_inference_steps=3)


@pytest.mark.parametrize(
    "reduce", [None, "mean", "quantile(0.5)", "quantile(0.1,0.9)", "histogram(-1,1,3)", "topk(1)", "topk(2)"]
)
@pytest.mark.parametrize("branch", ["cond", "both"])
def test_every_reduction_of_chosen_channels_is_loaded(cfg_lens, tmp_path, reduce, branch):
    op = Read("blocks.1.img", channels=[3, 1], reduce=reduce, branch=branch)
    run = cfg_lens.run(["red", "a blue one"], op, seed=1, output_type="latent")
    loaded = dl.Run.load(run.save(tmp_path / "run"))
    assert torch.equal(loaded["blocks.1.img"], run["blocks.1.img"])
    assert loaded.readings[0].channels == run.readings[0].channels


def test_a_saved_run_equals_the_loaded_one(run, tmp_path):
    loaded = dl.Run.load(run.save(tmp_path / "run"))
    assert loaded.keys() == run.keys()
    for one, other in zip(run.readings, loaded.readings, strict=True):
        assert {name: value for name, value in vars(one).items() if name != "tensors"} == {
            name: value for name, value in vars(other).items() if name != "tensors"
        }
        assert all(torch.equal(one.tensors[site], other.tensors[site]) for site in one.tensors)
    for name in ("receipt", "clock", "grid", "spec", "provenance"):
        assert getattr(loaded, name) == getattr(run, name)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(run.images, loaded.images, strict=True))
    assert loaded["blocks.1.img"].shape == (2, 2, 2, 96, 2)
    again = loaded.save(tmp_path / "again")
    assert (again / "run.json").read_bytes() == (tmp_path / "run" / "run.json").read_bytes()


def test_it_loads_without_diffusers_and_nnsight(run, tmp_path):
    folder = run.save(tmp_path / "run")
    code = (
        f"import sys, dit_lens; run = dit_lens.Run.load({str(folder)!r}); run.to_pandas(); "
        "assert not {'diffusers', 'nnsight', 'plotly'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rerun_gives_the_same_images_and_names_what_differs(run, cfg_lens):
    again = run.rerun(cfg_lens)
    assert again.identical
    assert again.differences == ()
    assert set(again.reads.values()) == {0.0}
    changed = dl.Run(**{**vars(run), "provenance": {**run.provenance, "dtype": "bfloat16"}})
    assert changed.rerun(cfg_lens).differences == (("provenance.dtype", "bfloat16", "float32"),)


def test_compare(run, cfg_lens):
    ops = [*OPS[:2], Zero("blocks.2.img", channels=[5], tokens=[0, 5])]
    other = cfg_lens.run(["red", "a blue one"], ops, seed=1, num_inference_steps=3)
    found = dl.compare(run, other)
    assert not found.identical
    assert ("spec.ops[2].channels[0]", 4, 5) in found.differences
    assert list(found.table.columns) == ["image", "rmse", "psnr"]
    a, b = (np.asarray(one.images[0], float) for one in (run, other))
    assert found.table["rmse"][0] == pytest.approx(np.sqrt(((a - b) ** 2).mean()), rel=1e-6)
    assert found.reads["spectrum/blocks.0.img"] < found.reads["spectrum/blocks.4.img"]
    assert "differences" in repr(found)
    assert found.images.size == (96, 64)
    with pytest.raises(dl.errors.OpError, match="equally many images"):
        dl.compare(run, cfg_lens.run("red", seed=1))


def test_latents_are_compared_where_there_are_no_images(cfg_lens):
    a, same, other = (cfg_lens.run("red", seed=seed, output_type="latent") for seed in (1, 1, 2))
    assert dl.compare(a, same).identical
    assert dl.compare(a, same).latents == 0
    found = dl.compare(a, other)
    assert not found.identical
    assert found.latents == pytest.approx(float((a.latents - other.latents).norm() / a.latents.norm()), rel=1e-5)
    assert "latents" in repr(found)
    nudged = dl.Run(**{**vars(a), "latents": a.latents.clone()})
    nudged.latents[0, 0, 0] = torch.nextafter(a.latents[0, 0, 0], torch.tensor(9.0))
    assert not dl.compare(a, nudged).identical
    assert a.rerun(cfg_lens).identical
    with pytest.raises(dl.errors.OpError, match="latents of equal shape"):
        dl.compare(a, cfg_lens.run("red", seed=1, output_type="latent", height=48))


def test_a_run_that_json_cannot_describe_is_not_repeated(cfg_lens):
    run = cfg_lens.run_with_hooks("red", [("blocks.0.img", lambda x, hook: None)], seed=0)
    with pytest.raises(PromptError, match="cannot be repeated"):
        run.rerun(cfg_lens)


def test_numpy_and_pandas(run):
    arrays = run.numpy()
    assert arrays["spectrum"]["blocks.0.img"].shape == (3, 2, 32)
    table = run.to_pandas()
    assert len(table) == 5 * 3 * 2 * 32
    line = table[
        (table["site"] == "blocks.3.img") & (table["step"] == 2) & (table["row"] == 1) & (table["channel"] == 7)
    ]
    assert line["value"].item() == pytest.approx(float(run["spectrum"]["blocks.3.img"][2, 1, 7]))
    assert line["sigma"].item() == pytest.approx(run.sigmas[2])


def test_unknown_reads(run):
    with pytest.raises(SiteError, match=r"no read 'spectrun'\. Nearest: 'spectrum'"):
        run["spectrun"]


def test_seeds_are_recorded_when_none_is_given(cfg_lens):
    run = cfg_lens.run("red")
    assert cfg_lens.run("red", seed=run.spec["seed"]).images[0].tobytes() == run.images[0].tobytes()


def test_ops_survive_json(run, tmp_path):
    folder = run.save(tmp_path / "run")
    ops = [
        *OPS,
        Swap("blocks.0.img", source="row:0", rows=[1], steps=(0.0, 0.5), strength=0.25, mask=np.eye(8, 12, dtype=bool)),
        Swap("blocks.0.img", source={"blocks.0.img": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)}),
        Swap("blocks.1.img", source=dl.Run.load(folder), channels=[3]),
        dl.Add("velocity", value=torch.tensor([0.5, -1.0]), channels=[0, 2], steps=dl.sigma(1.0, 0.3)),
        dl.TokenMean(["blocks.0.img", "double.1.txt"], keep="residual"),
        dl.MeanAblate("blocks.0.img", mean={"blocks.0.img": torch.zeros(32)}),
    ]
    for op in ops:
        data = to_json(op)
        back = from_json(data)
        assert type(back) is type(op)
        assert to_json(back) == data
        assert repr(back) == repr(op) or isinstance(op, Swap)
    tensor = from_json(to_json(ops[4])).source["blocks.0.img"]
    assert torch.equal(tensor, ops[4].source["blocks.0.img"])
    assert tensor.dtype == torch.bfloat16
    assert isinstance(from_json(to_json(ops[5])).source, dl.Run)


def test_json_of_unknown_ops():
    with pytest.raises(dl.errors.OpError, match="Nearest: 'Zero'"):
        from_json({"op": "Zeros", "site": "blocks.0.img"})
    with pytest.raises(dl.errors.OpError, match="takes no 'channel'"):
        from_json({"op": "Zero", "site": "blocks.0.img", "channel": 3})
    with pytest.raises(dl.errors.OpError, match="no JSON form"):
        to_json(dl.Apply("blocks.0.img", fn=print))


def test_reprs_teach(run, cfg_lens):
    text = repr(cfg_lens)
    for word in ("FLUX.1", "double 0-1, single 2-4", "32 channels", "8 x 12", "true_cfg_scale", "checks"):
        assert word in text
    assert "<table" in cfg_lens._repr_html_()
    for name, value in cfg_lens.defaults.items():
        assert f"{name}={value!r}" in text
        assert f"{name}={html.escape(repr(value))}" in cfg_lens._repr_html_()
    assert "data:image/png;base64," in run._repr_html_()
    assert "a blue one" not in repr(run)
    assert "Zero blocks.2.img" in repr(run.receipt)


def test_a_rerun_names_exchanged_weights(lens, tmp_path):
    """The same class and configuration do not make the same model."""
    folder = lens.run("red", seed=0).save(tmp_path / "run")
    weight = lens.pipe.transformer.proj_out.weight
    assert dl.Run.load(folder).rerun(lens).differences == ()
    before = weight.data[0, 0].clone()  # x + 1 - 1 is not x
    weight.data[0, 0] += 1
    try:
        ((where, one, other),) = dl.Run.load(folder).rerun(lens).differences
    finally:
        weight.data[0, 0] = before
    assert where == "provenance.weights"
    assert one != other


def test_a_fingerprint_sees_every_row_and_column():
    layer = torch.nn.Linear(512, 256)
    seen = {fingerprint(layer)}
    for line in (*layer.weight.data, *layer.weight.data.T):
        line.add_(1)
        seen.add(fingerprint(layer))
    assert len(seen) == 1 + 256 + 512


def test_a_fingerprint_needs_weights_at_hand():
    assert fingerprint(torch.nn.Linear(4, 4, device="meta")) is None
    assert fingerprint(torch.nn.Linear(4, 4).to(torch.bfloat16)) is not None


def test_what_a_pipeline_writes_into_its_lists_stays_with_it(cfg_lens, monkeypatch):
    """Z-Image puts its template around negative prompts, in place."""
    encode = type(cfg_lens.pipe).encode_prompt

    def writing(self, prompt, **options):
        result = encode(self, prompt=prompt, **options)
        prompt[0] = f"template {prompt[0]}"
        return result

    monkeypatch.setattr(type(cfg_lens.pipe), "encode_prompt", writing)
    prompts, negative = ["red"], ["ugly"]
    run = cfg_lens.run(prompts, negative_prompt=negative, seed=1, output_type="latent")
    assert (prompts, negative) == (["red"], ["ugly"])
    assert run.spec["call"]["negative_prompt"] == ["ugly"]
    assert torch.equal(cfg_lens.run_spec(run.spec).latents, run.latents)


def test_arguments_that_are_not_kept_are_told_apart_by_what_is_in_them(cfg_lens):
    latents = [torch.zeros(1, 96, 16).index_fill(1, torch.tensor([i]), 1.0) for i in (0, 1)]
    one, other = (cfg_lens.run("red", seed=0, latents=some, num_inference_steps=1) for some in latents)
    assert [where for where, *_ in dl.compare(one, other).differences] == ["spec.call.latents.digest"]
    again = cfg_lens.run("red", seed=0, latents=latents[0].clone(), num_inference_steps=1)
    assert dl.compare(one, again).differences == ()
    assert to_plain_data(torch.tensor(1.0))["unsaved"] == "Tensor []"
    assert to_plain_data(np.float32(1))["unsaved"] == "float32 []"


def test_the_strength_of_an_adapter_is_part_of_where_a_run_came_from():
    pipe = pipelines.flux()
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "one")
    lens, runs = dl.DiTLens(pipe, defaults=dict(pipelines.CALL)), []
    for strength in (1.0, 0.5):
        pipe.transformer.set_adapters(["one"], [strength])
        runs.append(lens.run("red", seed=0))
    pipe.scheduler.set_shift(2.0)
    runs.append(lens.run("red", seed=0))
    assert [where for where, *_ in dl.compare(*runs[:2]).differences] == ["provenance.adapters"]
    assert dl.compare(*runs[1:]).differences == (("provenance.shift", 1.0, 2.0),)


def test_a_recorded_run_is_copied_with_its_recording_and_pickled_without(cfg_lens):
    run = cfg_lens.run("red", [Read("blocks.0.img")], seed=0, record=True)
    for made in (copy.copy(run), copy.deepcopy(run)):
        again = cfg_lens.run("red", [Read("blocks.1.img")], seed=0, prefix=made)
        assert again.images[0].tobytes() == run.images[0].tobytes()
    loaded = pickle.loads(pickle.dumps(run))
    assert loaded.recording is None
    assert torch.equal(loaded["blocks.0.img"], run["blocks.0.img"])
    with pytest.raises(DitLensError, match="record=True"):
        cfg_lens.run("red", [Read("blocks.1.img")], seed=0, prefix=loaded)


@pytest.mark.parametrize("channels", [None, [9, 4, 7, 2, 11]])
def test_a_table_of_ranked_channels_names_them(cfg_lens, channels):
    reads = [Read("blocks.1.img", name="all"), Read("blocks.1.img", reduce="topk(3)", channels=channels, name="top")]
    run = cfg_lens.run("red", reads, seed=0)
    table = run.to_pandas()
    means = run["all"].tensor[:, 0].double().mean(1).abs()  # [s, d]
    offered = channels or range(means.shape[-1])
    for step, rows in table.groupby("step"):
        ranked = sorted(offered, key=lambda c: -means[step, c])[:3]
        assert rows["channel"].tolist() == ranked
        np.testing.assert_allclose(rows["value"], means[step, ranked], rtol=1e-5)


@pytest.mark.parametrize("kept", [[], [1], [1, 2]])
def test_a_ranking_of_more_channels_than_the_record_names_is_damaged(cfg_lens, tmp_path, kept):
    read = Read("blocks.1.img", reduce="topk(3)", channels=[9, 4, 7])
    folder = cfg_lens.run("red", [read], seed=0).save(tmp_path / "run")
    data = json.loads((folder / "run.json").read_text())
    data["readings"][0]["channels"] = {"blocks.1.img": kept}
    (folder / "run.json").write_text(json.dumps(data))
    with pytest.raises(StoreError, match="ranks channels beyond"):
        Run.load(folder)
