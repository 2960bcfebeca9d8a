"""Collectives: the only module that reduces, gathers or broadcasts over ranks.

Without a process group, every function treats this process as the only rank.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmdistill.errors import MMDistillError
from mmdistill.files import WriteError


def is_distributed() -> bool:
    """Whether this process is in a process group."""
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """Rank of this process; 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def barrier() -> None:
    """Wait until all ranks have called this function."""
    if is_distributed():
        dist.barrier()


def all_reduce_mean(values: Sequence[torch.Tensor]) -> list[float]:
    """Mean of each scalar tensor over all ranks, as float32, in one all-reduce."""
    stacked = torch.stack([v.detach().float() for v in values])
    if get_world_size() > 1:
        dist.all_reduce(stacked)
        stacked /= get_world_size()
    return [float(v) for v in stacked.tolist()]


def all_reduce_sum(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Sum of each tensor over all ranks, in its own dtype. Without other ranks the tensors are returned."""
    if get_world_size() == 1:
        return list(values)
    sums = [value.detach().clone() for value in values]
    for value in sums:
        dist.all_reduce(value)
    return sums


def all_reduce_any(flag: bool, device: torch.device) -> bool:
    """True on every rank if `flag` is true on at least one."""
    if get_world_size() == 1:
        return flag
    reduced = torch.tensor(float(flag), device=device)
    dist.all_reduce(reduced, op=dist.ReduceOp.MAX)
    return bool(reduced.item())


def all_gather_objects(value: Any) -> list[Any]:
    """The `value` of every rank, ordered by rank, on every rank. `value` must be picklable."""
    if get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """The `value` of rank 0, on every rank. `value` must be picklable."""
    if get_world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def broadcast_run_dir(run_dir: Path) -> Path:
    """The run directory of rank 0 as an absolute path, on every rank."""
    return Path(broadcast_object(str(run_dir.absolute())))


def run_on_all_ranks(
    action: Callable[[], Any], *, error_class: type[MMDistillError] | None, message: str = ""
) -> list[Any]:
    """Run `action` on every rank and gather its picklable results; if a rank fails, raise the same error on all ranks.

    Args:
        action: the same function on every rank.
        error_class: class of the raised error. A failure that is a subclass of it keeps its own class. None: a
            defect (no `MMDistillError`) is raised unchanged on its own rank.
        message: starts the error's message.

    Raises:
        MMDistillError: the failure of the lowest failing rank; the message names the rank.
    """
    try:
        own: tuple[Any, Exception | None] = (action(), None)
    except Exception as caught:  # raised again below, on every rank
        own = (None, caught)
    rank, world_size, failure = get_rank(), get_world_size(), own[1]
    kept_class = error_class or MMDistillError
    results = all_gather_objects((own[0], None if failure is None else (type(failure), _describe(failure, kept_class))))
    for source, (_, failed) in enumerate(results):
        if failed is not None:
            if error_class is None and source == rank and failure is not None:
                raise failure
            kind = failed[0] if issubclass(failed[0], kept_class) else kept_class
            text = f"rank {source} of {world_size}: {failed[1]}" if world_size > 1 else failed[1]
            error = kind(f"{message}: {text}" if message else text).on_all_ranks()
            raise error from (failure if source == rank else None)
    return [value for value, _ in results]


def _describe(error: BaseException, error_class: type[MMDistillError]) -> str:
    if isinstance(error, (error_class, WriteError)):
        return str(error)
    cause: BaseException | None = error
    while cause is not None:  # torch reports a full disk as a RuntimeError of its zip writer
        if isinstance(cause, OSError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {error}"
