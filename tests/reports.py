"""Model reports that were made up."""

import copy

import pandas as pd

from dit_lens.studies import ModelReport

ESTIMATE = {"mean": 1.25, "low": -0.5, "high": 3.0}
DIFFERENCES = [
    {"from": "bottom", "estimate": ESTIMATE, "p": 0.01, "p_corrected": 0.03},
    {"from": "random", "estimate": {"mean": 0.5, "low": None, "high": None}, "p": None, "p_corrected": None},
]
CONTENT = {
    "date": "2026-11-28",
    "model": {
        "id": "someone/a-model",
        "revision": "0123abcd",
        "weights": "89ab",
        "pipeline": "FluxPipeline",
        "family": "FLUX.1",
        "width": 3072,
        "blocks": 57,
    },
    "protocol": {"name": "turri2026", "digest": "0123456789abcdef", "given": {"k": 8}},
    "prompts": {"digest": "fedcba9876543210", "n": 3, "pairs": 1, "seeds": [0, 1], "source": "prompts.csv"},
    "settings": {"k": 8, "steps": 28, "draws": 2, "call": {"height": 64}, "judge": None, "masks": None},
    "studies": [{"study": "disruption", "rows": 4, "notes": ["a note"]}],
    "left_out": {"organisation": "no masks"},
    "energy_share": 0.5,
    "verdicts": [
        {
            "claim": "claim 1, critical: RMSE of ablation",
            "study": "disruption",
            "measure": "rmse",
            "verdict": "holds",
            "reason": None,
            "value": ESTIMATE,
            "differences": DIFFERENCES,
        },
        {
            "claim": "carrier or detail",
            "study": "carrier_or_detail",
            "measure": None,
            "verdict": "undecided",
            "reason": None,
            "value": None,
            "differences": [],
        },
    ],
    "ceiling": [{"study": "disruption", "what": "fidelity of untouched images", "estimate": ESTIMATE}],
    "versions": {"dit-lens": "0.1.0", "diffusers": "0.42", "torch": "2.13", "nnsight": "0.8.1"},
    "device": "cpu (x86_64)",
    "dtype": "float32",
}
TABLE = pd.DataFrame(
    {
        "study": ["disruption"] * 4,
        "prompt": ['a "cat", asleep', "zwei Hunde\nund é", "NA", None],
        "seed": [0, 1, 2, 3],
        "rmse": [0.1 + 0.2, 1e-310, float("nan"), -3.0],
        "matched": [True, None, False, True],
    }
)


def made_up(table: pd.DataFrame = TABLE, **changes) -> ModelReport:
    """A report with some entries changed."""
    return ModelReport(copy.deepcopy({**CONTENT, **changes}), table)
