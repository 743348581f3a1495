"""How to load a pipeline into the memory of a GPU: what every way needs, by arithmetic on parameter counts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dit_lens.arguments.checks import checked
from dit_lens.core.plan.cost import format_bytes
from dit_lens.errors import FamilyError, OpError, PromptError
from dit_lens.families import find_by_pipeline
from dit_lens.instruments.loading_code import LoadingCode
from dit_lens.instruments.text_embeddings import list_encoded
from dit_lens.instruments.weights import BYTES, Component, measure_parts
from dit_lens.old_names import find_old_names, renamed_keywords

if TYPE_CHECKING:
    import pandas as pd
    from diffusers import DiffusionPipeline

__getattr__ = find_old_names(__name__, {"Choice": "LoadingChoice", "Part": "dit_lens.instruments.weights.Component"})

GB = 1e9
CONTEXT = 0.6 * GB  # CUDA itself
# One image of 1024 x 1024. FLUX.1-dev's transformer alone takes 22.63 GiB, of which 22.17 are weights (diffusers'
# own benchmarks); its autoencoder takes about 4.7 GiB at the end, unless it decodes in tiles.
DENOISING = 0.6 * GB
DECODING = 5.0 * GB


@dataclass(frozen=True)
class LoadingChoice:
    """One way to load a pipeline, and the bytes on the GPU in each phase of a run.

    name: what it is called.
    encode, denoise, decode: bytes while prompts are encoded, while the transformer works, while images are drawn.
    exact: whether activations are those of the bf16 weights.
    note: what it costs.
    lines: Python that loads it.
    """

    name: str
    encode: float
    denoise: float
    decode: float
    exact: bool
    note: str
    lines: str

    @property
    def peak(self) -> float:
        """The bytes of the phase that needs most."""
        return max(self.encode, self.denoise, self.decode)


@dataclass(frozen=True)
class Recommendation:
    """Ways to load a pipeline into ``gb`` gigabytes, the fastest first.

    model: the pipeline's folder or repository.
    gb: of the GPU's memory.
    parts: what the pipeline is made of.
    choices: every way to load it.
    """

    model: str
    gb: float
    parts: tuple[Component, ...]
    choices: tuple[LoadingChoice, ...]

    def fits(self, choice: LoadingChoice) -> bool:
        """Whether a choice fits into the GPU's memory."""
        return choice.peak <= self.gb * GB

    @property
    def best(self) -> LoadingChoice | None:
        """The fastest choice that fits; None if nothing does."""
        return next((choice for choice in self.choices if self.fits(choice)), None)

    @property
    def exact(self) -> LoadingChoice | None:
        """The fastest that fits and does not change activations; None if there is none."""
        return next((choice for choice in self.choices if self.fits(choice) and choice.exact), None)

    @property
    def lines(self) -> str:
        """The Python that loads the best choice."""
        if self.best is None:
            least = min(self.choices, key=lambda choice: choice.peak)
            raise OpError(
                f"nothing fits into {self.gb:g} GB: the least is {format_bytes(least.peak)} ({least.name}). Draw "
                "smaller images (side=), decode in tiles (lens.pipe.vae.enable_tiling()), or use a larger GPU."
            )
        return self.best.lines

    @property
    def table(self) -> pd.DataFrame:
        """Gigabytes on the GPU in every phase, by choice."""
        import pandas as pd

        rows = [
            {
                "choice": choice.name,
                **{phase: getattr(choice, phase) / GB for phase in ("encode", "denoise", "decode", "peak")},
                "fits": self.fits(choice),
                "exact": choice.exact,
                "note": choice.note,
            }
            for choice in self.choices
        ]
        return pd.DataFrame(rows)

    @property
    def weights(self) -> pd.DataFrame:
        """Parameters of every part, and their gigabytes in each precision."""
        import pandas as pd

        rows = [
            {
                "part": part.name,
                "class": part.kind,
                "parameters": part.parameters,
                **{weights: part.size(weights) / GB for weights in BYTES},
            }
            for part in self.parts
        ]
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        def text(frame: pd.DataFrame) -> str:
            return frame.to_string(index=False, float_format="{:.2f}".format)

        shown = [
            f"{self.model} in {self.gb:g} GB: {'nothing fits' if self.best is None else self.best.name}",
            text(self.weights),
            text(self.table.drop(columns="note")),
        ]
        if self.best is not None:
            shown += [f"{self.best.name} ({self.best.note}):", self.best.lines]
            if self.exact is not None and self.exact is not self.best:
                shown.append(f"With the very activations of bf16: {self.exact.name} ({self.exact.note}).")
        return "\n\n".join(shown)


