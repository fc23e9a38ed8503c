"""Models of other architectures as a user works with them: a folder of transformers is fine-tuned, sampled, scored
and exported, whole and with adapters, and transformers computes the same from the export.
"""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import eval_val
import finetune
import infer
import list as list_program
from tests.interchange.conftest import TEXT
from tests.model.test_hf_model import random_model
from tinylm.__main__ import main
from tinylm.checkpoint.load import load_model
from tinylm.tokenizer.hf import HFTokenizer

SHAPES = {
    "gpt_neo": {},
    "gptj": {},
    "gemma2": {},
    "gemma3_text": {
        **{"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 16},
        **{"query_pre_attn_scalar": 16, "sliding_window": 5},
    },
    "llama, scaled rope": {"tie_word_embeddings": True},
    "qwen3": {},
    "lfm2": {},
}
IN_GGUF = ("qwen3", "llama, scaled rope")
ADAPTER = ["lora.r=2", "lora.alpha=4"]
CPU = ["--device", "cpu"]


@pytest.fixture
def make_folder(tmp_path: Path, bpe: Callable[[str], HFTokenizer]) -> Callable[[str], Path]:
    """Saves a random model of a shape and its tokenizer, as transformers saves them."""

    def make(shape: str) -> Path:
        tokenizer = bpe("gpt2")
        ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_id)
        sizes = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 128}
        folder = tmp_path / "theirs"
        random_model(shape, **(sizes | ids | SHAPES[shape])).save_pretrained(folder)
        plain = tokenizer.to_plain()
        (folder / "tokenizer.json").write_text(plain["tokenizer_json"], encoding="utf-8")
        settings = json.dumps({"eos_token": plain["eos"]})
        (folder / "tokenizer_config.json").write_text(settings, encoding="utf-8")
        return folder

    return make


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [{"instruction": f"{n} and {n}?", "output": f"It is {2 * n}."} for n in range(30)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ADAPTER], ids=["whole", "lora"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_folder_of_this_shape_is_tuned_sampled_scored_and_exported(
    shape: str, more: list[str], make_folder, rows: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    config = tmp_path / "a.yaml"
    config.write_text(f"data: {{dataset: {rows}}}\nhardware: {{accelerator: cpu}}\n", "utf-8")
    runs = tmp_path / "runs"
    steps = ["training.max_steps=3", "training.seq_len=64", "training.micro_batch_size=4"]
    places = [f"training.checkpoint_dir={runs}", f"training.log_dir={tmp_path / 'logs'}"]
    packing = "padded" if shape == "lfm2" else "packed"  # whose convolutions mix documents
    start = [f"training.init_from=hf:{make_folder(shape)}", f"data.packing={packing}"]
    assert finetune.main(["--config", str(config), *start, *steps, *places, *more]) == 0
    ckpt = str(runs / "final.ckpt")

    # Sampled: continued, several times, and in a chat of two questions.
    asked = ["--ckpt", ckpt, "--max-new-tokens", "6", "--seed", "1", *CPU]
    assert infer.main([*asked, "--prompt", "2 and 2?", "--n-samples", "2", "--json"]) == 0
    capsys.readouterr()
    questions = io.TextIOWrapper(io.BytesIO(b"2 and 2?\n2 and 3?\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", questions)
    assert infer.main([*asked, "--chat"]) == 0
    # Listed, and scored on plain text and on the answers.
    assert list_program.main(["--dir", str(runs)]) == 0
    assert "final" in capsys.readouterr().out
    scored = ["--ckpt", ckpt, "--config", str(config), "--json"]
    assert eval_val.main([*scored, "training.seq_len=64", "--answers"]) == 0
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} {TEXT}" for n in range(40)), encoding="utf-8")
    settings = [f"data.dataset={text}", f"data.cache_dir={tmp_path / 'cache'}"]
    assert eval_val.main([*scored, "training.seq_len=64", *settings]) == 0

    # Exported: transformers computes the same.
    out = tmp_path / "out"
    assert main(["export", ckpt, str(out)]) == 0
    ids = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = load_model(Path(ckpt)).model.eval()(ids)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()(ids).logits
        assert torch.allclose(theirs, expected, atol=1e-4, rtol=1e-4)
        if more:
            assert main(["export", ckpt, str(tmp_path / "merged"), "--merge"]) == 0
            merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
            assert torch.allclose(merged(ids).logits, expected, atol=1e-4, rtol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer(TEXT)["input_ids"] == load_model(Path(ckpt)).tokenizer.encode(TEXT)

    # What has no GGUF file says so, and what makes one.
    if not more and shape not in IN_GGUF:
        assert main(["export", ckpt, str(tmp_path / "a.gguf"), "--format", "gguf"]) == 2
        error = capsys.readouterr().err
        assert "is not supported in GGUF here" in error
        assert "llama.cpp's convert_hf_to_gguf.py reads the folder" in error
