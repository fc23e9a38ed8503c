"""`python -m tinylm serve`: flags, the first lines, signals (FAULTS I12, I14)."""

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests import programs
from tinylm.__main__ import main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host", "0.0.0.0"], "--host: 0.0.0.0 can be reached from other machines"),  # noqa: S104
        (["--host", "::"], "can be reached from other machines"),
        (["--host", "not an address", "--no-auth"], "--host: no such address"),
        (["--host", "192.0.2.1", "--no-auth"], "cannot listen on 192.0.2.1"),
        (["--port", "70000"], "--port: must be from 0 to 65535, got 70000"),
        (["--port", "-1"], "--port: must be from 0 to 65535, got -1"),
        (["--port", "x"], "argument --port: invalid int value"),
        (["--slots", "0"], "--slots: must be from 1 to 100000, got 0"),
        (["--grace", "-1"], "--grace: must be from 0 to 100000, got -1"),
        (["--allow-host", "a.example:80"], "--allow-host: must be a name without port"),
        (["--allow-origin", "*"], "--allow-origin: must be the address of a site without path"),
        (["--allow-origin", "https://a.example/b"], "got https://a.example/b"),
        (["--api-key-file", "none.txt"], "none.txt"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, message, capsys, model_files):
    try:
        code = main(["serve", str(model_files["base"]), *flags])
    except SystemExit as error:
        code = error.code
    errors = capsys.readouterr().err
    assert (code, message in errors, errors.count("error: ")) == (2, True, 1)


def test_a_port_that_is_taken_is_one_line(capsys, model_files):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code = main(["serve", str(model_files["base"]), "--port", str(port)])
    errors = capsys.readouterr().err
    assert code == 2
    assert (
        f"error: --port: cannot listen on 127.0.0.1 port {port}: Address already in use." in errors
    )


def test_a_checkpoint_that_cannot_be_loaded_is_one_line(capsys, model_files, tmp_path):
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(model_files["base"].read_bytes()[:3000])
    code = main(["serve", str(cut), "--port", "0"])
    errors = capsys.readouterr().err
    assert (code, f"error: {cut}: " in errors, "Traceback" in errors) == (2, True, False)


def test_a_key_and_no_auth_are_one_too_many(capsys, model_files, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("0123456789abcdef0123456789abcdef\n", encoding="utf-8")
    code = main(["serve", str(model_files["base"]), "--no-auth", "--api-key-file", str(keys)])
    assert (
        code,
        "--no-auth: cannot be combined with --api-key-file" in capsys.readouterr().err,
    ) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_a_stream_end_and_the_server_exits(model_files, number, code):
    command = [sys.executable, "-m", "tinylm", "serve", str(model_files["base"]), "--port", "0"]
    with programs.Program(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"serving (http://127\.0\.0\.1:\d+)/v1", line):
                break
        assert "cache at most" in "".join(lines)
        body = b'{"prompt": "a", "max_tokens": 90, "stream": true, "seed": 1}'
        url, headers = f"{found[1]}/v1/completions", {"content-type": "application/json"}
        request = urllib.request.Request(url, body, headers)  # noqa: S310
        with urllib.request.urlopen(request) as answer:  # noqa: S310
            answer.read(10)
            os.kill(process.pid, number)
            assert answer.read().endswith(b"data: [DONE]\n\n")
        rest = process.stderr.read()
        assert (process.wait(20), "Traceback" in rest) == (code, False)
