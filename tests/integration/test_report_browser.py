"""The report in a real browser."""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmdistill.evaluation.report.write import write_report
from tests.synthetic_features import make_results, read_gray_frame

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def profile() -> Iterator[Path]:
    """A folder with a short name: Chromium's sockets in it may have 107 characters, pytest's folders can be longer."""
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_real_browser_shows_the_page_without_errors_or_requests(tmp_path: Path, profile: Path):
    page = write_report(make_results(), tmp_path, read_frame=read_gray_frame, extra={"config": {"seed": 0}})
    log = tmp_path / "net.json"
    browser = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    no_requests = ["--disable-background-networking", "--disable-component-update", "--no-first-run", "--disable-sync"]
    env = {**os.environ, "TMPDIR": str(profile)}
    output = [f"--user-data-dir={profile}", f"--log-net-log={log}", "--window-size=1150,3000"]
    shot = tmp_path / "shot.png"
    command = [*browser, *no_requests, *output, f"--screenshot={shot}", page.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True, env=env)
    console = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    assert console == []
    assert shot.stat().st_size > 20_000
    urls = set(re.findall(r'"url":"((?:https?|wss?|ftp)://[^"]+)"', log.read_text()))
    outside = {url for url in urls if not re.search(r"://[\w.-]*(google|gvt1|chrome)", url)}  # not the browser's
    assert outside == set()

    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace("</header>", '</header><img src="https://example.org/a.png" alt="x">'))
    command = [*browser, *no_requests, f"--user-data-dir={profile}", "--dump-dom", broken.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True, env=env)
    assert "CONSOLE" in run.stderr  # the page's policy blocks the image, and this test detects it
