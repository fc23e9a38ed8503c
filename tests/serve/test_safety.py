"""Requests that must not harm: junk bodies, foreign sites, missing keys, paths (FAULTS I1-I4, I10, I11, I17)."""

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from starlette.routing import Route

from tinylm.common.errors import UserError
from tinylm.serve.app import make_app
from tinylm.serve.body import parse_body
from tinylm.serve.errors import ApiError
from tinylm.serve.pages import FILES
from tinylm.serve.schema import ChatRequest, CompletionRequest, DetokenizeRequest
from tinylm.serve.security import Rules, known_hosts, read_keys, read_origins

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
GOOD = {"model": "base", "prompt": "ab", "max_tokens": 2}
KEY = b"0123456789abcdef-key"


def assert_still_answers(server) -> None:
    assert server.post(PLAIN, GOOD).status == 200


def n_generated(server) -> int:
    text = server.request("GET", "/metrics").body.decode()
    return int(float(re.search(r"^tinylm_generated_tokens_total (\S+)", text, re.M)[1]))


# --- I1: bodies ---

JUNK = {
    "empty": (b"", "empty"),
    "not JSON": (b"{", "not JSON"),
    "no object": (b"[1]", "JSON object"),
    "NaN": (b'{"temperature": NaN}', "NaN"),
    "infinite": (b'{"temperature": 1e999}', "too large"),
    "huge integer": (b'{"seed": ' + b"9" * 5000 + b"}", "40 digits"),
    "deep": (b'{"a":' * 20_000 + b"1" + b"}" * 20_000, "64 levels"),
    "deep lists": (b"[" * 100_000, "64 levels"),
    "half a surrogate": (b'{"prompt": "\\ud800"}', "surrogate"),
    "UTF-16": ("{}".encode("utf-16"), "UTF-8"),
    "not UTF-8": (b'{"prompt": "\xff"}', "UTF-8"),
    "a key twice": (b'{"n": 1, "n": 2}', "twice"),
    "an unclosed text": (b'{"a": "' + b"\\\\[" * 1000, "not JSON"),
}


@pytest.mark.parametrize("path", [CHAT, PLAIN, "/tokenize", "/detokenize"])
@pytest.mark.parametrize("case", JUNK)
def test_a_junk_body_is_an_error_in_the_shape_of_the_api(server, case, path):
    body, message = JUNK[case]
    answer = server.post(path, body)
    assert answer.status == 400
    assert answer.json["error"]["type"] == "invalid_request_error"
    assert message in answer.json["error"]["message"]
    assert_still_answers(server)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, None),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [260]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"model": 1}, "model"),
        ({"stream": "yes"}, "stream"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "echo": False}, "max_tokens"),
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"n": 10**6}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e9}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"stop": ""}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"logprobs": 21}, "logprobs"),
        ({"stream_options": {"include_usage": True}}, None),
        ({"misspelled": 1}, "misspelled"),
    ],
)
def test_a_wrong_field_is_named_and_nothing_is_generated(server, change, param):
    before = n_generated(server)
    error = server.post(PLAIN, GOOD | change)
    assert error.status == 400
    assert error.json["error"]["param"] == param or (param or "").join(["", "["]) in str(
        error.json["error"]["param"]
    )
    assert n_generated(server) == before


def test_a_wrong_message_is_named(server):
    body = {"model": "chat", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}
    error = server.post(CHAT, body).json["error"]
    assert error["param"] == "messages[0].content[0].type"
    error = server.post(PLAIN, GOOD | {"prompt": [True]}).json["error"]
    assert error["param"] == "prompt[0]"


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (CompletionRequest, b'{"prompt": [' + b"1," * 500_000 + b'"a"]}'),
        (CompletionRequest, b'{"prompt": [' + b"[1]," * 500_000 + b"[1]]}"),
        (CompletionRequest, b'{"prompt": [' + b'"",' * 500_000 + b'""]}'),
        (CompletionRequest, b'{"stop": [' + b"1," * 500_000 + b"1]}"),
        (ChatRequest, b'{"messages": [' + b"{}," * 500_000 + b"{}]}"),
        (DetokenizeRequest, b'{"tokens": [' + b"-1," * 500_000 + b"1]}"),
    ],
    ids=["ids and a text", "lists", "texts", "stops", "messages", "negative ids"],
)
def test_a_body_of_many_wrong_items_takes_no_long_time(model, body):
    """An error for each item of 4 MB took 33 seconds, in which nobody was answered; of 1 MB, 9."""
    start = time.process_time()
    with pytest.raises(ApiError):
        parse_body(body, model)
    assert time.process_time() - start < 5


