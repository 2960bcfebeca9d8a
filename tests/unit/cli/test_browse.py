"""The command ``mmdistill browse``."""

from pathlib import Path

import pytest

from mmdistill.cli.browse import main
from tests.tiny_data import overrides

pytestmark = pytest.mark.usefixtures("single_process_env")


def test_the_page_is_written_and_its_contents_are_printed(
    tiny_clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [o for o in overrides(tiny_clips) if not o.startswith("trainer")]
    assert main([*options, "--output", str(tmp_path / "out" / "page.html"), "--clips", "2", "--modalities", "rgb"]) == 0
    out = capsys.readouterr().out
    assert "index: 4 of 4 clips, 4 of 4 videos\npictures: 2 of 4 clips\n" in out
    assert f"page: {tmp_path / 'out' / 'page.html'} (" in out
    assert (tmp_path / "out" / "page.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--evaluation", "absent.json"], "absent.json"),
        (["--clips", "-1"], "--clips -1 must be at least 0"),
        (["data_module.fewshot_eval_json_path=absent.json"], "data_module.fewshot_eval_json_path"),
    ],
)
def test_invalid_arguments_are_one_line(
    tiny_clips: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*(o for o in overrides(tiny_clips) if not o.startswith("trainer")), *more]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
