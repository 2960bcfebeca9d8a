"""COCO-17 skeletons of two players by ViTPose, with a person detector of transformers, for example RT-DETR.

ViTPose: Xu et al., NeurIPS 2022, arXiv 2204.12484. RT-DETR: Zhao et al., CVPR 2024, arXiv 2304.08069. transformers is
an optional extra. It is imported only when these skeletons are requested.

The detector searches persons in the crop around each player, which tracking provides. There a far player is large
enough for it. ViTPose then estimates the joints in the box of the person who is nearest to the center of the crop.
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmdistill.errors import format_first
from mmdistill.prepare.player_tracking import select_people
from mmdistill.prepare.pose import MAX_HIP_OFFSET, PoseError, cut_crop

DETECTOR_MODEL = "PekingU/rtdetr_r50vd_coco_o365"
POSE_MODEL = "usyd-community/vitpose-base-simple"
INSTALLATION = "pip install 'transformers>=5,<6'"
MIN_PERSON_SCORE = 0.3  # of a detected person
NUM_JOINTS = 17
COCO_EXPERT = 0  # of ViTPose+, which has one expert per dataset
PADDING = 1.25  # crop of ViTPose, as a multiple of the box
# Tensors that do not change the output of a network in evaluation mode, so a file may omit them
TRAINING_TENSORS = ("num_batches_tracked", "denoising")
FINGERPRINT_BYTES = 1 << 20  # read from the start and from the end of each file of a folder


class VitPose:
    """A `PoseEstimator` of a person detector and ViTPose, on a GPU if there is one.

    Args:
        detector_model: folder that transformers wrote, or name on the Hugging Face Hub, of any object detector with the
            class ``person``.
        pose_model: the same of a ViTPose with the 17 joints of COCO.

    Raises:
        PoseError: transformers is missing, a folder does not exist, or a model cannot be loaded completely or does not
            fit.
    """

    def __init__(self, detector_model: str, pose_model: str) -> None:
        _check_folders({"--detector-model": detector_model, "--pose-model": pose_model})
        transformers = _import_transformers()
        import torch

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._torch = torch
        detector_class, pose_class = transformers.AutoModelForObjectDetection, transformers.VitPoseForPoseEstimation
        self.detector, self.detector_processor = self._load(detector_class, "--detector-model", detector_model)
        self.pose, self.pose_processor = self._load(pose_class, "--pose-model", pose_model)
        classes = self.detector.config.id2label
        self.person = next((i for i, name in classes.items() if str(name).lower() == "person"), None)
        if self.person is None:
            known = format_first(list(classes.values()), 3)
            raise PoseError(f"--detector-model {detector_model}: no class is named person ({known})")
        if (joints := self.pose.config.num_labels) != NUM_JOINTS:
            raise PoseError(f"--pose-model {pose_model}: {joints} joints, expected the {NUM_JOINTS} joints of COCO")

    def _load(self, model_class: Any, option: str, name: str) -> tuple[Any, Any]:
        """The model in evaluation mode and its image processor."""
        try:
            (model, loaded), processor = _load_or_download(model_class, name)
        except Exception as error:  # of transformers, huggingface_hub or safetensors, which share no base class
            reason = str(error).strip().partition("\n")[0]
            online = "" if Path(name).is_dir() else ", or run the command once while online"
            fix = f"give a folder that save_pretrained of transformers wrote{online}"
            raise PoseError(f"{option} {name}: cannot be loaded ({type(error).__name__}: {reason}); {fix}") from error
        absent = [key for key in loaded["missing_keys"] if not any(part in key for part in TRAINING_TENSORS)]
        if absent:
            raise PoseError(f"{option} {name}: weights are missing: {format_first(sorted(absent), 3)}")
        return model.to(self.device).eval(), processor

    def __call__(self, frames: Sequence[np.ndarray], crops: np.ndarray) -> np.ndarray:
        """See `PoseEstimator`."""
        rows = np.zeros((*crops.shape[:2], NUM_JOINTS, 3), np.float32)
        persons, numbers = np.nonzero(~np.isnan(crops[..., 0]))  # of each crop: the player and the frame
        pairs = list(zip(persons.tolist(), numbers.tolist(), strict=True))
        people = self.detect_people([cut_crop(frames[k], crops[m, k]) for m, k in pairs])
        boxes: dict[tuple[int, int], np.ndarray] = {}  # by player and frame
        for k in range(len(frames)):
            own = np.flatnonzero(numbers == k).tolist()
            selected = select_people([people[i] for i in own], crops[persons[own], k], max_offset=MAX_HIP_OFFSET)
            boxes |= {pairs[i]: people[i][j] for i, j in zip(own, selected, strict=True) if j is not None}
        if boxes:
            images = [frames[k] for _, k in boxes]
            rows[tuple(zip(*boxes, strict=True))] = self.estimate_joints(images, np.stack(list(boxes.values())))
        return rows

    def detect_people(self, crops: Sequence[tuple[np.ndarray, tuple[int, int]]]) -> list[np.ndarray]:
        """Boxes (n, 4) left, top, width, height of all persons in each crop, in px of the frame.

        A crop is uint8 (S, S, 3) RGB with its upper left corner (x, y).
        """
        if not crops:
            return []
        images = [image for image, _ in crops]
        with self._torch.inference_mode():
            inputs = self.detector_processor(images=images, return_tensors="pt").to(self.device)
            outputs = self.detector(**inputs)
        sizes = [image.shape[:2] for image in images]
        found = self.detector_processor.post_process_object_detection(
            outputs, threshold=MIN_PERSON_SCORE, target_sizes=sizes
        )
        people = []
        for result, (_, corner) in zip(found, crops, strict=True):
            corners = result["boxes"][result["labels"] == self.person].cpu().numpy().astype(np.float64)
            people.append(np.hstack([corners[:, :2] + corner, corners[:, 2:] - corners[:, :2]]))
        return people

    def estimate_joints(self, frames: Sequence[np.ndarray], boxes: np.ndarray) -> np.ndarray:
        """Joints in boxes (n, 4) left, top, width, height of n BGR frames of one size.

        Returns:
            float32 (n, 17, 3): x and y in px of the frame, and the score. A joint outside of the image or of the
            enlarged box has score 0: ViTPose pads the image with black, and the subpixel refinement of its heat-maps
            has no bound.
        """
        images = [np.ascontiguousarray(frame[..., ::-1]) for frame in frames]
        listed = boxes[:, None].tolist()  # one box per image
        inputs = self.pose_processor(images, boxes=listed, return_tensors="pt").to(self.device)
        if self.pose.config.backbone_config.num_experts > 1:
            inputs["dataset_index"] = self._torch.full((len(boxes),), COCO_EXPERT, device=self.device)
        with self._torch.inference_mode():
            outputs = self.pose(**inputs)
        found = self.pose_processor.post_process_pose_estimation(outputs, boxes=listed)
        xy = np.stack([person["keypoints"].numpy() for (person,) in found])
        scores = np.stack([person["scores"].numpy() for (person,) in found])
        low, high = self._bounds(boxes, frames[0].shape[:2])
        is_found = (scores > 0) & ((xy >= low) & (xy <= high)).all(axis=2)
        rows = np.concatenate([xy, scores.clip(0, 1)[..., None]], axis=2)
        return np.where(is_found[..., None], rows, 0).astype(np.float32)

    def _bounds(self, boxes: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Smallest and largest x, y of a joint, (n, 1, 2): the enlarged box in the aspect ratio of ViTPose's input."""
        ratio = self.pose_processor.size["width"] / self.pose_processor.size["height"]
        width = np.maximum(boxes[:, 2], boxes[:, 3] * ratio) * PADDING
        half, center = np.stack([width, width / ratio], axis=1) / 2, boxes[:, :2] + boxes[:, 2:] / 2
        low, high = np.maximum(center - half, -0.5), np.minimum(center + half, np.array(shape[::-1]) - 0.5)
        return low[:, None], high[:, None]


