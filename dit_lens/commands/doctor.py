"""Says what works on this machine with this model: draws two steps, with and without a lens."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dit_lens.core.execution.assemble import output_images
from dit_lens.core.plan.cost import format_bytes, nbytes
from dit_lens.core.request.call import prepare_call
from dit_lens.core.request.ops import Read, Zero
from dit_lens.core.request.values import check_device
from dit_lens.core.runs.provenance import describe
from dit_lens.families.calls import call_parameters
from dit_lens.instruments.recommend import recommend
from dit_lens.old_names import OldName

if TYPE_CHECKING:
    from dit_lens.core.runs.run import Run
    from dit_lens.lens import DiTLens

PROMPT = "a big red circle left on a plain blue background"  # words that every toy knows
STEPS = 2
LARGE = 1_000_000_000  # parameters from which a CPU gets a smaller image
SMALL_SIDE = 256
TOP = 4  # channels of a block that count as massive
# (family, width) -> channels, and where they were published
PUBLISHED = {
    ("FLUX.1", 3072): ((154, 1446), "arXiv 2505.18584, FLUX.1-dev"),
    ("Stable Diffusion 3", 1536): ((810,), "arXiv 2510.11538, SD3"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that was examined.

    name: what was examined.
    state: "ok", "failed", "skipped" or "info".
    says: what was found, in words.
    data: its numbers.
    """

    name: str
    state: str
    says: str
    data: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`examine` found.

    model: name of the model.
    findings: in the order in which they were made.
    """

    model: str
    findings: tuple[Finding, ...]

    well = OldName("ok")

    @property
    def ok(self) -> bool:
        """Whether nothing failed and the lens was tried."""
        return not any(finding.state in ("failed", "skipped") for finding in self.findings)

    def __getitem__(self, name: str) -> Finding:
        return next(finding for finding in self.findings if finding.name == name)

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "ok": self.ok,
            "well": self.ok,  # the name in version 0.1.0
            "findings": [{"name": one.name, "state": one.state, "says": one.says, **one.data} for one in self.findings],
        }

    def __repr__(self) -> str:
        width = max(len(one.name) for one in self.findings)
        lines = [f"  {one.state:<8}{one.name:<{width}}  {one.says}" for one in self.findings]
        return "\n".join([f"{self.model}: {'all is well' if self.ok else 'not all is well'}", *lines])


def examine(lens: DiTLens, *, device: str | None = None) -> Diagnosis:
    """Draws two steps without a lens and under an empty edit, and returns what it found; prints nothing.

    >>> from dit_lens import DiTLens
    >>> diagnosis = examine(DiTLens.toy())
    >>> diagnosis.ok, diagnosis["identity"].says
    (True, 'an empty edit and reads of every block give the same image, bit for bit')

    On a CPU large models draw a small image.

    lens: lens on the model.
    device: device to try it on; the pipeline is moved there, if it fits. Its own device by default.
    """
    model = str(getattr(lens.pipe, "name_or_path", "") or "") or type(lens.pipe).__name__
    findings = [_examine_family(lens), _examine_weights(lens)]
    if device is not None:
        check_device(device)
    memory = _examine_memory(lens, device)
    findings.append(memory)
    if memory.state == "failed":
        return Diagnosis(model, (*findings, Finding("drawing", "skipped", "the pipeline does not fit")))
    if device is not None and torch.device(device) != lens.pipe.device:
        lens.to(device)
    findings.insert(1, _examine_machine(lens))
    try:
        findings += _examine_drawing(lens)
    except Exception as problem:  # noqa: BLE001 whatever goes wrong is what was asked about
        findings.append(Finding("drawing", "failed", f"{type(problem).__name__}: {problem}"))
    return Diagnosis(model, tuple(findings))


def default_device() -> str:
    """The GPU, if there is one; else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _examine_family(lens: DiTLens) -> Finding:
    checks = [check.name for check in lens.checks]
    kind = type(lens.pipe.transformer).__name__
    says = f"{lens.family.name} ({kind}), {lens.anatomy.depth} blocks; checks passed: {', '.join(checks)}"
    return Finding("family", "ok", says, {"family": lens.family.name, "transformer": kind, "checks": checks})


