"""An exported model in the lm-evaluation-harness: its own `hf` model gives the texts of ours."""

import logging
from pathlib import Path

import pytest

from tests.interchange.conftest import GPT2, TEXT
from tinylm.checkpoint.load import load_model
from tinylm.eval.lm_eval import harness_model
from tinylm.generate.engine import Engine
from tinylm.interchange.hf_export import export_hf
from tinylm.rows.template_factory import make_template

NEW_TOKENS = 12
# 64 positions: some prompts are shorter, one has exactly the room that is left, others are longer.
PROMPTS = ["the model", TEXT[:52], TEXT[:90], TEXT, "token " * 60]


class Request:
    """A request of the harness: a tuple of arguments."""

    def __init__(self, *args):
        self.args = args


def texts_of(model, prompts: list[str], **settings) -> list[str]:
    requests = [Request(prompt, dict(settings)) for prompt in prompts]
    return model.generate_until(requests, disable_tqdm=True)


def both(ckpt: Path, folder: Path):
    """The harness's hf model of an export, and ours of the checkpoint."""
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    exported = export_hf(ckpt, folder)
    assert exported.tokenizer_class == "AutoTokenizer"
    loaded = load_model(ckpt)
    stop_ids = ()
    if loaded.template:
        stop_ids = make_template(loaded.template, loaded.tokenizer).stop_ids(loaded.tokenizer)
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    return theirs, harness_model(Engine(loaded.model, loaded.tokenizer), stop_ids=stop_ids)


@pytest.mark.parametrize(
    ("stage", "model"),
    [
        pytest.param("pretrain", {}, id="llama"),
        pytest.param("pretrain", GPT2, id="gpt2", marks=pytest.mark.slow),
        pytest.param("sft", {}, id="llama, tuned", marks=pytest.mark.slow),
    ],
)
def test_both_generate_the_same_text_from_short_and_long_prompts(stage, model, save, tmp_path):
    theirs, ours = both(save(stage=stage, **model), tmp_path / "out")
    settings = {"until": ["ing"], "max_gen_toks": NEW_TOKENS}
    expected = texts_of(theirs, PROMPTS, **settings)
    assert texts_of(ours, PROMPTS, **settings) == expected
    assert len(set(expected)) > 1


@pytest.mark.slow
def test_the_task_decides_how_long_a_text_is(save, tmp_path):
    """sampling.max_new_tokens is that of samples; a longer answer is not cut, a shorter one not stretched."""
    ckpt = save(config={"sampling": {"max_new_tokens": 3}})
    theirs, ours = both(ckpt, tmp_path / "out")
    for n in (2, 20):
        [expected] = texts_of(theirs, PROMPTS[:1], until=[], max_gen_toks=n)
        assert texts_of(ours, PROMPTS[:1], until=[], max_gen_toks=n) == [expected]


@pytest.mark.slow
def test_a_task_without_room_for_a_prompt_is_answered_with_a_warning(save, tmp_path, caplog):
    _, ours = both(save(), tmp_path / "out")
    with caplog.at_level(logging.WARNING, logger="tinylm"):
        [text] = texts_of(ours, PROMPTS[:1], until=[], max_gen_toks=64)
    assert text
    assert "max_gen_toks (64) leaves no room for a prompt in a context of 64 tokens" in caplog.text
