"""An op that changes how much of a dictionary's features is in hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_lens.arguments.numbers import to_number
from dit_lens.arguments.signatures import told_fields
from dit_lens.core.request.dictionaries.dictionary import Dictionary
from dit_lens.core.request.dictionaries.encode import encode, find_level, place_parts
from dit_lens.core.request.op import Edit, Lowered, Lowering, Op
from dit_lens.errors import OpError, show


@told_fields
@dataclass(frozen=True, eq=False, repr=False)
class Feature(Op):
    """Scales the share that features of a dictionary have in hidden states: h + ((scale - 1) a + add) d.

    >>> import torch
    >>> from dit_lens import DiTLens, Feature
    >>> from dit_lens.dictionaries import Dictionary
    >>> channels = Dictionary(torch.eye(128), torch.zeros(128), torch.eye(128), torch.zeros(128))
    >>> prompt, op = "a big red circle left on a plain green background", Feature("blocks.3.img", channels, 5, scale=0)
    >>> DiTLens.toy().run(prompt, op, seed=0, num_inference_steps=2).receipt.entries[0].kind
    'Feature'

    a is how much of a feature is in a token, and d its direction. What the dictionary does not explain stays as it is,
    and so do tokens without the feature (unless ``add`` is given), bit for bit. ``scale=0`` removes it, ``scale=3``
    triples it, ``scale=0, add=5`` sets it to 5 in every chosen token. One of the two has to be given.

    A transcoder is edited where it decodes, at ``mlp.o``; it encodes what enters the same MLP.

    dictionary: from :func:`dit_lens.dictionaries.load`, as wide as the site.
    features: one or several, by number.
    scale: 1 leaves it as it is, and is meant where only ``add`` is given.
    add: in units of the activation; 0 where only ``scale`` is given.
    """

    dictionary: Dictionary
    features: int | Sequence[int]
    scale: float | None = None
    add: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale is None and self.add is None:
            raise OpError(
                "Feature takes scale= or add=, or both: scale=0 removes a feature, scale=3 triples it, add=5 adds 5 of "
                "it. Give one."
            )
        object.__setattr__(self, "scale", 1.0 if self.scale is None else self.scale)
        object.__setattr__(self, "add", 0.0 if self.add is None else self.add)

    def does_nothing(self) -> bool:
        return (to_number(self.scale), to_number(self.add)) == (1, 0)

    def lower(self, at: Lowering) -> Lowered:
        how = {name: to_number(getattr(self, name)) for name in ("scale", "add")}
        for name, number in how.items():
            if number is None or abs(number) > torch.finfo(torch.float32).max:
                raise OpError(f"Feature at {at.site}: {name}={show(getattr(self, name))} is not a finite number.")
        chosen = choose_features(self, self.dictionary, self.features, at)
        key = at.give(self.dictionary.parts(chosen))
        if not self.dictionary.transcoder:
            return at.on_branches(kind="Feature", key=key, parameters=how)
        if not at.site.endswith(".mlp.o"):
            raise OpError(f"Feature at {at.site}: a transcoder decodes what leaves an MLP. Edit it at mlp.o.")
        held = at.hold(at.site.removesuffix("o") + "in")
        return at.on_branches(kind="Feature", key=key, parameters=how, held=held)


def choose_features(op: Op, dictionary: object, features: int | Sequence[int] | None, at: Lowering) -> list[int]:
    """The features of an op by number; OpError where its dictionary does not fit the site.

    op: what is asked.
    dictionary, features: as it names them.
    at: where it is laid out.
    """
    name = type(op).__name__
    if not isinstance(dictionary, Dictionary):
        raise OpError(
            f"{name} at {at.site}: {show(dictionary)} is not a Dictionary. Load one: dictionaries.load(path)."
        )
    if op.channels is not None:
        raise OpError(f"{name} at {at.site} takes no channels=: a feature is made of all of them. Leave it out.")
    width = dictionary.writes if op.edits else dictionary.width
    if width != at.size:
        raise OpError(
            f"{name} at {at.site}: this dictionary is of {width} channels, and the site has {at.size}. It was trained "
            "on another model, or at another site."
        )
    return dictionary.choose(features)


def add_feature(edit: Edit) -> Tensor:
    """The sum with a multiple of what features have in it; with one of directions."""
    key, how = edit.action["key"], edit.action["parameters"]
    parts = place_parts(edit.payload[key], key, edit.old.device, edit.indices)
    encoded = edit.take_held(None) if "held" in edit.action else edit.old
    active, unit = encode(parts, encoded, find_level(edit.inputs, edit.time) if parts["time"] else None)
    change = ((how["scale"] - 1) * active + how["add"]) @ parts["decoder"].to(active) * unit
    return (edit.old + change).to(edit.old.dtype)
