"""A dataset on the hub, streamed over a network that drops, stalls and refuses connections (FAULTS: E1, E10, E11).

The hub is played by a server on this machine: the few routes that `datasets` asks for a dataset
without code. Everything
between our `train_documents` and the socket is the libraries' own, their retries too; only their pauses are shortened.
"""

import gzip
import hashlib
import io
import json
import logging
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import train
from tinylm.checkpoint import format as checkpoint_format
from tinylm.common.errors import UserError
from tinylm.config.schema import DataConfig, TokenizerConfig
from tinylm.text.data_source import train_documents
from tinylm.tokenizer.byte_char import CharTokenizer
from training.tokenizer import learn_from_documents

SEED = 1
COMMIT = "c" * 40
DATASET = DataConfig(dataset="owner/name", streaming=True, val_fraction=1e-9)
# Faults of a request for a file: an HTTP status, a dropped connection, or one that drops or stalls after N bytes.
Fault = int | tuple[str, int]
FOREVER = 500


@dataclass
class Hub:
    """The files of one dataset, the faults of the next requests for each, and a record of requests and log lines."""

    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    """log lines of the libraries"""

    def listed(self, path: str) -> dict[str, Any]:
        return {
            "type": "file",
            "path": path,
            "size": len(self.files[path]),
            "oid": hashlib.sha256(self.files[path]).hexdigest()[:40],
        }


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    """The request handler of `hub`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = (
            True  # or each answer waits 40 ms for the client's acknowledgement
        )

        def log_message(self, *arguments: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_POST(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path, body = (
                self.path.partition("?")[0],
                self.rfile.read(int(self.headers["Content-Length"] or 0)),
            )
            if re.fullmatch(r"/api/datasets/owner/name(/revision/\w+)?", path):
                self.answer_json(
                    {
                        "id": "owner/name",
                        "sha": COMMIT,
                        "siblings": [{"rfilename": name} for name in hub.files],
                        "tags": [],
                        "private": False,
                    }
                )
            elif re.fullmatch(r"/api/datasets/owner/name/tree/\w+", path):
                self.answer_json([hub.listed(name) for name in hub.files])
            elif re.fullmatch(r"/api/datasets/owner/name/paths-info/\w+", path):
                self.answer_json(
                    [
                        hub.listed(name)
                        for name in parse_qs(body.decode())["paths"]
                        if name in hub.files
                    ]
                )
            elif (match := re.fullmatch(r"/datasets/owner/name/resolve/\w+/(.*)", path)) and match[
                1
            ] in hub.files:
                self.answer_file(match[1])
            else:
                self.answer(
                    404,
                    b"",
                    {
                        "X-Error-Code": "EntryNotFound" if "owner/name" in path else "RepoNotFound",
                        "X-Repo-Commit": COMMIT,
                    },
                )

        def answer_json(self, value: Any) -> None:
            self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def answer(
            self, status: int, body: bytes, headers: dict[str, str], *, sent: int | None = None
        ) -> None:
            """Send a whole response, or the first `sent` bytes of its body."""
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[:sent])

        def answer_file(self, name: str) -> None:
            data = hub.files[name]
            status, headers = (
                200,
                {
                    "ETag": f'"{hub.listed(name)["oid"]}"',
                    "X-Repo-Commit": COMMIT,
                    "Accept-Ranges": "bytes",
                },
            )
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or ""):
                start, stop = int(wanted[1]), min(int(wanted[2]) + 1, len(data))
                status, headers, data = (
                    206,
                    headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"},
                    data[start:stop],
                )
            if self.command == "HEAD":
                return self.answer(200, data, headers)
            hub.asked.append(name)
            match hub.faults[name].pop(0) if hub.faults.get(name) else None:
                case int(refused):
                    self.answer(refused, b"", {})
                case (how, sent):
                    self.answer(status, data, headers, sent=sent)
                    if how == "stall":
                        time.sleep(1)
                    self.close_connection = True
                case _:
                    self.answer(status, data, headers)

    return Handler


class LogHandler(logging.Handler):
    """Keeps log lines."""

    def __init__(self, messages: list[str]):
        super().__init__()
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A local hub that the libraries use as the real one; they wait 10 ms instead of seconds."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    ours = {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    }
    ours |= {
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DOWNLOAD_TIMEOUT": 0.3,
    }
    for name, value in ours.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    for pause in ("", "_SERVER_UNAVAILABLE", "_RATE_LIMIT"):
        monkeypatch.setattr(datasets.config, f"STREAMING_READ{pause}_RETRY_INTERVAL", 0.01)
    impatient = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: time.sleep(0.01)})
    monkeypatch.setattr("huggingface_hub.utils._http.time", impatient)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    handler = LogHandler(hub.messages)
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "datasets")]
    for logger in loggers:
        logger.addHandler(handler)
    yield hub
    for logger in loggers:
        logger.removeHandler(handler)
    server.shutdown()
    server.server_close()


def texts(start: int, stop: int) -> list[str]:
    return [f"document {i} " + "x" * 100 for i in range(start, stop)]


def jsonl(documents: list[str]) -> bytes:
    return "".join(
        json.dumps({"id": i, "text": document}) + "\n" for i, document in enumerate(documents)
    ).encode()


def parquet(documents: list[str]) -> bytes:
    file = io.BytesIO()
    pq.write_table(
        pa.table({"id": list(range(len(documents))), "text": documents}), file, row_group_size=40
    )
    return file.getvalue()


KINDS: dict[str, Callable[[list[str]], bytes]] = {
    "jsonl": jsonl,
    "json.gz": lambda documents: gzip.compress(jsonl(documents)),
    "parquet": parquet,
}
# Network faults do not depend on the kind of file; the slow tier makes sure.
ONE_KIND = [
    "jsonl",
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "jsonl"),
]
FIRST, SECOND = texts(0, 100), texts(100, 200)


def fill(hub: Hub, kind: str) -> str:
    """Add two files of a hundred documents each; returns the name of the second, which is not opened before the
    first is read.
    """
    hub.files |= {
        f"train-{i}.{kind}": KINDS[kind](documents) for i, documents in enumerate((FIRST, SECOND))
    }
    return f"train-1.{kind}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("streaming", [True, False])
def test_a_dataset_on_the_hub_is_read_in_order(hub, kind, streaming):
    fill(hub, kind)
    assert (
        list(train_documents(DATASET.model_copy(update={"streaming": streaming}), SEED))
        == FIRST + SECOND
    )


WAYS: list[list[Fault]] = [
    [("drop", 500)],
    [("stall", 500)],
    [("drop", 0)],
    [429, 429],
    [500],
    [503, 504, 502],
    [("drop", 9), 429, ("stall", 99), 500],
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ONE_KIND)
@pytest.mark.parametrize("faults", WAYS, ids=str)
def test_after_a_network_fault_no_row_is_lost_or_repeated(hub, kind, faults):
    """E11: the library retries and logs each time, and the documents equal those without faults."""
    name = fill(hub, kind)
    hub.faults[name] = list(faults)
    assert list(train_documents(DATASET, SEED)) == FIRST + SECOND
    assert hub.faults[name] == [], "the faults must have been met"
    assert len([line for line in hub.messages if line.startswith("Retrying in ")]) == len(faults)


@pytest.mark.parametrize("kind", ONE_KIND)
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (500, "Server error '500 Internal Server Error' for url "),
        (404, "Client error '404 Not Found' for url "),
        pytest.param(
            ("drop", 50), "Server Disconnected", marks=pytest.mark.slow
        ),  # 20 times 6 requests, each of 2 libraries tries its own number of times
    ],
)
def test_a_permanent_network_fault_is_one_line_and_the_stream_can_be_resumed(
    hub, kind, fault, words
):
    """E11: the documents before the failure are the first ones; after it, the rest follows, each once."""
    name = fill(hub, kind)
    hub.faults[name] = [fault] * FOREVER
    seen: list[str] = []
    with pytest.raises(UserError) as caught:
        for document in train_documents(DATASET, SEED):
            seen.append(document)
    assert str(caught.value).startswith(f"owner/name (train): reading stopped: {words}")
    assert str(caught.value).endswith(". Try again: a run resumes where it stopped.")
    assert "\n" not in str(caught.value)
    assert fault == 404 or any(line.startswith("Retrying in ") for line in hub.messages)
    assert seen == FIRST
    hub.faults.clear()
    assert list(train_documents(DATASET, SEED, skip=len(seen))) == SECOND


@pytest.mark.parametrize(
    ("kind", "damaged"),
    [
        ("jsonl", b'{"id": 1, "text": "cut o'),
        ("jsonl", b"<html></html>"),
        ("json.gz", gzip.compress(jsonl(SECOND))[:-20]),
        ("parquet", parquet(SECOND)[:-20]),
    ],
    ids=["cut line", "no json", "cut gz", "cut parquet"],
)
@pytest.mark.parametrize("first", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_damaged_file_on_the_hub_is_one_line(hub, kind, damaged, first):
    """E1, E10: also if it is the file from which the library reads the columns."""
    name = fill(hub, kind)
    hub.files[name.replace("-1", "-0") if first else name] = damaged
    with pytest.raises(UserError) as caught:
        list(train_documents(DATASET, SEED))
    assert "owner/name" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_that_the_hub_does_not_have_is_one_line(hub):
    fill(hub, "jsonl")
    with pytest.raises(
        UserError,
        match=r"^data.dataset: owner/other: .*doesn't exist on the Hub.* Check data.dataset_config and data.split",
    ):
        list(train_documents(DATASET.model_copy(update={"dataset": "owner/other"}), SEED))


def test_a_char_tokenizer_learns_from_the_first_documents_of_a_stream(hub):
    """The first file has no capital letters; the second is not requested, because the eighth document is in the
    first.
    """
    hub.files = {"train-0.jsonl": jsonl(FIRST), "train-1.jsonl": jsonl(["CAPITALS"])}
    tokenizer = learn_from_documents(
        TokenizerConfig(kind="char", unknown="unk", learn_docs=8), DATASET, SEED
    )
    assert isinstance(tokenizer, CharTokenizer)
    assert tokenizer.characters == " 01234567cdemnotux"
    assert "train-1.jsonl" not in hub.asked
    assert tokenizer.decode(tokenizer.encode("documenT 8")) == "documen\ufffd \ufffd"


@pytest.mark.parametrize(
    ("kind", "settings"), [("char", {"unknown": "unk"}), ("bpe", {"vocab_size": 300})]
)
def test_a_tokenizer_needs_learn_docs_for_a_stream(hub, kind, settings):
    fill(hub, "jsonl")
    with pytest.raises(
        UserError,
        match=f"^tokenizer.learn_docs: kind {kind} would read all of a streamed dataset. Set "
        f"tokenizer.learn_docs, for ",
    ):
        learn_from_documents(TokenizerConfig(kind=kind, **settings), DATASET, SEED)
    assert hub.asked == []


def test_the_rows_of_the_character_preset_can_be_shown(hub, capsys):
    """configs/c4-char.yaml, except the name of the dataset and the shuffle window, which two small files do not
    fill.
    """
    fill(hub, "json.gz")
    preset = str(Path(__file__).parents[2] / "configs" / "c4-char.yaml")
    assert (
        train.main(
            [
                "--config",
                preset,
                "--show-rows",
                "2",
                "data.dataset=owner/name",
                "data.dataset_config=null",
                "data.shuffle_window=16",
            ]
        )
        == 0
    )
    heading, text, counts, *_ = capsys.readouterr().out.splitlines()
    assert heading == "row 0, micro-batch 0: owner/name"
    assert re.fullmatch(r"⟦.⟧[documentx0-9 ┊]*(<\|eos\|>[documentx0-9 ]*)?", text)
    assert counts.startswith("64 tokens, targets: 64, documents: ")


@pytest.mark.slow
def test_a_run_that_loses_the_network_can_be_resumed(hub, make_config, tmp_path, capsys):
    """E11 end to end: exit code 2 and one line if the second file cannot be downloaded; resumed, the losses equal
    those without faults.
    """
    name, short = "train-1.jsonl", [f"document {i}" for i in range(1200)]
    hub.files = {"train-0.jsonl": jsonl(short[:600]), name: jsonl(short[600:])}
    streamed = {
        "dataset": "owner/name",
        "streaming": True,
        "shuffle_window": 8,
        "val_fraction": 0.1,
        "val_docs": 3,
    }
    config = make_config(
        data=streamed,
        training={
            "max_steps": 120,
            "save_every_steps": 20,
            "val_every_steps": 120,
            "log_every_steps": 120,
        },
    )
    calm = tmp_path / "calm"
    elsewhere = [
        f"training.checkpoint_dir={calm / 'checkpoints'}",
        f"training.log_dir={calm / 'logs'}",
    ]
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    assert train.main(["--config", str(config), *elsewhere]) == 0
    hub.faults[name] = [500] * FOREVER
    capsys.readouterr()
    assert train.main(["--config", str(config)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(
        "error: owner/name (train): reading stopped: Server error '500 Internal Server Error' for url "
    )
    hub.faults.clear()
    assert train.main(["--config", str(config)]) == 0
    # Documents are encoded 256 at a time: the training documents of the first file are two such batches, about
    # 6500 tokens, 64 a step.
    assert re.search(r"resuming .*/step-000(080|100).ckpt at step ", capsys.readouterr().err)
    for number, handler in before.items():
        signal.signal(number, handler)
    runs = [
        checkpoint_format.read(folder / "checkpoints" / "final.ckpt") for folder in (calm, tmp_path)
    ]
    assert all(
        torch.equal(runs[0]["weights"][key], runs[1]["weights"][key]) for key in runs[0]["weights"]
    )
    assert runs[0]["progress"]["validations"] == runs[1]["progress"]["validations"]
