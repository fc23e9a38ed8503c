"""Before a run: what it will cost, whether the model can learn, and which settings suit.
Nothing is kept.

    python train.py --config config_smoke.yaml --plan
    python train.py --config config_smoke.yaml --overfit-one-batch
    python train.py --config config_smoke.yaml --find-lr
    python train.py --config config_smoke.yaml --find-batch-size

This file decides what is tried and prints the results; tinylm/planning/ counts and measures, and
train.py has the flags. Text may be encoded into data.cache_dir, where the run will find it; --plan
does not even do that.
"""

import argparse
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from data import PretrainData
from tinylm.common.bnb import import_bitsandbytes
from tinylm.common.console import duration, progress_bar, short, size
from tinylm.common.errors import Diverged, UserError
from tinylm.common.tables import Table, print_table
from tinylm.config.duration import budget_of
from tinylm.config.schema import AUTO, Config
from tinylm.model.decoder import Decoder
from tinylm.planning.batch_size import WORTHWHILE, enough_rows, measure_sizes, size_for
from tinylm.planning.memory import explain_out_of_memory, resident_bytes, usable_bytes
from tinylm.planning.memory_plan import (
    CHINCHILLA_TOKENS,
    RunPlan,
    largest_batch,
    plan_run,
    suggest_overrides,
    with_settings,
)
from tinylm.planning.probes import (
    LEARNED,
    RANGE_STEPS,
    Batch,
    Probe,
    lr_range_test,
    measure_matmul_flops,
    measure_speed,
    overfit,
    smoothed_losses,
    suggest_lr,
    without_noise,
)
from tinylm.runs.plots import text_curves
from tinylm.tokenizer.base import Tokenizer
from training.build import build_weights, find_initial_model, initialized_config, prepare_tokenizer
from training.context import RunContext
from training.run import Stage
from training.settle import planned_steps, settle_precision, with_max_steps, with_micro_batch
from training.support import require_supported

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preflight:
    """A run that has not started."""

    config: Config
    device: str
    prepare_tokenizer: Callable[[], tuple[Tokenizer, Config]]
    """the run's tokenizer, and its settings with model.vocab_size"""
    build_weights: Callable[[Config], nn.Module]
    """the model that the run would start with"""

    def config_with_vocabulary(self) -> Config:
        """The settings with model.vocab_size; no tokenizer is learned for it.

        Raises:
            UserError: the tokenizer cannot be loaded.
        """
        vocab_size = self.config.model.vocab_size
        if vocab_size is None and self.config.tokenizer.kind in ("bpe", "unigram"):
            vocab_size = self.config.tokenizer.vocab_size
        if vocab_size is not None:
            return with_settings(self.config, {"model.vocab_size": vocab_size})
        try:
            return self.prepare_tokenizer()[1]
        except UserError as error:
            fix = "To plan without the tokenizer, set its size: model.vocab_size=50257"
            raise error.within(
                fix=f"{error.fix.removesuffix('.')}. {fix}" if error.fix else fix
            ) from None


def run_preflight(stage: Stage, config: Config, args: argparse.Namespace) -> int:
    """Do what the flags request, with the model that a new run would start from,
    and return the exit code.
    """
    require_supported("plan", config)
    context = RunContext.open(stage.name, config)
    if config.training.micro_batch_size == AUTO and not args.find_lr:
        # a step as one micro-batch, whose sizes --plan and --find-batch-size try by themselves
        config = with_micro_batch(config, config.training.batch_size)
    if args.find_lr or args.overfit_one_batch is not None:
        stage.find_data(config)
    initial = find_initial_model(config, None)
    if initial is not None:
        if initial.is_hf:
            require_supported("plan", config, model_features=frozenset({"hf_model"}))
        config = initialized_config(config, initial)
    if config.hardware.precision == AUTO:
        config = settle_precision(replace(context, config=config)).config
    if config.training.duration is not None and not args.plan:  # the others have their own length
        config = with_max_steps(config, 1)
    preflight = Preflight(
        config,
        context.device,
        lambda: prepare_tokenizer(config, None, initial, stage.learn_tokenizer),
        lambda config: build_weights(config, None, initial),
    )
    if args.plan:
        return plan(preflight)
    if args.find_batch_size:
        return find_batch_size(preflight)
    if args.find_lr:
        return find_lr(preflight)
    return overfit_one_batch(preflight, args.overfit_one_batch)


# --- --plan ---


