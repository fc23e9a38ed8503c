"""The models of a server by name: found at the start, loaded when a request asks for them.

    checkpoints/                            names
        base/final.ckpt                     base
        chat/step-00000100.ckpt, ...        chat        the newest step, if the run has not ended
        gpt2.ckpt                           gpt2        a file of no run: imported, or renamed by hand

At most `max_models` are in memory; the least recently used one is removed when another is loaded.
"""

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinylm.checkpoint.format import candidates, read
from tinylm.checkpoint.load import Loaded
from tinylm.checkpoint.result import model_folders, model_of_run
from tinylm.common.console import size
from tinylm.common.errors import UserError
from tinylm.generate.engine import Engine
from tinylm.generate.weights import MAX_RISE, Precision, open_model, round_weights
from tinylm.model.decoder import Decoder
from tinylm.model.hf_model import HFModel
from tinylm.rows.conversation import SCORING_STAGES
from tinylm.rows.templates import Template
from tinylm.serve.errors import ApiError, busy
from tinylm.serve.worker import EngineWorker
from tinylm.tokenizer.base import Tokenizer

logger = logging.getLogger(__name__)

# Files of a run; the folder has the better name.
RUN_FILES = ("final", "best", "last")


@dataclass(frozen=True)
class EngineSettings:
    """How a model generates."""

    device: str = "cpu"
    slots: int = 8
    deterministic: bool = True
    max_waiting: int = 64
    weights: Precision | None = None
    """None: as in the checkpoint"""
    max_bpb_rise: float = MAX_RISE


