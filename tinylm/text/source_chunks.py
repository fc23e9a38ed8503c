"""A source cut into chunks (chunks.py), for counting its words."""

from collections.abc import Iterator
from itertools import islice

from tinylm.text.chunks import RawChunk, TextChunk, raw_chunks, text_chunks
from tinylm.text.documents import file_documents
from tinylm.text.sources import LocalFiles, Source, Together


def word_chunks(
    source: Source, processes: int = 1, docs: int | None = None
) -> Iterator[RawChunk | TextChunk]:
    """The source, or its first `docs` documents, in chunks that cut no word.

    A .txt file without a separator is read as it is, in `raw_chunks`; everything else by its
    documents.
    """
    if docs is not None or not isinstance(source, LocalFiles | Together):
        yield from text_chunks(islice(source.documents(), docs))
        return
    if isinstance(source, Together):
        for one in source.sources:
            yield from word_chunks(one, processes)
        return
    for path in source.paths:
        if path.name.endswith(".txt") and source.separator is None:
            yield from raw_chunks(path, processes)
        else:
            yield from text_chunks(file_documents(path, source.field, source.separator))
