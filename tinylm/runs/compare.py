"""What experiments have shown: every checkpoint measured, and one report of all runs.

    evaluate      the steps that are done ─▶ evaluation.csv, positions.csv, generations.json, pictures, report.md
    measure       one run ─▶ `Found`: its losses, the loss by position, where its heads look, what it writes; kept on disk
    write_report  all that was found ─▶ Markdown

A model reads beyond the positions of its training in several ways: `READINGS`.
"""

import csv
import json
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinylm.checkpoint import format as checkpoint_format
from tinylm.checkpoint import info as checkpoint_info
from tinylm.checkpoint import load as checkpoint_load
from tinylm.common.errors import UserError, printable, reading, writing
from tinylm.common.files import write_atomic
from tinylm.config.schema import SamplingConfig
from tinylm.eval.perplexity import LOSS_CAP, byte_length_table, score_batches
from tinylm.generate.engine import Engine
from tinylm.model.attention_sinks import with_attention_sinks
from tinylm.model.decoder import Decoder, active_parameters, count_parameters
from tinylm.runs.experiments import QUESTIONS, Question, Say, Step, is_done, last_line
from tinylm.runs.plots import attention_maps, draw, draw_lines, find_runs, smoothed
from tinylm.tokens.packing import IGNORE_INDEX, row_at
from tinylm.tokens.run_files import cached_token_file


@dataclass(frozen=True)
class Reading:
    """A way in which a model reads a text longer than any it was trained on."""

    run: str
    window: int | None = None
    """last positions that are kept; None: as the model was built, up to its max_seq_len"""
    first: int = 0
    """first positions that are kept beside them"""

    @property
    def name(self) -> str:
        """The run, and what is kept of the text."""
        if self.window is None:
            return f"{self.run}, as built"
        return (
            f"{self.run}, "
            + (f"first {self.first} + " if self.first else "")
            + f"last {self.window}"
        )


# The caches of 128 positions are as large as the rows of training: Xiao et al. 2023, table 1, in small.
READINGS = (
    Reading("base"), Reading("base", 128), Reading("base", 124, 4),
    Reading("sinks"), Reading("sinks", 128), Reading("sinks", 124, 4),
    Reading("window"), Reading("window", 60, 4), Reading("window-sinks"), Reading("window-sinks", 64),
    Reading("learned"), Reading("alibi"),
)  # fmt: skip
# How far a cache that forgets is followed. A row begins every so many tokens, so that each position is asked of much the same text;
# what is left of the text in a curve returns after as many positions, and a mean over them has none of it.
FAR, ROW_STRIDE = 2048, 128
# Borders of the bands of positions in the table; training saw the first 128.
BANDS = (0, 32, 128, 256, 512, 1024, FAR)
# Where heads look is taken from rows of the length of training, at positions that have much to look at.
MAP_ROWS, MAP_FROM, MAP_FIRST = 8, 64, 4
PROMPTS = ("Attention is", "The loss", "A token")
FAR_PROMPT, FAR_TOKENS, FAR_SAMPLES = "Attention is", 600, 4
# Characters of its beginning and of its end that are compared.
FAR_PART = 200
BATCH_ROWS = 8
TEMPERATURE = 0.7


# --- measuring ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What one checkpoint does on its validation data."""

    run: str
    seed: int
    stage: str
    step: int
    val_loss: float | None
    """of a fine-tuned model, what its run measured on the answers; None where it did not at this step"""
    val_ppl: float | None
    val_bpb: float | None
    """of a pretrained model"""
    parameters: int
    active: int | None = None
    """parameters that a token meets: of the experts of a layer only those it is sent to"""
    cache_bytes: int | None = None
    """keys and values of one token in all layers, in fp32"""


