"""`model.depth`: one number for a new model; its width, heads, batch, rates and decay follow.

    model: {depth: 6}  ─▶  6 layers, width 192, 3 heads, 24 rows of 256 tokens a step, rates, decay

`RULES` is the table: a setting, the rule for it, where that is from, and why. `resolve` puts their
values into a config before it is checked. A setting that has a value in the config keeps it, and the
rules after it use that value; null leaves it to its rule. The resolved config has no `depth` left: it
reads like one that was written by hand, and that is what checkpoints and config.yaml store.

All rules are functions of the depth and of settings, not of the data or of the length of the run.
They think of a run with a fixed number of tokens per parameter (Hoffmann et al. 2022), where with a
width in proportion to the depth d

    parameters ∝ d³     tokens ∝ d³     batch ∝ d     optimizer steps ∝ d²
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from tinylm.config.rules import RuleError
from tinylm.config.schema import AUTO, COUNT_LIMIT, Config, fill_recipe

DEPTH, LAYERS = "model.depth", "model.n_layers"
ADAMW, MUON = ("adamw", "adamw_plain", "adamw_8bit"), "muon"

WIDTH_PER_LAYER = 32
LARGEST_HEAD = 64
TOKENS_PER_LAYER = 1024
# More tokens in a forward and backward pass are not faster, but need more memory.
LARGEST_MICRO_BATCH = 8192
# The width and depth whose rates and decay are those of the rules; others follow by a power.
WIDTH, LAYERS_THERE = 128, 4


class Settings:
    """The settings that rules read: as written or by an earlier rule, else their default."""

    def __init__(self, values: dict[str, Any]):
        self.values = values
        self.defaults = Config()

    def find(self, key: str) -> Any:
        """The value of a setting in the config; None if it is not written, or null."""
        section, _, name = key.partition(".")
        found = self.values.get(section)
        return found.get(name) if isinstance(found, dict) else None

    def number(self, key: str) -> int:
        """A count; of one that is not valid, which is an error later, the default."""
        found = self.find(key)
        if isinstance(found, int) and 0 < found <= COUNT_LIMIT:
            return found
        section, _, name = key.partition(".")
        return getattr(getattr(self.defaults, section), name)

    @property
    def depth(self) -> int:
        """The number of layers."""
        return self.number(LAYERS)

    @property
    def width(self) -> int:
        """model.d_model."""
        return self.number("model.d_model")

    @property
    def optimizer(self) -> str:
        """training.optimizer."""
        return self.find("training.optimizer") or self.defaults.training.optimizer

    @property
    def is_tied(self) -> bool:
        """model.tie_embeddings."""
        return self.find("model.tie_embeddings") is not False

    @property
    def rows(self) -> int:
        """Rows per optimizer step on one device."""
        devices = self.number("hardware.devices") * self.number("hardware.num_nodes")
        tokens = TOKENS_PER_LAYER * self.depth / devices
        return max(1, round(tokens / self.number("training.seq_len")))


# --- the rules, each a value or None if the setting keeps its default -----------------------------


def heads(s: Settings) -> int:
    """The fewest heads of an even width up to `LARGEST_HEAD`, in whole groups of n_kv_heads."""
    if s.find("model.head_dim") is not None:
        return max(1, s.width // s.number("model.head_dim"))
    groups = s.number("model.n_kv_heads") if s.find("model.n_kv_heads") is not None else 1
    fewest = math.ceil(s.width / LARGEST_HEAD)
    for n in range(fewest, 8 * fewest + LARGEST_HEAD):
        if s.width % n == 0 and s.width // n % 2 == 0 and n % groups == 0:
            return n
    return groups  # no number fits: the error is that of any config with this width


def is_measured(s: Settings) -> bool:
    """Whether the micro-batch is `auto`."""
    return s.find("training.micro_batch_size") == AUTO


def batch_size(s: Settings) -> int | None:
    """Only for a micro-batch that is measured."""
    return s.rows if is_measured(s) else None


def grad_accum_steps(s: Settings) -> int | None:
    """Micro-batches of the written size, else of at most `LARGEST_MICRO_BATCH` tokens."""
    if is_measured(s):
        return None
    if s.find("training.micro_batch_size") is not None:
        return max(1, round(s.rows / s.number("training.micro_batch_size")))
    return math.ceil(s.rows / max(1, LARGEST_MICRO_BATCH // s.number("training.seq_len")))


def micro_batch_size(s: Settings) -> int:
    """The rows of a step in as many equal parts."""
    return math.ceil(s.rows / s.number("training.grad_accum_steps"))


def lr(s: Settings) -> float | None:
    """AdamW's rate of all weights; with muon that of the vectors."""
    if s.optimizer in ADAMW:
        return rounded(3e-3 * WIDTH / s.width)
    return 3e-3 if s.optimizer == MUON else None


def muon_lr(s: Settings) -> float | None:
    """The rate of the matrices."""
    return 0.02 if s.optimizer == MUON else None


def embedding_lr(s: Settings) -> float | None:
    """A tied embedding is the head too, and keeps `lr`."""
    return 0.1 if s.optimizer in (*ADAMW, MUON) and not s.is_tied else None


def head_lr(s: Settings) -> float | None:
    """Only for a head of its own."""
    if s.optimizer in (*ADAMW, MUON) and not s.is_tied:
        return rounded(0.01 * WIDTH / s.width)
    return None


