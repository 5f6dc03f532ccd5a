"""Peak memory of four small networks equals what is worked out here by hand, tensor by tensor, in bytes.

Activations take 1 byte per element, gradients 4, biases and the classifier 4, masks 1 bit.
"""

from torch import nn
from torch.nn.functional import relu, relu6

from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.networks.operations import find_operations
from microtune.modules.sparse_update.update_scheme import UpdateScheme


class InvertedResidualNetwork(nn.Module):
    """Tensors: image 3x8x8, stem 4x8x8, expand and depthwise 24x8x8, project and sum 4x8x8, features 4, logits 10."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.expand = nn.Conv2d(4, 24, 1)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.project = nn.Conv2d(24, 4, 1)
        self.classifier = nn.Linear(4, 10)

    def forward(self, x):
        x = relu6(self.stem(x))
        x = x + self.project(relu6(self.depthwise(relu6(self.expand(x)))))
        return self.classifier(x.mean([2, 3]))


class BranchNetwork(nn.Module):
    """Tensors: image 3x8x8, stem 8x8x8, depthwise 8x4x4, pool 8x2x2, first, second, shortcut and sum 32x2x2,
    features 32, logits 5. Two convolutions, first and shortcut, read the output of the pooling."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
        self.pool = nn.MaxPool2d(2)
        self.first = nn.Conv2d(8, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 32, 3, padding=1)
        self.shortcut = nn.Conv2d(8, 32, 1)
        self.classifier = nn.Linear(32, 5)

    def forward(self, x):
        x = self.pool(relu(self.depthwise(relu(self.stem(x)))))
        x = relu(self.second(relu(self.first(x))) + self.shortcut(x))
        return self.classifier(x.mean([2, 3]))


class ShortResidualNetwork(nn.Module):
    """Tensors: image 3x8x8, stem, single and sum 4x8x8, features 4, logits 10. The residual spans one convolution."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.single = nn.Conv2d(4, 4, 3, padding=1)
        self.classifier = nn.Linear(4, 10)

    def forward(self, x):
        x = relu(self.stem(x))
        return self.classifier((x + self.single(x)).mean([2, 3]))


class TwoReadersNetwork(nn.Module):
    """Tensors: image 3x8x8, stem 8x8x8, pointwise, depthwise and sum 8x4x4, features 8, logits 5."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.pointwise = nn.Conv2d(8, 8, 1, stride=2)
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
        self.classifier = nn.Linear(8, 5)

    def forward(self, x):
        x = relu(self.stem(x))
        return self.classifier((self.pointwise(x) + self.depthwise(x)).mean([2, 3]))


INVERTED_RESIDUAL = find_operations(InvertedResidualNetwork(), (3, 8, 8))
BRANCHES = find_operations(BranchNetwork(), (3, 8, 8))
SHORT_RESIDUAL = find_operations(ShortResidualNetwork(), (3, 8, 8))
TWO_READERS = find_operations(TwoReadersNetwork(), (3, 8, 8))


def test_inverted_residual_with_the_classifier_only():
    scheme = UpdateScheme("inverted residual", 0)
    resident = (4 * 10 + 10) * 4  # classifier

    depthwise = (
        4 * 8 * 8  # stem, held until it is added
        + 24 * 8 * 8  # expand, overwritten by depthwise
        + 8 * 8  # the channel through which it is overwritten
    )
    project = (
        4 * 8 * 8  # stem, held until it is added
        + 24 * 8 * 8  # depthwise
        + 4 * 8 * 8  # project
    )
    classifier_backward = (
        4  # features, the classifier's input
        + 10 * 4  # gradient of the logits
        + (4 * 10 + 10) * 4  # gradient of the classifier
    )
    assert project > depthwise > classifier_backward
    assert PeakMemory(INVERTED_RESIDUAL).peak_bytes(scheme) == resident + project

    depthwise_beside_its_input = (
        4 * 8 * 8  # stem, held until it is added
        + 24 * 8 * 8  # expand
        + 24 * 8 * 8  # depthwise
    )
    peak = PeakMemory(INVERTED_RESIDUAL, depthwise_in_place=False).peak_bytes(scheme)
    assert peak == resident + depthwise_beside_its_input


