"""Random numbers of a study: every draw, of every image, has a stream of its own."""

from __future__ import annotations

import hashlib

import numpy as np

# What decides random numbers here; cells of a study that were drawn by another one do not go with new ones.
STREAMS = 2


def make_stream(*parts: int | str) -> int:
    """A seed that no other parts have: what a draw is of, such as the study's seed, the prompt, the arm and its number.

    >>> make_stream(0, "a red fox", "random", 1) == make_stream(0, "a red fox", "random", 1)
    True
    >>> make_stream(0, "a red fox", "random", 1) == make_stream(1, "a red fox", "random", 0)
    False

    An image keeps its draws whatever else is in the study, and in whichever order.
    """
    # Of a text its digest, since SeedSequence takes numbers; the length says where one part ends.
    words = [part if isinstance(part, int) else int(hashlib.sha256(part.encode()).hexdigest(), 16) for part in parts]
    kinds = sum(isinstance(part, str) << i for i, part in enumerate(parts))
    state = np.random.SeedSequence([len(parts), kinds, *words]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))  # torch and JSON readers take 63 bits
