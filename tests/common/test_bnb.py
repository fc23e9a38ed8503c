"""bitsandbytes without the code that it would download."""

import importlib
import sys
from pathlib import Path

import pytest

from tinylm.common.bnb import block_downloads, import_bitsandbytes
from tinylm.common.errors import UserError
from tinylm.config.schema import LoraConfig, ModelConfig
from tinylm.model.decoder import Decoder
from tinylm.model.lora import attach


@pytest.fixture
def with_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package `kernels` is installed, which nothing may import."""
    (tmp_path / "kernels.py").write_text("version = 1\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    assert importlib.import_module("kernels").version == 1
    yield
    sys.modules.pop("kernels", None)


def test_nothing_imports_the_package_that_downloads_kernels(with_kernels: None) -> None:
    """It is there and could be imported, and after the call it cannot: not even if it was before."""
    block_downloads()
    with pytest.raises(ImportError):
        importlib.import_module("kernels")


@pytest.mark.slow
def test_adapters_block_it_too(with_kernels: None) -> None:
    """peft imports bitsandbytes where that is installed."""
    attach(
        Decoder(ModelConfig(vocab_size=9, n_layers=1, d_model=8, n_heads=2, d_ff=8)),
        LoraConfig(r=2),
        seed=0,
    )
    with pytest.raises(ImportError):
        importlib.import_module("kernels")


def test_a_missing_bitsandbytes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = "^bitsandbytes: this package is needed and is not installed. pip install bitsandbytes.$"
    with pytest.raises(UserError, match=words):
        import_bitsandbytes()