def test_a_request_has_at_most_100_000_parts():
    """A list or object is two, a text one: a conversation of 4096 turns has 24,579."""
    with pytest.raises(ApiError, match="more than 100000 strings"):
        parse_body(b'{"prompt": [' + b"[1]," * 50_000 + b"[1]]}", CompletionRequest)
    messages = [{"role": ("user", "assistant")[n % 2], "content": ""} for n in range(4095)]
    body = json.dumps({"messages": messages}).encode()
    assert len(parse_body(body, ChatRequest).messages) == 4095


def test_a_large_body_is_read_in_another_thread(server, monkeypatch):
    """Its parsing does not keep others waiting; that of a small one is faster than the thread."""
    threads = []

    def parse(body, model):
        threads.append(threading.current_thread())
        return parse_body(body, model)

    monkeypatch.setattr("tinylm.serve.body.parse_body", parse)
    assert server.post(PLAIN, GOOD).status == 200
    assert server.post(PLAIN, GOOD | {"prompt": "a" * 70_000}).status == 400
    small, large = threads
    assert small is server.thread
    assert large is not server.thread


def test_more_texts_than_slots_and_queue_is_an_error_that_names_the_limit(server):
    error = server.post(PLAIN, GOOD | {"n": 128})
    assert (error.status, "At most 12 texts" in error.json["error"]["message"]) == (400, True)


# --- I3: long prompts ---


def test_a_prompt_longer_than_the_context_is_an_error_with_both_lengths(server):
    error = server.post(PLAIN, GOOD | {"prompt": "a" * 97})
    assert error.status == 400
    assert error.json["error"]["code"] == "context_length_exceeded"
    assert "96 tokens, but the prompt has 97" in error.json["error"]["message"]


def test_a_full_context_has_room_for_one_token(server):
    answer = server.post(PLAIN, GOOD | {"prompt": "a" * 96, "max_tokens": 50}).json
    assert answer["usage"]["completion_tokens"] == 1


# --- I4: large bodies; the limit of the fixture is 200,000 bytes ---


def test_a_large_body_is_refused_at_its_head(server):
    with server.connect() as connection:
        connection.sendall(
            f"POST {PLAIN} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            "content-length: 100000000\r\n\r\n".encode()
        )
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")


def test_a_large_body_in_chunks_is_refused_when_it_is_too_large(server):
    with server.connect() as connection:
        connection.sendall(
            f"POST {PLAIN} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            "transfer-encoding: chunked\r\n\r\n".encode()
        )
        sent = 0
        try:
            for _ in range(1000):
                connection.sendall(b"10000\r\n" + b"a" * 65536 + b"\r\n")
                sent += 65536
        except OSError:
            pass
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")
    assert sent < 20_000_000  # the rest fits in the buffers of the sockets
    assert_still_answers(server)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "headers",
    ["content-length: 100000000", "transfer-encoding: chunked", "content-length: 100"],
    ids=["by its length", "in chunks", "more than its length"],
)
def test_a_body_of_100_mb_takes_less_than_20_mb(run_server, headers):
    """The highest resident memory of this process, in which the server runs, begins anew at
    `clear_refs` (proc(5)). The limit of the body is the default, 4 MB.
    """

    def highest_mb() -> float:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024

    chunk = b"10000\r\n" + b"a" * 65536 + b"\r\n"
    with run_server("base", rules=Rules()) as server:
        assert_still_answers(server)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = highest_mb()
        with server.connect() as connection, contextlib.suppress(OSError):
            connection.sendall(
                f"POST {PLAIN} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                f"{headers}\r\n\r\n".encode()
            )
            for _ in range(1600):
                connection.sendall(chunk)
        assert_still_answers(server)
        assert highest_mb() < before + 20


@pytest.mark.parametrize("length", ["-1", "1e3", "5, 6", "9" * 30, "+5", ""])
def test_a_length_that_is_none_is_refused(server, length):
    with server.connect() as connection:
        connection.sendall(
            f"POST {PLAIN} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            f"content-length: {length}\r\n\r\n".encode()
        )
        assert re.match(rb"HTTP/1.1 4\d\d", connection.recv(65536))


# --- I10: other sites ---


