"""Collectives of one process, without a process group and in a group of one. Two ranks: tests/integration."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mmdistill.distributed import collectives
from mmdistill.errors import InputError, MMDistillError


@pytest.fixture(params=[False, True], ids=["no group", "group of one"], autouse=True)
def group(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[bool]:
    """Whether this process is in a process group."""
    if not request.param:
        yield False
        return
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield True
    dist.destroy_process_group()


def test_rank_and_world_size_are_those_of_one_process(group: bool) -> None:
    assert collectives.is_distributed() is group
    assert (collectives.get_rank(), collectives.get_world_size()) == (0, 1)
    collectives.barrier()


def test_all_reduce_mean_returns_the_values_as_numbers() -> None:
    values = [torch.tensor(1.5, requires_grad=True), torch.tensor(2, dtype=torch.bfloat16), torch.tensor(3)]
    assert collectives.all_reduce_mean(values) == [1.5, 2.0, 3.0]


@pytest.mark.parametrize("flag", [False, True])
def test_all_reduce_any_returns_the_flag(flag: bool) -> None:
    assert collectives.all_reduce_any(flag, torch.device("cpu")) is flag


def test_objects_are_not_copied() -> None:
    value = {"a": [1]}
    assert collectives.all_gather_objects(value)[0] is value
    assert collectives.broadcast_object(value) is value


def test_run_dir_becomes_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert collectives.broadcast_run_dir(Path("run")) == tmp_path / "run"


class SaveError(MMDistillError):
    """An error class of a caller."""


class FullDiskError(SaveError):
    """A subclass, which keeps its class."""


def fail(error: Exception) -> None:
    raise error


def test_run_on_all_ranks_returns_the_results() -> None:
    assert collectives.run_on_all_ranks(lambda: 3, error_class=SaveError) == [3]


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (SaveError("disk is full"), SaveError, "saving: disk is full"),
        (FullDiskError("disk is full"), FullDiskError, "saving: disk is full"),
        (InputError("wrong"), SaveError, "saving: InputError: wrong"),
        (TypeError("a defect"), SaveError, "saving: TypeError: a defect"),
        (OSError(28, "No space left on device"), SaveError, "saving: [Errno 28] No space left on device"),
    ],
)
def test_failure_has_the_class_of_the_caller(error: Exception, kind: type[Exception], text: str) -> None:
    with pytest.raises(SaveError) as caught:
        collectives.run_on_all_ranks(lambda: fail(error), error_class=SaveError, message="saving")
    assert (type(caught.value), str(caught.value), caught.value.__cause__) == (kind, text, error)


def test_cause_of_a_failure_is_found_below_other_errors() -> None:
    def write() -> None:
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise RuntimeError("unexpected pos 64 vs 0") from error  # as torch's zip writer does

    with pytest.raises(SaveError, match=r"^\[Errno 28\] No space left on device$"):
        collectives.run_on_all_ranks(write, error_class=SaveError)


def test_defect_stays_a_defect_without_an_error_class() -> None:
    error = TypeError("a defect")
    with pytest.raises(TypeError) as caught:
        collectives.run_on_all_ranks(lambda: fail(error), error_class=None)
    assert caught.value is error
