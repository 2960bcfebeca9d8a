"""Checkpoints are read without DeepSpeed."""

import subprocess
import sys

from tests.unit.checkpoint.make_fixtures import FIXTURES, NAME

ZERO = [f"zero{stage}-w{world}-{precision}" for stage in range(4) for world in (1, 2) for precision in ("fp32", "bf16")]


def test_deepspeed_is_not_imported() -> None:
    code = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "from mmdistill.checkpoint import read_checkpoint\n"
        f"for name in {ZERO!r}: read_checkpoint({str(FIXTURES)!r} + '/' + name + '/{NAME}')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