@dataclass(frozen=True)
class Found:
    """All that was measured of one run."""

    results: list[Result]
    """one a checkpoint, in the order of the steps"""
    positions: dict[str, list[float]] = field(default_factory=dict)
    """by the name of a reading, the mean loss at each position"""
    looks: dict[str, float] = field(default_factory=dict)
    """where heads look"""
    texts: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "Found":
        """What `asdict` gave."""
        return cls(**plain | {"results": [Result(**result) for result in plain["results"]]})


def evaluate(steps: Iterable[Step], out: Path, say: Say) -> Path:
    """Measure every checkpoint of the training steps among `steps`, write tables, texts and pictures; the path of the report comes back.

    What was measured of a run is kept, and measured anew where its checkpoints are others.

    Raises:
        UserError: no run has finished, or a file cannot be written.
    """
    found, left_out = {}, {}
    for step in steps:
        run = step.result.parent.name
        if step.result.suffix != ".ckpt":
            continue
        try:
            if is_done(step):
                found[run] = kept_measure(run, step, out)
                say(
                    f"{run}: {'; '.join(f'step {result.step} {_number(result.val_loss)}' for result in found[run].results)}"
                )
            else:
                left_out[run] = (
                    f"its output ends: {last_line(step.output)}"
                    if step.output.exists()
                    else "not run"
                )
        except UserError as error:
            left_out[run] = str(error)
        if run in left_out:
            say(f"{run}: left out: {left_out[run]}")
    if not any(result.stage == "pretrain" for one in found.values() for result in one.results):
        fix = "Run: python -m tinylm experiments --phase pretrain"
        raise UserError(out, "no finished run", fix)
    return write_findings(Findings(found, left_out, out))


def kept_measure(run: str, step: Step, out: Path) -> Found:
    """What was measured of a run, from a file if that is of these checkpoints and these measures."""
    name, _, seed = run.partition("-seed")
    paths = [
        path
        for path in reversed(checkpoint_format.candidates(step.result.parent))
        if checkpoint_format.step_of(path) >= 0
    ]
    files = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    readings = [reading.name for reading in READINGS if reading.run == name]
    texts = [PROMPTS, FAR_PROMPT, FAR_TOKENS, FAR_SAMPLES, FAR_PART, TEMPERATURE]
    key = json.loads(
        json.dumps([files, readings, FAR, ROW_STRIDE, MAP_ROWS, MAP_FROM, MAP_FIRST, texts])
    )
    kept = out / "measured" / f"{run}.json"
    if kept.exists():
        with reading(kept):
            was = json.loads(kept.read_text(encoding="utf-8"))
        if was["of"] == key:
            return Found.from_plain(was["found"])
    measured = measure(name, int(seed or 1), paths)
    write_atomic(kept, json.dumps({"of": key, "found": asdict(measured)}) + "\n", "--out")
    return measured


def measure(name: str, seed: int, paths: Sequence[Path]) -> Found:
    """Measure one run; `paths` are its checkpoints, the last one last."""
    if checkpoint_info.describe(paths[-1]).stage != "pretrain":
        return Found([told(name, checkpoint_info.describe(path)) for path in paths])
    results = [score(name, seed, checkpoint_load.load_model(path)) for path in paths]
    last = checkpoint_load.load_model(paths[-1])
    positions = {
        reading.name: loss_by_position(last, reading).tolist()
        for reading in READINGS
        if reading.run == name
    }
    looks = where_heads_look(last) if name in QUESTIONS[-1].runs else {}
    return Found(results, positions, looks, generations(name, seed, last, far=bool(positions)))


def told(name: str, info: checkpoint_info.CheckpointInfo) -> Result:
    """What a fine-tuned checkpoint says of itself."""
    perplexity = None if info.val_loss is None else float(np.exp(min(info.val_loss, LOSS_CAP)))
    return Result(name, 1, info.stage, info.step, info.val_loss, perplexity, None, info.parameters)


