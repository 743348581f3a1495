"""The weights of a pipeline's parts: from a live pipeline, from the headers of its files, or from its configs."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_lens.core.plan.cost import nbytes
from dit_lens.core.runs.files import check_pipeline, read_json, report_damage
from dit_lens.errors import StoreError
from dit_lens.families.arguments import is_text_encoder

# Bytes of a weight. NF4 (QLoRA, arXiv 2305.14314) keeps a scale of 4 bytes for every 64 weights of half a byte.
BYTES = {"bf16": 2.0, "int8": 1.0, "nf4": 0.5 + 4 / 64}
SAFETENSORS = r"(diffusion_pytorch_model|model|pytorch_model)(-\d+-of-\d+)?\.safetensors"

Shapes = list[tuple[str, tuple[int, ...], int]]  # name, shape and bytes of every weight


@dataclass(frozen=True)
class Component:
    """The weights of one part of a pipeline.

    name: of the part.
    kind: its class.
    parameters: how many there are.
    matrices: those that quantisation shrinks.
    block: those of the largest block.
    blocks: those of all blocks.
    bytes: as they are stored.
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

    @property
    def role(self) -> str:
        """Transformer, encoder or other."""
        if re.fullmatch(r"(\w+_)?transformer(_\d+)?", self.name):
            return "transformer"
        return "encoder" if is_text_encoder(self.name) else "other"


def measure_parts(source: Any) -> tuple[str, type | None, list[Component]]:
    """What a pipeline is called, its class, and its parts."""
    import diffusers

    if hasattr(source, "components"):
        model = str(getattr(source, "name_or_path", "") or "") or "path/to/pipeline"
        parts = [
            _make_part(
                name,
                type(part).__name__,
                _list_shapes(part),
                quantised=getattr(part.config, "quantization_config", None) is not None,
            )
            for name, part in source.components.items()
            if hasattr(part, "named_parameters")
        ]
        return model, type(source), parts
    folder = _find_folder(source)
    index = read_json(folder / "model_index.json", "the index of a diffusers pipeline")
    parts = []
    for name, entry in index.items():
        if isinstance(entry, list) and entry[0] is not None and (folder / name / "config.json").is_file():
            config = read_json(folder / name / "config.json", f"the config of {name}")
            shapes = _read_headers(folder / name) or _make_from_config(folder / name, *entry)
            parts.append(_make_part(name, entry[1], shapes, quantised="quantization_config" in config))
    return str(source), getattr(diffusers, index.get("_class_name", ""), None), parts


def _find_folder(source: str | Path) -> Path:
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
            f"{source} is not a folder, and its configs could not be fetched from the hub: {problem}"
        ) from problem


def _list_shapes(module: Any) -> Shapes:
    return [(name, tuple(p.shape), nbytes(p)) for name, p in module.named_parameters()]


def _read_headers(folder: Path) -> Shapes:
    """Every weight of a part from the headers of its safetensors files; empty where there are none."""
    found: Shapes = []
    for file in sorted(folder.glob("*.safetensors")):
        if not re.fullmatch(SAFETENSORS, file.name):
            continue
        with report_damage(file, "Download the weights again."), file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > file.stat().st_size:
                raise StoreError(f"{file} is incomplete: its header says {length} bytes. Download the weights again.")
            header: Mapping[str, Any] = json.loads(stream.read(length))
            for name, entry in header.items():
                if name != "__metadata__":
                    start, stop = entry["data_offsets"]
                    found.append((name, tuple(entry["shape"]), stop - start))
    return found


def _make_from_config(folder: Path, library: str, kind: str) -> Shapes:
    """Every weight of a part, from its class, made without memory."""
    import diffusers
    import torch
    import transformers

    home: Any = {"diffusers": diffusers, "transformers": transformers}.get(library)
    cls = getattr(home, kind, None)
    if cls is None:
        raise StoreError(
            f"{folder} holds no safetensors file, and its class {library}.{kind} is not known here, so its size cannot "
            "be computed. Download the weights, or pass the loaded pipeline."
        )
    with torch.device("meta"):
        if library == "transformers":
            part = cls(cls.config_class.from_pretrained(folder))
        else:
            part = cls.from_config(cls.load_config(folder))
    return _list_shapes(part)


def _make_part(name: str, kind: str, shapes: Shapes, *, quantised: bool) -> Component:
    blocks: dict[str, int] = {}
    for weight, shape, _ in shapes:
        listed = re.match(r"(.*?\.\d+)\.", weight)
        if listed:
            blocks[listed[1]] = blocks.get(listed[1], 0) + math.prod(shape)
    return Component(
        name=name,
        kind=kind,
        parameters=sum(math.prod(shape) for _, shape, _ in shapes),
        matrices=sum(math.prod(shape) for _, shape, _ in shapes if len(shape) == 2),
        block=max(blocks.values(), default=0),
        blocks=sum(blocks.values()),
        bytes=sum(size for *_, size in shapes),
        quantised=quantised,
    )
