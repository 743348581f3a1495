"""The explorer: a widget that shows images with maps of their channels, at every block and step."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import traitlets
from PIL import Image
from tqdm.auto import tqdm

from dit_lens.arguments.checks import checked_but
from dit_lens.arguments.numbers import as_plain, check_number
from dit_lens.errors import OpError, SiteError, nearest, show
from dit_lens.explorer.browser_data import join_arrays, join_blocks, join_images, make_info
from dit_lens.explorer.code import STATE, code_of_runs
from dit_lens.explorer.colours import (
    AUTO,
    DIVERGING,
    PALETTES,
    choose_palette,
    read_palette,
)
from dit_lens.explorer.companions import check_kinds
from dit_lens.explorer.results import view_result
from dit_lens.explorer.runs import view_runs
from dit_lens.explorer.view_arrays import Views
from dit_lens.explorer.widget import Widget, bytes_trait, join_modules

if TYPE_CHECKING:
    from dit_lens.analysis.channels import ChannelSet
    from dit_lens.core.runs.run import Run
    from dit_lens.instruments.word_maps import WordMap
    from dit_lens.instruments.x0_lens import X0
    from dit_lens.studies import Result

BUDGET = 64 * 2**20  # bytes of maps that are sent to the browser at once; if there are more, each block when shown
UNDER = 0.5  # brightness of the grey image under a map, on average
DEFAULTS = {"k": 8, "clusters": 2}
OVERLAYS = ("heat", "clusters", "none")
SCALES = ("map", "own", "steps")
COMPARE = ("beside", "wipe", "difference")
IMAGES = ("end", "step")


@checked_but("shown", "beside")
def explore(
    shown: Run | Result,
    beside: Run | None = None,
    *,
    channels: ChannelSet | None = None,
    k: int = DEFAULTS["k"],
    clusters: int = DEFAULTS["clusters"],
    x0: X0 | None = None,
    words: WordMap | None = None,
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
    x0: ``lens.read_x0(prompt, "x0", steps=...)`` of the same images: under and beside the maps is then the image that
      the model predicts at the step.
    words: ``lens.word_map(prompt, ...)`` of the same images: the maps are one more group, with words for channels.
    state: attributes of the :class:`Explorer` to begin with, such as ``step=3``.
    Raises OpError if a run has no reads of whole image tokens, or if x0 or words are of other images.
    """
    from dit_lens.core.runs.run import Run
    from dit_lens.studies import Result

    for given in (shown,) if beside is None else (shown, beside):
        if not isinstance(given, Run | Result):
            raise OpError(
                f"explore takes a run or the result of a study, and got a {type(given).__name__}. Run first: "
                "dl.explore(lens.run(prompt, [dl.Read('blocks.*.img')], seed=0))."
            )
    check_kinds(x0, words)
    if isinstance(shown, Result):
        if beside is not None:
            raise OpError("beside= is for runs; a result already has its images side by side.")
        if any(one is not None for one in (channels, x0, words)) or {"k": k, "clusters": clusters} != DEFAULTS:
            raise OpError("channels=, k=, clusters=, x0= and words= are for runs; a result shows what its study chose.")
        return Explorer(view_result(shown), **state)
    runs = (shown,) if beside is None else (shown, beside)
    chosen = {"k": k, "clusters": clusters}
    code = code_of_runs(runs, **{name: value for name, value in chosen.items() if value != DEFAULTS[name]})
    for name, value in {"channels": channels, "x0": x0, "words": words}.items():
        if value is not None:
            code = code.replace(STATE, f", {name}={name}{STATE}")  # a variable of the caller
    views = view_runs(runs, channels=channels, k=k, clusters=clusters, code=code, x0=x0, words=words)
    return Explorer(views, **state)


