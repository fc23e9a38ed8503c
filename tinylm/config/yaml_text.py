"""From a `Config` back to YAML: every setting with its value, in the order of the schema."""

from typing import Any

import yaml

from tinylm.config.schema import Config


class _Dumper(yaml.SafeDumper):
    """Quotes every text, so that none is read as a number, a switch or null."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """A value that is text, in double quotes."""
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"')

    def represent_settings(self, values: dict[str, Any]) -> yaml.MappingNode:
        """A section: its keys are names, which need no quotes."""
        node = self.represent_dict(values)
        for key, _ in node.value:
            if key.value.isidentifier():
                key.style = None
        return node

    def ignore_aliases(self, data: Any) -> bool:
        """Equal values are written again: the loader refuses anchors."""
        return True


_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_representer(dict, _Dumper.represent_settings)


def config_text(config: Config) -> str:
    """The text of a config file that `load_config` reads as `config`."""
    return yaml.dump(
        config.to_plain(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100
    )
