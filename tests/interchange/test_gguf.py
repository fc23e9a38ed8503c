"""Export to GGUF: transformers reads the file back to the same text, and what GGUF does not have is an error."""

import json

import pytest
import torch
import transformers

from tests.interchange.conftest import (
    GPT2,
    SPECIAL,
    TEXT,
    quick,
    text_of_infer,
    text_of_transformers,
)
from tinylm.__main__ import main
from tinylm.checkpoint import format as checkpoint_format
from tinylm.common.errors import UserError
from tinylm.interchange.gguf import Vocabulary, export_gguf, interleave_halves, vocabulary_of
from tinylm.tokenizer.bpe_files import Bpe
from tinylm.tokenizer.byte_char import ByteTokenizer, CharTokenizer
from tinylm.tokenizer.factory import tokenizer_from_plain
from tinylm.tokenizer.hf import HFTokenizer
from tinylm.tokenizer.pretokenize import Pretokenizer

# --- GGUF ---

IN_GGUF = {
    "llama": {"n_kv_heads": 2},
    "llama, untied, wide heads": {
        "tie_embeddings": False,
        "head_dim": 10,
        "rope_theta": 500.0,
        "norm_eps": 1e-3,
    },
    "llama, more rows than tokens": {"vocab_size": 384},
    "qwen2": {"bias": "qkv", "n_kv_heads": 1},
    "qwen3": {"qk_norm": True, "head_dim": 128, "n_kv_heads": 2},
    "qwen3, other heads": {"qk_norm": True, "head_dim": 12},
    "gpt2": GPT2,
    "gpt2, untied": GPT2 | {"tie_embeddings": False, "d_ff": 128, "max_seq_len": 1024},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", quick(IN_GGUF, "llama", "qwen3, other heads", "gpt2"))
def test_a_gguf_file_generates_the_text_of_infer(name, save, tmp_path, capsys):
    """Read back by transformers. Settings in the file that it does not read are in `needs`."""
    path = save(**IN_GGUF[name])
    written = export_gguf(path, tmp_path / "out.gguf")
    assert written.model_type == name.partition(",")[0]
    assert written.needs == {
        "qwen3, other heads": {"head_dim": 12},
        "gpt2": {"n_positions": 64, "n_inner": 48},
    }.get(name, {})
    assert text_of_transformers(tmp_path, gguf_file="out.gguf", **written.needs) == text_of_infer(
        path, capsys
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.ckpt", "out.gguf"]


def test_the_word_pattern_of_gpt4_has_a_name_in_gguf(save, bpe, tmp_path):
    """It splits 12345 into 123 and 45; GPT-2's makes it one word."""
    export_gguf(save(bpe("gpt4")), tmp_path / "out.gguf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="out.gguf")
    assert theirs(TEXT)["input_ids"] == bpe("gpt4").encode(TEXT) != bpe("gpt2").encode(TEXT)


def test_both_formats_can_be_written_into_one_folder(save, tmp_path, capsys):
    """The file has the name of the checkpoint, and transformers reads either."""
    path, out = save(), tmp_path / "out"
    assert main(["export", str(path), str(out), "--format", "hf"]) == 0
    assert main(["export", str(path), str(out), "--format", "gguf"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(out), str(out / "a.gguf")]
    assert main(["export", str(path), str(out), "--format", "gguf"]) == 2
    assert f"{out / 'a.gguf'}: already exists" in capsys.readouterr().err


def test_f16_halves_the_matrices_and_nothing_else(save, tmp_path):
    """The logits equal those of our decoder with its matrices rounded to 16 bits, as the export checks; norms keep
    32.
    """
    from gguf import GGMLQuantizationType, GGUFReader

    path = save()
    exact, halved = (
        export_gguf(path, tmp_path / "a.gguf"),
        export_gguf(path, tmp_path / "b.gguf", floats="f16"),
    )
    assert max(exact.difference, halved.difference) < 1e-5
    types = {tensor.name: tensor.tensor_type for tensor in GGUFReader(tmp_path / "b.gguf").tensors}
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == GGMLQuantizationType.F16
    assert (
        types["blk.0.attn_norm.weight"] == types["output_norm.weight"] == GGMLQuantizationType.F32
    )


def test_a_weight_that_overflows_in_16_bits_is_named(save, tmp_path):
    path = save()
    state = checkpoint_format.read(path)
    weights = {name: weight.clone() for name, weight in state["weights"].items()}
    weights["blocks.1.ffn.down.weight"][0, 0] = 1e5
    checkpoint_format.write(path, state | {"weights": weights})
    with pytest.raises(
        UserError,
        match=r"blk\.1\.ffn_down\.weight: has non-finite numbers in 16 bits. Export it as f32.",
    ):
        export_gguf(path, tmp_path / "out.gguf", floats="f16")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            {"sliding_window": 9},
            "model.sliding_window: 9 is not supported in a GGUF file that can be checked; a mistral "
            "has null there. Export with --format hf.",
        ),
        ({"moe": {"n_experts": 3}}, "model.moe: .*a mixtral has null there"),
        ({"bias": "all"}, 'model.bias: "all" .*a llama has "none" there'),
        (GPT2 | {"ffn": "silu"}, 'model.ffn: "silu" .*a gpt2 has "gelu" there'),
        ({"n_heads": 5, "head_dim": 8}, "model.d_model: 32 .*has 35"),
    ],
)
def test_a_setting_that_gguf_does_not_have_is_named(model, words, save, tmp_path):
    path = save(**model)
    with pytest.raises(UserError, match=words):
        export_gguf(path, tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer("ab", unknown="error")])
def test_gguf_supports_no_byte_or_character_tokenizer(tokenizer):
    with pytest.raises(
        UserError,
        match=f"tokenizer.kind: a tokenizer of kind {tokenizer.kind} is not supported in GGUF. Export with --format hf",
    ):
        vocabulary_of(tokenizer)


def test_gguf_supports_no_other_word_pattern_and_no_vocabulary_without_merges(bpe):
    plain = bpe("gpt4").to_plain()
    description = json.loads(plain["tokenizer_json"])
    description["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+"
    with pytest.raises(
        UserError,
        match="tokenizer: must be byte-level BPE with the words of GPT-2, GPT-4 or Qwen2 for GGUF",
    ):
        vocabulary_of(tokenizer_from_plain(plain | {"tokenizer_json": json.dumps(description)}))
    with pytest.raises(UserError, match="tokenizer: has no merges, but GGUF needs some"):
        vocabulary_of(
            HFTokenizer(
                Bpe((), Pretokenizer("gpt2", SPECIAL)).backend(), eos="<|endoftext|>", pad=None
            )
        )


def test_special_tokens_are_marked_in_gguf(bpe):
    found = vocabulary_of(bpe("gpt2"))
    assert isinstance(found, Vocabulary)
    assert (found.pre, found.tokens[-4:], found.types[-5:]) == (
        "gpt-2",
        list(SPECIAL),
        [1, 3, 3, 3, 3],
    )
    assert len(found.tokens) == bpe("gpt2").vocab_size


def test_neighbors_are_rotated_as_halves_were():
    """Llama in GGUF rotates rows 2i and 2i + 1 together; ours rotates i and i + K/2. Two heads of four: 0 1 2 3
    becomes 0 2 1 3 in each.
    """
    assert interleave_halves(torch.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
