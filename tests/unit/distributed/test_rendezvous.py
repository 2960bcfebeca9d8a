"""Ranks of one run meet; ranks of two runs raise. Each rank is a thread with its own connection to the store."""

import socket
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from mmdistill.distributed import rendezvous
from mmdistill.distributed.rendezvous import RendezvousError, verify_ranks
from tests.ranks import free_port

TIMEOUT = timedelta(seconds=20)


@pytest.fixture(autouse=True)
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "LATE_RANKS_S", 0.3)


class Port:
    """A port on which rank 0 of the first run has a store. `join` adds a rank."""

    def __init__(self) -> None:
        self.number = free_port()
        self._pool = ThreadPoolExecutor(8)
        self._server: dist.TCPStore | None = None

    def join(
        self, rank: int, run_id: str, *, gpu: str = "", timeout: timedelta = TIMEOUT, world_size: int = 2
    ) -> "Future[None]":
        store = dist.TCPStore("127.0.0.1", self.number, None, self._server is None, TIMEOUT, wait_for_workers=False)
        self._server = self._server or store
        return self._pool.submit(verify_ranks, store, rank, world_size, timeout=timeout, run_id=run_id, gpu=gpu)


def problems(ranks: "list[Future[None]]") -> list[str]:
    errors = [rank.exception(20) for rank in ranks]
    assert all(error is None or isinstance(error, RendezvousError) for error in errors), errors
    return [str(error or "") for error in errors]


def test_ranks_of_one_run_are_accepted() -> None:
    port = Port()
    assert problems([port.join(rank, "a", gpu=f"GPU-{rank}", world_size=3) for rank in range(3)]) == ["", "", ""]


def test_ranks_of_two_runs_raise_the_same_error_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of one job have met: rank 1 of the second step was faster than rank 1 of the first."""
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("MASTER_PORT", "10123")
    port = Port()
    found = problems([port.join(0, "step 0"), port.join(1, "step 1"), port.join(1, "step 0")])
    assert set(found) == {
        "ranks of two runs have met at MASTER_ADDR=node1 MASTER_PORT=10123: rank 1 is of run step 1, but other ranks "
        "are of run step 0; set another MASTER_PORT for each run"
    }


def test_rank_of_another_run_that_comes_late_does_not_stop_a_run() -> None:
    port = Port()
    own = [port.join(rank, "a") for rank in range(2)]
    assert problems(own) == ["", ""]
    assert "rank 1 is of run b, but other ranks are of run a" in problems([port.join(1, "b")])[0]


def test_two_processes_with_one_rank_raise_without_a_run_id() -> None:
    port = Port()
    found = problems([port.join(0, "", world_size=3), port.join(1, "", world_size=3), port.join(1, "", world_size=3)])
    assert all("two processes are rank 1" in text for text in found)


def test_two_ranks_with_one_gpu_raise() -> None:
    port = Port()
    found = problems([port.join(0, "a", gpu="GPU-1"), port.join(1, "a", gpu="GPU-1")])
    assert len(set(found)) == 1
    assert found[0].endswith("use the same GPU; start one rank per GPU, and make a GPU visible to each")


def test_missing_rank_ends_the_others_after_the_timeout() -> None:
    found = problems([Port().join(0, "a", timeout=timedelta(seconds=0.2))])
    assert found[0].startswith("not all of 2 ranks have connected to MASTER_ADDR=")
    assert found[0].endswith("within distributed_timeout_s=0.2; see the output of the other ranks")


def test_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        with pytest.raises(
            RendezvousError, match=rf"^rank 0 cannot use MASTER_ADDR=127.0.0.1 MASTER_PORT={port}: .*EADDRINUSE"
        ):
            rendezvous.init_process_group("gloo", timeout=timedelta(seconds=1))