def score(name: str, seed: int, loaded: checkpoint_load.Loaded) -> Result:
    """The checkpoint's score on every validation row of the length it was trained on."""
    config, model, length = loaded.config.model, loaded.model, loaded.config.training.seq_len
    lengths = byte_length_table(loaded.tokenizer, model.embedding.num_embeddings)
    found = score_batches(model, _batches(loaded, length, length, whole=False), lengths)
    cache = 2 * config.n_layers * config.n_kv_heads * config.head_dim * 4
    numbers = (
        found.loss,
        found.perplexity,
        found.bits_per_byte,
        count_parameters(model),
        active_parameters(model),
        cache,
    )
    return Result(name, seed, loaded.info.stage, loaded.info.step, *numbers)


def _batches(
    loaded: checkpoint_load.Loaded, length: int, stride: int, *, whole: bool
) -> Iterator[dict[str, torch.Tensor]]:
    """Validation rows that begin every `stride` tokens; `whole` leaves out those that the text's end cuts short, but never all."""
    config, tokenizer = loaded.config, loaded.tokenizer
    tokens = cached_token_file(config.data, "val", tokenizer, config.training.seed).tokens
    starts = range(0, max(1, len(tokens) - (length if whole else 1)), stride)
    for first in range(0, len(starts), BATCH_ROWS):
        inputs, labels = zip(
            *(
                row_at(tokens, start, length, tokenizer.pad_id)
                for start in starts[first : first + BATCH_ROWS]
            ),
            strict=True,
        )
        yield {
            "input_ids": torch.from_numpy(np.stack(inputs)),
            "labels": torch.from_numpy(np.stack(labels)),
        }


@torch.no_grad()
def loss_by_position(loaded: checkpoint_load.Loaded, reading: Reading) -> np.ndarray:
    """The mean loss at each position of validation rows, read in one way; NaN where no row has a target.

    As built a model reads as far as max_seq_len says, and `FAR` positions through a cache that forgets.
    """
    model, length = loaded.model, loaded.config.model.max_seq_len
    if reading.window is not None:
        assert isinstance(model, Decoder)  # our own configs
        length = FAR
        model = with_attention_sinks(model, window=reading.window, n_first=reading.first)
    total, n = np.zeros(length), np.zeros(length)
    for batch in _batches(loaded, length, ROW_STRIDE, whole=True):
        logits, labels = model(batch["input_ids"]), batch["labels"]
        losses = torch.nn.functional.cross_entropy(
            logits.mT, labels, reduction="none"
        )  # 0 where nothing is asked
        total += losses.sum(dim=0).double().numpy()
        n += (labels != IGNORE_INDEX).sum(dim=0).numpy()
    return np.divide(total, n, out=np.full(length, np.nan), where=n > 0)


def banded(losses: np.ndarray) -> dict[str, float]:
    """The mean loss in each band of positions.

    >>> banded(np.repeat([4.0, 3.0], [32, 96]))
    {'0-31': 4.0, '32-127': 3.0}
    """
    bands = [
        (start, stop)
        for start, stop in zip(BANDS, BANDS[1:], strict=False)
        if np.isfinite(losses[start:stop]).any()
    ]
    return {f"{start}-{stop - 1}": float(np.nanmean(losses[start:stop])) for start, stop in bands}


def where_heads_look(loaded: checkpoint_load.Loaded) -> dict[str, float]:
    """Shares of attention on the learned sinks and on a row's first tokens, from MAP_FROM on: the mean head, and the one with most."""
    model, n_sinks = loaded.model, loaded.config.model.n_sinks
    assert isinstance(model, Decoder)  # our own configs
    rows = next(_batches(loaded, loaded.config.training.seq_len, ROW_STRIDE, whole=True))[
        "input_ids"
    ][:MAP_ROWS]
    maps = torch.stack([attention_maps(model, row.tolist()) for row in rows])[
        :, :, :, MAP_FROM:
    ]  # (rows, layers, heads, T, n_sinks + T)
    shares = {}
    for name, part in (
        ("sinks", maps[..., :n_sinks]),
        ("first", maps[..., n_sinks : n_sinks + MAP_FIRST]),
    ):
        of_head = part.sum(dim=-1).mean(dim=(0, 3))  # (layers, heads)
        shares |= {name: of_head.mean().item(), f"{name}, most": of_head.max().item()}
    return shares