def plan(preflight: Preflight) -> int:
    """Print what the run will cost, and how long it takes if it fits.

    Raises:
        UserError: it does not fit; with the settings to change.
    """
    device = preflight.device
    if preflight.config.training.optimizer == "adamw_8bit":
        import_bitsandbytes()  # 50 MB of the program
    program = program_bytes(device)
    config = preflight.config_with_vocabulary()
    usable = usable_bytes(device, program=program, n_devices=config.hardware.devices)
    if config.training.duration is not None:
        config = with_planned_steps(preflight, config, usable, program)
    run_plan = plan_run(config, device, program=program)
    fits = usable is None or run_plan.peak <= usable
    rows = Table(("", ""), text=("",), fold=("",))
    for name, text in describe_cost(config, run_plan, usable):
        rows.add_row(name, text)
    if fits:
        logger.info("measuring the speed ...")
        rows.add_row("time", measure_time(config, run_plan, device))
    else:
        rows.add_row("time", "not measured, because the run does not fit")
    print_table(rows)
    if config.hardware.compile:
        logger.info("without hardware.compile, which is faster and mostly needs less memory")
    if fits:
        return 0
    assert usable is not None
    overrides = suggest_overrides(config, device, usable, program=program)
    raise UserError(
        "memory",
        f"a step needs {size(run_plan.peak)}, but only {size(usable)} are available",
        f"It fits with: {' '.join(overrides)}"
        if overrides
        else "Use a much smaller model: lower model.d_model and model.vocab_size",
    )


def with_planned_steps(
    preflight: Preflight, config: Config, usable: int | None, program: int
) -> Config:
    """The settings with the number of steps that training.duration is on this machine, which is
    logged: for a number of epochs the data are read, and encoded if they are not yet.

    Raises:
        UserError: it is shorter than a step, or its length is not known.
    """
    device, unit = preflight.device, budget_of(config).unit
    rows_per_pass, step = None, math.nan
    one_step = with_max_steps(config, 1)
    if unit == "epochs":
        data = PretrainData(one_step, preflight.prepare_tokenizer()[0])
        data.prepare(validation=False)
        rows_per_pass = sum(data.source_rows) or None
    elif unit == "seconds":
        run_plan = plan_run(one_step, device, program=program)
        if usable is not None and run_plan.peak > usable:
            return one_step  # nothing can be measured
        with explain_out_of_memory(config, "Nothing was trained"):
            speed = measure_speed(Decoder(config.model), one_step, device)
        step = run_plan.tokens / speed.tokens_per_second
    max_steps = planned_steps(config, rows_per_pass, step)
    logger.info(f"training.duration {config.training.duration}: {max_steps:,} steps")
    return with_max_steps(config, max_steps)


def describe_cost(
    config: Config, run_plan: RunPlan, usable: int | None
) -> Iterator[tuple[str, str]]:
    """The rows of the plan, except the time."""
    parameters, active = run_plan.parameters, run_plan.active_parameters
    yield (
        "parameters",
        f"{parameters:,}"
        + (f", {active:,} of them active per token" if active < parameters else ""),
    )
    yield (
        "FLOPs",
        f"{short(run_plan.flops_per_token)} per token, {short(run_plan.flops)} for the whole run",
    )
    yield (
        "tokens",
        f"{short(run_plan.tokens)} for the whole run, {run_plan.tokens_per_parameter:.3g} per "
        f"parameter (compute-optimal: about {CHINCHILLA_TOKENS}, "
        f"{short(CHINCHILLA_TOKENS * parameters)})",
    )
    n_files, each = run_plan.checkpoint_files, run_plan.checkpoint_bytes
    if n_files is None:
        kept = "all are kept (training.keep_last null)"
    else:
        total = size(n_files * each)
        kept = (
            f"at most {n_files} at a time, {total} (training.keep_last {config.training.keep_last})"
        )
    yield "checkpoints", f"{size(each)} each, {kept}"
    several = " per device" if config.hardware.devices * config.hardware.num_nodes > 1 else ""
    available = "unknown how much is available" if usable is None else f"{size(usable)} available"
    yield "memory", f"{size(run_plan.peak)}{several} at the peak, {available}"
    for name, part in run_plan.parts.items():
        yield f"  {name}", size(part)


def measure_time(config: Config, run_plan: RunPlan, device: str) -> str:
    """How long all steps of the run take, from a measurement of about a second."""
    with explain_out_of_memory(config, "Nothing was trained"):
        speed = measure_speed(Decoder(config.model), config, device)
    n_devices = config.hardware.devices * config.hardware.num_nodes
    seconds = run_plan.tokens / (speed.tokens_per_second * n_devices)
    flops = speed.tokens_per_second * run_plan.flops_per_token
    share = flops / measure_matmul_flops(config, device)
    measured = f"{short(speed.tokens_per_second)} tokens/s measured"
    if speed.rows < config.training.micro_batch_size:
        measured += f" with {speed.rows} of {config.training.micro_batch_size} rows"
    if n_devices > 1:
        measured += f" on each of {n_devices} devices, without communication"
    measured += f", {share:.0%} of the FLOPs of bare matrix products"
    return f"{duration(seconds)} of steps, without validation ({measured})"


def program_bytes(device: str) -> int:
    """What the process of a run holds in the device's memory before there is a model."""
    return resident_bytes() if device == "cpu" else 0


# --- --overfit-one-batch ---


