"""The rows of a .parquet file, a batch at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinylm.common.errors import UserError, first_line, import_optional
from tinylm.common.files import require_regular
from tinylm.text.row_text import no_column

BATCH_ROWS = 1024


def parquet_rows(path: Path, field: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a .parquet file with its location for errors: all of its columns,
    or `field` alone.
    """
    require_regular(path)
    import_optional("pyarrow", path)
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if field is not None and field not in columns:
                raise no_column(path, field, columns)
            wanted = None if field is None else [field]
            for batch in file.iter_batches(BATCH_ROWS, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        problem = f"damaged or truncated, or not a parquet file: {first_line(error)}"
        raise UserError(path, problem, "Download or write it again") from None
