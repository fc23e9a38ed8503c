"""Formats of documents and rows against other libraries: pandas, pyarrow, json, the compressors."""

import bz2
import csv
import gzip
import io
import json
import logging
import lzma
import sys
from pathlib import Path

import pandas
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinylm.common.errors import UserError
from tinylm.config.schema import DataConfig
from tinylm.rows.row_files import read_rows
from tinylm.text import compression, csv_files, json_files
from tinylm.text.data_source import find_split
from tinylm.text.documents import file_rows
from tinylm.text.sources import LocalFiles
from tinylm.tokenizer.byte_char import ByteTokenizer
from tinylm.tokens.encode import EncodeSpec, encode_file
from tinylm.tokens.token_file import TokenFile

# Cells that a careless reader divides or changes.
CELLS = [
    "plain",
    "two\nlines",
    'a "quote"',
    "a,b\tc",
    "é\u2028ü",
    " spaces ",
    "x\r\ny",
    "z\rw",
    "7",
]
COMPRESSORS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


def read(path: Path | str, **settings) -> list[str]:
    data = DataConfig(dataset=str(path), **settings)
    return list(find_split(data, "train", 1).text_source.documents())


def refusal(path: Path | str, **settings) -> str:
    with pytest.raises(UserError) as caught:
        read(path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- tables ---


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t")])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_table_has_the_cells_that_pandas_wrote(write, name, delimiter, line_end, mark):
    """Also with a byte-order mark, with the line ends of Windows and of old Macs, and with line
    ends in cells. The oracle of reading is pandas as well.
    """
    frame = pandas.DataFrame({"id": range(len(CELLS)), "text": CELLS})
    content = frame.to_csv(
        None, sep=delimiter, index=False, lineterminator=line_end, quoting=csv.QUOTE_ALL
    )
    path = write(name, mark + content)
    again = pandas.read_csv(path, sep=delimiter, dtype=str, keep_default_na=False)
    assert read(path) == list(again["text"]) == CELLS
    assert [row["id"] for _, row in file_rows(path)] == [str(i) for i in range(len(CELLS))]


@pytest.mark.slow
@given(
    cells=st.lists(
        st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\ufeff")),
        min_size=1,
    )
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_cells_come_back(tmp_path, cells):
    """Written by the csv module, with a second column so that no line is blank."""
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerows([("text", "n"), *((cell, "1") for cell in cells)])
    (tmp_path / "a.csv").write_bytes(file.getvalue().encode())
    assert [row["text"] for _, row in file_rows(tmp_path / "a.csv")] == cells


def test_a_row_of_a_table_is_named_by_the_line_it_begins_in(write):
    path = write("a.csv", 'id,text\n1,"two\nlines"\n\n2,b\n3\n')
    rows = file_rows(path)
    assert [str(next(rows)[0]) for _ in range(2)] == [f"{path}:2", f"{path}:5"]
    assert refusal(path) == (
        f'{path}:6: has 1 cells, but there are 2 columns. Put text with commas in quotes: "a, b".'
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,text\na,b\n", ":1: two columns are named 'text'. Rename one of them."),
        ("a.csv", "text\na,b\n", ":2: has 2 cells, but there are 1 columns. Put text with commas"),
        ("a.tsv", "text\na\tb\n", ":2: has 2 cells, but there are 1 columns. Put a cell with tabs"),
        (
            "a.csv",
            'text\n"open\nb\n',
            ":2: not a table of cells: unexpected end of data. Close the",
        ),
        ("a.csv", 'text\n"a" b\n', ":2: not a table of cells: ',' expected after '\"'. Close the"),
        (
            "a.csv",
            "id,body\n1,a\n",
            ":2: text: missing; the row has id, body. Correct the row, or ",
        ),
        ("a.csv", b"text\nab\xff\n", ":2: not UTF-8 text: byte 0xff at offset 7. Save the file as"),
        ("a.json", '{"text": "a"}', ": must be a list of objects, got an object. Write [{...}, "),
        (
            "a.json",
            '[{"text": "a"}',
            ": row 1: not JSON: Expecting ',' or ']' after it. Correct the",
        ),
        ("a.json", '[{"text": "a"},]', ": row 2: not JSON: Expecting value. Correct the file"),
        ("a.json", '[{"text": "a"}] x', ": not JSON: Extra data after the list. Correct the file"),
        ("a.json", '["a"]', ': row 1: expected an object such as {"text": "..."}, found a string.'),
        ("a.json", '[{"text": [["a"]]}]', ": row 1: text: expected a string, found a list."),
        ("a.json", "[" * 100_000, ": row 1: not JSON: lists or objects inside each other too deep"),
        ("a.json", b'[{"text": "\xc3\xa9\xff"}]', ": not UTF-8 text (byte 13). Save the file as"),
        (
            "a.md",
            b"ab\nc\xff",
            ":2: not UTF-8 text: byte 0xff at offset 4. Save the file as UTF-8.",
        ),
    ],
)
def test_a_mistake_is_named_with_its_place(write, name, content, message):
    path = write(name, content)
    assert refusal(path).startswith(f"{path}{message}")


# --- lists ---


@pytest.mark.slow
@given(
    items=st.lists(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=8,
        )
    ),
    block=st.integers(1, 40),
    indent=st.sampled_from([None, 1]),
)
@settings(max_examples=40)
def test_items_of_a_list_are_those_of_json_loads(items, block, indent):
    """In blocks of a few bytes, so that every item is cut at every place."""
    written = json.dumps(items, indent=indent, ensure_ascii=block % 2 == 0)
    size = json_files.BLOCK_BYTES
    json_files.BLOCK_BYTES = block
    try:
        file = io.BytesIO(written.encode("utf-8", "surrogatepass"))
        found = [item for _, item in json_files.array_items(Path("a.json"), file)]
    except UserError as error:  # only a lone surrogate, which UTF-8 does not have
        assert "not UTF-8" in str(error)
        return
    finally:
        json_files.BLOCK_BYTES = size
    assert found == json.loads(written)


