"""A wheel contains the package and its configs, and works from any folder."""

import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from zipfile import ZipFile

import pytest

from mmdistill.cli.main import VERBS
from tests.commands import ROOT, environment

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
BOUNDED = ("deepspeed", "hydra-core", "pytorch-lightning", "timm", "torch")  # their private interfaces are used


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", f"--wheel-dir={folder}", str(ROOT)],
        check=True,
    )
    return next(folder.glob("mmdistill-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside the repository with the installed wheel."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([*PIP, "install", "--no-deps", "--no-index", f"--target={folder}", str(wheel)], check=True)
    return folder


def _run(installed: Path, cwd: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment(PYTHONPATH=str(installed)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_wheel_contains_all_modules_and_configs(wheel: Path) -> None:
    with ZipFile(wheel) as file:
        names = {name for name in file.namelist() if not name.startswith("mmdistill-")}
    sources = (
        (ROOT / "src", "*.py", ""),
        (ROOT / "src", "*.jinja", ""),
        (ROOT / "src", "*.js", ""),
        (ROOT / "src", "*.yaml", ""),  # the key poses of the demo
        (ROOT / "configs", "*.yaml", "mmdistill/configs/"),
        (ROOT / "docs", "glossary.md", "mmdistill/docs/"),
    )
    expected = {prefix + p.relative_to(root).as_posix() for root, glob, prefix in sources for p in root.rglob(glob)}
    assert names == expected


def test_command_works_from_another_folder(installed: Path, tmp_path: Path) -> None:
    listed = _run(installed, tmp_path, "-m", "mmdistill", "--help")
    assert all(f"  {verb} " in listed for verb in VERBS)
    assert _run(installed, tmp_path, str(installed / "bin" / "mmdistill"), "--help") == listed


@pytest.mark.parametrize("name", ["config_pretrain", "config_pretrain_tennis"])
def test_configs_compose_from_another_folder(installed: Path, tmp_path: Path, name: str) -> None:
    arguments = ["pretrain", f"--config-name={name}", "modality=rgb", "--cfg", "job"]
    assert "seed: 0\n" in _run(installed, tmp_path, "-m", "mmdistill", *arguments)
    code = "from mmdistill.config.compose import *; print(CONFIGS, SOURCE_ROOT)\n"
    code += f"print(load_config(PretrainConfig, {name!r}, ['modality=rgb']).data_module.name)"
    lines = _run(installed, tmp_path, "-c", code).splitlines()
    assert lines == [f"{installed}/mmdistill/configs None", "tennis" if name.endswith("tennis") else "demo"]


def test_terms_of_the_report_are_read_from_another_folder(installed: Path, tmp_path: Path) -> None:
    code = "from mmdistill.evaluation.report.html_page import TERMS, read_terms; print(len(TERMS) == len(read_terms()))"
    assert _run(installed, tmp_path, "-c", code) == "True\n"


def test_dependencies_with_private_interfaces_have_upper_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {text.split(">=")[0]: text for text in project["dependencies"]}
    assert all(",<" in required[name] for name in BOUNDED)


def test_lock_contains_installed_versions_and_no_address() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    assert "@" not in text
    locked = dict(line.split("==") for line in text.splitlines() if not line.startswith("#"))
    assert {name: locked[name] for name in BOUNDED} == {name: version(name) for name in BOUNDED}
    assert not {"mediapipe", "mmdistill"} & set(locked)
