"""A dataset on the Hugging Face hub as a source of documents or rows."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tinylm.common.errors import UserError, first_line, import_optional
from tinylm.common.hub import hub_errors, hub_problem, require_hub
from tinylm.text.documents import DAMAGED, RESUMES, TextChunk, text_chunks
from tinylm.text.row_text import field_texts, no_column


@dataclass(frozen=True)
class HubDataset:
    """A dataset on the Hugging Face hub, downloaded whole or streamed."""

    name: str
    config: str | None
    split: str
    streaming: bool
    field: str | None
    """the column of the text; None: rows are read, with all their columns"""
    again: str = RESUMES
    """the fix of an error if the network fails"""
    setting: str = "data.dataset"
    """the setting or flag that names the dataset"""

    def documents(self) -> Iterator[str]:
        """Every document that is not blank, in the order of the dataset."""
        if self.field is None:
            raise ValueError("the dataset was opened for its rows, not for the text of one column")
        return field_texts(self.rows(), self.field)

    def chunks(self) -> Iterator[TextChunk]:
        """The documents in chunks; an error in reading them is in the last one."""
        return text_chunks(self.documents())

    def size(self) -> int:
        """0: the dataset must be read to know."""
        return 0

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the name: the content is not downloaded for it."""
        return hashlib.sha256(f"hub {self.name} {self.config} {self.split}".encode()).hexdigest()

    def rows(self) -> Iterator[tuple[str, Any]]:
        """Each row, with its location for errors."""
        dataset = self._load()
        where = f"{self.name} ({self.split})"
        try:
            for number, row in enumerate(dataset, start=1):
                yield f"{where}: row {number}", row
        except hub_errors() as error:
            problem = f"reading stopped: {first_line(error)}"
            raise UserError(where, problem, self.again) from error
        except DAMAGED as error:
            problem = f"one of its files is damaged: {first_line(error)}"
            raise UserError(where, problem, "Give another dataset, or local files") from error

    def _load(self) -> Iterable[Any]:
        """The dataset of the library; only its text column
        if the columns are known before reading.
        """
        where = (self.setting, self.name)
        fix = f"Give a local file or folder as {self.setting}"
        require_hub(where, fix)
        datasets = import_optional("datasets", self.name)
        try:
            dataset = datasets.load_dataset(
                self.name, self.config, split=self.split, streaming=self.streaming
            )
        except (*hub_errors(), *DAMAGED, datasets.exceptions.DatasetsError) as error:
            fix = f"Check {{}} and {{}}, or: {fix}"
            settings = ("data.dataset_config", "data.split")
            raise UserError(where, hub_problem(error), fix, *settings) from error
        columns = dataset.column_names
        if columns is None or self.field is None:
            return dataset
        if self.field not in columns:
            raise no_column(f"{self.name} ({self.split})", self.field, columns)
        return dataset.select_columns([self.field])
