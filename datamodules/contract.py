"""What recipes, searches and kept features ask of a data module; imports no PyTorch, as a command line needs none."""

from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import DataLoader

Split = Literal["train", "val", "test"]
# mean and standard deviation on images from 0 to 1, one value each or one per channel
Normalization = tuple[tuple[float, ...], tuple[float, ...]]


@runtime_checkable
class ClassificationData(Protocol):
    """Labelled samples in three splits: a ``LightningDataModule`` that says what a network must know of them.

    What types cannot say, ``tests/datamodules/test_contract.py`` holds of every data set in the list:

    - The training loader asks its data set for ``(epoch, index)`` keys and the others for plain indices, in the order
      of ``reproducible_order.data_loader``; no worker, resumed run or device changes it.
    - A training sample is a function of (seed, epoch, index) and draws nothing from torch's global random state; a
      sample of another split is a function of its index. Epochs differ by augmentation and by nothing else.
    - The validation split is taken from the training data; the test split is used once, at the end.
    - ``setup`` does its work once, whatever the stage, and everything below is known after it.

    Attributes:
        input_shape: Channels, height and width of a sample as the network takes it.
        num_classes: Number of classes.
        class_names: Name of each class, in the order of the labels.
        normalization: Mean and standard deviation by which images from 0 to 1 were normalised; None where samples are
            no images.
        train_samples: Number of samples to train on.
        val_samples: Number of samples that everything is chosen by; 0 where none are held out.
        test_samples: Number of samples to test on.

    Example::

        data = Digits(resolution=32)
        data.prepare_data()
        data.setup()
        isinstance(data, ClassificationData)  # True
    """

    input_shape: tuple[int, int, int]
    num_classes: int
    class_names: list[str]
    normalization: Normalization | None
    train_samples: int
    val_samples: int
    test_samples: int

    def prepare_data(self) -> None:
        """Download and unpack what is missing: in one process of a machine, keeping nothing in ``self``."""

    def setup(self, stage: str | None = None) -> None:
        """Read and split the samples, in every process."""

    def train_dataloader(self) -> "DataLoader":
        """Batches of the training split, shuffled."""

    def val_dataloader(self) -> "DataLoader | list":
        """Batches of the validation split; an empty list where there is none, which a Trainer takes for that."""

    def test_dataloader(self) -> "DataLoader":
        """Batches of the test split."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> "tuple[Tensor, Tensor]":
        """Samples (N, channels, height, width) in float32 and labels (N,) in int64 of a loader's batch.

        Computed where the batch is, on a GPU or not. ``LightningDataModule`` returns the batch as it is: what is to be
        computed on the device, such as spectrograms, is computed here.
        """
