"""Statistics of a corpus: lengths as the tokenizer gives them, and what a seq_len cuts."""

import json
from pathlib import Path

import numpy as np
import pytest

from tinylm.__main__ import main
from tinylm.common.errors import UserError
from tinylm.text.named_sources import sources_named
from tinylm.text.scripts import language_of
from tinylm.tokenizer.byte_char import ByteTokenizer
from tinylm.tokens.length_stats import fits, measure_corpus, recommended

SENTENCES = {
    "English": "It was the best of times, and it was the worst of times for the people of that town.",
    "German": "Die Leute in der Stadt sind nicht alle mit dem Zug und dem Schiff von Hamburg gekommen.",
    "French": "Les gens de la ville ne sont pas tous venus dans le train et des bateaux, que je sache.",
    "Spanish": "Los hombres y las mujeres del pueblo que viven en el valle tienen una casa para el verano.",
    "Italian": "Il treno della sera non è un treno di lusso, ma per il paese è una cosa che conta.",
}


def test_lengths_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    """Bytes and one EOS each, whatever the chunks: UTF-8 counts them."""
    texts = [*SENTENCES.values(), "東京 9", "x" * 300]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    measured = measure_corpus(sources_named([str(path)]), ByteTokenizer())
    assert measured.lengths.tolist() == [len(text.encode()) + 1 for text in texts]
    assert measured.characters.total() == sum(map(len, texts))
    assert measured.n_bytes == sum(len(text.encode()) for text in texts)
    assert measured.languages == dict.fromkeys(SENTENCES, 1) | {"unknown": 2}


@pytest.mark.parametrize("language", SENTENCES)
def test_a_language_is_guessed_by_its_function_words(language: str) -> None:
    assert language_of(SENTENCES[language]) == language


def test_a_seq_len_takes_95_percent_of_the_documents_whole() -> None:
    """Of 100 documents 95 have at most 128 tokens; at 128 the other five lose 72 tokens each."""
    lengths = np.array([100] * 95 + [200] * 5)
    assert recommended(lengths) == 128
    fit = next(fit for fit in fits(lengths) if fit.seq_len == 128)
    assert fit.whole == 0.95
    assert fit.cut == pytest.approx(5 * 72 / 10500)
    assert fit.padding == pytest.approx(95 * 28 / (128 * 100))


def test_the_command_prints_its_tables(tmp_path: Path, monkeypatch, capsys) -> None:
    """Documents of 3, 3 and 90 bytes, each with EOS: 4, 4 and 91 tokens of 99."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("abc\nxyz\n" + "x" * 90 + "\n", encoding="utf-8")
    assert main(["data", "stats", "--data", "a.txt", "--tokenizer", "byte"]) == 0
    out = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert out == [
        "3 documents, 96 characters, 99 tokens with one EOS each, 1.00 bytes per token",
        "characters: Latin 100.0%",
        "languages, guessed: unknown 100.0%",
        "tokens, at most documents of all tokens",
        "4 2 8.1% ##############################",
        "128 1 91.9% ###############",
        "length of a document in tokens, 50%: 4, 90%: 91, 95%: 91, 99%: 91, 100%: 91",
        "seq_len documents whole tokens cut padding, one document a row",
        "64 66.7% 27.3% 62.5%",
        "128 100.0% 0.0% 74.2%",
        "recommended training.seq_len: 128, the smallest that takes 95% of the documents whole. "
        "Packed rows, as in train.py, have no padding and lose nothing: what is cut continues in the "
        "next row.",
    ]


def test_a_bad_row_ends_the_statistics(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n3\n', encoding="utf-8")
    with pytest.raises(UserError, match="a.jsonl:2: expected an object"):
        measure_corpus(sources_named([str(path)]), ByteTokenizer())
