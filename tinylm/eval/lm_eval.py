"""The tasks of EleutherAI's lm-evaluation-harness on our models (the package lm_eval, an extra).

`run_harness` gives the scores; `harness_model` is the class that the harness asks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylm.common.errors import UserError, printable
from tinylm.common.statistics import Z95, wilson
from tinylm.config.schema import SamplingConfig
from tinylm.generate.engine import Engine
from tinylm.generate.scoring import fit_continuation, score_continuations

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager


# What the harness calls a setting of SamplingConfig.
SAMPLING_NAMES = {
    "max_gen_toks": "max_new_tokens",
    "until": "stop",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "num_beams": "n_beams",
}
SHARES = (
    "acc",
    "acc_norm",
    "acc_bytes",
    "acc_mutual_info",
    "exact_match",
)  # measures of the harness that count right answers
DEFAULT_NEW_TOKENS = 256  # the harness's own


@dataclass(frozen=True)
class HarnessScore:
    """One measure of one of the harness's tasks."""

    task: str
    measure: str
    value: float
    stderr: float | None
    n_examples: int
    higher_is_better: bool

    @property
    def interval(self) -> tuple[float | None, float | None]:
        """The ends of the 95% interval: Wilson's for a share, else by the harness's standard error, where it has one."""
        if self.measure.partition(" ")[0] in SHARES:
            return wilson(self.value, self.n_examples)
        return (
            (None, None)
            if self.stderr is None
            else (self.value - Z95 * self.stderr, self.value + Z95 * self.stderr)
        )

    @property
    def worth(self) -> float:
        """What checkpoints are ranked by, more being better, as far as it is shown."""
        return round(self.value if self.higher_is_better else -self.value, 4)


def run_harness(
    engine: Engine,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
) -> list[HarnessScore]:
    """The scores of the named tasks.

    Args:
        include_path: folder of YAML tasks that take the place of the harness's own.
        shots: examples in each prompt; None: as the task says.
        limit: at most so many examples a task, its first ones.
    """
    from lm_eval import simple_evaluate

    model = harness_model(engine, batch_size=batch_size)
    manager = _task_manager(include_path)
    found = simple_evaluate(
        model,
        tasks=list(tasks),
        num_fewshot=shots,
        limit=limit,
        task_manager=manager,
        log_samples=False,
    )
    return [score for task in found["results"] for score in _scores(found, task)]


def check_tasks(tasks: Sequence[str], include_path: Path | None) -> None:
    """Raise a UserError where lm_eval is not installed, or has no task of one of the names."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise UserError(
            '--lm-eval needs lm_eval. Install it: pip install "lm_eval>=0.4.13,<0.5"'
        ) from None
    manager = _task_manager(include_path)
    for task in tasks:
        if not manager.match_tasks([task]):
            there = ", ".join(map(printable, manager.all_tasks)) or "none"
            known = (
                f"{printable(include_path)} has {there}"
                if include_path
                else "`lm-eval ls tasks` shows them"
            )
            raise UserError(
                f"--lm-eval: {printable(task)}: no such task; {known}. Name one that there is, or give its folder by --include-path."
            )


def _task_manager(include_path: Path | None) -> "TaskManager":
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=include_path is None)


def _scores(found: dict[str, Any], task: str) -> list[HarnessScore]:
    """The measures of a task: the harness names each `measure,filter`, and its error `measure_stderr,filter`."""
    numbers, scores = found["results"][task], []
    for key, value in numbers.items():
        measure, comma, kind = key.partition(",")
        if comma and not measure.endswith("_stderr"):
            stderr = numbers.get(f"{measure}_stderr,{kind}")
            name = measure if kind == "none" else f"{measure} ({kind})"
            n = found["n-samples"][task]["effective"]
            higher = found["higher_is_better"][task][measure] is not False
            scores.append(
                HarnessScore(
                    task,
                    name,
                    float(value),
                    stderr if isinstance(stderr, float) and math.isfinite(stderr) else None,
                    n,
                    higher,
                )
            )
    return scores


def harness_model(engine: Engine, *, batch_size: int = 16) -> "LM":
    """The engine as the harness asks it. Prompts that are too long lose their beginning."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows

    class EngineLM(TemplateLM):
        """`TemplateLM` parts context and continuation into tokens as the harness does for every model."""

        @property
        def eot_token_id(self) -> int:
            return engine.tokenizer.eos_id

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
        ) -> list[int]:
            return engine.tokenizer.encode(string)

        def _loglikelihood_tokens(
            self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
        ) -> list[tuple[float, bool]]:
            scores = score_continuations(
                engine,
                [fit_continuation(engine, context, wanted) for _, context, wanted in requests],
                batch_size=batch_size,
            )
            return [(score.log_prob, score.greedy_match) for score in scores]

        def loglikelihood_rolling(
            self, requests: "list[Instance]", disable_tqdm: bool = False
        ) -> list[float]:
            return [self._rolling(request.args[0]) for request in requests]

        def _rolling(self, text: str) -> float:
            """Log-probability of a text of any length, each token after as many before it as the windows hold."""
            windows = get_rolling_token_windows(
                engine.tokenizer.encode(text),
                engine.tokenizer.eos_id,
                engine.model.config.max_seq_len,
                1,
            )
            # Read and wanted tokens overlap in all but one: the context is what stands before the wanted ones.
            pairs = [
                fit_continuation(engine, read[: len(read) - len(wanted) + 1], wanted)
                for read, wanted in windows
            ]
            return sum(
                score.log_prob
                for score in score_continuations(engine, pairs, batch_size=batch_size)
            )

        def generate_until(
            self, requests: "list[Instance]", disable_tqdm: bool = False
        ) -> list[str]:
            return [
                engine.generate(request.args[0], sampling_of(request.args[1]))[0].text
                for request in requests
            ]

    return EngineLM()


def sampling_of(settings: dict[str, Any]) -> SamplingConfig:
    """The harness's settings of a text to write as ours; greedy unless it is told to draw.

    Raises:
        UserError: a setting that we do not have.
    """
    given = {
        name: value for name, value in settings.items() if name != "do_sample" and value is not None
    }
    if unknown := given.keys() - SAMPLING_NAMES.keys():
        raise UserError(
            f"--lm-eval: generation_kwargs: {printable(min(unknown))} is not known here, but {', '.join(SAMPLING_NAMES)}. Take it out of the task."
        )
    ours = {SAMPLING_NAMES[name]: value for name, value in given.items()}
    until = ours.get("stop", ())
    ours["stop"] = (until,) if isinstance(until, str) else tuple(until)
    if not settings.get("do_sample", False):
        ours["temperature"] = 0
    return SamplingConfig.model_validate({"max_new_tokens": DEFAULT_NEW_TOKENS, **ours})
