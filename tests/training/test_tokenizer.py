"""The tokenizer of a run: learned from its training documents, once."""

import json
from pathlib import Path

import pytest

from tinylm.common.errors import UserError
from tinylm.config.schema import DataConfig, TokenizerConfig
from tinylm.tokenizer import bpe_fast
from tinylm.tokenizer.factory import make_tokenizer, tokenizer_from_plain
from training.tokenizer import learn_from_documents, learn_from_texts


@pytest.fixture
def data(tmp_path) -> DataConfig:
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"the newest widest lowest {n}"}) + "\n" for n in range(200)),
        encoding="utf-8",
    )
    return DataConfig(dataset=str(tmp_path / "text.jsonl"), cache_dir=str(tmp_path / "cache"))


def cached(data: DataConfig) -> list[Path]:
    return sorted(path for path in Path(data.cache_dir).glob("bpe-*"))


def test_a_run_learns_from_its_training_split_once(data, monkeypatch):
    config = TokenizerConfig(kind="bpe", vocab_size=280)
    first = learn_from_documents(config, data, seed=1)
    assert first.vocab_size == 280
    monkeypatch.setattr(bpe_fast, "count_words_of", None)  # a second learning would fail
    assert learn_from_documents(config, data, seed=1).fingerprint == first.fingerprint
    assert tokenizer_from_plain(first.to_plain()).encode("the lowest") == first.encode("the lowest")


@pytest.mark.slow
def test_a_cached_tokenizer_is_found_by_the_content_of_the_text_and_the_settings(data):
    config = TokenizerConfig(kind="bpe", vocab_size=280)
    learn_from_documents(config, data, seed=1)
    other_place = Path(data.dataset).rename(Path(data.dataset).with_name("moved.jsonl"))
    moved = data.model_copy(update={"dataset": str(other_place)})
    learn_from_documents(config, moved, seed=1)
    assert len(cached(data)) == 1
    own = {"pattern": r"\p{L}+"}
    for changed in ({"vocab_size": 281}, {"pattern": "gpt4"}, own, {"learn_docs": 5}):
        learn_from_documents(config.model_copy(update=changed), moved, seed=1)
    learn_from_documents(config, moved, seed=2)  # which documents are held out
    learn_from_documents(config, moved.model_copy(update={"train_docs": 7}), seed=1)
    with open(other_place, "a", encoding="utf-8") as file:
        file.write('{"text": "one more document of the training split"}\n')
    learn_from_documents(config, moved, seed=1)
    assert len(cached(data)) == 8


def test_learn_docs_bounds_what_is_read(tmp_path):
    """`ab` ten times, then `cd`: the first ten documents have only `ab`, so one merge."""
    (tmp_path / "a.jsonl").write_text(
        '{"text": "ab"}\n' * 10 + '{"text": "cd"}\n' * 90, encoding="utf-8"
    )
    data = DataConfig(
        dataset=str(tmp_path / "a.jsonl"),
        cache_dir=str(tmp_path / "cache"),
        val_dataset=str(tmp_path / "a.jsonl"),
    )
    assert (
        learn_from_documents(
            TokenizerConfig(kind="bpe", vocab_size=300, learn_docs=10), data, seed=1
        ).vocab_size
        == 259
    )
    assert (
        learn_from_documents(TokenizerConfig(kind="bpe", vocab_size=300), data, seed=1).vocab_size
        == 260
    )


def test_an_endless_stream_is_not_read():
    data = DataConfig(
        dataset="nobody/nothing", streaming=True, val_docs=10, val_dataset="nobody/else"
    )
    with pytest.raises(
        UserError,
        match="^tokenizer.learn_docs: kind bpe would read all of a streamed dataset. Set "
        "tokenizer.learn_docs, for example to 100000.$",
    ):
        learn_from_documents(TokenizerConfig(kind="bpe", vocab_size=300), data, seed=1)


def test_other_kinds_are_not_bpe(data):
    assert make_tokenizer(TokenizerConfig()).kind == "byte"
    assert learn_from_documents(TokenizerConfig(kind="char"), data, seed=1).kind == "char"
    with pytest.raises(ValueError, match="kind bpe is learned"):
        make_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300))


def test_a_tokenizer_that_is_not_cached_is_the_one_that_would_be(data):
    """With all documents for training, the texts and the tokenizer in the checkpoint are the same."""
    config = TokenizerConfig(kind="bpe", vocab_size=280)
    cached_one = learn_from_documents(
        config, data.model_copy(update={"val_dataset": data.dataset}), seed=1
    )
    rows = Path(data.dataset).read_text(encoding="utf-8").splitlines()
    texts = [json.loads(row)["text"] for row in rows]
    assert learn_from_texts(config, texts).to_plain() == cached_one.to_plain()
