"""Training: every stage runs, an interrupted run can be resumed, and the model card has what was measured."""

import itertools
import shutil

import pytest
import torch
from safetensors.torch import load_file

from dit_lens.commands import evaluate_toy as evaluate
from dit_lens.core.runs.files import read_json
from dit_lens.errors import StoreError
from dit_lens.lens import DiTLens
from dit_lens.toys import stages, train
from dit_lens.toys.kinds import KINDS, kind
from dit_lens.toys.stages import TransformerStage
from dit_lens.toys.train import Settings

SETTINGS = Settings(iterations=7, batch=2)


@pytest.fixture(scope="module", autouse=True)
def clock():
    """Every iteration takes half a second, so that a checkpoint is written after two."""
    ticks = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.time, "monotonic", lambda: next(ticks) / 2)
        patch.setattr(train, "CHECKPOINT_SECONDS", 0.9)
        patch.setattr(train, "ITERATIONS", {"text": 1, "autoencoder": 1})
        patch.setattr(stages, "NORMALISED", 8)
        for toy in map(kind, KINDS):
            patch.setattr(toy, "CALL", {**toy.CALL, "num_inference_steps": 1})
        yield


@pytest.fixture(scope="module")
def finished(clock, tmp_path_factory):
    """The folder of a training without interruption; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("training") / "whole"
    train.train(folder, SETTINGS)
    return folder


def interrupt_at(iteration, monkeypatch):
    """Makes one iteration of the transformer's training raise KeyboardInterrupt, as Ctrl-C does."""
    loss, iterations = TransformerStage.loss, itertools.count()

    def interrupted(*arguments):
        if next(iterations) == iteration:
            raise KeyboardInterrupt
        return loss(*arguments)

    monkeypatch.setattr(TransformerStage, "loss", interrupted)


def test_a_resumed_run_gives_the_result_of_one_without_interruption(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(5, patch)
        with pytest.raises(KeyboardInterrupt):
            train.train(tmp_path / "stopped", SETTINGS)
    saved = read_json(tmp_path / "stopped" / "checkpoint-transformer" / "progress.json", "progress")
    assert saved["progress"]["iteration"] in (4, 5)
    with pytest.raises(StoreError, match="--resume"):
        train.train(tmp_path / "stopped", SETTINGS)
    train.train(tmp_path / "stopped", SETTINGS, resume=True)
    whole, stopped = (
        load_file(tmp_path / name / "checkpoint-transformer" / "ema.safetensors") for name in ("whole", "stopped")
    )
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert list((tmp_path / "whole" / "samples").glob("*.png"))

    lens = DiTLens.from_pretrained(tmp_path / "whole" / "pipeline")
    assert lens.vocabulary
    assert lens.defaults["height"] == 64
    quality = evaluate.evaluate(tmp_path / "whole" / "pipeline", prompts=2)
    evaluate.write_card(tmp_path / "whole" / "pipeline", quality)
    card = (tmp_path / "whole" / "pipeline" / "README.md").read_text()
    assert "missed by" in card
    assert "| transformer | 7 |" in card
    assert "missed by" in evaluate.report(quality)
    assert read_json(tmp_path / "whole" / "pipeline" / "dit_lens.json", "card")["quality"]["prompts"] == 2


def test_more_iterations_train_only_the_last_stage_further(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before = {name: load_file(tmp_path / f"checkpoint-{name}" / "weights.safetensors") for name in train.NAMES}
    train.train(tmp_path, Settings(iterations=9, batch=2), resume=True)
    after = {name: load_file(tmp_path / f"checkpoint-{name}" / "weights.safetensors") for name in train.NAMES}
    changed = {
        name: any(not torch.equal(before[name][key], after[name][key]) for key in before[name]) for name in before
    }
    assert changed == {"text": False, "autoencoder": False, "transformer": True}


def test_transformers_are_kept_along_the_way(tmp_path):
    train.train(tmp_path, Settings(iterations=4, batch=2, keep_every=2))
    kept = sorted((tmp_path / "kept").glob("[0-9]*"))
    assert [folder.name for folder in kept] == ["000000", "000002", "000004"]
    first, *_, last = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in kept)
    built = kind("flux").build(0).transformer.half().state_dict()
    assert all(torch.equal(first[name], built[name]) for name in built)
    final = load_file(tmp_path / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(last[name], final[name]) for name in final)
    assert any(not torch.equal(first[name], last[name]) for name in first)


def test_training_ends_when_the_quality_is_reached(tmp_path, monkeypatch):
    """The share of the worst attribute, measured after every second iteration: 0.5, 0.9, 1.0."""
    shares = iter([0.5, 0.9, 1.0])
    monkeypatch.setattr(train, "MEASURE_EVERY", 2)
    monkeypatch.setattr(train, "MEASURED", 2)
    monkeypatch.setattr(train, "measure_shares", lambda *_: {"size": (1.0, 0, 1), "shape": (next(shares), 0, 1)})
    settings = Settings(iterations=50, batch=2, until=0.9)
    train.train(tmp_path, settings)
    train.train(tmp_path, settings, resume=True)  # finished: nothing is left to do
    assert read_json(tmp_path / "checkpoint-transformer" / "progress.json", "progress")["progress"]["iteration"] == 4


@pytest.mark.parametrize("name", KINDS[1:])
def test_the_other_toys_are_trained_the_same_way(tmp_path, name):
    train.train(tmp_path, Settings(iterations=4, batch=2, toy=name))
    assert list((tmp_path / "samples").glob("*.png"))
    lens = DiTLens.from_pretrained(tmp_path / "pipeline")
    assert lens.defaults == kind(name).CALL
    evaluate.write_card(tmp_path / "pipeline", evaluate.evaluate(tmp_path / "pipeline", prompts=2))
    card = (tmp_path / "pipeline" / "README.md").read_text()
    for words in (f"# A {kind(name).TITLE} toy", f"`{type(lens.pipe).__name__}`", f"train-toy {name}`", "missed by"):
        assert words in card
    assert kind(name).NOTES in card
