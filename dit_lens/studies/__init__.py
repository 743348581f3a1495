"""Experiments on a lens with controls, whose results are data: import studies and results from here, parts by name."""

from typing import Any

from dit_lens.old_names import warn_of_old_name
from dit_lens.studies.basis import basis
from dit_lens.studies.blocks import blocks
from dit_lens.studies.carrier_or_detail import carrier_or_detail
from dit_lens.studies.disruption import disruption
from dit_lens.studies.model_report import ModelReport
from dit_lens.studies.organisation import organisation
from dit_lens.studies.parts.verdict import Thresholds
from dit_lens.studies.patching import patching
from dit_lens.studies.power import power
from dit_lens.studies.shared.keys import ImageKey
from dit_lens.studies.shared.merging import merge
from dit_lens.studies.shared.registry import find_study, study_names
from dit_lens.studies.shared.result import Result
from dit_lens.studies.stability import stability
from dit_lens.studies.steering import steering
from dit_lens.studies.sweep import sweep
from dit_lens.studies.transfer import transfer
from dit_lens.studies.transfer_image import transfer_image
from dit_lens.studies.write_attribution import write_attribution

STUDIES = study_names()

__all__ = [
    "STUDIES",
    "ImageKey",
    "ModelReport",
    "Result",
    "Thresholds",
    "basis",
    "blocks",
    "carrier_or_detail",
    "disruption",
    "merge",
    "organisation",
    "patching",
    "power",
    "stability",
    "steering",
    "sweep",
    "transfer",
    "transfer_image",
    "write_attribution",
]


def __getattr__(name: str) -> Any:
    """A study under its name of an earlier release."""
    record = find_study(name)
    if record is None:
        raise AttributeError(f"module 'dit_lens.studies' has no attribute {name!r}")
    warn_of_old_name(f"dit_lens.studies.{name}", f"dit_lens.studies.{record.name}", stacklevel=3)
    return record.function
