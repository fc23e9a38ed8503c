"""Checkpoints of random models, published folders, and the text that infer.py and transformers generate."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import infer
from tinylm.checkpoint import format as checkpoint_format
from tinylm.config.schema import Config
from tinylm.model.decoder import Decoder
from tinylm.text.documents import text_chunks
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokenizer.bpe_fast import learn_bpe
from tinylm.tokenizer.hf import HFTokenizer
from tinylm.tokenizer.hf_files import load_hf_tokenizer
from tinylm.tokenizer.pretokenize import PATTERNS, Pretokenizer

TEXT = (
    "the model reads a token and guesses the next token; it isn't 12345 words, nor naïve 東京 🙂 "
    "text, the the the model's guesses\n"
)
GPT2 = {"position": "learned", "norm": "layernorm", "ffn": "gelu", "bias": "all"}
SPECIAL = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], HFTokenizer]:
    """A byte-level BPE tokenizer learned from one sentence and a number, with the words of a pattern."""
    folder, made = tmp_path_factory.mktemp("tokenizers"), {}
    for pattern in PATTERNS:
        pretokenizer = Pretokenizer(pattern, SPECIAL)
        learn_bpe(text_chunks([TEXT + 9 * " 12345"]), 300, pretokenizer).save(folder / pattern)
        made[pattern] = load_hf_tokenizer(str(folder / pattern))
    return made.__getitem__


@pytest.fixture
def save(tmp_path: Path, bpe: Callable[[str], HFTokenizer]) -> Callable[..., Path]:
    """Writes a checkpoint of a random model; keyword arguments are settings of the model."""

    def write(
        tokenizer: Tokenizer | None = None,
        *,
        stage: str = "pretrain",
        config: dict | None = None,
        **model: Any,
    ) -> Path:
        tokenizer = tokenizer or bpe("gpt2")
        shape = {
            "vocab_size": tokenizer.vocab_size,
            "n_layers": 2,
            "d_model": 32,
            "n_heads": 4,
            "d_ff": 48,
            "max_seq_len": 64,
        } | model
        settings = Config.model_validate(
            {"training": {"seq_len": 32}} | (config or {}) | {"model": shape}
        )
        path = tmp_path / "a.ckpt"
        decoder, generator = Decoder(settings.model), torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in decoder.parameters():
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
        weights = checkpoint_format.NO_REFERENCES | {
            "config": settings.to_plain(),
            "tokenizer": tokenizer.to_plain(),
            "weights": decoder.state_dict(),
        }
        about = {
            "format": "tinylm",
            "schema": 1,
            "stage": stage,
            "step": 5,
            "tokens": 640,
            "train_loss": 2.5,
            "val_loss": 2.25,
            "created": 1.0,
        }
        checkpoint_format.write(path, about | weights)
        return path

    return write


def quick(cases: Iterable[str], *kept: str) -> list[Any]:
    """The cases as parameters; all but `kept` are in the slow tier, because there are many of them."""
    return [name if name in kept else pytest.param(name, marks=pytest.mark.slow) for name in cases]


PROMPT = "the model"


def text_of_infer(ckpt: Path, capsys: pytest.CaptureFixture) -> tuple[str, list[int]]:
    """The text that infer.py generates greedily after the prompt, and its ids."""
    capsys.readouterr()
    assert (
        infer.main(
            [
                "--ckpt",
                str(ckpt),
                "--prompt",
                PROMPT,
                "--temperature",
                "0",
                "--max-new-tokens",
                "40",
                "--device",
                "cpu",
                "--json",
            ]
        )
        == 0
    )
    [completion] = json.loads(capsys.readouterr().out)["completions"]
    return completion["text"], completion["ids"]


def text_of_transformers(
    folder: Path, tokenizer_class: str = "AutoTokenizer", **gguf: Any
) -> tuple[str, list[int]]:
    """The text that transformers generates greedily after the prompt, with the exported tokenizer and generation
    settings.
    """
    file = {"gguf_file": gguf["gguf_file"]} if gguf else {}
    tokenizer = getattr(transformers, tokenizer_class).from_pretrained(folder, **file)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **gguf)
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    ids = model.generate(prompt, do_sample=False, max_new_tokens=40)[0, prompt.size(1) :].tolist()
    return tokenizer.decode(ids, skip_special_tokens=True), ids


THEIR_SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
THEIRS = {
    "llama": lambda: transformers.LlamaConfig(**THEIR_SHAPE),
    "llama, tied": lambda: transformers.LlamaConfig(
        **THEIR_SHAPE, tie_word_embeddings=True, rope_theta=500.0
    ),
    "mistral": lambda: transformers.MistralConfig(**THEIR_SHAPE, sliding_window=9),
    "qwen2": lambda: transformers.Qwen2Config(**THEIR_SHAPE),
    "qwen3": lambda: transformers.Qwen3Config(**THEIR_SHAPE, head_dim=12),
    "mixtral": lambda: transformers.MixtralConfig(**THEIR_SHAPE, num_local_experts=3),
    "olmo2": lambda: transformers.Olmo2Config(**THEIR_SHAPE, pad_token_id=0),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(
        **THEIR_SHAPE | {"num_hidden_layers": 4, "head_dim": 12, "query_pre_attn_scalar": 9},
        sliding_window=9,
        sliding_window_pattern=2,
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64
    ),
}


@pytest.fixture
def published(tmp_path: Path, bpe: Callable[[str], HFTokenizer]) -> Callable[..., Path]:
    """Saves a random model with its tokenizer as its authors would, with transformers."""

    def write(
        name: str = "llama", *, dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB"
    ) -> Path:
        folder = tmp_path / "published"
        model = transformers.AutoModelForCausalLM.from_config(THEIRS[name](), dtype=dtype)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        plain = bpe("gpt2").to_plain()
        (folder / "tokenizer.json").write_text(plain["tokenizer_json"], encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"eos_token": plain["eos"]}), encoding="utf-8"
        )
        return folder

    return write
