"""Export of checkpoints to transformers and GGUF, import of Hugging Face folders: the same text, no file trusted (FAULTS: E14, H2, H3, H6).

The oracle is transformers, which reads what is written here. Weights are random and large (std 0.3), so that every token,
matrix and setting matters; what a folder from a stranger may hold is written by hand.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import infer
from tinylm.__main__ import main
from tinylm.checkpoint import format as checkpoint_format
from tinylm.checkpoint import info as checkpoint_info
from tinylm.checkpoint import initial as checkpoint_initial
from tinylm.checkpoint import load as checkpoint_load
from tinylm.common.errors import UserError, require_package
from tinylm.config.loader import load_config
from tinylm.config.schema import Config, LoraConfig
from tinylm.interchange import conversion, hf_import
from tinylm.interchange.gguf import Vocabulary, export_gguf, interleave_halves, vocabulary_of
from tinylm.interchange.hf_export import export_hf, sampling_settings
from tinylm.interchange.hf_import import import_hf
from tinylm.interchange.hf_tokenizer import CHAT_TEMPLATES, backend_of
from tinylm.model import hf_files
from tinylm.model.decoder import Decoder
from tinylm.model.hf_model import HFModel
from tinylm.model.lora import target_layers
from tinylm.rows.conversation import Turn
from tinylm.rows.template_factory import make_template
from tinylm.text.chunks import text_chunks
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokenizer.bpe_fast import learn_bpe
from tinylm.tokenizer.bpe_files import Bpe
from tinylm.tokenizer.byte_char import ByteTokenizer, CharTokenizer
from tinylm.tokenizer.factory import tokenizer_from_plain
from tinylm.tokenizer.hf import HFTokenizer
from tinylm.tokenizer.hf_files import load_hf_tokenizer
from tinylm.tokenizer.pretokenize import Pretokenizer
from training.context import ResumeOptions, RunContext
from training.initial import find_initial_model
from training.resume import find_resume_state

TEXT = "the model reads a token and guesses the next token; it isn't 12345 words, nor naïve 東京 🙂 text, the the the model's guesses\n"
GPT2 = {"position": "learned", "norm": "layernorm", "ffn": "gelu", "bias": "all"}
SPECIAL = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], HFTokenizer]:
    """A byte-level BPE tokenizer learned from one sentence and a number, with GPT-2's or GPT-4's words."""
    folder, made = tmp_path_factory.mktemp("tokenizers"), {}
    for pattern in ("gpt2", "gpt4"):
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
    """The text that transformers generates greedily after the prompt, with the exported tokenizer and generation settings."""
    file = {"gguf_file": gguf["gguf_file"]} if gguf else {}
    tokenizer = getattr(transformers, tokenizer_class).from_pretrained(folder, **file)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **gguf)
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    ids = model.generate(prompt, do_sample=False, max_new_tokens=40)[0, prompt.size(1) :].tolist()
    return tokenizer.decode(ids, skip_special_tokens=True), ids


# --- folders for transformers ---

EXPRESSIBLE = {
    "llama": {"n_kv_heads": 2},
    "llama, untied": {"tie_embeddings": False, "rope_theta": 500.0},
    "llama, more rows than tokens": {"vocab_size": 384},
    "mistral": {"sliding_window": 9},
    "qwen2": {"bias": "qkv", "n_kv_heads": 1},
    "qwen3": {"qk_norm": True, "head_dim": 10},
    "mixtral": {"moe": {"n_experts": 3}},
    "gpt2": GPT2 | {"tie_embeddings": False},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", quick(EXPRESSIBLE, "llama", "llama, more rows than tokens", "qwen2", "gpt2")
)
def test_an_exported_folder_generates_the_text_of_infer(name, save, tmp_path, capsys):
    """The same ids too, to the end; rows of the embedding without a token are never sampled."""
    path = save(**EXPRESSIBLE[name])
    written = export_hf(path, tmp_path / "out")
    assert (written.path, written.model_type) == (tmp_path / "out", name.partition(",")[0])
    assert written.tokenizer_class == (
        "PreTrainedTokenizerFast" if name == "qwen2" else "AutoTokenizer"
    )
    assert text_of_transformers(tmp_path / "out", written.tokenizer_class) == text_of_infer(
        path, capsys
    )


def test_the_card_of_a_qwen2_names_the_class_that_reads_its_tokenizer(save, bpe, tmp_path):
    """transformers 5 splits text for every Qwen2 into Qwen2's words, in which each digit is one word; our 12345 is one token."""
    export_hf(save(bias="qkv"), tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT)["input_ids"] != bpe(
        "gpt2"
    ).encode(TEXT)
    assert transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")(TEXT)[
        "input_ids"
    ] == bpe("gpt2").encode(TEXT)
    assert "tokenizer = PreTrainedTokenizerFast.from_pretrained" in (
        tmp_path / "out" / "README.md"
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "tokenizer",
    [
        ByteTokenizer(),
        CharTokenizer(TEXT, unknown="error"),
        CharTokenizer(TEXT[:60], unknown="unk"),
    ],
)
def test_a_byte_or_character_model_generates_the_same_text_in_transformers(
    tokenizer, save, tmp_path, capsys
):
    path = save(tokenizer)
    export_hf(path, tmp_path / "out")
    assert text_of_transformers(tmp_path / "out") == text_of_infer(path, capsys)


