"""Figures: data in, a plotly ``go.Figure`` out; nothing is shown or printed. Studies and the explorer import from here.

    massive = lens.massive_channels(prompt, k=12)
    channel_spectrum(massive.scores["blocks.3.img"], massive["blocks.3.img"])
    block_channel_map(massive.scores, massive)
    result.figure()                                        # of a study: disruption, organisation, transfer

A figure shows itself in a notebook. It has a transparent background and colours that are legible on white and on black;
an arm has the same colour, marker and name everywhere (theme.ARMS).
"""

import sys
from typing import Any

from dit_lens.old_names import warn_of_old_name
from dit_lens.plots.carrier_or_detail import carrier_or_detail_figure
from dit_lens.plots.channels import block_channel_map, channel_histogram, channel_spectrum
from dit_lens.plots.disruption import disruption_figure
from dit_lens.plots.organisation import organisation_figure
from dit_lens.plots.overlays import cluster_overlay, overlay_grid, sheet, strip
from dit_lens.plots.patching import patching_figure
from dit_lens.plots.stability import stability_figure
from dit_lens.plots.sweep import sweep_figure
from dit_lens.plots.theme import ARMS, TEMPLATE, looks
from dit_lens.plots.transfer import transfer_figure, transfer_image_figure, transfer_strips
from dit_lens.plots.write_attribution import write_attribution_figure

__all__ = [
    "ARMS",
    "TEMPLATE",
    "block_channel_map",
    "carrier_or_detail_figure",
    "channel_histogram",
    "channel_spectrum",
    "cluster_overlay",
    "disruption_figure",
    "looks",
    "organisation_figure",
    "overlay_grid",
    "patching_figure",
    "sheet",
    "stability_figure",
    "strip",
    "sweep_figure",
    "transfer_figure",
    "transfer_image_figure",
    "transfer_strips",
    "write_attribution_figure",
]

_OLD_NAMES = {"births_figure": "write_attribution_figure"}


def __getattr__(name: str) -> Any:
    """A figure under its name of an earlier release."""
    if name not in _OLD_NAMES:
        raise AttributeError(f"module 'dit_lens.plots' has no attribute {name!r}")
    warn_of_old_name(f"dit_lens.plots.{name}", f"dit_lens.plots.{_OLD_NAMES[name]}", stacklevel=3)
    return getattr(sys.modules[__name__], _OLD_NAMES[name])
