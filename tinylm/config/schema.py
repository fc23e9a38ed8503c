"""Every setting: its type, its meaning, its bounds and its default.

Reading order: the sections (`TokenizerConfig`, `DataConfig`, `TrainingConfig`, `HardwareConfig`,
`SamplingConfig`), the recipes, then `Config`, which holds all of them. The section of the model is in
`model.py`, the optional ones of fine-tuning are in `finetuning.py`.
Types of fields and rules between settings are in `rules.py`, YAML in `loader.py`.
Settings are frozen: they are what the run was started with. Steps are optimizer steps everywhere.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema, model_validator

from tinylm.config.finetuning import (
    DistillConfig,
    DpoConfig,
    GrpoConfig,
    LoraConfig,
    RewardModelConfig,
    VerifierConfig,
)
from tinylm.config.model import ModelConfig
from tinylm.config.rules import (
    CONFIG,
    COUNT_LIMIT,
    DATA,
    SAMPLING,
    TOKENIZER,
    TRAINING,
    Count,
    CountOrZero,
    Fraction,
    Name,
    Number,
    PathName,
    Section,
    Switch,
)

__all__ = ["COUNT_LIMIT", "Section"]  # of rules, for code that reads settings

# The value of settings that are chosen once, before step 1.
AUTO = "auto"
# The value of data.dataset that names the few built-in rows of data.task.
SMOKE = "smoke"
# The columns of rows that tinylm/rows reads.
RowColumn = Literal[
    "instruction", "input", "output", "prompt", "completion",
    "messages", "conversations", "chosen", "rejected", "system", "label",
]  # fmt: skip
RowShape = Literal["auto", "alpaca", "prompt", "messages", "sharegpt"]
TaskName = Literal["sst2", "samsum", "gsm8k", "sms", "alpaca", "pairs"]
TemplateName = Literal["instruction", "alpaca", "chatml", "plain", "chat_template"]


class TokenizerConfig(Section):
    """How text becomes token ids."""

    rules: ClassVar = TOKENIZER

    kind: Literal["byte", "char", "bpe", "unigram", "hf"] = "byte"
    """byte: 256 bytes, 4 special tokens; char, bpe, unigram: trained on the training split; hf: at `path`"""
    path: PathName | None = None
    """hf: a Hugging Face name or a folder; on the command line it replaces the whole section"""
    unknown: Literal["error", "unk"] = "error"
    """char: a character outside the vocabulary is an error, or becomes the token <|unk|>"""
    vocab_size: Annotated[Count, Field(ge=258, le=1_000_000)] | None = None
    """bpe, unigram: number of tokens with 256 bytes and the special ones; fewer if the text has few words"""
    pattern: Name | None = None
    """bpe, unigram: words that tokens stay within: gpt2, gpt4, qwen2 or a regular expression; null: gpt2"""
    special_tokens: tuple[Name, ...] = ()
    """added after the tokenizer's own; with init_from the model grows: <|im_start|> and <|im_end|> for chatml"""
    learn_docs: Count | None = None
    """char, bpe, unigram: train on at most this many documents, which a stream requires; null: all"""

    @model_validator(mode="before")
    @classmethod
    def _path_means_hf(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("path") is not None and "kind" not in values:
            return {**values, "kind": "hf"}
        return values


class MixPart(Section):
    """One source of a mixture."""

    dataset: PathName
    """a file of text or rows or a token file, a folder or glob of them, or a Hugging Face name (owner/name)"""
    weight: Annotated[Number, Field(gt=0, le=1e6)] = 1.0
    """share of the rows from this source, relative to the other weights"""
    rows: RowShape | None = None
    """fine-tuning: format of its rows; null: data.rows"""
    columns: dict[RowColumn, Name] | None = None
    """fine-tuning: the names of its columns; null: data.columns"""
    template: TemplateName | None = None
    """fine-tuning: how its turns are written; null: data.template, in which the model is asked afterwards"""


class DataConfig(Section):
    """The documents for training and validation, and how they become rows."""

    rules: ClassVar = DATA

    dataset: PathName = "data/tiny_corpus.txt"
    """a text (docs/DATA.md), a token file (.bin, .npy, .ds), a folder or glob of texts, or a hub name"""
    dataset_config: Name | None = None
    """configuration of a Hugging Face dataset (20231101.en)"""
    mix: Annotated[tuple[MixPart, ...], Field(min_length=1, max_length=1000)] | None = None
    """sources with weights, in place of `dataset`; val_fraction is held out of each; null: none"""
    token_dtype: Literal["uint16", "uint32"] | None = None
    """type of the ids in a token file without a header (a raw .bin); null: from the header"""
    task: Literal["sst2", "samsum", "gsm8k", "sms", "alpaca"] | None = None
    """fine-tuning: a task with its columns, prompts and dataset (tinylm/eval/tasks); `dataset: smoke`: its test rows"""
    rows: RowShape = "auto"
    """fine-tuning: format of a row; auto: detected from its keys"""
    columns: dict[RowColumn, Name] | None = None
    """fine-tuning: the names of columns in the data, as our name: their name"""
    skip_bad_rows: CountOrZero = 0
    """fine-tuning: at most this many bad rows of a split are skipped; 0: the first is an error"""
    template: TemplateName = "instruction"
    """fine-tuning: how turns are written (tinylm/rows/templates.py); chat_template: the tokenizer's own template"""
    tools: Literal["calculator"] | None = None
    """fine-tuning: answers have calls as <<6*4=24>>; the result is not trained, and is computed in generation"""
    packing: Literal["packed", "padded"] = "packed"
    """fine-tuning: several examples per row with document masks, or one example per row (always for preferences)"""
    truncation_side: Literal["right", "left"] = "right"
    """fine-tuning: what an example longer than seq_len loses: its end (right) or its start (left)"""
    split: Name = "train"
    """split of a Hugging Face dataset to train on"""
    val_dataset: PathName | None = None
    """validation documents from another source; null: from val_split or val_fraction"""
    val_split: Name | None = None
    """split of a Hugging Face dataset to validate on; null: from val_dataset or val_fraction"""
    val_fraction: Annotated[Number, Field(gt=0, lt=1)] = 0.1
    """share of documents held out if there is no validation source, chosen by content and seed"""
    streaming: Switch = False
    """read documents during training, never all at once; for datasets larger than the disk"""
    text_field: Name = "text"
    """column or key that holds a document's text"""
    document_separator: Annotated[str, Field(min_length=1)] | None = None
    """text that separates documents in a .txt file; null: each line is a document"""
    train_docs: Count | None = None
    """maximum number of training documents; null: all"""
    val_docs: Count | None = None
    """maximum number of validation documents; null: all"""
    max_doc_len: Count | None = None
    """maximum tokens of a document, the rest is dropped; null: all"""
    stride: Count | None = None
    """tokens from one row's start to the next; null: training.seq_len, without overlap"""
    order: Literal["shuffled", "sequential", "random"] = "shuffled"
    """order of rows: a seeded permutation per pass, the order of the data, or windows at random offsets"""
    document_mask: Switch = False
    """stop attention at document boundaries and restart positions there"""
    shuffle_window: Count = 1024
    """rows of a stream that are shuffled together"""
    num_workers: Annotated[CountOrZero, Field(le=256)] = 0
    """processes that prepare batches; the result does not depend on it"""
    cache_dir: PathName = ".cache"
    """folder for token files and other files made from the data"""


def _precision_name(value: Any) -> Any:
    """16 and 32 are numbers in YAML; the setting is a name."""
    return str(value) if type(value) is int else value


class TrainingConfig(Section):
    """The optimization: batches, steps, optimizer, schedule, validation and files."""

    rules: ClassVar = TRAINING

    seed: CountOrZero = 1337
    """the only seed: initialization, order of data, dropout and the held-out documents"""
    seq_len: Count = 256
    """tokens per row"""
    micro_batch_size: Count | Literal["auto"] = 16
    """rows per forward and backward pass on one device; auto: measured once, and grad_accum_steps from batch_size"""
    batch_size: Count | None = None
    """rows per optimizer step on one device, for micro_batch_size auto; null: micro_batch_size x grad_accum_steps"""
    grad_accum_steps: Count = 1
    """micro-batches per optimizer step"""
    max_epochs: Annotated[Number, Field(gt=0, le=1e6)] | None = None
    """passes over the training data, in place of max_steps: short for a duration of so many epochs"""
    duration: str | None = Field(
        default_factory=lambda given: given.get("max_epochs") and f"{given['max_epochs']:g} epochs",
        json_schema_extra={"default": None},
    )
    """in place of max_steps, turned into that: 20min, 3 epochs, 1M tokens, 20 tokens_per_parameter or 1e17 flops"""
    max_steps: Count | None = Field(
        default_factory=lambda given: 1000 if given.get("duration") is None else None,
        json_schema_extra={"default": 1000},
    )
    """optimizer steps of the whole run; null: as many as `duration` is"""
    optimizer: Literal["adamw", "adamw_plain", "adamw_8bit", "sgd", "muon"] = Field(
        default="adamw",
        description="adamw: torch's fused; adamw_plain: plain PyTorch; adamw_8bit: moments in 8 bits (bitsandbytes); "
        "sgd: lr/sqrt(t+1); muon: Muon with AdamW",
    )
    lr: Annotated[Number, Field(gt=0)] = 3e-4
    """peak learning rate"""
    muon_lr: Annotated[Number, Field(gt=0, le=1e20)] = 0.02
    """peak learning rate of the matrices for muon"""
    embedding_lr: Annotated[Number, Field(gt=0, le=1e20)] | None = None
    """peak learning rate of the embedding; null: lr"""
    head_lr: Annotated[Number, Field(gt=0, le=1e20)] | None = None
    """peak learning rate of a head that is not tied to the embedding; null: lr"""
    min_lr_ratio: Annotated[Number, Field(ge=0, le=1)] = 0.1
    """lowest learning rate as a share of the peak"""
    schedule: Literal["warmup_cosine", "wsd", "constant", "plateau"] = "warmup_cosine"
    """learning rate schedule; all but `constant` begin with a linear warmup"""
    warmup_ratio: Fraction = 0.02
    """share of max_steps in which the learning rate rises from 0"""
    decay_ratio: Annotated[Number, Field(gt=0, le=1)] = 0.2
    """wsd: share of max_steps in which the learning rate falls at the end"""
    plateau_patience: Count = 3
    """plateau: validations without improvement before the learning rate is reduced"""
    plateau_factor: Annotated[Number, Field(gt=0, lt=1)] = 0.5
    """plateau: factor by which the learning rate is reduced"""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment"""
    eps: Annotated[Number, Field(gt=0, le=1)] = 1e-8
    """AdamW's epsilon, which avoids division by zero"""
    momentum: Fraction = 0.95
    """Muon's momentum"""
    muon_per_head: Switch = False
    """muon: each attention head of the matrices by itself (MuonSplit; Zhang et al. 2026), which is faster"""
    muon_rounds: Literal["jordan", "polar_express", "polar_express_3"] = "jordan"
    """muon: five rounds of one polynomial (Jordan 2024), or one for each of four or three (Amsel et al. 2025)"""
    weight_decay: Annotated[Number, Field(ge=0, le=100)] = 0.1
    """decoupled weight decay, only for matrices"""
    grad_clip: Annotated[Number, Field(gt=0)] | None = 1.0
    """maximum norm of the gradient; null: not clipped"""
    skip_spikes: Annotated[Number, Field(ge=2, le=1e6)] | None = None
    """skip a step whose loss or gradient norm is this many deviations above the last 100 steps; null: never"""
    label_smoothing: Fraction = 0.0
    """share of each target that is spread evenly over the vocabulary; not used in validation"""
    val_every_steps: Count = 200
    """optimizer steps between validations"""
    val_batches: Count | None = None
    """maximum batches per validation; null: all"""
    eval_tasks: dict[TaskName, PathName] | None = None
    """tasks to score at validations, each on a file or folder of rows, `validation` (those of data.task) or `smoke`"""
    eval_every_steps: Count | None = None
    """optimizer steps between these scores, a multiple of val_every_steps; null: val_every_steps"""
    eval_rows: Count = 200
    """maximum rows of each task, drawn by the seed"""
    best_by: Name = "val_loss"
    """column of metrics.csv that best.ckpt is best by; losses, perplexities and errors the lower, others the higher"""
    early_stopping_patience: Count | None = None
    """stop after this many validations without improvement, and make best.ckpt the final.ckpt; null: never"""
    log_every_steps: Count = 10
    """optimizer steps between rows of metrics.csv"""
    profile_steps: tuple[Count, Count] | None = None
    """first and last step of a trace by torch.profiler in the run's folder, with the slowest operators; null: none"""
    save_every_steps: Count = 500
    """optimizer steps between checkpoints"""
    keep_last: Count | None = 2
    """number of step-*.ckpt files to keep; null: all"""
    checkpoint_dir: PathName = "checkpoints"
    """folder of the checkpoints"""
    log_dir: PathName = "logs"
    """folder of the metrics of all runs"""
    run_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] = (
        "pretrain"
    )
    """folder of this run in log_dir"""
    loggers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """loggers in addition to metrics.csv: settings, metrics, samples and the curve of val_loss"""
    sample_prompt: str | None = None
    """text to continue at each validation; null: none"""
    auto_resume: Switch = True
    """continue from the latest valid checkpoint in checkpoint_dir"""
    init_from: PathName | None = None
    """a checkpoint, hf:NAME or hf:FOLDER to take weights, tokenizer and model settings from; null: new weights"""
    train_on: Literal["response", "all"] = "response"
    """fine-tuning: the tokens that are targets: only those of the responses, or all"""


