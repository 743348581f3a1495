"""The steps that strength= leaves are those that each pipeline's own code takes."""

import inspect
import random
from types import SimpleNamespace

import diffusers
import pytest

from dit_lens.core.request.timeline import count_skipped
from dit_lens.errors import PromptError
from dit_lens.families.registry import known_families


def shortening():
    """Every pipeline class of the table with an argument that leaves steps out, and its entry."""
    for family in known_families():
        for entry in family.pipelines:
            kind = getattr(diffusers, entry.name, None)
            if kind is not None and hasattr(kind, "get_timesteps"):
                yield pytest.param(kind, entry, id=entry.name)


@pytest.mark.parametrize(("kind", "entry"), shortening())
def test_a_share_of_steps_is_that_of_the_pipeline(kind, entry):
    known = inspect.signature(kind.__call__).parameters
    assert entry.strength in known or "strength" not in known
    if entry.strength not in known:
        return
    rng = random.Random(0)
    for _ in range(100):
        steps, strength = rng.randint(1, 40), round(rng.uniform(0.05, 1), 2)
        scheduler = SimpleNamespace(timesteps=list(range(steps)), order=1, set_begin_index=lambda _: None)
        pipe = SimpleNamespace(scheduler=scheduler)
        whole = list(range(steps))
        given = {
            "num_inference_steps": steps,
            "strength": strength,
            "sigmas": whole,
            "timesteps": whole,
            "device": None,
        }
        taken = [name for name in inspect.signature(kind.get_timesteps).parameters if name in given]
        left = len(kind.get_timesteps(pipe, **{name: given[name] for name in taken})[0])
        call = {entry.strength: strength}
        if left:
            assert steps - count_skipped(pipe, entry, call, steps) == left
        else:
            with pytest.raises(PromptError, match="leaves none to run"):
                count_skipped(pipe, entry, call, steps)
