"""Export to GGUF: transformers reads the file back to the same text, and what GGUF does not have is an error."""

import json
import logging
import math
import re

import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFReader

from tests.interchange.conftest import (
    GPT2,
    SPECIAL,
    TEXT,
    THEIR_SHAPE,
    quick,
    text_of_infer,
    text_of_transformers,
)
from tinylm.__main__ import main
from tinylm.checkpoint import format as checkpoint_format
from tinylm.checkpoint.load import load_model
from tinylm.common.errors import UserError
from tinylm.interchange import gguf, gguf_types
from tinylm.interchange.gguf import export_gguf, interleave_halves, read_gguf
from tinylm.interchange.gguf_tokenizer import Vocabulary, vocabulary_of
from tinylm.model.hf_model import HFModel
from tinylm.tokenizer.bpe_files import Bpe
from tinylm.tokenizer.byte_char import ByteTokenizer, CharTokenizer
from tinylm.tokenizer.factory import tokenizer_from_plain
from tinylm.tokenizer.hf import HFTokenizer
from tinylm.tokenizer.pretokenize import Pretokenizer

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
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == ["a.ckpt", "out.Modelfile", "out.gguf"]


@pytest.mark.slow
def test_the_word_pattern_of_gpt4_has_a_name_in_gguf(save, bpe, tmp_path):
    """It splits 12345 into 123 and 45; GPT-2's makes it one word."""
    export_gguf(save(bpe("gpt4")), tmp_path / "out.gguf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="out.gguf")
    assert theirs(TEXT)["input_ids"] == bpe("gpt4").encode(TEXT) != bpe("gpt2").encode(TEXT)


def test_the_word_pattern_of_qwen2_has_a_name_in_gguf(save, bpe):
    """llama.cpp's name for single digits, of which 12345 has five."""
    tokenizer = bpe("qwen2")
    assert vocabulary_of(tokenizer).pre == "qwen2"
    assert len(tokenizer.encode("12345")) == 5 > len(bpe("gpt4").encode("12345"))


def test_words_of_a_regular_expression_have_no_name_in_gguf(bpe):
    plain = bpe("gpt4").to_plain()
    own = plain["tokenizer_json"].replace("{1,3}", "{1,2}")
    with pytest.raises(UserError) as caught:
        vocabulary_of(tokenizer_from_plain(plain | {"tokenizer_json": own}))
    assert str(caught.value) == (
        "tokenizer: must be byte-level BPE with the words of GPT-2, GPT-4 or Qwen2 for GGUF. Export "
        "with --format hf."
    )


@pytest.mark.slow
def test_both_formats_can_be_written_into_one_folder(save, tmp_path, capsys):
    """The file has the name of the checkpoint, and transformers reads either."""
    path, out = save(), tmp_path / "out"
    assert main(["export", str(path), str(out), "--format", "hf"]) == 0
    assert main(["export", str(path), str(out), "--format", "gguf"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(out), str(out / "a.gguf")]
    assert main(["export", str(path), str(out), "--format", "gguf"]) == 2
    assert f"{out / 'a.gguf'}: already exists" in capsys.readouterr().err


@pytest.mark.slow
def test_f16_halves_the_matrices_and_nothing_else(save, tmp_path):
    """The logits equal those of our decoder with its matrices rounded to 16 bits, as the export checks; norms keep
    32.
    """
    path = save()
    exact, halved = (
        export_gguf(path, tmp_path / "a.gguf"),
        export_gguf(path, tmp_path / "b.gguf", dtype="f16"),
    )
    assert max(exact.difference, halved.difference) < 1e-5
    types = {tensor.name: tensor.tensor_type for tensor in GGUFReader(tmp_path / "b.gguf").tensors}
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == GGMLQuantizationType.F16
    assert (
        types["blk.0.attn_norm.weight"] == types["output_norm.weight"] == GGMLQuantizationType.F32
    )


@pytest.mark.slow
def test_a_mixture_of_experts_is_a_llama_with_experts(save, tmp_path):
    """As llama.cpp writes Mixtral: one tensor for all gates, one for all values, the router in f32."""
    written = export_gguf(save(moe={"n_experts": 3, "top_k": 2}), tmp_path / "a.gguf", dtype="f16")
    assert written.model_type == "llama"
    assert written.difference < 1e-5
    reader = GGUFReader(tmp_path / "a.gguf")
    assert [reader.get_field(f"llama.{key}").contents() for key in EXPERT_KEYS] == [3, 2, 48]
    shapes = {t.name: ([*t.shape.tolist()][::-1], t.tensor_type.name) for t in reader.tensors}
    assert shapes["blk.1.ffn_gate_inp.weight"] == ([3, 32], "F32")
    assert shapes["blk.1.ffn_gate_exps.weight"] == ([3, 48, 32], "F16")
    assert shapes["blk.1.ffn_up_exps.weight"] == ([3, 48, 32], "F16")
    assert shapes["blk.1.ffn_down_exps.weight"] == ([3, 32, 48], "F16")


EXPERT_KEYS = ("expert_count", "expert_used_count", "feed_forward_length")


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"full_attention_interval": 2}], ids=["all", "some"])
def test_a_window_becomes_the_context_of_the_file(more, save, tmp_path, caplog):
    """GGUF's Llama has no window; up to its length, a window changes nothing, in all layers or in some."""
    caplog.set_level(logging.INFO, "tinylm")
    assert export_gguf(save(sliding_window=9, **more), tmp_path / "a.gguf").model_type == "llama"
    assert GGUFReader(tmp_path / "a.gguf").get_field("llama.context_length").contents() == 9
    assert caplog.messages == [
        "note: GGUF has no sliding window, so the file's context is the window, 9 of 64 tokens"
    ]


