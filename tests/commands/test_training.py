"""Massive channels over a training: every kept transformer is the one that was trained, and has its numbers."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from dit_lens import DiTLens, plots, studies
from dit_lens.commands.chapters import Size
from dit_lens.commands.training import measure, training
from dit_lens.errors import OpError, StoreError
from dit_lens.toys import stages, train
from dit_lens.toys.kept import build_pipeline, list_iterations, load_iteration
from dit_lens.toys.train import Settings

SIZE = Size(prompts=2, seeds=1, draws=1, k=4, call={"num_inference_steps": 1, "true_cfg_scale": 1.0})


@pytest.fixture(scope="module", autouse=True)
def few_pictures():
    """Latents are normalised by few pictures, in training and whenever a kept transformer is put beside its VAE."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "NORMALISED", 64)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training of two iterations that kept its transformer after each."""
    folder = tmp_path_factory.mktemp("trainings") / "flux-seed3"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "ITERATIONS", {"text": 1, "autoencoder": 1})
        patch.setattr(train, "SAMPLE_SECONDS", 1e9)
        patch.setattr(train, "_save_samples", lambda *_: None)
        train.train(folder, Settings(seed=3, iterations=2, batch=2, keep_every=2))
    return folder


def test_what_was_kept_last_is_the_finished_pipeline(trained, tmp_path):
    going_on = tmp_path / "flux-seed3"
    shutil.copytree(trained, going_on, ignore=shutil.ignore_patterns("pipeline"))
    assert list_iterations(going_on) == [0, 2]
    name, pipe = build_pipeline(going_on)
    assert name == "flux"
    finished = DiTLens.from_pretrained(trained / "pipeline").pipe
    before = pipe.transformer.state_dict()["proj_out.weight"].clone()
    load_iteration(pipe, going_on, 2)
    assert not torch.equal(before, pipe.transformer.state_dict()["proj_out.weight"])
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        ours, theirs = (getattr(one, part).state_dict() for one in (pipe, finished))
        assert all(torch.equal(ours[key].float(), theirs[key].float()) for key in theirs), part


def test_a_page_has_a_point_for_every_kept_transformer_and_goes_on(trained, tmp_path, monkeypatch):
    cells = tmp_path / "cells"
    page = training([trained], tmp_path / "page", size=SIZE, cells=cells)
    table = pd.read_csv(page.parent / "training.csv")
    assert table[["run", "iteration"]].to_numpy().tolist() == [["flux-seed3", i] for i in (0, 2)]
    said = page.read_text("utf-8")
    assert "| flux-seed3 | 2 | 2 |" in said
    finished = DiTLens.from_pretrained(trained / "pipeline")
    with finished.quiet():
        found = studies.disruption(finished, SIZE.texts, **SIZE.shared, draws=1, confounds=False)
    rmse = found.table.groupby("arm")["rmse"].mean()
    last = table.iloc[-1]
    assert last["damage"] == pytest.approx(rmse["top"] - rmse["energy-matched"], abs=1e-4)
    share = found.table.loc[found.table["arm"] == "top", "energy_share"].mean()
    assert last["energy_share"] == pytest.approx(share, abs=1e-4)
    assert np.isnan(last["iou"])  # two iterations draw nothing that could be read

    monkeypatch.setattr(DiTLens, "run", lambda *_, **__: pytest.fail("drawn again"))
    training([trained], tmp_path / "page", size=SIZE, cells=cells)
    assert pd.read_csv(page.parent / "training.csv").equals(table)


def test_a_toy_that_draws_has_an_overlap(toy):
    size = Size(prompts=2, seeds=1, draws=1, k=4, call={"num_inference_steps": 2, "true_cfg_scale": 1.0})
    with toy.quiet():
        line = measure(toy, size, None)
        found = studies.organisation(toy, size.texts, **size.shared, draws=1, words=[]).table
    means = found.groupby(["arm", "block", "prompt"])["iou"].mean().groupby(level=0).mean()
    assert line["iou"] == pytest.approx(means["top"])
    assert line["iou_random"] == pytest.approx(means["random"])
    assert line["fidelity"] > 0.5


def test_folders_that_cannot_be_followed(trained, tmp_path):
    with pytest.raises(StoreError, match=r"holds no transformers of a training.*--keep-every N"):
        training([tmp_path], tmp_path / "page")
    twin = tmp_path / "other" / trained.name
    shutil.copytree(trained, twin)
    with pytest.raises(StoreError, match="two of the folders have the same name"):
        training([trained, twin], tmp_path / "page")


def test_a_figure_has_a_line_for_every_run():
    rows = [
        {"run": f"seed {s}", "iteration": i, "n": 8, "fidelity": 0.5, "energy_share": 0.1 * s, "damage": i, "iou": 0.3}
        for s in range(5)
        for i in (0, 500)
    ]
    figure = plots.training_figure(pd.DataFrame(rows))
    assert [trace.name for trace in figure.data] == [f"seed {s}" for s in range(5)] * 4
    damage = figure.data[2 * 5 + 1]
    assert (list(damage.x), list(damage.y)) == ([0, 500], [0, 500])
    with pytest.raises(OpError, match="something other than numbers in a column of numbers"):
        plots.training_figure(pd.DataFrame(rows).assign(iou="none"))
    with pytest.raises(OpError, match="The summary lacks iou"):
        plots.training_figure(pd.DataFrame(rows).drop(columns="iou"))
    many = pd.concat([pd.DataFrame(rows).assign(run=str(i)) for i in range(9)])
    with pytest.raises(OpError, match="9 training runs are too many lines"):
        plots.training_figure(many)
