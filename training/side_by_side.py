"""All models of a pipeline on the same held-out data and the same prompts: the table, results.json,
report.md.

compare         a row of METRICS for each stage, and what each model writes on each prompt
table_rows      the table for the terminal; sample_lines: the samples
write_results   results.json for programs, report.md for people
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from tinylm.checkpoint.initial import open_initial_model
from tinylm.checkpoint.load import Loaded, load_model, load_reward_model, load_verifier
from tinylm.common.device import autocast_dtype, pick_device
from tinylm.common.errors import printable
from tinylm.common.files import read_regular, write_atomic
from tinylm.config.schema import Config, SamplingConfig
from tinylm.eval.answers import answer_questions, read_questions
from tinylm.eval.pair_validation import pair_validation, score_reward_model
from tinylm.eval.tasks.data import with_data_of_task
from tinylm.eval.validation import answer_validation, score_checkpoint, text_validation
from tinylm.generate.chat import format_prompt
from tinylm.generate.engine import Engine
from tinylm.model.decoder import Decoder
from tinylm.model.hf_model import HFModel
from tinylm.objectives.verifier import VerifierScore
from training.context import RunContext
from training.held_out import HeldOutTest, ask_models, test_lines
from training.pipeline import PipelineStage
from training.stages.dpo import PreferenceData
from training.stages.reference_log_probs import pair_log_probs
from training.stages.verifier import prepare_data

logger = logging.getLogger(__name__)
# The rows of the table, in this order, with their meaning.
METRICS = {
    "val_ppl": "perplexity of the held-out text of stage pretrain; lower is better",
    "response_loss": "nats per token of the held-out answers of stage sft; lower is better",
    "response_accuracy": "share of the tokens of these answers that the model ranks first",
    "answer_f1": "overlap of the words that the model answers with those of the held-out answers "
    "of stage sft, 0 to 1",
    "answer_exact": "share of these questions that it answers letter for letter",
    "learned_exact": "the same for questions that stage sft was trained on",
    "preference_accuracy": "share of the held-out pairs of stage dpo "
    "whose chosen answer is more probable",
    "reward_accuracy": "the same for the implicit reward: log-probabilities relative "
    "to the reference, the model that dpo began with",
    "reward_margin": "mean difference of the implicit rewards of chosen and rejected answers",
    "reward_model_accuracy": "share of the held-out pairs of stage reward_model "
    "whose chosen answer has the higher reward",
    "verifier_accuracy": "share of the held-out answers of stage verifier "
    "that are classified correctly",
    "verifier_auc": "probability that a correct answer scores above a wrong one; 0.5 is chance",
}
SAMPLE_TOKENS = 60
# Questions of each split of stage sft that every fine-tuned model answers.
N_QUESTIONS = 50
# Of the held-out ones, so many are printed with all answers.
N_SHOWN = 5


def results_of(
    out: Path, stages: list[PipelineStage], weights: str, test: HeldOutTest | None
) -> dict[str, Any]:
    """The comparison of the stages, and what they answer to the held-out questions of `test`: read
    from results.json, or computed and written there and to report.md.

    Args:
        weights: identifies the weights of all stages.
    """
    made_from = weights if test is None else f"{weights} {test.fingerprint()}"
    results = known_results(out, made_from)
    if results is None:
        results = compare(stages) | {"made_from": made_from}
        if test is not None:
            results["test"] = ask_models(test, stages)
        write_results(out, results, stages)
    return results


def known_results(out: Path, made_from: str) -> dict[str, Any] | None:
    """The results in results.json, if they were computed from the weights
    that `made_from` identifies.
    """
    path = out / "results.json"
    if not path.exists():
        return None
    try:
        results = json.loads(read_regular(path))
        is_known = results["made_from"] == made_from and "answers" in results
        return results if is_known else None
    except (ValueError, TypeError, KeyError):  # cut off or edited: computed again
        return None


def compare(stages: list[PipelineStage]) -> dict[str, Any]:
    """`models`: a row of METRICS for each stage; `samples`: what each model writes on each prompt,
    greedily; `answers`: what it answers to held-out questions.
    """
    models: list[dict[str, Any]] = []
    samples: list[dict[str, str]] = []
    answers: list[dict[str, str]] = []
    log_probs: dict[str, np.ndarray] = {}
    for stage in stages:
        device, _ = pick_device(stage.config.hardware.accelerator, key="hardware.accelerator")
        path = stage.model
        logger.info("compare: %s", path)
        row: dict[str, Any] = {"stage": stage.name, "checkpoint": str(path)}
        if stage.kind == "verifier":
            row |= verifier_metrics(stage, path, device)
            models.append(row)
            continue
        if stage.kind == "reward_model":
            models.append(row | reward_model_metrics(stage, path, device))
            continue
        loaded = load_model(path, device)
        row["tokenizer"] = loaded.tokenizer.fingerprint
        row |= text_metrics(loaded, stages)
        if loaded.template is not None:
            metrics, held_out = answer_metrics(loaded, stages)
            row |= metrics
            answers += [{"stage": stage.name, **answer} for answer in held_out]
        log_probs[str(path)] = held_out_log_probs(loaded, loaded.model, stages)
        reference = reference_of(stage)
        if reference is not None and reference not in log_probs:
            base = open_initial_model(reference, loaded.config.tokenizer.special_tokens)
            model = base.build(loaded.config.model).to(device)
            log_probs[reference] = held_out_log_probs(loaded, model, stages)
        row |= preference_metrics(stage, log_probs, str(path))
        models.append(row)
        for prompt in prompts_of(stages):
            samples.append({"stage": stage.name, "prompt": prompt, "text": sample(loaded, prompt)})
    return {"models": models, "samples": samples, "answers": answers}


def prompts_of(stages: list[PipelineStage]) -> list[str]:
    """The sample prompts of all stages, without repetition."""
    prompts = [stage.config.training.sample_prompt for stage in stages]
    return list(dict.fromkeys(prompt for prompt in prompts if prompt is not None))


def config_of(kind: str, stages: list[PipelineStage]) -> Config | None:
    """The config of the first stage of a kind, with all of its validation data;
    None if there is no such stage.
    """
    found = [stage.config for stage in stages if stage.kind == kind]
    if not found:
        return None
    config = with_data_of_task(found[0])
    training = config.training.model_copy(update={"val_batches": None})
    return config.model_copy(update={"training": training})


def text_metrics(loaded: Loaded, stages: list[PipelineStage]) -> dict[str, Any]:
    """Metrics on the text of stage pretrain and on the answers of stage sft."""
    row: dict[str, Any] = {}
    tokenizer = loaded.tokenizer
    if (config := config_of("pretrain", stages)) is not None:
        data = text_validation(config, loaded, tokenizer, seq_len=config.training.seq_len)
        row["val_ppl"] = score_checkpoint(loaded, tokenizer, data.batches).perplexity
    if (config := config_of("sft", stages)) is not None:
        data = answer_validation(config, loaded, tokenizer)
        score = score_checkpoint(loaded, tokenizer, data.batches)
        row |= {"response_loss": score.loss, "response_accuracy": score.accuracy}
    return row


def answer_metrics(
    loaded: Loaded, stages: list[PipelineStage]
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Metrics on the model's own answers to questions of stage sft, and the held-out answers."""
    config = config_of("sft", stages)
    if config is None:
        return {}, []
    seed = config.training.seed
    learned, held_out = (
        answer_questions(
            loaded, read_questions(config.data, which, seed, N_QUESTIONS), SAMPLE_TOKENS
        )
        for which in ("train", "val")
    )
    metrics = {
        "answer_f1": fmean(answer.f1 for answer in held_out),
        "answer_exact": fmean(answer.is_exact for answer in held_out),
        "learned_exact": fmean(answer.is_exact for answer in learned),
    }
    shown = []
    for answer in held_out:
        question = answer.question
        shown.append(
            {"question": question.text, "expected": question.expected, "text": answer.text}
        )
    return metrics, shown


