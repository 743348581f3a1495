"""The pipeline call a run makes: prompts, seeds and the pipeline's own arguments, checked before anything happens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dit_lens.arguments.numbers import as_plain, as_seed
from dit_lens.core.request.division import Division, PromptSpan
from dit_lens.core.request.values import (
    allow_none,
    check_count,
    check_steps,
    check_text,
    check_values,
    copy_of,
    is_several,
    list_values,
)
from dit_lens.errors import ExecutionError, PromptError, nearest
from dit_lens.families.arguments import IMAGES_PER_PROMPT, belongs_to_prompts, holds_text, stands_for_prompts
from dit_lens.families.calls import call_parameters
from dit_lens.families.row import Pipeline, Prompts

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dit_lens.families import Family


MOST_ROWS = 2**16  # images in one call, far more than any memory holds
OUTPUTS = ("pil", "np", "pt", "latent")
USUAL = Division(Pipeline("", None), Prompts())  # of a pipeline whose row says nothing else


@dataclass(frozen=True)
class Call:
    """One checked call of the pipeline.

    prompts: one for each row of prompts; None where embeddings stand for them.
    seeds: one for each image; None with a generator of the user's own.
    arguments: everything else the pipeline is called with.
    rows: images in the batch.
    division: whose each argument is.
    """

    prompts: tuple[str, ...] | None
    seeds: tuple[int, ...] | None
    arguments: dict[str, Any]
    rows: int
    division: Division = USUAL

    @property
    def images_per_prompt(self) -> int:
        """How many images are drawn of each prompt."""
        return _images_per_prompt(self.arguments)

    @property
    def draws(self) -> tuple[tuple[str | None, int | None], ...]:
        """Of each image its prompt and its seed; None for what is given otherwise."""
        n, unknown = self.images_per_prompt, [None] * self.rows
        prompts = unknown if self.prompts is None else [prompt for prompt in self.prompts for _ in range(n)]
        return tuple(zip(prompts, self.seeds or unknown, strict=True))

    @property
    def count(self) -> int:
        """How many prompts there are, or embeddings in place of them."""
        return self.rows // self.images_per_prompt

    def keywords(self) -> dict[str, Any]:
        """The call as keyword arguments of the pipeline, whose own they are: some pipelines write to them.

        Embeddings are repeated for each image of a prompt here: many pipelines repeat none that they are given, or only
        some. Images to start from are repeated for each row, so that its seed alone says how its image is encoded.
        """
        import torch

        call = {name: copy_of(value) for name, value in self.arguments.items()}
        if (function := call.get("callback_on_step_end")) is not None:
            call["callback_on_step_end"] = allow_none(function)
        if self.prompts is not None:
            call["prompt"] = list(self.prompts)
        elif self.images_per_prompt > 1:
            call = {name: self._repeat(name, value) for name, value in call.items()}
        if self.seeds is not None:
            call = {name: self.division.spread(name, value, self.rows) for name, value in call.items()}
            call["generator"] = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        return call

    def _repeat(self, name: str, value: Any) -> Any:
        """An argument of a call that draws one image of each of its prompts, of which there are as many as images."""
        if name in IMAGES_PER_PROMPT and value is not None:
            return 1
        entries = value is not None and self.division.holding(name) == "prompts"
        if entries and self.division.count(name, value) == self.rows:  # repeated already
            return value
        return self.division.repeat(name, value, self.images_per_prompt)

    def for_prompts(self, prompts: range, *, asked: bool = True) -> Call:
        """The same call for some of its prompts, or of what stands for them. asked: whether batch_size= asks for it."""
        if self.seeds is None and asked:
            raise PromptError("batch_size= splits prompts with a seed. Leave it out when passing generator=.")
        if self.seeds is None:
            raise PromptError("prompts are split with a seed. Pass seed= instead of generator=, or fewer prompts.")
        part = PromptSpan(prompts, self.count, self.images_per_prompt, asked)
        return replace(
            self,
            prompts=None if self.prompts is None else self.prompts[prompts.start : prompts.stop],
            seeds=tuple(self.seeds[row] for row in part.rows),
            arguments={name: self.division.select(name, value, part) for name, value in self.arguments.items()},
            rows=len(part.rows),
        )


def prepare_call(
    pipe: DiffusionPipeline,
    prompt: str | Sequence[str] | None,
    *,
    seed: int | Sequence[int] | None,
    num_inference_steps: int | None,
    defaults: Mapping[str, Any],
    vocabulary: Sequence[str] | None,
    call: Mapping[str, Any],
    family: Family | None = None,
) -> Call:
    """Checks and completes a call; PromptError says what is wrong with it.

    pipe: the pipeline.
    prompt: one or several; None where embeddings in ``call`` stand for them.
    seed: one for all prompts, or one for each image; None: a random one.
    num_inference_steps: denoising steps; None: as ``call`` or the pipeline says.
    defaults: arguments of every call.
    vocabulary: the only words a prompt may have; None: any.
    call: the pipeline's own arguments.
    family: of the pipeline; None: one whose row says nothing of its arguments.
    """
    signature = call_parameters(type(pipe))
    division = USUAL if family is None else Division.of(pipe, family)
    _check_arguments(type(pipe).__name__, signature, call, seed)
    arguments = check_values(signature, {**defaults, **call})
    arguments = {name: value for name, value in arguments.items() if value is not None or name not in IMAGES_PER_PROMPT}
    arguments |= _check_output(type(pipe).__name__, signature, arguments)
    if prompt is not None and "prompt" not in signature:
        raise PromptError(f"{type(pipe).__name__} takes no prompt. Pass what it draws, such as class_labels=[207].")
    held = [name for name in arguments if division.holding(name) == "prompts" and arguments[name] is not None]
    if held:  # it takes long to find a pipeline's device
        device = pipe._execution_device  # noqa: SLF001 diffusers offers no public way
        arguments |= {name: _as_entries(name, arguments[name], device) for name in held}
    _check_classes(pipe, division.prompts, arguments.get("class_labels"))
    given = _find_embeddings(arguments, division)
    prompts = _check_prompts(prompt, given)
    count = division.count(given or "", arguments[given or ""]) if prompts is None else len(prompts)
    if count < 1:
        raise PromptError(f"{given}= has no entry. Give one for each prompt.")
    steps = arguments.get("num_inference_steps") if num_inference_steps is None else num_inference_steps
    steps = signature["num_inference_steps"].default if steps is None else steps
    arguments["num_inference_steps"] = check_steps("num_inference_steps", check_count("num_inference_steps", steps))
    texts = {
        name: _list_texts(name, value, count)
        for name, value in arguments.items()
        if name != "prompt" and holds_text(name) and value is not None
    }
    arguments |= texts
    if vocabulary is not None:
        _check_words([*(prompts or ()), *(text for some in texts.values() for text in some)], vocabulary)
    rows = count * _images_per_prompt(arguments)
    if rows > MOST_ROWS:
        raise PromptError(
            f"{count} prompts with {_images_per_prompt(arguments):,} images each are {rows:,} images in one call, more "
            f"than {MOST_ROWS:,}. Draw them in several runs."
        )
    arguments |= {name: _fit_entries(name, arguments[name], count, rows, division) for name in held}
    _check_rows(arguments, rows)
    seeds = None if "generator" in call else _list_seeds(seed, count, rows)
    if seeds is not None:
        division.check_spread(arguments, rows, rows // count)
    return Call(None if prompts is None else tuple(prompts), seeds, arguments, rows, division)


def _images_per_prompt(arguments: Mapping[str, Any]) -> int:
    return next((arguments[name] for name in IMAGES_PER_PROMPT if arguments.get(name)), 1)


def _check_classes(pipe: DiffusionPipeline, conditioning: Prompts, labels: Sequence[int] | None) -> None:
    if labels is None or conditioning.classes is None:
        return
    count = pipe.transformer.config[conditioning.classes]
    for label in labels:
        if not isinstance(as_plain(label), int) or not 0 <= label < count:
            raise PromptError(f"class {label} does not exist: this model has {count}, 0 to {count - 1}.")


def _check_arguments(pipeline: str, signature: Mapping[str, Any], call: Mapping[str, Any], seed: Any) -> None:
    for name in call:
        if name == "return_dict":
            raise PromptError("return_dict= is set by the lens, which always returns a Run. Leave it out.")
        if name not in signature or name == "self":
            known = [known for known in signature if known not in ("self", "return_dict")]
            raise PromptError(f"{pipeline} takes no argument {name!r}.{nearest(name, known, 'It takes')}")
    if "generator" in call and seed is not None:
        raise PromptError("seed= and generator= both fix the noise. Pass one of them.")


def _check_output(pipeline: str, signature: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The output type that the pipeline is asked for: a Run keeps latents, or images as PIL has them."""
    asked = arguments.get("output_type", "pil")
    if asked not in OUTPUTS:
        raise PromptError(
            f"output_type={asked!r} is not kept by a Run.{nearest(str(asked), OUTPUTS)} For arrays, use "
            "numpy.asarray(run.images[0])."
        )
    if "num_frames" in signature and asked != "latent":
        raise PromptError(f"{pipeline} draws videos, of which a Run keeps latents only. Pass output_type='latent'.")
    return {"output_type": "pil"} if asked in ("np", "pt") else {}