@renamed_keywords(pictures="images")
@checked
def recommend(
    path_or_pipe: str | Path | DiffusionPipeline, gb: float = 24, *, images: int = 1, side: int = 1024
) -> Recommendation:
    """How to load a pipeline so that a run fits into ``gb`` gigabytes of GPU memory; loads no weights, prints nothing.

    >>> from dit_lens import DiTLens
    >>> advice = recommend(DiTLens.toy().pipe, gb=24)
    >>> advice.best.name, advice.best.exact
    ('all in bf16', True)
    >>> print(advice.lines)
    import torch
    import dit_lens as dl
    ...

    The text encoders work on the CPU where they alone would not fit.

    path_or_pipe: a live pipeline, a folder that save_pretrained wrote (its weights' headers are read, or else its
      configs), or a repository of the hub (its configs are fetched).
    gb: gigabytes of 10**9 bytes, as cards are sold: the few per cent more that a card has stay free.
    images: how many are drawn together.
    side: their height and width in pixels.
    """
    if gb <= 0:
        raise OpError(f"gb={gb!r} must be more than 0: the gigabytes of the GPU's memory.")
    model, kind, parts = measure_parts(path_or_pipe)
    if not any(part.role == "transformer" for part in parts):
        raise FamilyError(
            f"{model} has no transformer (its parts are {', '.join(part.name for part in parts)}), so it is not a DiT "
            "pipeline."
        )
    scale = images * (side / 1024) ** 2
    return Recommendation(model, gb, tuple(parts), tuple(_list_choices(model, kind, parts, gb, scale)))


def _list_choices(
    model: str, kind: type | None, parts: list[Component], gb: float, scale: float
) -> Iterable[LoadingChoice]:
    """Every way to load a pipeline, the fastest first.

    model: what the pipeline is called.
    kind: its class; None if unknown.
    parts: its components that hold weights.
    gb: memory of the GPU, in GB.
    scale: pixels of all images that run at once, in units of 1024 x 1024.
    """
    encoders = [part for part in parts if part.role == "encoder"]
    denoisers = [part for part in parts if part.role == "transformer"]
    others = sum(part.size() for part in parts if part.role == "other")
    texts, whole = sum(part.size() for part in encoders), sum(part.size() for part in denoisers)
    denoising, decoding = CONTEXT + scale * DENOISING, CONTEXT + scale * DECODING
    load = LoadingCode(model, tuple(part.name for part in encoders), tuple(part.name for part in denoisers))

    everything = texts + whole + others
    yield LoadingChoice(
        "all in bf16",
        everything + CONTEXT,
        everything + denoising,
        everything + decoding,
        exact=True,
        note="fastest",
        lines=load.load_whole(),
    )
    first = _can_encode(kind) and bool(encoders)
    device = "cuda" if texts + CONTEXT <= gb * GB else "cpu"
    encode = texts + CONTEXT if device == "cuda" else 0.0
    largest = max((part.size() for part in encoders), default=0.0) + CONTEXT
    if first:
        yield LoadingChoice(
            "texts first, then bf16",
            encode,
            whole + others + denoising,
            whole + others + decoding,
            exact=True,
            note="as fast; prompts are encoded beforehand",
            lines=load.load_after_texts(device),
        )
    yield LoadingChoice(
        "model CPU offload",
        largest,
        max(part.size() for part in denoisers) + denoising,
        others + decoding,
        exact=True,
        note="every run moves each part to the GPU and back",
        lines=load.load_offloaded(),
    )
    for weights in ("int8", "nf4"):
        if any(part.quantised for part in denoisers):
            break
        small = sum(part.size(weights) for part in denoisers)
        yield LoadingChoice(
            f"{'texts first, then ' if first else ''}{weights} transformer{'' if first else ', model CPU offload'}",
            encode if first else largest,
            small + (others if first else 0) + denoising,
            others + (small if first else 0) + decoding,
            exact=False,
            note="activations differ from those of bf16; compare with an exact choice"
            + ("; float8 is as large" if weights == "int8" else ""),
            lines=load.load_after_texts(device, weights) if first else load.load_offloaded(weights),
        )
    streamed = sum(part.size() * (1 - part.blocks / part.parameters) for part in denoisers)
    streamed += 2 * max(part.size() * part.block / part.parameters for part in denoisers)
    if first:
        yield LoadingChoice(
            "texts first, group offload",
            encode,
            streamed + others + denoising,
            others + streamed + decoding,
            exact=True,
            note="every step moves every block to the GPU: slow, but nothing is rounded",
            lines=load.load_after_texts(device, offload=True),
        )


def _can_encode(kind: type | None) -> bool:
    """Whether prompts of a pipeline class can be encoded beforehand."""
    family = None if kind is None else find_by_pipeline(kind)
    try:
        return kind is not None and family is not None and bool(list_encoded(kind, family))
    except (FamilyError, PromptError):
        return False
