"""Dense optical flow between consecutive frames, computed with OpenCV."""

from collections.abc import Callable

import cv2
import numpy as np

FLOW_METHODS = {
    "dis": "OpenCV DIS, medium preset (Kroeger et al., arXiv 1603.03590)",
    "farneback": "OpenCV Farneback (pyramid 0.5, 3 levels, window 15, 3 iterations, polynomial 5 / 1.2)",
}

FlowFunction = Callable[[np.ndarray, np.ndarray], np.ndarray]


def make_flow_function(method: str) -> FlowFunction:
    """A function that computes the flow from one gray image to another with `method`, a key of `FLOW_METHODS`.

    Its arguments are uint8 (H, W). It returns the displacement of each pixel of the first image, float32 (2, H, W),
    (x, y) in px.

    Raises:
        ValueError: the method is unknown.
    """
    if method == "dis":
        dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        return lambda first, second: _to_channels_first(dis.calc(first, second, None))  # type: ignore[call-overload]
    if method == "farneback":
        return lambda first, second: _to_channels_first(
            cv2.calcOpticalFlowFarneback(first, second, None, 0.5, 3, 15, 3, 5, 1.2, 0)  # type: ignore[call-overload]
        )
    raise ValueError(f"flow={method!r} is not one of {', '.join(FLOW_METHODS)}")


def _to_channels_first(flow: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(flow.transpose(2, 0, 1), dtype=np.float32)