@functools.cache
def load_vitpose(detector_model: str, pose_model: str) -> VitPose:
    """The estimator of these models, loaded once per process. See `VitPose`."""
    return VitPose(detector_model, pose_model)


def limit_threads(num_processes: int) -> None:
    """Divide the threads of torch in this process by the number of processes that run at the same time."""
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() // num_processes))


def describe_model(name: str) -> str:
    """A text that differs for different models: the name on the Hub, or a folder's name with a hash of its files."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}:{size}:".encode())
        with path.open("rb") as file:
            digest.update(file.read(FINGERPRINT_BYTES))
            file.seek(max(0, size - FINGERPRINT_BYTES))
            digest.update(file.read(FINGERPRINT_BYTES))
    return f"{folder.resolve().name}:{digest.hexdigest()[:16]}"


def _check_folders(models: Mapping[str, str]) -> None:
    """Raise `PoseError` if a model looks like a path and is no folder. A name on the Hub is NAME or OWNER/NAME."""
    for option, name in models.items():
        is_path = Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
        if is_path and not Path(name).is_dir():
            raise PoseError(f"{option} {name}: no such folder; give a folder, or a name on the Hugging Face Hub")


def _load_or_download(model_class: Any, name: str) -> tuple[Any, Any]:
    """(model, information about loading) and image processor, of a folder or from the Hub, which is asked last."""
    from huggingface_hub import snapshot_download
    from transformers import AutoImageProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading; that of a download is shown

    def load() -> tuple[Any, Any]:
        model = model_class.from_pretrained(name, local_files_only=True, output_loading_info=True)
        return model, AutoImageProcessor.from_pretrained(name, local_files_only=True)

    try:
        return load()
    except OSError:
        if Path(name).exists():
            raise
        snapshot_download(name, allow_patterns=["*.json", "*.safetensors"])
        return load()


def _import_transformers() -> Any:
    try:
        import transformers

        transformers.VitPoseForPoseEstimation  # noqa: B018, imported on access
    except (ImportError, AttributeError) as error:
        raise PoseError(f"--skeleton vitpose needs transformers ({error}): {INSTALLATION}") from error
    return transformers