@pytest.mark.parametrize(
    ("headers", "status", "message"),
    [
        ({"host": "evil.example"}, 400, "Host header"),
        ({"host": "127.0.0.1.evil.example"}, 400, "Host header"),
        ({"host": "localhost:80:80"}, 400, "Host header"),
        ({"host": None}, 400, ""),
        ({"origin": "https://evil.example"}, 403, "Pages of other sites may not ask"),
        ({"origin": "null"}, 403, "Pages of other sites may not ask"),
        ({"content_type": "text/plain"}, 400, "Content-Type must be application/json"),
        ({"content_type": "application/x-www-form-urlencoded"}, 400, "Content-Type must be"),
    ],
)
def test_a_request_of_another_site_is_refused_without_a_cors_header(
    server, headers, status, message
):
    answer = server.post(PLAIN, GOOD, **headers)
    assert answer.status == status
    assert message in answer.body.decode()
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_preflight_of_another_site_gets_no_cors_header(server):
    answer = server.request("OPTIONS", PLAIN, origin="https://evil.example")
    assert answer.status == 403
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert server.request("OPTIONS", PLAIN).status == 405


def test_an_allowed_site_may_ask(run_server):
    with run_server("base", rules=Rules(origins=frozenset({"https://good.example"}))) as server:
        answer = server.post(PLAIN, GOOD, origin="https://good.example")
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (
            200,
            "https://good.example",
        )
        preflight = server.request("OPTIONS", PLAIN, origin="https://good.example")
        assert preflight.status == 204
        assert preflight.headers["access-control-allow-headers"] == "authorization, *"


def test_an_origin_is_compared_as_a_browser_writes_it():
    assert read_origins(["https://Good.example/"]) == {"https://good.example"}


def test_an_error_of_a_route_is_json_without_its_text(run_server, monkeypatch, tmp_path):
    def fails(root):
        raise RuntimeError("/secret")

    monkeypatch.setattr("tinylm.serve.runs.read_run_folders", fails)
    with run_server("base", logs=tmp_path) as server:
        answer = server.request("GET", "/runs")
        assert (answer.status, answer.json["error"]["type"]) == (500, "server_error")
        assert b"secret" not in answer.body


def test_runs_have_names_that_a_path_can_have(run_server, tmp_path):
    """The folder itself, a file name that is not UTF-8, and a run that cannot be read."""
    rows = "step,train_loss\n1,2.0\n"
    strange = Path(os.fsdecode(bytes(tmp_path / "logs") + b"/a\xff"))
    for folder in (tmp_path / "logs", strange):
        folder.mkdir()
        (folder / "metrics.csv").write_text(rows, encoding="utf-8")
    (tmp_path / "logs" / "bad" / "metrics.csv").mkdir(parents=True)
    with run_server("base", logs=tmp_path / "logs") as server:
        names = {row["name"] for row in server.request("GET", "/runs").json["data"]}
        assert names == {"logs", "a\\udcff"}
        for name in ("logs", "a%5Cudcff"):
            assert server.request("GET", f"/runs/{name}").status == 200


def test_names_of_the_server():
    assert known_hosts("0.0.0.0", ["My.Host"]) == {"localhost", "127.0.0.1", "[::1]", "my.host"}  # noqa: S104
    assert "192.168.0.5" in known_hosts("192.168.0.5", [])
    assert "[fe80::1]" in known_hosts("fe80::1", [])


# --- I11: keys ---


@pytest.fixture(scope="module")
def locked_server(run_server):
    with run_server("base", rules=Rules(keys=(b"another-key-of-some-length", KEY))) as running:
        yield running


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Basic {KEY.decode()}",
        "Bearer wrong-key-wrong-key",
        KEY.decode(),
        f"Bearer {KEY.decode()}x",
        "Bearer \xff\xfe",
    ],
)
def test_a_request_without_the_key_is_refused(locked_server, header):
    answer = locked_server.request("GET", "/v1/models", authorization=header)
    assert answer.status == 401
    assert "A valid key is needed" in answer.json["error"]["message"]
    assert KEY.decode() not in str(answer.json)


def test_every_route_but_health_and_the_files_of_the_page_needs_the_key(locked_server):
    app, _ = make_app(locked_server.store, Rules())
    paths = {(path_of(route), method) for route in app.routes for method in methods_of(route)}
    assert len(paths) >= 8
    for path, method in sorted(paths):
        status = locked_server.request(method, path.replace("{name:path}", "base")).status
        is_open = path == "/health" or path in FILES
        assert (path, status) == (path, 200 if is_open else 401)
    assert (
        locked_server.request("GET", "/v1/models", authorization=f"bearer {KEY.decode()}").status
        == 200
    )


