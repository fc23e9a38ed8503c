"""A ladder: the same recipe at several depths, to predict the loss of the next one.

    plan_ladder   depths, seeds -> steps (experiments.py): the rungs, or the next size after them
    read_rung     a finished step -> compute and loss of its run
    fit_rungs     rungs -> their power law (scaling.py)
    report        rungs, the law, the next size -> Markdown; draw_ladder makes a figure of them

All else follows from the depth by the rules of tinylm/config/depth.py. The loss is the last
val_bpb; the compute is FLOPs per token times tokens trained on, as the run counts them
(tinylm/model/decoder.py: flops_per_token).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from tinylm.checkpoint import format as checkpoint_format
from tinylm.common.console import short
from tinylm.common.errors import UserError
from tinylm.common.statistics import Measure
from tinylm.config.schema import Config
from tinylm.model.decoder import Decoder, count_parameters, sized_parameters
from tinylm.runs.experiments import Step
from tinylm.runs.plots import COLORS, new_figure
from tinylm.runs.run_folder import read_run_folder
from tinylm.runs.scaling import Fit, fit_power_law

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFIG = Path("configs/experiments/ladder/base.yaml")
LOSS = "val_bpb"
# Of a law of three parameters at least one run must be left over.
FEWEST_RUNS, FEWEST_DEPTHS = 4, 3


@dataclass(frozen=True)
class Rung:
    """One finished run."""

    depth: int
    seed: int
    width: int
    parameters: int
    inner_parameters: int
    """beyond the embedding and the head"""
    tokens: int
    compute: float
    """FLOPs"""
    loss: float
    """bits per byte of the validation text"""


def plan_ladder(
    out: Path, depths: Sequence[int], seeds: int, settings: Sequence[str]
) -> list[Step]:
    """A step per depth and seed, smallest first; they write below `out`."""
    steps = []
    for depth in sorted(depths):
        for seed in range(1, seeds + 1):
            name = f"depth{depth}-seed{seed}"
            own = (
                f"model.depth={depth}",
                f"training.seed={seed}",
                f"training.checkpoint_dir={out / 'runs' / name}",
                f"training.log_dir={out / 'logs'}",
                f"training.run_name={name}",
            )
            command = ("train.py", "--config", str(CONFIG), *settings, *own)
            result = out / "runs" / name / "final.ckpt"
            output = out / "output" / f"{name}.txt"
            steps.append(Step(f"ladder: {name}", "ladder", command, result, output))
    return steps


def require_enough(depths: Sequence[int], seeds: int) -> None:
    """Raise a UserError if a law cannot be fitted to all depths but the last."""
    n = len(depths) - 1
    if len(set(depths)) < len(depths) or min(depths, default=0) < 1:
        raise UserError("--depths", "must be different numbers from 1", "For example 1,2,3,4,5")
    if n < FEWEST_DEPTHS or n * seeds < FEWEST_RUNS:
        problem = (
            f"a law of three parameters needs {FEWEST_RUNS} runs at {FEWEST_DEPTHS} depths below "
            f"the last, got {n * seeds} at {n}"
        )
        raise UserError("--depths", problem, "Give more depths, or --seeds 2")


def read_rung(step: Step) -> Rung:
    """The run of a finished step, from its checkpoint and the folder of its metrics."""
    state = checkpoint_format.read(step.result)
    config = Config.from_plain(state["config"])
    training = config.training
    run = read_run_folder(Path(training.log_dir) / training.run_name)
    assert run.facts.flops_per_token is not None, "train.py writes it for every decoder"
    with torch.device("meta"):
        model = Decoder(config.model)
    outer = model.embedding.weight.numel()
    if not config.model.tie_embeddings:
        outer *= 2
    parameters = count_parameters(model)
    return Rung(
        depth=config.model.n_layers,
        seed=training.seed,
        width=config.model.d_model,
        parameters=parameters,
        inner_parameters=sized_parameters(model) - outer,
        tokens=run.facts.tokens,
        compute=float(run.facts.flops_per_token * run.facts.tokens),
        loss=run.columns[LOSS][-1],
    )


def seed_offsets(rungs: Sequence[Rung]) -> dict[int, float]:
    """How much higher the mean loss of each seed is than that of the first. Another seed also holds
    out other documents, which are harder or easier for every depth alike.
    """
    means = {}
    for seed in sorted({rung.seed for rung in rungs}):
        means[seed] = float(np.mean([rung.loss for rung in rungs if rung.seed == seed]))
    first = means[min(means)]
    return {seed: mean - first for seed, mean in means.items()}


def without_offsets(rungs: Sequence[Rung]) -> list[Rung]:
    """The rungs with the losses that they would have on the first seed's documents."""
    offsets = seed_offsets(rungs)
    return [replace(rung, loss=rung.loss - offsets[rung.seed]) for rung in rungs]