def generations(
    name: str, seed: int, loaded: checkpoint_load.Loaded, *, far: bool
) -> list[dict[str, Any]]:
    """What a model writes on the fixed prompts and, with `far`, at several times the length of its training."""
    engine = Engine(loaded.model, loaded.tokenizer)
    known = known_words(loaded)
    asked = [(prompt, 80, 1) for prompt in PROMPTS] + [
        (FAR_PROMPT, FAR_TOKENS, sample) for sample in range(1, FAR_SAMPLES + 1)
    ] * far
    texts = []
    for prompt, n, sample in asked:
        text = long_text(engine, prompt, n, sample)
        shares = {
            "words_known_first": share_known(text[:FAR_PART], known),
            "words_known_last": share_known(text[-FAR_PART:], known),
        }
        texts.append(
            {
                "run": name,
                "seed": seed,
                "sample": sample,
                "prompt": prompt,
                "max_new_tokens": n,
                "text": text,
            }
            | (shares if n == FAR_TOKENS else {})
        )
    return texts


def long_text(engine: Engine, prompt: str, n: int, seed: int) -> str:
    """What a model writes in `n` tokens after a prompt; where it ends a text it goes on with the next, on a new line."""
    ids, texts = engine.tokenizer.encode(prompt), []
    while n > 0:
        [written] = engine.generate(
            engine.fit_prompt(ids),
            SamplingConfig(max_new_tokens=n, temperature=TEMPERATURE, seed=100 * seed + len(texts)),
        )
        ids, n = [*ids, *written.ids], n - len(written.ids)
        texts.append(written.text)
    return "\n".join(texts)


def known_words(loaded: checkpoint_load.Loaded) -> set[str]:
    """The words of the training text."""
    file = cached_token_file(
        loaded.config.data, "train", loaded.tokenizer, loaded.config.training.seed
    )
    return set(re.findall(r"\w+", loaded.tokenizer.decode(file.tokens[:].tolist())))


def share_known(text: str, known: set[str]) -> float:
    """The share of a text's words that are among `known`; its first and last one may be cut, and do not count.

    >>> share_known("ost in the modle and", {"in", "the", "model"})
    0.6666666666666666
    """
    words = re.findall(r"\w+", text)[1:-1]
    return sum(word in known for word in words) / len(words) if words else 0.0


# --- the report -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Findings:
    """What was measured of all runs, and where it is written."""

    found: dict[str, Found]
    """by the name of a run"""
    left_out: dict[str, str]
    """runs that are not compared, and why"""
    out: Path

    def seeds(self, name: str) -> list[Found]:
        """The runs of a config, by seed."""
        return [one for one in self.found.values() if one.results[-1].run == name]

    def last(self, name: str) -> dict[int, Result]:
        """What the last checkpoints of a config's runs do, by seed."""
        return {one.results[-1].seed: one.results[-1] for one in self.seeds(name)}

    def position_losses(self) -> dict[str, np.ndarray]:
        """By the name of a reading, the mean loss at each position, over the seeds too."""
        runs = {reading.name: self.seeds(reading.run) for reading in READINGS}
        return {
            name: np.mean([one.positions[name] for one in found], axis=0)
            for name, found in runs.items()
            if found
        }


