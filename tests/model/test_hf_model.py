"""Hugging Face models with our interface: the numbers are transformers' own, and untrusted files are checked
(FAULTS: E14, H2, H3, H6).
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tinylm.common.errors import UserError
from tinylm.config.schema import SamplingConfig
from tinylm.generate.engine import Engine, Request
from tinylm.model import hf_model
from tinylm.model.hf_files import find_hf_model, rebuild_hf_model
from tinylm.model.hf_model import HFModel, check_packing
from tinylm.objectives.cross_entropy import cross_entropy
from tinylm.tokenizer.byte_char import ByteTokenizer
from tinylm.tokens.packing import IGNORE_INDEX

SIZES = {
    "vocab_size": 260,
    "max_position_embeddings": 64,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"intermediate_size": 48, "num_key_value_heads": 2},
    "mistral": {"intermediate_size": 48, "num_key_value_heads": 1, "sliding_window": 5},
    "qwen2": {"intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 16},
    "llama, scaled rope": {
        "intermediate_size": 48,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 5},
    "gemma2": {
        "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16,
        "sliding_window": 5, "final_logit_softcapping": 3.0, "pad_token_id": None, "tie_word_embeddings": False,
    },
    "gptj": {"rotary_dim": 4},  # its head has a bias
    "granite": {"intermediate_size": 48, "num_key_value_heads": 2, "logits_scaling": 2.0},
}  # fmt: skip
# Models that know no packed rows, and whose caches hold other things than keys and values.
OTHERS: dict[str, dict[str, Any]] = {
    "gpt_oss": {
        "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 5, "num_local_experts": 4,
        "num_experts_per_tok": 2, "pad_token_id": None,
    },
    "lfm2": {
        "intermediate_size": 48, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"], "pad_token_id": None,
        "tie_word_embeddings": False,
    },
}  # fmt: skip

STD = dict.fromkeys(("llama, scaled rope", "gpt_neo", "gptj", "gemma2", "granite", *OTHERS), 0.6)


def random_model(kind: str, **settings: Any) -> transformers.PreTrainedModel:
    """A model of random weights, large enough that logits vary."""
    torch.manual_seed(0)
    values = SIZES | {"bos_token_id": None, "eos_token_id": None} | (KINDS | OTHERS).get(kind, {})
    config = transformers.AutoConfig.for_model(kind.partition(",")[0], **values | settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(STD.get(kind, 0.15) * torch.randn(weight.shape))
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved llama, whose files the tests change."""
    random_model("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(260, (3, 20), generator=torch.Generator().manual_seed(0))


# --- the numbers are transformers' own ---


@pytest.mark.parametrize("kind", KINDS)
def test_logits_sizes_and_cache_equal_those_of_transformers(
    kind: str, ids: Tensor, tmp_path: Path
) -> None:
    """Read from disk; all at once, and in parts of 7, 1 and 12 through the cache, whose rows were reordered."""
    theirs = random_model(kind)
    theirs.save_pretrained(tmp_path)
    model = find_hf_model(str(tmp_path)).load().eval()
    assert (
        model.config.n_layers,
        model.config.d_model,
        model.config.n_heads,
        model.config.max_seq_len,
        model.config.vocab_size,
    ) == (2, 32, 4, 64, 260)
    with torch.no_grad():
        expected = theirs(ids).logits
        assert expected.std() > 0.1
        assert torch.allclose(model(ids), expected, atol=1e-5)
        cache, order = model.new_cache(3, 20), torch.tensor([2, 0, 0])
        parts = [model(ids[:, :7], cache=cache), model(ids[:, 7:8], cache=cache)]
        cache.select(order)
        last = model(ids[order, 8:], cache=cache)
    assert cache.length == 20
    assert torch.allclose(torch.cat(parts, dim=1), expected[:, :8], atol=1e-5)
    assert torch.allclose(last, expected[order, 8:], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, *OTHERS])
