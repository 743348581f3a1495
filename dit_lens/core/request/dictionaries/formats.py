"""Dictionaries in the files of SAELens, sparsify, overcomplete and DifFRACT, none of them imported, and in its own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_lens.arguments.checks import checked
from dit_lens.core.request.dictionaries.dictionary import FORMAT, PLAIN, Dictionary
from dit_lens.core.runs.files import check_regular, file_inside, read_json, report_damage
from dit_lens.errors import StoreError, nearest, show

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"  # SAELens
SPARSIFY = "sae.safetensors"  # beside a cfg.json, too
REMEDY = "Restore it from a copy, or save it again."
PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt")
CONVERT = """\
{file} is a pickle, which can run any code when it is read, so it is not read here. Where you trust it, convert it once.

A whole model of overcomplete:
    import torch; from safetensors.torch import save_file; sae = torch.load({name!r}, "cpu", weights_only=False).eval()
    save_file({{n: t.detach().clone().contiguous() for n, t in {{**vars(sae), **sae.state_dict(), "dictionary": \
sae.get_dictionary()}}.items() if torch.is_tensor(t)}}, {new!r}, {{"overcomplete": type(sae).__name__, \
"top_k": str(vars(sae).get("top_k"))}})

A state dict, as of DifFRACT:
    import torch; from safetensors.torch import save_file
    save_file({{n: t.contiguous() for n, t in torch.load({name!r}, map_location="cpu").items()}}, {new!r})"""

# SAELens: architecture -> activation; those called "...transcoder" write elsewhere
SAELENS = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
}
# overcomplete: class -> activation
OVERCOMPLETE = {
    "SAE": "relu",
    "TopKSAE": "topk",
    "RATopKSAE": "topk",
    "BatchTopKSAE": "jumprelu",
    "JumpSAE": "jumprelu",
    "RAJumpSAE": "jumprelu",
}
UNUSED = (
    "bandwidth",
    "dictionary._weights",
    "dictionary.multiplier",
    "dictionary.C",
    "dictionary.W",
    "dictionary.Relax",
)
ENCODERS = ("encoder.final_block.0", "encoder")  # its linear encoder, and the one that tied() and untied() make
DIFFRACT = {"time_mlp.0": "first", "time_mlp.2": "second", "mod_linear": "last"}


@checked
def load(path: str | Path, *, transcoder: bool | None = None) -> Dictionary:
    """Reads a trained dictionary.

    >>> import tempfile, torch
    >>> from dit_lens import dictionaries
    >>> axes = dictionaries.Dictionary(torch.eye(3), torch.zeros(3), torch.eye(3), torch.zeros(3))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     dictionaries.load(axes.save(f"{folder}/axes.safetensors"))
    Dictionary: sparse autoencoder of 3 channels, 3 features, relu

    path: a folder of SAELens (``cfg.json`` and ``sae_weights.safetensors``) or of sparsify (``cfg.json`` and
        ``sae.safetensors``); or a safetensors file of :meth:`Dictionary.save`, or of overcomplete or DifFRACT. These
        two save pickles, which are not read: the error has the two lines that convert one.
    transcoder: for DifFRACT, whether it is a transcoder (True) or an autoencoder (False) of the MLP's output, which
        look the same; by default what the file's name begins with says it, "transcoder_" or "sae_".

    Weights keep their type, and are computed with in float32. Raises StoreError for what is none, for a damaged file,
    and for an architecture that is not known, by its name.
    """
    path = Path(path)
    try:
        is_folder = path.is_dir()
    except (OSError, ValueError) as problem:  # a name that no file can have
        raise StoreError(f"{show(str(path))} cannot be read: {type(problem).__name__}.") from problem
    if is_folder:
        return _load_folder(path)
    file = check_regular(path)
    if not file.exists():
        raise StoreError(f"{path} does not exist. Name a folder of SAELens or sparsify, or a safetensors file.")
    if file.suffix in PICKLES:
        raise StoreError(CONVERT.format(file=file, name=file.name, new=file.with_suffix(".safetensors").name))
    if file.suffix != ".safetensors":
        raise StoreError(f"{path} is not a dictionary: a safetensors file is, or a folder of SAELens or sparsify.")
    tensors, about = _read_tensors(file)
    if "dictionary" in about:
        return _read_own(file, tensors, about["dictionary"])
    if "overcomplete" in about:
        return _read_overcomplete(file, tensors, about)
    if "mod_linear.weight" in tensors:
        return _read_diffract(file, tensors, transcoder)
    if file.name in (WEIGHTS, SPARSIFY):
        return _load_folder(file.parent)
    raise StoreError(
        f"{file} holds {_list(tensors)}, which is the layout of no library that is known here: SAELens and sparsify (a "
        f"folder with {CONFIG} and {WEIGHTS} or {SPARSIFY}), overcomplete, DifFRACT. Make it yourself: "
        "dictionaries.Dictionary(encoder, ...)."
    )


def load_reference(reference: Mapping[str, Any]) -> Dictionary:
    """The dictionary that the JSON of an op refers to; StoreError where the file holds another."""
    found = load(str(reference["dictionary"]), transcoder=bool(reference["transcoder"]))
    if found.checksum != reference["checksum"]:
        raise StoreError(
            f"{reference['dictionary']} holds another dictionary than the one that the op was written with."
        )
    return found


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a safetensors file holds, and its header."""
    from safetensors import safe_open

    with report_damage(file, REMEDY), safe_open(file, "pt") as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata() or {}  # noqa: SIM118 no mapping


