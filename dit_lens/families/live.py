"""What of a live pipeline is not what was tried, or would silently change which calls and modules run."""

from __future__ import annotations

import functools
import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from dit_lens.errors import FamilyError
from dit_lens.families.module_tree import look_up

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dit_lens.families.anatomy import Anatomy

CACHES = "cache|fbc|pyramid_attention"  # in the names of diffusers' hooks that skip work
HOOKS = ("accelerate.hooks", "diffusers.hooks.hooks")  # whose wrappers pass on what a module computes
# Where hooks are defined that only move or cast weights.
HARMLESS = (*HOOKS, "diffusers.hooks.group_offloading", "diffusers.hooks.layerwise_casting")

# (stack, path within its blocks) -> the functions that ran there; stack "" is the transformer itself. What is called to
# compute an attention stands at the path of the attention, with PROCESSOR after it.
Functions = Mapping[tuple[str, str], frozenset[Callable[..., Any]]]
PROCESSOR = "()"
METHOD = ":"
CALLING = ("__call__", "_wrapped_call_impl", "_call_impl")  # what comes between the call of a module and its forward
MARKS = ("_diffusers_hook", "_hf_hook", "_orig_mod", "_compiled_call_impl", "_chunk_size", "fused_projections")
ODD = frozenset((*MARKS, *CALLING, "forward"))  # what a plain module does not have beside its class
TORCH = str(Path(nn.__file__).parents[1])


def refuse_unsafe(pipe: DiffusionPipeline) -> None:
    """Refuses what would silently change which calls and modules run; looked at before every run."""
    named = list(pipe.transformer.named_modules())  # once, as torch takes long to walk through them
    if (script := _find_script(named)) is not None:
        raise FamilyError(script)
    named = _select_odd(named)
    modules = [module for _, module in named]
    hooks = [name for module in modules for name in getattr(look_up(module, "_diffusers_hook"), "hooks", ())]
    if getattr(pipe.transformer, "is_cache_enabled", False) or any(re.search(CACHES, name) for name in hooks):
        raise FamilyError(
            "a step cache is enabled, which skips blocks without saying so. "
            "Call pipe.transformer.disable_cache() first, or load the pipeline again where there is no such method."
        )
    if (changing := _find_hook(named)) is not None:
        raise FamilyError(
            f"{changing} may change what this computes, unseen by names of tensors inside. Remove it first; hooks that "
            "move or cast weights are no harm."
        )
    if (calling := _find_other_call(named)) is not None:
        raise FamilyError(
            f"{calling} in the place of torch's own, which may change what is given to its forward and what that "
            "returns, unseen by names of tensors inside. Put back what was there; a change belongs into the forward."
        )
    if any(map(_compiled, modules)):
        raise FamilyError(
            "the transformer or a part of it is compiled, so nothing inside it can be read or changed. "
            "Load the pipeline again without compiling it."
        )
    if any(look_up(one, "_chunk_size") is not None for one in modules):
        raise FamilyError(
            "forward chunking is enabled, so an MLP is called with some rows or tokens at a time, and mlp.pre and "
            "mlp.post of one call are a part of them. Call pipe.transformer.disable_forward_chunking() first."
        )
    if any(map(_fused, modules)):
        raise FamilyError(
            "query, key and value projections are fused, so the modules that attn.q, attn.k and attn.v name are not "
            "called. Call pipe.transformer.unfuse_qkv_projections() first."
        )


