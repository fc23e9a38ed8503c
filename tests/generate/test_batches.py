"""Texts of different prompts in one batch: each as if it were alone; with `deterministic` to the last bit."""

import random
from collections.abc import Iterator, Sequence

import pytest
import torch

from tinylm.common.errors import UserError
from tinylm.config.schema import ModelConfig, SamplingConfig
from tinylm.generate import decoding, lean_step
from tinylm.generate.engine import Engine, Request
from tinylm.generate.output import Prompt, TokenOutput
from tinylm.model.decoder import Decoder
from tinylm.tokenizer.byte_char import ByteTokenizer

BYTES = ByteTokenizer()
OPTIONS = {
    "rope": {},
    "learned": {"position": "learned"},
    "alibi": {"position": "alibi"},
    "no positions": {"position": "none"},
    "window": {"sliding_window": 5},
    "alibi window sinks": {"position": "alibi", "sliding_window": 5, "n_sinks": 2},
    "sinks": {"n_sinks": 2},
    "grouped queries": {"n_kv_heads": 1, "qk_norm": True},
    "post norm": {"norm_placement": "post", "norm": "layernorm", "bias": "all"},
    "experts": {"moe": {"n_experts": 4, "top_k": 2}},
}
ALL_OPTIONS = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def make_model(**options: object) -> Decoder:
    """A tiny random decoder whose texts do not repeat at once."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 260,
        "max_seq_len": 48,
        "n_layers": 2,
        "d_model": 32,
        "n_heads": 4,
        "tie_embeddings": False,
    } | options
    model = Decoder(ModelConfig.model_validate(shape)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(3)
    return model


def make_requests(engine: Engine, n: int, seed: int = 0) -> list[Request]:
    """Prompts of 1 to 40 bytes, some of which begin alike, and settings of every kind; texts of up to 30 tokens, so
    that some need a context shift in 48 positions.
    """
    chance = random.Random(seed)
    openings = ["", "", "the same ten bytes and more ", "the same ten words "]
    settings = [
        {"temperature": 0},
        {"temperature": 0, "repetition_penalty": 1.3},
        {"temperature": 1.0, "top_k": 9},
        {"temperature": 1.5, "top_p": 0.8, "no_repeat_ngram": 3},
        {"temperature": 0.7, "min_p": 0.01, "stop": ("e", "q")},
    ]
    requests = []
    for number in range(n):
        rest = "".join(chance.choices("abcdefgh", k=chance.randint(1, 12)))
        sampling = SamplingConfig(
            max_new_tokens=chance.randint(1, 30), seed=number, **chance.choice(settings)
        )
        prompt = engine.encode_prompt(chance.choice(openings) + rest)
        requests.append(Request(prompt, sampling, n_alternatives=2))
    return requests


def run_in_a_random_order(engine: Engine, requests: Sequence[Request], seed: int) -> list[list]:
    """The outputs of each request; they are added at random steps, between others that are canceled."""
    chance = random.Random(seed)
    waiting = list(enumerate(requests))
    chance.shuffle(waiting)
    outputs: list[list[TokenOutput]] = [[] for _ in requests]
    index_of: dict[int, int] = {}
    disturbing: list[int] = []
    while waiting or engine.is_busy:
        for _ in range(chance.randint(0, 2)):
            if waiting:
                index, request = waiting.pop()
                index_of[engine.add(request)] = index
        if chance.random() < 0.3 and waiting:
            disturbing.append(engine.add(chance.choice(requests)))
        if disturbing and (chance.random() < 0.2 or not waiting):
            engine.cancel(disturbing.pop())
        for event in engine.step():
            if event.number in index_of:
                outputs[index_of[event.number]].append(event.output)
    return outputs


def compare(found: Sequence[TokenOutput], expected: Sequence[TokenOutput]) -> Iterator[bool]:
    """Per step whether the two best log-probabilities are more than 1e-3 apart; there the tokens must be equal, and
    everywhere the best log-probabilities within 1e-4. Ends where the texts may differ.
    """
    for one, other in zip(found, expected, strict=False):
        (best, first), (_, second) = other.alternatives
        assert one.alternatives[0][1] == pytest.approx(first, abs=1e-4)
        is_apart = first - second > 1e-3
        yield is_apart
        if one.token_id != other.token_id:
            assert not is_apart
            return
    assert len(found) == len(expected)


@pytest.mark.slow
@ALL_OPTIONS
def test_rows_of_a_batch_are_as_each_alone(options, capsys):
    """12 texts that join and leave 3 slots at random steps, beside each in an engine of its own. The sampled ones too:
    a draw depends on seed and sample only, and differences of 1e-4 in a probability change no token here.
    """
    model = make_model(**options)
    requests = make_requests(Engine(model, BYTES), 12)
    found = run_in_a_random_order(Engine(model, BYTES, slots=3), requests, seed=1)
    steps: list[bool] = []
    for request, outputs in zip(requests, found, strict=True):
        [expected] = Engine(model, BYTES, slots=1).run([request])
        steps += compare(outputs, expected)
    with capsys.disabled():
        print(f" {sum(steps)} of {len(steps)} steps compared", end="")
    assert sum(steps) > 80


@pytest.mark.slow
@ALL_OPTIONS
def test_deterministic_texts_are_equal_to_the_last_bit_whatever_is_beside_and_before_them(
    options, monkeypatch
):
    """Tokens, log-probabilities and alternatives, in two random orders and alone; with prefixes that are copied."""
    monkeypatch.setattr(decoding, "PREFILL_CHUNK", 8)
    monkeypatch.setattr(lean_step, "LENGTH_MULTIPLE", 8)  # several groups of rows in a step
    model = make_model(**options)
    requests = make_requests(Engine(model, BYTES), 8)
    engine = Engine(model, BYTES, slots=4, deterministic=True)
    first = run_in_a_random_order(engine, requests, seed=1)
    second = run_in_a_random_order(engine, requests, seed=2)  # after the others: prefixes remain
    for request, one, other in zip(requests, first, second, strict=True):
        [alone] = Engine(model, BYTES, slots=4, deterministic=True).run([request])
        assert one == other == alone


@pytest.mark.slow
def test_without_it_they_are_not_equal_to_the_last_bit():
    """So that the test above can fail."""
    model = make_model()
    requests = make_requests(Engine(model, BYTES), 8)
    found = run_in_a_random_order(Engine(model, BYTES, slots=4), requests, seed=1)
    alone = [next(Engine(model, BYTES, slots=4).run([request])) for request in requests]
    assert found != alone


def test_the_texts_of_a_run_come_in_the_order_of_their_requests():
    """More than there are slots, of very different lengths, one of them by beam search."""
    engine = Engine(make_model(), BYTES, slots=2)
    requests = []
    for number, length in enumerate([20, 1, 7, 3, 12]):
        sampling = SamplingConfig(max_new_tokens=length, seed=5, n_beams=1 + (number == 3))
        requests.append(Request(engine.encode_prompt(f"text {number}"), sampling, sample=2))
    found = list(engine.complete(requests))
    for request, completion in zip(requests, found, strict=True):
        n_samples = 3 if request.sampling.n_beams == 1 else 1
        samples = request.sampling.model_copy(update={"n_samples": n_samples})
        expected = engine.generate(request.prompt, samples)[-1]
        assert (completion.ids, completion.text) == (expected.ids, expected.text)


# --- prefixes ---


def ids_read(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all ids that the model reads from now on, without its lean step."""
    read: list[tuple[int, ...]] = []
    monkeypatch.setattr(decoding, "lean_step", lambda model: None)
    features = model.features
    monkeypatch.setattr(
        model,
        "features",
        lambda ids, **more: read.append(tuple(ids.shape)) or features(ids, **more),
    )
    return read