YARN = {"type": "yarn", "factor": 8.0, "original_max_seq_len": 8}


@pytest.mark.parametrize("own", [{}, {"attention_factor": 1.5}], ids=str)
def test_a_context_scaled_by_yarn_has_the_keys_that_llama_cpp_reads(own, save, tmp_path):
    """llama.cpp multiplies by 0.1 ln(factor) + 1 itself, and then by the factor in the file."""
    export_gguf(save(rope_scaling=YARN | own), tmp_path / "a.gguf")
    fields = GGUFReader(tmp_path / "a.gguf").fields
    found = {
        key.removeprefix("llama.rope.scaling."): field.contents()
        for key, field in fields.items()
        if ".rope.scaling." in key
    }
    times = found.pop("attn_factor", 1.0) * (0.1 * math.log(8) + 1)
    assert times == pytest.approx(own.get("attention_factor", 0.1 * math.log(8) + 1))
    assert found == {"type": "yarn", "factor": 8.0, "original_context_length": 8}


@pytest.mark.slow
def test_a_linear_context_is_a_setting_and_that_of_llama_3_a_tensor(save, tmp_path):
    """llama.cpp divides the frequency of each pair by the number in the tensor: here the first of four is kept, the
    last divided by the whole factor. The context of the file is the longer one.
    """
    export_gguf(save(rope_scaling={"type": "linear", "factor": 4.0}), tmp_path / "a.gguf")
    reader = GGUFReader(tmp_path / "a.gguf")
    keys = ("rope.scaling.type", "rope.scaling.factor", "context_length")
    assert [reader.get_field(f"llama.{key}").contents() for key in keys] == ["linear", 4.0, 64]
    scaling = YARN | {"type": "llama3", "low_freq_factor": 0.002, "high_freq_factor": 1.2}
    export_gguf(save(rope_scaling=scaling), tmp_path / "b.gguf")
    [divisors] = [
        tensor.data
        for tensor in GGUFReader(tmp_path / "b.gguf").tensors
        if "rope_freqs" in tensor.name
    ]
    assert divisors[0] == 1 < divisors[1] < divisors[2] < divisors[3] == 8


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "mxfp4"])
def test_matrices_are_rounded_to_the_number_type_and_nothing_else(dtype, save, tmp_path):
    """transformers reads what our decoder computes with its matrices rounded alike, as the export checks. The output
    matrix, here the embedding too, keeps 8 bits.
    """
    path = save(d_ff=64)
    assert export_gguf(path, tmp_path / "a.gguf", dtype=dtype).difference < 1e-5
    tensors = GGUFReader(tmp_path / "a.gguf").tensors
    types = {tensor.name: tensor.tensor_type.name for tensor in tensors}
    norms = {name for name in types if "norm" in name}
    assert {types.pop(name) for name in norms} == {"F32"}
    assert types.pop("token_embd.weight") == (
        dtype.upper() if dtype in ("bf16", "q8_0") else "Q8_0"
    )
    assert set(types.values()) == {dtype.upper()}


@pytest.mark.slow
def test_a_file_is_read_back_as_the_decoder(save, tmp_path):
    """An f32 file holds exactly the weights, whatever their layout in it."""
    for shape in ({"n_kv_heads": 2}, GPT2, {"moe": {"n_experts": 3}, "vocab_size": 384}):
        path = save(**shape)
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf"
        export_gguf(path, file)
        expected = load_model(path).model
        found = read_gguf(file, expected.config)
        ids = torch.arange(9)[None]
        assert torch.equal(found(ids), expected(ids)[..., :300])


def bits_per_byte(decoder, tokenizer, lines):
    """By hand: each line after EOS, its loss in bits over its bytes."""
    bits = 0.0
    for line in lines:
        ids = torch.tensor([[tokenizer.eos_id, *tokenizer.encode(line)]])
        with torch.no_grad():
            logits = decoder(ids[:, :-1])[0]
        bits += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    return bits / math.log(2) / sum(len(line.encode()) for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["--text", "validation", "own"])
