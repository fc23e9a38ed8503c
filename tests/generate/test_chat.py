"""format_prompt and Chat: what the model reads for a question, with the tokens that end its answer."""

from collections.abc import Callable

import pytest
import torch

from tinylm.config.schema import ModelConfig, SamplingConfig
from tinylm.generate.chat import Chat, format_prompt
from tinylm.generate.engine import Engine
from tinylm.model.decoder import Decoder
from tinylm.rows.conversation import Turn
from tinylm.rows.template_factory import make_template
from tinylm.tokenizer.byte_char import ByteTokenizer

TOKENIZER = ByteTokenizer()
TEMPLATE = make_template("instruction", TOKENIZER)
EOS, SEP = 258, 259


@pytest.fixture
def make_engine() -> Callable[[int], Engine]:
    """Make an engine of a tiny untrained model with the given context."""

    def make(context: int) -> Engine:
        torch.manual_seed(0)
        config = ModelConfig(
            vocab_size=260, max_seq_len=context, d_model=8, n_heads=1, n_layers=1, d_ff=8
        )
        return Engine(Decoder(config), TOKENIZER)

    return make


def test_without_a_template_the_prompt_is_plain_text(make_engine):
    formatted = format_prompt(make_engine(64), "red", None)
    assert TOKENIZER.decode(formatted.prompt.ids) == "red"
    assert formatted.stop_ids == ()


def test_a_template_adds_its_markers_the_system_turn_and_its_stop_tokens(make_engine):
    """The template `instruction` ends an answer with <|sep|>, and EOS ends every text."""
    formatted = format_prompt(make_engine(128), "red", TEMPLATE, system="Be kind.")
    text = "### System: Be kind.\n### Instruction: red\n### Output:"
    assert TOKENIZER.decode(formatted.prompt.ids) == text
    assert formatted.stop_ids == (SEP, EOS)


def test_a_text_is_formatted_like_a_conversation_of_one_turn(make_engine):
    engine = make_engine(128)
    conversation = (Turn("user", "red"),)
    assert format_prompt(engine, "red", TEMPLATE) == format_prompt(engine, conversation, TEMPLATE)


def test_a_prompt_longer_than_the_context_loses_its_beginning(make_engine):
    """32 bytes with the markers; the last 16 stay."""
    prompt = format_prompt(make_engine(16), "red", TEMPLATE).prompt
    whole = "### Instruction: red\n### Output:"
    assert TOKENIZER.decode(prompt.ids) == whole[-16:]
    assert prompt.truncated == len(whole) - 16


def test_a_chat_repeats_the_conversation_and_drops_its_oldest_exchanges(make_engine):
    """120 of 160 positions are for the prompt; a question takes 32 tokens, an answer 6."""
    chat = Chat(make_engine(160), TEMPLATE, max_new_tokens=40)
    forgotten = []
    for word in ("red", "sky", "sea"):
        question = chat.ask(word)
        forgotten.append(question.n_forgotten)
        chat.remember(question, f" {word.upper()}\n")
    assert forgotten == [0, 0, 0]
    question = chat.ask("sun")
    assert question.n_forgotten == 1
    text = TOKENIZER.decode(question.prompt.ids)
    assert text.startswith("### Instruction: sky\n### Output: SKY\n")
    assert text.endswith("### Instruction: sun\n### Output:")


def test_a_question_reads_only_what_the_conversation_did_not_have(make_engine, monkeypatch):
    """The answer of 8 bytes without whitespace at its ends is repeated as it was generated; after it the model reads
    the next question in its template. The answer's last token was never read.
    """
    engine = make_engine(400)
    engine.model.eval()
    chat = Chat(engine, TEMPLATE, max_new_tokens=8)
    sampling = SamplingConfig(temperature=0, max_new_tokens=8)
    question = chat.ask("red")
    answer = next(iter(engine.generate(question.prompt, sampling, stop_ids=question.stop_ids)))
    chat.remember(question, answer.text)
    read: list[int] = []
    features = engine.model.features
    monkeypatch.setattr(
        engine.model,
        "features",
        lambda ids, **more: read.append(ids.size(1)) or features(ids, **more),
    )
    following = chat.ask("sky")
    engine.generate(following.prompt, sampling)
    assert read[0] < len(following.prompt.ids) - len(question.prompt.ids) + 1


def test_a_blank_answer_is_not_remembered(make_engine):
    chat = Chat(make_engine(160), TEMPLATE, max_new_tokens=40)
    chat.remember(chat.ask("red"), " \n")
    assert chat.exchanges == []
