"""The setting `recipe`: values that learn fast together, for the settings that are not given.

    recipe: research  ─ fill ─▶  model.tie_embeddings: false, training.optimizer: muon, ...

What each value brings is in docs/RESULTS.md, what was tried without success in docs/LOG.md. The
settings of `OWN_FORMAT` have no place in the files of other programs.
"""

from typing import Any

from pydantic import BaseModel

OWN_FORMAT = ("input_scalars",)
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "default": {},
    "research": {
        "model": {
            "tie_embeddings": False,
            "init": "zero_outputs",
            "input_scalars": True,
        },
        "training": {
            "optimizer": "muon",
            "muon_per_head": True,
            "muon_rounds": "polar_express",
            "lr": 3e-3,
            "embedding_lr": 0.1,
            "head_lr": 0.01,
            "schedule": "wsd",
            "decay_ratio": 0.4,
        },
    },
}


def fill(cls: type, values: Any) -> Any:
    """The values of a `Config` with those of its recipe, before they are checked; what is given
    stays.
    """
    if not isinstance(values, dict) or not RECIPES.get(str(values.get("recipe"))):
        return values
    filled = dict(values)
    for section, settings in RECIPES[values["recipe"]].items():
        given = values.get(section) or {}
        if isinstance(given, BaseModel):
            given = given.model_dump(exclude_unset=True)
        if not isinstance(given, dict):  # the check of its type says so
            return values
        filled[section] = settings | given
    if filled["model"]["tie_embeddings"] is True and "head_lr" not in (
        values.get("training") or {}
    ):
        del filled["training"]["head_lr"]  # a head that is the embedding has no rate of its own
    return filled