def fit_rungs(rungs: Sequence[Rung]) -> Fit:
    """The power law of the rungs; each seed has the same depths."""
    compute = np.array([rung.compute for rung in rungs])
    losses = np.array([rung.loss for rung in without_offsets(rungs)])
    return fit_power_law(compute, losses, n_offsets=len(seed_offsets(rungs)) - 1)


def describe_law(fit: Fit) -> str:
    """The fitted law in a line."""
    values = fit.intervals()
    return (
        f"L(C) = E + A (C / {fit.law.smallest:.3g} FLOPs)^-b, in bits per byte: "
        f"E {_text(values['floor'])}, A {_text(values['scale'])}, b {_text(values['exponent'])}; "
        f"a run differs from it by {fit.sigma:.4f}"
    )


def describe_next(fit: Fit, following: Rung) -> str:
    """What the law predicts for the next size, and what was measured."""
    predicted = _text(fit.predict(following.compute))
    return f"depth {following.depth}: predicted {predicted}, measured {following.loss:.4f}"


def _text(measure: Measure) -> str:
    return f"{measure.value:.4f} (95% {measure.low:.4f} to {measure.high:.4f})"


def report(rungs: Sequence[Rung], following: Rung, fit: Fit) -> str:
    """The ladder as Markdown: a row per run, the law, and the next size beside its prediction."""
    lines = [
        "# Ladder",
        "",
        "| depth | width | seed | parameters | inner parameters | tokens | FLOPs | bits per byte |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for rung in [*rungs, following]:
        lines.append(
            f"| {rung.depth} | {rung.width} | {rung.seed} | {rung.parameters:,} | "
            f"{rung.inner_parameters:,} | {short(rung.tokens)} | {rung.compute:.3g} | "
            f"{rung.loss:.4f} |"
        )
    lines.append("")
    for seed, offset in list(seed_offsets(rungs).items())[1:]:
        lines.append(f"Seed {seed}, with other held-out documents: {offset:+.4f}, taken off first.")
    lines += [describe_law(fit), "", describe_next(fit, following)]
    return "\n".join(lines) + "\n"


def draw_ladder(rungs: Sequence[Rung], following: Rung, fit: Fit) -> "Figure":
    """Loss over compute: the runs, the law with its interval, and the next size."""
    figure, (axes,) = new_figure()
    low = min(rung.compute for rung in rungs)
    high = max(rung.compute for rung in [*rungs, following])
    compute = np.geomspace(low / 1.3, high * 1.3, 60)
    predicted = [fit.predict(float(c)) for c in compute]
    axes.fill_between(
        compute,
        [measure.low for measure in predicted],
        [measure.high for measure in predicted],
        color=COLORS[0],
        alpha=0.15,
        linewidth=0,
        label="95% of new runs",
    )
    axes.plot(compute, fit.law.loss(compute), color=COLORS[0], label="fitted law")
    for runs, color, mark, label in (
        (without_offsets(rungs), COLORS[0], "o", "runs that were fitted"),
        ([following], COLORS[1], "D", "the next size, measured afterwards"),
    ):
        xs, ys = [run.compute for run in runs], [run.loss for run in runs]
        axes.plot(xs, ys, mark, color=color, label=label)
    losses = [rung.loss for rung in [*without_offsets(rungs), following]]
    margin = 0.3 * (max(losses) - min(losses))
    axes.set(
        xscale="log",
        ylim=(min(losses) - margin, max(losses) + margin),
        xlabel="FLOPs of training",
        ylabel="bits per byte of held-out text",
        title="One recipe at several depths",
    )
    axes.grid(True, alpha=0.3)
    axes.legend()
    return figure
