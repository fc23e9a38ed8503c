"""Every setting of the program: its type, its meaning, its bounds, and how YAML becomes it.

Reading order: the sections (`ModelConfig`, `TokenizerConfig`, `DataConfig`, `TrainingConfig`, `HardwareConfig`,
`SamplingConfig`), then `Config` that holds them, then `load_config`, the only reader of configuration YAML.
Settings are frozen: whoever holds one holds what the run was started with. Steps are optimizer steps everywhere.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from tinylm.common.errors import printable

# Large enough for any real run, small enough that no product of two settings overflows a 64-bit integer.
COUNT_LIMIT = 2**31 - 1
MIX_LIMIT = 1_000_000  # so many times the smallest weight may be all weights together: a block of rows has one of each source

# What tinylm/rows/sft.py looks for in a row.
ROW_COLUMNS = (
    "instruction",
    "input",
    "output",
    "prompt",
    "completion",
    "messages",
    "conversations",
    "chosen",
    "rejected",
)

Count = Annotated[int, Field(ge=1, le=COUNT_LIMIT, strict=True)]
CountOrZero = Annotated[int, Field(ge=0, le=COUNT_LIMIT, strict=True)]
# Strict: YAML's `no` and `yes` are booleans, and a boolean must not pass for a number.
Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False, strict=True)]
Switch = Annotated[bool, Field(strict=True)]
# A path or name that is not empty; a NUL byte would reach the operating system as a surprise.
Name = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")]


class Section(BaseModel):
    """What all sections share: frozen after loading, and a key that is not a setting is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class MoEConfig(Section):
    """A mixture of experts in place of each feed-forward layer (Shazeer et al. 2017; Jiang et al. 2024)."""

    n_experts: Count = 8
    """feed-forward networks a layer"""
    top_k: Count = 2
    """experts that each token is sent to"""
    balance_coef: Annotated[Number, Field(ge=0, le=1)] = 0.01
    """weight of the load-balance loss (Fedus et al. 2021, equation 4) beside the cross entropy"""

    @model_validator(mode="after")
    def _top_k_fits(self) -> "MoEConfig":
        if self.top_k > self.n_experts:
            raise ValueError(
                f"top_k: {self.top_k} is more than n_experts ({self.n_experts}). Lower top_k"
            )
        return self


