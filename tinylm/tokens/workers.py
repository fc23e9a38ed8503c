"""Batches made by worker processes: an error that the user can correct keeps its one line.

torch raises the error of a worker again with the worker's traceback as its text. Here a UserError
is passed on as if it were a batch, and raised in the process that trains.
"""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset

from tinylm.common.errors import UserError
from tinylm.tokens.packing import Batch

# A worker that makes no batch for so long hangs; streams that wait for a network give up earlier.
TIMEOUT_SECONDS = 900
# How torch's error about a worker that died begins.
WORKER_ENDED = "DataLoader worker"


class WorkerLoader(DataLoader[Any]):
    """A DataLoader with worker processes.

    Args:
        dataset: of batches, by number or iterable.
        settings: of `DataLoader`.
    """

    def __init__(self, dataset: Dataset[Batch], **settings: Any):
        kind = _Iterable if isinstance(dataset, IterableDataset) else _ByNumber
        super().__init__(
            kind(dataset), timeout=TIMEOUT_SECONDS, persistent_workers=True, **settings
        )

    def __iter__(self) -> Iterator[Any]:
        try:
            for batch in super().__iter__():
                if isinstance(batch, UserError):
                    raise batch
                yield batch
        except (ConnectionError, EOFError) as error:  # it died while it sent a batch
            raise RuntimeError(f"{WORKER_ENDED} (pid not known): {error}") from error


class _ByNumber(Dataset[Any]):
    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __getitem__(self, k: int) -> Batch | UserError:
        try:
            return self.dataset[k]
        except UserError as error:
            return error


class _Iterable(IterableDataset[Any]):
    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __iter__(self) -> Iterator[Batch | UserError]:
        try:
            yield from self.dataset
        except UserError as error:
            yield error
