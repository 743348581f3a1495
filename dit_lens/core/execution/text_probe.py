"""One call of a copy of a pipeline in which nothing is computed, to see which token of which text arrives where.

In it tokenizers answer with a number for each token that says where it comes from, text encoders pass that number on in
place of a hidden state, and the transformer notes what it is given. Nothing that belongs to the pipeline is changed.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dit_lens.core.execution.schedule import copy_generators

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FIRST = 2**21  # of the numbers; no vocabulary has as many tokens, and float32 holds them up to LAST
LAST = 2**24
KEPT = ("vae", "image_encoder", "controlnet", "feature_extractor", "scheduler")  # parts that work as they are


class UnfollowedError(Exception):
    """Why a text cannot be followed; it becomes part of a message."""


class _Stop(Exception):  # noqa: N818 not an error: it ends the call
    pass


class Recording:
    """One call of a copy of the pipeline.

    texts: what tokenizers were given.
    tokens: for every number from FIRST on (text, start, stop, piece, whether it is padding, whether it ends a text).
    seen: the arguments of each forward pass.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.tokens: list[tuple[int, int, int, str, bool, bool]] = []
        self.seen: list[tuple[tuple, dict]] = []

    def run(self, pipe: DiffusionPipeline, arguments: Mapping[str, Any], forwards: int) -> None:
        """Calls a copy up to a number of forward passes."""
        probe = copy.copy(pipe)
        if pipe.device.type == "meta":
            probe.__class__ = type(type(pipe).__name__, (type(pipe),), {"_execution_device": torch.device("cpu")})
        for name, part in pipe.components.items():
            vars(probe)[name] = self._stand_in(name, part, forwards)
        vars(probe)["_progress_bar_config"] = {"disable": True}
        try:
            with _silence(), suppress(_Stop), torch.no_grad(), torch.random.fork_rng():
                probe(**{name: copy_generators(value) for name, value in arguments.items()})
        finally:
            if getattr(pipe, "_all_hooks", None):
                pipe.maybe_free_model_hooks()

    def _stand_in(self, name: str, part: Any, forwards: int) -> Any:
        if name == "scheduler":
            return copy.deepcopy(part)
        if name == "transformer":
            return _Transformer(part, self, forwards)
        if name.endswith("transformer"):
            return _Transformer(part, Recording(), forwards + 1)
        if hasattr(part, "convert_ids_to_tokens") or hasattr(part, "tokenizer"):
            return _Tokenizer(part, self)
        if isinstance(part, nn.Module) and not name.startswith(KEPT):
            return _Encoder(part)
        return part

    def number(self, encoding: Any, text: str, tokenizer: Any, ids: Sequence[int]) -> list[int]:
        """A number for each token of one text.

        encoding: of the tokenizers library.
        text: what it was made of.
        tokenizer: of transformers.
        ids: what the tokenizer returned.
        """
        self.texts.append(text)
        first = FIRST + len(self.tokens)
        if list(encoding.ids) != list(ids):
            raise UnfollowedError(f"{type(tokenizer).__name__} returns other tokens than it made")
        for token, (start, stop), piece, attended in zip(
            ids, encoding.offsets, encoding.tokens, encoding.attention_mask, strict=True
        ):
            ends = bool(attended) and token == tokenizer.eos_token_id
            self.tokens.append((len(self.texts) - 1, start, stop, piece, not attended, ends))
        return list(range(first, FIRST + len(self.tokens)))


class _StandIn:
    """Something that stands for a part of a pipeline, of whose class it says it is."""

    def __init__(self, part: Any):
        self.__dict__["part"] = part

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return type(self.__dict__["part"])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["part"], name)

    @property
    def dtype(self) -> torch.dtype:
        """One that holds the numbers exactly."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Where numbers can be: not where a model without weights is."""
        device = self.__dict__["part"].device
        return torch.device("cpu") if device.type == "meta" else device


