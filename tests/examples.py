"""How many cases Hypothesis draws for a test."""

from hypothesis import settings


def examples(count, **choices):
    """Settings for so many examples; a profile with more multiplies them and looks elsewhere in every session.

    choices: other settings of Hypothesis.
    """
    more = settings.default.max_examples // 100
    return settings(max_examples=count * max(more, 1), deadline=None, derandomize=more <= 1, **choices)
