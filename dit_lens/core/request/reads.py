"""Ops that read: what a site holds, and how much of a dictionary's features is in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from dit_lens.arguments.signatures import told_fields
from dit_lens.core.request.dictionaries.dictionary import Dictionary
from dit_lens.core.request.feature import choose_features
from dit_lens.core.request.op import Lowered, Lowering, Op
from dit_lens.core.request.reduce import parse
from dit_lens.errors import OpError


@told_fields
@dataclass(frozen=True, eq=False, repr=False)
class Read(Op):
    """Keeps the values at a site: [step, row, token, channel], or [step, row, channel, ...] after a reduction.

    reduce: how tokens are reduced on the model's device: "mean", "|mean|", "mean|x|", "rms", "max", "p99.9",
        "quantile(0.1,0.9)", "histogram(-10,10,64)", "topk(12)"; None keeps every token.
    name: the key of the result; the site's own name by default.
    """

    reduce: str | None = field(default=None, kw_only=True)
    name: str | None = field(default=None, kw_only=True)

    default_branch: ClassVar[str] = "cond"
    edits: ClassVar[bool] = False

    def lower(self, at: Lowering) -> Lowered:
        return at.on_branches(kind="Read", reduce=self._parse(at.site, at.size))

    def _parse(self, site: str, size: int) -> list[Any] | None:
        """The reduction in its plain form, checked against the site. size: of its channels."""
        if self.reduce is None:
            return None
        try:
            spec = parse(self.reduce)
        except ValueError as problem:
            raise OpError(f"reduce={self.reduce!r}: {problem}") from None
        if spec[0] == "topk" and spec[1] > size:
            raise OpError(
                f"reduce={self.reduce!r} asks for {spec[1]} channels, but {size} are chosen of {site}. Take "
                f"topk({size}) at most."
            )
        return spec


@told_fields
@dataclass(frozen=True, eq=False, repr=False)
class ReadFeatures(Read):
    """Keeps how much of a dictionary's features is in every token: [step, row, token, feature], float32.

    >>> import torch
    >>> from dit_lens import DiTLens, ReadFeatures
    >>> from dit_lens.dictionaries import Dictionary
    >>> channels = Dictionary(torch.eye(128), torch.zeros(128), torch.eye(128), torch.zeros(128))
    >>> prompt, op = "a big red circle left on a plain green background", ReadFeatures("blocks.3.img", channels, [5, 7])
    >>> DiTLens.toy().run(prompt, op, seed=0, num_inference_steps=2)["blocks.3.img"].shape
    torch.Size([2, 1, 256, 2])

    It takes what :class:`Read` takes; a reduction is over tokens, and leaves [step, row, feature, ...]. A transcoder is
    read where it encodes, at ``mlp.in``.

    dictionary: from :func:`dit_lens.dictionaries.load`, as wide as the site.
    features: by number, in their order; all by default.
    """

    dictionary: Dictionary
    features: int | Sequence[int] | None = None

    def lower(self, at: Lowering) -> Lowered:
        chosen = choose_features(self, self.dictionary, self.features, at)
        if self.dictionary.transcoder and not at.site.endswith(".mlp.in"):
            raise OpError(f"ReadFeatures at {at.site}: a transcoder encodes what enters an MLP. Read it at mlp.in.")
        key = at.give(self.dictionary.parts(chosen))
        return at.on_branches(kind="Read", reduce=self._parse(at.site, len(chosen)), key=key)
