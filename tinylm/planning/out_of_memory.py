"""What to do when a device has no memory left: an error that names the settings to lower."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tinylm.common.errors import UserError, first_line
from tinylm.config.schema import Config


@contextmanager
def explain_out_of_memory(config: Config, intact: str) -> Iterator[None]:
    """Turn a lack of memory, on any device, into a UserError.

    Args:
        config: the settings of the run.
        intact: a sentence about what was not lost.

    Raises:
        UserError: with overrides that halve the memory of a step.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        rows, tokens = config.training.micro_batch_size, config.training.seq_len
        raise UserError(
            "out of memory",
            f"a micro-batch of {rows} rows (training.micro_batch_size) of {tokens} tokens "
            f"(training.seq_len) does not fit: {first_line(error)}",
            f"Try {' '.join(_halve(config))}; train.py --plan shows what a run needs. {intact}",
        ) from None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the device had no memory left; the CPU and Apple's GPU have no exception of their own
    for it.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error) or "backend out of memory" in str(error)


def _halve(config: Config) -> Iterator[str]:
    """Overrides with which a step needs about half the memory."""
    training = config.training
    if training.micro_batch_size > 1:
        rows = training.micro_batch_size * training.grad_accum_steps
        size = next(n for n in range(training.micro_batch_size // 2, 0, -1) if rows % n == 0)
        yield f"training.micro_batch_size={size}"
        yield f"training.grad_accum_steps={rows // size}"
    elif not config.model.gradient_checkpointing:
        yield "model.gradient_checkpointing=true"
    else:
        yield f"training.seq_len={max(1, training.seq_len // 2)}"