def path_of(route: Route) -> str:
    return route.path


def methods_of(route: Route) -> set[str]:
    return route.methods


def test_nothing_of_a_request_is_in_the_log(locked_server, caplog):
    with caplog.at_level("DEBUG"):
        authorization = f"Bearer {KEY.decode()}"
        locked_server.post(
            PLAIN, {"prompt": "secret-prompt", "user": "secret-user"}, authorization=authorization
        )
        locked_server.post(PLAIN, {"prompt": 5, "secret-name": 1}, authorization=authorization)
        locked_server.request("GET", "/secret-path?secret=query", authorization=authorization)
        locked_server.request("SECRET-METHOD", "/v1/models", authorization=authorization)
    assert "POST /v1/completions: 200" in caplog.text
    for secret in ("secret", KEY.decode(), str(Path.home())):
        assert secret not in caplog.text.replace("SECRET", "secret")


def test_keys_are_read_from_a_file(tmp_path):
    path = tmp_path / "keys"
    path.write_bytes(b"# of the team\n" + KEY + b"\n\nanother-key-of-some-length\n")
    assert read_keys(path) == (KEY, b"another-key-of-some-length")
    path.write_bytes(b"short\n")
    with pytest.raises(UserError, match="key 1 must have at least 16"):
        read_keys(path)
    path.write_bytes(b"\n")
    with pytest.raises(UserError, match="contains no key"):
        read_keys(path)


# --- I16, I17: paths and headers ---


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
        ("GET", "/v1/models/../../etc/passwd", 404),
        ("GET", "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd", 404),
        ("GET", "/v1/models/%00", 404),
        ("GET", "//etc/passwd", 404),
        ("GET", "/v1", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("GET", PLAIN, 405),
        ("PUT", "/health", 405),
        ("DELETE", "/v1/models/base", 405),
        ("TRACE", "/health", 405),
    ],
)
def test_other_paths_and_methods_are_errors_without_content(server, method, path, status):
    answer = server.request(method, path)
    assert (answer.status, answer.json["error"]["message"].endswith(".")) == (status, True)
    assert b"root:" not in answer.body


def test_a_storm_of_head_and_range_requests_gets_errors_and_whole_files(server):
    """HEAD is no method of a route but the files of the page; a Range is ignored, as RFC 9110 (14.2)
    allows: no part is made, however many are asked for.
    """
    ranges = ",".join(f"{start}-{start + 9}" for start in range(0, 20_000, 10))
    whole = server.request("GET", "/app.js")
    storm = b"".join(
        f"{method} {path} HTTP/1.1\r\nhost: localhost\r\nrange: bytes={part}\r\n\r\n".encode()
        for part in ("0-0", "-1", "5-2", "0-" + "9" * 300, ranges[:10_000])
        for path in ("/app.js", "/vendor/", "/../app.js")
        for method in ("HEAD", "GET")
    )
    with server.connect() as connection:
        connection.sendall(storm)
        connection.shutdown(socket.SHUT_WR)
        data = b""
        while part := connection.recv(65536):
            data += part
    statuses = re.findall(rb"HTTP/1.1 (\d+)", data)
    assert (statuses.count(b"200"), statuses.count(b"404")) == (10, 20)
    assert (data.count(whole.body), data.count(b"content-range")) == (5, 0)
    assert server.request("GET", "/app.js", range="bytes=0-5").body == whole.body


def test_answers_have_the_headers_that_make_them_no_page(server):
    for answer in (server.request("GET", "/health"), server.post(PLAIN, b"")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "server" not in answer.headers


def test_the_files_of_the_page_are_a_table(locked_server):
    """They need no key; no other path is a file of the folder."""
    page = locked_server.request("GET", "/")
    assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    authorization = f"Bearer {KEY.decode()}"
    for path in ("/page/index.html", "/../page/index.html", "/%2e%2e/pages.py", "/page/"):
        assert locked_server.request("GET", path, authorization=authorization).status == 404


def test_a_model_by_another_path_is_not_found(server):
    """H6: a name is a key of a table, never a path."""
    for name in ("../base", "/etc/passwd", "base/final.ckpt", "base\0", "%2e%2e"):
        assert server.post(PLAIN, GOOD | {"model": name}).status == 404
