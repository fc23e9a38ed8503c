"""Measure one run of the experiments: checkpoints, loss by position, attention and sample texts.

    load_or_measure   checkpoints of a run -> `RunMeasurements`, cached in a file
    measure_run       the same without the cache:
        score_checkpoint     loss, perplexity and bits per byte on the validation rows
        loss_by_position     mean loss at each position, also far beyond the training length
        attention_shares     attention on learned sinks and on the first tokens
        sample_texts         text after fixed prompts, and the share of known words in long text

`CACHE_SETTINGS` lists how far each model reads, and what its cache keeps (Xiao et al. 2023).
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinylm.checkpoint import format as checkpoint_format
from tinylm.checkpoint import info as checkpoint_info
from tinylm.checkpoint import load as checkpoint_load
from tinylm.common.files import read_regular, write_atomic
from tinylm.config.schema import SamplingConfig
from tinylm.eval.perplexity import LOSS_CAP, byte_length_table, score_batches
from tinylm.generate.engine import Engine
from tinylm.model.attention_sinks import with_attention_sinks
from tinylm.model.decoder import Decoder, active_parameters, count_parameters
from tinylm.runs.experiments import QUESTIONS
from tinylm.runs.plots import attention_maps
from tinylm.tokens.packing import IGNORE_INDEX, row_at
from tinylm.tokens.run_files import cached_token_file


@dataclass(frozen=True)
class CacheSetting:
    """Which positions a model can attend to when it reads a long text."""

    run: str
    window: int | None = None
    """the last positions that the cache keeps; None: as the model was built, up to max_seq_len"""
    n_first: int = 0
    """the first positions that the cache keeps in addition"""

    @property
    def name(self) -> str:
        """The run and what the cache keeps, for tables and legends."""
        if self.window is None:
            return f"{self.run}, as built"
        first = f"first {self.n_first} + " if self.n_first else ""
        return f"{self.run}, {first}last {self.window}"


# Caches of 128 positions are as long as training rows: table 1 of Xiao et al. 2023, scaled down.
CACHE_SETTINGS = (
    CacheSetting("base"),
    CacheSetting("base", 128),
    CacheSetting("base", 124, 4),
    CacheSetting("sinks"),
    CacheSetting("sinks", 128),
    CacheSetting("sinks", 124, 4),
    CacheSetting("window"),
    CacheSetting("window", 60, 4),
    CacheSetting("window-sinks"),
    CacheSetting("window-sinks", 64),
    CacheSetting("learned"),
    CacheSetting("alibi"),
)
# Length of the rows that are read through a cache of fixed size.
LONG_ROW = 2048
# A row begins every ROW_STRIDE tokens, so that every position sees nearly the same text. The rest
# of the text's influence has this period, and a moving mean over one period removes it.
ROW_STRIDE = 128
# Borders of the bands of positions in the table; training used the first 128 positions.
BANDS = (0, 32, 128, 256, 512, 1024, LONG_ROW)
# Attention is measured on rows of the training length, at positions with many tokens before them.
ATTENTION_ROWS = 8
ATTENTION_FROM = 64
ATTENTION_N_FIRST = 4
PROMPTS = ("Attention is", "The loss", "A token")
PROMPT_TOKENS = 80
LONG_PROMPT = "Attention is"
LONG_TOKENS = 600
LONG_SAMPLES = 4
# Characters at the beginning and at the end of a long text whose words are counted.
PART_CHARS = 200
BATCH_ROWS = 8
TEMPERATURE = 0.7


@dataclass(frozen=True)
class Score:
    """Validation metrics and size of one checkpoint."""

    run: str
    seed: int
    stage: str
    step: int
    val_loss: float | None
    """of a fine-tuned model: as logged by its run; None if it was not validated at this step"""
    val_ppl: float | None
    val_bpb: float | None
    """bits per byte of a pretrained model"""
    parameters: int
    active: int | None = None
    """parameters used per token: of a layer's experts only those that it is routed to"""
    cache_bytes: int | None = None
    """keys and values of one token in all layers, in fp32"""


@dataclass(frozen=True)
class RunMeasurements:
    """Everything that was measured of one run."""

    scores: list[Score]
    """one per checkpoint, in the order of steps"""
    position_losses: dict[str, list[float]] = field(default_factory=dict)
    """name of a cache setting -> the mean loss at each position"""
    attention: dict[str, float] = field(default_factory=dict)
    """shares of attention, see `attention_shares`"""
    texts: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "RunMeasurements":
        """The inverse of `asdict`."""
        return cls(**plain | {"scores": [Score(**score) for score in plain["scores"]]})


