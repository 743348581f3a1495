"""Protocols: every free choice of a study by one name, with whose choice each is.

    result = dl.studies.organisation(lens, prompts, protocol="fig3-reproduction")
    dl.protocols.get("turri2026").table                  # what it sets, and who says so

A paper leaves choices open, and results depend on them. A protocol fills them in and tells the authors' ("paper") from
those of the public reproduction of its Fig. 3 ("repro") and from this library's ("ours"). An argument that is given
explicitly wins, and counts as "yours". How the paper's models are run is in ``get("turri2026").models``, where
"default" is diffusers' and "makers" what those say who made the model.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

from dit_lens.arguments.checks import checked
from dit_lens.core.runs.provenance import digest
from dit_lens.errors import OpError, check_choice
from dit_lens.old_names import OldName
from dit_lens.studies.shared.folders import add_remarks
from dit_lens.studies.shared.model_rows import TURRI_2026, ModelRow
from dit_lens.studies.shared.shares import UnfinishedStudyError

if TYPE_CHECKING:
    import pandas as pd

    from dit_lens.studies.shared.result import Result

Study = TypeVar("Study", bound="Callable[..., Result]")

ORIGINS = {"paper": "the authors'", "repro": "the reproduction's", "ours": "this library's", "yours": "given"}
ORIGINS |= {"default": "diffusers'", "makers": "the model's makers'"}


@dataclass(frozen=True)
class Choice:
    """One free choice of a study.

    study: name of the study.
    argument: argument that holds the choice; "" if it is part of the procedure.
    value: what was chosen.
    origin: whose choice it is, a key of ORIGINS.
    why: reason, or what the source says.
    """

    study: str
    argument: str
    value: Any
    origin: str
    why: str = ""


@dataclass(frozen=True)
class Protocol:
    """A named set of choices.

    >>> get("fig3-reproduction").arguments("organisation")["k"]
    12
    >>> get("turri2026").table.query("study == 'disruption' and argument == 'ablation'")["origin"].item()
    'paper'

    >>> get("turri2026").models.query("argument == 'num_inference_steps'")[["model", "value", "origin"]].iloc[
    ...     1
    ... ].tolist()
    ['FLUX.1-schnell', 4, 'makers']

    name: name of the protocol.
    about: what it follows.
    choices: its choices, for every study that it covers.
    rows: how its models are run.
    """

    name: str
    about: str
    choices: tuple[Choice, ...]
    rows: tuple[ModelRow, ...] = ()

    chosen = OldName("apply")

    @property
    def studies(self) -> list[str]:
        """The names of the studies that it covers."""
        return list(dict.fromkeys(choice.study for choice in self.choices))

    @property
    def table(self) -> pd.DataFrame:
        """One row per choice: study, argument, value, origin ("paper", "repro", "ours"), why."""
        import pandas as pd

        return pd.DataFrame([asdict(choice) for choice in self.choices])

    @property
    def models(self) -> pd.DataFrame:
        """One row per choice of how a model is run: model, argument, value (None: the pipeline's own), origin, why."""
        import pandas as pd

        lines = [
            {"model": row.name, "argument": name, **asdict(setting)}
            for row in self.rows
            for name, setting in row.settings.items()
        ]
        return pd.DataFrame(lines, columns=["model", "argument", "value", "origin", "why"], dtype=object)

    @property
    def digest(self) -> str:
        """A hash of what it sets; wording and origins do not count."""
        choices = [[choice.study, choice.argument, choice.value] for choice in self.choices]
        return digest(json.dumps(choices).encode())

    @checked
    def find_row(self, repository: str) -> ModelRow | None:
        """How the model of a repository is run; None if it is none of the protocol's."""
        return next((row for row in self.rows if row.repository.lower() == repository.lower()), None)

    @checked
    def arguments(self, study: str) -> dict[str, Any]:
        """The arguments that it sets for a study; OpError if it does not cover the study."""
        if study not in self.studies:
            raise OpError(
                f"the protocol {self.name!r} says nothing of {study}: {self.about} It sets {', '.join(self.studies)}."
            )
        return {choice.argument: choice.value for choice in self.choices if choice.study == study and choice.argument}

    @checked
    def apply(self, study: str, given: Mapping[str, Any]) -> list[Choice]:
        """Its choices for a study, after what was given explicitly."""
        return [
            replace(choice, value=given[choice.argument], origin="yours", why="")
            if choice.argument and choice.argument in given
            else choice
            for choice in self.choices
            if choice.study == study
        ]

    def __repr__(self) -> str:
        return f"Protocol {self.name}: {self.about}\n{self.table.to_string(index=False, justify='left')}"


def _make_choices(study: str, *choices: tuple[Any, ...]) -> tuple[Choice, ...]:
    return tuple(Choice(study, *choice) for choice in choices)


_K = ("k", 12, "repro", "the authors state none; 12 on FLUX.2-klein in the reproduction")
_SETS = (("score", "|mean|", "paper", "|mean over image tokens| of the block's output"), _K)
_REPRODUCED_SETS = (("score", "mean|x|", "repro", "absolute values first, then their mean over image tokens"), _K)
_DRAWS = ("draws", 10, "ours", "random controls, each one map of channels for all blocks")
_STABLE = ("stable", 0.9, "ours", "SPARK's stopping rule")

_STABILITY = _make_choices(
    "stability",
    _K,
    ("scores", ("|mean|", "mean|x|"), "paper", "the authors' score, and beside it the reproduction's"),
    ("site", "blocks.*.img", "paper", "a set for every block, image stream"),
    ("steps", None, "ours", "the steps are not stated: all of them"),
    _STABLE,
)

_REPRODUCED_STABILITY = _make_choices(
    "stability",
    _K,
    ("scores", ("mean|x|", "p99.9"), "repro", "the second finds channels that are massive at few tokens"),
    ("site", "blocks.*.img", "ours", "the reproduction looks at block 11 of FLUX.1-dev: here all of them"),
    ("steps", -1, "repro", "the last denoising step"),
    _STABLE,
)

_PROCEDURE = (
    ("steps", -1, "repro", "the last denoising step; channels are chosen at the same step"),
    ("site", "blocks.*.img", "repro", "every block, clustered by itself"),
    ("n_clusters", 2, "paper", "K-means with K = 2"),
    ("method", "minmax", "repro", "every channel by its minimum and maximum over tokens"),
    ("polarity", "heat", "repro", "the cluster with the larger mean of the summed channels is the subject"),
    ("", "top, bottom, random", "paper", "the low-statistic control; random in the reproduction"),
    ("", "IoU after nearest upsampling of the token grid", "repro", "with a mask of the generated image"),
    ("", "energy-matched arm, chance level, nulls", "ours", "what a smooth, centred subject demands"),
)

_ORGANISATION = _make_choices("organisation", *_SETS, *_PROCEDURE, _DRAWS)

_REPRODUCED_ORGANISATION = _make_choices(
    "organisation",
    *_REPRODUCED_SETS,
    *_PROCEDURE,
    ("draws", 5, "repro", "random controls; here each is one map of channels for all blocks"),
)

_DISRUPTION = _make_choices(
    "disruption",
    *_SETS,
    ("ablation", "zero", "paper", "channels are set to 0"),
    ("site", "blocks.*.img", "ours", "image stream as in the paper, which does not state the layers: all of them"),
    ("steps", None, "ours", "the steps are not stated: all of them"),
    ("distances", ("rmse", "psnr"), "ours", "the metrics are not stated"),
    _DRAWS,
    ("confounds", True, "ours", "arms for the norm, the energy and the size of the change"),
    ("", "bottom: an equally sized low-statistic set", "paper", "the control"),
    ("", "sets of each image's clean run, kept in the edited one", "ours", "not stated"),
)

_TRANSPORT = (
    *_SETS,
    ("strengths", (0.25, 0.5, 0.75, 1.0), "ours", "the formula replaces, which is strength 1; less is a sweep"),
    ("mask_from", "source", "ours", "whose mask is not stated; a spatial mask p is the paper's, and None a variant"),
    ("mask_block", None, "ours", "not stated: after two thirds of the blocks"),
    ("channels_from", "source", "ours", "not stated"),
    ("site", "blocks.*.img", "ours", "the layers are not stated: all of them, image stream"),
    ("steps", None, "ours", "the steps are not stated: all of them"),
    ("branch", "cond", "ours", "the branch is not stated"),
    _DRAWS,
    ("", "X_target (1 - p m^T) + X_source p m^T", "paper", "the swap"),
    ("", "one noise for source and target", "ours", "not stated"),
)

_TRANSFER = _make_choices("transfer", *_TRANSPORT)

_TRANSFER_IMAGE = _make_choices(
    "transfer_image",
    *_TRANSPORT,
    ("how", "noised", "ours", "how the trajectory of an image is computed is not stated; inversion is the other way"),
)

_PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "turri2026",
            "arXiv 2605.13974, the authors' values where they are stated, else the reproduction's, else ours.",
            (*_DISRUPTION, *_ORGANISATION, *_TRANSFER, *_TRANSFER_IMAGE, *_STABILITY),
            TURRI_2026,
        ),
        Protocol(
            "fig3-reproduction",
            "the public reproduction of Fig. 3 of arXiv 2605.13974 (github.com/BrendanGho/massive-activations-fig3), "
            "which looks at activations and changes none.",
            (*_REPRODUCED_ORGANISATION, *_REPRODUCED_STABILITY),
        ),
    )
}
NAMES = tuple(_PROTOCOLS)


