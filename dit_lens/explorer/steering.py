"""Live steering: a widget that swaps channels of one generation into another and shows the resulting image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from time import perf_counter
from typing import TYPE_CHECKING, Any

import traitlets

from dit_lens.arguments.checks import checked, checked_fields
from dit_lens.arguments.signatures import sets
from dit_lens.core.request.division import Division, refuse_several_images
from dit_lens.core.request.ops import Swap
from dit_lens.errors import DitLensError, OpError, PromptError, check_choice, nearest
from dit_lens.explorer.code import code_of_lens
from dit_lens.explorer.widget import Widget, bytes_trait, encode_webp, join_modules

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from dit_lens.analysis.channels import ChannelSet
    from dit_lens.lens import DiTLens

ARMS = ("top", "bottom", "random", "energy-matched", "all")
WHERE = ("everywhere", "subject")


@checked_fields
@dataclass(frozen=True)
class Setting:
    """The setting of the controls, which describes one edit.

    strength: share of the source in the swapped channels, 0 to 1.
    arm: which channels: "top" (massive), "bottom", "random", "energy-matched" or "all".
    k: number of channels per block.
    blocks: half-open interval of block indices.
    steps: half-open interval of step indices.
    where: which tokens: "everywhere", or the "subject" of the source (a cluster of its channels).
    """

    strength: float = 1.0
    arm: str = "top"
    k: int = 8
    blocks: tuple[int, int] = (0, 1)
    steps: tuple[int, int] = (0, 1)
    where: str = "everywhere"


@checked
@sets("prompt", "ops", "record", "prefix", "batch_size")
def steer(
    lens: DiTLens, source: str, target: str, *, k: int = 8, seed: int = 0, score: str = "|mean|", **call: Any
) -> Steer:
    """Opens a panel that draws ``target`` with channels of ``source`` whenever its controls are moved.

    >>> from dit_lens import DiTLens
    >>> source = "a big red circle left on a plain blue background"
    >>> target = "a small white cross right on a plain green background"
    >>> panel = steer(DiTLens.toy(), source, target, k=4, num_inference_steps=2)
    >>> image = panel.draw(strength=0.5, blocks=(4, 8))
    >>> panel.settings[-1]
    Setting(strength=0.5, arm='top', k=4, blocks=(4, 8), steps=(0, 2), where='everywhere')

    Source and target are two rows of one batch with the same noise. In the chosen channels,
    X_target <- (1 - s) X_target + s X_source. ``panel.draw(...)`` does from Python what the controls do;
    ``panel.images`` and ``panel.settings`` keep every result, and ``panel.code`` is the code of the last one. The steps
    before the first edited one are computed only once.

    lens: lens of the model.
    source: prompt that channels are taken from.
    target: prompt of the image that is changed.
    k: number of channels to begin with; up to four times as many can be chosen.
    seed: seed of the noise.
    score: score of the massive channels, as in ``lens.massive_channels``.
    call: arguments of the pipeline's call.
    """
    largest = min(4 * k, lens.anatomy.width // 2)
    if not 1 <= k <= largest:
        raise OpError(
            f"k={k} of {lens.anatomy.width} channels leaves too few for the controls. Choose k from 1 to "
            f"{lens.anatomy.width // 2}."
        )
    _check_call(lens, [source, target], {"seed": seed, **call})
    alone = Division.of(lens.pipe, lens.family).share(call, [0], 2)
    massive = lens.massive_channels(source, largest, score=score, seed=seed, **alone)
    return Steer(lens, source, target, massive, k=k, seed=seed, call=call)


def _check_call(lens: DiTLens, prompts: list[str], call: dict[str, Any]) -> None:
    """Raises what is wrong with the arguments of the pipeline, before anything is drawn."""
    asked = {**lens.defaults, **call}
    refuse_several_images(asked, "source and target are one row each")
    if asked.get("output_type") == "latent":
        raise PromptError("output_type='latent': the panel shows images. Leave it out.")
    lens.outline(prompts, **call)


class Steer(Widget):
    """The widget that ``dl.steer`` returns. Its controls are the attributes of a :class:`Setting`."""

    _esm = join_modules("steering")

    # Data for the browser, which static/steering.js reads.
    data_info = traitlets.Dict().tag(sync=True)
    data_ends = bytes_trait()
    data_results = traitlets.List().tag(sync=True)
    data_images = bytes_trait()

    strength = traitlets.Float(1.0).tag(sync=True)
    arm = traitlets.Unicode("top").tag(sync=True)
    k = traitlets.Int(8).tag(sync=True)
    blocks = traitlets.List(traitlets.Int()).tag(sync=True)
    steps = traitlets.List(traitlets.Int()).tag(sync=True)
    where = traitlets.Unicode("everywhere").tag(sync=True)

    def __init__(
        self, lens: DiTLens, source: str, target: str, massive: ChannelSet, *, k: int, seed: int, call: dict[str, Any]
    ):
        """Runs source and target without an edit. massive: channels of the source, as many as can be chosen."""
        self.lens, self.prompts, self.massive = lens, [source, target], massive
        self.call: dict[str, Any] = {"seed": seed, **call}
        self._source_call = Division.of(lens.pipe, lens.family).share(self.call, [0], 2)
        self.base = lens.run(self.prompts, record=True, **self.call)
        self.settings: list[Setting] = []
        self.images: list[Image] = []
        self._seconds: list[float] = []
        self._cached_channels = cache(self._choose_channels)
        self._cached_mask = cache(self._segment_subject)
        self._initial = Setting(k=k, blocks=(0, lens.anatomy.depth), steps=(0, len(self.base.clock)))
        files = [encode_webp(image) for image in self.base.images]
        super().__init__(
            data_info={
                "prompts": self.prompts,
                "arms": ARMS,
                "where": WHERE,
                "largest": massive.k,
                "depth": lens.anatomy.depth,
                "sigmas": self.base.sigmas,
                "split": len(files[0]),
            },
            data_ends=b"".join(files),
            **_to_state(self._initial),
        )
        self.on_msg(self._answer)

    def draw(self, **changes: Any) -> Image:
        """Draws the target with the setting of the controls and adds the result to the strip.

        changes: controls to change first, such as ``strength=0.5``.
        """
        known = list(asdict(self._initial))
        if unknown := [name for name in changes if name not in known]:
            raise OpError(f"there is no control {unknown[0]!r}.{nearest(unknown[0], known)}")
        setting = replace(self.setting, **changes)
        swap = self.swap(setting)
        start = perf_counter()
        run = self.lens.run(self.prompts, [swap], prefix=self.base, **self.call)
        self._seconds.append(perf_counter() - start)
        self.settings.append(setting)
        self.images.append(run.images[1])
        self.set_state(_to_state(setting))  # the controls show the setting of the last image
        self._send_result(len(self.images) - 1)
        return run.images[1]

    @property
    def setting(self) -> Setting:
        """The current setting of the controls."""
        (first_block, end_block), (first_step, end_step) = self.blocks, self.steps
        return Setting(self.strength, self.arm, self.k, (first_block, end_block), (first_step, end_step), self.where)

    @checked
    def swap(self, setting: Setting) -> Swap:
        """Returns the op of a setting."""
        check_choice(setting.arm, ARMS, "arm")
        check_choice(setting.where, WHERE, "where")
        return Swap(
            f"blocks[{setting.blocks[0]}:{setting.blocks[1]}].img",
            source="row:0",
            rows=1,
            channels=self._cached_channels(setting.arm, setting.k),
            strength=setting.strength,
            steps=slice(*setting.steps),
            mask=None if setting.where == "everywhere" else self._cached_mask(setting.k),
            branch="cond",
        )

    @property
    def code(self) -> str:
        """The code that draws the last image, or that of the initial setting."""
        return self.code_of(self.settings[-1] if self.settings else self._initial)

    @checked
    def code_of(self, setting: Setting) -> str:
        """Returns the code that draws the image of a setting."""
        arm = {"bottom": ".bottom()", "random": ".random(seed=0)", "energy-matched": ".energy_matched(seed=0)"}
        call, alone = (
            ", ".join(f"{name}={value!r}" for name, value in one.items()) for one in (self.call, self._source_call)
        )
        arguments = [
            f'"blocks[{setting.blocks[0]}:{setting.blocks[1]}].img"',
            'source="row:0"',
            "rows=1",
            "channels=None" if setting.arm == "all" else "channels=massive" + arm.get(setting.arm, ""),
            f"strength={setting.strength:g}",
            f"steps=slice{setting.steps}",
            *(["mask=subject"] if setting.where == "subject" else []),
            'branch="cond"',
        ]
        lines = "".join(f"    {argument},\n" for argument in arguments)
        subject = f"subject = lens.subject_mask(source, massive, {alone})\n" if setting.where == "subject" else ""
        return (
            f"import dit_lens as dl\n\n{code_of_lens(self.base)}\n"
            f"source = {self.prompts[0]!r}\ntarget = {self.prompts[1]!r}\n"
            f"massive = lens.massive_channels(source, {setting.k}, score={self.massive.score!r}, {alone})\n{subject}"
            f"swap = dl.Swap(\n{lines})\n"
            f"run = lens.run([source, target], [swap], {call})\nrun.images[1]"
        )

    def whole_state(self) -> dict[str, Any]:
        files = [encode_webp(image) for image in self.images]
        results = [self._result(i) | {"length": len(file)} for i, file in enumerate(files)]
        return super().whole_state() | {"data_results": results, "data_images": b"".join(files)}

    def preview(self) -> Image | None:
        return self.images[-1] if self.images else self.base.images[1]

    def _choose_channels(self, arm: str, k: int) -> ChannelSet | None:
        if arm == "all":
            return None
        top = self.massive.take(k)
        arms: dict[str, Callable[[], ChannelSet]] = {
            "top": lambda: top,
            "bottom": top.bottom,
            "random": lambda: top.random(0),
            "energy-matched": lambda: top.energy_matched(0),
        }
        return arms[arm]()

    def _segment_subject(self, k: int) -> np.ndarray:
        return self.lens.subject_mask(self.prompts[0], self.massive.take(k), **self._source_call)

    def _result(self, i: int) -> dict[str, Any]:
        return {**_to_state(self.settings[i]), "code": self.code_of(self.settings[i]), "seconds": self._seconds[i]}

    def _send_result(self, i: int) -> None:
        self.send({"kind": "result", "number": i, **self._result(i)}, buffers=[encode_webp(self.images[i])])

    def _answer(self, _: Any, message: dict[str, Any], buffers: Sequence[Any]) -> None:  # noqa: ARG002
        """Draws what the browser requests; for a view that has just opened, sends the results so far."""
        if message["kind"] == "open":
            for i in range(len(self.images)):
                self._send_result(i)
            return
        setting = {name: tuple(v) if isinstance(v, list) else v for name, v in message["setting"].items()}
        try:
            self.draw(**setting)
        except DitLensError as error:
            self.send({"kind": "error", "text": str(error)})

    def __repr__(self) -> str:
        return f"Steer: {self.prompts[0]!r} into {self.prompts[1]!r}, {len(self.images)} drawn"


def _to_state(setting: Setting) -> dict[str, Any]:
    """Returns a setting as values of the widget's traits, which are lists instead of tuples."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(setting).items()}