def test_greedy_text_equals_that_of_generate(kind: str) -> None:
    """The oracle is transformers' own decoding; 30 tokens from 6."""
    theirs = random_model(kind)
    prompt = torch.tensor([[84, 104, 101, 32, 99, 97]])
    expected = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=30,
        do_sample=False,
        pad_token_id=0,
    )[0, 6:].tolist()
    engine = Engine(HFModel(theirs).eval(), ByteTokenizer())
    actual = engine.generate(
        engine.fit_prompt(prompt[0].tolist()), SamplingConfig(max_new_tokens=30, temperature=0)
    )[0].ids
    assert list(actual) == expected[: len(actual)]
    assert len(set(expected)) >= 3, "a text of one token would compare little"
    assert len(actual) == 30 or actual[-1] == ByteTokenizer().eos_id


@pytest.mark.parametrize("kind", OTHERS)
def test_other_caches_keep_the_rows_that_are_selected(
    kind: str, ids: Tensor, tmp_path: Path
) -> None:
    """Read from disk; one position at a time, after the rows were reordered and one was repeated."""
    theirs = random_model(kind)
    theirs.save_pretrained(tmp_path)
    model, order = find_hf_model(str(tmp_path)).load().eval(), torch.tensor([2, 0, 0])
    with torch.no_grad():
        expected = theirs(ids).logits
        cache = model.new_cache(3, 20)
        first = model(ids[:, :15], cache=cache)
        cache.select(order)
        rest = [model(ids[order, t : t + 1], cache=cache) for t in range(15, 20)]
    assert torch.allclose(first, expected[:, :15], atol=1e-5)
    assert torch.allclose(torch.cat(rest, dim=1), expected[order, 15:], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_of_a_packed_row_do_not_see_each_other(kind: str, ids: Tensor) -> None:
    """Each document gives the same output as alone, also one of a single token, and beyond a sliding window of 5."""
    model = HFModel(random_model(kind)).eval()
    documents = torch.tensor([[0] * 9 + [1] * 1 + [2] * 10]).expand(3, -1)
    with torch.no_grad():
        packed = model.features(ids, document_ids=documents).hidden
        for start, stop in ((0, 9), (9, 10), (10, 20)):
            assert torch.allclose(
                packed[:, start:stop], model.features(ids[:, start:stop]).hidden, atol=1e-5
            )
        assert not torch.allclose(packed[:, 9:], model.features(ids).hidden[:, 9:], atol=1e-2), (
            "else the comparison cannot fail"
        )
    check_packing(model)
    assert not model.training


def test_a_model_that_mixes_documents_cannot_train_on_packed_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model whose attention ignores positions would mix them."""
    model = HFModel(random_model("llama"))
    alone = model.features
    monkeypatch.setattr(model, "features", lambda ids, document_ids=None: alone(ids))
    with pytest.raises(
        UserError,
        match="data.packing: a llama model does not keep the examples of a packed row apart. Set data.packing: padded.",
    ):
        check_packing(model)


@pytest.mark.slow
def test_a_checkpoint_has_all_that_is_needed_to_rebuild_the_model(ids: Tensor) -> None:
    """Settings as text and weights by name; tied weights are tied again."""
    for kind in KINDS:
        model = HFModel(random_model(kind)).eval()
        again = rebuild_hf_model(
            model.settings, {name: weight.clone() for name, weight in model.state_dict().items()}
        ).eval()
        with torch.no_grad():
            assert torch.equal(again(ids), model(ids))
        assert (
            (again.head.weight is again.embedding.weight)
            == model.config.tie_embeddings
            == (kind in ("gpt2", "qwen2", "gpt_neo"))
        )


def test_misuse_is_an_error() -> None:
    """As in our decoder: more positions than max_seq_len, and a cache together with document_ids."""
    model = HFModel(random_model("llama"))
    with pytest.raises(ValueError, match="65 positions are more than max_seq_len"):
        model(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="document_ids or a cache"):
        model(
            torch.zeros(1, 2, dtype=torch.long),
            document_ids=torch.zeros(1, 2),
            cache=model.new_cache(1),
        )


# --- files ---


def test_published_layouts_of_files_are_read(tmp_path: Path, ids: Tensor) -> None:
    """bf16, shards with an index, and GPT-2's old names without their first part; the model is fp32."""
    theirs = random_model("gpt2").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    (tmp_path / "old").mkdir()
    save_file(
        {
            name.removeprefix("transformer."): weight.clone()
            for name, weight in theirs.state_dict().items()
            if name != "lm_head.weight"
        },
        tmp_path / "old" / "model.safetensors",
    )
    (tmp_path / "old" / "config.json").write_bytes(
        (tmp_path / "shards" / "config.json").read_bytes()
    )
    expected = theirs.float()(ids).logits
    for name in ("shards", "old"):
        model = find_hf_model(str(tmp_path / name)).load().eval()
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
        assert torch.allclose(model(ids), expected, atol=1e-4)


def config_with(**values: Any) -> Callable[[Path], None]:
    """Writes these keys into config.json."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def weights_with(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    """Changes the tensors of model.safetensors."""

    def act(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return act


def header(text: str, length: int | None = None) -> Callable[[Path], None]:
    """Writes a safetensors file of this header and 16 bytes of data."""
    raw = text.encode()
    return lambda folder: (
        (folder / "model.safetensors").write_bytes(
            struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(16)
        )
        and None
    )


def index_with(name: str) -> Callable[[Path], None]:
    """Replaces the file by an index that names this shard."""

    def act(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"lm_head.weight": name}})
        )

    return act


NORM = "model.norm.weight"
FAULTS = {
    "a header of 2^62 bytes": (header("{}", 2**62), "model.safetensors: not valid safetensors: "),
    "a header that is not JSON": (header("{"), "model.safetensors: not valid safetensors: "),
    "overlapping tensors": (
        header(
            '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}'
        ),
        "model.safetensors: not valid safetensors: ",
    ),
    "a shape beyond the file": (
        header('{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,16]}}'),
        "not valid safetensors: ",
    ),
    "a file cut short": (
        lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:-5]
        ),
        "not valid safetensors: ",
    ),
    "an integer tensor": (
        weights_with(lambda w: w.update({NORM: torch.ones(32, dtype=torch.int64)})),
        f"{NORM}: type must be one of F64, F32, F16, BF16, got I64.",
    ),
    "another shape": (
        weights_with(lambda w: w.update({NORM: torch.ones(64)})),
        f"{NORM}: weight of another shape than in config.json.",
    ),
    "a missing tensor": (
        weights_with(lambda w: w.update({"x": w.pop(NORM)})),
        f"{NORM}: missing weight.",
    ),
    "a smaller tensor": (
        weights_with(lambda w: w.update({NORM: torch.ones(31)})),
        f"weights, but the files have 32,159: {NORM} must be [32], got [31]. Download config.json",
    ),
    "too few tensors": (
        weights_with(lambda w: w.pop(NORM)),
        f": {NORM} is missing. Download config.json",
    ),
    "a number that is not finite": (
        weights_with(lambda w: w.update({NORM: torch.tensor([float("nan")] * 32)})),
        f"{NORM}: has non-finite numbers. Download",
    ),
    "an extra tensor": (
        weights_with(lambda w: w.update(x=torch.ones(3))),
        "x: unexpected weight.",
    ),
    "a config that asks for all memory": (
        config_with(vocab_size=2**31 - 1),
        "config.json needs 137,438,96",
    ),
    "a config beyond all bounds": (
        config_with(vocab_size=2**62),
        "the sizes of this llama model are not known (vocab_size: Input should be less than",
    ),
    "a width whose feed-forward is beyond all bounds": (
        config_with(hidden_size=10**9),
        "config.json: the sizes of this llama model are not known (d_ff: Input should be less than",
    ),
    "code of its author": (
        config_with(auto_map={"AutoModelForCausalLM": "evil.Model"}),
        "config.json: auto_map: requires running code of its author",
    ),
    "quantized": (
        config_with(quantization_config={"quant_method": "bitsandbytes"}),
        "config.json: quantization_config: its weights are quantized",
    ),
    "an unknown architecture": (
        config_with(model_type="nonsense"),
        'config.json: model_type: no model of the installed transformers, got "nonsense". Choose a',
    ),
    "no architecture": (
        config_with(model_type=None),
        "config.json: model_type: no model of the installed transformers, got null. Choose a",
    ),
    "an encoder-decoder without a start id": (
        config_with(model_type="t5"),
        "config.json: decoder_start_token_id: missing; an encoder-decoder needs it.",
    ),
    "no language model": (
        config_with(model_type="vit"),
        "config.json: model_type: must be a model that generates text, got vit.",
    ),
    "a size that is text": (
        config_with(hidden_size="wide"),
        "config.json: transformers cannot read it: ",
    ),
    "heads of no size": (config_with(num_attention_heads=0), "config.json: "),
    "no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        "config.json: not valid JSON: ",
    ),
    "a JSON list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        "config.json: must be a JSON object, got list.",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json."),
    "no weights": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "no model.safetensors.",
    ),
    "an adapter": (
        lambda folder: (folder / "adapter_config.json").write_text(
            '{"base_model_name_or_path": "../other"}'
        ),
        "an adapter, not a whole model.",
    ),
    "a shard elsewhere": (
        index_with("../model.safetensors"),
        "weight_map: must be the name of a safetensors file beside it, got '../model.safetensors'.",
    ),
    "a shard that is a pickle": (
        index_with("pytorch_model.bin"),
        "weight_map: must be the name of a safetensors file beside it, got 'pytorch_model.bin'",
    ),
    "a shard that is not there": (
        index_with("model-2.safetensors"),
        "model-2.safetensors: not found",
    ),
    "an index of nothing": (
        lambda folder: (
            index_with("x")(folder) or (folder / "model.safetensors.index.json").write_text("{}")
        ),
        "weight_map: must be an object",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_file_is_an_error_that_names_it(name: str, folder: Path) -> None:
    """H2, H3: one error that names the file and the tensor or key; memory is bounded, because a meta model is
    compared first.
    """
    change, words = FAULTS[name]
    change(folder)
    with pytest.raises(UserError) as error:
        find_hf_model(str(folder)).load()
    assert words in str(error.value)
    assert str(folder) in str(error.value)


def test_settings_that_cannot_be_computed_together_are_an_error(tmp_path: Path) -> None:
    random_model("gpt_oss").save_pretrained(tmp_path)
    config_with(num_experts_per_tok=9)(tmp_path)
    with pytest.raises(
        UserError, match=r"config\.json: transformers cannot compute it: .*out of range"
    ):
        find_hf_model(str(tmp_path)).load()


@pytest.mark.parametrize("kind", ["gptj", "gemma2"])
def test_the_loss_and_its_gradients_are_those_of_transformers(kind: str, ids: Tensor) -> None:
    """With the bias of GPT-J's head, and the soft cap of Gemma 2's; every weight has its gradient."""
    theirs = random_model(kind)
    labels = ids.roll(-1, dims=1)
    labels[:, -1] = IGNORE_INDEX
    loss = theirs(ids, labels=ids).loss * (labels != IGNORE_INDEX).sum()
    expected = torch.autograd.grad(loss, list(theirs.parameters()))
    model = HFModel(theirs)
    hidden, head = model.features(ids).hidden.flatten(0, 1), model.head
    ours = cross_entropy(hidden, head.weight, labels.flatten(), softcap=head.softcap)
    assert torch.allclose(ours, loss, rtol=1e-5)
    actual = torch.autograd.grad(ours, list(theirs.parameters()))
    for one, other in zip(actual, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-3, rtol=1e-3)


def test_logits_that_are_not_a_matrix_of_hidden_states_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loss multiplies by the head's matrix, adds its bias and applies its soft cap, and no more."""
    model = HFModel(random_model("llama"))
    plain = model.inner.forward

    def scaled(**arguments: Any) -> Any:
        output = plain(**arguments)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(model.inner, "forward", scaled)
    with pytest.raises(
        UserError, match="the logits of a llama model are not hidden states times a matrix"
    ):
        hf_model.require_plain_head(model, "x")


@pytest.mark.parametrize("kind", ["llama", "gemma2", "lfm2"])
def test_a_prompt_that_begins_as_an_earlier_text_is_read_rightly(kind: str) -> None:
    """The next question of a chat: it shares a part of what the cache has. Windows and convolutions have
    forgotten the positions before, so that their text is read again.
    """
    model = HFModel(random_model(kind)).eval()
    engine = Engine(model, ByteTokenizer())
    sampling = SamplingConfig(temperature=0, max_new_tokens=8)
    engine.generate("the first question", sampling)
    [found] = engine.generate("the first answer and more", sampling)
    [expected] = Engine(model, ByteTokenizer()).generate("the first answer and more", sampling)
    assert found.ids == expected.ids
    assert found.log_prob == pytest.approx(expected.log_prob, abs=1e-3)


@pytest.mark.parametrize(
    "name", ["../../etc", "/etc/passwd", "nowhere/at/all", "%2e%2e/x", "a\0b", "", "."]
)
def test_a_name_that_cannot_be_a_model_is_an_error(name: str) -> None:
    """H6: paths out of this folder, files, and invalid names."""
    with pytest.raises(UserError, match="Give "):
        find_hf_model(name)


def test_without_the_hub_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A valid name, and no network."""

    def unreachable(where: object, fix: str) -> None:
        raise UserError(where, "cannot be reached", fix)

    monkeypatch.setattr("tinylm.common.hub.require_hub", unreachable)
    with pytest.raises(
        UserError,
        match="someone/model: cannot be reached. Give a local folder with config.json and model.safetensors.",
    ):
        find_hf_model("someone/model")


# --- batches ---


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, *OTHERS])
def test_texts_of_different_lengths_decode_together_as_each_alone(kind: str) -> None:
    """Padded on the left where the cache holds keys and values only; windows of 5 positions too. Texts join and
    leave: 5 texts in 3 slots.
    """
    model = HFModel(random_model(kind)).eval()
    engine = Engine(model, ByteTokenizer(), slots=3)
    requests = []
    for number, prompt in enumerate(["abc", "a longer prompt", "x", "two words", "abcdefghij"]):
        sampling = SamplingConfig(temperature=0, max_new_tokens=4 + 5 * number % 11)
        requests.append(Request(engine.encode_prompt(prompt), sampling, n_alternatives=1))
    for request, found in zip(requests, engine.run(requests), strict=True):
        [expected] = Engine(model, ByteTokenizer(), slots=1).run([request])
        assert [one.token_id for one in found] == [one.token_id for one in expected]
        log_probs = [one.log_prob for one in expected]
        assert [one.log_prob for one in found] == pytest.approx(log_probs, abs=1e-3)
    assert model.can_pad == (kind in KINDS or kind == "gpt_oss")


@pytest.mark.slow
def test_a_deterministic_engine_reads_the_rows_of_a_hugging_face_model_one_by_one() -> None:
    """So a text is the same to the last bit beside others, and after them."""
    model = HFModel(random_model("llama")).eval()
    engine = Engine(model, ByteTokenizer(), slots=3, deterministic=True)
    sampling = SamplingConfig(max_new_tokens=8)
    prompts = ["abc", "a longer prompt", "x", "abc and more"]
    requests = [Request(engine.encode_prompt(prompt), sampling) for prompt in prompts]
    together = list(engine.run(requests))
    apart = []
    for request in requests:
        apart += Engine(model, ByteTokenizer(), deterministic=True).run([request])
    assert together == apart == list(engine.run(requests))
