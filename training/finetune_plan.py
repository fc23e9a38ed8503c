"""What a fine-tuning run costs, before it starts: `--plan` of finetune.py.

    prepare   the data and the model, as the run makes them
    memory    optimizer steps on the first rows, in which every tensor is counted: on one row at a
              time, and then on the run's micro-batches if those will fit
    time      the same steps, timed
    rows      the first row, as training sees it

Unlike the plan of pretraining, whose model is traced without contents, this takes real steps: the
stage, the model (ours or one of Hugging Face), its adapters and the lengths of the rows decide the
memory. Nothing is saved but what the run will find in data.cache_dir.
"""

import logging
from dataclasses import dataclass, replace
from itertools import islice

from model import TrainingModule
from tinylm.common.console import duration, size
from tinylm.common.device import keep_freed_memory
from tinylm.common.errors import UserError
from tinylm.common.tables import Table, print_table
from tinylm.config.schema import AUTO, Config
from tinylm.model.decoder import count_parameters
from tinylm.planning.memory import (
    explain_out_of_memory,
    peak_bytes,
    resident_bytes,
    usable_bytes,
)
from tinylm.planning.memory_plan import lost_to_allocator
from tinylm.planning.step_memory import StepMemory
from tinylm.tokens.packing import Batch
from training.build import find_initial_model, initialized_config, prepare_tokenizer
from training.context import RunContext
from training.run import Stage
from training.settle import planned_steps, settle_precision, with_max_steps
from training.show_rows import show_rows
from training.support import require_supported
from training.trial_steps import TrialSteps, rows_of

logger = logging.getLogger(__name__)


def plan_finetune(stage: Stage, config: Config) -> int:
    """Print what the run costs, and its first row; return the exit code.

    Raises:
        UserError: it does not fit; with the settings to change.
    """
    samples = {
        "a grpo section": config.grpo is not None,
        "distill.own_samples": bool(config.distill and config.distill.own_samples),
    }
    for name in (name for name, is_there in samples.items() if is_there):
        raise UserError(
            "--plan",
            f"not supported with {name}: most of a step is sampling, which it does not measure",
            "Start the run with training.max_steps=2",
        )
    if config.hardware.compile:
        logger.info("without hardware.compile, which is faster and mostly needs less memory")
    hardware = config.hardware.model_copy(update={"compile": False})
    settings = config.data.model_copy(update={"num_workers": 0})
    config = config.model_copy(update={"hardware": hardware, "data": settings})
    given = config
    require_supported(stage.name, config)
    if config.training.duration is not None:  # known when a step is measured
        config = with_max_steps(config, config.training.grad_accum_steps)
    context = RunContext.open(stage.name, config)
    config, device = context.config, context.device
    if device == "cpu":
        keep_freed_memory()
    stage.find_data(config)
    initial = find_initial_model(config, None)
    if initial is not None:
        config = initialized_config(config, initial)
    if config.hardware.precision == AUTO:
        config = settle_precision(replace(context, config=config)).config
    tokenizer, config = prepare_tokenizer(config, None, initial, stage.learn_tokenizer)
    context = replace(context, config=config)
    data = stage.open_data(context, tokenizer)
    module = stage.build_module(context, data, None, initial)
    module.rows_per_pass = sum(data.source_rows) or None
    logger.info(module.describe())
    logger.info("measuring memory and speed ...")
    weights = sum(weight.nbytes for weight in module.parameters())
    program = max(0, resident_bytes() - weights) if device == "cpu" else 0
    held = program + weights if device == "cpu" else 0
    usable = usable_bytes(device, program=held, n_devices=config.hardware.devices)
    n_batches = min(2, config.training.grad_accum_steps)  # the second has gradients beside it
    batches = list(islice(iter(data.train_dataloader()), n_batches))
    with explain_out_of_memory(config, "Nothing was trained"):
        found = measure(TrialSteps(module, device), batches, program, usable)
    if given.training.duration is not None and found.seconds is not None:
        max_steps = planned_steps(given, sum(data.source_rows) or None, found.seconds)
        module.config = with_max_steps(given, max_steps)
        logger.info(f"training.duration {given.training.duration}: {max_steps:,} steps")
    print_plan(module, found, usable)
    if found.seconds is None:
        raise does_not_fit(config, found, usable)
    show_rows(data, 1)
    return 0


# --- what they need ---


