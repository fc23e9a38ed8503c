"""The sources of fine-tuning rows: data.dataset, or each part of data.mix, as settings of its own.

    data.mix[1] ─▶ RowSource: the DataConfig of this part alone, with its rows, columns and template

Everything behind it reads one source and knows nothing of mixtures.
"""

import os
from dataclasses import dataclass

from tinylm.common.errors import UserError
from tinylm.config.schema import DataConfig
from tinylm.rows.row_files import ROW_FILES, resolve_dataset
from tinylm.text.data_source import data_sources
from tinylm.text.sources import NAMES, Which, files_in, list_kinds


@dataclass(frozen=True)
class RowSource:
    """One source of rows."""

    setting: str
    """the setting that names it, `data.mix[1].dataset`"""
    data: DataConfig
    """the settings of this source alone"""
    is_part: bool
    """whether it is a part of a mixture"""

    def renamed(self, error: UserError) -> UserError:
        """The error about data.dataset with the setting that the user has written."""
        return error.renamed({"data.dataset": self.setting}) if self.is_part else error


def row_sources(data: DataConfig, which: Which) -> list[RowSource]:
    """The sources of a split: those of data.mix, except where data.val_dataset has the validation
    rows, whose format and template are those of the data section.

    Raises:
        UserError: a folder of a mixture has no file of rows.
    """
    if data.mix is None:
        return [RowSource("data.dataset", data, is_part=False)]
    if which == "val" and data.val_dataset is not None:
        return [RowSource("data.val_dataset", data.model_copy(update={"mix": None}), is_part=False)]
    sources = []
    for number, part in enumerate(data.mix):
        own = part.model_dump(include={"dataset", "rows", "columns", "template"}, exclude_none=True)
        setting = f"data.mix[{number}].dataset"
        if os.path.isdir(part.dataset) and not files_in(part.dataset, ROW_FILES):
            problem = f"no file of rows ({list_kinds(ROW_FILES)}) in this folder"
            raise UserError((setting, part.dataset), problem, "Give the path of one")
        of_part = data.model_copy(update={"mix": None, **own})
        sources.append(RowSource(setting, of_part, is_part=True))
    return sources


def find_rows(data: DataConfig, seed: int) -> None:
    """Raise a UserError if the rows that `data` describes are not there; they are not read yet."""
    for which in NAMES:
        for source in row_sources(data, which):
            try:
                found, _ = resolve_dataset(source.data)
                data_sources(found, which, seed, ROW_FILES)
            except UserError as error:
                raise source.renamed(error) from None
