"""Studies: experiments on a lens whose results are data. Controls run by default, on the same seeds."""

from dit_lens.studies.births import births
from dit_lens.studies.carrier_or_detail import carrier_or_detail
from dit_lens.studies.disruption import disruption
from dit_lens.studies.organisation import organisation
from dit_lens.studies.parts.evidence import Thresholds
from dit_lens.studies.patching import patching
from dit_lens.studies.shared.result import Result
from dit_lens.studies.stability import stability
from dit_lens.studies.sweep import sweep
from dit_lens.studies.transfer import transfer
from dit_lens.studies.transfer_image import transfer_image

STUDIES = (
    "births",
    "carrier_or_detail",
    "disruption",
    "organisation",
    "patching",
    "stability",
    "sweep",
    "transfer",
    "transfer_image",
)

__all__ = [
    "STUDIES",
    "Result",
    "Thresholds",
    "births",
    "carrier_or_detail",
    "disruption",
    "organisation",
    "patching",
    "stability",
    "sweep",
    "transfer",
    "transfer_image",
]
