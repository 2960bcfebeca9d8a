"""docs/config.md is generated from the schema."""

from pathlib import Path

import pytest

from mmdistill.cli.config_reference import PAGE, field_comments, main, render
from mmdistill.config import DistillConfig, PretrainConfig, schema
from mmdistill.config.error_messages import known_keys

SOURCE = """
@dataclass
class C:
    # above one
    # above two
    a: int = 1  # beside
    b: str = "x"
    c: float = (
        0.5  # inside
    )
"""


def test_comments_above_and_after_a_field() -> None:
    assert field_comments(SOURCE) == {("C", "a"): "above one above two beside", ("C", "b"): "", ("C", "c"): "inside"}


def test_page_is_up_to_date() -> None:
    assert main(["--check"]) == 0, "run `make docs`"


def test_stale_page_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "config.md"
    assert main(["--output", str(page)]) == 0
    assert page.read_bytes() == PAGE.read_bytes()
    page.write_text(page.read_text() + "x")
    assert main(["--output", str(page), "--check"]) == 1
    assert "is stale: run `make docs`" in capsys.readouterr().err


def test_every_key_is_described() -> None:
    text = render(Path(schema.__file__).read_text())
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    keys = {row[0].strip("| `") for row in rows}
    groups = {"data_module", "trainer", "model", "data_module.modalities"}
    assert {*known_keys(PretrainConfig), *known_keys(DistillConfig)} - groups <= keys
    assert not [row[0] for row in rows if row[3].strip(" |") == ""]