def _read_own(file: Path, tensors: dict[str, Tensor], text: str) -> Dictionary:
    with report_damage(file, REMEDY):
        about = json.loads(text)
        if not isinstance(about, dict) or about.pop("format", None) != FORMAT or about.keys() != set(PLAIN):
            raise StoreError(f"{file} holds no dictionary that this version can read.")
        names = [f"{layer}.{part}" for layer in DIFFRACT.values() for part in ("weight", "bias")]
        time = {name: tensors.pop(f"time.{name}") for name in names if f"time.{name}" in tensors}
        given: dict[str, Any] = {**tensors, **about, "time": time}
        return Dictionary(**given).stored_in(file)


def _load_folder(folder: Path) -> Dictionary:
    """Of SAELens or sparsify, which call their weights differently."""
    library, read = ("sparsify", _read_sparsify) if (folder / SPARSIFY).exists() else ("SAELens", _read_saelens)
    if not (folder / CONFIG).exists():
        raise StoreError(f"{folder} is not a folder of {library}: it has no {CONFIG}.")
    about = read_json(file_inside(folder, CONFIG), f"the configuration of {library}")
    if not isinstance(about, dict):
        raise StoreError(f"{folder / CONFIG} is not the configuration of {library}.")
    weights = SPARSIFY if library == "sparsify" else WEIGHTS
    if not (folder / weights).exists():  # of sparsify neither, which is known by it
        raise StoreError(
            f"{folder} has {CONFIG} and no weights: {WEIGHTS} of SAELens, or {SPARSIFY} of sparsify. {REMEDY}"
        )
    tensors, _ = _read_tensors(file_inside(folder, weights))
    return read(folder, tensors, about)