class ModelConfig(Section):
    """The shape of the decoder: what `tinylm/model/decoder.py` builds."""

    vocab_size: Count | None = None
    """rows of the embedding; null: as many as the tokenizer has (a larger multiple of 64 can be faster on a GPU)"""
    max_seq_len: Count = 1024
    """positions that the model can tell apart in one context"""
    n_layers: Annotated[Count, Field(le=1000)] = 6
    """decoder blocks"""
    d_model: Count = 384
    """width of the residual stream"""
    n_heads: Count = 6
    """query heads a layer"""
    n_kv_heads: Count | None = None
    """key/value heads a layer; null: n_heads (MHA); 1: multi-query; between: grouped-query (Ainslie et al. 2023)"""
    head_dim: Count | None = None
    """width of one head; null: d_model / n_heads"""
    ffn: Literal["swiglu", "silu", "gelu", "relu2"] = "swiglu"
    """feed-forward: gated SiLU (Shazeer 2020), or one hidden layer with SiLU, GELU (tanh form) or squared ReLU"""
    d_ff: Count | None = None
    """hidden width of the feed-forward; null: 8/3 d_model rounded up to a multiple of 64 for swiglu, else 4 d_model"""
    position: Literal["rope", "learned", "alibi", "none"] = "rope"
    """how order enters: rotary (Su et al. 2021), a learned table, linear biases (Press et al. 2021), or not at all"""
    rope_theta: Annotated[Number, Field(gt=1, le=1e12)] = 10000.0
    """base of RoPE's wavelengths"""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """RMSNorm (Zhang and Sennrich 2019) or LayerNorm (Ba et al. 2016)"""
    norm_eps: Annotated[Number, Field(gt=0, le=0.1)] = 1e-5
    """added to the variance before the root"""
    norm_placement: Literal["pre", "post", "none"] = "pre"
    """norm before each sub-layer, after each residual sum, or nowhere"""
    qk_norm: Switch = False
    """RMS-normalise queries and keys a head before attention (Dehghani et al. 2023)"""
    sliding_window: Count | None = None
    """positions that a token sees, itself included; null: all before it"""
    n_sinks: Annotated[CountOrZero, Field(le=1024)] = 0
    """learned key/value slots that every position sees, outside the window too (after Xiao et al. 2023)"""
    moe: MoEConfig | None = None
    """mixture of experts; null: one dense feed-forward a layer"""
    attention_dropout: Fraction = 0.0
    """dropout on attention weights"""
    residual_dropout: Fraction = 0.0
    """dropout on the embedding and on what each sub-layer adds"""
    bias: Literal["none", "qkv", "all"] = "none"
    """biases in the linear layers: in none, in query/key/value only (Qwen2), or in all but the head (GPT-2)"""
    tie_embeddings: Switch = True
    """one matrix embeds tokens and scores them (Press and Wolf 2017)"""
    init: Literal["normal", "trunc_normal"] = "normal"
    """normal: std 0.02 everywhere; trunc_normal: std sqrt(2/(in+out)) cut at 3 std, embeddings std 1"""
    gradient_checkpointing: Switch = False
    """recompute each block in the backward pass: less memory, about a third more compute"""

    @model_validator(mode="after")
    def _shapes_agree(self) -> "ModelConfig":
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(
                f"n_heads: {self.n_heads} does not divide d_model ({self.d_model}). Change one, or set head_dim"
            )
        if self.n_kv_heads is not None and self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_kv_heads: {self.n_kv_heads} does not divide n_heads ({self.n_heads}). Change one"
            )
        if self.position == "rope" and self.size_of_head % 2:
            raise ValueError(
                f"head_dim: {self.size_of_head} is odd, and position rope rotates pairs. Choose an even head_dim"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """The settings as a plain dict; peft asks the config of a model for it."""
        return self.model_dump()

    @property
    def size_of_head(self) -> int:
        """Width of one head."""
        return self.head_dim or self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads a layer."""
        return self.n_kv_heads or self.n_heads

    @property
    def hidden(self) -> int:
        """Hidden width of the feed-forward.

        >>> ModelConfig(d_model=384, n_heads=6).hidden, ModelConfig(d_model=384, n_heads=6, ffn="gelu").hidden
        (1024, 1536)
        """
        if self.d_ff is not None:
            return self.d_ff
        return (
            64 * math.ceil(8 * self.d_model / (3 * 64))
            if self.ffn == "swiglu"
            else 4 * self.d_model
        )


class TokenizerConfig(Section):
    """How text becomes token ids."""

    kind: Literal["byte", "char", "bpe", "hf"] = "byte"
    """byte: 256 bytes and 4 specials; char, bpe: learned from the training split; hf: read from `path`"""
    path: Name | None = None
    """for hf: a Hugging Face name (gpt2), or a folder with tokenizer.json or vocab.json and merges.txt; on the command line it replaces the others here"""
    unknown: Literal["error", "unk"] = "error"
    """for char: what a character outside the vocabulary is, an error or the token <|unk|>"""
    vocab_size: Annotated[Count, Field(ge=258, le=1_000_000)] | None = None
    """for bpe: tokens to learn, among them the 256 bytes and 2 specials; fewer where the text has too few words"""
    pattern: Literal["gpt2", "gpt4"] | None = None
    """for bpe: the words that merges stay within, those of GPT-2 or of GPT-4; null: gpt2"""
    learn_docs: Count | None = None
    """for char, bpe: learn from at most so many training documents, as a stream needs it; null: from all"""

    @model_validator(mode="before")
    @classmethod
    def _path_means_hf(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("path") is not None and "kind" not in values:
            return {**values, "kind": "hf"}
        return values

    @model_validator(mode="after")
    def _path_fits_kind(self) -> "TokenizerConfig":
        if self.kind == "hf" and self.path is None:
            raise ValueError("path: kind hf needs a name or folder. Set tokenizer.path")
        if self.kind != "hf" and self.path is not None:
            raise ValueError(
                f"path: kind {self.kind} reads no files. Take path out, or set kind: hf"
            )
        if self.kind != "char" and self.unknown != "error":
            raise ValueError(f"unknown: kind {self.kind} knows every text. Take unknown out")
        if self.kind == "bpe" and self.vocab_size is None:
            raise ValueError(
                "vocab_size: kind bpe needs it. Set tokenizer.vocab_size, for example 4096"
            )
        for name, value in (("vocab_size", self.vocab_size), ("pattern", self.pattern)):
            if self.kind != "bpe" and value is not None:
                raise ValueError(
                    f"{name}: kind {self.kind} learns no merges. Take {name} out, or set kind: bpe"
                )
        if self.learn_docs is not None and self.kind not in ("char", "bpe"):
            raise ValueError(
                f"learn_docs: kind {self.kind} learns nothing. Take learn_docs out, or set kind: bpe or char"
            )
        if self.learn_docs is not None and self.kind == "char" and self.unknown == "error":
            raise ValueError(
                "learn_docs: later documents have characters that the first ones lack, and unknown is error. Set unknown: unk"
            )
        return self


class MixPart(Section):
    """One source of a mixture."""

    dataset: Name
    """a .txt, .jsonl, .parquet or token file, a folder or glob of them, or a Hugging Face name (owner/name)"""
    weight: Annotated[Number, Field(gt=0, le=1e6)] = 1.0
    """share of the rows that come from it, relative to the other weights"""


class DataConfig(Section):
    """Which documents are read, which are held out, and how they become rows."""

    dataset: Name = "data/tiny_corpus.txt"
    """a .txt, .jsonl, .parquet or token file (.bin, .npy, .ds), a folder or glob of texts, or a Hugging Face name (owner/name)"""
    dataset_config: Name | None = None
    """configuration of a Hugging Face dataset (20231101.en)"""
    mix: Annotated[tuple[MixPart, ...], Field(min_length=1, max_length=1000)] | None = None
    """several sources with weights, and then `dataset` is not read; val_fraction is held out of each of them; null: `dataset` alone"""
    token_dtype: Literal["uint16", "uint32"] | None = None
    """type of the ids in a token file that does not say it: a bare .bin; null: the file says it"""
    task: Literal["sst2", "samsum", "gsm8k", "sms", "alpaca"] | None = None
    """for fine-tuning: whose columns and prompts the rows have (tinylm/tasks); `dataset` left out is then its own on the hub, smoke its few built-in rows"""
    rows: Literal["auto", "alpaca", "prompt", "messages", "sharegpt"] = "auto"
    """for fine-tuning: what a row is made of; auto: told by its keys"""
    columns: dict[Name, Name] | None = None
    """for fine-tuning: our name of a column (instruction, input, output, prompt, completion, messages, conversations, chosen, rejected) to that in the data"""
    template: Literal["instruction", "alpaca", "chatml", "plain", "chat_template"] = "instruction"
    """for fine-tuning: how turns are written (tinylm/rows/templates.py); chat_template: as the tokenizer's own template says"""
    packing: Literal["packed", "padded"] = "packed"
    """for fine-tuning: several examples a row behind document masks, or one example a row, as preferences always are"""
    split: Name = "train"
    """split of a Hugging Face dataset to train on"""
    val_dataset: Name | None = None
    """validation documents from another source; null: from val_split or val_fraction"""
    val_split: Name | None = None
    """split of a Hugging Face dataset to validate on; null: from val_dataset or val_fraction"""
    val_fraction: Annotated[Number, Field(gt=0, lt=1)] = 0.1
    """share of the documents held out where there is no other validation source, drawn by content and seed"""
    streaming: Switch = False
    """read documents as training goes, never all at once; for what does not fit on the disk"""
    text_field: Name = "text"
    """column or key that holds a document's text"""
    document_separator: Annotated[str, Field(min_length=1)] | None = None
    """what divides documents in a .txt file; null: each line is a document"""
    train_docs: Count | None = None
    """at most so many training documents"""
    val_docs: Count | None = None
    """at most so many validation documents"""
    max_doc_len: Count | None = None
    """tokens after which a document is cut"""
    stride: Count | None = None
    """tokens from one row's start to the next; null: training.seq_len, so that rows do not overlap"""
    order: Literal["shuffled", "sequential", "random"] = "shuffled"
    """rows by a seeded permutation each pass, as they stand, or windows at random offsets with replacement"""
    document_mask: Switch = False
    """stop attention at document borders and start positions again there"""
    shuffle_window: Count = 1024
    """rows of a stream that are shuffled together"""
    num_workers: Annotated[CountOrZero, Field(le=256)] = 0
    """processes that prepare batches; the result does not depend on it"""
    cache_dir: Name = ".cache"
    """folder for the token files made from text"""

    @model_validator(mode="after")
    def _one_validation_source(self) -> "DataConfig":
        if self.val_dataset is not None and self.val_split is not None:
            raise ValueError("val_split: val_dataset is set too. Keep one of them")
        if self.streaming and self.order == "random":
            raise ValueError(
                "order: random needs an indexed source. Set streaming: false or order: shuffled"
            )
        if self.streaming and self.stride is not None:
            raise ValueError(
                "stride: a stream is packed without overlap. Take stride out, or set streaming: false"
            )
        return self

    @model_validator(mode="after")
    def _mix_stands_alone(self) -> "DataConfig":
        if self.mix is None:
            return self
        one_source = {
            "streaming": self.streaming,
            "dataset_config": self.dataset_config is not None,
            "split": self.split != "train",
            "val_split": self.val_split is not None,
            "train_docs": self.train_docs is not None,
        }
        for name in (name for name, given in one_source.items() if given):
            raise ValueError(
                f"{name}: it is for one source, and mix names several. Take {name} or mix out"
            )
        if self.val_docs is not None and self.val_dataset is None:
            raise ValueError(
                "val_docs: mix holds val_fraction of each source out. Take val_docs out, or set val_dataset"
            )
        if self.val_dataset in {part.dataset for part in self.mix}:
            raise ValueError(
                "val_dataset: it is a source of mix too. Take it out of one of them, and out of both for val_fraction of each source"
            )
        total = sum(part.weight for part in self.mix)
        for part in self.mix:
            if part.weight < total / MIX_LIMIT:
                raise ValueError(
                    f"mix: weight {part.weight} of {printable(part.dataset)} is less than a millionth of all. Raise it, or take the source out"
                )
        return self

    @model_validator(mode="after")
    def _columns_are_ours(self) -> "DataConfig":
        for name in self.columns or {}:
            if name not in ROW_COLUMNS:
                raise ValueError(
                    f"columns: {printable(name)} is none of our names ({', '.join(ROW_COLUMNS)}). Write our name: name in the data"
                )
        return self

    @model_validator(mode="after")
    def _a_task_knows_its_rows(self) -> "DataConfig":
        for name, given in (("rows", self.rows != "auto"), ("columns", self.columns is not None)):
            if self.task is not None and given:
                raise ValueError(
                    f"{name}: task {self.task} says what a row is made of. Take {name} out, or task"
                )
        return self


def _precision_name(value: Any) -> Any:
    """16 and 32 are numbers in YAML; the setting is a name."""
    return str(value) if type(value) is int else value


class TrainingConfig(Section):
    """The optimisation: batches, steps, optimizer, schedule, validation and files."""

    seed: CountOrZero = 1337
    """the one seed: initialisation, order of data, dropout, and which documents are held out"""
    seq_len: Count = 256
    """tokens a row"""
    micro_batch_size: Count = 16
    """rows in one forward and backward pass on one device"""
    grad_accum_steps: Count = 1
    """micro-batches an optimizer step"""
    max_steps: Count = 1000
    """optimizer steps of the whole run"""
    optimizer: Literal["adamw", "adamw_plain", "sgd", "muon"] = "adamw"
    """torch's fused AdamW, ours written out, SGD with lr/sqrt(t+1), or Muon for matrices with AdamW for the rest"""
    lr: Annotated[Number, Field(gt=0)] = 3e-4
    """peak learning rate"""
    muon_lr: Annotated[Number, Field(gt=0)] = 0.02
    """peak learning rate of the matrices under muon"""
    min_lr_ratio: Annotated[Number, Field(ge=0, le=1)] = 0.1
    """lowest learning rate as a share of the peak"""
    schedule: Literal["warmup_cosine", "wsd", "constant", "plateau"] = "warmup_cosine"
    """the learning rate over the steps; every one but `constant` begins with a linear warm-up"""
    warmup_ratio: Fraction = 0.02
    """share of max_steps in which the learning rate rises from 0"""
    decay_ratio: Annotated[Number, Field(gt=0, le=1)] = 0.2
    """wsd: share of max_steps in which the learning rate falls at the end"""
    plateau_patience: Count = 3
    """plateau: validations without improvement before the learning rate is cut"""
    plateau_factor: Annotated[Number, Field(gt=0, lt=1)] = 0.5
    """plateau: what the learning rate is multiplied by"""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's decay of the first and second moment"""
    eps: Annotated[Number, Field(gt=0, le=1)] = 1e-8
    """AdamW's guard against division by zero"""
    momentum: Fraction = 0.95
    """Muon's momentum"""
    weight_decay: Annotated[Number, Field(ge=0, le=100)] = 0.1
    """decoupled decay, on matrices only"""
    grad_clip: Annotated[Number, Field(gt=0)] | None = 1.0
    """largest norm of the gradient; null: not clipped"""
    label_smoothing: Fraction = 0.0
    """share of each target spread evenly over the vocabulary; validation never smooths"""
    val_every_steps: Count = 200
    """optimizer steps between validations"""
    val_batches: Count | None = None
    """at most so many batches a validation; null: all"""
    early_stopping_patience: Count | None = None
    """stop after so many validations without improvement; null: never"""
    log_every_steps: Count = 10
    """optimizer steps between rows of metrics.csv"""
    save_every_steps: Count = 500
    """optimizer steps between checkpoints"""
    keep_last: Count | None = 2
    """how many step-*.ckpt stay; null: all"""
    checkpoint_dir: Name = "checkpoints"
    """folder of the checkpoints"""
    log_dir: Name = "logs"
    """folder of the runs' metrics"""
    run_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] = (
        "pretrain"
    )
    """folder in log_dir"""
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """where the metrics go beside metrics.csv"""
    sample_prompt: str | None = None
    """text continued at each validation; null: none"""
    auto_resume: Switch = True
    """go on from the newest sound checkpoint in checkpoint_dir"""
    init_from: Name | None = None
    """a checkpoint, or hf:NAME or hf:FOLDER, whose weights, tokenizer and model settings (but dropout) a new run takes; null: new weights"""
    train_on: Literal["response", "all"] = "response"
    """for fine-tuning: which tokens are targets, those of the responses or all"""

    @model_validator(mode="after")
    def _settings_have_a_use(self) -> "TrainingConfig":
        if self.schedule == "wsd" and self.warmup_ratio + self.decay_ratio > 1:
            raise ValueError(
                f"decay_ratio: {self.decay_ratio} and warmup_ratio {self.warmup_ratio} sum to more than 1. Lower one"
            )
        if len(set(self.loggers)) < len(self.loggers):
            raise ValueError(
                f"loggers: {', '.join(self.loggers)} names one twice. Take it out once"
            )
        if self.schedule == "plateau" and self.val_every_steps > self.max_steps:
            raise ValueError(
                f"val_every_steps: {self.val_every_steps} is more than max_steps ({self.max_steps}), so plateau never sees a validation. Lower it"
            )
        return self


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021) in place of training every weight."""

    r: Annotated[Count, Field(le=4096)] = 8
    """rank of the adapters"""
    alpha: Annotated[Number, Field(gt=0, le=1e6)] = 16.0
    """the adapters' output is multiplied by alpha / r"""
    dropout: Fraction = 0.0
    """dropout on the adapters' input"""
    target_modules: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    """ends of the names of the linear layers that get adapters; null: attention and feed-forward of the architecture at hand"""


