"""Pictures of clips as the model sees them: a row per modality, drawn over the frames, and a column per frame."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate

from mmdistill.data.clips import Clip, ClipTable
from mmdistill.data.dataset import ClipDataset
from mmdistill.data.readers.base import FrameError
from mmdistill.errors import format_first, quote_name
from mmdistill.evaluation.report.frame_images import data_uri, encode_webp, film_strip, resize_to_width
from mmdistill.modalities import STUDENT_MODALITY, ModalitySpec, preprocess_clips
from mmdistill.modalities.images import draw_over_frames, hide_removed_tokens, render_clip
from mmdistill.randomness import seeded_rng

_COLUMNS = 4  # frames of a clip that a picture shows
_FRAME_WIDTH = 112  # px


class ClipPictures:
    """Draws the clips of a dataset with its crop, its mask and the model input of its modalities.

    Args:
        dataset: the clips; its readers include ``rgb``.
        specs: of the modalities of the readers.

    Attributes:
        rows: names of the rows of a picture.
    """

    def __init__(self, dataset: ClipDataset, specs: Mapping[str, ModalitySpec]) -> None:
        self.dataset, self.specs = dataset, specs
        self.others = [name for name in dataset.readers if name != STUDENT_MODALITY]
        self.rows = ("input", *self.others, "mask")

    def draw(self, i: int, *, only_input: bool = False) -> str:
        """The picture of clip `i`, as a data URI. The frame of the event has an orange border.

        The rows are the RGB input; every other modality, drawn over the RGB input; and the RGB input without the tokens
        that the mask removes. `only_input` draws the first row only.

        Raises:
            FrameError: a file of the clip cannot be read.
        """
        clip = self.dataset.index.clips[i]
        event = event_frame(self.dataset, i)
        positions = choose_frames(clip, event)
        batch = default_collate([self.dataset[i]])
        if int(batch["index"]) != i:  # a training replaces a clip that cannot be read
            raise FrameError(f"clip {quote_name(clip.id)}: its files cannot be read; `mmdistill check-data` lists them")

        def model_input(name: str) -> Tensor:
            height, width = (size // self.specs[name].input_stride for size in self.dataset.crop.crop_size)
            return preprocess_clips(batch[name], batch["crop_box"], self.specs[name], (height, width))[0]

        rgb = model_input(STUDENT_MODALITY)
        frames = self._render_rgb(rgb, positions)
        rows = [frames]
        if not only_input:
            base = np.stack(frames).astype(np.float32) / 255
            for name in self.others:
                drawn = draw_over_frames(base, model_input(name)[:, positions], self.specs[name])
                rows.append([to_uint8(image) for image in drawn])
            masked = hide_removed_tokens(rgb, batch["visible"][0], self.dataset.mask.grid)
            rows.append(self._render_rgb(masked, positions))
        numbers = [clip.frames[k] for k in positions]
        marked = numbers.index(event) if event in numbers else None
        image = np.concatenate([film_strip(row, marked=marked) for row in rows])
        return data_uri(encode_webp(image), "image/webp")

    def _render_rgb(self, clip: Tensor, positions: Sequence[int]) -> list[NDArray[np.uint8]]:
        """These frames of a (3, T, h, w) clip, resized."""
        images = render_clip(clip, self.specs[STUDENT_MODALITY])[list(positions)]
        return [resize_to_width(to_uint8(image), _FRAME_WIDTH) for image in images]

    def describe_frames(self, i: int) -> str:
        """The numbers of the frames in the picture of clip `i`."""
        clip = self.dataset.index.clips[i]
        numbers = [clip.frames[k] for k in choose_frames(clip, event_frame(self.dataset, i))]
        return format_first(numbers, _COLUMNS)


def to_uint8(image: np.ndarray) -> NDArray[np.uint8]:
    """An image in [0, 1] as uint8."""
    return (255 * image).round().astype(np.uint8)


def clip_table(dataset: ClipDataset) -> ClipTable:
    """The clips of a dataset that `build_index` made."""
    table = dataset.index.clips
    assert isinstance(table, ClipTable)
    return table


def event_frame(dataset: ClipDataset, i: int) -> int:
    """The frame number of the event of clip `i`; of a window its first frame."""
    return int(clip_table(dataset).rows[i][4])


def choose_frames(clip: Clip, event: int) -> list[int]:
    """Positions of evenly spaced frames of a clip. The one nearest to the frame number `event` is moved to it."""
    last = len(clip.frames) - 1
    chosen = np.unique(np.linspace(0, last, min(_COLUMNS, len(clip.frames))).round().astype(int))
    if event in clip.frames:
        position = clip.frames.index(event)
        chosen[np.abs(chosen - position).argmin()] = position
    positions: list[int] = chosen.tolist()
    return positions


def picture_order(labels: Sequence[int], seed: int) -> list[int]:
    """All clips in the order in which they get a picture: one clip of every label, then another one of every label ...

    The clips of a label are in random order. Labels with more clips come first.
    """
    values = np.asarray(labels)
    names, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = np.empty(len(values), dtype=np.int64)
    for code, name in enumerate(names.tolist()):
        clips = np.flatnonzero(codes == code)
        ranks[clips] = seeded_rng(seed, "browse", name).permutation(len(clips))
    order: list[int] = np.lexsort((values, -counts[codes], ranks)).tolist()
    return order
