"""What a model is, looked at where its weights are: equal for the same model here and on a server."""

from __future__ import annotations

from typing import Any

from dit_lens.core.execution.at_weights import at_weights
from dit_lens.core.runs.provenance import describe
from dit_lens.core.runs.state import describe_state


@at_weights
def describe_model(lens: Any) -> dict[str, Any]:
    """The model of a lens in words, and as "state" everything that decides its answers: one pass over all weights."""
    return {**describe(lens.pipe, lens.family), "state": describe_state(lens.pipe)}
