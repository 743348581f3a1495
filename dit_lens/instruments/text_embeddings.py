"""Prompts become embeddings before a run, so that text encoders and transformer need not share a GPU."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dit_lens.arguments.checks import checked
from dit_lens.core.execution.at_weights import at_weights
from dit_lens.core.plan.cost import format_bytes, nbytes
from dit_lens.core.request.call import Call, needs_weights, prepare_call
from dit_lens.errors import DitLensError, ExecutionError, PromptError, show
from dit_lens.families import find, find_by_pipeline
from dit_lens.families.arguments import IMAGES_PER_PROMPT, explain_unread, holds_text, is_text_encoder
from dit_lens.families.calls import call_parameters
from dit_lens.families.sources import check_source

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from dit_lens.core.session import Session
    from dit_lens.families import Family, Guidance


@dataclass(frozen=True)
class Released:
    """What :func:`release` gave back.

    parts: of the pipeline, by name.
    bytes: of their weights, by device.
    """

    parts: tuple[str, ...]
    bytes: Mapping[str, int]

    def __repr__(self) -> str:
        if not self.parts:
            return "nothing released: the pipeline holds no text encoder"
        sizes = ", ".join(f"{format_bytes(size)} on {device}" for device, size in self.bytes.items())
        return f"released {', '.join(self.parts)}: {sizes}"


@checked
def encode_prompts(
    pipe: DiffusionPipeline,
    prompts: str | Sequence[str],
    *,
    device: str | torch.device | None = None,
    defaults: Mapping[str, Any] | None = None,
    vocabulary: Sequence[str] | None = None,
    **call: Any,
) -> dict[str, Any]:
    """The embeddings of prompts as keyword arguments for ``lens.run``; the pipeline needs its text encoders only.

    >>> from dit_lens import DiTLens
    >>> pipe = DiTLens.toy().pipe
    >>> texts = encode_prompts(pipe, ["a red circle", "a blue cross"], negative_prompt="", max_sequence_length=16)
    >>> texts["prompt_embeds"].shape[:2], texts["negative_prompt_embeds"].shape[:2]  # [row, token, channel]
    (torch.Size([2, 16]), torch.Size([2, 16]))

    On a small GPU the transformer is loaded afterwards:
    ``encode_prompts(DiffusionPipeline.from_pretrained(path, transformer=None, vae=None).to("cuda"), prompts)``.

    Negative embeddings come along where a negative prompt is given, or where the pipeline guides by an empty one.
    Arguments that held texts are set to None, so that defaults do not stand against the embeddings. Raises PromptError
    if embeddings cannot stand for this pipeline's prompts.

    pipe: a pipeline with its text encoders.
    prompts: one or several.
    device: where the text encoders work; they are moved there and back. By default, where the pipeline works.
    defaults, vocabulary: those of a lens.
    call: the pipeline's own arguments; those that do not concern text change nothing.
    """
    import torch

    needs_weights(pipe, "encoding prompts needs")
    family = find_by_pipeline(type(pipe))
    if family is None and getattr(pipe, "transformer", None) is not None:
        family = find(pipe)
    if family is None:
        raise _refuse(type(pipe), "no family describes it")
    names = list_encoded(type(pipe), family)
    prepared = prepare_call(
        pipe,
        prompts,
        seed=None if "generator" in call else 0,
        num_inference_steps=None,
        defaults=defaults or {},
        vocabulary=vocabulary,
        call=call,
        family=family,
    )
    _check(pipe, prepared)
    arguments = _complete_arguments(pipe, prepared)
    guidance = family.pipeline(type(pipe)).guidance
    with _move_encoders(pipe, device) as where:
        try:
            embeddings = _encode(pipe, names, arguments, guidance, where)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as problem:
            if isinstance(problem, DitLensError | torch.OutOfMemoryError):
                raise
            told = (
                f"{type(pipe).__name__} cannot encode these prompts: {str(problem).rstrip('.')}. Change the arguments"
            )
            raise PromptError(explain_unread(pipe) or f"{told} that concern text.") from problem
    texts = [name for name, value in arguments.items() if holds_text(name) and value is not None]
    return {**{name: None for name in texts if name != "prompt"}, **embeddings}


@at_weights
def encode_texts(
    lens: Session, prompts: str | Sequence[str], *, device: str | torch.device | None = None, **call: Any
) -> dict[str, Any]:
    """The embeddings of prompts by the text encoders of a lens; see :meth:`dit_lens.DiTLens.encode`."""
    return encode_prompts(lens.pipe, prompts, device=device, defaults=lens.defaults, vocabulary=lens.vocabulary, **call)


def find_encoders(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The text encoders a pipeline holds, by the name of the part."""
    return {name: part for name, part in pipe.components.items() if is_text_encoder(name) and hasattr(part, "forward")}