def _check_prompts(prompt: str | Sequence[str] | None, given: str | None) -> list[str] | None:
    """Prompts as a list. given: the argument that stands for them, if any."""
    if prompt is None:
        if given is None:
            raise PromptError(
                "there is nothing to draw: pass a prompt, a list of prompts, or prompt_embeds= (class_labels= to a "
                "model of classes)."
            )
        return None
    if given is not None:
        raise PromptError(f"a prompt and {given}= were both given. Pass one of them.")
    prompts = list_values(prompt) if is_several(prompt) else [as_plain(prompt)]
    if not prompts:
        raise PromptError("the list of prompts is empty. Pass at least one prompt.")
    return [check_text("a prompt", one) for one in prompts]


def _find_embeddings(arguments: Mapping[str, Any], division: Division) -> str | None:
    """The argument that stands for prompts, where one was passed: one entry for each."""
    names = [name for name in arguments if stands_for_prompts(name) and name not in division.prompts.layered]
    return min((name for name in names if arguments[name] is not None), default=None)


def _list_texts(name: str, value: str | Sequence[str], count: int) -> list[str]:
    """One text per prompt; a single one stands for all."""
    texts = list_values(value) if is_several(value) else [value] * count
    if len(texts) != count:
        raise PromptError(f"{name}= lists {len(texts)} texts for {count} prompts. Give one for all, or one each.")
    return [check_text(f"{name}=", text) for text in texts]


