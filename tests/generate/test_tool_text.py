"""Tool calls in generation: the result is the calculator's, whatever the model would have written,
alone, in a batch, streamed, in every program; and reinforcement learning masks it.
"""

from pathlib import Path

import pytest
import torch

import infer
import tinylm
from tests.conftest import state_of
from tinylm.checkpoint import format as checkpoint_format
from tinylm.common.errors import UserError
from tinylm.config.finetuning import GrpoConfig
from tinylm.config.schema import Config, SamplingConfig
from tinylm.generate.constraint import Constraint
from tinylm.generate.engine import Engine, Request
from tinylm.generate.output import Completion
from tinylm.model.decoder import Decoder
from tinylm.rewards.rollouts import pad_rollouts, sample_rollouts
from tinylm.rewards.table import RewardSum
from tinylm.rows.prompts import PromptRow
from tinylm.rows.template_factory import make_template
from tinylm.tokenizer.byte_char import ByteTokenizer
from tinylm.tokens.packing import IGNORE_INDEX

BYTES = ByteTokenizer()
# ? is where a result comes; the model would write it.
SCRIPT = "So 4*6=<<4*6=????24, less 1/0: <<1/0=???????, 12/5 is <<12/5=?????2.4.\n"
TEXT = SCRIPT.replace("????24", "24>>24").replace("???????", "error>>").replace("?????", "2.4>>")


def write_script(
    path: Path, script: str = SCRIPT, *, n_prompt: int = 1, tools: str | None = "calculator"
) -> Path:
    """Writes a fine-tuned checkpoint that answers any prompt of n_prompt bytes with `script` and the
    end of template instruction. Its logits depend on the position alone: token embeddings are 0,
    position embeddings are the unit vectors, and the blocks add nothing.
    """
    [end] = make_template("instruction", BYTES).stop_ids(BYTES)[:1]
    ids = [0] * (n_prompt - 1) + list(script.encode()) + [end]
    n = len(ids)
    shape = {
        "vocab_size": 260, "max_seq_len": n, "n_layers": 1, "d_model": n + n % 2, "n_heads": 1,
        "position": "learned", "tie_embeddings": False,
    }  # fmt: skip
    data = {"tools": tools}
    config = Config.model_validate({"model": shape, "data": data, "training": {"seq_len": n}})
    model = Decoder(config.model)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.zero_()
        model.positions.weight.copy_(torch.eye(n, n + n % 2))
        model.head.weight[ids, torch.arange(n)] = 8 / (n + n % 2) ** 0.5  # the norm gives sqrt(d)
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint_format.write(path, state_of(config, model, "sft"))
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_script(tmp_path_factory.mktemp("script") / "final.ckpt")


def engine_of(checkpoint: Path, **settings: object) -> Engine:
    model = tinylm.load(checkpoint).model
    return Engine(model, BYTES, tools="calculator", **settings)


def settings(**given: object) -> SamplingConfig:
    return SamplingConfig(max_new_tokens=len(SCRIPT), temperature=0).model_copy(update=given)


# --- the engine -----------------------------------------------------------------------------------


def test_results_are_written_by_the_tool(checkpoint: Path) -> None:
    """Division by zero is the fixed text; each token is marked and has the log-probability 0."""
    outputs = list(engine_of(checkpoint).stream("x", settings()))
    assert "".join(output.text for output in outputs) == TEXT
    by_tool = "".join(chr(output.token_id) for output in outputs if output.by_tool)
    assert by_tool == "24>>error>>2.4>>"
    for output in outputs:
        assert (output.log_prob == 0) == output.by_tool
    completion = Completion.of(engine_of(checkpoint).encode_prompt("x"), outputs)
    assert bytes(completion.ids).decode() == TEXT
    assert completion.log_prob == pytest.approx(
        sum(output.log_prob for output in outputs if not output.by_tool)
    )


def test_without_the_setting_the_model_writes_its_own(checkpoint: Path) -> None:
    [completion] = Engine(tinylm.load(checkpoint).model, BYTES).generate("x", settings())
    assert completion.text == SCRIPT and not any(completion.by_tool)


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_text_is_the_same_alone_and_in_a_batch(checkpoint: Path, deterministic: bool) -> None:
    """Prompts of other lengths call at other steps; three texts in two slots, at temperature 1."""
    kind = {"slots": 2, "deterministic": deterministic}
    requests = []
    for n in (1, 4, 2):
        sampling = settings(temperature=1.0, seed=n, max_new_tokens=45)
        requests.append(Request(engine_of(checkpoint).encode_prompt("x" * n), sampling))
    together = list(engine_of(checkpoint, **kind).complete(requests))
    for request, found in zip(requests, together, strict=True):
        [alone] = engine_of(checkpoint, **kind).complete([request])
        assert (alone.ids, alone.by_tool) == (found.ids, found.by_tool)
    assert len({text.ids for text in together}) == 3
    assert sum(any(text.by_tool) for text in together) >= 2