def test_the_folder_describes_the_model(save, tmp_path):
    """Only the tokenizer's own tokens end or pad a text; older readers find rope_theta and a class that they know."""
    data = {"dataset": "owner/texts", "template": "plain"}
    path = save(
        stage="sft",
        config={"sampling": {"temperature": 0.5, "top_p": 0.9}, "data": data},
        rope_theta=777.0,
    )
    export_hf(path, tmp_path / "out")
    files = {
        file.name: file.read_text(encoding="utf-8")
        for file in (tmp_path / "out").iterdir()
        if file.suffix != ".safetensors"
    }
    assert sorted(files) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config, generation = (
        json.loads(files["config.json"]),
        json.loads(files["generation_config.json"]),
    )
    tokenizer = checkpoint_load.load_model(path).tokenizer
    assert (config["eos_token_id"], config["pad_token_id"], config["rope_theta"]) == (
        tokenizer.eos_id,
        tokenizer.pad_id,
        777.0,
    )
    assert {key: generation[key] for key in ("eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p", "max_new_tokens")} == {
        "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id, "do_sample": True, "temperature": 0.5, "top_k": 0, "top_p": 0.9,
        "max_new_tokens": 200,
    }  # fmt: skip
    assert (
        json.loads(files["tokenizer_config.json"])["tokenizer_class"] == "PreTrainedTokenizerFast"
    )
    for part in (
        "llama: 2 layers",
        "| data | owner/texts |",
        "sft, 5 optimizer steps, 640 tokens",
        "2.2500 nats",
        "apply_chat_template",
    ):
        assert part in files["README.md"]


@pytest.mark.slow
def test_the_example_in_the_model_card_runs(save, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for stage, folder in (("pretrain", "base"), ("sft", "tuned")):
        export_hf(save(stage=stage), tmp_path / folder)
        monkeypatch.chdir(tmp_path / folder)
        code = (
            Path("README.md")
            .read_text(encoding="utf-8")
            .partition("```python\n")[2]
            .partition("```")[0]
        )
        capsys.readouterr()
        exec(compile(code, "README.md", "exec"), {})  # noqa: S102
        assert capsys.readouterr().out.strip()


def test_the_model_card_has_no_path_of_this_machine(save, tmp_path):
    export_hf(
        save(config={"data": {"dataset": str(tmp_path / "mine.txt")}}, stage="pretrain"),
        tmp_path / "out",
    )
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| data | mine.txt |" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"temperature": 0.0}, {"do_sample": False}),
        ({"n_beams": 3}, {"do_sample": False, "num_beams": 3}),
        ({"top_k": 7, "min_p": 0.1}, {"do_sample": True, "top_k": 7, "min_p": 0.1, "top_p": 1.0}),
        (
            {"repetition_penalty": 1.5, "no_repeat_ngram": 2},
            {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        ),
    ],
)
def test_sampling_settings_are_translated_to_transformers(sampling, expected):
    """transformers refuses to save a temperature without sampling, so these settings exist only if they are used."""
    found = sampling_settings(Config.model_validate({"sampling": sampling}).sampling)
    assert expected.items() <= found.items()
    assert found["do_sample"] or "temperature" not in found


def test_without_a_padding_token_no_padding_id_is_exported(save, bpe, tmp_path):
    """transformers keeps the gradient of row `pad_token_id` at zero: an EOS that also pads would never be trained again."""
    plain = bpe("gpt2").to_plain() | {"pad": None}
    export_hf(save(tokenizer_from_plain(plain)), tmp_path / "out")
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["pad_token_id"]
        is None
    )


def test_a_token_that_a_tokenizer_adds_to_texts_is_not_added_in_the_export(save, bpe, tmp_path):
    """The model was not trained with such a token; the export must encode a prompt as infer.py does."""
    plain = bpe("gpt2").to_plain()
    description = json.loads(plain["tokenizer_json"])
    bos = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    description["post_processor"] = {
        "type": "TemplateProcessing", "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [bpe("gpt2").vocab_size - 2], "tokens": ["<|im_start|>"]}},
    }  # fmt: skip
    opening = tokenizer_from_plain(plain | {"tokenizer_json": json.dumps(description)})
    export_hf(save(opening), tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT)[
        "input_ids"
    ] == opening.encode(TEXT)


@settings(deadline=None, max_examples=50)
@given(st.text())
def test_bytes_have_the_same_ids_and_text_in_tokenizers(text):
    tokenizer = ByteTokenizer()
    backend = backend_of(tokenizer)
    ids = (
        backend.encode(text).ids
        if not any(name in text for name in tokenizer.special_names.values())
        else tokenizer.encode(text)
    )
    assert ids == tokenizer.encode(text)
    assert backend.decode(ids) == text