# --- files that are one document ---


def test_a_markdown_file_is_one_document(write):
    assert read(write("a.md", "\ufeff# Title\r\n\r\nText.\r\n")) == ["# Title\n\nText."]
    assert read(write("b.md.gz", gzip.compress(b"one\n\ntwo\n"))) == ["one\n\ntwo"]


PAGE = """<html><head><title>T</title><script>var x = 1;</script></head><body><nav><a href="/">Home</a>
<a href="/b">Shop</a></nav><article><h1>Rivers</h1><p>{}</p></article><footer>Imprint</footer></body></html>"""
SENTENCE = "The river begins in the hills, and after forty miles it reaches the sea. " * 6


def test_a_page_gives_its_main_text_and_names_pages_without_any(write, tmp_path, caplog):
    """trafilatura itself is the oracle; menu, script and footer are not in the text."""
    trafilatura = pytest.importorskip("trafilatura")
    content = PAGE.format(SENTENCE).encode("latin-1")
    write("pages/a.html", content)
    write("pages/b.htm", "<html><body><script>1</script></body></html>")
    with caplog.at_level(logging.INFO, "tinylm"):
        texts = read(tmp_path / "pages")
    assert texts == [trafilatura.extract(content, include_comments=False)]
    assert SENTENCE.strip() in texts[0]
    assert not [word for word in ("Shop", "var x", "Imprint") if word in texts[0]]
    assert f"{tmp_path / 'pages'}: left out, without any text: 1 (b.htm)" in caplog.messages


def test_a_page_needs_trafilatura(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "trafilatura", None)
    path = write("a.html", PAGE)
    message = f"{path}: reading it needs trafilatura. Install it: pip install trafilatura lxml_html_clean."
    with pytest.raises(UserError) as caught:
        LocalFiles("a", (path,), "text", None).fingerprint  # noqa: B018
    assert str(caught.value) == message


# --- compressed data ---


@pytest.mark.parametrize("end", COMPRESSORS)
@pytest.mark.parametrize("plain_name", [False, True])
def test_the_content_decides_how_it_is_decompressed(write, end, plain_name):
    """Under its own name, under the name of another compression, and under the plain name; two
    compressed parts one after the other are one content.
    """
    name = "a.jsonl" if plain_name else "a.jsonl.gz"
    compress = COMPRESSORS[end]
    content = compress(b'\xef\xbb\xbf{"text": "one"}\n{"text"') + compress(b': "two"}\n')
    assert read(write(name, content)) == ["one", "two"]
    assert read(write(f"b.txt.{end}", b"not compressed\n")) == ["not compressed"]


@pytest.mark.parametrize("end", COMPRESSORS)
def test_damaged_data_name_their_file(write, end):
    content = COMPRESSORS[end](b"".join(b"line %d of the text\n" % (i * i) for i in range(999)))
    path = write(f"a.txt.{end}", content[:-20])
    assert refusal(path).startswith(f"{path}: damaged or truncated ")


