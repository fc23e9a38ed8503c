"""Puts the programs, and the files that they need, into the wheel: in tinylm/_app, once.

Everything else is in pyproject.toml. The checkout, and `pip install -e .`, use the files where they
are (tinylm/common/app_folder.py).
"""

import shutil
from itertools import chain
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PROGRAMS = (
    "train.py",
    "finetune.py",
    "align.py",
    "infer.py",
    "evaluate_checkpoints.py",
    "eval_val.py",
    "list.py",
)
FILES = (*PROGRAMS, "model.py", "data.py")
PATTERNS = ("config*.yaml", "training/**/*.py", "configs/**/*.yaml", "cases/*.yaml", "data/tiny_*")


class BuildWithPrograms(build_py):
    """Copies the programs after the package; an editable installation needs no copy."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        app = Path(self.build_lib, "tinylm", "_app")
        shutil.rmtree(app, ignore_errors=True)  # of an earlier build
        for source in (*map(ROOT.joinpath, FILES), *chain(*map(ROOT.glob, PATTERNS))):
            target = app / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildWithPrograms})
