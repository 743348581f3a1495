"""The code that made a view, a result or a figure: what a reader copies to make it again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_lens.core.runs.provenance import unsaved

if TYPE_CHECKING:
    from dit_lens.core.runs.run import Run

# Where the state of a view goes, as further arguments.
STATE = "{state}"


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
