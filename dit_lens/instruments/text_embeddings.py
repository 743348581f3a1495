"""Prompts become embeddings before a run, so that text encoders and transformer need not share a GPU."""

from __future__ import annotations

import ast
import gc
import inspect
import re
import textwrap
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dit_lens.core.plan.cost import format_bytes, nbytes
from dit_lens.core.request.call import EMBEDDING, TEXT, Call, needs_weights, prepare_call
from dit_lens.errors import PromptError
from dit_lens.families import families

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from dit_lens.families import Guidance

ENCODER = r"text_encoder(_\d+)?"
EACH = ("num_images_per_prompt", "num_videos_per_prompt")


@dataclass(frozen=True)
class Released:
    """What :func:`release` gave back: the pipeline's parts, and bytes of their weights by device."""

    parts: tuple[str, ...]
    bytes: Mapping[str, int]

    def __repr__(self) -> str:
        if not self.parts:
            return "nothing released: the pipeline holds no text encoder"
        sizes = ", ".join(f"{format_bytes(size)} on {device}" for device, size in self.bytes.items())
        return f"released {', '.join(self.parts)}: {sizes}"


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

    call: the pipeline's own arguments; those that do not concern text change nothing. Negative embeddings come along
    where a negative prompt is given, or where the pipeline guides by an empty one. Arguments that held texts are
    set to None, so that defaults do not stand against the embeddings.
    device: where the text encoders work; they are moved there and back. By default, where the pipeline works.
    defaults, vocabulary: those of a lens. Raises PromptError where embeddings cannot stand for this pipeline's prompts.
    """
    needs_weights(pipe, "encoding prompts needs")
    prepared = prepare_call(
        pipe,
        prompts,
        seed=None if "generator" in call else 0,
        num_inference_steps=None,
        defaults=defaults or {},
        vocabulary=vocabulary,
        call=call,
    )
    names = returned_names(type(pipe))
    _check(pipe, prepared)
    with _placed(pipe, device) as where:
        found = _encoded(pipe, names, prepared, where)
    cleared = {name: None for name, value in _arguments(pipe, prepared).items() if _is_text(name) and value is not None}
    return {**{name: None for name in cleared if name != "prompt"}, **found}


def encoders(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The text encoders a pipeline holds, by the name of the part."""
    return {
        name: part for name, part in pipe.components.items() if re.fullmatch(ENCODER, name) and hasattr(part, "forward")
    }


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
    found = encoders(pipe)
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


def returned_names(kind: type[DiffusionPipeline]) -> list[str]:
    """What encode_prompt of a pipeline class returns, by the names in its source.

    PromptError where that is not all that stands for the prompts of its call.
    """
    encode = getattr(kind, "encode_prompt", None)
    if encode is None:
        raise _refusal(kind, "it has no encode_prompt")
    if "image" in inspect.signature(encode).parameters:
        raise _refusal(kind, "it encodes prompts together with images")
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(encode)))
        others = re.findall(r"self\.(encode_prompt\w+)", inspect.getsource(kind.__call__))
    except (OSError, SyntaxError) as problem:
        raise _refusal(kind, f"the source of its encode_prompt cannot be read ({problem})") from problem
    if others:
        raise _refusal(kind, f"it also encodes by {others[0]}")
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    parts = [node.elts if isinstance(node, ast.Tuple) else [node] for node in returned]
    named = [[part.id if isinstance(part, ast.Name) else "" for part in some] for some in parts]
    if len(named) != 1 or not all(named[0]):
        raise _refusal(kind, "its encode_prompt returns values without names")
    wanted = [name for name in inspect.signature(kind.__call__).parameters if re.fullmatch(EMBEDDING, name)]
    lost = [name for name in wanted if name not in named[0]]
    if not wanted or lost:
        why = f"its encode_prompt does not return {', '.join(lost)}" if lost else "it takes no prompt_embeds="
        raise _refusal(kind, why)
    return named[0]


def _check(pipe: DiffusionPipeline, prepared: Call) -> None:
    """Refuses what this very pipeline or call cannot do."""
    if not encoders(pipe):
        gone = any(re.fullmatch(ENCODER, name) for name in pipe.components)
        raise PromptError(
            f"{type(pipe).__name__} holds no text encoder{' any more' if gone else ''}. Encode prompts before the "
            "encoders are released, or load a pipeline with them."
        )
    if any((prepared.arguments.get(name) or 1) > 1 for name in EACH):
        raise PromptError(
            "encoded prompts stand for one image each. List a prompt once for every image, with seed= as a list."
        )


