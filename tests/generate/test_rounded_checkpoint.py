"""A checkpoint in 8 or 4 bits: every program opens it, and it generates what --weights does."""

import json
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import eval_val
import evaluate_checkpoints
import finetune
import infer
import list as list_program
from tests.checkpoint.test_checkpoint import make_state
from tinylm.__main__ import main
from tinylm.checkpoint import format as checkpoint_format
from tinylm.checkpoint.info import describe
from tinylm.checkpoint.initial import fingerprint_of, open_initial_model, weights_fingerprint
from tinylm.checkpoint.load import load_model
from tinylm.common.errors import DamagedError, UserError
from tinylm.config.schema import Config
from tinylm.generate.rounded_checkpoint import export_checkpoint
from tinylm.generate.weights import round_weights
from tinylm.model.decoder import Decoder
from tinylm.model.rounded import Int4Linear, Int8Linear, bits_of_model
from tinylm.serve.models import EngineSettings, load_served

MODELS = {
    "tied": {},
    "untied, with biases": {"tie_embeddings": False, "bias": "all", "position": "learned"},
    "mixture": {"moe": {"n_experts": 3, "top_k": 2}, "bias": "all"},
}


ROUNDED = ["int8", "int4"]


def save(path: Path, **model: Any) -> Path:
    """A checkpoint of a random model; keyword arguments are settings of the model. In 4 bits, the
    vocabulary and the inputs of ffn.down are no multiples of 16 and 32, so these have 8 bits.
    """
    shape = {"vocab_size": 260, "n_layers": 2, "d_model": 32, "n_heads": 4, "d_ff": 48}
    settings = shape | {"max_seq_len": 128} | model
    config = Config.model_validate({"model": settings, "training": {"seq_len": 16}})
    torch.manual_seed(0)
    decoder = Decoder(config.model)
    with torch.no_grad():
        for weight in decoder.parameters():
            weight.copy_(0.1 * torch.randn(weight.shape))
    state = make_state(config=config.to_plain(), weights=decoder.state_dict())
    checkpoint_format.write(path, state)
    return path


