"""Colours of the explorer: palettes for values, and one colour for each cluster."""

from __future__ import annotations

SEQUENTIAL, DIVERGING = "Cividis", "RdBu"
PALETTES = (SEQUENTIAL, "Viridis", "Magma", "Greys", DIVERGING)
AUTO = "auto"
BOTH_SIGNS = 0.25  # of the larger side of 0, which the smaller one must reach for a channel to count as signed

# Okabe & Ito, distinguishable with colour blindness; from the lowest mean heat to the highest.
CLUSTER_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442")


def read_palette(name: str) -> list[list[int]]:
    """Returns the equally spaced colours of a scale of plotly, from dark to light; RdBu from blue to red.

    >>> read_palette("Greys")[0], read_palette("RdBu")[0]
    ([0, 0, 0], [5, 48, 97])
    """
    from plotly.colors import diverging, sequential

    if name == DIVERGING:
        return [parse_colour(colour) for colour in reversed(diverging.RdBu)]
    found = [parse_colour(colour) for colour in getattr(sequential, name)]
    return sorted(found, key=sum) if name == "Greys" else found


def choose_palette(name: str, low: float, high: float) -> str:
    """Returns the palette that ``name`` means for values of this range, as the browser chooses it.

    "auto" is diverging for values on both sides of 0, if the smaller side reaches a quarter of the larger one.

    >>> choose_palette("auto", -3.0, 9.0), choose_palette("auto", -0.1, 9.0), choose_palette("Magma", -3.0, 9.0)
    ('RdBu', 'Cividis', 'Magma')
    """
    if name != AUTO:
        return name
    return DIVERGING if min(-low, high) > BOTH_SIGNS * max(-low, high) else SEQUENTIAL


def parse_colour(colour: str) -> list[int]:
    """Converts "#rrggbb" or "rgb(r, g, b)" to [r, g, b].

    >>> parse_colour("#0072B2"), parse_colour("rgb(1, 2, 3)")
    ([0, 114, 178], [1, 2, 3])
    """
    if colour.startswith("#"):
        return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return [int(part) for part in colour.removeprefix("rgb(").rstrip(")").split(",")]
