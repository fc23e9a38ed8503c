"""Checkpoints of older schemas in the form of the current one: one step a schema, from each to the next.

A schema number changes whenever a key of the state is renamed or gets another meaning. Then `SCHEMA` goes up by one, and
the table gets a function that turns a state of the previous number into the new form. Every checkpoint that was ever
written stays readable; `tests/checkpoint/data` holds some of each old schema.
"""

from collections.abc import Callable
from typing import Any

SCHEMA = 2
# What only some checkpoints have: see `format`. The first ones of schema 1 had none of these keys.
NO_REFERENCES: dict[str, Any] = {"base": None, "hf_config": None, "reference": None}


def _upgrade_1(state: dict[str, Any]) -> dict[str, Any]:
    """Schema 2 renames fields of the progress of a run; an imported model has none."""
    if "progress" not in state:
        return state
    progress = {PROGRESS_1.get(name, name): value for name, value in state["progress"].items()}
    return state | {"progress": progress}


# Names of schema 1 ─▶ of schema 2.
PROGRESS_1 = {
    "logged_loss": "loss_sum",
    "logged_units": "n_targets",
    "logged_measures": "metric_sums",
    "train_measures": "train_metrics",
}
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _upgrade_1}


def upgrade(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a checkpoint in the form of schema `SCHEMA`."""
    state = NO_REFERENCES | state
    for schema in range(state["schema"], SCHEMA):
        state = UPGRADES[schema](state) | {"schema": schema + 1}
    return state
