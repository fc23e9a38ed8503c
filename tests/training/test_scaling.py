"""Beyond one machine: datatrove's files as token files, and docs/SCALING.md done as it says."""

import filecmp
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import orjson
import pytest
import torch

from tests import programs
from tests.test_docs import SHOWN, Command, blocks, commands
from tinylm.checkpoint import format as checkpoint_format
from tinylm.common.errors import UserError
from tinylm.config.loader import load_config
from tinylm.config.schema import DataConfig
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokenizer.byte_char import ByteTokenizer
from tinylm.tokenizer.hf_files import load_hf_tokenizer
from tinylm.tokens.encode import encode_documents
from tinylm.tokens.id_arrays import open_tokens
from tinylm.tokens.run_files import cached_token_file
from training.context import is_lost_connection, lost_process

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "SCALING.md").read_text(encoding="utf-8")
BYTES = ByteTokenizer()
EOS = BYTES.eos_id
Write = Callable[..., Path]

# --- the format -------------------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes datatrove's three files from the ids of documents."""

    def write(
        documents: Sequence[Sequence[int]],
        dtype: str = "<u2",
        ends: Sequence[int] | None = None,
        metadata: str | None = None,
    ) -> Path:
        path = tmp_path / "a.ds"
        ids = np.concatenate([*documents, []]).astype(dtype)
        path.write_bytes(ids.tobytes())
        ends = np.cumsum([len(document) for document in documents]) if ends is None else ends
        (tmp_path / "a.ds.index").write_bytes(np.array(ends, dtype="<u8").tobytes())
        content = f"tokenizers/a|b/tokenizer.json|{ids.itemsize}\n{len(ids)}\n{len(ids)} T"
        (tmp_path / "a.ds.metadata").write_text(
            content if metadata is None else metadata, encoding="utf-8"
        )
        return path

    return write


DOCUMENTS = [[97, 98, EOS], [EOS], [99, EOS, 99, EOS]]


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_a_file_of_datatrove_reads_as_its_ids_and_ends(write, dtype):
    """An EOS inside a document ends none: the index decides. 3 + 1 + 4 tokens, 97 and 98 and twice
    99 being bytes of text.
    """
    file = open_tokens(write(DOCUMENTS, dtype), tokenizer=BYTES)
    assert (file.tokens.dtype, file.tokens.tolist()) == (
        np.dtype(dtype),
        [97, 98, EOS, EOS, 99, EOS, 99, EOS],
    )
    assert file.document_ends.tolist() == [3, 4, 8]
    assert (file.header.documents, file.header.text_bytes, file.header.eos_id) == (3, 4, EOS)
    file.require_tokenizer(BYTES)
    file.verify()


def test_a_run_trains_on_the_first_documents_and_validates_on_the_last(write):
    data = DataConfig(dataset=str(write([[i, i, i, EOS] for i in range(10)])), val_fraction=0.25)
    train, val = (cached_token_file(data, which, BYTES, seed=1) for which in ("train", "val"))
    assert (len(train), val.tokens.tolist()) == (32, [8, 8, 8, EOS, 9, 9, 9, EOS])


def test_a_changed_id_changes_the_fingerprint(write):
    """A10: a resumed run must see that its data are others."""
    before = open_tokens(write(DOCUMENTS), tokenizer=BYTES).fingerprint
    assert (
        open_tokens(write([[96, 98, EOS], *DOCUMENTS[1:]]), tokenizer=BYTES).fingerprint != before
    )
    assert open_tokens(write(DOCUMENTS), tokenizer=BYTES).fingerprint == before


