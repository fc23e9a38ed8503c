"""`export --push` against a stand-in of the hub's API on this machine: the files arrive, byte by byte, through
huggingface_hub's own client.
"""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import transformers
import yaml

import finetune
from tinylm.__main__ import main
from tinylm.checkpoint.load import load_model

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Hub:
    """What the stand-in was sent."""

    port: int = 0
    created: dict = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str | None] = field(default_factory=set)


@pytest.fixture
def hub() -> Iterator[Hub]:
    found = Hub()

    class Answers(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self, values: object) -> None:
            content = json.dumps(values).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self.answer({"id": "owner/name", "sha": "c" * 40, "siblings": []})

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            found.tokens.add(self.headers["Authorization"])
            address = f"http://127.0.0.1:{found.port}/owner/name"
            if self.path == "/api/repos/create":
                found.created = json.loads(content)
                self.answer({"url": address, "name": "owner/name", "id": "owner/name"})
            elif "/preupload/" in self.path:
                paths = [file["path"] for file in json.loads(content)["files"]]
                whole = [
                    {"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths
                ]
                self.answer({"files": whole})
            elif "/commit/" in self.path:
                for line in map(json.loads, content.splitlines()):
                    if line["key"] == "file":
                        value = line["value"]
                        found.files[value["path"]] = base64.b64decode(value["content"])
                self.answer({"commitUrl": f"{address}/commit/c", "commitOid": "c" * 40})
            else:
                self.answer({"errors": [], "warnings": []})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    found.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.slow
def test_an_exported_folder_is_pushed_whole(hub, save, tmp_path):
    """HF_ENDPOINT is read when the library is imported, so in a process of its own. The model card has the lines for
    other programs.
    """
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.port}",
        "HF_TOKEN": "hf_of_the_test",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-m", "tinylm", "export", save(), tmp_path / "out"]
    done = subprocess.run(
        [*command, "--push", "owner/name", "--private"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'out'}\n"
    assert f"pushed to http://127.0.0.1:{hub.port}/owner/name" in done.stderr
    assert (hub.created["name"], hub.created["organization"]) == ("name", "owner")
    assert hub.created.get("private") or hub.created.get("visibility") == "private"
    assert hub.tokens == {"Bearer hf_of_the_test"}
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.files == written
    assert {"README.md", "tokenizer.json", "model.safetensors"} <= written.keys()
    card = written["README.md"].decode()
    assert "vllm serve . --max-model-len 64" in card
    assert "llama-server -m model.gguf -c 64\nollama create model -f model.Modelfile" in card


def arrived(hub: Hub, folder: Path) -> Path:
    """What the stand-in was sent, as the files of a new folder; it is empty again."""
    folder.mkdir()
    for name, content in hub.files.items():
        (folder / name).write_bytes(content)
    hub.files.clear()
    return folder


@pytest.mark.slow
def test_a_pushed_adapter_loads_with_peft_and_the_pushed_merged_model_with_transformers(
    hub, save, bpe, write, make_config, tmp_path, monkeypatch, capsys
):
    """A LoRA run on a folder of transformers in ChatML. Both folders are rebuilt from what the stand-in
    was sent alone: logits equal those of the checkpoint, and differ from those of the base; tokenizer,
    chat template and card are in both.
    """
    import peft

    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{hub.port}")
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    base = tmp_path / "base"
    assert main(["export", str(save()), str(base)]) == 0
    rows = [json.dumps({"instruction": f"{n} and {n}?", "output": f"{2 * n}"}) for n in range(20)]
    config = make_config(
        data={"dataset": str(write("rows.jsonl", "\n".join(rows) + "\n")), "template": "chatml"},
        training={"init_from": f"hf:{base}", "seq_len": 64, "max_steps": 3, "lr": 0.01},
        lora={"r": 2, "alpha": 4},
    )
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    del settings["model"]  # it is that of the base
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert finetune.main(["--config", str(config)]) == 0
    ckpt = tmp_path / "checkpoints" / "final.ckpt"
    push = ["--push", "owner/name"]
    assert main(["export", str(ckpt), str(tmp_path / "adapter"), *push]) == 0
    adapter = arrived(hub, tmp_path / "adapter from the hub")
    assert main(["export", str(ckpt), str(tmp_path / "merged"), "--merge", *push]) == 0
    merged = arrived(hub, tmp_path / "merged from the hub")
    assert capsys.readouterr().err.count("/owner/name\n") == 2

    own = load_model(ckpt)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = own.model.eval()(ids)
        whole = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
        assert not torch.allclose(whole(ids).logits, expected, atol=1e-3)
        theirs = peft.PeftModel.from_pretrained(whole, adapter).eval()
        assert torch.allclose(theirs(ids).logits, expected, atol=1e-4)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(merged).eval()
        assert torch.allclose(theirs(ids).logits, expected, atol=1e-4)
    asked = [{"role": "user", "content": "2 and 2?"}]
    for folder, words in ((adapter, "| adapter | LoRA, r 2, alpha 4 |"), (merged, "vllm serve .")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        assert prompt == "<|im_start|>user\n2 and 2?<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer("2 and 2?")["input_ids"] == own.tokenizer.encode("2 and 2?")
        assert words in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--push", "name"], "--push: must be OWNER/NAME, got name."),
        (
            ["--push", "owner/name", "--format", "gguf"],
            "--push: only valid for --format hf. Remove it, or remove --format.",
        ),
        (["--private"], "--private: only valid with --push. Remove it, or give --push."),
    ],
    ids=str,
)
def test_what_cannot_be_pushed_is_refused_before_any_work(flags, words, save, tmp_path, capsys):
    assert main(["export", str(save()), str(tmp_path / "out"), *flags]) == 2
    assert capsys.readouterr().err.strip() == f"error: {words}"
    assert not (tmp_path / "out").exists()


def test_a_hub_that_cannot_be_reached_is_an_error_before_any_work(
    save, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("urllib.request.getproxies", dict)
    command = ["export", str(save()), str(tmp_path / "out"), "--push", "owner/name"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --push: owner/name: 127.0.0.1 cannot be reached (")
    assert "`hf upload OWNER/NAME FOLDER` uploads the folder later" in error
    assert not (tmp_path / "out").exists()
