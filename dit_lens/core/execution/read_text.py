"""The text stream of a call before it runs, read off the pipeline itself: its own templates, tokenizers and slices.

What arrives at its transformer is numbers of tokens (``text_probe``); here they become words and classes again.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from dit_lens.core.execution.schedule import call_to_first_step
from dit_lens.core.execution.text_probe import FIRST, LAST, Recording, UnfollowedError
from dit_lens.core.request.text_tokens import Origin, StreamText, Text
from dit_lens.families.arguments import explain_unread, holds_text
from dit_lens.families.layout import PlanMismatchError, find_image_tokens, find_text_masks, mask_text, optional_argument

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

    from dit_lens.core.request.call import Call
    from dit_lens.families import Anatomy

SENTINEL = "\N{WHITE SQUARE}"


def read_stream_text(
    pipe: DiffusionPipeline, anatomy: Anatomy, call: Call, forwards: Sequence[Sequence[str]]
) -> StreamText:
    """The text in every row and branch of the text stream of a call.

    pipe: the pipeline.
    anatomy: of its transformer.
    call: checked.
    forwards: the branches of each forward pass of a step.
    """
    prompts = anatomy.family.prompts
    before = 0 if prompts.before is None else int(getattr(pipe.transformer, prompts.before).shape[1])
    recording, problem = Recording(), None
    try:
        recording.run(pipe, call.keywords(), len(forwards))
    except UnfollowedError as failed:
        problem = f"the pipeline's own tokenisation could not be followed ({failed})"
    except Exception as failed:  # noqa: BLE001 whatever a pipeline raises
        if len(recording.seen) < len(forwards):
            _ask_pipeline(pipe, call)
        problem = f"the pipeline's own tokenisation could not be followed ({type(failed).__name__}: {failed})"
    if len(recording.seen) < len(forwards):
        return StreamText(unknown=problem or "the pipeline made fewer forward passes than expected")
    try:
        numbers = _numbers_by_row(recording.seen, anatomy, forwards, call.rows)
    except UnfollowedError as why:
        return StreamText(unknown=str(why))
    counts = {len(tokens) for tokens in numbers.values()}
    uneven = (
        len(counts) > 1
        or prompts.mixed
        or prompts.gathered
        or anatomy.family.pipeline(type(pipe)).caches
        or _is_ragged(recording.seen, anatomy)
    )
    count = None if uneven else counts.pop() + before + prompts.after
    around = before + prompts.after
    data = _find_data(recording.seen, anatomy, forwards, {at: len(row) + around for at, row in numbers.items()})
    contradiction = _find_contradiction(recording.seen, forwards, numbers, call.rows)
    if contradiction is not None:
        data = _data_of_prompts(pipe, anatomy, call, forwards, {at: len(row) + around for at, row in numbers.items()})
    why = prompts.mixed
    if call.prompts is None:
        why = "this run has prompt_embeds, not a prompt to find words in"
    elif why is None and not any(some for tokens in numbers.values() for some in tokens):
        why = "what the pipeline's tokenizers return does not arrive in the text stream"
    if why is not None:
        return StreamText(count=count, before=before, data=data, contradiction=contradiction, unknown=why)
    try:
        spans = _prompt_spans(pipe, call, recording, len(forwards))
    except UnfollowedError as untold:
        return StreamText(count=count, before=before, data=data, contradiction=contradiction, unknown=str(untold))
    texts = [Text(whole, span) for whole, span in zip(recording.texts, spans, strict=True)]
    rows = {
        at: [[_origin(recording.tokens[number - FIRST], texts) for number in token] for token in tokens]
        for at, tokens in numbers.items()
    }
    return StreamText(rows, texts, count, before, prompts.after, data, contradiction)


def read_grid(pipe: DiffusionPipeline, anatomy: Anatomy, call: Call) -> tuple[int, ...] | None:
    """(h, w) image tokens of a call, (f, h, w) of a video, off the pipeline's own; None where it cannot be followed.

    pipe, anatomy, call: as in :func:`read_stream_text`.
    """
    recording = Recording()
    try:
        recording.run(pipe, call.keywords(), 1)
    except Exception as failed:  # noqa: BLE001 whatever a pipeline raises
        if not isinstance(failed, UnfollowedError) and not recording.seen:
            _ask_pipeline(pipe, call)
    return tuple(map(int, find_image_tokens(recording.seen[0], anatomy.grid_rule).grid)) if recording.seen else None


def _ask_pipeline(pipe: DiffusionPipeline, call: Call) -> None:
    """PromptError where the pipeline itself refuses a call, which then could not be followed either.

    A pipeline without weights, or without what reads its text, is not asked.
    """
    if pipe.device.type != "meta" and not explain_unread(pipe):
        call_to_first_step(pipe, call.keywords())


def _find_data(
    seen: Sequence[tuple[tuple, dict]],
    anatomy: Anatomy,
    forwards: Sequence[Sequence[str]],
    lengths: Mapping[tuple[str, int], int],
) -> dict[tuple[str, int], list[bool]]:
    """(branch, row) -> for each token whether it takes part in attention; empty where that cannot be told.

    seen: the arguments of each forward pass of a step.
    anatomy: of the transformer.
    forwards: the branches of each of them.
    lengths: (branch, row) -> how many tokens the text stream has.
    """
    found: dict[tuple[str, int], list[bool]] = {}
    for arguments, branches in zip(seen, forwards, strict=True):
        try:
            masks = find_text_masks(arguments, anatomy.text_rule)
        except PlanMismatchError:  # the run will say it
            return {}
        at = [(branch, row) for branch in branches for row in range(len(lengths) // sum(map(len, forwards)))]
        for number, one in enumerate(at):
            mask = mask_text(masks, range(number, number + 1), lengths[one])
            found[one] = [True] * lengths[one] if mask is None else mask[0].tolist()
    return found


def _data_of_prompts(
    pipe: DiffusionPipeline,
    anatomy: Anatomy,
    call: Call,
    forwards: Sequence[Sequence[str]],
    lengths: Mapping[tuple[str, int], int],
) -> dict[tuple[str, int], list[bool]]:
    """As :func:`_find_data`, from each prompt alone: where all of them together are masked wrongly, they run so.

    Pipelines that mask text fill it up behind, so that numbers of tokens are the same.
    """
    found: dict[tuple[str, int], list[bool]] = {}
    n = call.images_per_prompt
    for prompt in range(call.count if call.seeds is not None else 0):
        alone = read_stream_text(pipe, anatomy, call.for_prompts(range(prompt, prompt + 1)), forwards).data
        for (branch, row), data in alone.items():
            at = (branch, prompt * n + row)
            found[at] = [*data, *[False] * (lengths[at] - len(data))]
    return found if len(found) == len(lengths) else {}


def _find_contradiction(
    seen: Sequence[tuple[tuple, dict]],
    forwards: Sequence[Sequence[str]],
    numbers: Mapping[tuple[str, int], list[list[int]]],
    rows: int,
) -> str | None:
    """What is wrong where rows hold the same text under other masks; None where nothing is.

    Some pipelines repeat masks for each image of a prompt in another order than embeddings.

    seen: the arguments of each forward pass of a step.
    forwards: the branches of each of them.
    numbers: (branch, row) -> for every token the numbers in it.
    rows: images of one branch.
    """
    for (_, arguments), branches in zip(seen, forwards, strict=True):
        masks = {name: value for name, value in arguments.items() if "mask" in name and _has_rows(value, rows)}
        for (name, mask), (i, branch) in itertools.product(masks.items(), enumerate(branches)):
            first: dict[str, int] = {}
            for row in range(rows if len(mask) == rows * len(branches) else 0):
                text = numbers[branch, row]
                other = first.setdefault(repr(text), row)
                one, same = mask[i * rows + row], mask[i * rows + other]
                if any(text) and not one.equal(same):
                    return (
                        f"{name} lets {int((same != 0).sum())} tokens of image {other} take part and "
                        f"{int((one != 0).sum())} of image {row} ({branch}), whose text is the same"
                    )
    return None


def _has_rows(value: Any, rows: int) -> bool:
    return hasattr(value, "equal") and value.ndim > 1 and len(value) % rows == 0


def _is_ragged(seen: Sequence[tuple[tuple, dict]], anatomy: Anatomy) -> bool:
    """Whether blocks hold fewer text tokens than the arguments, as each row is followed by its image."""
    if all(stack.layout != "ragged" for stack in anatomy.family.stacks):
        return False
    return not all(mask.all() for arguments in seen for mask in find_text_masks(arguments, anatomy.text_rule))


def _numbers_by_row(
    seen: Sequence[tuple[tuple, dict]], anatomy: Anatomy, forwards: Sequence[Sequence[str]], rows: int
) -> dict[tuple[str, int], list[list[int]]]:
    """(branch, row) -> for every token of the text stream the numbers in it.

    seen: the arguments of each forward pass of a step.
    anatomy: of the transformer.
    forwards: the branches of each of them.
    rows: images of one branch.
    """
    prompts, found = anatomy.family.prompts, {}
    for arguments, branches in zip(seen, forwards, strict=True):
        parts = []
        for name in prompts.text:
            position = anatomy.modules.find_parameter("", name)[1]
            value = optional_argument(arguments, [name], position)
            if value is None:
                raise UnfollowedError(f"the pipeline gives its transformer no {name}")
            parts.append(_numbers_in(value, layered=_is_layered(name, prompts.layered), multiple=prompts.multiple))
        if prompts.gathered:
            masks = find_text_masks(arguments, anatomy.text_rule)
            if len(masks) != len(parts):
                raise UnfollowedError("the pipeline gives its transformer no mask of the text")
            parts = [_gather(parts, masks)]
        every = [[token for part in parts for token in part[row]] for row in range(len(parts[0]))]
        if isinstance(prompts.masked_by, int):  # the argument goes on where the image is
            (marked,) = find_text_masks(arguments, anatomy.text_rule)
            every = [row[: 1 + int(marked.any(0).nonzero().max())] for row in every]
        if len(every) != rows * len(branches):
            raise UnfollowedError(f"the text has {len(every)} rows, where {rows * len(branches)} were expected")
        for number, branch in enumerate(branches):
            found |= {(branch, row): every[number * rows + row] for row in range(rows)}
    return found


def _is_layered(name: str, layered: Sequence[str]) -> bool:
    """Whether an argument of the transformer has an axis of layers first, as that of the pipeline."""
    return any(name.rpartition("_")[2] == one.rpartition("_")[2] for one in layered)


def _numbers_in(value: Any, *, layered: bool, multiple: int) -> list[list[list[int]]]:
    """For every row and token the numbers in its channels; a list of rows is filled up as the model does it."""
    if isinstance(value, list | tuple):
        longest = max(-(-len(one) // multiple) * multiple for one in value)
        rows = [_numbers_in(one[None], layered=False, multiple=1)[0] for one in value]
        return [row + [[]] * (longest - len(row)) for row in rows]
    value = value.movedim(0, -1) if layered else value
    flat = (value.detach().flatten(2) if value.ndim > 2 else value[..., None]).cpu()  # [row, token, channel]
    ours = (flat >= FIRST) & (flat < LAST)
    highest = flat.masked_fill(~ours, 0).amax(-1).long()
    lowest = flat.masked_fill(~ours, LAST).amin(-1).long()
    several = (highest > lowest).tolist()  # two encoders side by side
    return [
        [
            sorted(set(flat[row, token][ours[row, token]].long().tolist()))
            if several[row][token]
            else [number][: number > 0]
            for token, number in enumerate(numbers)
        ]
        for row, numbers in enumerate(highest.tolist())
    ]


def _gather(parts: Sequence[list[list[list[int]]]], masks: Sequence[Tensor]) -> list[list[list[int]]]:
    """Tokens of several arguments in one order: what takes part first, the last argument's ahead."""
    found = []
    for row in range(len(parts[0])):
        pairs = [
            (bool(takes_part), token)
            for part, mask in reversed(list(zip(parts, masks, strict=True)))
            for token, takes_part in zip(part[row], mask[row].tolist(), strict=True)
        ]
        found.append([token for takes_part, token in sorted(pairs, key=lambda pair: not pair[0])])
    return found


