"""The report and the page of ``mmdistill browse`` in a real browser."""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmdistill.evaluation.browse import BrowseOptions, BrowsePage
from mmdistill.evaluation.report.label_page import write_labels
from mmdistill.evaluation.report.write import write_report
from tests.browse_data import browse_config, write_evaluation
from tests.labeled_videos import make_labeled_video
from tests.synthetic_features import make_results, read_gray_frame
from tests.tiny_data import make_tiny

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def profile() -> Iterator[Path]:
    """A folder with a short name: Chromium's sockets in it may have 107 characters, pytest's folders can be longer."""
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


BROWSER = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
NO_REQUESTS = ["--disable-background-networking", "--disable-component-update", "--no-first-run", "--disable-sync"]


def run_browser(address: str, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open an address. The standard error is the log of the browser."""
    command = [str(CHROMIUM), *BROWSER, *NO_REQUESTS, f"--user-data-dir={profile}", *options, address]
    env = {**os.environ, "TMPDIR": str(profile)}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=True, env=env)


def open_page(page: Path, profile: Path, *options: str) -> str:
    """Open a page. Returns the log of the browser."""
    return run_browser(page.as_uri(), profile, *options).stderr


def check_log(text: str, net_log: Path) -> None:
    """Check that there are no messages in the console and no requests."""
    assert [line for line in text.splitlines() if "CONSOLE" in line] == []
    urls = set(re.findall(r'"url":"((?:https?|wss?|ftp)://[^"]+)"', net_log.read_text()))
    outside = {url for url in urls if not re.search(r"://[\w.-]*(google|gvt1|chrome)", url)}  # not the browser's
    assert outside == set()


def check_page(page: Path, profile: Path, folder: Path) -> None:
    """Check that the browser shows the page without messages in its console and without requests."""
    log, shot = folder / "net.json", folder / "shot.png"
    output = (f"--log-net-log={log}", "--window-size=1150,3000", f"--screenshot={shot}")
    check_log(open_page(page, profile, *output), log)
    assert shot.stat().st_size > 20_000


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


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_browser_finds_clips_by_label_and_labels_by_frame(tmp_path: Path, profile: Path):
    config = browse_config(make_tiny(tmp_path / "data", per_class=5), "data_module.label_fields=[direction]")
    evaluation = write_evaluation(config, tmp_path)
    page = tmp_path / "browse.html"
    page.write_text(BrowsePage(config, BrowseOptions(evaluation=evaluation, clips=4, modalities=("rgb",))).render()[0])
    log = tmp_path / "net.json"

    def result(fragment: str) -> str:
        run = run_browser(f"{page.as_uri()}#{fragment}", profile, f"--log-net-log={log}", "--dump-dom")
        check_log(run.stderr, log)
        found = re.search(r'<div id="result">(.*?)</section>', run.stdout, re.DOTALL)
        assert found is not None
        return found[1]

    by_label = result("label=DL+fh")
    assert "5 clips of 1 label<" in by_label
    assert re.findall(r">(rally_\w+), frame (\d+)</a></li>", by_label) == [(f"rally_DL_{n}", "6") for n in range(5)]
    assert by_label.count("<figure") == 1
    by_frame = result("video=rally_T_1&frame=5")
    assert "rally_T_1, frame 5: 1 clip contains it" in by_frame
    assert re.search(r"nearest event is <a[^>]*>near_deuce_stroke_fh_gs_T_-_in</a> at frame 6\.", by_frame)