class DpoConfig(Section):
    """Direct preference optimisation: from pairs of answers, one better than the other (Rafailov et al. 2023)."""

    beta: Annotated[Number, Field(gt=0, le=100)] = 0.1
    """how strongly the policy is held to its reference"""
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """what is minimised: DPO's, IPO's (Azar et al. 2023) or SLiC's (Zhao et al. 2023)"""
    label_smoothing: Annotated[Number, Field(ge=0, lt=0.5)] = 0.0
    """for sigmoid: share of the pairs that are believed to be the wrong way round"""
    length_normalised: Switch = False
    """log-probabilities per token of an answer, so that long answers do not weigh more; ipo always does so"""
    sft_coef: Annotated[Number, Field(ge=0, le=100)] = 0.0
    """weight of the chosen answers' cross entropy per token beside the preference loss"""
    reference: Literal["copy", "adapters_off", "cached"] = "copy"
    """what the policy is held to: a frozen copy of it, itself with its LoRA switched off, or log-probabilities computed once"""

    @model_validator(mode="after")
    def _settings_have_a_use(self) -> "DpoConfig":
        if self.loss != "sigmoid" and self.label_smoothing:
            raise ValueError(
                f"label_smoothing: loss {self.loss} has none. Take it out, or set loss: sigmoid"
            )
        if self.loss == "ipo" and self.length_normalised:
            raise ValueError("length_normalised: loss ipo is always so. Take it out")
        return self


