"""A lack of memory becomes an error that names the settings to lower."""

import pytest
import torch

from tinylm.common.errors import UserError
from tinylm.config.schema import Config
from tinylm.planning.memory_plan import with_settings
from tinylm.planning.out_of_memory import explain_out_of_memory

CPU_ERROR = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 2621440000 bytes."
)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        RuntimeError(CPU_ERROR),
        RuntimeError("MPS backend out of memory"),
    ],
)
@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        (
            {"training.micro_batch_size": 12},
            "training.micro_batch_size=6 training.grad_accum_steps=2",
        ),
        (
            {"training.micro_batch_size": 3},
            "training.micro_batch_size=1 training.grad_accum_steps=3",
        ),
        ({"training.micro_batch_size": 1}, "model.gradient_checkpointing=true"),
        (
            {"training.micro_batch_size": 1, "model.gradient_checkpointing": True},
            "training.seq_len=8",
        ),
    ],
)
def test_a_lack_of_memory_is_one_line_with_the_settings_to_lower(error, changes, fix):
    config = with_settings(Config(), {"training.seq_len": 16} | changes)
    with pytest.raises(UserError) as caught, explain_out_of_memory(config, "All is well"):
        raise error
    rows = config.training.micro_batch_size
    found = (
        f"a micro-batch of {rows} rows (training.micro_batch_size) of 16 tokens (training.seq_len) "
        f"does not fit: {str(error).rstrip('.')}"
    )
    assert (
        str(caught.value)
        == f"out of memory: {found}. Try {fix}; train.py --plan shows what a run needs. All is well."
    )


def test_another_error_keeps_its_traceback():
    with (
        pytest.raises(RuntimeError, match="shapes"),
        explain_out_of_memory(Config(), "All is well"),
    ):
        raise RuntimeError("shapes do not match")