def _encoded(pipe: DiffusionPipeline, names: Sequence[str], prepared: Call, device: Any) -> dict[str, Any]:
    """The embeddings, and the negative ones: of the same call of encode_prompt, or of a second one."""
    arguments = _arguments(pipe, prepared)
    known = inspect.signature(type(pipe).__call__).parameters
    found = _ask(pipe, names, arguments, device)
    if "negative_prompt_embeds" in known and "negative_prompt_embeds" not in names:
        negative = arguments.get("negative_prompt")
        guidance = _guidance(pipe)
        if negative is None and guidance is not None and not guidance.negative:
            negative = [""] * prepared.rows
        if negative is not None:
            texts = {name: arguments.get(f"negative_{name}") for name in arguments if re.fullmatch(r"prompt_\d", name)}
            second = _ask(pipe, names, {**arguments, **texts, "prompt": negative}, device)
            found |= {f"negative_{name}": value for name, value in second.items()}
    return {name: value for name, value in found.items() if name in known and value is not None}


def _ask(pipe: DiffusionPipeline, names: Sequence[str], arguments: Mapping[str, Any], device: Any) -> dict[str, Any]:
    """One call of encode_prompt. What a run cannot be told must follow from what it can: it is asked for twice."""
    import torch

    with torch.no_grad():
        given = _accepted(pipe, arguments, device)
        found = _results(names, pipe.encode_prompt(**given))
        untold = [name for name in names if name not in inspect.signature(type(pipe).__call__).parameters]
        if not untold:
            return found
        told = {name: None if _is_text(name) else found.get(name, value) for name, value in given.items()}
        try:
            again = _results(names, pipe.encode_prompt(**told))
        except (AttributeError, TypeError, ValueError) as problem:
            again, why = {}, f" ({problem})"
        else:
            why = ""
    if not all(_same(found[name], again.get(name)) for name in names):
        raise _refusal(type(pipe), f"{', '.join(untold)} cannot be found from the embeddings alone{why}")
    return found


def _accepted(pipe: DiffusionPipeline, arguments: Mapping[str, Any], device: Any) -> dict[str, Any]:
    """The arguments of encode_prompt, as the pipeline's own call would give them."""
    scale = (arguments.get("joint_attention_kwargs") or {}).get("scale")
    own = {
        "device": device,
        "batch_size": len(arguments["prompt"]),
        "do_classifier_free_guidance": True,
        "lora_scale": scale,
        **dict.fromkeys(EACH, 1),
    }
    given = {}
    for name, parameter in inspect.signature(type(pipe).encode_prompt).parameters.items():
        if name == "self" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name in own or name in arguments:
            given[name] = own[name] if name in own else arguments[name]
        elif parameter.default is parameter.empty:
            raise _refusal(type(pipe), f"its encode_prompt needs {name}=, which only its own call knows")
    return given


def _arguments(pipe: DiffusionPipeline, prepared: Call) -> dict[str, Any]:
    """The pipeline's arguments, its own defaults included."""
    parameters = inspect.signature(type(pipe).__call__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    texts = {
        name: [value] * prepared.rows
        for name, value in defaults.items()
        if re.fullmatch(r"negative_prompt(_\d)?", name) and isinstance(value, str)
    }
    return {**defaults, **texts, **prepared.arguments, "prompt": list(prepared.prompts or ())}


def _guidance(pipe: DiffusionPipeline) -> Guidance | None:
    """How a pipeline is guided, found without its transformer."""
    kind = type(pipe).__name__
    return next((family.guidance_of(pipe) for family in families() if kind in family.pipelines), None)


@contextmanager
def _placed(pipe: DiffusionPipeline, device: str | torch.device | None) -> Generator[Any]:
    """The text encoders on a device for a while; yields the device."""
    if device is None:
        yield pipe._execution_device  # noqa: SLF001 diffusers offers no public way
        return
    before = {name: part.device for name, part in encoders(pipe).items()}
    try:
        for part in encoders(pipe).values():
            part.to(device)
        yield device
    finally:
        for name, part in encoders(pipe).items():
            part.to(before[name])


def _results(names: Sequence[str], returned: Any) -> dict[str, Any]:
    values = returned if len(names) > 1 else (returned,)
    return dict(zip(names, values, strict=True))


def _same(a: Any, b: Any) -> bool:
    import torch

    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a, b)
    return a is b or a == b


def _is_text(name: str) -> bool:
    return re.fullmatch(TEXT, name) is not None


def _refusal(kind: type, why: str) -> PromptError:
    return PromptError(
        f"prompts of {kind.__name__} cannot be encoded beforehand: {why}. Pass the prompts to lens.run, and where "
        "memory is short offload with lens.pipe.enable_model_cpu_offload()."
    )
