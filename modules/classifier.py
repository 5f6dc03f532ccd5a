"""The LightningModule: a network that learns to classify."""

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from microtune.modules.int8.network import build_quantized_network
from microtune.modules.learning_rate import learning_rate_factor
from microtune.modules.networks.mobilenet_v2 import build_network

OptimizerName = Literal["sgd", "adamw"]


def network_of(arguments: dict[str, Any]) -> nn.Module:
    """A network with fresh weights, as the hyperparameters of a checkpoint describe it: in floating point or int8.

    Example::

        network_of({"width": 0.35, "num_classes": 10, "folded": True})
    """
    return build_quantized_network(**arguments) if "graph" in arguments else build_network(**arguments)


class Classifier(LightningModule):
    """Trains a network to classify, with warm-up and cosine per step, and measures top-1 and, of many classes, top-5.

    Everything it is built from is among its hyperparameters, so that ``Classifier.load_from_checkpoint`` rebuilds it,
    folded batch norm included.

    Args:
        network: Arguments of ``build_network``, or of ``build_quantized_network``.
        learning_rate: At its highest, for the batch size that is used.
        optimizer: ``"sgd"`` or ``"adamw"``.
        momentum: Of SGD; 0 needs no optimizer state, as a device wants it.
        weight_decay: Of weights; biases and norms have none.
        warmup_fraction: Part of all optimizer steps in which the learning rate rises from zero.
        label_smoothing: Of the cross entropy in training; evaluation has none.
        class_names: What the outputs mean, in their order, for those who find the checkpoint.
        input_shape: Channels, height and width that it was trained on, likewise.

    Attributes:
        net: The network, kept in PyTorch's ``channels_last`` order, which is faster on CPUs and GPUs.
        test_confusion: Counts of shape (true class, predicted class), after ``trainer.test``.

    Example::

        module = Classifier({"width": 0.35, "num_classes": 10, "folded": True}, learning_rate=0.0125)
        Trainer(callbacks=[SparseUpdate("scheme.json")]).fit(module, data)
    """

    def __init__(
        self,
        network: dict[str, Any],
        learning_rate: float = 0.1,
        optimizer: OptimizerName = "sgd",
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        warmup_fraction: float = 0.1,
        label_smoothing: float = 0.0,
        class_names: list[str] | None = None,
        input_shape: list[int] | None = None,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.net = network_of(network).to(memory_format=torch.channels_last)
        self.loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        classes = network["num_classes"]
        self.metrics = nn.ModuleDict()
        for split in ("val", "test"):
            self.metrics[f"{split}_top1"] = MulticlassAccuracy(classes, average="micro")
            if classes > 5:
                self.metrics[f"{split}_top5"] = MulticlassAccuracy(classes, top_k=5, average="micro")
        self.confusion = MulticlassConfusionMatrix(classes)
        self.test_confusion: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of samples (N, channels, height, width)."""
        return self.net(x.to(self.dtype, memory_format=torch.channels_last))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """The loss of one batch."""
        samples, labels = batch
        loss = self.loss(self(samples), labels)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Counts one batch of the validation split."""
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Counts one batch of the test split."""
        self.confusion.update(self._evaluate("test", batch), batch[1])

    def on_test_epoch_end(self) -> None:
        """Keeps the confusion matrix."""
        self.test_confusion = self.confusion.compute().cpu()
        self.confusion.reset()

    def _evaluate(self, split: str, batch: tuple[Tensor, Tensor]) -> Tensor:
        samples, labels = batch
        logits = self(samples)
        self.log(f"{split}/loss", nn.functional.cross_entropy(logits, labels), batch_size=len(labels), sync_dist=True)
        # int8 logits are often equal, and of equal ones the first of topk(5) counts, as in the usual evaluation code;
        # argmax takes the lowest class, which on 1,000 images makes a difference of 0.9 points
        best = logits.topk(min(5, logits.shape[1])).indices[:, 0]
        for name, metric in self.metrics.items():
            if name.startswith(split):
                metric.update(best if name.endswith("top1") else logits, labels)
                self.log(name.replace("_", "/"), metric, prog_bar=split == "val")
        return best

    def configure_optimizers(self) -> dict[str, Any]:
        """SGD or AdamW over what is trainable by now, with the schedule per step."""
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [parameter for parameter in trainable if parameter.ndim > 1]},
            {"params": [parameter for parameter in trainable if parameter.ndim <= 1], "weight_decay": 0.0},
        ]
        options = {"lr": self.hparams.learning_rate, "weight_decay": self.hparams.weight_decay}
        if self.hparams.optimizer == "adamw":
            optimizer = torch.optim.AdamW(groups, **options)
        else:
            optimizer = torch.optim.SGD(groups, momentum=self.hparams.momentum, **options)
        total_steps = int(self.trainer.estimated_stepping_batches)
        warmup_steps = round(self.hparams.warmup_fraction * total_steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, warmup_steps, total_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