def _examine_machine(lens: DiTLens) -> Finding:
    made = describe(lens.pipe, lens.family)
    says = f"{made['device']}, {made['dtype']}, torch {made['versions']['torch']}, {made['threads']} threads"
    return Finding("machine", "ok", says, {name: made[name] for name in ("device", "dtype", "threads", "versions")})


def _examine_weights(lens: DiTLens) -> Finding:
    """Parameters and memory of every part of the pipeline, as loaded."""
    parts = recommend(lens.pipe).parts
    says = ", ".join(f"{part.name} {_format_count(part.parameters)} ({format_bytes(part.bytes)})" for part in parts)
    data = {part.name: {"parameters": part.parameters, "bytes": part.bytes} for part in parts}
    return Finding(
        "weights", "info", f"{says}; {format_bytes(sum(part.bytes for part in parts))} in all", {"parts": data}
    )


def _examine_memory(lens: DiTLens, device: str | None) -> Finding:
    """Whether what is not yet on the device fits into its free memory."""
    import psutil

    target = torch.device(device or lens.pipe.device)
    free = torch.cuda.mem_get_info(target)[0] if target.type == "cuda" else psutil.virtual_memory().available
    moving = sum(
        nbytes(tensor)
        for part in lens.pipe.components.values()
        if isinstance(part, torch.nn.Module)
        for tensor in part.parameters()
        if tensor.device.type != target.type
    )
    data = {"free": free, "needed": moving}
    if moving > free:
        advice = recommend(lens.pipe, gb=free / 1e9).best
        hint = "" if advice is None else f" What fits: {advice.name}."
        says = (
            f"{format_bytes(moving)} are to go to {target}, where {format_bytes(free)} are free.{hint} "
            "See dit_lens.recommend."
        )
        return Finding("memory", "failed", says, data)
    return Finding("memory", "info", f"{format_bytes(free)} free on {target}", data)


def _examine_drawing(lens: DiTLens) -> list[Finding]:
    """Draws two steps with the pipeline alone, and the same under a lens."""
    prompt, call = _choose_call(lens)
    prepared = prepare_call(
        lens.pipe,
        prompt,
        seed=0,
        num_inference_steps=STEPS,
        defaults=lens.defaults,
        vocabulary=lens.vocabulary,
        call=call,
        family=lens.family,
    )
    with lens.quiet():
        with _measure_times(lens.pipe.transformer) as times:
            plain = list(output_images(lens.pipe(**prepared.keywords())))
        ops = [Zero("blocks.*.img", channels=[]), Read("blocks.*.img", reduce="|mean|", name="spectrum")]
        run = lens.run(prompt, ops, seed=0, num_inference_steps=STEPS, **call)
        difference = _largest_difference(plain, run.images)
        noise = _largest_difference(plain, list(output_images(lens.pipe(**prepared.keywords())))) if difference else 0.0
    calls = len(times) // len(run.clock) or 1
    seconds = sum(times[-calls:])
    grid = " x ".join(map(str, run.grid))
    speed = (
        f"{seconds:.3g} s per step of {grid} image tokens ({calls} call{'s' if calls > 1 else ''}), the second of two"
    )
    found = [
        Finding("drawing", "ok", speed, {"seconds_per_step": seconds, "grid": list(run.grid), "calls_per_step": calls})
    ]
    if lens.pipe.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(lens.pipe.device)
        found.append(Finding("peak", "info", f"{format_bytes(peak)} of GPU memory at most", {"bytes": peak}))
    return [*found, _examine_identity(difference, noise), _examine_channels(lens, run)]


