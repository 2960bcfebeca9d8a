import sys
from pathlib import Path

import pytest

from mmdistill.checkpoint.formats import names
from mmdistill.checkpoint.formats.names import CheckpointFormat


@pytest.mark.parametrize("member", list(CheckpointFormat))
def test_format_is_printed_as_its_value(member: CheckpointFormat) -> None:
    assert str(member) == f"{member}" == member.value
    assert CheckpointFormat(member.value) is member


def test_names_does_not_import_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # an import would raise ImportError
    exec(compile(Path(names.__file__).read_text(), names.__file__, "exec"), {"__name__": "names"})