class HardwareConfig(Section):
    """Device, precision and parallelism."""

    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA if available, else MPS, else the CPU; the reason is printed"""
    precision: Annotated[
        Literal["32", "16", "bf16", "auto"],
        BeforeValidator(_precision_name),
        WithJsonSchema({"enum": ["32", "16", "bf16", "auto", 32, 16]}),
    ] = "32"
    """precision of the forward pass; weights and optimizer state are always fp32; auto: chosen once, by measurement"""
    devices: Count = 1
    """devices per machine"""
    num_nodes: Count = 1
    """machines, started by torchrun or SLURM"""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """how several devices share the work"""
    compile: Switch = False
    """compile the decoder with torch.compile"""
    threads: Count | None = None
    """CPU threads; null: torch's default. The number changes results in the last bits"""


class SamplingConfig(Section):
    """How the next token is chosen from the logits."""

    rules: ClassVar = SAMPLING

    max_new_tokens: Annotated[Count, Field(le=1_000_000)] = 200
    """maximum number of new tokens"""
    temperature: Annotated[Number, Field(ge=0, le=100)] = 0.8
    """the logits are divided by it; 0: greedy"""
    top_k: Count | None = None
    """only the k most probable tokens; null: off"""
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    """the most probable tokens with probabilities that sum to p (Holtzman et al. 2020); null: off"""
    min_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    """only tokens at least min_p times as probable as the most probable one (Nguyen et al. 2024); null: off"""
    repetition_penalty: Annotated[Number, Field(gt=0, le=100)] = 1.0
    """makes tokens that are already in the context less probable (Keskar et al. 2019); 1: off"""
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] = 0.0
    """subtracted from the logit of each token that was generated before, as in OpenAI's API; 0: off"""
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] = 0.0
    """subtracted from the logit of each token as often as it was generated, as in OpenAI's API; 0: off"""
    no_repeat_ngram: Count | None = None
    """no n-gram of this length occurs twice; null: off"""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """strings that end the text; they are not part of the output"""
    seed: CountOrZero = 0
    """seed of the sampling"""
    n_samples: Annotated[Count, Field(le=1024)] = 1
    """continuations per prompt"""
    n_beams: Annotated[Count, Field(le=256)] = 1
    """beams; more than 1: beam search for the most probable text instead of sampling"""


