"""Checkpoints of older schemas in the form of the current one: one step per schema,
from each to the next.

A schema number changes when a key of the state is renamed or its meaning changes. Then `SCHEMA` is
increased by one, and `UPGRADES` gets a function that turns a state of the previous number into the
new form. Every checkpoint that was ever written can still be read; tests/checkpoint/data has some
of each old schema.
"""

from collections.abc import Callable
from typing import Any

from tinylm.config.renamed import with_new_names

SCHEMA = 2
# Keys that only some checkpoints need (see `format`).
# The first checkpoints of schema 1 had none of them.
NO_REFERENCES: dict[str, Any] = {"base": None, "hf_config": None, "reference": None}

# Schema 1 to 2: fields of the progress of a run. Renamed settings are in config/renamed.py.
PROGRESS_1 = {
    "logged_loss": "loss_sum",
    "logged_units": "n_targets",
    "logged_measures": "metric_sums",
    "train_measures": "train_metrics",
}


def _upgrade_1(state: dict[str, Any]) -> dict[str, Any]:
    """Rename settings, and fields of `progress`; an imported model has no progress."""
    state = state | {"config": with_new_names(state["config"])}
    if "progress" not in state:
        return state
    progress = {PROGRESS_1.get(name, name): value for name, value in state["progress"].items()}
    return state | {"progress": progress}


UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _upgrade_1}


def upgrade(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a checkpoint in the form of schema `SCHEMA`."""
    state = NO_REFERENCES | state
    for schema in range(state["schema"], SCHEMA):
        state = UPGRADES[schema](state) | {"schema": schema + 1}
    return state
