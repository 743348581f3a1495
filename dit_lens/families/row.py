"""What a family of DiTs is made of, as data: one row says where every named tensor of a model class lives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PointSpec:
    """Where a tensor inside a block is.

    module: path within the block ("": the block itself). side, slot: "output" and its place in the tuple (None: a bare
    tensor), or "input" and the argument (by name, or by place).
    span: which channels, in units of the hidden size: (start, stop), stop None for the end.
    layout: where the stream's tokens lie in it; None: as in the stack's tensors. axes: "tokens", or those of an image.
    batch_first: whether it is [row, token, channel] also where the stack's tensors are sequence_first.
    half: of a module that projects attention and MLP at once, what its input has of one of them: (start, stop) in units
    of the hidden size, stop None for the end. The tensor is what the module makes of that alone; a bias counts with the
    last part.
    gate: what it is multiplied by before it is added to the residual; tanh: of which the hyperbolic tangent is taken.
    table: a parameter of the block, [part, channel], that is added to the argument.
    """

    module: str
    side: str = "output"
    slot: str | int | None = None
    span: tuple[int, int | None] | None = None
    layout: str | None = None
    axes: str = "tokens"
    batch_first: bool = False
    half: tuple[int, int | None] | None = None
    gate: PointSpec | None = None
    tanh: bool = False
    table: str | None = None


@dataclass(frozen=True)
class Stack:
    """A list of equal blocks. Stacks run in the order the family lists them.

    name: what people call it ("double"). path: the attribute of the transformer that holds it.
    inputs, outputs: stream -> argument name, and stream -> position in the output tuple (None: a bare tensor).
    layout: where a stream's tokens lie in that tensor: "own" (the streams are two tensors), or joint: "text_first",
    "image_first" or "ragged" (text first, of another length in every row).
    sequence_first: whether the blocks' tensors are [token, row, channel].
    rewritten: streams that the model changes between blocks. ends_without: streams the last block does not return.
    points: stream -> point -> where it is, or why these blocks have none.
    attends: the order of the streams inside attention, "text_first" or "image_first"; "own" where the image attends
    to itself; or why there is no pattern of attention.
    """

    name: str
    path: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, int | None]
    layout: str = "own"
    sequence_first: bool = False
    rewritten: tuple[str, ...] = ()
    ends_without: tuple[str, ...] = ()
    points: Mapping[str, Mapping[str, PointSpec | str]] = field(default_factory=dict)
    attends: str = ""

    @property
    def attention(self) -> str:
        """``attends``, which follows from the streams and their layout where the row does not say it."""
        if self.attends:
            return self.attends
        if len(self.outputs) == 1:
            return "own"
        return "text_first" if self.layout in ("own", "ragged") else self.layout


@dataclass(frozen=True)
class Grid:
    """How the image tokens of a transformer call follow from its arguments.

    rule: "ids" (rows of an argument hold reference, y, x), "positions" (the same, after the text's rows), "marks" (the
    same, where another argument says so), "shapes" (a list of (f, h, w)), "counts" (arguments num_frames, height,
    width), or the axes of the latents: "bchw", "bcfhw", "bfchw", "bfhwc", "bicfhw" (i: images), "list" (one cfhw
    for each row). argument: what the rule looks at. latents: the argument that holds the noisy image.
    patch: latent pixels per side of a token, or the name of it in the transformer's config.
    target: which image is drawn, where there are references: "first" or "last".
    pad: image tokens are padded to a multiple of this; "square": to the largest image. mask: the argument that marks
    the text tokens of every row, where text is ragged.
    """

    rule: str
    argument: str = "hidden_states"
    latents: str = "hidden_states"
    patch: int | str = 1
    target: str = "first"
    pad: int | str = 1
    mask: str | None = None
    marked: int | None = None

    @property
    def axes(self) -> str:
        """The axes of the latents: tokens already, or those of an image."""
        return "tokens" if self.rule in ("ids", "positions", "marks", "shapes", "counts") else self.rule


@dataclass(frozen=True)
class Guidance:
    """How a pipeline runs the conditional and unconditional branches.

    calls: the transformer calls of one step when guidance is on, each the branches of its rows in order.
    scale, above: the pipeline argument that turns guidance on, and the value it must exceed (None: always on).
    negative: arguments of which one must be given as well. distilled: the pipeline's config entry that turns it off.
    cut: the argument that ends guidance before the last step, which is not followed.
    """

    calls: tuple[tuple[str, ...], ...]
    scale: str | None = "guidance_scale"
    above: float = 1
    negative: tuple[str, ...] = ()
    distilled: str | None = None
    cut: str | None = None


@dataclass(frozen=True)
class Time:
    """What the transformer is told of time: its argument, and noise level = offset + scale * value."""

    argument: str = "timestep"
    offset: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class Readout:
    """How image tokens become a prediction: the final norm, then these modules.

    modules: after ``Family.final``, in order. order: of a predicted token's channels, "cyx" or "yxc".
    shift: where shift and scale between the norm and the first module come from, when no module applies them: a module
    (and the place in its output tuple) to whose output the transformer's ``table`` is added, or which goes through
    SiLU and ``projection``; ``passes_temb``: or which the first module is given as its ``temb``.
    """

    modules: tuple[str, ...] = ("proj_out",)
    order: str = "cyx"
    shift: tuple[str, int | None] | None = None
    table: str | None = None
    projection: str | None = None
    passes_temb: bool = False


@dataclass(frozen=True, eq=False)
class Family:
    """One DiT class of diffusers.

    name: as its users call it. transformer: the class of the denoiser. pipelines: those this row was tried with.
    stacks: in execution order. final: the module whose first argument is the image stream that is projected out.
    width, out_width: the hidden size and the size of a predicted token: names in ``transformer.config`` or attributes
    of the transformer, multiplied where several are joined by ``*``.
    grid, time, guidance: see there; guidance None means that a pipeline makes one conditional call per step.
    variants, times: pipeline class -> its own guidance, and its own time, where they differ.
    final_layout: where image tokens lie in what enters ``final`` and (prediction_layout) in what is predicted.
    final_sequence_first, final_axes: of what enters ``final``: whether it is [token, row, channel], and where
    it is no list of tokens.
    prediction: "tokens", or the axes of a predicted image, as in Grid.
    readout: what follows the final norm, where the row says it.
    sign: -1 where the pipeline negates the prediction.
    caching: pipelines whose first step fills a cache that later steps read.
    patch: latent pixels per side of an image token.
    packing: the order of a token's channels in packed latents, "cyx" or "yxc". returns_vae_latents: pipelines
    that return latents as their autoencoder takes them.
    chooses_size: pipelines that choose the size of the image themselves. size_from_image:
    pipelines that take it from an image they are given, where none is asked for.
    tokenizer, text_length: the pipeline's tokenizer of the text stream, and the argument that sets its length.
    plain_text: whether the text stream is the prompt's own tokens, padded to that length: no template around it, no
    second text encoder beside it.
    embedded: the config flag for a guidance scale that the transformer is told.
    check_config, call: overrides that shrink the config, and the arguments of a call of that, for the check at load,
    which uses a grid of ``check_grid`` tokens (not square where the model allows it, so that a transposed grid shows).
    refuses: pipeline argument -> why a run with it cannot be followed. note: what else its users must know.
    """

    name: str
    transformer: str
    pipelines: tuple[str, ...]
    stacks: tuple[Stack, ...]
    final: str
    width: str
    out_width: str
    grid: Grid
    guidance: Guidance | None
    variants: Mapping[str, Guidance | None] = field(default_factory=dict)
    time: Time = Time(scale=1e-3)
    times: Mapping[str, Time] = field(default_factory=dict)
    final_layout: str = "own"
    final_sequence_first: bool = False
    final_axes: str = "tokens"
    prediction: str = "tokens"
    prediction_layout: str = "own"
    readout: Readout | None = None
    sign: int = 1
    caching: tuple[str, ...] = ()
    patch: int = 2
    packing: str = "cyx"
    returns_vae_latents: tuple[str, ...] = ()
    chooses_size: tuple[str, ...] = ()
    size_from_image: tuple[str, ...] = ()
    tokenizer: str = "tokenizer"
    text_length: str = "max_sequence_length"
    plain_text: bool = False
    embedded: str | None = None
    check_config: Mapping[str, object] = field(default_factory=dict)
    call: Mapping[str, object] = field(default_factory=dict)
    check_grid: tuple[int, int] = (2, 3)
    refuses: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    def guidance_of(self, pipe: object) -> Guidance | None:
        """How a pipeline of this family is guided."""
        return self.variants.get(type(pipe).__name__, self.guidance)

    def time_of(self, pipe: object) -> Time:
        """What a pipeline of this family tells the transformer of time."""
        return self.times.get(type(pipe).__name__, self.time)
