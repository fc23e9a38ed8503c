"""Cleaning: planted duplicates, contamination and poor text are found, and nothing else."""

import json
from pathlib import Path

import numpy as np
import pytest

from tinylm.__main__ import main as run_command
from tinylm.common.errors import UserError
from tinylm.text import clean as cleaning
from tinylm.text.clean import EVALUATION, EXACT, NEAR, CleanSpec, clean
from tinylm.text.contamination import ngram_index
from tinylm.text.minhash import near_duplicates, signature, similarity
from tinylm.text.named_sources import sources_named
from tinylm.text.quality import RULES, Measured, first_failure
from tinylm.text.shingles import ngram_hashes, word_hashes, words_of

ROW = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
)


def random_texts(rng: np.random.Generator, n: int, vocabulary: int = 5000) -> list[list[str]]:
    """Texts of 80 to 200 random words, which have next to no runs of five words in common."""
    return [
        [f"w{i}" for i in rng.integers(vocabulary, size=rng.integers(80, 200))] for _ in range(n)
    ]


def planted_corpus(path: Path) -> dict[int, str]:
    """A corpus of 400 documents; gives the planted ones with their reasons.

    Changing 1 word in 150 changes 5 of 146 shingles: J = 141 / 151 = 0.93. Changing every 12th word
    leaves J below 0.45, which is no near duplicate.
    """
    rng = np.random.default_rng(1)
    texts = random_texts(rng, 400)
    planted: dict[int, str] = {}
    originals = list(range(0, 100))
    for number, original in zip(range(200, 230), originals[:30], strict=True):
        texts[number] = texts[original]
        planted[number] = EXACT
    for number, original in zip(range(230, 270), originals[30:70], strict=True):
        texts[number] = [*texts[original]]
        texts[number][int(rng.integers(80))] = "changed"
        planted[number] = NEAR
    for number, original in zip(range(270, 290), originals[70:90], strict=True):
        texts[number] = [w if i % 12 else "other" for i, w in enumerate(texts[original])]
    for number in range(290, 300):
        texts[number][40:40] = (
            ROW.upper().replace(",", " --").split()[: 14 + number - 290]
        )  # -- is no word
        planted[number] = EVALUATION
    for number in range(300, 305):
        texts[number] = ["7", "-", "8"] * 30
        planted[number] = "no_letters"
    for number in range(305, 310):  # 12 words in a row in common: no contamination
        texts[number][40:40] = words_of(ROW)[:12]
    lines = [json.dumps({"text": " ".join(words)}) for words in texts]
    path.write_text("\n".join(lines), encoding="utf-8")
    return planted


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> tuple[Path, dict[int, str]]:
    path = tmp_path_factory.mktemp("planted") / "a.jsonl"
    return path, planted_corpus(path)


def kept_numbers(path: Path, out: Path) -> list[int]:
    """The numbers of the documents of a corpus that were written, by their order."""
    texts = [json.loads(line)["text"] for line in path.read_text("utf-8").split("\n")]
    found, number = [], -1
    for line in out.read_text("utf-8").splitlines():
        number = texts.index(json.loads(line)["text"], number + 1)
        found.append(number)
    return found


@pytest.mark.slow
def test_planted_documents_are_found_and_nothing_else(planted, tmp_path):
    """Recall and precision of each reason are 1, and the first of equal documents is kept."""
    path, expected = planted
    spec = CleanSpec(evaluation=ngram_index([("gsm8k: row 1", ROW)]))
    report = clean(sources_named([str(path)]), tmp_path / "out.jsonl", spec)
    removed = set(range(400)) - set(kept_numbers(path, tmp_path / "out.jsonl"))
    right = removed & expected.keys()
    print(f"recall {len(right) / len(expected):.3f}, precision {len(right) / len(removed):.3f}")
    assert removed == expected.keys()
    assert report.removed == {
        reason: list(expected.values()).count(reason) for reason in set(expected.values())
    }
    assert (report.documents, report.kept) == (400, 400 - len(expected))
    (near, *_) = report.examples[NEAR]
    assert near["document"] == 231 and near["detail"].startswith("of document 31, similarity 0.9")
    assert report.examples[EXACT][4]["detail"] == "of document 5"
    assert len(report.examples[EXACT]) == 5
    expected_words = " ".join(words_of(ROW)[:13])
    assert report.examples[EVALUATION][0]["detail"] == f"gsm8k: row 1: {expected_words}"


