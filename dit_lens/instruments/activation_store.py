"""Activations of many images as safetensors files, for libraries that train dictionaries.

Letters: s step, b row, n token, d channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dit_lens.arguments.lists import as_prompts, as_seeds
from dit_lens.core.request.ops import Read
from dit_lens.core.request.token_set import TokenSet
from dit_lens.core.runs.files import check_folder, check_regular, read_json, report_damage, write_bytes, write_json
from dit_lens.core.runs.provenance import describe, to_plain_data
from dit_lens.errors import OpError, StoreError

if TYPE_CHECKING:
    from dit_lens.core.plan.outline import Outline
    from dit_lens.core.request.ops import Pattern, Steps
    from dit_lens.core.runs.run import Run
    from dit_lens.core.session import Session

MARK, FORMAT = "activations.json", 1
LABELS = ("prompt", "seed", "step", "token", "sigma")  # of every activation
REMEDY = "Delete this file, and the same call makes it again; the others stay."


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which tokens are kept.

    sites: their names.
    tokens: how many of every image and step.
    steps: of the run.
    outline: of a run of one prompt.
    """

    sites: Sequence[str]
    tokens: int
    steps: Sequence[int]
    outline: Outline

    def kept(self, site: str) -> int:
        """How many tokens of every image and step a shard has; of text, at most."""
        count = self.counted(site)
        return self.tokens if count is None else min(self.tokens, count)

    def counted(self, site: str) -> int | None:
        """How many tokens a site has, where they are all of the image and known beforehand."""
        return None if ".txt" in site else self.outline.tokens("img")

    def reads(self, rng: np.random.Generator) -> list[Read]:
        """One read for each site: of random tokens, others at every step; of all where they are not known."""
        found = []
        for site in self.sites:
            count, chosen = self.counted(site), None
            if count is not None and count > self.tokens:
                drawn = [np.sort(rng.permutation(count)[: self.tokens]).tolist() for _ in range(self.outline.steps)]
                chosen = TokenSet({site: drawn})
            found.append(Read(site, tokens=chosen, steps=list(self.steps)))
        return found


