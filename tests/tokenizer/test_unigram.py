"""Unigram: learned by the library, the same tokens each time, and like another tokenizer everywhere else."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, trainers

from tinylm.__main__ import main
from tinylm.common.errors import UserError
from tinylm.config.schema import DataConfig, TokenizerConfig
from tinylm.interchange.gguf_tokenizer import vocabulary_of
from tinylm.tokenizer import unigram
from tinylm.tokenizer.bpe_files import word_splitter
from tinylm.tokenizer.factory import tokenizer_from_plain
from tinylm.tokenizer.hf import HFTokenizer
from tinylm.tokenizer.hf_files import load_hf_tokenizer
from tinylm.tokenizer.pretokenize import BYTE_OF_CHARACTER, Pretokenizer
from tinylm.tokenizer.unigram import learn_unigram
from training.tokenizer import learn_from_documents

EOT = "<|endoftext|>"


@pytest.fixture(scope="module")
def learned(small_text) -> unigram.Unigram:
    return learn_unigram(small_text.splitlines(), 500, Pretokenizer())


@pytest.fixture(scope="module")
def tokenizer(learned) -> HFTokenizer:
    return HFTokenizer(learned.backend(), eos=learned.eos, pad=learned.pad)


@pytest.mark.slow
def test_the_same_text_gives_the_same_ids_though_the_librarys_order_differs(learned, small_text):
    """The tokens and scores are the library's; bytes that it puts back have one score."""
    again = learn_unigram(small_text.splitlines(), 500, Pretokenizer())
    assert again == learned
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = word_splitter(Pretokenizer())
    trainer = trainers.UnigramTrainer(
        vocab_size=498, initial_alphabet=sorted(BYTE_OF_CHARACTER), show_progress=False
    )
    texts = [one for line in small_text.splitlines() for one in line.split(EOT) if one]
    backend.train_from_iterator(texts, trainer)
    theirs = dict(json.loads(backend.to_str())["model"]["vocab"])
    assert theirs.keys() == dict(learned.pieces).keys() >= BYTE_OF_CHARACTER.keys()
    for piece, score in learned.pieces:
        assert score == pytest.approx(theirs[piece], abs=unigram.LOW_BAND)
        assert len(piece) == 1 or score == pytest.approx(theirs[piece], abs=1e-6)
    scores = [score for _, score in learned.pieces]
    assert scores == sorted(scores, reverse=True)


@settings(deadline=None, max_examples=50)
@given(text=st.text())
def test_any_text_round_trips_and_no_id_is_special(tokenizer, text):
    for spelled in (text, f"{text}{EOT}{text}"):
        ids = tokenizer.encode(spelled)
        assert tokenizer.decode(ids) == spelled
        assert max(ids, default=0) < 498
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (498, 499, 500)


@pytest.mark.slow
def test_files_and_checkpoints_have_the_tokenizer_that_transformers_reads(
    learned, tokenizer, small_text, tmp_path
):
    from transformers import AutoTokenizer

    learned.save(tmp_path / "mine")
    names = sorted(path.name for path in (tmp_path / "mine").iterdir())
    assert names == ["tokenizer.json", "tokenizer_config.json"]
    expected = tokenizer.encode(small_text)
    assert load_hf_tokenizer(str(tmp_path / "mine")).encode(small_text) == expected
    assert tokenizer_from_plain(tokenizer.to_plain()).encode(small_text) == expected
    theirs = AutoTokenizer.from_pretrained(tmp_path / "mine")
    assert theirs.encode(small_text, split_special_tokens=True) == expected


def test_gguf_refuses_it(tokenizer):
    with pytest.raises(
        UserError, match="^tokenizer: must be byte-level BPE with the words of GPT-2"
    ):
        vocabulary_of(tokenizer)


def test_a_run_learns_it_from_its_documents_once(tmp_path, small_text, monkeypatch):
    """The words of a regular expression of one's own hold for it as for BPE."""
    (tmp_path / "a.txt").write_text(small_text[:20_000], encoding="utf-8")
    data = DataConfig(dataset=str(tmp_path / "a.txt"), cache_dir=str(tmp_path / "cache"))
    config = TokenizerConfig(kind="unigram", vocab_size=300, pattern=r"\p{L}+|[^\p{L}]+")
    first = learn_from_documents(config, data, seed=1)
    [folder] = (tmp_path / "cache").glob("unigram-*")
    assert first.vocab_size == 300
    monkeypatch.setattr("training.tokenizer.learn_unigram", None)  # a second learning would fail
    assert learn_from_documents(config, data, seed=1).fingerprint == first.fingerprint


def test_no_text_is_an_error():
    with pytest.raises(UserError) as caught:
        learn_unigram(["", EOT], 300, Pretokenizer())
    assert str(caught.value) == (
        "tokenizer: the text has no words to learn from. Give a file with text."
    )


@pytest.mark.slow
def test_a_model_with_it_is_trained_sampled_and_exported(make_config, corpus, tmp_path, capsys):
    """transformers computes the same ids and logits from the export (which compares them itself). The
    folder in the cache is a tokenizer to encode files with.
    """
    from transformers import AutoTokenizer

    import infer
    import train
    from tinylm.checkpoint.load import load_model

    config = make_config(tokenizer={"kind": "unigram", "vocab_size": 300})
    assert train.main(["--config", str(config)]) == 0
    ckpt = str(tmp_path / "checkpoints" / "final.ckpt")
    [folder] = map(str, (tmp_path / "cache").glob("unigram-*"))
    encode = ["--tokenizer", folder, "--data", str(corpus), "--out", str(tmp_path / "a.bin")]
    assert main(["encode", *encode]) == 0
    words = ["--prompt", "the", "--max-new-tokens", "5", "--device", "cpu"]
    assert infer.main(["--ckpt", ckpt, *words]) == 0
    assert main(["export", ckpt, str(tmp_path / "out")]) == 0
    assert "its logits differ from ours by" in capsys.readouterr().err
    own = load_model(tmp_path / "checkpoints" / "final.ckpt").tokenizer
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "the model's naïve 東京\n\n  12"
    assert theirs.encode(text) == own.encode(text)
    assert main(["export", ckpt, str(tmp_path / "o.gguf"), "--format", "gguf"]) == 2
