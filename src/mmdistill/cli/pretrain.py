"""The command ``mmdistill pretrain`` and the script ``pretrain_main.py``. Imports no torch."""

import sys
from collections.abc import Sequence

from mmdistill.cli import imports_without_collections
from mmdistill.cli.entrypoint import exit_with_error, run_entrypoint
from mmdistill.config import ConfigError, PretrainConfig
from mmdistill.config.error_messages import describe_misplaced_key

_USAGE = """usage: mmdistill pretrain modality=NAME [KEY=VALUE ...] [--config-name=NAME] [--config-dir=DIR] [-m]
Pretrain a masked autoencoder on one modality."""


def run_pretraining(config: PretrainConfig, run_dir: str) -> None:
    """Pretrain one model. torch is imported here, after the config is valid."""
    from pathlib import Path

    with imports_without_collections():
        from mmdistill.pretrain import pretrain

    pretrain(config, Path(run_dir))


def main(argv: Sequence[str] | None = None) -> int:
    """Compose the config from `argv`, then pretrain; see `run_entrypoint`."""
    given = sys.argv[1:] if argv is None else argv
    if problem := describe_misplaced_key(given, PretrainConfig):
        exit_with_error(ConfigError(problem), PretrainConfig, "pretrain")
    run_entrypoint(
        run_pretraining, PretrainConfig, config_name="config_pretrain", usage=_USAGE, verb="pretrain", argv=argv
    )
    return 0
