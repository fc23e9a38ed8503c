"""Export of checkpoints to transformers: the same text, tokens and logits (FAULTS: E14).

The oracle is transformers, which reads what is written here. Weights are random and large (std 0.3), so that every
token, matrix and setting matters.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.interchange.conftest import (
    GPT2,
    PROMPT,
    SPECIAL,
    TEXT,
    quick,
    text_of_infer,
    text_of_transformers,
)
from tinylm.__main__ import main
from tinylm.checkpoint import format as checkpoint_format
from tinylm.checkpoint import initial as checkpoint_initial
from tinylm.checkpoint import load as checkpoint_load
from tinylm.checkpoint.initial import fingerprint_of, weights_fingerprint
from tinylm.checkpoint.load import load_model
from tinylm.common.errors import UserError, require_package
from tinylm.common.files import locked
from tinylm.config.schema import Config, LoraConfig
from tinylm.generate.rounded_checkpoint import export_checkpoint
from tinylm.interchange import conversion, hf_export
from tinylm.interchange.gguf import export_gguf
from tinylm.interchange.hf_export import export_hf, sampling_settings
from tinylm.interchange.hf_import import import_hf
from tinylm.interchange.hf_tokenizer import CHAT_TEMPLATES, backend_of
from tinylm.model.decoder import Decoder
from tinylm.model.hf_model import HFModel
from tinylm.model.lora import target_layers
from tinylm.model.rounded import quantize
from tinylm.rows.conversation import Turn
from tinylm.rows.template_factory import make_template
from tinylm.text.documents import text_chunks
from tinylm.tokenizer.bpe_fast import learn_bpe
from tinylm.tokenizer.byte_char import ByteTokenizer, CharTokenizer
from tinylm.tokenizer.factory import tokenizer_from_plain
from tinylm.tokenizer.hf import HFTokenizer
from tinylm.tokenizer.pretokenize import Pretokenizer

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
    """transformers 5 splits text for every Qwen2 into Qwen2's words, in which each digit is one word; our 12345 is
    one token.
    """
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


@pytest.mark.slow
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
    assert {
        key: generation[key]
        for key in (
            "eos_token_id",
            "pad_token_id",
            "do_sample",
            "temperature",
            "top_k",
            "top_p",
        )
    } == {
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 0,
        "top_p": 0.9,
    }
    assert "max_new_tokens" not in generation
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


def code_of(card: Path) -> str:
    """The Python code in a card."""
    return card.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]


@pytest.mark.slow
def test_the_example_in_the_model_card_runs(save, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for stage, folder in (("pretrain", "base"), ("sft", "tuned")):
        export_hf(save(stage=stage), tmp_path / folder)
        monkeypatch.chdir(tmp_path / folder)
        capsys.readouterr()
        exec(compile(code_of(Path("README.md")), "README.md", "exec"), {})  # noqa: S102
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "tokenizer", [None, ByteTokenizer(), CharTokenizer(TEXT + "<|>_fpx", unknown="error")]
)
def test_the_name_of_a_special_token_in_a_text_is_text(tokenizer, save, tmp_path):
    """A template needs its markers as tokens: with one, the names are tokens, and the card says so."""
    text = "the<|endoftext|> model <|pad|><|im_start|>next <|endoftext|>"
    path = save(tokenizer)
    export_hf(path, tmp_path / "base")
    ours = checkpoint_load.load_model(path).tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs([text, "the"], padding=True)["input_ids"][0] == ours.encode(text)
    assert theirs.decode(ours.encode(text), skip_special_tokens=True) == text
    export_hf(save(tokenizer, stage="sft"), tmp_path / "tuned")
    tuned = transformers.AutoTokenizer.from_pretrained(tmp_path / "tuned")
    assert ours.eos_id in tuned(ours.special_names[ours.eos_id])["input_ids"]
    card = (tmp_path / "tuned" / "README.md").read_text(encoding="utf-8")
    assert "the name of a special token in a message becomes that token" in card


def test_without_a_padding_token_no_padding_id_is_exported(save, bpe, tmp_path):
    """transformers keeps the gradient of row `pad_token_id` at zero: an EOS that also pads would never be trained
    again.
    """
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
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {
            "<|im_start|>": {
                "id": "<|im_start|>",
                "ids": [bpe("gpt2").vocab_size - 2],
                "tokens": ["<|im_start|>"],
            }
        },
    }
    opening = tokenizer_from_plain(plain | {"tokenizer_json": json.dumps(description)})
    export_hf(save(opening), tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT)[
        "input_ids"
    ] == opening.encode(TEXT)


@pytest.mark.slow
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


@pytest.mark.slow
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
    monkeypatch.setattr("tinylm.interchange.hf_tokenizer.backend_of", lambda tokenizer: other)
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
        match=r"out: cannot be written: the disk did not take all of it \([\d,]+ bytes are free there\)\. "
        "Free disk space or change the output path",
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
    [("user", "Name three colors.", "")],
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_tuned_hugging_face_model_is_exported_as_it_is_and_as_gguf(save, tmp_path, capsys):
    """Such a checkpoint has a model of transformers (HFModel), here a Llama; for GGUF it is converted to our
    decoder first.
    """
    path = save()
    state = checkpoint_format.read(path)
    inner = conversion.to_hf(checkpoint_load.load_model(path).model)
    hf_model = HFModel(inner)
    checkpoint_format.write(
        path, state | {"hf_config": hf_model.settings, "weights": hf_model.state_dict()}
    )
    expected = text_of_infer(path, capsys)
    assert export_hf(path, tmp_path / "out").model_type == "llama"
    assert text_of_transformers(tmp_path / "out") == expected
    export_gguf(path, tmp_path / "out.gguf")
    assert text_of_transformers(tmp_path, gguf_file="out.gguf") == expected


# --- answers, and adapters ---


def ending_at(path: Path, place: int, capsys: pytest.CaptureFixture, eos_id: int) -> None:
    """Change the model so that its greedy answer ends there: the token at this place and EOS swap their rows of
    the tied embedding.
    """
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
    """A checkpoint in the folder of `base` with an adapter for it."""
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


@pytest.mark.slow
def test_a_checkpoint_of_an_adapter_is_the_merged_model(save, tmp_path):
    """It needs no base; in 8 bits it is the merged model, rounded."""
    base = save()
    path, whole, rounded = adapter_of(base), tmp_path / "whole.ckpt", tmp_path / "int8.ckpt"
    export_checkpoint(path, whole, "fp32", max_rise=1.0)
    export_checkpoint(path, rounded, "int8", max_rise=1.0)
    merged = load_model(path).model
    assert fingerprint_of(merged) != weights_fingerprint(base)
    assert fingerprint_of(merged) == weights_fingerprint(whole)
    base.unlink()
    quantize(merged)
    loaded = load_model(rounded, as_stored=["int8"])
    codes = loaded.model.blocks[1].attention.qkv.codes
    assert torch.equal(codes, merged.blocks[1].attention.qkv.codes)
    assert loaded.config.lora is None


@pytest.mark.slow
def test_an_adapter_alone_is_a_folder_for_peft(save, tmp_path, monkeypatch, capsys):
    """With tokenizer and card; peft's logits equal those of the merged checkpoint. The code in the card runs where
    the base is, and prints the text of infer.py.
    """
    import peft

    base = save(stage="sft", config={"data": {"template": "alpaca"}}, max_seq_len=256)
    path = adapter_of(base)
    assert main(["export", str(path), str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'out'}\n"
    assert (
        err.splitlines()[0]
        == f"the adapter alone, for peft, of {base}; --merge writes the whole model"
    )
    assert (
        err.splitlines()[1]
        == f"next: the Python code in {tmp_path / 'out' / 'README.md'} loads both"
    )
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| adapter | LoRA, r 2, alpha 16 |" in card
    assert f'Path("{base.name}")' in card and str(tmp_path) not in card
    (tmp_path / "out" / base.name).hardlink_to(base)
    monkeypatch.chdir(tmp_path / "out")
    exec(compile(code_of(Path("README.md")), "README.md", "exec"), {})  # noqa: S102
    printed = capsys.readouterr().out
    assert "### Instruction:\nHello\n\n### Response:\n" in printed
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
        == "note: load its tokenizer with PreTrainedTokenizerFast; AutoTokenizer pre-tokenizes "
        "differently for every qwen2"
    )
    assert "import pipeline, PreTrainedTokenizerFast as T; " in after


FIRST_QUESTIONS = {
    "positions of GPT-2": (
        GPT2 | {"max_seq_len": 32}, {}, '("Once", max_new_tokens=28)', ),
    "a short answer": ({}, {"config": {"sampling": {"max_new_tokens": 3}}}, '("Once", max_new_tokens=3)'),
    "a chat model": (
        {}, {"stage": "sft", "config": {"data": {"template": "chatml"}}},
        '([{"role": "user", "content": "Hello"}], max_new_tokens=',
    ),
    "a chat model without room for an answer": (
        {}, {"stage": "sft", "config": {"data": {"template": "alpaca"}}},
        '([{"role": "user", "content": "Hello"}], max_new_tokens=1)',
    ),
    "few characters": (
        {}, {"tokenizer": CharTokenizer("xyz 1", unknown="error")}, '("xyz", max_new_tokens=61)',
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST_QUESTIONS)
def test_the_printed_command_fits_the_model(name, save, tmp_path, capsys, monkeypatch):
    """It runs: text that the tokenizer has, an answer that fits in the context, a message for a chat model."""
    monkeypatch.chdir(tmp_path)
    model, rest, asked = FIRST_QUESTIONS[name]
    assert main(["export", str(save(**rest, **model)), "out"]) == 0
    code = capsys.readouterr().err.splitlines()[-1].partition("python -c ")[2].strip("'")
    assert asked in code
    exec(compile(code, "next", "exec"), {})  # noqa: S102
    assert "generated_text" in capsys.readouterr().out


@pytest.mark.slow
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
    if kind == "gguf":
        assert lines.pop(1) == "Ollama: ollama create 'out it' -f 'out it.Modelfile'"
    assert lines[1].startswith("next: python -c '")
    code = lines[1].partition("python -c ")[2].strip("'")
    exec(compile(code, "next", "exec"), {})  # noqa: S102
    assert len(lines) == 2
    assert capsys.readouterr().out


def test_a_number_type_is_only_valid_for_gguf(save, tmp_path, capsys):
    assert (
        main(["export", str(save()), str(tmp_path / "out"), "--format", "hf", "--dtype", "f16"])
        == 2
    )
    assert (
        capsys.readouterr().err
        == "error: --dtype: only valid for --format gguf. Remove it, or give --format gguf.\n"
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


def test_the_next_export_removes_what_a_killed_one_left(save, tmp_path):
    """K9: whatever its name, but not one that is still at work, nor other files."""
    path = save()
    out = tmp_path / "exports"
    for name in ("killed", "again", "working"):
        scratch = out / f".{name}{hf_export.SCRATCH}"
        scratch.mkdir(parents=True)
        (scratch / "model.safetensors").write_bytes(b"half")
    (out / ".mine").mkdir()
    with locked(out / "working", "OUT"):
        export_hf(path, out / "again")
        found = sorted(path.name for path in out.iterdir())
    assert found == [".mine", ".working.lock", f".working{hf_export.SCRATCH}", "again"]


def test_an_export_that_fails_leaves_nothing(save, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_export, "set_token_ids", lambda *_: (_ for _ in ()).throw(KeyError()))
    with pytest.raises(KeyError):
        export_hf(save(), tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()