def test_inference_keeps_activations_alone():
    project = (
        4 * 8 * 8  # stem, held until it is added
        + 24 * 8 * 8  # depthwise
        + 4 * 8 * 8  # project
    )
    assert PeakMemory(INVERTED_RESIDUAL).inference_peak_bytes == project
    depthwise_beside_its_input = (
        4 * 8 * 8  # stem, held until it is added
        + 24 * 8 * 8  # expand
        + 24 * 8 * 8  # depthwise
    )
    not_in_place = PeakMemory(INVERTED_RESIDUAL, depthwise_in_place=False, optimizer_state="adam")
    assert not_in_place.inference_peak_bytes == depthwise_beside_its_input

    # where training the classifier is the highest moment, inference needs less than the peak without its weights
    stem = (
        3 * 8 * 8  # image
        + 8 * 8 * 8  # stem
    )
    assert PeakMemory(BRANCHES, gradient_accumulation=True).inference_peak_bytes == stem


def test_inverted_residual_with_all_biases():
    scheme = UpdateScheme("inverted residual", 4)
    resident = (
        (4 * 10 + 10) * 4  # classifier
        + (4 + 24 + 24 + 4) * 4  # biases
    )

    project = (
        4 * 8 * 8  # stem
        + 24 * 8 * 8  # depthwise
        + 4 * 8 * 8  # project
        + (4 + 24 + 24 + 4) * 8 * 8 // 8  # masks of the four convolutions
    )
    project_backward = (
        4 * 8 * 8 * 4  # gradient of the sum, which is that of project and of the skipped stem
        + 24 * 8 * 8 * 4  # gradient of depthwise
        + 4 * 4  # gradient of project's biases
        + (4 + 24 + 24 + 4) * 8 * 8 // 8  # masks of the four convolutions
    )
    depthwise_backward = (
        4 * 8 * 8 * 4  # gradient of the skipped stem
        + 24 * 8 * 8 * 4  # gradient of depthwise, overwritten by that of expand
        + 8 * 8 * 4  # the channel through which it is overwritten
        + 24 * 4  # gradient of depthwise's biases
        + (4 + 24 + 24) * 8 * 8 // 8  # masks of stem, expand, depthwise
    )
    expand_backward = (
        24 * 8 * 8 * 4  # gradient of expand
        + 4 * 8 * 8 * 4  # gradient of stem, added to that of the skip
        + 24 * 4  # gradient of expand's biases
        + (4 + 24) * 8 * 8 // 8  # masks of stem, expand
    )
    assert depthwise_backward > project_backward > expand_backward > project
    assert PeakMemory(INVERTED_RESIDUAL).peak_bytes(scheme) == resident + depthwise_backward

    depthwise_backward_beside_its_input = (
        4 * 8 * 8 * 4  # gradient of the skipped stem
        + 24 * 8 * 8 * 4  # gradient of depthwise
        + 24 * 8 * 8 * 4  # gradient of expand
        + 24 * 4  # gradient of depthwise's biases
        + (4 + 24 + 24) * 8 * 8 // 8  # masks of stem, expand, depthwise
    )
    peak = PeakMemory(INVERTED_RESIDUAL, depthwise_in_place=False).peak_bytes(scheme)
    assert peak == resident + depthwise_backward_beside_its_input


