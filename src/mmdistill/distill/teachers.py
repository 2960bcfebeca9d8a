"""Load the frozen teachers, and check that they are the ones that a resumed student was distilled from."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mmdistill.builders import (
    check_joints,
    check_token_grid,
    clip_setting_warnings,
    make_encoder_config,
    token_grid,
)
from mmdistill.checkpoint import Checkpoint, CheckpointError, load_encoder_for_clips, open_checkpoint
from mmdistill.checkpoint.errors import name_setting
from mmdistill.checkpoint.locate import existing_path
from mmdistill.checkpoint.references import (
    inherited_sources,
    labeled_sources,
    labeled_sources_entry,
    require_exists,
    require_same_digest,
    weights_digest,
)
from mmdistill.checkpoint.retention import resume_path
from mmdistill.config import ConfigError, DataModuleConfig, DistillConfig, feature_files, teacher_paths
from mmdistill.config.compose import load_model_preset, model_presets
from mmdistill.distill.feature_file import FeatureFile, read_feature_file
from mmdistill.errors import suggest_nearest
from mmdistill.modalities import STUDENT_MODALITY, ModalitySpec, modality_names, stored_statistics
from mmdistill.models.videomae import Encoder
from mmdistill.randomness import seed_torch
from mmdistill.training.compatibility import diff_settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Teachers:
    """All teachers of a run, and its student.

    Attributes:
        encoders: teachers that are networks, by modality.
        files: teachers that are files of features, by name.
        sources: path and sha256 of each teacher by component, ``teacher_NAME``.
        student: initial encoder of the student; None: a copy of the RGB teacher.
        student_sources: labeled sources of the checkpoint `student`, see `labeled_sources`.
    """

    encoders: dict[str, Encoder]
    files: dict[str, FeatureFile]
    sources: dict[str, Any]
    student: Encoder | None
    student_sources: list[dict[str, Any]]

    @property
    def meta(self) -> dict[str, Any]:
        """Metadata of a checkpoint: the origin of the teachers, and the labeled sources of the initial student."""
        return {"teachers": dict(self.sources), **labeled_sources_entry(self.student_sources)}


def load_all_teachers(config: DistillConfig, specs: dict[str, ModalitySpec], resumed: Checkpoint | None) -> Teachers:
    """See `load_teachers`, `load_feature_files` and `load_initial_student`, whose errors it raises."""
    encoders, sources = load_teachers(config, specs, resumed)
    files, file_sources = load_feature_files(config, resumed)
    student = load_initial_student(config, specs[STUDENT_MODALITY], resumed, encoders.get(STUDENT_MODALITY))
    path = None if config.student in model_presets() else config.student
    return Teachers(encoders, files, {**sources, **file_sources}, student, inherited_sources(path, resumed))


def read_teacher(
    path: str, modality: str, spec: ModalitySpec, data: DataModuleConfig, key: str = "trainer.ckpt_path"
) -> Encoder:
    """The encoder of a pretraining checkpoint, or the student of a distilled one; `key` names it in errors.

    Raises:
        ConfigError: its modality, statistics or token grid differ from this run's.
    """
    with name_setting(key):
        checkpoint = open_checkpoint(path)
    stored_modality = checkpoint.meta.get("modality")
    if stored_modality is not None and stored_modality != modality:
        raise ConfigError(
            f"{key}: {path} is a {stored_modality} checkpoint, but is listed as the {modality} "
            + ("student" if key == "student" else "teacher; check the order (rgb, flow, skeleton)")
        )
    encoder = load_encoder_for_clips(checkpoint, num_frames=data.num_frames, token_grid=token_grid(data))
    check_joints(checkpoint.meta, spec, path)
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
    """Raise `CheckpointError` if `resume`, `student` or a path of `trainer.ckpt_path` does not exist. Nothing is read.

    A run that resumes may need no teacher of `trainer.ckpt_path`, see `load_teachers`.
    """
    if config.resume is None:
        if config.student is not None and config.student not in model_presets():
            try:
                existing_path(config.student)
            except CheckpointError as error:
                presets = model_presets()
                raise ConfigError(
                    f"student={config.student} is neither one of {', '.join(presets)} nor a checkpoint: {error}"
                    f"{suggest_nearest(config.student, presets)}"
                ) from error
        with name_setting("trainer.ckpt_path"):
            for path in teacher_paths(config.trainer).values():
                existing_path(path)
        for name, path in feature_files(config.trainer).items():
            with name_setting(f"trainer.ckpt_path.{name}.file"):
                existing_path(path)
    elif config.resume != "auto":
        resume_path(config.resume)


def load_teachers(
    config: DistillConfig, specs: dict[str, ModalitySpec], resumed: Checkpoint | None
) -> tuple[dict[str, Encoder], dict[str, Any]]:
    """The teachers that are networks, by modality, and the origin of each component.

    The origin is its path, its encoder's sha256 and its labeled sources, if any.

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
    if stored and set(stored) != {f"teacher_{name}" for name in config.trainer.teachers}:
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
            check_joints(resumed.meta, spec, source)
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
        if learned := labeled_sources(open_checkpoint(path, verify=False).stored_meta):
            sources[component]["sources"] = learned
    return teachers, sources


