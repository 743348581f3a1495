"""How the models of a paper are run: repository, steps, size, guidance, precision and k, with whose choice each is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ARGUMENTS = ("num_inference_steps", "height", "width", "guidance_scale", "true_cfg_scale", "negative_prompt")
ARGUMENTS += ("max_sequence_length",)


@dataclass(frozen=True)
class Setting:
    """One choice of how a model is run.

    value: what was chosen; None leaves it to the pipeline.
    origin: whose choice it is, a key of ``protocols.ORIGINS``.
    why: reason, or what the source says.
    """

    value: Any
    origin: str
    why: str


@dataclass(frozen=True)
class ModelRow:
    """How one model is run.

    name: as the paper calls it.
    settings: "repository", "dtype", "k", and arguments of the pipeline.
    """

    name: str
    settings: dict[str, Setting]

    @property
    def repository(self) -> str:
        """Where its weights are, on the Hugging Face hub."""
        return self.settings["repository"].value

    @property
    def call(self) -> dict[str, Any]:
        """The arguments of the pipeline that it sets."""
        settings = {name: self.settings[name].value for name in ARGUMENTS if name in self.settings}
        return {name: value for name, value in settings.items() if value is not None}


_NAMED = "the paper names the model, and what could be had of it no repository: its makers' own"
_SIZE = Setting(1024, "default", "not stated by the paper; the size of diffusers, and the same for all five")
_DTYPE = Setting("bfloat16", "makers", "not stated by the paper")
_K = Setting(12, "ours", "not stated by the paper for this model; that of the reproduction on FLUX.2-klein")


def _make_row(name: str, repository: Setting, k: Setting = _K, dtype: Setting = _DTYPE, **call: Setting) -> ModelRow:
    size = {"height": call.pop("size", _SIZE)}
    return ModelRow(name, {"repository": repository, **size, "width": size["height"], **call, "dtype": dtype, "k": k})


# The paper's five models. Of how it runs them no more is known than that (the reproduction's own settings are of its
# configs), so defaults are those of diffusers 0.42 and of the model cards.
TURRI_2026 = (
    _make_row(
        "FLUX.1-dev",
        Setting("black-forest-labs/FLUX.1-dev", "ours", _NAMED),
        num_inference_steps=Setting(28, "default", "not stated; 28 (other models beside it) or 50 in the reproduction"),
        guidance_scale=Setting(3.5, "default", "not stated; the reproduction's too"),
    ),
    _make_row(
        "FLUX.1-schnell",
        Setting("black-forest-labs/FLUX.1-schnell", "ours", _NAMED),
        num_inference_steps=Setting(4, "makers", "not stated; the reproduction's too"),
        guidance_scale=Setting(0.0, "makers", "the model takes none"),
        max_sequence_length=Setting(256, "makers", "the model knows no longer texts"),
    ),
    _make_row(
        "FLUX.2-klein",
        Setting("black-forest-labs/FLUX.2-klein-4B", "ours", "4B or 9B is not known: the smaller"),
        k=Setting(12, "repro", "the authors state none"),
        dtype=Setting("bfloat16", "repro", "not stated by the paper"),
        size=Setting(1024, "repro", "not stated by the paper"),
        num_inference_steps=Setting(4, "repro", "not stated by the paper"),
        guidance_scale=Setting(None, "repro", "left to the pipeline, which ignores it for the distilled model"),
    ),
    _make_row(
        "Qwen-Image",
        Setting("Qwen/Qwen-Image", "ours", _NAMED),
        num_inference_steps=Setting(50, "default", "not stated"),
        true_cfg_scale=Setting(4.0, "default", "not stated; without a negative prompt the pipeline leaves it out"),
        negative_prompt=Setting(" ", "makers", "so that guidance is on"),
    ),
    _make_row(
        "SANA-1.5",
        Setting(
            "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers", "ours", "1.6B or 4.8B is not known: the smaller"
        ),
        num_inference_steps=Setting(20, "default", "not stated"),
        guidance_scale=Setting(4.5, "default", "not stated"),
    ),
)