AGAIN = "Run the task of datatrove again that wrote it."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"metadata": ""},
            "a.ds.metadata: expected a name, |2 or |4, then the number of tokens, found b''. "
            + AGAIN,
        ),
        (
            {"metadata": "x|3\n8\n8 T"},
            "a.ds.metadata: expected a name, |2 or |4, then the number of tokens, found b'x|3\\n8\\n8 T'. "
            + AGAIN,
        ),
        (
            {"metadata": "x|2\n" + "9" * 5000},
            "a.ds.metadata: expected a name, |2 or |4",
        ),
        (
            {"metadata": "x|2\n9\n9 T"},
            "a.ds: expected 18 bytes (9 tokens of 2 bytes), found 16. " + AGAIN,
        ),
        (
            {"metadata": "x|4\n8\n8 T"},
            "a.ds: expected 32 bytes (8 tokens of 4 bytes), found 16. " + AGAIN,
        ),
        (
            {"ends": []},
            "a.ds.index: expected 8 bytes for each of at least one document, found 0. " + AGAIN,
        ),
        ({"ends": [3, 4]}, "a.ds: its index is not that of 8 tokens in 2 documents. " + AGAIN),
        ({"ends": [4, 3, 8]}, "a.ds: its index is not that of 8 tokens in 3 documents. " + AGAIN),
        (
            {"ends": [0, 3, 4, 8]},
            "a.ds: its index is not that of 8 tokens in 4 documents. " + AGAIN,
        ),
        (
            {"ends": [3, 4, 2**64 - 1]},
            "a.ds: its index is not that of 8 tokens in 3 documents. " + AGAIN,
        ),
        (
            {"ends": [3, 5, 8]},
            "a.ds: 1 of 3 documents, the first of them number 2, do not end with the tokenizer's end of text. "
            "Set tokenizer to the one that encoded it, or encode with its eos_token and shuffle no chunks.",
        ),
        (
            {"documents": [[97, EOS], [260, EOS]]},
            "a.ds: id 260 at position 2, and the tokenizer of this run has 260 tokens. Set tokenizer to the one that",
        ),
    ],
)
def test_what_is_no_whole_file_of_this_tokenizer_is_refused(write, changes, message):
    path = write(**{"documents": DOCUMENTS} | changes)
    with pytest.raises(UserError) as caught:
        open_tokens(path, tokenizer=BYTES)
    assert str(caught.value).startswith(f"{path.parent}{os.sep}{message}")


def test_a_file_without_its_index_or_metadata_is_refused(write):
    for suffix in (".metadata", ".index"):
        path = write(DOCUMENTS)
        path.with_name(f"a.ds{suffix}").unlink()
        with pytest.raises(UserError) as caught:
            open_tokens(path, tokenizer=BYTES)
        assert (
            str(caught.value)
            == f"{path}{suffix}: not found. Keep it beside a.ds: datatrove writes .ds, .ds.index and .ds.metadata."
        )


def test_an_index_that_is_cut_off_is_refused(write):
    path = write(DOCUMENTS)
    index = path.with_name("a.ds.index")
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(
        UserError,
        match="a.ds.index: expected 8 bytes for each of at least one document, found 23. ",
    ):
        open_tokens(path, tokenizer=BYTES)


# --- the guide, done --------------------------------------------------------------------------------------------------

# What the guide's 200M parameters and 16 GPUs become here.
SMALL = [
    *("model.n_layers=1", "model.d_model=32", "model.n_heads=2", "model.n_kv_heads=1", "model.max_seq_len=64", "training.seq_len=64"),
    *("training.micro_batch_size=2", "training.grad_accum_steps=1", "training.save_every_steps=2", "training.val_every_steps=2", "training.val_batches=2"),
    *("hardware.accelerator=cpu", "hardware.precision=32", "hardware.compile=false", "hardware.threads=1", "hardware.devices=1", "data.num_workers=0"),
    *("data.val_fraction=0.1", "training.schedule=constant"),
]  # fmt: skip


def script(executor: str) -> str:
    """`encode_corpus.py` with the last lines that the guide has for an executor."""
    code = [
        "\n".join(block.lines) + "\n"
        for block in blocks(GUIDE)
        if block.language == "python" and not block.lines[0].startswith(">>>")
    ]
    last = [lines for lines in code if f"{executor}PipelineExecutor(" in lines]
    assert len(last) == 1
    return code[0] + "\n\n" + last[0]


def typed(start: str) -> Command:
    """The one command of the guide that begins so."""
    found = [
        command
        for command in commands(GUIDE)
        if command.fenced and " ".join(command.words).startswith(start)
    ]
    assert len(found) == 1
    return found[0]


def started(folder: Path, words: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    """A command of the guide in `folder`, with the programs and configs of this project."""
    words = [str(ROOT / word) if (ROOT / word).is_file() else word for word in words]
    words = (
        [sys.executable, *words[1:]]
        if words[0] == "python"
        else [str(Path(sys.executable).with_name(words[0])), *words[1:]]
    )
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "SLURM"))
    }
    kept |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return programs.Program(
        words, cwd=folder, env=kept, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen[str]) -> str:
    """What it printed on stderr, once it ended well."""
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return stderr


@pytest.fixture(scope="module")
def texts() -> list[str]:
    paragraphs = (ROOT / "data" / "tiny_corpus.txt").read_text(encoding="utf-8").split("\n")
    return [text for text in paragraphs if text] + [
        "A text that spells <|endoftext|> in its middle.",
        "naïve 東京 🙂 and so on, at length",
        "short",
    ]


