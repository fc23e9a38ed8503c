"""The curves of benchmarks/quality.py as a table and as a picture."""

import statistics
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Point:
    """How far a process is after a turn."""

    step: int
    seconds: float
    """processor time of all training steps"""
    wall_seconds: float
    bits_per_byte: float
    peak_mb: float
    parameters: int


def seconds_to(points: list[Point], bits_per_byte: float) -> float | None:
    """When a curve first has this value, on straight lines between its points; None: never.

    >>> from functools import partial
    >>> point = partial(Point, wall_seconds=0, peak_mb=0, parameters=0)
    >>> seconds_to([point(1, 10, bits_per_byte=4), point(2, 20, bits_per_byte=2)], 3)
    15.0
    """
    before = points[0]
    for point in points:
        if point.bits_per_byte <= bits_per_byte:
            if point is before:
                return point.seconds
            share = before.bits_per_byte - bits_per_byte
            share /= before.bits_per_byte - point.bits_per_byte
            return before.seconds + share * (point.seconds - before.seconds)
        before = point
    return None


def print_table(curves: dict[str, list[list[Point]]], references: list[str]) -> None:
    """One row for each implementation: means over seeds, and when it reaches the end values of
    `references`.
    """
    from rich.console import Console
    from rich.table import Table

    some = next(iter(curves.values()))[0]
    n_turns = len(some)
    shown = sorted({max(n_turns // 4, 1) - 1, max(n_turns // 2, 1) - 1, n_turns - 1})
    steps = [some[k].step for k in shown]
    table = Table(title="held-out bits per byte")
    table.add_column("", no_wrap=True)
    headers = [*(f"step {step}" for step in steps), "seeds", "s", "ms/step", "M params", "peak MB"]
    headers += [f"s to {name}'s end" for name in references]
    for header in headers:
        table.add_column(header, justify="right")
    for name, runs in curves.items():
        ends = [run[-1] for run in runs]
        seconds = statistics.mean(end.seconds for end in ends)
        cells = [f"{statistics.mean(run[k].bits_per_byte for run in runs):.4f}" for k in shown]
        cells += [
            f"{min(e.bits_per_byte for e in ends):.4f}-{max(e.bits_per_byte for e in ends):.4f}",
            f"{seconds:.0f}",
            f"{1000 * seconds / ends[0].step:.0f}",
            f"{ends[0].parameters / 1e6:.2f}",
            f"{max(end.peak_mb for end in ends):.0f}",
        ]
        for reference in references:
            goal = statistics.mean(run[-1].bits_per_byte for run in curves[reference])
            times = [seconds_to(run, goal) for run in runs]
            reached = [t for t in times if t is not None]
            cells.append(f"{statistics.mean(reached):.0f}" if len(reached) == len(runs) else "-")
        table.add_row(Path(name).stem, *cells)
    Console(width=160).print(table)


def draw(curves: dict[str, list[list[Point]]], path: Path) -> None:
    """Bits per byte against steps and against seconds; a line for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for number, (name, runs) in enumerate(curves.items()):
        for run in runs:
            values = [point.bits_per_byte for point in run]
            label = Path(name).stem if run is runs[0] else None
            for ax, x in zip(axes, ("step", "seconds"), strict=True):
                xs = [getattr(point, x) for point in run]
                ax.plot(xs, values, color=f"C{number % 10}", label=label, marker=".", linewidth=1)
    axes[0].set(xlabel="optimizer steps", ylabel="held-out bits per byte")
    axes[1].set(xlabel="processor seconds of training, one thread")
    axes[0].legend()
    for ax in axes:
        ax.grid(True, alpha=0.3)
    figure.savefig(path)
