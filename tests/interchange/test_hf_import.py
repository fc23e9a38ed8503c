"""Import of Hugging Face folders: the same logits, and no file is trusted (FAULTS: E14, H2, H3, H6).

The untrusted files are written by hand.
"""

import json
import os
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.interchange.conftest import THEIRS, quick, text_of_infer, text_of_transformers
from tinylm.__main__ import main
from tinylm.checkpoint import format as checkpoint_format
from tinylm.checkpoint import info as checkpoint_info
from tinylm.checkpoint import load as checkpoint_load
from tinylm.common.errors import UserError
from tinylm.config.loader import load_config
from tinylm.interchange import conversion, hf_import
from tinylm.interchange.hf_export import export_hf
from tinylm.interchange.hf_import import import_hf
from tinylm.model.hf_files import find_hf_model
from training.build import find_initial_model
from training.context import ResumeOptions, RunContext
from training.resume import find_resume_state


@pytest.mark.slow
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
    # AutoTokenizer takes a class by the model's type, and Gemma's needs a token <unk>.
    reader = "PreTrainedTokenizerFast" if name == "gemma3_text" else "AutoTokenizer"
    assert text_of_infer(tmp_path / "in.ckpt", capsys) == text_of_transformers(folder, reader)


@pytest.mark.slow
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
        match="in.ckpt: an imported model, which has no optimizer state to resume. Choose another "
        "training.checkpoint_dir, and start from its weights: training.init_from=",
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


@pytest.mark.slow
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
        "model.safetensors: its content is an HTML page. Download it again",
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
        lambda f: edit(f / "config.json", model_type="cohere"),
        r"model_type: must be one of gemma, gemma3_text, gpt2, .*, got cohere\. "
        r"Fine-tune it as it is, without import: training\.init_from=hf:",
    ),
    "a model of images": (
        lambda f: edit(f / "config.json", model_type="vit"),
        r"model_type: must be one of gemma, .*, got vit\. Choose another model",
    ),
    "no model": (
        lambda f: edit(f / "config.json", model_type=["llama"]),
        r'model_type: must be one of .*, got \["llama"\]',
    ),
    "scaled rope": (
        lambda f: edit(
            f / "config.json",
            rope_parameters={"rope_type": "proportional", "factor": 2.0, "rope_theta": 1e4},
        ),
        r"config\.json: rope_parameters\.rope_type: must be one of default, linear, dynamic, yarn, llama3, "
        r'got "proportional"\. '
        r"Fine-tune it as it is, without import: training\.init_from=hf:/\S+published\.$",
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
        "tokenizer.json: not valid JSON",
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
    """A sparse file of 50 GB whose header should have 40: its first eight bytes are checked before the library
    opens it.
    """
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
        match=r"published: our logits differ from transformers' by 0\.\d+: it computes something "
        r"that our decoder does not",
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
    monkeypatch.setattr(
        "tinylm.common.hub.require_hub", lambda *args: pytest.fail("the hub was asked")
    )
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
    monkeypatch.setattr("tinylm.common.hub.require_hub", lambda *args: None)
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


@pytest.mark.parametrize(
    "key", ["attn_implementation", "_attn_implementation", "experts_implementation"]
)
def test_an_implementation_that_a_config_names_is_not_looked_for(published, key):
    """K8: transformers would ask the hub for the code of evil/evil; the model is a plain Llama."""
    folder = published()
    edit(folder / "config.json", **{key: "evil/evil"}, more={"text_config": {key: "evil/evil"}})
    for config in (hf_import.read_config(folder, "name"), find_hf_model(str(folder)).config):
        assert "evil" not in json.dumps(config.to_dict())
        assert config._attn_implementation != "evil/evil"


def test_code_in_a_config_inside_a_config_is_refused(published):
    folder = published()
    edit(folder / "config.json", text_config={"auto_map": {"AutoModel": "evil.Model"}})
    for read in (partial(hf_import.read_config, name="name"), find_hf_model):
        with pytest.raises(UserError, match="auto_map: requires running code of its author"):
            read(str(folder) if read is find_hf_model else folder)