@dataclass(frozen=True)
class Measured:
    """What a run needs."""

    parts: dict[str, int]
    """the memory of one process at the peak, by part"""
    optimizer_state: int
    seconds: float | None
    """of an optimizer step; None: it does not fit, and `parts` is estimated from one row"""
    n_rows: int
    """the largest micro-batch that fits by the estimate, up to the configured one; 0: none"""

    @property
    def peak(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


def measure(steps: TrialSteps, batches: list[Batch], program: int, usable: int | None) -> Measured:
    """Memory and time; micro-batches that will not fit are not tried.

    Raises:
        UserError: not even the gradients fit beside the weights.
    """
    training = steps.config.training
    trained = sum(weight.nbytes for weight in steps.module.parameters() if weight.requires_grad)
    weights = sum(weight.nbytes for weight in steps.module.parameters())
    if usable is not None and program + weights + trained > usable:
        needed = size(program + weights + trained)
        problem = f"weights and gradients need {needed}, but only {size(usable)} are available"
        raise UserError("memory", problem, "Train adapters (a lora section), or a smaller model")
    one = steps.memory([rows_of(batch, 1) for batch in batches])

    def estimate(n_rows: int) -> dict[str, int]:
        return with_program(times_rows(one, n_rows), program, steps.device)

    rows = training.micro_batch_size
    fitting = [
        n for n in range(rows, 0, -1) if usable is None or sum(estimate(n).values()) <= usable
    ]
    if not fitting or fitting[0] < rows:
        return Measured(estimate(rows), one.optimizer_state, None, max(fitting, default=0))
    whole = steps.memory(batches)
    seconds = steps.seconds(batches) * training.grad_accum_steps / len(batches)
    parts = with_program(whole, program, steps.device)
    used = peak_bytes(steps.device) if steps.device == "cpu" else None
    if used is not None:  # what the allocator lost is in it, so no estimate is needed
        parts["scratch"] = 0
        parts["scratch"] = max(0, used - sum(parts.values()))
    return Measured(parts, whole.optimizer_state, seconds, rows)


def times_rows(memory: StepMemory, n_rows: int) -> StepMemory:
    """The memory of a step on rows of which there are `n_rows` times as many."""
    grown = {name: memory.at_peak[name] * n_rows for name in ("activations", "scratch")}
    return replace(
        memory,
        at_peak=memory.at_peak | grown,
        largest=memory.largest * n_rows,
        allocated=memory.allocated * n_rows,
    )


def with_program(memory: StepMemory, program: int, device: str) -> dict[str, int]:
    """The parts of the peak, with those of the program and the allocator."""
    scratch = memory.at_peak["scratch"] + lost_to_allocator(memory, device)
    parts = memory.at_peak | {"program": program, "scratch": scratch}
    return {name: n_bytes for name, n_bytes in parts.items() if name != "logits"}


# --- the report ---


def print_plan(module: TrainingModule, found: Measured, usable: int | None) -> None:
    """Print the table."""
    training, parameters = module.config.training, list(module.decoder.parameters())
    n_trained = sum(weight.numel() for weight in parameters if weight.requires_grad)
    n_all = count_parameters(module.decoder)
    saved = n_trained if module.config.lora is not None else n_all
    available = "unknown how much is available" if usable is None else f"{size(usable)} available"
    rows = Table(("", ""), text=("",), fold=("",))
    rows.add_row("parameters", f"{n_all:,}, {n_trained:,} of them trained")
    rows.add_row("checkpoints", f"{size(4 * saved + found.optimizer_state)} each")
    rows.add_row("memory", f"{size(found.peak)} at the peak, {available}")
    for name, n_bytes in found.parts.items():
        rows.add_row(f"  {name}", size(n_bytes))
    text = "not measured, because the run does not fit"
    if found.seconds is not None:
        total = duration(found.seconds * training.max_steps)
        text = f"{total} of steps, without validation ({found.seconds:.2g} s a step measured)"
    rows.add_row("time", text)
    print_table(rows)


def does_not_fit(config: Config, found: Measured, usable: int | None) -> UserError:
    """The error, with the settings to change."""
    assert usable is not None
    training = config.training
    total = training.micro_batch_size * training.grad_accum_steps
    sizes = [n for n in range(1, found.n_rows + 1) if total % n == 0]
    fix = "Shorten the rows (training.seq_len), or set model.gradient_checkpointing=true"
    if sizes:
        n_rows = sizes[-1]
        changed = f"training.micro_batch_size={n_rows} training.grad_accum_steps={total // n_rows}"
        fix = f"It fits with: {changed}"
    problem = f"a step needs about {size(found.peak)}, but only {size(usable)} are available"
    return UserError("memory", problem, fix)
