"""What a run of all studies would be, before it is one: its rules, its power and its cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any

from dit_lens.commands.findings_cost import count_study
from dit_lens.commands.study_inputs import PromptSet
from dit_lens.core.plan.cost import format_bytes
from dit_lens.core.request.ops import Read
from dit_lens.core.runs.provenance import describe
from dit_lens.errors import FamilyError
from dit_lens.studies import power
from dit_lens.studies.shared.arguments import describe_k
from dit_lens.studies.shared.judges import ask_judge, choose_judge
from dit_lens.studies.shared.registry import get_study

if TYPE_CHECKING:
    from PIL.Image import Image

    from dit_lens.lens import DiTLens
    from dit_lens.studies.shared.model_rows import ModelRow
    from dit_lens.studies.shared.protocols import Protocol

BATCH = 4  # prompts that go through the pipeline together, or pairs; more where one would be left alone
FEW_DRAWS = 3  # of carrier_or_detail, which draws an image for every part
CONTROLS, LEVEL = 3, 0.05  # of a claim, with Holm's correction
TIMED = 2  # steps of the image that is timed
ORDER = ("stability", "disruption", "organisation", "transfer", "carrier_or_detail")


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """Everything that is decided before the first image of the studies.

    lens: lens on the model.
    model: repository or folder, as it was given.
    command: what was asked for, as a command.
    protocol: the protocol.
    row: how the protocol runs this model, if it is one of its own.
    prompts: the prompts.
    seeds: seeds of the noise.
    given: what stands in place of the protocol's, by name: k, draws, arguments of the pipeline, dtype.
    call: arguments of the pipeline.
    judge: what says how far an image shows its prompt, if anything does.
    masks: where subjects are, if that is known.
    timed: an image of TIMED steps, drawn under ``call``.
    seconds: how long that took.
    """

    lens: DiTLens
    model: str
    command: str
    protocol: Protocol
    row: ModelRow | None
    prompts: PromptSet
    seeds: list[int]
    given: dict[str, Any]
    call: dict[str, Any]
    judge: Callable | None
    masks: Any
    timed: Image
    seconds: float

    @property
    def whose(self) -> str:
        """Of what the intervals are."""
        return "new prompts under this noise" if len(self.seeds) == 1 else "new prompts and new seeds"

    @property
    def batch_size(self) -> int:
        """How many prompts go through the pipeline together: each has another one beside it, which it may take from."""
        return next(size for size in count(BATCH) if len(self.prompts.texts) % size != 1)

    def setting(self, argument: str) -> Any:
        """What an argument is: the given one, or that of the protocol."""
        told = {choice.argument: choice.value for choice in self.protocol.choices}
        return self.given.get(argument, told.get(argument))

    @property
    def steps(self) -> int:
        """Denoising steps of an image."""
        return self.lens.outline(self.prompts.texts[0], **self.call).steps

    @cached_property
    def judged(self) -> bool:
        """Whether the judge says how far an image shows its prompt."""
        judge = choose_judge(self.lens, self.prompts.texts, self.judge)
        return "fidelity" in ask_judge(judge, self.timed, self.prompts.texts[0])

    @cached_property
    def left_out(self) -> dict[str, str]:
        """Study -> why it is not run."""
        protocol = self.protocol
        missing = [name for name in ORDER if name not in (*protocol.studies, "carrier_or_detail")]
        found = dict.fromkeys(missing, f"the protocol {protocol.name} says nothing of it")
        if "disruption" in missing:
            found["carrier_or_detail"] = f"the protocol {protocol.name} changes no activations"
        if self.masks is None and choose_judge(self.lens, self.prompts.texts, None) is None:
            found.setdefault("organisation", "nothing says where subjects are (--masks does)")
        if not self.judged:
            found.setdefault("carrier_or_detail", "no judge says how far an image shows its prompt (--judge vqa does)")
        return found

    def arguments(self) -> dict[str, dict[str, Any]]:
        """Study -> its arguments, of the studies that are run."""
        prompts, pairs = self.prompts.texts, self.prompts.pairs
        shared = {"seeds": self.seeds, "batch_size": self.batch_size, **self.call}
        common = {"k": self.given["k"]} if "k" in self.given else {}
        drawn = common | ({"draws": self.given["draws"]} if "draws" in self.given else {})
        by = {"protocol": self.protocol.name}
        found: dict[str, dict[str, Any]] = {
            "stability": {"prompts": prompts, **common, **by},
            "disruption": {"prompts": prompts, "judge": self.judge, **drawn, **by},
            "organisation": {"prompts": prompts, "masks": self.masks, **drawn, **by},
            "transfer": {"pairs": pairs, "judge": self.judge, **drawn, **by},
            "carrier_or_detail": {
                "prompts": prompts,
                "judge": self.judge,
                "k": self.setting("k"),
                "draws": min(self.setting("draws") or FEW_DRAWS, FEW_DRAWS),
            },
        }
        asked = {name: {**found[name], **shared} for name in ORDER if name not in self.left_out}
        if len(self.seeds) == 2 and "carrier_or_detail" in asked:
            asked["carrier_or_detail"]["seeds"] = self.seeds[:1]  # of two, intervals reach far, and decide less
        return asked

    @cached_property
    def counts(self) -> dict[str, tuple[int, int]]:
        """Study -> its cells, and about how many images they draw; mistakes in the arguments raise here."""
        return {name: count_study(get_study(name), self.lens, given) for name, given in self.arguments().items()}

    def hours(self, images: int) -> float:
        """How long so many images take, by the one that was timed."""
        return images * self.seconds * self.steps / TIMED / 3600

    def describe(self) -> str:
        """Rules, power and cost, as text."""
        return "\n".join([self._head(), *self._rules(), *self._power(), *self._cost()])

    def _head(self) -> str:
        anatomy = self.lens.anatomy
        kind = type(self.lens.pipe).__name__
        return f"{self.model}: {kind}, {anatomy.depth} blocks of {anatomy.width} channels"

    def _rules(self) -> list[str]:
        prompts, protocol, width = self.prompts, self.protocol, self.lens.anatomy.width
        given = ", ".join(f"{name}={value}" for name, value in self.given.items())
        call = ", ".join(f"{name}={value!r}" for name, value in self.call.items())
        texts = f"prompts: {len(prompts.texts)} of {prompts.source} ({prompts.digest})"
        return [
            "Rules",
            f"  protocol {protocol.name} ({protocol.digest}): {protocol.about}",
            f"  in its place: {given or 'nothing'}",
            f"  {self._describe_row()}",
            f"  call: {call or 'nothing but the prompt'}; {self.steps} steps; {describe_k(self.setting('k'), width)}",
            f"  {texts}; pairs: {len(prompts.pairs)}, {prompts.pairing}",
            f"  seeds: {len(self.seeds)}, so intervals are of {self.whose}; {self.batch_size} prompts or pairs at once",
            "  a claim holds where the massive channels lie beyond each control of equal size, by p-values corrected",
            f"  for their number (Holm, {LEVEL}), fails where they lie on the other side of one, else is undecided",
            "  claim 2 has nulls to exceed as well, at a block that half of the prompts chose;",
            "  carrier or detail asks of the same channels whether the prompt needs them, and whether they move it",
            f"  studies: {', '.join(self.counts)}",
            *(f"  left out: {name}, as {why}" for name, why in self.left_out.items()),
        ]

    def _describe_row(self) -> str:
        """How the protocol runs this model."""
        if self.row is None:
            known = ", ".join(row.name for row in self.protocol.rows) or "it has none"
            return f"this model is none of the protocol's ({known}): it runs by the pipeline's defaults"
        settings = [(name, one) for name, one in self.row.settings.items() if name not in self.given]
        return f"{self.row.name}: {', '.join(f'{name}={one.value!r} ({one.origin})' for name, one in settings)}"

    def _power(self) -> list[str]:
        """What can be found: in units of a spread that nobody knows before the first images."""
        n = len(self.prompts.texts)
        level = 1 - LEVEL / CONTROLS  # the first comparison that Holm looks at
        row = power(1.0, prompts=n, difference=0.5, level=level).iloc[0]
        return [
            "Power",
            f"  {n} prompts find, with a chance of 80 %, a mean difference from each control of {row['decides']:.2f}",
            f"  standard deviations of the differences over prompts; one of 0.5 takes {row['needs']:.0f} prompts",
        ]

    def _cost(self) -> list[str]:
        images = sum(some for _, some in self.counts.values())
        width, height = self.timed.size
        made = describe(self.lens.pipe, self.lens.family)
        where = f"{made['device']} in {made['dtype']}"
        disk, memory = format_bytes(images * width * height * 3), format_bytes(self._largest_reading())
        return [
            "Cost",
            *(f"  {name}: about {some:,} images, cells: {cells:,}" for name, (cells, some) in self.counts.items()),
            f"  about {_format_hours(self.hours(images))}: an image of {TIMED} steps took {self.seconds:.2g} s on",
            f"  {where}, and one of {self.steps} steps is taken to need {self.steps / TIMED:g} times as long",
            f"  at most {disk} of images on disk, and {memory} of activations in memory",
        ]

    def _largest_reading(self) -> int:
        """Bytes of what `organisation`, the study that reads most, keeps of a batch."""
        some = self.prompts.texts[: self.batch_size]
        try:
            return self.lens.cost(some, [Read("blocks.*.img", steps=-1)], seed=0, **self.call).bytes
        except FamilyError:
            return 0


def time_image(lens: DiTLens, prompt: str, call: Mapping[str, Any]) -> tuple[Image, float]:
    """An image of TIMED steps, and how many seconds it took; the first one of a process, which takes longer, is let go.

    lens: lens on the model.
    prompt: what is drawn.
    call: arguments of the pipeline.
    """
    short: dict[str, Any] = {**call, "num_inference_steps": TIMED, "seed": 0}
    with lens.quiet():
        lens.run(prompt, **short)
        began = time.perf_counter()
        run = lens.run(prompt, **short)  # what it returns is on the CPU, so it is done
    return run.images[0], time.perf_counter() - began


def _format_hours(hours: float) -> str:
    """A duration in the unit a person would use."""
    if hours >= 1:
        return f"{hours:.1f} hours"
    return f"{hours * 60:.1f} minutes ({hours:.2g} hours)"