def _read_sparsify(folder: Path, tensors: dict[str, Tensor], about: Mapping[str, Any]) -> Dictionary:
    """As ``SparseCoder.save_to_disk`` of EleutherAI's sparsify writes it, version 1."""
    kind = str(about.get("activation", "topk"))
    if kind != "topk":
        raise StoreError(f"{folder}: the activation {kind!r} of sparsify is not known here, only 'topk'.")
    if about.get("signed"):
        raise StoreError(f"{folder}: features of either sign (signed) are not known here.")
    transcoder = bool(about.get("transcode"))
    encoder, encoder_bias = _pop(folder, tensors, "encoder.weight"), _pop(folder, tensors, "encoder.bias")
    decoder, decoder_bias = _pop(folder, tensors, "W_dec"), _pop(folder, tensors, "b_dec")
    _refuse_others(folder, tensors)
    with report_damage(folder, REMEDY):
        return Dictionary(
            encoder.T.contiguous(),
            encoder_bias,
            decoder,
            decoder_bias,
            kind,
            k=about.get("k"),
            centred=not transcoder,
            transcoder=transcoder,
            origin=f"sparsify {'transcoder' if transcoder else 'autoencoder'}",
        ).stored_in(folder)


def _read_saelens(folder: Path, tensors: dict[str, Tensor], about: Mapping[str, Any]) -> Dictionary:
    """As ``SAE.save_model`` of SAELens writes it, versions 3 to 6."""
    kind = str(about.get("architecture", "standard"))
    if kind not in SAELENS:
        raise StoreError(f"{folder}: the architecture {kind!r} of SAELens is not known here.{nearest(kind, SAELENS)}")
    activation, transcoder = SAELENS[kind], kind.endswith("transcoder")
    _check_saelens(folder, about, activation)
    threshold = _pop_threshold(folder, tensors, activation)
    encoder, decoder = _pop(folder, tensors, "W_enc"), _pop(folder, tensors, "W_dec")
    encoder_bias, decoder_bias = _pop(folder, tensors, "b_enc"), _pop(folder, tensors, "b_dec")
    if (scaling := tensors.pop("scaling_factor", None)) is not None and not torch.all(scaling == 1):
        raise StoreError(f"{folder}: its features were scaled by finetuning (scaling_factor), which is not known here.")
    _refuse_others(folder, tensors)
    if activation == "topk" and about.get("rescale_acts_by_decoder_norm"):
        norm = decoder.norm(dim=-1)  # as if the decoder had been normalised: a' = a |d|, d' = d / |d|
        encoder, encoder_bias, decoder = encoder * norm, encoder_bias * norm, decoder / norm[:, None]
    k = about.get("k", (about.get("activation_fn_kwargs") or {}).get("k")) if activation == "topk" else None
    with report_damage(folder, REMEDY):
        return Dictionary(
            encoder,
            encoder_bias,
            decoder,
            decoder_bias,
            activation,
            threshold,
            k,
            centred=bool(about.get("apply_b_dec_to_input", True)) and not transcoder,
            normalisation=_normalisation(about),
            transcoder=transcoder,
            origin=f"SAELens {kind}, {_hook_name(about)}",
        ).stored_in(folder)


def _normalisation(about: Mapping[str, Any]) -> Any:
    """Of SAELens: versions before 3.2 had True and False."""
    given = about.get("normalize_activations") or "none"
    return "expected_average_only_in" if given is True else given


def _hook_name(about: Mapping[str, Any]) -> str:
    kept = about.get("metadata")
    kept = kept if isinstance(kept, Mapping) else about
    return str(kept.get("hook_name") or "no hook named")


def _check_saelens(folder: Path, about: Mapping[str, Any], activation: str) -> None:
    """StoreError for settings that change what is computed, and are not known here."""
    if _normalisation(about) == "expected_average_only_in":
        raise StoreError(
            f"{folder} was trained on activations scaled to an average norm, and its files do not hold the factor. "
            "Fold it in SAELens: sae.fold_activation_norm_scaling_factor(factor), then sae.save_model(folder)."
        )
    if about.get("finetuning_scaling_factor"):
        raise StoreError(f"{folder}: finetuning_scaling_factor is not known here.")
    given = str(about.get("activation_fn", about.get("activation_fn_str", "relu")))
    if given not in ("relu", activation):
        raise StoreError(f"{folder}: the activation {given!r} of an architecture of {activation!r} is not known here.")


