"""The family's names inside nnsight's own traces: ``lens.blocks[3].img`` reads, and assigning to it writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dit_lens.errors import nearest
from dit_lens.families.layout import replace_tensor, select_tensor
from dit_lens.families.sites import DEFAULT_POINT

if TYPE_CHECKING:
    from torch import Tensor

    from dit_lens.families import Anatomy
    from dit_lens.families.locations import Location


class Blocks:
    """The blocks of a model, in execution order over all stacks."""

    def __init__(self, anatomy: Anatomy, model: Any):
        self._anatomy, self._model = anatomy, model

    def __len__(self) -> int:
        return self._anatomy.depth

    def __getitem__(self, index: int) -> Block:
        return Block(self._anatomy, self._model, self._anatomy.check_block(index))

    def __iter__(self) -> Iterator[Block]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        stacks = [f"{name} {blocks.start}-{blocks.stop - 1}" for name, blocks in self._anatomy.stacks.items()]
        return f"Blocks({len(self)}: {', '.join(stacks)})"


class Block:
    """One block. Inside a trace ``block.img`` is a copy of its stream; assign the changed copy to write it back.

    All rows of the call and, on the image stream, every token the block has (reference tokens too). A block that holds
    both streams in one tensor has ``block.joint`` instead.
    """

    __slots__ = ("_anatomy", "_index", "_model")

    def __init__(self, anatomy: Anatomy, model: Any, index: int):
        object.__setattr__(self, "_anatomy", anatomy)
        object.__setattr__(self, "_model", model)
        object.__setattr__(self, "_index", index)

    def __getattr__(self, stream: str) -> Tensor:
        location, envoy = self._locate(stream)
        return select_tensor(envoy.output, "output", location).clone()

    def __setattr__(self, stream: str, value: Tensor) -> None:
        location, envoy = self._locate(stream)
        envoy.output = replace_tensor(envoy.output, "output", location, value)

    def __repr__(self) -> str:
        return f"Block({self._index}, {self._anatomy.block_name(self._index)})"

    def _locate(self, stream: str) -> tuple[Location, Any]:
        sites = {
            site.stream: site
            for site in self._anatomy.sites
            if site.block == self._index and site.point == DEFAULT_POINT
        }
        locations = {name: self._anatomy.locate(site) for name, site in sites.items()}
        if any(location.layout != "own" for location in locations.values()):
            locations = {"joint": locations["img"]}
        if stream not in locations:
            raise AttributeError(f"block {self._index} has no stream {stream!r}.{nearest(stream, locations)}")
        location = locations[stream]
        return location.plain(), self._model.get(location.module)