@settings(deadline=None, max_examples=50)
@given(st.text(alphabet="ab\r\n \u0301é🙂\0xyz"))
def test_characters_have_the_same_ids_and_text_in_tokenizers(text):
    """A combining accent is a character by itself, and so are \\r and \\n; an unknown character is <|unk|>."""
    tokenizer = CharTokenizer("ab\r\n \u0301é🙂\0", unknown="unk")
    backend = backend_of(tokenizer)
    assert backend.encode(text).ids == tokenizer.encode(text)
    assert backend.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_an_unsupported_setting_is_an_error_and_nothing_is_written(save, tmp_path):
    path = save(position="alibi")
    for write in (export_hf, export_gguf):
        with pytest.raises(
            UserError,
            match='model.position: "alibi" is not supported by any Hugging Face architecture',
        ):
            write(path, tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == [path]


def test_an_existing_output_is_an_error_before_any_work(tmp_path):
    for work, name in ((export_hf, "out"), (export_gguf, "out.gguf"), (import_hf, "out.ckpt")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
        with pytest.raises(UserError, match=f"{name}: already exists. Delete it"):
            work(tmp_path / "none", tmp_path / name)


def test_weights_that_are_exported_wrongly_are_found(save, tmp_path, monkeypatch):
    """One wrong number in one matrix is enough; the files are removed."""
    path, write = save(), conversion.to_hf

    def swapped(model: Decoder) -> Any:
        made = write(model)
        with torch.no_grad():
            made.model.layers[1].self_attn.k_proj.weight[3, 3] += 0.5
        return made

    monkeypatch.setattr(conversion, "to_hf", swapped)
    for export in (export_hf, export_gguf):
        with pytest.raises(
            UserError,
            match=r"export: the exported model's logits differ by 0\.\d+, so it was removed",
        ):
            export(path, tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == [path]


def test_a_tokenizer_that_transformers_reads_differently_is_an_error(save, tmp_path, monkeypatch):
    path = save()
    other = backend_of(ByteTokenizer())
    monkeypatch.setattr("tinylm.interchange.hf_export.backend_of", lambda tokenizer: other)
    with pytest.raises(
        UserError,
        match=r"tokenizer: transformers encodes a sample text to other ids \(token \d of \d+\); nothing was exported",
    ):
        export_hf(path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_an_error(save, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*args: Any, **more: Any) -> None:
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    path = save()
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
    with pytest.raises(
        UserError,
        match="out: the weights could not be written: .*No space left on device .*Free some space",
    ):
        export_hf(path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_package_is_named():
    with pytest.raises(
        UserError, match="ggufff: this package is needed and is not installed. pip install ggufff."
    ):
        require_package("ggufff")


# --- chat templates ---

CONVERSATIONS = [
    [("user", "Name three colours.", "")],
    [("user", "Translate.", "Guten Tag\nWelt")],
    [("system", "Be brief.", ""), ("user", "Why is 2 + 2 four?", "")],
    [
        ("user", "First.", ""),
        ("assistant", "One.", ""),
        ("user", "Second?", "x"),
        ("assistant", "Two\nlines.", ""),
        ("user", "Third", ""),
    ],
    [
        ("system", "S", ""),
        ("user", "Ends in space ", ""),
        ("assistant", "yes", ""),
        ("user", "q", ""),
    ],
]


@pytest.mark.slow
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_the_chat_template_renders_prompts_as_in_training(name, conversation, save, tmp_path):
    """`prompt_ids` is the definition; transformers renders our Jinja and encodes the text."""
    path = save(stage="sft", config={"data": {"template": name}})
    ours = checkpoint_load.load_model(path).tokenizer
    export_hf(path, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [
        {"role": role, "content": text} | ({"input": input} if input else {})
        for role, text, input in conversation
    ]
    found = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    template = make_template(name, ours)
    assert found == template.prompt_ids(tuple(Turn(*turn) for turn in conversation), ours)
    generation = json.loads(
        (tmp_path / "out" / "generation_config.json").read_text(encoding="utf-8")
    )
    ends = generation["eos_token_id"]
    assert tuple(ends if isinstance(ends, list) else [ends]) == template.stop_ids(ours)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_bos_token_is_written_once_in_a_conversation(name, save, tmp_path):
    pretokenizer = Pretokenizer("gpt2", (*SPECIAL, "<s>"))
    opening = HFTokenizer(
        learn_bpe(text_chunks([TEXT]), 300, pretokenizer).backend(),
        eos="<|endoftext|>",
        pad=None,
    )
    export_hf(save(opening, stage="sft", config={"data": {"template": name}}), tmp_path / "out")
    turns = (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    found = theirs.apply_chat_template(
        [{"role": turn.role, "content": turn.text} for turn in turns], add_generation_prompt=True
    )["input_ids"]
    assert found == make_template(name, opening).prompt_ids(turns, opening)
    assert found.count(opening.vocab_size - 1) == 1


def test_answers_of_a_byte_model_end_with_the_separator(save, tmp_path):
    path, ours = (
        save(ByteTokenizer(), stage="sft", config={"data": {"template": "instruction"}}),
        ByteTokenizer(),
    )
    export_hf(path, tmp_path / "out")
    generation = json.loads(
        (tmp_path / "out" / "generation_config.json").read_text(encoding="utf-8")
    )
    assert (
        generation["eos_token_id"]
        == [ours.sep_id, ours.eos_id]
        == list(make_template("instruction", ours).stop_ids(ours))
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    turns = (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"))
    found = theirs.apply_chat_template(
        [{"role": turn.role, "content": turn.text} for turn in turns], add_generation_prompt=True
    )["input_ids"]
    assert found == make_template("instruction", ours).prompt_ids(turns, ours)


OWN = """{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"""
OWN += """{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def test_a_base_model_has_no_template_and_a_tokenizers_own_is_kept(save, bpe, tmp_path):
    """A model tuned with the tokenizer's own template ends its answers as that does; a base model ends with EOS."""
    export_hf(save(), tmp_path / "base")
    assert not (tmp_path / "base" / "chat_template.jinja").exists()
    own = tokenizer_from_plain(bpe("gpt2").to_plain() | {"chat_template": OWN})
    for stage, data, ends in (
        ("pretrain", {}, own.eos_id),
        ("sft", {"template": "chat_template"}, [own.vocab_size - 1, own.eos_id]),
    ):
        export_hf(save(own, stage=stage, config={"data": data}), tmp_path / stage)
        assert (tmp_path / stage / "chat_template.jinja").read_text(encoding="utf-8") == OWN
        assert (
            json.loads((tmp_path / stage / "generation_config.json").read_text(encoding="utf-8"))[
                "eos_token_id"
            ]
            == ends
        )


# --- other checkpoints ---


def test_a_tuned_hugging_face_model_is_exported_as_it_is_and_as_gguf(save, tmp_path, capsys):
    """Such a checkpoint has a model of transformers (HFModel), here a Llama; for GGUF it is converted to our decoder first."""
    path = save()
    payload = checkpoint_format.read(path)
    inner = conversion.to_hf(checkpoint_load.load_model(path).model)
    foreign = HFModel(inner)
    checkpoint_format.write(
        path, payload | {"hf_config": foreign.settings, "weights": foreign.state_dict()}
    )
    expected = text_of_infer(path, capsys)
    assert export_hf(path, tmp_path / "out").model_type == "llama"
    assert text_of_transformers(tmp_path / "out") == expected
    export_gguf(path, tmp_path / "out.gguf")
    assert text_of_transformers(tmp_path, gguf_file="out.gguf") == expected


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
    """The logits equal those of our decoder with its matrices rounded to 16 bits, as the export checks; norms keep 32."""
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
    payload = checkpoint_format.read(path)
    weights = {name: weight.clone() for name, weight in payload["weights"].items()}
    weights["blocks.1.ffn.down.weight"][0, 0] = 1e5
    checkpoint_format.write(path, payload | {"weights": weights})
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
            "model.sliding_window: 9 is not supported in a GGUF file that can be checked; a mistral has null there. Export with --format hf.",
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
    """Llama in GGUF rotates rows 2i and 2i + 1 together; ours rotates i and i + K/2. Two heads of four: 0 1 2 3 becomes 0 2 1 3 in each."""
    assert interleave_halves(torch.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


# --- import of Hugging Face folders ---

THEIR_SHAPE = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
THEIRS = {
    "llama": lambda: transformers.LlamaConfig(**THEIR_SHAPE),
    "llama, tied": lambda: transformers.LlamaConfig(
        **THEIR_SHAPE, tie_word_embeddings=True, rope_theta=500.0
    ),
    "mistral": lambda: transformers.MistralConfig(**THEIR_SHAPE, sliding_window=9),
    "qwen2": lambda: transformers.Qwen2Config(**THEIR_SHAPE),
    "qwen3": lambda: transformers.Qwen3Config(**THEIR_SHAPE, head_dim=12),
    "mixtral": lambda: transformers.MixtralConfig(**THEIR_SHAPE, num_local_experts=3),
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


@pytest.mark.parametrize("name", quick(THEIRS, "llama, tied", "mixtral", "gpt2"))
def test_an_imported_model_generates_the_text_of_transformers(name, published, tmp_path, capsys):
    folder = published(name)
    imported = import_hf(str(folder), tmp_path / "in.ckpt")
    assert (imported.model_type, imported.stored_as) == (name.partition(",")[0], "F32")
    (folder / "generation_config.json").unlink()  # random tokens end no text there
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    eos = checkpoint_load.load_model(tmp_path / "in.ckpt").tokenizer.eos_id
    (folder / "config.json").write_text(
        json.dumps(config | {"eos_token_id": eos, "pad_token_id": None}), encoding="utf-8"
    )
    assert text_of_infer(tmp_path / "in.ckpt", capsys) == text_of_transformers(folder)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_sharded_model_is_imported(name, published, tmp_path):
    whole = checkpoint_load.load_model(
        import_hf(str(published(name)), tmp_path / "whole.ckpt").path
    )
    for file in (tmp_path / "published").iterdir():
        file.unlink()
    folder = published(name, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    parts = checkpoint_load.load_model(import_hf(str(folder), tmp_path / "parts.ckpt").path)
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True)
    )


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_half_weights_become_fp32_with_the_same_values(dtype, name, published, tmp_path):
    folder = published(dtype=dtype)
    imported = import_hf(str(folder), tmp_path / "in.ckpt")
    assert imported.stored_as == name
    weight = checkpoint_load.load_model(tmp_path / "in.ckpt").model.embedding.weight
    assert weight.dtype == torch.float32
    assert torch.equal(
        weight, load_file(folder / "model.safetensors")["model.embed_tokens.weight"].float()
    )


def test_older_files_are_read(published, tmp_path):
    """GPT-2 on the hub has names without `transformer.` and its causal masks; a tied model may also have its head."""
    folder = published("gpt2")
    weights = {
        name.removeprefix("transformer."): weight
        for name, weight in load_file(folder / "model.safetensors").items()
    }
    weights |= {
        "h.0.attn.bias": torch.ones(1, 1, 64, 64),
        "h.1.attn.masked_bias": torch.tensor(-1e4),
        "lm_head.weight": weights["wte.weight"].clone(),
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert import_hf(str(folder), tmp_path / "in.ckpt").difference < 1e-5


def test_an_imported_checkpoint_is_described_and_the_next_command_is_printed(
    published, tmp_path, capsys
):
    folder = published()
    assert main(["import", str(folder), str(tmp_path / "in.ckpt")]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'in.ckpt'}\n"
    assert "llama, F32, stored as fp32: its logits differ from transformers' by " in err
    assert (
        f"to train it further: training.init_from={tmp_path / 'in.ckpt'}, in train.py or finetune.py\n"
        in err
    )
    assert err.endswith(f'next: python infer.py --ckpt {tmp_path / "in.ckpt"} --prompt "Once"\n')
    info = checkpoint_info.describe(tmp_path / "in.ckpt")
    assert (info.stage, info.step, info.tokens, info.train_loss, info.val_loss) == (
        "pretrain",
        0,
        0,
        None,
        None,
    )


def test_a_run_starts_from_an_imported_checkpoint_and_does_not_resume_it(
    published, make_config, tmp_path
):
    folder = published()
    import_hf(str(folder), tmp_path / "in.ckpt")
    context = RunContext("pretrain", load_config(make_config()), "cpu")
    with pytest.raises(
        UserError,
        match="in.ckpt: an imported model, which has no optimizer state to resume. Choose another training.checkpoint_dir, and start from its weights: training.init_from=",
    ):
        find_resume_state(context, ResumeOptions(tmp_path / "in.ckpt"))

    config = load_config(
        make_config(), [f"training.init_from={tmp_path / 'in.ckpt'}", f"tokenizer.path={folder}"]
    )
    base = find_initial_model(config, None)
    model = base.build(base.model)
    assert torch.equal(
        model.embedding.weight,
        checkpoint_format.read(tmp_path / "in.ckpt")["weights"]["embedding.weight"],
    )


def test_an_exported_import_equals_the_published_model(published, tmp_path):
    """After import and export every tensor has the same bits."""
    folder = published("qwen3")
    import_hf(str(folder), tmp_path / "in.ckpt")
    export_hf(tmp_path / "in.ckpt", tmp_path / "out")
    before, after = (
        load_file(folder / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "weights imported from published" in (tmp_path / "out" / "README.md").read_text(
        encoding="utf-8"
    )


# --- untrusted folders ---


def edit(file: Path, **values: Any) -> None:
    """Change keys of a JSON file."""
    file.write_text(
        json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8"
    )


def reweight(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors, by name with `__` for a dot; None removes one."""
    weights = load_file(folder / "model.safetensors") | {
        name.replace("__", "."): tensor for name, tensor in tensors.items()
    }
    save_file(
        {name: weight for name, weight in weights.items() if weight is not None},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def with_header(folder: Path, header: Any, data: bytes = b"") -> None:
    """Write a safetensors file with this header."""
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


Q = "model__layers__0__self_attn__q_proj__weight"
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (
        lambda f: reweight(f, **{Q: None}),
        r"published: model\.layers\.0\.self_attn\.q_proj\.weight: missing tensor",
    ),
    "extra": (
        lambda f: reweight(f, x=torch.ones(1), y=torch.ones(1)),
        r"model\.safetensors: x: not part of a llama \(and 1 more\)",
    ),
    "shape": (
        lambda f: reweight(f, **{Q: torch.ones(8, 128)}),
        r"q_proj\.weight: shape must be \[32, 32\] according to config.json, got \[8, 128\]",
    ),
    "transposed": (
        lambda f: reweight(f, model__norm__weight=torch.ones(32, 1)),
        r"model\.norm\.weight: shape must be \[32\] according to config.json, got \[32, 1\]",
    ),
    "type": (
        lambda f: reweight(f, **{Q: torch.ones(32, 32, dtype=torch.int8)}),
        r"q_proj\.weight: type must be one of F32, F16, BF16, got I8",
    ),
    "NaN": (
        lambda f: reweight(f, **{Q: torch.full((32, 32), torch.nan)}),
        r"q_proj\.weight: has non-finite numbers",
    ),
    "empty": (
        lambda f: (f / "model.safetensors").write_bytes(b""),
        r"model\.safetensors: not valid safetensors",
    ),
    "a page": (
        lambda f: (f / "model.safetensors").write_text("<!doctype html>" * 9),
        "not valid safetensors: its header of [0-9]+ bytes is more than",
    ),
    "giant header": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}"),
        r"its header of 4611686018427387904 bytes is more",
    ),
    "overlap": (
        lambda f: with_header(f, {"a": F32, "b": F32}, bytes(8)),
        "not valid safetensors: .*nvalid",
    ),
    "huge shape": (
        lambda f: with_header(f, {"a": F32 | {"shape": [2**40, 2**40]}}, bytes(8)),
        "not valid safetensors",
    ),
    "past the end": (
        lambda f: with_header(f, {"a": F32 | {"shape": [99], "data_offsets": [0, 396]}}, bytes(8)),
        "not valid safetensors",
    ),
    "huge model": (
        lambda f: edit(f / "config.json", hidden_size=2**30),
        r"embed_tokens\.weight: shape must be \[300, 10\d+\] according to config.json, got \[300, 32\]",
    ),
    "sizes past 64 bits": (
        lambda f: edit(f / "config.json", hidden_size=2**31 - 4, head_dim=2**31 - 2),
        "config.json: its sizes make no tensor",
    ),
    "more layers than any": (
        lambda f: edit(f / "config.json", num_hidden_layers=10**9),
        r"num_hidden_layers: 1000000000 is out of bounds here \(Input should be less than",
    ),
    "sizes in words": (
        lambda f: edit(f / "config.json", hidden_size="big"),
        "config.json: transformers cannot read it: .*hidden_size",
    ),
    "no heads": (lambda f: edit(f / "config.json", num_attention_heads=0), "config.json: "),
    "code": (
        lambda f: edit(f / "config.json", auto_map={"AutoModel": "evil.Model"}),
        "config.json: auto_map: requires running code of its author",
    ),
    "tokenizer code": (
        lambda f: edit(f / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}),
        "tokenizer_config.json: auto_map",
    ),
    "quantized": (
        lambda f: edit(f / "config.json", quantization_config={"bits": 4}),
        "quantization_config: its weights are quantized",
    ),
    "another model": (
        lambda f: edit(f / "config.json", model_type="bloom"),
        'model_type: must be one of gpt2, llama, .*, got "bloom". Choose another model',
    ),
    "no model": (
        lambda f: edit(f / "config.json", model_type=["llama"]),
        r'model_type: must be one of .*, got \["llama"\]',
    ),
    "scaled rope": (
        lambda f: edit(
            f / "config.json",
            rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        ),
        "rope_type: .*linear",
    ),
    "config cut off": (
        lambda f: (f / "config.json").write_text('{"model_type"'),
        "config.json: not valid JSON",
    ),
    "config is a list": (
        lambda f: (f / "config.json").write_text("[]"),
        "config.json: must be a JSON object, got list",
    ),
    "config is deep": (
        lambda f: (f / "config.json").write_text("[" * 200000),
        "config.json: not valid JSON",
    ),
    "config is large": (
        lambda f: (f / "config.json").write_bytes(bytes(1_000_001)),
        "config.json: must have at most 1000000 bytes, got 1000001",
    ),
    "no config": (
        lambda f: (f / "config.json").unlink(),
        "published: no config.json. Give the folder of a Hugging Face model",
    ),
    "an adapter": (
        lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "/etc"}'),
        "adapter_config.json: an adapter, not a whole model",
    ),
    "a pipe": (
        lambda f: ((f / "config.json").unlink(), os.mkfifo(f / "config.json")),
        "config.json: not a regular file",
    ),
    "pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "has only pickled weights, which can run code and are never read",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "published: no model.safetensors and no model.safetensors.index.json",
    ),
    "no tokenizer": (
        lambda f: (f / "tokenizer.json").unlink(),
        "published: has no tokenizer.json",
    ),
    "tokenizer cut off": (
        lambda f: (f / "tokenizer.json").write_text('{"model"'),
        "tokenizer.json: not JSON, or cut off",
    ),
    "a link out": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").symlink_to("/etc/passwd")),
        "config.json: a link out of the folder",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_folder_is_one_error_line_and_nothing_is_written(name, published, tmp_path):
    """H2, H3, H6 and E14: the message names the file, and the tensor if there is one."""
    folder = published()
    spoil, words = FAULTS[name]
    spoil(folder)
    with pytest.raises(UserError, match=words) as refused:
        import_hf(str(folder), tmp_path / "in.ckpt")
    assert "\n" not in str(refused.value)
    assert "root:" not in str(refused.value)
    assert not (tmp_path / "in.ckpt").exists()


def test_a_large_header_takes_no_memory(published, tmp_path, monkeypatch):
    """A sparse file of 50 GB whose header should have 40: its first eight bytes are checked before the library opens it."""
    folder = published()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 40 * 10**9))
        file.truncate(50 * 10**9)
    monkeypatch.setattr("safetensors.safe_open", lambda *args, **more: pytest.fail("opened"))
    with pytest.raises(UserError, match="its header of 40000000000 bytes is more than 10000000"):
        import_hf(str(folder), tmp_path / "in.ckpt")


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (
            "../secret.safetensors",
            r"must be a name such as model-00001-of-00002.safetensors, got '../secret.safetensors'",
        ),
        ("/etc/passwd", "got '/etc/passwd'"),
        ("%2e%2e/secret.safetensors", "got '%2e%2e/secret.safetensors'"),
        ("model-0\0.safetensors", r"got 'model-0\\x00.safetensors'"),
        (
            "model-00009.safetensors",
            r"model-00009.safetensors: not found, but model.safetensors.index.json names it",
        ),
        (7, "weight_map: must be an object from tensor to file"),
    ],
)
def test_an_index_names_files_of_its_folder_only(place, words, published, tmp_path):
    folder = published()
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    (folder / hf_import.INDEX).write_text(
        json.dumps({"weight_map": {"model.norm.weight": place}}), encoding="utf-8"
    )
    with pytest.raises(UserError, match=words):
        import_hf(str(folder), tmp_path / "in.ckpt")


def test_a_tensor_in_two_files_is_an_error(published, tmp_path):
    folder = published(max_shard_size="20KB")
    first, second = sorted(folder.glob("model-*"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor}, second, metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=f"{second.name}: {name}: {first.name} also has a tensor of this name"
    ):
        import_hf(str(folder), tmp_path / "in.ckpt")


def test_a_tied_head_that_differs_from_the_embedding_is_an_error(published, tmp_path):
    folder = published("llama, tied")
    reweight(folder, lm_head__weight=torch.ones(300, 32))
    with pytest.raises(
        UserError,
        match="lm_head.weight: differs from the embedding, but config.json has tie_word_embeddings",
    ):
        import_hf(str(folder), tmp_path / "in.ckpt")


def test_a_tokenizer_with_more_tokens_than_embedding_rows_is_an_error_with_both_numbers(
    published, bpe, tmp_path
):
    """E14."""
    folder = published()
    reweight(
        folder, model__embed_tokens__weight=torch.ones(290, 32), lm_head__weight=torch.ones(290, 32)
    )
    edit(folder / "config.json", vocab_size=290)
    with pytest.raises(
        UserError,
        match=f"its tokenizer has {bpe('gpt2').vocab_size} tokens, but its embedding 290 rows",
    ):
        import_hf(str(folder), tmp_path / "in.ckpt")


def test_logits_that_differ_from_transformers_stop_the_import(published, tmp_path, monkeypatch):
    """As they would for a setting in config.json that no table has."""
    read = conversion.from_weights
    monkeypatch.setattr(
        conversion,
        "from_weights",
        lambda config, weight: read(
            config, lambda name: weight(name) * (1.01 if "o_proj" in name else 1)
        ),
    )
    with pytest.raises(
        UserError,
        match=r"published: our logits differ from transformers' by 0\.\d+: it computes something that our decoder does not",
    ):
        import_hf(str(published()), tmp_path / "in.ckpt")
    assert not (tmp_path / "in.ckpt").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../../etc", r"\.\./\.\./etc: not found"),
        ("%2e%2e/etc", "%2e%2e/etc: not found"),
        ("a\0b", r"a\\x00b: not found"),
        ("/etc/passwd", "/etc/passwd: not a folder"),
        ("/etc", "/etc: no config.json. Give the folder"),
    ],
)
def test_invalid_names_are_errors_without_a_request_to_the_hub(name, words, tmp_path, monkeypatch):
    """H6."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hf_files, "require_hub", lambda *args: pytest.fail("the hub was asked"))
    with pytest.raises(UserError, match=words):
        import_hf(name, tmp_path / "in.ckpt")


def test_a_name_on_the_hub_without_network_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UserError,
        match="owner/name: not a folder, and cannot be downloaded: .*Give a local folder with config.json",
    ):
        import_hf("owner/name", tmp_path / "in.ckpt")


def test_config_json_is_checked_before_the_weights_are_downloaded_and_links_within_the_cache_are_allowed(
    published, tmp_path, monkeypatch
):
    """In the hub library's cache, snapshots/REVISION/FILE is a link to blobs/HASH of the same model."""
    folder = published()
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "1a2b"
    blobs = snapshot.parents[1] / "blobs"
    for made in (snapshot, blobs):
        made.mkdir(parents=True)
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(file.rename(blobs / file.name))
    asked: list[list[str]] = []
    monkeypatch.setattr(hf_files, "require_hub", lambda *args: None)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, allow_patterns: asked.append(allow_patterns) or str(snapshot),
    )
    assert import_hf("owner/name", tmp_path / "in.ckpt").config.tokenizer.path == "owner/name"
    assert [("model.safetensors" in patterns) for patterns in asked] == [False, True]
    assert not any("bin" in pattern for patterns in asked for pattern in patterns)
    asked.clear()
    edit(blobs / "config.json", model_type="bloom")
    with pytest.raises(UserError, match="model_type: must be one of"):
        import_hf("owner/name", tmp_path / "again.ckpt")
    assert len(asked) == 1


# --- answers, and adapters ---


def ending_at(path: Path, place: int, capsys: pytest.CaptureFixture, eos_id: int) -> None:
    """Change the model so that its greedy answer ends there: the token at this place and EOS swap their rows of the tied embedding."""
    [*_, token] = text_of_infer(path, capsys)[1][: place + 1]
    stored = checkpoint_format.read(path)
    for name in ("embedding.weight", "head.weight"):
        weight = stored["weights"][name].clone()
        weight[[token, eos_id]] = weight[[eos_id, token]]
        stored["weights"][name] = weight
    checkpoint_format.write(path, stored)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hf", "gguf"])
@pytest.mark.parametrize(
    ("template", "ends"), [("instruction", True), ("alpaca", False), ("chatml", True)]
)
def test_an_answer_equals_that_of_infer(kind, template, ends, save, bpe, tmp_path, capsys):
    """With the exported chat template, transformers generates the same ids and ends where infer.py does."""
    path = save(stage="sft", config={"data": {"template": template}}, max_seq_len=200)
    if template == "instruction":  # the random model ends by itself in the words of ChatML
        ending_at(path, 7, capsys, bpe("gpt2").eos_id)
    out = tmp_path / f"out.{kind}"
    assert main(["export", str(path), str(out), "--format", kind]) == 0
    found = {"gguf_file": out.name} if kind == "gguf" else {}
    folder = tmp_path if kind == "gguf" else out
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **found)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **found)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    ids = model.generate(prompt, do_sample=False, max_new_tokens=40)[0, prompt.size(1) :].tolist()
    text, expected = text_of_infer(path, capsys)
    assert (tokenizer.decode(ids, skip_special_tokens=True), ids) == (text, expected)
    assert (len(ids) < 40) == ends


def adapter_of(base: Path) -> Path:
    """A checkpoint in the folder of `base` with an adapter of it."""
    stored, lora = checkpoint_format.read(base), LoraConfig(r=2)
    model = checkpoint_load.load_model(base).model
    generator = torch.Generator().manual_seed(2)
    weights = {}
    for name, layer in target_layers(model, lora).items():
        n_out, n_in = layer.weight.shape
        weights[f"{name}.lora_A.weight"] = torch.randn(lora.r, n_in, generator=generator)
        weights[f"{name}.lora_B.weight"] = torch.randn(n_out, lora.r, generator=generator)
    reference = {"path": base.name, "fingerprint": checkpoint_initial.fingerprint_of(model)}
    settings = Config.from_plain(stored["config"]).model_copy(update={"lora": lora})
    settings = settings.model_copy(
        update={"training": settings.training.model_copy(update={"init_from": str(base)})}
    )
    path = base.with_name("adapter.ckpt")
    checkpoint_format.write(
        path, stored | {"weights": weights, "base": reference, "config": settings.to_plain()}
    )
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_a_merged_adapter_generates_the_text_of_infer(kind, save, tmp_path, capsys):
    base = save()
    path = adapter_of(base)
    assert (
        main(["export", str(path), str(tmp_path / f"out.{kind}"), "--format", kind, "--merge"]) == 0
    )
    text = text_of_infer(path, capsys)
    found = (
        text_of_transformers(tmp_path, gguf_file="out.gguf")
        if kind == "gguf"
        else text_of_transformers(tmp_path / "out.hf")
    )
    assert found == text != text_of_infer(base, capsys)


def test_an_adapter_alone_is_a_folder_for_peft(save, tmp_path, capsys):
    """Exactly two files, and the command prints the base; peft's logits with it equal those of the merged checkpoint."""
    import peft

    base = save()
    path = adapter_of(base)
    assert main(["export", str(path), str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'out'}\n"
    assert (
        err.splitlines()[0]
        == f"the adapter alone, for peft, of {base}; --merge writes the whole model"
    )
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    ids = torch.arange(20)[None]
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(
            checkpoint_load.load_model(base).model, tmp_path / "out"
        ).eval()(ids)
        assert torch.allclose(checkpoint_load.load_model(path).model(ids), theirs, atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["adapter.ckpt", "out.gguf", "--format", "gguf"],
            "--format gguf: is not supported with an adapter alone. Give --merge for the whole model",
        ),
        (
            ["a.ckpt", "out", "--merge"],
            "--merge: a.ckpt holds a whole model, not an adapter. Remove --merge.",
        ),
        (["adapter.ckpt", "a.ckpt"], "a.ckpt: already exists."),
    ],
)
def test_unsupported_flags_for_adapters_are_errors(
    flags, words, save, tmp_path, capsys, monkeypatch
):
    adapter_of(save())
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main(["export", *flags]) == 2
    assert words in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


# --- the commands ---


def test_the_command_prints_which_class_reads_the_tokenizer(save, tmp_path, capsys):
    assert main(["export", str(save(bias="qkv")), str(tmp_path / "out"), "--format", "hf"]) == 0
    note, after = capsys.readouterr().err.splitlines()[1:]
    assert (
        note
        == "note: load its tokenizer with PreTrainedTokenizerFast; AutoTokenizer pre-tokenizes differently for every qwen2"
    )
    assert "import pipeline, PreTrainedTokenizerFast as T; " in after


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_the_command_ends_with_the_path_and_the_next_command(
    kind, save, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(save(qk_norm=True)), f"out it.{kind}", "--format", kind]) == 0
    out, err = capsys.readouterr()
    assert out == f"out it.{kind}\n"
    lines = err.splitlines()
    assert lines[0].startswith(
        "qwen3, f32: read back by transformers, its logits differ from ours by "
    )
    assert lines[1].startswith("next: python -c '")
    code = lines[1].partition("python -c ")[2].strip("'")
    exec(compile(code, "next", "exec"), {})  # noqa: S102
    assert len(lines) == 2
    assert capsys.readouterr().out


def test_floats_are_only_valid_for_gguf(save, tmp_path, capsys):
    assert (
        main(["export", str(save()), str(tmp_path / "out"), "--format", "hf", "--floats", "f16"])
        == 2
    )
    assert (
        capsys.readouterr().err
        == "error: --floats: only valid for --format gguf. Remove it, or give --format gguf.\n"
    )


def test_a_missing_checkpoint_and_an_invalid_name_are_errors(save, tmp_path, capsys):
    assert (
        main(["export", str(tmp_path / "none.ckpt"), str(tmp_path / "out"), "--format", "hf"]) == 2
    )
    assert "none.ckpt: not found" in capsys.readouterr().err
    with pytest.raises(UserError, match="out: the name of a GGUF file must end in .gguf."):
        export_gguf(save(), tmp_path / "out")
    assert main(["import", "gpt2", str(tmp_path / "out.pt")]) == 2
    assert capsys.readouterr().err.endswith("out.pt: the name of a checkpoint must end in .ckpt.\n")
