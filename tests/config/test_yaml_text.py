"""config_text: what it writes is read back as the same settings."""

from pathlib import Path

import pytest

from tests.conftest import CONFIGS
from tinylm.config.loader import load_config
from tinylm.config.schema import Config
from tinylm.config.yaml_text import config_text

ROOT = Path(__file__).parents[2]


def read_back(config: Config, folder: Path) -> Config:
    path = folder / "config.yaml"
    path.write_text(config_text(config), encoding="utf-8")
    return load_config(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_is_read_back(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert read_back(config, tmp_path) == config


TEXTS = ["null", "1e3", "yes", "---", "=##", "a: b # c", " \n\t", '"', "\\n", "\x1b[31m", "日本 🙂"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_stays_as_it_is(text: str, tmp_path: Path) -> None:
    plain = Config().to_plain()
    plain["data"]["document_separator"] = text
    plain["sampling"]["stop"] = [text, text]
    config = Config.from_plain(plain)
    assert read_back(config, tmp_path) == config


def test_a_tokenizer_of_its_own_and_columns(tmp_path: Path) -> None:
    overrides = ["tokenizer.path=tokenizers/mine", "data.columns={prompt: q, completion: a b}"]
    config = load_config(ROOT / "config_finetune.yaml", overrides)
    assert read_back(config, tmp_path) == config