class Explorer(Widget):
    """The widget that ``dl.explore`` returns. ``.views`` has all data that it shows, as arrays.

    The attributes are the state of the view:

    - left: index of the image on the left.
    - right: index of the image on the right, -1 for none.
    - compare: how the right image is compared with the left one: "beside" it, by a "wipe" from one to the other, or as
      "difference", right minus left.
    - wipe: where the wipe stands, 0 to 1.
    - under: the image under the maps: that at the "end", or the one predicted at the "step" (``x0=``).
    - step: index of the step.
    - site: name of the site.
    - group: name of the group of channels.
    - channel: number of the channel whose map is shown; of the group, or any one if the run kept all.
    - overlay: "heat" (the channel), "clusters" (K-means of the group) or "none".
    - palette: name of the colour scale; "auto" has 0 in the middle of a channel with values of both signs.
    - scale: the colours span the values of the "map", shared by both images, of each image's "own" map, or of all
      "steps" of the block.
    - opacity: opacity of the overlay, 0 to 1.
    - token: index of the selected token, -1 for none.
    """

    _esm = join_modules(
        "explorer_data", "explorer_layers", "explorer_pane", "explorer_overview", "explorer_picture", "explorer"
    )

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
    compare = traitlets.Unicode("beside").tag(sync=True)
    wipe = traitlets.Float(0.5).tag(sync=True)
    under = traitlets.Unicode("end").tag(sync=True)
    step = traitlets.Int(0).tag(sync=True)
    site = traitlets.Unicode("").tag(sync=True)
    group = traitlets.Unicode("").tag(sync=True)
    channel = traitlets.Int(-1).tag(sync=True)
    token = traitlets.Int(-1).tag(sync=True)
    overlay = traitlets.Unicode("heat").tag(sync=True)
    palette = traitlets.Unicode(AUTO).tag(sync=True)
    scale = traitlets.Unicode("map").tag(sync=True)
    opacity = traitlets.Float(0.7).tag(sync=True)

    def __init__(self, views: Views, **state: Any):
        self.views, self._others = views, {}
        state = {name: as_plain(value) for name, value in state.items()}
        initial = _initial_state(views)
        if unknown := [name for name in state if name not in initial]:
            raise OpError(f"an explorer has no attribute {unknown[0]!r} to start from.{nearest(unknown[0], initial)}")
        if odd := [name for name, value in state.items() if not isinstance(value, str | int | float)]:
            raise OpError(f"an explorer cannot start so: {odd[0]}={show(state[odd[0]])} is not a number or a name.")
        state = _choose_channel(views, initial, state)
        images, spans = join_images(views)
        choices = {"overlay": OVERLAYS, "scale": SCALES, "compare": COMPARE, "under": IMAGES}
        shown: dict[str, Any] = {
            "data_info": make_info(views, spans, initial) | {"choices": choices},
            "data_images": images,
            "data_maps": join_blocks(views, views.maps) if views.map_bytes <= BUDGET else b"",
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
        *("left", "right", "compare", "wipe", "under", "step", "site", "group", "channel", "token"),
        *("overlay", "palette", "scale", "opacity"),
    )
    def _check_state(self, proposal: Any) -> Any:
        name, value = proposal["trait"].name, proposal["value"]
        if name in ("opacity", "wipe"):
            check_number(name, value, 0, 1)
            return value
        known = _allowed_values(self.views)[name]
        if value not in known:
            problem = SiteError if name == "site" else OpError
            raise problem(f"there is no {name} {value!r} in this explorer.{_list_known(value, known)}")
        return value

    def whole_state(self) -> dict[str, Any]:
        """Returns the state with every map and all clusters, which takes a while for a large run.

        Of channels outside of the groups it has those that have been looked at.
        """
        blocks = tqdm(range(len(self.views.blocks)), desc="clusters", unit="site", delay=1, leave=False)
        labels = {block: self.views.labels(block).tobytes() for block in blocks}
        maps = {block: self.views.maps(block).tobytes() for block in range(len(self.views.blocks))}
        if self._shows_other:
            self._read_other(self.channel)
        info = self.data_info | {"kept": sorted(self._others)}
        pieces = {"data_maps": maps, "data_labels": labels, "data_channel": dict(self._others)}
        return super().whole_state() | {"data_info": info} | {name: one for name, one in pieces.items() if one}

    def _is_shown_first(self, name: str, number: int) -> bool:
        """The blocks that the page shows first, with their neighbours, and all further channels."""
        first = self.views.blocks.index(self.site) if self.views.blocks else 0
        return name == "data_channel" or abs(number - first) <= 1

    def preview(self) -> Image.Image | None:
        """Returns the image on the left, with the map that is shown."""
        pane = self.views.panes[self.left]
        frame = pane.frames.get(self.step) if self.under == "step" or pane.map_index is None else None
        image = frame or pane.image or Image.new("RGB", (256, 256))
        if pane.map_index is None or self.overlay != "heat":
            return image
        values = self._values_at(pane.map_index)
        palette = choose_palette(self.palette, values.min(), values.max())
        low, high = values.min(), values.max()
        if palette == DIVERGING:
            low, high = -np.abs(values).max(), np.abs(values).max()
        table = np.array(read_palette(palette))
        position = (values - low) / ((high - low) or 1) * (len(table) - 1)
        colours = np.stack([np.interp(position, range(len(table)), channel) for channel in table.T], -1)
        heat = Image.fromarray(colours.astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
        grey = image.convert("L").point(lambda light: 255 * UNDER + 0.8 * (light - 127.5))  # as the browser does
        return Image.blend(grey.convert("RGB"), heat, self.opacity)

    def _values_at(self, image: int) -> np.ndarray:
        """Returns [h, w], the values of the map that is shown of an image with maps, as the browser has them."""
        views, group = self.views, self.views.groups.index(self.group)
        block, step = views.blocks.index(self.site), [index for index, _ in views.steps].index(self.step)
        shown = views.channels[block, group].tolist()
        if self._shows_other:
            other = views.other(self.channel)
            (low, high), values = other.ranges[block, image, step], other.maps[block, image, step]
        else:
            rank = shown.index(self.channel) if self.channel in shown else 0  # as the browser does
            low, high = views.ranges[block, image, step, group, rank]
            values = views.maps(block).reshape(*views.means.shape[1:], *views.grid)[image, step, group, rank]
        return np.nan_to_num(low + (high - low) * (values / 255.0))

    @property
    def _shows_other(self) -> bool:
        """Whether the channel is one outside of the group at this site, which can be shown nevertheless."""
        views = self.views
        if not 0 <= self.channel < views.width or self.group in views.labelled:
            return False
        shown = views.channels[views.blocks.index(self.site), views.groups.index(self.group)]
        return self.channel not in shown

    def _read_other(self, channel: int) -> bytes:
        """Returns the maps of a channel outside of the groups, as explorer_data.js divides them."""
        if channel not in self._others:
            self._others[channel] = join_arrays(self.views.other(channel))
        return self._others[channel]

    def _answer(self, _: Any, message: dict[str, Any], buffers: Sequence[Any]) -> None:  # noqa: ARG002
        """Sends the maps or labels of the block, or the channel, that the browser requests."""
        compute = {"maps": self.views.maps, "labels": self.views.labels, "channel": self._read_other}[message["kind"]]
        found = compute(message["block"])
        self.send(message, buffers=[found if isinstance(found, bytes) else np.ascontiguousarray(found).data])

    def __repr__(self) -> str:
        views = self.views
        parts = [_count(len(views.panes), "image")]
        if views.blocks:
            parts.append(f"{_count(len(views.blocks), 'site')} x {_count(len(views.steps), 'step')}")
            names = [name for name in views.groups if name not in views.labelled]
            groups = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
            size = int((views.channels[:, : len(names)] >= 0).sum(-1).max()) if views.channels.size else 0
            parts.append(f"{groups} {_count(size, 'channel')}" if views.channels.size else f"masks: {groups}")
            parts += [f"maps of {_count(len(words), name[:-1])}" for name, words in views.labelled.items()]
        return f"Explorer: {', '.join(parts)}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _initial_state(views: Views) -> dict[str, Any]:
    """Returns the state of a new explorer: the last step, and the site at two thirds of the depth."""
    block = (2 * len(views.blocks)) // 3
    return {
        "left": 0,
        "right": views.right,
        "compare": COMPARE[0],
        "wipe": 0.5,
        "under": "step" if any(pane.frames for pane in views.panes) else "end",
        "step": views.steps[-1][0] if views.steps else 0,
        "site": views.blocks[block] if views.blocks else "",
        "group": views.groups[0] if views.groups else "",
        "channel": int(views.channels[block, 0, 0]) if views.channels.size else -1,
        "token": -1,
        "overlay": "heat" if views.channels.size else "clusters" if views.blocks else "none",
        "palette": AUTO,
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
    any_channel = isinstance(asked, int) and 0 <= asked < views.width and group not in views.labelled
    if asked not in shown and not any_channel:
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
        "channel": range(-1, views.width) if views.width else sorted({-1, *views.channels.ravel().tolist()}),
        "compare": COMPARE,
        "under": IMAGES,
        "token": range(-1, prod(views.grid) if views.blocks else 0),
        "overlay": OVERLAYS,
        "palette": (AUTO, *PALETTES),
        "scale": SCALES,
    }
