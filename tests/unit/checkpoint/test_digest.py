import dataclasses
import hashlib
import json

import torch

from mmdistill.checkpoint.digest import weights_digest
from mmdistill.models.videomae import Encoder, EncoderConfig

CONFIG = EncoderConfig(3, 2, 8, 8, 4, 2, 8, 1, 2, 4, 16)


def make_encoder(**changes: object) -> Encoder:
    torch.manual_seed(0)
    return Encoder(dataclasses.replace(CONFIG, **changes))


def test_digest_is_the_sha256_of_config_values_and_tensors() -> None:
    encoder = make_encoder()
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(CONFIG), sort_keys=True).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    assert weights_digest(encoder) == digest.hexdigest()


def test_digest_does_not_depend_on_class_names() -> None:
    """Student-only checkpoints store it, and must find their teachers after a class was renamed."""
    expected, encoder = weights_digest(make_encoder()), make_encoder()
    renamed = dataclasses.make_dataclass("Renamed", [(f.name, f.type) for f in dataclasses.fields(CONFIG)], frozen=True)
    encoder.config = renamed(**dataclasses.asdict(CONFIG))
    encoder.__class__ = type("RenamedEncoder", (Encoder,), {})
    assert weights_digest(encoder) == expected


def test_digest_depends_on_values_dtypes_and_settings_without_a_tensor() -> None:
    digests = [weights_digest(make_encoder()), weights_digest(make_encoder().bfloat16())]
    digests.append(weights_digest(make_encoder(heads=1, head_dim=8)))  # the same shapes
    changed = make_encoder()
    changed.norm.bias.data[3] += 1e-6
    digests.append(weights_digest(changed))
    assert len(set(digests)) == 4


def test_module_without_config_has_a_digest() -> None:
    assert weights_digest(torch.nn.Linear(2, 2)) != weights_digest(torch.nn.Linear(2, 2))
