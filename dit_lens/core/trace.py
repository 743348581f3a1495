"""The ``with`` form: a block that collects ops and runs them when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

from dit_lens.core.request.ops import Add, Apply, MeanAblate, Op, Read, Resample, Scale, Swap, TokenMean, Zero
from dit_lens.errors import NotYetError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from dit_lens.core.request.ops import Pattern, Source
    from dit_lens.core.runs.receipt import Receipt
    from dit_lens.core.runs.run import Reading, Run, SiteTensor
    from dit_lens.lens import DiTLens


class Handle(Mapping[str, "Tensor"]):
    """What ``t.read`` returns: a mapping site -> tensor once the run is done."""

    def __init__(self, trace: Trace, number: int):
        self._trace, self._number = trace, number

    @property
    def reading(self) -> Reading:
        """The read itself, with its steps, rows and channels."""
        if self._trace.finished is None:
            raise NotYetError(
                "this value does not exist yet: the run starts when the with block ends. "
                "To compute with it during the run, use t.apply(site, fn)."
            )
        reads = [i for i, op in enumerate(self._trace.ops) if isinstance(op, Read)]
        return self._trace.finished.readings[reads.index(self._number)]

    @property
    def tensor(self) -> SiteTensor:
        """The only tensor of a read of one site."""
        return self.reading.tensor

    def __getitem__(self, site: str) -> SiteTensor:
        return self.reading[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.reading)

    def __len__(self) -> int:
        return len(self.reading)

    def __repr__(self) -> str:
        waiting = self._trace.finished is None
        return f"Handle({self._trace.ops[self._number]!r}, {'before the run' if waiting else f'{len(self)} sites'})"


class Trace:
    """Collects ops inside a ``with`` block and runs them at its end; nothing runs when the block raises.

    Every method takes the arguments of the op it is named after. ``run``, ``images`` and ``receipt`` exist afterwards.
    """

    def __init__(self, lens: DiTLens, prompt: Any, call: dict[str, Any]):
        self._lens, self._prompt, self._call = lens, prompt, call
        self.ops: list[Op] = []
        self.finished: Run | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finished = self._lens.run(self._prompt, self.ops, **self._call)

    def read(self, site: Pattern, **options: Any) -> Handle:
        """Keeps the values at a site; see :class:`~dit_lens.ops.Read`."""
        self.ops.append(Read(site, **options))
        return Handle(self, len(self.ops) - 1)

    def zero(self, site: Pattern, **options: Any) -> None:
        """Sets elements to zero; see :class:`~dit_lens.ops.Zero`."""
        self.ops.append(Zero(site, **options))

    def scale(self, site: Pattern, factor: float, **options: Any) -> None:
        """Multiplies elements; see :class:`~dit_lens.ops.Scale`."""
        self.ops.append(Scale(site, factor=factor, **options))

    def add(self, site: Pattern, value: float | Tensor, **options: Any) -> None:
        """Adds a number or a vector over channels; see :class:`~dit_lens.ops.Add`."""
        self.ops.append(Add(site, value=value, **options))

    def swap(self, site: Pattern, source: Source, **options: Any) -> None:
        """Replaces elements by those of another row, a Run or a tensor; see :class:`~dit_lens.ops.Swap`."""
        self.ops.append(Swap(site, source=source, **options))

    def resample(self, site: Pattern, source: Run | Mapping[str, Tensor], **options: Any) -> None:
        """Replaces elements by those of a random row of another run; see :class:`~dit_lens.ops.Resample`."""
        self.ops.append(Resample(site, source=source, **options))

    def token_mean(self, site: Pattern, **options: Any) -> None:
        """Keeps each channel's mean over tokens, or the residual; see :class:`~dit_lens.ops.TokenMean`."""
        self.ops.append(TokenMean(site, **options))

    def mean_ablate(self, site: Pattern, mean: Run | Mapping[str, Tensor], **options: Any) -> None:
        """Replaces elements by a data set's mean; see :class:`~dit_lens.ops.MeanAblate`."""
        self.ops.append(MeanAblate(site, mean=mean, **options))

    def apply(self, site: Pattern, fn: Callable[[Tensor, Any], Tensor | None], **options: Any) -> None:
        """Calls ``fn(tensor, hook)`` during the run; see :class:`~dit_lens.ops.Apply`."""
        self.ops.append(Apply(site, fn=fn, **options))

    @property
    def run(self) -> Run:
        """The finished run."""
        if self.finished is None:
            raise NotYetError("there is no run yet: it starts when the with block ends.")
        return self.finished

    @property
    def images(self) -> list[Image]:
        return self.run.images

    @property
    def receipt(self) -> Receipt:
        return self.run.receipt
