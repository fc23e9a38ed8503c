"""The real openai client, without retries: what programs that people use send and read."""

import openai
import pytest

ASK = {
    "model": "chat",
    "messages": [{"role": "user", "content": "Hi"}],
    "seed": 1,
    "max_tokens": 12,
}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def streamed(chunks) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["chat", "base"]
    assert client.models.retrieve("base").owned_by == "tinylm"


@pytest.mark.slow
def test_a_chat_is_answered_and_a_stream_has_the_same_text(client):
    answer = client.chat.completions.create(**ASK)
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert (answer.object, answer.model) == ("chat.completion", "chat")
    assert choice.finish_reason in ("stop", "length")
    assert 1 <= answer.usage.completion_tokens <= 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    options = {"include_usage": True}
    *chunks, last = client.chat.completions.create(**ASK, stream=True, stream_options=options)
    assert streamed(chunks) == choice.message.content
    assert chunks[-1].choices[0].finish_reason == choice.finish_reason
    assert (last.choices, last.usage) == ([], answer.usage)


def test_the_prompt_is_what_the_template_writes(client, server):
    """`### Instruction: Hi⏎### Output:` has 30 bytes."""
    answer = client.chat.completions.create(**ASK)
    assert answer.usage.prompt_tokens == len("### Instruction: Hi\n### Output:")
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    of_parts = ASK | {"messages": [{"role": "user", "content": parts}]}
    assert (
        client.chat.completions.create(**of_parts).choices[0].message == answer.choices[0].message
    )


def test_n_texts_are_those_of_seeds_and_samples_and_repeat(client):
    settings = {"model": "base", "prompt": "ab", "max_tokens": 10, "temperature": 1.5, "seed": 3}
    three = client.completions.create(**settings, n=3)
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    texts = [choice.text for choice in three.choices]
    assert len(set(texts)) == 3
    assert [c.text for c in client.completions.create(**settings, n=3).choices] == texts
    assert client.completions.create(**settings).choices[0].text == texts[0]


def test_a_list_of_prompts_ids_and_texts_give_the_same(client):
    settings = {"model": "base", "max_tokens": 8, "temperature": 0}
    texts = client.completions.create(prompt=["ab", "cd"], **settings)
    ids = client.completions.create(prompt=[[97, 98], [99, 100]], **settings)
    one = client.completions.create(prompt=[97, 98], **settings)
    assert [c.text for c in texts.choices] == [c.text for c in ids.choices]
    assert one.choices[0].text == texts.choices[0].text
    assert texts.usage.prompt_tokens == 4


