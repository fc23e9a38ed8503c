"""Fine-tuning end to end on tiny models, whole and by adapters, of our decoder and a Hugging Face
model (FAULTS: A3, A12, B14, D8, E14).
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

import eval_val
import finetune
import infer
import list as list_program
import train
from tests import programs
from tests.training.test_train import (
    Capture,
    Patch,
    assert_same_run,
    bytes_of,
    curve,
    elsewhere,
    interrupt_at,
)
from tinylm import __main__ as commands
from tinylm.checkpoint import format as checkpoint_format
from tinylm.checkpoint import info as checkpoint_info
from tinylm.checkpoint import initial as checkpoint_initial
from tinylm.checkpoint import load as checkpoint_load
from tinylm.cli.loading import choose_system
from tinylm.common.errors import UserError
from tinylm.config.loader import load_config
from tinylm.config.schema import Config
from tinylm.interchange.peft import save_adapter
from tinylm.model.hf_model import HFModel
from tinylm.rows.template_factory import make_template
from tinylm.tokenizer.byte_char import ByteTokenizer
from tinylm.tokenizer.hf import HFTokenizer
from tinylm.tokenizer.pretokenize import CHARACTER_OF_BYTE
from training.resume import changed_settings
from training.stages.sft import SFTData

ROOT = Path(__file__).resolve().parents[2]
Make = Callable[..., Path]
LORA = {"lora": {"r": 4, "dropout": 0.2}}
# What is fine-tuned: each must hold for each.
RUNS: dict[str, dict[str, Any]] = {
    "whole": {},
    "lora": LORA,
    "hf_model": {"hf_model": True},
    "hf_model lora": {"hf_model": True, **LORA},
}
DORA = {"lora": LORA["lora"] | {"dora": True}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pretrained base.ckpt, a saved llama, and rows; nothing in it may change."""
    folder = tmp_path_factory.mktemp("home")
    rows = [
        {"instruction": f"say {word}", "output": f"{word} {word}!"}
        for word in ("one", "two", "red", "blue", "cat", "dog", "sun", "sea", "tea", "ink") * 2
    ]
    rows = [
        row | {"instruction": row["instruction"] + " " * (i // 10)} for i, row in enumerate(rows)
    ]
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    (folder / "corpus.txt").write_text(
        "".join(f"say {i} and answer {i * i}\n" for i in range(200)), encoding="utf-8"
    )
    settings = {
        "model": {
            "n_layers": 1,
            "d_model": 16,
            "n_heads": 2,
            "max_seq_len": 160,
            "residual_dropout": 0.2,
            "attention_dropout": 0.2,
        },
        "data": {"dataset": str(folder / "corpus.txt"), "cache_dir": str(folder / "cache")},
        "training": {
            "seq_len": 32,
            "micro_batch_size": 4,
            "max_steps": 2,
            "checkpoint_dir": str(folder / "base"),
            "log_dir": str(folder / "logs"),
        },
        "hardware": {"accelerator": "cpu", "threads": 1},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    assert train.main(["--config", str(folder / "base.yaml")]) == 0
    for number, handler in handlers:
        signal.signal(number, handler)
    save_llama(folder / "llama")
    return folder


def save_llama(folder: Path, *, vocab_size: int = 257, seed: int = 0) -> None:
    """A random llama with dropout and a tokenizer of bytes, as a folder of Hugging Face."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=160,
        attention_dropout=0.2, bos_token_id=None, eos_token_id=256,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    backend = Tokenizer(
        models.BPE(
            {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []
        )
    )
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"eos_token": "<|endoftext|>"}', encoding="utf-8"
    )


OWN_TEMPLATE = (
    "{% for m in messages %}{{ m.role + ':' + m.content + '<|endoftext|>' }}{% endfor %}{% if "
    "add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def byte_level() -> HFTokenizer:
    """A Hugging Face tokenizer of bytes and the end of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(
        models.BPE({character: byte for byte, character in CHARACTER_OF_BYTE.items()}, [])
    )
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    return HFTokenizer(backend, eos="<|endoftext|>", pad=None)


@pytest.fixture
def make(home: Path, tmp_path: Path) -> Iterator[Make]:
    """Writes a config of a tiny run; at the end not a byte of what it began from has changed."""
    before = {name: content for name, content in bytes_of(home).items() if "cache" not in name}

    def write(*, hf_model: bool = False, **sections: dict[str, Any]) -> Path:
        settings: dict[str, dict[str, Any]] = {
            "data": {"dataset": str(home / "rows.jsonl"), "val_fraction": 0.2, "cache_dir": str(tmp_path / "cache")},
            "training": {
                "init_from": f"hf:{home / 'llama'}" if hf_model else str(home / "base" / "final.ckpt"), "seq_len": 64, "micro_batch_size": 2,
                "grad_accum_steps": 3, "max_steps": 6, "val_every_steps": 3, "log_every_steps": 1, "save_every_steps": 2, "lr": 1e-2,
                "checkpoint_dir": str(tmp_path / "checkpoints"), "log_dir": str(tmp_path / "logs"), "run_name": "tiny",
            },
            "hardware": {"accelerator": "cpu", "threads": 1},
        }  # fmt: skip
        for section, values in sections.items():
            settings.setdefault(section, {}).update(values)
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return path

    yield write
    assert {name: content for name, content in bytes_of(home).items() if name in before} == before


def run(config: Path, *arguments: str) -> int:
    """The exit code of finetune.py in this process."""
    return finetune.main(["--config", str(config), *arguments])


KILLED = """
import importlib, os, signal, sys
at, module, name, *arguments = sys.argv[1:]
stage, seen = getattr(importlib.import_module(module), name), []
original = stage.batch_loss
def batch_loss(self, batch, **given):
    found = original(self, batch, **given)
    seen.append(1)
    if len(seen) == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
    return found
stage.batch_loss = batch_loss
import finetune
sys.exit(finetune.main(arguments))
"""


def kill_in(module: type, micro_batch: int, config: Path) -> None:
    """Run finetune.py in a process that kill -9 ends after the loss of a micro-batch, from 1 on."""
    names = (module.__module__, module.__name__)
    command = [sys.executable, "-c", KILLED, str(micro_batch), *names, "--config", str(config)]
    ended = programs.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == -9, ended.stderr


def kill_twice(config: Path, metrics: Path) -> None:
    """Run finetune.py to its end, where kill -9 ends the first two processes, each after two more
    rows of `metrics`. The last one is a real start, with another seed of hashes.
    """
    kills = 0
    while True:
        start = programs.Program if kills < 2 else subprocess.Popen
        process = start(
            [sys.executable, "finetune.py", "--config", str(config)],
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        before, began = n_lines(metrics), time.monotonic()
        while process.poll() is None and (kills == 2 or n_lines(metrics) < before + 2):
            assert time.monotonic() - began < 300
            time.sleep(0.005)
        process.kill()
        if process.wait() == 0:
            break
        kills += 1
    assert kills == 2


def n_lines(path: Path) -> int:
    """Lines of a file that may not be there."""
    return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0


def refused(config: Path, tmp_path: Path, capsys: Capture, *arguments: str) -> str:
    """The one line of a run that exits with 2 and changes no file."""
    before = bytes_of(tmp_path)
    capsys.readouterr()
    assert run(config, *arguments) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    after = bytes_of(tmp_path)
    assert {name: after.get(name) for name in before} == before
    return error[0]


# --- what a run does --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_rows_are_shown_with_their_questions_in_brackets(
    packing: str, make: Make, home: Path, capsys: Capture
) -> None:
    """In the tokens of the base. An example has about 50 bytes: several fit into a context of 160,
    and padding is not a document.
    """
    config = make(hf_model=True, data={"packing": packing}, training={"seq_len": 160})
    assert finetune.main(["--config", str(config), "--show-rows", "1"]) == 0
    heading, text, counts, _ = capsys.readouterr().out.split("\n", 3)
    rows = (home / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    found = [
        json.loads(rows[int(place.rpartition(":")[2]) - 1])
        for place in heading.removeprefix("row 0, micro-batch 0: ").split(", ")
    ]
    asked = [
        f"⟦### Instruction: {row['instruction']}\\n### Output:⟧ {row['output']}\\n<|endoftext|>"
        for row in found
    ]
    assert text.partition("⟦<|endoftext|>")[0] == "".join(
        f"┃{number}┃{part}" for number, part in enumerate(asked)
    )
    assert counts.endswith(f", documents: {len(found)}")
    assert (len(found) > 1) == (packing == "packed")


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_learns_and_every_program_reads_what_it_wrote(
    name: str, make: Make, home: Path, tmp_path: Path, capsys: Capture
) -> None:
    """The checkpoint has stage and template; the loss falls; sampling, listing and evaluating work."""
    assert run(make(**RUNS[name])) == 0
    output = capsys.readouterr()
    final = tmp_path / "checkpoints" / "final.ckpt"
    assert output.out == f"{final}\n"
    assert f"next: python infer.py --ckpt {final} --chat" in output.err
    losses = [float.fromhex(loss) for loss in curve(tmp_path).values()]
    assert losses[-1] < losses[0] - (0.02 if "lora" in name else 0.2)
    state = checkpoint_format.read(final)
    assert (state["stage"], state["config"]["data"]["template"]) == ("sft", "instruction")
    assert (
        infer.main(
            ["--ckpt", str(final), "--prompt", "say", "--max-new-tokens", "4", "--device", "cpu"]
        )
        == 0
    )
    assert list_program.main(["--dir", str(final.parent)]) == 0
    assert ("16d 2h + r4" in capsys.readouterr().out) == ("lora" in name)
    assert eval_val.main(["--ckpt", str(final), "--config", str(home / "base.yaml")]) == 0


@pytest.mark.slow
def test_answers_are_scored_as_in_training_and_before_it(
    make: Make, home: Path, tmp_path: Path, capsys: Capture
) -> None:
    """eval_val.py --answers gives the val_loss that training wrote, and for the base a higher one;
    a longer context than the model has is an error.
    """
    config = make()
    assert run(config) == 0
    losses = []
    for path in (tmp_path / "checkpoints" / "final.ckpt", home / "base" / "final.ckpt"):
        capsys.readouterr()
        assert (
            eval_val.main(["--ckpt", str(path), "--config", str(config), "--answers", "--json"])
            == 0
        )
        losses.append(json.loads(capsys.readouterr().out)["val_loss"])
    assert losses[0] == float.fromhex(curve(tmp_path, "val_loss")[6])
    assert losses[1] > losses[0] + 0.2
    assert (
        eval_val.main(
            ["--ckpt", str(path), "--config", str(config), "--answers", "training.seq_len=161"]
        )
        == 2
    )
    assert "training.seq_len: 161 is more than the 160 positions of " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["packed", "padded"])
@pytest.mark.parametrize("name", ["whole", "hf_model lora"])
def test_validation_is_the_loss_of_the_answers_alone(
    name: str, packing: str, make: Make, tmp_path: Path
) -> None:
    """The oracle takes each example by itself, without rows or masks: the mean of -log p over its
    trained tokens, and how many are argmax.

    So packed and padded rows give the same numbers up to rounding, and the model in the checkpoint
    is the one that was validated.
    """
    config_file = make(**RUNS[name], data={"packing": packing})
    assert run(config_file) == 0
    loaded = checkpoint_load.load_model(tmp_path / "checkpoints" / "final.ckpt")
    data = SFTData(load_config(config_file), loaded.tokenizer)
    data.prepare()
    total, right, count = 0.0, 0, 0
    for example in data.val_examples:
        ids = torch.from_numpy(example.ids)
        with torch.no_grad():
            log_p = F.log_softmax(loaded.model(ids[None, :-1])[0], dim=-1)[example.trained[1:]]
        targets = ids[1:][example.trained[1:]]
        total -= log_p.gather(1, targets[:, None]).sum().item()
        right += (log_p.argmax(dim=-1) == targets).sum().item()
        count += len(targets)
    assert len(data.val_examples) > 1
    assert float.fromhex(curve(tmp_path, "val_loss")[6]) == pytest.approx(total / count, abs=1e-5)
    assert float.fromhex(curve(tmp_path, "val_accuracy")[6]) == pytest.approx(
        right / count, abs=1e-9
    )


@pytest.mark.slow
def test_packed_and_padded_rows_train_on_the_same_loss(make: Make, tmp_path: Path) -> None:
    """All training examples in one step: the mean is over the same targets in any rows, so the
    first step's loss is equal.
    """
    first = []
    for packing in ("packed", "padded"):
        config = make(
            data={"packing": packing},
            model={"residual_dropout": 0.0, "attention_dropout": 0.0},
            training={"seq_len": 160},
        )
        data = SFTData(
            load_config(config),
            checkpoint_load.load_model(
                Path(load_config(config).training.init_from or "")
            ).tokenizer,
        )
        data.prepare()
        rows = len(data.rows_of(data.train_examples))
        folder = tmp_path / packing
        assert (
            run(
                config,
                *elsewhere(folder),
                f"training.micro_batch_size={rows}",
                "training.grad_accum_steps=1",
                "training.max_steps=1",
            )
            == 0
        )
        first.append((rows, float.fromhex(curve(folder)[1])))
    assert first[0][0] < first[1][0]
    assert first[0][1] == pytest.approx(first[1][1], abs=1e-5)


@pytest.mark.slow
def test_only_fine_tuning_has_a_column_of_accuracy(make: Make, home: Path, tmp_path: Path) -> None:
    """The file of a pretraining run is as it was; fine-tuning has one column more, filled at validations."""
    assert run(make()) == 0
    before = (
        "step,train_loss,val_loss,val_ppl,val_bpb,lr,grad_norm,tokens,tokens_per_s,passes,"
        "mfu,data_wait,peak_bytes"
    )
    assert (home / "logs" / "pretrain" / "metrics.csv").read_text(encoding="utf-8").splitlines()[
        0
    ] == before
    assert (tmp_path / "logs" / "tiny" / "metrics.csv").read_text(encoding="utf-8").splitlines()[
        0
    ] == f"{before},val_accuracy"
    assert sorted(curve(tmp_path, "val_accuracy")) == [3, 6]


@pytest.mark.slow
def test_a_sample_is_asked_for_as_the_examples_ask(
    make: Make, monkeypatch: Patch, capsys: Capture
) -> None:
    """The model continues the template's words and not the bare prompt."""
    seen = prompts_seen(monkeypatch)
    assert run(make(sampling={"max_new_tokens": 2}), "training.sample_prompt=say red") == 0
    assert capsys.readouterr().err.count("sample: ⟦say red⟧") == 2
    assert {bytes(ids).decode() for ids in seen} == {"### Instruction: say red\n### Output:"}


@pytest.mark.slow
def test_answers_are_generated_with_the_commonest_system_turn_of_the_rows(
    make: Make, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """Samples of the run and infer.py; --system replaces it, "" is none."""
    rows = [{"prompt": f"say {i}", "completion": f"{i}", "system": "Be brief."} for i in range(30)]
    rows += [{"prompt": f"say {i}", "completion": f"{i}", "system": "Be long."} for i in range(9)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = make(data={"dataset": str(path)}, sampling={"max_new_tokens": 2})
    seen = prompts_seen(monkeypatch)
    assert run(config, "training.sample_prompt=say red", "training.max_steps=3") == 0
    expected = "### System: Be brief.\n### Instruction: say red\n### Output:"
    assert {bytes(ids).decode() for ids in seen} == {expected}
    final = tmp_path / "checkpoints" / "final.ckpt"
    assert checkpoint_load.load_model(final).system == "Be brief."
    capsys.readouterr()
    told = "system: Be brief. (from the fine-tuning rows; --system replaces it)"
    for flags, is_told in (([], True), (["--system", "Be kind."], False), (["--no-wrap"], False)):
        arguments = ["--ckpt", str(final), "--prompt", "say red", "--max-new-tokens", "1", *flags]
        assert infer.main(arguments) == 0
        assert (told in capsys.readouterr().err) == is_told


@pytest.mark.parametrize(
    ("given", "used"), [(None, "Be brief."), ("Be kind.", "Be kind."), ("", None)]
)
def test_a_given_system_message_replaces_that_of_the_rows(given: str | None, used: str) -> None:
    loaded = SimpleNamespace(system="Be brief.")
    template = make_template("plain", ByteTokenizer())
    assert choose_system(Namespace(system=given), loaded, template) == used
    assert choose_system(Namespace(system=None), loaded, None) is None


def prompts_seen(monkeypatch: Patch) -> list[tuple[int, ...]]:
    """The ids of every prompt that an engine is given from now on."""
    from tinylm.generate.engine import Engine

    seen: list[tuple[int, ...]] = []
    original = Engine.generate

    def generate(self: Any, prompt: Any, sampling: Any, **more: Any) -> Any:
        seen.append(prompt.ids)
        return original(self, prompt, sampling, **more)

    monkeypatch.setattr(Engine, "generate", generate)
    return seen


@pytest.mark.slow
def test_new_weights_learn_whole_texts(make: Make, tmp_path: Path, capsys: Capture) -> None:
    """S0: with training.train_on=all a run begins from nothing, on a folder of rows; every token
    but each example's first is a target.
    """
    config = make(
        data={"dataset": str(tmp_path / "empty")},
        model={"n_layers": 1, "d_model": 16, "n_heads": 2, "max_seq_len": 160},
    )
    (tmp_path / "empty").mkdir()
    assert (
        run(
            config,
            "training.init_from=null",
            "training.train_on=all",
            "training.max_steps=2",
            "training.seq_len=160",
        )
        == 0
    )
    stderr = capsys.readouterr().err
    assert "100% of the tokens trained (train_on all)" in stderr
    assert f"{tmp_path / 'empty'} has no SMSSpamCollection, instruction-data.json or any" in stderr
    info = checkpoint_info.describe(tmp_path / "checkpoints" / "final.ckpt")
    assert (info.stage, info.shape) == ("sft", "1L 16d 2h")
    ending = checkpoint_load.load_model(info.path).tokenizer.special_names
    assert "<|sep|>" in ending.values()


def test_the_model_and_tokenizer_are_those_of_the_base(
    make: Make, home: Path, tmp_path: Path
) -> None:
    """The config has neither section; dropout may differ; given shapes and tokenizer settings must agree."""
    assert (
        run(
            make(
                model={"residual_dropout": 0.0, "d_model": 16, "n_heads": 2},
                tokenizer={"kind": "byte"},
            ),
            "training.max_steps=1",
        )
        == 0
    )
    was, now = (
        checkpoint_format.read(folder / "final.ckpt")["config"]
        for folder in (home / "base", tmp_path / "checkpoints")
    )
    assert now["model"] == was["model"] | {"residual_dropout": 0.0}
    assert now["tokenizer"] == was["tokenizer"]


@pytest.mark.slow
def test_pretraining_goes_on_from_a_hugging_face_model_too(
    make: Make, home: Path, tmp_path: Path
) -> None:
    """train.py with the same settings: another stage, on plain text, here by adapters."""
    config = make(hf_model=True, **LORA)
    assert (
        train.main(
            ["--config", str(config), f"data.dataset={home / 'corpus.txt'}", "training.max_steps=2"]
        )
        == 0
    )
    info = checkpoint_info.describe(tmp_path / "checkpoints" / "final.ckpt")
    assert (info.stage, info.shape) == ("pretrain", "1L 16d 2h + r4")


@pytest.mark.slow
def test_the_rows_of_a_task_are_asked_as_the_task_asks(make: Make, tmp_path: Path) -> None:
    """data.task says which columns there are and what the question is."""
    rows = [{"sentence": f"film number {i} , and a good one", "label": 1} for i in range(20)]
    (tmp_path / "sst2.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    config = make(
        data={"dataset": str(tmp_path / "sst2.jsonl"), "task": "sst2"},
        training={"seq_len": 160, "max_steps": 1},
    )
    assert run(config) == 0
    loaded = checkpoint_load.load_model(tmp_path / "checkpoints" / "final.ckpt")
    data = SFTData(load_config(config), loaded.tokenizer)
    data.prepare()
    text = loaded.tokenizer.decode(data.train_examples[0].ids.tolist())
    assert text.startswith(
        "### Instruction: Is the sentiment of this review positive or negative?\n### Input: film number "
    )
    assert text.endswith("\n### Output: positive\n")


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_number(make: Make, tmp_path: Path) -> None:
    """Of a Hugging Face model too; dropout is drawn again alike in the second forward."""
    for name in ("true", "false"):
        assert (
            run(
                make(**RUNS["hf_model lora"]),
                f"model.gradient_checkpointing={name}",
                *elsewhere(tmp_path / name),
            )
            == 0
        )
    assert_same_run(tmp_path / "true", tmp_path / "false")


# --- what a checkpoint of adapters holds ------------------------------------------------------------------------------


def adapted(make: Make, **sections: Any) -> Path:
    """The final checkpoint of a run of two steps by adapters."""
    config = make(**(LORA | sections))
    assert run(config, "training.max_steps=2") == 0
    return Path(load_config(config).training.checkpoint_dir) / "final.ckpt"


@pytest.mark.slow
def test_a_checkpoint_holds_the_adapter_alone_and_says_whose_it_is(make: Make, home: Path) -> None:
    """A and B of four layers; optimizer state for no more; the base by path and by the fingerprint of its weights."""
    path = adapted(make)
    state = checkpoint_format.read(path)
    layers = ("attention.qkv", "attention.out", "ffn.up", "ffn.down")
    assert set(state["weights"]) == {
        f"blocks.0.{layer}.lora_{side}.weight" for layer in layers for side in "AB"
    }
    assert len(state["optimizer"]["state"]) == 8
    base = checkpoint_load.load_model(home / "base" / "final.ckpt").model
    assert state["base"] == {
        "path": os.path.relpath(home / "base" / "final.ckpt", path.parent),
        "fingerprint": checkpoint_initial.fingerprint_of(base),
    }
    assert checkpoint_info.describe(path).parameters == sum(
        weight.numel() for weight in state["weights"].values()
    )


@pytest.mark.slow
@pytest.mark.parametrize("hf_model", [False, True])
def test_a_base_that_is_gone_or_another_is_named(
    hf_model: bool, make: Make, home: Path, tmp_path: Path
) -> None:
    """B14, D8: both moved together still belong together; the error names the adapter and its base,
    and both fingerprints.
    """
    shutil.copytree(home, tmp_path / "there" / "home")
    base = tmp_path / "there" / "home" / ("llama" if hf_model else "base/final.ckpt")
    name = f"hf:{base}" if hf_model else str(base)
    adapted(
        make,
        hf_model=hf_model,
        training={"init_from": name, "checkpoint_dir": str(tmp_path / "there" / "sft")},
    )
    (tmp_path / "there").rename(tmp_path / "moved")
    path = tmp_path / "moved" / "sft" / "final.ckpt"
    base = tmp_path / "moved" / base.relative_to(tmp_path / "there")
    wanted = checkpoint_format.read(path)["base"]["fingerprint"]
    assert checkpoint_load.load_model(path).info.stage == "sft"
    if hf_model:
        save_llama(base, seed=1)
    else:
        state = checkpoint_format.read(base)
        state["weights"]["norm.weight"] = state["weights"]["norm.weight"] + 1
        base.unlink()
        checkpoint_format.write(base, state)
    with pytest.raises(UserError) as error:
        checkpoint_load.load_model(path)
    assert f"{path}: this adapter was trained on " in str(error.value)
    assert f"{base} with fingerprint {wanted}, but now it has " in str(error.value)
    shutil.rmtree(base) if hf_model else base.unlink()
    with pytest.raises(UserError) as error:
        checkpoint_load.load_model(path)
    assert f"{path}: the base of this adapter (" in str(error.value)
    assert "not found" in str(error.value)


@pytest.mark.slow
def test_a_whole_hugging_face_model_needs_nothing_beside_its_checkpoint(
    make: Make, home: Path, tmp_path: Path
) -> None:
    """Its config.json travels as text; the folder may be gone. Another run may begin from it, whole or by adapters."""
    shutil.copytree(home / "llama", tmp_path / "llama")
    config = make(training={"init_from": f"hf:{tmp_path / 'llama'}"})
    assert run(config, "training.max_steps=2") == 0
    shutil.rmtree(tmp_path / "llama")
    first = tmp_path / "checkpoints" / "final.ckpt"
    model = checkpoint_load.load_model(first).model
    assert isinstance(model, HFModel)
    config = make(
        training={"init_from": str(first), "checkpoint_dir": str(tmp_path / "second")}, **LORA
    )
    assert run(config, "training.max_steps=2") == 0
    assert isinstance(checkpoint_load.load_model(tmp_path / "second" / "final.ckpt").model, HFModel)


@pytest.mark.slow
@pytest.mark.parametrize(("hf_model", "dora"), [(False, False), (True, False), (True, True)])
def test_plain_peft_loads_a_saved_adapter(
    hf_model: bool, dora: bool, make: Make, home: Path, tmp_path: Path
) -> None:
    """The logits with peft's adapter equal those of the merged model; adapter_config.json says which base."""
    import peft
    import transformers

    path = adapted(make, hf_model=hf_model, **(DORA if dora else LORA))
    save_adapter(path, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    if hf_model:
        base: Any = transformers.AutoModelForCausalLM.from_pretrained(home / "llama")
    else:
        base = checkpoint_load.load_model(home / "base" / "final.ckpt").model
    ids = torch.arange(20)[None]
    with torch.no_grad():
        merged = checkpoint_load.load_model(path).model(ids)
        plain = base(ids).logits if hf_model else base(ids)
        wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
        separate = wrapped(ids).logits if hf_model else wrapped(ids)
    assert torch.allclose(merged, separate, atol=1e-5)
    assert not torch.allclose(merged, plain, atol=1e-4)
    described = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert described["use_dora"] is dora
    assert described["base_model_name_or_path"] == str(
        home / ("llama" if hf_model else "base/final.ckpt")
    )


@pytest.mark.slow
def test_an_adapter_of_a_hugging_face_model_is_exported_alone_or_merged(
    make: Make, home: Path, tmp_path: Path, capsys: Capture
) -> None:
    """peft's folder names its base; the merged folder has the logits of the checkpoint, and
    transformers answers as infer.py does.
    """
    import transformers

    path = adapted(make, hf_model=True)
    assert commands.main(["export", str(path), str(tmp_path / "alone")]) == 0
    assert f"of {home / 'llama'}; --merge writes the whole model" in capsys.readouterr().err
    assert commands.main(["export", str(path), str(tmp_path / "merged"), "--merge"]) == 0
    model, tokenizer = (
        kind.from_pretrained(tmp_path / "merged")
        for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer)
    )
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "say red"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    theirs = model.generate(asked, do_sample=False, max_new_tokens=8)[0, asked.size(1) :].tolist()
    capsys.readouterr()
    assert (
        infer.main(
            [
                "--ckpt",
                str(path),
                "--prompt",
                "say red",
                "--temperature",
                "0",
                "--max-new-tokens",
                "8",
                "--device",
                "cpu",
                "--json",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["completions"][0]["ids"] == theirs


def test_a_whole_model_has_no_adapter_to_save(home: Path, tmp_path: Path) -> None:
    """The error names the file."""
    with pytest.raises(
        UserError,
        match="final.ckpt: is a whole model, not an adapter. Give a checkpoint of a run with a lora section.",
    ):
        save_adapter(home / "base" / "final.ckpt", tmp_path)


# --- exact resume -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RUNS, "dora", "adamw_8bit", "nf4"])
def test_a_stopped_run_goes_on_to_the_last_bit(
    name: str, make: Make, tmp_path: Path, monkeypatch: Patch
) -> None:
    """A12, C1: SIGTERM in the second of three micro-batches of step 4, dropout everywhere; resumed
    from step 4, equal to an uninterrupted run.
    """
    if name in ("adamw_8bit", "nf4"):
        pytest.importorskip("bitsandbytes")
    others = {"dora": DORA, "adamw_8bit": {"training": {"optimizer": "adamw_8bit"}}}
    others["nf4"] = {"hf_model": True, "lora": LORA["lora"] | {"base_weights": "nf4"}}
    config = make(**(RUNS | others)[name])
    assert run(config, *elsewhere(tmp_path / "calm")) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3 * 3 + 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(config) == 143
    newest = checkpoint_format.latest_valid(tmp_path / "checkpoints")
    assert newest is not None and newest.name == "step-000004.ckpt"
    before = newest.read_bytes()
    assert run(config, "--resume", str(newest), *elsewhere(tmp_path / "aside")) == 0
    assert newest.read_bytes() == before
    assert run(config) == 0
    assert_same_run(tmp_path / "calm", tmp_path)
    assert curve(tmp_path / "calm", "val_accuracy") == curve(tmp_path, "val_accuracy")
    assert run(config) == 0, "complete"


@pytest.mark.slow
def test_without_the_reseeding_of_dropout_a_resumed_run_differs(
    make: Make, tmp_path: Path, monkeypatch: Patch
) -> None:
    """NEG: the comparison can fail, for the dropout of adapters too."""
    config = make(**RUNS["hf_model lora"])
    assert run(config, *elsewhere(tmp_path / "calm")) == 0
    torch.manual_seed(5)
    monkeypatch.setattr(torch, "default_generator", torch.Generator())
    assert run(config, "--resume", str(tmp_path / "calm" / "checkpoints" / "step-000004.ckpt")) == 0
    assert curve(tmp_path)[5] != curve(tmp_path / "calm")[5]


@pytest.mark.slow
def test_a_run_resumes_without_its_initial_model(make: Make, home: Path, tmp_path: Path) -> None:
    """Its weights, model settings and tokenizer are in its own checkpoint."""
    shutil.copytree(home / "llama", tmp_path / "llama")
    config = make(training={"init_from": f"hf:{tmp_path / 'llama'}"})
    assert run(config, "training.max_steps=4") == 0
    shutil.rmtree(tmp_path / "llama")
    assert run(config) == 0
    assert checkpoint_format.read(tmp_path / "checkpoints" / "final.ckpt")["step"] == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["lora", *(pytest.param(name, marks=pytest.mark.long) for name in ("whole", "hf_model lora"))],
)
def test_killed_again_and_again_the_curve_is_equal_to_the_last_bit(
    name: str, make: Make, tmp_path: Path
) -> None:
    """A12: SIGKILL whenever two more steps are logged, twice; curve and weights equal an uninterrupted run's."""
    config = make(**RUNS[name], training={"max_steps": 14, "save_every_steps": 1})
    assert run(config, *elsewhere(tmp_path / "calm")) == 0
    kill_twice(config, tmp_path / "logs" / "tiny" / "metrics.csv")
    assert_same_run(tmp_path / "calm", tmp_path)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_of_another_stage_is_not_resumed(
    make: Make, home: Path, tmp_path: Path, capsys: Capture
) -> None:
    """B14: both stages are named, either way round."""
    shutil.copytree(home / "base", tmp_path / "used")
    message = refused(make(), tmp_path, capsys, f"training.checkpoint_dir={tmp_path / 'used'}")
    assert (
        "step-000002.ckpt: a checkpoint of stage pretrain, but this run is of stage sft. Choose "
        "another training.checkpoint_dir" in message
    )
    config = make()
    assert run(config, "training.max_steps=1") == 0
    assert train.main(["--config", str(config), f"data.dataset={home / 'corpus.txt'}"]) == 2
    assert "a checkpoint of stage sft, but this run is of stage pretrain" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_cannot_start_from_an_adapter(make: Make, tmp_path: Path, capsys: Capture) -> None:
    """B14: it is not a whole model; the error names both stages and the base to use."""
    path = adapted(make)
    message = refused(
        make(),
        tmp_path,
        capsys,
        f"training.init_from={path}",
        f"training.checkpoint_dir={tmp_path / 'x'}",
    )
    assert (
        f"training.init_from: {path}: is a LoRA adapter (stage sft), not a whole model (stage "
        f"pretrain, or sft without lora)." in message
    )
    assert "base/final.ckpt, or from the merged model." in message


@pytest.mark.slow
def test_an_adapter_resumes_only_on_its_own_base(
    make: Make, home: Path, tmp_path: Path, capsys: Capture
) -> None:
    """D8: as a model, the other base would fit; --allow-changes does not help."""
    adapted(make, hf_model=True)
    shutil.copytree(home / "llama", tmp_path / "llama")
    save_llama(tmp_path / "llama", seed=1)
    was = checkpoint_format.read(tmp_path / "checkpoints" / "final.ckpt")["base"]["fingerprint"]
    message = refused(
        make(hf_model=True, **LORA),
        tmp_path,
        capsys,
        f"training.init_from=hf:{tmp_path / 'llama'}",
        "--allow-changes",
    )
    assert (
        f"step-000002.ckpt: the base model is "
        f"hf:{os.path.relpath(home / 'llama', tmp_path / 'checkpoints')} with fingerprint {was}, "
        f"but " in message
    )
    assert f"training.init_from (hf:{tmp_path / 'llama'}) has " in message


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        (
            "whole",
            ["training.init_from=null"],
            "training.init_from: must be set: new weights cannot learn from the answers alone. Set it to a checkpoint "
            "or hf:NAME, or set training.train_on=all. To train new weights on documents, run train.py.",
        ),
        (
            "whole",
            ["training.init_from=null", "training.train_on=all", "tokenizer.kind=char"],
            "tokenizer.kind: bpe and char are learned from documents, but",
        ),
        (
            "whole",
            ["training.init_from=nowhere.ckpt"],
            "training.init_from: nowhere.ckpt: not found in ",
        ),
        (
            "whole",
            ["training.init_from=hf:./nowhere"],
            "training.init_from: ./nowhere: not found in ",
        ),
        (
            "whole",
            ["training.seq_len=161"],
            "final.ckpt), got 161. Lower training.seq_len, or extend the context with model.max_seq_len and "
            "model.rope_scaling.",
        ),
        (
            "lora",
            ["lora.target_modules=[]"],
            "lora.target_modules: must be a list that is not empty, got [].",
        ),
        ("whole", ["model.n_layers=3"], "model.n_layers: must be 1, as in training.init_from ("),
        (
            "hf_model",
            ["model.residual_dropout=0.1"],
            "model.residual_dropout: must be 0.0, as in training.init_from (hf:",
        ),
        (
            "whole",
            ["model.vocab_size=50304"],
            "final.ckpt), got 50304. Remove it; for new weights, run train.py without "
            "training.init_from.",
        ),
        ("whole", ["tokenizer.kind=char"], "final.ckpt was trained with tokenizer "),
        (
            "whole",
            ["tokenizer.kind=bpe", "tokenizer.vocab_size=300"],
            "but the tokenizer section describes a new one of kind bpe. Remove the tokenizer section.",
        ),
        (
            "hf_model",
            ["training.optimizer=muon"],
            "training.optimizer: muon is not supported with a Hugging Face model",
        ),
        (
            "hf_model",
            ["hardware.strategy=fsdp"],
            "hardware.strategy: fsdp is not supported with a Hugging Face model",
        ),
        (
            "lora",
            ["hardware.strategy=fsdp"],
            "lora: not supported with hardware.strategy=fsdp: adapters are too small to shard.",
        ),
        (
            "lora",
            ["lora.r=17"],
            "lora.r: must be at most 16, the smaller side of blocks.0.ffn.down, got 17.",
        ),
        (
            "lora",
            ["lora.target_modules=[q_proj]"],
            "lora.target_modules: must name layers that can have an adapter (down, out, qkv, up), got q_proj.",
        ),
        (
            "hf_model",
            ["tokenizer.kind=byte"],
            "model.vocab_size: must be at least 260, the tokenizer's, got 257. Use the tokenizer "
            "that the model was trained with.",
        ),
    ],
)
def test_an_impossible_setting_is_an_error_of_one_line(
    name: str, overrides: list[str], words: str, make: Make, tmp_path: Path, capsys: Capture
) -> None:
    """D8, E14: exit code 2 and the setting's name, and nothing is written."""
    assert words in refused(make(**RUNS[name]), tmp_path, capsys, *overrides)


def test_adapters_need_a_trained_model(home: Path, tmp_path: Path, capsys: Capture) -> None:
    """In train.py too, which can begin from nothing."""
    assert train.main(["--config", str(home / "base.yaml"), *elsewhere(tmp_path), "lora.r=4"]) == 2
    assert (
        "lora: adapters need a trained model. Set training.init_from, or remove the lora section."
        in capsys.readouterr().err
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "override", "words", "fatal"),
    [
        ("lora", "lora.r=2", "lora.r was 4 when it was saved, this run has 2", True),
        ("lora", "lora=null", "lora was {", True),
        ("whole", "lora.r=4", "lora was None when it was saved, this run has {", True),
        (
            "whole",
            "model.residual_dropout=0.1",
            "model.residual_dropout was 0.2 when it was saved, this run has 0.1",
            True,
        ),
        (
            "whole",
            "data.template=plain",
            "data.template was instruction when it was saved, this run has plain",
            False,
        ),
        (
            "whole",
            "data.packing=padded",
            "data.packing was packed when it was saved, this run has padded",
            False,
        ),
        (
            "whole",
            "training.train_on=all",
            "training.train_on was response when it was saved, this run has all",
            False,
        ),
    ],
)
def test_another_run_is_not_resumed(
    name: str, override: str, words: str, fatal: bool, make: Make, tmp_path: Path, capsys: Capture
) -> None:
    """A10: settings that affect a step; adapters of another shape cannot be used at all."""
    config = make(**RUNS[name])
    assert run(config, "training.max_steps=1") == 0
    message = refused(config, tmp_path, capsys, override)
    assert words in message
    assert ("--allow-changes" in message) == (not fatal)


@pytest.mark.slow
@pytest.mark.parametrize(("train_on", "warns"), [("response", True), ("all", False)])
def test_questions_of_both_splits_are_told(
    train_on: str, warns: bool, make: Make, tmp_path: Path, capsys: Capture
) -> None:
    """Ten of ten, with other answers; a row of which every token is trained has no question apart."""
    for name, answer in (("train", "yes"), ("val", "no")):
        rows = "".join(
            json.dumps({"prompt": f"{n}?", "completion": answer}) + "\n" for n in range(10)
        )
        (tmp_path / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    config = make(
        data={"dataset": str(tmp_path / "train.jsonl"), "val_dataset": str(tmp_path / "val.jsonl")}
    )
    assert run(config, "training.max_steps=1", f"training.train_on={train_on}") == 0
    assert (
        "10 validation rows have a question of a training row; val_loss will be lower than on new questions"
        in capsys.readouterr().err
    ) == warns


def test_a_checkpoint_that_is_older_than_a_setting_can_be_resumed() -> None:
    """A setting that it does not have counts as null; the rows that are skipped are compared by content."""
    now = Config().to_plain()
    was = now | {"data": {k: v for k, v in now["data"].items() if k != "skip_bad_rows"}}
    assert changed_settings(was, now) == {}


@pytest.mark.slow
def test_changed_rows_are_refused(make: Make, home: Path, tmp_path: Path, capsys: Capture) -> None:
    """A10: the rows are compared by what they are encoded to."""
    shutil.copy(home / "rows.jsonl", tmp_path / "rows.jsonl")
    config = make(data={"dataset": str(tmp_path / "rows.jsonl")})
    assert run(config, "training.max_steps=1") == 0
    (tmp_path / "rows.jsonl").write_text(
        (home / "rows.jsonl").read_text(encoding="utf-8").replace("!", "?"), encoding="utf-8"
    )
    assert f"train data ({tmp_path / 'rows.jsonl'}) was " in refused(config, tmp_path, capsys)


# --- rows as text -----------------------------------------------------------------------------------------------------


def shown(config: Path, capsys: Capture, *arguments: str) -> tuple[list[str], str]:
    """What --show-rows prints on stdout, a line each, and on stderr."""
    capsys.readouterr()
    code = finetune.main(["--config", str(config), *arguments])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out.splitlines(), printed.err


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_the_rows_of_examples_are_shown_with_what_is_trained(
    make: Make, home: Path, capsys: Capture, packing: str
) -> None:
    """`say one` is answered `one one!`: the answer and its end are targets, the question is not. A
    question that ends without a space is followed by a line end.
    """
    lines, err = shown(
        make(data={"template": "plain", "packing": packing}), capsys, "--show-rows", "3"
    )
    data = SFTData(
        load_config(make(data={"template": "plain", "packing": packing})), ByteTokenizer()
    )
    data.prepare()
    batches = data.train_dataset()
    assert "validation" in err and len(lines) == 3 * 4
    for place in range(3):
        heading, text, counts, _ = lines[4 * place : 4 * place + 4]
        batch = batches[place // 2]
        places, labels = batch["origin"][place % 2], batch["labels"][place % 2]
        more = f" and {len(places) - 3} more" if len(places) > 3 else ""
        assert heading == f"row {place}, micro-batch {place // 2}: {', '.join(places[:3])}{more}"
        parts = [re.sub(r"⟦<\|pad\|>.*⟧$", "", part) for part in re.split(r"┃\d+┃", text)[1:]]
        answers = [
            re.fullmatch(r"⟦say (\w+) *⟧(?:\\n)?(\w+) (\w+)!<\|eos\|>", part) for part in parts
        ]
        assert len(answers) == len(places) and all(
            found and len(set(found.groups())) == 1 for found in answers
        ), parts
        assert (
            counts == f"64 tokens, targets: {int((labels != -100).sum())}, documents: {len(places)}"
        )


def test_rows_are_those_of_the_run_and_no_more(make: Make, capsys: Capture) -> None:
    """Three steps of two micro-batches of two rows; the second pass over 16 or so rows has another order."""
    config = make(
        data={"template": "plain", "packing": "padded"},
        training={"max_steps": 3, "grad_accum_steps": 2},
    )
    lines, _ = shown(config, capsys, "--show-rows", "100")
    assert [line.split(":")[0] for line in lines[::4]] == [
        f"row {i}, micro-batch {i // 2}" for i in range(12)
    ]


def test_show_rows_refuses_what_a_run_refuses(make: Make, capsys: Capture) -> None:
    assert (
        finetune.main(
            [
                "--config",
                str(make(data={"template": "plain"}, training={"init_from": None})),
                "--show-rows",
                "1",
            ]
        )
        == 2
    )
    assert (
        "error: training.init_from: must be set: new weights cannot learn from the answers alone."
        in capsys.readouterr().err
    )
