"""Run tasks of EleutherAI's lm-evaluation-harness on our models
(needs the optional package lm_eval).

`run_harness` returns the scores; `harness_model` adapts our engine to the interface
that the harness calls.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylm.common.errors import UserError
from tinylm.common.statistics import Z95, wilson
from tinylm.config.schema import SamplingConfig
from tinylm.generate.engine import Engine, Request
from tinylm.generate.output import Prompt
from tinylm.generate.scoring import fit_continuation, score_continuations

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager


logger = logging.getLogger(__name__)

# The harness's name of a setting: our name in SamplingConfig.
SAMPLING_NAMES = {
    "max_gen_toks": "max_new_tokens",
    "until": "stop",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "num_beams": "n_beams",
}
# Measures of the harness that are shares of right answers.
SHARES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")
DEFAULT_NEW_TOKENS = 256  # the harness's own default


@dataclass(frozen=True)
class HarnessScore:
    """One measure of one task of the harness."""

    task: str
    measure: str
    value: float
    stderr: float | None
    n_examples: int
    higher_is_better: bool

    @property
    def interval(self) -> tuple[float | None, float | None]:
        """The ends of the 95% interval: Wilson's for a share, else from the standard error, if
        there is one.
        """
        if self.measure.partition(" ")[0] in SHARES:
            return wilson(self.value, self.n_examples)
        if self.stderr is None:
            return None, None
        half = Z95 * self.stderr
        return self.value - half, self.value + half

    @property
    def rank_key(self) -> float:
        """What checkpoints are ranked by, more is better, as displayed."""
        return round(self.value if self.higher_is_better else -self.value, 4)


def run_harness(
    engine: Engine,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    stop_ids: Sequence[int] = (),
) -> list[HarnessScore]:
    """The scores of the named tasks.

    Args:
        include_path: folder of YAML tasks, used in place of the harness's own.
        shots: examples in each prompt; None: as the task says.
        limit: the first examples of each task, at most this many.
        stop_ids: tokens that end a text like EOS, such as those of the model's template.
    """
    from lm_eval import simple_evaluate

    model = harness_model(engine, batch_size=batch_size, stop_ids=stop_ids)
    manager = _task_manager(include_path)
    found = simple_evaluate(
        model,
        tasks=list(tasks),
        num_fewshot=shots,
        limit=limit,
        task_manager=manager,
        log_samples=False,
    )
    scores = []
    for task in found["results"]:
        scores += _task_scores(found, task)
    return scores


def check_tasks(tasks: Sequence[str], include_path: Path | None) -> None:
    """Raise a UserError if lm_eval is not installed, or does not have one of the tasks."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        fix = 'Install it: pip install "lm_eval>=0.4.13,<0.5"'
        raise UserError("--lm-eval", "needs the package lm_eval", fix) from None
    manager = _task_manager(include_path)
    for task in tasks:
        if manager.match_tasks([task]):
            continue
        known = "`lm-eval ls tasks` lists them"
        if include_path:
            known = f"{include_path} has {', '.join(manager.all_tasks) or 'none'}"
        raise UserError(
            ("--lm-eval", task),
            f"no such task; {known}",
            "Name one of these, or give the folder of your task with --include-path",
        )


def _task_manager(include_path: Path | None) -> "TaskManager":
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=include_path is None)


def _task_scores(found: dict[str, Any], task: str) -> list[HarnessScore]:
    """The measures of a task: the harness names them `measure,filter`, and their errors
    `measure_stderr,filter`.
    """
    numbers = found["results"][task]
    n_examples = found["n-samples"][task]["effective"]
    scores = []
    for key, value in numbers.items():
        measure, comma, kind = key.partition(",")
        if not comma or measure.endswith("_stderr"):
            continue
        name = measure if kind == "none" else f"{measure} ({kind})"
        stderr = numbers.get(f"{measure}_stderr,{kind}")
        if not isinstance(stderr, float) or not math.isfinite(stderr):
            stderr = None
        higher = found["higher_is_better"][task][measure] is not False
        scores.append(HarnessScore(task, name, float(value), stderr, n_examples, higher))
    return scores