def load_or_measure(run: str, checkpoint_dir: Path, out: Path) -> RunMeasurements:
    """The measurements of a run, from a file if it has the same checkpoints and settings."""
    name, _, seed = run.partition("-seed")
    paths = []
    for path in reversed(checkpoint_format.candidates(checkpoint_dir)):
        if checkpoint_format.step_of(path) >= 0:
            paths.append(path)
    key = _cache_key(name, paths)
    cached = out / "measurements" / f"{run}.json"
    if cached.exists():
        content = json.loads(read_regular(cached))
        if content["key"] == key:
            return RunMeasurements.from_plain(content["measurements"])
    measured = measure_run(name, int(seed or 1), paths)
    content = {"key": key, "measurements": asdict(measured)}
    write_atomic(cached, json.dumps(content) + "\n", "--out")
    return measured


def _cache_key(name: str, paths: Sequence[Path]) -> list[Any]:
    """Everything that the measurements of a run depend on, as JSON gives it back."""
    key = [
        [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths],
        [setting.name for setting in CACHE_SETTINGS if setting.run == name],
        [LONG_ROW, ROW_STRIDE],
        [ATTENTION_ROWS, ATTENTION_FROM, ATTENTION_N_FIRST],
        [PROMPTS, PROMPT_TOKENS, LONG_PROMPT, LONG_TOKENS, LONG_SAMPLES, PART_CHARS, TEMPERATURE],
    ]
    return json.loads(json.dumps(key))


def measure_run(name: str, seed: int, paths: Sequence[Path]) -> RunMeasurements:
    """Measure one run; `paths` are its checkpoints in the order of steps."""
    if checkpoint_info.describe(paths[-1]).stage != "pretrain":
        return RunMeasurements([logged_score(name, checkpoint_info.describe(p)) for p in paths])
    scores = [score_checkpoint(name, seed, checkpoint_load.load_model(path)) for path in paths]
    last = checkpoint_load.load_model(paths[-1])
    position_losses = {}
    for setting in CACHE_SETTINGS:
        if setting.run == name:
            position_losses[setting.name] = loss_by_position(last, setting).tolist()
    attention = attention_shares(last) if name in QUESTIONS[-1].runs else {}
    texts = sample_texts(name, seed, last, long=bool(position_losses))
    return RunMeasurements(scores, position_losses, attention, texts)


# --- scores ---------------------------------------------------------------------------------------


def logged_score(name: str, info: checkpoint_info.CheckpointInfo) -> Score:
    """The score of a fine-tuned checkpoint, as its run logged it."""
    perplexity = None
    if info.val_loss is not None:
        perplexity = float(np.exp(min(info.val_loss, LOSS_CAP)))
    return Score(name, 1, info.stage, info.step, info.val_loss, perplexity, None, info.parameters)


def score_checkpoint(name: str, seed: int, loaded: checkpoint_load.Loaded) -> Score:
    """Score a checkpoint on all validation rows of the length that it was trained on."""
    config = loaded.config.model
    model = loaded.model
    seq_len = loaded.config.training.seq_len
    byte_lengths = byte_length_table(loaded.tokenizer, model.embedding.num_embeddings)
    batches = _validation_batches(loaded, seq_len, seq_len, only_full=False)
    score = score_batches(model, batches, byte_lengths)
    return Score(
        run=name,
        seed=seed,
        stage=loaded.info.stage,
        step=loaded.info.step,
        val_loss=score.loss,
        val_ppl=score.perplexity,
        val_bpb=score.bits_per_byte,
        parameters=count_parameters(model),
        active=active_parameters(model),
        cache_bytes=2 * config.n_layers * config.n_kv_heads * config.head_dim * 4,
    )


