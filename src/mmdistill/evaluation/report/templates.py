"""The jinja2 templates of the pages. ``base.html.jinja`` has the head, the styles and the security policy of all pages.

A page is one self-contained file: its policy forbids scripts and requests, and images are data URIs. A template extends
``base.html.jinja`` and fills its blocks ``title``, ``style`` and ``body``.
"""

from pathlib import Path
from typing import Any

import jinja2

from mmdistill.errors import format_count


def render_template(name: str, **values: Any) -> str:
    """The page of a template of this folder. Text is escaped, and an undefined value is an error.

    Bytes of file names that are not UTF-8 are shown as escapes.

    The filter ``count`` is `format_count`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["count"] = format_count
    text = environment.get_template(name).render(values)
    return text.encode(errors="backslashreplace").decode()
