"""Colours of the explorer: palettes for values, and one colour for each cluster."""

from __future__ import annotations

PALETTES = ("Cividis", "Viridis", "Magma", "Greys")

# Okabe & Ito, distinguishable with colour blindness; from the lowest mean heat to the highest.
CLUSTER_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442")


def read_palette(name: str) -> list[list[int]]:
    """Returns the equally spaced colours of a sequential scale of plotly, from dark to light.

    >>> read_palette("Greys")[0]
    [0, 0, 0]
    """
    from plotly.colors import sequential

    found = [parse_colour(colour) for colour in getattr(sequential, name)]
    return sorted(found, key=sum) if name == "Greys" else found


def parse_colour(colour: str) -> list[int]:
    """Converts "#rrggbb" or "rgb(r, g, b)" to [r, g, b].

    >>> parse_colour("#0072B2"), parse_colour("rgb(1, 2, 3)")
    ([0, 114, 178], [1, 2, 3])
    """
    if colour.startswith("#"):
        return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return [int(part) for part in colour.removeprefix("rgb(").rstrip(")").split(",")]
