"""Slots and deadlines: clients that leave, send slowly or read nothing (FAULTS I5-I9, I13-I15, I18)."""

import asyncio
import contextlib
import importlib.util
import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tinylm.generate.engine import Engine

PLAIN = "/v1/completions"
ASK = {"prompt": "ab", "temperature": 1.5, "seed": 7, "max_tokens": 60}


def head_and_body(body: dict, host: str = "localhost") -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {PLAIN} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    return head.encode() + data


def eventually(condition, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture
def slow_steps(monkeypatch):
    """Each step of an engine takes this long; its length is the number of steps."""
    steps: list[float] = []
    step = Engine.step

    def slow(self):
        steps.append(time.monotonic())
        time.sleep(0.02)
        return step(self)

    monkeypatch.setattr(Engine, "step", slow)
    return steps


@pytest.fixture(scope="module")
def base(run_server):
    """A server of 4 slots where 8 texts may wait."""
    with run_server("base", read_seconds=1.0, write_seconds=1.0) as running:
        running.post(PLAIN, ASK)  # loads the model
        yield running


def test_a_client_that_leaves_frees_its_slot(base, slow_steps):
    for after_first_token in (True, False) * 5:
        connection = base.connect()
        connection.sendall(head_and_body(ASK | {"stream": True}))
        if after_first_token:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        connection.close()
    assert eventually(lambda: base.worker.n_texts == 0 and not base.worker.engine.is_busy, 5)
    n_steps = len(slow_steps)
    time.sleep(0.1)
    assert len(slow_steps) == n_steps  # nothing is generated for nobody
    assert not base.worker._jobs


def test_a_client_that_leaves_before_its_whole_answer_frees_its_slot(base, slow_steps):
    connection = base.connect()
    connection.sendall(head_and_body(ASK))
    assert eventually(lambda: base.worker.engine.is_busy)
    connection.close()
    assert eventually(lambda: not base.worker.engine.is_busy, 0.5)


@pytest.mark.slow
def test_slow_senders_are_closed_and_others_are_answered(base):
    """200 half-sent heads or bodies; the deadline of the fixture is 1 second."""
    slow = []
    for number in range(200):
        connection = base.connect()
        whole = head_and_body(ASK)
        connection.sendall(whole[: 20 if number % 2 else -5])
        slow.append(connection)
    start = time.monotonic()
    assert base.request("GET", "/health").status == 200
    assert time.monotonic() - start < 10  # one after another they would take 200
    for connection in slow:
        connection.settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(100) == b""
        connection.close()
    assert eventually(lambda: len(base.server.server_state.connections) == 0)


@pytest.mark.slow
def test_a_byte_now_and_then_does_not_move_the_deadline(base):
    start = time.monotonic()
    with base.connect() as connection, contextlib.suppress(OSError):
        for byte in head_and_body(ASK):
            connection.sendall(bytes([byte]))
            time.sleep(0.1)
    assert time.monotonic() - start < 10  # all bytes take longer


def test_more_connections_than_the_limit_are_closed(run_server):
    with run_server("base", max_connections=5) as server:
        held = [server.connect() for _ in range(5)]
        assert eventually(lambda: len(server.server.server_state.connections) == 5)
        with server.connect() as sixth, contextlib.suppress(ConnectionResetError):
            assert sixth.recv(1) == b""
        for connection in held:
            connection.close()
        assert eventually(lambda: not server.server.server_state.connections)
        assert server.request("GET", "/health").status == 200


@pytest.mark.slow
def test_a_full_queue_is_503_with_retry_after(base, slow_steps):
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(base.post(PLAIN, ASK | {"max_tokens": 5})))
        for _ in range(40)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = [answer.status for answer in answers]
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= 12
    refused = next(answer for answer in answers if answer.status == 503)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json["error"]["type"] == "server_error"


