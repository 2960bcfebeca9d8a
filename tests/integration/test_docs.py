"""README and docs/: link targets exist, and both languages of a page have the same commands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
_CHINESE = re.compile(r"[\u3400-\u9fff\uff00-\uffef]")


def _anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_have_a_target(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if not link.startswith("http"):
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            assert target.exists(), link
            assert not anchor or anchor in _anchors(target), link


def _commands(page: Path) -> list[str]:
    """Lines of the code blocks: commands, settings, output; without comments, diagrams and Chinese lines."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks if "──" not in block for line in block.splitlines()]
    bare = [re.sub(r"(^|\s+)#.*", "", line).rstrip() for line in lines]
    return [line for line in bare if line and not _CHINESE.search(line)]


@pytest.mark.parametrize("page", [p for p in PAGES if p.name.endswith(".zh.md")], ids=lambda p: p.name)
def test_both_languages_have_the_same_commands(page: Path) -> None:
    commands = _commands(page)
    assert commands or page.name.startswith(("results", "speed"))
    assert commands == _commands(page.with_name(page.name.replace(".zh.md", ".md")))
