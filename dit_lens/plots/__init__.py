"""Plotly figures made of plain data: import every figure from here; nothing is shown or printed."""

from dit_lens.old_names import find_old_names
from dit_lens.plots.attention import head_figure, head_word_figure, pattern_figure
from dit_lens.plots.basis import basis_figure
from dit_lens.plots.blocks import blocks_figure
from dit_lens.plots.carrier_or_detail import carrier_or_detail_figure
from dit_lens.plots.channels import block_channel_map, channel_histogram, channel_spectrum
from dit_lens.plots.disruption import disruption_figure
from dit_lens.plots.organisation import organisation_figure
from dit_lens.plots.overlays import cluster_overlay, overlay_grid, sheet, strip
from dit_lens.plots.patching import patching_figure
from dit_lens.plots.stability import stability_figure
from dit_lens.plots.steering import steering_figure
from dit_lens.plots.sweep import sweep_figure
from dit_lens.plots.theme import ARMS, TEMPLATE, looks
from dit_lens.plots.training import training_figure
from dit_lens.plots.transfer import transfer_figure, transfer_image_figure, transfer_strips
from dit_lens.plots.word_maps import word_map_figure
from dit_lens.plots.write_attribution import write_attribution_figure

__all__ = [
    "ARMS",
    "TEMPLATE",
    "basis_figure",
    "block_channel_map",
    "blocks_figure",
    "carrier_or_detail_figure",
    "channel_histogram",
    "channel_spectrum",
    "cluster_overlay",
    "disruption_figure",
    "head_figure",
    "head_word_figure",
    "looks",
    "organisation_figure",
    "overlay_grid",
    "patching_figure",
    "pattern_figure",
    "sheet",
    "stability_figure",
    "steering_figure",
    "strip",
    "sweep_figure",
    "training_figure",
    "transfer_figure",
    "transfer_image_figure",
    "transfer_strips",
    "word_map_figure",
    "write_attribution_figure",
]

__getattr__ = find_old_names(__name__, {"births_figure": "write_attribution_figure"})
