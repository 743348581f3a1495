"""The text stream of a call before it runs, read off the pipeline itself: its own templates, tokenizers and slices.

The pipeline's own call runs on a copy of it, in which tokenizers answer with a number for each token that says where it
comes from, text encoders pass that number on in place of a hidden state, and the transformer notes what it is given.
Nothing is computed, and nothing that belongs to the pipeline is changed.
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
from dit_lens.core.request.text_tokens import Origin, StreamText, Text
from dit_lens.families.arguments import holds_text
from dit_lens.families.layout import find_text_masks, optional_argument

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dit_lens.core.request.call import Call
    from dit_lens.families import Anatomy

FIRST = 2**21  # of the numbers; no vocabulary has as many tokens, and float32 holds them up to LAST
LAST = 2**24
SENTINEL = "\N{WHITE SQUARE}"
KEPT = ("vae", "image_encoder", "controlnet", "feature_extractor", "scheduler")  # parts that work as they are


class _Stop(Exception):  # noqa: N818 not an error: it ends the call
    pass


class _Unfollowed(Exception):  # noqa: N818 a reason, which becomes part of a message
    pass


def read_stream_text(
    pipe: DiffusionPipeline, anatomy: Anatomy, call: Call, forwards: Sequence[Sequence[str]]
) -> StreamText:
    """The text in every row and branch of the text stream of a call.

    pipe: the pipeline.
    anatomy: of its transformer.
    call: checked.
    forwards: the branches of each forward pass of a step.
    """
    prompts = anatomy.family.prompts
    before = 0 if prompts.before is None else int(getattr(pipe.transformer, prompts.before).shape[1])
    recording, problem = _Recording(), None
    try:
        recording.run(pipe, call.keywords(), len(forwards))
    except Exception as failed:  # noqa: BLE001 whatever a pipeline raises: its run will say it again
        problem = f"the pipeline's own tokenisation could not be followed ({type(failed).__name__}: {failed})"
    if len(recording.seen) < len(forwards):
        return StreamText(unknown=problem or "the pipeline made fewer forward passes than expected")
    try:
        numbers = _numbers_by_row(recording.seen, anatomy, forwards, call.rows)
    except _Unfollowed as why:
        return StreamText(unknown=str(why))
    counts = {len(tokens) for tokens in numbers.values()}
    uneven = (
        len(counts) > 1
        or prompts.mixed
        or prompts.gathered
        or anatomy.family.pipeline(type(pipe)).caches
        or _is_ragged(recording.seen, anatomy)
    )
    count = None if uneven else counts.pop() + before + prompts.after
    why = prompts.mixed
    if call.prompts is None:
        why = "this run has prompt_embeds, not a prompt to find words in"
    elif why is None and not any(some for tokens in numbers.values() for some in tokens):
        why = "what the pipeline's tokenizers return does not arrive in the text stream"
    if why is not None:
        return StreamText(count=count, before=before, unknown=why)
    spans = _prompt_spans(pipe, call, recording, len(forwards))
    texts = [Text(whole, span) for whole, span in zip(recording.texts, spans, strict=True)]
    rows = {
        at: [[_origin(recording.tokens[number - FIRST], texts) for number in token] for token in tokens]
        for at, tokens in numbers.items()
    }
    return StreamText(rows, texts, count, before, prompts.after)


def _is_ragged(seen: Sequence[tuple[tuple, dict]], anatomy: Anatomy) -> bool:
    """Whether blocks hold fewer text tokens than the arguments, as each row is followed by its image."""
    if all(stack.layout != "ragged" for stack in anatomy.family.stacks):
        return False
    return not all(mask.all() for arguments in seen for mask in find_text_masks(arguments, anatomy.text_rule))


class _Recording:
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
            return _Transformer(part, _Recording(), forwards + 1)
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
            raise _Unfollowed(f"{type(tokenizer).__name__} returns other tokens than it made")
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

    def __init__(self, part: Any, recording: _Recording):
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
            raise _Unfollowed(f"{type(part).__name__} does not tell which characters a token stands for")
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
            raise _Unfollowed("a language model writes to the prompt")
        return _Encoder(found) if isinstance(found, nn.Module) else found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        part = self.__dict__["part"]
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not hasattr(part, "config"):
            return ids  # a norm after the last layer
        if not isinstance(ids, Tensor) or ids.is_floating_point():
            raise _Unfollowed(f"{type(part).__name__} was not given the ids of tokens")
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

    def __init__(self, part: Any, recording: _Recording, forwards: int):
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


def _numbers_by_row(
    seen: Sequence[tuple[tuple, dict]], anatomy: Anatomy, forwards: Sequence[Sequence[str]], rows: int
) -> dict[tuple[str, int], list[list[int]]]:
    """(branch, row) -> for every token of the text stream the numbers in it.

    seen: the arguments of each forward pass of a step.
    anatomy: of the transformer.
    forwards: the branches of each of them.
    rows: images of one branch.
    """
    prompts, found = anatomy.family.prompts, {}
    for arguments, branches in zip(seen, forwards, strict=True):
        parts = []
        for name in prompts.text:
            position = anatomy.modules.find_parameter("", name)[1]
            value = optional_argument(arguments, [name], position)
            if value is None:
                raise _Unfollowed(f"the pipeline gives its transformer no {name}")
            parts.append(_numbers_in(value, layered=_is_layered(name, prompts.layered), multiple=prompts.multiple))
        if prompts.gathered:
            masks = find_text_masks(arguments, anatomy.text_rule)
            if len(masks) != len(parts):
                raise _Unfollowed("the pipeline gives its transformer no mask of the text")
            parts = [_gather(parts, masks)]
        every = [[token for part in parts for token in part[row]] for row in range(len(parts[0]))]
        if isinstance(prompts.masked_by, int):  # the argument goes on where the image is
            (marked,) = find_text_masks(arguments, anatomy.text_rule)
            every = [row[: 1 + int(marked.any(0).nonzero().max())] for row in every]
        if len(every) != rows * len(branches):
            raise _Unfollowed(f"the text has {len(every)} rows, where {rows * len(branches)} were expected")
        for number, branch in enumerate(branches):
            found |= {(branch, row): every[number * rows + row] for row in range(rows)}
    return found


def _is_layered(name: str, layered: Sequence[str]) -> bool:
    """Whether an argument of the transformer has an axis of layers first, as that of the pipeline."""
    return any(name.rpartition("_")[2] == one.rpartition("_")[2] for one in layered)


def _numbers_in(value: Any, *, layered: bool, multiple: int) -> list[list[list[int]]]:
    """For every row and token the numbers in its channels; a list of rows is filled up as the model does it."""
    if isinstance(value, list | tuple):
        longest = max(-(-len(one) // multiple) * multiple for one in value)
        rows = [_numbers_in(one[None], layered=False, multiple=1)[0] for one in value]
        return [row + [[]] * (longest - len(row)) for row in rows]
    value = value.movedim(0, -1) if layered else value
    flat = (value.detach().flatten(2) if value.ndim > 2 else value[..., None]).cpu()  # [row, token, channel]
    ours = (flat >= FIRST) & (flat < LAST)
    highest = flat.masked_fill(~ours, 0).amax(-1).long()
    lowest = flat.masked_fill(~ours, LAST).amin(-1).long()
    several = (highest > lowest).tolist()  # two encoders side by side
    return [
        [
            sorted(set(flat[row, token][ours[row, token]].long().tolist()))
            if several[row][token]
            else [number][: number > 0]
            for token, number in enumerate(numbers)
        ]
        for row, numbers in enumerate(highest.tolist())
    ]


def _gather(parts: Sequence[list[list[list[int]]]], masks: Sequence[Tensor]) -> list[list[list[int]]]:
    """Tokens of several arguments in one order: what takes part first, the last argument's ahead."""
    found = []
    for row in range(len(parts[0])):
        pairs = [
            (bool(takes_part), token)
            for part, mask in reversed(list(zip(parts, masks, strict=True)))
            for token, takes_part in zip(part[row], mask[row].tolist(), strict=True)
        ]
        found.append([token for takes_part, token in sorted(pairs, key=lambda pair: not pair[0])])
    return found


