"""Several cells of a study, made by one worker: what one job of a server does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dit_lens.core.execution.at_weights import at_weights
from dit_lens.studies.shared.orders import Failed, Give, GoOn, Made, Make, Needs
from dit_lens.studies.shared.shares import StudyJob
from dit_lens.studies.shared.worker import StudyWorker

if TYPE_CHECKING:
    from dit_lens.lens import DiTLens


@at_weights
def make_cells(
    lens: DiTLens,
    study: str,
    arguments: Mapping[str, Any],
    model: Mapping[str, Any],
    wanted: Sequence[tuple[int, str]],
) -> dict[int, tuple[dict[str, bytes], list[str]]]:
    """Makes cells, each with what was warned of on the way: number -> its files by name, and warnings.

    Cells that these need are made as well.

    study, arguments, model: as of :class:`StudyJob`.
    wanted: number and key of each cell.
    """
    worker = StudyWorker(lambda: lens)
    made: dict[int, Made] = {}
    reply = worker.begin(StudyJob(study=study, arguments=arguments, model=model))
    try:
        for number, key in wanted:
            reply = reply if isinstance(reply, Failed) else worker.answer(Make(number, key))
            while number not in made:
                if isinstance(reply, Failed):
                    raise reply.problem
                if isinstance(reply, Needs):
                    reply = worker.answer(Give(made[reply.number].files if reply.number in made else None))
                elif isinstance(reply, Made):
                    made[reply.number] = reply
                    reply = reply if reply.number == number else worker.answer(GoOn())
    finally:
        worker.end()
    return {number: (dict(made[number].files), list(made[number].warnings)) for number, _ in wanted}
