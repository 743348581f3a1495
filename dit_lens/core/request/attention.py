"""An op on the pattern of attention: edges from queries to keys that are knocked out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dit_lens.arguments.signatures import told_fields
from dit_lens.core.request.indices import list_items, to_indices
from dit_lens.core.request.op import (
    Edit,
    Forecast,
    Lowered,
    Lowering,
    Mask,
    Op,
    Tokens,
    check_outputs,
    list_words,
    move_tokens,
)
from dit_lens.core.request.token_set import TokenSet
from dit_lens.errors import OpError, nearest
from dit_lens.families.layout import PlanMismatchError, check_whole, select_stream

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dit_lens.families import Anatomy
    from dit_lens.families.sites import Site

STREAMS = ("img", "txt")
CUT = "knocked out"  # beside the arguments of a call: edges [(row, heads, queries, keys)] that its result goes without


@told_fields
@dataclass(frozen=True, eq=False, repr=False)
class AttentionMask(Op):
    """Knocks edges of attention out: tokens of one stream no longer read some tokens of one.

    What is left is normalised anew, as if those keys were not there; a token that is left without any key reads zeros.
    Several such ops add up. References and padding of the image are tokens of neither stream, and stay.

    >>> import dit_lens as dl
    >>> lens = dl.DiTLens.toy("sana")
    >>> op = dl.AttentionMask("blocks.3.img", keys="txt", key_tokens="red")  # what the image reads of this word
    >>> run = lens.run("a big red circle left on a plain blue background", op, seed=0, num_inference_steps=1)
    >>> print(run.receipt)
    Receipt: 1 site touched
    [0] AttentionMask blocks.3.img.cross.pattern (cond): 1 step, 1 row, all tokens, all channels, without txt 3, ...

    site: blocks, and the stream of the tokens that read, such as "blocks[3:5].img"; which of them say ``tokens`` and
        ``mask``.
    keys: the stream that they no longer read: "txt" or "img".
    key_tokens: which of its tokens, as ``tokens`` is written: indices, a word or words of the prompt, a class, or a
        TokenSet of that stream; None for all.
    key_mask: which image tokens, as ``mask`` is written.
    heads: which heads of the attention, by number, negative ones from the end; None for all.
    """

    keys: Literal["txt", "img"] = field(default="txt", kw_only=True)
    key_tokens: Tokens = field(default=None, kw_only=True)
    key_mask: Mask = field(default=None, kw_only=True)
    heads: int | Sequence[int] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("key_tokens", "heads"):
            if hasattr(getattr(self, name), "__next__"):
                object.__setattr__(self, name, list_items(getattr(self, name), f"{name}="))
        if not isinstance(self.key_tokens, TokenSet):
            object.__setattr__(self, "key_tokens", list_words(self.key_tokens))

    @property
    def words_of_rows(self) -> Tokens:
        """The words that are knocked out."""
        return self.key_tokens if self.keys == "txt" else None

    def prepare(self, sites: list[Site], anatomy: Anatomy, run: Forecast) -> tuple[Op, list[Site]]:  # noqa: ARG002 of all
        """Itself with heads as channels, at the patterns of the blocks that it names."""
        self._check(sites)
        found = [anatomy.find_call(site.block or 0, site.stream, self.keys)[0] for site in sites]
        tokens, channels = move_tokens(self.tokens, zip(sites, found, strict=True)), None
        if self.heads is not None:
            channels = {site.name: self._list_channels(anatomy.heads(site), site) for site in found}
        return replace(self, tokens=tokens, channels=channels), found

    def _list_channels(self, heads: list[range], site: Site) -> list[int]:
        """The channels of the chosen heads."""
        chosen = to_indices(self.heads, len(heads), "head", f"{site} has", "heads")
        if not chosen:
            raise OpError("heads=[] chooses no head. Leave it out for all of them, or leave the op out.")
        return [channel for head in chosen for channel in heads[head]]

    def _check(self, sites: list[Site]) -> None:
        """OpError for what no model has."""
        if not isinstance(self.keys, str) or self.keys not in STREAMS:
            raise OpError(f"keys={self.keys!r} is no stream of tokens.{nearest(str(self.keys), STREAMS)}")
        if self.channels is not None:
            raise OpError("AttentionMask takes heads= in place of channels=: a head has one pattern.")
        if self.key_mask is not None and (self.keys != "img" or self.key_tokens is not None):
            raise OpError("key_mask= chooses image tokens: use it with keys='img', and without key_tokens=.")
        check_outputs(self, sites, "read")

    def lower(self, at: Lowering) -> Lowered:
        return at.attend(self.keys, self.key_tokens, self.key_mask)


def knock_out(edit: Edit) -> Tensor:
    """What attention puts out for the chosen queries and heads without some keys: [row, query, channel].

    Only these are computed anew, so that whatever is not chosen stays bit for bit as it is.
    """
    call, how, rows = edit.call, edit.action["parameters"], edit.hook.rows
    if call.get("is_causal"):
        raise PlanMismatchError(f"{edit.hook.name} attends to earlier tokens only, which is not followed")
    query, key, value = call["query"], call["key"], call["value"]
    heads, shared = how["heads"] or list(range(query.shape[1])), query.shape[1] // key.shape[1]
    asking = _find_tokens(query, how["stream"], how["queries"], edit)[rows]  # [row, token of the stream]
    chosen = asking if edit.action["tokens"] is None else asking[:, edit.action["tokens"]]
    allowed = _allow(edit, key, chosen, heads)  # [row, head, query, key]
    given = call.get("attn_mask")
    if given is not None:
        whole = given.expand(*query.shape[:3], key.shape[2])
        given = torch.stack([whole[row, heads][:, some] for row, some in zip(rows, chosen, strict=True)])
    mask, lost = mask_edges(given, ~allowed)
    asked = torch.stack([query[row, heads][:, some] for row, some in zip(rows, chosen, strict=True)])
    read = ([one[row, [head // shared for head in heads]] for row in rows] for one in (key, value))
    keys, values = (torch.stack(one) for one in read)
    made = scaled_dot_product_attention(asked, keys, values, attn_mask=mask, scale=call.get("scale"))
    return made.masked_fill(lost, 0).transpose(1, 2).flatten(2).to(edit.old)


def mask_edges(mask: Tensor | None, gone: Tensor) -> tuple[Tensor, Tensor]:
    """An attention mask without some edges, and which queries have no key left: [..., query, 1].

    To these it leaves keys, as attention makes no numbers of none.

    mask: of the call: bool, or added to scores; None for all edges.
    gone: bool [..., query, key], which edges are left out.
    """
    if mask is None or mask.dtype == torch.bool:
        allowed = ~gone if mask is None else mask & ~gone
        lost = ~allowed.any(-1, keepdim=True)
        return allowed | lost, lost
    lost = (gone | mask.isneginf()).all(-1, keepdim=True)
    return mask.masked_fill(gone, -torch.inf).masked_fill(lost, 0), lost


def _find_tokens(tensor: Tensor, stream: str, layout: str, edit: Edit) -> Tensor:
    """Where a stream's tokens are among those of attention: [row of the forward pass, token].

    tensor: queries or keys [row, head, token, channel].
    """
    numbers = torch.arange(tensor.shape[2])[None, :, None].expand(len(tensor), -1, 1)
    location: Any = {"stream": stream, "layout": layout, "name": edit.hook.name}
    check_whole(tensor.shape[2], location, edit.image)
    return select_stream(numbers, location, edit.image, range(len(tensor)))[0][..., 0].to(tensor.device)


def _allow(edit: Edit, key: Tensor, chosen: Tensor, heads: list[int]) -> Tensor:
    """Which keys the chosen queries may read, after all that was knocked out before: bool [row, head, query, key].

    chosen: the queries, [row, query].
    """
    how, rows, image = edit.action["parameters"], edit.hook.rows, edit.image
    there = _find_tokens(key, how["keys"], how["layout"], edit)
    before = edit.call.setdefault(CUT, [])
    shape = (len(rows), len(heads) if before else 1, chosen.shape[1], key.shape[2])
    allowed = torch.ones(shape, dtype=torch.bool, device=key.device)
    for row, some, queries, keys in before:
        shared = [i for i, head in enumerate(heads) if head in some]
        for i in (i for i, one in enumerate(rows) if one == row):
            same = torch.isin(chosen[i], queries).nonzero()[:, 0]
            allowed[i, torch.tensor(shared, dtype=torch.long)[:, None, None], same[:, None], keys] = False
    steps = edit.action["key_tokens"]
    named = None if steps is None else steps[min(edit.action["step_index"], len(steps) - 1)]
    for i, row in enumerate(rows):
        count = image.starts[row] if how["layout"] == "ragged" and how["keys"] == "txt" else there.shape[1]
        tokens = list(range(count)) if named is None else named[i]
        if tokens and max(tokens) >= count:
            raise PlanMismatchError(
                f"{edit.hook.name} reads {count} tokens of {how['keys']} at step {edit.hook.step}, and key "
                f"{max(tokens)} was chosen"
            )
        allowed[i, :, :, there[row, tokens]] = False
        before.append((row, set(heads), chosen[i], there[row, tokens]))
    return allowed
