"""The call that made a figure, kept in the figure."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec

from dit_lens.arguments.checks import bind

if TYPE_CHECKING:
    import plotly.graph_objects as go


P = ParamSpec("P")

# Longer arguments of a plot are given by name only.
LONGEST = 200


def carries_code(plot: Callable[P, go.Figure]) -> Callable[P, go.Figure]:
    """Makes a plot's figures carry the call that made them, in ``layout.meta``.

    >>> from dit_lens.plots import channel_spectrum
    >>> figure = channel_spectrum([0.1, 9.0, 0.2], massive=[1], site="blocks.3.img")
    >>> print(figure.layout.meta["code"])
    import dit_lens as dl
    <BLANKLINE>
    dl.plots.channel_spectrum(
        [0.1, 9.0, 0.2],
        [1],
        site='blocks.3.img',
    )

    An argument that has no literal, such as a tensor, is given by its name.
    """
    signature = inspect.signature(plot)

    @functools.wraps(plot)
    def made(*args: P.args, **kwargs: P.kwargs) -> go.Figure:
        bound = bind(plot, signature, args, kwargs)
        by_name = {name for name, one in signature.parameters.items() if one.kind is one.KEYWORD_ONLY}
        lines = "".join(
            f"    {_write_argument(name, value, named=name in by_name)}\n" for name, value in bound.arguments.items()
        )
        code = f"import dit_lens as dl\n\ndl.plots.{made.__name__}(\n{lines})"
        return plot(*bound.args, **bound.kwargs).update_layout(meta={"code": code})

    return made


def _write_argument(name: str, value: Any, *, named: bool) -> str:
    """An argument in code: as a literal, or as its name with a comment that says what it is."""
    before = f"{name}=" if named else ""
    if _has_literal(value) and len(repr(value)) <= LONGEST:
        return f"{before}{value!r},"
    shape = getattr(value, "shape", None)
    size = list(shape) if shape is not None else len(value) if hasattr(value, "__len__") else ""
    return f"{before}{name},  # {type(value).__name__} {size}".rstrip()


def _has_literal(value: Any) -> bool:
    """Whether a value's repr is code for it."""
    if isinstance(value, list | tuple):
        return all(map(_has_literal, value))
    return value is None or isinstance(value, str | bool | int | float)
