"""Names of tensors, the same for every DiT: ``blocks.{i}.{stream}.{point}``, and the patterns that select them.

>>> sites = [
...     Site(i, stream, point) for i in range(4) for stream in ("img", "txt") for point in ("resid_pre", "resid_post")
... ]
>>> [site.name for site in match("blocks[1:3].img", sites)]
['blocks.1.img', 'blocks.2.img']
>>> [site.name for site in match("blocks.-1.{img,txt}.resid_pre", sites)]
['blocks.3.txt.resid_pre', 'blocks.3.img.resid_pre']
"""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from dit_lens.arguments.functions import name_of, takes
from dit_lens.arguments.numbers import MOST
from dit_lens.errors import SiteError, nearest

Pattern: TypeAlias = "str | Callable[[str], bool] | Iterable[str | Callable[[str], bool]]"

DEFAULT_POINT = "resid_post"
# Roughly the order in which a block computes them; the text stream comes first because most blocks' outputs list it so.
POINTS = (
    "resid_pre",
    *(f"mod.{part}" for part in ("shift", "scale", "gate")),
    *(f"mod.attn.{part}" for part in ("shift", "scale", "gate")),
    *(f"mod.mlp.{part}" for part in ("shift", "scale", "gate")),
    "attn.in",
    *(f"attn.{part}" for part in ("q", "k", "v", "q_rot", "k_rot", "pattern", "z", "o")),
    "attn_out",
    "attn2_out",
    *(f"cross.{part}" for part in ("q", "k", "v", "pattern", "z", "o")),
    "cross_out",
    "resid_mid",
    "mlp.in",
    "mlp.pre",
    "mlp.post",
    "mlp.o",
    "mlp_out",
    "ip_out",
    "resid_post",
    "control_out",
    "x0",
)
PATTERNS = ("attn.pattern", "cross.pattern")  # no tensors: ops on patterns act there
MODEL_POINTS = ("mod.final", "final", "velocity", "x0")
_MODEL_NAMES = {"mod.final": "final.img.mod", "final": "final.img"}
STREAMS = ("txt", "img")


@dataclass(frozen=True)
class Site:
    """One named tensor of one block, or of the whole model (``block`` is None).

    >>> Site(3, "img").name, Site(3, "txt", "resid_pre").name, Site(None, "img", "final").name
    ('blocks.3.img', 'blocks.3.txt.resid_pre', 'final.img')
    """

    block: int | None
    stream: str
    point: str = DEFAULT_POINT

    @property
    def name(self) -> str:
        if self.block is None:
            return _MODEL_NAMES.get(self.point, self.point)
        suffix = "" if self.point == DEFAULT_POINT else f".{self.point}"
        return f"blocks.{self.block}.{self.stream}{suffix}"

    @classmethod
    def parse(cls, name: str) -> Site:
        """The site of a full name, without patterns or aliases.

        >>> Site.parse("blocks.3.img"), Site.parse("velocity").block
        (Site(block=3, stream='img', point='resid_post'), None)

        Raises SiteError if the name is not one that :attr:`name` gives.
        """
        parts = name.split(".", 3)
        if parts[0] == "blocks" and len(parts) > 2 and parts[1].isdecimal() and parts[2] in STREAMS:
            return cls(int(parts[1]), parts[2], parts[3] if len(parts) > 3 else DEFAULT_POINT)
        point = next((point for point in MODEL_POINTS if _MODEL_NAMES.get(point, point) == name), None)
        if point is None:
            raise SiteError(f"{name!r} is not the name of a site, such as 'blocks.3.img' or 'velocity'.")
        return cls(None, "img", point)

    @property
    def is_image(self) -> bool:
        """Whether its tensor holds image tokens: not text, and not one vector for the whole image.

        >>> [Site.parse(name).is_image for name in ("blocks.3.img", "blocks.3.txt", "blocks.3.img.mod.gate")]
        [True, False, False]
        """
        return self.stream == "img" and not self.point.startswith("mod.")

    @property
    def order(self) -> tuple[float, int, int]:
        """Sorts sites as the model computes them."""
        if self.block is None:
            return (float("inf"), MODEL_POINTS.index(self.point), 0)
        return (self.block, POINTS.index(self.point), STREAMS.index(self.stream))

    def __str__(self) -> str:
        return self.name


