"""What the options of ``dit-lens study`` name: prompts, a judge, and masks of subjects."""

from __future__ import annotations

import json
import runpy
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_lens.analysis import metrics
from dit_lens.arguments.numbers import MOST, check_number
from dit_lens.arguments.paths import expand_user
from dit_lens.core.runs.files import check_regular, report_damage
from dit_lens.core.runs.provenance import digest
from dit_lens.errors import OpError, PromptError, StoreError, nearest
from dit_lens.studies.shared import prompts as lists
from dit_lens.studies.shared import protocols
from dit_lens.studies.shared.ray_workers import RayWorkers

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from dit_lens.lens import DiTLens

SCENES, SEED = 16, 100  # held-out scenes of a toy, as many as in its findings
SEEDS = 1  # of two, intervals are of new seeds as well, of which two tell little
CLIP = "openai/clip-vit-large-patch14"


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """What ``dit-lens study`` is asked for.

    protocol: name of the protocol.
    prompts: a file of prompts; None: those of the library.
    masks: birefnet, a file FILE.py with a function masks, or a folder of masks.
    judge: clip, vqa, or a file FILE.py with a function judge.
    k, draws: in place of the protocol's.
    steps: in place of the pipeline's, or of the protocol's for this model.
    call: other arguments of the pipeline, each NAME=VALUE.
    seeds: how many.
    trust_remote_code: whether code that comes with a segmenter may run.
    """

    protocol: str = "turri2026"
    prompts: Path | None = None
    masks: str | None = None
    judge: str | None = None
    k: int | None = None
    draws: int | None = None
    steps: int | None = None
    call: tuple[str, ...] = ()
    seeds: int = SEEDS
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Tells what cannot be used before a pipeline is loaded."""
        check_number("seeds", self.seeds, 1, MOST)
        for name in ("k", "draws"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 1, MOST)
        protocols.get(self.protocol)
        self.make_call()
        if self.prompts is not None:
            lists.load(self.prompts)
        _check_named("judge", self.judge, ("clip", "vqa"))
        _check_named("masks", self.masks, ("birefnet",))

    def write_command(self, pipeline: str) -> str:
        """The command that asks for this of a pipeline, but for where it runs and what it writes."""
        words = ["dit-lens", "study", pipeline]
        for own in fields(self):
            value, flag = getattr(self, own.name), f"--{own.name.replace('_', '-')}"
            if value == own.default:
                continue
            words += [flag] if value is True else [flag, *map(str, value if isinstance(value, tuple) else [value])]
        return shlex.join(words)

    def make_call(self) -> dict[str, Any]:
        """The arguments of the pipeline that were given."""
        found = {} if self.steps is None else {"num_inference_steps": self.steps}
        for text in self.call:
            name, equals, value = text.partition("=")
            if not equals:
                raise PromptError(f"--call {text} has no '='. Give NAME=VALUE, such as height=512.")
            found[name] = _read_value(value)
        return found

    def make_given(self) -> dict[str, Any]:
        """What was given in place of what the protocol, or the pipeline, has."""
        numbers = {name: value for name in ("k", "draws") if (value := getattr(self, name)) is not None}
        return {**numbers, **self.make_call()}


def choose_share(
    shard: str | None, load: Callable[[], DiTLens], workers: int | None, address: str | None
) -> dict[str, Any]:
    """How the cells of every study are divided, as arguments of it: by a shard, by workers, or not.

    shard: I/N, as it was given.
    load: what returns the lens of a worker.
    workers: how many there are.
    address: of their cluster.
    """
    if address is not None and workers is None:
        raise OpError(f"--ray {address} is where workers are. Say how many with --workers N.")
    if shard is not None and workers is not None:
        raise OpError("--shard and --workers both divide the cells. Give one of them.")
    if workers is not None:
        return {"workers": RayWorkers(load, workers, address)}
    if shard is None:
        return {}
    number, _, count = shard.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise OpError(f"--shard {shard} is not a valid part. Give I/N, such as 0/8 to 7/8.")
    return {"shard": (int(number), int(count))}


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a study.

    texts: those whose images are edited.
    pairs: (source, target) of transport.
    names: name of each text, by which masks are found.
    source: where they are from.
    pairing: how pairs were made, in words.
    """

    texts: list[str]
    pairs: list[tuple[str, str]]
    names: list[str]
    source: str
    pairing: str

    @property
    def digest(self) -> str:
        """A hash of the texts and pairs."""
        return digest(json.dumps([self.texts, self.pairs]).encode())


