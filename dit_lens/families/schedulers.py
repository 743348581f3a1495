"""How a scheduler of diffusers has noise: what its pipeline's transformer predicts, and what its times mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dit_lens.errors import FamilyError
from dit_lens.families.row import Time

# Classes, their children included, that sample neither a flow nor by a table of noise levels.
OTHERS = (
    "AmusedScheduler",
    "CMStochasticIterativeScheduler",
    "CosineDPMSolverMultistepScheduler",
    "DDPMWuerstchenScheduler",
    "IPNDMScheduler",
    "KarrasVeScheduler",
    "ScoreSdeVeScheduler",
    "ScoreSdeVpScheduler",
    "VQDiffusionScheduler",
)
EDM = ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler")


@dataclass(frozen=True)
class Noise:
    """How noise goes through a run.

    kind: what is predicted: "flow", "epsilon", "v_prediction", or None for anything else.
    levels: the noise level of every timestep, where the scheduler has a table of them.
    data: the standard deviation of data, where times are those of EDM.
    sign: -1 where the negative is predicted.
    """

    kind: str | None = None
    levels: list[float] | None = None
    data: float | None = None
    sign: int = 1


def find_noise(scheduler: Any, time: Time, pipeline: str) -> Noise:
    """How a scheduler has noise; FamilyError where the pipeline's row says otherwise of its time, or nobody knows.

    scheduler: of the pipeline.
    time: what the pipeline passes as the transformer's time.
    pipeline: the name of its class, for the message.
    """
    names, config = {base.__name__ for base in type(scheduler).__mro__}, scheduler.config
    edm, levels = not names.isdisjoint(EDM), _list_levels(scheduler)
    inverted = bool(config.get("invert_sigmas"))
    continuous = config.get("timestep_type") == "continuous"  # EDM's times beside a table of noise levels
    if edm != time.edm or not names.isdisjoint(OTHERS) or inverted != time.inverted or continuous:
        what = "with" if inverted == time.inverted else f"with invert_sigmas={inverted} of"
        raise FamilyError(
            f"{pipeline} {what} {type(scheduler).__name__}: its family does not say what noise its "
            f"times mean. Put back the scheduler it came with, or one of its kind"
            f"{f', with invert_sigmas={time.inverted}' * (inverted != time.inverted)}."
        )
    if edm:
        # EDM (arXiv 2206.00364, eq. 7): x0 = data^2 / (sigma^2 + data^2) x + data sigma / sqrt(sigma^2 + data^2) F, and
        # the model is given x / sqrt(sigma^2 + data^2): in units of data, that is -F as v. With "v_prediction" c_out is
        # negative, and so is F.
        return Noise(
            "v_prediction", None, float(config["sigma_data"]), 1 if config["prediction_type"] == "v_prediction" else -1
        )
    kind = "flow" if levels is None else config.get("prediction_type", "epsilon")
    return Noise(kind if kind in ("flow", "epsilon", "v_prediction") else None, levels)


def _list_levels(scheduler: Any) -> list[float] | None:
    """The noise level of every training timestep, for schedulers that keep such a table and do not sample a flow.

    DDPM (arXiv 2006.11239, eq. 4): x_t = sqrt(alpha bar) x0 + sqrt(1 - alpha bar) noise.
    """
    table = getattr(scheduler, "alphas_cumprod", None)
    flow = scheduler.config.get("use_flow_sigmas") or scheduler.config.get("prediction_type") == "flow_prediction"
    return None if table is None or flow else [max(1 - float(kept), 0.0) ** 0.5 for kept in table]