def release(pipe: DiffusionPipeline) -> Released:
    """Takes the text encoders out of a pipeline and says how much memory that gives back.

    Memory returns as soon as nothing else refers to them. A pipeline that is offloaded keeps them: there they leave
    the GPU by themselves.
    """
    import torch

    needs_weights(pipe, "releasing text encoders needs")
    if getattr(pipe, "_all_hooks", None):
        raise PromptError(
            "this pipeline is offloaded, so its text encoders leave the GPU by themselves. "
            "Release them before pipe.enable_model_cpu_offload(), or leave them."
        )
    found = find_encoders(pipe)
    sizes: dict[str, int] = {}
    for name, part in found.items():
        for tensor in (*part.parameters(), *part.buffers()):
            sizes[str(tensor.device)] = sizes.get(str(tensor.device), 0) + nbytes(tensor)
        setattr(pipe, name, None)
    names = tuple(found)
    found.clear()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return Released(names, sizes)


def list_encoded(kind: type[DiffusionPipeline], family: Family) -> tuple[str, ...]:
    """What ``encode_prompt`` of a pipeline class returns, in order, as the row of its family says.

    Raises PromptError if that is not all that stands for the prompts of its call.
    """
    check_source(kind, family, "encodes")
    encodes = family.pipeline(kind).encodes
    if isinstance(encodes, str):
        raise _refuse(kind, encodes)
    return encodes


def _check(pipe: DiffusionPipeline, prepared: Call) -> None:
    """Refuses what this very pipeline or call cannot do."""
    if not find_encoders(pipe):
        released = any(is_text_encoder(name) for name in pipe.components)
        raise PromptError(
            f"{type(pipe).__name__} holds no text encoder{' any more' if released else ''}. Encode prompts before the "
            "encoders are released, or load a pipeline with them."
        )
    if any((prepared.arguments.get(name) or 1) > 1 for name in IMAGES_PER_PROMPT):
        raise PromptError(
            "encoded prompts stand for one image each. List a prompt once for every image, with seed= as a list."
        )


def _encode(
    pipe: DiffusionPipeline,
    names: Sequence[str],
    arguments: Mapping[str, Any],
    guidance: Guidance | None,
    device: Any,
) -> dict[str, Any]:
    """The embeddings, and the negative ones: of the same call of encode_prompt, or of a second one.

    pipe: the pipeline.
    names: what its encode_prompt returns.
    arguments: those of the run, complete.
    guidance: how the pipeline guides.
    device: where its text encoders are.
    """
    known = call_parameters(type(pipe))
    found = _call_encode_prompt(pipe, names, arguments, device)
    if "negative_prompt_embeds" in known and "negative_prompt_embeds" not in names:
        negative = arguments.get("negative_prompt")
        if negative is None and guidance is not None and not guidance.negative:
            negative = [""] * len(arguments["prompt"])
        if negative is not None:
            others = [name for name in arguments if name != "prompt" and holds_text(f"negative_{name}")]
            texts = {name: arguments.get(f"negative_{name}") for name in others}
            second = _call_encode_prompt(pipe, names, {**arguments, **texts, "prompt": negative}, device)
            found |= {f"negative_{name}": value for name, value in second.items()}
    return {name: value for name, value in found.items() if name in known and value is not None}


