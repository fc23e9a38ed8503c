"""Generation: cache and full forward agree, stop strings are never shown, seeds repeat, beams find the best."""

import itertools
import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tinylm.common.errors import UserError
from tinylm.config.schema import ModelConfig, SamplingConfig
from tinylm.generate import decoding
from tinylm.generate.beam_search import beam_search
from tinylm.generate.engine import Engine
from tinylm.generate.output import Completion, Prompt, StopStringFilter, TokenOutput
from tinylm.generate.sampling import make_generator, next_token
from tinylm.generate.scoring import (
    ContinuationScore,
    ScoredToken,
    encode_continuation,
    score_continuations,
    score_prompts,
)
from tinylm.model.decoder import Decoder, Features
from tinylm.tokenizer.byte_char import ByteTokenizer, CharTokenizer

BYTES = ByteTokenizer()
OPTIONS = {
    "rope": {},
    "learned": {"position": "learned"},
    "alibi": {"position": "alibi"},
    "no positions": {"position": "none"},
    "window": {"sliding_window": 5},
    "alibi window": {"position": "alibi", "sliding_window": 5},
    "sinks": {"n_sinks": 2},
    "window and sinks": {"sliding_window": 5, "n_sinks": 2},
    "grouped queries": {"n_kv_heads": 1, "qk_norm": True},
    "post norm": {"norm_placement": "post", "norm": "layernorm", "bias": "all"},
    "bigrams": {"bigram_rows": 50},
    "experts": {"moe": {"n_experts": 4, "top_k": 2}},
}


def score_continuation(engine: Engine, prompt: str | Prompt, target: str) -> ContinuationScore:
    """The score of one target."""
    return score_continuations(engine, [encode_continuation(engine, prompt, target)])[0]


def make_model(seed: int = 0, **options: object) -> Decoder:
    """A tiny random decoder whose logits are too far apart for rounding to matter."""
    torch.manual_seed(seed)
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
        if model.config.bigram_rows:
            model.bigram_embedding.weight.normal_(std=0.02)  # zero in a new model
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(6)
        model.head.weight[BYTES.eos_id :] = (
            0  # with bytes, EOS has the logit 0 and a greedy text never ends by it
        )
    return model


def greedy(**settings: object) -> SamplingConfig:
    return SamplingConfig.model_validate({"temperature": 0, **settings})