def _validation_batches(
    loaded: checkpoint_load.Loaded, length: int, stride: int, *, only_full: bool
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of validation rows, one row every `stride` tokens.

    With `only_full`, without the rows that the end of the text shortens, but with at least one row.
    """
    config, tokenizer = loaded.config, loaded.tokenizer
    tokens = cached_token_file(config.data, "val", tokenizer, config.training.seed).tokens
    end = len(tokens) - (length if only_full else 1)
    starts = range(0, max(1, end), stride)
    for first in range(0, len(starts), BATCH_ROWS):
        batch = starts[first : first + BATCH_ROWS]
        rows = [row_at(tokens, start, length, tokenizer.pad_id) for start in batch]
        yield {
            "input_ids": torch.from_numpy(np.stack([inputs for inputs, _ in rows])),
            "labels": torch.from_numpy(np.stack([labels for _, labels in rows])),
        }


# --- positions and attention ----------------------------------------------------------------------


@torch.no_grad()
def loss_by_position(loaded: checkpoint_load.Loaded, setting: CacheSetting) -> np.ndarray:
    """The mean validation loss at each position; NaN where no row has a target.

    Rows have max_seq_len positions, or LONG_ROW if the cache has a fixed size.
    """
    model, length = loaded.model, loaded.config.model.max_seq_len
    if setting.window is not None:
        assert isinstance(model, Decoder)  # the experiments train no other model
        length = LONG_ROW
        model = with_attention_sinks(model, window=setting.window, n_first=setting.n_first)
    total = np.zeros(length)
    n_targets = np.zeros(length)
    for batch in _validation_batches(loaded, length, ROW_STRIDE, only_full=True):
        labels = batch["labels"]
        logits = model(batch["input_ids"])
        # 0 where the label is IGNORE_INDEX
        losses = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none")
        total += losses.sum(dim=0).double().numpy()
        n_targets += (labels != IGNORE_INDEX).sum(dim=0).numpy()
    return np.divide(total, n_targets, out=np.full(length, np.nan), where=n_targets > 0)


def mean_by_band(losses: np.ndarray) -> dict[str, float]:
    """The mean loss in each band of positions that has a loss.

    >>> mean_by_band(np.repeat([4.0, 3.0], [32, 96]))
    {'0-31': 4.0, '32-127': 3.0}
    """
    means = {}
    for start, stop in zip(BANDS, BANDS[1:], strict=False):
        band = losses[start:stop]
        if np.isfinite(band).any():
            means[f"{start}-{stop - 1}"] = float(np.nanmean(band))
    return means


def attention_shares(loaded: checkpoint_load.Loaded) -> dict[str, float]:
    """Shares of attention on learned sinks and on the first tokens, from position ATTENTION_FROM.

    `sinks` and `first` are means over all heads, `sinks_max` and `first_max` the largest of a head.
    """
    model, n_sinks = loaded.model, loaded.config.model.n_sinks
    assert isinstance(model, Decoder)  # the experiments train no other model
    seq_len = loaded.config.training.seq_len
    batch = next(_validation_batches(loaded, seq_len, ROW_STRIDE, only_full=True))
    rows = batch["input_ids"][:ATTENTION_ROWS]
    maps = torch.stack([attention_maps(model, row.tolist()) for row in rows])
    maps = maps[:, :, :, ATTENTION_FROM:]  # (rows, layers, heads, T, n_sinks + T)
    columns = {
        "sinks": maps[..., :n_sinks],
        "first": maps[..., n_sinks : n_sinks + ATTENTION_N_FIRST],
    }
    shares = {}
    for name, weights in columns.items():
        per_head = weights.sum(dim=-1).mean(dim=(0, 3))  # (layers, heads)
        shares[name] = per_head.mean().item()
        shares[f"{name}_max"] = per_head.max().item()
    return shares


# --- sample texts ---------------------------------------------------------------------------------


def sample_texts(
    name: str, seed: int, loaded: checkpoint_load.Loaded, *, long: bool
) -> list[dict[str, Any]]:
    """Text after the fixed prompts and, with `long`, texts of several times the training length."""
    engine = Engine(loaded.model, loaded.tokenizer)
    known = training_words(loaded)
    requests = [(prompt, PROMPT_TOKENS, 1) for prompt in PROMPTS]
    if long:
        requests += [(LONG_PROMPT, LONG_TOKENS, n) for n in range(1, LONG_SAMPLES + 1)]
    texts = []
    for prompt, n_tokens, sample in requests:
        text = long_text(engine, prompt, n_tokens, sample)
        entry = {
            "run": name,
            "seed": seed,
            "sample": sample,
            "prompt": prompt,
            "max_new_tokens": n_tokens,
            "text": text,
        }
        if n_tokens == LONG_TOKENS:
            entry["words_known_first"] = known_word_share(text[:PART_CHARS], known)
            entry["words_known_last"] = known_word_share(text[-PART_CHARS:], known)
        texts.append(entry)
    return texts


def long_text(engine: Engine, prompt: str, n_tokens: int, seed: int) -> str:
    """Sample exactly `n_tokens` tokens; after EOS, the next text begins on a new line."""
    ids = engine.tokenizer.encode(prompt)
    texts: list[str] = []
    while n_tokens > 0:
        sampling = SamplingConfig(
            max_new_tokens=n_tokens, temperature=TEMPERATURE, seed=100 * seed + len(texts)
        )
        [output] = engine.generate(engine.fit_prompt(ids), sampling)
        ids = [*ids, *output.ids]
        n_tokens -= len(output.ids)
        texts.append(output.text)
    return "\n".join(texts)


def training_words(loaded: checkpoint_load.Loaded) -> set[str]:
    """The words of the training text."""
    config = loaded.config
    file = cached_token_file(config.data, "train", loaded.tokenizer, config.training.seed)
    return set(re.findall(r"\w+", loaded.tokenizer.decode(file.tokens[:].tolist())))


def known_word_share(text: str, known: set[str]) -> float:
    """The share of words in `known`, without the first and the last word, which may be cut.

    >>> known_word_share("ost in the modle and", {"in", "the", "model"})
    0.6666666666666666
    """
    words = re.findall(r"\w+", text)[1:-1]
    return sum(word in known for word in words) / len(words) if words else 0.0
