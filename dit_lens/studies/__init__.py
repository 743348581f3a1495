"""Studies: experiments on a lens whose results are data. Controls run by default, on the same seeds."""

from dit_lens.studies.births import births
from dit_lens.studies.disruption import disruption
from dit_lens.studies.organisation import organisation
from dit_lens.studies.result import Result
from dit_lens.studies.stability import stability
from dit_lens.studies.transfer import transfer

STUDIES = ("births", "disruption", "organisation", "stability", "transfer")

__all__ = ["STUDIES", "Result", "births", "disruption", "organisation", "stability", "transfer"]
