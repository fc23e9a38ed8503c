"""Constrained output: whatever the weights, the text is valid by the schema, or matched by the expression."""

import json
import re
import time
from collections.abc import Mapping

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from tinylm.common.errors import UserError
from tinylm.config.schema import ModelConfig, SamplingConfig
from tinylm.generate import constraint as constraint_module
from tinylm.generate import decoding
from tinylm.generate.constraint import Constraint
from tinylm.generate.engine import Engine, Request
from tinylm.model.decoder import Decoder
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokenizer.byte_char import ByteTokenizer, CharTokenizer
from tinylm.tokenizer.hf import HFTokenizer

pytest.importorskip("llguidance")

# Its text has characters of 2, 3 and 4 bytes, and every value is bounded, so that each text ends.
SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": -5, "maximum": 1000},
        "s": {"type": "string", "maxLength": 6},
        "e": {"enum": ["red", "é東🙂", None]},
        "a": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["n", "s", "e", "a"],
    "additionalProperties": False,
}
PATTERN = r"(the )*(model|é東🙂|[0-9]){1,3}"
GREEDY = SamplingConfig(max_new_tokens=300, temperature=0)


def byte_level_bpe() -> Tokenizer:
    """GPT-2's construction, the one of our own BPE and of tiktoken: characters of several bytes span tokens."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(['the model, the "next" : the model\'s {"n": 12}'], trainer)
    return HFTokenizer(backend, eos="<|endoftext|>", pad="<|pad|>")


def byte_fallback_bpe() -> Tokenizer:
    """Llama's construction: the first token of a text loses its space; other characters are <0x..> bytes, of which
    those of ASCII have the bytes of ordinary tokens.
    """
    bytes_of = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<unk>", "</s>", *bytes_of, "▁", *'themodl{}":,', "th", "the", "▁the", "▁{", "é"]
    backend = Backend(
        models.BPE(
            {piece: id for id, piece in enumerate(pieces)},
            [("t", "h"), ("th", "e"), ("▁", "the")],
            unk_token=pieces[0],
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "</s>"])
    return HFTokenizer(backend, eos="</s>", pad=None)


def unigram() -> Tokenizer:
    """SentencePiece's Unigram: every character of the text is a token."""
    characters = sorted(set(json.dumps(SCHEMA, ensure_ascii=False) + PATTERN + " \n0123456789-"))
    vocabulary = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("▁the", -1.0), ("▁{", -1.0)]
    vocabulary += [(c, -3.0) for c in characters if c != " "]
    backend = Backend(models.Unigram(vocabulary, 0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.add_special_tokens(["<unk>", "</s>"])
    return HFTokenizer(backend, eos="</s>", pad=None)


CHARACTERS = CharTokenizer(
    json.dumps(SCHEMA, ensure_ascii=False) + PATTERN + "0123456789- \n", unknown="unk"
)
TOKENIZERS = {
    "byte": ByteTokenizer(),
    "char": CHARACTERS,
    "byte-level bpe": byte_level_bpe(),
    "byte fallback": byte_fallback_bpe(),
    "unigram": unigram(),
}
EVERY_TOKENIZER = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def make_engine(tokenizer: Tokenizer, slots: int = 8) -> Engine:
    """A random decoder, sure of its tokens."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": tokenizer.vocab_size + 3,  # rows that are padding
        "max_seq_len": 64,  # less than a text: a context shift
        "n_layers": 1,
        "d_model": 32,
        "n_heads": 4,
        "tie_embeddings": False,
    }
    model = Decoder(ModelConfig.model_validate(shape)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    return Engine(model, tokenizer, slots=slots)


def check(value: object, schema: Mapping[str, object]) -> None:
    """That a value is valid by SCHEMA, by hand."""
    assert list(value) == list(schema["properties"])
    assert type(value["n"]) is int and -5 <= value["n"] <= 1000
    assert isinstance(value["s"], str) and len(value["s"]) <= 6
    assert value["e"] in ("red", "é東🙂", None)
    assert len(value["a"]) <= 3 and all(type(item) is bool for item in value["a"])


@pytest.mark.slow
@EVERY_TOKENIZER
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_random_weights_write_json_that_is_valid_by_the_schema(tokenizer, temperature):
    """Four samples at once, beside texts without a constraint, which stay as they are alone."""
    engine = make_engine(tokenizer)
    sampling = SamplingConfig(max_new_tokens=300, temperature=temperature, top_p=0.99)
    free = SamplingConfig(max_new_tokens=20, temperature=temperature)
    prompt = engine.fit_prompt(tokenizer.encode("the "))
    constraint = Constraint.json_schema(SCHEMA)
    requests = [Request(prompt, free)]
    for sample in range(4):
        requests.append(Request(prompt, sampling, sample=sample, constraint=constraint))
    unconstrained, *found = engine.complete(requests)
    for completion in found:
        check(json.loads(completion.text), SCHEMA)
        assert completion.finish_reason == "stop"
        assert completion.text == tokenizer.decode(completion.ids)
    if temperature:
        assert len({completion.text for completion in found}) == 4
    [alone] = make_engine(tokenizer).complete([Request(prompt, free)])
    assert unconstrained.ids == alone.ids


@EVERY_TOKENIZER
def test_random_weights_write_text_that_the_expression_matches(tokenizer):
    engine = make_engine(tokenizer)
    sampling = SamplingConfig(max_new_tokens=300, temperature=1.0, n_samples=8)
    prompt = engine.fit_prompt(tokenizer.encode("the "))
    found = engine.generate(prompt, sampling, constraint=Constraint.regex(PATTERN))
    for completion in found:
        assert re.fullmatch(PATTERN, completion.text)
        assert completion.finish_reason in ("stop", "eos")
    assert len({completion.text for completion in found}) > 2


@pytest.mark.slow
@EVERY_TOKENIZER
def test_a_constraint_that_allows_everything_leaves_greedy_text_as_it_is(tokenizer, monkeypatch):
    """The model itself writes neither special tokens nor parts of characters, which no constraint allows."""
    engine = make_engine(tokenizer)
    is_not_text = torch.zeros(engine.model.embedding.num_embeddings)
    for id in range(tokenizer.vocab_size):
        text = tokenizer.first_token_bytes(id)
        is_not_text[id] = id in tokenizer.special_names or not text or not text.isascii()
    monkeypatch.setattr(decoding, "lean_step", lambda model: None)
    engine.model.head.register_forward_hook(lambda head, inputs, logits: logits - 99 * is_not_text)
    prompt = engine.fit_prompt(tokenizer.encode("the "))
    sampling = GREEDY.model_copy(update={"max_new_tokens": 40, "no_repeat_ngram": 2})
    [free] = engine.generate(prompt, sampling)
    [constrained] = engine.generate(prompt, sampling, constraint=Constraint.regex("(?s).*"))
    assert constrained == free
    assert len(set(free.ids)) > 10 and free.finish_reason == "length"


def test_what_the_constraint_masks_is_not_in_the_log_probabilities():
    """They stay the model's own: one forced byte, scored by a full forward pass."""
    engine = make_engine(ByteTokenizer())
    [completion] = engine.generate("ab", GREEDY, constraint=Constraint.regex("q"))
    with torch.no_grad():
        logits = engine.model(torch.tensor([list(b"ab")]))[0, -1, :260]
    assert completion.text == "q"
    assert completion.log_prob == pytest.approx(logits.log_softmax(-1)[ord("q")].item(), abs=1e-4)


def test_a_token_that_ends_an_answer_is_allowed_where_the_text_may_end():
    """`a*` may end at once; its end may also be a stop id of a template, here <|sep|>."""
    engine = make_engine(ByteTokenizer())
    with torch.no_grad():
        engine.model.head.weight[:] = 0
    # All logits are equal: argmax takes the lowest allowed id.
    [completion] = engine.generate("x", GREEDY, stop_ids=[65], constraint=Constraint.regex("b*"))
    assert (completion.ids, completion.text, completion.finish_reason) == ((65,), "", "eos")
    [completion] = engine.generate("x", GREEDY, constraint=Constraint.regex("b{2}"))
    assert (completion.ids, completion.finish_reason) == ((98, 98), "stop")


def test_a_text_that_ends_by_its_length_is_not_complete():
    engine = make_engine(ByteTokenizer())
    sampling = GREEDY.model_copy(update={"max_new_tokens": 3})
    [completion] = engine.generate("x", sampling, constraint=Constraint.json_schema(SCHEMA))
    assert completion.finish_reason == "length"
    sampling = GREEDY.model_copy(update={"max_new_tokens": 2})
    [completion] = engine.generate("x", sampling, constraint=Constraint.regex("ab"))
    assert (completion.text, completion.finish_reason) == ("ab", "stop")


# --- errors ---


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (
            Constraint.json_schema("{"),
            "json_schema: not a supported JSON schema: Expecting property",
        ),
        (Constraint.json_schema("3"), "it must be an object in braces. Change it."),
        (Constraint.json_schema("[" * 100_000), "it is nested too deeply"),
        (Constraint.json_schema({"type": "foo"}), "not a supported JSON schema: Invalid type: foo"),
        (Constraint.json_schema({"enum": []}), "Unsatisfiable schema: anyOf is empty"),
        (Constraint.json_schema({"not": {}}), 'Unimplemented keys: ["not"]'),
        (Constraint.json_schema({"$ref": "http://localhost/x"}), "does not fetch resources"),
        (Constraint.json_schema({"allOf": [{"$ref": "#"}]}), "after 0 tokens, no token of the"),
        (Constraint.regex("["), "regex: not a supported regular expression: unclosed character"),
        (Constraint.regex("a(?=b)"), "look-around, including look-ahead and look-behind"),
        (Constraint.regex(r"\bx"), "regular expression: lookarounds not supported yet"),
        (Constraint.regex("x" * 300_000), "must have at most 262,144 characters, got 300,000"),
    ],
)
def test_an_invalid_or_impossible_constraint_is_one_line_and_adds_nothing(constraint, message):
    engine = make_engine(ByteTokenizer())
    with pytest.raises(UserError) as caught:
        engine.generate("x", GREEDY, constraint=constraint)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert not engine.is_busy


