"""The figure of strength curves: what changes as meant, and what is kept, by the strength of a direction."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from plotly.subplots import make_subplots

from dit_lens.arguments.checks import checked
from dit_lens.errors import OpError
from dit_lens.plots.code import carries_code
from dit_lens.plots.tables import check_summary, column_values, describe_n, error_bars
from dit_lens.plots.theme import ARMS, CI, MASSIVE, Look, set_title

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

PANELS = {
    "changed": "changed as meant",
    "kept": "the rest kept",
    "readable": "readable",
    "fidelity_to": "edited prompt",
    "fidelity_from": "own prompt",
    "to_prompt": "RMSE to edit",
    "rmse": "RMSE",
}
SHARES = ("changed", "kept", "readable", "fidelity_to", "fidelity_from")
MOST = 3  # panels
CURVES = {
    "steering": Look("steering", MASSIVE, "circle"),
    "random": Look("random directions as long", ARMS["random"].colour, ARMS["random"].symbol),
}
LEVELS = {
    "prompt": Look("the edited prompt", "#0072B2", "square"),
    "untouched": ARMS["untouched"],
}


@carries_code
@checked
def steering_figure(summary: pd.DataFrame) -> go.Figure:
    """Strength against effect, of a direction and of random ones as long; dotted: the edited prompt, and no edit.

    >>> import pandas as pd
    >>> figure = steering_figure(
    ...     pd.DataFrame(
    ...         {"strength": [0.0, 1.0, 2.0], "arm": ["untouched", "steering", "steering"], "n": 8}
    ...         | {"changed": [0.0, 0.2, 0.6], "changed_low": [0.0, 0.1, 0.4], "changed_high": [0.0, 0.3, 0.8]}
    ...     )
    ... )
    >>> [(trace.name, trace.y.tolist()) for trace in figure.data]
    [('steering', [0.2, 0.6]), ('untouched', [0.0, 0.0])]

    The first three measures are drawn that a study has: the share of attributes that changed as they were to, the share
    of the others that was kept, and the share of images that can be read.

    summary: of ``studies.steering``; columns strength, arm, n, and measures with their bounds.
    """
    table = check_summary(summary, ("strength", "arm", "n"))
    panels = [name for name in PANELS if np.isfinite(column_values(table, name)).any()][:MOST]
    strengths = sorted(strength for strength in table["strength"].unique() if strength > 0)
    if not strengths or not panels:
        raise OpError("The summary has no steered images to draw: it needs rows with a strength above 0 and a measure.")
    figure = make_subplots(1, len(panels), subplot_titles=[PANELS[name] for name in panels], horizontal_spacing=0.08)
    for column, name in enumerate(panels, start=1):
        for arm, look in CURVES.items():
            rows = table[(table["arm"] == arm) & (table["strength"] > 0)].sort_values("strength")
            if rows.empty:
                continue
            figure.add_scatter(
                x=rows["strength"].map(strengths.index),
                y=rows[name],
                name=look.name,
                legendgroup=arm,
                showlegend=column == 1,
                mode="lines+markers",
                line={"color": look.colour, "width": 2},
                marker={"symbol": look.symbol, "size": 8, "color": look.colour},
                error_y=error_bars(rows, name, look),
                customdata=rows["strength"],
                hovertemplate=f"{look.name}, strength %{{customdata:g}}: %{{y:.3f}}<extra></extra>",
                row=1,
                col=column,
            )
        for arm, look in LEVELS.items():
            values = table.loc[table["arm"] == arm, name].dropna()
            if values.empty:
                continue
            figure.add_scatter(
                x=np.array([-0.3, len(strengths) - 0.7]),
                y=np.repeat(float(values.iloc[0]), 2),
                name=look.name,
                legendgroup=arm,
                showlegend=column == 1,
                mode="lines",
                line={"color": look.colour, "width": 1.5, "dash": "dot"},
                hovertemplate=f"{look.name}: %{{y:.3f}}<extra></extra>",
                row=1,
                col=column,
            )
        reach = {"range": [-0.03, 1.05]} if name in SHARES else {"rangemode": "tozero"}
        figure.update_yaxes(**reach, row=1, col=column)
    figure.update_annotations(font={"size": 11})
    figure.update_xaxes(
        title="strength",
        tickvals=list(range(len(strengths))),
        ticktext=[f"{strength:g}" for strength in strengths],
        range=[-0.3, len(strengths) - 0.7],
    )
    small = f"{'shares; ' if panels[0] in SHARES else ''}{describe_n(table)}; {CI}"
    set_title(figure, "How far does the direction steer?", small, height=380)
    return figure.update_layout(margin={"t": 92, "b": 92})
