"""What decides a pipeline's answers beside the call: its weights, and everything that is set around them.

Settings are the plain attributes of modules, of what they hold and of the tokenizers. Functions are hooks, and methods
that somebody put in the place of a package's. A run in the same process compares functions by identity; a study, which
goes on in other processes and on other machines, by what they do. What packages keep to themselves, in names that begin
with an underscore or speak of a cache, comes and goes with runs; in a user's own classes it counts.
"""

from __future__ import annotations

import enum
import functools
import inspect
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from dit_lens.core.runs.memory import list_kept
from dit_lens.core.runs.names import find_named, find_referred
from dit_lens.core.runs.provenance import checksum, describe_adapters, describe_scheduler, digest, find_modules
from dit_lens.core.runs.values import PLAIN, Reader, is_installed, is_own, list_mentioned

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_PLAIN = tuple(kind for kind in PLAIN if kind is not torch.device)  # where something lies decides nothing
FUNCTIONS = (FunctionType, MethodType, BuiltinFunctionType, staticmethod, classmethod, property)
DEEPEST = 5  # objects within objects that are followed
LARGEST = 1000  # items of a list that are looked at whenever it is compared
LONGEST = 60  # characters of a setting that is shown as it is

_NAMED = ("settings", "functions", "settings of torch")  # parts of a state of which it is told what differs

# What every module has, and says nothing of its answers but for hooks, which are looked at apart.
_OF_MODULES = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")

# Where something came from or lies, and notes that change without a change of any answer.
_PASSING = frozenset({
    "_name_or_path", "name_or_path", "_commit_hash", "_diffusers_version", "_use_default_values", "_is_hf_initialized",
    "_post_init_done", "transformers_version", "init_inputs", "init_kwargs", "files_loaded", "deprecation_warnings",
    "verbose", "_tokenizer", "_in_target_context_manager", "_hf_hook", "_old_forward", "hf_device_map", "device",
    "progress_bar",
}) | {"num_timesteps", "freqs_cis", "momentum_buffer"}  # what every run of some pipelines sets anew  # fmt: skip
# Of the attributes that packages keep to themselves, those that decide: others come and go with versions and runs.
_DECIDING = frozenset({
    "_internal_dict", "_attention_backend", "_attn_implementation_internal", "_experts_implementation_internal",
    "_diffusers_hook",
})  # fmt: skip


def describe_state(pipe: DiffusionPipeline, reader: Reader | None = None) -> dict[str, Any]:
    """What decides a pipeline's answers, as data that is equal in every process and on every machine.

    A component whose weights are not at hand has None.

    reader: what reads functions by value, and notes what cannot be read.
    """
    reader = reader or Reader(describe_part)
    return _state(pipe, portable=True, tell=lambda found: _by_value(found, reader))