def export(
    lens: Session,
    sites: Pattern,
    prompts: str | Sequence[str],
    out: Path,
    *,
    tokens: int,
    steps: Steps,
    seeds: int | Sequence[int],
    shard: int,
    batch_size: int,
    shuffle: int,
    **call: Any,
) -> Path:
    """See :meth:`dit_lens.DiTLens.export`."""
    prompts, seeds = as_prompts(prompts), as_seeds(seeds)
    for name, number in (("tokens", tokens), ("shard", shard), ("batch_size", batch_size)):
        if number < 1:
            raise OpError(f"export: {name}={number} is to be 1 or more.")
    if shuffle < 0:
        raise OpError(f"export: shuffle={shuffle} is to be 0 or more.")
    call = {"output_type": "latent", **call}
    outline, names = lens.outline(prompts[0], **call), lens.sites(sites)
    sampling = Sampling(sites=names, tokens=tokens, steps=outline.select(steps), outline=outline)
    if vectors := [name for name in names if ".mod." in name]:
        raise OpError(f"{vectors[0]} is one vector for each image, not tokens. Export sites of tokens.")
    cost = lens.cost(prompts[0], sampling.reads(np.random.default_rng(0)), **call)  # which checks all of it

    pairs = [(prompt, seed) for prompt in range(len(prompts)) for seed in seeds]
    order = np.random.default_rng(shuffle).permutation(len(pairs)).tolist()
    size = max(1, shard // (max(map(sampling.kept, names)) * len(sampling.steps)))  # images of a shard
    groups = [[pairs[i] for i in order[start : start + size]] for start in range(0, len(order), size)]
    widths = {name: lens.anatomy.channels(lens.anatomy.site(name)) for name in names}
    model = {**describe(lens.pipe, lens.family), **lens.engine.provenance}
    about = {
        "format": FORMAT,
        "sites": widths,
        "prompts": prompts,
        "seeds": seeds,
        "tokens": {name: sampling.kept(name) for name in names},
        "steps": list(sampling.steps),
        "shard": shard,
        "batch_size": batch_size,
        "shuffle": shuffle,
        "shards": len(groups),
        "call": to_plain_data(call),
        "model": {name: model.get(name) for name in ("family", "model", "revision", "dtype", "weights")},
    }
    check_folder(out, MARK, cost.bytes * len(pairs))
    _begin(out, about)
    places = [{name: out / name / f"{number:05d}.safetensors" for name in names} for number in range(len(groups))]
    for files, group in zip(places, groups, strict=True):
        for name, file in files.items():
            if file.exists():
                _check_shard(file, widths[name], len(group), sampling, name)
    with lens.quiet():
        for number, (files, group) in enumerate(zip(tqdm(places, desc="shards"), groups, strict=True)):
            if not all(file.exists() for file in files.values()):
                rng = np.random.default_rng([shuffle, number])
                for name, content in _draw_group(lens, prompts, group, sampling, batch_size, rng, call).items():
                    _write_shard(files[name], content, rng)
    return out


def _begin(out: Path, about: Mapping[str, Any]) -> None:
    """Writes what the folder holds; StoreError where it holds another export."""
    if not (out / MARK).exists():
        write_json(out / MARK, about)
        return
    there = read_json(out / MARK, "an export of activations")
    if not isinstance(there, dict) or there.get("format") != FORMAT:
        raise StoreError(f"{out} holds no export that this version can go on with. Choose another folder.")
    if differing := [name for name in about if there.get(name) != about[name]]:
        raise StoreError(
            f"{out} holds another export: its {', '.join(differing)} differ. Choose another folder or ask for the same."
        )


def _check_shard(file: Path, width: int, images: int, sampling: Sampling, site: str) -> None:
    """StoreError where a file is not a whole shard by its header, which is all that is read.

    width: channels of the site.
    images: that it is of.
    sampling, site: which tokens are kept, of which site.
    """
    from safetensors import safe_open

    with report_damage(file, REMEDY), safe_open(check_regular(file), "pt") as stored:  # which checks the file's size
        shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118 no mapping
    count = next(iter(shapes.get("activations", ())), 0)
    most = images * len(sampling.steps) * sampling.kept(site)
    fits = count <= most if sampling.counted(site) is None else count == most
    if not fits or shapes != {"activations": (count, width), **dict.fromkeys(LABELS, (count,))}:
        raise StoreError(
            f"{file} is not the shard that this export wrote: it holds "
            f"{', '.join(f'{name} {list(shape)}' for name, shape in shapes.items())}. {REMEDY}"
        )


def _draw_group(
    lens: Session,
    prompts: Sequence[str],
    group: Sequence[tuple[int, int]],
    sampling: Sampling,
    batch_size: int,
    rng: np.random.Generator,
    call: Mapping[str, Any],
) -> dict[str, list[dict[str, Tensor]]]:
    """Site -> what every run of a group of images kept.

    lens, prompts, call: as of export.
    group: of each image its prompt and its seed.
    sampling: which tokens are kept.
    batch_size: images of a run.
    rng: of the tokens.
    """
    found: dict[str, list[dict[str, Tensor]]] = {name: [] for name in sampling.sites}
    for start in range(0, len(group), batch_size):
        some = group[start : start + batch_size]
        reads = sampling.reads(rng)
        run = lens.run([prompts[i] for i, _ in some], reads, seed=[seed for _, seed in some], **call)
        for name, read in zip(sampling.sites, reads, strict=True):
            chosen = read.tokens[name] if isinstance(read.tokens, TokenSet) else None
            found[name].append(take_tokens(run, name, chosen, some, sampling, rng))
    return found


def take_tokens(
    run: Run,
    name: str,
    chosen: Sequence[Sequence[int]] | None,
    some: Sequence[tuple[int, int]],
    sampling: Sampling,
    rng: np.random.Generator,
) -> dict[str, Tensor]:
    """The activations [token, d] of one site of a run, and where each is from.

    run, name: the run and the site.
    chosen: the tokens that it read at every step; None where it read all, of which random ones are kept now.
    some: prompts and seeds of its rows.
    sampling, rng: which tokens are kept.
    """
    reading = run.reading(name)
    value = reading.tensors[name].as_subclass(Tensor)  # [s, b, n, d]
    s, b, n, _ = value.shape
    if chosen is None:
        scores = torch.from_numpy(rng.random((s, b, n)))
        if (mask := reading.masks.get(name)) is not None:
            scores = scores.masked_fill(~mask, -1)  # what the pipeline masks is no data
        kept = scores.topk(min(sampling.tokens, n), dim=-1)
        tokens, data = kept.indices, kept.values >= 0
        value = value.gather(2, tokens[..., None].expand(-1, -1, -1, value.shape[-1]))
    else:
        tokens = torch.tensor([chosen[step] for step in sampling.steps])[:, None].expand(s, b, n)
        data = torch.ones_like(tokens, dtype=torch.bool)
    per = torch.tensor(some)
    labels = {
        "prompt": per[None, :, None, 0].expand_as(tokens),
        "seed": per[None, :, None, 1].expand_as(tokens),
        "step": torch.tensor(sampling.steps)[:, None, None].expand_as(tokens),
        "token": tokens,
    }
    sigmas = torch.tensor([run.sigmas[step] for step in sampling.steps])[:, None, None].expand_as(tokens)
    return {"activations": value[data], "sigma": sigmas[data]} | {key: label[data] for key, label in labels.items()}


def _write_shard(file: Path, content: Sequence[Mapping[str, Tensor]], rng: np.random.Generator) -> None:
    """Writes the activations of a group of images in random order, whole or not at all."""
    from safetensors.torch import save

    joined = {key: torch.cat([one[key] for one in content]) for key in content[0]}
    order = torch.from_numpy(rng.permutation(len(joined["activations"])))
    write_bytes(file, save({key: value[order].contiguous() for key, value in joined.items()}))