def test_the_cost_of_rounding_is_measured(source, save, bpe, tmp_path, caplog):
    """On the text of --text, else on the validation documents of the run, here all of a file, else, if the file is
    gone, on text of the model, which has about 8 bits per byte as it is random.
    """
    caplog.set_level(logging.INFO, "tinylm")
    lines = ["the next token", "guesses 12345 words"]
    text, out = tmp_path / "held.txt", tmp_path / "a.gguf"
    text.write_text("\n".join(lines), encoding="utf-8")
    data = {"dataset": "gone.txt", "val_dataset": str(text if source == "validation" else "gone")}
    path = save(d_ff=64, config={"data": data})
    given = ["--text", str(text)] if source == "--text" else []
    command = ["export", str(path), str(out), "--format", "gguf", "--dtype", "q4_0"]
    assert main([*command, *given]) == 0
    name = {"--text": str(text), "validation": r"its validation text \(gone.txt\)"}
    [found] = [
        found
        for message in caplog.messages
        if (
            found := re.fullmatch(
                rf"q4_0: [0-9.]+ kB, bits per byte of {name.get(source, 'its own text')} "
                r"(\S+) -> (\S+) \(([+-]\S+)\)",
                message,
            )
        )
    ]
    before, after, rise = map(float, found.groups())
    assert rise == pytest.approx(after - before, abs=2e-4)
    if source == "own":
        assert 2 < before < 20
        return
    exact = load_model(path).model
    rounded = read_gguf(out, exact.config)
    assert before == pytest.approx(bits_per_byte(exact, bpe("gpt2"), lines), abs=1e-4)
    assert after == pytest.approx(bits_per_byte(rounded, bpe("gpt2"), lines), abs=1e-4)
    assert before != after


def test_a_text_is_only_valid_with_rounded_weights(save, tmp_path, capsys):
    command = ["export", str(save()), str(tmp_path / "a.gguf"), "--format", "gguf"]
    assert main([*command, "--text", "README.md"]) == 2
    assert capsys.readouterr().err == (
        "error: --text: only valid for a GGUF file with rounded weights. "
        "Remove it, or give for example --format gguf --dtype q8_0.\n"
    )
    blank = tmp_path / "blank.txt"
    blank.write_text("\n\n")
    for text, problem in (
        (tmp_path / "none.txt", "not found"),
        (blank, "no documents, only blank"),
    ):
        assert main([*command, "--dtype", "f16", "--text", str(text)]) == 2
        assert f"error: --text: {text}: {problem}" in capsys.readouterr().err
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize(
    ("dtype", "shape", "words"),
    [
        (
            "q4_0",
            {"d_ff": 48},
            "q4_0 rounds 32 numbers of a row together, but the rows of blk.0.ffn_down.weight have 48. "
            "Export with --dtype f16.",
        ),
        (
            "q4_k",
            {"d_ff": 64},
            "q4_k rounds 256 numbers of a row together, but the rows of token_embd.weight have 32. "
            "Export with --dtype q8_0 or f16.",
        ),
    ],
)
def test_rows_that_no_block_fits_are_named(dtype, shape, words, save, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_types, "require_llama_cpp", lambda type: None)
    monkeypatch.setattr(gguf, "require_llama_cpp", lambda type: None)
    path = save(**shape)
    with pytest.raises(UserError) as caught:
        export_gguf(path, tmp_path / "a.gguf", dtype=dtype)
    assert str(caught.value) == f"{path}: {words}"
    assert list(tmp_path.iterdir()) == [path]


