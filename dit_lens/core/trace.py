"""The ``with`` form: a block that collects ops and runs them when it ends."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from dit_lens.arguments.mappings import NamedMapping
from dit_lens.arguments.saving import saved_by
from dit_lens.core.request.ops import OPS, Op, Read
from dit_lens.errors import CallError, NotYetError, OpError, nearest

if TYPE_CHECKING:
    from PIL.Image import Image

    from dit_lens.core.runs.reading import Reading, SiteTensor
    from dit_lens.core.runs.receipt import Receipt
    from dit_lens.core.runs.run import Run


class Handle(NamedMapping[Tensor]):
    """What ``t.read`` returns: a mapping site -> tensor once the run is done."""

    save = saved_by("A read is kept without it: leave .save() out. Afterwards, t.run.save(folder) writes the run.")

    def __init__(self, trace: Trace, number: int):
        self._trace, self._number = trace, number

    @property
    def reading(self) -> Reading:
        """The read itself, with its steps, rows and channels."""
        if self._trace.finished is None:
            raise self._trace.tell_missing(
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

    Every op is a method, and takes the op's own arguments: ``t.zero("blocks.3.img", channels=[5])`` adds
    ``Zero("blocks.3.img", channels=[5])``, ``t.mean_ablate(...)`` a ``MeanAblate``. ``t.read`` returns a
    :class:`Handle`, the others nothing. ``run``, ``images`` and ``receipt`` exist afterwards. From the end of the block
    on nothing can be added: it would not be carried out.

    run_ops: what carries out the ops.
    """

    def __init__(self, run_ops: Callable[[Sequence[Op]], Run]):
        self._run_ops = run_ops
        self.ops: list[Op] = []
        self.ended = False
        self.finished: Run | None = None

    def __enter__(self) -> Self:
        if self.ended:
            raise OpError("the block of this trace is over. Begin another one: with lens.trace(...) as t.")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.ended = True  # before the run: an op that is added during it would not be carried out either
        if kind is None:
            self.finished = self._run_ops(self.ops)

    @property
    def run(self) -> Run:
        """The finished run."""
        if self.finished is None:
            raise self.tell_missing("there is no run yet: it starts when the with block ends.")
        return self.finished

    def tell_missing(self, before: str) -> NotYetError:
        """The error for what only a finished run has. before: the message while the run is still to come."""
        if not self.ended:
            return NotYetError(before)
        return NotYetError(
            "there is no run: the with block, or the run at its end, stopped with an error, or still runs."
        )

    def collect(self, op: Op) -> Handle | None:
        """Adds an op, and returns the handle of a read; OpError once the block has ended."""
        if self.ended:
            raise OpError(
                f"{op!r} comes too late: the run of this trace started when its with block ended, and would not carry "
                "it out. Put it inside the block, or begin another one: with lens.trace(...) as t."
            )
        self.ops.append(op)
        return Handle(self, len(self.ops) - 1) if isinstance(op, Read) else None

    @property
    def images(self) -> list[Image]:
        return self.run.images

    @property
    def receipt(self) -> Receipt:
        return self.run.receipt

    if TYPE_CHECKING:  # the methods are made below, one for each op

        def read(self, *args: Any, **options: Any) -> Handle: ...

    def __getattr__(self, name: str) -> Callable[..., None]:
        """The method of an op that was declared after this module was read, such as one of a notebook."""
        found = {_method_name(op): op for op in OPS}.get(name)
        if found is None:
            raise AttributeError(f"Trace has no method {name!r}.{nearest(name, map(_method_name, OPS))}")
        return partial(_method(name, OPS[found]), self)


def _method(name: str, op: type[Op]) -> Callable[..., Any]:
    """A method that adds an op, with the op's signature. What the op cannot do without may be given by position."""
    signature = inspect.signature(op)
    own = ["site", *(name for name in vars(op).get("__annotations__", {}) if name in signature.parameters)]

    def add(self: Trace, *args: Any, **options: Any) -> Handle | None:
        named = dict(zip(own, args, strict=False))
        if len(args) > len(own) or named.keys() & options.keys():
            raise CallError(f"{name}() takes {', '.join(own)} once each, and keywords of {op.__name__}.")
        return self.collect(op(**named, **options))

    add.__name__, add.__qualname__ = name, f"Trace.{name}"
    add.__doc__ = f"{(inspect.getdoc(op) or '').splitlines()[0]} See :class:`~dit_lens.{op.__name__}`."
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    vars(add)["__signature__"] = signature.replace(parameters=[first, *signature.parameters.values()])
    return add


def _method_name(op: str) -> str:
    """MeanAblate -> mean_ablate."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", op).lower()


for _op in OPS.values():
    setattr(Trace, _method_name(_op.__name__), _method(_method_name(_op.__name__), _op))
