"""Live steering: move channels of one generation into another, and see at once what becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from time import perf_counter
from typing import TYPE_CHECKING, Any

import traitlets

from dit_lens.core.request.ops import Swap
from dit_lens.errors import DitLensError, OpError, nearest
from dit_lens.explorer.code import lens_code
from dit_lens.explorer.widget import Widget, bytes_trait, module_of, webp

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from dit_lens.analysis.channels import ChannelSet
    from dit_lens.lens import DiTLens

ARMS = ("top", "bottom", "random", "energy-matched", "all")
WHERE = ("everywhere", "subject")


@dataclass(frozen=True)
class Setting:
    """One edit: how strongly which channels of which blocks are moved, at which steps and where.

    blocks, steps: half-open intervals. where: "everywhere", or on the source's "subject" (clusters of its channels).
    """

    strength: float = 1.0
    arm: str = "top"
    k: int = 8
    blocks: tuple[int, int] = (0, 1)
    steps: tuple[int, int] = (0, 1)
    where: str = "everywhere"


def steer(
    lens: DiTLens, source: str, target: str, *, k: int = 8, seed: int = 0, score: str = "|mean|", **call: Any
) -> Steer:
    """A panel that draws ``target`` with channels of ``source``, as often as its controls are moved.

    >>> from dit_lens import DiTLens
    >>> source = "a big red circle left on a plain blue background"
    >>> target = "a small white cross right on a plain green background"
    >>> panel = steer(DiTLens.toy(), source, target, k=4, num_inference_steps=2)
    >>> image = panel.draw(strength=0.5, blocks=(4, 8))
    >>> panel.settings[-1]
    Setting(strength=0.5, arm='top', k=4, blocks=(4, 8), steps=(0, 2), where='everywhere')

    Source and target run as two rows of one batch from the same noise: X_target <- (1 - s) X_target + s X_source for
    the chosen channels. ``panel.draw(...)`` does from Python what the controls do; ``panel.images`` and
    ``panel.settings`` keep every result, ``panel.code`` is the code of the last. What precedes the first edited step
    is computed once.

    source, target: prompts. k: channels to begin with; up to four times as many can be chosen. seed: of the noise.
    score: what makes a channel massive, as in ``lens.massive_channels``. call: the pipeline's own arguments.
    """
    largest = min(4 * k, lens.anatomy.width // 2)
    if not 1 <= k <= largest:
        raise OpError(
            f"k={k} channels of {lens.anatomy.width} leave no controls. Choose k from 1 to {lens.anatomy.width // 2}."
        )
    massive = lens.massive_channels(source, largest, score=score, seed=seed, **call)
    return Steer(lens, source, target, massive, k=k, seed=seed, call=call)


class Steer(Widget):
    """What ``dl.steer`` returns. strength, arm, k, blocks, steps and where are its controls."""

    _esm = module_of("steering")

    _meta = traitlets.Dict().tag(sync=True)
    _ends = bytes_trait()
    _shots = traitlets.List().tag(sync=True)
    _album = bytes_trait()

    strength = traitlets.Float(1.0).tag(sync=True)
    arm = traitlets.Unicode("top").tag(sync=True)
    k = traitlets.Int(8).tag(sync=True)
    blocks = traitlets.List(traitlets.Int()).tag(sync=True)
    steps = traitlets.List(traitlets.Int()).tag(sync=True)
    where = traitlets.Unicode("everywhere").tag(sync=True)

    def __init__(
        self, lens: DiTLens, source: str, target: str, massive: ChannelSet, *, k: int, seed: int, call: dict[str, Any]
    ):
        self.lens, self.prompts, self.massive = lens, [source, target], massive
        self.call: dict[str, Any] = {"seed": seed, **call}
        self.base = lens.run(self.prompts, record=True, **self.call)
        self.settings: list[Setting] = []
        self.images: list[Image] = []
        self._seconds: list[float] = []
        self._chosen = cache(self._chosen_channels)
        self._subject = cache(self._subject_mask)
        self._first = Setting(k=k, blocks=(0, lens.anatomy.depth), steps=(0, len(self.base.clock)))
        files = [webp(image) for image in self.base.images]
        super().__init__(
            _meta={
                "prompts": self.prompts,
                "arms": ARMS,
                "where": WHERE,
                "largest": massive.k,
                "depth": lens.anatomy.depth,
                "sigmas": self.base.sigmas,
                "split": len(files[0]),
            },
            _ends=b"".join(files),
            **_plain(self._first),
        )
        self.on_msg(self._answer)

    def draw(self, **changes: Any) -> Image:
        """Draws the target under the setting of the controls, with ``changes``; the result joins the strip."""
        known = list(asdict(self._first))
        if unknown := [name for name in changes if name not in known]:
            raise OpError(f"there is no control {unknown[0]!r}.{nearest(unknown[0], known)}")
        setting = replace(self.setting, **changes)
        swap = self.swap(setting)
        began = perf_counter()
        run = self.lens.run(self.prompts, [swap], prefix=self.base, **self.call)
        self._seconds.append(perf_counter() - began)
        self.settings.append(setting)
        self.images.append(run.images[1])
        self.set_state(_plain(setting))  # the controls stand where the image was drawn
        self._deliver(len(self.images) - 1)
        return run.images[1]

    @property
    def setting(self) -> Setting:
        """Where the controls stand."""
        first, last = tuple(self.blocks), tuple(self.steps)
        return Setting(self.strength, self.arm, self.k, (first[0], first[1]), (last[0], last[1]), self.where)

    def swap(self, setting: Setting) -> Swap:
        """The op of a setting."""
        for name, known in (("arm", ARMS), ("where", WHERE)):
            if (value := getattr(setting, name)) not in known:
                raise OpError(f"there is no {name} {value!r}.{nearest(str(value), known)}")
        return Swap(
            f"blocks[{setting.blocks[0]}:{setting.blocks[1]}].img",
            source="row:0",
            rows=1,
            channels=self._chosen(setting.arm, setting.k),
            strength=setting.strength,
            steps=slice(*setting.steps),
            mask=None if setting.where == "everywhere" else self._subject(setting.k),
            branch="cond",
        )

    @property
    def code(self) -> str:
        """The code that draws the last image of the strip, or the untouched target."""
        return self.code_of(self.settings[-1] if self.settings else self._first)

    def code_of(self, setting: Setting) -> str:
        """The code that draws what ``draw`` does under a setting."""
        arm = {"bottom": ".bottom()", "random": ".random(seed=0)", "energy-matched": ".energy_matched(seed=0)"}
        call = ", ".join(f"{name}={value!r}" for name, value in self.call.items())
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
        subject = f"subject = lens.subject_mask(source, massive, {call})\n" if setting.where == "subject" else ""
        return (
            f"import dit_lens as dl\n\n{lens_code(self.base)}\n"
            f"source = {self.prompts[0]!r}\ntarget = {self.prompts[1]!r}\n"
            f"massive = lens.massive_channels(source, {setting.k}, score={self.massive.score!r}, {call})\n{subject}"
            f"swap = dl.Swap(\n{lines})\n"
            f"run = lens.run([source, target], [swap], {call})\nrun.images[1]"
        )

    def whole_state(self) -> dict[str, Any]:
        files = [webp(image) for image in self.images]
        shots = [self._shot(i) | {"length": len(file)} for i, file in enumerate(files)]
        return super().whole_state() | {"_shots": shots, "_album": b"".join(files)}

    def preview(self) -> Image | None:
        return self.images[-1] if self.images else self.base.images[1]

    def _chosen_channels(self, arm: str, k: int) -> ChannelSet | None:
        if arm == "all":
            return None
        top = self.massive.take(k)
        made: dict[str, Callable[[], ChannelSet]] = {
            "top": lambda: top,
            "bottom": top.bottom,
            "random": lambda: top.random(0),
            "energy-matched": lambda: top.energy_matched(0),
        }
        return made[arm]()

    def _subject_mask(self, k: int) -> np.ndarray:
        return self.lens.subject_mask(self.prompts[0], self.massive.take(k), **self.call)

    def _shot(self, i: int) -> dict[str, Any]:
        return {**_plain(self.settings[i]), "code": self.code_of(self.settings[i]), "seconds": self._seconds[i]}

    def _deliver(self, i: int) -> None:
        self.send({"kind": "shot", "number": i, **self._shot(i)}, buffers=[webp(self.images[i])])

    def _answer(self, _: Any, message: dict[str, Any], buffers: Sequence[Any]) -> None:  # noqa: ARG002
        """Draws what the browser asks for, or sends it what was drawn before it opened."""
        if message["kind"] == "open":
            for i in range(len(self.images)):
                self._deliver(i)
            return
        setting = {name: tuple(v) if isinstance(v, list) else v for name, v in message["setting"].items()}
        try:
            self.draw(**setting)
        except DitLensError as problem:
            self.send({"kind": "problem", "text": str(problem)})

    def __repr__(self) -> str:
        return f"Steer: {self.prompts[0]!r} into {self.prompts[1]!r}, {len(self.images)} drawn"


def _plain(setting: Setting) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(setting).items()}