def _choose_call(lens: DiTLens) -> tuple[str | None, dict[str, Any]]:
    """A prompt and arguments that the pipeline can draw with."""
    from PIL import Image

    kind = type(lens.pipe)
    known = call_parameters(kind)
    call: dict[str, Any] = {}
    size = sum(parameter.numel() for parameter in lens.pipe.transformer.parameters())
    if size > LARGE and lens.pipe.device.type == "cpu" and {"height", "width"} <= set(known):
        call |= {"height": SMALL_SIDE, "width": SMALL_SIDE}
    if lens.family.pipeline(kind).needs_image:
        side = call.get("height") or lens.defaults.get("height") or 512
        call["image"] = Image.linear_gradient("L").convert("RGB").resize((side, side))
        if "mask_image" in known:
            call["mask_image"] = Image.new("L", (side, side), 255)
    if "prompt" in known:
        return PROMPT, call
    return None, {**call, "class_labels": [0]}


@contextmanager
def _measure_times(transformer: torch.nn.Module) -> Generator[list[float]]:
    """Yields the seconds of every forward pass of the transformer."""
    times: list[float] = []
    began = 0.0

    def now() -> float:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()

    def before(*_: Any) -> None:
        nonlocal began
        began = now()

    handles = [
        transformer.register_forward_pre_hook(before),
        transformer.register_forward_hook(lambda *_: times.append(now() - began)),
    ]
    try:
        yield times
    finally:
        for handle in handles:
            handle.remove()


def _examine_identity(difference: float, noise: float) -> Finding:
    """Whether the image under a lens is the pipeline's own, and if not, whether two runs without it are the same.

    difference: largest difference of a pixel under an empty edit.
    noise: largest difference of a pixel between two runs without a lens.
    """
    data = {"identical": not difference, "difference": difference, "difference_of_plain_runs": noise}
    if not difference:
        says = "an empty edit and reads of every block give the same image, bit for bit"
        return Finding("identity", "ok", says, data)
    cause = (
        f"two runs without a lens differ by up to {noise:g}: this machine does not repeat itself. Compare images "
        "with that in mind, or try torch.use_deterministic_algorithms(True)."
        if noise
        else "two runs without a lens are the same. Please report this pipeline."
    )
    return Finding(
        "identity", "failed", f"under an empty edit pixels differ by up to {difference:g} of 255; {cause}", data
    )


def _largest_difference(one: list[Any], other: list[Any]) -> float:
    """The largest difference of a pixel, of 255."""
    import numpy as np

    return max(float(np.abs(_as_array(a) - _as_array(b)).max()) for a, b in zip(one, other, strict=True))


def _as_array(image: Any) -> Any:
    """An image, or the frames of a video, as numbers."""
    import numpy as np

    frames = image if isinstance(image, list | tuple) else [image]
    return np.stack([np.asarray(frame, dtype=np.float32) for frame in frames])


def _examine_channels(lens: DiTLens, run: Run) -> Finding:
    """The channels that lead most blocks, and those that are published for this width."""
    leads: Counter[int] = Counter()
    ratios: dict[int, float] = {}
    for value in run["spectrum"].values():
        score = value.float().mean((0, 1))  # [d]
        for channel in score.topk(min(TOP, len(score))).indices.tolist():
            leads[channel] += 1
            ratio = float(score[channel] / score.median().clamp_min(1e-12))
            ratios[channel] = max(ratios.get(channel, 0.0), ratio)
    first = leads.most_common(TOP)
    blocks = len(run["spectrum"])
    says = "; ".join(f"channel {c} in {n} of {blocks} blocks, up to {ratios[c]:.3g} x the median" for c, n in first)
    data: dict[str, Any] = {
        "channels": [{"channel": c, "blocks": n, "largest_over_median": ratios[c]} for c, n in first]
    }
    known = PUBLISHED.get((lens.family.name, lens.anatomy.width))
    if known is not None:
        channels, where = known
        listed = ", ".join(f"{c} ({leads[c]} of {blocks} blocks)" for c in channels)
        says += f". Published: {listed} ({where})"
        data["published"] = [{"channel": c, "blocks": leads[c]} for c in channels]
    return Finding("massive", "info", says, data)


def _format_count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= LARGE else f"{parameters / 1e6:.3g} M"
