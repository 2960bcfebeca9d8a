"""Two ranks that call every collective: python -m tests.integration.collectives_worker FOLDER."""

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.distributed import collectives
from mmdistill.errors import MMDistillError
from tests.ranks import fork_ranks, wait_for


def raise_on(rank: int, failing: int, error: Exception) -> int:
    """Raise on one rank, return the rank on the others."""
    if rank == failing:
        raise error
    return rank


def error_of(rank: int, failing: int, error: Exception, kind: type[MMDistillError] | None) -> list[str]:
    """Class and message of the error that a rank gets if `failing` fails in `run_on_all_ranks`."""
    try:
        collectives.run_on_all_ranks(lambda: raise_on(rank, failing, error), error_class=kind, message="saving")
    except Exception as caught:
        return [type(caught).__name__, str(caught)]
    return []


def job(rank: int, folder: Path) -> None:
    """Call the collectives on one rank and write the results."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    cpu = torch.device("cpu")
    collectives.barrier()
    results: dict[str, Any] = {
        "rank": [collectives.get_rank(), collectives.get_world_size(), collectives.is_distributed()],
        "mean": collectives.all_reduce_mean([torch.tensor(float(rank)), torch.tensor(3 * rank, dtype=torch.bfloat16)]),
        "sum": [t.tolist() for t in collectives.all_reduce_sum([torch.tensor([rank + 1.0, 2.0], dtype=torch.float64)])],
        "any": [collectives.all_reduce_any(flag, cpu) for flag in (False, rank == 1, True)],
        "gather": collectives.all_gather_objects({"rank": rank}),
        "broadcast": collectives.broadcast_object(f"from {rank}"),
        "run_dir": str(collectives.broadcast_run_dir(folder / str(rank))),
        "all succeed": collectives.run_on_all_ranks(lambda: rank, error_class=CheckpointError),
        "one fails": error_of(rank, 1, OSError("disk is full"), CheckpointError),
        "defect": error_of(rank, 1, TypeError("a defect"), None),
    }
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    target = Path(sys.argv[1])
    codes = wait_for(fork_ranks(2, lambda rank: job(rank, target)))
    raise SystemExit(max(map(abs, codes)))
