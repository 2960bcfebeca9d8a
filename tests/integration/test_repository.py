"""The repository's own files."""

import subprocess
from pathlib import Path

from tests.commands import ROOT


def test_symlinked_folders_are_ignored(tmp_path: Path) -> None:
    """Users link .venv, data and output to a larger disk."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    (tmp_path / "disk").mkdir()
    for name in (".venv", "data", "output"):
        (tmp_path / name).symlink_to("disk")
    command = ["git", "status", "--porcelain", "--untracked-files=all"]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["?? .gitignore"]
