"""What is known of a run before it starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_lens.core.request.ops import Steps
    from dit_lens.core.request.text_tokens import StreamText
    from dit_lens.core.request.timeline import Timeline


@dataclass(frozen=True)
class Outline:
    """The shape of a run: its images, tokens, steps and branches.

    >>> from dit_lens import DiTLens
    >>> outline = DiTLens.toy().outline("a big red circle left on a plain blue background", num_inference_steps=4)
    >>> outline.rows, outline.grid, outline.steps, outline.branches, outline.kind
    (1, (16, 16), 4, ('cond', 'uncond'), 'flow')
    >>> outline.select((0.0, 0.5))
    [0, 1]

    rows: images in the batch.
    grid: (h, w) image tokens; None where only the pipeline knows.
    timeline: the steps, with their branches and noise levels.
    text: what is in the text stream of the run, or of a batch of some prompts; asked of the pipeline when needed.
    ask_grid: asks the pipeline itself for the grid, (f, h, w) of a video; None where it cannot be followed.
    draws: of each row its prompt and its seed; None for what is given otherwise.
    text_of: what is in that of another run, of which "prompt" and "call" of the spec are known.
    """

    rows: int
    grid: tuple[int, int] | None
    timeline: Timeline
    text: Callable[..., StreamText] = field(repr=False)
    text_of: Callable[[Mapping[str, Any]], StreamText] = field(repr=False)
    ask_grid: Callable[[], tuple[int, ...] | None] = field(repr=False)
    draws: tuple[tuple[str | None, int | None], ...] = field(default=(), repr=False)

    @property
    def text_tokens(self) -> int | None:
        """Length of the text stream; None where only the run can tell."""
        return self.text().count

    def find_grid(self) -> tuple[int, ...] | None:
        """The grid of image tokens, (f, h, w) of a video; the first look may call the pipeline up to its first step."""
        return self.ask_grid() if self.grid is None else self.grid

    @property
    def steps(self) -> int:
        """How many denoising steps run."""
        return self.timeline.steps

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches of one step, in the order in which they are computed."""
        return self.timeline.branches

    @property
    def kind(self) -> str | None:
        """What is predicted: "flow", "epsilon", "v_prediction", or None where it is none of these."""
        return self.timeline.kind

    @property
    def sigmas(self) -> tuple[float, ...] | None:
        """The noise level of each step; None where it is not known before the run."""
        return self.timeline.sigmas

    def select(self, steps: Steps) -> list[int]:
        """The step indices that ``steps=`` means, in the order in which they are named."""
        return self.timeline.select(steps)

    def tokens(self, stream: str) -> int | None:
        """The number of tokens of a stream, "img" or "txt"; None where it is unknown."""
        if stream == "txt":
            return self.text_tokens
        return None if self.grid is None else self.grid[0] * self.grid[1]