@pytest.mark.slow
def test_a_generation_past_its_deadline_ends(run_server, slow_steps):
    with run_server("base", timeout=0.3) as server:
        server.post(PLAIN, ASK | {"max_tokens": 1})
        answer = server.post(PLAIN, ASK)
        assert (answer.status, answer.json["error"]["type"]) == (504, "server_error")
        streamed = server.post(PLAIN, ASK | {"stream": True})
        *_, error, done, rest = streamed.body.split(b"\n\n")
        assert "0.3 seconds" in json.loads(error.removeprefix(b"data: "))["error"]["message"]
        assert (done, rest) == (b"data: [DONE]", b"")
        assert eventually(lambda: not server.worker.engine.is_busy)


@pytest.mark.slow
@pytest.mark.parametrize("fails", ["error", "NaN"])
def test_an_error_of_the_model_is_an_event_and_the_server_lives(run_server, monkeypatch, fails):
    with run_server("base") as server:
        whole = server.post(PLAIN, ASK).json["choices"][0]["text"]
        model = server.worker.engine.model
        head, n_calls = model.head.forward, 0

        def broken(hidden):
            nonlocal n_calls
            n_calls += 1
            if n_calls == 4 and fails == "error":
                raise RuntimeError("secret of the model")
            return head(hidden) * (float("nan") if n_calls >= 4 else 1)

        # Without the copy of the weights that decoding uses otherwise.
        monkeypatch.setattr("tinylm.generate.decoding.lean_step", lambda model: None)
        server.worker.engine = server.worker._make_engine()
        monkeypatch.setattr(model.head, "forward", broken)
        answer = server.post(PLAIN, ASK | {"stream": True})
        *tokens, error, done, _ = answer.body.split(b"\n\n")
        assert (answer.status, done) == (200, b"data: [DONE]")
        assert 1 <= len(tokens) <= 3  # a token that is half a character has no event
        assert b"secret" not in error
        assert json.loads(error.removeprefix(b"data: "))["error"]["type"] == "server_error"
        monkeypatch.setattr(model.head, "forward", head)
        assert server.post(PLAIN, ASK).json["choices"][0]["text"] == whole


@pytest.mark.slow
def test_an_error_of_the_model_is_told_before_a_new_engine_is_made(run_server, monkeypatch):
    with run_server("base") as server:
        server.post(PLAIN, ASK | {"max_tokens": 1})
        make_engine, told = server.worker._make_engine, threading.Event()

        def make_when_told():
            assert told.wait(20)
            return make_engine()

        def fail(engine):
            raise RuntimeError

        monkeypatch.setattr(server.worker, "_make_engine", make_when_told)
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "step", fail)
            assert server.post(PLAIN, ASK).status == 500
        told.set()
        assert server.post(PLAIN, ASK).status == 200


def test_characters_are_whole_in_every_chunk(base, monkeypatch):
    """The model writes é and 😀 as single bytes; each appears in one chunk, and none as U+FFFD."""
    model = base.worker.engine.model
    wanted = [*"é😀é".encode(), 258]
    written = []

    def scripted(hidden):
        logits = torch.full((len(hidden), 260), -20.0)
        logits[:, wanted[len(written)]] = 20.0
        written.append(1)
        return logits

    monkeypatch.setattr("tinylm.generate.decoding.lean_step", lambda model: None)
    monkeypatch.setattr(base.worker, "engine", base.worker._make_engine())
    monkeypatch.setattr(model.head, "forward", scripted)
    answer = base.post(PLAIN, {"prompt": "x", "stream": True, "temperature": 0})
    events = [json.loads(line.removeprefix(b"data: ")) for line in answer.body.split(b"\n\n")[:-2]]
    assert [event["choices"][0]["text"] for event in events] == ["é", "😀", "é", ""]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_text_alone_and_under_load(base):
    alone = base.post(PLAIN, ASK).json["choices"][0]["text"]
    found: list[str] = []
    others = [ASK | {"seed": seed, "prompt": "x" * seed, "max_tokens": 20} for seed in range(1, 8)]

    def ask(body):
        choice = base.post(PLAIN, body).json["choices"][0]
        if body is ASK:
            found.append(choice["text"])

    threads = [threading.Thread(target=ask, args=(body,)) for body in (*others, ASK, ASK)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone, alone]