def reference_of(stage: PipelineStage) -> str | None:
    """The reference model of stage dpo; None for other stages, and for a loss without one."""
    dpo, init_from = stage.config.dpo, stage.config.training.init_from
    if dpo is None or dpo.reference is None or init_from is None:
        return None
    return str(Path(init_from))


def held_out_log_probs(
    loaded: Loaded, model: Decoder | HFModel, stages: list[PipelineStage]
) -> np.ndarray:
    """(n, 2): log p under `model` of the chosen and the rejected answer of each held-out pair of
    stage dpo.

    (0, 2) without a stage dpo. Tokens and precision are those of `loaded`.
    """
    config = config_of("dpo", stages)
    if config is None:
        return np.empty((0, 2))
    data = PreferenceData(config, loaded.tokenizer)
    data.prepare()
    dtype = autocast_dtype(loaded.config.hardware.precision)
    return pair_log_probs(model, data.val_dataloader(), dtype)


def preference_metrics(
    stage: PipelineStage, log_probs: dict[str, np.ndarray], path: str
) -> dict[str, Any]:
    """Which answers the model itself prefers, and after dpo also relative to the reference."""
    own = log_probs[path]
    if not len(own):
        return {}
    row: dict[str, Any] = {
        "preference_accuracy": float((own[:, 0] > own[:, 1]).mean()),
        "n_pairs": len(own),
    }
    reference = reference_of(stage)
    if stage.config.dpo is not None and reference is not None:
        margin = (own - log_probs[reference]) @ (1, -1)
        row["reward_accuracy"] = float((margin > 0).mean())
        row["reward_margin"] = float(stage.config.dpo.beta * margin.mean())
    return row


