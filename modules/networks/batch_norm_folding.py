"""Folding of batch norm into the convolutions before it, as a deployed network has it."""

import copy
from collections import Counter
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from microtune.modules.networks.operations import evaluation_mode
from microtune.modules.user_error import UserError


def find_batch_norm(network: nn.Module) -> str | None:
    """Returns the module path of the first batch norm, or None where there is none.

    Example::

        find_batch_norm(torchvision.models.resnet18())  # "bn1"
    """
    return next((name for name, module in network.named_modules() if isinstance(module, _BatchNorm)), None)


def fold_batch_norm(network: nn.Module, input_shape: tuple[int, int, int]) -> nn.Module:
    """Returns a copy without batch norm, whose convolutions have a bias and give the same outputs in eval mode.

    Which convolution a batch norm follows is found by running it once on zeros. Convolutions keep their names, a
    batch norm becomes an ``nn.Identity``, every parameter requires a gradient. To load a checkpoint of a folded
    network, fold a fresh one and load into that.

    Args:
        network: Any network whose convolutions are ``nn.Conv2d``; without batch norm, the copy is unchanged.
        input_shape: Channels, height and width of a sample.

    Raises:
        UserError: A convolution or batch norm is shared or called twice; a batch norm follows no convolution, has no
            running statistics, or is not the only reader of its convolution's output; the network does not run on
            this shape.

    Example::

        folded = fold_batch_norm(torchvision.models.resnet18(), (3, 224, 224))
        folded.conv1.bias.shape  # (64,)
    """
    return fold_batch_norm_(copy.deepcopy(network), input_shape)


def fold_batch_norm_(network: nn.Module, input_shape: tuple[int, int, int]) -> nn.Module:
    """``fold_batch_norm`` in place; returns the network."""
    if find_batch_norm(network) is None:
        return network
    _check_not_shared(network)
    for norm_name, convolution_name in _convolutions_before_batch_norm(network, input_shape).items():
        convolution, norm = network.get_submodule(convolution_name), network.get_submodule(norm_name)
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        network.set_submodule(norm_name, nn.Identity().train(norm.training))
    return network.requires_grad_(True)


def _check_not_shared(network: nn.Module) -> None:
    first_name: dict[int, str] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Conv2d | _BatchNorm):
            identity = id(module if module.weight is None else module.weight)
            if identity in first_name:
                raise UserError(f"{name} is shared with {first_name[identity]}: give each its own module and weight")
            first_name[identity] = name


def _convolutions_before_batch_norm(network: nn.Module, input_shape: tuple[int, int, int]) -> dict[str, str]:
    """The convolution of every batch norm, by name."""
    run = _record_run(network, input_shape)
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | _BatchNorm) and run.calls[name] > 1:
            raise UserError(f"{name} is called {run.calls[name]} times: give each call its own module")
        if isinstance(module, _BatchNorm):
            if name not in run.convolution_of_norm:
                raise UserError(f"batch norm {name} follows no convolution: put it right behind one, or leave it out")
            if module.running_mean is None:
                raise UserError(f"batch norm {name} has no running statistics: build it with track_running_stats=True")
            convolution = run.convolution_of_norm[name]
            if run.reads[convolution] > 1:
                raise UserError(
                    f"the output of convolution {convolution} is read by more than batch norm {name}: "
                    "folding would change what the other reads, so give that a convolution of its own"
                )
    return run.convolution_of_norm


class _Run(TorchDispatchMode):
    """Notes which batch norm reads which convolution's output, and how often each output is read."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self.convolution_of_norm: dict[str, str] = {}
        # kept, since a storage's address is its identity only while it lives
        self.outputs: dict[int, tuple[str, Tensor, int]] = {}

    def after_convolution(self, name: str, _module: nn.Module, _inputs: tuple[Tensor], output: Tensor) -> None:
        self.calls[name] += 1
        self.outputs[output.untyped_storage().data_ptr()] = (name, output, output._version)

    def before_batch_norm(self, name: str, _module: nn.Module, inputs: tuple[Tensor]) -> None:
        tensor = inputs[0]
        self.calls[name] += 1
        convolution, output, version = self.outputs.get(tensor.untyped_storage().data_ptr(), (None, None, None))
        # an activation in place writes into the convolution's output, which then has a new version
        if tensor is output and tensor._version == version:
            self.convolution_of_norm[name] = convolution

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operation imports torch._dynamo, which takes longer than all of torch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and (address := tensor.untyped_storage().data_ptr()) in self.outputs:
                self.reads[self.outputs[address][0]] += 1
        return func(*args, **(kwargs or {}))


def _record_run(network: nn.Module, input_shape: tuple[int, int, int]) -> _Run:
    parameter = next(network.parameters())
    sample = torch.zeros(1, *input_shape, dtype=parameter.dtype, device=parameter.device)
    run, hooks = _Run(), []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(partial(run.after_convolution, name)))
        elif isinstance(module, _BatchNorm):
            hooks.append(module.register_forward_pre_hook(partial(run.before_batch_norm, name)))
    try:
        with evaluation_mode(network), run:
            network(sample)
    except RuntimeError as error:
        raise UserError(f"the network does not run on an input of shape {(1, *input_shape)}: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return run
