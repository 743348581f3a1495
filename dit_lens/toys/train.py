"""Trains a toy from scratch on images that are drawn during training: text encoders, autoencoder, then transformer.

Every random number and learning rate depends on (seed, stage, iteration) only, so a run that was interrupted and
resumed from its last checkpoint gives the same result as one that was not, and so does a slower machine.
"""

from __future__ import annotations

import copy
import math
import platform
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from dit_lens.arguments.checks import checked, checked_fields
from dit_lens.arguments.numbers import MOST, check_number
from dit_lens.core.request.call import prepare_call
from dit_lens.core.request.values import check_device
from dit_lens.core.runs.files import (
    check_folder,
    check_place,
    file_inside,
    find_folder,
    read_json,
    report_damage,
    report_unwritten,
    whole_folder,
    write_json,
)
from dit_lens.errors import DitLensError, StoreError
from dit_lens.toys import quiet_loading
from dit_lens.toys.kinds import kind
from dit_lens.toys.quality import measure_shares
from dit_lens.toys.scenes import VOCABULARY, Scene, sample_scenes
from dit_lens.toys.stages import STAGES, Stage, normalise_latents

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

ITERATIONS = {"text": 2000, "autoencoder": 1200}  # of the stages before the transformer's
EMA = 0.998  # decay of the moving average of the weights
WARMUP = 100  # iterations in which the learning rate rises
STABLE = 0.65  # share of a stage's iterations after which the learning rate falls
CHECKPOINT_SECONDS = 120.0
SAMPLE_SECONDS = 900.0
# What the folders of a checkpoint, of a kept transformer and of a finished toy have.
CHECKPOINT = r"progress\.json|(weights|ema|optimizer)\.safetensors"
TRANSFORMER = r"config\.json|diffusion_pytorch_model\.safetensors"
PIPELINE = (
    r"(model_index|dit_lens)\.json|README\.md|"
    r"(scheduler|transformer|vae|(tokenizer|text_encoder)(_\d)?)/[\w.-]+\.(json|safetensors)"
)
MEASURE_EVERY = 500  # iterations between two measurements for --until
MEASURED = 64  # held-out prompts of one
NAMES = [stage.name for stage in STAGES]


@checked_fields
@dataclass(frozen=True)
class Settings:
    """Settings of a training run; stored with its checkpoints and in the model card.

    seed: seed of the initial weights and of all random numbers.
    iterations: of the transformer's stage.
    until: share of right answers at which the transformer's training ends earlier, for the attribute that is worst in
      images of held-out prompts; None: never.
    keep_every: iterations after which the transformer is kept in ``kept``, as it is then; 0: never.
    device: name of the device, such as "cpu" or "cuda".
    batch: number of images per iteration.
    rate: learning rate before it falls.
    toy: kind of the toy, one of ``KINDS``.
    """

    seed: int = 0
    iterations: int = 8000
    until: float | None = None
    keep_every: int = 0
    device: str = "cpu"
    batch: int = 16
    rate: float = 1e-3
    toy: str = "flux"

    def __post_init__(self) -> None:
        check_number("iterations", self.iterations, 1, 2**31)
        check_number("batch", self.batch, 1, MOST)
        check_number("keep_every", self.keep_every, 0)
        check_number("rate", self.rate, 0, open_ends=True)
        check_number("until", 1.0 if self.until is None else self.until, 0, 1)


@dataclass
class Progress:
    """Progress of a stage.

    iteration: number of finished iterations.
    seconds: training time so far, without interruptions.
    loss: moving average of the loss.
    sampled: value of ``seconds`` when sample images were last drawn.
    reached: whether the quality was reached that ends the stage earlier.
    """

    iteration: int = 0
    seconds: float = 0.0
    loss: float = float("nan")
    sampled: float = 0.0
    reached: bool = False