def write_findings(findings: Findings) -> Path:
    """Write the tables, the texts, the pictures and the report, whose path comes back."""
    out = findings.out
    results = [result for one in findings.found.values() for result in one.results]
    bands = {name: banded(losses) for name, losses in findings.position_losses().items()}
    texts = [text for one in findings.found.values() for text in one.texts]
    _write_csv(out / "evaluation.csv", [asdict(result) for result in results])
    _write_csv(out / "positions.csv", [{"reading": name, **of} for name, of in bands.items()])
    write_atomic(
        out / "generations.json", json.dumps(texts, indent=2, ensure_ascii=False) + "\n", "--out"
    )
    _draw(findings)
    write_atomic(out / "report.md", write_report(findings, bands, texts), "--out")
    return out / "report.md"


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with writing(path, "--out"), open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def _draw(findings: Findings) -> None:
    out, by_name = findings.out, {run.name: run for run in find_runs([findings.out / "logs"])}
    pictures = {}
    for number, question in enumerate(QUESTIONS, start=1):
        runs = [by_name[name] for name in question.runs if name in findings.found]
        if len(runs) > 1:
            pictures[f"question-{number}.png"] = draw("val_loss", runs)
    losses = {name: smoothed(of, ROW_STRIDE) for name, of in findings.position_losses().items()}
    for of in losses.values():
        of[:16] = (
            np.nan
        )  # whoever has read next to nothing knows nothing, and all else would look flat
    built = {reading.name for reading in READINGS if reading.window is None}
    title = f"Validation loss by position (mean of the {ROW_STRIDE} up to it)"
    for name, chosen in (("positions", losses.keys() & built), ("streams", losses.keys() - built)):
        lines = {name: of for name, of in losses.items() if name in chosen}
        pictures[f"{name}.png"] = draw_lines(
            lines,
            title=title,
            xlabel="position",
            ylabel="nats per token",
            mark=(128, "training saw 0-127"),
        )
    for name, figure in pictures.items():
        with writing(out / name, "--out"):
            figure.savefig(out / name)


def write_report(
    findings: Findings, bands: dict[str, dict[str, float]], texts: list[dict[str, Any]]
) -> str:
    """The comparison as Markdown: a table and a picture a question, losses by position, where heads look, and what the models write."""
    seeds = max(result.seed for one in findings.found.values() for result in one.results)
    told = (
        "One seed: small differences are chance."
        if seeds == 1
        else f"{seeds} seeds: val_loss is their mean, and the last column has each by itself."
    )
    parts = [
        "# Experiments\n",
        f"One text, one number of steps; the runs of a question differ in one thing (configs/experiments). {told}\n",
    ]
    if findings.left_out:
        parts += [
            "Left out:\n",
            *(f"- {run}: {printable(why)}" for run, why in findings.left_out.items()),
            "",
        ]
    for number, question in enumerate(QUESTIONS, start=1):
        parts += _answer(findings, question, number)
    parts += [*_beyond(bands), *_looks(findings), *_written(texts), *_tasks(findings.out)]
    return "\n".join(parts)


