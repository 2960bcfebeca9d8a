"""The report in a real browser."""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmdistill.evaluation.report.label_page import write_labels
from mmdistill.evaluation.report.write import write_report
from tests.labeled_videos import make_labeled_video
from tests.synthetic_features import make_results, read_gray_frame

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def profile() -> Iterator[Path]:
    """A folder with a short name: Chromium's sockets in it may have 107 characters, pytest's folders can be longer."""
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


BROWSER = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
NO_REQUESTS = ["--disable-background-networking", "--disable-component-update", "--no-first-run", "--disable-sync"]


def open_page(page: Path, profile: Path, *options: str) -> str:
    """Open a page. Returns the log of the browser."""
    command = [str(CHROMIUM), *BROWSER, *NO_REQUESTS, f"--user-data-dir={profile}", *options, page.as_uri()]
    env = {**os.environ, "TMPDIR": str(profile)}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=True, env=env).stderr


def check_page(page: Path, profile: Path, folder: Path) -> None:
    """Check that the browser shows the page without messages in its console and without requests."""
    log, shot = folder / "net.json", folder / "shot.png"
    output = (f"--log-net-log={log}", "--window-size=1150,3000", f"--screenshot={shot}")
    assert [line for line in open_page(page, profile, *output).splitlines() if "CONSOLE" in line] == []
    assert shot.stat().st_size > 20_000
    urls = set(re.findall(r'"url":"((?:https?|wss?|ftp)://[^"]+)"', log.read_text()))
    outside = {url for url in urls if not re.search(r"://[\w.-]*(google|gvt1|chrome)", url)}  # not the browser's
    assert outside == set()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_real_browser_shows_the_page_without_errors_or_requests(tmp_path: Path, profile: Path):
    page = write_report(make_results(), tmp_path, read_frame=read_gray_frame, extra={"config": {"seed": 0}})
    check_page(page, profile, tmp_path)
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace("</header>", '</header><img src="https://example.org/a.png" alt="x">'))
    # the page's policy blocks the image, and this test detects it
    assert "CONSOLE" in open_page(broken, profile, "--dump-dom")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_real_browser_shows_the_page_of_labels(tmp_path: Path, profile: Path):
    page = write_labels(make_labeled_video(), tmp_path)[-1]
    check_page(page, profile, tmp_path)
