"""Connect the ranks of one run, and raise an error if ranks of two runs meet."""

import os
import time
import uuid
from datetime import timedelta

import torch
from torch import distributed as dist

from mmdistill.distributed.launch import get_run_id
from mmdistill.errors import InputError

LATE_RANKS_S = 30.0  # after a mismatch, rank 0 keeps its store this long for ranks of its own run that arrive late
_ACCEPTED = "accepted"


class RendezvousError(InputError):
    """The ranks of a run cannot connect, or ranks of two runs have met."""


def init_process_group(backend: str, *, timeout: timedelta, gpu: str = "") -> None:
    """Create the default process group from the launcher's variables, after every rank has verified the others.

    Args:
        backend: ``nccl`` or ``gloo``.
        timeout: time that a rank waits for the others, here and in collectives.
        gpu: identifier of the GPU of this rank; no two ranks may have the same. Empty: no GPU, or an unknown one.

    Raises:
        RendezvousError: see `verify_ranks`; or ``MASTER_PORT`` is in use, or rank 0 does not answer.
    """
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    except dist.DistNetworkError as error:
        reason = str(error).splitlines()[0]
        raise RendezvousError(
            f"rank {os.environ['RANK']} cannot use {_address()}: {reason}; set MASTER_ADDR to the machine of rank 0 "
            "and MASTER_PORT to a free port there, the same on all ranks"
        ) from error
    verify_ranks(store, rank, world_size, timeout=timeout, run_id=get_run_id(), gpu=gpu)
    store.set_timeout(timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def verify_ranks(
    store: dist.Store, rank: int, world_size: int, *, timeout: timedelta, run_id: str, gpu: str = ""
) -> None:
    """Return after all ranks of this run have connected to `store`, and no rank of another run has before.

    The first rank writes its run id. A rank that finds another id, or an entry under its own number or GPU, writes the
    reason as the result. Otherwise the last rank writes that the ranks are accepted. The first result counts.

    Raises:
        RendezvousError: the result is a reason; the same on all connected ranks. Or a rank has not connected in time.
    """
    claims = {"run id": f"run {run_id or '(none)'}", f"rank {rank}": uuid.uuid4().hex}
    if gpu:
        claims[f"gpu {gpu}"] = f"rank {rank}"
    problem = ""
    for key, own in claims.items():
        found = store.compare_set(key, "", own).decode()
        if found != own:
            problem = _describe(key, found, own, rank)
            store.compare_set("result", "", problem)
            break
    else:
        if store.add("connected", 1) == world_size:
            store.compare_set("result", "", _ACCEPTED)
    try:
        store.wait(["result"], timeout)
        result = store.get("result").decode()
    except dist.DistError:
        raise RendezvousError(
            f"not all of {world_size} ranks have connected to {_address()} within "
            f"distributed_timeout_s={timeout.total_seconds():g}; see the output of the other ranks"
        ) from None
    if rank == 0 and result != _ACCEPTED:
        _wait_for_late_ranks(store, world_size)
    if result != _ACCEPTED:
        raise RendezvousError(result).on_all_ranks()
    if problem:  # the other ranks belong to a run that has started
        raise RendezvousError(problem)


def _describe(key: str, found: str, own: str, rank: int) -> str:
    """Why a rank is not accepted whose claim `own` of `key` was `found` to be another one."""
    if key.startswith("gpu"):
        return f"{found} and rank {rank} use the same GPU; start one rank per GPU, and make a GPU visible to each"
    text = f"rank {rank} is of {own}, but other ranks are of {found}" if key == "run id" else f"two processes are {key}"
    return f"ranks of two runs have met at {_address()}: {text}; set another MASTER_PORT for each run"


def _wait_for_late_ranks(store: dist.Store, world_size: int) -> None:
    end = time.monotonic() + LATE_RANKS_S
    while store.add("connected", 0) < world_size and time.monotonic() < end:
        time.sleep(0.1)


def _address() -> str:
    return f"MASTER_ADDR={os.environ.get('MASTER_ADDR')} MASTER_PORT={os.environ.get('MASTER_PORT')}"


def gpu_id(index: int) -> str:
    """UUID of a visible GPU; empty if torch does not know it."""
    return str(getattr(torch.cuda.get_device_properties(index), "uuid", ""))