def test_a_prompt_that_begins_as_an_earlier_text_is_read_from_where_it_differs(monkeypatch):
    """The answer is part of the text: of the next turn, only its last token, which was never read, and what follows."""
    model = make_model()
    engine, read = Engine(model, BYTES), ids_read(model, monkeypatch)
    sampling = SamplingConfig(temperature=0, max_new_tokens=4)
    [answer] = engine.generate("a question, ", sampling)
    read.clear()
    turn = engine.fit_prompt([*b"a question, ", *answer.ids, *b"and one more"])
    [found] = engine.generate(turn, sampling)
    assert read == [(1, 13), (1, 1), (1, 1), (1, 1)]
    assert found.ids == Engine(model, BYTES).generate(turn, sampling)[0].ids


def test_a_text_that_is_still_running_lends_its_prefix_too(monkeypatch):
    model = make_model()
    engine, read = Engine(model, BYTES), ids_read(model, monkeypatch)
    sampling = SamplingConfig(temperature=0, max_new_tokens=3)
    prompts = [engine.encode_prompt(f"the same example, {word}") for word in ("red", "blue")]
    found = list(engine.run([Request(prompt, sampling) for prompt in prompts]))
    assert read == [(1, 21), (1, 4), (2, 1), (2, 1)]
    for prompt, outputs in zip(prompts, found, strict=True):
        [expected] = Engine(model, BYTES).run([Request(prompt, sampling)])
        assert [one.token_id for one in outputs] == [one.token_id for one in expected]