@checked
def train(out: str | Path, settings: Settings, *, resume: bool = False) -> DiffusionPipeline:
    """Trains a toy and returns its pipeline.

    out: folder to write: ``checkpoint-*``, ``samples``, ``kept``, and at the end ``pipeline``.
    settings: settings of the run.
    resume: continues from the checkpoints in ``out``. Without it, StoreError is raised if there are any.
    """
    check_device(settings.device)
    out = Path(out)
    for name in NAMES:
        check_folder(out / f"checkpoint-{name}", "progress.json")
    check_folder(out / "pipeline", "dit_lens.json")
    for part in ("samples", "kept"):
        check_place(out / part / "000000")
    if not resume and any(find_folder(out / f"checkpoint-{name}").exists() for name in NAMES):
        raise StoreError(
            f"{out} holds the checkpoints of a training run. Pass --resume to continue it, or choose another folder."
        )
    toy = kind(settings.toy)
    pipe = toy.build(settings.seed).to(settings.device)
    history = {}
    for number, stage_class in enumerate(STAGES):
        torch.manual_seed(settings.seed + number)
        pipe.transformer.requires_grad_(stage_class.name == "transformer")
        stage = stage_class(toy, pipe)
        history[stage.name] = fit(stage, pipe, out, settings)
        if stage.name == "autoencoder":
            normalise_latents(toy, pipe)
    return export(pipe, out, settings, history)


def fit(stage: Stage, pipe: DiffusionPipeline, out: Path, settings: Settings) -> Progress:
    """Trains one stage: AdamW with warm-up, a constant rate and cosine decay; moving average (EMA) of the weights.

    stage: the stage to train; its modules have the averaged weights at the end.
    pipe: pipeline that the stage belongs to, for sample images.
    out: folder to write; a checkpoint every two minutes.
    settings: settings of the run. A finished run that is resumed with more iterations trains its transformer further.
    """
    folder, last = out / f"checkpoint-{stage.name}", stage.name == "transformer"
    optimizer = torch.optim.AdamW(stage.net.parameters(), settings.rate, betas=(0.9, 0.99), weight_decay=0.01)
    ema = {name: value.clone() for name, value in stage.net.state_dict().items()}
    progress = _restore(find_folder(folder), stage.net, ema, optimizer, settings)
    total, saved = settings.iterations if last else ITERATIONS[stage.name], progress.seconds
    stage.net.train()
    if last and progress.iteration == 0:
        _keep(pipe, ema, out, settings, 0)
    with tqdm(total=total, initial=min(progress.iteration, total), desc=stage.name, leave=True) as bar:
        while progress.iteration < total and not progress.reached:
            start = time.monotonic()
            optimizer.param_groups[0]["lr"] = settings.rate * _rate_factor(progress.iteration, total)
            loss = _step(stage, optimizer, settings, progress.iteration)
            _update_average(ema, stage.net, progress.iteration)
            progress.iteration += 1
            progress.loss = loss if math.isnan(progress.loss) else 0.98 * progress.loss + 0.02 * loss
            progress.seconds += time.monotonic() - start
            bar.update()
            bar.set_postfix(loss=f"{progress.loss:.4f}")
            if last:
                _keep(pipe, ema, out, settings, progress.iteration)
                progress.reached = _is_reached(pipe, ema, settings, progress.iteration)
            ends = progress.iteration == total or progress.reached
            if ends or progress.seconds - saved > CHECKPOINT_SECONDS:
                saved = progress.seconds
                _save_checkpoint(folder, stage.net, ema, optimizer, progress, settings)
            if last and (ends or progress.seconds - progress.sampled > SAMPLE_SECONDS):
                progress.sampled = progress.seconds
                _save_samples(pipe, ema, out / "samples" / f"{progress.iteration:06d}.png", settings)
    stage.net.load_state_dict(ema)
    stage.net.eval().requires_grad_(False)
    return progress