def test_inverted_residual_with_a_quarter_of_one_layer_and_momentum():
    scheme = UpdateScheme("inverted residual", 2, {"project": 0.25})
    resident = (
        (4 * 10 + 10) * 4  # classifier
        + 6 * 4  # slice of project: 6 of 24 input channels, 4 outputs, int8
        + (24 + 4) * 4  # biases of depthwise and project
        + (4 * 10 + 10 + 6 * 4 + 24 + 4) * 4  # momentum of the classifier, the slice and the biases
    )

    project = (
        4 * 8 * 8  # stem, held until it is added
        + 24 * 8 * 8  # depthwise
        + 4 * 8 * 8  # project
        + 6 * 8 * 8  # copy of 6 channels of depthwise
        + (24 + 4) * 8 * 8 // 8  # masks of depthwise and project
    )
    project_backward = (
        4 * 8 * 8 * 4  # gradient of the sum, which is that of project; the stem needs none
        + 24 * 8 * 8 * 4  # gradient of depthwise
        + 6 * 8 * 8  # copy of 6 channels of depthwise
        + 6 * 4 * 4  # gradient of the slice
        + 4 * 4  # gradient of project's biases
        + (24 + 4) * 8 * 8 // 8  # masks of depthwise and project
    )
    depthwise_backward = (
        24 * 8 * 8 * 4  # gradient of depthwise; expand needs none
        + 24 * 4  # gradient of depthwise's biases
        + 24 * 8 * 8 // 8  # mask of depthwise
    )
    assert project_backward > depthwise_backward > project
    peak = PeakMemory(INVERTED_RESIDUAL, optimizer_state="momentum").peak_bytes(scheme)
    assert peak == resident + project_backward


def test_inverted_residual_with_everything():
    scheme = UpdateScheme("inverted residual", 4, {"stem": 1, "expand": 1, "depthwise": 1, "project": 1})
    resident = (
        (4 * 10 + 10) * 4  # classifier
        + (3 * 4 * 9 + 4 * 24 + 24 * 9 + 24 * 4)  # weights, int8
        + (4 + 24 + 24 + 4) * 4  # biases
    )

    depthwise = (
        3 * 8 * 8  # image, kept for stem
        + 4 * 8 * 8  # stem, kept for expand and held until it is added
        + 24 * 8 * 8  # expand, kept for depthwise, which cannot overwrite it
        + 24 * 8 * 8  # depthwise
        + (4 + 24 + 24) * 8 * 8 // 8  # masks of stem, expand, depthwise
    )
    project_backward = (
        3 * 8 * 8  # image, kept for stem
        + 4 * 8 * 8  # stem, kept for expand
        + 24 * 8 * 8  # expand, kept for depthwise
        + 24 * 8 * 8  # depthwise, kept for project
        + 4 * 8 * 8 * 4  # gradient of the sum, which is that of project and of the skipped stem
        + 24 * 8 * 8 * 4  # gradient of depthwise
        + 24 * 4 * 4  # gradient of project's weight
        + 4 * 4  # gradient of project's biases
        + (4 + 24 + 24 + 4) * 8 * 8 // 8  # masks of the four convolutions
    )
    depthwise_backward = (
        3 * 8 * 8  # image, kept for stem
        + 4 * 8 * 8  # stem, kept for expand
        + 24 * 8 * 8  # expand, kept for depthwise
        + 4 * 8 * 8 * 4  # gradient of the skipped stem
        + 24 * 8 * 8 * 4  # gradient of depthwise, overwritten by that of expand
        + 8 * 8 * 4  # the channel through which it is overwritten
        + 24 * 9 * 4  # gradient of depthwise's weight
        + 24 * 4  # gradient of depthwise's biases
        + (4 + 24 + 24) * 8 * 8 // 8  # masks of stem, expand, depthwise
    )
    assert project_backward > depthwise_backward > depthwise
    assert PeakMemory(INVERTED_RESIDUAL).peak_bytes(scheme) == resident + project_backward

    depthwise_backward_while_gradients_wait = (
        depthwise_backward
        + (4 * 10 + 10) * 4  # gradient of the classifier
        + (24 * 4 + 4) * 4  # gradient of project's weight and biases
    )
    project_backward_while_gradients_wait = project_backward + (4 * 10 + 10) * 4  # gradient of the classifier
    assert project_backward_while_gradients_wait > depthwise_backward_while_gradients_wait
    peak = PeakMemory(INVERTED_RESIDUAL, reordering=False).peak_bytes(scheme)
    assert peak == resident + project_backward_while_gradients_wait

    accumulated = (
        (4 * 10 + 10) * 4  # gradient of the classifier
        + (3 * 4 * 9 + 4 * 24 + 24 * 9 + 24 * 4) * 4  # gradients of the weights
        + (4 + 24 + 24 + 4) * 4  # gradients of the biases
    )
    project_backward_without_its_own = project_backward - (24 * 4 + 4) * 4
    depthwise_backward_without_its_own = depthwise_backward - (24 * 9 + 24) * 4
    assert project_backward_without_its_own > depthwise_backward_without_its_own
    peak = PeakMemory(INVERTED_RESIDUAL, gradient_accumulation=True).peak_bytes(scheme)
    assert peak == resident + accumulated + project_backward_without_its_own


