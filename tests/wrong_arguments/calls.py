"""For every public call, arguments that are right, of which one after another is replaced."""

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

import dit_lens as dl
from dit_lens import DiTLens, Read
from dit_lens.core.runs.comparison import Comparison
from dit_lens.instruments import gradients
from dit_lens.studies import Result
from dit_lens.toys.train import Settings
from tests import pipelines
from tests.channel_sets import sample_set
from tests.reports import made_up
from tests.wrong_arguments.surface import find_calls

# Public names that are not called by a user with arguments of their own, and where they are tried instead.
ELSEWHERE = {
    "ops, which check themselves against a model when they run": [
        "Add",
        "Apply",
        "AttentionMask",
        "Feature",
        "Guide",
        "MeanAblate",
        "Read",
        "ReadFeatures",
        "Resample",
        "Rope",
        "Scale",
        "Skip",
        "Swap",
        "TokenMean",
        "Zero",
        "sigma",
        "ops.Op",
        "ops.SigmaInterval",
        "ops.from_json",
        "ops.to_json",
        "DiTLens.run",
        "DiTLens.run_with_hooks",
        "DiTLens.run_with_cache",
        "DiTLens.trace",
        "DiTLens.cost",
        "DiTLens.outline",
        "DiTLens.planned",
        "DiTLens.run_spec",
        "DiTLens.rerun",
        "Run.rerun",
    ],
    "of the Hub: tests/hub tries them": ["push_to_hub", "from_hub"],
    "of a server: tests/server tries them": ["DiTLens.submit", "DiTLens.submit_many", "Job", "Job.*"],
    "for those who add an op: given by the library": [
        "Add.lower",
        "Add.prepare",
        "Apply.lower",
        "MeanAblate.lower",
        "Feature.lower",
        "Feature.does_nothing",
        "Read.lower",
        "ReadFeatures.lower",
        "Resample.lower",
        "Scale.lower",
        "AttentionMask.prepare",
        "AttentionMask.lower",
        "Guide.prepare",
        "Guide.lower",
        "Rope.prepare",
        "Rope.lower",
        "Skip.lower",
        "Swap.lower",
        "TokenMean.lower",
        "Zero.lower",
        "ops.Edit",
        "ops.Edit.*",
        "ops.Lowering",
        "ops.Lowering.*",
        "ops.to_real_tensor",
    ],
    "what files of dictionaries become: given by the library": [
        "dictionaries.Dictionary.choose",
        "dictionaries.Dictionary.parts",
        "dictionaries.Dictionary.stored_in",
    ],
    "results, which the library makes": [
        "Run",
        "Receipt",
        "clusters.Segmentation",
        "explorer.Explorer",
        "explorer.Steer",
        "explorer.Views",
        "explorer.Views.labels",
        "explorer.Views.other",
        "inversion.Inversion",
        "metrics.Clip",
        "metrics.Clip.*",
        "metrics.Vqa",
        "metrics.Interval",
        "studies.ModelReport",
        "studies.Result",
        "protocols.Choice",
        "protocols.Protocol",
    ],
    "for those who add a study, and take a function": ["protocols.with_protocols"],
    "what a family knows of its model: given by the library": [
        "families.Anatomy",
        "families.Anatomy.block_name",
        "families.Anatomy.blocks",
        "families.Anatomy.channels",
        "families.Anatomy.find_attention",
        "families.Anatomy.find_call",
        "families.Anatomy.find_norm",
        "families.Anatomy.find_rotated",
        "Stack.find",
        "families.Anatomy.heads",
        "families.Anatomy.locate",
        "families.Anatomy.place",
        "families.Anatomy.plan_grid",
        "families.Anatomy.rank",
        "families.Anatomy.stack_name",
        "families.Anatomy.time_rule",
        "families.Anatomy.why_not",
        "families.refuse_unsafe",
        "families.write_template",
        "inversion.check_flow",
        "inversion.check_invertible",
    ],
    "as diffusers and torch have it": ["DiTLens.to"],
    "no arguments": ["channels.RunningStats", "families.known_families", "prompts.bundled", "toys.quiet_loading"],
    "how errors and warnings are worded": ["errors.check_choice", "errors.nearest", "errors.show", "errors.warn"],
}