@pytest.mark.parametrize("end", COMPRESSORS)
def test_data_that_expand_without_end_are_refused(write, end, monkeypatch):
    """4 MB of zeros, far more than 500 times what they are compressed to."""
    monkeypatch.setattr(compression, "FREE_BYTES", 2**20)
    path = write(f"a.md.{end}", COMPRESSORS[end](bytes(4_000_000)))
    if path.stat().st_size * compression.MAX_RATIO < 4_000_000:
        assert "expand to more than 500 times as many, which text does not. Remove it" in refusal(
            path
        )
    else:
        pytest.fail("the compressed file is too large for this test")


# --- folders and token files ---


def test_a_mixed_folder_is_read_in_its_order_and_what_is_left_out_is_named(write, tmp_path, caplog):
    for name, content in {
        "1.md": "one",
        "2.csv": "text\ntwo\n",
        "3.json": '[{"text": "three"}]',
        "4.txt.bz2": bz2.compress(b"four\n"),
        "5.tsv": "text\tn\nfive\t5\n",
        "6.jsonl": '{"text": "six"}\n',
        "7.md": "\n \n",
        "empty.json": "",
        "empty.csv": "",
        "a.png": "",
        "b.pdf": "",
    }.items():
        write(f"mixed/{name}", content)
    folder = tmp_path / "mixed"
    with caplog.at_level(logging.INFO, "tinylm"):
        assert read(folder) == ["one", "two", "three", "four", "five", "six"]
    assert caplog.messages == [
        f"{folder}: files: 2 .csv, 2 .json, 1 .jsonl, 2 .md, 1 .tsv, 1 .txt; "
        "left out, of other kinds: 2 (a.png, b.pdf)",
        f"{folder}: left out, without any text: 1 (7.md)",
    ]


def test_tokens_of_a_mixed_folder_are_those_of_its_documents(write, tmp_path):
    """Through the chunks of the encoder, with two processes; resumed or not is in test_encode.py."""
    write("mixed/a.csv.xz", lzma.compress("text\nü\n".encode()))
    write("mixed/b.json", '[{"text": "b"}]')
    write("mixed/c.md", "c\nc")
    write("mixed/d.txt", "d\n")
    write("mixed/e.jsonl", gzip.compress(b'{"text": "e"}\n'))
    split = find_split(DataConfig(dataset=str(tmp_path / "mixed"), val_dataset="x"), "train", 1)
    tokenizer = ByteTokenizer()
    encode_file(tmp_path / "a.bin", EncodeSpec(split, tokenizer), processes=1)
    file = TokenFile.open(tmp_path / "a.bin")
    expected = [[*text.encode(), tokenizer.eos_id] for text in ("ü", "b", "c\nc", "d", "e")]
    assert file.tokens.tolist() == sum(expected, [])


def test_rows_of_a_table_are_rows_for_fine_tuning(write):
    path = write("a.csv", 'instruction,output\n"Add 1, 2",3\n')
    data = DataConfig(dataset=str(path), val_dataset=str(path))
    assert list(read_rows(data, "train", 1)) == [
        (f"{path}:2", {"instruction": "Add 1, 2", "output": "3"})
    ]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_lines_of_100_mb_are_read_in_a_few_times_their_size(tmp_path, child):
    """One cell, one item; each is held as bytes, as text and as a part of a copy."""
    n = 100_000_000
    (tmp_path / "a.csv").write_bytes(b'text\n"' + b"x" * n + b'"\n')
    (tmp_path / "a.json").write_bytes(b'[{"text": "' + b"x" * n + b'"}]')
    code = """paths = [args[0] + name for name in ("/a.csv", "/a.json")]
for path in paths:
    for text in data_source.find_split(DataConfig(dataset=path), "train", 1).text_source.documents():
        print(len(text))
status = open("/proc/self/status", encoding="ascii").read()  # ru_maxrss counts the parent's before exec
print(int(status.partition("VmHWM:")[2].split()[0]) // 1024)"""
    out, err = child(code, tmp_path).communicate(timeout=60)
    *lengths, megabytes = map(int, out.split())
    assert (err, lengths) == ("", [n, n])
    assert megabytes < 1000


def test_a_cell_has_a_limit(write, monkeypatch):
    monkeypatch.setattr(csv_files, "CELL_CHARACTERS", 10)
    path = write("a.csv", 'text\n"open and never closed\n')
    assert "field larger than field limit (10)" in refusal(path)
    csv.field_size_limit(2**28)