class _Tokenizer(_StandIn):
    """A tokenizer, or a processor that holds one, whose ids are numbers that say where tokens come from."""

    def __init__(self, part: Any, recording: Recording):
        super().__init__(part)
        self.__dict__["recording"] = recording

    def __getattr__(self, name: str) -> Any:
        part = self.__dict__["part"]
        found = getattr(part, name)
        if name == "tokenizer":
            return _Tokenizer(found, self.__dict__["recording"])
        if name.startswith("batch_decode") or name == "decode":
            return lambda *_, **__: [""]  # of what was cut off, for a warning
        if isinstance(found, types.MethodType) and found.__self__ is part:
            return types.MethodType(found.__func__, self)  # what it calls on itself comes by here
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        part, recording = self.__dict__["part"], self.__dict__["recording"]
        if not hasattr(part, "convert_ids_to_tokens"):
            return type(part).__call__(self, *args, **kwargs)
        answer = part(*args, **kwargs)
        if not getattr(answer, "encodings", None):
            raise UnfollowedError(f"{type(part).__name__} does not tell which characters a token stands for")
        given: Any = args[0] if args else kwargs.get("text")
        single = isinstance(given, str)
        ids = answer["input_ids"]
        rows = ids.tolist() if isinstance(ids, Tensor) else ids
        flat = bool(rows) and not isinstance(rows[0], list)
        numbered = [
            recording.number(encoding, text, part, row)
            for encoding, text, row in zip(
                answer.encodings, [given] if single else given, [rows] if flat else rows, strict=True
            )
        ]
        new = numbered[0] if flat else numbered
        answer["input_ids"] = torch.tensor(new, device=ids.device) if isinstance(ids, Tensor) else new
        return answer


class _Encoder(_StandIn):
    """A text encoder whose hidden states are the ids it was given, in every channel."""

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        if name == "generate":
            raise UnfollowedError("a language model writes to the prompt")
        return _Encoder(found) if isinstance(found, nn.Module) else found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        part = self.__dict__["part"]
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not hasattr(part, "config"):
            return ids  # a norm after the last layer
        if not isinstance(ids, Tensor) or ids.is_floating_point():
            raise UnfollowedError(f"{type(part).__name__} was not given the ids of tokens")
        config = part.config.get_text_config()
        hidden = ids.float()[..., None].expand(*ids.shape, config.hidden_size)
        pooled = hidden.new_zeros(len(ids), getattr(config, "projection_dim", None) or config.hidden_size)
        layers = 1 + (getattr(config, "num_hidden_layers", None) or 1)
        return _Encoded(hidden, pooled, layers, pooled_first=hasattr(part, "text_projection"))


class _Encoded:
    """What a text encoder returns."""

    def __init__(self, hidden: Tensor, pooled: Tensor, layers: int, *, pooled_first: bool):
        self.last_hidden_state, self.hidden_states = hidden, (hidden,) * layers
        self.pooler_output = self.text_embeds = pooled
        self.first = pooled if pooled_first else hidden

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, str):
            return getattr(self, at)
        return (self.first, self.last_hidden_state, self.hidden_states)[at]

    def to(self, *_: Any, **__: Any) -> _Encoded:
        return self


class _Transformer(_StandIn):
    """A transformer that notes its arguments and answers with the latents; the last call ends the pipeline's."""

    def __init__(self, part: Any, recording: Recording, forwards: int):
        super().__init__(part)
        self.__dict__.update(recording=recording, forwards=forwards)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        seen = self.__dict__["recording"].seen
        seen.append((args, kwargs))
        if len(seen) == self.__dict__["forwards"]:
            raise _Stop
        latents = args[0] if args else next(kwargs[name] for name in ("hidden_states", "x") if name in kwargs)
        return _Answer((latents,))


class _Answer(tuple):
    """What a transformer returns, in both of its forms."""

    __slots__ = ()

    @property
    def sample(self) -> Any:
        return self[0]


@contextmanager
def _silence() -> Generator[None]:
    """Without the warnings of diffusers and transformers, which the run will give."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    levels = [(one, one.get_verbosity()) for one in (of_diffusers, of_transformers)]
    for one, _ in levels:
        one.set_verbosity(50)
    try:
        yield
    finally:
        for one, level in levels:
            one.set_verbosity(level)