def _prompt_spans(pipe: DiffusionPipeline, call: Call, recording: Recording, forwards: int) -> list[range]:
    """Where in each recorded text the prompt is, beside the template of the pipeline."""
    arguments = call.keywords()
    names = [name for name in arguments if holds_text(name) and arguments[name] is not None]
    given = {text for name in names for text in _listed(arguments[name])}
    if all(whole in given for whole in recording.texts):  # no template
        return [range(len(whole)) for whole in recording.texts]
    twin = Recording()
    signs = {name: [SENTINEL] * len(_listed(arguments[name])) for name in names}
    with suppress(Exception):  # what was recorded until then may be all there is
        twin.run(pipe, {**arguments, **signs}, forwards)
    if len(twin.texts) < len(recording.texts):
        raise UnfollowedError("the prompt could not be told from the template around it")
    return [_find_prompt(whole, set(twin.texts)) for whole in recording.texts]


def _listed(texts: str | Sequence[str]) -> Sequence[str]:
    return [texts] if isinstance(texts, str) else texts


def _find_prompt(whole: str, templates: set[str]) -> range:
    """Where a text is not its template, in which a sign stands for the prompt; all of it where it has no template."""
    if whole in templates:
        return range(0)  # the same whatever the prompt is
    found = range(len(whole))
    for template in templates:
        before, sign, after = template.partition(SENTINEL)
        fits = whole.startswith(before) and whole.endswith(after) and len(whole) >= len(before) + len(after)
        if sign and fits and len(whole) - len(before) - len(after) < len(found):
            found = range(len(before), len(whole) - len(after))
    return found


def _origin(token: tuple[int, int, int, str, bool, bool], texts: Sequence[Text]) -> Origin:
    number, start, stop, piece, padding, ends = token
    prompt = texts[number].prompt
    inside = start < stop and start < prompt.stop and prompt.start < stop
    kind = "pad" if padding else "prompt" if inside else "eos" if ends else "template"
    return Origin(piece, kind, number, 0 if padding else start, 0 if padding else stop)
