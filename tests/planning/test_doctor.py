"""What the machine can do is found, and what it lacks comes with the fix."""

import importlib.metadata
import re

import pytest
import torch

from tinylm.__main__ import main
from tinylm.planning import doctor

NO_VNNI = "fp32 for more, as this CPU has no VNNI"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """The hub is never asked in a test."""

    monkeypatch.setattr(doctor, "find_hub_problem", lambda: "the hub cannot be reached (timed out)")


def test_every_subject_is_checked_and_versions_are_the_installed_ones(capsys):
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert re.search(rf"^torch +{re.escape(torch.__version__)}", out, re.MULTILINE)
    for subject in (
        "python",
        "lightning",
        "peft",
        "cpu",
        "mps",
        "precision bf16",
        "hardware.compile",
        "disk",
        "writing",
        "Hugging Face hub",
    ):
        assert re.search(rf"^{subject}  ", out, re.MULTILINE)
    assert "the hub cannot be reached (timed out)" in out
    assert "everything that training needs is here" in err


def test_a_missing_library_that_training_needs_fails_and_an_optional_one_does_not(
    monkeypatch, capsys
):
    real = importlib.metadata.version
    missing = {"wandb"}

    def version(name):
        if name in missing:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert main(["doctor"]) == 0
    missing.add("lightning")
    capsys.readouterr()
    assert main(["doctor"]) == 2
    out, err = capsys.readouterr()
    assert "pip install lightning" in out and "pip install wandb" in out
    assert (
        err == "error: missing: lightning. Follow the table, or: pip install -r requirements.txt.\n"
    )


def test_a_folder_that_cannot_be_written_is_found(monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    found = {finding.subject: finding for finding in doctor.memory_and_disk()}
    assert (
        found["writing"].found == "this folder cannot be written: Permission denied"
        and found["writing"].required
    )


def test_generation_is_described_by_the_functions_that_decide(monkeypatch):
    """Without oneDNN, 8 bits are refused and bf16 is not packed, and the table says so."""
    found = {finding.subject: finding.found for finding in doctor.generation()}
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        assert found["generation"].startswith("cpu (neither CUDA nor MPS is available), ")
        assert found["--weights fp32"] == (
            "lean step, matrices copied by column, those above 67 MB as stored"
        )
    monkeypatch.setattr(doctor, "pick_device", lambda name: ("cpu", "requested"))
    for is_exact, many in ((True, "oneDNN with inputs in 8 bits for more"), (False, NO_VNNI)):
        monkeypatch.setattr(doctor, "multiplies_int8", lambda value=is_exact: value)
        found = {finding.subject: finding.found for finding in doctor.generation()}
        assert re.fullmatch(
            rf"lean step, _weight_int4pack_mm_for_cpu for up to \d+ texts at once, {many}",
            found["--weights int4"],
        )
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    found = {finding.subject: finding.found for finding in doctor.generation()}
    assert found["--weights bf16"] == found["--weights fp32"]
    for name in ("int8", "int4"):
        expected = "8 and 4 bits are only supported on the CPU, with oneDNN"
        assert found[f"--weights {name}"] == expected
    monkeypatch.setattr(doctor, "pick_device", lambda name: ("meta", "requested"))
    found = {finding.subject: finding.found for finding in doctor.generation()}
    assert found["--weights fp32"] == (
        "step of decoder.py (on a GPU, fewer launches matter and not the layout)"
    )
