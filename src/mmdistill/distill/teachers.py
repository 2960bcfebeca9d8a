"""Frozen teachers: which file each comes from, and proof that it is the one a student was distilled with."""

import logging
from pathlib import Path
from typing import Any

from mmdistill.builders import check_token_grid, sampling_rate_warnings, token_grid
from mmdistill.checkpoint import Checkpoint, CheckpointError, load_encoder, load_encoder_for_clips, read_checkpoint
from mmdistill.checkpoint.digest import weights_digest
from mmdistill.checkpoint.references import require_exists, require_same_digest
from mmdistill.config import ConfigError, DataModuleConfig, DistillConfig, teacher_paths
from mmdistill.modalities import ModalitySpec, modality_names, stored_statistics
from mmdistill.models.videomae import Encoder

log = logging.getLogger(__name__)


def read_teacher(path: str, modality: str, spec: ModalitySpec, data: DataModuleConfig) -> Encoder:
    """The encoder of a pretraining checkpoint.

    Raises:
        ConfigError: it was trained on another modality, other statistics or another token grid.
    """
    checkpoint = read_checkpoint(path)
    found = checkpoint.meta.get("modality")
    if found is not None and found != modality:
        raise ConfigError(
            f"trainer.ckpt_path: {path} is a {found} checkpoint, given as the {modality} teacher; "
            "check the order (rgb, flow, skeleton)"
        )
    encoder = load_encoder_for_clips(checkpoint, num_frames=data.num_frames, token_grid=token_grid(data))
    check_token_grid(encoder, spec, data, path)
    _check_inputs(checkpoint, spec, path)
    for line in sampling_rate_warnings(checkpoint.meta, data, path):
        log.info(line)
    return encoder


def _check_inputs(checkpoint: Checkpoint, spec: ModalitySpec, path: object) -> None:
    """Whether this run gives a teacher what it was trained on."""
    stored = stored_statistics(checkpoint.meta, spec.name)
    if stored and spec.with_statistics(*stored) != spec:
        found = spec.with_statistics(*stored)
        names = [n for n in ("mean", "std", "sigma") if getattr(found, n) != getattr(spec, n)]
        told = ", ".join(f"{n} {getattr(found, n)} / {getattr(spec, n)}" for n in names)
        raise ConfigError(
            f"data_module.modalities.{spec.name}: not as {path} was trained with (checkpoint / data_module): {told}; "
            "use the same dataset config in both phases"
        )


def load_teachers(
    config: DistillConfig, specs: dict[str, ModalitySpec], resume: Path | None
) -> tuple[dict[str, Encoder], dict[str, Any]]:
    """The teachers by modality, and for each the path and the sha256 of its encoder's tensors.

    A fresh run reads `trainer.ckpt_path`. A resumed one takes the teachers out of a full file; for a slim one it reads
    `trainer.ckpt_path`, or without it the paths that the file names. What is there is compared by its sha256.

    Raises:
        ConfigError: of `read_teacher`; a slim file's teacher is missing; or what `trainer.ckpt_path` names, or a slim
            file, is another teacher than the one that the student has learned from.
    """
    wanted = [m for m in modality_names() if m in config.trainer.teachers]
    resumed = read_checkpoint(resume, verify=False) if resume else None  # verified when the Trainer loads it
    named: dict[str, Any] = (resumed.meta.get("teachers") or {}) if resumed else {}
    if named and set(named) != {f"teacher_{m}" for m in wanted}:
        raise ConfigError(
            f"trainer.teachers={config.trainer.teachers}: {resume} was distilled from {', '.join(named)}; "
            "set the same teachers, or start anew with resume=null"
        )
    given = teacher_paths(config.trainer) if config.trainer.ckpt_path is not None or not named else {}
    teachers: dict[str, Encoder] = {}
    sources: dict[str, Any] = {}
    for modality in wanted:
        part = f"teacher_{modality}"
        if resumed and part in named and part in resumed.components:
            teachers[modality] = load_encoder(resumed, part=part)
            check_token_grid(teachers[modality], specs[modality], config.data_module, resume)
            _check_inputs(resumed, specs[modality], resume)
            if modality in given and Path(given[modality]).expanduser().exists():  # else those of the file are all
                own = read_teacher(given[modality], modality, specs[modality], config.data_module)
                require_same_digest(given[modality], weights_digest(own), part, named[part], resume)
            sources[part] = named[part]
            continue
        path = given.get(modality) or str(named[part]["path"])
        if part in named:
            require_exists(path, part, named[part], resume)
        teachers[modality] = read_teacher(path, modality, specs[modality], config.data_module)
        digest = weights_digest(teachers[modality])
        if part in named:
            require_same_digest(path, digest, part, named[part], resume)
        sources[part] = {"path": str(Path(path).expanduser().absolute()), "sha256": digest}
    return teachers, sources


def check_teachers(found: dict[str, Any], own: dict[str, Any], parts: list[str]) -> None:
    """Compare the sha256 of teachers that a checkpoint names (`found`) with those of a module (`own`).

    Raises:
        CheckpointError: another teacher, with both digests.
    """
    for part in parts:
        stored = (found.get(part) or {}).get("sha256")
        mine = (own.get(part) or {}).get("sha256")
        if stored is None or stored != mine:
            raise CheckpointError(
                f"the checkpoint is slim and was distilled with {part} of sha256 {stored}; this module's {part} has "
                f"{mine}; give that checkpoint in trainer.ckpt_path"
            )
