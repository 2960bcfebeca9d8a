from pathlib import Path

import pytest

from mmdistill.evaluation.report.write import write_report
from mmdistill.fewshot.protocol import Results
from tests.synthetic_features import make_results, read_gray_frame


@pytest.fixture(scope="session")
def results() -> Results:
    return make_results()


@pytest.fixture(scope="session")
def page(results: Results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    return write_report(results, folder, read_frame=read_gray_frame, extra={"config": {"seed": 0}})
