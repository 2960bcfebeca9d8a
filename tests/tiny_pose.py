"""Small, randomly initialized models of transformers with their processors: RT-DETR (a detector) and ViTPose."""

from pathlib import Path


def write_detector(folder: Path, *, person: str = "person") -> Path:
    """An RT-DETR of two classes, the second of which is `person`, for images of 64 x 64 px."""
    import torch
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrImageProcessor, RTDetrResNetConfig

    torch.manual_seed(0)
    backbone = RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic", out_indices=[2, 3, 4]
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=[8, 16, 16],
        encoder_hidden_dim=16,
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        d_model=16,
        decoder_in_channels=[16, 16, 16],
        decoder_ffn_dim=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        num_queries=6,
        num_denoising=0,
        id2label={0: "car", 1: person},
        label2id={"car": 0, person: 1},
    )
    RTDetrForObjectDetection(config).save_pretrained(folder)
    RTDetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def write_vitpose(folder: Path, *, joints: int = 17, experts: int = 1, seed: int = 0) -> Path:
    """A ViTPose of one layer and width 16, for crops of 64 x 48 px."""
    import torch
    from transformers import VitPoseBackboneConfig, VitPoseConfig, VitPoseForPoseEstimation, VitPoseImageProcessor

    torch.manual_seed(seed)
    size = (64, 48)
    backbone = VitPoseBackboneConfig(
        image_size=size,
        patch_size=(16, 16),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_experts=experts,
        part_features=4,
        out_indices=[1],
    )
    VitPoseForPoseEstimation(VitPoseConfig(backbone_config=backbone, num_labels=joints)).save_pretrained(folder)
    VitPoseImageProcessor(size={"height": size[0], "width": size[1]}).save_pretrained(folder)
    return folder