_BLOCK_PATTERN = re.compile(
    r"(?P<stack>[A-Za-z_]\w*)"
    r"(?:\.(?P<index>-?\d{1,9}|\*)"
    r"|\[(?P<start>(?:-?\d{1,9})?):(?P<stop>(?:-?\d{1,9})?)\]|\[(?P<bracket>-?\d{1,9})\])"
    r"(?:\.(?P<stream>\*|\w+|\{[\w,\s]+\}))?"
    r"(?:\.(?P<point>.+))?"
)


def match(
    pattern: Pattern,
    sites: Sequence[Site],
    stacks: Mapping[str, range] | None = None,
    why_not: Callable[[int | None, str, str], str | None] | None = None,
) -> list[Site]:
    """The sites a pattern means, in the order the model computes them.

    pattern: ``*``, ``[a:b]`` (half-open), ``{img,txt}``, negative block indices, a stack's own name (``double.3``); a
        function that is given each site's name and says whether it is meant; or several of these in a list.
    sites: every site the model has.
    stacks: the blocks of each stack, by name.
    why_not: (block, stream, point) -> the reason why a block lacks a point, or for None the whole model.

    Raises SiteError, naming what exists and the nearest match, when a pattern selects nothing.
    """
    found: dict[Site, None] = {}
    for one in list_patterns(pattern):
        chosen = _match_one(one, sites, stacks or {}, why_not) if isinstance(one, str) else _filter(one, sites)
        found.update(dict.fromkeys(chosen))
    return sorted(found, key=lambda site: site.order)


def list_patterns(pattern: Pattern) -> list[str | Callable[[str], bool]]:
    """One pattern or several as a list of texts and functions; SiteError if one is neither.

    >>> list_patterns("blocks.*.img"), len(list_patterns(["velocity", lambda name: name.endswith("img")]))
    (['blocks.*.img'], 2)
    """
    several = not isinstance(pattern, str | Site) and not callable(pattern) and _is_iterable(pattern)
    patterns: list[Any] = list(itertools.islice(pattern, MOST + 1)) if several else [pattern]
    if not patterns:
        raise SiteError("no site was named. Pass a pattern such as 'blocks.*.img'.")
    if len(patterns) > MOST:
        raise SiteError(f"more than {MOST} patterns were given. Pass a list of a few.")
    found: list[str | Callable[[str], bool]] = []
    for one in patterns:
        if isinstance(one, Site):
            found.append(one.name)
        elif isinstance(one, str):
            found.append(str(one).strip())
        elif callable(one) and not isinstance(one, type) and takes(one, 1):
            found.append(one)
        else:
            raise SiteError(
                f"{one!r} ({type(one).__name__}) does not name a site. Pass a pattern such as 'blocks.*.img', a "
                "function fn(name) that says whether a site is meant, or a list of these."
            )
    return found


def _is_iterable(value: Any) -> bool:
    """Whether Python can go through a value; arrays without an axis only look as if it could."""
    try:
        iter(value)
    except TypeError:
        return False
    return True


def _filter(meant: Callable[[str], bool], sites: Sequence[Site]) -> list[Site]:
    """The sites of whose names a function says that they are meant."""
    found = []
    for site in sites:
        answer = meant(site.name)
        try:
            chosen = bool(answer)
        except (TypeError, ValueError, RuntimeError) as problem:
            raise SiteError(
                f"{name_of(meant)} is to say whether {site} is meant, and returned {type(answer).__name__}, which is "
                "neither true nor false."
            ) from problem
        if chosen:
            found.append(site)
    if not found:
        some = ", ".join(site.name for site in sites[:4])
        raise SiteError(
            f"{name_of(meant)} chose none of the {len(sites)} sites of this model, such as {some}. "
            "lens.sites() lists them all."
        )
    return found


