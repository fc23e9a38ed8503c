"""Before a run: what it will cost, whether the model can learn, which settings suit. Nothing of it is kept.

    python train.py --config config_smoke.yaml --plan
    python train.py --config config_smoke.yaml --overfit-one-batch
    python train.py --config config_smoke.yaml --find-lr
    python train.py --config config_smoke.yaml --find-batch-size

This file decides what is tried and prints it; `tinylm/planning/memory_plan.py` counts, `tinylm/planning/probes.py` takes the steps, and train.py
has the flags. Text may be encoded into data.cache_dir, where the run will find it; --plan does not do even that.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tinylm.common.errors import Diverged, UserError
from tinylm.common.units import duration, short, size
from tinylm.config.schema import Config
from training.build import build_weights
from training.context import RunContext
from training.initial import find_initial_model, initialized_config, prepare_tokenizer
from training.stage import Stage
from training.support import require_supported

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from tinylm.model.decoder import Decoder
    from tinylm.planning.memory_plan import Plan
    from tinylm.planning.probes import Batch, Trial
    from tinylm.tokenizer.base import Tokenizer


logger = logging.getLogger(__name__)

# A larger micro-batch that is not so much faster does not pay.
PAYS = 1.05


@dataclass(frozen=True)
class Rehearsal:
    """A run that has not begun."""

    config: Config
    device: str
    say: Callable[[str], None]
    """for what is no result"""
    prepare_tokenizer: "Callable[[], tuple[Tokenizer, Config]]"
    """the run's tokenizer, and its settings with the vocabulary's size filled in"""
    build_model: "Callable[[Config], Any]"
    """the model that the run would begin with"""

    def with_vocabulary(self) -> Config:
        """The settings with the vocabulary's size filled in, without learning a tokenizer for it.

        Raises:
            UserError: the tokenizer cannot be had here.
        """
        from tinylm.planning.memory_plan import with_settings

        known = self.config.model.vocab_size
        if known is None and self.config.tokenizer.kind == "bpe":
            known = self.config.tokenizer.vocab_size
        if known is not None:
            return with_settings(self.config, {"model.vocab_size": known})
        try:
            return self.prepare_tokenizer()[1]
        except UserError as error:
            raise UserError(
                f"{error} To plan without the tokenizer, give its size: model.vocab_size=50257."
            ) from None


def run_preflight(stage: Stage, config: Config, args: argparse.Namespace) -> int:
    """Do what the flags ask for, with the model that a new run would start from, and return the exit code."""
    require_supported("plan", config)
    context = RunContext.open(stage.name, config)
    initial = find_initial_model(config, None)
    if initial is not None:
        if initial.is_hf:
            require_supported("plan", config, model_features=frozenset({"hf_model"}))
        config = initialized_config(config, initial)
    tokenizer = partial(prepare_tokenizer, config, None, initial, stage.make_tokenizer)
    run = Rehearsal(
        config,
        context.device,
        logger.info,
        tokenizer,
        lambda config: build_weights(config, None, initial),
    )
    return rehearse(run, args)


def rehearse(run: Rehearsal, args: argparse.Namespace) -> int:
    """What the flags ask for; the exit code comes back."""
    if args.plan:
        return plan(run)
    if args.find_batch_size:
        return find_batch_size(run)
    if args.find_lr:
        return find_lr(run)
    return overfit_one_batch(run, args.overfit_one_batch)


# --- what it will cost ------------------------------------------------------------------------------------------------


def plan(run: Rehearsal) -> int:
    """Print what the run will cost, the time of it where it fits.

    Raises:
        UserError: it does not fit; which settings to change.
    """
    from tinylm.planning import memory_plan

    program = loaded_bytes(run.device)
    config = run.with_vocabulary()
    planned = memory_plan.plan_run(config, run.device, program=program)
    room = memory_plan.room(config, run.device, program=program)
    table = grid()
    for name, text in cost(config, planned, room):
        table.add_row(name, text)
    fits = room is None or planned.peak <= room
    if fits:
        run.say("measuring the speed ...")
    table.add_row(
        "time",
        time_of(run, config, planned) if fits else "not measured, because the run does not fit",
    )
    results().print(table)
    if config.hardware.compile:
        run.say("without hardware.compile, which is faster and mostly needs less memory")
    if fits:
        return 0
    assert room is not None
    overrides = memory_plan.advice(config, run.device, room, program=program)
    mend = (
        f"It fits with: {' '.join(overrides)}"
        if overrides
        else "Take a much smaller model: lower model.d_model and model.vocab_size"
    )
    raise UserError(
        f"memory: a step needs {size(planned.peak)}, and {size(room)} are there. {mend}."
    )


def cost(config: Config, planned: "Plan", room: int | None) -> Iterator[tuple[str, str]]:
    """The rows of the plan but the time."""
    from tinylm.planning.memory_plan import CHINCHILLA_TOKENS

    active = (
        ""
        if planned.active_parameters == planned.parameters
        else f", {planned.active_parameters:,} of them active for a token"
    )
    yield "parameters", f"{planned.parameters:,}{active}"
    yield "FLOPs", f"{short(planned.flops_per_token)} a token, {short(planned.flops)} the whole run"
    per_parameter = f"{planned.tokens_per_parameter:.3g} a parameter"
    advised = short(CHINCHILLA_TOKENS * planned.parameters)
    yield (
        "tokens",
        f"{short(planned.tokens)} the whole run, {per_parameter} (a given amount of work is spent best at about {CHINCHILLA_TOKENS}: {advised})",
    )
    files, each = planned.checkpoint_files, size(planned.checkpoint_bytes)
    stay = (
        "all stay"
        if files is None
        else f"at most {files} at a time, {size(files * planned.checkpoint_bytes)}"
    )
    yield (
        "checkpoints",
        f"{each} each, {stay} (training.keep_last {'null' if files is None else config.training.keep_last})",
    )
    several = " on each device" if config.hardware.devices * config.hardware.num_nodes > 1 else ""
    yield (
        "memory",
        f"{size(planned.peak)}{several} at the peak, {'how much is there is not known here' if room is None else f'{size(room)} are there'}",
    )
    for name, part in planned.parts.items():
        yield f"  {name}", size(part)


def time_of(run: Rehearsal, config: Config, planned: "Plan") -> str:
    """How long the steps of the whole run take, from a second of them."""
    from tinylm.model.decoder import Decoder
    from tinylm.planning.memory_plan import explaining_memory
    from tinylm.planning.probes import matrix_rate, measure_speed

    with explaining_memory(config, "Nothing was trained"):
        speed = measure_speed(Decoder(config.model), config, run.device)
    devices = config.hardware.devices * config.hardware.num_nodes
    seconds = planned.tokens / (speed.tokens_per_second * devices)
    use = speed.tokens_per_second * planned.flops_per_token / matrix_rate(config, run.device)
    rows = (
        ""
        if speed.rows == config.training.micro_batch_size
        else f" with {speed.rows} of {config.training.micro_batch_size} rows"
    )
    several = (
        f" on each of {devices} devices, what they send each other left out" if devices > 1 else ""
    )
    measured = f"{short(speed.tokens_per_second)} tokens/s measured{rows}{several}, {use:.0%} of the FLOPs of bare matrix products"
    return f"{duration(seconds)} of steps, validation not counted ({measured})"


def loaded_bytes(device: str) -> int:
    """What a run's process has in the device's memory before there is a model."""
    from tinylm.planning.memory_plan import resident_bytes
    from training import callbacks  # noqa: F401  a run has it loaded, and with it Lightning

    return resident_bytes() if device == "cpu" else 0


# --- whether it can learn ---------------------------------------------------------------------------------------------


def overfit_one_batch(run: Rehearsal, steps: int) -> int:
    """Train on micro-batch 0 alone and print how its loss falls.

    Raises:
        Diverged: it did not go to nearly zero.
    """
    from tinylm.planning.probes import LEARNT, overfit, without_noise

    tokenizer, config = run.prepare_tokenizer()
    run.say(
        "micro-batch 0 alone, at training.lr without its schedule, and without dropout and label smoothing"
    )
    losses: list[float] = []
    for loss in overfit(trial(run, without_noise(config)), next(batches(config, tokenizer)), steps):
        losses.append(loss)
        if len(losses) == 1 or len(losses) % max(1, steps // 15) == 0:
            print(f"step {len(losses):>5}  loss {loss:.4f}", flush=True)
    verdict = f"the loss of one batch fell from {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} steps"
    if losses[-1] >= LEARNT * losses[0]:
        raise Diverged(
            f"not learnt: {verdict}, and learnt is below {LEARNT:.0%} of the first. Raise training.lr or the number of steps"
        )
    print(f"learnt: {verdict}, below {LEARNT:.0%} of the first")
    return 0


# --- which learning rate ----------------------------------------------------------------------------------------------


def find_lr(run: Rehearsal) -> int:
    """Print the loss over a rising learning rate, and a learning rate for the run.

    Raises:
        Diverged: there is no curve to read one from.
    """
    import numpy as np

    from tinylm.planning.memory_plan import with_settings
    from tinylm.planning.probes import RANGE_STEPS, lr_range_test, smoothed_losses, suggested_lr
    from tinylm.runs.plots import text_curves

    tokenizer, config = run.prepare_tokenizer()
    run.say(
        f"at most {RANGE_STEPS} steps, each at a higher learning rate, until the loss has doubled"
    )
    source = batches(with_settings(config, {"training.max_steps": RANGE_STEPS}), tokenizer)
    curve = list(lr_range_test(trial(run, config), source))
    if not curve:
        raise Diverged(
            "the first loss is not a finite number. Look at the data: python train.py --config ... --show-rows 3"
        )
    losses = np.array(smoothed_losses([loss for _, loss in curve]))
    steps = np.arange(len(curve), dtype=float)
    print(
        text_curves(
            "Loss over the learning rate",
            [("*", "mean of five steps", steps, losses)],
            f"{curve[0][0]:.0e}",
            f"{curve[-1][0]:.2g}",
        )
    )
    lr = suggested_lr(curve)
    run.say(
        f"a third of {3 * lr:.2g}, the lowest rate that takes the loss down, but for a twentieth, as far as any does:"
    )
    muon = (
        f" training.muon_lr={config.training.muon_lr * lr / config.training.lr:.2g}"
        if config.training.optimizer == "muon"
        else ""
    )
    print(f"training.lr={lr:.2g}{muon}")
    return 0


# --- which micro-batch ------------------------------------------------------------------------------------------------


def find_batch_size(run: Rehearsal) -> int:
    """Print the largest micro-batch that fits and the speed of those up to it, and the size that is worth taking.

    Raises:
        UserError: not even a single row fits.
    """
    from tinylm.planning import memory_plan

    program = loaded_bytes(run.device)
    config = run.with_vocabulary()
    room = memory_plan.room(config, run.device, program=program)
    if room is None:
        raise UserError(
            f"--find-batch-size: nobody says how much memory {run.device} has here. Try training.micro_batch_size by hand."
        )
    largest = memory_plan.largest_batch(config, run.device, room, program=program)
    if largest == 0:
        raise UserError(
            f"memory: not even one row fits into {size(room)}. Type --plan in place of --find-batch-size: it says what to change."
        )
    run.say(f"the largest that fits into {size(room)} by the plan: {largest} rows")
    speeds = measure_sizes(run, config, largest)
    table = grid("rows", "planned memory", "tokens/s")
    for rows, speed in speeds.items():
        needed = memory_plan.plan_run(
            memory_plan.with_settings(config, {"training.micro_batch_size": rows}),
            run.device,
            program=program,
        ).peak
        table.add_row(str(rows), size(needed), f"{speed:,.0f}")
    results().print(table)
    enough = min(rows for rows, speed in speeds.items() if speed * PAYS >= max(speeds.values()))
    step = config.training.micro_batch_size * config.training.grad_accum_steps
    size_of_part = max(rows for rows in speeds if rows <= enough and step % rows == 0)
    run.say(
        f"more than {enough} rows are not {PAYS - 1:.0%} faster; for a step of {step} rows, as it is:"
    )
    print(
        f"training.micro_batch_size={size_of_part} training.grad_accum_steps={step // size_of_part}"
    )
    return 0


def measure_sizes(run: Rehearsal, config: Config, largest: int) -> dict[int, float]:
    """Tokens a second by rows: 1, 2, 4 ... until two in a row do not pay, or memory ends.

    Raises:
        UserError: there is no memory for a single row.
    """
    from tinylm.model.decoder import Decoder
    from tinylm.planning.memory_plan import explaining_memory, is_out_of_memory, with_settings
    from tinylm.planning.probes import measure_speed

    speeds: dict[int, float] = {}
    rows = 1
    while rows <= largest and not stopped_paying(list(speeds.values())):
        tried = with_settings(
            config, {"training.micro_batch_size": rows, "training.grad_accum_steps": 1}
        )
        with explaining_memory(tried, "Nothing was trained"):
            try:
                speeds[rows] = measure_speed(
                    Decoder(tried.model), tried, run.device
                ).tokens_per_second
            except RuntimeError as error:
                if not is_out_of_memory(error) or not speeds:
                    raise
                run.say(f"{rows} rows do not fit after all")
                break
        rows *= 2
    return speeds


def stopped_paying(speeds: list[float]) -> bool:
    """Whether neither of the last two brought PAYS times the best before them.

    >>> stopped_paying([100.0, 101.0]), stopped_paying([100.0, 101.0, 102.0]), stopped_paying([100.0, 101.0, 110.0])
    (False, True, False)
    """
    return len(speeds) > 2 and max(speeds[-2:]) < PAYS * max(speeds[:-2])


# --- what all of them need --------------------------------------------------------------------------------------------


def trial(run: Rehearsal, config: Config) -> "Trial":
    """The run's model and a new optimizer, to be thrown away."""
    from tinylm.planning.probes import Trial

    model: Decoder = run.build_model(config)
    return Trial(model, config, run.device)


def batches(config: Config, tokenizer: "Tokenizer") -> "Iterator[Batch]":
    """The run's micro-batches, from the first one on."""
    from data import PretrainData
    from tinylm.common.console import progress_bar
    from tinylm.planning.memory_plan import with_settings

    data = PretrainData(
        with_settings(config, {"data.num_workers": 0}), tokenizer
    )  # for a few batches a process is not worth its start
    with progress_bar() as progress:
        data.prepare(progress, validation=False)
    return iter(data.train_dataloader())


def results() -> "Console":
    """Stdout for people; into a pipe nothing is cut."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)


def grid(*columns: str) -> "Table":
    """A table without lines."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=bool(columns), header_style="bold")
    for column in columns:
        table.add_column(column, justify="right")
    return table
