"""Two processes share the work and return the same results. One pair of ranks runs all checks."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mmdistill.data.clips import Clip, ClipIndex
from mmdistill.fewshot.encode import EncodingJob, encode_cached
from mmdistill.fewshot.errors import FeatureError
from mmdistill.fewshot.features import load_features, save_features
from mmdistill.fewshot.protocol import Protocol, run_protocol
from tests.ranks import fork_ranks, wait_for
from tests.synthetic_features import make_features

pytestmark = pytest.mark.multiprocess
INDEX = ClipIndex(tuple(Clip(f"c{i}", "v", (0,), 0, "v") for i in range(7)), ("a",))
PROTOCOL = Protocol(q_sample=5, episodes=7, classifiers=("centroid", "logistic"))


def encode(batch: dict[str, Tensor], visible: Tensor | None) -> Tensor:
    return batch["index"][:, None].float().expand(-1, 3)


def broken_on_rank_one(batch: dict[str, Tensor], visible: Tensor | None) -> Tensor:
    return encode(batch, visible) * (torch.nan if dist.get_rank() == 1 else 1.0)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = run_protocol([load_features(Path(folder) / "f.safetensors")], PROTOCOL, workers=1, show_progress=False)
    np.save(
        f"{folder}/predictions{rank}.npy",
        np.stack([row.scores.predictions for setting in results.settings for row in setting.rows]),
    )

    batches = [{"index": torch.tensor(rows)} for rows in ([0, 2], [4, 6]) if rank == 0] or [
        {"index": torch.tensor([5, 3, 1])}
    ]
    options = {"data": "d", "cache": folder, "show_progress": False}
    job = EncodingJob("student_rgb", encode, (1, 1, 1), weights="w")
    (made,) = encode_cached([job], lambda: batches, INDEX, **options)
    np.save(f"{folder}/features{rank}.npy", made.features)
    dist.barrier()
    (again,) = encode_cached([job], lambda: pytest.fail("everything is cached"), INDEX, **options)
    assert np.array_equal(again.features, made.features)

    broken = EncodingJob("teacher_flow", broken_on_rank_one, (1, 1, 1))
    with pytest.raises(FeatureError, match="teacher_flow: NaN" if rank == 1 else r"rank 1 of 2: teacher_flow: NaN"):
        encode_cached([broken], lambda: batches, INDEX, **options)
    dist.destroy_process_group()


def test_two_ranks_return_the_results_of_one_and_fail_together(tmp_path: Path):
    f = make_features("student_rgb", 2.0)
    save_features(f, tmp_path / "f.safetensors")
    assert wait_for(fork_ranks(2, lambda rank: _rank(rank, str(tmp_path)))) == [0, 0]
    alone = run_protocol([f], PROTOCOL, workers=1, show_progress=False)
    expected = np.stack([row.scores.predictions for setting in alone.settings for row in setting.rows])
    for rank in (0, 1):
        assert np.array_equal(np.load(tmp_path / f"predictions{rank}.npy"), expected)
        assert np.load(tmp_path / f"features{rank}.npy")[:, 0, 0].tolist() == list(range(7))
