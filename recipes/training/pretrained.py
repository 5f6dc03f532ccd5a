"""The weights that a training starts from, put into its network; and the network that they were, beside it."""

import copy

from lightning.pytorch import Trainer

from microtune.datamodules.contract import ClassificationData
from microtune.modules.classifier import Classifier
from microtune.modules.int8.files import read_quantized_network
from microtune.modules.int8.network import load_quantized_tensors
from microtune.modules.networks.batch_norm_folding import fold_batch_norm
from microtune.modules.networks.mobilenet_v2 import build_network
from microtune.modules.networks.pretrained_weights import load_weights, weights_are_folded
from microtune.modules.user_error import UserError
from microtune.recipes.training.networks import class_names_of


def load_pretrained(module: Classifier, weights: str, input_shape: tuple[int, int, int], whole: bool) -> None:
    """Loads weights into the module's network, folding their batch norm if the network's is folded.

    Args:
        module: Whose network gets the weights.
        weights: As ``load_weights`` takes them.
        input_shape: Channels, height and width of a sample.
        whole: Whether the classifier must be among them; otherwise it stays fresh where the weights have none, or
            one of other classes.

    Raises:
        UserError: The weights do not suit the network.
    """
    network = module.hparams.network
    if weights == "none":
        return
    if "graph" in network and whole and module.net.graph.classifier.classes != network["num_classes"]:
        raise UserError(
            f"{weights} knows {module.net.graph.classifier.classes} classes, and the data has "
            f"{network['num_classes']}: give the data it learnt"
        )
    fresh = copy.deepcopy(module.net.classifier.state_dict())
    if "graph" in network:
        load_quantized_tensors(module.net, read_quantized_network(weights)[1])
    elif weights_are_folded(weights) and not network["folded"]:
        raise UserError(f"{weights} has no batch norm, which --scheme none trains with: give --scheme full, or another")
    elif network["folded"] == weights_are_folded(weights):
        load_weights(module.net, weights, whole)
    else:
        unfolded = build_network(**{**network, "folded": False})
        load_weights(unfolded, weights, whole)
        module.net.load_state_dict(fold_batch_norm(unfolded, input_shape).state_dict())
    known, wanted = class_names_of(weights), module.hparams.class_names
    if known is not None and known != wanted:
        if whole:
            raise UserError(f"{weights} knows {_few(known)}, the data has {_few(wanted)}: give the data it learnt")
        module.net.classifier.load_state_dict(fresh)


def _few(names: list[str]) -> str:
    return f"{', '.join(names[:3])}, ... ({len(names)})" if len(names) > 3 else ", ".join(names)


def earlier_classifier(
    module: Classifier, weights: str, input_shape: tuple[int, int, int], earlier_data: ClassificationData
) -> Classifier:
    """The network as its weights were trained: with their own classifier, for the classes of ``earlier_data``."""
    earlier_data.prepare_data()
    earlier_data.setup()
    network = {**module.hparams.network, "num_classes": earlier_data.num_classes}
    earlier = Classifier(network, class_names=earlier_data.class_names)
    load_pretrained(earlier, weights, input_shape, whole=True)
    return earlier


def take_trunk(earlier: Classifier, module: Classifier) -> None:
    """Puts all of the module's network but its classifier into that of ``earlier``."""
    own = {name: value for name, value in earlier.net.state_dict().items() if name.startswith("classifier.")}
    earlier.net.load_state_dict(module.net.state_dict() | own)


def test_quietly(trainer: Trainer, module: Classifier, data: ClassificationData) -> float:
    """Top-1 on the test split, of which the loggers learn nothing."""
    loggers, trainer.loggers = trainer.loggers, []
    top1 = trainer.test(module, data, verbose=False)[0]["test/top1"]
    trainer.loggers = loggers
    return top1