@pytest.mark.slow
def test_the_result_does_not_depend_on_the_number_of_processes(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(cleaning, "WORTH_PROCESSES", 0)
    monkeypatch.setattr("tinylm.text.documents.SPAN_BYTES", 2**14)
    reports = []
    for processes in (1, 2):
        source = sources_named([str(planted[0])])
        reports.append(
            clean(source, tmp_path / f"{processes}.jsonl", CleanSpec(), processes=processes)
        )
    assert reports[0] == reports[1]
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()


def test_a_source_that_changed_meanwhile_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("one document\nanother document\n", encoding="utf-8")
    examine = cleaning._examine

    def and_append(*arguments):
        found = examine(*arguments)
        path.write_text("one document\n", encoding="utf-8")
        return found

    monkeypatch.setattr(cleaning, "_examine", and_append)
    with pytest.raises(
        UserError, match="had 2 documents when it was first read, and now has others"
    ):
        clean(sources_named([str(path)]), tmp_path / "out.jsonl", CleanSpec())
    assert not (tmp_path / "out.jsonl").exists()


# --- MinHash ---


@pytest.mark.parametrize("shared", [0, 20, 50, 80, 95, 100])
def test_equal_places_of_signatures_estimate_the_jaccard_similarity(shared):
    """Within 4.5 standard deviations sqrt(J (1 - J) / 112) of the J that is counted with sets."""
    rng = np.random.default_rng(shared)
    first = [f"w{i}" for i in rng.integers(10_000, size=400)]
    second = [w if i % 100 < shared else f"x{i}" for i, w in enumerate(first)]
    hashes = [word_hashes(words) for words in (first, second)]
    sets = [set(ngram_hashes(words, 5).tolist()) for words in hashes]
    jaccard = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    estimate = float(similarity(*map(signature, hashes)))
    assert abs(estimate - jaccard) <= 4.5 * np.sqrt(jaccard * (1 - jaccard) / 112) + 1e-9


def test_a_chain_of_near_duplicates_has_one_first():
    """Documents 0, 2 and 3 are equal, as are 1 and 4; 5 is alone and 6 is no candidate."""
    rng = np.random.default_rng(0)
    made = rng.integers(0, 2**32, (7, 112), dtype=np.uint32)
    made[2] = made[3] = made[0]
    made[4], made[6] = made[1], made[5]
    first = near_duplicates(made, np.array([0, 1, 2, 3, 4, 5]), 0.8)
    assert first.tolist() == [0, 1, 0, 0, 1, 5]


def test_ngram_hashes_are_of_runs_of_words():
    """The run "b c" has one hash wherever it is, and another order has another hash."""
    first, second = (ngram_hashes(word_hashes(t.split()), 2) for t in ("a b c", "x b c b"))
    assert first[1] == second[1]
    assert len({*first.tolist(), *second.tolist()}) == 4
    assert len(ngram_hashes(word_hashes(["a"]), 2)) == 0


def test_long_documents_have_the_signature_of_all_their_shingles(monkeypatch):
    words = word_hashes([f"w{i}" for i in range(300)])
    whole = signature(words)
    monkeypatch.setattr("tinylm.text.minhash.BLOCK", 7)
    assert (signature(words) == whole).all()


# --- rules and evaluation rows ---


@pytest.mark.parametrize(
    ("text", "rules", "name"),
    [
        ("A sentence of some length.", "basic", None),
        ("1 2 3 four", "basic", "no_letters"),
        ("ab\ufffd" * 20, "basic", "broken"),
        ("a line\n" * 4, "basic", None),  # fewer than 5 lines
        ("a line\n" * 2 + "b\nc\nd\ne\n", "basic", "repeated_text"),  # 6 of 16 characters
        ("}\n" * 9 + "a much longer line than the others here, by far\n", "basic", None),
        ("the cat and dog " * 20, "basic", "top_2gram"),  # the cat: 6 of 12 characters
        ("the of " + "word" * 3, "gopher", "few_words"),
        ("- a b c\n" * 60, "gopher", "word_length"),
        (" ".join(f"wort{i}" for i in range(60)), "gopher", "stop_words"),
        ("the of # " + " ".join(f"word{i}" for i in range(60)), "gopher", None),
        ("the of " + " ".join(f"# word{i}" for i in range(60)), "gopher", "symbols"),
    ],
)
def test_a_rule_removes_what_it_names(text, rules, name):
    """The numbers are those of Rae et al. 2021, counted by hand."""
    failed = first_failure(Measured(text), RULES[rules])
    assert (failed and failed.name) == name


def test_short_evaluation_rows_are_compared_whole_or_counted():
    """9 words are compared as 9 in a row, 7 words are not compared."""
    index = ngram_index([("a", "one two three four five six seven eight nine"), ("b", "Is it so?")])
    assert (index.names, index.n_short) == (["a"], 1)
    for text, found in (
        ("x one TWO, three four five six seven eight nine y", "a"),
        ("one two three four five six seven eight", None),
    ):
        words = words_of(text)
        overlap = index.find(words, word_hashes(words))
        assert (overlap and overlap.row) == found


# --- the command ---


def test_the_command_prints_what_was_removed_and_both_paths(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(f"One document.\nOne document.\nAnother. {ROW}\n", encoding="utf-8")
    Path("rows.csv").write_text(f'q,a\n"{ROW}",72\n', encoding="utf-8")
    words = ["data", "clean", "--data", "a.txt", "--out", "b.jsonl", "--against", "rows.csv"]
    assert run_command(words) == 0
    out = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()) for line in out] == [
        "documents characters the first",
        f"read 3 {26 + 9 + len(ROW)}",
        "removed: duplicate 1 13 document 2: of document 1",
        f"removed: evaluation_row 1 {9 + len(ROW)} document 3: rows.csv:2: {' '.join(words_of(ROW)[:13])}",
        "kept 1 13",
        "1 evaluation texts of under 8 words were not compared",
        "b.report.json",
        "b.jsonl",
    ]
    assert Path("b.jsonl").read_text(encoding="utf-8") == '{"text": "One document."}\n'
    report = json.loads(Path("b.report.json").read_text(encoding="utf-8"))
    assert report["removed"] == {"duplicate": 1, "evaluation_row": 1}
    assert report["examples"]["duplicate"][0] == {
        "document": 2,
        "detail": "of document 1",
        "text": "One document.",
    }
    assert run_command(words) == 2
    assert capsys.readouterr().err.endswith(
        "b.jsonl: already exists. Delete it, or choose another folder.\n"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--out", "b.txt"],
            "--out: b.txt: the documents are written as JSON lines, to a file that",
        ),
        (["--near", "0.2"], "--near: must be from 0.5 to 1, got 0.2. Give 0.8."),
        (["--docs", "3"], "--docs: cannot be combined with clean. Remove it."),
        (
            ["--against", "gsm9k"],
            "--against: gsm9k: no such file and no such task. Give a file, or",
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("text\n", encoding="utf-8")
    assert run_command(["data", "clean", "--data", "a.txt", "--out", "b.jsonl", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_task_is_named_with_its_file(tmp_path, monkeypatch, capsys):
    """gsm8k's question and answer are texts of their own, with the location of the row."""
    monkeypatch.chdir(tmp_path)
    Path("test.jsonl").write_text(
        json.dumps({"question": ROW, "answer": "#### 72"}), encoding="utf-8"
    )
    Path("a.txt").write_text(f"Before {ROW} after\nother text here\n", encoding="utf-8")
    words = [
        "data",
        "clean",
        "--data",
        "a.txt",
        "--out",
        "b.jsonl",
        "--against",
        "gsm8k=test.jsonl",
    ]
    assert run_command(words) == 0
    assert "document 1: test.jsonl:1: natalia sold clips" in capsys.readouterr().out
