"""A dictionary of features: a trained sparse autoencoder or transcoder, whichever library trained it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from dit_lens.arguments.checks import checked, checked_fields
from dit_lens.core.request.dictionaries.encode import Parts, encode
from dit_lens.core.request.indices import to_indices
from dit_lens.core.runs.files import write_bytes
from dit_lens.errors import OpError, check_choice, show

FORMAT = 1
ACTIVATIONS = ("relu", "jumprelu", "topk")
NORMALISATIONS = ("none", "layer_norm", "constant_norm_rescale")
LAYERS = ("first.weight", "first.bias", "second.weight", "second.bias", "last.weight", "last.bias")
TENSORS = ("encoder", "encoder_bias", "decoder", "decoder_bias", "threshold")
PLAIN = ("activation", "k", "centred", "normalisation", "transcoder", "origin")


@checked_fields
@dataclass(frozen=True, eq=False, repr=False)
class Dictionary:
    """Directions that hidden states are made of, each with an encoder that tells how much of it is in a token.

    >>> import torch
    >>> from dit_lens.dictionaries import Dictionary
    >>> axes = Dictionary(torch.eye(3), torch.zeros(3), torch.eye(3), torch.zeros(3))
    >>> axes.encode(torch.tensor([[2.0, -1.0, 0.5]]))
    tensor([[2.0000, 0.0000, 0.5000]])

    x is encoded as a = activation((x - decoder_bias) encoder + encoder_bias), and reconstructed as a decoder +
    decoder_bias. :func:`~dit_lens.dictionaries.load` reads what other libraries train; :class:`~dit_lens.Feature` and
    :class:`~dit_lens.ReadFeatures` use it in runs.

    encoder: [d, f] for d channels and f features.
    encoder_bias: [f].
    decoder: [f, d]; of a transcoder as many channels as it writes.
    decoder_bias: [d].
    activation: "relu"; "jumprelu", which is 0 up to the ``threshold``; "topk", the ``k`` largest of a token.
    threshold: [f].
    k: how many features of a token are active at most.
    centred: whether the decoder's bias is subtracted from what is encoded.
    normalisation: of every token before it is encoded: "none", "layer_norm" or "constant_norm_rescale", as SAELens
        has them; what is decoded is scaled back.
    time: weights of the three layers by which the noise level modulates what is encoded (DifFRACT); none by default.
    transcoder: whether it encodes what enters an MLP, and decodes what leaves it.
    origin: where it is from, in words.
    file: where it is stored, as ops in JSON say it; None where it is in no file.
    """

    encoder: Tensor
    encoder_bias: Tensor
    decoder: Tensor
    decoder_bias: Tensor
    activation: str = "relu"
    threshold: Tensor | None = None
    k: int | None = None
    centred: bool = True
    normalisation: str = "none"
    time: Mapping[str, Tensor] = field(default_factory=dict)
    transcoder: bool = False
    origin: str = ""
    file: Path | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        check_choice(self.activation, ACTIVATIONS, "activation")
        check_choice(self.normalisation, NORMALISATIONS, "normalisation")
        if self.encoder.ndim != 2 or self.decoder.ndim != 2:
            raise OpError("a Dictionary takes encoder [channel, feature] and decoder [feature, channel].")
        width, count = self.encoder.shape
        shapes = {"encoder_bias": (count,), "decoder": (count, self.writes), "decoder_bias": (self.writes,)}
        if (self.threshold is not None) != (self.activation == "jumprelu"):
            raise OpError("a threshold goes with activation='jumprelu', and with no other.")
        if (self.k is not None) != (self.activation == "topk") or not 1 <= (1 if self.k is None else self.k) <= count:
            raise OpError(
                f"k={self.k} does not go with {self.activation!r} of {count} features: topk takes 1 to {count}."
            )
        shapes |= {"threshold": (count,)} if self.threshold is not None else {}
        if not self.transcoder and self.writes != width:
            raise OpError(f"it encodes {width} channels and decodes {self.writes}, which only a transcoder does.")
        if self.centred and self.transcoder:
            raise OpError("a transcoder's bias is of what it writes, so it is not centred. Pass centred=False.")
        self._check_time(width)
        for name, shape in shapes.items():
            if tuple(getattr(self, name).shape) != shape:
                raise OpError(f"{name} has shape {list(getattr(self, name).shape)}, and is to have {list(shape)}.")
        for name, tensor in self.tensors.items():
            if not tensor.is_floating_point() or tensor.element_size() < 2 or not tensor.isfinite().all():
                raise OpError(f"{name} holds what is no finite number of 16 bits or more ({tensor.dtype}).")

    def _check_time(self, width: int) -> None:
        if not self.time:
            return
        if tuple(self.time) != LAYERS:
            raise OpError(f"time= takes {', '.join(LAYERS)}; it was given {', '.join(self.time)}.")
        size = self.time["first.weight"].shape[-1]
        wanted = [(size, size), (size,), (size, size), (size,), (2 * width, size), (2 * width,)]
        if [tuple(one.shape) for one in self.time.values()] != wanted or size < 4 or size % 2:
            raise OpError(f"the layers of time= have shapes {[list(one.shape) for one in self.time.values()]}.")

    @property
    def width(self) -> int:
        """How many channels it encodes."""
        return self.encoder.shape[0]

    @property
    def writes(self) -> int:
        """How many channels it decodes."""
        return self.decoder.shape[-1]

    def __len__(self) -> int:
        """How many features it has."""
        return self.encoder.shape[1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All its tensors by name."""
        own = {name: getattr(self, name) for name in TENSORS}
        return {name: one for name, one in own.items() if one is not None} | {
            f"time.{name}": one for name, one in self.time.items()
        }

    def choose(self, features: int | Sequence[int] | None) -> list[int]:
        """Features by their numbers; None for all. OpError where there is no such feature."""
        if features is None:
            return list(range(len(self)))
        found = to_indices(features, len(self), "feature", "this dictionary has", "features")
        if not found:
            raise OpError("features=[] chooses no feature. Leave the op out, or name some.")
        return found

    def parts(self, features: Sequence[int]) -> Parts:
        """Itself as plain data, as far as some features need it: all encoders where features compete."""
        chosen, compete = torch.as_tensor(features), self.k is not None
        some = slice(None) if list(features) == list(range(len(self))) else chosen
        encoded = slice(None) if compete else some
        return {
            "encoder": self.encoder[:, encoded],
            "encoder_bias": self.encoder_bias[encoded],
            "threshold": None if self.threshold is None else self.threshold[encoded],
            "decoder": self.decoder[some],
            "decoder_bias": self.decoder_bias,
            "k": self.k,
            "chosen": chosen if compete else None,
            "centred": self.centred,
            "normalisation": self.normalisation,
            "time": dict(self.time),
            "transcoder": self.transcoder,
        }

    @checked
    def encode(self, x: Tensor, features: int | Sequence[int] | None = None, *, sigma: float | None = None) -> Tensor:
        """How much of features is in tokens, [..., f].

        x: hidden states [..., d].
        features: by number, in their order; all by default.
        sigma: the noise level, for a dictionary that depends on it.
        """
        return encode(self.parts(self.choose(features)), self._check_input(x, sigma), sigma)[0]

    @checked
    def reconstruct(self, x: Tensor, *, sigma: float | None = None) -> Tensor:
        """What it makes of tokens, [..., d]: the sum of all their features, and the bias. x, sigma: as of encode."""
        active, unit = encode(self.parts(range(len(self))), self._check_input(x, sigma), sigma)
        made = (active @ self.decoder.to(active) + self.decoder_bias.to(active)) * unit
        shifted = self.normalisation == "layer_norm" and not self.transcoder
        return made + x.to(made).mean(-1, keepdim=True) if shifted else made

    def _check_input(self, x: Tensor, sigma: float | None) -> Tensor:
        if not x.ndim or x.shape[-1] != self.width:
            raise OpError(f"x has shape {list(x.shape)}, and this dictionary encodes {self.width} channels.")
        if self.time and sigma is None:
            raise OpError("this dictionary depends on the noise level. Pass sigma=, such as run.sigmas[step].")
        return x if x.is_floating_point() and x.element_size() > 1 else x.float()

    @cached_property
    def checksum(self) -> str:
        """Of its tensors: another for another dictionary."""
        found = hashlib.sha256(repr([getattr(self, name) for name in PLAIN[:-1]]).encode())
        for name, tensor in self.tensors.items():
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return found.hexdigest()

    def reference(self) -> dict[str, Any]:
        """How an op's JSON refers to it: by the file it is stored in, and its checksum."""
        if self.file is None:
            raise OpError(
                "an op uses a dictionary that is in no file, so the op has no JSON form. Save it: save(file)."
            )
        return {"dictionary": str(self.file), "checksum": self.checksum, "transcoder": self.transcoder}

    @checked
    def save(self, file: str | Path) -> Path:
        """Writes one safetensors file, whole or not at all; ops that use it refer to that from then on."""
        from safetensors.torch import save

        about = {"format": FORMAT, **{name: getattr(self, name) for name in PLAIN}}
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.tensors.items()}
        written = write_bytes(Path(file), save(tensors, metadata={"dictionary": json.dumps(about)}))
        object.__setattr__(self, "file", written)
        return written

    def stored_in(self, file: Path | None) -> Self:
        """Itself, with the file that it is in."""
        object.__setattr__(self, "file", file)
        return self

    def __repr__(self) -> str:
        kind = "transcoder" if self.transcoder else "sparse autoencoder"
        how = f"top {self.k}" if self.k is not None else self.activation
        return f"Dictionary: {kind} of {self.width} channels, {len(self)} features, {how}" + (
            f" ({show(self.origin).strip(chr(39))})" if self.origin else ""
        )
