"""Packages whose code runs at the first use of it."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tinylm.common.lazy import postpone


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `costly` with a module; its name leaves sys.modules after the test."""
    (tmp_path / "costly").mkdir()
    (tmp_path / "costly" / "__init__.py").write_text("class Kind: ran = True\nOTHER = 1\n", "utf-8")
    (tmp_path / "costly" / "inner.py").write_text("from costly import OTHER\n", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"version of {name}")
    yield "costly"
    for name in ("costly", "costly.inner"):
        sys.modules.pop(name, None)


def test_its_code_runs_when_a_name_is_used_that_does_not_stand_in(package):
    stand_in = type("Kind", (), {})
    postpone(package, Kind=stand_in)
    import costly

    assert costly.Kind is stand_in
    assert costly.__version__ == "version of costly"
    assert not hasattr(costly, "__wrapped__")  # inspect and doctest ask for such names
    assert costly.Kind is stand_in
    assert costly.OTHER == 1
    assert costly.Kind.ran
    with pytest.raises(AttributeError, match="module 'costly' has no attribute 'missing'"):
        _ = costly.missing


def test_its_modules_can_be_imported(package):
    postpone(package, Kind=object)
    from costly.inner import OTHER

    assert OTHER == 1


def test_a_package_that_is_loaded_or_missing_stays_as_it_is(package):
    import costly

    postpone(package, Kind=object)
    assert costly.Kind.ran
    postpone("no_such_package")
    assert "no_such_package" not in sys.modules


@pytest.mark.slow
def test_training_imports_no_library_of_metrics():
    """torchmetrics, which Lightning imports, would load all of them. It still works when it is used."""
    code = """import sys, training.run
print(sorted({"scipy", "matplotlib", "transformers", "pandas"} & sys.modules.keys()))
import torch, torchmetrics
print(float(torchmetrics.MeanMetric()(torch.tensor([1.0, 3.0]))))"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["[]", "2.0"]
