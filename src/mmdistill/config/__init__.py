"""The typed schema of every configuration.

With `cli` and `sweep`, which Hydra calls, the only part that knows OmegaConf. The entrypoints compose a config, turn it
into the dataclasses of `schema` with `parse`, which checks them (`checks`) and makes them read-only, and pass those on.
Nothing here imports torch, so a wrong key is reported at once.
"""

from mmdistill.config.error_messages import explain
from mmdistill.config.parsing import parse, stored_config, to_plain
from mmdistill.config.schema import (
    ConfigError,
    DataModuleConfig,
    DistillConfig,
    ModalityConfig,
    ModelConfig,
    PretrainConfig,
    register_schemas,
)
from mmdistill.config.validation import (
    COMPONENT_PREFIXES,
    DEEPSPEED_STAGES,
    HEAD_NAMES,
    SHORT_KEYS,
    as_ints,
    as_names,
    has_offload,
    modality_setting,
    modality_setting_key,
    modality_specs,
    teacher_paths,
    zero_stage,
)

__all__ = [
    "COMPONENT_PREFIXES",
    "DEEPSPEED_STAGES",
    "HEAD_NAMES",
    "SHORT_KEYS",
    "ConfigError",
    "DataModuleConfig",
    "DistillConfig",
    "ModalityConfig",
    "ModelConfig",
    "PretrainConfig",
    "as_ints",
    "as_names",
    "explain",
    "has_offload",
    "modality_setting",
    "modality_setting_key",
    "modality_specs",
    "parse",
    "register_schemas",
    "stored_config",
    "teacher_paths",
    "to_plain",
    "zero_stage",
]
