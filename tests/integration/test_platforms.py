"""Reading, exporting and evaluating where functions of Linux do not exist."""

from pathlib import Path

from tests.commands import run_python
from tests.tiny_data import EVAL, make_tiny, overrides, write_teacher


def test_every_module_and_the_evaluation_without_what_windows_does_not_have(tmp_path: Path) -> None:
    data = overrides(make_tiny(tmp_path / "data", per_class=4))
    checkpoint = write_teacher(tmp_path / "rgb", "rgb", 0, statistics={"rgb": {"mean": [0.5], "std": [0.2]}})
    run = tmp_path / "run"
    evaluation = [*data, *EVAL, "eval_component=encoder", "accelerator=cpu", f"hydra.run.dir={run}"]
    done = run_python("-m", "tests.integration.windows_worker", checkpoint, tmp_path, *evaluation)
    assert (run / "report.html").is_file()
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    assert "Traceback" not in done.stderr
