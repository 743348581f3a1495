"""What the source of diffusers says of a pipeline or a transformer, to check what the row of a family declares."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from types import CodeType
from typing import TYPE_CHECKING, Any

from dit_lens.errors import FamilyError
from dit_lens.families.arguments import holds_embedding
from dit_lens.families.calls import call_parameters, find_call

if TYPE_CHECKING:
    from torch import nn

    from dit_lens.families.row import Family

# How prepare_latents returns latents that it is given: as they are,
_UNCHANGED = (
    r"if latents is not None:\n(\s+latent_image_ids = .*\n)?\s+return latents\.to\("
    r"|else:\n(\s+if latents\.shape != shape:\n\s+raise .*\n)?\s+latents = latents\.to\(.*\n+\s+return latents\b"
)
# or, an image of them, with every pixel as a token.
_FLATTENED = (
    r"else:\n\s+latents = latents\.to\(.*\n+(\s+latent_ids = .*\n)+\n?\s+latents = self\._pack_latents\(latents\)"
)


def find_encoded(kind: type) -> tuple[str, ...] | str:
    """What ``encode_prompt`` of a pipeline class returns, by the names in its source; or why that is not enough."""
    encode: Any = getattr(kind, "encode_prompt", None)
    if encode is None:
        return "it has no encode_prompt"
    if "image" in inspect.signature(encode).parameters:
        return "it encodes prompts together with images"
    others = re.findall(r"self\.(encode_prompt\w+)", inspect.getsource(find_call(kind)))
    if others:
        return f"it also encodes by {others[0]}"
    tree = ast.parse(textwrap.dedent(inspect.getsource(encode)))
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    parts = [node.elts if isinstance(node, ast.Tuple) else [node] for node in returned]
    names = [tuple(part.id if isinstance(part, ast.Name) else "" for part in some) for some in parts]
    if len(names) != 1 or not all(names[0]):
        return "its encode_prompt returns values without names"
    wanted = [name for name in call_parameters(kind) if holds_embedding(name)]
    if not wanted:
        return "it takes no prompt_embeds="
    if lost := [name for name in wanted if name not in names[0]]:
        return f"its encode_prompt does not return {', '.join(lost)}"
    return names[0]


def find_latents(kind: type) -> str | None:
    """How ``latents`` reach the transformer: "unchanged", "flattened" or None, as ``Pipeline.takes_latents``."""
    prepare: Any = getattr(kind, "prepare_latents", None)
    source = "" if prepare is None else inspect.getsource(prepare)
    if re.search(_FLATTENED, source):
        return "flattened"
    return "unchanged" if re.search(_UNCHANGED, source) else None


def returns_latents(kind: type) -> bool:
    """Whether a pipeline class can return latents in place of images."""
    return '"latent"' in inspect.getsource(inspect.unwrap(find_call(kind)))


def find_without_gradient(transformer: nn.Module) -> tuple[str, ...]:
    """Methods of a transformer's modules that torch.no_grad decorates and a forward pass calls, as class and name.

    What is called is followed by name, from ``forward`` on, through all classes. Methods that fuse projections, or that
    initialise the weights of an adapter, are not.
    """
    kinds: set[type] = {type(module) for module in transformer.modules()}
    kinds |= {type(module.processor) for module in transformer.modules() if hasattr(module, "processor")}
    methods = {kind: dict(inspect.getmembers(kind, inspect.isfunction)) for kind in kinds}
    called, new = set(), {"forward", "__call__"}
    while new:
        called |= new
        bodies = [inspect.unwrap(found[name]) for found in methods.values() for name in new & found.keys()]
        new = {name for body in bodies for name in _names_used(body.__code__)} - called
    return tuple(
        sorted(
            f"{kind.__name__}.{name}"
            for kind, found in methods.items()
            for name, method in found.items()
            if name in called and method.__code__.co_name == "decorate_context"
        )
    )


def _names_used(code: CodeType) -> set[str]:
    """The names that a function looks up, and those that functions inside it do."""
    inside = (one for one in code.co_consts if isinstance(one, CodeType))
    return {*code.co_names, *(name for one in inside for name in _names_used(one))}


def check_source(kind: type, family: Family, field: str) -> None:
    """FamilyError where the source of a pipeline class says something else than its row.

    field: of :class:`~dit_lens.families.Pipeline`, "encodes" or "takes_latents".
    """
    declared = getattr(family.pipeline(kind), field)
    try:
        found = {"encodes": find_encoded, "takes_latents": find_latents}[field](kind)
    except (OSError, SyntaxError):  # the source cannot be read
        return
    if found != declared:
        entry = f"Pipeline({kind.__name__!r}, ...)"
        raise FamilyError(
            f"{kind.__name__} is not as the row of {family.name} says: {field}={declared!r} is declared, and its "
            f"source says {found!r}. Describe it with "
            f"dit_lens.register_family(dataclasses.replace(row, pipelines=({entry}, *row.pipelines)))."
        )