def test_a_stop_string_ends_the_text_and_is_not_in_it(client):
    settings = {"model": "base", "prompt": "ab", "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(**settings).choices[0]
    stop = whole.text[2:4]
    cut = client.completions.create(**settings, stop=[stop]).choices[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"


def test_chat_logprobs_have_the_token_and_its_alternatives(client):
    settings = ASK | {"temperature": 0, "logprobs": True, "top_logprobs": 2}
    choice = client.chat.completions.create(**settings).choices[0]
    content = choice.logprobs.content
    assert (
        b"".join(bytes(entry.bytes) for entry in content).decode(errors="replace").strip()
        == choice.message.content
    )
    for entry in content:
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].logprob == entry.logprob  # greedy
    chunks = client.chat.completions.create(**settings, stream=True)
    found = [
        entry
        for chunk in chunks
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert found == content


def test_echo_has_the_log_probabilities_of_the_prompt(client):
    """Read as a prompt or generated, a token has the same log-probability."""
    settings = {"model": "base", "temperature": 0, "logprobs": 1}
    first = client.completions.create(prompt=[97, 98], max_tokens=3, **settings).choices[0]
    ids = [97, 98, *[ord(c) for c in first.text]] if first.text.isascii() else None
    given = ids or [97, 98, 99]
    echo = client.completions.create(prompt=given, max_tokens=1, echo=True, **settings).choices[0]
    assert len(echo.logprobs.tokens) == len(given) + 1
    assert echo.logprobs.token_logprobs[0] is None
    if ids:
        assert echo.logprobs.token_logprobs[2:-1] == pytest.approx(
            first.logprobs.token_logprobs, abs=1e-4
        )
    [streamed_echo, *_] = client.completions.create(
        prompt=given, max_tokens=1, echo=True, stream=True, **settings
    )
    assert streamed_echo.choices[0].text.startswith("ab")


def test_echo_without_new_tokens_scores_the_prompt(client):
    """The same values as with one new token, whose own entry is the last."""
    settings = {"model": "base", "prompt": ["ab", "cdé"], "logprobs": 2, "echo": True, "n": 2}
    scored = client.completions.create(**settings, max_tokens=0)
    one_more = client.completions.create(**settings, max_tokens=1)
    assert [choice.text for choice in scored.choices] == ["ab", "ab", "cdé", "cdé"]
    assert {choice.finish_reason for choice in scored.choices} == {"length"}
    assert (scored.usage.prompt_tokens, scored.usage.completion_tokens) == (6, 0)
    for choice, other in zip(scored.choices, one_more.choices, strict=True):
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert getattr(choice.logprobs, name) == getattr(other.logprobs, name)[:-1]
    chunks = list(client.completions.create(**settings, max_tokens=0, stream=True))
    assert [chunk.choices[0] for chunk in chunks] == scored.choices
    plain = client.completions.create(model="base", prompt="ab", echo=True, max_tokens=0)
    assert (plain.choices[0].text, plain.choices[0].logprobs) == ("ab", None)


def test_a_token_begins_at_its_character(client):
    """é is two tokens of one character, which begin where it does; <|eos|> has no character."""
    settings = {"model": "base", "echo": True, "logprobs": 0}
    choice = client.completions.create(**settings, prompt="é!é", max_tokens=2).choices[0]
    assert choice.logprobs.tokens[:2] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert choice.logprobs.text_offset[:6] == [0, 0, 1, 2, 2, 3]
    choice = client.completions.create(**settings, prompt=[258, 97, 258, 98], max_tokens=0)
    assert choice.choices[0].logprobs.text_offset == [0, 0, 1, 1]
    assert choice.choices[0].text == "ab"


def test_fields_of_the_api_that_change_nothing_are_accepted_and_logged_once(client, caplog):
    with caplog.at_level("INFO", logger="tinylm"):
        for _ in range(2):
            client.chat.completions.create(
                **ASK, user="secret-user", store=False, metadata={"a": "b"}
            )
    assert "secret-user" not in caplog.text
    assert caplog.text.count("the field user ") <= 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "none"}, openai.NotFoundError, "no such model"),
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"messages": [{"role": "user", "content": "a" * 200}]}, openai.BadRequestError, f"maximum context length is 96 tokens, but the prompt has {200 + 29}"),
        ({"model": "base"}, openai.BadRequestError, "base model"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens: Input should be greater"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools is not supported"),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "no parameter temprature"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, openai.BadRequestError, "second user turn"),
    ],
)  # fmt: skip
def test_errors_have_the_exception_classes_of_the_client(client, changes, error, message):
    with pytest.raises(error, match=message):
        client.chat.completions.create(**ASK | changes)


def test_tokenize_and_detokenize_are_inverse(server):
    answer = server.post("/tokenize", {"model": "base", "prompt": "é!"}).json
    assert answer == {"tokens": [0xC3, 0xA9, 0x21], "count": 3, "max_model_len": 96}
    assert server.post("/detokenize", {"model": "base", "tokens": answer["tokens"]}).json == {
        "prompt": "é!"
    }
    chat = server.post("/tokenize", {"model": "chat", "messages": ASK["messages"]}).json
    assert bytes(chat["tokens"]).decode() == "### Instruction: Hi\n### Output:"


def test_health_and_metrics(server):
    assert server.request("GET", "/health").json == {"status": "ok"}
    text = server.request("GET", "/metrics").body.decode()
    assert 'tinylm_requests_total{path="/health",status="200"}' in text
    assert "tinylm_generated_tokens_total" in text


def test_the_beginning_of_an_answer_is_continued(client, server):
    """As a plain completion of the ids of the conversation and of the beginning."""
    ask = {"model": "chat", "temperature": 0, "max_tokens": 6}
    question = {"role": "user", "content": "Hi"}
    begun = {"role": "assistant", "content": " ab"}
    ids = server.post("/tokenize", {"model": "chat", "messages": [question]}).json["tokens"]
    ids += server.post("/tokenize", {"model": "chat", "prompt": " ab"}).json["tokens"]
    plain = client.completions.create(**ask, prompt=ids, logprobs=0).choices[0].logprobs
    more = client.chat.completions.create(
        **ask,
        messages=[question, begun],
        logprobs=True,
        extra_body={"continue_final_message": True},
    )
    entries = more.choices[0].logprobs.content
    assert [entry.token for entry in entries] == plain.tokens
    with pytest.raises(openai.BadRequestError, match="must be from the user"):
        client.chat.completions.create(**ask, messages=[question, begun])
    with pytest.raises(openai.BadRequestError, match="must be from the assistant"):
        client.chat.completions.create(
            **ask, messages=[question], extra_body={"continue_final_message": True}
        )