def _call_encode_prompt(
    pipe: DiffusionPipeline, names: Sequence[str], arguments: Mapping[str, Any], device: Any
) -> dict[str, Any]:
    """One call of encode_prompt, by the names of what it returns.

    A run cannot be given all of that (text_ids, for instance). The pipeline will make the rest from the embeddings, so
    a second call, with embeddings in place of texts, must return the same.

    pipe: the pipeline.
    names: what its encode_prompt returns.
    arguments: those of the run, complete.
    device: where its text encoders are.
    """
    import torch

    with torch.no_grad():
        given = _select_arguments(pipe, arguments, device)
        found = _name_results(names, pipe.encode_prompt(**given))
        missing = [name for name in names if name not in call_parameters(type(pipe))]
        if not missing:
            return found
        embeddings = {name: None if holds_text(name) else found.get(name, value) for name, value in given.items()}
        try:
            again = _name_results(names, pipe.encode_prompt(**embeddings))
        except (AttributeError, TypeError, ValueError) as problem:
            again, why = {}, f" ({problem})"
        else:
            why = ""
    if not all(_same(found[name], again.get(name)) for name in names):
        raise _refuse(type(pipe), f"{', '.join(missing)} cannot be found from the embeddings alone{why}")
    return found


def _select_arguments(pipe: DiffusionPipeline, arguments: Mapping[str, Any], device: Any) -> dict[str, Any]:
    """The arguments of encode_prompt, as the pipeline's own call would give them."""
    scale = (arguments.get("joint_attention_kwargs") or {}).get("scale")
    own = {
        "device": device,
        "batch_size": len(arguments["prompt"]),
        "do_classifier_free_guidance": True,
        "lora_scale": scale,
        **dict.fromkeys(IMAGES_PER_PROMPT, 1),
    }
    given = {}
    for name, parameter in inspect.signature(type(pipe).encode_prompt).parameters.items():
        if name == "self" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name in own or name in arguments:
            given[name] = own[name] if name in own else arguments[name]
        elif parameter.default is parameter.empty:
            raise _refuse(type(pipe), f"its encode_prompt needs {name}=, which only its own call knows")
    return given


def _complete_arguments(pipe: DiffusionPipeline, prepared: Call) -> dict[str, Any]:
    """The pipeline's arguments, its own defaults included."""
    parameters = call_parameters(type(pipe)).values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    texts = {
        name: [value] * prepared.rows
        for name, value in defaults.items()
        if name.startswith("negative_") and holds_text(name) and isinstance(value, str)
    }
    return {**defaults, **texts, **prepared.arguments, "prompt": list(prepared.prompts or ())}


@contextmanager
def _move_encoders(pipe: DiffusionPipeline, device: str | torch.device | None) -> Generator[Any]:
    """The text encoders on a device for a while; yields the device."""
    if device is None:
        yield pipe._execution_device  # noqa: SLF001 diffusers offers no public way
        return
    before = {name: part.device for name, part in find_encoders(pipe).items()}
    try:
        for part in find_encoders(pipe).values():
            _move_part(part, device)
        yield device
    finally:
        for name, part in find_encoders(pipe).items():
            part.to(before[name])


def _move_part(part: Any, device: str | torch.device) -> None:
    """Moves a module; ExecutionError where there is no such device."""
    import torch

    try:
        where = torch.device(device)
        if where.type == "meta":
            raise ExecutionError("device='meta' has no memory. Name one on which encoders can work, such as 'cpu'.")
        part.to(where)
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError, TypeError, ValueError) as problem:
        if isinstance(problem, ExecutionError):
            raise
        raise ExecutionError(
            f"encoders cannot be moved to device={show(device)}: {problem}. Name a device of this machine."
        ) from problem


def _name_results(names: Sequence[str], returned: Any) -> dict[str, Any]:
    values = returned if len(names) > 1 else (returned,)
    return dict(zip(names, values, strict=True))


def _same(a: Any, b: Any) -> bool:
    import torch

    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a, b)
    return a is b or a == b


def _refuse(kind: type, why: str) -> PromptError:
    return PromptError(
        f"prompts of {kind.__name__} cannot be encoded beforehand: {why}. Pass the prompts to lens.run, and where "
        "memory is short offload with lens.pipe.enable_model_cpu_offload()."
    )
