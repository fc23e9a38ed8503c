"""Where the programs are, with the configs and the data that belong to them: `app_folder`.

a checkout, or pip install -e .   the folder of train.py
pip install .                     tinylm/_app, where setup.py puts the same files
"""

from pathlib import Path

PACKAGE = Path(__file__).parent.parent
# Inside the package, so that nothing called data, list or model is at the top of site-packages.
INSTALLED = "_app"


def app_folder() -> Path:
    """The folder of train.py; only read from, never written to."""
    installed = PACKAGE / INSTALLED
    return installed if installed.is_dir() else PACKAGE.parent