def make_calls(lens, folder):
    """name -> (what is called, arguments that are right): of every public call, and of methods of results.

    lens: a lens on a tiny FLUX.
    folder: an empty folder.
    """
    found = {**_data(), **_pictures(), **_stored(folder), **_models(lens), **_studies(lens)}
    public = find_calls()
    return {name: (public[name] if call is None else call, arguments) for name, (call, arguments) in found.items()}


def _data():
    x = np.random.default_rng(0).random((16, 3))
    mask = x[:, 0].reshape(4, 4) > 0.5
    site = {"blocks.0.img": torch.rand(8)}
    chosen = sample_set(0)
    return {
        "ChannelSet": (
            None,
            {
                "channels": {"a": (1,)},
                "scores": {"a": torch.rand(4)},
                "energy": {"a": torch.rand(4)},
                "score": "rms",
                "arm": "given",
                "matched": True,
                "note": "",
            },
        ),
        "ChannelSet.take": (chosen.take, {"k": 2}),
        "ChannelSet.restrict": (chosen.restrict, {"sites": ["blocks.0.img"]}),
        "ChannelSet.random": (chosen.random, {"seed": 0}),
        "ChannelSet.energy_matched": (chosen.energy_matched, {"seed": 0}),
        "ChannelSet.jaccard": (chosen.jaccard, {"other": {"blocks.0.img": [1, 2]}}),
        "ChannelSet.from_json": (None, {"data": chosen.to_json()}),
        "ChannelSet[]": (chosen.get, {"key": "blocks.0.img"}),
        "channels.RunningStats.update": (lambda x: dl.channels.RunningStats().update(x), {"x": torch.rand(4, 3)}),
        "channels.RunningStats.merge": (
            lambda other: dl.channels.RunningStats().merge(other),
            {"other": dl.channels.RunningStats()},
        ),
        "channels.absolute_channels": (
            None,
            {"peaks": site, "medians": site, "energy": site, "least": 0.1, "times": 2.0},
        ),
        "channels.definitions": (
            None,
            {"scores": {"|mean|": torch.rand(4), "rms": torch.rand(4)}, "k": 2, "share": 0.5, "threshold": 10.0},
        ),
        "channels.energy_share": (None, {"energy": torch.rand(4), "channels": [0]}),
        "channels.gini": (None, {"values": torch.rand(4)}),
        "channels.jaccard": (None, {"a": [1, 2], "b": [2, 3]}),
        "channels.mad_channels": (None, {"scores": site, "energy": site, "threshold": 5.0, "score": "rms"}),
        "channels.mad_outliers": (None, {"scores": torch.rand(4), "threshold": 3.0}),
        "channels.rule_of": (None, {"widths": {"blocks.0.img": 8}, "k": 2, "share": None, "mad": None}),
        "channels.share_channels": (None, {"scores": site, "energy": site, "share": 0.5, "score": "rms"}),
        "channels.top_channels": (None, {"scores": site, "energy": site, "k": 2, "score": "rms"}),
        "channels.top_median_ratio": (None, {"scores": torch.rand(4)}),
        "dictionaries.Dictionary": (
            None,
            {
                "encoder": torch.rand(4, 3),
                "encoder_bias": torch.rand(3),
                "decoder": torch.rand(3, 4),
                "decoder_bias": torch.rand(4),
                "activation": "topk",
                "threshold": None,
                "k": 2,
                "centred": True,
                "normalisation": "layer_norm",
                "time": {},
                "transcoder": False,
                "origin": "",
            },
        ),
        "dictionaries.Dictionary.encode": (
            dictionary().encode,
            {"x": torch.rand(2, 4), "features": [1], "sigma": 0.5},
        ),
        "dictionaries.Dictionary.reconstruct": (dictionary().reconstruct, {"x": torch.rand(2, 4), "sigma": 0.5}),
        "clusters.segment": (
            None,
            {"x": x, "grid": (4, 4), "n_clusters": 2, "polarity": "heat", "method": "minmax", "seed": 0},
        ),
        "clusters.normalise": (None, {"x": x, "method": "robust"}),
        "clusters.cluster": (None, {"x": x, "n_clusters": 2, "seed": 0, "method": "minmax"}),
        "clusters.foreground": (
            None,
            {"labels": [0, 1, 1, 0], "heat": [0.1, 0.9, 0.7, 0.2], "grid": (2, 2), "polarity": "border"},
        ),
        "clusters.upsample": (None, {"mask": mask, "size": (8, 8)}),
        "clusters.to_grid": (None, {"mask": np.eye(8, dtype=bool), "grid": (4, 4)}),
        "clusters.iou": (None, {"a": mask, "b": mask}),
        "clusters.ious": (None, {"masks": [mask], "truths": [mask]}),
        "clusters.chance_iou": (None, {"truth": mask, "size": 3, "oracle": True}),
        "clusters.permutation_p": (None, {"scores": np.eye(7), "seed": 0, "n": 50}),
        "metrics.mean_ci": (
            None,
            {
                "values": x[:, 0],
                "prompts": list("aabbccddeeffgghh"),
                "seeds": [0, 1] * 8,
                "level": 0.9,
                "limits": (-100.0, 100.0),
            },
        ),
        "metrics.paired_difference_ci": (
            None,
            {"a": x, "b": x * 0.5, "level": 0.9, "limits": (-100.0, 100.0)},
        ),
        "metrics.wilson": (None, {"successes": 3, "n": 7, "level": 0.9}),
        "metrics.distances": (None, {"chosen": ["rmse"]}),
        **{
            f"metrics.{name}": (None, {"a": image(0), "b": image(1)})
            for name in ("rmse", "psnr", "mean_abs", "ssim", "lpips")
        },
        "metrics.clip_judge": (None, {"model": "openai/clip", "processor": None}),
        "metrics.vqa_judge": (None, {"model": "someone/vqa", "processor": None}),
        "metrics.dino_distance": (None, {"model": "someone/dino"}),
        "metrics.birefnet_masks": (None, {"model": "someone/birefnet", "trust_remote_code": False}),
        "metrics.set_distances": (
            None,
            {
                "a": [image(0), image(1)],
                "b": [image(2), image(3)],
                "measures": ["fid"],
                "features": Colours(),
                "clip": None,
            },
        ),
    }


