"""The code that made a view, a result or a figure: what a reader copies to make it again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

from dit_lens.provenance import unsaved

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from dit_lens.run import Run
    from dit_lens.studies import Result

P = ParamSpec("P")

# Where the state of a view goes, as further arguments.
STATE = "{state}"

# How a study names the judge it takes where none is given.
STOCK_JUDGE = "scene_judge"

# Arguments of a study that are no choices of what it finds, or that its prompts and judge decide.
LEFT_OUT = ("call", "batch_size", "judge", "attributes")


# Longer arguments of a plot stand as names.
LONGEST = 200


def code_of_runs(runs: tuple[Run, ...], **options: Any) -> str:
    """What draws some runs again and explores them.

    >>> import dit_lens as dl
    >>> run = dl.DiTLens.toy().run("a big red circle left on a plain blue background", seed=0, num_inference_steps=2)
    >>> print(code_of_runs((run,)))  # doctest: +NORMALIZE_WHITESPACE
    import dit_lens as dl
    <BLANKLINE>
    lens = dl.DiTLens.toy('flux')
    run = lens.run(
        ['a big red circle left on a plain blue background'],
        [],
        seed=[0],
        height=64,
        ...
    )
    dl.explore(run{state})

    options: further arguments of ``explore``.
    """
    names = ["run", "beside"][: len(runs)]
    made = "\n".join(_run(run, name) for run, name in zip(runs, names, strict=True))
    options = {name: name for name in names[1:]} | {name: repr(value) for name, value in options.items()}
    shown = ", ".join(["run", *(f"{name}={value}" for name, value in options.items())])
    return f"import dit_lens as dl\n\n{lens_code(runs[0])}\n{made}\ndl.explore({shown}{STATE})"


def code_of_result(result: Result) -> str:
    """The call of a study, with every choice that differs from its defaults.

    >>> from dit_lens.studies import Result
    >>> settings = {"prompts": ["a red circle"], "k": [8], "seeds": [0, 1], "draws": 3, "steps": "None", "call": {}}
    >>> print(code_of_result(Result("disruption", None, None, settings)))
    import dit_lens as dl
    <BLANKLINE>
    result = dl.studies.disruption(
        lens,
        ['a red circle'],
        k=[8],
        seeds=[0, 1],
        draws=3,
    )
    result.figure()

    What JSON cannot hold, such as a judge of your own, stands as a comment.
    """
    from dit_lens import studies

    lines = []
    for name, parameter in inspect.signature(getattr(studies, result.study)).parameters.items():
        if name in result.settings and name not in LEFT_OUT:
            value = _argument(name, result.settings[name], parameter.default)
            lines += [] if value is None else [value if parameter.default is parameter.empty else f"{name}={value}"]
    if (judge := result.settings.get("judge", STOCK_JUDGE)) != STOCK_JUDGE:
        lines.append(f"judge=...,  # {judge}")
    lines += [f"{name}={value!r}" for name, value in result.settings.get("call", {}).items()]
    arguments = "".join(f"    {line},\n" for line in lines)
    return f"import dit_lens as dl\n\nresult = dl.studies.{result.study}(\n    lens,\n{arguments})\nresult.figure()"


def _argument(name: str, value: Any, default: Any) -> str | None:
    """A setting, as JSON keeps it, in code; None where it is the argument's default."""
    if default is inspect.Parameter.empty:
        return repr(value)
    if is_dataclass(default) and not isinstance(default, type):
        words = ", ".join(f"{name}={number!r}" for name, number in value.items())
        return None if value == asdict(default) else f"dl.studies.{type(default).__name__}({words})"
    if callable(default):
        return None if value == default.__name__ else f"...  # {value}"
    if str(value) == str(default) or (isinstance(default, tuple) and value == list(default)):
        return None
    return value if name == "steps" and isinstance(value, str) else repr(value)  # a slice or an interval, as text


def carries_code(plot: Callable[P, go.Figure]) -> Callable[P, go.Figure]:
    """Makes a plot's figures carry the call that made them in ``layout.meta``.

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

    What code cannot spell, such as a tensor, stands as the argument's name.
    """
    signature = inspect.signature(plot)

    @functools.wraps(plot)
    def made(*args: P.args, **kwargs: P.kwargs) -> go.Figure:
        given = signature.bind(*args, **kwargs).arguments
        by_name = {name for name, one in signature.parameters.items() if one.kind is one.KEYWORD_ONLY}
        lines = "".join(f"    {_spelt(name, value, named=name in by_name)}\n" for name, value in given.items())
        code = f"import dit_lens as dl\n\ndl.plots.{made.__name__}(\n{lines})"
        return plot(*args, **kwargs).update_layout(meta={"code": code})

    return made


def _spelt(name: str, value: Any, *, named: bool) -> str:
    """An argument in code: as a literal, or as its name with a word of what it is."""
    before = f"{name}=" if named else ""
    if _literate(value) and len(repr(value)) <= LONGEST:
        return f"{before}{value!r},"
    shape = getattr(value, "shape", None)
    size = list(shape) if shape is not None else len(value) if hasattr(value, "__len__") else ""
    return f"{before}{name},  # {type(value).__name__} {size}".rstrip()


def _literate(value: Any) -> bool:
    """Whether a value's repr is code for it."""
    if isinstance(value, list | tuple):
        return all(map(_literate, value))
    return value is None or isinstance(value, str | bool | int | float)


def lens_code(run: Run) -> str:
    """What loads the lens that drew a run."""
    from dit_lens.toys import WEIGHTS

    model = run.provenance.get("model")
    if model is None:
        return f"lens = dl.DiTLens(pipe)  # a {run.provenance.get('pipeline', 'pipeline')}"
    if Path(model).parent == WEIGHTS:
        return f"lens = dl.DiTLens.toy({Path(model).name!r})"
    return f"lens = dl.DiTLens.from_pretrained({str(model)!r})"


def _run(run: Run, name: str) -> str:
    if run.folder is not None:
        return f"{name} = dl.Run.load({str(run.folder)!r})"
    if unsaved(run.spec):
        return f"# {name}: made with values that code cannot spell; run.save(folder) keeps it"
    spec = run.spec
    call = {"seed": spec["seed"], **spec["call"]}
    lines = [repr(spec["prompt"]), f"[{', '.join(map(_op, spec['ops']))}]", *(f"{k}={v!r}" for k, v in call.items())]
    return f"{name} = lens.run(\n" + "".join(f"    {line},\n" for line in lines) + ")"


def _op(spec: Mapping[str, Any]) -> str:
    """An op as it is written in code, from its JSON; one that holds tensors, as JSON."""
    if any(isinstance(value, dict) and "tensor" in str(value) for value in spec.values()):
        return f"dl.ops.from_json({dict(spec)!r})"
    arguments = {name: value for name, value in spec.items() if name not in ("op", "site")}
    words = [repr(spec["site"]), *(f"{name}={_literal(value)}" for name, value in arguments.items())]
    return f"dl.{spec['op']}({', '.join(words)})"


def _literal(value: Any) -> str:
    if not isinstance(value, dict):
        return repr(value)
    if "sigma" in value:
        return f"dl.sigma({value['sigma'][0]}, {value['sigma'][1]})"
    if "slice" in value:
        return repr(slice(*value["slice"]))
    if "fraction" in value:
        return repr(tuple(value["fraction"]))
    if "run" in value:
        return f"dl.Run.load({value['run']!r})"
    return repr(value.get("mapping", value.get("array")))
