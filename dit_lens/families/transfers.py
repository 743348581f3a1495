"""Tensors that go from one device to another while Python goes on. Torch only: it travels to a server by source.

A GPU works through a queue. Asking it for a number empties the queue first, and it stands idle until Python has
prepared more work. Inside a run nothing asks: what is read goes to pinned memory, and the run waits once, at its end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MOST_PINNED = 2**31  # bytes of a run in memory that the system cannot page out; copies beyond them are waited for


def is_queued(tensor: Tensor) -> bool:
    """Whether a tensor's values may not be there yet, so that asking for them would wait."""
    return tensor.device.type == "cuda"


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of main memory on another device, which nothing waits for."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Transfers:
    """What goes between main memory and the devices of a run.

    patient: whether each copy to main memory is waited for, for what uses the values at once.
    """

    def __init__(self, *, patient: bool = False):
        self.patient = patient
        self.indices: dict = {}  # index tensors that were sent before
        self.pinned, self.devices = 0, set()

    def bring(self, tensor: Tensor, *, copy: bool = False) -> Tensor:
        """A tensor in main memory, whose values are there after :meth:`wait`. copy: even if it lies there already."""
        size = tensor.numel() * tensor.element_size()
        if self.patient or not is_queued(tensor) or self.pinned + size > MOST_PINNED:
            return tensor.to("cpu", copy=copy)
        self.pinned += size
        self.devices.add(tensor.device)
        return start_copy(tensor)

    def wait(self) -> None:
        """Waits until all are there."""
        for device in self.devices:
            finish_copies(device)
        self.devices.clear()


def start_copy(tensor: Tensor) -> Tensor:
    """Pinned memory that will have the values of a tensor on a GPU."""
    there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return there.copy_(tensor, non_blocking=True)


def finish_copies(device: torch.device) -> None:
    """Waits until a device has done all that it was told so far."""
    torch.cuda.synchronize(device)


def fetch_numbers(tensors: Sequence[Tensor]) -> list[float]:
    """The numbers of tensors that have one element each, with one wait for each device and precision."""
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(tensors):
        alike.setdefault((tensor.device, tensor.dtype), []).append(place)
    found = [0.0] * len(tensors)
    for places in alike.values():
        some = [tensors[place] for place in places]
        joined = torch.stack([one if one.ndim == 0 else one.reshape(()) for one in some])
        for place, number in zip(places, joined.detach().double().tolist(), strict=True):
            found[place] = number
    return found
