"""The models of a folder, what each of them answers with, and texts that must be JSON."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch

from tinylm.common.errors import UserError
from tinylm.serve.models import EngineSettings, find_models, load_served
from tinylm.serve.worker import EngineWorker

PLAIN, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def folder(tmp_path, save_model):
    """Two runs, one of which has not ended."""
    save_model(tmp_path / "a" / "final.ckpt", seed=1)
    save_model(tmp_path / "deep" / "b" / "step-000001.ckpt", seed=2, stage="pretrain")
    return tmp_path


def test_the_models_of_a_folder_have_the_names_of_their_runs(folder, tmp_path):
    assert find_models(folder) == {
        "a": folder / "a" / "final.ckpt",
        "deep/b": folder / "deep" / "b" / "step-000001.ckpt",
    }
    assert list(find_models(folder / "a")) == ["a"]
    assert list(find_models(folder / "a" / "final.ckpt")) == ["a"]
    assert list(find_models(folder / "deep" / "b" / "step-000001.ckpt")) == ["step-000001"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="contains no language model"):
        find_models(tmp_path / "empty")
    with pytest.raises(UserError, match="no such file or folder"):
        find_models(tmp_path / "none")


def test_a_file_of_no_run_is_a_model_by_its_own_name(folder, save_model, caplog):
    """So are imported models beside runs; a damaged one is skipped with a line."""
    gpt2 = save_model(folder / "gpt2.ckpt", seed=3)
    inner = save_model(folder / "a" / "copy.ckpt", seed=4)
    (folder / "torn.ckpt").write_bytes(gpt2.read_bytes()[:-1])
    found = find_models(folder)
    assert found.keys() == {"a", "a/copy", "deep/b", "gpt2"}
    assert (found["gpt2"], found["a/copy"]) == (gpt2, inner)
    assert "skipped: " in caplog.text and "torn.ckpt" in caplog.text


def test_a_damaged_checkpoint_is_an_error_of_one_model_only(run_server, folder, caplog):
    paths = find_models(folder)
    with run_server(paths=paths, max_models=2) as server:
        content = bytearray(paths["a"].read_bytes())
        content[len(content) // 2] ^= 1
        paths["a"].write_bytes(content)
        answer = server.post(PLAIN, {"model": "a", "prompt": "x"})
        assert answer.status == 500
        assert str(folder) not in answer.json["error"]["message"]
        assert server.post(PLAIN, {"model": "deep/b", "prompt": "x"}).status == 200


def test_of_a_run_that_replaced_its_checkpoint_the_newest_is_loaded(tmp_path, save_model):
    old = save_model(tmp_path / "run" / "step-000001.ckpt")
    [path] = find_models(tmp_path).values()
    new = save_model(tmp_path / "run" / "step-000002.ckpt", seed=1)
    old.unlink()
    assert path == old
    assert load_served(path, EngineSettings()).info.path == new


@pytest.mark.slow
def test_the_model_that_was_not_used_for_longest_leaves_the_memory(run_server, model_files):
    paths = model_files | {"third": model_files["base"]}
    with run_server(paths=paths, max_models=2) as server:
        for name in ("base", "chat", "base", "third"):
            assert server.post(PLAIN, {"model": name, "prompt": "x"}).status == 200
        assert list(server.store.in_memory) == ["base", "third"]
        assert sum(thread.name == "engine" for thread in threading.enumerate()) <= 3
        assert server.post(PLAIN, {"prompt": "x"}).status == 404  # which of the three?


def test_a_model_in_use_stays_in_memory(run_server):
    with run_server("chat", "base", max_models=1) as server:
        server.post(PLAIN, {"model": "base", "prompt": "x"})
        server.store.n_users["base"] += 1  # as a stream that has not ended
        answer = server.post(PLAIN, {"model": "chat", "prompt": "x"})
        assert (answer.status, "retry-after" in answer.headers) == (503, True)
        server.store.n_users["base"] -= 1
        assert server.post(PLAIN, {"model": "chat", "prompt": "x"}).status == 200


@pytest.fixture
def slow_loading(monkeypatch):
    """A model is loaded when `go` is set; `begun` has the path of each loading."""
    begun, go = [], threading.Event()

    def load(path, settings):
        begun.append(path)
        assert go.wait(20)
        return load_served(path, settings)

    monkeypatch.setattr("tinylm.serve.models.load_served", load)
    yield begun, go
    go.set()


def test_a_model_that_is_being_loaded_does_not_make_others_wait(run_server, slow_loading):
    begun, go = slow_loading
    with run_server("chat", "base", max_models=2) as server:
        go.set()
        server.post(PLAIN, {"model": "base", "prompt": "x"})
        go.clear()
        statuses = []
        ask = {"model": "chat", "prompt": "x"}
        waiting = [
            threading.Thread(target=lambda: statuses.append(server.post(PLAIN, ask).status))
            for _ in range(2)
        ]
        for thread in waiting:
            thread.start()
        while len(begun) < 2:
            time.sleep(0.01)
        assert server.post(PLAIN, {"model": "base", "prompt": "x"}).status == 200
        assert statuses == []
        go.set()
        for thread in waiting:
            thread.join()
        assert statuses == [200, 200]
        assert len(begun) == 2
        assert server.store.n_users.total() == 0


def test_clients_that_leave_while_a_model_is_loaded_have_it_loaded_once(run_server, slow_loading):
    begun, go = slow_loading
    with run_server("base") as server:
        data = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
        head = f"POST {PLAIN} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        for _ in range(5):
            with server.connect() as connection:
                connection.sendall(head.encode() + data)
                while not server.store.n_users["base"]:
                    time.sleep(0.01)
            while server.store.n_users["base"]:
                time.sleep(0.01)
        go.set()
        assert server.post(PLAIN, {"prompt": "x"}).status == 200
        assert len(begun) == 1


def test_the_system_text_of_the_rows_is_used_unless_there_is_another(
    run_server, save_model, tmp_path
):
    path = save_model(tmp_path / "final.ckpt", system="Be brief.")
    with run_server(paths={"m": path}) as server:

        def text(messages: list) -> str:
            return bytes(server.post("/tokenize", {"messages": messages}).json["tokens"]).decode()

        rest = "### Instruction: Hi\n### Output:"
        assert text(HI) == f"### System: Be brief.\n{rest}"
        assert (
            text([{"role": "developer", "content": "Shout."}, *HI]) == f"### System: Shout.\n{rest}"
        )


def test_a_stop_token_of_the_template_ends_an_answer(run_server, monkeypatch):
    """`<|sep|>`, 259, ends an answer of the template instruction."""
    with run_server("chat") as server:
        server.post(CHAT, {"messages": HI, "max_tokens": 1})
        model, wanted = server.worker.engine.model, iter([*b" ok\n", 259])

        def scripted(hidden):
            logits = torch.full((len(hidden), 260), -20.0)
            logits[:, next(wanted)] = 20.0
            return logits

        monkeypatch.setattr("tinylm.generate.decoding.lean_step", lambda model: None)
        server.worker.engine = server.worker._make_engine()
        monkeypatch.setattr(model.head, "forward", scripted)
        answer = server.post(CHAT, {"messages": HI, "temperature": 0}).json
    assert answer["choices"][0]["message"]["content"] == "ok"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 5


def test_a_text_is_valid_by_its_schema(server):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"], "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    body = {"model": "chat", "messages": HI, "seed": 1, "max_tokens": 60, "response_format": form}
    answer = server.post(CHAT, body).json["choices"][0]
    assert answer["finish_reason"] == "stop"
    assert isinstance(json.loads(answer["message"]["content"])["n"], int)


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "nonsense"}}},
        {"type": "xml"},
    ],
)
def test_a_wrong_response_format_is_an_error_that_names_it(server, form):
    body = {"model": "chat", "messages": HI, "response_format": form}
    error = server.post(CHAT, body)
    assert (error.status, error.json["error"]["param"].split(".")[0]) == (400, "response_format")


def test_an_adapter_is_served_with_its_base(run_server):
    """The committed checkpoint of an adapter, whose base lies beside it."""
    folder = Path(__file__).parents[1] / "checkpoint" / "data" / "schema1"
    with run_server(
        paths={"lora": folder / "lora.ckpt", "base": folder / "pretrain.ckpt"}
    ) as server:
        for name in ("lora", "base"):
            answer = server.post(PLAIN, {"model": name, "prompt": "a", "seed": 1, "max_tokens": 4})
            assert (answer.status, answer.json["model"]) == (200, name)
        assert server.post(CHAT, {"model": "lora", "messages": HI, "max_tokens": 4}).status == 200


def test_a_thread_survives_a_text_that_cannot_be_added(run_server, monkeypatch):
    with run_server("base") as server:
        server.post(PLAIN, {"prompt": "a", "max_tokens": 1})
        engine = server.worker.engine

        def fail(request):
            raise ValueError("secret")

        monkeypatch.setattr(engine, "add", fail)
        answer = server.post(PLAIN, {"prompt": "a"})
        assert (answer.status, b"secret" in answer.body) == (500, False)
        monkeypatch.undo()
        assert server.post(PLAIN, {"prompt": "a"}).status == 200
        assert server.worker.n_texts == 0


def test_a_text_that_ended_keeps_no_number(run_server, monkeypatch):
    """After an error a new engine counts from 1 again; to cancel an old number would end its text."""
    jobs = []
    add = EngineWorker._add

    def remember(worker, job):
        jobs.append(job)
        add(worker, job)

    monkeypatch.setattr(EngineWorker, "_add", remember)
    with run_server("base") as server:
        server.post(PLAIN, {"prompt": "a", "max_tokens": 2, "n": 2})
    assert [job.numbers for job in jobs] == [{}]