def test_inverted_residual_with_latent_weights():
    scheme = UpdateScheme("inverted residual", 2, {"project": 0.25})
    resident = (
        (4 * 10 + 10) * 4  # classifier, a float in any case
        + 6 * 4  # slice of project: 6 of 24 input channels, 4 outputs, int8
        + 6 * 4 * 4  # the same as floats; the frozen 18 channels have none
        + (24 + 4) * 4  # biases of depthwise and project, which are floats in place of int32
    )
    project_backward = (
        4 * 8 * 8 * 4  # gradient of the sum, which is that of project; the stem needs none
        + 24 * 8 * 8 * 4  # gradient of depthwise
        + 6 * 8 * 8  # copy of 6 channels of depthwise
        + 6 * 4 * 4  # gradient of the slice
        + 4 * 4  # gradient of project's biases
        + (24 + 4) * 8 * 8 // 8  # masks of depthwise and project
    )
    peak_memory = PeakMemory(INVERTED_RESIDUAL, latent_weights=True)
    assert peak_memory.peak_bytes(scheme) == resident + project_backward
    assert (peak_memory.timeline(scheme).bytes_of_category["weights"] == resident).all()
    biases_only = UpdateScheme("inverted residual", 4)
    assert peak_memory.peak_bytes(biases_only) == PeakMemory(INVERTED_RESIDUAL).peak_bytes(biases_only)


def test_branches_with_the_classifier_only():
    scheme = UpdateScheme("branches", 0)
    resident = (32 * 5 + 5) * 4  # classifier

    stem = (
        3 * 8 * 8  # image
        + 8 * 8 * 8  # stem
    )
    depthwise = (
        8 * 8 * 8  # stem, overwritten by the smaller depthwise
        + 4 * 4  # the channel through which it is overwritten
    )
    classifier_backward = (
        32  # features, the classifier's input
        + 5 * 4  # gradient of the logits
        + (32 * 5 + 5) * 4  # gradient of the classifier
    )
    assert classifier_backward > stem > depthwise
    assert PeakMemory(BRANCHES).peak_bytes(scheme) == resident + classifier_backward
    # carried from step to step, the classifier's gradient is there while the stem runs
    peak = PeakMemory(BRANCHES, gradient_accumulation=True).peak_bytes(scheme)
    assert peak == resident + (32 * 5 + 5) * 4 + stem


def test_branches_with_the_biases_behind_the_pooling():
    scheme = UpdateScheme("branches", 3)
    resident = (
        (32 * 5 + 5) * 4  # classifier
        + (32 + 32 + 32) * 4  # biases
    )

    classifier_backward = (
        32  # features, the classifier's input
        + 5 * 4  # gradient of the logits
        + 32 * 4  # gradient of the features
        + (32 * 5 + 5) * 4  # gradient of the classifier
        + (32 + 32 + 32 + 32) * 2 * 2 // 8  # masks of first, second, shortcut and the sum
    )
    shortcut_backward = (
        32 * 2 * 2 * 4  # gradient of the sum, which is that of shortcut and of second
        + 32 * 4  # gradient of shortcut's biases
        + (32 + 32 + 32) * 2 * 2 // 8  # masks of first, second, shortcut
    )
    second_backward = (
        32 * 2 * 2 * 4  # gradient of the sum, which is that of second
        + 32 * 2 * 2 * 4  # gradient of first
        + 32 * 4  # gradient of second's biases
        + (32 + 32) * 2 * 2 // 8  # masks of first, second
    )
    assert second_backward > classifier_backward > shortcut_backward
    assert PeakMemory(BRANCHES).peak_bytes(scheme) == resident + second_backward


