"""Python that loads a pipeline in the ways that :func:`dit_lens.recommend` compares."""

from __future__ import annotations

from dataclasses import dataclass

BF16 = "dtype=torch.bfloat16"
QUANTISED = {  # weights -> what diffusers calls it, and how it is made
    "int8": ("TorchAoConfig", "TorchAoConfig(Int8WeightOnlyConfig())"),
    "nf4": (
        "BitsAndBytesConfig",
        'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)',
    ),
}


@dataclass(frozen=True)
class LoadingCode:
    """Python that loads a pipeline.

    model: its folder or repository.
    encoders: parts that encode prompts, by name.
    denoisers: its transformers, by name.
    """

    model: str
    encoders: tuple[str, ...]
    denoisers: tuple[str, ...]

    def load_whole(self) -> str:
        """Everything on the GPU."""
        return "\n".join([*_write_imports(), f'lens = {self._write_lens()}.to("cuda")'])

    def load_offloaded(self, weights: str | None = None) -> str:
        """Each part on the GPU while it works."""
        lens = self._write_lens(weights=weights)
        return "\n".join([*_write_imports(weights), f"lens = {lens}", "lens.pipe.enable_model_cpu_offload()"])

    def load_after_texts(self, device: str, weights: str | None = None, *, offload: bool = False) -> str:
        """Encodes with a pipeline of text encoders on ``device``, then loads the rest."""
        absent = [f"{name}=None" for name in (*self.denoisers, "vae")]
        encoders = _write_call("DiffusionPipeline.from_pretrained", [f'"{self.model}"', *absent, BF16])
        lens = self._write_lens(tuple(f"{name}=None" for name in self.encoders), weights)
        rest = [f'lens = {lens}.to("cuda")']
        if offload:
            blocks = ['onload_device=torch.device("cuda")', 'offload_type="block_level"', "num_blocks_per_group=1"]
            streams = [
                _write_call(f"lens.pipe.{name}.enable_group_offload", [*blocks, "use_stream=True"])
                for name in self.denoisers
            ]
            rest = [f"lens = {lens}", 'lens.pipe.vae.to("cuda")', *streams]
        return "\n".join(
            [
                *_write_imports(weights, "DiffusionPipeline"),
                f'encoders = {encoders}.to("{device}")',
                "texts = dl.encode_prompts(encoders, prompts)",
                "del encoders",
                *rest,
                "run = lens.run(**texts, seed=0)",
            ]
        )

    def _write_lens(self, absent: tuple[str, ...] = (), weights: str | None = None) -> str:
        options = [f'"{self.model}"', *absent, BF16]
        if weights is not None:
            mapping = ", ".join(f'"{name}": {QUANTISED[weights][1]}' for name in self.denoisers)
            options.append(f"quantization_config=PipelineQuantizationConfig(quant_mapping={{{mapping}}})")
        return _write_call("dl.DiTLens.from_pretrained", options)


def _write_imports(weights: str | None = None, *names: str) -> list[str]:
    names = (*names, *(["PipelineQuantizationConfig", QUANTISED[weights][0]] if weights else []))
    return [
        "import torch",
        "import dit_lens as dl",
        *([f"from diffusers import {', '.join(sorted(names))}"] if names else []),
        *(["from torchao.quantization import Int8WeightOnlyConfig"] if weights == "int8" else []),
        "",
    ]


def _write_call(function: str, arguments: list[str]) -> str:
    """A call on one line, or with a line for each argument."""
    line = f"{function}({', '.join(arguments)})"
    return line if len(line) <= 88 else "\n    ".join([f"{function}(", *(f"{one}," for one in arguments)]) + "\n)"