def _check_words(texts: Sequence[str], vocabulary: Sequence[str]) -> None:
    for text in texts:
        for word in text.lower().split():
            if word not in vocabulary:
                raise PromptError(
                    f"{word!r} in {text!r} is not a word this toy has learned.{nearest(word, vocabulary, 'It knows')}"
                )


def _as_entries(name: str, value: Any, device: Any) -> Any:
    """Embeddings, masks or classes with an axis of prompts, on the pipeline's device: it does not move them itself."""
    import torch

    if name == "class_labels" and is_several(value):
        return list_values(value)
    if isinstance(value, list | tuple):
        return [_as_entries("", one, device) for one in value]
    if type(value).__module__ == "numpy":
        value = torch.as_tensor(value)
    if not name:  # an entry of a list
        return value if not hasattr(value, "to") or device.type == "meta" else value.to(device)
    axes = 3 if stands_for_prompts(name.removeprefix("negative_")) and "clip" not in name else 2
    axes = 1 if not belongs_to_prompts(name) or name == "class_labels" or "cu_seqlens" in name else axes
    if not hasattr(value, "ndim") or value.ndim < axes:
        what = repr(value) if not hasattr(value, "shape") else f"of shape {list(value.shape)}"
        raise PromptError(
            f"{name}= is {what}, without an axis of prompts. Pass one entry for each prompt: {name}[None]."
        )
    return value if device.type == "meta" else value.to(device)


