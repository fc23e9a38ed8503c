"""The generated reference and schema: up to date, complete and correct."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tinylm.__main__ import main
from tinylm.config import docs
from tinylm.config.loader import load_config
from tinylm.config.messages import sections
from tinylm.config.schema import Config

ROOT = Path(__file__).parents[2]


def test_the_files_in_docs_match_the_settings(monkeypatch):
    """If this fails, a field has changed: python -m tinylm config-reference"""
    monkeypatch.chdir(ROOT)
    assert main(["config-reference", "--check"]) == 0


@pytest.mark.slow
def test_the_check_accepts_the_written_files(tmp_path, capsys):
    folder = tmp_path / "new" / "docs"
    assert main(["config-reference", "--folder", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}/CONFIG_REFERENCE.md\n{folder}/config.schema.json\n"
    assert main(["config-reference", "--folder", str(folder), "--check"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CONFIG_REFERENCE.md", "config.schema.json"])
def test_the_check_finds_one_changed_byte_and_changes_nothing(tmp_path, capsys, name):
    main(["config-reference", "--folder", str(tmp_path)])
    capsys.readouterr()
    stale = tmp_path / name
    stale.write_bytes(stale.read_bytes().replace(b"384", b"385", 1))
    before = stale.read_bytes()
    assert main(["config-reference", "--folder", str(tmp_path), "--check"]) == 2
    expected = (
        f"error: {stale}: does not match the settings in tinylm/config/. Write it again: "
        f"python -m tinylm config-reference.\n"
    )
    assert capsys.readouterr().err == expected
    assert stale.read_bytes() == before


@pytest.mark.parametrize("arguments", [["--check"], []])
def test_an_impossible_folder_is_a_user_error(tmp_path, capsys, arguments):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "docs"
    assert main(["config-reference", "--folder", str(folder), *arguments]) == 2
    assert (
        capsys.readouterr().err
        == f"error: {folder}/CONFIG_REFERENCE.md: Not a directory. Give the folder of the reference with --folder.\n"
    )


def test_the_page_has_a_row_for_every_setting():
    page = docs.reference_files()["CONFIG_REFERENCE.md"]
    for key, section in sections():
        if section is not Config:
            table = page.partition(f"\n## {key}\n")[2].partition("\n## ")[0]
            assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(section.model_fields)
            assert all(info.description for info in section.model_fields.values())


def test_every_row_has_four_columns():
    """A bare `|` in a doc line would add a fifth."""
    rows = [
        line
        for line in docs.reference_files()["CONFIG_REFERENCE.md"].splitlines()
        if line.startswith("|")
    ]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}


@pytest.mark.slow
def test_the_examples_of_the_page_load_and_its_errors_are_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = docs.reference_files()["CONFIG_REFERENCE.md"]
    first, second = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    Path("config.yaml").write_text(first, encoding="utf-8")
    Path("child.yaml").write_text(second, encoding="utf-8")
    overrides = ["training.max_steps=100", "model.moe.top_k=1", "training.loggers=[tensorboard]"]
    assert " ".join(overrides) in page.replace("'", "")
    child = load_config("child.yaml", overrides)
    assert (
        child.model.n_layers,
        child.model.moe.n_experts,
        child.model.moe.top_k,
        child.training.lr,
        child.training.max_steps,
    ) == (4, 4, 1, 3e-4, 100)
    assert "\nerror: config.yaml:5: training.lrr: no such setting. Did you mean lr?\n" in page
    assert str(tmp_path.parent) not in page


def test_an_example_without_a_mistake_stops_the_generation():
    with pytest.raises(ValueError, match="no mistake in"):
        docs._error_of(docs.EXAMPLE)


def test_the_schema_names_every_setting_and_nothing_else():
    """An editor completes these names and marks others; `extends` is the only key that is not a field of Config."""
    schema = json.loads(docs.reference_files()["config.schema.json"])
    assert schema["additionalProperties"] is False
    assert list(schema["properties"]) == ["extends", *Config.model_fields]
    for key, section in sections():
        if key:
            described = schema["$defs"][section.__name__]
            assert described["additionalProperties"] is False
            assert list(described["properties"]) == list(section.model_fields)
            assert described.get("required", []) == [
                name for name, info in section.model_fields.items() if info.is_required()
            ]


RESOLVED = {"n_kv_heads": 6, "head_dim": 64, "query_scalar": 64, "d_ff": 1024}


def test_the_defaults_in_the_schema_are_those_of_the_settings():
    """Except the widths of the model: null in the schema, resolved in the settings (6 heads of 384 / 6)."""
    schema, plain = docs.config_schema(), Config().to_plain()
    for key, section in sections():
        if plain.get(key) is not None:  # neither a section inside another nor one that is off
            properties = schema["$defs"][section.__name__]["properties"]
            defaults = {name: setting["default"] for name, setting in properties.items()}
            if key == "model":
                assert {name: defaults[name] for name in RESOLVED} == dict.fromkeys(RESOLVED)
                defaults |= RESOLVED
            assert defaults == plain[key]


def test_the_schema_accepts_precision_as_a_number():
    assert docs.config_schema()["$defs"]["HardwareConfig"]["properties"]["precision"]["enum"] == [
        "32",
        "16",
        "bf16",
        "auto",
        32,
        16,
    ]


def test_the_bounds_in_the_schema_are_enforced():
    """n_layers narrows Count: both the schema and the validation must have the narrower bound."""
    assert docs.config_schema()["$defs"]["ModelConfig"]["properties"]["n_layers"]["maximum"] == 1000
    with pytest.raises(ValueError, match="less than or equal to 1000"):
        Config.model_validate({"model": {"n_layers": 1001}})


# --- the program ----------------------------------------------------------------------------------


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "config-reference" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [[], ["no-such-command"], ["config-reference", "--no-such-option"]]
)
def test_a_wrong_command_line_exits_with_2_and_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert re.fullmatch(r"error: .*\. See python -m tinylm --help.\n", capsys.readouterr().err)


def test_help_does_not_import_what_the_commands_need():
    """Not timed: the slow modules must not be imported."""
    code = (
        "import sys, tinylm.__main__; print([name for name in ('torch', 'pydantic', 'yaml', "
        "'numpy') if name in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


def test_it_runs_without_home_locale_or_working_directory(tmp_path):
    """The folder of the reference is relative to a working directory that was removed, and the one line says so."""
    gone = tmp_path / "gone"
    gone.mkdir()
    program = (
        "import os, sys; os.rmdir(os.getcwd()); from tinylm.__main__ import main; "
        "sys.exit(main(['config-reference', '--check']))"
    )
    environment = {"PYTHONPATH": str(ROOT), "LC_ALL": "C", "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=gone,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    message = "error: the working folder was deleted. Change to a folder that exists.\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)
