"""Data that a list of stages begins with: made by a program of ours before the first stage.

    - data: arithmetic          a name of MAKERS
      out: data/arithmetic      its folder

It is made only if the folder does not exist, and whole or not at all: remove the folder to make it
again.
"""

import logging
from pathlib import Path

from tinylm.common.errors import UserError
from tinylm.common.files import make_once
from tinylm.config.yaml_file import read_list
from tinylm.text.arithmetic import write_arithmetic

logger = logging.getLogger(__name__)
# The function that writes each kind of data into a folder.
MAKERS = {"arithmetic": write_arithmetic}


def make_data(path: Path) -> None:
    """Make the data that a YAML list of stages names, where it is missing.

    Raises:
        UserError: an entry is wrong, naming the file, the line and the key; or as its maker.
    """
    for location, item in read_list(path):
        if "data" not in item:
            continue
        if item["data"] not in MAKERS:
            problem = f"{item['data']}: no such data"
            raise UserError((location, "data"), problem, f"Use one of {', '.join(MAKERS)}")
        if not isinstance(item.get("out"), str) or item.keys() != {"data", "out"}:
            problem = f"must have the keys data and out, got {', '.join(map(str, item))}"
            raise UserError(location, problem, "Name the folder of the data: out: data/arithmetic")
        out = Path(item["out"])
        if out.exists():
            logger.info("data: %s is there", out)
            continue
        logger.info("data: making %s", out)
        make_once(out, MAKERS[item["data"]], setting=f"{location}: out")