def test_branches_with_all_biases():
    scheme = UpdateScheme("branches", 5)
    resident = (
        (32 * 5 + 5) * 4  # classifier
        + (8 + 8 + 32 + 32 + 32) * 4  # biases
    )

    second_backward = (
        32 * 2 * 2 * 4  # gradient of the sum, which is that of second
        + 32 * 2 * 2 * 4  # gradient of first
        + 8 * 2 * 2 * 4  # gradient of the pooling, to which shortcut has given its part
        + 32 * 4  # gradient of second's biases
        + 8 * 8 * 8 // 8  # mask of stem
        + 8 * 4 * 4 // 8  # mask of depthwise
        + 8 * 2 * 2  # which positions won in the pooling
        + (32 + 32) * 2 * 2 // 8  # masks of first, second
    )
    pool_backward = (
        8 * 2 * 2 * 4  # gradient of the pooling
        + 8 * 4 * 4 * 4  # gradient of depthwise
        + 8 * 8 * 8 // 8  # mask of stem
        + 8 * 4 * 4 // 8  # mask of depthwise
        + 8 * 2 * 2  # which positions won in the pooling
    )
    depthwise_backward = (
        8 * 8 * 8 * 4  # gradient of stem, written over the smaller one of depthwise
        + 8 * 8 * 4  # the channel through which it is written
        + 8 * 4  # gradient of depthwise's biases
        + 8 * 8 * 8 // 8  # mask of stem
        + 8 * 4 * 4 // 8  # mask of depthwise
    )
    stem_backward = (
        8 * 8 * 8 * 4  # gradient of stem
        + 8 * 4  # gradient of stem's biases
        + 8 * 8 * 8 // 8  # mask of stem
    )
    assert depthwise_backward > stem_backward > second_backward > pool_backward
    assert PeakMemory(BRANCHES).peak_bytes(scheme) == resident + depthwise_backward


def test_branches_that_keep_channels_of_one_tensor_keep_their_union():
    weights = {"first": 0.5, "shortcut": 0.25}
    resident = (
        (32 * 5 + 5) * 4  # classifier
        + 4 * 32 * 9  # slice of first: 4 of 8 input channels
        + 2 * 32  # slice of shortcut: 2 of 8 input channels
        + (32 + 32 + 32) * 4  # biases
    )
    second_backward_without_kept_channels = (
        32 * 2 * 2 * 4  # gradient of the sum, which is that of second
        + 32 * 2 * 2 * 4  # gradient of first
        + 32 * 4  # gradient of second's biases
        + (32 + 32) * 2 * 2 // 8  # masks of first, second
    )
    first_backward_without_kept_channels = (
        32 * 2 * 2 * 4  # gradient of first
        + 4 * 32 * 9 * 4  # gradient of its slice
        + 32 * 4  # gradient of its biases
        + 32 * 2 * 2 // 8  # mask of first
    )
    assert first_backward_without_kept_channels > second_backward_without_kept_channels

    def peak(weights, channels):
        return PeakMemory(BRANCHES).peak_bytes(UpdateScheme("branches", 3, weights, channels))

    unknown = 4 + 2  # first's and shortcut's, which may be different ones
    assert peak(weights, {}) == resident + first_backward_without_kept_channels + unknown * 2 * 2
    assert peak(weights, {"first": [0, 1, 2, 3]}) == resident + first_backward_without_kept_channels + unknown * 2 * 2
    known = 5  # 0 to 4
    channels = {"first": [0, 1, 2, 3], "shortcut": [3, 4]}
    assert peak(weights, channels) == resident + first_backward_without_kept_channels + known * 2 * 2
    everything = 8  # shortcut keeps the pooling's output itself, and first finds its channels in it
    resident_with_whole_shortcut = resident + 6 * 32
    peak_with_whole_shortcut = peak({"first": 0.5, "shortcut": 1}, {"first": [0, 1, 2, 3]})
    assert (
        peak_with_whole_shortcut
        == resident_with_whole_shortcut + first_backward_without_kept_channels + everything * 2 * 2
    )


