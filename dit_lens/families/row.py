"""What a family of DiTs is made of, as data: one row says where every named tensor of a model class lives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stack:
    """A list of equal blocks. Stacks run in the order the family lists them.

    name: what people call it ("double"). path: the attribute of the transformer that holds it.
    inputs, outputs: stream -> argument name, and stream -> position in the output tuple (None: a bare tensor).
    """

    name: str
    path: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, int | None]


@dataclass(frozen=True)
class Guidance:
    """How a pipeline runs the conditional and unconditional branches.

    calls: the branches in the order of their transformer calls within one step, when guidance is on.
    scale: the pipeline argument that turns guidance on when it exceeds 1.
    negative: the arguments of which one must be given as well.
    """

    calls: tuple[str, ...]
    scale: str
    negative: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Family:
    """One DiT class of diffusers.

    name: as its users call it. transformer: the class of the denoiser. pipelines: those this row was tried with.
    stacks: in execution order. final: the module whose first argument is the image stream that is projected out.
    width, out_width: the hidden size and the size of a predicted token, as attributes of ``transformer.config`` or of
    the transformer. grid: the rule that finds the image tokens in a call's arguments (see execute.py).
    patch: latent pixels per side of an image token. resizing: pipelines that choose the size of the picture themselves.
    tokenizer, text_length: the pipeline's tokenizer of the text stream, and the argument that sets its length.
    embedded: the config flag for a guidance scale that the transformer is told. tiny: overrides that shrink the config.
    """

    name: str
    transformer: str
    pipelines: tuple[str, ...]
    stacks: tuple[Stack, ...]
    final: str
    width: str
    out_width: str
    grid: str
    guidance: Guidance
    patch: int = 2
    resizing: tuple[str, ...] = ()
    tokenizer: str = "tokenizer"
    text_length: str = "max_sequence_length"
    embedded: str | None = None
    tiny: Mapping[str, object] = field(default_factory=dict)