def product_of_choices(n: int) -> dict[str, object]:
    """2 ** n combinations."""
    choices = []
    for number in range(n):
        pair = [{"properties": {f"{name}{number}": {"const": 1}}} for name in "ab"]
        choices.append({"anyOf": pair})
    return {"allOf": choices}


@pytest.mark.slow
@pytest.mark.parametrize(
    "constraint",
    [
        Constraint.json_schema(product_of_choices(25)),
        Constraint.json_schema({"type": "integer", "multipleOf": 999_999_937}),
        Constraint.json_schema({"type": "string", "pattern": "(([a-z]{1,999}){1,999}){1,999}"}),
        Constraint.json_schema({"enum": [f"{n * 7919}" for n in range(20_000)]}),
        Constraint.regex("((a{1,999}){1,999}){1,999}"),
        Constraint.regex("(" * 5000 + "a" + ")" * 5000),
        Constraint.regex("(?s).*a.{2000}b.*c.{2000}"),
    ],
)
def test_a_constraint_that_explodes_takes_bounded_time(constraint):
    """It ends as an error of one line, or as a text; both within seconds."""
    engine = make_engine(ByteTokenizer())
    start = time.process_time()
    try:
        engine.generate("x", GREEDY, constraint=constraint)
    except UserError as error:
        assert re.search("too complex after|not a supported", str(error))
    assert time.process_time() - start < 20
    assert not engine.is_busy


