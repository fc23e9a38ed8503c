"""The stages of align.py: read from a YAML list and checked against each other before anything
runs.

    read_stages  YAML list ─▶ PipelineStage, one for each entry, in order
    check_chain  no two stages write to one folder, and every stage begins with a model that exists
    by then

Each entry names a stage and a config that also runs by itself. Running them is `pipeline_run.py`,
comparing their models `side_by_side.py`.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tinylm.checkpoint.result import FINAL
from tinylm.common.errors import UserError
from tinylm.common.hub import HF_PREFIX
from tinylm.config.loader import load_config
from tinylm.config.schema import Config
from tinylm.config.yaml_file import read_list
from tinylm.model.hf_files import find_hf_model
from training.support import require_supported

# The program that runs each stage.
PROGRAMS = {
    "pretrain": "train.py",
    "sft": "finetune.py",
    "dpo": "finetune.py",
    "verifier": "finetune.py",
}


@dataclass(frozen=True)
class PipelineStage:
    """One entry of the list."""

    name: str
    """one of PROGRAMS"""
    file: str
    """the path of its config"""
    config: Config
    overrides: tuple[str, ...]
    model: Path
    """the checkpoint to compare: the one that a later stage begins with, otherwise final.ckpt"""

    @property
    def folder(self) -> Path:
        """The folder of its checkpoints."""
        return Path(self.config.training.checkpoint_dir)

    @property
    def command(self) -> tuple[str, ...]:
        """The command that runs this stage alone."""
        return ("python", PROGRAMS[self.name], "--config", self.file, *self.overrides)

    @property
    def bases(self) -> tuple[str, ...]:
        """The checkpoints that it reads; a Hugging Face model is not one of them."""
        verifier = self.config.verifier
        names = [self.config.training.init_from, verifier.sampled_from if verifier else None]
        return tuple(name for name in names if name is not None and not name.startswith(HF_PREFIX))

    def holds(self, checkpoint: str) -> bool:
        """Whether `checkpoint` is a file in this stage's folder."""
        return Path(checkpoint).parent.resolve() == self.folder.resolve()


def read_stages(path: Path, overrides: Sequence[str] = ()) -> list[PipelineStage]:
    """The stages of a YAML list, with `overrides` applied to each config,
    checked against each other.

    Raises:
        UserError: naming the file, the line and the problem;
            or as `load_config` of a stage's config.
    """
    stages: dict[str, PipelineStage] = {}
    for location, item in read_list(path):
        name, file = _name_and_config(location, item)
        if name not in PROGRAMS:
            raise UserError(
                (location, "stage"), f"{name}: no such stage", f"Use one of {', '.join(PROGRAMS)}"
            )
        if name in stages:
            raise UserError(
                (location, "stage"), f"{name} is listed twice", "List each stage only once"
            )
        config = load_config(file, overrides)
        check_kind(name, config, (location, file), overrides)
        final = Path(config.training.checkpoint_dir) / FINAL
        stages[name] = PipelineStage(name, file, config, tuple(overrides), final)
    check_chain(list(stages.values()))
    return [_with_compared_model(stage, stages.values()) for stage in stages.values()]


def _name_and_config(location: object, item: dict[str, object]) -> tuple[str, str]:
    for key in ("stage", "config"):
        if not isinstance(item.get(key), str):
            found = item.get(key, "nothing")
            raise UserError(
                (location, key), f"must be text, got {found}", "Each stage has a stage and a config"
            )
    if unknown := item.keys() - {"stage", "config"}:
        raise UserError(
            (location, min(unknown)),
            "no such key",
            "A stage has the keys stage and config; settings belong in the config",
        )
    return str(item["stage"]), str(item["config"])


def _with_compared_model(stage: PipelineStage, stages: Iterable[PipelineStage]) -> PipelineStage:
    """The stage with the checkpoint that a later stage begins with, if one does."""
    taken = [base for other in stages for base in other.bases if stage.holds(base)]
    return replace(stage, model=Path(taken[0])) if taken else stage


# --- checks ---


def check_kind(
    name: str, config: Config, where: tuple[object, ...], overrides: Sequence[str]
) -> None:
    """Refuse a config of another stage, or one that its program would refuse later.

    Raises:
        UserError: at `where`.
    """
    for section, present in (("dpo", config.dpo), ("verifier", config.verifier)):
        if (present is not None) == (name == section):
            continue
        fix = "Give another config or another stage"
        if any(override.startswith(f"{section}.") for override in overrides):
            fix = "Overrides apply to every stage: put this setting into the config of its stage"
        has = "has no" if name == section else "has a"
        raise UserError(where, f"{has} {section} section, but its stage is {name}", fix)
    if name in ("sft", "dpo"):
        try:
            require_supported(name, config)
        except UserError as error:
            raise error.within(*where) from None


def check_chain(stages: list[PipelineStage]) -> None:
    """Refuse stages that would overwrite each other,
    and one whose base does not exist when it runs.

    Raises:
        UserError: naming the config of the stage and the setting.
    """
    for number, stage in enumerate(stages):
        before, after = stages[:number], stages[number:]
        for other in before:
            if other.folder.resolve() == stage.folder.resolve():
                raise UserError(
                    (stage.file, "training.checkpoint_dir"),
                    f"{stage.folder} is also the folder of stage {other.name}",
                    "Give each stage its own folder",
                )
        check_init_from(stage, before)
        for base in stage.bases:
            if any(other.holds(base) for other in before):
                continue
            if any(other.holds(base) for other in after):
                raise UserError(
                    (stage.file, base),
                    "written by this stage or a later one",
                    "Change the order of the stages",
                )
            if not os.path.exists(base):
                raise UserError(
                    (stage.file, base),
                    f"not found, and no stage before {stage.name} writes it",
                    "Add the stage that does",
                )


def check_init_from(stage: PipelineStage, before: list[PipelineStage]) -> None:
    """Refuse a base that the stage cannot begin with, or that cannot be compared.

    Raises:
        UserError: naming the config of the stage and the model.
    """
    base = stage.config.training.init_from
    if base is None:
        return
    where = (stage.file, "training.init_from")
    if base.startswith(HF_PREFIX):
        try:
            encoder_decoder = find_hf_model(base.removeprefix(HF_PREFIX)).config.is_encoder_decoder
        except UserError as error:
            raise error.within(*where) from None
        if encoder_decoder:
            raise UserError(
                where,
                f"{base} is an encoder-decoder, which has no perplexity on plain text to compare",
                "Run finetune.py by itself, or choose another model",
            )
    for other in before:
        if other.config.lora is not None and other.holds(base):
            raise UserError(
                where,
                f"{base} is an adapter, because {other.file} has a lora section, "
                f"and stage {stage.name} begins with a whole model",
                "Remove that section; if memory is short, use lora in the last stage only",
            )
