"""Progress on stderr: a bar on a terminal, else one line for each row of metrics."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from tinylm.common.console import lead_nowhere
from tinylm.common.units import duration, short
from tinylm.runs.metrics_csv import Row

# Digits of the validation metrics on the screen; metrics.csv has all of them.
DIGITS = {
    "val_loss": 4,
    "val_ppl": 2,
    "val_bpb": 3,
    "val_accuracy": 3,
    "val_margin": 3,
    "val_majority": 3,
    "val_auc": 3,
    "val_calibration_error": 3,
}


class StderrConsole(Console):
    """Stderr for people; a closed pipe (`2>&1 | head`) does not end the run."""

    def on_broken_pipe(self) -> None:
        """Called by rich, whose own version exits."""
        lead_nowhere(sys.stderr)


class ProgressDisplay:
    """Shows how far a run is, its metrics and its speed."""

    def __init__(self, max_steps: int):
        self.console, self.max_steps = StderrConsole(stderr=True), max_steps
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("training", total=max_steps, note="")
        self.started, self.first_step = time.monotonic(), 0

    def start(self, step: int) -> None:
        """Show the bar at the step that the run starts from."""
        self.started, self.first_step = time.monotonic(), step
        self.advance(step)
        self.bar.start()

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        self.bar.update(self.task, completed=step)

    def stop(self) -> None:
        """Leave the bar as it is, so that other lines follow it."""
        self.bar.stop()

    def show_row(self, row: Row) -> None:
        """Show a row of metrics: beside the bar, and as a line if it has a validation
        or if there is no bar.
        """
        loss = "" if row["train_loss"] is None else f"loss {row['train_loss']:.4f}"
        note = f"{loss}  lr {row['lr']:.2e}  {short(row['tokens_per_s'] or 0)} tokens/s"
        validation = ""
        for name, value in row.items():
            if name in DIGITS and value is not None:
                validation += f"  {name} {value:.{DIGITS[name]}f}"
        self.bar.update(self.task, note=note)
        if validation or not self.console.is_terminal:
            eta = "" if self.console.is_terminal else f"  ETA {duration(self._seconds_left(row))}"
            self.show(f"step {row['step']:>6}/{self.max_steps}  {note}{validation}{eta}")

    def show(self, text: str) -> None:
        """Show a line above the bar; nothing in it is interpreted as markup."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _seconds_left(self, row: Row) -> float:
        step = int(row["step"] or 0)
        n_done = step - self.first_step
        if n_done == 0:
            return 0.0
        return (time.monotonic() - self.started) / n_done * (self.max_steps - step)