def capture_state(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The same for later in this process: computed buffers, every setting of torch, and functions themselves."""
    return _state(pipe, portable=False, tell=dict)


def list_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs in two states, in words: the name of the part, or where in it. Parts that only one has are equal."""
    odd = []
    for part in before.keys() & now.keys():
        there, here = before[part], now[part]
        if part in _NAMED and there != here:
            there, here = _flatten(there), _flatten(here)
            odd += [f"{name} ({part})" for name in {**there, **here} if there.get(name) != here.get(name)]
        elif there != here:
            odd.append(part)
    return sorted(odd)


def _flatten(nested: Mapping[str, Any]) -> dict[str, Any]:
    """The innermost values of mappings, by their names."""
    found: dict[str, Any] = {}
    for name, value in nested.items():
        inner = {f"{name}.{key}": one for key, one in _flatten(value).items()} if isinstance(value, Mapping) else None
        found |= {name: value} if inner is None else inner
    return found


def describe_part(value: Any, reader: Reader) -> Any:
    """The state of a pipeline, of a lens's pipeline, or of a module, as data; None for anything else."""
    pipe = value if _is_pipeline(value) else getattr(value, "pipe", None)
    if _is_pipeline(pipe):
        return describe_state(pipe, reader)
    if not isinstance(value, nn.Module):
        return None
    look = _Look(portable=True)
    look.module("", value)
    return [str(value), checksum(value), look.take_settings(), _by_value(look.all_functions(), reader)]


def _state(
    pipe: DiffusionPipeline, *, portable: bool, tell: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    modules = find_modules(pipe)
    settings, functions = _look_at(pipe, portable=portable)
    return {
        "weights": {name: checksum(module, computed=not portable) for name, module in modules.items()},
        "adapters": describe_adapters(modules),
        "scheduler": describe_scheduler(pipe),
        "settings": settings,
        "functions": tell(functions),
        "settings of torch": _describe_torch(pipe.device.type, portable=portable),
    }


def capture_settings(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The part of :func:`capture_state` that a run may change by itself, as by what a module remembers."""
    settings, functions = _look_at(pipe, portable=False)
    return {"settings": settings, "functions": functions}


def _look_at(pipe: DiffusionPipeline, *, portable: bool) -> tuple[dict[str, dict[str, str]], dict[str, Any]]:
    """The settings of every component and of the pipeline itself, and all functions."""
    look, settings = _Look(portable), {}
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            look.module(name, part)
        elif part is not None:
            own = getattr(part, "__dict__", {})
            if part is pipe.scheduler:  # what it remembers is of its last run; its settings are described apart
                own = {attribute: value for attribute, value in own.items() if isinstance(value, FUNCTIONS)}
            look.part(name, part, own)
        settings[name] = look.take_settings() | look.vocabulary(part)
    own = {attribute: value for attribute, value in vars(pipe).items() if attribute not in pipe.components}
    look.part("pipe", pipe, {name: value for name, value in own.items() if name[0] != "_"})
    look.found[type(pipe).__name__, "config"].append(
        look.plain({name: value for name, value in pipe.config.items() if name not in pipe.components})
    )
    settings["pipe"] = look.take_settings()
    return settings, look.all_functions()


class _Look:
    """One look at the parts of a pipeline: their plain attributes, and functions where there may be foreign ones."""

    def __init__(self, portable: bool):
        self.found: dict[tuple[str, str], list[Any]] = defaultdict(list)  # class, attribute -> values
        self._portable = portable
        self._functions: dict[str, Any] = {}
        self._kinds: dict[type, None] = {}
        self._seen: dict[int, tuple[Any, Any]] = {}  # of objects that several modules share; kept, so that ids last

    def module(self, component: str, top: nn.Module) -> None:
        """Everything in a module and the modules inside it."""
        for path, module in top.named_modules():
            attributes = vars(module)
            self.part(f"{component}.{path}" if path else component, module, attributes)
            for hooks in _HOOKS:
                if attributes[hooks]:
                    for i, hook in enumerate(attributes[hooks].values()):
                        self._functions[f"{component}.{path} {hooks[1:-1]} {i}"] = hook

    def part(self, name: str, part: Any, attributes: Mapping[str, Any]) -> None:
        """A part's own attributes, and its class."""
        kind = type(part)
        self._kinds[kind] = None
        for attribute, value in attributes.items():
            if attribute in _OF_MODULES or self._passes(attribute, kind):
                continue
            if attribute == "forward" and (behind := _find_forward_behind(value)) is not None:
                if behind is kind.forward:
                    continue
                value = behind  # noqa: PLW2901 what nnsight stands for is looked at in its place
            if attribute == "_diffusers_hook":
                self._hook_registry(kind.__name__, value)
                continue
            if isinstance(value, FUNCTIONS) or (attribute == "forward" and callable(value)):
                if not (attribute == "forward" and "_hf_hook" in attributes):  # accelerate's, which moves weights
                    self._functions[f"{name}.{attribute}"] = value
            elif not isinstance(value, nn.Module):
                self.found[kind.__name__, attribute].append(
                    value if isinstance(value, _PLAIN) else self.plain(value, kind)
                )
        if "_hf_hook" in attributes and isinstance(before := attributes.get("_old_forward"), FunctionType):
            self._functions[f"{name}.forward"] = before

    def _hook_registry(self, kind: str, registry: Any) -> None:
        """The hooks of diffusers, such as caches. A run may make a registry of none; what they remember is passing."""
        if hooks := getattr(registry, "hooks", None):
            said = {
                name: [type(hook).__name__, self.plain(getattr(hook, "config", None))] for name, hook in hooks.items()
            }
            self.found[kind, "hooks of diffusers"].append(said)

    def take_settings(self) -> dict[str, str]:
        """Class and attribute -> its value, where all modules of the class have the same one, else a digest of all.

        The next look begins with none.
        """
        said, found = {}, self.found
        self.found = defaultdict(list)
        for (kind, attribute), values in found.items():
            texts = list(map(repr, values))
            text = texts[0] if len(set(texts)) == 1 else f"{len(texts)} values {digest(repr(texts).encode())}"
            said[f"{kind}.{attribute}"] = text if len(text) <= LONGEST else digest(text.encode())
        return said

    def vocabulary(self, part: Any) -> dict[str, str]:
        """What a tokenizer makes of words; how it last padded is not kept, as every call says it."""
        backend = getattr(part, "backend_tokenizer", None)
        if backend is None:
            return {}
        if not self._portable:
            return {"vocabulary": f"{id(backend)}, {len(part)} words"}
        kept = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
        return {"vocabulary": digest(json.dumps(kept).encode())}

    def all_functions(self) -> dict[str, Any]:
        """Name -> function: of hooks and attributes, of every class, and hooks on all modules."""
        found = dict(self._functions)
        for hooks in ("_global_forward_pre_hooks", "_global_forward_hooks"):
            for i, hook in enumerate(getattr(nn.modules.module, hooks).values()):
                found[f"every module {hooks[8:-1]} {i}"] = hook
        bases = {base: None for one in self._kinds for base in one.__mro__ if base is not object}
        for kind in bases:
            for name, value in vars(kind).items():
                if isinstance(value, FUNCTIONS) or (not self._portable and isinstance(value, _PLAIN)):
                    found[f"{kind.__module__}.{kind.__qualname__}.{name}"] = value
        return found | find_named(bases, portable=self._portable) | ({} if self._portable else find_referred(found))

    def _passes(self, attribute: str, kind: type) -> bool:
        """Whether an attribute of an object of a class decides nothing, or comes and goes by itself."""
        if attribute in _PASSING:
            return True
        if self._portable and _is_written_by_own(kind, attribute):
            return True
        private = attribute[0] == "_" and attribute not in _DECIDING
        return (private or "cache" in attribute) and not _is_read_by_own(kind, attribute)

    def plain(self, value: Any, owner: type = object, depth: int = 0) -> Any:
        """A value as plain data: an object by its class and attributes, a function by its name.

        owner: the class of the object that holds it.
        """
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, torch.Tensor | np.ndarray):
            return self._array(value)
        if isinstance(value, enum.Enum | np.generic):
            return str(value)
        if isinstance(value, (type, *FUNCTIONS)):
            return getattr(value, "__qualname__", type(value).__name__)
        if isinstance(value, torch.device | nn.Module) or depth > DEEPEST:
            return type(value).__name__
        if (seen := self._seen.get(id(value))) is not None:
            return seen[1]
        self._seen[id(value)] = value, type(value).__name__  # where it holds itself
        made = self._inside(value, depth + 1, owner)
        self._seen[id(value)] = value, made
        return made

    def _inside(self, value: Any, depth: int, owner: type) -> Any:
        if not self._portable and isinstance(value, dict | list | tuple | set) and len(value) > LARGEST:
            return [id(value), len(value)]
        if isinstance(value, Mapping):
            return {
                str(k): self.plain(v, owner, depth) for k, v in value.items() if not self._passes(str(k) or " ", owner)
            }
        if isinstance(value, list | tuple):
            return [self.plain(one, owner, depth) for one in value]
        if isinstance(value, set | frozenset):
            return sorted(repr(self.plain(one, owner, depth)) for one in value)
        self._kinds[type(value)] = None
        own = getattr(value, "__dict__", {})
        kind = type(value)
        return [kind.__name__, {k: self.plain(v, kind, depth) for k, v in own.items() if not self._passes(k, kind)}]

    def _array(self, value: torch.Tensor | np.ndarray) -> Any:
        """A tensor beside buffers. Machines compute them with other last digits, so a study knows its form only."""
        form = [type(value).__name__, str(value.dtype), list(value.shape)]
        if self._portable or (isinstance(value, torch.Tensor) and value.device.type == "meta"):
            return form
        raw = (
            value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            if isinstance(value, torch.Tensor)
            else value
        )
        return [*form, digest(raw.tobytes())]


def _find_forward_behind(forward: Any) -> Any:
    """What nnsight, where it stands in the place of a module's forward, calls; None where it does not stand there."""
    state = getattr(forward, "state", None) if type(forward).__module__.startswith("nnsight.") else None
    return getattr(state, "original", None)


def _is_read_by_own(kind: type, attribute: str) -> bool:
    """Whether a user's own code may read an attribute: all of a class of one's own, and what its methods mention."""
    own = [base for base in kind.__mro__ if not is_installed(base.__module__)]
    if not own:
        return False
    if all(base in own or base.__module__.partition(".")[0] in ("builtins", "torch") for base in kind.__mro__):
        return True
    return any(attribute in _mentioned_in(base) for base in own)


def _is_written_by_own(kind: type, attribute: str) -> bool:
    """Whether methods of a user's own class write an attribute as they run."""
    own = [base for base in kind.__mro__ if not is_installed(base.__module__)]
    return bool(own) and attribute in list_kept(own)


def _mentioned_in(kind: type) -> set[str]:
    """The names in the code of the methods that a class itself defines."""
    methods = [getattr(one, "fget", None) or getattr(one, "__func__", one) for one in vars(kind).values()]
    functions = [inspect.unwrap(one) for one in methods if isinstance(one, FunctionType)]
    return {name for one in functions for name in list_mentioned(one.__code__)}


def _by_value(functions: Mapping[str, Any], reader: Reader) -> dict[str, str]:
    """What functions do that are of no package."""
    own = {name: one for name, found in functions.items() if (one := _foreign(found)) is not None}
    return {name: reader.read(one) for name, one in own.items()}


def _foreign(value: Any) -> Any:
    """A function, or those of a property, if any of it is written outside of packages; else None."""
    value = getattr(value, "__func__", None) if isinstance(value, staticmethod | classmethod) else value
    if isinstance(value, property):
        parts = [one for one in (value.fget, value.fset) if _foreign(one) is not None]
        return parts or None
    if isinstance(value, MethodType | functools.partial):
        inner = value.func if isinstance(value, functools.partial) else value.__func__
        return None if _foreign(inner) is None else value
    if isinstance(value, FunctionType):
        return value if is_own(value) else None
    return None if value is None or isinstance(value, BuiltinFunctionType) else value


def _describe_torch(device: str, *, portable: bool) -> dict[str, str]:
    """What is set for all computations of a process. portable: only what a program sets, and no machine."""
    cast = torch.is_autocast_enabled(device) if torch.amp.is_autocast_available(device) else False
    found = {
        "autocast": torch.get_autocast_dtype(device) if cast else None,
        "dtype": torch.get_default_dtype(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "attention backend": _attention_backend(),
    }
    if not portable:
        cuda = torch.backends.cuda
        found |= {
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "threads": torch.get_num_threads(),
            "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark),
            "mkldnn": torch.backends.mkldnn.enabled,
            "sdp": (
                cuda.flash_sdp_enabled(),
                cuda.mem_efficient_sdp_enabled(),
                cuda.math_sdp_enabled(),
                cuda.cudnn_sdp_enabled(),
            ),
        }
    return {name: str(value) for name, value in found.items()}


def _attention_backend() -> Any:
    """The backend of diffusers for attentions that name none; older releases have no such choice."""
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    registry = getattr(dispatch, "_AttentionBackendRegistry", None)
    return None if registry is None else registry.get_active_backend()[0].value


def _is_pipeline(value: Any) -> bool:
    from diffusers import DiffusionPipeline

    return isinstance(value, DiffusionPipeline)