class VerifierConfig(Section):
    """A verifier: an encoder that reads a problem with an answer and tells right from wrong (Cobbe et al. 2021)."""

    n_wrong: Annotated[CountOrZero, Field(le=64)] = 1
    """wrong answers made of each right one by changing one of its numbers, other ones in each pass; a row of a batch is a problem with all its answers"""
    n_sampled: Annotated[CountOrZero, Field(le=64)] = 0
    """answers to each problem that the model in `sampled_from` writes, right or wrong as the last number in them says"""
    sampled_from: Name | None = None
    """checkpoint of the model that writes them"""

    @model_validator(mode="after")
    def _there_are_wrong_answers(self) -> "VerifierConfig":
        if self.n_wrong + self.n_sampled == 0:
            raise ValueError(
                "n_wrong: without wrong answers there is nothing to tell apart. Set n_wrong, or n_sampled and sampled_from"
            )
        if self.n_sampled and self.sampled_from is None:
            raise ValueError(
                "sampled_from: n_sampled needs a model that writes the answers. Set sampled_from to its checkpoint"
            )
        if self.sampled_from is not None and not self.n_sampled:
            raise ValueError(
                "n_sampled: sampled_from names a model, and n_sampled asks for none of its answers. Set n_sampled, or take sampled_from out"
            )
        return self