def test_k_types_need_llama_cpp(save, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_types.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        gguf_types.require_llama_cpp(gguf_types.NUMBER_TYPES["q4_k_m"])
    assert str(caught.value) == (
        "--dtype: q4_k_m: only llama.cpp rounds to it, and llama-cpp-python is not installed. "
        "pip install llama-cpp-python, or export with --dtype q8_0."
    )


def test_an_unknown_number_type_is_an_error(save, tmp_path, capsys):
    out = str(tmp_path / "a.gguf")
    assert main(["export", str(save()), out, "--format", "gguf", "--dtype", "q7_0"]) == 2
    assert "error: --dtype: must be one of f32, f16, bf16, q8_0, " in capsys.readouterr().err


def test_a_weight_that_overflows_in_16_bits_is_named(save, tmp_path):
    path = save()
    state = checkpoint_format.read(path)
    weights = {name: weight.clone() for name, weight in state["weights"].items()}
    weights["blocks.1.ffn.down.weight"][0, 0] = 1e5
    checkpoint_format.write(path, state | {"weights": weights})
    with pytest.raises(
        UserError,
        match=r"a\.ckpt: blk\.1\.ffn_down\.weight: has non-finite numbers as f16. "
        "Export with --dtype f32.",
    ):
        export_gguf(path, tmp_path / "out.gguf", dtype="f16")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            {"bias": "all"},
            r'a\.ckpt: model.bias: "all" is not supported in a GGUF file that can be checked; a llama has "none" '
            "there. Export with --format hf.",
        ),
        (
            {"position": "alibi"},
            r'a\.ckpt: model.position: "alibi" is not supported by any Hugging',
        ),
        (GPT2 | {"ffn": "silu"}, 'model.ffn: "silu" .*a gpt2 has "gelu" there'),
        ({"n_heads": 5, "head_dim": 8}, "model.d_model: 32 .*has 35"),
        (
            {"no_rope_interval": 2},
            "model: a smollm3 model is not supported in GGUF here. Export with --format hf; llama.cpp",
        ),
        (
            {
                **{"norm_placement": "sandwich", "qk_norm": True, "ffn": "geglu"},
                **{"scale_embeddings": True, "sliding_window": 8, "full_attention_interval": 2},
                **{"rope_local_theta": 300.0},
            },
            "model: a gemma3_text model is not supported in GGUF here",
        ),
        (
            {"norm_placement": "output", "qk_norm": "all_heads"},
            "model: a olmo2 model is not supported in GGUF here. Export with --format hf; llama.cpp",
        ),
        (
            {"rope_scaling": YARN | {"type": "dynamic"}},
            "model.rope_scaling: type dynamic is not supported in the GGUF file of a llama. Export",
        ),
        (
            {"rope_scaling": YARN | {"type": "llama3"}, "bias": "qkv"},
            "model.rope_scaling: type llama3 is not supported in the GGUF file of a qwen2",
        ),
        (
            {"rope_scaling": YARN | {"beta_fast": 16.0}},
            r"model.rope_scaling.beta_fast: must be 32.0 in a GGUF file \(llama.cpp reads no other\), got 16.0",
        ),
    ],
)
def test_a_setting_that_gguf_does_not_have_is_named(model, words, save, tmp_path):
    path = save(**model)
    with pytest.raises(UserError, match=words):
        export_gguf(path, tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == [path]


def tuned(path, inner):
    """The checkpoint at `path` as finetune.py writes it from a model of transformers."""
    hf_model = HFModel(inner)
    state = checkpoint_format.read(path)
    weights = {"hf_config": hf_model.settings, "weights": hf_model.state_dict()}
    checkpoint_format.write(path, state | weights)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "found"),
    [
        (
            transformers.GPTNeoConfig(
                vocab_size=300,
                hidden_size=32,
                num_layers=2,
                num_heads=4,
                attention_types=[[["global", "local"], 1]],
            ),
            "a gpt_neo model is not supported in GGUF here (model_type: must be one of gemma, gemma3_text, gpt2, "
            "llama, ministral, mistral, mixtral, olmo2, olmo3, phi3, qwen2, qwen3, qwen3_moe, smollm3, got gpt_neo)",
        ),
        (
            transformers.LlamaConfig(
                **THEIR_SHAPE, rope_parameters={"rope_type": "proportional", "factor": 2.0}
            ),
            "a llama model is not supported in GGUF here (rope_parameters.rope_type: must be one of default, linear, "
            'dynamic, yarn, llama3, got "proportional")',
        ),
    ],
)
def test_an_unsupported_tuned_model_is_named_by_its_checkpoint(config, found, save, tmp_path):
    """Its config.json is not a file of who tuned it."""
    path = save()
    tuned(path, transformers.AutoModelForCausalLM.from_config(config))
    with pytest.raises(UserError) as caught:
        export_gguf(path, tmp_path / "out.gguf")
    assert str(caught.value) == (
        f"{path}: its model: {found}. Export with --format hf; llama.cpp's convert_hf_to_gguf.py reads the folder."
    )
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


def test_llama_3_makes_a_known_word_one_token_before_any_merge(bpe):
    """llama.cpp has a name for that with the words of GPT-4, and none with those of GPT-2."""
    for pattern, pre in (("gpt4", "llama-bpe"), ("gpt2", None)):
        plain = bpe(pattern).to_plain()
        description = json.loads(plain["tokenizer_json"])
        description["model"]["ignore_merges"] = True
        made = tokenizer_from_plain(plain | {"tokenizer_json": json.dumps(description)})
        if pre is None:
            with pytest.raises(UserError, match="tokenizer: must be byte-level BPE"):
                vocabulary_of(made)
        else:
            assert vocabulary_of(made).pre == pre


def test_neighbors_are_rotated_as_halves_were():
    """Llama in GGUF rotates rows 2i and 2i + 1 together; ours rotates i and i + K/2. Two heads of four: 0 1 2 3
    becomes 0 2 1 3 in each.
    """
    assert interleave_halves(torch.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