@torch.no_grad()
def greedy_by_full_forward(
    model: Decoder, ids: Sequence[int], n: int, vocab_size: int
) -> list[int]:
    """Without a cache: the whole context again for each token; when it is full, its last half is kept."""
    visible, written = list(ids), []
    for _ in range(n):
        written.append(model(torch.tensor([visible]))[0, -1, :vocab_size].argmax().item())
        visible.append(written[-1])
        if len(visible) > model.config.max_seq_len:
            visible = visible[-max(1, model.config.max_seq_len // 2) :]
    return written


class Scripted(Decoder):
    """A model that generates the given ids after any prompt of one token."""

    def __init__(self, ids: Sequence[int]):
        super().__init__(
            ModelConfig(vocab_size=260, max_seq_len=len(ids) + 1, n_layers=1, d_model=8, n_heads=1)
        )
        self.script = nn.functional.one_hot(torch.tensor([*ids, 0]), 260) * 50.0
        self.head = nn.Identity()

    def features(self, input_ids, *, document_ids=None, cache=None):
        return Features(
            self.script[cache.advance(input_ids.size(1))].expand(input_ids.size(0), -1, -1),
            torch.zeros(()),
        )


def beams(
    engine: Engine, prompt: Prompt, sampling: SamplingConfig, *stop_ids: int
) -> Iterator[TokenOutput]:
    """Beam search also with one beam, for which `stream` decodes greedily."""
    end_ids = {engine.tokenizer.eos_id, *stop_ids}
    return beam_search(engine.model, engine.tokenizer, prompt, sampling, end_ids)


def scripted(ids: Sequence[int] | str) -> Engine:
    return Engine(Scripted(list(ids.encode()) if isinstance(ids, str) else ids).eval(), BYTES)


def write(ids: Sequence[int] | str, **settings: object) -> Completion:
    [completion] = scripted(ids).generate(
        "x",
        greedy(**{"max_new_tokens": len(ids.encode() if isinstance(ids, str) else ids)} | settings),
    )
    return completion


# --- the cache changes nothing --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_greedy_with_cache_equals_greedy_by_full_forward(options):
    """Beyond the context too: 10 tokens of prompt and 60 more in 48 positions make two context shifts."""
    model = make_model(**options)
    [completion] = Engine(model, BYTES).generate("a prompt..", greedy(max_new_tokens=60))
    expected = greedy_by_full_forward(model, b"a prompt..", 60, 260)
    assert (list(completion.ids), completion.finish_reason) == (expected, "length")
    assert len(set(expected)) > 5


@pytest.mark.parametrize(
    "options", [OPTIONS["window"], OPTIONS["window and sinks"], OPTIONS["alibi window"]], ids=str
)
def test_a_prompt_longer_than_the_ring_is_read_in_chunks(options):
    """Window 5 and chunks of 256 make a ring of 260 slots; the prompt has 600 tokens."""
    model = make_model(max_seq_len=1000, **options)
    prompt = "".join(chr(97 + i * i % 26) for i in range(600))
    [completion] = Engine(model, BYTES).generate(prompt, greedy(max_new_tokens=5))
    assert list(completion.ids) == greedy_by_full_forward(model, prompt.encode(), 5, 260)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [OPTIONS["rope"], OPTIONS["alibi window"], OPTIONS["window and sinks"], OPTIONS["experts"]],
    ids=str,
)
def test_half_precision_models_generate(dtype, options):
    model = make_model(**options).to(dtype)
    completions = Engine(model, BYTES).generate(
        "a prompt", SamplingConfig(max_new_tokens=60, n_samples=2, top_p=0.9, seed=1)
    )
    assert all(
        math.isfinite(completion.log_prob) and completion.log_prob < 0 for completion in completions
    )


def test_the_prompt_is_read_once_for_all_samples_and_only_last_positions_reach_the_head(
    monkeypatch,
):
    monkeypatch.setattr(decoding, "lean_step", lambda model: None)
    model = make_model()
    read, scored = [], []
    features, head = model.features, model.head.forward
    monkeypatch.setattr(
        model,
        "features",
        lambda ids, **more: read.append(tuple(ids.shape)) or features(ids, **more),
    )
    monkeypatch.setattr(
        model.head, "forward", lambda hidden: scored.append(tuple(hidden.shape)) or head(hidden)
    )
    Engine(model, BYTES).generate(
        "ten tokens", SamplingConfig(n_samples=3, max_new_tokens=5, seed=3)
    )
    assert read == [(1, 10), (3, 1), (3, 1), (3, 1), (3, 1)]
    assert scored == [(1, 32), (3, 32), (3, 32), (3, 32), (3, 32)]


def test_ids_beyond_the_tokenizer_are_never_written():
    """An embedding of 320 rows for 260 tokens, where the rows beyond would win."""
    model = make_model(vocab_size=320)
    with torch.no_grad():
        model.head.weight[260:] = 50 * model.head.weight[:60]
    for settings in ({}, {"n_beams": 3}, {"temperature": 2.0}):
        [completion] = Engine(model, BYTES).generate("a", greedy(max_new_tokens=20, **settings))
        assert max(completion.ids) < 260


# --- the context ----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [7, 8])
@pytest.mark.parametrize("position", ["rope", "learned", "alibi", "none"])
def test_generation_continues_beyond_the_last_position(position, length):
    """8 positions, 40 tokens: when they are in use, the last 4 tokens are read again from position 0."""
    model = make_model(max_seq_len=8, position=position)
    completions = Engine(model, BYTES).generate(
        "x" * length, greedy(max_new_tokens=40, n_samples=2)
    )
    expected = greedy_by_full_forward(model, b"x" * length, 40, 260)
    for completion in completions:
        assert (list(completion.ids), completion.finish_reason) == (expected, "length")


def test_a_context_of_one_position_works():
    model = make_model(max_seq_len=1)
    [completion] = Engine(model, BYTES).generate("abc", greedy(max_new_tokens=6))
    assert list(completion.ids) == greedy_by_full_forward(model, b"c", 6, 260)
    assert (completion.prompt_tokens, completion.truncated) == (1, 2)


def test_a_prompt_longer_than_the_context_keeps_its_last_tokens_and_counts_the_others():
    """50 tokens in 48 positions: the first 2 are cut off, and the text is that of the last 48."""
    engine = Engine(make_model(), BYTES)
    [long] = engine.generate("!?" + "b" * 48, greedy(max_new_tokens=3))
    [short] = engine.generate("b" * 48, greedy(max_new_tokens=3))
    assert (long.truncated, long.prompt_tokens, long.ids) == (2, 48, short.ids)
    assert short.truncated == 0


def test_an_empty_prompt_starts_from_eos():
    """EOS opens every document in training."""
    engine = Engine(make_model(), BYTES)
    assert engine.encode_prompt("") == Prompt((BYTES.eos_id,))
    assert engine.generate("", greedy(max_new_tokens=4)) == engine.generate(
        Prompt((BYTES.eos_id,)), greedy(max_new_tokens=4)
    )


def test_fit_prompt_is_for_callers_with_ids():
    assert Engine(make_model(), BYTES).fit_prompt(range(50)) == Prompt(tuple(range(2, 50)), 2)


# --- text output ----------------------------------------------------------------------------------


def test_a_character_of_many_tokens_is_shown_whole():
    """I15: 4-byte emoji, joiners, accents, byte by byte; no output contains U+FFFD, and the joined text is exact."""
    text = "héllo 👩‍👩‍👧 日本 🇺🇳."
    engine = scripted(text)
    outputs = list(engine.stream("x", greedy(max_new_tokens=len(text.encode()))))
    assert "".join(output.text for output in outputs) == text
    assert all("\ufffd" not in output.text for output in outputs)
    assert [output.text for output in outputs[:4]] == ["h", "", "é", "l"]


def test_a_character_cut_off_by_the_length_is_what_decode_gives():
    ids = list("a日".encode())[:3]
    assert write(ids).text == BYTES.decode(ids) == "a\ufffd"


@pytest.mark.parametrize(
    ("stops", "text", "reason"),
    [
        (["\n\n"], "one ##", "stop"),  # straddles two tokens
        (["##"], "one ", "stop"),
        (
            ["# #"],
            "one ##\n\ntwo###",
            "length",
        ),  # never comes; what was held back is shown at the end
        (["####"], "one ##\n\ntwo###", "length"),
        (["two", "###"], "one ##\n\n", "stop"),
        (["o"], "", "stop"),
        (["e ##\n\nt", "##\n\n"], "one ", "stop"),  # the one that is complete first ends the text
    ],
)
def test_a_stop_string_ends_the_text_and_is_not_part_of_it(stops, text, reason):
    completion = write("one ##\n\ntwo###", stop=stops)
    assert (completion.text, completion.finish_reason) == (text, reason)


def test_text_that_could_begin_a_stop_string_is_held_back():
    """Stop "##!" in "a##b##!": the first "##" is shown only with "b" after it, the second never."""
    outputs = list(scripted("a##b##!zzz").stream("x", greedy(max_new_tokens=10, stop=["##!"])))
    assert [output.text for output in outputs] == ["a", "", "", "##b", "", "", ""]
    assert [output.finish_reason for output in outputs] == [None] * 6 + ["stop"]


@pytest.mark.slow
@given(
    st.text("ab#", max_size=30),
    st.lists(st.text("ab#", min_size=1, max_size=4), max_size=3),
    st.data(),
)
def test_stopping_does_not_depend_on_how_the_text_is_cut(text, stops, data):
    """Oracle: the stop string whose last character comes first, the longest if several end there."""
    ends = [
        (end, -len(stop))
        for stop in stops
        for end in range(len(stop), len(text) + 1)
        if text[:end].endswith(stop)
    ]
    expected = text[: min(ends)[0] + min(ends)[1]] if ends else text
    stop_filter, shown, rest = StopStringFilter(stops), "", text
    while rest:
        n = data.draw(st.integers(1, len(rest)))
        shown, rest = shown + stop_filter.feed(rest[:n]), rest[n:]
        assert expected.startswith(shown)
    assert (shown + stop_filter.rest(), stop_filter.stopped) == (expected, bool(ends))


def test_the_stop_string_that_is_complete_first_counts_also_within_one_token():
    """Letter by letter "b" is complete before "ab#"; all at once it must be the same."""
    stop_filter = StopStringFilter(["ab#", "b"])
    assert (stop_filter.feed("ab#"), stop_filter.stopped) == ("a", True)


def test_eos_ends_the_text_and_is_not_shown():
    completion = write([*b"abc", BYTES.eos_id, *b"def"])
    assert (completion.text, completion.finish_reason, completion.ids) == (
        "abc",
        "eos",
        (*b"abc", BYTES.eos_id),
    )


def test_a_stop_id_ends_the_text_as_eos_does():
    """A stop token of a template is in the ids, is not shown, and ends the text; also in beam search."""
    engine, sampling = Engine(make_model(), BYTES), greedy(max_new_tokens=8)
    prompt = engine.encode_prompt("abc")
    [whole] = engine.generate(prompt, sampling)
    stop = next(id for id in whole.ids if id != whole.ids[0])
    n = whole.ids.index(stop) + 1
    [stopped] = engine.generate(prompt, sampling, stop_ids=[stop])
    searched = Completion.of(prompt, list(beams(engine, prompt, sampling, stop)))
    for found in (stopped, searched):
        assert (found.text, found.finish_reason, found.ids) == (
            BYTES.decode(whole.ids[: n - 1]),
            "eos",
            whole.ids[:n],
        )


def test_held_back_text_is_shown_at_eos():
    assert write([*b"ab#", BYTES.eos_id], stop=["##"]).text == "ab#"


def test_max_new_tokens_is_exact():
    completion = write("abcdef", max_new_tokens=4)
    assert (completion.text, completion.finish_reason, len(completion.ids)) == ("abcd", "length", 4)


def test_stream_and_generate_are_the_same_text():
    engine, sampling = (
        Engine(make_model(), BYTES),
        SamplingConfig(max_new_tokens=20, n_samples=3, stop=("e", "t"), seed=4),
    )
    outputs: list[list[TokenOutput]] = [[], [], []]
    for output in engine.stream("abc", sampling):
        outputs[output.sample].append(output)
    assert [
        Completion.of(engine.encode_prompt("abc"), of_sample) for of_sample in outputs
    ] == engine.generate("abc", sampling)


def test_log_prob_is_the_sum_over_the_tokens_of_a_full_forward():
    """Of the unmodified logits, although the token was drawn from modified ones."""
    model = make_model()
    [completion] = Engine(model, BYTES).generate(
        "abcd", SamplingConfig(max_new_tokens=12, temperature=2.0, top_k=7, repetition_penalty=1.5)
    )
    ids = torch.tensor([[*b"abcd", *completion.ids]])
    with torch.no_grad():
        log_probs = model(ids)[0, 3:-1].log_softmax(-1)
    assert completion.log_prob == pytest.approx(
        log_probs.gather(1, ids[0, 4:, None]).sum().item(), abs=1e-3
    )


def test_forbidden_ngrams_hold_for_prompt_and_text_and_across_a_context_shift():
    [completion] = Engine(make_model(max_seq_len=16), BYTES).generate(
        "abab", SamplingConfig(max_new_tokens=100, no_repeat_ngram=2, temperature=0.3)
    )
    ids = [*b"abab"[2:], *completion.ids]  # "abab" itself repeats "ab"
    pairs = list(itertools.pairwise(ids))
    assert len(pairs) == len(set(pairs)) > 30


# --- seeds ----------------------------------------------------------------------------------------


def ending_engine(seed: int = 0) -> Engine:
    """Four tokens, one of them EOS, so that samples end at different steps."""
    return Engine(
        make_model(seed, vocab_size=4, max_seq_len=32), CharTokenizer("ab", unknown="error")
    )


def test_the_same_seed_gives_the_same_text_alone_and_among_others():
    """I18: samples end and leave the batch at different steps, which must not change the draws of the others."""
    engine = ending_engine()
    settings = {"max_new_tokens": 30, "temperature": 3.0, "seed": 7}
    texts = {n: engine.generate("ab", SamplingConfig(n_samples=n, **settings)) for n in (1, 2, 12)}
    assert [c.ids for c in texts[12][:2]] == [c.ids for c in texts[2]]
    assert [c.ids for c in texts[2][:1]] == [c.ids for c in texts[1]]
    assert texts[12] == engine.generate("ab", SamplingConfig(n_samples=12, **settings))
    assert len({len(c.ids) for c in texts[12]}) > 2
    assert {c.finish_reason for c in texts[12]} >= {"eos"}


@torch.no_grad()
def test_each_sample_draws_from_its_own_stream_to_its_end():
    """Oracle: each sample alone, a full forward pass per token, with the generator of (seed, sample)."""
    engine, sampling = (
        ending_engine(),
        SamplingConfig(max_new_tokens=20, temperature=3.0, seed=7, n_samples=8),
    )
    for number, completion in enumerate(engine.generate("ab", sampling)):
        ids, generator = [0, 1], make_generator(7, number)
        while len(ids) < 22 and engine.tokenizer.eos_id not in ids:
            ids.append(
                next_token(
                    engine.model(torch.tensor([ids]))[:, -1],
                    torch.tensor([ids]),
                    sampling,
                    [generator],
                    len(ids) - 2,
                ).ids.item()
            )
        assert list(completion.ids) == ids[2:]


@torch.no_grad()
@pytest.mark.parametrize("n_beams", [1, 2])
def test_presence_and_frequency_count_the_generated_tokens_and_not_the_prompt(n_beams):
    """Greedy, by full forward passes and OpenAI's formula; the log-probabilities are of the softmax before it.
    Beams obey them too: no token comes as often as without them.
    """
    model = make_model()
    settings = {"presence_penalty": 1.5, "frequency_penalty": 2.0, "max_new_tokens": 20}
    ids, expected = list(b"abcabc"), []
    for _ in range(20):
        logits = model(torch.tensor([ids]))[0, -1]
        counts = torch.tensor(ids[6:], dtype=torch.long).bincount(minlength=260)
        penalized = logits - 1.5 * (counts > 0) - 2.0 * counts
        ids.append(penalized.argmax().item())
        expected.append(logits.log_softmax(-1)[ids[-1]].item())
    engine = Engine(model, BYTES)
    [found] = engine.generate("abcabc", greedy(n_beams=n_beams, **settings))
    if n_beams == 1:
        assert list(found.ids) == ids[6:]
        assert found.log_prob == pytest.approx(sum(expected), abs=1e-3)
    plain = engine.generate("abcabc", greedy(max_new_tokens=20, n_beams=n_beams))[0]
    assert max(map(found.ids.count, found.ids)) < max(map(plain.ids.count, plain.ids))


@pytest.mark.slow
def test_another_seed_gives_another_text():
    engine = Engine(make_model(), BYTES)
    texts = {
        engine.generate("ab", SamplingConfig(seed=seed, temperature=2.0))[0].ids
        for seed in range(5)
    }
    assert len(texts) == 5


def test_the_global_generator_is_not_used():
    """Sampling at a validation must not change training (FAULTS A7)."""
    engine, before = Engine(make_model(), BYTES), torch.get_rng_state()
    engine.generate("ab", SamplingConfig(max_new_tokens=5, n_samples=2))
    assert torch.equal(torch.get_rng_state(), before)


# --- beams ----------------------------------------------------------------------------------------


@torch.no_grad()
def best_by_exhaustion(
    engine: Engine, prompt: list[int], length: int, stop: str
) -> tuple[float, list[int]]:
    """The best of all texts of `length` tokens, or fewer with EOS or a stop string, by mean log-probability."""

    def end(text: tuple[int, ...]) -> int:
        return next(
            (
                n
                for n in range(1, length)
                if text[n - 1] == engine.tokenizer.eos_id
                or stop in engine.tokenizer.decode(text[:n])
            ),
            length,
        )

    scored = []
    for text in {text[: end(text)] for text in itertools.product(range(4), repeat=length)}:
        log_probs = engine.model(torch.tensor([[*prompt, *text]]))[
            0, len(prompt) - 1 : -1
        ].log_softmax(-1)
        scored.append((log_probs.gather(1, torch.tensor(text)[:, None]).mean().item(), list(text)))
    return max(scored)


@pytest.mark.slow
@pytest.mark.parametrize("stop", ["bb", "never"])
@pytest.mark.parametrize("seed", [1, 2, 5, 7, 9, 11])
def test_enough_beams_are_an_exhaustive_search(seed, stop):
    """A vocabulary of 4, at most 4 tokens: 1 + 3·(1 + 3·(1 + 3·4)) = 121 texts, so 121 beams never drop one."""
    engine = Engine(
        make_model(seed, vocab_size=4, max_seq_len=32), CharTokenizer("ab", unknown="error")
    )
    [found] = engine.generate("ab", SamplingConfig(n_beams=121, max_new_tokens=4, stop=(stop,)))
    score, text = best_by_exhaustion(engine, [0, 1], 4, stop)
    assert list(found.ids) == text
    assert found.log_prob / len(found.ids) == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_one_beam_is_greedy(seed):
    engine = Engine(
        make_model(seed, vocab_size=4, max_seq_len=16), CharTokenizer("ab", unknown="error")
    )
    prompt = engine.encode_prompt("ab")
    outputs = list(beams(engine, prompt, SamplingConfig(max_new_tokens=30, n_beams=1)))
    [expected] = engine.generate(prompt, greedy(max_new_tokens=30))
    assert Completion.of(prompt, outputs).ids == expected.ids
    assert Completion.of(prompt, outputs).log_prob == pytest.approx(expected.log_prob, abs=1e-3)


def test_beams_continue_beyond_the_context():
    [completion] = Engine(make_model(max_seq_len=12), BYTES).generate(
        "abc", SamplingConfig(n_beams=4, max_new_tokens=30)
    )
    assert (len(completion.ids), completion.finish_reason) == (30, "length")


def test_beams_obey_forbidden_ngrams():
    """Four tokens and none twice: "ab" is in the prompt, so only pad and EOS are left."""
    engine = ending_engine(seed=1)
    [free] = engine.generate("ab", SamplingConfig(n_beams=5, max_new_tokens=2))
    assert set(free.ids) == {0, 1}
    [completion] = engine.generate(
        "ab", SamplingConfig(n_beams=5, max_new_tokens=2, no_repeat_ngram=1)
    )
    assert set(completion.ids) <= {engine.tokenizer.pad_id, engine.tokenizer.eos_id}


# --- scoring --------------------------------------------------------------------------------------


def test_score_is_the_full_forward_read_by_hand():
    """Prompt "abc", target "de": the logits at "c" and "d" score the target, at "a" and "b" the prompt."""
    model = make_model()
    score = score_continuation(Engine(model, BYTES), "abc", "de")
    with torch.no_grad():
        log_probs = model(torch.tensor([list(b"abcde")]))[0].log_softmax(-1)
    expected = log_probs[2, ord("d")] + log_probs[3, ord("e")]
    assert score.log_prob == pytest.approx(expected.item(), abs=1e-4)
    assert score.ranks == (
        1 + (log_probs[2] > log_probs[2, ord("d")]).sum().item(),
        1 + (log_probs[3] > log_probs[3, ord("e")]).sum().item(),
    )
    assert score.prompt_perplexity == pytest.approx(
        math.exp(-(log_probs[0, ord("b")] + log_probs[1, ord("c")]).item() / 2), rel=1e-4
    )
    assert score.n_tokens == 2


def test_the_tokens_of_a_prompt_are_scored_as_by_a_direct_softmax():
    """Prompts of three lengths in one batch, one of them a single token, which nothing precedes."""
    model = make_model()
    engine = Engine(model, BYTES)
    texts = [b"abcde", b"x", b"fgh"]
    prompts = [Prompt(tuple(text)) for text in texts]
    for prompt, tokens in zip(
        prompts, score_prompts(engine, prompts, n_alternatives=3), strict=True
    ):
        assert tuple(token.token_id for token in tokens) == prompt.ids
        assert tokens[0] == ScoredToken(prompt.ids[0], None, ())
        with torch.no_grad():
            log_probs = model(torch.tensor([prompt.ids]))[0].log_softmax(-1)
        for token, row in zip(tokens[1:], log_probs[:-1], strict=True):
            best = row.topk(3)
            assert token.log_prob == pytest.approx(row[token.token_id].item(), abs=1e-4)
            assert [id for id, _ in token.alternatives] == best.indices.tolist()
            assert [value for _, value in token.alternatives] == pytest.approx(
                best.values.tolist(), abs=1e-4
            )
    whole = Prompt(tuple(b"x" * 48))  # as long as the context
    assert len(score_prompts(engine, [whole])[0]) == 48
    assert score_prompts(engine, [prompts[0]])[0][1].alternatives == ()


def test_only_the_greedy_text_is_a_greedy_match():
    engine = Engine(make_model(vocab_size=6), CharTokenizer("abcd", unknown="error"))
    with torch.no_grad():
        engine.model.head.weight[4:] = 0  # no pad and no EOS, which have no text to score
    [best] = engine.generate("abab", greedy(max_new_tokens=6))
    assert set(best.ids) <= {0, 1, 2, 3}
    assert score_continuation(engine, "abab", best.text).greedy_match
    assert score_continuation(engine, "abab", best.text).log_prob == pytest.approx(
        best.log_prob, abs=1e-3
    )
    other = best.text[:-1] + ("a" if best.text[-1] != "a" else "b")
    assert not score_continuation(engine, "abab", other).greedy_match


def test_of_equal_logits_the_lower_id_ranks_first_as_argmax_has_it():
    model = make_model()
    with torch.no_grad():
        model.head.weight.zero_()
    assert score_continuation(Engine(model, BYTES), "a", "\x00\x02").ranks == (1, 3)


def test_score_at_the_edges():
    """An empty prompt is EOS; one of a single token has no perplexity; a long one is cut to fit the target."""
    engine = Engine(make_model(), BYTES)
    assert score_continuation(engine, "", "ab").prompt_perplexity is None
    assert score_continuation(engine, "x" * 100 + "y" * 46, "abc").log_prob == pytest.approx(
        score_continuation(engine, "y" * 46, "abc").log_prob, abs=1e-4
    )
    assert score_continuation(engine, "x", "a" * 48).n_tokens == 48
    for target, n in (("", 0), ("a" * 49, 49)):
        with pytest.raises(
            UserError,
            match=rf"^target: must have 1 to 48 tokens, got {n}\. Change the target\.$",
        ):
            score_continuation(engine, "x", target)


# --- misuse ---------------------------------------------------------------------------------------


def test_a_model_in_training_mode_is_an_error():
    with pytest.raises(ValueError, match="training mode"):
        Engine(make_model().train(), BYTES).generate("a", greedy())


def test_a_tokenizer_larger_than_the_model_is_an_error():
    with pytest.raises(ValueError, match="the tokenizer has 260 tokens, but the model only 100"):
        Engine(make_model(vocab_size=100), BYTES)


@pytest.mark.parametrize("ids", [(), (1,) * 49])
def test_a_prompt_that_does_not_fit_is_an_error(ids):
    with pytest.raises(ValueError, match="use encode_prompt or fit_prompt"):
        Engine(make_model(), BYTES).generate(Prompt(ids), greedy())


@pytest.mark.parametrize("settings", [{}, {"n_beams": 2}])
def test_damaged_weights_are_an_error(settings):
    model = make_model()
    with torch.no_grad():
        model.embedding.weight[0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        Engine(model, BYTES).generate("a", greedy(**settings))
