"""Training a toy from nothing, on images drawn as it goes: text encoders, autoencoder, then the transformer.

Every random number follows from (seed, stage, iteration), so a run that was killed goes on from its last checkpoint as
if nothing had happened.
"""

from __future__ import annotations

import math
import platform
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from dit_lens.core.request.call import prepare_call
from dit_lens.core.runs.files import read_json, recovered, whole_folder, write_json
from dit_lens.errors import DitLensError, StoreError
from dit_lens.toys.kinds import SHARES, Kind, kind
from dit_lens.toys.scenes import ATTRIBUTES, VALUES, VOCABULARY, Scene, draw, sample_scenes

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

CAPTION_DROPOUT = 0.1
KL_WEIGHT = 1e-6
EMA = 0.998
WARMUP = 100  # iterations
STABLE = 0.65  # share of a stage after which its learning rate falls
CHECKPOINT_SECONDS = 120.0
SAMPLE_SECONDS = 900.0


@dataclass(frozen=True)
class Settings:
    """What a training run is made of; stored with its checkpoints and in the model card."""

    seed: int = 0
    minutes: float = 120.0
    device: str = "cpu"
    batch: int = 16
    rate: float = 1e-3
    toy: str = "flux"


@dataclass
class Progress:
    """Where a stage stands: finished iterations, seconds of work, smoothed loss."""

    iteration: int = 0
    seconds: float = 0.0
    loss: float = float("nan")
    done: bool = False
    sampled: float = 0.0


class Stage(Protocol):
    """What :func:`fit` needs: the parameters to train, and the loss of one batch."""

    name: str

    @property
    def net(self) -> nn.Module: ...

    def loss(self, scenes: list[Scene], first: int, noise: torch.Generator, /) -> Tensor: ...


class TextStage:
    """Text encoders learn to say, of every word and of the whole caption, which attribute has which value."""

    name = "text"

    def __init__(self, toy: Kind, pipe: DiffusionPipeline):
        self.toy, self.pipe = toy, pipe
        classes = 1 + sum(len(values) for values in VALUES.values())
        self.word = nn.Linear(toy.TEXT_WIDTH, classes)
        self.caption = nn.ModuleDict({name: nn.Linear(toy.TEXT_WIDTH, len(of)) for name, of in VALUES.items()})
        encoders = toy.text_encoders(pipe)
        self.net = nn.ModuleDict({**encoders, "word": self.word, "caption": self.caption}).to(pipe.device)

    def loss(self, scenes: list[Scene], _first: int, _noise: torch.Generator) -> Tensor:
        words, caption = self.toy.features(self.toy.encode(self.pipe, [scene.caption for scene in scenes]))
        device = words.device
        values = torch.tensor([_indices(scene) for scene in scenes], device=device)  # [b, attribute]
        starts = torch.tensor(np.cumsum([1, *(len(v) for v in VALUES.values())])[:-1], device=device)
        labels = torch.zeros(words.shape[:2], dtype=torch.long, device=device)
        places = [self.toy.FIRST_WORD + i for i in (1, 2, 3, 4, 7, 8)]  # where the attributes stand in a caption
        labels[:, places] = values + starts
        whole = [F.cross_entropy(self.caption[name](caption), values[:, i]) for i, name in enumerate(ATTRIBUTES)]
        return F.cross_entropy(self.word(words).flatten(0, 1), labels.flatten()) + sum(whole) / len(whole)


class AutoencoderStage:
    """The VAE learns to reproduce images from 4096 numbers that are nearly normal (beta-VAE, L1)."""

    name = "autoencoder"

    def __init__(self, toy: Kind, pipe: DiffusionPipeline):
        self.toy, self.pipe = toy, pipe
        self.net = pipe.vae

    def loss(self, scenes: list[Scene], first: int, noise: torch.Generator) -> Tensor:
        images = pixels(scenes, first, self.net.device)
        posterior = self.toy.posterior(self.pipe, images)
        kept = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=noise).to(images)
        return F.l1_loss(self.toy.decode(self.pipe, kept), images) + KL_WEIGHT * posterior.kl().mean()