def dictionary():
    return dl.dictionaries.Dictionary(torch.eye(4), torch.zeros(4), torch.eye(4), torch.zeros(4))


class Colours(torch.nn.Module):
    """The mean colour of images."""

    num_features = 3

    def forward(self, images):
        return images.float().mean((2, 3))


def image(seed, size=8):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8))


TRAINING = ["iteration", "n", "fidelity", "energy_share", "damage", "iou"]


def _pictures():
    mask = np.eye(4, dtype=bool)
    summaries = {
        "disruption_figure": ["k", "arm", "n", "rmse", "rmse_low", "rmse_high"],
        "organisation_figure": ["block", "arm", "n", "iou", "iou_low", "iou_high"],
        "transfer_figure": ["k", "arm", "strength", "masked", "n"],
        "transfer_image_figure": ["k", "arm", "strength", "masked", "n"],
        "blocks_figure": ["part", "block", "measure", "n", "damage", "noise", "needed", "specific"],
        "patching_figure": ["kind", "row", "column", "n", "effect"],
        "steering_figure": ["strength", "arm", "n", "changed"],
        "stability_figure": ["step", "block", "n", "jaccard"],
        "carrier_or_detail_figure": ["measure", "part", "n", "value"],
        "write_attribution_figure": ["block", "arm", "n", "share"],
        "sweep_figure": ["k", "arm", "n", "rmse"],
        "basis_figure": ["k", "arm", "n", "energy_share", "rmse"],
    }
    tables = {name: pd.DataFrame([dict.fromkeys(columns, 1.0) | {"arm": "top"}]) for name, columns in summaries.items()}
    options = {
        "blocks_figure": {"measure": "1.0"},
        "carrier_or_detail_figure": {"bound": 0.1},
        "transfer_figure": {"k": 1},
        "transfer_image_figure": {"k": 1},
        "sweep_figure": {"over": ["k"], "measure": "rmse"},
    }
    result = saved_result()
    return {
        **{f"plots.{name}": (None, {"summary": table, **options.get(name, {})}) for name, table in tables.items()},
        "plots.block_channel_map": (
            None,
            {"scores": {"blocks.0.img": [1.0, 3.0]}, "massive": {"blocks.0.img": [1]}, "score": "rms"},
        ),
        "plots.channel_histogram": (
            None,
            {"scores": [0.1, 9.0], "massive": [1], "site": "s", "score": "rms", "bins": 4},
        ),
        "plots.channel_spectrum": (
            None,
            {"scores": [0.1, 9.0], "massive": [1], "site": "s", "score": "rms", "by_rank": True},
        ),
        "plots.cluster_overlay": (
            None,
            {"image": image(0), "mask": mask, "truth": np.ones((8, 8), bool), "title": "t", "opacity": 0.5},
        ),
        "plots.overlay_grid": (
            None,
            {
                "image": image(0),
                "masks": {"blocks.0.img": mask},
                "truth": np.ones((8, 8), bool),
                "title": "t",
                "opacity": 0.5,
            },
        ),
        "plots.strip": (None, {"images": [image(0)], "labels": ["a"], "title": "", "subtitle": ""}),
        "plots.sheet": (None, {"images": [[image(0)]], "rows": ["a"], "columns": ["b"], "title": "", "subtitle": ""}),
        "plots.pattern_figure": (None, {"patterns": {"head 0": np.eye(2)}, "title": "", "subtitle": ""}),
        "plots.head_figure": (None, {"values": {0: [0.1, 0.2]}, "title": "", "subtitle": ""}),
        "plots.head_word_figure": (
            None,
            {"image": image(0), "maps": {"head 0": {"a": np.eye(2)}}, "title": "", "subtitle": ""},
        ),
        "plots.word_map_figure": (None, {"image": image(0), "maps": {"a": np.eye(2)}, "title": "", "subtitle": ""}),
        "plots.training_figure": (None, {"table": pd.DataFrame([dict.fromkeys(TRAINING, 1.0) | {"run": "a"}])}),
        "plots.looks": (None, {"arms": ["top", "mine"]}),
        "plots.transfer_strips": (
            None,
            {"result": result, "pair": 0, "seed": 0, "k": None, "masked": False, "arms": ("top",)},
        ),
        "studies.Result.figure": (result.figure, {}),
        "studies.Result.image": (result.image, {"item": 0, "seed": 0, "k": 2, "arm": "top"}),
        "studies.Result.mask": (result.mask, {"item": 0, "seed": 0, "arm": "truth"}),
        "studies.ImageKey": (
            None,
            {
                "item": 0,
                "seed": 0,
                "k": 1,
                "step": 0,
                "block": 1,
                "edit": "a",
                "row": 1,
                "column": 2,
                "arm": "top",
                "draw": 1,
                "part": "p",
                "strength": 0.5,
            },
        ),
        "studies.ImageKey.parse": (None, {"text": "0/1/4/top"}),
        "studies.power": (
            None,
            {
                "pilot": 20.0,
                "difference": 10.0,
                "measure": None,
                "base": "top",
                "prompts": 16,
                "power": 0.8,
                "level": 0.95,
            },
        ),
        "studies.Thresholds": (None, {"bound": 0.1, "ceiling": 0.8, "readable": 0.5}),
        "explorer.Setting": (
            None,
            {
                "strength": 1.0,
                "arm": "top",
                "k": 8,
                "blocks": (0, 1),
                "steps": (0, 1),
                "where": "everywhere",
                "mask": (1,),
            },
        ),
    }


