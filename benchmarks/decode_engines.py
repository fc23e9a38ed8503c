"""The model of benchmarks/decode.py, and the implementations that it compares: one class each, with
`generate(prompts, n_new)`, and the table `IMPLEMENTATIONS`.
"""

import functools
import importlib.util
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
Prompts = list[list[int]]


@dataclass(frozen=True)
class Shape:
    """The size of the model, that of benchmarks/train.py."""

    n_layers: int = 6
    d_model: int = 384
    n_heads: int = 6
    d_ff: int = 1024
    vocab_size: int = 8192
    max_seq_len: int = 1024


QUICK = Shape(n_layers=2, d_model=32, n_heads=2, d_ff=64, vocab_size=300, max_seq_len=64)


# --- the model, written once for all --------------------------------------------------------------


def write_model(folder: Path, shape: Shape, makers: set[Any]) -> int:
    """Write `model.ckpt`, and exports of it for the classes `makers`; returns the parameters."""
    import torch

    from tinylm.checkpoint import format as checkpoint_format
    from tinylm.config.schema import Config
    from tinylm.interchange.gguf import export_gguf
    from tinylm.interchange.hf_export import export_hf
    from tinylm.model.decoder import Decoder, count_parameters
    from tinylm.text.documents import text_chunks
    from tinylm.tokenizer.bpe_fast import learn_bpe
    from tinylm.tokenizer.hf_files import load_hf_tokenizer
    from tinylm.tokenizer.pretokenize import Pretokenizer

    files = [*ROOT.rglob("*.py"), *ROOT.rglob("*.md"), *ROOT.glob("data/*.txt")]
    texts = [path.read_text(encoding="utf-8") for path in sorted(files)]
    learn_bpe(
        text_chunks(texts), shape.vocab_size, Pretokenizer("gpt2", ("<|endoftext|>", "<|pad|>"))
    ).save(folder / "tokenizer")
    tokenizer = load_hf_tokenizer(str(folder / "tokenizer"))
    config = Config.model_validate(
        {
            "model": asdict(shape) | {"vocab_size": tokenizer.vocab_size},
            "training": {"seq_len": shape.max_seq_len},
        }
    )
    torch.manual_seed(0)
    model = Decoder(config.model)
    with torch.no_grad():
        # The logit of EOS is 0, which is never the largest of so many: no text ends early.
        model.embedding.weight[tokenizer.eos_id] = 0
    state = checkpoint_format.NO_REFERENCES | {
        "format": "tinylm",
        "schema": 1,
        "stage": "pretrain",
        "step": 0,
        "tokens": 0,
        "train_loss": 0.0,
        "val_loss": 0.0,
        "created": 0.0,
        "config": config.to_plain(),
        "tokenizer": tokenizer.to_plain(),
        "weights": model.state_dict(),
    }
    checkpoint_format.write(folder / "model.ckpt", state)
    if makers & {Transformers, CTranslate2}:
        export_hf(folder / "model.ckpt", folder / "hf")
    if LlamaCpp in makers:
        export_gguf(folder / "model.ckpt", folder / "f32.gguf")
        export_gguf(folder / "model.ckpt", folder / "q8_0.gguf", dtype="q8_0")
    if CTranslate2 in makers:
        from ctranslate2.converters import TransformersConverter

        TransformersConverter(str(folder / "hf")).convert(str(folder / "ct2"))
    return count_parameters(model)