@pytest.mark.slow
def test_a_stopping_server_ends_running_texts_and_takes_no_new_ones(run_server, slow_steps):
    with run_server("base", grace=10) as server:
        server.post(PLAIN, ASK | {"max_tokens": 1})
        answers = []
        running = threading.Thread(
            target=lambda: answers.append(server.post(PLAIN, ASK | {"stream": True}))
        )
        running.start()
        assert eventually(lambda: server.worker.engine.is_busy)
        server.server.should_exit = True
        assert eventually(lambda: refuses(server))
        running.join()
        assert answers[0].body.endswith(b"data: [DONE]\n\n")
    assert not server.worker._thread.is_alive()


def refuses(server) -> bool:
    try:
        return server.request("GET", "/v1/models").status == 503
    except OSError:
        return True


@pytest.mark.slow
def test_texts_that_outlast_the_grace_are_ended(run_server, slow_steps):
    with run_server("base", grace=0.2) as server:
        server.post(PLAIN, ASK | {"max_tokens": 1})
        connection = server.connect()
        connection.sendall(head_and_body(ASK | {"stream": True}))
        assert connection.recv(10)
        server.stop()
        assert len(slow_steps) < 55  # of 62
        connection.close()


@pytest.mark.slow
def test_a_client_that_never_reads_is_closed_and_its_slot_freed(base, monkeypatch):
    """Its texts are made long, so that they fill the buffers of the sockets."""
    from tinylm.serve import responses

    monkeypatch.setattr(responses, "event", lambda content: b"data: " + b"x" * 2_000_000 + b"\n\n")
    connection = base.connect()
    connection.setsockopt(1, 8, 4096)  # SOL_SOCKET, SO_RCVBUF
    connection.sendall(head_and_body(ASK | {"stream": True, "n": 4}))
    assert eventually(lambda: base.worker.n_texts == 4)
    assert eventually(lambda: base.worker.n_texts == 0, 8)
    assert eventually(lambda: not base.server.server_state.connections)
    connection.close()


@pytest.fixture(scope="module")
def soak():
    """benchmarks/soak.py, loaded by path."""
    root = Path(__file__).parents[2]
    spec = importlib.util.spec_from_file_location("soak", root / "benchmarks" / "soak.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["soak"]


@pytest.mark.slow
def test_nothing_leaks_in_20_seconds_of_bad_clients(run_server, soak, monkeypatch):
    """Clients that leave, read slowly or not at all, send half a request or junk, storms of HEAD and
    Range, and models that take turns: no text, memory, thread, file or connection remains.

    They run in this process too. The deadline of the server is 1 second.
    """
    monkeypatch.setattr(soak, "CLOSED_AFTER", 5)
    with run_server("base", "chat", max_models=1, read_seconds=1.0, write_seconds=1.0) as server:
        found = soak.Soak(server.port, seed=0, models=("base", "chat"))

        async def let_loose():
            async with found.crowd(8):
                await asyncio.sleep(6)
                before = await soak.usage(os.getpid(), server.port)
                await asyncio.sleep(20)
            return before

        def is_quiet():
            return not server.server.server_state.connections and not any(
                served.worker.engine.is_busy for served in server.store.in_memory.values()
            )

        before = asyncio.run(let_loose())
        assert eventually(is_quiet, 20)
        after = asyncio.run(soak.usage(os.getpid(), server.port))
        assert soak.excess(before, after) == []
        assert found.problems == []
        assert len(found.texts) == 1  # of all good clients
        assert found.disconnects > 50
        assert {*found.counts} == {kind.__name__ for kind in (*soak.QUICK, *soak.SLOW)}
        assert server.store.n_users.total() == 0


def test_the_limits_of_the_soak_can_fail(soak):
    warm = soak.Usage(rss_mb=300, files=10, threads=7, texts=9)
    assert soak.excess(warm, soak.Usage(319, 12, 9, 0)) == []
    assert soak.excess(warm, soak.Usage(321, 13, 10, 1)) == [
        "rss_mb: 321, when warm 300, limit +20",
        "files: 13, when warm 10, limit +2",
        "threads: 10, when warm 7, limit +2",
        "texts: 1, when warm 0, limit +0",
    ]
