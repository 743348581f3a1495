"""The Python code that draws an image of the steering panel again, for users to copy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dit_lens.explorer.code import code_of_lens

if TYPE_CHECKING:
    from dit_lens.core.runs.run import Run
    from dit_lens.explorer.setting import Setting

_CONTROLS = {"bottom": ".bottom()", "random": ".random(seed=0)", "energy-matched": ".energy_matched(seed=0)"}


def code_of_steering(base: Run, setting: Setting, score: str, call: dict[str, Any], source_call: dict[str, Any]) -> str:
    """Returns the code that draws the image of a setting.

    base: the run of source and target without an edit.
    setting: the setting.
    score: score of the massive channels.
    call: arguments of the run.
    source_call: those of a run of the source alone.
    """
    together, alone = (", ".join(f"{name}={value!r}" for name, value in one.items()) for one in (call, source_call))
    masks = {"subject": "mask=subject", "brush": "mask=mask"}
    arguments = [
        f'"blocks[{setting.blocks[0]}:{setting.blocks[1]}].img"',
        'source="row:0"',
        "rows=1",
        "channels=None" if setting.arm == "all" else "channels=massive" + _CONTROLS.get(setting.arm, ""),
        f"strength={setting.strength:g}",
        f"steps=slice{setting.steps}",
        *([masks[setting.where]] if setting.where in masks else []),
        'branch="cond"',
    ]
    lines = "".join(f"    {argument},\n" for argument in arguments)
    mask = {
        "subject": f"subject = lens.subject_mask(source, massive, {alone})\n",
        "brush": f"mask = np.zeros({tuple(base.grid)}, bool)\nmask.flat[{list(setting.mask)}] = True\n",
    }.get(setting.where, "")
    numpy = "import numpy as np\n\n" if setting.where == "brush" else ""
    source, target = base.spec["prompt"]
    return (
        f"{numpy}import dit_lens as dl\n\n{code_of_lens(base)}\nsource = {source!r}\ntarget = {target!r}\n"
        f"massive = lens.massive_channels(source, {setting.k}, score={score!r}, {alone})\n{mask}"
        f"swap = dl.Swap(\n{lines})\nrun = lens.run([source, target], [swap], {together})\nrun.images[1]"
    )
