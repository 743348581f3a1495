"""The pipeline call a run makes: prompts, seeds and the pipeline's own arguments, checked before anything happens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dit_lens.errors import ExecutionError, PromptError, nearest
from dit_lens.families.arguments import belongs_to_prompts, holds_text, stands_for_prompts
from dit_lens.families.calls import call_parameters
from dit_lens.families.row import Prompts

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


OUTPUTS = ("pil", "latent")
USUAL = Prompts()  # of a pipeline whose row says nothing else
IMAGES = ("image", "mask_image", "masked_image_latents")  # arguments that a batch may have one of for each image


@dataclass(frozen=True)
class Call:
    """One checked call of the pipeline.

    prompts: one for each row of prompts; None where embeddings stand for them.
    seeds: one for each image; None with a generator of the user's own.
    arguments: everything else the pipeline is called with.
    rows: images in the batch.
    starts: whether image= holds what images are drawn from, one for each where it is a list, and not what all of them
      refer to.
    conditioning: how prompts enter the pipeline, from the family's row.
    """

    prompts: tuple[str, ...] | None
    seeds: tuple[int, ...] | None
    arguments: dict[str, Any]
    rows: int
    starts: bool = False
    conditioning: Prompts = USUAL

    @property
    def images_per_prompt(self) -> int:
        """How many images are drawn of each prompt."""
        return self.arguments.get("num_images_per_prompt") or 1

    def keywords(self) -> dict[str, Any]:
        """The call as keyword arguments of the pipeline, whose own are all lists and generators: some write to them."""
        import torch

        call = _with_own_lists(self.arguments)
        if self.prompts is not None:
            call["prompt"] = list(self.prompts)
        if self.seeds is not None:
            call["generator"] = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        return call

    def for_prompts(self, prompts: range) -> Call:
        """The same call for some of its prompts, or of what stands for them."""
        if self.seeds is None:
            raise PromptError("batch_size= splits prompts with a seed. Leave it out when passing generator=.")
        n = self.images_per_prompt
        span = slice(prompts.start, prompts.stop)
        images = slice(prompts.start * n, prompts.stop * n)
        arguments = {name: self._select(name, value, span) for name, value in self.arguments.items()}
        for name in arguments.keys() & {"latents", *(IMAGES if self.starts else ())}:
            arguments[name] = _select_images(name, arguments[name], {self.rows // n: span, self.rows: images})
        return replace(
            self,
            prompts=None if self.prompts is None else self.prompts[span],
            seeds=self.seeds[images],
            arguments=arguments,
            rows=len(prompts) * n,
        )

    def _select(self, name: str, value: Any, span: slice) -> Any:
        """What a pipeline argument is for some of the prompts."""
        if value is None or isinstance(value, str) or not (_per_prompt(name) or belongs_to_prompts(name)):
            return value
        if name in self.conditioning.offsets:  # those of these prompts, from 0 up
            return value[span.start : span.stop + 1] - value[span.start]
        return value[:, span] if name in self.conditioning.layered else value[span]


def prepare_call(
    pipe: DiffusionPipeline,
    prompt: str | Sequence[str] | None,
    *,
    seed: int | Sequence[int] | None,
    num_inference_steps: int | None,
    defaults: Mapping[str, Any],
    vocabulary: Sequence[str] | None,
    call: Mapping[str, Any],
    conditioning: Prompts = USUAL,
) -> Call:
    """Checks and completes a call; PromptError says what is wrong with it.

    pipe: the pipeline.
    prompt: one or several; None where embeddings in ``call`` stand for them.
    seed: one for all prompts, or one for each image; None: a random one.
    num_inference_steps: denoising steps; None: as ``call`` or the pipeline says.
    defaults: arguments of every call.
    vocabulary: the only words a prompt may have; None: any.
    call: the pipeline's own arguments.
    conditioning: how prompts enter the pipeline, from the family's row.
    """
    signature = call_parameters(type(pipe))
    _check_arguments(type(pipe).__name__, signature, call, seed)
    arguments: dict[str, Any] = {**defaults, **call}
    if "num_frames" in signature and arguments.get("output_type") != "latent":
        raise PromptError(
            f"{type(pipe).__name__} draws videos, of which a Run keeps latents only. Pass output_type='latent'."
        )
    device = pipe._execution_device  # noqa: SLF001 diffusers offers no public way
    arguments |= {name: _move(value, device) for name, value in arguments.items() if belongs_to_prompts(name)}
    if prompt is not None and "prompt" not in signature:
        raise PromptError(f"{type(pipe).__name__} takes no prompt. Pass what it draws, such as class_labels=[207].")
    _check_classes(pipe, conditioning, arguments.get("class_labels"))
    given = _find_embeddings(arguments, conditioning)
    prompts = _check_prompts(prompt, given)
    count = len(arguments[given or ""]) if prompts is None else len(prompts)
    steps = num_inference_steps if num_inference_steps is not None else arguments.get("num_inference_steps")
    arguments["num_inference_steps"] = _check_positive(
        "num_inference_steps", signature["num_inference_steps"].default if steps is None else steps
    )
    sizes = [side for side in ("height", "width") if arguments.get(side) is not None]
    arguments |= {side: _check_positive(side, arguments[side]) for side in sizes}
    texts = {
        name: _list_texts(name, value, count)
        for name, value in arguments.items()
        if _per_prompt(name) and value is not None
    }
    arguments |= texts
    if vocabulary is not None:
        _check_words([*(prompts or ()), *(text for some in texts.values() for text in some)], vocabulary)
    each = arguments.get("num_images_per_prompt")
    rows = count * (1 if each is None else _check_positive("num_images_per_prompt", each))
    seeds = None if "generator" in call else _list_seeds(seed, count, rows)
    return Call(
        None if prompts is None else tuple(prompts),
        seeds,
        arguments,
        rows,
        starts="strength" in signature,
        conditioning=conditioning,
    )


def _with_own_lists(value: Any) -> Any:
    """The same value, its lists and mappings copied; tensors, images and what else they hold are shared."""
    if type(value) is list:
        return [_with_own_lists(item) for item in value]
    if type(value) is dict:
        return {name: _with_own_lists(item) for name, item in value.items()}
    return value


def _check_classes(pipe: DiffusionPipeline, conditioning: Prompts, labels: Sequence[int] | None) -> None:
    if labels is None or conditioning.classes is None:
        return
    count = pipe.transformer.config[conditioning.classes]
    for label in labels:
        if not 0 <= label < count:
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
    if call.get("output_type", "pil") not in OUTPUTS:
        raise PromptError(
            f"output_type={call['output_type']!r} is not kept by a Run.{nearest(str(call['output_type']), OUTPUTS)} "
            "For arrays, use numpy.asarray(run.images[0])."
        )


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
    prompts = list(prompt) if isinstance(prompt, Iterable) and not isinstance(prompt, str) else [prompt]
    if not prompts:
        raise PromptError("the list of prompts is empty. Pass at least one prompt.")
    for one in prompts:
        if not isinstance(one, str):
            raise PromptError(f"a prompt must be a string; one is {one!r} ({type(one).__name__}).")
    return prompts


def _find_embeddings(arguments: Mapping[str, Any], conditioning: Prompts) -> str | None:
    """The argument that stands for prompts, where one was passed: one entry for each."""
    names = [name for name in arguments if stands_for_prompts(name) and name not in conditioning.layered]
    return min((name for name in names if arguments[name] is not None), default=None)


def _list_texts(name: str, value: str | Sequence[str], count: int) -> list[str]:
    """One text per prompt; a single one stands for all."""
    texts = [value] * count if isinstance(value, str) else list(value)
    if len(texts) != count:
        raise PromptError(f"{name}= lists {len(texts)} texts for {count} prompts. Give one for all, or one each.")
    return texts


def _check_words(texts: Sequence[str], vocabulary: Sequence[str]) -> None:
    for text in texts:
        for word in text.lower().split():
            if word not in vocabulary:
                raise PromptError(
                    f"{word!r} in {text!r} is not a word this toy has learned.{nearest(word, vocabulary, 'It knows')}"
                )


def _list_seeds(seed: int | Sequence[int] | None, count: int, rows: int) -> tuple[int, ...]:
    """One seed per image: an integer for every prompt, counted up over the images of one prompt; or a list."""
    import torch

    if seed is None:
        seed = int(torch.randint(2**31 - 1, ()))
    if isinstance(seed, Sequence):
        if len(seed) != rows:
            raise PromptError(
                f"seed= lists {len(seed)} seeds for {rows} images. Give one integer for all, or one seed per image."
            )
        return tuple(as_seed(one) for one in seed)
    return tuple(as_seed(seed) + j for _ in range(count) for j in range(rows // count))


def as_seed(seed: Any) -> int:
    """Returns the seed as an int; raises PromptError if it is not valid."""
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or not 0 <= seed.__index__() < 2**63:
        raise PromptError(f"seed {seed!r} is not a whole number from 0 up.")
    return seed.__index__()


def _check_positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < 1:
        raise PromptError(f"{name}={value!r} must be a whole number of at least 1.")
    return value.__index__()


def _per_prompt(name: str) -> bool:
    """Whether a pipeline argument holds one text per prompt (prompt_2, negative_prompt, negative_prompt_2 ...)."""
    return name != "prompt" and holds_text(name)


def default_argument(pipe: DiffusionPipeline, name: str) -> Any:
    """The default of an argument of a pipeline's own call; None if it has none."""
    parameter = call_parameters(type(pipe)).get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def _select_images(name: str, value: Any, spans: Mapping[int, slice]) -> Any:
    """Some entries of a list or batch with one for every prompt or image; anything else stands for all.

    name: of the argument.
    value: what it holds.
    spans: number of entries -> those to select.
    """
    batched = isinstance(value, list | tuple) or getattr(value, "ndim", 0) > (1 if name == "latents" else 3)
    return value[spans[len(value)]] if batched and len(value) in spans else value


def _move(value: Any, device: Any) -> Any:
    """Embeddings on the pipeline's device, to which it does not move them itself."""
    if isinstance(value, list):
        return [_move(one, device) for one in value]
    # A pipeline without weights is on a server, which moves what it is sent.
    return value.to(device) if hasattr(value, "to") and device.type != "meta" else value


def needs_weights(pipe: DiffusionPipeline, what: str) -> None:
    """Raises ExecutionError if the model is on a server, so that this machine has no weights.

    what: what needs them, with its verb.
    """
    if pipe.device.type == "meta":
        raise ExecutionError(
            f"{what} the model's weights on this machine, and this model is on a server. Load it here, with "
            "DiTLens.from_pretrained; runs, traces and the studies made of them work on a server."
        )
