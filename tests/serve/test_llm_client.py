"""The `llm` command (https://llm.datasette.io), which people chat with, talks to the server."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("llm", reason="needs llm (requirements-dev.txt)")
QUESTION = "Hi"
SETTINGS = {"temperature": 0, "seed": 1, "max_tokens": 12}
# One model that the server has, and one that it does not have.
MODELS = """
- {{model_id: ours, model_name: chat, api_base: "{url}/v1"}}
- {{model_id: other, model_name: missing, api_base: "{url}/v1"}}
"""


@pytest.fixture
def ask(server, tmp_path):
    """Runs `llm` with a folder of settings of its own."""
    models = tmp_path / "extra-openai-models.yaml"
    models.write_text(MODELS.format(url=server.url), encoding="utf-8")
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        options = [word for name in SETTINGS for word in ("-o", name, str(SETTINGS[name]))]
        command = [sys.executable, "-m", "llm", "prompt", *arguments, *options]
        return subprocess.run(
            command, env=environment, input="", capture_output=True, text=True, check=False
        )

    return run


@pytest.mark.slow
def test_the_llm_command_chats_and_streams(server, ask):
    """Both texts are the answer to the same request over plain HTTP."""
    messages = [{"role": "user", "content": QUESTION}]
    body = {"model": "chat", "messages": messages} | SETTINGS
    expected = server.post("/v1/chat/completions", body).json["choices"][0]["message"]["content"]
    assert expected
    for arguments in (["--no-stream"], []):
        done = ask("-m", "ours", *arguments, QUESTION)
        assert (done.returncode, done.stdout) == (0, expected + "\n"), done.stderr


@pytest.mark.slow
def test_the_llm_command_shows_the_message_of_an_error(ask):
    done = ask("-m", "other", QUESTION)
    assert done.returncode == 1
    assert "There is no such model; GET /v1/models lists them." in done.stderr
    done = ask("-m", "ours", "a" * 200)
    assert done.returncode == 1
    assert "maximum context length is 96 tokens, but the prompt has" in done.stderr