def verifier_metrics(stage: PipelineStage, path: Path, device: str) -> dict[str, Any]:
    """Metrics on the validation problems of stage verifier."""
    score = verifier_score(stage, path, device)
    low, high = score.interval
    return {
        "verifier_accuracy": score.accuracy,
        "verifier_auc": score.auc,
        "verifier_low": low,
        "verifier_high": high,
        "majority": score.majority,
        "n_answers": score.n,
    }


def verifier_score(stage: PipelineStage, path: Path, device: str) -> VerifierScore:
    """The verifier's score on every held-out answer."""
    config = config_of("verifier", [stage])
    assert config is not None
    loaded = load_verifier(path, device)
    data = prepare_data(RunContext("verifier", config, device), loaded.tokenizer)
    probabilities, labels = [], []
    with torch.inference_mode():
        for batch in data.val_dataloader():
            logits = loaded.model(batch["input_ids"].to(device), batch["attention_mask"].to(device))
            probabilities.append(torch.sigmoid(logits.float()).cpu().numpy())
            labels.append(batch["label"].numpy())
    return VerifierScore.of(np.concatenate(probabilities), np.concatenate(labels))


def reward_model_metrics(stage: PipelineStage, path: Path, device: str) -> dict[str, Any]:
    """Metrics on the validation pairs of stage reward_model."""
    config = config_of("reward_model", [stage])
    assert config is not None and config.reward_model is not None
    loaded = load_reward_model(path, device)
    batches = pair_validation(config, loaded).batches
    score = score_reward_model(loaded.model, batches, config.reward_model.center_coef)
    return {
        "reward_model_accuracy": score["val_accuracy"],
        "reward_model_low": score["val_accuracy_low"],
        "reward_model_high": score["val_accuracy_high"],
        "n_pairs": score["pairs"],
    }


def sample(loaded: Loaded, prompt: str) -> str:
    """What the model writes on a prompt, in its template if it was fine-tuned with one,
    as infer.py does.
    """
    engine = Engine.of(loaded)
    formatted = format_prompt(engine, prompt, loaded.make_template(), system=loaded.system)
    greedy = SamplingConfig(max_new_tokens=SAMPLE_TOKENS, temperature=0)
    return engine.generate(formatted.prompt, greedy, stop_ids=formatted.stop_ids)[0].text


# --- the report ---


def metrics_in(results: dict[str, Any]) -> list[str]:
    """The metrics that at least one model has."""
    return [name for name in METRICS if any(name in row for row in results["models"])]


def notes_on(results: dict[str, Any]) -> Iterator[str]:
    """Reasons why numbers of the table cannot be compared."""
    if len({row["tokenizer"] for row in results["models"] if "tokenizer" in row}) > 1:
        yield (
            "note: these models have different tokenizers: val_ppl, response_loss and "
            "response_accuracy are per token and cannot be compared between them"
        )


