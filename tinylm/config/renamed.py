"""Settings that have a new name.

In a YAML file or on the command line the old name is an error that tells the new one. Checkpoints of
older schemas are read under the new name.
"""

from typing import Any

# old name -> new name, each as section.key
RENAMED = {"dpo.length_normalised": "dpo.length_normalized"}


def with_new_names(config: dict[str, Any]) -> dict[str, Any]:
    """The plain settings of an old checkpoint under the new names.

    >>> with_new_names({"dpo": {"beta": 0.1, "length_normalised": True}, "lora": None})
    {'dpo': {'beta': 0.1, 'length_normalized': True}, 'lora': None}
    """
    renamed: dict[str, Any] = {}
    for section, settings in config.items():
        if isinstance(settings, dict):
            new = {}
            for key, value in settings.items():
                name = f"{section}.{key}"
                new[RENAMED.get(name, name).removeprefix(f"{section}.")] = value
            settings = new
        renamed[section] = settings
    return renamed
