"""Vectors that are added at sites, with what they were measured on: plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dit_lens.errors import OpError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Directions(Mapping[str, Any]):
    """A mapping site -> vector that knows the model it is of, as the value of :class:`~dit_lens.Add`.

    vectors: site -> [channel], or [step, channel]: one for every step of a run, from the first.
    family: of the model; "" where that is not known.
    """

    vectors: Mapping[str, Tensor]
    family: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "vectors", dict(self.vectors))
        if len(counts := {len(vector) for vector in self.vectors.values() if vector.ndim == 2}) > 1:
            raise OpError(
                f"directions are of one run, and these have one for each of {' and of '.join(map(str, sorted(counts)))}"
                " steps, from site to site."
            )

    @property
    def steps(self) -> int | None:
        """How many steps a run has that each have their own; None where one is for all steps."""
        return next((len(vector) for vector in self.vectors.values() if vector.ndim == 2), None)

    def check(self, op: str, family: str, steps: int) -> None:
        """OpError where they are of another model, or of runs of other steps. op, family, steps: where they go."""
        if self.family and self.family != family:
            raise OpError(
                f"{op}: these directions are of {self.family}, and this model is {family}. Channels of one family mean "
                "nothing in another. Measure them on this model."
            )
        if self.steps is not None and self.steps != steps:
            raise OpError(
                f"{op}: these directions are of a run of {self.steps} steps, each with its own, and this one has "
                f"{steps}. Measure them in runs of {steps}, or one for all steps: per_step=False."
            )

    def __getitem__(self, site: str) -> Tensor:
        return self.vectors[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.vectors)

    def __len__(self) -> int:
        return len(self.vectors)
