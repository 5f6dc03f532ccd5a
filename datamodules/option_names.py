"""The words that options of data modules take, apart from the modules: a command line names them without PyTorch."""

from typing import Literal

AugmentationName = Literal["none", "shift", "crop"]  # of CIFAR
Task = Literal["words10", "words12", "all"]  # of Speech Commands
CacheName = Literal["memory", "disk"]  # of decoded audio
KeepName = Literal["memory", "disk", "none"]  # of a frozen trunk's features