def export(pipe: DiffusionPipeline, out: Path, settings: Settings, history: dict[str, Progress]) -> DiffusionPipeline:
    """Writes ``out/pipeline``: the folder of diffusers (transformer in half precision) and the toy's own JSON file.

    pipe: the trained pipeline, which is returned.
    out: folder of the training run.
    settings: settings of the run.
    history: name of a stage -> its final progress, for the model card.
    """
    with whole_folder(out / "pipeline", mark="dit_lens.json", own=PIPELINE) as folder, quiet_loading():
        pipe.save_pretrained(folder)
        pipe.transformer.half().save_pretrained(folder / "transformer")
        pipe.transformer.float()
        training = {
            "seed": settings.seed,
            "batch": settings.batch,
            "rate": settings.rate,
            "hardware": hardware(settings.device),
            "stages": {
                name: {"iterations": p.iteration, "seconds": round(p.seconds), "loss": round(p.loss, 5)}
                for name, p in history.items()
            },
        }
        call = kind(settings.toy).CALL
        stored = {"format": 1, "toy": settings.toy, "call": call, "vocabulary": list(VOCABULARY), "training": training}
        write_json(folder / "dit_lens.json", stored)
    return pipe


def hardware(device: str) -> str:
    """Returns the name of the machine's processor, for a model card."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'' if threads == 1 else 's'} ({platform.machine()})"


def _rate_factor(iteration: int, total: int) -> float:
    """Returns the learning rate relative to its maximum. total: iterations of the stage."""
    decay = min(1.0, max(0.0, (iteration / total - STABLE) / (1 - STABLE)))
    return min(1.0, (iteration + 1) / WARMUP) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * decay)))


def _step(stage: Stage, optimizer: torch.optim.Optimizer, settings: Settings, iteration: int) -> float:
    """Trains on one batch and returns its loss. Raises DitLensError if the loss is not finite."""
    number = NAMES.index(stage.name)
    seed = int(np.random.SeedSequence([settings.seed, number, iteration]).generate_state(1)[0])
    scenes = sample_scenes(settings.batch, seed=seed)
    loss = stage.loss(scenes, seed, torch.Generator().manual_seed(seed))
    loss.backward()
    nn.utils.clip_grad_norm_(stage.net.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if not math.isfinite(value := loss.item()):
        raise DitLensError(
            f"the loss became {value} at iteration {iteration}. Resume from the last checkpoint with a lower --rate."
        )
    return value


@torch.no_grad()
def _update_average(ema: dict[str, Tensor], net: nn.Module, iteration: int) -> None:
    """Updates the exponential moving average of the weights, in place."""
    # A lower decay at first, so that the random initial weights are soon forgotten.
    decay = min(EMA, (1 + iteration) / (10 + iteration))
    for name, value in net.state_dict().items():
        if value.is_floating_point():
            ema[name].lerp_(value, 1 - decay)
        else:
            ema[name].copy_(value)


def _save_checkpoint(
    folder: Path,
    net: nn.Module,
    ema: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    settings: Settings,
) -> None:
    """Writes everything that resuming needs.

    folder: folder of the checkpoint, which is replaced as a whole.
    net: the modules of the stage.
    ema: name -> averaged weight.
    optimizer: its moments are saved.
    progress: progress of the stage.
    settings: settings of the run.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in net.named_parameters()}
    moments = {f"{names[p]}|{key}": value for p, state in optimizer.state.items() for key, value in state.items()}
    with whole_folder(folder, mark="progress.json", own=CHECKPOINT) as fresh:
        save_file({k: v.contiguous().clone() for k, v in net.state_dict().items()}, fresh / "weights.safetensors")
        save_file({k: v.contiguous() for k, v in ema.items()}, fresh / "ema.safetensors")
        save_file({k: v.contiguous() for k, v in moments.items()}, fresh / "optimizer.safetensors")
        write_json(fresh / "progress.json", {"progress": asdict(progress), "settings": asdict(settings)})


def _restore(
    folder: Path, net: nn.Module, ema: dict[str, Tensor], optimizer: torch.optim.Optimizer, settings: Settings
) -> Progress:
    """Loads a checkpoint into the modules, their averages and the optimizer; the arguments are those it was saved with.

    folder: of the checkpoint.
    net: gets the weights.
    ema: name -> average of the weights, which gets the averages.
    optimizer: gets its moments.
    settings: of the training, which the checkpoint must fit.
    Returns the progress of the stage; if the folder does not exist, that of a new one. Raises StoreError if the
    checkpoint is of another kind of toy.
    """
    if not folder.exists():
        return Progress()
    with report_damage(folder, "Start again without --resume, in a new folder."):
        return _load_checkpoint(folder, net, ema, optimizer, settings)