def read_prompts(lens: DiTLens, file: Path | None) -> PromptSet:
    """The prompts of a file, or those that come with the library; two or more.

    lens: a toy takes scenes.
    file: a .csv or .jsonl, or None.
    """
    if file is not None:
        found, source = lists.load(file), file.name
    elif lens.vocabulary is not None:
        found, source = lists.scenes(SCENES, SEED, held_out=True), "held-out scenes"
    else:
        found, source = lists.bundled(), "the bundled prompts"
    some = found.unpaired if len(found.unpaired) > 1 else found
    if len(some) < 2:
        raise PromptError(f"{source} has one prompt, of which no difference can be told. Give two or more.")
    texts = [prompt.text for prompt in some.prompts]
    pairs = found.pairs or list(zip(texts[::2], texts[1::2], strict=False))
    return PromptSet(
        texts,
        pairs,
        [prompt.id for prompt in some.prompts],
        source,
        "those of the list" if found.pairs else "neighbours in the list",
    )


def find_judge(named: str | None, device: Any) -> Callable[[Image, str], Any] | None:
    """The judge that an option names: clip, vqa (each with :MODEL for another model), or a file with ``judge``.

    named: the option, or None.
    device: where its model is to be.
    """
    if named is None:
        return None
    kind, _, model = named.partition(":")
    if kind == "clip":
        return _place(metrics.clip_judge(model or CLIP), device)
    if kind == "vqa":
        return _place(metrics.vqa_judge(*([model] if model else [])), device)
    return load_function(Path(expand_user(named)), "judge")


def find_masks(
    named: str | None, names: list[str], device: Any, *, trust_remote_code: bool = False
) -> list[np.ndarray] | Callable[[Image, str], Any] | None:
    """The masks that an option names: birefnet (or birefnet:MODEL), a file with ``masks``, or a folder of images.

    named: the option, or None.
    names: names of the prompts; a folder has NAME.png for each, white on the subject.
    device: where the model is to be.
    trust_remote_code: whether code that comes with a model may run.
    """
    if named is None:
        return None
    kind, _, model = named.partition(":")
    if kind == "birefnet":
        given = [model] if model else []
        return _place(metrics.birefnet_masks(*given, trust_remote_code=trust_remote_code), device)
    if named.endswith(".py"):
        return load_function(Path(expand_user(named)), "masks")
    folder = Path(expand_user(named))
    return [_read_mask(folder / f"{name}.png") for name in names]


def _check_named(what: str, named: str | None, kinds: Sequence[str]) -> None:
    """Raises OpError for a judge or masks that are neither of a known kind, nor a file, nor a folder of masks.

    what: "judge" or "masks".
    named: the option, or None.
    kinds: those that have a name.
    """
    if named is None or named.partition(":")[0] in kinds:
        return
    if named.endswith(".py"):
        if not check_regular(Path(expand_user(named))).is_file():
            raise StoreError(f"there is no file {named}.")
    elif what == "judge" or not Path(expand_user(named)).is_dir():
        folder = ["a folder with ID.png files"] if what == "masks" else []
        raise OpError(f"--{what} {named} is none.{nearest(named, [*kinds, 'FILE.py', *folder])}")


def _read_value(text: str) -> Any:
    """A value as JSON writes it; anything else is a text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def load_function(file: Path, name: str) -> Callable[[Image, str], Any]:
    """A function of a Python file, which is run; StoreError or OpError if that does not work."""
    try:
        found = runpy.run_path(str(file))
    except Exception as problem:
        raise OpError(f"{file} raises {type(problem).__name__} when it is run: {problem}") from problem
    if not callable(found.get(name)):
        raise OpError(f"{file} has no function {name}(image, prompt). Define it, and nothing else is needed.")
    return found[name]


def _read_mask(file: Path) -> np.ndarray:
    import numpy as np
    from PIL import Image

    if not check_regular(file).is_file():
        raise StoreError(
            f"there is no mask {file}. A folder of masks has an image for every prompt, by the prompt's id."
        )
    with report_damage(file, "Draw it again."):
        return np.asarray(Image.open(file, formats=["PNG"]).convert("L")) > 127


def _place(judge: Any, device: Any) -> Any:
    judge.model.to(device)
    return judge