@pytest.fixture(scope="module", params=ROUNDED)
def rounded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rounded checkpoint, beside a.ckpt, of which it was made; for tests that only read it."""
    out = tmp_path_factory.mktemp("rounded") / f"{request.param}.ckpt"
    export_checkpoint(save(out.with_name("a.ckpt")), out, request.param, max_rise=0.1)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("precision", ROUNDED)
@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_model_that_was_rounded_in_memory(name, precision, tmp_path):
    """To the last bit, in all logits, of many rows and of few; and the same in fp32 but for bf16
    beside the matrices.
    """
    ckpt, out = save(tmp_path / "a.ckpt", **MODELS[name]), tmp_path / "b.ckpt"
    written = export_checkpoint(ckpt, out, precision, max_rise=0.1)
    rounded, stored = load_model(ckpt), load_model(out, as_stored=[precision])
    cost = round_weights(rounded.model, rounded.tokenizer, precision, max_rise=0.1)
    with torch.inference_mode():
        for ids in (torch.arange(40).view(2, 20), torch.tensor([[3]])):
            logits = rounded.model(ids)
            assert logits.dtype == torch.bfloat16
            assert torch.equal(stored.model(ids), logits)
            in_fp32 = load_model(out).model(ids)
            assert in_fp32.dtype == torch.float32
            assert (in_fp32 - logits).std() < 0.02 * in_fp32.std()
    assert written.cost == cost
    # 1 byte a weight, and names, and a tokenizer
    assert written.bytes < 0.45 * written.bytes_before
    assert describe(out).parameters == describe(ckpt).parameters


@pytest.mark.slow
def test_4_bits_take_0_625_bytes_a_weight(tmp_path):
    """Half a byte, and a scale and an offset of 2 bytes for each 32 weights; in 8 bits 1 byte."""
    ckpt = save(tmp_path / "a.ckpt", d_ff=64, vocab_size=272)
    sizes = {}
    for precision in ROUNDED:
        out = tmp_path / f"{precision}.ckpt"
        sizes[precision] = export_checkpoint(ckpt, out, precision, max_rise=0.1).bytes
    matrices = checkpoint_format.read(tmp_path / "int4.ckpt")["int4"]
    codes = sum(matrix[0].numel() for matrix in matrices.values())
    n_bytes = sum(part.nbytes for matrix in matrices.values() for part in matrix)
    assert n_bytes == 1.25 * codes  # two codes in a byte
    assert sizes["int4"] < 0.8 * sizes["int8"]


@pytest.mark.slow
def test_training_and_export_read_it_in_fp32(rounded, caplog):
    """Each weight is its code times its scale, in 4 bits from -8 and plus the offset of its group; a
    tied matrix is one.
    """
    with caplog.at_level(logging.INFO):
        initial = open_initial_model(str(rounded))
    assert caplog.messages == [
        f"{rounded}: its weights are {rounded.stem}, and are used in fp32 as rounded"
    ]
    model = initial.build(initial.model)
    state = checkpoint_format.read(rounded)
    if rounded.stem == "int8":
        codes, scale = state["int8"]["blocks.1.ffn.up.weight"]
        expected = codes.float() * scale.float()[:, None]
    else:
        codes, scale, offset = state["int4"]["blocks.1.ffn.up.weight"]  # one group a row
        expected = torch.empty(len(codes), 32)
        expected[:, ::2], expected[:, 1::2] = codes % 16, codes // 16
        expected = (expected - 8) * scale.float() + offset.float()
        assert "head.weight" in state["int8"]
    assert torch.equal(model.blocks[1].ffn.up.weight, expected)
    assert model.head.weight is model.embedding.weight
    assert all(w.dtype == torch.float32 and w.requires_grad for w in model.parameters())
    assert fingerprint_of(model) == weights_fingerprint(rounded)


@pytest.mark.slow
def test_other_weights_are_rounded_from_it(rounded, capsys):
    """--weights as it is stored changes nothing and costs nothing; others are measured."""
    prompt = ["--prompt", "ab", "--temperature", "0", "--max-new-tokens", "5"]
    for weights in ("fp32", "bf16", "int8", "int4"):
        flags = ["--weights", weights, "--max-bpb-rise", "1"]
        assert infer.main(["--ckpt", str(rounded), *prompt, *flags]) == 0
        err = capsys.readouterr().err
        expected = f"weights: {weights}, bits per byte"
        if weights == rounded.stem:
            expected = f"weights: {weights}, as in the checkpoint\n"
        assert (expected in err) == (weights != "fp32")


@pytest.mark.slow
def test_every_program_opens_it(rounded, tmp_path, capsys):
    """The text of infer.py is that of the exact checkpoint with --weights."""
    exact, precision = rounded.with_name("a.ckpt"), rounded.stem
    texts = []
    for ckpt, flags in ((rounded, []), (exact, ["--weights", precision, "--max-bpb-rise", "0.1"])):
        flags += ["--prompt", "ab", "--temperature", "0", "--max-new-tokens", "20"]
        assert infer.main(["--ckpt", str(ckpt), *flags]) == 0
        captured = capsys.readouterr()
        texts.append(captured.out)
        assert f"weights: {precision}" in captured.err
    assert texts[0] == texts[1]
    assert list_program.main(["--dir", str(exact.parent), "--json"]) == 0
    shapes = {Path(row["path"]).name: row["shape"] for row in json.loads(capsys.readouterr().out)}
    assert shapes == {"a.ckpt": "2L 32d 4h", rounded.name: f"2L 32d 4h {precision}"}
    data = tmp_path / "text.txt"
    data.write_text("\n\n".join(f"some words to score, {n} times" for n in range(40)))
    config = tmp_path / "config.yaml"
    config.write_text(
        f"data: {{dataset: {data}, val_fraction: 0.5}}\nhardware: {{accelerator: cpu}}\n"
        "training: {seq_len: 16}\n"
    )
    cases = tmp_path / "cases.yaml"
    cases.write_text("- {name: a, prompt: some, target: ' words'}\n")
    losses = []
    for ckpt in (rounded, exact):
        assert eval_val.main(["--config", str(config), "--ckpt", str(ckpt), "--json"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["val_loss"])
        asked = ["--checkpoints", str(ckpt), "--cases", str(cases), "--out", str(tmp_path / "r")]
        assert evaluate_checkpoints.main(asked) == 0
        capsys.readouterr()
    assert 0 < abs(losses[0] - losses[1]) < (0.01 if precision == "int8" else 0.1)
    assert main(["export", str(rounded), str(tmp_path / "hf")]) == 0
    capsys.readouterr()


@pytest.mark.slow
def test_a_run_of_fine_tuning_starts_from_it(rounded, tmp_path, capsys):
    """It starts from the fp32 weights, which its checkpoint has afterwards but for one step."""
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"a{n}", "response": "b"} for n in range(20)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    config = tmp_path / "config.yaml"
    config.write_text(
        f"extends: {Path('config_finetune.yaml').resolve()}\n"
        f"data: {{dataset: {data}, val_fraction: 0.25}}\nhardware: {{accelerator: cpu}}\n"
        f"training: {{init_from: {rounded}, seq_len: 128, max_steps: 1, micro_batch_size: 2, "
        f"checkpoint_dir: {tmp_path / 'c'}, log_dir: {tmp_path / 'logs'}}}\n"
    )
    assert finetune.main(["--config", str(config)]) == 0
    assert "and are used in fp32 as rounded" in capsys.readouterr().err
    tuned = load_model(tmp_path / "c" / "final.ckpt").model.state_dict()
    start = load_model(rounded).model.state_dict()
    changes = [(tuned[name] - start[name]).abs().max() for name in start]
    assert 0 < max(changes) < 0.01


@pytest.mark.slow
def test_evaluation_rounds_weights_too(tmp_path, capsys):
    ckpt = save(tmp_path / "a.ckpt")
    cases = tmp_path / "cases.yaml"
    cases.write_text("- {name: a, prompt: some, target: ' words'}\n")
    asked = ["--checkpoints", str(ckpt), "--cases", str(cases), "--out", str(tmp_path / "r")]
    for precision in ("bf16", "int8"):
        assert evaluate_checkpoints.main([*asked, "--weights", precision]) == 0
        assert f"weights: {precision}, bits per byte" in capsys.readouterr().err
    tight = ["--weights", "int8", "--max-bpb-rise", "-1"]
    assert evaluate_checkpoints.main([*asked, *tight]) == 2
    assert "--weights: int8 raises the bits per byte" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("precision", ROUNDED)
def test_the_command_says_what_it_wrote(precision, tmp_path, capsys):
    """Sizes of the file, of its weights, and of the new file; bits per byte before and after."""
    ckpt, out = save(tmp_path / "a.ckpt"), tmp_path / "b.ckpt"
    command = ["export", str(ckpt), str(out), "--format", "checkpoint"]
    command += ["--weights", precision]
    assert main([*command, "--max-bpb-rise", "0.1"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out}\n"
    assert re.search(
        rf"weights: {precision}, bits per byte of its own text \d\.\d+ -> \d\.\d+ \(.*\)\n"
        rf"{ckpt}: 1\d\d\.\d kB, its weights in fp32 1\d\d\.\d kB; {out}: \d\d\.\d kB\n"
        rf'next: python infer.py --ckpt {out} --prompt "Once"\n',
        captured.err,
    )
    assert main(command) == 2
    assert "b.ckpt: already exists" in capsys.readouterr().err
    out.unlink()
    assert main([*command, "--max-bpb-rise", "-1"]) == 2
    assert "by more than -1" in capsys.readouterr().err
    assert not out.exists()
    assert main(["export", str(ckpt), str(tmp_path / "hf"), "--weights", precision]) == 2
    assert "--weights: only valid for --format checkpoint" in capsys.readouterr().err
    assert main(["export", str(ckpt), "b.bin", "--format", "checkpoint"]) == 2
    assert "b.bin: the name of a checkpoint must end in .ckpt" in capsys.readouterr().err


def test_without_rounding_it_has_the_weights_alone(tmp_path):
    ckpt, out = save(tmp_path / "a.ckpt"), tmp_path / "b.ckpt"
    export_checkpoint(ckpt, out, "fp32", max_rise=0.02)
    assert weights_fingerprint(out) == weights_fingerprint(ckpt)
    assert bits_of_model(load_model(out, as_stored=ROUNDED).model) is None


def test_a_model_without_groups_has_8_bits(tmp_path, caplog):
    """24 inputs are no multiple of 32."""
    ckpt, out = save(tmp_path / "a.ckpt", d_model=24, d_ff=40), tmp_path / "b.ckpt"
    with caplog.at_level(logging.INFO):
        export_checkpoint(ckpt, out, "int4", max_rise=0.02)
    assert caplog.messages[0] == (
        "weights: no matrix has a shape for 4 bits (outputs in multiples of 16, inputs of 32): "
        "all have 8"
    )
    assert describe(out).shape == "2L 24d 4h int8"


Change = Callable[[dict[str, Any]], Any]
HEAD, UP = "head.weight", "blocks.1.ffn.up.weight"


def part(index: int, change: Callable[[torch.Tensor], Any], key: str = "int4") -> Change:
    """Changes a part of a matrix in a state."""
    name = UP if key == "int4" else HEAD

    def apply(state: dict[str, Any]) -> None:
        parts = list(state[key][name])
        parts[index] = change(parts[index])
        state[key][name] = tuple(parts)

    return apply


def put(key: str, name: str, value: Any) -> Change:
    """Puts a matrix into a state."""
    return lambda state: state[key].update({name: value})


# what is changed in a valid state in 4 bits, whose head has 8, and what the error says after the path
ODD: dict[str, tuple[Change, str]] = {
    "no dict": (lambda s: s.update(int8=[1]), "int8: must be of type dict, got list"),
    "no dict of 4 bits": (lambda s: s.update(int4=[1]), "int4: must be of type dict, got list"),
    "no pair": (put("int8", HEAD, 5), f"int8: {HEAD}: must be codes, scales"),
    "no triple": (put("int4", UP, (1, 2)), f"int4: {UP}: must be codes, scales, offsets"),
    "no codes": (put("int8", HEAD, (1, 2)), f"int8: {HEAD}: must be a tensor with a name"),
    "floats": (
        part(0, torch.Tensor.float, "int8"),
        f"int8: {HEAD}: must be a tensor of 8-bit integers, got torch.float32",
    ),
    "8-bit integers for two codes": (
        part(0, torch.Tensor.char),
        f"int4: {UP}: must be a tensor of bytes, got torch.int8",
    ),
    "scales in fp32": (part(1, torch.Tensor.float), "must be a tensor of bf16 numbers, got torch."),
    "sparse offsets": (part(2, torch.Tensor.to_sparse), "must be a tensor of bf16 numbers"),
    "one scale": (
        part(1, lambda scale: scale[:1], "int8"),
        f"int8: {HEAD}: must have scales of the shape (260,), got (1,)",
    ),
    "one offset": (
        part(2, lambda offset: offset[:1]),
        f"int4: {UP}: must have offsets of the shape (96, 1), got (1, 1)",
    ),
    "a code a byte": (
        part(0, lambda codes: codes.repeat(1, 2)),
        f"int4: {UP}: must have codes of the shape (96, 16), got (96, 32)",
    ),
    "codes by column": (
        part(0, lambda codes: codes.T.contiguous().T),
        f"int4: {UP}: must have codes of the shape (96, 16), got (96, 16)",
    ),
    "no dimension": (
        part(0, lambda codes: codes[0, 0]),
        f"int4: {UP}: must have codes of the shape (96, 16), got ()",
    ),
    "infinite scale": (part(1, lambda scale: scale * torch.inf), "that are not finite numbers"),
    "an offset that is no number": (
        part(2, lambda offset: offset * torch.nan),
        "has weights that are not finite numbers",
    ),
    "wrong shape": (
        part(0, lambda codes: codes[:9], "int8"),
        f"int8: {HEAD}: must have codes of the shape (260, 32), got (9, 32)",
    ),
    "4 bits without groups": (
        lambda s: s["int4"].update({HEAD: s["int8"].pop(HEAD)}),
        f"int4: {HEAD}: a matrix of the shape (260, 32) cannot have 4 bits",
    ),
    "missing": (lambda s: s["int8"].pop(HEAD), f"int4: {HEAD}: missing weight"),
    "missing in 4 bits": (lambda s: s["int4"].pop(UP), f"int4: {UP}: missing weight"),
    "only 4 bits": (lambda s: s.pop("int8"), "missing weight"),
    "unknown": (
        lambda s: s["int8"].update({"norm.weight": s["int8"][HEAD]}),
        "int4: norm.weight: not a matrix of 8 or 4 bits",
    ),
    "a name that is a number": (put("int4", 5, ()), "int4: 5: not a matrix of 8 or 4 bits"),
    "fp32 beside it": (
        lambda s: s["weights"].update({"norm.weight": torch.ones(32)}),
        "weights: norm.weight: must be a tensor of bf16 numbers, got torch.float32",
    ),
    "a norm is missing": (
        lambda s: s["weights"].pop("norm.weight"),
        "weights: norm.weight: missing weight",
    ),
    "verifier": (lambda s: s.update(stage="verifier"), "int4: is not supported for a verifier"),
}


@pytest.fixture(scope="module")
def odd_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in 4 bits, its head and ffn.down in 8."""
    out = tmp_path_factory.mktemp("odd") / "int4.ckpt"
    export_checkpoint(save(out.with_name("a.ckpt")), out, "int4", max_rise=0.1)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", ODD)
