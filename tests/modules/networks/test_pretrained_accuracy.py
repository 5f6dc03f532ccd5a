"""Public weights give, in this project's networks, the accuracy that they are known for."""

from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from microtune.modules.networks.mobilenet_v2 import mobilenet_v2
from microtune.modules.networks.pretrained_weights import NORMALIZATION, load_weights

PREPROCESSING = (v2.PILToTensor(), v2.Resize(256), v2.CenterCrop(224), v2.ToDtype(torch.float32, scale=True))


def outputs_and_labels(network: nn.Module, folder: Path, padding: str) -> tuple[Tensor, Tensor]:
    """Of every second image."""
    images = ImageFolder(folder, v2.Compose([*PREPROCESSING, v2.Normalize(*NORMALIZATION[padding])]))
    network.eval().to(memory_format=torch.channels_last)
    with torch.no_grad():
        batches = [
            (network(batch.contiguous(memory_format=torch.channels_last)), labels)
            for batch, labels in DataLoader(Subset(images, range(0, len(images), 2)), batch_size=50)
        ]
    return torch.cat([outputs for outputs, _ in batches]), torch.cat([labels for _, labels in batches])


def test_a_linear_probe_on_keras_weights_classifies_flowers(shared_data):
    network = mobilenet_v2(0.35, head_convolution=True, padding="keras")
    load_weights(network, shared_data / "weights/mobilenet_v2_w035_keras_imagenet_notop.npz")
    network.classifier = nn.Identity()
    train = outputs_and_labels(network, shared_data / "flowers17/train", "keras")
    test = outputs_and_labels(network, shared_data / "flowers17/val", "keras")
    probe = LogisticRegression(max_iter=3000).fit(*(tensor.numpy() for tensor in train))
    top1 = probe.score(*(tensor.numpy() for tensor in test))
    print(f"linear probe on Keras' weights of width 0.35, Flowers-17, 224 px: top-1 {top1:.2%}")
    assert top1 >= 0.90