class TransformerStage:
    """Rectified flow: the transformer learns the velocity noise - image at sigma (Esser et al., arXiv 2403.03206)."""

    name = "transformer"

    def __init__(self, toy: Kind, pipe: DiffusionPipeline):
        self.toy, self.pipe = toy, pipe
        self.net = pipe.transformer

    def loss(self, scenes: list[Scene], first: int, noise: torch.Generator) -> Tensor:
        n = len(scenes)
        told = torch.rand(n, generator=noise) >= CAPTION_DROPOUT
        with torch.no_grad():
            captions = [scene.caption if t else "" for scene, t in zip(scenes, told, strict=True)]
            text = self.toy.encode(self.pipe, captions)
            clean = self.toy.to_latents(self.pipe, pixels(scenes, first, self.net.device))
        eps = torch.randn(clean.shape, generator=noise).to(clean)
        uniform = torch.sigmoid(torch.randn(n, generator=noise))
        sigma = (self.toy.SHIFT * uniform / (1 + (self.toy.SHIFT - 1) * uniform)).to(clean)
        mixed = torch.lerp(clean, eps, sigma[:, None, None, None])
        return F.mse_loss(self.toy.velocity(self.pipe, mixed, sigma, text), eps - clean)


def train(out: Path, settings: Settings, *, resume: bool = False) -> DiffusionPipeline:
    """Trains a toy into ``out``: ``checkpoint-*`` folders, ``samples``, and at the end ``pipeline``."""
    if not resume and any(recovered(out / f"checkpoint-{name}").exists() for name in SHARES):
        raise StoreError(
            f"{out} holds the checkpoints of a training run. Pass --resume to go on with it, or choose another folder."
        )
    toy = kind(settings.toy)
    pipe = toy.build(settings.seed).to(settings.device)
    history = {}
    for number, stage_class in enumerate((TextStage, AutoencoderStage, TransformerStage)):
        torch.manual_seed(settings.seed + number)
        pipe.transformer.requires_grad_(stage_class is TransformerStage)
        stage = stage_class(toy, pipe)
        history[stage.name] = fit(stage, pipe, out, settings, last=number == 2)
        if stage.name == "autoencoder":
            normalise_latents(toy, pipe)
    return export(pipe, out, settings, history)


def fit(stage: Stage, pipe: DiffusionPipeline, out: Path, settings: Settings, *, last: bool) -> Progress:
    """One stage: AdamW, warm-up, a stable rate, a cosine fall; EMA weights; a checkpoint every two minutes."""
    toy = kind(settings.toy)
    folder = out / f"checkpoint-{stage.name}"
    optimizer = torch.optim.AdamW(stage.net.parameters(), settings.rate, betas=(0.9, 0.99), weight_decay=0.01)
    ema = {name: value.clone() for name, value in stage.net.state_dict().items()}
    progress = _restore(recovered(folder), stage.net, ema, optimizer, settings)
    budget = 60 * settings.minutes * toy.SHARES[stage.name]
    saved, number = progress.seconds, list(SHARES).index(stage.name)
    stage.net.train()
    with tqdm(
        total=round(budget), initial=round(min(progress.seconds, budget)), unit="s", desc=stage.name, leave=True
    ) as bar:
        while progress.seconds < budget and not (progress.done and not last):
            began = time.monotonic()
            share = progress.seconds / budget
            optimizer.param_groups[0]["lr"] = settings.rate * _schedule(progress.iteration, share)
            loss = _step(stage, optimizer, settings, number, progress.iteration)
            _average(ema, stage.net, progress.iteration)
            progress.iteration += 1
            progress.loss = loss if math.isnan(progress.loss) else 0.98 * progress.loss + 0.02 * loss
            progress.seconds += time.monotonic() - began
            progress.done = progress.seconds >= budget
            bar.update(max(0, round(min(progress.seconds, budget)) - bar.n))
            bar.set_postfix(iteration=progress.iteration, loss=f"{progress.loss:.4f}")
            if progress.done or progress.seconds - saved > CHECKPOINT_SECONDS:
                saved = progress.seconds
                _checkpoint(folder, stage.net, ema, optimizer, progress, settings)
                if stage.name == "transformer" and (
                    progress.done or progress.seconds - progress.sampled > SAMPLE_SECONDS
                ):
                    progress.sampled = progress.seconds
                    _sample(pipe, ema, out / "samples" / f"{progress.iteration:06d}.png", toy.CALL)
    stage.net.load_state_dict(ema)
    stage.net.eval().requires_grad_(False)
    return progress


def pixels(scenes: list[Scene], first: int, device: torch.device | str) -> Tensor:
    """Drawn images [b, 3, 64, 64] in [-1, 1]; ``first`` numbers the drawings, so that no two are alike."""
    drawn = np.stack([np.asarray(draw(scene, first + i).image) for i, scene in enumerate(scenes)])
    return torch.from_numpy(drawn).to(device).permute(0, 3, 1, 2) / 127.5 - 1


