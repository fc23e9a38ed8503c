"""`recipe: research` sets what is not given, and nothing else."""

import pytest

from tinylm.common.errors import UserError
from tinylm.config.loader import load_config
from tinylm.config.schema import OWN_FORMAT, RECIPES, Config, ModelConfig

GIVEN = {"model": {"n_layers": 2, "init": "normal"}, "training": {"head_lr": None}}


def changes(config: Config, plain: Config) -> dict[str, object]:
    """The settings that differ, by dotted name."""
    found = {}
    for section in ("model", "training"):
        for name, value in getattr(config, section):
            if value != getattr(getattr(plain, section), name):
                found[f"{section}.{name}"] = value
    return found


def test_it_sets_the_settings_of_its_table_that_are_not_given():
    """All of the table, without model.init and training.head_lr, which are given here."""
    table = {
        f"{s}.{name}": value for s, t in RECIPES["research"].items() for name, value in t.items()
    }
    del table["model.init"], table["training.head_lr"]
    config = Config.model_validate({"recipe": "research"} | GIVEN)
    assert changes(config, Config.model_validate(GIVEN)) == table
    assert Config.from_plain(config.to_plain()) == config


def test_a_stored_config_of_an_earlier_version_gets_no_new_setting_of_the_recipe():
    """Its weights are those of the settings that it has."""
    stored = Config.model_validate({"recipe": "research"}).to_plain()
    del stored["model"]["bigram_rows"], stored["training"]["muon_rounds"]
    config = Config.from_plain(stored)
    assert (config.recipe, config.model.input_scalars) == ("research", True)
    assert (config.model.bigram_rows, config.training.muon_rounds) == (0, "jordan")


def test_sections_in_python_count_as_given_where_they_were_set():
    config = Config(recipe="research", model=ModelConfig(n_layers=2, init="normal"))
    assert (config.model.init, config.model.n_layers) == ("normal", 2)
    assert config.model.input_scalars


def test_a_head_that_is_the_embedding_gets_no_rate_of_its_own():
    """Else the optimizer would refuse training.head_lr, which nobody wrote."""
    config = Config.model_validate({"recipe": "research", "model": {"tie_embeddings": True}})
    assert config.training.head_lr is None
    assert config.training.embedding_lr == RECIPES["research"]["training"]["embedding_lr"]


def test_it_can_be_chosen_on_the_command_line(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model:\n  n_layers: 2\n")
    assert load_config(path) == load_config(path, ["recipe=default"])
    assert load_config(path, ["recipe=research"]).training.optimizer == "muon"


@pytest.mark.parametrize(
    "text", ["recipe: fast", "recipe: [research]", "recipe: research\nmodel: 3"]
)
def test_a_mistake_beside_it_is_an_error_with_its_line(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"config.yaml:\d: (recipe|model)"):
        load_config(path)


def test_the_settings_of_our_format_are_those_that_no_other_recipe_has():
    assert set(OWN_FORMAT) <= set(RECIPES["research"]["model"])
    assert not any(ModelConfig.model_fields[name].default for name in OWN_FORMAT)
