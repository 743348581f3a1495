"""Figures: data in, a plotly ``go.Figure`` out. Nothing is shown or printed; a figure shows itself in a notebook.

    massive = lens.massive_channels(prompt, k=12)
    channel_spectrum(massive.scores["blocks.3.img"], massive["blocks.3.img"])
    block_channel_map(massive.scores, massive)
    result.figure()                                        # of a study: disruption, organisation, transfer

Every figure has a transparent background and colours that read on white and on black; an arm has the same colour,
marker and name everywhere (theme.ARMS).
"""

from dit_lens.plots.births import births_figure
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

__all__ = [
    "ARMS",
    "TEMPLATE",
    "births_figure",
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
]