def test_the_cache_of_a_finished_text_continues_after_a_call(checkpoint: Path) -> None:
    """The next prompt begins with the first text and its result; the rest is as without the cache."""
    engine = engine_of(checkpoint)
    [first] = engine.generate("x", settings(max_new_tokens=20))
    prompt = "x" + first.text
    [second] = engine.generate(prompt, settings(max_new_tokens=30))
    [fresh] = engine_of(checkpoint).generate(prompt, settings(max_new_tokens=30))
    assert first.text == TEXT[:20] and second.ids == fresh.ids
    assert second.text == TEXT[20:50]


@pytest.mark.parametrize("n", [14, 15, 16, 17])
def test_results_count_as_new_tokens(checkpoint: Path, n: int) -> None:
    """A text can end by its length within a result."""
    [completion] = engine_of(checkpoint).generate("x", settings(max_new_tokens=n))
    assert (completion.text, completion.finish_reason) == (TEXT[:n], "length")


def test_a_stop_string_in_a_result_ends_the_text(checkpoint: Path) -> None:
    [completion] = engine_of(checkpoint).generate("x", settings(stop=("4>>",)))
    assert (completion.text, completion.finish_reason) == ("So 4*6=<<4*6=2", "stop")


def test_a_constraint_and_a_prompt_call_nothing(checkpoint: Path) -> None:
    """A constraint says what each character is; an open call of the prompt is not the model's."""
    free = Constraint("regex", "(.|\n)*", "--regex")
    [completion] = engine_of(checkpoint).generate("x", settings(), constraint=free)
    assert completion.text == SCRIPT
    [completion] = engine_of(checkpoint).generate("x<<2+3=", settings(max_new_tokens=4))
    assert not any(completion.by_tool)


def test_ways_that_cannot_call_are_refused(checkpoint: Path) -> None:
    engine = engine_of(checkpoint)
    problem = "data.tools: the model calls a calculator, which is not supported with"
    with pytest.raises(UserError, match=f"{problem} beam search. Set n_beams to 1."):
        engine.generate("x", settings(n_beams=2))
    with pytest.raises(UserError, match=f"{problem} lookup. Generate without lookup."):
        list(engine.stream("x", settings(), lookup=True))


# --- programs and stages --------------------------------------------------------------------------


@pytest.mark.slow
def test_programs_read_the_switch_in_the_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`### Instruction: x⏎### Output:` has 30 bytes."""
    path = write_script(tmp_path / "final.ckpt", n_prompt=30)
    sampling = ["--temperature", "0", "--max-new-tokens", "99", "--device", "cpu"]
    assert infer.main(["--ckpt", str(path), "--prompt", "x", *sampling]) == 0
    assert TEXT.strip() in capsys.readouterr().out
    model = tinylm.load(path)
    assert model.chat("x", temperature=0) == TEXT.strip()
    assert "".join(model.chat_stream("x", temperature=0)).strip() == TEXT.strip()
    plain = tinylm.load(write_script(tmp_path / "plain.ckpt", n_prompt=30, tools=None))
    assert plain.chat("x", temperature=0) == SCRIPT.strip()


def test_what_the_tool_wrote_has_no_loss_in_grpo(checkpoint: Path) -> None:
    """Of the labels of a sampled answer, those of the results alone are masked."""
    sampling = SamplingConfig(max_new_tokens=len(SCRIPT), temperature=0.1)
    prompt = PromptRow(torch.tensor([120]).numpy(), "x", "2.4", "row 1")
    engine = engine_of(checkpoint, deterministic=True)
    rollouts = sample_rollouts(
        engine, [prompt], [0], 2, sampling=sampling, max_len=len(TEXT) + 2, stop_ids=()
    )
    scored = RewardSum(GrpoConfig(), "cpu")([rollout.answer for rollout in rollouts])
    assert [item.reward for item in scored] == [1.0, 1.0]
    batch = pad_rollouts(rollouts, BYTES.pad_id, seq_len=len(TEXT) + 1)
    assert batch["input_ids"].shape == (2, len(TEXT) + 1), "not rounded up beyond the context"
    for inputs, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        written = inputs[1 : len(TEXT)] + [ord(TEXT[-1])]
        assert bytes(written).decode() == TEXT
        trained = [chr(i) for i in labels[: len(TEXT)] if i != IGNORE_INDEX]
        assert "".join(trained) == SCRIPT.replace("?", "")