def table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown, names to the left and numbers to the right, and an empty line."""
    return [
        f"| {' | '.join(names)} |",
        f"|---|{'---:|' * (len(names) - 1)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _answer(findings: Findings, question: Question, number: int) -> list[str]:
    first = findings.last(question.runs[0])
    rows = [_row(of, first) for name in question.runs if (of := findings.last(name))]
    if len(rows) < 2:
        return []
    names = (
        "run",
        "parameters",
        "of them active",
        "cache bytes a token",
        "val_loss",
        "val_bpb",
        f"val_loss beside {question.runs[0]}",
    )
    return [
        f"## {question.title}\n",
        *table(names, rows),
        f"![validation loss, first seed](question-{number}.png)\n",
    ]


def _row(of: dict[int, Result], first: dict[int, Result]) -> list[str]:
    """The row of a run: means over its seeds, and its differences from the run of the same seed that it is held against."""
    [one, *_] = of.values()
    losses = {seed: result.val_loss for seed, result in of.items() if result.val_loss is not None}
    beside = [
        f"{loss - first[seed].val_loss:+.4f}"
        for seed, loss in losses.items()
        if seed in first and first[seed].val_loss is not None
    ]
    bpb = statistics.fmean(result.val_bpb for result in of.values() if result.val_bpb is not None)
    sizes = (f"{one.parameters:,}", f"{one.active:,}", f"{one.cache_bytes:,}")
    return [
        one.run,
        *sizes,
        _number(statistics.fmean(losses.values())),
        _number(bpb),
        " ".join(beside),
    ]


def _beyond(bands: dict[str, dict[str, float]]) -> list[str]:
    names = [f"{start}-{stop - 1}" for start, stop in zip(BANDS, BANDS[1:], strict=False)]
    about = (
        "Mean validation loss in bands of positions; training saw 0-127. A cache of the last positions alone is what sinks are to mend: "
        "with the first few kept beside them, or with learned sinks (Xiao et al. 2023). A dash: as built, a model has no more positions. "
        "Of a learned table the rows from 128 on were never trained.\n"
    )
    rows = [
        [name, *(f"{of[band]:.3f}" if band in of else "-" for band in names)]
        for name, of in bands.items()
    ]
    pictures = [
        "![loss by position, as built](positions.png)\n",
        "![loss by position, through caches](streams.png)\n",
    ]
    return (
        [
            "## Beyond the positions of training\n",
            about,
            *table(("what is read", *names), rows),
            *pictures,
        ]
        if rows
        else []
    )


def _looks(findings: Findings) -> list[str]:
    rows = []
    for name in QUESTIONS[-1].runs:
        shares = [one.looks for one in findings.seeds(name) if one.looks]
        rows += (
            [[name, *(f"{statistics.fmean(of[key] for of in shares):.1%}" for key in shares[0])]]
            if shares
            else []
        )
    evenly = statistics.fmean(MAP_FIRST / (t + 1) for t in range(MAP_FROM, 128))
    about = (
        f"Shares of attention at positions {MAP_FROM}-127. A head that looks evenly at all before it gives the first {MAP_FIRST} tokens {evenly:.1%}; "
        "where a sink has formed it is most of all.\n"
    )
    names = (
        "run",
        "learned sinks, mean head",
        "most",
        f"first {MAP_FIRST} tokens, mean head",
        "most",
    )
    return ["## Where heads look\n", about, *table(names, rows)] if rows else []


def _written(texts: list[dict[str, Any]]) -> list[str]:
    """How far words hold, and the first text of each run and prompt."""
    far: dict[str, list[dict[str, Any]]] = {}
    for text in texts:
        if text["max_new_tokens"] == FAR_TOKENS:
            far.setdefault(text["run"], []).append(text)
    about = (
        f"Of {FAR_TOKENS} tokens written as built, the share of words that stand in the training text, among the first and the last {FAR_PART} characters; "
        f"{FAR_SAMPLES} texts a seed. All texts: generations.json.\n"
    )
    rows = [
        [
            run,
            *(
                f"{statistics.fmean(text[key] for text in of):.0%}"
                for key in ("words_known_first", "words_known_last")
            ),
        ]
        for run, of in far.items()
    ]
    parts = ["## What they write\n", about, *table(("run", "first", "last"), rows)]
    for text in texts:
        if (text["seed"], text["sample"]) == (1, 1):
            parts += [
                f"**{text['run']}**, {text['max_new_tokens']} tokens after `{text['prompt']}`:\n",
                f"    {printable(text['text'])}\n",
            ]
    return parts


def _tasks(out: Path) -> list[str]:
    """The scores of the fine-tuned models, and of those they began as, where they were asked."""
    rows = []
    for path in sorted(out.glob("tasks/*/results.json")):
        with reading(path):
            measures = json.loads(path.read_text(encoding="utf-8"))["measures"]
        for row in measures:
            interval = f"{_number(row['low'])} to {_number(row['high'])}"
            rows.append(
                [
                    row["task"],
                    printable(row["checkpoint"]),
                    str(row["shots"]),
                    row["measure"],
                    _number(row["value"]),
                    interval,
                ]
            )
    return (
        ["## Tasks\n", *table(("task", "model", "shots", "measure", "value", "95% interval"), rows)]
        if rows
        else []
    )
