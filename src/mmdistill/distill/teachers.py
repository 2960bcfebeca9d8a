"""Load the frozen teachers, and check that they are the ones that a resumed student was distilled from."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdistill.builders import check_token_grid, clip_setting_warnings, token_grid
from mmdistill.checkpoint import Checkpoint, CheckpointError, load_encoder_for_clips, open_checkpoint
from mmdistill.checkpoint.errors import name_setting
from mmdistill.checkpoint.locate import existing_path
from mmdistill.checkpoint.references import require_exists, require_same_digest, weights_digest
from mmdistill.checkpoint.retention import resume_path
from mmdistill.config import ConfigError, DataModuleConfig, DistillConfig, teacher_paths
from mmdistill.modalities import ModalitySpec, modality_names, stored_statistics
from mmdistill.models.videomae import Encoder
from mmdistill.training.compatibility import diff_settings

log = logging.getLogger(__name__)


def read_teacher(path: str, modality: str, spec: ModalitySpec, data: DataModuleConfig) -> Encoder:
    """The encoder of a pretraining checkpoint.

    Raises:
        ConfigError: its modality, statistics or token grid differ from this run's.
    """
    with name_setting("trainer.ckpt_path"):
        checkpoint = open_checkpoint(path)
    stored_modality = checkpoint.meta.get("modality")
    if stored_modality is not None and stored_modality != modality:
        raise ConfigError(
            f"trainer.ckpt_path: {path} is a {stored_modality} checkpoint, but is listed as the {modality} teacher; "
            "check the order (rgb, flow, skeleton)"
        )
    encoder = load_encoder_for_clips(checkpoint, num_frames=data.num_frames, token_grid=token_grid(data))
    check_token_grid(encoder, spec, data, path)
    _check_statistics(checkpoint, spec, path)
    for line in clip_setting_warnings(checkpoint.meta, data, path):
        log.info(line)
    return encoder


def _check_statistics(checkpoint: Checkpoint, spec: ModalitySpec, path: object) -> None:
    """Raise `ConfigError` if mean, std or sigma differ from those that the checkpoint was trained with."""
    stored = stored_statistics(checkpoint.meta, spec.name)
    if stored and (difference := diff_settings(vars(spec.with_statistics(*stored)), vars(spec))):
        raise ConfigError(
            f"data_module.modalities.{spec.name}: differs from the settings that {path} was trained with (checkpoint / "
            f"data_module): {difference}; use the same dataset config in both trainings"
        )


def check_paths(config: DistillConfig) -> None:
    """Raise `CheckpointError` if `resume` or a path of `trainer.ckpt_path` does not exist. Nothing is read.

    A run that resumes may need no teacher of `trainer.ckpt_path`, see `load_teachers`.
    """
    if config.resume is None:
        with name_setting("trainer.ckpt_path"):
            for path in teacher_paths(config.trainer).values():
                existing_path(path)
    elif config.resume != "auto":
        resume_path(config.resume)


def load_teachers(
    config: DistillConfig, specs: dict[str, ModalitySpec], resumed: Checkpoint | None
) -> tuple[dict[str, Encoder], dict[str, Any]]:
    """The teachers by modality, and for each component its path and its encoder's sha256.

    A new run reads `trainer.ckpt_path`. A resumed run reads `trainer.ckpt_path`, and takes a teacher that is not there
    from the checkpoint. If that is a student-only checkpoint, the run reads the paths in the checkpoint. Digests must
    match.

    Raises:
        ConfigError: see `read_teacher`; `trainer.teachers` differs from the checkpoint.
        CheckpointError: a teacher of a student-only checkpoint is missing, or a teacher's sha256 differs.
    """
    modalities = [m for m in modality_names() if m in config.trainer.teachers]
    source = resumed.path if resumed else None
    stored: dict[str, Any] = (resumed.meta.get("teachers") or {}) if resumed else {}
    if stored and set(stored) != {f"teacher_{m}" for m in modalities}:
        raise ConfigError(
            f"trainer.teachers={config.trainer.teachers}: {source} was distilled from {', '.join(stored)}; "
            "set the same teachers, or start from scratch with resume=null"
        )
    paths = teacher_paths(config.trainer) if config.trainer.ckpt_path is not None or not stored else {}
    teachers: dict[str, Encoder] = {}
    sources: dict[str, Any] = {}
    for modality in modalities:
        component, spec = f"teacher_{modality}", specs[modality]
        if resumed and component in stored and component in resumed.components:
            _check_statistics(resumed, spec, source)
            # trainer.ckpt_path is optional here, but a checkpoint that it names must contain the same teacher
            if modality in paths and Path(paths[modality]).expanduser().exists():
                teachers[modality] = read_teacher(paths[modality], modality, spec, config.data_module)
                digest = weights_digest(teachers[modality])
                require_same_digest(paths[modality], digest, component, stored[component], source)
            else:
                teachers[modality] = resumed.encoder(component)
                check_token_grid(teachers[modality], spec, config.data_module, source)
            sources[component] = stored[component]
            continue
        path = paths.get(modality) or str(stored[component]["path"])
        if component in stored:
            require_exists(path, component, stored[component], source)
        teachers[modality] = read_teacher(path, modality, spec, config.data_module)
        digest = weights_digest(teachers[modality])
        if component in stored:
            require_same_digest(path, digest, component, stored[component], source)
        sources[component] = {"path": str(Path(path).expanduser().absolute()), "sha256": digest}
    return teachers, sources


def check_teacher_digests(stored: Mapping[str, Any], own: Mapping[str, Any], components: Sequence[str]) -> None:
    """Compare the sha256 of the teachers that a checkpoint references (`stored`) with those of this run (`own`).

    Raises:
        CheckpointError: a teacher differs; names both digests.
    """
    for component in components:
        expected, found = ((sources.get(component) or {}).get("sha256") for sources in (stored, own))
        if expected is None or expected != found:
            raise CheckpointError(
                f"the student-only checkpoint was distilled with {component} of sha256 {expected}; this run's "
                f"{component} has {found}; set trainer.ckpt_path to that teacher's checkpoint"
            )
