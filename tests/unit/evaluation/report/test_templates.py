"""The templates of the pages."""

import os
from pathlib import Path

import jinja2
import pytest

from mmdistill.evaluation.report import templates

FOLDER = Path(templates.__file__).parent


def test_an_undefined_value_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="row"):
        templates.render_template("report.html.jinja")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.jinja")), ids=lambda path: path.name)
def test_every_page_has_the_policy_of_the_base(path: Path):
    text = path.read_text()
    assert "default-src 'none'" in text or '{% extends "base.html.jinja" %}' in text


def test_names_that_are_not_utf8_are_shown_as_escapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "page.html.jinja").write_text("<code>{{ path }}</code>")
    monkeypatch.setattr(templates, "__file__", str(tmp_path / "templates.py"))
    assert templates.render_template("page.html.jinja", path=os.fsdecode(b"\xe9t")) == r"<code>\udce9t</code>"
