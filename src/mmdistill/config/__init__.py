"""The typed schema of every configuration.

An entrypoint composes a config. `parse` converts it to the dataclasses of `schema`, validates it and makes it
read-only. Besides this package only `cli`, which Hydra calls, uses OmegaConf. Nothing here imports torch, so that an
invalid key is reported at once.
"""

from mmdistill.config.error_messages import explain
from mmdistill.config.keypoints import extra_format, skeleton_format
from mmdistill.config.parsing import parse, stored_config, to_plain
from mmdistill.config.rules import ConfigError, as_ints, as_names, standardization
from mmdistill.config.schema import (
    CLASSIFIER_NAMES,
    DEEPSPEED_STAGES,
    DataModuleConfig,
    DistillConfig,
    ModalityConfig,
    ModelConfig,
    PretrainConfig,
    register_schemas,
)
from mmdistill.config.validation import (
    RANDOM_PREFIX,
    SHORT_KEYS,
    SOURCE_KEYS,
    LossWeights,
    baseline_component,
    feature_files,
    has_offload,
    loss_weights,
    modality_setting,
    modality_setting_key,
    modality_specs,
    removes_no_token,
    teacher_paths,
    teacher_weights,
    zero_stage,
)

__all__ = [
    "CLASSIFIER_NAMES",
    "DEEPSPEED_STAGES",
    "RANDOM_PREFIX",
    "SHORT_KEYS",
    "SOURCE_KEYS",
    "ConfigError",
    "DataModuleConfig",
    "DistillConfig",
    "LossWeights",
    "ModalityConfig",
    "ModelConfig",
    "PretrainConfig",
    "as_ints",
    "as_names",
    "baseline_component",
    "explain",
    "extra_format",
    "feature_files",
    "has_offload",
    "loss_weights",
    "modality_setting",
    "modality_setting_key",
    "modality_specs",
    "parse",
    "register_schemas",
    "removes_no_token",
    "skeleton_format",
    "standardization",
    "stored_config",
    "teacher_paths",
    "teacher_weights",
    "to_plain",
    "zero_stage",
]
