"""The update scheme of a recipe: a file, or a rule that fills a microcontroller's budget."""

import logging

from microtune.modules.memory.microcontrollers import Microcontroller
from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.sparse_update.channel_choice import to_be_chosen
from microtune.modules.sparse_update.channel_importance import Criterion
from microtune.modules.sparse_update.simple_schemes import (
    biases_that_fit,
    classifier_only,
    expanding_convolutions_that_fit,
    full_update,
    last_layers_that_fit,
)
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.recipes.training.memory_figures import refuse_oversize, scheme_fits
from microtune.recipes.training.networks import DescribedNetwork
from microtune.recipes.training.plan import TrainingPlan, check_scheme_name, refuse_unsuited_choice

log = logging.getLogger(__name__)

FILLING_SCHEMES = ("biases", "last_layers", "sub_tensor")  # as much as fits a microcontroller


def scheme_to_train(plan: TrainingPlan, described: DescribedNetwork) -> UpdateScheme | None:
    """The scheme that a training recipe was asked for; None where it trains everything with batch norm, or nothing.

    Args:
        plan: What is to be trained.
        described: The network.

    Raises:
        UserError: The scheme is not for the network, or does not fit and that is not allowed, or its channels cannot be
            chosen as they are to be.
    """
    if plan.scheme is None:
        return None
    peak_memory = plan.peak_memory(described.operations)
    scheme = scheme_by_name_or_file(plan.scheme, described, peak_memory, plan.device, plan.rechosen_by)
    if not plan.budget.allow_oversize:
        remedy = "or give --allow_oversize to train anyway"
        refuse_oversize(peak_memory, scheme, plan.device, described.network, remedy, plan.rechosen_by)
    elif plan.scheme in FILLING_SCHEMES and not scheme_fits(peak_memory, scheme, plan.device, plan.rechosen_by):
        log.warning(
            "%s takes what fits %s, and nothing does: the classifier alone is updated", plan.scheme, plan.device.name
        )
    if plan.source == "none":
        log.warning("a scheme updates little of a network that has learnt nothing: give --weights")
    chooses = bool(to_be_chosen(scheme, described.operations.convolutions))
    refuse_unsuited_choice(chooses, plan.budget, plan.optimization, plan.devices)
    return scheme


def scheme_by_name_or_file(
    scheme: str,
    described: DescribedNetwork,
    peak_memory: PeakMemory,
    microcontroller: Microcontroller,
    rechosen_by: Criterion | None = None,
) -> UpdateScheme:
    """The update scheme that the command line asks for.

    Args:
        scheme: A JSON file, or one of ``NAMED_SCHEMES``; ``biases``, ``last_layers`` and ``sub_tensor`` take as many
            layers as fit the microcontroller.
        described: The network.
        peak_memory: Of the network, with the options of the training.
        microcontroller: The device.
        rechosen_by: The score by which it chooses channels anew in training; by default it does not.

    Raises:
        UserError: The file is no scheme for this network, or nothing fits.
    """
    name, operations = described.name, described.operations
    rules = {
        "biases": biases_that_fit,
        "last_layers": last_layers_that_fit,
        "sub_tensor": expanding_convolutions_that_fit,
    }
    if scheme == "classifier":
        return classifier_only(name)
    if scheme == "full":
        return full_update(name, operations)
    if scheme in rules:
        found = rules[scheme](name, operations, lambda one: scheme_fits(peak_memory, one, microcontroller, rechosen_by))
        # nothing fits: the smallest scheme says so where it is checked
        return found or classifier_only(name)
    check_scheme_name(scheme)
    return described.load_scheme(scheme)
