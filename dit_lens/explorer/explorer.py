"""The explorer: a widget that shows images with maps of their channels, at every block and step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import traitlets
from PIL import Image
from tqdm.auto import tqdm

from dit_lens.arguments.checks import checked_but
from dit_lens.arguments.numbers import as_plain, check_number
from dit_lens.errors import OpError, SiteError, nearest, show
from dit_lens.explorer.code import STATE, code_of_runs
from dit_lens.explorer.colours import CLUSTER_COLOURS, PALETTES, parse_colour, read_palette
from dit_lens.explorer.results import view_result
from dit_lens.explorer.runs import view_runs
from dit_lens.explorer.view_arrays import Views
from dit_lens.explorer.widget import Widget, bytes_trait, encode_webp, join_modules

if TYPE_CHECKING:
    from dit_lens.analysis.channels import ChannelSet
    from dit_lens.core.runs.run import Run
    from dit_lens.studies import Result

BUDGET = 64 * 2**20  # bytes of maps that are sent to the browser at once; if there are more, each block when shown
LARGEST = 768  # pixels of the longer side of an image in the browser
DEFAULTS = {"k": 8, "clusters": 2}
OVERLAYS = ("heat", "clusters", "none")
SCALES = ("map", "steps")


@checked_but("shown", "beside")
def explore(
    shown: Run | Result,
    beside: Run | None = None,
    *,
    channels: ChannelSet | None = None,
    k: int = DEFAULTS["k"],
    clusters: int = DEFAULTS["clusters"],
    **state: Any,
) -> Explorer:
    """Shows a run interactively: its images with the maps of their channels, at every block and step.

    >>> import dit_lens as dl
    >>> prompt = "a big red circle left on a plain blue background"
    >>> run = dl.DiTLens.toy().run(prompt, [dl.Read("blocks[4:6].img")], seed=0, num_inference_steps=2)
    >>> explorer = explore(run, k=4, site="blocks.5.img")
    >>> explorer
    Explorer: 1 image, 2 sites x 2 steps, top, bottom and random 4 channels
    >>> explorer.step, explorer.group, explorer.overlay
    (1, 'top', 'heat')

    A notebook displays it; ``explorer.to_html("page.html")`` writes a file that works without a kernel. The attributes
    (``step``, ``site``, ``group``, ``channel``, ``token`` ...) follow the view, and the view follows them.

    shown: a run that read image tokens, or the result of a study, of which images and masks are shown. Of a run that
      read all channels (``Read("blocks.*.img")``), the top k by |mean| are shown, with bottom and random ones. Of one
      that read chosen channels, every named read is a group (``dl.explorer_reads(massive)``).
    beside: an edited run, to be compared; it has maps if it has the same reads.
    channels: a set of channels to show instead of the top k.
    k: number of channels per site.
    clusters: number of K-means clusters over the channels of a group.
    state: attributes of the :class:`Explorer` to begin with, such as ``step=3``.
    Raises OpError if a run has no reads of whole image tokens.
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
            raise OpError("beside= is for runs; a result already has its images side by side.")
        if channels is not None or {"k": k, "clusters": clusters} != DEFAULTS:
            raise OpError("channels=, k= and clusters= are for runs; a result shows what its study chose.")
        return Explorer(view_result(shown), **state)
    runs = (shown,) if beside is None else (shown, beside)
    chosen = {"k": k, "clusters": clusters}
    code = code_of_runs(runs, **{name: value for name, value in chosen.items() if value != DEFAULTS[name]})
    if channels is not None:
        code = code.replace(STATE, f", channels=channels{STATE}")  # a variable of the caller
    return Explorer(view_runs(runs, channels=channels, k=k, clusters=clusters, code=code), **state)


