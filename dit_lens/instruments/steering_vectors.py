"""Directions that steer: differences between prompts, measured, scaled, saved and added to activations.

Letters: s step, b row, d channel, p pair of prompts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from dit_lens.arguments.checks import checked, checked_fields
from dit_lens.arguments.lists import as_seeds, check_once
from dit_lens.arguments.numbers import to_number
from dit_lens.core.request.directions import Directions
from dit_lens.core.request.ops import Add, Read
from dit_lens.core.runs.files import check_regular, report_damage, write_bytes
from dit_lens.errors import OpError, PromptError, StoreError, check_choice, nearest, show

if TYPE_CHECKING:
    from dit_lens.core.request.ops import Pattern
    from dit_lens.core.session import Session

FORMAT = 1
WHERE = ("steps", "tokens", "mask", "rows", "branch")


@checked_fields
@dataclass(frozen=True, eq=False)
class Steering:
    """A direction for each site, which moves images from what some prompts say to what others say.

    >>> from dit_lens import DiTLens, Steering
    >>> lens = DiTLens.toy()
    >>> scenes = [f"a big red {shape} left on a plain green background" for shape in ("circle", "cross")]
    >>> pairs = [(scene, scene.replace("red", "blue")) for scene in scenes]
    >>> blue = Steering.from_pairs(lens, pairs, "blocks[2:5].img", num_inference_steps=2)
    >>> blue.vectors["blocks.3.img"].shape  # [step, channel]
    torch.Size([2, 128])
    >>> run = lens.run(scenes[0], blue.op(strength=1.5), seed=0, num_inference_steps=2)

    Directions add up (``blue + large``, ``blue - large``, ``sum([blue, large])``), and are lengthened or turned round
    (``2 * blue``, ``blue / 2``, ``-blue``).

    vectors: site -> [channel], for all steps, or [step, channel]: one for every step of a run, from the first. Tensors,
        arrays or lists of numbers, which are kept as float32 tensors.
    method: how they were found.
    pairs: the prompts they were found from.
    n: how many differences they were found from: pairs times seeds; of a sum, those of both.
    family: of the model. Runs of another family, or of another number of steps than the directions have, are refused.
    """

    vectors: Mapping[str, Tensor] = field(repr=False)
    method: str = ""
    pairs: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    n: int = 0
    family: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.vectors, Mapping) or not self.vectors:
            raise OpError("a Steering takes vectors={site: [channel] or [step, channel]}, at least one.")
        vectors = {}
        for site, given in self.vectors.items():
            vector = _to_direction(given)
            if vector is None:
                raise OpError(
                    f"the vector of {site} is {show(given)}. Give a finite tensor [channel] or [step, channel], or "
                    "lists of numbers of that shape."
                )
            vectors[site] = vector
        object.__setattr__(self, "vectors", Directions(vectors, self.family).vectors)  # which checks their steps

    @classmethod
    @checked
    def from_pairs(
        cls,
        lens: Session,
        pairs: Sequence[tuple[str, str]],
        sites: Pattern = "blocks.*.img",
        *,
        method: str = "mean",
        per_step: bool = True,
        seeds: int | Sequence[int] = 0,
        **call: Any,
    ) -> Steering:
        """The direction from the first to the second prompt of pairs, at every site.

        lens: lens on the model.
        pairs: (from, to), prompts that differ in what is to be steered.
        sites: of tokens.
        method: "mean": the mean difference of the tokens' means (activation addition, arXiv 2308.10248; over pairs
            CAA, 2312.06681). "probe": the normal of a logistic regression that tells both sides apart, as long as the
            mean difference along it; it takes several pairs.
        per_step: whether each step has its own direction; otherwise one, their mean, for all steps.
        seeds: noises that both prompts of a pair start from, one after the other.
        call: as in :meth:`DiTLens.run`.

        Raises PromptError for what is not a pair of two different prompts.
        """
        _check_pairs(pairs)
        if "seed" in call:
            raise PromptError("seed= is called seeds= here: one noise, or several over which differences are averaged.")
        check_choice(method, ("mean", "probe"), "method")
        seeds = as_seeds(seeds)
        if method == "probe" and len(pairs) * len(seeds) < 2:
            raise PromptError("a probe parts two groups: give at least two pairs, or two seeds.")
        prompts = [one for pair in zip(*pairs, strict=True) for one in pair]
        found: dict[str, list[Tensor]] = {}
        with lens.quiet():
            for seed in tqdm(seeds, desc="pairs of prompts", disable=len(seeds) < 2):
                reading = lens.run(prompts, Read(sites, reduce="mean"), seed=seed, **call).readings[0]
                for site, value in reading.tensors.items():
                    found.setdefault(site, []).append(value.float().unflatten(1, (2, -1)))
        vectors = {}
        for site, values in found.items():
            both = torch.cat(values, 2)  # [step, side, pair and seed, channel]
            both = both if per_step else both.mean(0, keepdim=True)
            steps = [(_mean_difference if method == "mean" else _probe)(one) for one in both]
            vectors[site] = torch.stack(steps) if per_step else steps[0]
        return cls(vectors, method, tuple(pairs), len(pairs) * len(seeds), lens.family.name)

    @checked
    def op(self, strength: float = 1.0, *, sites: Sequence[str] | str | None = None, **where: Any) -> Add:
        """The op that adds the directions, ``strength`` times.

        strength: 1 moves by the mean difference; negative the other way.
        sites: those of them at which to add; all by default.
        where: ``steps``, ``tokens``, ``mask``, ``rows``, ``branch`` of :class:`~dit_lens.Add`; by default everywhere.

        A run refuses it that is of another family, or has another number of steps than the directions.
        """
        chosen = list(self.vectors) if sites is None else [sites] if isinstance(sites, str) else list(sites)
        if not chosen:
            raise OpError(
                f"op: sites=[] chooses no site. Leave it out for all {len(self.vectors)}, or leave the op out."
            )
        if missing := [site for site in chosen if site not in self.vectors]:
            raise OpError(f"there is no direction at {show(missing[0])}.{nearest(missing[0], self.vectors)}")
        if odd := sorted(where.keys() - set(WHERE)):
            raise OpError(f"op takes no {odd[0]}=.{nearest(odd[0], WHERE)}")
        value = Directions({site: float(strength) * self.vectors[site] for site in chosen}, self.family)
        return Add(chosen, value=value, **where)

    @checked
    def randomised(self, seed: int = 0) -> Steering:
        """Random directions of the same length at every site and step: the control of a strength curve."""
        generator = torch.Generator().manual_seed(seed)
        vectors = {}
        for site, vector in self.vectors.items():
            random = torch.randn(vector.shape, generator=generator)
            vectors[site] = random * vector.norm(dim=-1, keepdim=True) / random.norm(dim=-1, keepdim=True)
        return replace(self, vectors=vectors, method="random")

    def __add__(self, other: object) -> Steering:
        """Both at once: the sum where they have a site in common."""
        return self._join(other, 1)

    def __radd__(self, other: object) -> Steering:
        """The beginning of a ``sum``, which adds to 0."""
        return self._join(other, 1)

    def __sub__(self, other: object) -> Steering:
        """The one, and the other turned round."""
        return self._join(other, -1)

    def __rsub__(self, other: object) -> Steering:
        return (-self)._join(other, 1)

    def _join(self, other: object, sign: int) -> Steering:
        if isinstance(other, int | float) and other == 0:  # nothing, as at the beginning of a sum
            return self
        if not isinstance(other, Steering):
            raise OpError(f"a Steering goes together with a Steering; it was given {show(other)}.")
        if self.family and other.family and self.family != other.family:
            raise OpError(f"directions of {self.family} and of {other.family} do not add up: their channels differ.")
        vectors = dict(self.vectors)
        for site, vector in other.vectors.items():
            if site in vectors and vectors[site].shape != vector.shape:
                raise OpError(
                    f"the directions at {site} have shapes {list(vectors[site].shape)} and {list(vector.shape)}. Make "
                    "both from runs of as many steps, or with per_step=False."
                )
            vectors[site] = vectors[site] + sign * vector if site in vectors else sign * vector
        method = f"{self.method} {'+' if sign > 0 else '-'} {other.method}"
        pairs, family = (*self.pairs, *other.pairs), self.family or other.family
        return Steering(vectors, method, pairs, self.n + other.n, family)

    def __mul__(self, factor: object) -> Steering:
        """Longer or shorter directions; the other way by a negative number."""
        return self._stretch(_to_factor(factor))

    __rmul__ = __mul__

    def __truediv__(self, factor: object) -> Steering:
        if not (number := _to_factor(factor)):
            raise OpError("a Steering is not divided by 0. To leave it out, leave its op out.")
        return self._stretch(1 / number)

    def __neg__(self) -> Steering:
        """The other way."""
        return self._stretch(-1.0)

    def _stretch(self, factor: float) -> Steering:
        return replace(self, vectors={site: vector * factor for site, vector in self.vectors.items()})

    @checked
    def save(self, file: str | Path) -> Path:
        """Writes one safetensors file, whole or not at all; its header says what the directions are."""
        from safetensors.torch import save

        about = {"format": FORMAT, "method": self.method, "pairs": self.pairs, "n": self.n, "family": self.family}
        tensors = {site: vector.contiguous() for site, vector in self.vectors.items()}
        return write_bytes(Path(file), save(tensors, metadata={"steering": json.dumps(about)}))

    @classmethod
    @checked
    def load(cls, file: str | Path) -> Steering:
        """Reads what :meth:`save` wrote."""
        from safetensors import safe_open

        file = check_regular(Path(file))
        with report_damage(file, "Restore it from a copy, or make it again from its pairs."):
            with safe_open(file, "pt") as stored:
                about = json.loads((stored.metadata() or {}).get("steering", "null"))
                vectors = {site: stored.get_tensor(site) for site in stored.keys()}  # noqa: SIM118 it is no mapping
            if not isinstance(about, dict) or about.get("format") != FORMAT:
                raise StoreError(f"{file} holds no directions that this version can read.")
            pairs = tuple((str(a), str(b)) for a, b in about["pairs"])
            return cls(vectors, str(about["method"]), pairs, int(about["n"]), str(about["family"]))


def _to_direction(given: Any) -> Tensor | None:
    """Finite numbers, [channel] or [step, channel], as a float32 tensor; None for anything else."""
    try:
        of_tensors = isinstance(given, list | tuple) and all(isinstance(one, Tensor) for one in given)
        vector = torch.stack(list(given)) if of_tensors else torch.as_tensor(given)
        odd = vector.dtype == torch.bool or vector.is_complex() or vector.ndim not in (1, 2) or not vector.numel()
        return None if odd or not (vector := vector.float()).isfinite().all() else vector
    except (ArithmeticError, RuntimeError, TypeError, ValueError):
        return None


def _to_factor(value: object) -> float:
    number = to_number(value)
    if number is None:
        raise OpError(f"a Steering is multiplied and divided by finite numbers; it was given {show(value)}.")
    return number


def _check_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    if not pairs:
        raise PromptError("there are no pairs of prompts. Give at least one: (from, to).")
    if same := [start for start, to in pairs if start == to]:
        raise PromptError(f"a pair is twice the prompt {same[0]!r}, which gives no direction. Give (from, to).")
    check_once("pairs", pairs, "a pair", PromptError, by=tuple)


def _mean_difference(both: Tensor) -> Tensor:
    """The mean of second minus first. both: [side, pair, channel]."""
    return (both[1] - both[0]).mean(0)


def _probe(both: Tensor) -> Tensor:
    """The unit normal of a logistic regression, times the mean difference along it. both: [side, pair, channel]."""
    from sklearn.linear_model import LogisticRegression

    features = both.flatten(0, 1)
    scale = features.std().clamp_min(torch.finfo(torch.float32).tiny)
    labels = [0] * both.shape[1] + [1] * both.shape[1]
    fitted = LogisticRegression(max_iter=1000).fit((features / scale).numpy(), labels)
    normal = torch.nn.functional.normalize(torch.from_numpy(fitted.coef_[0]).float(), dim=0)
    return normal * (_mean_difference(both) @ normal)
