"""The explorer: images under maps of their channels, over all blocks and steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import traitlets
from PIL import Image
from tqdm.auto import tqdm

from dit_lens.errors import OpError, SiteError, nearest
from dit_lens.explorer.code import STATE, code_of_runs
from dit_lens.explorer.results import of_result
from dit_lens.explorer.views import Views, of_runs
from dit_lens.explorer.widget import Widget, bytes_trait, module_of, webp

if TYPE_CHECKING:
    from dit_lens.analysis.channels import ChannelSet
    from dit_lens.core.runs.run import Run
    from dit_lens.studies import Result

BUDGET = 64 * 2**20  # bytes of maps that go to the browser at once; beyond, blocks are sent when they are looked at
LARGEST = 768  # pixels of an image's longer side
DEFAULTS = {"k": 8, "clusters": 2}
PALETTES = ("Cividis", "Viridis", "Magma", "Greys")
OVERLAYS = ("heat", "clusters", "none")
SCALES = ("map", "steps")
CLUSTER_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442")  # Okabe & Ito, cold to hot


def explore(
    shown: Run | Result,
    beside: Run | None = None,
    *,
    channels: ChannelSet | None = None,
    k: int = DEFAULTS["k"],
    clusters: int = DEFAULTS["clusters"],
    **state: Any,
) -> Explorer:
    """An interactive view of a run: its images under the maps of their channels, at every block and step.

    >>> import dit_lens as dl
    >>> prompt = "a big red circle left on a plain blue background"
    >>> run = dl.DiTLens.toy().run(prompt, [dl.Read("blocks[4:6].img")], seed=0, num_inference_steps=2)
    >>> explorer = explore(run, k=4, site="blocks.5.img")
    >>> explorer
    Explorer: 1 image, 2 sites x 2 steps, top, bottom and random 4 channels
    >>> explorer.step, explorer.group, explorer.overlay
    (1, 'top', 'heat')

    In a notebook it shows itself; ``explorer.to_html("page.html")`` writes a file that works without a kernel. What is
    looked at is in its attributes (``step``, ``site``, ``group``, ``channel``, ``token`` ...), both ways.

    shown: a run that read image tokens: whole (``Read("blocks.*.img")``), of which the top k channels by |mean| are
    shown with bottom and random ones, or chosen ones, a group for each named read (``dl.explorer_reads(massive)``). Or the
    result of a study: its images and masks. beside: an edited run, to be seen next to it; it has maps if it read the
    same. channels: a set to show instead of the top k. clusters: of K-means over a group's channels. state: what is
    looked at first. Raises OpError where a run kept no image tokens.
    """
    from dit_lens.core.runs.run import Run
    from dit_lens.studies import Result

    for given in (shown,) if beside is None else (shown, beside):
        if not isinstance(given, Run | Result):
            raise OpError(
                f"explore takes a run or the result of a study, and got a {type(given).__name__}. Run first: "
                "dl.explore(lens.run(prompt, [dl.Read('blocks.*.img')], seed=0))."
            )
    if isinstance(shown, Result):
        if beside is not None:
            raise OpError("a result has its images side by side already. Leave beside= out.")
        return Explorer(of_result(shown), **state)
    runs = (shown,) if beside is None else (shown, beside)
    chosen = {"k": k, "clusters": clusters}
    code = code_of_runs(runs, **{name: value for name, value in chosen.items() if value != DEFAULTS[name]})
    if channels is not None:
        code = code.replace(STATE, f", channels=channels{STATE}")  # a set of the caller's
    return Explorer(of_runs(runs, channels=channels, k=k, clusters=clusters, code=code), **state)


class Explorer(Widget):
    """What ``dl.explore`` returns. ``.views`` has all that is shown, as arrays.

    left, right: the numbers of the images that are shown, -1 for none on the right. step: a step's index. site,
    group, channel: what is mapped. overlay: "heat" (the channel), "clusters" (K-means of the group), "none". scale:
    colours span "map", this map, or "steps", all of the block's. palette, opacity. token: the one that is kept in view,
    -1 for none.
    """

    _esm = module_of("explorer")

    _meta = traitlets.Dict().tag(sync=True)
    _images = bytes_trait()
    _maps = bytes_trait()
    _labels = bytes_trait()
    _thumbs = bytes_trait()
    _channels = bytes_trait()
    _ranges = bytes_trait()
    _means = bytes_trait()
    _scores = bytes_trait()

    left = traitlets.Int(0).tag(sync=True)
    right = traitlets.Int(-1).tag(sync=True)
    step = traitlets.Int(0).tag(sync=True)
    site = traitlets.Unicode("").tag(sync=True)
    group = traitlets.Unicode("").tag(sync=True)
    channel = traitlets.Int(-1).tag(sync=True)
    token = traitlets.Int(-1).tag(sync=True)
    overlay = traitlets.Unicode("heat").tag(sync=True)
    palette = traitlets.Unicode("Cividis").tag(sync=True)
    scale = traitlets.Unicode("map").tag(sync=True)
    opacity = traitlets.Float(0.7).tag(sync=True)

    def __init__(self, views: Views, **state: Any):
        self.views = views
        start = _start(views)
        if unknown := [name for name in state if name not in start]:
            raise OpError(f"an explorer has no {unknown[0]!r} to start from.{nearest(unknown[0], start)}")
        album, places = _album(views)
        super().__init__(
            _meta=_meta(views, places, start),
            _images=album,
            _maps=_joined(views, views.maps) if views.map_bytes <= BUDGET else b"",
            _thumbs=views.thumbs.tobytes(),
            _channels=views.channels.tobytes(),
            _ranges=views.ranges.tobytes(),
            _means=views.means.tobytes(),
            _scores=views.scores.tobytes(),
            **start | state,
        )
        self.on_msg(self._answer)

    @traitlets.validate("left", "right", "step", "site", "group", "overlay", "palette", "scale")
    def _known(self, proposal: Any) -> Any:
        name, value = proposal["trait"].name, proposal["value"]
        known = _choices(self.views)[name]
        if value not in known:
            problem = SiteError if name == "site" else OpError
            raise problem(f"there is no {name} {value!r} in this explorer.{nearest(str(value), map(str, known))}")
        return value

    def whole_state(self) -> dict[str, Any]:
        """With every map and every cluster inside, which takes a while for a large run."""
        blocks = tqdm(range(len(self.views.blocks)), desc="clusters", unit="site", delay=1, leave=False)
        labels = b"".join(self.views.labels(block).tobytes() for block in blocks)
        return super().whole_state() | {"_maps": self._maps or _joined(self.views, self.views.maps), "_labels": labels}

    def preview(self) -> Image.Image | None:
        """The first image, under the map that is looked at."""
        pane, views = self.views.panes[self.left], self.views
        image = pane.image or Image.new("RGB", (256, 256))
        if pane.values is None or self.overlay != "heat":
            return image
        block, group = views.blocks.index(self.site), views.groups.index(self.group)
        step = [index for index, _ in views.steps].index(self.step)
        rank = views.channels[block, group].tolist().index(self.channel)
        map_ = views.maps(block).reshape(*views.means.shape[1:], *views.grid)[pane.values, step, group, rank]
        anchors = np.array(_anchors(self.palette))
        place = map_ / 255 * (len(anchors) - 1)
        colours = np.stack([np.interp(place, range(len(anchors)), channel) for channel in anchors.T], -1)
        heat = Image.fromarray(colours.astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
        return Image.blend(image.convert("RGB"), heat, self.opacity)

    def _answer(self, _: Any, message: dict[str, Any], buffers: Sequence[Any]) -> None:  # noqa: ARG002
        """Sends the maps or labels of the block that the browser asks for."""
        made = {"maps": self.views.maps, "labels": self.views.labels}[message["kind"]](message["block"])
        self.send(message, buffers=[np.ascontiguousarray(made).data])

    def __repr__(self) -> str:
        views = self.views
        found = [_count(len(views.panes), "image")]
        if views.blocks:
            found.append(f"{_count(len(views.blocks), 'site')} x {_count(len(views.steps), 'step')}")
            names = list(views.groups)
            words = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
            size = views.channels.shape[-1]
            found.append(f"{words} {_count(size, 'channel')}" if views.channels.size else f"masks: {words}")
        return f"Explorer: {', '.join(found)}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _start(views: Views) -> dict[str, Any]:
    """What is looked at first: the last step, and the site after two thirds of the depth."""
    block = (2 * len(views.blocks)) // 3
    return {
        "left": 0,
        "right": views.right,
        "step": views.steps[-1][0] if views.steps else 0,
        "site": views.blocks[block] if views.blocks else "",
        "group": views.groups[0] if views.groups else "",
        "channel": int(views.channels[block, 0, 0]) if views.channels.size else -1,
        "token": -1,
        "overlay": "heat" if views.channels.size else "clusters" if views.blocks else "none",
        "palette": PALETTES[0],
        "scale": SCALES[0],
        "opacity": 0.7,
    }


def _choices(views: Views) -> dict[str, Sequence[Any]]:
    return {
        "left": range(len(views.panes)),
        "right": range(-1, len(views.panes)),
        "step": [step for step, _ in views.steps] or [0],
        "site": views.blocks or ("",),
        "group": views.groups or ("",),
        "overlay": OVERLAYS,
        "palette": PALETTES,
        "scale": SCALES,
    }


def _meta(views: Views, places: Sequence[tuple[int, int] | None], start: dict[str, Any]) -> dict[str, Any]:
    """What the browser has to know besides the arrays."""
    panes = [
        {"name": pane.name, "values": pane.values, "bytes": place, "mime": "image/webp"}
        for pane, place in zip(views.panes, places, strict=True)
    ]
    return {
        "panes": panes,
        "groups": views.groups,
        "blocks": views.blocks,
        "steps": views.steps,
        "grid": views.grid,
        "size": views.channels.shape[-1],
        "values": len({pane.values for pane in views.panes} - {None}),
        "thumb": views.thumbs.shape[-2:],
        "palettes": {name: _anchors(name) for name in PALETTES},
        "cluster_colours": [_rgb(colour) for colour in CLUSTER_COLOURS],
        "masks": views.masks,
        "code": views.code,
        "note": views.note,
        "initial": start,
    }


def _album(views: Views) -> tuple[bytes, list[tuple[int, int] | None]]:
    """All images as WebP, one after the other, and where each begins and ends."""
    data, places = b"", []
    for pane in views.panes:
        if pane.image is None:
            places.append(None)
            continue
        file = webp(pane.image, LARGEST)
        places.append((len(data), len(data) + len(file)))
        data += file
    return data, places


def _joined(views: Views, part: Callable[[int], np.ndarray]) -> bytes:
    return b"".join(part(block).tobytes() for block in range(len(views.blocks)))


def _anchors(name: str) -> list[list[int]]:
    """A plotly colour scale as colours at equal distances, dark to light."""
    from plotly.colors import sequential

    found = [_rgb(colour) for colour in getattr(sequential, name)]
    return sorted(found, key=sum) if name == "Greys" else found


def _rgb(colour: str) -> list[int]:
    if colour.startswith("#"):
        return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return [int(part) for part in colour.removeprefix("rgb(").rstrip(")").split(",")]