@torch.no_grad()
def normalise_latents(toy: Kind, pipe: DiffusionPipeline) -> None:
    """Sets the VAE's constants so that latents of drawn images have mean 0 and variance 1."""
    toy.normalise(pipe, toy.posterior(pipe, pixels(sample_scenes(256, seed=1), 0, pipe.device)).mode())


def export(pipe: DiffusionPipeline, out: Path, settings: Settings, history: dict[str, Progress]) -> DiffusionPipeline:
    """Writes ``out/pipeline``: the diffusers folder (transformer in half precision) and the toy's own file."""
    with whole_folder(out / "pipeline") as folder:
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
    """The machine in words, for a model card."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'' if threads == 1 else 's'} ({platform.machine()})"


def _indices(scene: Scene) -> list[int]:
    return [VALUES[name].index(value) for name, value in zip(ATTRIBUTES, astuple(scene), strict=True)]


def _schedule(iteration: int, share: float) -> float:
    fall = max(0.0, (share - STABLE) / (1 - STABLE))
    return min(1.0, (iteration + 1) / WARMUP) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, fall))))


def _step(stage: Stage, optimizer: torch.optim.Optimizer, settings: Settings, number: int, iteration: int) -> float:
    entropy = int(np.random.SeedSequence([settings.seed, number, iteration]).generate_state(1)[0])
    scenes = sample_scenes(settings.batch, seed=entropy)
    loss = stage.loss(scenes, entropy, torch.Generator().manual_seed(entropy))
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
def _average(ema: dict[str, Tensor], net: nn.Module, iteration: int) -> None:
    decay = min(EMA, (1 + iteration) / (10 + iteration))
    for name, value in net.state_dict().items():
        if value.is_floating_point():
            ema[name].lerp_(value, 1 - decay)
        else:
            ema[name].copy_(value)


def _checkpoint(
    folder: Path,
    net: nn.Module,
    ema: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    settings: Settings,
) -> None:
    names: dict[Tensor, str] = {parameter: name for name, parameter in net.named_parameters()}
    moments = {f"{names[p]}|{key}": value for p, state in optimizer.state.items() for key, value in state.items()}
    with whole_folder(folder) as fresh:
        save_file({k: v.contiguous().clone() for k, v in net.state_dict().items()}, fresh / "weights.safetensors")
        save_file({k: v.contiguous() for k, v in ema.items()}, fresh / "ema.safetensors")
        save_file({k: v.contiguous() for k, v in moments.items()}, fresh / "optimizer.safetensors")
        write_json(fresh / "progress.json", {"progress": vars(progress), "settings": vars(settings)})


def _restore(
    folder: Path, net: nn.Module, ema: dict[str, Tensor], optimizer: torch.optim.Optimizer, settings: Settings
) -> Progress:
    if not folder.exists():
        return Progress()
    stored = read_json(folder / "progress.json", "a training checkpoint")
    if (toy := stored["settings"].get("toy", "flux")) != settings.toy:
        raise StoreError(
            f"{folder} is a checkpoint of the toy {toy!r}, not of {settings.toy!r}. Choose another folder."
        )
    progress = Progress(**stored["progress"])
    net.load_state_dict(load_file(folder / "weights.safetensors"))
    for name, value in load_file(folder / "ema.safetensors").items():
        ema[name].copy_(value)
    parameters = dict(net.named_parameters())
    for key, value in load_file(folder / "optimizer.safetensors").items():
        name, moment = key.rsplit("|", 1)
        state = optimizer.state[parameters[name]]
        state[moment] = value.to(parameters[name].device) if moment != "step" else value
    return progress


@torch.no_grad()
def _sample(pipe: DiffusionPipeline, ema: dict[str, Tensor], path: Path, defaults: dict[str, Any]) -> None:
    """A strip of held-out scenes drawn by the averaged weights; the weights in training are left as they are."""
    from PIL import Image

    training = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    pipe.transformer.load_state_dict(ema)
    pipe.set_progress_bar_config(disable=True)
    captions = [scene.caption for scene in sample_scenes(8, seed=0, held_out=True)]
    call = prepare_call(
        pipe, captions, seed=[0] * 8, num_inference_steps=None, defaults=defaults, vocabulary=VOCABULARY, call={}
    )
    images = pipe(**call.keywords()).images
    pipe.transformer.load_state_dict(training)
    strip = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    for i, image in enumerate(images):
        strip.paste(image, (i * image.width, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    strip.save(path)
