"""The file of an int8 network: its graph and its tensors in one safetensors file, in which nothing can run."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from microtune.modules.atomic_files import whole_file
from microtune.modules.int8.graph import QuantizedGraph
from microtune.modules.user_error import UserError

SUFFIX = ".safetensors"
FORMAT = "microtune-int8"
VERSION = "1"
REMEDY = "make one with recipes/quantize_network.py"
HEADER_LENGTH = 8  # bytes of a safetensors file that hold the length of its header


def is_quantized_file(source: str | Path) -> bool:
    """Whether a source of weights is, by its suffix, the file of an int8 network.

    Example::

        is_quantized_file("network.safetensors")  # True
    """
    return Path(source).suffix == SUFFIX


def write_quantized_network(path: str | Path, graph: QuantizedGraph, tensors: Mapping[str, Tensor]) -> None:
    """Writes an int8 network to one file; the same network gives the same bytes.

    Args:
        path: Ends in ``.safetensors``.
        graph: Its layers.
        tensors: As ``tensor_shapes`` lists them.

    Raises:
        UserError: The path has another suffix, or the tensors are not those of the graph.

    Example::

        write_quantized_network("network.safetensors", *read_published_network("mbv2-w0.35.pkl"))
    """
    path = Path(path)
    if not is_quantized_file(path):
        raise UserError(f"{path}: the file of an int8 network ends in {SUFFIX}: give such a name")
    _check_tensors(path, graph, tensors)
    metadata = {"format": FORMAT, "version": VERSION, "graph": graph.to_json()}
    # a copy each: safetensors writes no views, no tensors in shared memory and none in PyTorch's channels_last order
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    content = save(plain, metadata)
    with whole_file(path) as partial:
        partial.write_bytes(_with_sorted_header(content))


def read_quantized_network(path: str | Path) -> tuple[QuantizedGraph, dict[str, Tensor]]:
    """Reads the graph and the tensors that ``write_quantized_network`` wrote.

    Args:
        path: A ``.safetensors`` file.

    Returns:
        The graph and its tensors, as ``tensor_shapes`` lists them.

    Raises:
        UserError: The file is missing, is cut short, or is no int8 network; the message begins with its path.

    Example::

        graph, tensors = read_quantized_network("network.safetensors")
        network = QuantizedNetwork(graph)
        load_quantized_tensors(network, tensors)
    """
    path = Path(path)
    if not is_quantized_file(path):
        raise UserError(f"{path}: the file of an int8 network ends in {SUFFIX}: {REMEDY}")
    if not path.is_file():
        raise UserError(f"{path}: there is no such file: {REMEDY}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # copies, lest a file that changes later change the network
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UserError(f"{path}: it is cut short or no safetensors file ({error}): {REMEDY}") from error
    graph = _graph(path, metadata)
    _check_tensors(path, graph, tensors)
    return graph, {name: tensors[name] for name in tensor_shapes(graph)}


def tensor_shapes(graph: QuantizedGraph) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of every tensor of an int8 network, in forward order.

    A layer has ``"<layer>.weight"`` in int8, ``"<layer>.bias"`` in int32, both of them integers with zero point 0, and
    ``"<layer>.weight_scales"`` in float32, one per output channel: the real weight is scale x integer, the real bias
    scale x scale of the input x integer. So has the classifier if its output is quantized; else its weight and bias
    are in float32.

    Example::

        tensor_shapes(graph)["first_conv.weight"]  # (torch.int8, (16, 3, 3, 3))
    """
    classifier = graph.classifier
    weights = {layer: convolution.weight_shape for layer, convolution in graph.convolutions()}
    linear = (classifier.classes, classifier.features)
    if classifier.output is not None:
        weights["classifier"] = linear
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for layer, shape in weights.items():
        shapes[f"{layer}.weight"] = (torch.int8, shape)
        shapes[f"{layer}.bias"] = (torch.int32, shape[:1])
        shapes[f"{layer}.weight_scales"] = (torch.float32, shape[:1])
    if classifier.output is None:
        shapes["classifier.weight"] = (torch.float32, linear)
        shapes["classifier.bias"] = (torch.float32, linear[:1])
    return shapes


def _with_sorted_header(content: bytes) -> bytes:
    """The same file with the keys of its header in order: safetensors writes those of the metadata in any."""
    end = HEADER_LENGTH + int.from_bytes(content[:HEADER_LENGTH], "little")
    header = json.dumps(json.loads(content[HEADER_LENGTH:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # as safetensors does, so that tensors begin at a multiple of 8
    return len(header).to_bytes(HEADER_LENGTH, "little") + header + content[end:]


def _graph(path: Path, metadata: Mapping[str, str]) -> QuantizedGraph:
    if metadata.get("format") != FORMAT or "graph" not in metadata:
        raise UserError(f"{path}: it is a safetensors file, but not of an int8 network of microtune: {REMEDY}")
    if metadata.get("version") != VERSION:
        raise UserError(
            f"{path}: it is of version {metadata.get('version')!r:.20}, and this microtune reads {VERSION!r}: "
            f"{REMEDY}, or update microtune"
        )
    try:
        return QuantizedGraph.from_json(metadata["graph"])
    except UserError as error:
        raise UserError(f"{path}: its graph is damaged: {error}: {REMEDY}") from error


def _check_tensors(path: Path, graph: QuantizedGraph, tensors: Mapping[str, Tensor]) -> None:
    shapes = tensor_shapes(graph)
    for name in (*shapes, *tensors):
        if name not in tensors or name not in shapes:
            what = "is missing" if name in shapes else "is not one of its graph's"
            raise UserError(f"{path}: tensor {name} {what}: {REMEDY}")
    for name, (dtype, shape) in shapes.items():
        tensor = tensors[name]
        if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            raise UserError(
                f"{path}: tensor {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, "
                f"where the graph says {dtype} of shape {shape}: {REMEDY}"
            )
        if dtype == torch.float32 and not tensor.isfinite().all():
            raise UserError(f"{path}: tensor {name} has values that are not finite: {REMEDY}")
        if name.endswith(".weight_scales") and not (tensor > 0).all():
            raise UserError(f"{path}: tensor {name} has a scale that is not positive: {REMEDY}")