def load_feature_files(
    config: DistillConfig, resumed: Checkpoint | None
) -> tuple[dict[str, FeatureFile], dict[str, Any]]:
    """The teachers that are files of features, by name in the order of `trainer.teachers`, and their path and sha256.

    A run that resumes without `trainer.ckpt_path` reads the paths in the checkpoint.

    Raises:
        CheckpointError: a file has changed since the checkpoint was written, or see `read_feature_file`.
    """
    stored: dict[str, Any] = (resumed.meta.get("teachers") or {}) if resumed else {}
    paths = feature_files(config.trainer)
    files: dict[str, FeatureFile] = {}
    sources: dict[str, dict[str, Any]] = {}
    for name in (name for name in config.trainer.teachers if name not in modality_names()):
        component = f"teacher_{name}"
        with name_setting(f"trainer.ckpt_path.{name}.file"):
            found = read_feature_file(paths.get(name) or stored[component]["path"])
            expected = (stored.get(component) or {}).get("sha256", found.sha256)
            if found.sha256 != expected:
                raise CheckpointError(
                    f"{found.path}: its sha256 is {found.sha256}, but {resumed and resumed.path} was distilled with a "
                    f"file of sha256 {expected}; restore it, or start from scratch with resume=null"
                )
        files[name] = found
        sources[component] = {"path": str(found.path), "sha256": found.sha256, "kind": "file"}
        if found.sources:
            sources[component]["sources"] = list(found.sources)
    return files, sources


def load_initial_student(
    config: DistillConfig, spec: ModalitySpec, resumed: Checkpoint | None, rgb_teacher: Encoder | None
) -> Encoder | None:
    """The encoder that the student starts from; None: a copy of the RGB teacher.

    It is that of a resumed checkpoint, or that of `student`.

    Raises:
        ConfigError: `student` does not fit the clips, or its sizes are not those of the resumed checkpoint; or there is
            neither a student nor an RGB teacher.
    """
    data, student = config.data_module, config.student
    preset = None
    if student is not None and student in model_presets():
        preset = make_encoder_config(load_model_preset(student), data, spec)
    stored = resumed.encoder_config("student_rgb") if resumed else None
    if resumed and stored and (student is not None or rgb_teacher is None or stored != rgb_teacher.config):
        encoder = resumed.encoder("student_rgb")
        check_token_grid(encoder, spec, data, resumed.path)
        if preset and (difference := diff_settings(asdict(encoder.config), asdict(preset))):
            raise ConfigError(
                f"student={student}: the student of {resumed.path} has other sizes (checkpoint / student): "
                f"{difference}; use the same student, or start from scratch with resume=null"
            )
        return encoder
    if preset:
        with torch.random.fork_rng(devices=[]):
            seed_torch(config.seed)
            return Encoder(preset)
    if student is not None:
        return read_teacher(student, spec.name, spec, data, "student")
    if rgb_teacher is None:
        raise ConfigError("student: without a teacher rgb, set student to a model preset or to a checkpoint")
    return None


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