def _load_checkpoint(
    folder: Path, net: nn.Module, ema: dict[str, Tensor], optimizer: torch.optim.Optimizer, settings: Settings
) -> Progress:
    """What :func:`_restore` reads of a folder that exists."""
    stored = read_json(file_inside(folder, "progress.json"), "a training checkpoint")
    if (toy := stored["settings"].get("toy", "flux")) != settings.toy:
        raise StoreError(
            f"{folder} is a checkpoint of the toy {toy!r}, not of {settings.toy!r}. Choose another folder."
        )
    progress = Progress(**stored["progress"])
    net.load_state_dict(load_file(file_inside(folder, "weights.safetensors")))
    for name, value in load_file(file_inside(folder, "ema.safetensors")).items():
        ema[name].copy_(value)
    parameters = dict(net.named_parameters())
    for key, value in load_file(file_inside(folder, "optimizer.safetensors")).items():
        name, moment = key.rsplit("|", 1)
        state = optimizer.state[parameters[name]]
        state[moment] = value.to(parameters[name].device) if moment != "step" else value
    return progress


@contextmanager
def _averaged(pipe: DiffusionPipeline, ema: dict[str, Tensor]) -> Generator[None]:
    """The transformer has its averaged weights inside. ema: name -> averaged weight."""
    training = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    pipe.transformer.load_state_dict(ema)
    try:
        yield
    finally:
        pipe.transformer.load_state_dict(training)


def _keep(pipe: DiffusionPipeline, ema: dict[str, Tensor], out: Path, settings: Settings, iteration: int) -> None:
    """Writes the averaged transformer, in half precision, to a folder of its own where it is due."""
    if not settings.keep_every or iteration % settings.keep_every:
        return
    folder = out / "kept" / f"{iteration:06d}"
    with _averaged(pipe, ema), whole_folder(folder, mark="config.json", own=TRANSFORMER) as fresh, quiet_loading():
        copy.deepcopy(pipe.transformer).half().save_pretrained(fresh)


def _is_reached(pipe: DiffusionPipeline, ema: dict[str, Tensor], settings: Settings, iteration: int) -> bool:
    """Whether images of held-out prompts are good enough to end; measured where it is due."""
    if settings.until is None or iteration % MEASURE_EVERY:
        return False
    scenes = sample_scenes(MEASURED, seed=1, held_out=True)
    images = [image for i in range(0, MEASURED, 8) for image in _draw(pipe, ema, scenes[i : i + 8], settings)]
    return min(share for share, *_ in measure_shares(scenes, images).values()) >= settings.until


def _save_samples(pipe: DiffusionPipeline, ema: dict[str, Tensor], path: Path, settings: Settings) -> None:
    """Saves a strip of held-out scenes. path: PNG file to write."""
    from PIL import Image

    images = _draw(pipe, ema, sample_scenes(8, seed=0, held_out=True), settings)
    strip = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    for i, image in enumerate(images):
        strip.paste(image, (i * image.width, 0))
    with report_unwritten(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        strip.save(path)


@torch.no_grad()
def _draw(pipe: DiffusionPipeline, ema: dict[str, Tensor], scenes: list[Scene], settings: Settings) -> list[Any]:
    """Images of scenes, drawn with the averaged weights and the same noise. ema: name -> averaged weight."""
    call = prepare_call(
        pipe,
        [scene.caption for scene in scenes],
        seed=[0] * len(scenes),
        num_inference_steps=None,
        defaults=kind(settings.toy).CALL,
        vocabulary=VOCABULARY,
        call={},
    )
    pipe.set_progress_bar_config(disable=True)
    with _averaged(pipe, ema):
        return pipe(**call.keywords()).images