def _fit_entries(name: str, value: Any, count: int, rows: int, division: Division) -> Any:
    """Entries for each prompt, or each image; a single one stands for all."""
    found = division.count(name, value)
    if found in (count, rows):
        return value
    if found == 1:
        return division.repeat(name, value, count)
    raise PromptError(f"{name}= has {found} entries for {count} prompts. Give one for all, or one each.")


def _check_rows(arguments: Mapping[str, Any], rows: int) -> None:
    """PromptError where there are not as many latents or generators as images."""
    latents, generator = arguments.get("latents"), arguments.get("generator")
    if latents is not None and (getattr(latents, "ndim", 0) < 3 or len(latents) != rows):
        shape = getattr(latents, "shape", None)
        what = f"a {type(latents).__name__}" if shape is None else f"of shape {list(shape)}"
        raise PromptError(f"latents= is {what} for {rows} images. Give a tensor with one entry for each image.")
    if isinstance(generator, list) and len(generator) != rows:
        raise PromptError(
            f"generator= lists {len(generator)} generators for {rows} images. Give one for all, or one for each image."
        )


def _list_seeds(seed: int | Sequence[int] | None, count: int, rows: int) -> tuple[int, ...]:
    """One seed per image: an integer for every prompt, counted up over the images of one prompt; or a list."""
    import torch

    if seed is None:
        seed = int(torch.randint(2**31 - 1, ()))
    if is_several(seed):
        seeds = list_values(seed)
        if len(seeds) != rows:
            raise PromptError(
                f"seed= lists {len(seeds)} seeds for {rows} images. Give one integer for all, or one seed per image."
            )
        return tuple(as_seed(one) for one in seeds)
    first = as_seed(seed)
    return tuple(as_seed(first + j) for _ in range(count) for j in range(rows // count))


def check_latents(call: Call, grid: tuple[int, int] | None, family: Family) -> None:
    """PromptError for latents of another size than the image that is asked for.

    call: the call.
    grid: its image tokens; None where only the run can tell.
    family: of the pipeline.
    """
    latents, pipeline = call.arguments.get("latents"), call.division.pipeline
    if latents is None or grid is None or pipeline.takes_latents != "unchanged" or not pipeline.tested:
        return
    axes, (h, w), patch = family.grid.axes, grid, family.latents.patch
    if axes == "tokens" and latents.ndim == 3:
        fits, wanted = latents.shape[1] == h * w, f"{h * w} tokens"
    elif axes == "bchw" and latents.ndim == 4:
        fits = tuple(side // patch for side in latents.shape[2:]) == grid
        wanted = f"{h * patch} x {w * patch} pixels of latents"
    else:
        return
    if not fits:
        raise PromptError(
            f"latents= is of shape {list(latents.shape)}, and an image of this size has {wanted} ({h} x {w} tokens). "
            "Give latents of that size, or height= and width= that fit them."
        )


def default_argument(pipe: DiffusionPipeline, name: str) -> Any:
    """The default of an argument of a pipeline's own call; None if it has none."""
    parameter = call_parameters(type(pipe)).get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def needs_weights(pipe: DiffusionPipeline, what: str) -> None:
    """Raises ExecutionError if the model is on a server, so that this machine has no weights.

    what: what needs them, with its verb.
    """
    if pipe.device.type == "meta":
        raise ExecutionError(
            f"{what} the model's weights on this machine, and this model is on a server. Load it here, with "
            "DiTLens.from_pretrained; runs, traces and the studies made of them work on a server."
        )