def test_branches_with_everything_and_adam():
    scheme = UpdateScheme("branches", 5, {"stem": 1, "depthwise": 1, "first": 1, "second": 1, "shortcut": 1})
    resident = (
        (32 * 5 + 5) * 4  # classifier
        + (3 * 8 * 9 + 8 * 9 + 8 * 32 * 9 + 32 * 32 * 9 + 8 * 32)  # weights, int8
        + (8 + 8 + 32 + 32 + 32) * 4  # biases
        + (32 * 5 + 5) * 8  # Adam's two states of the classifier
        + (3 * 8 * 9 + 8 * 9 + 8 * 32 * 9 + 32 * 32 * 9 + 8 * 32) * 8  # of the weights
        + (8 + 8 + 32 + 32 + 32) * 8  # of the biases
    )

    second_backward = (
        3 * 8 * 8  # image, kept for stem
        + 8 * 8 * 8  # stem, kept for depthwise
        + 8 * 2 * 2  # the pooling's output, kept for first and shortcut; depthwise, its input, is not kept
        + 32 * 2 * 2  # first, kept for second
        + 32 * 2 * 2 * 4  # gradient of the sum, which is that of second
        + 32 * 2 * 2 * 4  # gradient of first
        + 8 * 2 * 2 * 4  # gradient of the pooling, to which shortcut has given its part
        + 32 * 32 * 9 * 4  # gradient of second's weight
        + 32 * 4  # gradient of second's biases
        + 8 * 8 * 8 // 8  # mask of stem
        + 8 * 4 * 4 // 8  # mask of depthwise
        + 8 * 2 * 2  # which positions won in the pooling
        + (32 + 32) * 2 * 2 // 8  # masks of first, second
    )
    first_backward = (
        3 * 8 * 8  # image, kept for stem
        + 8 * 8 * 8  # stem, kept for depthwise
        + 8 * 2 * 2  # the pooling's output, kept for first
        + 32 * 2 * 2 * 4  # gradient of first
        + 8 * 2 * 2 * 4  # gradient of the pooling
        + 8 * 32 * 9 * 4  # gradient of first's weight
        + 32 * 4  # gradient of first's biases
        + 8 * 8 * 8 // 8  # mask of stem
        + 8 * 4 * 4 // 8  # mask of depthwise
        + 8 * 2 * 2  # which positions won in the pooling
        + 32 * 2 * 2 // 8  # mask of first
    )
    assert second_backward > first_backward
    assert PeakMemory(BRANCHES, optimizer_state="adam").peak_bytes(scheme) == resident + second_backward

    depthwise_backward_while_gradients_wait = (
        3 * 8 * 8  # image, kept for stem
        + 8 * 8 * 8  # stem, kept for depthwise
        + 8 * 8 * 8 * 4  # gradient of stem, written over the smaller one of depthwise
        + 8 * 8 * 4  # the channel through which it is written
        + 8 * 8 * 8 // 8  # mask of stem
        + 8 * 4 * 4 // 8  # mask of depthwise
        + (32 * 5 + 5) * 4  # gradient of the classifier
        + (8 * 9 + 8 * 32 * 9 + 32 * 32 * 9 + 8 * 32) * 4  # gradients of all weights but the stem's
        + (8 + 32 + 32 + 32) * 4  # gradients of all biases but the stem's
    )
    stem_backward_while_gradients_wait = (
        3 * 8 * 8  # image, kept for stem
        + 8 * 8 * 8 * 4  # gradient of stem
        + 8 * 8 * 8 // 8  # mask of stem
        + (32 * 5 + 5) * 4  # gradient of the classifier
        + (3 * 8 * 9 + 8 * 9 + 8 * 32 * 9 + 32 * 32 * 9 + 8 * 32) * 4  # gradients of the weights
        + (8 + 8 + 32 + 32 + 32) * 4  # gradients of the biases
    )
    assert stem_backward_while_gradients_wait > depthwise_backward_while_gradients_wait
    peak = PeakMemory(BRANCHES, optimizer_state="adam", reordering=False).peak_bytes(scheme)
    assert peak == resident + stem_backward_while_gradients_wait


