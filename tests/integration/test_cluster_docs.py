"""docs/cluster.md: every shell block parses, and the overrides of its commands are existing keys."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from mmdistill.config import register_schemas
from mmdistill.config.overrides import quote_overrides

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "cluster.md").read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_shell_blocks_parse(block: str) -> None:
    done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _commands() -> list[list[str]]:
    lines = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in lines if "pretrain_main.py" in line or "lit_main" in line]
    return [w[next(i for i, x in enumerate(w) if x.endswith("main.py") or "mmdistill.py" in x) :] for w in words]


@pytest.mark.parametrize("words", _commands(), ids=lambda w: " ".join(w[1:3]))
def test_overrides_of_commands_are_existing_keys(words: list[str]) -> None:
    """Each swept list by its first value. Hydra's own keys are checked by composing its config, too."""
    pretrain = words[0] == "pretrain_main.py"
    name = next((w.partition("=")[2] for w in words if w.startswith("--config-name=")), None)
    overrides = [w for w in words[1:] if not w.startswith("-")]
    overrides = [re.sub(r"=(choice|interval)\(([^,]+),.*", r"=\2", w) for w in overrides]
    overrides = [w.partition(",")[0] if "[" not in w else w for w in overrides]
    overrides = [w.replace("$teachers", "[a,b,c]") for w in overrides]
    register_schemas()
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        top = name or ("config_pretrain" if pretrain else "config_mmdistill")
        assert compose(top, overrides=quote_overrides(overrides), return_hydra_config=True).hydra
