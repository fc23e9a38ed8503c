"""A lack of memory becomes an error that names the settings to lower."""

import pytest
import torch

from tinylm.common.errors import UserError
from tinylm.config.schema import Config
from tinylm.planning import memory
from tinylm.planning.memory import explain_out_of_memory
from tinylm.planning.memory_plan import plan_run, with_settings

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
        RuntimeError("Invalid buffer size: 37.25 GiB"),
        MemoryError("Unable to allocate 1.9 TiB for an array with shape (1000000, 256)"),
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


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({"model.d_model": 30000}, "Lower model.d_model, model.n_layers or model.vocab_size"),
        ({"training.micro_batch_size": 10**6}, "Lower training.micro_batch_size or training"),
    ],
)
def test_a_run_that_cannot_fit_is_refused_before_anything_is_allocated(monkeypatch, changes, fix):
    """With 1.5 GB: 30000² · 6 layers · 12 matrices need terabytes; so do 256 million tokens."""
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1_500_000_000)
    memory.require_memory(Config(), "cpu")
    with pytest.raises(
        UserError, match=f"^memory: a step needs at least .* but only 1.5 GB .*{fix}"
    ):
        memory.require_memory(with_settings(Config(), changes), "cpu")


@pytest.mark.slow
def test_the_bound_is_below_what_a_step_needs():
    """A run that fits is never refused: the traced peak is higher than the bound."""
    for changes in ({"model.tie_embeddings": False}, {"training.optimizer": "muon"}):
        config = with_settings(Config(), {"model.vocab_size": 260, "model.n_layers": 2} | changes)
        planned = plan_run(config, "cpu")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "available_bytes", lambda device, n=planned.peak: n)
            memory.require_memory(config, "cpu")
            patch.setattr(memory, "available_bytes", lambda device, n=planned.weights: n)
            with pytest.raises(UserError, match="^memory: "):
                memory.require_memory(config, "cpu")


def test_a_killed_worker_is_one_line():
    killed = "DataLoader worker (pid 7) is killed by signal: Killed. \n Details are lost."
    with pytest.raises(UserError) as caught, explain_out_of_memory(Config(), "All is well"):
        raise RuntimeError(killed)
    assert str(caught.value) == (
        "data.num_workers: a worker process was killed, possibly out of memory: DataLoader worker "
        "(pid 7) is killed by signal: Killed. Free memory, or lower data.num_workers. All is well."
    )