class HardwareConfig(Section):
    """Where it runs."""

    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto takes CUDA, else MPS, else the CPU, and says why"""
    precision: Annotated[
        Literal["32", "16", "bf16"],
        BeforeValidator(_precision_name),
        WithJsonSchema({"enum": ["32", "16", "bf16", 32, 16]}),
    ] = "32"
    """arithmetic of the forward pass; weights and optimizer state stay fp32"""
    devices: Count = 1
    """devices on each machine"""
    num_nodes: Count = 1
    """machines, started by torchrun or SLURM"""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """how several devices share the work"""
    compile: Switch = False
    """compile the decoder with torch.compile"""
    threads: Count | None = None
    """CPU threads; null: torch's choice. The number changes results in the last bits"""


class SamplingConfig(Section):
    """How the next token is chosen from the logits."""

    max_new_tokens: Annotated[Count, Field(le=1_000_000)] = 200
    """tokens to write at most"""
    temperature: Annotated[Number, Field(ge=0, le=100)] = 0.8
    """divides the logits; 0 is greedy"""
    top_k: Count | None = None
    """only the k most probable tokens"""
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    """only the most probable tokens that together reach p (Holtzman et al. 2020)"""
    min_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    """only tokens at least min_p times as probable as the most probable one (Nguyen et al. 2024)"""
    repetition_penalty: Annotated[Number, Field(gt=0, le=100)] = 1.0
    """makes tokens already in the context less probable (Keskar et al. 2019); 1 is off"""
    no_repeat_ngram: Count | None = None
    """no sequence of so many tokens occurs twice"""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """strings that end the text; they are not part of it"""
    seed: CountOrZero = 0
    """seed of the draw"""
    n_samples: Annotated[Count, Field(le=1024)] = 1
    """continuations of the prompt"""
    n_beams: Annotated[Count, Field(le=256)] = 1
    """beams; more than 1 searches for the most probable text instead of drawing"""

    @model_validator(mode="after")
    def _beams_do_not_draw(self) -> "SamplingConfig":
        if self.n_beams > 1 and self.n_samples > 1:
            raise ValueError("n_samples: beam search gives one text. Set n_beams or n_samples to 1")
        return self