def table_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The table: a row for each metric, a column for each stage."""
    models = results["models"]
    return [
        {"metric": name, **{row["stage"]: row.get(name) for row in models}}
        for name in metrics_in(results)
    ]


def sample_lines(results: dict[str, Any], stages: list[PipelineStage]) -> Iterator[str]:
    """The samples for the terminal: each prompt with what every model writes on it."""
    for prompt in prompts_of(stages):
        yield f"\n{printable(prompt)}"
        for found in results["samples"]:
            if found["prompt"] == prompt:
                yield f"  {found['stage']:>8}: {printable(found['text'].strip())}"
    for question, expected, given in shown_questions(results):
        yield f"\n{printable(question)} (held out; expected: {printable(expected)})"
        for stage_name, text in given.items():
            yield f"  {stage_name:>8}: {printable(text)}"
    yield ""


def shown_questions(results: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, str]]]:
    """The first held-out questions: question, expected answer, and what each stage answers."""
    given: dict[tuple[str, str], dict[str, str]] = {}
    for answer in results["answers"]:
        key = (answer["question"], answer["expected"])
        given.setdefault(key, {})[answer["stage"]] = answer["text"]
    for (question, expected), texts in list(given.items())[:N_SHOWN]:
        yield question, expected, texts


def write_results(out: Path, results: dict[str, Any], stages: list[PipelineStage]) -> None:
    """Write report.md and results.json."""
    report = "".join(f"{line}\n" for line in report_lines(results, stages))
    write_atomic(out / "report.md", report, "--out")
    text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    write_atomic(out / "results.json", text, "--out")


def report_lines(results: dict[str, Any], stages: list[PipelineStage]) -> Iterator[str]:
    """The lines of report.md."""
    models = results["models"]
    yield "# The stages side by side\n"
    for stage, row in zip(stages, models, strict=True):
        yield f"- {stage.name}: `{' '.join(stage.command)}` wrote {printable(row['checkpoint'])}"
    yield f"\n| | {' | '.join(row['stage'] for row in models)} |"
    yield f"|---|{'---:|' * len(models)}"
    for name in metrics_in(results):
        values = [row.get(name) for row in models]
        cells = ["-" if value is None else f"{value:.4f}" for value in values]
        yield f"| {name} | {' | '.join(cells)} |"
    yield "\nAll models on the same held-out data:\n"
    for name in metrics_in(results):
        yield f"- {name}: {METRICS[name]}"
    for note in notes_on(results):
        yield f"\n{note}"
    for stage, row in zip(stages, models, strict=True):
        if stage.kind == "dpo":
            yield f"\n{row['n_pairs']} pairs of answers were held out."
        if stage.kind == "reward_model":
            yield (
                f"\nThe reward model compared {row['n_pairs']} held-out pairs: 95% interval of its "
                f"accuracy {row['reward_model_low']:.3f} to {row['reward_model_high']:.3f}."
            )
        if stage.kind == "verifier":
            yield (
                f"\nThe verifier classified {row['n_answers']} held-out answers: "
                f"95% interval of its accuracy {row['verifier_low']:.3f} to "
                f"{row['verifier_high']:.3f}; always giving the more frequent label has "
                f"{row['majority']:.3f}."
            )
    if "test" in results:
        yield from test_lines(results["test"])
    if results["samples"]:
        yield from _report_samples(results, stages)


def _report_samples(results: dict[str, Any], stages: list[PipelineStage]) -> Iterator[str]:
    yield "\n## The same prompts\n"
    yield (
        f"Greedy, at most {SAMPLE_TOKENS} tokens. The base model continues the bare prompt; "
        "the others get it in their template."
    )
    for prompt in prompts_of(stages):
        yield f"\n**{printable(prompt)}**\n"
        for found in results["samples"]:
            if found["prompt"] == prompt:
                yield f"- {found['stage']}: {printable(found['text'].strip()) or '(nothing)'}"
    if results["answers"]:
        yield "\n## Held-out questions of stage sft\n"
    for question, expected, given in shown_questions(results):
        yield f"\n**{printable(question)}** (expected: {printable(expected)})\n"
        for stage_name, text in given.items():
            yield f"- {stage_name}: {printable(text) or '(nothing)'}"
