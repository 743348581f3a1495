"""The chapters of the findings: which studies they tell of, how each is run, and what is published about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dit_lens.arguments.numbers import MOST, check_number
from dit_lens.commands import sentences
from dit_lens.studies.shared.registry import StudyRecord, get_study
from dit_lens.toys.scenes import sample_scenes

if TYPE_CHECKING:
    from dit_lens.commands.sentences import ControlComparison
    from dit_lens.studies import Result

# 64 prompts decide differences of half a standard deviation (studies.power). Images are spent on prompts: two seeds
# cost twice as much and decide less than one, and so do draws of controls that every image has of its own
# (docs/concepts/statistics.md).
PROMPTS, SEEDS, DRAWS, K = 64, 1, 3, 8
PATCHED = 8  # pairs whose maps are patched; two would show nothing but a difference of 12 standard deviations


@dataclass(frozen=True)
class Size:
    """How much is drawn.

    prompts: number of held-out prompts.
    seeds: number of seeds of each.
    draws: number of random controls where all prompts share them; where every image has its own, a third as many.
    k: number of channels that count as massive.
    call: other arguments of the pipeline.
    """

    prompts: int = PROMPTS
    seeds: int = SEEDS
    draws: int = DRAWS
    k: int = K
    call: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("prompts", "seeds", "draws", "k"):
            check_number(name, getattr(self, name), 1, MOST)

    @property
    def texts(self) -> list[str]:
        """The prompts, no two equal."""
        return [scene.caption for scene in sample_scenes(self.prompts, seed=100, held_out=True, distinct=True)]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Pairs of neighbouring prompts: source, target."""
        return list(zip(self.texts[::2], self.texts[1::2], strict=False))

    @property
    def shared(self) -> dict[str, Any]:
        """The arguments that all studies share."""
        return {"k": self.k, "seeds": list(range(self.seeds)), "batch_size": 8, **self.call}

    @property
    def own_draws(self) -> int:
        """The draws of studies in which every image has random controls of its own."""
        return max(1, self.draws // 3)


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """What the findings say about one study.

    name: name of the study.
    arguments: function size -> arguments of the study, besides lens and folder.
    describe: function result -> what it found, in Markdown.
    published: what others found, and how far it can be compared.
    claim: heading of the claim that the study tests; "" without one.
    compare: function result -> the comparison that decides the claim.
    """

    name: str
    arguments: Callable[[Size], dict[str, Any]]
    describe: Callable[[Result], str]
    published: str
    claim: str = ""
    compare: Callable[[Result], ControlComparison] | None = None

    @property
    def study(self) -> StudyRecord:
        """The study."""
        return get_study(self.name)

    def write_code(self, toy: str, size: Size) -> str:
        """The code that runs the study on a toy, as Python.

        toy: name of the toy.
        size: how much is drawn.
        """
        named = {"prompts": (size.texts, "size.texts"), "pairs": (size.pairs, "size.pairs")}
        given = [
            f"{name}={named[name][1] if name in named and value == named[name][0] else write_value(value, size)}"
            for name, value in self.arguments(size).items()
        ]
        return (
            "import dit_lens as dl\n"
            "from dit_lens.commands.chapters import Size\n\n"
            f"size = {size}\n"
            f"dl.studies.{self.name}(dl.DiTLens.toy({toy!r}), {', '.join(given)})\n"
        )


def write_value(value: Any, size: Size) -> str:
    """An argument in code: pairs by their number, anything else as a literal."""
    pairs = size.pairs
    if isinstance(value, list) and value and value == pairs[: len(value)]:
        return f"size.pairs[:{len(value)}]"
    return repr(value)


def _patch_groups(size: Size) -> dict[str, Any]:
    # Rows of one batch are patches here, so the batch size of the other studies does not apply.
    shared = {name: value for name, value in size.shared.items() if name != "batch_size"}
    # With 17 rows, 8 blocks of 4 groups fill two batches beside their source.
    rows = {"batch_size": 17, "draws": 1}
    return {**shared, "pairs": size.pairs[:PATCHED], "over": "block x channel group", "seeds": [0], **rows}


CHAPTERS = (
    Chapter(
        name="stability",
        # Whether seeds share their channels takes two of them.
        arguments=lambda size: {"prompts": size.texts, **size.shared, "seeds": list(range(max(2, size.seeds)))},
        describe=sentences.describe_stability,
        published="SPARK calls a set stable from a mean overlap of 0.9 of successive aggregates on.",
    ),
    Chapter(
        name="write_attribution",
        arguments=lambda size: {"prompts": size.texts, **size.shared},
        describe=sentences.describe_write_attribution,
        published="2510.11538 finds AdaLN gates that spike at massive dimensions (SD3: 810).",
    ),
    Chapter(
        name="disruption",
        arguments=lambda size: {"prompts": size.texts, **size.shared, "draws": size.own_draws},
        describe=sentences.describe_disruption,
        published="The paper: zeroing the top channels collapses the image, zeroing low-statistic ones hardly matters. "
        "Its k, layers and steps are not stated.",
        claim="claim 1, critical: RMSE of ablation",
        compare=sentences.compare_damage,
    ),
    Chapter(
        name="organisation",
        arguments=lambda size: {"prompts": size.texts, **size.shared, "draws": size.draws},
        describe=sentences.describe_organisation,
        published="The reproduction aims, on FLUX.2-klein, at a peak mIoU of about 0.5 near layer 10 and bottom-k flat "
        "at about 0.2; its one stored measurement (FLUX.1-schnell, 4 prompts) did not show it: top 0.082, random "
        "0.186, bottom 0.184.",
        claim="claim 2, organised: IoU with the subject",
        compare=sentences.compare_overlap,
    ),
    Chapter(
        name="transfer",
        arguments=lambda size: {
            "pairs": size.pairs,
            **size.shared,
            "draws": size.own_draws,
            "strengths": (0.5, 1.0),
            "mask_from": None,
        },
        describe=sentences.describe_transfer,
        published="The paper: moving the channels takes the image towards the source and keeps much of the target. "
        "Strength, layers and steps are not stated.",
        claim="claim 3, movable: RMSE nearer to its own source than to others",
        compare=sentences.compare_distance,
    ),
    Chapter(
        name="patching",
        arguments=_patch_groups,
        describe=sentences.describe_patching,
        published="Attribution patching is a first-order estimate of patching (Syed et al., arXiv 2310.10348); where "
        "the two disagree, patching is right.",
    ),
    Chapter(
        name="carrier_or_detail",
        # Of two seeds intervals reach far, and decide less than of one.
        arguments=lambda size: {
            "prompts": size.texts,
            **size.shared,
            "seeds": [0] if size.seeds == 2 else size.shared["seeds"],
            "draws": size.draws,
        },
        describe=sentences.describe_carrier_or_detail,
        published="2605.13974: massive channels carry the prompt. 2510.11538 and 2607.02968: they are nearly "
        "independent of it and tune detail.",
    ),
)