def saved_result():
    table = pd.DataFrame([{"prompt": 0, "seed": 0, "k": 2, "arm": "top", "draw": 0, "rmse": 1.0}])
    summary = pd.DataFrame([{"k": 2, "arm": "top", "n": 1, "rmse": 1.0, "rmse_low": 0.5, "rmse_high": 2.0}])
    images = {"0/0/untouched": image(0), "0/0/2/top": image(1)}
    masks = {"0/0/truth": np.eye(8, dtype=bool)}
    return Result("disruption", table, summary, {"prompts": ["red"], "call": {}}, images, masks, ["a note"])


def _stored(folder):
    steering = dl.Steering({"blocks.0.img": torch.ones(4)})
    prompts = folder / "prompts.csv"
    prompts.write_text("prompt\na cat\n")
    saved = saved_result().save(folder / "result")
    protocol = dl.protocols.get("turri2026")
    there = dl.DiTLens.remote(dl.toys.path("flux"), host="http://localhost:1")
    return {
        "Receipt.from_json": (None, {"data": []}),
        "dictionaries.Dictionary.save": (dictionary().save, {"file": folder / "d.safetensors"}),
        "dictionaries.load": (None, {"path": dictionary().save(folder / "e.safetensors"), "transcoder": None}),
        "Steering.save": (steering.save, {"file": folder / "x.safetensors"}),
        "Steering.load": (dl.Steering.load, {"file": folder / "none.safetensors"}),
        "studies.Result.save": (saved_result().save, {"folder": folder / "new-result", "overwrite": True}),
        "studies.Result.load": (None, {"folder": saved}),
        "prompts.load": (None, {"path": prompts}),
        "prompts.scenes": (None, {"n": 2, "seed": 0, "held_out": False}),
        "prompts.Prompt": (None, {"text": "a cat", "id": "1", "subject": "cat", "pair": "", "role": ""}),
        "prompts.PromptList": (None, {"prompts": (dl.prompts.Prompt("a", id="1"),)}),
        "protocols.get": (None, {"name": "turri2026"}),
        "RayWorkers": (None, {"load": lambda: None, "num": 2, "address": None, "gpus": None}),
        "ServerWorkers": (None, {"lens": there}),
        "ServerWorkers.cancel": (dl.ServerWorkers(there).cancel, {"out": folder}),
        "studies.merge": (None, {"folders": [folder / "shard"], "out": folder / "merged"}),
        "protocols.Protocol.arguments": (protocol.arguments, {"study": "transfer"}),
        "protocols.Protocol.find_row": (protocol.find_row, {"repository": "someone/model"}),
        "studies.ModelReport.save": (made_up().save, {"folder": folder / "new-report"}),
        "studies.ModelReport.load": (None, {"path": made_up().save(folder / "report")}),
        "protocols.Protocol.apply": (protocol.apply, {"study": "transfer", "given": {"k": 1}}),
        "toys.find_pipeline": (None, {"name": "toy:flux"}),
        "toys.path": (None, {"name": "flux"}),
        "toys.train_command": (None, {"name": "flux"}),
        "toys.untrained": (None, {"name": "flux"}),
        "toys.train.Settings": (
            Settings,
            {
                "seed": 0,
                "iterations": 10,
                "until": 0.9,
                "keep_every": 5,
                "device": "cpu",
                "batch": 4,
                "rate": 1e-3,
                "toy": "flux",
            },
        ),
        "recommend": (None, {"path_or_pipe": dl.toys.path("flux"), "gb": 24, "images": 1, "side": 64}),
        "DiTLens.from_pretrained": (None, {"path": "nowhere"}),
        "DiTLens.toy": (None, {"name": "fluks", "untrained": True}),
        "DiTLens.remote": (None, {"model": dl.toys.path("flux"), "host": "http://localhost:1", "revision": None}),
    }