def harness_model(engine: Engine, *, batch_size: int = 16, stop_ids: Sequence[int] = ()) -> "LM":
    """The engine with the interface of the harness; too long prompts lose their beginning.

    Generated texts are those of the harness's own `hf` model on an export of the model.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs

    class EngineLM(TemplateLM):
        """`TemplateLM` splits context and continuation into tokens as for every model."""

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
            asked = [fit_continuation(engine, context, target) for _, context, target in requests]
            scores = score_continuations(engine, asked, batch_size=batch_size)
            return [(score.log_prob, score.greedy_match) for score in scores]

        def loglikelihood_rolling(
            self, requests: "list[Instance]", disable_tqdm: bool = False
        ) -> list[float]:
            texts = [request.args[0] for request in requests]
            return [log_prob_of_text(engine, text, batch_size) for text in texts]

        def generate_until(
            self, requests: "list[Instance]", disable_tqdm: bool = False
        ) -> list[str]:
            asked = []
            for request in requests:
                text, settings = request.args
                sampling = to_sampling_config(normalize_gen_kwargs(settings, DEFAULT_NEW_TOKENS))
                prompt = fit_harness_prompt(engine, text, sampling.max_new_tokens)
                asked.append(Request(prompt, sampling, stop_ids))
            return [completion.text for completion in engine.complete(asked)]

    return EngineLM()


def log_prob_of_text(engine: Engine, text: str, batch_size: int) -> float:
    """Log-probability of a text of any length, by the windows of the harness: each token given as
    much context as its window has.
    """
    from lm_eval.utils import get_rolling_token_windows

    ids, eos_id = engine.tokenizer.encode(text), engine.tokenizer.eos_id
    windows = get_rolling_token_windows(ids, eos_id, engine.model.config.max_seq_len, 1)
    # Inputs and targets are shifted by one: the context is the inputs before the targets.
    continuations = []
    for inputs, targets in windows:
        context = inputs[: len(inputs) - len(targets) + 1]
        continuations.append(fit_continuation(engine, context, targets))
    return sum(
        s.log_prob for s in score_continuations(engine, continuations, batch_size=batch_size)
    )


def fit_harness_prompt(engine: Engine, text: str, max_new_tokens: int) -> Prompt:
    """The last tokens of `text` that leave room for `max_new_tokens` in the context:
    the harness's rule.

    Where it leaves no room for a prompt, the harness refuses the task. Here the prompt may then
    fill the context, and the model forgets the oldest tokens while it writes.
    """
    limit = engine.model.config.max_seq_len
    # The encoder of an encoder-decoder reads only the prompt and EOS.
    room = limit - (1 if engine.model.has_encoder else max_new_tokens)
    if room < 1:
        logger.warning(
            "max_gen_toks (%d) leaves no room for a prompt in a context of %d tokens: "
            "lm-eval's hf model refuses such a task; here the model forgets the oldest tokens",
            max_new_tokens,
            limit,
        )
        room = limit
    prompt = engine.encode_prompt(text)
    cut = max(0, len(prompt.ids) - room)
    return Prompt(prompt.ids[cut:], prompt.truncated + cut)


def to_sampling_config(settings: dict[str, Any]) -> SamplingConfig:
    """The harness's generation_kwargs as our settings; greedy unless do_sample is set.

    Raises:
        UserError: a setting that we do not have.
    """
    given = {}
    for name, value in settings.items():
        if name != "do_sample" and value is not None:
            given[name] = value
    if unknown := given.keys() - SAMPLING_NAMES.keys():
        raise UserError(
            ("--lm-eval", "generation_kwargs", min(unknown)),
            f"not supported; known are {', '.join(SAMPLING_NAMES)}",
            "Remove it from the task",
        )
    ours = {SAMPLING_NAMES[name]: value for name, value in given.items()}
    until = ours.get("stop", ())
    ours["stop"] = (until,) if isinstance(until, str) else tuple(until)
    if not settings.get("do_sample", False):
        ours["temperature"] = 0
    return SamplingConfig.model_validate({"max_new_tokens": DEFAULT_NEW_TOKENS, **ours})
