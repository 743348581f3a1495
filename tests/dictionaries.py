"""Random sparse autoencoders in the files of other libraries, and what those libraries compute with them.

Written after the sources of SAELens 6, sparsify 1.3, overcomplete 0.3 and DifFRACT; it shares nothing with the library.
"""

import json

import torch
from diffusers.models.embeddings import get_timestep_embedding
from safetensors.torch import save_file
from torch.nn import functional as F

COUNT = 48  # features


def draw(width, seed=0):
    """Weights of an autoencoder by SAELens' names."""
    torch.manual_seed(seed)
    return {
        "W_enc": torch.randn(width, COUNT) / width**0.5,
        "b_enc": torch.randn(COUNT) * 0.1,
        "W_dec": torch.randn(COUNT, width) / width**0.5,
        "b_dec": torch.randn(width) * 0.1,
    }


def saelens(folder, width, architecture="standard", seed=0, drop=(), **settings):
    """Writes a folder as ``save_model`` does; returns its encoding and its reconstruction as functions."""
    weights = draw(width, seed)
    config = {
        "architecture": architecture,
        "d_in": width,
        "d_sae": COUNT,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.5.0", "hook_name": "blocks.1.img"},
        **settings,
    }
    if "jumprelu" in architecture:
        weights["threshold"] = torch.rand(COUNT)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: value for name, value in weights.items() if name not in drop}
    if "threshold" in drop:
        stored["log_threshold"] = weights["threshold"].log()
    save_file(stored, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))

    def normalised(x):
        if config["normalize_activations"] == "layer_norm":
            mean = x.mean(-1, keepdim=True)
            std = (x - mean).std(-1, keepdim=True)
            return (x - mean) / (std + 1e-5), std, mean
        if config["normalize_activations"] == "constant_norm_rescale":
            factor = width**0.5 / x.norm(dim=-1, keepdim=True)
            return x * factor, 1 / factor, 0
        return x, 1, 0

    def encode(x):
        given = normalised(x)[0] - weights["b_dec"] * (
            config["apply_b_dec_to_input"] and "transcoder" not in architecture
        )
        before = given @ weights["W_enc"] + weights["b_enc"]
        if config.get("rescale_acts_by_decoder_norm"):
            before = before * weights["W_dec"].norm(dim=-1)
        if architecture == "topk":
            values, places = before.topk(config["k"], dim=-1)
            return torch.zeros_like(before).scatter(-1, places, values.relu())
        return before.relu() * (before > weights["threshold"]) if "threshold" in weights else before.relu()

    def decode(codes, x, bias=1):
        if config.get("rescale_acts_by_decoder_norm"):
            codes = codes / weights["W_dec"].norm(dim=-1)
        _, size, mean = normalised(x)
        return (codes @ weights["W_dec"] + bias * weights["b_dec"]) * size + bias * mean

    return encode, decode


def sparsify(folder, width, *, transcode=False, k=6, **settings):
    """Writes a folder as ``save_to_disk`` does; returns its encoding and its reconstruction."""
    weights = draw(width)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {
        "encoder.weight": weights["W_enc"].T.contiguous(),
        "encoder.bias": weights["b_enc"],
        "W_dec": weights["W_dec"],
        "b_dec": weights["b_dec"],
    }
    save_file(stored, folder / "sae.safetensors")
    config = {
        "activation": "topk",
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": COUNT,
        "k": k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": transcode,
        "d_in": width,
    }
    (folder / "cfg.json").write_text(json.dumps({**config, **settings}))

    def encode(x):
        x = x if transcode else x - weights["b_dec"]
        values, places = F.relu(F.linear(x, stored["encoder.weight"], stored["encoder.bias"])).topk(k, sorted=False)
        return torch.zeros(*x.shape[:-1], COUNT).scatter(-1, places, values)

    return encode, lambda codes, _, bias=1: codes @ weights["W_dec"] + bias * weights["b_dec"]


def overcomplete(file, width, kind="TopKSAE", *, tied=False, k=5):
    """Writes what the two lines of the error make of a model; returns its encoding and its reconstruction."""
    weights = draw(width)
    dictionary = F.normalize(weights["W_dec"], dim=1)
    encoder, bias = (dictionary, torch.zeros(COUNT)) if tied else (weights["W_enc"].T.contiguous(), weights["b_enc"])
    stored = {
        "dictionary": dictionary,
        "dictionary._weights": dictionary.clone(),
        "dictionary.multiplier": torch.zeros(()),
    }
    if not tied:
        stored |= {"encoder.final_block.0.weight": encoder, "encoder.final_block.0.bias": bias}
    thresholds = torch.randn(COUNT) - 1
    if kind == "JumpSAE":
        stored |= {"thresholds": thresholds, "bandwidth": torch.tensor(1e-3)}
    if kind == "BatchTopKSAE":
        stored["running_threshold"] = torch.tensor(0.25)
    save_file(stored, file, {"overcomplete": kind, "top_k": str(k)})

    def encode(x):
        codes = (x @ encoder.T + bias).relu()
        if kind == "TopKSAE":
            values, places = codes.topk(k, dim=-1)
            return torch.zeros_like(codes).scatter(-1, places, values)
        above = {"JumpSAE": thresholds.exp(), "BatchTopKSAE": 0.25}.get(kind, 0)
        return codes * (codes >= above)

    return encode, lambda codes, _, bias=1: codes @ dictionary


def diffract(file, width, size=16):
    """Writes the state dict of a TemporalAwareTranscoder; returns its encoding, with the time, and its decoding."""
    torch.manual_seed(1)
    layers = {
        "time_mlp.0": torch.nn.Linear(size, size),
        "time_mlp.2": torch.nn.Linear(size, size),
        "mod_linear": torch.nn.Linear(size, 2 * width),
        "encoder": torch.nn.Linear(width, COUNT),
        "decoder": torch.nn.Linear(COUNT, width),
    }
    state = {
        f"{name}.{part}": getattr(layer, part).detach() for name, layer in layers.items() for part in ("weight", "bias")
    }
    save_file(state, file)

    @torch.no_grad()
    def encode(x, time):
        waves = get_timestep_embedding(torch.tensor([time], dtype=torch.float32), embedding_dim=size)
        scale, shift = layers["mod_linear"](F.silu(layers["time_mlp.2"](F.silu(layers["time_mlp.0"](waves))))).chunk(
            2, dim=-1
        )
        return layers["encoder"](x * (1 + scale) + shift).relu()

    return encode, lambda codes, _, bias=1: codes @ state["decoder.weight"].T + bias * state["decoder.bias"]
