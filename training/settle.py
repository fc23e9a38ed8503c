"""Settings that are given as a wish and settled as a value once, before step 1.

    hardware.precision          auto                          ─▶ 32, 16 or bf16
    training.micro_batch_size   auto                          ─▶ rows, and training.grad_accum_steps
    training.duration           a length in time, tokens, ... ─▶ training.max_steps

From then on the run has the value, as if it had been written: its checkpoints and its config.yaml
have it, and the schedule is computed from it. What was given is in each checkpoint under `settled`.
A resumed run takes the values of its checkpoint, and a run that was killed before its first
checkpoint those of its run.json: nothing is measured twice.

What is measured is measured on other models, which are thrown away: a run with a settled value is,
to the last bit, the run with that value written.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from data import RunData
from model import TrainingModule
from tinylm.common.console import short
from tinylm.common.device import keep_freed_memory
from tinylm.common.errors import UserError
from tinylm.config.duration import Budget, budget_of
from tinylm.config.loader import load_config
from tinylm.config.messages import explain
from tinylm.config.schema import AUTO, COUNT_LIMIT, Config
from tinylm.model.decoder import Decoder, flops_per_token, sized_parameters
from tinylm.planning.batch_size import measure_sizes, size_for
from tinylm.planning.memory import explain_out_of_memory, resident_bytes, usable_bytes
from tinylm.planning.memory_plan import largest_batch, with_settings
from tinylm.planning.precision import choose_precision
from tinylm.planning.probes import autocast
from tinylm.runs.run_folder import CONFIG, RUNNING, read_facts
from training.context import RunContext
from training.resume import ResumeState
from training.support import require_supported
from training.trial_steps import TrialSteps

if TYPE_CHECKING:
    from tinylm.checkpoint.initial import InitialModel

logger = logging.getLogger(__name__)

DURATION, ROWS, PRECISION = "training.duration", "training.micro_batch_size", "hardware.precision"
# The trial reads this many micro-batches, and repeats them.
N_BATCHES = 8
# Micro-batches are timed for about this long, but not for more than this share of the duration.
TIMED_SECONDS = 3.0
LARGEST_SHARE = 0.05


def given_settings(config: Config) -> dict[str, str]:
    """The settings that wait to be settled, with what was given."""
    training, wishes = config.training, {}
    if config.hardware.precision == AUTO:
        wishes[PRECISION] = AUTO
    if training.micro_batch_size == AUTO:
        wishes[ROWS] = f"{AUTO} of {training.batch_size} rows"
    if training.duration is not None:
        wishes[DURATION] = training.duration
    return wishes


# --- settled before: by an earlier process of this run ---


def settled_before(context: RunContext, resume: ResumeState | None) -> RunContext:
    """The context with the values that an earlier process of this run has settled, if any.

    Raises:
        UserError: another duration was settled.
    """
    if resume is not None:
        config = with_settled(context.config, resume.config, resume.settled, str(resume.path))
        return _continued(context, config, resume.settled, "as its checkpoint has it")
    facts = read_facts(context.log_dir)
    killed = facts is not None and facts.status == RUNNING and facts.settled
    if not killed or context.config.hardware.devices * context.config.hardware.num_nodes > 1:
        return context
    # Killed before its first checkpoint. Its values hold if all other settings are the same.
    try:
        was = load_config(context.log_dir / CONFIG)
        config = with_settled(context.config, was, facts.settled, str(context.log_dir))
    except UserError:
        return context
    model = config.model.model_copy(update={"vocab_size": was.model.vocab_size})
    if config.model_copy(update={"model": model}).to_plain() != was.to_plain():
        return context
    context = _continued(context, config, facts.settled, "as before this run was killed")
    logger.info(f"settled before this run was killed: {_list_values(config, facts.settled)}")
    return context


def _continued(
    context: RunContext, config: Config, settled: dict[str, str], why: str
) -> RunContext:
    """The context with the values that were settled before."""
    if context.config.hardware.precision == AUTO:
        _say_device(context, config.hardware.precision, why)
    return replace(context, config=config, settled=settled)


def with_settled(config: Config, was: Config, settled: dict[str, str], where: str) -> Config:
    """`config` with the values of `was` for the settings that it leaves open.

    Args:
        config: the settings as they are given now.
        was: those of the earlier process, settled.
        settled: what was given to that.
        where: what it left behind, for the error.

    Raises:
        UserError: the duration is not the one that was settled.
    """
    now = given_settings(config)
    if DURATION in now and settled.get(DURATION) != now[DURATION]:
        given = settled.get(DURATION)
        began = f"a duration of {given}" if given else "training.max_steps"
        problem = f"is {now[DURATION]}, but the run in {where} began with {began}"
        fix = f"To change its length set training.max_steps (now {was.training.max_steps})"
        raise UserError(DURATION, problem, f"{fix} in place of training.duration")
    changes: dict[str, Any] = {}
    if PRECISION in now:
        changes[PRECISION] = was.hardware.precision
    if ROWS in now:
        per_step = was.training.micro_batch_size * was.training.grad_accum_steps
        if per_step != config.training.batch_size:
            problem = f"is {config.training.batch_size}, but the run in {where} has {per_step} rows"
            raise UserError("training.batch_size", problem, "Set it back")
        changes |= {
            "training.batch_size": None,
            ROWS: was.training.micro_batch_size,
            "training.grad_accum_steps": was.training.grad_accum_steps,
        }
    if DURATION in now:
        changes |= {DURATION: None, "training.max_steps": was.training.max_steps}
    return with_values(config, changes)


def with_values(config: Config, changes: dict[str, Any]) -> Config:
    """The settings with some of them replaced, by dotted key; checked again.

    Raises:
        UserError: they contradict each other.
    """
    try:
        return with_settings(config, changes)
    except ValidationError as invalid:
        raise explain(invalid.errors()[0], ()) from None


def with_max_steps(config: Config, max_steps: int) -> Config:
    """The settings with a number of steps in place of a duration."""
    return with_values(config, {DURATION: None, "training.max_steps": max_steps})


def _list_values(config: Config, settled: dict[str, str]) -> str:
    values = {
        PRECISION: config.hardware.precision,
        ROWS: f"{config.training.micro_batch_size} rows",
        DURATION: f"training.max_steps {config.training.max_steps}",
    }
    return ", ".join(f"{name} {given} is {values[name]}" for name, given in settled.items())


# --- the precision ---


def settle_precision(context: RunContext) -> RunContext:
    """The context with a precision; logs the device and why both were chosen."""
    if context.device == "cpu":
        keep_freed_memory()  # as the run will
    precision, why = choose_precision(context.config, context.device)
    _say_device(context, precision, why)
    config = with_values(context.config, {PRECISION: precision})
    return replace(context, config=config, settled=context.settled | {PRECISION: AUTO})


def _say_device(context: RunContext, precision: str, why: str) -> None:
    """The first line of a run; TF32 is a part of auto."""
    if context.device == "cuda":
        torch.set_float32_matmul_precision("high")
        why += "; TF32 is on"
    logger.info(f"device: {context.device} ({context.why}), precision {precision} (auto: {why})")


# --- the micro-batch ---


def settle_micro_batch(context: RunContext, initial: InitialModel | None) -> RunContext:
    """The context with the fewest rows of a micro-batch that are nearly the fastest of those that
    fit, and with the number of them in a step of training.batch_size rows.

    Raises:
        UserError: not even one row fits.
    """
    config, device = context.config, context.device
    is_hf = initial is not None and initial.is_hf
    require_supported(context.stage, config, device, frozenset({"hf_model"} if is_hf else ()))
    per_step = config.training.batch_size
    program = resident_bytes() if device == "cpu" else 0
    usable = usable_bytes(device, program=program)
    one_row = with_micro_batch(config, 1)
    if one_row.training.duration is not None:
        one_row = with_max_steps(one_row, 1)
    largest = per_step
    if usable is not None:
        largest = largest_batch(one_row, device, usable, program=program, most=per_step)
    logger.info(f"training.micro_batch_size auto: measuring up to {largest} rows ...")
    # That one row does not fit is an error of the measurement.
    speeds = measure_sizes(one_row, device, max(1, largest))
    rows = size_for(speeds, per_step)
    tried = ", ".join(f"{n} rows {short(speed)}" for n, speed in speeds.items())
    logger.info(f"training.micro_batch_size auto: {rows} rows (tokens/s: {tried})")
    if device == "cuda":
        torch.cuda.empty_cache()
    settled = context.settled | {ROWS: given_settings(config)[ROWS]}
    return replace(context, config=with_micro_batch(config, rows), settled=settled)


def with_micro_batch(config: Config, rows: int) -> Config:
    """The settings with micro-batches of `rows` rows in steps of training.batch_size rows."""
    n_batches = config.training.batch_size // rows
    changes = {"training.batch_size": None, ROWS: rows, "training.grad_accum_steps": n_batches}
    return with_values(config, changes)


# --- the duration ---


def settle_duration(
    context: RunContext,
    data: RunData,
    initial: InitialModel | None,
    build: Callable[..., TrainingModule],
) -> RunContext:
    """The context and `data` with the number of optimizer steps that training.duration is.

    Args:
        context: of the run, with its vocabulary.
        data: of the run, prepared.
        initial: the model of training.init_from, if any.
        build: `Stage.build_module`, for a measurement.

    Raises:
        UserError: the duration is shorter than a step, or it is not known how long it is.
    """
    config = context.config
    is_hf = initial is not None and initial.is_hf
    features = frozenset({"hf_model"} if is_hf else ())
    require_supported(context.stage, config, context.device, features)
    budget = budget_of(config)
    if budget.unit == "seconds":
        trial = partial(build, data=data, resume=None, initial=initial)
        max_steps = measure_steps(context, data, trial, budget.amount)
    else:
        max_steps = count_steps(config, budget, sum(data.source_rows) or None)
    given = config.training.duration
    logger.info(f"training.duration {given}: {max_steps:,} steps; from now on this is the length")
    config = with_max_steps(config, max_steps)
    data.config = config
    settled = context.settled | {DURATION: given}
    return replace(context, config=config, settled=settled)


def count_steps(config: Config, budget: Budget, rows_per_pass: float | None) -> int:
    """The optimizer steps of a budget that is not a time.

    Args:
        config: the settings, with model.vocab_size.
        budget: in epochs, tokens, tokens per parameter or FLOPs.
        rows_per_pass: of the training data; None: not known.

    Raises:
        UserError: it is less than a step, or more than `COUNT_LIMIT` of them, or the number of rows
            is needed and not known.
    """
    training, hardware = config.training, config.hardware
    processes = hardware.devices * hardware.num_nodes
    rows = training.micro_batch_size * training.grad_accum_steps * processes  # of a step
    if budget.unit == "epochs":
        if rows_per_pass is None:
            problem = f"{training.duration}: the length of a stream is not known"
            raise UserError(DURATION, problem, "Give tokens or a time, or data.streaming=false")
        return checked_steps(config, budget.amount * rows_per_pass / rows)
    tokens = budget.amount
    if budget.unit != "tokens":
        with torch.device("meta"):
            model = Decoder(config.model)
        if budget.unit == "flops":
            tokens /= flops_per_token(model, training.seq_len)
        else:
            tokens *= sized_parameters(model)
    return checked_steps(config, tokens / (rows * training.seq_len))


def planned_steps(config: Config, rows_per_pass: float | None, step: float) -> int:
    """The optimizer steps of training.duration for a plan, which knows the seconds of a step but not
    of a validation; raises as `count_steps`.
    """
    budget = budget_of(config)
    if budget.unit == "seconds":
        return checked_steps(config, budget.amount / step)
    return count_steps(config, budget, rows_per_pass)


def checked_steps(config: Config, steps: float) -> int:
    """`steps` as a whole number.

    Raises:
        UserError: it is below 1 or above `COUNT_LIMIT`.
    """
    if not 1 <= steps + 1e-9 < COUNT_LIMIT:
        problem = f"{config.training.duration} is {steps:.3g} optimizer steps"
        raise UserError(DURATION, problem, f"It must be from 1 to {COUNT_LIMIT:,} steps")
    return round(steps)


# --- a time ---


def measure_steps(
    context: RunContext,
    data: RunData,
    build: Callable[[RunContext], TrainingModule],
    seconds: float,
) -> int:
    """How many optimizer steps, with their validations, take `seconds`; what the measurement takes
    counts as well.
    """
    began = time.monotonic()
    logger.info(f"training.duration {context.config.training.duration}: measuring a step ...")
    config = with_max_steps(context.config, N_BATCHES)  # as many as the trial needs at most
    config = with_values(config, {"data.num_workers": 0})
    data.config = config
    if context.device == "cpu":
        keep_freed_memory()
    with explain_out_of_memory(config, "Nothing was trained"):
        trial = TrialSteps(build(replace(context, config=config)), context.device)
        limit = min(TIMED_SECONDS, LARGEST_SHARE * seconds)
        is_read_beside = context.config.data.num_workers > 0
        step = time_step(trial, data, limit, is_read_beside=is_read_beside)
        validation = time_validation(trial, data)
    del trial
    if context.device == "cuda":
        torch.cuda.empty_cache()
    left = seconds - (time.monotonic() - began)
    logger.info(f"a step takes {step:.3g} s, a validation {validation:.3g} s")
    return checked_steps(
        context.config, steps_within(left, step, validation, config.training.val_every_steps)
    )


def steps_within(seconds: float, step: float, validation: float, val_every: int) -> int:
    """The most steps that take `seconds` with a validation after every `val_every` steps and after
    the last one; 0 if it is less than one.

    >>> steps_within(100, 1, 5, 10), steps_within(16, 1, 5, 10), steps_within(4, 1, 5, 10)
    (63, 10, 0)
    """
    n_periods = int(seconds // (val_every * step + validation))
    rest = seconds - n_periods * (val_every * step + validation)
    more = math.floor(max(0.0, (rest - validation) / step))
    return n_periods * val_every + min(more, val_every)


def time_step(trial: TrialSteps, data: RunData, limit: float, *, is_read_beside: bool) -> float:
    """Seconds of an optimizer step with all its micro-batches.

    Args:
        trial: takes the steps.
        data: the micro-batches.
        limit: seconds after which no further step is timed.
        is_read_beside: whether worker processes read the data meanwhile.
    """
    began = time.perf_counter()
    batches = list(islice(data.train_dataloader(), N_BATCHES))
    reading = 0.0 if is_read_beside else (time.perf_counter() - began) / len(batches)
    for _ in range(2):  # compiles, creates the state of the optimizer, and fills the allocator
        trial.take(batches[:1])
    trial.wait()
    of_batches, of_updates, n_timed = 0.0, 0.0, 0
    for batch in cycle(batches):
        began = time.perf_counter()
        trial.accumulate(batch)
        trial.wait()
        middle = time.perf_counter()
        trial.update()
        trial.wait()
        of_batches += middle - began
        of_updates += time.perf_counter() - middle
        n_timed += 1
        if of_batches + of_updates >= limit:
            break
    of_batch = of_batches / n_timed + reading
    return trial.config.training.grad_accum_steps * of_batch + of_updates / n_timed


def time_validation(trial: TrialSteps, data: RunData) -> float:
    """Seconds of a validation, from its first micro-batch."""
    module, batch = trial.module, next(iter(data.val_dataloader()))
    module.eval()
    began = 0.0
    for _ in range(2):  # the second time without the costs of a first step
        began = time.perf_counter()
        with torch.no_grad(), autocast(trial.config, trial.device):
            module.validation_step(trial.on_device(batch), 0)[0].item()
    seconds = time.perf_counter() - began
    module.train()
    return len(data.val_dataset()) * seconds
