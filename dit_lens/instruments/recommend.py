"""How to load a pipeline into the memory of a GPU: what every way needs, by arithmetic on parameter counts."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_lens.core.plan.cost import format_bytes, nbytes
from dit_lens.core.runs.files import check_pipeline, read_json
from dit_lens.errors import FamilyError, OpError, PromptError, StoreError
from dit_lens.instruments.text_embeddings import ENCODER, returned_names

if TYPE_CHECKING:
    import pandas as pd
    from diffusers import DiffusionPipeline

GB = 1e9
CONTEXT = 0.6 * GB  # CUDA itself
# One image of 1024 x 1024. FLUX.1-dev's transformer alone takes 22.63 GiB, of which 22.17 are weights (diffusers'
# own benchmarks); its autoencoder takes about 4.7 GiB at the end, unless it decodes in tiles.
DENOISING = 0.6 * GB
DECODING = 5.0 * GB
BYTES = {"bf16": 2.0, "int8": 1.0, "nf4": 0.5 + 4 / 64}  # of a weight; NF4 has a scale of 4 bytes for 64 of them
BF16 = "dtype=torch.bfloat16"
QUANTISED = {  # weights -> what diffusers calls it, and how it is made
    "int8": ("TorchAoConfig", "TorchAoConfig(Int8WeightOnlyConfig())"),
    "nf4": (
        "BitsAndBytesConfig",
        'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)',
    ),
}
SAFETENSORS = r"(diffusion_pytorch_model|model|pytorch_model)(-\d+-of-\d+)?\.safetensors"

Shapes = list[tuple[str, tuple[int, ...], int]]  # name, shape and bytes of every weight


@dataclass(frozen=True)
class Part:
    """The weights of one part of a pipeline.

    parameters: all; matrices: those that quantisation shrinks; block: of the largest block. bytes: as they are stored.
    quantised: whether they are so already.
    """

    name: str
    kind: str
    parameters: int
    matrices: int
    block: int
    blocks: int
    bytes: int
    quantised: bool = False

    def size(self, weights: str = "bf16") -> float:
        """Bytes on the GPU, with matrices in bf16, int8 or nf4 and the rest in bf16."""
        if self.quantised:
            return self.bytes
        return BYTES[weights] * self.matrices + BYTES["bf16"] * (self.parameters - self.matrices)


@dataclass(frozen=True)
class Choice:
    """One way to load a pipeline, and the bytes on the GPU in each phase of a run.

    exact: whether activations are those of the bf16 weights. lines: Python that loads it. note: what it costs.
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
        return max(self.encode, self.denoise, self.decode)


