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
from tinylm.config.loader import load_config, require_path_here
from tinylm.config.schema import Config
from tinylm.config.yaml_file import read_list
from tinylm.model.hf_files import find_hf_model
from training.support import require_supported

# The program that runs each stage.
PROGRAMS = {
    "pretrain": "train.py",
    "sft": "finetune.py",
    "dpo": "finetune.py",
    "grpo": "finetune.py",
    "reward_model": "finetune.py",
    "verifier": "finetune.py",
}
# The keys of entries that are not stages: data to make first (`made_data.py`), and questions that
# every model is asked at the end (`held_out.py`).
OTHER_ENTRIES = {"data", "test"}


@dataclass(frozen=True)
class PipelineStage:
    """One entry of the list."""

    kind: str
    """one of PROGRAMS"""
    name: str
    """the column of its model in tables: its kind, unless the entry has a name"""
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
        return ("python", PROGRAMS[self.kind], "--config", self.file, *self.overrides)

    @property
    def bases(self) -> tuple[str, ...]:
        """The checkpoints that it reads; a Hugging Face model is not one of them."""
        verifier, distill = self.config.verifier, self.config.distill
        names = [self.config.training.init_from, verifier.sampled_from if verifier else None]
        names += [part.checkpoint for part in self.config.grpo.rewards] if self.config.grpo else []
        names.append(distill.teacher if distill else None)
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
        if OTHER_ENTRIES & item.keys():
            continue
        kind, name, file = _kind_name_and_config(location, item)
        if kind not in PROGRAMS:
            raise UserError(
                (location, "stage"), f"{kind}: no such stage", f"Use one of {', '.join(PROGRAMS)}"
            )
        if name in stages:
            raise UserError(
                (location, "name" if "name" in item else "stage"),
                f"{name} is listed twice",
                "List each stage only once, or give the second one a name of its own (name: ...)",
            )
        require_path_here(file, path, "config", location)
        config = load_config(file, overrides)
        check_kind(kind, config, (location, file), overrides)
        final = Path(config.training.checkpoint_dir) / FINAL
        stages[name] = PipelineStage(kind, name, file, config, tuple(overrides), final)
    if not stages:
        raise UserError(path, "lists no stage", "Add one: - stage: pretrain")
    check_chain(list(stages.values()))
    return [_with_compared_model(stage, stages.values()) for stage in stages.values()]


def results_folder(out: Path, stages: list[PipelineStage]) -> Path:
    """The folder of the results, which is that of no stage.

    Raises:
        UserError: a stage keeps its checkpoints there.
    """
    for stage in stages:
        if stage.folder.resolve() == out.resolve():
            problem = f"{out} is training.checkpoint_dir of {stage.file}"
            raise UserError("--out", problem, "Choose another folder")
    return out


def _kind_name_and_config(location: object, item: dict[str, object]) -> tuple[str, str, str]:
    found = {"name": item.get("stage"), **item}
    for key in ("stage", "config", "name"):
        if not isinstance(found.get(key), str):
            value = found.get(key, "nothing")
            raise UserError(
                (location, key), f"must be text, got {value}", "Each stage has a stage and a config"
            )
    if unknown := item.keys() - {"stage", "config", "name"}:
        raise UserError(
            (location, min(unknown)),
            "no such key",
            "A stage has the keys stage, config and name; settings belong in the config",
        )
    return str(found["stage"]), str(found["name"]), str(found["config"])


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
    for section in ("dpo", "grpo", "reward_model", "verifier"):
        present = getattr(config, section)
        if (present is not None) == (name == section):
            continue
        fix = "Give another config or another stage"
        if any(override.startswith(f"{section}.") for override in overrides):
            fix = "Overrides apply to every stage: put this setting into the config of its stage"
        has = "has no" if name == section else "has a"
        raise UserError(where, f"{has} {section} section, but its stage is {name}", fix)
    if name in ("sft", "dpo", "grpo", "reward_model"):
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