def test_a_text_that_the_tokenizer_cannot_spell_ends_alone():
    """The vocabulary has no z: after "a" nothing can follow. Another text goes on to its end."""
    tokenizer = CharTokenizer("abc", unknown="error")
    engine = make_engine(tokenizer)
    prompt = engine.fit_prompt([0])
    impossible = engine.add(Request(prompt, GREEDY, constraint=Constraint.regex("az|bz")))
    possible = engine.add(Request(prompt, GREEDY, constraint=Constraint.regex("[abc]{9}")))
    events = []
    while engine.is_busy:
        events += engine.step()
    [error] = [event.error for event in events if event.number == impossible and event.error]
    assert str(error) == (
        "regex: after 1 tokens, no token of the tokenizer can follow. "
        "Change the constraint, or use a tokenizer that has all bytes."
    )
    assert [event.number for event in events].count(possible) == 9


def test_a_constraint_and_another_setting_can_leave_no_token():
    engine = make_engine(ByteTokenizer())
    sampling = GREEDY.model_copy(update={"no_repeat_ngram": 1})
    message = "^constraint: after 1 tokens, each allowed token is forbidden by another setting"
    with pytest.raises(UserError, match=message):
        engine.generate("x", sampling, constraint=Constraint.regex("aa"))


def test_beams_cannot_be_constrained():
    engine = make_engine(ByteTokenizer())
    sampling = GREEDY.model_copy(update={"n_beams": 2})
    message = r"^regex: not supported with beam search\. Set n_beams to 1\.$"
    with pytest.raises(UserError, match=message):
        engine.generate("x", sampling, constraint=Constraint.regex("a"))


def test_a_tokenizer_whose_tokens_depend_on_their_neighbors_is_refused():
    """CTC removes a token that repeats the one before it."""
    backend = Backend(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": 3}, "<unk>"))
    backend.decoder = decoders.CTC("<pad>", "|")
    backend.add_special_tokens(["<unk>", "</s>"])
    engine = make_engine(HFTokenizer(backend, eos="</s>", pad=None))
    with pytest.raises(UserError, match="^regex: not supported with this tokenizer: the text of"):
        engine.generate(engine.fit_prompt([2]), GREEDY, constraint=Constraint.regex("a"))


def test_without_llguidance_a_constraint_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = (
        r"^llguidance: this package is needed and is not installed\. pip install llguidance\.$"
    )
    with pytest.raises(UserError, match=message):
        make_engine(ByteTokenizer()).generate("x", GREEDY, constraint=Constraint.regex("a"))


def test_compiled_constraints_are_kept_up_to_a_number(monkeypatch):
    monkeypatch.setattr(constraint_module, "N_KEPT", 2)
    grammars = make_engine(ByteTokenizer()).grammars
    first = Constraint.regex("1")
    kept = grammars.compile(first)
    grammars.compile(Constraint.regex("2"))
    assert grammars.compile(Constraint.regex("1", "--regex")) is kept
    grammars.compile(Constraint.regex("3"))
    grammars.compile(Constraint.regex("4"))
    assert grammars.compile(first) is not kept