@dataclass(frozen=True)
class Recommendation:
    """Ways to load a pipeline into ``gb`` gigabytes, the fastest first.

    parts: what the pipeline is made of. best: the first choice that fits, exact: the first that fits and does not
    change activations; None where none does. table, weights: the arithmetic.
    """

    model: str
    gb: float
    parts: tuple[Part, ...]
    choices: tuple[Choice, ...]

    def fits(self, choice: Choice) -> bool:
        return choice.peak <= self.gb * GB

    @property
    def best(self) -> Choice | None:
        return next((choice for choice in self.choices if self.fits(choice)), None)

    @property
    def exact(self) -> Choice | None:
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

    path_or_pipe: a live pipeline, a folder that save_pretrained wrote (its weights' headers are read, or else its
    configs), or a repository of the hub (its configs are fetched). gb: gigabytes of 10**9 bytes, as cards are sold: the
    few per cent more that a card has stay free. images, side: how many are drawn together, and of how many pixels.
    The text encoders work on the CPU where they alone would not fit.
    """
    if gb <= 0:
        raise OpError(f"gb={gb!r} must be more than 0: the gigabytes of the GPU's memory.")
    model, kind, parts = _measured(path_or_pipe)
    if not any(_role(part) == "transformer" for part in parts):
        raise FamilyError(
            f"{model} has no transformer (its parts are {', '.join(part.name for part in parts)}), so it is not a DiT "
            "pipeline."
        )
    scale = images * (side / 1024) ** 2
    return Recommendation(model, gb, tuple(parts), tuple(_choices(model, kind, parts, gb, scale)))


def _choices(model: str, kind: type | None, parts: list[Part], gb: float, scale: float) -> Iterable[Choice]:
    """Every way, the fastest first."""
    encoders = [part for part in parts if _role(part) == "encoder"]
    denoisers = [part for part in parts if _role(part) == "transformer"]
    others = sum(part.size() for part in parts if _role(part) == "other")
    texts, whole = sum(part.size() for part in encoders), sum(part.size() for part in denoisers)
    denoising, decoding = CONTEXT + scale * DENOISING, CONTEXT + scale * DECODING
    load = _Lines(model, tuple(part.name for part in encoders), tuple(part.name for part in denoisers))

    everything = texts + whole + others
    yield Choice(
        "all in bf16",
        everything + CONTEXT,
        everything + denoising,
        everything + decoding,
        exact=True,
        note="fastest",
        lines=load.all(),
    )
    first = _can_encode(kind) and bool(encoders)
    device = "cuda" if texts + CONTEXT <= gb * GB else "cpu"
    encode = texts + CONTEXT if device == "cuda" else 0.0
    largest = max((part.size() for part in encoders), default=0.0) + CONTEXT
    if first:
        yield Choice(
            "texts first, then bf16",
            encode,
            whole + others + denoising,
            whole + others + decoding,
            exact=True,
            note="as fast; prompts are encoded beforehand",
            lines=load.texts_first(device),
        )
    yield Choice(
        "model CPU offload",
        largest,
        max(part.size() for part in denoisers) + denoising,
        others + decoding,
        exact=True,
        note="every run moves each part to the GPU and back",
        lines=load.offloaded(),
    )
    for weights in ("int8", "nf4"):
        if any(part.quantised for part in denoisers):
            break
        small = sum(part.size(weights) for part in denoisers)
        yield Choice(
            f"{'texts first, then ' if first else ''}{weights} transformer{'' if first else ', model CPU offload'}",
            encode if first else largest,
            small + (others if first else 0) + denoising,
            others + (small if first else 0) + decoding,
            exact=False,
            note="activations differ from those of bf16; compare with an exact choice"
            + ("; float8 is as large" if weights == "int8" else ""),
            lines=load.texts_first(device, weights) if first else load.offloaded(weights),
        )
    streamed = sum(part.size() * (1 - part.blocks / part.parameters) for part in denoisers)
    streamed += 2 * max(part.size() * part.block / part.parameters for part in denoisers)
    if first:
        yield Choice(
            "texts first, group offload",
            encode,
            streamed + others + denoising,
            others + streamed + decoding,
            exact=True,
            note="every step moves every block to the GPU: slow, but nothing is rounded",
            lines=load.texts_first(device, offload=True),
        )


@dataclass(frozen=True)
class _Lines:
    """Python that loads a pipeline, for each choice."""

    model: str
    encoders: tuple[str, ...]
    denoisers: tuple[str, ...]

    def all(self) -> str:
        return "\n".join([*_imports(), f'lens = {self._lens()}.to("cuda")'])

    def offloaded(self, weights: str | None = None) -> str:
        lens = self._lens(weights=weights)
        return "\n".join([*_imports(weights), f"lens = {lens}", "lens.pipe.enable_model_cpu_offload()"])

    def texts_first(self, device: str, weights: str | None = None, *, offload: bool = False) -> str:
        """Encode with a pipeline of text encoders, then load the rest."""
        absent = [f"{name}=None" for name in (*self.denoisers, "vae")]
        encoders = _call("DiffusionPipeline.from_pretrained", [f'"{self.model}"', *absent, BF16])
        lens = self._lens(tuple(f"{name}=None" for name in self.encoders), weights)
        rest = [f'lens = {lens}.to("cuda")']
        if offload:
            blocks = ['onload_device=torch.device("cuda")', 'offload_type="block_level"', "num_blocks_per_group=1"]
            streams = [
                _call(f"lens.pipe.{name}.enable_group_offload", [*blocks, "use_stream=True"]) for name in self.denoisers
            ]
            rest = [f"lens = {lens}", 'lens.pipe.vae.to("cuda")', *streams]
        return "\n".join(
            [
                *_imports(weights, "DiffusionPipeline"),
                f'encoders = {encoders}.to("{device}")',
                "texts = dl.encode_prompts(encoders, prompts)",
                "del encoders",
                *rest,
                "run = lens.run(**texts, seed=0)",
            ]
        )

    def _lens(self, absent: tuple[str, ...] = (), weights: str | None = None) -> str:
        options = [f'"{self.model}"', *absent, BF16]
        if weights is not None:
            mapping = ", ".join(f'"{name}": {QUANTISED[weights][1]}' for name in self.denoisers)
            options.append(f"quantization_config=PipelineQuantizationConfig(quant_mapping={{{mapping}}})")
        return _call("dl.DiTLens.from_pretrained", options)


def _imports(weights: str | None = None, *names: str) -> list[str]:
    names = (*names, *(["PipelineQuantizationConfig", QUANTISED[weights][0]] if weights else []))
    return [
        "import torch",
        "import dit_lens as dl",
        *([f"from diffusers import {', '.join(sorted(names))}"] if names else []),
        *(["from torchao.quantization import Int8WeightOnlyConfig"] if weights == "int8" else []),
        "",
    ]


def _call(function: str, arguments: list[str]) -> str:
    """A call on one line, or with a line for each argument."""
    line = f"{function}({', '.join(arguments)})"
    return line if len(line) <= 88 else "\n    ".join([f"{function}(", *(f"{one}," for one in arguments)]) + "\n)"


def _measured(source: Any) -> tuple[str, type | None, list[Part]]:
    """What a pipeline is called, its class, and its parts."""
    import diffusers

    if hasattr(source, "components"):
        model = str(getattr(source, "name_or_path", "") or "") or "path/to/pipeline"
        parts = [
            _part(
                name,
                type(part).__name__,
                _shapes_of(part),
                quantised=getattr(part.config, "quantization_config", None) is not None,
            )
            for name, part in source.components.items()
            if hasattr(part, "named_parameters")
        ]
        return model, type(source), parts
    folder = _folder(source)
    index = read_json(folder / "model_index.json", "the index of a diffusers pipeline")
    parts = []
    for name, entry in index.items():
        if isinstance(entry, list) and entry[0] is not None and (folder / name / "config.json").is_file():
            config = read_json(folder / name / "config.json", f"the config of {name}")
            shapes = _headers(folder / name) or _from_config(folder / name, *entry)
            parts.append(_part(name, entry[1], shapes, quantised="quantization_config" in config))
    return str(source), getattr(diffusers, index.get("_class_name", ""), None), parts


def _folder(source: str | Path) -> Path:
    """The folder of a pipeline; a repository's configs are fetched into the hub's cache."""
    folder = Path(source)
    if check_pipeline(folder):
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=["model_index.json", "*/config.json"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as problem:
        raise StoreError(
            f"{source} is no folder, and its configs could not be fetched from the hub: {problem}"
        ) from problem


def _shapes_of(module: Any) -> Shapes:
    return [(name, tuple(p.shape), nbytes(p)) for name, p in module.named_parameters()]


def _headers(folder: Path) -> Shapes:
    """Every weight of a part from the headers of its safetensors files; empty where there are none."""
    found: Shapes = []
    for file in sorted(folder.glob("*.safetensors")):
        if not re.fullmatch(SAFETENSORS, file.name):
            continue
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header: Mapping[str, Any] = json.loads(stream.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                found.append((name, tuple(entry["shape"]), stop - start))
    return found


def _from_config(folder: Path, library: str, kind: str) -> Shapes:
    """Every weight of a part, from its class made without memory."""
    import diffusers
    import torch
    import transformers

    home: Any = {"diffusers": diffusers, "transformers": transformers}.get(library)
    cls = getattr(home, kind, None)
    if cls is None:
        raise StoreError(
            f"{folder} holds no safetensors file, and its class {library}.{kind} is not known here, so its size cannot "
            "be told. Download the weights, or pass the loaded pipeline."
        )
    with torch.device("meta"):
        if library == "transformers":
            part = cls(cls.config_class.from_pretrained(folder))
        else:
            part = cls.from_config(cls.load_config(folder))
    return _shapes_of(part)


def _part(name: str, kind: str, shapes: Shapes, *, quantised: bool) -> Part:
    blocks: dict[str, int] = {}
    for weight, shape, _ in shapes:
        listed = re.match(r"(.*?\.\d+)\.", weight)
        if listed:
            blocks[listed[1]] = blocks.get(listed[1], 0) + math.prod(shape)
    return Part(
        name=name,
        kind=kind,
        parameters=sum(math.prod(shape) for _, shape, _ in shapes),
        matrices=sum(math.prod(shape) for _, shape, _ in shapes if len(shape) == 2),
        block=max(blocks.values(), default=0),
        blocks=sum(blocks.values()),
        bytes=sum(size for *_, size in shapes),
        quantised=quantised,
    )


def _role(part: Part) -> str:
    """Transformer, encoder or other."""
    if re.fullmatch(r"(\w+_)?transformer(_\d+)?", part.name):
        return "transformer"
    return "encoder" if re.fullmatch(ENCODER, part.name) else "other"


def _can_encode(kind: type | None) -> bool:
    """Whether prompts of a pipeline class can be encoded beforehand."""
    try:
        return kind is not None and bool(returned_names(kind))
    except PromptError:
        return False
