"""The Python code that makes a view of runs again, for users to copy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_lens.core.runs.provenance import holds_unsaved

if TYPE_CHECKING:
    from dit_lens.core.runs.run import Run

# Placeholder for the state of a view (further arguments), which the browser fills in.
STATE = "{state}"


def code_of_runs(runs: tuple[Run, ...], **options: Any) -> str:
    """Returns the code that repeats one or two runs and explores them.

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
    lines = "\n".join(_code_of_run(run, name) for run, name in zip(runs, names, strict=True))
    options = {name: name for name in names[1:]} | {name: repr(value) for name, value in options.items()}
    arguments = ", ".join(["run", *(f"{name}={value}" for name, value in options.items())])
    return f"import dit_lens as dl\n\n{code_of_lens(runs[0])}\n{lines}\ndl.explore({arguments}{STATE})"


def code_of_lens(run: Run) -> str:
    """Returns the code that loads the lens of a run."""
    from dit_lens.toys import WEIGHTS

    model = run.provenance.get("model")
    if model is None:
        return f"lens = dl.DiTLens(pipe)  # a {run.provenance.get('pipeline', 'pipeline')}"
    if Path(model).parent == WEIGHTS:
        return f"lens = dl.DiTLens.toy({Path(model).name!r})"
    return f"lens = dl.DiTLens.from_pretrained({str(model)!r})"


def _code_of_run(run: Run, name: str) -> str:
    if run.folder is not None:
        return f"{name} = dl.Run.load({str(run.folder)!r})"
    if holds_unsaved(run.spec):
        return f"# {name}: made with values that cannot be written as code; run.save(folder) keeps it"
    spec = run.spec
    call = {"seed": spec["seed"], **spec["call"]}
    ops = ", ".join(map(_code_of_op, spec["ops"]))
    lines = [repr(spec["prompt"]), f"[{ops}]", *(f"{k}={v!r}" for k, v in call.items())]
    return f"{name} = lens.run(\n" + "".join(f"    {line},\n" for line in lines) + ")"


def _code_of_op(spec: Mapping[str, Any]) -> str:
    """Returns the code of an op from its JSON form; an op that holds tensors stays JSON."""
    if any(isinstance(value, dict) and "tensor" in str(value) for value in spec.values()):
        return f"dl.ops.from_json({dict(spec)!r})"
    arguments = {name: value for name, value in spec.items() if name not in ("op", "site")}
    words = [repr(spec["site"]), *(f"{name}={_code_of_value(value)}" for name, value in arguments.items())]
    return f"dl.{spec['op']}({', '.join(words)})"


def _code_of_value(value: Any) -> str:
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
