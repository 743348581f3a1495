"""What a training leaves on its way (``train-toy --keep-every``): its transformer after so many iterations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file

from dit_lens.core.runs.files import file_inside, find_folder, read_json, report_damage
from dit_lens.errors import StoreError
from dit_lens.toys import quiet_loading
from dit_lens.toys.kinds import kind
from dit_lens.toys.stages import STAGES, normalise_latents

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"


def list_iterations(folder: Path) -> list[int]:
    """The iterations after which a training kept its transformer, in order; StoreError if it kept none.

    folder: what ``train-toy --out`` named.
    """
    found = sorted(int(one.name) for one in find_folder(folder / "kept").glob("[0-9]*") if one.name.isdecimal())
    if not found:
        raise StoreError(
            f"{folder} holds no transformers of a training: there is no {folder / 'kept'}/000000. Name a folder that "
            "dit-lens train-toy --keep-every N --out DIR has written."
        )
    return found


def build_pipeline(folder: Path) -> tuple[str, DiffusionPipeline]:
    """The kind of a toy that is or was in training, and its pipeline: what was trained before the transformer.

    The transformer is that of the beginning, until :func:`load_iteration` gives it another. A training that goes on can
    be read, since the text encoders and the autoencoder are finished when the first transformer is kept.

    folder: what ``train-toy --out`` named.
    """
    last = find_folder(folder / f"checkpoint-{STAGES[-1].name}")
    settings = read_json(file_inside(last, "progress.json"), "a training checkpoint")["settings"]
    name = settings.get("toy", "flux")
    toy = kind(name)
    pipe = toy.build(settings["seed"])
    for stage_class in STAGES[:-1]:
        checkpoint = find_folder(folder / f"checkpoint-{stage_class.name}")
        with report_damage(checkpoint, "Restore it from a copy, or train again."):
            stage = stage_class(toy, pipe)
            stage.net.load_state_dict(load_file(file_inside(checkpoint, "ema.safetensors")))
        stage.net.eval().requires_grad_(False)
    normalise_latents(toy, pipe)
    pipe.transformer.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return name, pipe


def load_iteration(pipe: DiffusionPipeline, folder: Path, iteration: int) -> None:
    """Gives a pipeline the transformer of an iteration.

    pipe: of :func:`build_pipeline`.
    folder: what ``train-toy --out`` named.
    iteration: one of :func:`list_iterations`.
    """
    kept = find_folder(folder / "kept" / f"{iteration:06d}")
    with report_damage(kept, "Restore it from a copy, or train again."), quiet_loading():
        pipe.transformer.load_state_dict(load_file(file_inside(kept, WEIGHTS)))
