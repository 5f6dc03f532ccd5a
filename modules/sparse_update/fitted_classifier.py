"""A fresh classifier fitted to some samples, so that the gradient through it says something of the network's layers."""

import copy
from collections.abc import Sequence

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn import functional as F

from microtune.modules.networks.operations import Convolution, NetworkOperations
from microtune.modules.sparse_update.channel_importance import ChannelImportance, measure_importance
from microtune.modules.user_error import UserError

L2_PENALTY = 1e-2  # keeps the weights finite where the samples are separable
MOST_ITERATIONS = 100


def fit_classifier(
    network: nn.Module, operations: NetworkOperations, batches: Sequence[tuple[Tensor, Tensor]]
) -> float:
    """Fits the classifier alone, in place, to samples: logistic regression on the features in front of it.

    A fresh classifier knows nothing, and gradients through it are those of random directions. It is fitted from zero in
    float64 by L-BFGS, with an L2 penalty on its weights, so that what it was before does not matter. Under
    ``torch.distributed`` it is fitted to the samples of all ranks, and the same on all.

    Args:
        network: With a linear classifier in floating point; runs in evaluation mode and is otherwise left as it was.
        operations: Of the network.
        batches: Samples (N, C, H, W) and labels (N,).

    Returns:
        Accuracy of the fitted classifier on these samples.

    Raises:
        UserError: There is no sample, or the features are no finite numbers.

    Example::

        fit_classifier(network, find_operations(network, (3, 96, 96)), [(samples, labels)])
    """
    classifier = network.get_submodule(operations.classifier_name)
    if not batches:
        raise UserError("the classifier is fitted to training samples, and there are none: give at least one batch")
    features = _features_of(network, classifier, [samples for samples, _ in batches]).double()
    if not features.isfinite().all():
        raise UserError("the features in front of the classifier are no finite numbers: give other weights")
    labels = torch.cat([labels for _, labels in batches])
    features, labels = _of_all_ranks(features), _of_all_ranks(labels)
    weight, bias = _logistic_regression(features, labels, classifier.out_features, classifier.bias is not None)
    with torch.no_grad():
        classifier.weight.copy_(weight)
        if classifier.bias is not None:
            classifier.bias.copy_(bias)
    return float((F.linear(features, weight, bias).argmax(1) == labels).double().mean())


def _features_of(network: nn.Module, classifier: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    """What the classifier is given for the samples, of shape (N, features)."""
    features: list[Tensor] = []
    modes = [(module, module.training) for module in network.modules()]
    handle = classifier.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].detach()))
    try:
        network.eval()
        with torch.no_grad():
            for samples in batches:
                network(samples)
    finally:
        handle.remove()
        for module, mode in modes:
            module.training = mode
    return torch.cat(features)


def _of_all_ranks(values: Tensor) -> Tensor:
    """The rows of all ranks, one rank after another, where there are several."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    count = torch.tensor(len(values), device=values.device)
    counts = [torch.zeros_like(count) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(counts, count)
    # all ranks have to send equally many rows
    sent = values.new_zeros(int(max(counts)), *values.shape[1:])
    sent[: len(values)] = values
    received = [torch.zeros_like(sent) for _ in counts]
    torch.distributed.all_gather(received, sent)
    return torch.cat([rows[: int(rank_count)] for rows, rank_count in zip(received, counts, strict=True)])


@torch.enable_grad()
def _logistic_regression(features: Tensor, labels: Tensor, classes: int, with_bias: bool) -> tuple[Tensor, Tensor]:
    """Weight (classes, features) and bias (classes,), or zeros, of the lowest mean cross entropy plus L2 penalty."""
    weight = features.new_zeros(classes, features.shape[1]).requires_grad_()
    bias = features.new_zeros(classes).requires_grad_(with_bias)
    fitted = [weight, bias] if with_bias else [weight]
    optimizer = torch.optim.LBFGS(fitted, max_iter=MOST_ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(features, weight, bias), labels) + L2_PENALTY * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def measure_with_fitted_classifier(
    network: nn.Module,
    operations: NetworkOperations,
    convolutions: Sequence[Convolution],
    batches: Sequence[tuple[Tensor, Tensor]],
) -> tuple[ChannelImportance, float]:
    """Fits the classifier, for the time being, to the first half of the batches, and measures on the second half.

    Not on the same: there it makes hardly an error, and what is left of the gradient is noise. A single batch has to do
    for both.

    Args:
        network: With a linear classifier in floating point; left as it was.
        operations: Of the network.
        convolutions: Of which layers the channels are measured.
        batches: Samples (N, C, H, W) and labels (N,).

    Returns:
        The importance of the channels, and the fitted classifier's accuracy on the samples that it is measured on.

    Raises:
        UserError: As ``fit_classifier`` and ``measure_importance`` do.

    Example::

        importance, top1 = measure_with_fitted_classifier(network, operations, operations.convolutions[-36:], batches)
    """
    classifier = network.get_submodule(operations.classifier_name)
    before = copy.deepcopy(classifier.state_dict())
    half = len(batches) // 2
    try:
        fit_classifier(network, operations, batches[:half] or batches)
        importance = measure_importance(network, convolutions, batches[half:])
        top1 = _top1(network, batches[half:])
    finally:
        classifier.load_state_dict(before)
    return importance, top1


def _top1(network: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    with torch.no_grad():
        correct = sum(int((network(samples).argmax(1) == labels).sum()) for samples, labels in batches)
    for module, mode in modes:
        module.training = mode
    return correct / sum(len(labels) for _, labels in batches)
