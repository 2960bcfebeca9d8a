"""Which network is scored: any encoder of any checkpoint, with the statistics it was trained on."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmdistill.checkpoint import Checkpoint, load_encoder, load_encoder_for_clips, read_checkpoint
from mmdistill.checkpoint.digest import weights_digest
from mmdistill.fewshot.encode import ClipEncoder, EncodingJob, Views
from mmdistill.fewshot.errors import FewshotError
from mmdistill.modalities import BUILTIN_MODALITIES, ModalitySpec, get_modality, modality_names, stored_statistics
from mmdistill.models.videomae import Encoder
from mmdistill.randomness import seed_torch

_BY_CHANNELS = {get_modality(name).channels: name for name in BUILTIN_MODALITIES}


@dataclass(frozen=True)
class Network:
    """One encoder.

    Attributes:
        name: in every output: ``student_rgb``, ``teacher_flow``, ``pretrained_rgb``, ``random`` ...
        encoder: with its weights.
        modality: what it looks at.
        checkpoint: the file or folder it is from; "" for none.
        statistics: (mean, std, sigma) stored in the checkpoint, or None.
    """

    name: str
    encoder: Encoder
    modality: str
    checkpoint: str = ""
    statistics: tuple[Any, ...] | None = None

    def spec(self, dataset: ModalitySpec) -> ModalitySpec:
        """The dataset's spec with the statistics that this network was trained on.

        Raises:
            FewshotError: another modality or number of channels.
        """
        if dataset.name != self.modality or dataset.channels != self.encoder.config.channels:
            channels = self.encoder.config.channels
            raise FewshotError(
                f"{self.name} takes {self.modality} with {channels} channels, the data are {dataset.name}"
            )
        return dataset if self.statistics is None else dataset.with_statistics(*self.statistics)

    def job(
        self,
        dataset: ModalitySpec,
        views: Views,
        *,
        device: torch.device | str = "cpu",
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        precision: str = "32",
    ) -> EncodingJob:
        """This network as work for `encode.encode_clips`; one for each way the clips are shown.

        `precision` names what `autocast` does, for the cache.

        Raises:
            FewshotError: of `spec`, or the masks leave nothing visible.
        """
        spec = self.spec(dataset)
        views.check(self.encoder.config.grid)
        info = {"checkpoint": self.checkpoint, "modality": self.modality}
        digest = f"{weights_digest(self.encoder)} {spec} {precision}"
        encode = ClipEncoder(self.encoder, spec, device=device, autocast=autocast)
        return EncodingJob(self.name, encode, self.encoder.config.grid, views, digest, info)


def load_network(
    path: str | Path,
    *,
    part: str | None = None,
    modality: str | None = None,
    input_sizes: Mapping[str, tuple[int, int, int]] | None = None,
    token_grid: tuple[int, int] | None = None,
) -> Network:
    """An encoder of a checkpoint of any format.

    Args:
        path: whatever `checkpoint.read_checkpoint` reads.
        part: ``student_rgb``, ``teacher_flow``, ``encoder`` ...; None: the student of a distilled checkpoint, the
            encoder of a pretraining one.
        modality: needed only where neither the file nor the number of channels tells.
        input_sizes: by modality (frames, height, width) of the model input; the encoder's must be the same.
        token_grid: rows and columns of patches per frame, needed for files without metadata if `input_sizes` is given
            (see `load_encoder_for_clips`).

    Raises:
        CheckpointError: the path cannot be read or has no such part.
        FewshotError: the modality is unknown or another one than asked for, or the input has another size.
    """
    checkpoint = read_checkpoint(path)
    preferred = [p for p in ("student_rgb", "encoder") if p in checkpoint.components]
    taken = part or next(iter(preferred + checkpoint.components), "encoder")
    tail = taken.rsplit("_", 1)[-1]
    stored = tail if tail in modality_names() else checkpoint.meta.get("modality")
    found = str(stored or modality or _BY_CHANNELS.get(_channels(checkpoint, taken), ""))
    if not found:
        raise FewshotError(f"{path}: the modality of {taken} is unknown; say which it is")
    if modality is not None and modality != found:
        raise FewshotError(f"{path}: {taken} is of the modality {found}, not {modality}")
    size = (input_sizes or {}).get(found)
    if size and token_grid:
        encoder = load_encoder_for_clips(checkpoint, component=taken, num_frames=size[0], token_grid=token_grid)
    else:
        encoder = load_encoder(checkpoint, part=taken)
    g = encoder.config
    if size and size != (g.num_frames, g.height, g.width):
        raise FewshotError(
            f"{path}: {taken} was trained on (frames, height, width) = {(g.num_frames, g.height, g.width)}, the data "
            f"give {size}; use its dataset config, or set data_module.num_frames and data_module.crop_size"
        )
    name = f"pretrained_{found}" if taken == "encoder" else taken
    return Network(name, encoder, found, str(path), stored_statistics(checkpoint.meta, found))


def _channels(checkpoint: Checkpoint, part: str) -> int:
    """Input channels of a part's patch embedding; 0 where there is none."""
    shapes = {k: v.shape for k, v in checkpoint.state_dict.items() if k.endswith("patch_embed.proj.weight")}
    own = [shape for key, shape in shapes.items() if part in key] or list(shapes.values())
    return int(own[0][1]) if own else 0


def random_network(like: Network, *, seed: int) -> Network:
    """The same architecture with untrained weights: what training is worth is measured against this."""
    with torch.random.fork_rng(devices=[]):
        seed_torch(seed)
        encoder = Encoder(like.encoder.config)
    return Network("random", encoder, like.modality, "", like.statistics)
