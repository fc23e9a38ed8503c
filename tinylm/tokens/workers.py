"""Batches made by worker processes: an error that the user can correct keeps its one line.

torch raises the error of a worker again with the worker's traceback as its text. Here a UserError
is passed on as if it were a batch, and raised in the process that trains. Any other error is a bug,
whose traceback names the worker and the micro-batch. A worker that hangs is killed.
"""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset, _utils

from tinylm.common.errors import UserError
from tinylm.tokens.packing import Batch

# A worker that makes no batch for so long hangs; streams that wait for a network give up earlier.
TIMEOUT_SECONDS = 900
# How torch's errors about a worker that died, or that hangs, begin.
WORKER_ENDED = "DataLoader worker"
TIMED_OUT = "DataLoader timed out"


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
        n_done = 0
        try:
            for batch in super().__iter__():
                if isinstance(batch, UserError):
                    raise batch
                yield batch
                n_done += 1
        except (ConnectionError, EOFError) as error:  # it died while it sent a batch
            raise RuntimeError(f"{WORKER_ENDED} (pid not known): {error}") from error
        except RuntimeError as error:
            if not str(error).startswith(TIMED_OUT):
                raise
            self._kill_workers()
            problem = (
                f"a worker process took more than {self.timeout:g} seconds to make "
                f"micro-batch {n_done + 1} since the start of this program"
            )
            fix = "Look at the disk and the network that the data are on, and run the command again"
            raise UserError("data.num_workers", problem, fix) from None

    def _kill_workers(self) -> None:
        """Workers ignore SIGTERM, so this program would wait for them at its exit."""
        iterator: Any = self._iterator
        # torch raises an error of its own, at any later line, when a process that it watches ends.
        if iterator._worker_pids_set:
            _utils.signal_handling._remove_worker_pids(id(iterator))
            iterator._worker_pids_set = False
        for worker in iterator._workers:
            worker.kill()


class _ByNumber(Dataset[Any]):
    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __getitem__(self, k: int) -> Batch | UserError:
        try:
            return self.dataset[k]
        except UserError as error:
            return error
        except Exception as error:
            error.add_note(f"micro-batch {k + 1} of the run")
            raise


class _Iterable(IterableDataset[Any]):
    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __iter__(self) -> Iterator[Batch | UserError]:
        try:
            yield from self.dataset
        except UserError as error:
            yield error
