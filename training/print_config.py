"""Print all settings of a run as a config file: `--print-config` of train.py and finetune.py."""

from tinylm.config.schema import Config
from tinylm.config.yaml_text import config_text
from training.build import find_initial_model, initialized_config


def print_config(config: Config) -> int:
    """Print the settings of the run, with those of the model that it starts from,
    and return the exit code.

    A run with the printed file is the same run.
    """
    initial = find_initial_model(config, None)
    if initial is not None:
        config = initialized_config(config, initial)
    print(config_text(config), end="")
    return 0
