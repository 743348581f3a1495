"""Inside an attention: its queries and keys as it compares them, and what it puts out, where no module has them.

Torch only: it travels to a server by source. A mode of torch sees the one call of attention in a module; it is there
from where the module is entered until it is left, and only where an op asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from dit_lens.core.request.attention import CUT
from dit_lens.families.layout import PlanMismatchError

if TYPE_CHECKING:
    from torch import Tensor

ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def tell_cut(query: Tensor, edges: list[tuple[int, set[int], Tensor, Tensor]]) -> None:
    """Tells modes of torch that watch a call of attention which edges were knocked out after it.

    query: of that call, the very tensor.
    edges: for each row of the forward pass and some heads of it the queries that do not read some keys.
    """
    if has_torch_function((query,)):
        handle_torch_function(tell_cut, (query,), query, edges)


class Attending(TorchFunctionMode):
    """What is done at the call of attention in one module.

    change: fn(slot, tokens [row, token, channel], arguments of the call) -> what replaces these tokens, or None. Slots
      are "query", "key" and "result".
    channels: of queries and keys, where they are asked for; heads that were repeated to share a key are one.
    """

    def __init__(self, change: Callable[[str, Tensor, dict[str, Any]], Tensor | None], channels: dict[str, int | None]):
        TorchFunctionMode.__init__(self)
        self.change, self.channels, self.calls = change, channels, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The call, with what replaces its queries, keys and result."""
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        given = {**dict(zip(ARGUMENTS, args, strict=False)), **(kwargs or {})}
        for slot in ("query", "key"):
            if slot in self.channels:
                given[slot] = self._change(slot, given[slot], given)
        result = func(**given)
        if "result" not in self.channels:
            return result
        result = self._change("result", result, given)
        edges: Any = given.get(CUT)
        if edges:
            tell_cut(given["query"], edges)
        return result

    def _change(self, slot: str, tensor: Tensor, given: dict[str, Any]) -> Tensor:
        """A tensor [row, head, token, channel] of the call, or what replaces it."""
        channels, (heads, size) = self.channels[slot], (tensor.shape[1], tensor.shape[3])
        repeated = 1 if channels is None else max(1, heads * size // channels)
        new = self.change(slot, tensor[:, ::repeated].transpose(1, 2).flatten(2), given)
        if new is None:
            return tensor
        return new.unflatten(2, (-1, size)).transpose(1, 2).repeat_interleave(repeated, 1)

    def check(self, module: str) -> None:
        """Fails where the module has not called attention just once."""
        if self.calls != 1:
            raise PlanMismatchError(
                f"{module} called scaled dot-product attention {self.calls} times in place of once, so that its "
                "queries and keys cannot be told. Is another attention backend set? "
                "pipe.transformer.set_attention_backend('native') has them"
            )