def _select_odd(named: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """The modules of which anything that :func:`refuse_unsafe` looks for may be true: none of it is of a plain one."""
    odd_kinds: dict[type, bool] = {}  # for this look only, as classes can be patched
    found = []
    for path, module in named:
        kind, own = type(module), vars(module)
        if kind not in odd_kinds:
            odd_kinds[kind] = _is_odd_kind(kind)
        beside = [own, own["_modules"], own["_buffers"], own["_parameters"]]
        if odd_kinds[kind] or not all(map(ODD.isdisjoint, beside)):
            found.append((path, module))
    return found


def _is_odd_kind(kind: type) -> bool:
    """Whether all modules of a class are to be looked at: it has a mark, another call, or no plain forward."""
    if any(getattr(kind, name, None) is not None for name in MARKS):
        return True
    forward: Any = getattr(kind, "forward", None)
    plain = inspect.isfunction(forward) and not hasattr(forward, "_torchdynamo_orig_callable")
    return not plain or not all(_is_of_torch(getattr(kind, name)) for name in CALLING)


def _find_script(named: Iterable[tuple[str, nn.Module]]) -> str | None:
    """What is said of a part that TorchScript has made, which is no module of Python any more."""
    import torch

    for path, module in named:
        if isinstance(module, torch.jit.ScriptModule):
            return (
                f"pipe.transformer{'.' if path else ''}{path} was made by torch.jit, so nothing inside it can be read "
                "or changed, and what it computes cannot be looked up. Put back the module that it was made of."
            )
    return None


def _find_hook(named: Iterable[tuple[str, nn.Module]]) -> str | None:
    """A hook of diffusers or accelerate that does more than to move or cast weights; None where there is none."""
    for path, module in named:
        first = look_up(module, "_hf_hook")
        for hook in [*_hooks_of(module), *getattr(first, "hooks", [first] if first is not None else [])]:
            if type(hook).__module__ not in HARMLESS:
                return f"the hook {type(hook).__name__} on pipe.transformer{'.' if path else ''}{path}"
    return None


def _find_other_call(named: Iterable[tuple[str, nn.Module]]) -> str | None:
    """A module that torch does not call by itself; None where there is none. What is compiled is told apart."""
    others: dict[type, tuple[str, Any] | None] = {}
    for path, module in named:
        kind, own = type(module), vars(module)
        if path.endswith("processor"):  # it is called by an attention, and compared apart
            continue
        if kind not in others:
            found = ((name, getattr(kind, name)) for name in CALLING)
            others[kind] = next(((name, one) for name, one in found if not _is_of_torch(one)), None)
        other = next(((name, own[name]) for name in CALLING if name in own), others[kind])
        if other is not None and not _compiled(module):
            where = f"pipe.transformer{'.' if path else ''}{path}, a {kind.__name__},"
            return f"{where} has {_name(other[1])} as its {other[0]}"
    return None


def _is_of_torch(function: Any) -> bool:
    return getattr(getattr(function, "__code__", None), "co_filename", "").startswith(TORCH)


def _compiled(module: nn.Module) -> bool:
    """Whether a module, its call or its forward came out of ``torch.compile``."""
    if look_up(module, "_orig_mod") is not None or look_up(module, "_compiled_call_impl") is not None:
        return True
    forward = module.forward
    disabled = getattr(forward, "_torchdynamo_disable", False)  # what is never compiled has the other mark too
    return hasattr(forward, "_torchdynamo_orig_callable") and not disabled


def _fused(module: nn.Module) -> bool:
    """Whether an attention no longer calls to_q, to_k and to_v; older ones keep the mark, and tell by their processor.

    >>> module = nn.Module()
    >>> module.fused_projections, module.processor = True, "JointAttnProcessor2_0()"
    >>> _fused(module)
    False
    """
    newer = hasattr(type(module), "unfuse_projections")
    return bool(look_up(module, "fused_projections")) and (newer or "Fused" in str(getattr(module, "processor", "")))


def note_functions(anatomy: Anatomy) -> Functions:
    """What a transformer runs: its own forward, those of its blocks, those of their parts that have parts, and methods.

    Modules without parts are left out: adapters and quantisation exchange them, and their sites are whatever enters and
    leaves them.
    """
    found: dict[tuple[str, str], set[Callable[..., Any]]] = defaultdict(set)
    for path in ("", anatomy.family.final.module):
        found["", path].add(find_forward(anatomy.modules.get(path)))
    for stack in anatomy.family.stacks:
        for block in anatomy.blocks(stack):
            for path, module in block.named_modules():
                processor = getattr(module, "processor", None)
                if any(child is not processor for child in module.children()):
                    found[stack.name, path].add(find_forward(module))
                    for name, function in list_methods(type(module)).items():
                        found[stack.name, f"{path}{METHOD}{name}"].add(function)
                if processor is not None:
                    found[stack.name, path + PROCESSOR].add(type(processor).__call__)
    return {key: frozenset(functions) for key, functions in found.items()}


def find_difference(anatomy: Anatomy, tried: Functions) -> str | None:
    """What a live transformer runs in place of what was tried; None where it runs the same."""
    script = _find_script(anatomy.modules.get("").named_modules())
    return script or _find_twice(anatomy) or _find_reordered(anatomy) or _find_other(anatomy, tried)


def _find_twice(anatomy: Anatomy) -> str | None:
    """A module that is called in two places under names of two tensors; None where there is none."""
    places: dict[int, str] = {}
    for stack in anatomy.family.stacks:
        paths = [path.split(".") if path else [] for path in stack.modules]
        for number, block in enumerate(anatomy.blocks(stack)):
            for names in paths:
                module = _descend(block, names)
                if module is None:
                    continue
                place = ".".join(("pipe.transformer", stack.path, str(number), *names))
                if places.setdefault(id(module), place) != place:
                    return (
                        f"{places[id(module)]} and {place} are one module, which is called in both places, so names of "
                        "tensors inside cannot tell its calls apart. Put a copy (copy.deepcopy) into one of them."
                    )
    return None


def _find_reordered(anatomy: Anatomy) -> str | None:
    """A list that gives its blocks in another order than that of their numbers; None where there is none."""
    for stack in anatomy.family.stacks:
        blocks: Any = anatomy.modules.get(stack.path)
        numbered = list(map(id, blocks._modules.values()))  # noqa: SLF001 those that paths name
        for given in (list(blocks), [blocks[i] for i in range(len(blocks))]):
            if list(map(id, given)) != numbered:
                return (
                    f"pipe.transformer.{stack.path}, a {type(blocks).__name__}, gives its blocks in another order than "
                    "that of their numbers, by which sites are named. Put them into a plain torch.nn.ModuleList, in "
                    "the order in which they run."
                )
    return None


def _find_other(anatomy: Anatomy, tried: Functions) -> str | None:
    """A function that runs in the place of one that was tried; None where there is none."""
    for path in ("", anatomy.family.final.module):
        module = anatomy.modules.get(path)
        if (forward := find_forward(module)) not in tried["", path]:
            where = f"pipe.transformer{'.' if path else ''}{path}"
            return _describe(f"{where}, a {type(module).__name__}, runs", forward, tried["", path])
    of_kind = functools.cache(list_methods)  # for this look only, as classes can be patched
    for stack in anatomy.family.stacks:
        seen: set[tuple[str, type]] = set()  # whose methods were compared
        paths = [
            (key, key[1].split(".") if key[1] else [], tried[key])
            for key in tried
            if key[0] == stack.name and METHOD not in key[1]
        ]
        blocks = anatomy.blocks(stack)
        for number, block in enumerate(blocks):
            for (_, path), names, functions in paths:
                processed = path.endswith(PROCESSOR)
                module = _descend(block, [part.removesuffix(PROCESSOR) for part in names] if processed else names)
                if module is None:
                    continue
                where = f"pipe.transformer.{stack.path}.{number}{'.' if path else ''}{path.removesuffix(PROCESSOR)}"
                if processed:
                    processor = getattr(module, "processor", None)
                    if type(processor).__call__ not in functions:
                        kind = type(processor).__name__
                        return _describe(f"the attention {where} is computed by a {kind}:", type(processor), functions)
                elif (forward := find_forward(module)) not in functions:
                    kind = type(module).__name__
                    one_of = f", one of {len(blocks)} in {stack.path}," if not path else ""
                    return _describe(f"{where}, a {kind}{one_of or ','} runs", forward, functions)
                else:
                    methods = _list_own_methods(module, of_kind(type(module)), whole=(path, type(module)) not in seen)
                    seen.add((path, type(module)))
                    for name, method in methods.items():
                        usual = tried.get((stack.name, f"{path}{METHOD}{name}"))
                        if usual and method not in usual:
                            return _describe(f"{where}, a {type(module).__name__}, has another {name}:", method, usual)
    return None


def _list_own_methods(
    module: nn.Module, of_kind: Mapping[str, Callable[..., Any]], *, whole: bool
) -> dict[str, Callable[..., Any]]:
    """The functions behind a module's methods: those put on the module itself, and, where asked, those of its class."""
    own = {name: vars(module)[name] for name in of_kind.keys() & vars(module).keys()}
    own = {name: getattr(method, "__func__", method) for name, method in own.items()}
    return {**of_kind, **own} if whole else own


def list_methods(kind: type[nn.Module]) -> dict[str, Callable[..., Any]]:
    """The functions that a class of modules and its parents define beside ``forward``, those of torch left out."""
    found: dict[str, Callable[..., Any]] = {}
    for parent in reversed(kind.__mro__):
        if parent.__module__.partition(".")[0] not in ("torch", "builtins"):
            for name, value in vars(parent).items():
                function = getattr(value, "__func__", value)  # of a static method or one of the class
                if inspect.isfunction(function) and name not in ("forward", "__init__"):
                    found[name] = function
    return found


def find_processors(anatomy: Anatomy) -> Iterator[tuple[tuple[str, str], Any]]:
    """What computes each attention of the blocks, by stack and path within the block."""
    for stack in anatomy.family.stacks:
        for block in anatomy.blocks(stack):
            for path, module in block.named_modules():
                if (processor := getattr(module, "processor", None)) is not None:
                    yield (stack.name, path), processor


def find_forward(module: nn.Module) -> Callable[..., Any]:
    """The function that a call of a module comes to, seen through the hooks of accelerate, diffusers and nnsight.

    >>> from torch import nn
    >>> linear = nn.Linear(2, 2)
    >>> find_forward(linear) is nn.Linear.forward
    True
    >>> linear.forward = lambda x: 2 * x
    >>> find_forward(linear) is nn.Linear.forward
    False
    """
    own = vars(module).get("forward")
    while own is not None:
        if isinstance(own, functools.partial) and own.func.__module__ in HOOKS:
            replaced = [hook for hook in _hooks_of(module) if hasattr(hook, "new_forward")]
            own = replaced[0].new_forward.__func__ if replaced else getattr(own, "__wrapped__", None)
        elif type(own).__module__.startswith("nnsight."):
            own = None
        elif inspect.ismethod(own) and own.__self__ is module:
            return own.__func__
        else:
            return own
    return type(module).forward


def _hooks_of(module: nn.Module) -> list[Any]:
    """The hooks of diffusers on a module."""
    return list(getattr(look_up(module, "_diffusers_hook"), "hooks", {}).values())


def _descend(module: nn.Module, names: list[str]) -> nn.Module | None:
    """The module at a path, None where there is none."""
    found: nn.Module | None = module
    for name in names:
        found = None if found is None else found._modules.get(name)  # noqa: SLF001 fast, as get_submodule is not
    return found


def _describe(what: str, found: Any, tried: frozenset[Callable[..., Any]]) -> str:
    """What is there, what was tried, and what to do."""
    usual = " or ".join(sorted(map(_name, tried)))
    module = getattr(found, "__module__", None) or "?"
    return (
        f"{what} {_name(found)} of {module}, and this family was tried with {usual}. "
        "Names of tensors inside might mean something else. Put back what was there, or load the pipeline again."
    )


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", None) or repr(function)