def test_odd_content_is_one_error_line(name, tmp_path, odd_base):
    change, found = ODD[name]
    state = checkpoint_format.read(odd_base)
    for key in ("weights", *ROUNDED):
        state[key] = dict(state[key])
    change(state)
    path = tmp_path / "odd.ckpt"
    checkpoint_format.write(path, state)
    with pytest.raises(DamagedError, match=f"^{re.escape(str(path))}: .*{re.escape(found)}"):
        load_model(path, as_stored=ROUNDED)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("mapped", [True, False])
def test_weights_of_a_model_that_generates_stay_in_the_file(tmp_path, mapped):
    """Each address is in a part of memory that the system maps from it; others are copies. It may
    be deleted.
    """
    ckpt = save(tmp_path / "a.ckpt")
    model = load_model(ckpt, mapped=mapped).model
    ranges = []
    for line in Path("/proc/self/maps").read_text("utf-8").splitlines():
        if line.endswith(str(ckpt)):
            ranges.append([int(end, 16) for end in line.split()[0].split("-")])
    is_mapped = [
        any(start <= weight.data_ptr() < end for start, end in ranges)
        for weight in model.parameters()
    ]
    assert set(is_mapped) == {mapped}
    expected = model(torch.tensor([[1, 2]]))
    ckpt.unlink()
    assert torch.equal(model(torch.tensor([[1, 2]])), expected)


@pytest.mark.slow
@pytest.mark.parametrize("precision", [None, "int8", "int4"])
def test_a_server_rounds_weights_when_it_loads(rounded, precision, caplog):
    """A rounded checkpoint stays as it is without --weights."""
    settings = EngineSettings(weights=precision, max_bpb_rise=0.1)
    with caplog.at_level(logging.INFO):
        loaded = load_served(rounded, settings)
    expected = precision or rounded.stem
    layer = {"int8": Int8Linear, "int4": Int4Linear}[expected]
    assert type(loaded.model.blocks[0].attention.qkv) is layer
    stored = "as in the checkpoint" if expected == rounded.stem else "bits per byte of"
    assert caplog.messages[-1].startswith(f"weights: {expected}, {stored}")
    other = "int4" if rounded.stem == "int8" else "int8"
    with pytest.raises(UserError, match=f"{other} raises the bits per byte"):
        load_served(rounded, EngineSettings(weights=other, max_bpb_rise=-1.0))