def test_a_residual_over_one_convolution_copies_the_gradient_that_the_convolution_still_reads():
    scheme = UpdateScheme("short residual", 2)
    resident = (
        (4 * 10 + 10) * 4  # classifier
        + (4 + 4) * 4  # biases
    )

    sum_backward = (
        4 * 8 * 8 * 4  # gradient of the sum, passed on to single and stem as it is
        + (4 + 4 + 4) * 8 * 8 // 8  # masks of stem, single and the sum
    )
    single_backward = (
        4 * 8 * 8 * 4  # gradient of the sum, which is that of single
        + 4 * 8 * 8 * 4  # gradient of stem: a copy, to which single gives its part
        + 4 * 4  # gradient of single's biases
        + (4 + 4) * 8 * 8 // 8  # masks of stem, single
    )
    assert single_backward > sum_backward
    assert PeakMemory(SHORT_RESIDUAL).peak_bytes(scheme) == resident + single_backward


def test_depthwise_does_not_overwrite_a_gradient_that_another_convolution_still_reads():
    scheme = UpdateScheme("two readers", 3)
    resident = (
        (8 * 5 + 5) * 4  # classifier
        + (8 + 8 + 8) * 4  # biases
    )

    depthwise_backward = (
        8 * 4 * 4 * 4  # gradient of the sum, which is that of depthwise and, later, of pointwise
        + 8 * 8 * 8 * 4  # gradient of stem
        + 8 * 4  # gradient of depthwise's biases
        + 8 * 8 * 8 // 8  # mask of stem
        + (8 + 8) * 4 * 4 // 8  # masks of pointwise, depthwise
    )
    pointwise_backward = (
        8 * 4 * 4 * 4  # gradient of the sum, which is that of pointwise
        + 8 * 8 * 8 * 4  # gradient of stem, to which depthwise has given its part
        + 8 * 4  # gradient of pointwise's biases
        + 8 * 8 * 8 // 8  # mask of stem
        + 8 * 4 * 4 // 8  # mask of pointwise
    )
    assert depthwise_backward > pointwise_backward
    assert PeakMemory(TWO_READERS).peak_bytes(scheme) == resident + depthwise_backward


def test_two_halves_of_one_tensor_are_kept_as_a_copy_so_that_depthwise_may_overwrite_the_tensor():
    scheme = UpdateScheme("two readers", 2, {"pointwise": 0.5, "depthwise": 0.5})
    resident = (
        (8 * 5 + 5) * 4  # classifier
        + (4 * 8 + 4 * 9)  # slices of pointwise and depthwise, int8
        + (8 + 8) * 4  # biases of pointwise and depthwise
    )

    pointwise = (
        8 * 8 * 8  # stem, to be read by depthwise
        + 8 * 4 * 4  # pointwise
        + (4 + 4) * 8 * 8  # copy of the channels of stem that pointwise or depthwise may keep
        + 8 * 4 * 4 // 8  # mask of pointwise
    )
    depthwise = (
        8 * 4 * 4  # pointwise, held until it is added
        + 8 * 8 * 8  # stem, overwritten by the smaller depthwise
        + 4 * 4  # the channel through which it is overwritten
        + (4 + 4) * 8 * 8  # copy of channels of stem
        + (8 + 8) * 4 * 4 // 8  # masks of pointwise, depthwise
    )
    pointwise_backward = (
        8 * 4 * 4  # gradient of the sum, which is that of pointwise; stem needs none
        + (4 + 4) * 8 * 8  # copy of channels of stem
        + 4 * 8  # gradient of pointwise's slice
        + 8 * 4  # gradient of pointwise's biases
        + 8 * 4 * 4 // 8  # mask of pointwise
    )
    assert depthwise > pointwise > pointwise_backward
    assert PeakMemory(TWO_READERS, gradient_bytes=1).peak_bytes(scheme) == resident + depthwise

    depthwise_beside_its_input = (
        8 * 4 * 4  # pointwise, held until it is added
        + 8 * 8 * 8  # stem
        + 8 * 4 * 4  # depthwise
        + (4 + 4) * 8 * 8  # copy of channels of stem
        + (8 + 8) * 4 * 4 // 8  # masks of pointwise, depthwise
    )
    peak = PeakMemory(TWO_READERS, gradient_bytes=1, depthwise_in_place=False).peak_bytes(scheme)
    assert peak == resident + depthwise_beside_its_input