def test_a_model_that_was_trained_in_between_reads_everything_again(monkeypatch):
    model = make_model()
    engine, read = Engine(model, BYTES), ids_read(model, monkeypatch)
    sampling = SamplingConfig(temperature=0, max_new_tokens=2)
    engine.generate("a long prompt", sampling)
    with torch.no_grad():
        model.blocks[0].ffn.up.weight.mul_(2)
    read.clear()
    again = engine.generate("a long prompt", sampling)
    assert read == [(1, 13), (1, 1)]
    assert again == Engine(model, BYTES).generate("a long prompt", sampling)


# --- one text of many ---


def test_a_canceled_text_frees_its_slot_at_once():
    engine = Engine(make_model(), BYTES, slots=1)
    sampling = SamplingConfig(temperature=0, max_new_tokens=5)
    one, other, third = (engine.add(Request(engine.encode_prompt(p), sampling)) for p in "abc")
    assert [event.number for event in engine.step()] == [one]
    engine.cancel(one)
    engine.cancel(third)  # still waiting
    events = []
    while engine.is_busy:
        events += engine.step()
    assert [event.number for event in events] == [other] * 5
    engine.cancel(other)  # has ended: nothing happens
    assert not engine.is_busy


def test_a_first_token_does_not_wait_for_the_prompts_of_other_texts():
    """Each waiting prompt is read in a step of its own, which gives its first token; then, or when no
    slot is free, a step gives a token of every running text.
    """
    engine = Engine(make_model(), BYTES, slots=2)
    lengths = {"abc": 3, "xyz": 2, "later": 2}
    one, other, third = (
        engine.add(Request(engine.encode_prompt(text), SamplingConfig(max_new_tokens=n)))
        for text, n in lengths.items()
    )
    steps = []
    while engine.is_busy:
        steps.append([event.number for event in engine.step()])
    assert steps == [[one], [other], [one, other], [third], [one, third]]


def test_texts_with_one_prompt_begin_in_one_step_as_far_as_there_are_slots(monkeypatch):
    """The prompt is read once, also for the text that waits for a slot."""
    model = make_model()
    engine, read = Engine(model, BYTES, slots=3), ids_read(model, monkeypatch)
    for text in ("abc", "abc", "abc", "abc", "xyz"):
        engine.add(Request(engine.encode_prompt(text), SamplingConfig(max_new_tokens=2)))
    steps = []
    while engine.is_busy:
        steps.append([event.number for event in engine.step()])
    assert steps == [[1, 2, 3], [1, 2, 3], [4], [5], [4, 5]]
    assert [shape for shape in read if shape[1] > 1] == [(1, 3), (1, 3)]


