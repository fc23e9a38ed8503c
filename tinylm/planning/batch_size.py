"""The largest micro-batch that is worth its memory, by the speed of each size on this machine."""

import logging

from tinylm.common.errors import is_out_of_memory
from tinylm.config.schema import Config
from tinylm.model.decoder import Decoder
from tinylm.planning.memory import explain_out_of_memory
from tinylm.planning.memory_plan import with_settings
from tinylm.planning.probes import measure_speed

logger = logging.getLogger(__name__)

# A larger micro-batch is worth taking if it is at least this many times as fast.
WORTHWHILE = 1.05


def measure_sizes(config: Config, device: str, largest: int) -> dict[int, float]:
    """Tokens per second for 1, 2, 4, ... rows, until two sizes in a row are not worthwhile
    or memory ends.

    Raises:
        UserError: not even one row fits.
    """
    speeds: dict[int, float] = {}
    rows = 1
    while rows <= largest and not stopped_paying(list(speeds.values())):
        changes = {
            "training.batch_size": None,
            "training.micro_batch_size": rows,
            "training.grad_accum_steps": 1,
        }
        sized = with_settings(config, changes)
        with explain_out_of_memory(sized, "Nothing was trained"):
            try:
                speed = measure_speed(Decoder(sized.model), sized, device)
            except RuntimeError as error:
                if not is_out_of_memory(error) or not speeds:
                    raise
                logger.info(f"{rows} rows do not fit after all")
                break
        speeds[rows] = speed.tokens_per_second
        rows *= 2
    return speeds


def stopped_paying(speeds: list[float]) -> bool:
    """Whether neither of the last two speeds is `WORTHWHILE` times the best before them.

    >>> stopped_paying([100.0, 101.0]), stopped_paying([100.0, 101.0, 102.0]), stopped_paying([100.0, 101.0, 110.0])
    (False, True, False)
    """
    return len(speeds) > 2 and max(speeds[-2:]) < WORTHWHILE * max(speeds[:-2])


def enough_rows(speeds: dict[int, float]) -> int:
    """The fewest rows that are nearly as fast as the fastest number of them.

    >>> enough_rows({1: 50.0, 2: 99.0, 4: 100.0})
    2
    """
    fastest = max(speeds.values())
    return min(rows for rows, speed in speeds.items() if speed * WORTHWHILE >= fastest)


def size_for(speeds: dict[int, float], per_step: int) -> int:
    """The rows of a micro-batch of a step of `per_step` rows, which they must divide.

    >>> size_for({1: 50.0, 2: 80.0, 4: 100.0}, 6)
    2
    """
    enough = enough_rows(speeds)
    return max(rows for rows in speeds if rows <= enough and per_step % rows == 0)
