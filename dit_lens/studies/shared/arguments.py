"""Arguments that studies share: checked before anything runs, and in one form afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dit_lens.arguments.lists import as_tuple, check_once
from dit_lens.arguments.numbers import check_number, list_entries, to_int, to_number
from dit_lens.errors import OpError, PromptError, show
from dit_lens.families.sites import match
from dit_lens.studies.shared.fingerprints import fingerprint_values

if TYPE_CHECKING:
    from dit_lens.core.request.ops import Pattern, Steps
    from dit_lens.lens import DiTLens


MOST_DRAWS = 10_000  # of a random control; each draws an image or more


def check_k(lens: DiTLens, site: Pattern, ks: Sequence[int]) -> None:
    """Raises OpError if a k does not fit a site, with room for a control of the same size.

    lens: the lens whose sites are meant.
    site: sites of the study.
    ks: numbers of channels.
    """
    if not ks:
        raise OpError("k=[] asks for no set of channels. Give at least one k.")
    for found in match(site, lens.anatomy.sites, lens.anatomy.stacks):
        width = lens.anatomy.channels(found)
        for given in ks:
            k = to_int(given)
            if k is None:
                raise OpError(
                    f"k={show(given)} is not a valid number of channels. Give a whole number from 1 to {width // 2}."
                )
            if not 1 <= k <= width // 2:
                raise OpError(
                    f"k={k} leaves no control of equal size: {found} has {width} channels. "
                    f"Choose k from 1 to {width // 2}."
                )


def check_draws(draws: int) -> None:
    """Raises OpError for a number of random controls that no study has."""
    check_number("draws", draws, 0, MOST_DRAWS)


def as_ks(k: int | Sequence[int]) -> list[int]:
    """One or several numbers of channels as a list, ascending; OpError if one is not a whole number."""
    found = as_tuple(k)
    whole = [to_int(one) for one in found]
    for one, number in zip(found, whole, strict=True):
        if number is None:
            raise OpError(f"k={show(one)} is not a valid number of channels. Give a whole number, or a list of them.")
    ks = [number for number in whole if number is not None]
    check_once("k", ks, "a number of channels")
    return sorted(ks)


def as_strengths(strengths: float | Sequence[float]) -> tuple[float, ...]:
    """One or several strengths as a tuple; OpError if one is given twice, to the digits by which images are named."""
    found = as_tuple(strengths)
    check_once("strengths", found, "a strength", by=lambda one: one if to_number(one) is None else f"{one:g}")
    return found


def as_pairs(pairs: Sequence[tuple[Any, str]], source: str = "source prompt") -> list[tuple[Any, str]]:
    """Pairs of a source and a target prompt as a list; OpError if one is not a pair, PromptError if it is one prompt.

    pairs: what the user gave.
    source: what the first of a pair is, for the message.
    """
    given = list_entries(pairs)
    if given is None:
        raise OpError(f"pairs={show(pairs)} is not a list. Give a list of ({source}, target prompt).")
    if not given:
        raise OpError(f"there are no pairs. Give at least one ({source}, target prompt).")
    for i, pair in enumerate(given):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[1], str):
            raise OpError(
                f"pairs[{i}] is {show(pair)}, which is not a valid pair. Give a list of ({source}, target prompt)."
            )
    if same := [source for source, target in given if isinstance(source, str) and source == target]:
        raise PromptError(
            f"source and target are both {same[0]!r}: under one noise they are one image, so there is nothing to move. "
            "Pair it with another prompt; what moving everything does is measured beside every pair (the ceiling)."
        )
    check_once("pairs", given, "a pair", by=lambda pair: (_identify(pair[0]), pair[1]))
    return [(pair[0], pair[1]) for pair in given]


def _identify(source: Any) -> str:
    """What is equal for two sources of a pair that are the same: a prompt itself, of an image its pixels."""
    return source if isinstance(source, str) else str(fingerprint_values({"source": source})[0])


def find_meant(
    lens: DiTLens, prompts: Sequence[str], call: Mapping[str, Any], site: Pattern, steps: Steps = None
) -> dict[str, Any]:
    """What a study's sites and steps mean, however they were written; OpError or SiteError if they mean none.

    lens: the lens whose sites are meant.
    prompts: those of the study's first batch.
    call: other arguments of the pipeline.
    site, steps: as they were given.
    """
    return {"site": lens.sites(site), "steps": lens.outline(prompts, **{"seed": 0, **call}).select(steps)}


def describe_k(k: int, width: int) -> str:
    """The note that belongs beside every k: 12 of 3,072 and 12 of 128 are different things."""
    return f"k={k} is {k / width:.1%} of {width} channels"
