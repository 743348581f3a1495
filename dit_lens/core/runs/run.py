"""What a run leaves behind: images, reads, a receipt, and all it takes to run it again. Loads without the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from dit_lens.analysis.arrays import to_numpy
from dit_lens.arguments.checks import checked
from dit_lens.arguments.mappings import NamedMapping
from dit_lens.core.runs.files import (
    file_inside,
    find_folder,
    read_image,
    read_versioned,
    report_damage,
    whole_folder,
    write_json,
)
from dit_lens.core.runs.html import run_html
from dit_lens.core.runs.reading import Reading
from dit_lens.core.runs.receipt import Receipt, count_sites
from dit_lens.core.runs.record import RUN, check_record
from dit_lens.errors import OpError, SiteError, nearest, show
from dit_lens.old_names import OldName

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from PIL.Image import Image
    from torch import nn


FORMAT = 1
FILES = r"run\.json|(reads|latents)\.safetensors|images/\d{3,}\.png"  # what a saved run has


class Reruns(Protocol):
    """Something that can repeat a run: a lens."""

    def rerun(self, run: Run) -> Any: ...


@dataclass(frozen=True, eq=False, repr=False)
class Recording:
    """What the transformer answered in every forward pass of a run without edits.

    call: copies of the prompts, seeds and arguments it was called with.
    state: what else decided the answers: weights, adapters, the scheduler, settings and functions.
    transformer: the model that answered.
    answers: one for each forward pass, as the pipeline received them, on the model's device.
    given: for each forward pass the arguments of the transformer, by name: numbers that change with any bit of them.
    sums: texts that change with any bit of the answers.
    passing: what of the state the run changed by itself.
    """

    call: dict[str, Any]
    state: dict[str, Any]
    transformer: nn.Module
    answers: list[Any]
    given: list[dict[str, list[Any]]]
    sums: list[str]
    passing: list[str]

    def __deepcopy__(self, memo: dict[int, Any]) -> Recording:
        """Itself: it stands for the live model, and nothing changes it."""
        return self

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """None: a pickle holds no live model, so a run is pickled as it is saved, without its recording."""
        return type(None), ()


@dataclass
class Run(NamedMapping[Any]):
    """Images and numbers of one run; a mapping of its reads, key -> tensor (or site -> tensor of a named read).

    images: PIL images in row order (empty when latents were asked for).
    latents: what the pipeline returned for ``output_type="latent"``.
    readings: what was read.
    receipt: what every op touched.
    clock: (step, timestep, sigma) of every step.
    grid: (h, w) image tokens, (f, h, w) of a video.
    spec: prompt, seed, call and ops.
    provenance: model, machine and versions.
    folder: where it was saved.
    recording: what ``prefix=`` needs, where it was recorded; it is not saved.
    """

    images: list[Image]
    latents: Tensor | None
    readings: list[Reading]
    receipt: Receipt
    clock: list[tuple[int, float, float]]
    grid: tuple[int, ...]
    spec: dict[str, Any]
    provenance: dict[str, Any]
    folder: Path | None = None
    recording: Recording | None = field(default=None, repr=False)

    tape = OldName("recording")

    def __post_init__(self) -> None:
        """Reads keep what they need to be used elsewhere: what was asked, under how much noise, and of which model."""
        asked = {name: self.spec.get(name) for name in ("prompt", "call")}
        levels = tuple(self.sigmas)
        family = self.provenance["family"]
        self.readings = [replace(reading, call=asked, levels=levels, family=family) for reading in self.readings]

    def __getitem__(self, key: str) -> Any:
        """A read by its name (a mapping site -> tensor), or the tensor of a site that was read without a name."""
        if not isinstance(key, str):
            raise SiteError(f"this run has no read {show(key)}.{nearest(key, self)}")
        for reading in self.readings:
            if reading.name == key:
                return reading
        for reading in self.readings:
            if not reading.name and key in reading.tensors:
                return reading[key]
        raise SiteError(f"this run has no read {key!r}.{nearest(key, self)}")

    def __iter__(self) -> Iterator[str]:
        """The names under which reads are kept."""
        return (key for reading in self.readings for key in ([reading.name] if reading.name else reading.tensors))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __bool__(self) -> bool:
        """A run without reads has images all the same."""
        return True

    @checked
    def reading(self, site: str) -> Reading:
        """The first read that holds a site, whole tokens before reduced ones."""
        for reading in sorted(self.readings, key=lambda reading: reading.reduce is not None):
            if site in reading.tensors:
                return reading
        known = [name for reading in self.readings for name in reading.tensors]
        raise OpError(
            f"the source run never read {site}.{nearest(site, known) if known else ' It holds no reads.'} Run it again "
            f"with Read({site!r})."
        )

    @property
    def timesteps(self) -> list[float]:
        """What the scheduler's clock showed at every step, as the transformer received it."""
        return [timestep for _, timestep, _ in self.clock]

    @property
    def sigmas(self) -> list[float]:
        """The noise level of every step: 1 is noise, 0 a clean image."""
        return [sigma for _, _, sigma in self.clock]

    def numpy(self) -> dict[str, Any]:
        """Every read as numpy arrays: key -> array, or key -> site -> array if named.

        What numpy does not have, such as bfloat16, becomes float32.
        """
        return {
            key: {site: _array(value) for site, value in found.items()} if isinstance(found, Reading) else _array(found)
            for key in self
            for found in [self[key]]
        }

    def to_pandas(self) -> pd.DataFrame:
        """Every read that was reduced over tokens, one line per number.

        Columns: read, site, step, sigma, branch, row, channel, value (and bin, for reductions with several values).
        """
        import pandas as pd

        frames = [
            _long_form(reading, site, self.sigmas)
            for reading in self.readings
            if reading.reduce
            for site in reading.tensors
        ]
        if not frames:
            raise OpError(
                "this run has no read that was reduced over tokens. "
                "Read with reduce='mean' (or another), or use .numpy()."
            )
        return pd.concat(frames, ignore_index=True)

    @checked
    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Writes the run into a new folder: run.json, reads.safetensors, latents.safetensors, images/000.png ...

        overwrite: whether a run that is there already is replaced; other files in its folder stay.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        with whole_folder(folder, mark="run.json", own=FILES, overwrite=overwrite) as fresh:
            tensors = {
                f"{i}/{site}": value.contiguous()
                for i, r in enumerate(self.readings)
                for site, value in r.tensors.items()
            }
            tensors |= {f"{i}/mask/{site}": mask for i, r in enumerate(self.readings) for site, mask in r.masks.items()}
            save_file(tensors, fresh / "reads.safetensors")
            if self.latents is not None:
                save_file({"latents": self.latents.contiguous()}, fresh / "latents.safetensors")
            (fresh / "images").mkdir()
            for i, image in enumerate(self.images):
                image.save(fresh / "images" / f"{i:03d}.png")
            write_json(fresh / "run.json", self._to_json())
        self.folder = folder
        return folder

    @classmethod
    @checked
    def load(cls, folder: str | Path) -> Run:
        """Reads what :meth:`save` wrote; needs no model."""
        from safetensors.torch import load_file

        folder = find_folder(folder)
        data = read_versioned(folder / "run.json", "run", FORMAT)
        with report_damage(folder, "Restore it from a copy, or run it again."):
            check_record(data, RUN, "run.json")
            clock = [(step, timestep, level) for step, timestep, level in data["clock"]]
            tensors = load_file(file_inside(folder, "reads.safetensors"))
            latents = load_file(file_inside(folder, "latents.safetensors"))["latents"] if data["latents"] else None
            images = [read_image(folder, f"{i:03d}.png", under="images") for i in range(data["images"])]
            readings = [_reading_from(i, record, tensors) for i, record in enumerate(data["readings"])]
            if any(step >= len(clock) for reading in readings for step in reading.steps):
                raise ValueError(f"a read is of a step that the clock does not show, which has {len(clock)}")
            return cls(
                images=images,
                latents=latents,
                readings=readings,
                receipt=Receipt.from_json(data["receipt"]),
                clock=clock,
                grid=tuple(data["grid"]),
                spec=dict(data["spec"]),
                provenance=dict(data["provenance"]),
                folder=folder,
            )

    def rerun(self, lens: Reruns) -> Any:
        """Runs the same prompt, seed, call and ops on a lens; ``.differences`` and ``.table`` say what differs."""
        return lens.rerun(self)

    def reference(self) -> dict[str, str]:
        """How an op's JSON refers to this run: by the folder it was saved in."""
        if self.folder is None:
            raise OpError(
                "an op takes its values from a run that was not saved, so the op has no JSON form. "
                "Call run.save(folder) first."
            )
        return {"run": str(self.folder)}

    def _to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "spec": self.spec,
            "provenance": self.provenance,
            "grid": self.grid,
            "clock": self.clock,
            "images": len(self.images),
            "latents": self.latents is not None,
            "readings": [reading.to_json() for reading in self.readings],
            "receipt": self.receipt.to_json(),
        }

    def __repr__(self) -> str:
        prompts = self.spec.get("prompt") or ["(embeddings)"] * len(self.spec.get("seed") or [None])
        made = f"{len(self.images)} images" if self.images else "latents"
        return (
            f"Run: {made} of {len(prompts)} prompts, {len(self.clock)} steps, grid {' x '.join(map(str, self.grid))}, "
            f"{self.provenance['family']}\n"
            f"  prompt  {prompts[0]!r}{' ...' if len(prompts) > 1 else ''}\n"
            f"  seed    {self.spec.get('seed')}\n"
            f"  reads   {', '.join(list(self)[:6]) or 'none'}{' ...' if len(self) > 6 else ''}\n"
            f"  edits   {count_sites(self.receipt.entries)} (see .receipt)"
        )

    def _repr_html_(self) -> str:
        _, *lines = repr(self).splitlines()
        return run_html(self.images, [(line[2:10].strip(), line[10:]) for line in lines])