@pytest.fixture(scope="module")
def corpus_folder(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the corpus in four files, and the tokenizer that the guide learns from it."""
    folder = tmp_path_factory.mktemp("scaling")
    (folder / "corpus").mkdir()
    for number in range(4):
        (folder / "corpus" / f"part-{number:05}.jsonl").write_bytes(
            b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts[number::4])
        )
    ended(
        started(
            folder,
            [
                word.replace("32000", "600")
                for word in typed("python -m tinylm tokenizer train").words
            ],
        )
    )
    return folder


@pytest.fixture(scope="module")
def encoded(corpus_folder: Path) -> Path:
    """The folder after the pipeline ran on two tasks."""
    (corpus_folder / "encode_corpus.py").write_text(script("Local"), encoding="utf-8")
    ended(started(corpus_folder, typed("python encode_corpus.py").words))
    return corpus_folder


@pytest.fixture(scope="module")
def tokenizer(corpus_folder: Path) -> Tokenizer:
    return load_hf_tokenizer(str(corpus_folder / "tokenizers" / "corpus"))


@pytest.mark.slow
def test_two_tasks_of_datatrove_give_the_tokens_of_our_own_encoding(
    encoded: Path, texts: list[str], tokenizer: Tokenizer
) -> None:
    """The order is datatrove's: what its documents decode to, encoded by us in that order, is the
    same file to the last token.

    No document is lost or twice there but the one that the filter drops, and none is cut by the
    special token it spells.
    """
    assert len(list((encoded / "encoded" / "shards").glob("*.ds"))) == 2
    file = open_tokens(encoded / "encoded" / "000_corpus.ds", tokenizer=tokenizer)
    ends = file.document_ends.tolist()
    theirs = [
        tokenizer.decode(file.tokens[start : end - 1].tolist())
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    assert Counter(theirs) == Counter(texts) - Counter(["short"])
    assert theirs != [text for text in texts if text != "short"]  # shuffled
    assert (
        file.tokens.tolist()
        == np.concatenate(list(encode_documents(theirs, tokenizer, None))).tolist()
    )
    assert int((file.tokens == tokenizer.eos_id).sum()) == file.header.documents == len(texts) - 1


# What a cluster does, on this machine: every task of an array, one after the other.
STAND_INS = {
    "sbatch": """
        for script; do true; done
        last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
        for ((task = 0; task <= last; task++)); do SLURM_ARRAY_TASK_ID=$task SLURM_NODELIST=here RUN_OFFSET=0 bash "$script" >> slurm.log 2>&1; done
        echo Submitted batch job 7
    """,
    "srun": """
        while [[ "$1" == -* ]]; do [[ "$1" == -n ]] && shift; shift; done
        exec "$@"
    """,
    "scontrol": "echo here",
}


@pytest.mark.slow
def test_the_slurm_executor_gives_the_same_file(encoded: Path, tmp_path: Path) -> None:
    """Two tasks of an array and the merging that waits for them, through datatrove's own job script and pickles."""
    (tmp_path / "bin").mkdir()
    for name, text in STAND_INS.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}", encoding="utf-8")
        path.chmod(0o755)
    for name in ("corpus", "tokenizers"):
        (tmp_path / name).symlink_to(encoded / name)
    code = script("Slurm").replace("tasks=1000", "tasks=2").replace('"venv/bin/activate"', "None")
    (tmp_path / "encode_corpus.py").write_text(code, encoding="utf-8")
    path = os.pathsep.join(
        [str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    )
    ended(started(tmp_path, typed("python encode_corpus.py").words, PATH=path))
    assert filecmp.cmp(
        tmp_path / "encoded" / "000_corpus.ds", encoded / "encoded" / "000_corpus.ds", shallow=False
    ), (tmp_path / "slurm.log").read_text()


@pytest.mark.slow
def test_the_ray_executors_are_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself is not among the requirements: what would be run is taken down instead."""
    from datatrove.executor import RayPipelineExecutor

    ray = ModuleType("ray")
    ray.init = lambda: None  # type: ignore[attr-defined]
    built: list[RayPipelineExecutor] = []
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(RayPipelineExecutor, "run", lambda executor: built.append(executor))
    monkeypatch.chdir(tmp_path)
    exec(compile(script("Ray"), "encode_corpus.py", "exec"), {"__name__": "__main__"})  # noqa: S102
    (merge,) = built
    assert (merge.tasks, merge.depends.tasks, merge.depends.workers) == (1, 1000, 200)
    assert [type(step).__name__ for step in merge.depends.pipeline] == [
        "JsonlReader",
        "LambdaFilter",
        "PlainDocumentTokenizer",
    ]


def run_of(folder: Path, name: str) -> list[str]:
    """Overrides for a small run in a folder of its own."""
    return [*SMALL, f"training.checkpoint_dir={folder / name}", f"training.log_dir={folder / name}"]


@pytest.mark.slow
def test_a_model_trains_from_the_merged_file_and_goes_on(encoded: Path, tmp_path: Path) -> None:
    """From near ln 600 = 6.40, the loss of a guess among 600 tokens, downwards."""
    words = [*typed("python train.py").words, *run_of(tmp_path, "run"), "training.lr=1e-2"]
    stderr = ended(started(encoded, [*words, "training.max_steps=10"]))
    assert "data: encoded/000_corpus.ds: train " in stderr
    assert "resuming" in ended(started(encoded, [*words, "training.max_steps=20"]))
    validations = checkpoint_format.read(tmp_path / "run" / "final.ckpt")["progress"]["validations"]
    assert [step for step, _ in validations] == list(range(2, 21, 2))
    assert validations[-1][1] < validations[0][1] < 6.5


def by_torchrun(node: int, port: int) -> tuple[list[str], dict[str, str]]:
    """The guide's line, typed on one of two machines that have one device each."""
    stand_in = {"8": "1", "node1:29500": f"127.0.0.1:{port}"}
    return [stand_in.get(word, word) for word in typed("torchrun").words], {}


def by_slurm(node: int, port: int) -> tuple[list[str], dict[str, str]]:
    """The command after srun in the guide's job script, with the variables that srun sets on one of
    two such machines.
    """
    values = {
        "NTASKS": 2,
        "NTASKS_PER_NODE": 1,
        "NNODES": 2,
        "PROCID": node,
        "LOCALID": 0,
        "NODEID": node,
        "NODELIST": "127.0.0.1",
        "JOB_ID": 7,
    }
    line = next(line for line in GUIDE.splitlines() if line.startswith("srun python "))
    return line.split()[1:], {f"SLURM_{name}": str(value) for name, value in values.items()} | {
        "MASTER_PORT": str(port)
    }


@pytest.mark.slow
@pytest.mark.parametrize("start", [by_torchrun, by_slurm])
def test_two_machines_train_one_model(
    encoded: Path, tmp_path: Path, start: Callable[[int, int], tuple[list[str], dict[str, str]]]
) -> None:
    """This machine plays both. Two ranks with 2 rows each: 2 x 2 x 64 tokens a step; only rank 0 writes lines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for node in range(2):
        words, environment = start(node, port)
        processes.append(
            started(
                encoded, [*words, *run_of(tmp_path, "run"), "training.max_steps=2"], **environment
            )
        )
    stderr = "".join([ended(process) for process in processes])
    assert stderr.count("256 tokens per step, 2 steps") == 1
    assert checkpoint_format.read(tmp_path / "run" / "final.ckpt")["world_size"] == 2


@pytest.mark.slow
def test_a_lost_machine_is_one_error_line_of_the_other(encoded: Path, tmp_path: Path) -> None:
    """Killed after the first checkpoint, which the error names."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for node in range(2):
        words, environment = by_slurm(node, port)
        words = [*words, *run_of(tmp_path, "run"), "training.max_steps=100000"]
        processes.append(started(encoded, words, **environment))
    first = tmp_path / "run" / "step-000002.ckpt"
    deadline = time.monotonic() + 240
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    processes[1].kill()
    processes[1].communicate(timeout=60)
    _, stderr = processes[0].communicate(timeout=120)
    assert processes[0].returncode == 2, stderr
    assert "Traceback" not in stderr
    error = stderr.splitlines()[-1]
    newest = max((tmp_path / "run").glob("step-*.ckpt"), key=checkpoint_format.step_of)
    assert error.startswith("error: hardware: the connection to another process of this run was ")
    assert error.endswith(f" Start the same command for every process; it continues from {newest}.")


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("[a/gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
        (torch.distributed.DistStoreError("Timed out after 1801 seconds waiting"), True),
        (RuntimeError("size mismatch"), False),
    ],
)
def test_other_errors_keep_their_traceback(error: RuntimeError, is_lost: bool) -> None:
    assert is_lost_connection(error) == is_lost
    if is_lost:
        found = str(lost_process(error, Path("nowhere")))
        assert found.startswith(
            "hardware: the connection to another process of this run was lost: "
        )
        assert found.endswith(f"({error}). No checkpoint was saved before.")


def test_the_job_script_asks_for_what_the_config_says():
    hardware = load_config(ROOT / "configs" / "corpus.yaml").hardware
    for line in (
        f"#SBATCH --nodes={hardware.num_nodes}",
        f"#SBATCH --ntasks-per-node={hardware.devices}",
        f"#SBATCH --gpus-per-node={hardware.devices}",
    ):
        assert line in GUIDE.splitlines()
    assert f"torchrun --nnodes {hardware.num_nodes} --nproc-per-node {hardware.devices} " in GUIDE


def test_every_command_of_the_guide_is_done_here_or_said_why_not():
    done = ("python -m tinylm tokenizer train", "python train.py", "pip install")
    left = [
        command
        for command in commands(GUIDE)
        if command.fenced and not " ".join(command.words).startswith(done)
    ]
    assert all(command.words[0] in SHOWN or command.program in SHOWN for command in left)
