"""What a family of DiTs is made of, as data: the row of a model class, which holds every fact about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dit_lens.arguments.checks import checked, checked_fields
from dit_lens.errors import FamilyError
from dit_lens.families.stack import Adapter, PointSpec, Stack


@checked_fields
@dataclass(frozen=True)
class Guidance:
    """How a pipeline runs the conditional and the unconditional branch.

    forwards: the forward passes of one step when guidance is on; each lists the branches of its rows in order.
    scale: the pipeline argument that turns guidance on; None: it is always on.
    above: the value that argument must exceed.
    negative: pipeline arguments of which one must be given as well.
    distilled: the entry of the pipeline's config that turns guidance off.
    cut: the argument that ends guidance before the last step, where it is below 1; runs with it are refused.
    """

    forwards: tuple[tuple[str, ...], ...]
    scale: str | None = "guidance_scale"
    above: float = 1
    negative: tuple[str, ...] = ()
    distilled: str | None = None
    cut: str | None = None


@checked_fields
@dataclass(frozen=True)
class Time:
    """What the transformer gets as its time: noise level = offset + scale * value.

    Where tokens have values of their own, as where the first frame of a video is given, it is that of the noisiest.

    argument: of the transformer.
    offset: the noise level where the value is 0.
    scale: the noise level for each unit of the value.
    edm: whether the value is a quarter of the logarithm of noise beside data instead, as EDM's schedulers have it.
    inverted: whether its schedulers count from clean images to noise (``invert_sigmas``).
    """

    argument: str = "timestep"
    offset: float = 0.0
    scale: float = 1.0
    edm: bool = False
    inverted: bool = False


@checked_fields
@dataclass(frozen=True)
class Refusal:
    """A pipeline argument that changes which forward passes are made inside a run, so that they do not fit the plan.

    argument: its name.
    reason: what it does; the message continues with it.
    off: the value that does nothing; None: the argument is to be left out.
    """

    argument: str
    reason: str
    off: object = None


@checked_fields
@dataclass(frozen=True)
class Pipeline:
    """What a pipeline class of diffusers does around the transformer of a family.

    name: the class.
    guidance: how it runs the branches; None: one conditional forward pass in every step.
    time: what it passes as the transformer's time.
    encodes: what its ``encode_prompt`` returns, in order; a text says why its prompts cannot be encoded before a run.
    takes_latents: how its argument ``latents`` reaches the transformer: "unchanged", "flattened" (an image, each pixel
      of which becomes a token), or None where it is made into something else, or not taken.
    returns_latents: in which form it does: "tokens" (packed, or an image of patches), "vae" (as the autoencoder takes
      them), or None where it returns images only.
    needs_image: whether it starts from an image.
    chooses_size: whether it chooses the size of the image itself.
    size_from_image: whether it takes the size from an image it is given, where none is asked for.
    caches: whether its first step fills a cache that later steps read.
    second_model: whether another transformer computes its unconditional branch.
    refuses: arguments with which its forward passes cannot be followed.
    strength: the argument that says which share of the steps is run, the last ones.
    whole_strength: whether that share is rounded down to whole steps; else it is rounded up.
    row_images: arguments with images of which several are one for each row, repeated in order until all have one.
    prompt_images: the same, one for each prompt.
    references: arguments with images that every row is given, all of them.
    tested: whether the row was tested with it.
    """

    name: str
    guidance: Guidance | None
    time: Time = Time(scale=1e-3)
    encodes: tuple[str, ...] | str = ("prompt_embeds", "negative_prompt_embeds")
    takes_latents: str | None = "unchanged"
    returns_latents: str | None = "tokens"
    needs_image: bool = False
    chooses_size: bool = False
    size_from_image: bool = False
    caches: bool = False
    second_model: bool = False
    refuses: tuple[Refusal, ...] = ()
    strength: str = "strength"
    whole_strength: bool = False
    row_images: tuple[str, ...] = ()
    prompt_images: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    tested: bool = True

    def copy_for(self, *names: str, tested: bool = False, **changes: Any) -> tuple[Pipeline, ...]:
        """Other classes that do the same, except for ``changes``."""
        return tuple(replace(self, name=name, tested=tested, **changes) for name in names)


@checked_fields
@dataclass(frozen=True)
class Grid:
    """How the image tokens of a forward pass follow from its arguments.

    rule: "ids" (rows of an argument hold reference, y, x), "positions" (the same, after the text's rows), "marks" (the
      same, in the rows that another argument marks), "shapes" (a list of (f, h, w)), "counts" (arguments num_frames,
      height, width), or the axes of the latents: "bchw", "bcfhw", "bfchw", "bfhwc", "bicfhw" (i: images), "list" (one
      cfhw for each row).
    argument: what the rule looks at.
    latents: the argument that holds the noisy image.
    patch: latent pixels per side of a token, or the entry of the transformer's config that says so.
    target: which image is drawn, where there are references: "first" or "last".
    pad: image tokens are padded to a multiple of this.
    pad_to: the attribute of the transformer that says to how many tokens an image is padded that is not square.
    layout: where image tokens lie in the latents, as in :class:`Stack`.
    mask: the argument that marks the text tokens of every row, where text is ragged.
    marks: the argument that marks rows of image tokens, by the value ``marked``.
    marked: see ``marks``.
    coordinates: the argument with the coordinates [row, (frame, y, x), token] of tokens, where there are no counts.
    """

    rule: str
    argument: str = "hidden_states"
    latents: str = "hidden_states"
    patch: int | str = 1
    target: str = "first"
    pad: int = 1
    pad_to: str | None = None
    layout: str = "own"
    mask: str | None = None
    marks: str | None = None
    marked: int | None = None
    coordinates: str | None = None

    @property
    def axes(self) -> str:
        """The axes of the latents: tokens already, or those of an image."""
        return "tokens" if self.rule in ("ids", "positions", "marks", "shapes", "counts") else self.rule


@checked_fields
@dataclass(frozen=True)
class Final:
    """The image stream where it leaves the blocks.

    module: the final norm, whose first argument it is.
    layout: where image tokens lie in that argument, as in :class:`Stack`.
    sequence_first: whether it is [token, row, channel].
    axes: "tokens", or those of an image, as in :class:`Grid`.
    mod: what shift and scale of that norm are made of, one vector per row: where it is, or a text that says why there
      is none; None: unknown. Its module is a path in the transformer; "" is the final norm.
    mod_width: how many channels it has, as ``Family.width`` is written; None: the hidden size.
    """

    module: str = "norm_out"
    layout: str = "own"
    sequence_first: bool = False
    axes: str = "tokens"
    mod: PointSpec | str | None = None
    mod_width: str | None = None


@checked_fields
@dataclass(frozen=True)
class Readout:
    """How image tokens become a prediction: the final norm, then these modules.

    modules: after the final norm, in order.
    order: of a predicted token's channels, "cyx" or "yxc".
    shift: the module (and the position in its output tuple) from whose output shift and scale between the norm and the
      first module are made, where no module applies them.
    table: the transformer's parameter that is added to that output.
    projection: the module that output goes through, after a SiLU.
    passes_temb: whether the first module gets that output as its ``temb``.
    """

    modules: tuple[str, ...] = ("proj_out",)
    order: str = "cyx"
    shift: tuple[str, int | None] | None = None
    table: str | None = None
    projection: str | None = None
    passes_temb: bool = False


@checked_fields
@dataclass(frozen=True)
class Prediction:
    """What the transformer returns.

    width: the size of a predicted token, as ``Family.width`` is written.
    axes: "tokens", or those of an image, as in :class:`Grid`.
    layout: where image tokens lie in it, as in :class:`Stack`.
    sign: -1 where the pipeline negates it.
    """

    width: str
    axes: str = "tokens"
    layout: str = "own"
    sign: int = 1


@checked_fields
@dataclass(frozen=True)
class Latents:
    """How image tokens follow from the latents of the autoencoder.

    patch: latent pixels per side of an image token, as the pipeline counts them.
    packing: the order of a token's channels in packed latents, "cyx" or "yxc".
    normalised: by what: "factor" (one factor and shift, in the autoencoder's config), "channel" (a mean and deviation
      for each channel of its latents, in its config), or "token" (the same for each channel of a token, in its ``bn``).
    statistics: the batch normalisation of the autoencoder that holds them, where they are those of each token.
    channels: the entry of its config that counts the channels of its latents.
    frames: whether it takes videos, [row, channel, frame, h, w].
    """

    patch: int = 2
    packing: str = "cyx"
    normalised: str = "factor"
    statistics: str | None = None
    channels: str = "latent_channels"
    frames: bool = False


@checked_fields
@dataclass(frozen=True)
class Prompts:
    """How prompts enter a pipeline, and what they become.

    text: the arguments of the transformer that hold the tokens of the text stream, in order.
    before: the transformer's parameter [1, token, channel] whose tokens it puts in front of them.
    after: how many tokens of its own it puts behind them.
    gathered: whether those of several arguments are put in one order, what takes part first, the last argument's ahead.
    mixed: why the tokens of the text stream are no tokens of a prompt, where they are not.
    masks: the arguments that say which text tokens take part in attention; none: all do, padding too. A dot leads into
      a mapping.
    masked_by: how they say it: "token" (for each), "count" (as many from the first as are marked), "length" (how many
      of each row), "list" (a tensor for each row), "last" (the last row of an attention mask), "even" (as "count",
      where rows of different counts cannot be followed), or a number that marks them.
    multiple: each row's tokens are padded to a multiple of this, which takes part.
    layered: embeddings whose first axis is that of the encoder's layers; the second is that of prompts.
    offsets: arguments that say where each prompt's tokens begin, and where the last one's end.
    classes: of a model of classes, the entry of the transformer's config that counts them.
    """

    text: tuple[str, ...] = ("encoder_hidden_states",)
    before: str | None = None
    after: int = 0
    gathered: bool = False
    mixed: str | None = None
    masks: tuple[str, ...] = ()
    masked_by: str | int = "token"
    multiple: int = 1
    layered: tuple[str, ...] = ()
    offsets: tuple[str, ...] = ()
    classes: str | None = None


@checked_fields
@dataclass(frozen=True)
class Example:
    """A small transformer of the class, and a call of it, for the check at load.

    config: overrides that shrink the config.
    call: argument -> how it is made, see :mod:`dit_lens.families.example_call`.
    grid: its image tokens (h, w); not square where the model allows it, so that a transposed grid shows.
    """

    config: Mapping[str, object]
    call: Mapping[str, object]
    grid: tuple[int, int] = (2, 3)


@checked_fields
@dataclass(frozen=True, eq=False)
class Family:
    """One DiT class of diffusers, and every fact about it.

    name: as its users call it.
    transformer: the class of the denoiser.
    pipelines: the pipeline classes that hold it; the first stands for those that are not listed.
    stacks: lists of blocks, in execution order.
    width: the hidden size: a name in ``transformer.config`` or an attribute of the transformer, or several with ``*``
      between them.
    grid: where image tokens are in a call.
    prediction: what a call returns.
    example: what the row is checked with at load.
    final: where the image stream leaves the blocks.
    readout: what follows; None: unknown, so that blocks have no ``x0``.
    latents: how image tokens follow from the autoencoder's latents.
    prompts: how they enter a pipeline, and what they become.
    guidance_flag: the entry of the config that says whether the transformer takes a guidance scale.
    without_gradient: methods of its modules that run under ``torch.no_grad``.
    adapters: processors of attention that adapters bring with them.
    note: what else its users must know.
    """

    name: str
    transformer: str
    pipelines: tuple[Pipeline, ...]
    stacks: tuple[Stack, ...]
    width: str
    grid: Grid
    prediction: Prediction
    example: Example
    final: Final = Final()
    readout: Readout | None = Readout()
    latents: Latents = Latents()
    prompts: Prompts = Prompts()
    guidance_flag: str | None = None
    without_gradient: tuple[str, ...] = ()
    adapters: tuple[Adapter, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("pipelines", "stacks"):
            if not getattr(self, name):
                raise FamilyError(f"the row of {self.name} has no {name}. Give at least one.")

    @checked
    def pipeline(self, kind: type) -> Pipeline:
        """What a pipeline class does around this transformer: its own entry, a parent's, or the usual one."""
        return self.find_pipeline(kind) or self.pipelines[0]

    @checked
    def find_pipeline(self, kind: type) -> Pipeline | None:
        """The entry of a pipeline class or of its nearest parent that has one."""
        entries = {pipeline.name: pipeline for pipeline in self.pipelines}
        return next((entries[base.__name__] for base in kind.__mro__ if base.__name__ in entries), None)
