"""Checkpoints of older schemas in the form of the current one: one step a schema, from each to the next.

A schema number changes whenever a key of the state is renamed or gets another meaning. Then `SCHEMA` goes up by one, and
the table gets a function that turns a state of the previous number into the new form. Every checkpoint that was ever
written stays readable; `tests/checkpoint/data` holds some of each old schema.
"""

from collections.abc import Callable
from typing import Any

SCHEMA = 1
# What only some checkpoints have: see `format`. The first ones of schema 1 had none of these keys.
NO_REFERENCES: dict[str, Any] = {"base": None, "hf_config": None, "reference": None}

UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}


def upgrade(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a checkpoint in the form of schema `SCHEMA`."""
    state = NO_REFERENCES | state
    for schema in range(state["schema"], SCHEMA):
        state = UPGRADES[schema](state) | {"schema": schema + 1}
    return state
