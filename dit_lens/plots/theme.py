"""The one look of all figures: template, colours and names of the arms, labels that do not overlap.

Colours are those of Okabe & Ito, which colour-blind readers can distinguish. Text and lines that carry no meaning are
greys of equal contrast on white and on near-black, so one figure serves light and dark pages.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go

from dit_lens.arguments.checks import checked

INK = "#767676"
FAINT = "rgba(128, 128, 128, 0.25)"
MASSIVE = "#D55E00"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"

# Pixels for which labels and image rows are laid out: the output cell of a notebook.
WIDTH = 700

# The height of a line of labels, in pixels.
LINE = 13

CI = "CI: 95 %"


class Look(NamedTuple):
    """How an arm appears.

    name: name in legends; it begins with the arm's name in tables.
    colour: colour, as hex.
    symbol: marker, for readers who see no colour.
    """

    name: str
    colour: str
    symbol: str


ARMS = {
    "untouched": Look("untouched", "#8A8A8A", "x-thin-open"),
    "no-op": Look("no-op", "#8A8A8A", "line-ew-open"),
    "top": Look("top (massive)", MASSIVE, "circle"),
    "bottom": Look("bottom", "#0072B2", "square"),
    "random": Look("random", "#009E73", "diamond"),
    "energy-matched": Look("energy-matched", "#CC79A7", "triangle-up"),
    "attenuated": Look("attenuated (top, scaled down)", "#56B4E9", "cross"),
    "norm-kept": Look("norm-kept (top overwritten)", "#A6761D", "pentagon"),
    "norm-frozen": Look("norm-frozen (top zeroed, norms held)", "#882255", "star-square"),
    "rescaled": Look("rescaled (others raised)", "#7570B3", "hexagram"),
    "random-direction": Look("random-direction (a push)", "#B3A400", "triangle-down"),
    "all": Look("all", "#E69F00", "star"),
}

_SPARE_COLOURS = ("#CC6677", "#6699CC", "#44AA99", "#999933")
_SPARE_SYMBOLS = ("hexagon", "triangle-left", "bowtie", "triangle-right")

_AXIS = {
    "gridcolor": FAINT,
    "linecolor": FAINT,
    "zerolinecolor": FAINT,
    "showline": True,
    "ticks": "outside",
    "tickcolor": FAINT,
    "ticklen": 4,
    "automargin": True,
    "title": {"standoff": 8},
}

TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": FONT, "size": 12, "color": INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "colorway": [look.colour for arm, look in ARMS.items() if arm != "no-op"],
        "title": {
            "x": 0,
            "xanchor": "left",
            "xref": "container",
            "y": 1,
            "yanchor": "top",
            "yref": "container",
            "pad": {"l": 8, "t": 8},
            "font": {"size": 15},
            "subtitle": {"font": {"size": 12}},
        },
        "margin": {"l": 56, "r": 16, "t": 64, "b": 44},
        "xaxis": {**_AXIS, "showgrid": False, "zeroline": False},
        "yaxis": _AXIS,
        "legend": {
            "orientation": "h",
            "yref": "container",
            "y": 0,
            "yanchor": "bottom",
            "x": 0,
            "xanchor": "left",
            "itemsizing": "constant",
        },
        "modebar": {
            "bgcolor": "rgba(0,0,0,0)",
            "color": INK,
            "activecolor": MASSIVE,
            # The last one offers to send the figure's data to plotly's server.
            "remove": ["zoomin", "zoomout", "select", "lasso", "sendChartToCloud"],
        },
        "hoverlabel": {"align": "left", "namelength": -1},
        "bargap": 0.25,
    }
)


@checked
def looks(arms: Iterable[str]) -> dict[str, Look]:
    """The look of every arm, in the fixed order of arms; arms of your own come last, in spare colours.

    >>> looks(["bottom", "top", "mine", "top"])["mine"].name
    'mine'
    >>> list(looks(["bottom", "mine", "top"]))
    ['top', 'bottom', 'mine']
    """
    found = list(dict.fromkeys(arms))
    own = [arm for arm in found if arm not in ARMS]
    spare = {
        arm: Look(arm, _SPARE_COLOURS[i % len(_SPARE_COLOURS)], _SPARE_SYMBOLS[i % len(_SPARE_SYMBOLS)])
        for i, arm in enumerate(own)
    }
    return {arm: look for arm, look in ARMS.items() if arm in found} | spare


def set_title(figure: go.Figure, title: str, subtitle: str = "", *, height: int = 360) -> go.Figure:
    """Gives a figure the template, a title, a line of small print and a height, and returns it.

    >>> set_title(go.Figure(), "Scores", "n = 3").layout.title.subtitle.text
    'n = 3'

    figure: the figure; its width is the page's.
    title: title.
    subtitle: the small print below it.
    height: height in pixels.
    """
    return figure.update_layout(
        template=TEMPLATE, height=height, title={"text": f"<b>{title}</b>", "subtitle": {"text": subtitle}}
    )


def fade(colour: str, opacity: float) -> str:
    """A hex colour with an opacity (0 to 1), for areas.

    >>> fade("#0072B2", 0.2)
    'rgba(0, 114, 178, 0.2)'
    """
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {opacity:g})"


def bar_below(x: float = 0.5, length: float = 0.5) -> dict[str, Any]:
    """A colour bar at the foot of a figure. x, length: its middle and its length, as shares of the width."""
    return {
        "orientation": "h",
        "x": x,
        "len": length,
        "y": 0,
        "yref": "container",
        "yanchor": "bottom",
        "thickness": 10,
        "outlinewidth": 0,
        "nticks": 5,
    }


def place_labels(
    points: Sequence[tuple[float, float]], widths: Sequence[float], *, stems: bool = False, levels: int = 5
) -> list[tuple[float, float] | None]:
    """Finds places for labels so that none covers another: the offset of each from its point, right and up, or None.

    >>> place_labels([(0, 0), (5, 0), (50, 0)], widths=[20, 20, 20])
    [(0, 13), (0, 26), (0, 13)]

    A label for which there is no room has None.

    points: (x, y) in pixels, y upwards, the most important first.
    widths: widths of the labels, in pixels.
    stems: whether points stand on lines from below, which labels must not cross either; they may then stand beside
      their point.
    levels: number of heights to try.
    """
    boxes = [(x - 1, x + 1, -math.inf, y + 4) for x, y in points] if stems else []
    found: list[tuple[float, float] | None] = []
    for (x, y), width in zip(points, widths, strict=True):
        beside = [(width / 2 + 5, 0.0), (-width / 2 - 5, 0.0)] if stems else []
        above = [(0, LINE * level) for level in range(1, levels + 1)]
        for dx, dy in [above[0], *beside, *above[1:]]:
            box = (x + dx - width / 2, x + dx + width / 2, y + dy - LINE / 2, y + dy + LINE / 2)
            if not any(box[0] < b[1] and b[0] < box[1] and box[2] < b[3] and b[2] < box[3] for b in boxes):
                boxes.append(box)
                found.append((dx, dy))
                break
        else:
            found.append(None)
    return found


def label_width(text: str) -> float:
    """The approximate width of a label of 11 pixel type, in pixels, with a little room."""
    return 6.6 * len(text) + 4


def shorten_site(site: object) -> str:
    """The block number of a site, if that identifies it; else its name.

    >>> shorten_site("blocks.3.img"), shorten_site("final.img"), shorten_site(3)
    ('3', 'final.img', '3')
    """
    parts = str(site).split(".")
    return parts[1] if len(parts) == 3 and parts[0] == "blocks" and parts[2] == "img" else str(site)
