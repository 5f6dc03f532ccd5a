"""The operations of a network in the order in which it runs them, found by running it once."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from microtune.modules.user_error import UserError


@dataclass(frozen=True)
class Convolution:
    """Shapes of one convolution.

    Args:
        name: Module path inside the network.
        in_channels, out_channels, kernel_size, stride, groups: As in ``nn.Conv2d``.
        in_size: Height and width of its input, as the operation before wrote it. A device's kernel pads by itself.
        padded_size: Height and width of the tensor that PyTorch hands to it; differs from ``in_size`` where a padding
            module stands before it, as in Keras' networks.
        out_size: Height and width of its output.
        has_bias: Whether it has a bias, or gets one when the batch norm behind it is folded.
    """

    name: str
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    groups: int
    in_size: tuple[int, int]
    padded_size: tuple[int, int]
    out_size: tuple[int, int]
    has_bias: bool

    @property
    def is_depthwise(self) -> bool:
        """Whether each group has one input channel."""
        return self.groups == self.in_channels and self.groups > 1

    @property
    def bias_elements(self) -> int:
        """Elements of the bias; 0 without one."""
        return self.out_channels * self.has_bias

    @property
    def out_elements(self) -> int:
        """Elements of the output, for one sample."""
        return self.out_channels * self.out_size[0] * self.out_size[1]

    @property
    def weight_elements_per_channel(self) -> int:
        """Weights that belong to one input channel: (out / groups) x kernel area."""
        return self.out_channels // self.groups * self.kernel_size[0] * self.kernel_size[1]


@dataclass(frozen=True)
class Operation:
    """One step of the forward pass; an activation function belongs to the operation before it.

    Args:
        kind: What it does.
        name: Module path of a convolution or a linear layer, else the kind with a running number.
        inputs: Indexes into ``NetworkOperations.tensors``.
        output: Index into ``NetworkOperations.tensors``.
        layer: Index into ``NetworkOperations.convolutions``, of a convolution.
        activation: PyTorch's name of the non-linearity on its output, such as ``"hardtanh"`` (ReLU6) or ``"relu"``.
        activation_is_module: Whether an ``nn.ReLU`` or ``nn.ReLU6`` computes it, for which there is a version that
            stores a mask.
        is_quantized: Whether it is int8 and its output saturates, of which PyTorch keeps a mask.
    """

    kind: Literal["convolution", "addition", "mean", "max_pool", "linear", "other"]
    name: str
    inputs: tuple[int, ...]
    output: int
    layer: int | None = None
    activation: str | None = None
    activation_is_module: bool = False
    is_quantized: bool = False


@dataclass(frozen=True)
class NetworkOperations:
    """What a network does with one sample.

    Args:
        convolutions: In forward order.
        operations: In forward order.
        tensors: Shape, without the batch, of every activation; the first is the network's input.
        classifier_name: Module path of the last linear layer.
        classifier_features: Its inputs.
        classifier_classes: Its outputs.
    """

    convolutions: tuple[Convolution, ...]
    operations: tuple[Operation, ...]
    tensors: tuple[tuple[int, ...], ...]
    classifier_name: str
    classifier_features: int
    classifier_classes: int


ACTIVATIONS = {"relu", "hardtanh", "hardswish", "silu", "gelu", "leaky_relu", "elu", "sigmoid", "tanh", "hardsigmoid"}
# what a device does inside the neighbouring operation or not at all: the output is the input under another name
ALIASES = {"constant_pad_nd", "clone", "native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "_to_copy"}
ALIASES |= {"_native_batch_norm_legit_no_training", "_unsafe_view"}
KINDS: dict[str, Literal["convolution", "addition", "mean", "max_pool", "linear"]] = {
    "convolution": "convolution",
    "add": "addition",
    "mean": "mean",
    "max_pool2d_with_indices": "max_pool",
    "addmm": "linear",
    "mm": "linear",
}


class _Recorder(TorchDispatchMode):
    """Notes every operation and which activations it reads and writes."""

    def __init__(self, sample: Tensor, parameters: Iterator[Tensor]):
        super().__init__()
        self.convolutions: list[Convolution] = []
        self.weights: list[Tensor] = []  # of the convolutions
        self.operations: list[Operation] = []
        self.tensors: list[tuple[int, ...]] = []
        self.linears: list[tuple[str, int, int]] = []
        self.current: list[tuple[str, nn.Module]] = []
        self.index_of_storage: dict[int, int] = {}
        self.before_activation: dict[int, str] = {}  # storages whose value only the activation may read
        self.keep_alive: list[Any] = [list(parameters)]  # a storage's address is its identity only while it lives
        self.inside: nn.Module | None = None  # the int8 layer that is running
        self._new_tensor(sample)

    def _new_tensor(self, tensor: Tensor) -> int:
        self.tensors.append(tuple(tensor.shape[1:]))
        self._alias(tensor, len(self.tensors) - 1)
        return len(self.tensors) - 1

    def _alias(self, tensor: Tensor, index: int) -> None:
        self.keep_alive.append(tensor)
        self.index_of_storage[tensor.untyped_storage().data_ptr()] = index

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operation imports torch._dynamo, which takes longer than all of torch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self.inside is not None:
            return result
        flat = [a for arg in args for a in (arg if isinstance(arg, list | tuple) else [arg])]
        tensors = [a for a in flat if isinstance(a, Tensor)]
        pairs = [(t, self.index_of_storage.get(t.untyped_storage().data_ptr())) for t in tensors]
        activations = [(t, index) for t, index in pairs if index is not None]
        for tensor, _ in activations:
            if tensor.untyped_storage().data_ptr() in self.before_activation:
                self._refuse_second_reader(self.before_activation[tensor.untyped_storage().data_ptr()])
        output = result[0] if isinstance(result, tuple | list) else result
        if activations and isinstance(output, Tensor):
            self._record(func.overloadpacket.__name__.removesuffix("_"), activations, output)
        return result

    def leave(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Notes an int8 layer as one operation."""
        self.inside = None
        activations = [(tensor, self.index_of_storage[tensor.untyped_storage().data_ptr()]) for tensor in inputs]
        self._record(module.device_operation, activations, output)
        if module.saturates:
            self.operations[-1] = replace(self.operations[-1], is_quantized=True)

    def _record(self, op: str, activations: list[tuple[Tensor, int]], output: Tensor) -> None:
        inputs = tuple(index for _, index in activations)
        shares_storage = output.untyped_storage().data_ptr() == activations[0][0].untyped_storage().data_ptr()
        if op in ACTIVATIONS:
            self._activation(op, activations[0][0], inputs[0], output)
        elif op in ALIASES or (shares_storage and op not in KINDS):
            self._alias(output, inputs[0])
            if "batch_norm" in op:
                self._bias_from_batch_norm(inputs[0])
        else:
            kind = KINDS.get(op, "other")
            name, layer = f"{op} {sum(o.kind == kind for o in self.operations)}", None
            if kind == "convolution":
                name, layer = self._convolution(activations[0][0], inputs[0], output), len(self.convolutions) - 1
            elif kind == "linear" and self.current:
                name, module = self.current[-1]
                self.linears.append((name, module.in_features, module.out_features))
            self.operations.append(Operation(kind, name, inputs, self._new_tensor(output), layer))

    def _activation(self, op: str, tensor: Tensor, index: int, output: Tensor) -> None:
        is_module = bool(self.current) and type(self.current[-1][1]) in (nn.ReLU, nn.ReLU6)
        for position, operation in enumerate(self.operations):
            if operation.output == index:
                if any(index in other.inputs for other in self.operations):
                    self._refuse_second_reader(operation.name)
                self.operations[position] = replace(operation, activation=op, activation_is_module=is_module)
                if output.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
                    self.before_activation[tensor.untyped_storage().data_ptr()] = operation.name
        self._alias(output, index)

    def _refuse_second_reader(self, name: str) -> None:
        raise UserError(
            f"the output of {name} is read before its activation by something else too: the accounts of memory take "
            "both as one operation; let the other read what the activation gives"
        )

    def _bias_from_batch_norm(self, index: int) -> None:
        for operation in self.operations:
            if operation.output == index and operation.layer is not None:
                self.convolutions[operation.layer] = replace(self.convolutions[operation.layer], has_bias=True)

    def _convolution(self, tensor: Tensor, index: int, output: Tensor) -> str:
        if not self.current or not isinstance(self.current[-1][1], nn.Conv2d):
            raise UserError("the network calls a convolution that is no nn.Conv2d module: make it one")
        name, module = self.current[-1]
        if any(c.name == name for c in self.convolutions) or any(weight is module.weight for weight in self.weights):
            raise UserError(f"convolution {name} is shared or called twice: an update scheme needs one call per layer")
        self.weights.append(module.weight)
        self.convolutions.append(
            Convolution(
                name=name,
                in_channels=module.in_channels,
                out_channels=module.out_channels,
                kernel_size=module.kernel_size,
                stride=module.stride,
                groups=module.groups,
                in_size=self.tensors[index][1:],
                padded_size=tuple(tensor.shape[2:]),
                out_size=tuple(output.shape[2:]),
                has_bias=module.bias is not None,
            )
        )
        return name


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Runs the block with the network in eval mode and without gradients, then restores the mode of each module."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def find_operations(network: nn.Module, input_shape: tuple[int, int, int]) -> NetworkOperations:
    """Runs the network once on zeros and returns what it did.

    A module with a ``device_operation`` ("convolution", "add", "mean", or "clone" for none at all) is taken as that one
    operation, however many PyTorch takes for it, and says by ``saturates`` whether its output is int8 that does.

    Args:
        network: Any network whose convolutions are ``nn.Conv2d`` and whose classifier is its last ``nn.Linear``.
        input_shape: Channels, height and width of a sample.

    Raises:
        UserError: A convolution is shared, called twice or no ``nn.Conv2d``; there is no linear layer; the network
            does not run on this shape.

    Example::

        operations = find_operations(torchvision.models.resnet18(), (3, 224, 224))
        operations.convolutions[0].out_size  # (112, 112)
    """
    parameter = next(network.parameters())
    sample = torch.zeros(1, *input_shape, dtype=parameter.dtype, device=parameter.device)
    recorder = _Recorder(sample, network.parameters())
    hooks = []
    for name, module in network.named_modules(remove_duplicate=True):
        if isinstance(module, nn.Conv2d | nn.Linear) or type(module) in (nn.ReLU, nn.ReLU6):
            hooks.append(module.register_forward_pre_hook(lambda m, _, name=name: recorder.current.append((name, m))))
            hooks.append(module.register_forward_hook(lambda *_: recorder.current.pop() and None))
        if hasattr(module, "device_operation"):
            hooks.append(module.register_forward_pre_hook(lambda m, _: setattr(recorder, "inside", m)))
            # before the hook above, which forgets the layer's name
            hooks.append(module.register_forward_hook(lambda *call: recorder.leave(*call), prepend=True))
    try:
        with evaluation_mode(network), recorder:
            network(sample)
    except UserError:
        raise
    except RuntimeError as error:
        raise UserError(f"the network does not run on an input of shape {(1, *input_shape)}: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    if not recorder.linears:
        raise UserError(
            "the network has no nn.Linear: its last one is the classifier, which is always updated; build an int8 "
            "network with num_classes to have one"
        )
    return NetworkOperations(
        tuple(recorder.convolutions), tuple(recorder.operations), tuple(recorder.tensors), *recorder.linears[-1]
    )
