"""Where the reads of a run go: into memory, or into temporary files where they do not fit there."""

from __future__ import annotations

import shutil
import tempfile
from typing import TYPE_CHECKING, Any

from dit_lens.core.plan.cost import Cost, format_bytes
from dit_lens.errors import OpError, warn

if TYPE_CHECKING:
    from torch import Tensor

HEADROOM = 0.8  # share of what is free that reads may fill


class Spill(dict):
    """A dictionary whose tensors lie in files instead of memory."""

    def __setitem__(self, key: Any, tensor: Tensor) -> None:
        super().__setitem__(key, map_to_file(tensor))


def map_to_file(tensor: Tensor) -> Tensor:
    """The same values, read from a temporary file as they are used.

    The file has lost its name already, so that its room on the disk is given back with the tensor.
    """
    from safetensors.torch import load_file, save_file

    with tempfile.NamedTemporaryFile(prefix="dit_lens-", suffix=".safetensors") as file:
        save_file({"tensor": tensor.contiguous()}, file.name)
        return load_file(file.name)["tensor"]


def reads_container(cost: Cost) -> type[dict]:
    """The kind of dictionary for the reads of a run: in memory, or where they do not fit there, in files.

    Warns of the latter. Raises OpError, before anything is drawn, where the disk is too small as well.
    """
    import psutil

    free = psutil.virtual_memory().available
    if cost.bytes <= HEADROOM * free:
        return dict
    folder = tempfile.gettempdir()
    room = shutil.disk_usage(folder).free
    if cost.bytes > HEADROOM * room:
        raise OpError(
            f"the reads of this run would keep {format_bytes(cost.bytes)}, but only {format_bytes(free)} of memory and "
            f"{format_bytes(room)} of disk in {folder} are free. Reduce tokens at the source (reduce='|mean|'), choose "
            "channels= or tokens=, fewer steps= or sites, run fewer prompts at once, or name a larger disk in the "
            "environment variable TMPDIR."
        )
    warn(
        f"the reads of this run keep {format_bytes(cost.bytes)}, more than fits into the {format_bytes(free)} of "
        f"memory that are free: they go to files in {folder} (TMPDIR), which are removed with the run."
    )
    return Spill
