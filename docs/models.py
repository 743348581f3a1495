"""Writes docs/models.md from the table of families: ``python docs/models.py``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import diffusers

from dit_lens.families import Anatomy, Family, Stack
from dit_lens.families.checks import check
from dit_lens.families.table import TABLE
from dit_lens.instruments.summary import describe_guidance

PAGE = Path(__file__).with_name("models.md")

HEAD = """# Models

Written from the table of families by `python docs/models.py`. {count} transformer classes of diffusers are described by
a row each. `lens.sites("blocks.3.img.*")` lists what one block of your model has; a point that is missing answers with
the reason.

When a pipeline is wrapped, its row is tried on a tiny random transformer of the same class, which costs a fraction of a
second and touches none of the model's own weights. The checks:

| check | says |
| --- | --- |
| structure | every module and argument that the row names exists in the live model |
| sizes | every site has as many channels as its module says |
| chain | what leaves a block enters the next one |
| residual | a block adds `attn_out`, `mlp_out` (and `attn2_out`, `cross_out`, `ip_out`) to its input and nothing else |
| inputs | `attn.in` and `mlp.in` are what the projections of attention and MLP read |
| final | the last block's image tokens enter the final norm |
| modulation | a prediction is made of what enters the final norm and `final.img.mod`, and of nothing else |
| grid | image tokens lie row by row |
| write | a write to a block's image tokens reaches the prediction |
| readout | final norm and projection of the last block's tokens are the model's prediction |

During every run the rows, tokens and channels of every site that is read or edited, the grid, and the number and times
of the forward passes are compared with the plan, and a run that differs fails. Which rows or calls are conditional is
data of the row; the tests prove it for every family by changing the prompt. What the blocks of the live model run is
compared with what ran in the tiny one: a replaced `forward`, exchanged blocks or processors of attention are tried as
well where a tiny model can have them, and refused by name elsewhere.

| model | blocks | streams | x0 of a block | guidance |
| --- | --- | --- | --- | --- |
"""


def page() -> str:
    """The whole page."""
    lines = [HEAD.format(count=len(TABLE)).rstrip("\n")]
    lines += [_line(family) for family in TABLE]
    lines += [_section(family) for family in TABLE]
    lines.append(OTHERS)
    return "\n".join(lines)


def _line(family: Family) -> str:
    stacks = ", ".join(stack.name for stack in family.stacks)
    streams = ", ".join(dict.fromkeys(stream for stack in family.stacks for stream in sorted(stack.outputs)))
    link = family.name.lower().replace(" ", "-").replace(".", "")
    return (
        f"| [{family.name}](#{link}) | {stacks} | {streams} | {'yes' if family.readout else 'no'} | "
        f"{describe_guidance(family.pipelines[0].guidance)} |"
    )


def _section(family: Family) -> str:
    anatomy = Anatomy(family, getattr(diffusers, family.transformer)(**family.example.config))
    checks = check(anatomy)
    usual, *others = family.pipelines
    tested = [pipeline.name for pipeline in family.pipelines if pipeline.tested]
    lines = [
        f"\n## {family.name}\n",
        f"`{family.transformer}`; tested with {_list(tested)}.",
        f"Checked at load: {', '.join(one.name for one in checks)}.\n",
    ]
    lines += [line for stack in family.stacks for line in _points(anatomy, stack)]
    if isinstance(family.final.mod, str):
        lines.append(f"- no `final.img.mod`: {family.final.mod}")
    lines += [
        f"- `{pipeline.name}`: {describe_guidance(pipeline.guidance)}."
        for pipeline in others
        if pipeline.guidance != usual.guidance
    ]
    if family.note:
        lines.append(f"- {family.note}")
    for what, chosen in (
        ("choose the size themselves", [one.name for one in family.pipelines if one.chooses_size]),
        (
            "take the size of an image they are given, unless told another",
            [one.name for one in family.pipelines if one.size_from_image],
        ),
    ):
        if chosen:
            lines.append(f"- Pipelines that {what}: {_list(chosen)}.")
    if family.prediction.sign < 0:
        lines.append("- The pipeline negates the prediction: `x0` allows for that, `velocity` is the model's own.")
    if isinstance(usual.encodes, str):
        lines.append(f"- Prompts cannot be encoded before a run: {usual.encodes}.")
    if family.without_gradient:
        lines.append(f"- No gradients: {_list(family.without_gradient)} runs under `torch.no_grad`.")
    refused = {}
    for one in dict.fromkeys(one for pipeline in family.pipelines for one in pipeline.refuses):
        where = [pipeline.name for pipeline in family.pipelines if one in pipeline.refuses]
        of = "" if len(where) == len(family.pipelines) else f", with {_list(where)}"
        refused[f"`{one.argument}=`{'' if one.off is None else f' other than {one.off}'}{of}"] = one.reason
    if usual.guidance is not None and usual.guidance.cut is not None:
        why = "below 1 it ends guidance inside the run, so that the number of branches changes"
        refused[f"`{usual.guidance.cut}=`"] = why
    lines += [f"- Refused: {argument}: {reason}." for argument, reason in refused.items()]
    return "\n".join(lines)


def _list(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _points(anatomy: Anatomy, stack: Stack) -> list[str]:
    first = anatomy.stacks[stack.name][0]
    lines = []
    for stream in sorted({*stack.outputs, *stack.points}):
        have = [site.point for site in anatomy.sites if site.block == first and site.stream == stream]
        lines.append(f"- `{stack.name}.*.{stream}`: {_group_points(have)}")
        reasons: dict[str, list[str]] = {}
        for point, reason in stack.points.get(stream, {}).items():
            if isinstance(reason, str):
                reasons.setdefault(reason, []).append(point)
        lines += [f"  - no {_group_points(points)}: {reason}" for reason, points in reasons.items()]
    return lines


def _group_points(points: list[str]) -> str:
    """mod.attn.shift, mod.attn.scale -> `mod.attn.shift|scale`."""
    groups: dict[str, list[str]] = {}
    for point in points:
        head, _, last = point.rpartition(".")
        groups.setdefault(head or point, []).append(last)
    names = [f"{head}.{'|'.join(ends)}" if ends != [head] else head for head, ends in groups.items()]
    return ", ".join(f"`{name}`" for name in names)


OTHERS = """
## Not described

- FLUX.3 exists as a modular pipeline only, which has no fixed call that could be planned; it is refused by name.
- Another transformer is refused with its nearest relative in this table. Describe it with
  `dit_lens.register_family(dit_lens.families.Family(...))`: the row is checked as these are.
- Pipelines with perturbed attention (PAG) run with `pag_scale=0` only.
- Under quantisation the ranks of channels may shift. Compare before you carry channels over:
  `massive_of_one.jaccard(massive_of_the_other)`.
"""

if __name__ == "__main__":
    PAGE.write_text(page())