# --- the setting `recipe`: values that learn fast together, for the settings that are not given ---
#
# What each value brings is in docs/RESULTS.md, what was tried without success in docs/LOG.md.

OWN_FORMAT = ("input_scalars", "bigram_rows")
"""settings of the model that have no place in the files of other programs"""
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "default": {},
    "research": {
        "model": {
            "tie_embeddings": False,
            "init": "zero_outputs",
            "input_scalars": True,
            "bigram_rows": 16_000,
            "qk_norm": True,
        },
        "training": {
            "optimizer": "muon",
            "muon_per_head": True,
            "muon_rounds": "polar_express_3",
            "muon_lr": 0.03,
            "momentum": 0.85,
            "betas": (0.7, 0.95),
            "lr": 3e-3,
            "embedding_lr": 0.3,
            "head_lr": 0.01,
            "schedule": "wsd",
            "decay_ratio": 0.65,
            "weight_decay": 0.0,
        },
    },
}


def fill_recipe(cls: type, values: Any) -> Any:
    """The values of a `Config` with those of its recipe, before they are checked; what is given
    stays.
    """
    if not isinstance(values, dict) or not RECIPES.get(str(values.get("recipe"))):
        return values
    filled = dict(values)
    for section, settings in RECIPES[values["recipe"]].items():
        given = values.get(section) or {}
        if isinstance(given, BaseModel):
            given = given.model_dump(exclude_unset=True)
        if not isinstance(given, dict):  # the check of its type says so
            return values
        filled[section] = settings | given
    if filled["model"]["tie_embeddings"] is True and "head_lr" not in (
        values.get("training") or {}
    ):
        del filled["training"]["head_lr"]  # a head that is the embedding has no rate of its own
    return filled