@checked
def get(name: str) -> Protocol:
    """The protocol of a name, "turri2026" or "fig3-reproduction"; OpError for another name."""
    check_choice(name, NAMES, "protocol")
    return _PROTOCOLS[name]


def with_protocols(study: Study) -> Study:
    """Adds an argument ``protocol=`` to a study: a name that sets every argument not given explicitly.

    The result's ``settings["protocol"]`` has the name and every choice with its origin, and a note sums them up.
    """

    @wraps(study)
    def called(*args: Any, protocol: str | None = None, **given: Any) -> Result:
        if protocol is None:
            return study(*args, **given)
        chosen, name = get(protocol), called.__name__
        choices = chosen.apply(name, given)
        settings = {"protocol": {"name": protocol, "choices": [asdict(choice) for choice in choices]}}
        notes = [_write_note(protocol, choices)]
        try:
            result = study(*args, **{**chosen.arguments(name), **given})
        except UnfinishedStudyError:
            add_remarks(given["out"], settings, notes)
            raise
        if given.get("out") is not None:
            add_remarks(given["out"], settings, notes)
        result.settings |= settings
        result.notes += notes
        return result

    vars(called)["__signature__"] = _add_protocol(study)
    return cast("Study", called)


def _write_note(protocol: str, choices: list[Choice]) -> str:
    parts = [
        f"{whose}: {', '.join(found)}"
        for origin, whose in ORIGINS.items()
        if (found := [f"{c.argument}={c.value!r}" if c.argument else c.value for c in choices if c.origin == origin])
    ]
    return f"protocol {protocol}; {'; '.join(parts)}"


def _add_protocol(study: Callable[..., Any]) -> inspect.Signature:
    """The study's own signature, with ``protocol`` before ``**call``."""
    signature = inspect.signature(study)
    own = list(signature.parameters.values())
    position = len(own) - (own[-1].kind is inspect.Parameter.VAR_KEYWORD)
    extra = inspect.Parameter("protocol", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="str | None")
    return signature.replace(parameters=[*own[:position], extra, *own[position:]])