class Explorer(Widget):
    """The widget that ``dl.explore`` returns. ``.views`` has all data that it shows, as arrays.

    The attributes are the state of the view:

    - left: index of the image on the left.
    - right: index of the image on the right, -1 for none.
    - step: index of the step.
    - site: name of the site.
    - group: name of the group of channels.
    - channel: number of the channel whose map is shown.
    - overlay: "heat" (the channel), "clusters" (K-means of the group) or "none".
    - palette: name of the colour scale.
    - scale: the colours span the values of this "map", or of all "steps" of the block.
    - opacity: opacity of the overlay, 0 to 1.
    - token: index of the selected token, -1 for none.
    """

    _esm = join_modules("explorer_data", "explorer_pane", "explorer_overview", "explorer")

    # Data for the browser, which static/explorer_data.js reads.
    data_info = traitlets.Dict().tag(sync=True)
    data_images = bytes_trait()
    data_maps = bytes_trait()
    data_labels = bytes_trait()
    data_thumbs = bytes_trait()
    data_channels = bytes_trait()
    data_ranges = bytes_trait()
    data_means = bytes_trait()
    data_scores = bytes_trait()

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
        state = {name: as_plain(value) for name, value in state.items()}
        initial = _initial_state(views)
        if unknown := [name for name in state if name not in initial]:
            raise OpError(f"an explorer has no attribute {unknown[0]!r} to start from.{nearest(unknown[0], initial)}")
        if odd := [name for name, value in state.items() if not isinstance(value, str | int | float)]:
            raise OpError(f"an explorer cannot start so: {odd[0]}={show(state[odd[0]])} is not a number or a name.")
        state = _choose_channel(views, initial, state)
        images, spans = _join_images(views)
        shown: dict[str, Any] = {
            "data_info": _info(views, spans, initial),
            "data_images": images,
            "data_maps": _join_blocks(views, views.maps) if views.map_bytes <= BUDGET else b"",
            "data_thumbs": views.thumbs.tobytes(),
            "data_channels": views.channels.tobytes(),
            "data_ranges": views.ranges.tobytes(),
            "data_means": views.means.tobytes(),
            "data_scores": views.scores.tobytes(),
        }
        try:
            super().__init__(**shown, **initial | state)
        except traitlets.TraitError as problem:
            raise OpError(f"an explorer cannot start so: {problem}") from problem
        self.on_msg(self._answer)

    @traitlets.validate(
        "left", "right", "step", "site", "group", "channel", "token", "overlay", "palette", "scale", "opacity"
    )
    def _check_state(self, proposal: Any) -> Any:
        name, value = proposal["trait"].name, proposal["value"]
        if name == "opacity":
            check_number(name, value, 0, 1)
            return value
        known = _allowed_values(self.views)[name]
        if value not in known:
            problem = SiteError if name == "site" else OpError
            raise problem(f"there is no {name} {value!r} in this explorer.{_list_known(value, known)}")
        return value

    def whole_state(self) -> dict[str, Any]:
        """Returns the state with every map and all clusters, which takes a while for a large run."""
        blocks = tqdm(range(len(self.views.blocks)), desc="clusters", unit="site", delay=1, leave=False)
        labels = [self.views.labels(block).tobytes() for block in blocks]
        maps = [self.views.maps(block).tobytes() for block in range(len(self.views.blocks))]
        return super().whole_state() | {"data_maps": maps, "data_labels": labels}

    def preview(self) -> Image.Image | None:
        """Returns the image on the left, with the map that is shown."""
        pane, views = self.views.panes[self.left], self.views
        image = pane.image or Image.new("RGB", (256, 256))
        if pane.map_index is None or self.overlay != "heat":
            return image
        block, group = views.blocks.index(self.site), views.groups.index(self.group)
        step = [index for index, _ in views.steps].index(self.step)
        shown = views.channels[block, group].tolist()
        rank = shown.index(self.channel) if self.channel in shown else 0  # as the browser does
        values = views.maps(block).reshape(*views.means.shape[1:], *views.grid)[pane.map_index, step, group, rank]
        palette = np.array(read_palette(self.palette))
        position = values / 255 * (len(palette) - 1)
        colours = np.stack([np.interp(position, range(len(palette)), channel) for channel in palette.T], -1)
        heat = Image.fromarray(colours.astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
        return Image.blend(image.convert("RGB"), heat, self.opacity)

    def _answer(self, _: Any, message: dict[str, Any], buffers: Sequence[Any]) -> None:  # noqa: ARG002
        """Sends the maps or labels of the block that the browser requests."""
        compute = {"maps": self.views.maps, "labels": self.views.labels}[message["kind"]]
        self.send(message, buffers=[np.ascontiguousarray(compute(message["block"])).data])

    def __repr__(self) -> str:
        views = self.views
        parts = [_count(len(views.panes), "image")]
        if views.blocks:
            parts.append(f"{_count(len(views.blocks), 'site')} x {_count(len(views.steps), 'step')}")
            names = list(views.groups)
            groups = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
            size = views.channels.shape[-1]
            parts.append(f"{groups} {_count(size, 'channel')}" if views.channels.size else f"masks: {groups}")
        return f"Explorer: {', '.join(parts)}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _initial_state(views: Views) -> dict[str, Any]:
    """Returns the state of a new explorer: the last step, and the site at two thirds of the depth."""
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


def _choose_channel(views: Views, initial: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """The state to begin with, with a channel of its site and group; OpError if they do not have the one asked for.

    views: the views.
    initial: the state of a new explorer.
    state: what was asked for; a site or group that does not exist is told elsewhere.
    """
    site, group = ({**initial, **state}[name] for name in ("site", "group"))
    if not views.channels.size or site not in views.blocks or group not in views.groups:
        return state
    shown = views.channels[views.blocks.index(site), views.groups.index(group)].tolist()
    asked = state.get("channel", shown[0])
    if asked not in shown:
        known = [channel for channel in shown if channel >= 0]
        raise OpError(f"there is no channel {asked!r} in the group {group!r} at {site}.{nearest(str(asked), known)}")
    return {**state, "channel": asked}


def _list_known(value: Any, known: Sequence[Any]) -> str:
    """The end of a message: what exists; of numbers in a row, from which to which."""
    if isinstance(known, range):
        return f" Choose {known[0]} to {known[-1]}."
    return nearest(str(value), map(str, known))


def _allowed_values(views: Views) -> dict[str, Sequence[Any]]:
    return {
        "left": range(len(views.panes)),
        "right": range(-1, len(views.panes)),
        "step": [step for step, _ in views.steps] or [0],
        "site": views.blocks or ("",),
        "group": views.groups or ("",),
        "channel": sorted({-1, *views.channels.ravel().tolist()}),
        "token": range(-1, prod(views.grid) if views.blocks else 0),
        "overlay": OVERLAYS,
        "palette": PALETTES,
        "scale": SCALES,
    }


def _info(views: Views, spans: Sequence[tuple[int, int] | None], initial: dict[str, Any]) -> dict[str, Any]:
    """Returns what the browser needs besides the arrays.

    views: the views.
    spans: (start, end) of each image in the bytes of all images; None if a pane has no image.
    initial: state of a new explorer.
    """
    panes = [
        {"name": pane.name, "mapIndex": pane.map_index, "bytes": span, "mime": "image/webp"}
        for pane, span in zip(views.panes, spans, strict=True)
    ]
    return {
        "panes": panes,
        "groups": views.groups,
        "blocks": views.blocks,
        "steps": views.steps,
        "grid": views.grid,
        "groupSize": views.channels.shape[-1],
        "mappedImages": len({pane.map_index for pane in views.panes} - {None}),
        "thumb": views.thumbs.shape[-2:],
        "palettes": {name: read_palette(name) for name in PALETTES},
        "clusterColours": [parse_colour(colour) for colour in CLUSTER_COLOURS],
        "masks": views.masks,
        "code": views.code,
        "note": views.note,
        "initial": initial,
    }


def _join_images(views: Views) -> tuple[bytes, list[tuple[int, int] | None]]:
    """Returns all images as WebP, one after the other, and the (start, end) of each in bytes."""
    data, spans = b"", []
    for pane in views.panes:
        if pane.image is None:
            spans.append(None)
            continue
        file = encode_webp(pane.image, LARGEST)
        spans.append((len(data), len(data) + len(file)))
        data += file
    return data, spans


def _join_blocks(views: Views, compute: Callable[[int], np.ndarray]) -> bytes:
    return b"".join(compute(block).tobytes() for block in range(len(views.blocks)))
