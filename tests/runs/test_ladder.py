"""The ladder: its steps, its errors, and one of real runs at toy size."""

import json
import re
from pathlib import Path

import pytest

import train
from tinylm.__main__ import main
from tinylm.common.errors import UserError
from tinylm.config.loader import load_config
from tinylm.model.decoder import Decoder, flops_per_token
from tinylm.runs import experiments, ladder

ROOT = Path(__file__).parents[2]


def test_a_ladder_has_a_run_per_depth_and_seed_smallest_first(monkeypatch):
    monkeypatch.chdir(ROOT)
    steps = ladder.plan_ladder(Path("out"), [2, 1], 2, ["training.seq_len=64"])
    assert [step.name for step in steps] == [
        "ladder: depth1-seed1",
        "ladder: depth1-seed2",
        "ladder: depth2-seed1",
        "ladder: depth2-seed2",
    ]
    config = load_config(steps[3].command[2], steps[3].command[3:])
    assert (config.model.n_layers, config.model.d_model) == (2, 64)
    assert (config.training.seed, config.training.seq_len) == (2, 64)


def test_the_first_four_depths_have_at_most_a_million_and_a_half_inner_parameters(monkeypatch):
    """4 layers of 128: q, k, v and out 4 · 128², swiglu 3 · 128 · 384, two norms, and the last."""
    monkeypatch.chdir(ROOT)
    config = load_config(ladder.CONFIG, ["model.depth=4", "model.vocab_size=512"])
    model = Decoder(config.model)
    inner = sum(weight.numel() for weight in model.parameters()) - 2 * 512 * 128
    assert inner == 4 * (4 * 128**2 + 3 * 128 * 384 + 2 * 128) + 128 < 1_500_000


@pytest.mark.parametrize(
    ("depths", "seeds", "message"),
    [
        (
            "1,2,3,4",
            "1",
            "error: --depths: a law of three parameters needs 4 runs at 3 depths below the last, "
            "got 3 at 3. Give more depths, or --seeds 2.\n",
        ),
        (
            "1,2,3",
            "9",
            "error: --depths: a law of three parameters needs 4 runs at 3 depths below the last, "
            "got 18 at 2. Give more depths, or --seeds 2.\n",
        ),
        (
            "1,1,2,3,4",
            "1",
            "error: --depths: must be different numbers from 1. For example 1,2,3,4,5.\n",
        ),
        (
            "1,two",
            "1",
            "error: --depths: must be whole numbers with commas, got 1,two. For example 1,2,3,4.\n",
        ),
    ],
)
def test_depths_that_give_no_law_are_an_error(depths, seeds, message, capsys):
    assert main(["experiments", "ladder", "--depths", depths, "--seeds", seeds]) == 2
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("words", [[], ["stairs"], ["ladder", "--phase", "smoke"]])
def test_experiments_need_a_phase_or_the_word_ladder(words, capsys):
    assert main(["experiments", *words]) == 2
    assert capsys.readouterr().err == (
        "error: experiments: needs a phase, or the word ladder. "
        "For example: python -m tinylm experiments --phase smoke.\n"
    )


def train_here(step: experiments.Step, child: object) -> int:
    """As `experiments._run`, in this process."""
    code = train.main(list(step.command[1:]))
    step.record.write_text(json.dumps(experiments.step_inputs(step)), encoding="utf-8")
    return code


@pytest.mark.slow
def test_a_ladder_reports_its_runs_its_law_and_the_next_size(tmp_path, monkeypatch, capsys):
    """Compute is what the decoder counts per token times 2 steps of 2 rows of 64 tokens; the law is
    the one of `fit_rungs`; a second call trains nothing.
    """
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(experiments, "_run", train_here)
    settings = ["tokenizer.kind=byte", "tokenizer.vocab_size=null", "data.val_docs=1"]
    settings += ["training.duration=null", "training.max_steps=2", "training.seq_len=64"]
    settings += ["training.micro_batch_size=2", "training.grad_accum_steps=1"]
    command = ["experiments", "ladder", *settings, "--out", str(tmp_path)]
    assert main(command) == 0
    report = (tmp_path / "ladder/report.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| (\d+) \| (\d) \|.*\| (\S+) \| (\S+) \|$", report, re.MULTILINE)
    assert [row[:3] for row in rows] == [(str(d), str(32 * d), "1") for d in (1, 2, 3, 4, 5)]
    config = load_config(ladder.CONFIG, ["model.depth=3", "model.vocab_size=260"])
    compute = flops_per_token(Decoder(config.model), 64) * 2 * 2 * 64
    assert float(rows[2][3]) == pytest.approx(compute, rel=5e-3)  # three digits
    rungs = []
    for step in ladder.plan_ladder(tmp_path / "ladder", [1, 2, 3, 4], 1, settings):
        rungs.append(ladder.read_rung(step))
    fit = ladder.fit_rungs(rungs)
    assert ladder.describe_law(fit) in report
    (following,) = ladder.plan_ladder(tmp_path / "ladder", [5], 1, settings)
    line = ladder.describe_next(fit, ladder.read_rung(following))
    assert line.startswith("depth 5: predicted ") and line in report
    assert (tmp_path / "ladder/ladder.png").stat().st_size > 1000
    capsys.readouterr()
    monkeypatch.setattr(experiments, "_run", None)
    assert main(command) == 0
    assert capsys.readouterr().err.count("already done") == 5


def test_the_documents_of_a_seed_do_not_change_the_law():
    """Runs on L = 1.5 + 2 C^-0.25, and the same with seed 2, whose documents cost 0.3 more."""
    rungs = []
    for seed, more in ((1, 0.0), (2, 0.3)):
        for depth, compute in ((1, 1e8), (2, 1e10), (3, 1e12)):
            loss = 1.5 + 2 * (compute / 1e8) ** -0.25 + more
            rungs.append(ladder.Rung(depth, seed, 32 * depth, 0, 0, 0, compute, loss))
    assert ladder.seed_offsets(rungs) == pytest.approx({1: 0.0, 2: 0.3})
    fit = ladder.fit_rungs(rungs)
    assert fit.freedom == 6 - 3 - 1
    predicted = fit.predict(1e16)
    assert [predicted.value, predicted.low, predicted.high] == pytest.approx([1.52] * 3, abs=1e-6)


def test_a_rung_that_is_not_finished_has_no_loss(tmp_path):
    (step,) = ladder.plan_ladder(tmp_path, [1], 1, [])
    with pytest.raises(UserError, match="final.ckpt"):
        ladder.read_rung(step)
