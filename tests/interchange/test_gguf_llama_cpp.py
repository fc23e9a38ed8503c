"""llama.cpp reads the exported files as they are meant: greedy text equal to that of infer.py, and its own number
types. Needs llama-cpp-python (requirements-bench.txt); skipped without it.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.interchange.conftest import GPT2, PROMPT, TEXT, text_of_infer
from tinylm.checkpoint.load import load_model
from tinylm.interchange.gguf import export_gguf, read_gguf

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

pytestmark = pytest.mark.slow

MODELS = {
    "llama": {"n_kv_heads": 2},
    "llama, untied, wide heads": {"tie_embeddings": False, "head_dim": 16, "rope_theta": 500.0},
    "qwen2": {"bias": "qkv", "n_kv_heads": 1},
    "qwen3": {"qk_norm": True, "head_dim": 16, "n_kv_heads": 2},
    "gpt2": GPT2,
    "mixtral": {"moe": {"n_experts": 5, "top_k": 3}, "n_kv_heads": 2},
    "mixtral, one expert a token": {"moe": {"n_experts": 4, "top_k": 1}, "tie_embeddings": False},
    "mistral, window": {"sliding_window": 60, "max_seq_len": 64, "n_kv_heads": 2},
    "llama, linear": {"rope_scaling": {"type": "linear", "factor": 8.0}},
    "llama, yarn": {
        "rope_scaling": {"type": "yarn", "factor": 8.0, "original_max_seq_len": 8},
        "head_dim": 16,
    },
    "llama, yarn, own numbers": {
        "rope_scaling": {
            **{"type": "yarn", "factor": 8.0, "original_max_seq_len": 8},
            **{"attention_factor": 2.5},
        },
        "head_dim": 16,
    },
    "llama, llama3": {
        "rope_scaling": {
            **{"type": "llama3", "factor": 8.0, "original_max_seq_len": 8},
            **{"low_freq_factor": 0.02, "high_freq_factor": 1.1},
        },
        "head_dim": 16,
    },
    "qwen2, yarn": {
        "rope_scaling": {"type": "yarn", "factor": 8.0, "original_max_seq_len": 8},
        "bias": "qkv",
    },
    "mixtral, window": {"sliding_window": 50, "moe": {"n_experts": 4, "top_k": 2}},
}


@pytest.fixture(autouse=True)
def plain_kernels(monkeypatch):
    """Its kernels for AMX crash where the system does not let a process use it."""
    defaults = llama_cpp.llama_model_default_params

    def without_repacking():
        settings = defaults()
        settings.use_extra_bufts = False
        return settings

    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", without_repacking)


def ids_of_llama_cpp(file: Path, n_new: int) -> tuple[list[int], int]:
    """The ids that llama.cpp generates greedily after the prompt, and the context in the file."""
    # the cache in f32, as ours
    llm = llama_cpp.Llama(
        str(file), n_ctx=256, verbose=False, type_k=0, type_v=0, n_threads=1, n_threads_batch=1
    )
    prompt = llm.tokenize(PROMPT.encode(), add_bos=False, special=True)
    ids: list[int] = []
    for id in llm.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0):
        if id == llm.token_eos() or len(ids) == n_new:
            break
        ids.append(id)
    context = int(llm.metadata[f"{llm.metadata['general.architecture']}.context_length"])
    llm.close()
    return ids, context


def logits_of_llama_cpp(file: Path, ids: list[int]) -> np.ndarray:
    """llama.cpp's logits (T, V)."""
    llm = llama_cpp.Llama(str(file), n_ctx=256, verbose=False, logits_all=True, n_threads=1)
    llm.eval(ids)
    logits = llm.scores[: len(ids)].copy()
    llm.close()
    return logits


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_generates_the_text_of_infer(name, dtype, save, tmp_path, capsys):
    """f16 rounds the weights, so a text may leave ours where two tokens are nearly as probable: half of it is equal
    in all of these. The context of a windowed model is its window.
    """
    path = save(**MODELS[name])
    expected = text_of_infer(path, capsys)[1]
    export_gguf(path, tmp_path / "out.gguf", dtype=dtype)
    found, context = ids_of_llama_cpp(tmp_path / "out.gguf", len(expected))
    config = load_model(path).config.model
    assert context == min(config.sliding_window or config.max_seq_len, config.max_seq_len)
    n_equal = 20 if dtype == "f16" else len(expected)
    assert found[:n_equal] == expected[:n_equal]


QUANTIZED = {"llama": {"n_kv_heads": 2}, "gpt2": GPT2, "mixtral": {"moe": {"n_experts": 2}}}


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize(
    "dtype", ["bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "mxfp4", "q2_k", "q4_k_m", "q6_k"]
)
def test_llama_cpp_computes_with_every_number_type(name, dtype, save, tmp_path):
    """Its logits are near those of our decoder with the file's numbers, which the gguf package reads. llama.cpp also
    rounds the inputs of each product, to 8 bits, which costs 1% to 7% of their norm in a random model; a wrong order of
    the numbers would cost more than all of it. Every token visits both experts: a rounded router would otherwise
    choose others now and then.
    """
    path = save(**QUANTIZED[name] | {"d_model": 256, "d_ff": 256})
    export_gguf(path, tmp_path / "out.gguf", dtype=dtype)
    loaded = load_model(path)
    decoder = read_gguf(tmp_path / "out.gguf", loaded.model.config)
    ids = loaded.tokenizer.encode(TEXT)[:40]
    with torch.no_grad():
        expected = decoder(torch.tensor([ids]))[0]
    found = torch.from_numpy(logits_of_llama_cpp(tmp_path / "out.gguf", ids))
    difference = ((found - expected).norm() / expected.norm()).item()
    assert difference < 0.1
