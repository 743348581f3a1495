"""Runs, results, channels, directions, dictionaries and pages on the Hugging Face Hub."""

from dit_lens.hub.share import from_hub, push_to_hub

__all__ = ["from_hub", "push_to_hub"]