def make_prompts(shape: Shape, batch: int, length: int, *, same: bool) -> Prompts:
    """Random token ids."""
    import random

    draw = random.Random(1)
    rows = [[draw.randrange(shape.vocab_size // 2) for _ in range(length)] for _ in range(batch)]
    return [rows[0]] * batch if same else rows


# --- the implementations, each in its own process -------------------------------------------------


class TinyLM:
    """This project: the engine that infer.py uses, sampling and text included."""

    def __init__(self, folder: Path, weights: str, threads: int):
        import torch

        from tinylm.checkpoint.load import load_model
        from tinylm.generate.engine import Engine
        from tinylm.generate.weights import round_weights

        torch.set_num_threads(threads)
        loaded = load_model(folder / "model.ckpt")
        round_weights(loaded.model, loaded.tokenizer, weights, max_rise=1.0)
        self.engine = Engine(loaded.model, loaded.tokenizer, slots=32)
        self.n_turns = 0

    def generate(self, prompts: Prompts, n_new: int) -> None:
        """All at once. The prompts differ from turn to turn: the engine would know a prompt again."""
        from tinylm.config.schema import SamplingConfig
        from tinylm.generate.engine import Request
        from tinylm.generate.output import Prompt

        self.n_turns += 1
        sampling = SamplingConfig(max_new_tokens=n_new, temperature=0)
        start = self.n_turns % len(prompts[0])
        requests = [
            Request(Prompt((*ids[start:], *ids[:start])), sampling, sample=row)
            for row, ids in enumerate(prompts)
        ]
        for outputs in self.engine.run(requests):
            assert len(outputs) == n_new


class PlainTinyLM(TinyLM):
    """The same engine with decoder.py alone, without the lean step."""

    def __init__(self, folder: Path, weights: str, threads: int):
        from tinylm.generate import decoding

        decoding.lean_step = lambda model: None  # in this process only
        super().__init__(folder, weights, threads)


class Transformers:
    """transformers: `generate` of AutoModelForCausalLM."""

    def __init__(self, folder: Path, dtype: str, threads: int):
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(
            folder / "hf", dtype=getattr(torch, dtype)
        )

    def generate(self, prompts: Prompts, n_new: int) -> None:
        """One batch."""
        import torch

        ids = torch.tensor(prompts)
        text = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=n_new,
            max_new_tokens=n_new,
            pad_token_id=0,
        )
        assert text.shape[1] == ids.shape[1] + n_new


class CTranslate2:
    """ctranslate2: `Generator.generate_batch`."""

    def __init__(self, folder: Path, compute_type: str, threads: int):
        import ctranslate2

        self.generator = ctranslate2.Generator(
            str(folder / "ct2"),
            device="cpu",
            compute_type=compute_type,
            inter_threads=1,
            intra_threads=threads,
        )
        vocabulary = json.loads((folder / "ct2" / "vocabulary.json").read_text(encoding="utf-8"))
        self.tokens: list[str] = vocabulary

    def generate(self, prompts: Prompts, n_new: int) -> None:
        """One batch."""
        texts = self.generator.generate_batch(
            [[self.tokens[id] for id in ids] for ids in prompts],
            max_length=n_new,
            min_length=n_new,
            sampling_topk=1,
            include_prompt_in_result=False,
            end_token=[self.tokens[0]],
        )
        assert all(len(text.sequences_ids[0]) == n_new for text in texts)


class LlamaCpp:
    """llama.cpp through its C interface, because llama-cpp-python's classes have no batches."""

    def __init__(self, folder: Path, file: str, threads: int):
        import llama_cpp

        self.api = llama_cpp
        self.threads = threads
        llama_cpp.llama_log_set(QUIET_LLAMA(), None)
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        # Repacked weights end in an illegal instruction on some virtual machines with AMX.
        settings.use_extra_bufts = False
        path = str(folder / f"{file}.gguf").encode()
        self.model = llama_cpp.llama_model_load_from_file(path, settings)
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)
        self.context: Any = None
        self.n_rows = self.room = 0

    def prepare(self, n_rows: int, room: int) -> None:
        """A context of `n_rows` sequences, with `room` positions for all of them together."""
        if (n_rows, room) == (self.n_rows, self.room):
            return
        if self.context is not None:
            self.api.llama_free(self.context)
        self.n_rows, self.room = n_rows, room
        settings = self.api.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = room
        settings.n_seq_max = n_rows
        settings.n_threads = settings.n_threads_batch = self.threads
        settings.kv_unified = True
        # float32 keys and values, as the others have them
        settings.type_k = settings.type_v = self.api.GGML_TYPE_F32
        settings.flash_attn_type = self.api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = self.api.llama_init_from_model(self.model, settings)

    def generate(self, prompts: Prompts, n_new: int) -> None:
        """Equal prompts are read once, and their cache is shared."""
        import numpy as np

        api, n_rows, length = self.api, len(prompts), len(prompts[0])
        self.prepare(n_rows, max(self.room, 256 + n_rows * (length + n_new)))
        memory = api.llama_get_memory(self.context)
        api.llama_memory_clear(memory, True)
        different = 1 if all(row == prompts[0] for row in prompts) else n_rows
        batch = api.llama_batch_init(different * length, 0, 1)
        for row in range(different):
            for position, id in enumerate(prompts[row]):
                last = position == length - 1
                self.add(batch, id, position, row, wanted=last)
        assert api.llama_decode(self.context, batch) == 0
        for row in range(different, n_rows):
            api.llama_memory_seq_cp(memory, 0, row, -1, -1)
        ends = [(row % different + 1) * length - 1 for row in range(n_rows)]
        for position in range(length, length + n_new):
            logits = [api.llama_get_logits_ith(self.context, end) for end in ends]
            rows = [np.ctypeslib.as_array(row, shape=(self.n_vocab,)) for row in logits]
            ids = [int(row.argmax()) for row in rows]
            if position == length + n_new - 1:
                break
            batch.n_tokens = 0
            for row, id in enumerate(ids):
                self.add(batch, id, position, row, wanted=True)
            ends = list(range(n_rows))
            assert api.llama_decode(self.context, batch) == 0
        api.llama_batch_free(batch)

    def add(self, batch: Any, id: int, position: int, row: int, *, wanted: bool) -> None:
        """Add one token to a batch; `wanted`: its logits are needed."""
        at = batch.n_tokens
        batch.token[at], batch.pos[at] = id, position
        batch.n_seq_id[at], batch.seq_id[at][0] = 1, row
        batch.logits[at] = wanted
        batch.n_tokens += 1


@functools.cache
def QUIET_LLAMA() -> Any:  # noqa: N802
    """A log callback that prints nothing; kept alive, because C calls it."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)


class Memory:
    """No model: reads as many bytes as the weights have, once a token."""

    def __init__(self, folder: Path, dtype: str, threads: int):
        import torch

        from tinylm.checkpoint import format as checkpoint_format

        torch.set_num_threads(threads)
        weights = checkpoint_format.read(folder / "model.ckpt")["weights"]
        n = sum(weight.numel() for name, weight in weights.items() if name != "head.weight")
        self.numbers = torch.ones(n)

    def generate(self, prompts: Prompts, n_new: int) -> None:
        """`n_new` passes."""
        import torch

        for _ in range(n_new):
            torch.dot(self.numbers, self.numbers)


class Implementation(NamedTuple):
    """One row of the table."""

    group: str
    """fp32, bf16, int8 or int4"""
    module: str
    """imported before its memory is measured"""
    install: str
    """for pip"""
    make: Callable[[Path, str, int], Any]
    argument: str


_TINYLM = ("tinylm.generate.engine", "torch")
_TRANSFORMERS = ("transformers.models.llama.modeling_llama", "transformers")
_LLAMA_CPP = ("llama_cpp", "llama-cpp-python==0.3.36")
_CTRANSLATE2 = ("ctranslate2", "ctranslate2==4.8.5")  # has no bf16 on the CPU
IMPLEMENTATIONS = {
    "tinylm fp32": Implementation("fp32", *_TINYLM, TinyLM, "fp32"),
    "tinylm bf16": Implementation("bf16", *_TINYLM, TinyLM, "bf16"),
    "tinylm int8": Implementation("int8", *_TINYLM, TinyLM, "int8"),
    "tinylm int4": Implementation("int4", *_TINYLM, TinyLM, "int4"),
    "tinylm decoder.py": Implementation("fp32", *_TINYLM, PlainTinyLM, "fp32"),
    "transformers fp32": Implementation("fp32", *_TRANSFORMERS, Transformers, "float32"),
    "transformers bf16": Implementation("bf16", *_TRANSFORMERS, Transformers, "bfloat16"),
    "llama.cpp f32": Implementation("fp32", *_LLAMA_CPP, LlamaCpp, "f32"),
    "llama.cpp q8_0": Implementation("int8", *_LLAMA_CPP, LlamaCpp, "q8_0"),
    "ctranslate2 fp32": Implementation("fp32", *_CTRANSLATE2, CTranslate2, "float32"),
    "ctranslate2 int8": Implementation("int8", *_CTRANSLATE2, CTranslate2, "int8"),
}
OURS = "tinylm fp32"
READING = "reading the weights"


def is_installed(module: str) -> bool:
    """Whether the package of a module is installed."""
    return importlib.util.find_spec(module.partition(".")[0]) is not None