def _match_one(
    pattern: str,
    sites: Sequence[Site],
    stacks: Mapping[str, range],
    why_not: Callable[[int | None, str, str], str | None] | None,
) -> list[Site]:
    named = [site for site in sites if site.block is None and site.name == pattern]
    if named:
        return named
    if pattern in _MODEL_NAMES.values() and why_not is not None:
        site = Site.parse(pattern)
        raise SiteError(f"{pattern!r}: {why_not(None, site.stream, site.point)}.")
    _tell_transformerlens(pattern)
    if pattern.endswith(PATTERNS):
        raise SiteError(
            f"{pattern!r} is not a tensor that a block computes: attention patterns are made from q and k, by "
            "lens.read_pattern(prompt, block, heads=...)."
        )
    parts = _BLOCK_PATTERN.fullmatch(pattern)
    depth = 1 + max((site.block for site in sites if site.block is not None), default=-1)
    ranges = {"blocks": range(depth), **stacks}
    if parts is None or parts["stack"] not in ranges:
        names = [*(f"{stack}.*.img" for stack in ranges), *(site.name for site in sites if site.block is None)]
        raise SiteError(f"no site is called {pattern!r}.{_closest(pattern, sites, names)}")
    blocks = _blocks(pattern, parts, ranges[parts["stack"]])
    streams = _choose(
        pattern, "stream", parts["stream"], list(dict.fromkeys(site.stream for site in sites if site.block is not None))
    )
    have = {site.point for site in sites if site.block is not None}
    known = [point for point in POINTS if (why_not or point in have) and point not in PATTERNS]
    points = _choose(pattern, "point", parts["point"] or DEFAULT_POINT, known)
    found = [site for site in sites if site.block in blocks and site.stream in streams and site.point in points]
    if not found and why_not is not None and len(points) == 1:
        reasons = dict.fromkeys(str(why_not(block, stream, points[0])) for block in blocks for stream in streams)
        elsewhere = [site.name for site in sites if site.point == points[0]]
        raise SiteError(
            f"{pattern!r}: {'; '.join(reasons)}."
            + (f" Other blocks have {points[0]}: {', '.join(elsewhere[:4])} ..." if elsewhere else "")
        )
    if not found:
        raise SiteError(
            f"{pattern!r} selects no site of this model.{_closest(pattern, sites, [site.name for site in sites][:8])}"
        )
    return found


def _tell_transformerlens(pattern: str) -> None:
    """Raises SiteError with the name that is meant, where a pattern is a name of TransformerLens."""
    parts = re.fullmatch(r"blocks\.(?P<block>-?\d+|\*)\.(?P<inside>attn\.|mlp\.)?hook_(?P<what>\w+)", pattern)
    if parts is None:
        return
    point = f"{parts['inside'] or ''}{parts['what']}"
    point = "attn.pattern" if point in ("attn.attn_scores", "attn.pattern") else point
    if point == "attn.pattern":
        meant = f"lens.read_pattern(prompt, {parts['block'].replace('*', '0')}, heads=...)"
    elif point in POINTS:
        meant = repr(f"blocks.{parts['block']}.img" + ("" if point == DEFAULT_POINT else f".{point}"))
    else:
        return
    raise SiteError(
        f"{pattern!r} is a name of TransformerLens; here it is {meant}, as a DiT's blocks hold a stream of image "
        "tokens, img, and many of them one of text, txt."
    )


def _blocks(pattern: str, parts: re.Match[str], blocks: range) -> range | list[int]:
    if parts["start"] is not None:
        chosen = blocks[slice(*(int(end) if end else None for end in (parts["start"], parts["stop"])))]
        if not chosen:
            raise SiteError(
                f"{pattern!r} selects no block; {parts['stack']} has {len(blocks)}, numbered 0 to {len(blocks) - 1}."
            )
        return chosen
    index = parts["bracket"] or parts["index"]
    if index == "*":
        return blocks
    if not -len(blocks) <= int(index) < len(blocks):
        raise SiteError(
            f"{pattern!r} asks for block {index}, but {parts['stack']} has {len(blocks)}: 0 to {len(blocks) - 1}, or "
            "-1 for the last."
        )
    return [blocks[int(index)]]


def _choose(pattern: str, what: str, asked: str | None, known: list[str]) -> list[str]:
    if asked is None:
        raise SiteError(f"{pattern!r} names no {what}. Say which: {', '.join(f'{pattern}.{name}' for name in known)}.")
    names = []
    # Of a point with parts, such as attn.q, the braces may stand around one part: attn.{q,k}.
    start, _, listed = asked.rstrip("}").rpartition("{")
    for name in (start + part.strip() for part in listed.split(",")):
        chosen = fnmatch.filter(known, name)
        if not chosen:
            raise SiteError(f"{pattern!r}: this model has no {what} {name!r}.{nearest(name, known)}")
        names += chosen
    return names


def _closest(pattern: str, sites: Sequence[Site], names: Iterable[str]) -> str:
    message = nearest(pattern, [site.name for site in sites])
    close = message.split(" There are:")[0]
    return f"{close} There are: {', '.join(names)}."