def _models(lens):
    call = {"prompt": "red", "seed": 0, "num_inference_steps": 2}
    run = lens.run(
        "red", [Read("blocks.*.img"), Read("blocks.0.img", reduce="mean", name="m")], seed=0, num_inference_steps=2
    )
    explorer = dl.explore(run, k=2)
    panel = dl.steer(lens, "red", "blue", k=2, num_inference_steps=2)
    found = lens.gradients("red", "blocks.0.img", metric=torch.mean, through="step", num_inference_steps=2, seed=0)
    pattern = lens.read_pattern("red", 0, heads=[0], seed=0, num_inference_steps=2)
    steering = dl.Steering({"blocks.0.img": torch.ones(lens.anatomy.width)})
    tokens = dl.TokenSet({"blocks.0.img": [[1]]}, "sinks", 4)
    maps = lens.word_map("red", "red", seed=0, num_inference_steps=2)
    width = lens.anatomy.width
    axes = dl.dictionaries.Dictionary(torch.eye(width), torch.zeros(width), torch.eye(width), torch.zeros(width))
    row = lens.family
    rows = {
        "Family": row,
        "Stack": row.stacks[0],
        "Grid": row.grid,
        "Readout": row.readout,
        "Time": row.pipelines[0].time,
        "Guidance": next(one.guidance for one in row.pipelines if one.guidance),
        "PointSpec": dl.PointSpec("attn"),
        "families.Adapter": row.adapters[0],
        "families.Example": row.example,
        "families.Final": row.final,
        "families.Latents": row.latents,
        "families.Pipeline": row.pipelines[0],
        "families.Prediction": row.prediction,
        "families.Prompts": row.prompts,
        "families.Refusal": dl.families.Refusal("a", "b"),
    }
    return {
        **{
            name: (None, {field: getattr(one, field) for field in one.__dataclass_fields__})
            for name, one in rows.items()
        },
        "families.Pipeline.copy_for": (row.pipelines[0].copy_for, {"tested": True}),
        "Family.pipeline": (row.pipeline, {"kind": type(lens.pipe)}),
        "Family.find_pipeline": (row.find_pipeline, {"kind": type(lens.pipe)}),
        "families.find": (None, {"pipe": lens.pipe}),
        "families.find_by_pipeline": (None, {"kind": type(lens.pipe)}),
        "families.Anatomy.check_block": (lens.anatomy.check_block, {"index": 0}),
        "families.Anatomy.find_site": (lens.anatomy.find_site, {"pattern": "blocks.-1.img"}),
        "families.Anatomy.site": (lens.anatomy.site, {"name": "blocks.0.img"}),
        "register_family": (_register, {"family": row}),
        "DiTLens": (None, {"pipe": lens.pipe, "defaults": {}, "engine": None}),
        "DiTLens.sites": (lens.sites, {"pattern": "blocks.*.img"}),
        "DiTLens.heads": (lens.heads, {"site": "blocks.0.img.attn.q"}),
        "DiTLens.to_str_tokens": (lens.to_str_tokens, {"prompt": "red"}),
        "DiTLens.mask_site": (lens.mask_site, {"block": 1}),
        "DiTLens.encode": (lens.encode, {"prompts": "red", "device": None, "num_inference_steps": 2}),
        "DiTLens.massive_channels": (
            lens.massive_channels,
            {**call, "k": 2, "share": None, "mad": None, "score": "rms", "site": "blocks.*.img", "steps": None},
        ),
        "DiTLens.subject_mask": (
            lens.subject_mask,
            {**call, "channels": None, "k": 2, "polarity": "distance", "block": None, "steps": -1},
        ),
        "DiTLens.read_x0": (lens.read_x0, {**call, "site": "blocks.0.img", "steps": [0]}),
        "Steering": (None, {"vectors": steering.vectors, "method": "", "pairs": (), "n": 0, "family": ""}),
        "Steering.from_pairs": (
            dl.Steering.from_pairs,
            {
                "lens": lens,
                "pairs": [("red", "blue")],
                "sites": "blocks.0.img",
                "method": "mean",
                "per_step": True,
                "seeds": 0,
                "num_inference_steps": 2,
            },
        ),
        "Steering.op": (steering.op, {"strength": 1.0, "sites": "blocks.0.img"}),
        "Steering.randomised": (steering.randomised, {"seed": 0}),
        "DiTLens.forward": (
            lens.forward,
            {"images": image(0), "prompt": "red", "ops": (), "sigma": 0.3, "seed": 0, "height": 16, "width": 16},
        ),
        "DiTLens.encode_image": (lens.encode_image, {"images": image(0), "prompt": "red", "height": 16, "width": 16}),
        "DiTLens.export": (
            lens.export,
            {
                "sites": "blocks.0.img",
                "prompts": ["red"],
                "out": Path(tempfile.mkdtemp()) / "out",
                "tokens": 2,
                "steps": -1,
                "seeds": [0],
                "shard": 4,
                "batch_size": 1,
                "shuffle": 0,
                "num_inference_steps": 2,
            },
        ),
        "DiTLens.top_images": (
            lens.top_images,
            {
                "dictionary": axes,
                "prompts": ["red"],
                "site": "blocks.0.img",
                "features": [0],
                "k": 1,
                "steps": -1,
                "seeds": [0],
                "batch_size": 1,
                "num_inference_steps": 2,
            },
        ),
        "DiTLens.word_map": (
            lens.word_map,
            {
                **call,
                "words": "red",
                "method": "attention",
                "concepts": (),
                "blocks": 0,
                "heads": 0,
                "ops": (),
                "steps": 0,
            },
        ),
        "DiTLens.find_tokens": (
            lens.find_tokens,
            {**call, "kind": "registers", "over": 3.0, "k": None, "without": 2, "site": "blocks.*.img"},
        ),
        "TokenSet": (None, {"tokens": {"blocks.0.img": [[1]]}, "kind": "sinks", "count": 4, "peaks": {}}),
        "TokenSet.at": (tokens.at, {"site": "blocks.0.img", "step": 0, "steps": 1, "count": 4}),
        "TokenSet.from_json": (dl.TokenSet.from_json, {"data": tokens.to_json()}),
        "DiTLens.read_pattern": (
            lens.read_pattern,
            {**call, "block": 0, "heads": [0], "ops": (), "steps": -1, "branch": "cond"},
        ),
        "DiTLens.gradients": (
            lens.gradients,
            {
                **call,
                "site": "blocks.0.img",
                "metric": torch.mean,
                "through": "run",
                "steps": None,
                "branch": "cond",
                "reduce": None,
            },
        ),
        "gradients.attribution": (
            gradients.attribution,
            {
                "lens": lens,
                "source": "red",
                "target": "blue",
                "site": "blocks.0.img",
                "metric": None,
                "through": "run",
                "steps": None,
                "branch": "cond",
                "num_inference_steps": 2,
            },
        ),
        "encode_prompts": (
            None,
            {
                "pipe": lens.pipe,
                "prompts": "red",
                "device": None,
                "defaults": {},
                "vocabulary": None,
                "num_inference_steps": 2,
            },
        ),
        "inversion.invert": (
            None,
            {
                "lens": lens,
                "images": [image(0, 32)],
                "prompts": "red",
                "num_inference_steps": 2,
                "height": 32,
                "width": 32,
            },
        ),
        "inversion.noised_reference": (
            None,
            {
                "lens": lens,
                "images": [image(0, 32)],
                "seed": 0,
                "prompts": "red",
                "num_inference_steps": 2,
                "height": 32,
                "width": 32,
            },
        ),
        "atlas": (
            None,
            {
                "lens": lens,
                "path": "atlas.html",
                "prompts": ["red"],
                "k": 2,
                "seed": 0,
                "megabytes": 10.0,
                "batch_size": None,
                "num_inference_steps": 2,
            },
        ),
        "steer": (
            None,
            {
                "lens": lens,
                "source": "red",
                "target": "blue",
                "k": 2,
                "seed": 0,
                "score": "rms",
                "num_inference_steps": 2,
            },
        ),
        "explore": (
            None,
            {
                "shown": run,
                "beside": None,
                "channels": None,
                "k": 2,
                "clusters": 2,
                "x0": None,
                "words": None,
                "compare": "wipe",
                "wipe": 0.5,
                "under": "end",
                "step": 1,
                "site": "blocks.0.img",
                "left": 0,
                "right": -1,
                "group": "top",
                "channel": 0,
                "overlay": "heat",
                "palette": "Cividis",
                "scale": "map",
                "opacity": 0.5,
                "token": 3,
            },
        ),
        "explorer_reads": (None, {"massive": sample_set(0), "seed": 0}),
        "explorer.Explorer.to_html": (explorer.to_html, {"path": "page.html", "title": "t"}),
        "explorer.Steer.draw": (
            panel.draw,
            {
                "strength": 0.5,
                "arm": "top",
                "k": 2,
                "blocks": (0, 1),
                "steps": (0, 1),
                "where": "everywhere",
                "mask": (1,),
                "source": "red",
                "target": "blue",
            },
        ),
        "explorer.Steer.swap": (panel.swap, {"setting": panel.setting}),
        "explorer.Steer.code_of": (panel.code_of, {"setting": panel.setting}),
        "compare": (None, {"a": run, "b": run}),
        "Comparison.images": (
            lambda a: (
                Comparison(a, a, (), pd.DataFrame(columns=["rmse"]), {}).images if isinstance(a, dl.Run) else None
            ),
            {"a": run},
        ),
        "Run.save": (run.save, {"folder": "run", "overwrite": True}),
        "Run.load": (None, {"folder": "run"}),
        "Run.reading": (run.reading, {"site": "blocks.0.img"}),
        "Run[]": (run.get, {"key": "blocks.0.img"}),
        "Reading[]": (run["m"].get, {"key": "blocks.0.img"}),
        "Reading.by_branch": (run.readings[0].by_branch, {"site": "blocks.0.img"}),
        "Gradients[]": (found.get, {"key": "blocks.0.img"}),
        "WordMap[]": (lambda word: maps[word], {"word": "red"}),
        "WordMap.mask": (maps.mask, {"word": "red", "block": 0, "row": 0}),
        "WordMap.overlay": (maps.overlay, {"word": "red", "block": 0, "row": 0, "truth": None}),
        "WordMap.figure": (maps.figure, {"row": 0}),
        "Attention[]": (lambda block: pattern[block], {"block": 0}),
        "Attention.measure": (pattern.measure, {"what": "text"}),
        "Attention.figure": (pattern.figure, {"block": 0, "step": None, "row": 0}),
        "Attention.sheet": (pattern.sheet, {"what": "entropy", "step": None, "row": 0}),
        "Attention.words": (pattern.words, {"words": "red", "block": 0, "step": None, "row": 0}),
        "Attention.between": (pattern.between, {"block": 0, "queries": "img", "keys": "txt"}),
    }


