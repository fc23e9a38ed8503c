"""The calculator over the API: the switch is in the checkpoint, results are part of the answer."""

import openai
import pytest

from tests.generate.test_tool_text import SCRIPT, TEXT, write_script


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, run_server):
    """A server with the scripted model, and its client; `### Instruction: x⏎### Output:` has 30
    bytes.
    """
    path = write_script(tmp_path_factory.mktemp("tools") / "final.ckpt", n_prompt=30)
    with (
        run_server(paths={"chat": path}) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


@pytest.mark.slow
def test_an_answer_has_the_results_and_usage_counts_them(client: openai.OpenAI) -> None:
    """Whole and streamed; the end of the answer is a token too."""
    ask = {"model": "chat", "messages": [{"role": "user", "content": "x"}], "temperature": 0}
    whole = client.chat.completions.create(**ask, logprobs=True, top_logprobs=1)
    assert whole.choices[0].message.content == TEXT.strip()
    assert whole.usage.completion_tokens == len(TEXT) + 1
    content = whole.choices[0].logprobs.content
    by_tool = [entry for entry in content if not entry.top_logprobs]
    assert "".join(entry.token for entry in by_tool) == "24>>error>>2.4>>"
    assert {entry.logprob for entry in by_tool} == {0}
    assert all(entry.logprob < 0 for entry in content if entry.top_logprobs)
    chunks = client.chat.completions.create(**ask, stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed == TEXT.strip()


@pytest.mark.slow
def test_a_plain_completion_has_them_too(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="chat", prompt="x" * 30, temperature=0, max_tokens=len(SCRIPT), logprobs=1
    )
    assert answer.choices[0].text == TEXT
    logprobs = answer.choices[0].logprobs
    assert logprobs.text_offset == list(range(len(TEXT)))
    assert [logprobs.token_logprobs[i] == 0 for i in range(12, 17)] == [
        False,
        True,
        True,
        True,
        True,
    ]