@dataclass
class ServedModel:
    """A model in memory."""

    name: str
    loaded: Loaded
    template: Template | None
    worker: EngineWorker
    encoding: asyncio.Lock = field(default_factory=asyncio.Lock)
    """one text is encoded at a time, in another thread than the event loop's"""

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer."""
        return self.loaded.tokenizer

    @property
    def context(self) -> int:
        """Tokens that it reads at most."""
        return self.loaded.model.config.max_seq_len


def find_models(path: Path) -> dict[str, Path]:
    """The checkpoints at `path` by name: a file; or of a folder, the model of each run and each file
    of no run.

    Raises:
        UserError: there is none.
    """
    if path.is_file():
        stem = path.stem
        return {path.resolve().parent.name if stem in RUN_FILES else stem: path}
    if not path.exists():
        raise UserError(path, "no such file or folder", "Give a checkpoint, or a folder of runs")
    found = {}
    for folder in model_folders(path):
        file = _language_model(lambda folder=folder: model_of_run(folder, _log_skipped))
        if file is not None:
            inner = folder.relative_to(path).as_posix()
            found[path.resolve().name if inner == "." else inner] = file
        runs = set(candidates(folder))
        for other in sorted(set(folder.glob("*.ckpt")) - runs):
            if _language_model(lambda other=other: (other, read(other))) is not None:
                found[other.relative_to(path).with_suffix("").as_posix()] = other
    if not found:
        fix = "Train one (python train.py --config config_smoke.yaml)"
        raise UserError(path, "contains no language model", fix)
    return found


def _language_model(find: Callable[[], tuple[Path, dict[str, Any]] | None]) -> Path | None:
    """The path that `find` returns beside a state, if it is a language model; errors are logged."""
    try:
        found = find()
    except UserError as error:
        _log_skipped(error)
        return None
    return None if found is None or found[1]["stage"] in SCORING_STAGES else found[0]


def _log_skipped(error: UserError) -> None:
    logger.warning("skipped: %s", error)


class ModelStore:
    """The models that a server offers, of which the most recently used ones are in memory."""

    def __init__(self, paths: dict[str, Path], settings: EngineSettings, *, max_models: int = 1):
        self.paths, self.settings, self.max_models = paths, settings, max_models
        self.created = {name: int(path.stat().st_mtime) for name, path in paths.items()}
        self.in_memory: OrderedDict[str, ServedModel] = OrderedDict()  # the last used one last
        self.n_users: Counter[str] = Counter()
        """requests that use a model or wait for it, by its name: it stays in memory"""
        self._tasks: dict[str, asyncio.Task[ApiError | None]] = {}  # that load a model
        self._turn = asyncio.Lock()  # one model is loaded at a time

    @asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[ServedModel]:
        """The model of this name, which stays in memory within the block. While it is loaded, other
        models answer.

        Raises:
            ApiError: there is no such model, or all places are taken.
        """
        name = self._known(name)
        self.n_users[name] += 1
        try:
            if name not in self.in_memory:
                # The task is not the request's: it goes on when the client leaves, so that clients
                # that come and leave cannot have a model loaded many times at once.
                error = await asyncio.shield(self._task(name))
                if error is not None:
                    raise error
            self.in_memory.move_to_end(name)
            yield self.in_memory[name]
        finally:
            self.n_users[name] -= 1

    async def load_first(self) -> None:
        """Load the first model, before there are requests.

        Raises:
            UserError: it cannot be loaded.
        """
        name = next(iter(self.paths))
        self.in_memory[name] = await self._load(name)

    def _known(self, name: str | None) -> str:
        if name is None and len(self.paths) == 1:
            return next(iter(self.paths))
        if name not in self.paths:
            raise ApiError(
                404,
                "There is no such model; GET /v1/models lists them.",
                param="model",
                code="model_not_found",
            )
        return name

    def _task(self, name: str) -> asyncio.Task[ApiError | None]:
        """The task that loads a model into memory; a new one, if none does."""
        if name not in self._tasks:
            self._tasks[name] = asyncio.create_task(self._load_in_turn(name))
        return self._tasks[name]

    async def _load_in_turn(self, name: str) -> ApiError | None:
        """Load a model; the error if it fails, which nobody hears when all clients have left."""
        try:
            async with self._turn:
                self._make_room()
                self.in_memory[name] = await self._load(name)
        except ApiError as error:
            return error
        except UserError as error:
            logger.error("model %d: %s", list(self.paths).index(name) + 1, error)
            return ApiError(500, "The model cannot be loaded; the log says why.")
        finally:
            del self._tasks[name]
        return None

    def _make_room(self) -> None:
        if len(self.in_memory) < self.max_models:
            return
        for name, served in self.in_memory.items():  # the one not used for longest first
            if not self.n_users[name]:
                served.worker.close()
                del self.in_memory[name]
                return
        raise busy(f"All {self.max_models} models in memory are in use; try again later.", 5)

    async def _load(self, name: str) -> ServedModel:
        start = time.monotonic()
        settings = self.settings
        loaded = await asyncio.to_thread(load_served, self.paths[name], settings)
        template = loaded.make_template()

        def make_engine() -> Engine:
            return Engine.of(loaded, slots=settings.slots, deterministic=settings.deterministic)

        worker = EngineWorker(make_engine, max_waiting=settings.max_waiting)
        logger.info(
            "loaded %s in %.1f s: %d slots of %d tokens, cache at most %s",
            *(name, time.monotonic() - start, settings.slots),
            loaded.model.config.max_seq_len,
            size(cache_bytes(loaded.model, settings.slots)),
        )
        return ServedModel(name, loaded, template, worker)

    def close(self) -> None:
        """Stop the threads."""
        for served in self.in_memory.values():
            served.worker.close()


def load_served(path: Path, settings: EngineSettings) -> Loaded:
    """The model in the checkpoint at `path`, rounded; of a run that has replaced this checkpoint
    since the server began, the newest one.
    """
    if not path.exists():
        found = model_of_run(path.parent)
        path = path if found is None else found[0]
    loaded = open_model(path, settings.device, settings.weights)
    max_rise = settings.max_bpb_rise
    round_weights(loaded.model, loaded.tokenizer, settings.weights, max_rise=max_rise)
    return loaded


def cache_bytes(model: Decoder | HFModel, slots: int) -> int:
    """Bytes of the cached keys and values when the context of each slot is full."""
    config = model.config
    width = config.n_layers * config.n_kv_heads * config.head_dim
    element = model.embedding.weight.element_size()
    return 2 * slots * config.max_seq_len * width * element
