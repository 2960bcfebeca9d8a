"""The transfer head: names of its tensors and its formula."""

import torch
from torch import nn

from mmdistill.models.transfer_head import CrossModalTransfer


def test_one_mlp_per_teacher_with_the_names_of_the_checkpoints() -> None:
    head = CrossModalTransfer(6, {"rgb": 6, "flow": 4})
    shapes = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    assert shapes == {
        "mlp_to_rgb.0.weight": (6, 6),
        "mlp_to_rgb.0.bias": (6,),
        "mlp_to_rgb.2.weight": (6, 6),
        "mlp_to_rgb.2.bias": (6,),
        "mlp_to_flow.0.weight": (6, 6),
        "mlp_to_flow.0.bias": (6,),
        "mlp_to_flow.2.weight": (4, 6),
        "mlp_to_flow.2.bias": (4,),
    }


def test_output_is_linear_gelu_linear() -> None:
    torch.manual_seed(0)
    head, feature = CrossModalTransfer(6, {"rgb": 6, "flow": 4}).double(), torch.randn(3, 6, dtype=torch.float64)
    outputs = head(feature)
    assert list(outputs) == ["rgb", "flow"]
    weights = head.state_dict()
    hidden = feature @ weights["mlp_to_flow.0.weight"].T + weights["mlp_to_flow.0.bias"]
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(
        outputs["flow"], hidden @ weights["mlp_to_flow.2.weight"].T + weights["mlp_to_flow.2.bias"]
    )
    assert isinstance(head.mlp_to_rgb[1], nn.GELU)