def _register(family):
    """Registers a row, and forgets it."""
    from dit_lens.families import registry

    before = list(registry.REGISTERED)
    try:
        dl.register_family(family)
    finally:
        registry.REGISTERED[:] = before


def _studies(lens):
    call = {"num_inference_steps": 2}
    common = {
        "lens": lens,
        "prompts": ["red", "blue"],
        "k": 2,
        "seeds": [0],
        "site": "blocks.*.img",
        "batch_size": None,
        "out": None,
        "shard": None,
        "workers": None,
        **call,
    }
    scored = {"score": "rms", "draws": 1}
    pairs = {"pairs": [("red", "blue")], **{name: value for name, value in common.items() if name != "prompts"}}
    moved = {
        **scored,
        "strengths": [1.0],
        "channels_from": "source",
        "mask_from": None,
        "mask_block": None,
        "steps": None,
        "branch": "cond",
        "judge": None,
        "protocol": None,
    }
    return {
        "studies.disruption": (
            None,
            {
                **common,
                **scored,
                "steps": None,
                "ablation": "zero",
                "confounds": True,
                "distances": ["rmse"],
                "judge": None,
                "protocol": None,
            },
        ),
        "studies.blocks": (
            None,
            {
                **{name: value for name, value in common.items() if name != "k"},
                "parts": ["mlp"],
                "draws": 1,
                "steps": None,
                "ablation": "skip",
                "distances": ["rmse"],
                "judge": None,
            },
        ),
        "studies.organisation": (
            None,
            {
                **common,
                **scored,
                "steps": -1,
                "n_clusters": 2,
                "method": "minmax",
                "polarity": "heat",
                "masks": lambda image, prompt: np.eye(8, dtype=bool),
                "words": None,
                "protocol": None,
            },
        ),
        "studies.stability": (
            None,
            {**common, "scores": ["rms", "|mean|"], "steps": None, "stable": 0.9, "protocol": None},
        ),
        "studies.basis": (
            None,
            {
                **common,
                "energies": [0.5],
                "bases": ["components"],
                "draws": 1,
                "score": "rms",
                "steps": None,
                "ablation": "zero",
                "distances": ["rmse"],
                "judge": None,
            },
        ),
        "studies.write_attribution": (None, {**common, "site": "blocks.-1.img", "steps": None}),
        "studies.carrier_or_detail": (
            None,
            {
                **common,
                **scored,
                "ablation": "mean",
                "thresholds": dl.studies.Thresholds(),
                "judge": None,
                "attributes": None,
            },
        ),
        "studies.steering": (
            None,
            {
                **{name: value for name, value in pairs.items() if name not in ("k", "site")},
                "pairs": [("red", "blue"), ("one", "two")],
                "sites": "blocks.*.img",
                "strengths": [1.0],
                "directions": None,
                "draws": 1,
                "steps": None,
                "judge": None,
                "attributes": None,
            },
        ),
        "studies.transfer": (None, {**pairs, **moved}),
        "studies.transfer_image": (
            None,
            {
                **pairs,
                **moved,
                "pairs": [(image(0, 32), "blue")],
                "how": "noised",
                "captions": None,
                "height": 32,
                "width": 32,
            },
        ),
        "studies.patching": (
            None,
            {
                **pairs,
                "over": "block x step",
                "metric": gradients.nearness,
                "attribute": (),
                "site": None,
                "steps": None,
                "branch": "cond",
                "draws": 1,
                "score": "rms",
                "tiles": 2,
                "judge": None,
                "batch_size": 4,
            },
        ),
        "studies.sweep": (
            None,
            {
                "study": "stability",
                "lens": lens,
                "prompts": ["red"],
                "over": {"k": [1, 2]},
                "out": None,
                "num_inference_steps": 2,
            },
        ),
    }


def tiny_lens():
    return DiTLens(pipelines.flux(), defaults=dict(pipelines.CALL))