class Config(Section):
    """All settings of one run."""

    rules: ClassVar = CONFIG
    _fill_recipe = model_validator(mode="before")(fill_recipe)

    recipe: Literal["default", "research"] = "default"
    """research: settings that learn fast, where not given (RECIPES in tinylm/config/schema.py); not for hf and gguf"""
    model: ModelConfig = Field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    hardware: HardwareConfig = Field(default_factory=HardwareConfig)
    lora: LoraConfig | None = None
    """low-rank adapters for fine-tuning; null: all weights are trained"""
    distill: DistillConfig | None = None
    """learn from a teacher too when fine-tuning; null: from the rows alone"""
    dpo: DpoConfig | None = None
    """train on preference pairs; null: on next tokens"""
    reward_model: RewardModelConfig | None = None
    """train a reward model on preference pairs; null: a language model"""
    verifier: VerifierConfig | None = None
    """train a verifier of answers; null: a language model"""
    grpo: GrpoConfig | None = None
    """learn from the rewards of its own answers; null: from the rows"""
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)

    def to_plain(self) -> dict[str, Any]:
        """The settings as plain dicts, lists and numbers, as a checkpoint stores them;
        the inverse of `from_plain`.
        """
        return self.model_dump(mode="json")

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "Config":
        """The settings from what `to_plain` returned. One that it does not have, since it is newer,
        has its default, whatever the recipe sets.
        """
        recipe = plain.get("recipe", "default")
        if str(recipe) not in RECIPES:
            return cls.model_validate(plain)  # which refuses it
        config = cls.model_validate({**plain, "recipe": "default"})
        return config.model_copy(update={"recipe": recipe})
