"""Live steering: a widget that swaps channels of one generation into another and shows the resulting image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache
from math import prod
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import traitlets

from dit_lens.analysis.metrics import rmse
from dit_lens.arguments.checks import checked
from dit_lens.arguments.signatures import sets
from dit_lens.core.request.division import Division, refuse_several_images
from dit_lens.core.request.ops import Swap
from dit_lens.errors import DitLensError, OpError, PromptError, check_choice, nearest, show
from dit_lens.explorer.setting import ARMS, WHERE, Setting, to_state
from dit_lens.explorer.steering_code import code_of_steering
from dit_lens.explorer.widget import Widget, bytes_trait, encode_webp, join_modules
from dit_lens.studies.shared.judges import ask_judge, choose_judge

if TYPE_CHECKING:
    from PIL.Image import Image

    from dit_lens.analysis.channels import ChannelSet
    from dit_lens.lens import DiTLens


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
    Setting(strength=0.5, arm='top', k=4, blocks=(4, 8), steps=(0, 2), where='everywhere', mask=())

    Source and target are two rows of one batch with the same noise. In the chosen channels,
    X_target <- (1 - s) X_target + s X_source. ``panel.draw(...)`` does from Python what the controls do;
    ``panel.images`` and ``panel.settings`` keep every result, and ``panel.code`` is the code of the last one. The steps
    before the first edited one are computed only once. ``panel.draw(source="...")``, or a prompt that is written into
    the panel, draws source and target anew. Below the result stand its RMSE to both and, for a toy, what it shows of
    their prompts.

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
    """The widget that ``dl.steer`` returns. Its controls are the attributes of a :class:`Setting`, and both prompts.

    - source: prompt that channels are taken from.
    - target: prompt of the image that is changed.
    """

    _esm = join_modules("steering_brush", "steering")

    # Data for the browser, which static/steering.js reads.
    data_info = traitlets.Dict().tag(sync=True)
    data_starts = traitlets.List().tag(sync=True)
    data_results = traitlets.List().tag(sync=True)
    data_images = bytes_trait()

    source = traitlets.Unicode("").tag(sync=True)
    target = traitlets.Unicode("").tag(sync=True)
    strength = traitlets.Float(1.0).tag(sync=True)
    arm = traitlets.Unicode("top").tag(sync=True)
    k = traitlets.Int(8).tag(sync=True)
    blocks = traitlets.List(traitlets.Int()).tag(sync=True)
    steps = traitlets.List(traitlets.Int()).tag(sync=True)
    where = traitlets.Unicode("everywhere").tag(sync=True)
    mask = traitlets.List(traitlets.Int()).tag(sync=True)

    def __init__(
        self, lens: DiTLens, source: str, target: str, massive: ChannelSet, *, k: int, seed: int, call: dict[str, Any]
    ):
        """Runs source and target without an edit. massive: channels of the source, as many as can be chosen."""
        self.lens, self._largest = lens, max(map(len, dict(massive).values()))
        self.call: dict[str, Any] = {"seed": seed, **call}
        self._source_call = Division.of(lens.pipe, lens.family).share(self.call, [0], 2)
        self.settings: list[Setting] = []
        self.images: list[Image] = []
        self._starts: list[dict[str, Any]] = []
        self._results: list[dict[str, Any]] = []
        self._begin([source, target], massive)
        self._initial = Setting(k=k, blocks=(0, lens.anatomy.depth), steps=(0, len(self.base.clock)))
        super().__init__(
            data_info={
                "arms": ARMS,
                "where": WHERE,
                "largest": self._largest,
                "depth": lens.anatomy.depth,
                "sigmas": self.base.sigmas,
                "grid": list(self.base.grid),
            },
            data_starts=[_describe_start(self._starts[0])],
            data_images=b"".join(self._starts[0]["files"]),
            source=source,
            target=target,
            **to_state(self._initial),
        )
        self.on_msg(self._answer)

    def _begin(self, prompts: list[str], massive: ChannelSet) -> None:
        """Draws source and target without an edit, to which later images are compared."""
        base = self.lens.run(prompts, record=True, **self.call)
        self.prompts, self.massive, self.base = prompts, massive, base
        self._cached_channels = cache(self._choose_channels)
        self._cached_mask = cache(self._segment_subject)
        self._judge = choose_judge(self.lens, prompts, None)
        self._starts.append({"prompts": prompts, "files": [encode_webp(image) for image in base.images]})

    def draw(self, **changes: Any) -> Image:
        """Draws the target with the setting of the controls and adds the result to the strip.

        changes: controls to change first, such as ``strength=0.5``, ``mask=(3, 4)`` or ``source="another prompt"``.
        """
        known = [*asdict(self._initial), "source", "target"]
        if unknown := [name for name in changes if name not in known]:
            raise OpError(f"there is no control {unknown[0]!r}.{nearest(unknown[0], known)}")
        prompts = [changes.pop("source", self.source), changes.pop("target", self.target)]
        if odd := [prompt for prompt in prompts if not isinstance(prompt, str)]:
            raise PromptError(f"source and target are prompts, each a text, and not {show(odd[0])}.")
        setting = replace(self.setting, **changes)
        self._check_setting(setting)
        if prompts != self.prompts:
            self._change_prompts(prompts)
        start = perf_counter()
        run = self.lens.run(self.prompts, [self.swap(setting)], prefix=self.base, **self.call)
        seconds = perf_counter() - start
        self.settings.append(setting)
        self.images.append(run.images[1])
        self._results.append(self._describe(setting, run.images[1]) | {"seconds": seconds})
        self.set_state(to_state(setting) | {"source": prompts[0], "target": prompts[1]})  # those of the last image
        self._send_result(len(self.images) - 1)
        return run.images[1]

    def _change_prompts(self, prompts: list[str]) -> None:
        """Draws another source and target; the channels are those of the source."""
        _check_call(self.lens, prompts, self.call)
        massive = self.massive
        if prompts[0] != self.prompts[0]:
            massive = self.lens.massive_channels(prompts[0], self._largest, score=massive.score, **self._source_call)
        self._begin(prompts, massive)
        self._send_start(len(self._starts) - 1)

    @property
    def setting(self) -> Setting:
        """The current setting of the controls."""
        (first_block, end_block), (first_step, end_step) = self.blocks, self.steps
        ends = (first_block, end_block), (first_step, end_step)
        return Setting(self.strength, self.arm, self.k, *ends, self.where, tuple(self.mask))

    @checked
    def swap(self, setting: Setting) -> Swap:
        """Returns the op of a setting."""
        self._check_setting(setting)
        masks = {"everywhere": lambda _: None, "subject": self._cached_mask, "brush": lambda _: self._fill(setting)}
        return Swap(
            f"blocks[{setting.blocks[0]}:{setting.blocks[1]}].img",
            source="row:0",
            rows=1,
            channels=self._cached_channels(setting.arm, setting.k),
            strength=setting.strength,
            steps=slice(*setting.steps),
            mask=masks[setting.where](setting.k),
            branch="cond",
        )

    def _check_setting(self, setting: Setting) -> None:
        """Raises OpError if there are no such channels or tokens."""
        check_choice(setting.arm, ARMS, "arm")
        check_choice(setting.where, WHERE, "where")
        tokens = prod(self.base.grid)
        if odd := [token for token in setting.mask if not 0 <= token < tokens]:
            raise OpError(f"mask= has token {odd[0]}, and the image has {tokens}. Choose 0 to {tokens - 1}.")
        if setting.where == "brush" and not setting.mask:
            raise OpError(
                "where='brush' swaps at the tokens of mask=, and there are none. Mark some on an image first."
            )

    def _fill(self, setting: Setting) -> np.ndarray:
        """The tokens that are brushed, bool [h, w]."""
        mask = np.zeros(prod(self.base.grid), bool)
        mask[list(setting.mask)] = True
        return mask.reshape(self.base.grid)

    @property
    def code(self) -> str:
        """The code that draws the last image, or that of the initial setting."""
        return self._results[-1]["code"] if self._results else self.code_of(self._initial)

    @checked
    def code_of(self, setting: Setting) -> str:
        """Returns the code that draws the image of a setting, with the present source and target."""
        return code_of_steering(self.base, setting, self.massive.score, self.call, self._source_call)

    def whole_state(self) -> dict[str, Any]:
        files = [encode_webp(image) for image in self.images]
        results = [result | {"length": len(file)} for result, file in zip(self._results, files, strict=True)]
        starts = [file for start in self._starts for file in start["files"]]
        return super().whole_state() | {
            "data_starts": [_describe_start(start) for start in self._starts],
            "data_results": results,
            "data_images": b"".join([*starts, *files]),
        }

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

    def _describe(self, setting: Setting, image: Image) -> dict[str, Any]:
        """What the browser shows of an image: its setting and code, and how it compares with source and target."""
        judged = [ask_judge(self._judge, image, prompt) for prompt in self.prompts]
        return {
            **to_state(setting),
            "source": self.prompts[0],
            "target": self.prompts[1],
            "start": len(self._starts) - 1,
            "code": self.code_of(setting),
            "distances": [rmse(image, other) for other in self.base.images],
            "fidelity": {"readable": bool(judged[1]["readable"]), "shares": [one["fidelity"] for one in judged]}
            if self._judge
            else None,
        }

    def _send_start(self, i: int) -> None:
        start = self._starts[i]
        self.send({"kind": "start", "number": i, "prompts": start["prompts"]}, buffers=start["files"])

    def _send_result(self, i: int) -> None:
        self.send({"kind": "result", "number": i, **self._results[i]}, buffers=[encode_webp(self.images[i])])

    def _answer(self, _: Any, message: dict[str, Any], buffers: Sequence[Any]) -> None:  # noqa: ARG002
        """Draws what the browser requests; to a view that has just opened, sends what was drawn so far.

        Whatever goes wrong is sent, as a view that hears nothing waits for ever.
        """
        if message["kind"] == "open":
            for i in range(len(self._starts)):
                self._send_start(i)
            for i in range(len(self.images)):
                self._send_result(i)
            return
        self.send({"kind": "started"})
        try:
            self.draw(**{name: tuple(v) if isinstance(v, list) else v for name, v in message["setting"].items()})
        except DitLensError as error:
            self._send_error(str(error))
        except Exception as error:  # noqa: BLE001
            self._send_error(f"{type(error).__name__}: {error}")
        except BaseException as error:
            self._send_error(f"{type(error).__name__}: the drawing was stopped.")
            raise

    def _send_error(self, text: str) -> None:
        self.send({"kind": "error", "text": text})

    def __repr__(self) -> str:
        return f"Steer: {self.prompts[0]!r} into {self.prompts[1]!r}, {len(self.images)} drawn"


def _describe_start(start: dict[str, Any]) -> dict[str, Any]:
    """What a page knows of a source and target: their prompts, and the lengths of their images in bytes."""
    return {"prompts": start["prompts"], "lengths": [len(file) for file in start["files"]]}