def test_an_error_in_a_text_that_begins_leaves_those_that_began_before_it(monkeypatch):
    """Three texts with one prompt, of which the second one cannot begin and is lost."""
    engine = Engine(make_model(), BYTES, slots=3)
    request = Request(engine.encode_prompt("abc"), SamplingConfig(max_new_tokens=2, seed=5))
    alone = [output.token_id for output in next(engine.run([request]))]
    start, calls = decoding.DecodingBatch.start, []

    def start_or_fail(self, *args):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        return start(self, *args)

    monkeypatch.setattr(decoding.DecodingBatch, "start", start_or_fail)
    numbers = [engine.add(request) for _ in range(3)]
    with pytest.raises(MemoryError):
        engine.step()
    found = []
    while engine.is_busy:
        found += [(event.number, event.output.token_id) for event in engine.step()]
    first, third = ([token for n, token in found if n == number] for number in numbers[::2])
    assert first == third == alone
    assert len(found) == 4


def test_a_prompt_that_does_not_fit_is_refused_before_it_waits():
    """So that it cannot end a step in which others are decoded."""
    engine = Engine(make_model(), BYTES)
    with pytest.raises(ValueError, match="a prompt must have 1 to 48 tokens, got 49"):
        engine.add(Request(Prompt((1,) * 49), SamplingConfig()))
    assert not engine.is_busy


@pytest.mark.slow
def test_an_error_in_one_text_does_not_end_the_others():
    """A vocabulary of 260 and no token twice, EOS neither, which is in the prompt: after 260 tokens none is left."""
    engine = Engine(make_model(), BYTES)
    prompt = engine.fit_prompt([BYTES.eos_id, *b"a"])
    long = SamplingConfig(max_new_tokens=300, no_repeat_ngram=1)
    impossible = engine.add(Request(prompt, long))
    possible = engine.add(Request(prompt, SamplingConfig(temperature=0, max_new_tokens=280)))
    events = []
    while engine.is_busy:
        events += engine.step()
    [(number, error)] = [(event.number, event.error) for event in events if event.error]
    assert number == impossible
    assert str(error).startswith("no_repeat_ngram: 1 leaves no possible token after 260 tokens.")
    assert [event.number for event in events].count(possible) == 280
    with pytest.raises(UserError, match=r"^no_repeat_ngram: 1 leaves no possible token"):
        list(engine.run([Request(prompt, long)]))
    assert not engine.is_busy


def test_two_streams_of_one_engine_take_turns():
    engine = Engine(make_model(), BYTES)
    sampling = SamplingConfig(max_new_tokens=6)
    one, other = engine.stream("abc", sampling), engine.stream("xyz", sampling)
    mixed = [next(stream) for _ in range(6) for stream in (one, other)]
    assert (list(one), list(other)) == ([], [])
    for prompt, outputs in (("abc", mixed[::2]), ("xyz", mixed[1::2])):
        expected = [one.token_id for one in Engine(make_model(), BYTES).stream(prompt, sampling)]
        assert [output.token_id for output in outputs] == expected


def test_alternatives_are_the_most_probable_tokens_before_penalties_and_filters():
    model = make_model()
    engine = Engine(model, BYTES)
    sampling = SamplingConfig(max_new_tokens=1, temperature=2.0, repetition_penalty=2.0)
    [[output]] = engine.run([Request(engine.encode_prompt("abc"), sampling, n_alternatives=3)])
    with torch.no_grad():
        best = model(torch.tensor([list(b"abc")]))[0, -1].log_softmax(-1).topk(3)
    assert [id for id, _ in output.alternatives] == best.indices.tolist()
    expected = pytest.approx(best.values.tolist(), abs=1e-4)
    assert [log_prob for _, log_prob in output.alternatives] == expected


def test_more_texts_than_slots_are_an_error_of_the_caller():
    batch = decoding.DecodingBatch(make_model(), slots=1, vocab_size=260)
    with torch.inference_mode():
        batch.start([1, 2], 5)
        with pytest.raises(ValueError, match="all 1 slots are in use; finish a text first"):
            batch.start([3], 5)