def _array(value: Tensor) -> np.ndarray:
    return to_numpy(value.as_subclass(Tensor))


def _reading_from(number: int, record: dict[str, Any], tensors: dict[str, Tensor]) -> Reading:
    """A reading as it was saved."""
    named = {site: tensors[f"{number}/{site}"] for site in record["sites"]}
    masks = {f"mask/{site}": tensors[f"{number}/mask/{site}"] for site in record.get("masks", ())}
    return Reading.from_json(record, named | masks)


def _long_form(reading: Reading, site: str, sigmas: list[float]) -> pd.DataFrame:
    import numpy as np
    import pandas as pd

    frames = []
    for branch, value in reading.by_branch(site).items():
        array = _array(value)
        kept = reading.channels[site]
        ranked = array[..., 1].ravel().astype(int) if reading.is_ranked else None
        array = array if ranked is None else array[..., 0]
        axes = np.indices(array.shape).reshape(array.ndim, -1)
        channel = axes[2] if ranked is None else ranked
        columns = {
            "read": reading.name or site,
            "site": site,
            "step": np.asarray(reading.steps)[axes[0]],
            "sigma": np.asarray([sigmas[step] for step in reading.steps])[axes[0]],
            "branch": branch,
            "row": np.asarray(reading.rows)[axes[1]],
            "channel": channel if kept is None else np.asarray(kept)[channel],
            **({"bin": axes[3]} if array.ndim > 3 else {}),
            "value": array.ravel(),
        }
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)