def _prompt_spans(pipe: DiffusionPipeline, call: Call, recording: _Recording, forwards: int) -> list[range]:
    """Where in each recorded text the prompt is, beside the template of the pipeline."""
    arguments = call.keywords()
    names = [name for name in arguments if holds_text(name) and arguments[name] is not None]
    given = {text for name in names for text in _listed(arguments[name])}
    if all(whole in given for whole in recording.texts):  # no template
        return [range(len(whole)) for whole in recording.texts]
    twin = _Recording()
    signs = {name: [SENTINEL] * len(_listed(arguments[name])) for name in names}
    with suppress(Exception):  # what could be recorded is all there is to know
        twin.run(pipe, {**arguments, **signs}, forwards)
    return [_find_prompt(whole, set(twin.texts)) for whole in recording.texts]


def _listed(texts: str | Sequence[str]) -> Sequence[str]:
    return [texts] if isinstance(texts, str) else texts


def _find_prompt(whole: str, templates: set[str]) -> range:
    """Where a text is not its template, in which a sign stands for the prompt; all of it where it has no template."""
    if whole in templates:
        return range(0)  # the same whatever the prompt is
    found = range(len(whole))
    for template in templates:
        before, sign, after = template.partition(SENTINEL)
        fits = whole.startswith(before) and whole.endswith(after) and len(whole) >= len(before) + len(after)
        if sign and fits and len(whole) - len(before) - len(after) < len(found):
            found = range(len(before), len(whole) - len(after))
    return found


def _origin(token: tuple[int, int, int, str, bool, bool], texts: Sequence[Text]) -> Origin:
    number, start, stop, piece, padding, ends = token
    prompt = texts[number].prompt
    inside = start < stop and start < prompt.stop and prompt.start < stop
    kind = "pad" if padding else "prompt" if inside else "eos" if ends else "template"
    return Origin(piece, kind, number, 0 if padding else start, 0 if padding else stop)


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