def overfit_one_batch(preflight: Preflight, steps: int) -> int:
    """Train on micro-batch 0 alone and print how its loss falls.

    Raises:
        Diverged: the loss did not fall to nearly zero.
    """
    tokenizer, config = preflight.prepare_tokenizer()
    logger.info(
        "micro-batch 0 alone, with a constant training.lr, without dropout and label smoothing"
    )
    batch = next(read_batches(config, tokenizer))
    losses: list[float] = []
    for loss in overfit(make_probe(preflight, without_noise(config)), batch, steps):
        losses.append(loss)
        n = len(losses)
        if n == 1 or n % max(1, steps // 15) == 0:
            print(f"step {n:>5}  loss {loss:.4f}", flush=True)
    fall = (
        f"the loss of one batch fell from {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} "
        "steps"
    )
    if losses[-1] >= LEARNED * losses[0]:
        raise Diverged(
            f"not learned: {fall}, and must be below {LEARNED:.0%} of the first. "
            "Raise training.lr or the number of steps"
        )
    print(f"learned: {fall}, below {LEARNED:.0%} of the first")
    return 0


# --- --find-lr ---


def find_lr(preflight: Preflight) -> int:
    """Print the loss over a rising learning rate, and a learning rate for the run.

    Raises:
        Diverged: the first loss is not a finite number.
    """
    tokenizer, config = preflight.prepare_tokenizer()
    logger.info(
        f"at most {RANGE_STEPS} steps, each at a higher learning rate, until the loss has doubled"
    )
    batches = read_batches(with_settings(config, {"training.max_steps": RANGE_STEPS}), tokenizer)
    curve = list(lr_range_test(make_probe(preflight, config), batches))
    if not curve:
        raise Diverged(
            "the first loss is not a finite number. "
            "Look at the data: python train.py --config ... --show-rows 3"
        )
    losses = np.array(smoothed_losses([loss for _, loss in curve]))
    steps = np.arange(len(curve), dtype=float)
    lowest, highest = f"{curve[0][0]:.0e}", f"{curve[-1][0]:.2g}"
    curves = [("*", "mean of five steps", steps, losses)]
    print(text_curves("Loss over the learning rate", curves, lowest, highest))
    lr = suggest_lr(curve)
    logger.info(
        f"a third of {3 * lr:.2g}, the lowest rate with 95% of the largest fall of the loss:"
    )
    overrides = f"training.lr={lr:.2g}"
    others = ["muon_lr"] if config.training.optimizer == "muon" else []
    for name in (*others, "embedding_lr", "head_lr"):
        rate = getattr(config.training, name)
        if rate is not None:
            overrides += f" training.{name}={rate * lr / config.training.lr:.2g}"
    print(overrides)
    return 0


# --- --find-batch-size ---


def find_batch_size(preflight: Preflight) -> int:
    """Print the largest micro-batch that fits, the speed of the sizes up to it,
    and the size to use.

    Raises:
        UserError: not even one row fits, or the memory of the device is not known.
    """
    device = preflight.device
    program = program_bytes(device)
    config = preflight.config_with_vocabulary()
    usable = usable_bytes(device, program=program, n_devices=config.hardware.devices)
    if usable is None:
        raise UserError(
            "--find-batch-size",
            f"the memory of {device} is not known on this machine",
            "Try values of training.micro_batch_size by hand",
        )
    largest = largest_batch(config, device, usable, program=program)
    if largest == 0:
        raise UserError(
            "memory",
            f"not even one row fits into {size(usable)}",
            "Use --plan in place of --find-batch-size: it shows what to change",
        )
    logger.info(
        f"the largest micro-batch that fits into {size(usable)} by the plan: {largest} rows"
    )
    speeds = measure_sizes(config, device, largest)
    rows = Table(("rows", "planned memory", "tokens/s"))
    for n_rows, speed in speeds.items():
        sized = with_settings(config, {"training.micro_batch_size": n_rows})
        needed = plan_run(sized, device, program=program).peak
        rows.add_row(str(n_rows), size(needed), f"{speed:,.0f}")
    print_table(rows)
    # The rows of an optimizer step stay the same, so the micro-batch must divide them.
    per_step = config.training.micro_batch_size * config.training.grad_accum_steps
    chosen = size_for(speeds, per_step)
    logger.info(
        f"more than {enough_rows(speeds)} rows are less than {WORTHWHILE - 1:.0%} faster; "
        f"for {per_step} rows per step, as configured:"
    )
    print(f"training.micro_batch_size={chosen} training.grad_accum_steps={per_step // chosen}")
    return 0


# --- for all of them ---


def make_probe(preflight: Preflight, config: Config) -> Probe:
    """The run's initial model with a new optimizer."""
    model = preflight.build_weights(config)
    assert isinstance(model, Decoder)  # `run_preflight` refuses Hugging Face models
    return Probe(model, config, preflight.device)


def read_batches(config: Config, tokenizer: Tokenizer) -> Iterator[Batch]:
    """The run's micro-batches, from the first."""
    # A worker process takes longer to start than to read a few batches.
    data = PretrainData(with_settings(config, {"data.num_workers": 0}), tokenizer)
    with progress_bar() as on_progress:
        data.prepare(on_progress, validation=False)
    return iter(data.train_dataloader())
