"""The attentive probes of an evaluation (``probe=attentive``): encode the tokens of all clips once, then train."""

import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdistill.console import progress
from mmdistill.data.clips import ClipIndex
from mmdistill.distributed.collectives import get_rank, get_world_size, run_on_all_ranks
from mmdistill.distributed.device import autocast
from mmdistill.evaluation.networks import Network
from mmdistill.fewshot.attentive_probe import probe_tokens
from mmdistill.fewshot.errors import FeatureError, FewshotError
from mmdistill.files import temporary_folder
from mmdistill.modalities import ModalitySpec, preprocess_clips

Loader = Callable[[], Iterable[Mapping[str, Tensor]]]


def run_token_probes(
    networks: Sequence[Network],
    specs: Mapping[str, ModalitySpec],
    loader: Loader,
    index: ClipIndex,
    *,
    seed: int,
    device: torch.device,
    precision: str,
) -> dict[str, dict[str, Any]]:
    """The results of `probe_tokens`, and ``attentive_encode_seconds``, by network. Collective: a network has one rank.

    The tokens of one network at a time, float16 (clips, L, D), lie in a file in the folder for temporary files.

    Raises:
        FewshotError: the folder has too little space for this file.
        FeatureError: a network returns NaN or infinite values.
    """
    own = networks[get_rank() :: get_world_size()]

    def probe_own() -> dict[str, dict[str, Any]]:
        return {
            n.name: _probe_network(
                n, n.spec(specs[n.modality]), loader, index, seed=seed, device=device, precision=precision
            )
            for n in own
        }

    return {name: found for part in run_on_all_ranks(probe_own, error_class=None) for name, found in part.items()}


def _probe_network(
    network: Network,
    spec: ModalitySpec,
    loader: Loader,
    index: ClipIndex,
    *,
    seed: int,
    device: torch.device,
    precision: str,
) -> dict[str, Any]:
    config, clips = network.encoder.config, index.clips
    shape = (len(clips), config.num_tokens, config.dim)
    with temporary_folder() as folder:
        needed, free = 2 * math.prod(shape), shutil.disk_usage(folder).free
        if needed > free:
            raise FewshotError(
                f"probe=attentive: the tokens of {network.name} need {needed / 1e9:.1f} GB, and {Path(folder).parent} "
                f"has {free / 1e9:.1f} GB; set TMPDIR to a larger disk, or use probe=true"
            )
        tokens = np.lib.format.open_memmap(Path(folder) / "tokens.npy", "w+", np.float16, shape)
        start = time.perf_counter()
        _encode_tokens(network, spec, loader, tokens, device=device, precision=precision)
        seconds = time.perf_counter() - start
        labels, groups = np.array([clip.label for clip in clips], dtype=np.int64), [clip.group for clip in clips]
        found = probe_tokens(tokens, labels, groups=groups, seed=seed, device=device)
    return {**found, "attentive_encode_seconds": seconds}


def _encode_tokens(
    network: Network,
    spec: ModalitySpec,
    loader: Loader,
    tokens: np.memmap[Any, Any],
    *,
    device: torch.device,
    precision: str,
) -> None:
    """Write the tokens of all clips, each without a mask."""
    encoder = network.encoder.to(device).eval()
    size = (encoder.config.height, encoder.config.width)
    with torch.inference_mode(), progress(f"tokens of {network.name}", len(tokens), enabled=get_rank() == 0) as advance:
        for batch in loader():
            x = preprocess_clips(batch[spec.name].to(device), batch["crop_box"], spec, size)
            with autocast(precision, device):
                values = encoder(x).half().cpu()
            if not values.isfinite().all():
                raise FeatureError(f"{network.name}: NaN or infinite tokens; the weights or the clips are invalid")
            tokens[batch["index"].numpy()] = values.numpy()
            advance(len(values))