class Config(Section):
    """One run, whole."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    hardware: HardwareConfig = Field(default_factory=HardwareConfig)
    lora: LoraConfig | None = None
    """low-rank adapters for fine-tuning; null: every weight is trained"""
    dpo: DpoConfig | None = None
    """train on preferences; null: on next tokens"""
    verifier: VerifierConfig | None = None
    """train a verifier of answers; null: a language model"""
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)

    @model_validator(mode="after")
    def _sections_agree(self) -> "Config":
        seq_len, positions = self.training.seq_len, self.model.max_seq_len
        # A run that starts from a trained model has that model's positions, known once it is opened, where the settings say none.
        known = self.training.init_from is None or "max_seq_len" in self.model.model_fields_set
        if known and seq_len > positions:
            raise ValueError(
                f"training.seq_len: {seq_len} is more than model.max_seq_len ({positions}). Raise model.max_seq_len or lower training.seq_len"
            )
        if self.data.stride is not None and self.data.stride > seq_len:
            raise ValueError(
                f"data.stride: {self.data.stride} is more than training.seq_len ({seq_len}), which would skip tokens. Lower data.stride"
            )
        return self

    @model_validator(mode="after")
    def _preferences_have_no_use_for(self) -> "Config":
        if self.dpo is None:
            return self
        if self.dpo.reference == "adapters_off" and self.lora is None:
            raise ValueError(
                "dpo.reference: adapters_off needs adapters to switch off. Set dpo.reference to copy or cached, or write a lora section"
            )
        unused = {
            "data.task": (self.data.task, None),
            "data.rows": (self.data.rows, "auto"),
            "training.train_on": (self.training.train_on, "response"),
            "training.label_smoothing": (self.training.label_smoothing, 0.0),
        }
        for name, (value, default) in unused.items():
            if value != default:
                raise ValueError(
                    f"{name}: {value} has no meaning for pairs of answers, which the dpo section asks for. Take it out"
                )
        return self

    @model_validator(mode="after")
    def _a_verifier_has_no_use_for(self) -> "Config":
        if self.verifier is None:
            return self
        for name, section in (("lora", self.lora), ("dpo", self.dpo)):
            if section is not None:
                raise ValueError(
                    f"{name}: the verifier section asks for a verifier, which has no use for it. Take one of the two out"
                )
        unused = {
            "data.template": (self.data.template, "instruction"),
            "data.packing": (self.data.packing, "packed"),
            "training.train_on": (self.training.train_on, "response"),
            "training.label_smoothing": (self.training.label_smoothing, 0.0),
            "training.sample_prompt": (self.training.sample_prompt, None),
        }
        for name, (value, default) in unused.items():
            if value != default:
                raise ValueError(
                    f"{name}: {printable(value)} has no meaning for a verifier, which the verifier section asks for. Take it out"
                )
        return self

    def to_plain(self) -> dict[str, Any]:
        """The settings as plain dicts, lists and numbers: what a checkpoint stores. `from_plain` is its inverse."""
        return self.model_dump(mode="json")

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "Config":
        """The settings that `to_plain` gave."""
        return cls.model_validate(plain)