def _pop_threshold(folder: Path, tensors: dict[str, Tensor], activation: str) -> Tensor | None:
    if activation != "jumprelu":
        return None
    return tensors.pop("log_threshold").exp() if "log_threshold" in tensors else _pop(folder, tensors, "threshold")


def _read_overcomplete(file: Path, tensors: dict[str, Tensor], about: Mapping[str, str]) -> Dictionary:
    """What the two lines for overcomplete keep of a model in evaluation mode."""
    kind = about["overcomplete"]
    if kind not in OVERCOMPLETE:
        raise StoreError(
            f"{file}: the class {show(kind)} of overcomplete is not known here.{nearest(kind, OVERCOMPLETE)}"
        )
    decoder = _pop(file, tensors, "dictionary")
    count, width = decoder.shape
    encoder, bias = decoder, torch.zeros(count).to(decoder)  # tied
    for name in ENCODERS:
        encoder = tensors.pop(f"{name}.weight", encoder)
        bias = tensors.pop(f"{name}.bias", bias)
    threshold = None
    if OVERCOMPLETE[kind] == "jumprelu":
        above = _pop(file, tensors, "thresholds" if kind.endswith("JumpSAE") else "running_threshold")
        above = above.exp() if kind.endswith("JumpSAE") else above
        # It keeps what is at the threshold, too: what is above the next smaller number.
        threshold = torch.nextafter(above.expand(count), torch.tensor(-torch.inf).to(above)).clone()
    for name in [one for one in tensors if one in UNUSED or one.startswith("encoder.tied_to.")]:
        del tensors[name]
    _refuse_others(file, tensors)
    with report_damage(file, REMEDY):
        k = int(about["top_k"]) if OVERCOMPLETE[kind] == "topk" else None
        zeros = torch.zeros(width).to(decoder)
        return Dictionary(
            encoder.T.contiguous(),
            bias,
            decoder,
            zeros,
            OVERCOMPLETE[kind],
            threshold,
            k,
            centred=False,
            origin=f"overcomplete {kind}",
        ).stored_in(file)


def _read_diffract(file: Path, tensors: dict[str, Tensor], transcoder: bool | None) -> Dictionary:
    """The state dict of a TemporalAwareTranscoder (arXiv 2606.15796), or of the autoencoder of the same layers."""
    named = {"transcoder": True, "sae": False}.get(file.name.split("_")[0])
    if (transcoder := named if transcoder is None else transcoder) is None:
        raise StoreError(
            f"{file} is of DifFRACT, whose transcoders and autoencoders look the same. Say which it is: "
            "load(path, transcoder=True)."
        )
    time = {
        f"{layer}.{part}": _pop(file, tensors, f"{name}.{part}")
        for name, layer in DIFFRACT.items()
        for part in ("weight", "bias")
    }
    encoder, decoder = _pop(file, tensors, "encoder.weight"), _pop(file, tensors, "decoder.weight")
    biases = [_pop(file, tensors, f"{name}.bias") for name in ("encoder", "decoder")]
    _refuse_others(file, tensors)
    with report_damage(file, REMEDY):
        return Dictionary(
            encoder.T.contiguous(),
            biases[0],
            decoder.T.contiguous(),
            biases[1],
            centred=False,
            time=time,
            transcoder=transcoder,
            origin="DifFRACT",
        ).stored_in(file)


def _pop(where: Path, tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise StoreError(f"{where} has no {name}; it holds {_list(tensors)}. {REMEDY}")
    return tensors.pop(name)


def _refuse_others(where: Path, tensors: Mapping[str, Tensor]) -> None:
    """Weights that nobody uses would be an architecture that is computed wrongly."""
    if tensors:
        raise StoreError(f"{where} also holds {_list(tensors)}: an architecture that is not known here.")


def _list(names: Iterable[str]) -> str:
    some = sorted(names)
    return ", ".join(some[:6]) + (" ..." if len(some) > 6 else "")
