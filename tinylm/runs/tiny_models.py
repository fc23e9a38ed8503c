"""GPT-2 and T5 with random weights, as the folders that the hub would give: with them the smoke
phase of the experiments tries fine-tuning and evaluation of Hugging Face models without network.
"""

from pathlib import Path
from typing import Any

import torch

from tinylm.common.errors import require_package
from tinylm.common.files import make_once
from tinylm.model.hf_model import quiet_transformers
from tinylm.text.documents import text_chunks
from tinylm.tokenizer.bpe_fast import learn_bpe
from tinylm.tokenizer.pretokenize import Pretokenizer

END_ID = 256  # after the 256 bytes
N_IDS = END_ID + 1
# Its model_type: the class of transformers, and its settings.
TINY_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "AutoModelForCausalLM",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "bos_token_id": END_ID},
    ),
    "t5": (
        "AutoModelForSeq2SeqLM",
        {
            **{"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2},
            **{"pad_token_id": END_ID, "decoder_start_token_id": END_ID},
        },
    ),
}


def make_tiny_model(kind: str, folder: Path) -> None:
    """Make the folder of a model of `TINY_MODELS`, unless it exists; always the same weights."""
    require_package("transformers")
    make_once(folder, lambda temporary: _save(kind, temporary), setting="--out")


def _save(kind: str, folder: Path) -> None:
    import transformers

    # Bytes and an end of text, without merges: nothing is learned from the text.
    words = Pretokenizer("gpt2", ("<|endoftext|>",))
    learn_bpe(text_chunks([" "]), N_IDS, words).save(folder)
    auto_class, settings = TINY_MODELS[kind]
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=N_IDS, eos_token_id=END_ID, **settings
    )
    with quiet_transformers(), torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        getattr(transformers, auto_class).from_config(config).save_pretrained(folder)