def weight_decay(s: Settings) -> float | None:
    """Rate x decay x steps is that of `LAYERS_THERE` layers."""
    ratio = LAYERS_THERE / s.depth
    if s.optimizer in ADAMW:
        return rounded(min(0.1, 0.1 * ratio))
    return rounded(min(0.1, 0.1 * ratio**2)) if s.optimizer == MUON else None


def rounded(number: float) -> float:
    """Three digits, so that a config can be read.

    >>> rounded(0.0123456)
    0.0123
    """
    return float(f"{number:.3g}")


class DepthRule(NamedTuple):
    """One line of the table."""

    key: str
    value: Callable[[Settings], int | float | None]
    formula: str
    why: str


RULES = (
    DepthRule(
        "model.d_model",
        lambda s: WIDTH_PER_LAYER * s.depth,
        "32 d",
        "between 10 and 100 widths per layer hardly matter (Kaplan et al. 2020, figure 5); 32 is "
        "that of the small configs here",
    ),
    DepthRule(
        "model.n_heads",
        heads,
        "the fewest with heads of at most 64",
        "Vaswani et al. 2017 and GPT-2 have heads of 64; more heads compute more scores",
    ),
    DepthRule(
        "training.batch_size",
        batch_size,
        "1024 d tokens, if micro_batch_size is auto",
        "the best batch grows with the tokens of a run to a power of about 0.4 (Bergsma et al. "
        "2025), so about with d",
    ),
    DepthRule(
        "training.grad_accum_steps",
        grad_accum_steps,
        "1024 d tokens / the micro-batch",
        "with micro-batches of at most 8192 tokens",
    ),
    DepthRule(
        "training.micro_batch_size",
        micro_batch_size,
        "1024 d tokens / grad_accum_steps",
        "the same batch on every machine; over devices it is shared",
    ),
    DepthRule(
        "training.lr",
        lr,
        "adamw: 3e-3 · 128 / d_model; muon: 3e-3",
        "Adam moves each weight by the rate, and a wider sum moves further (Yang et al. 2022, "
        "table 3); with muon it is the rate of vectors, which do not sum",
    ),
    DepthRule(
        "training.muon_lr",
        muon_lr,
        "muon: 0.02",
        "an orthogonal update has the same size at every width (Yang et al. 2023; Jordan 2024)",
    ),
    DepthRule(
        "training.embedding_lr",
        embedding_lr,
        "untied: 0.1",
        "one row is read per token, whatever the width (Yang et al. 2022, table 3)",
    ),
    DepthRule(
        "training.head_lr",
        head_lr,
        "untied: 0.01 · 128 / d_model",
        "a logit is a sum over the width, moved by Adam",
    ),
    DepthRule(
        "training.weight_decay",
        weight_decay,
        "at most 0.1; adamw: 0.4 / d; muon: 1.6 / d²",
        "rate x decay x steps is the same part of every run (Wang and Aitchison 2024)",
    ),
)


def resolve(values: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The values of a config with those of the rules in place of `model.depth`, and one line that
    says what the rules have set and what was written.

    Raises:
        RuleError: `depth` is combined with a setting that says the same, or with a given model.
    """
    # The recipe says for which model and optimizer the rules are; its own rates are for one width.
    given, copied = Settings(values), {}
    for name, section in fill_recipe(Config, values).items():
        copied[name] = dict(section) if isinstance(section, dict) else section
    settings = Settings(copied)
    depth = settings.find(DEPTH)
    if settings.find(LAYERS) is not None:
        problem = f"cannot be combined with {DEPTH} ({depth}): both are the number of layers"
        fix = f"Remove one; on the command line {LAYERS}=null removes it"
        raise RuleError((LAYERS, DEPTH), problem, fix)
    if settings.find("training.init_from") is not None:
        problem = "cannot be combined with training.init_from, whose model has a shape"
        raise RuleError((DEPTH, "training.init_from"), problem, "Remove one")
    del copied["model"]["depth"]
    copied["model"]["n_layers"] = depth
    by_rule, written = [], []
    for rule in RULES:
        section, _, name = rule.key.partition(".")
        found = copied.setdefault(section, {})
        if not isinstance(found, dict):
            continue  # an error of its own
        if given.find(rule.key) is not None:
            written.append(f"{name} {found[name]}")
            continue
        of_recipe = found.pop(name, None)
        value = rule.value(settings)
        if value is not None:
            found[name] = value
            by_rule.append(f"{name} {value}")
        elif of_recipe is not None:  # for another optimizer, or a head of its own
            found[name] = getattr(getattr(settings.defaults, section), name)
    line = f"{DEPTH} {depth} sets {', '.join(by_rule)}"
    if written:
        line += f"; as written: {', '.join(written)}"
    return copied, line


def table() -> str:
    """`RULES` as a Markdown table with an example, for the reference of settings."""
    example = {"model": {"depth": 12, "tie_embeddings": False}, "training": {"optimizer": MUON}}
    values, _ = resolve(example)
    lines = ["| setting | rule | muon, untied, d = 12 | why |", "|---|---|---|---|"]
    for rule in RULES:
        section, _, name = rule.key.partition(".")
        found = values[section].get(name)
        shown = "" if found is None else f"`{found}`"
        lines.append(f"| `{rule.key}` | {rule.formula} | {shown} | {rule.why} |")
    return "\n".join(lines)
