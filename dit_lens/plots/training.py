"""The figure of a training: what becomes of massive channels over its iterations, one line for each training run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from plotly.subplots import make_subplots

from dit_lens.arguments.checks import checked
from dit_lens.errors import OpError
from dit_lens.plots.code import carries_code
from dit_lens.plots.tables import check_summary, column_values, error_bars
from dit_lens.plots.theme import CI, INK, Look, set_title

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

# Okabe & Ito without yellow, which is faint on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7570B3", "#8A8A8A")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "pentagon", "hexagram")
_PANELS = {
    "fidelity": "untouched images:<br>attributes right",
    "energy_share": "energy share of<br>the top channels",
    "damage": "RMSE of zeroing, top<br>minus energy-matched",
    "iou": "IoU of the top channels'<br>masks with the subject",
}


@carries_code
@checked
def training_figure(table: pd.DataFrame) -> go.Figure:
    """When massive channels appear in a training, and when they begin to matter.

    >>> import pandas as pd
    >>> rows = pd.DataFrame({"run": ["a", "a"], "iteration": [0, 500], "n": 8, "fidelity": [0.1, 0.9]})
    >>> figure = training_figure(rows.assign(energy_share=[0.07, 0.4], damage=[0.0, 20.0], iou=[float("nan"), 0.6]))
    >>> [trace.name for trace in figure.data], figure.layout.title.text
    (['a', 'a', 'a', 'a'], '<b>Massive channels over training</b>')

    An IoU is missing where no image can be read back, so that there is no subject yet.

    table: of ``dit-lens training``; columns run, iteration, n (prompts), fidelity (0 to 1), energy_share (0 to 1),
      damage (grey levels) and iou (0 to 1), the last three with their bounds if known.
    """
    table = check_summary(table, ("run", "iteration", "n", *_PANELS))
    runs = list(dict.fromkeys(table["run"]))
    if len(runs) > len(_COLOURS):
        raise OpError(f"{len(runs)} training runs are too many lines for one figure. Give up to {len(_COLOURS)}.")
    figure = make_subplots(2, 2, horizontal_spacing=0.14, vertical_spacing=0.13)
    for number, (measure, title) in enumerate(_PANELS.items()):
        cell = {"row": number // 2 + 1, "col": number % 2 + 1}
        for run, colour, symbol in zip(runs, _COLOURS, _SYMBOLS, strict=False):
            rows, look = table[table["run"] == run].sort_values("iteration"), Look(run, colour, symbol)
            bounds = np.stack([column_values(rows, f"{measure}{end}") for end in ("_low", "_high")], 1)
            figure.add_scatter(
                x=rows["iteration"].to_numpy(),
                y=column_values(rows, measure),
                name=run,
                legendgroup=run,
                showlegend=number == 0,
                mode="lines+markers",
                line={"color": colour, "width": 2},
                marker={"symbol": symbol, "size": 6, "color": colour},
                error_y=error_bars(rows, measure, look),
                customdata=bounds,
                hovertemplate=f"{run}, iteration %{{x:,}}: {measure} %{{y:.3g}} "
                "(%{customdata[0]:.3g} to %{customdata[1]:.3g})<extra></extra>",
                **cell,
            )
        figure.update_yaxes(title=title, **({} if measure == "damage" else {"range": [0, 1.05]}), **cell)
    figure.add_hline(y=0, line={"color": INK, "width": 1, "dash": "dot"}, row=2, col=1)
    figure.update_xaxes(title="iterations", row=2)
    n = sorted({int(value) for value in table["n"]})
    small = f"{n[0]}{f' to {n[-1]}' if n[1:] else ''} prompts per point; {CI}; below 0: the others do more damage"
    return set_title(figure, "Massive channels over training", small, height=620)
