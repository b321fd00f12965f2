"""Compiled decoder layers: one graph that all layers share, for packs of any size and any number of documents.

A layer is compiled whole, with attention as one operation in it and, where activations are recomputed, with the
recomputation in it too. What stays outside, embedding, rotary angles and response head, is a few large kernels.

Sizes that differ from pack to pack are symbols of the graph from the start: T, S and the rounded longest document.
So a run needs one graph for training and one for measuring, per kind of layer.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from shutil import which
from typing import Any

import torch
import torch._dynamo
import torch.fx.experimental._config
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel

from sft_dist.errors import BackendError
from sft_dist.model.attention import Backend
from sft_dist.model.last_layer import is_trimmed

logger = logging.getLogger(__name__)

MAX_GRAPHS = 4
"""Training and measuring, for a model with layers of two kinds (whole and windowed attention)."""


class CompiledLayers:
    """Compiles the decoder layers of a model and counts their graphs. `graphs`: what each was made for, in words."""

    def __init__(self, causal_lm: PreTrainedModel, *, compiler: str = "inductor") -> None:
        self.graphs: list[str] = []
        self._compile: Callable[[torch.fx.GraphModule, list[Tensor]], Any] = torch._dynamo.lookup_backend(compiler)
        compile_graph = self._compile_graph  # one object: layers share graphs when their backend is the same
        layers = decoder_layers(causal_lm)
        # A trimmed last layer would need graphs of its own, for one layer of dozens.
        for layer in layers[:-1] if is_trimmed(causal_lm) else layers:
            layer.compile(fullgraph=True, dynamic=True, backend=compile_graph)

    @contextlib.contextmanager
    def stable_shapes(self) -> Iterator[None]:
        """Spans calls of the layers: what the first pack happens to have in common is no property of the graph.

        By default a tracer takes two sizes that are equal once (T and the longest document of a pack that is one
        document) for the same size, and makes inputs of constants such as the norm's epsilon.
        """
        with (
            torch.fx.experimental._config.patch(use_duck_shape=False),  # type: ignore[attr-defined]
            torch._dynamo.config.patch(specialize_float=True),
        ):
            yield

    def _compile_graph(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs.append(_description(graph))
        if len(self.graphs) == MAX_GRAPHS + 1:
            listed = "\n".join(f"  {number}: {text}" for number, text in enumerate(self.graphs, 1))
            logger.warning(
                "compile: %d graphs of the decoder layers, %d are enough; something varies that should not, and each "
                "costs as long as the first. Their inputs, varying sizes by letter:\n%s\n"
                "TORCH_LOGS=recompiles names the reason; model.compile: off does without",
                *(len(self.graphs), MAX_GRAPHS, listed),
            )
        return self._compile(graph, inputs)


def choose_compile(
    name: str, config: PretrainedConfig, *, device: torch.device, backend: Backend, kernels: str, is_partitioned: bool
) -> bool:
    """Whether to compile, for `model.compile`; the choice of `auto` is logged with its reason.

    kernels: `model.kernels`. is_partitioned: ZeRO-3 holds the weights.
    Raises BackendError when it was asked for and cannot be.
    """
    dropout = float(getattr(config, "attention_dropout", 0.0) or 0.0)
    reason = _why_not(device, backend=backend, dropout=dropout, kernels=kernels, is_partitioned=is_partitioned)
    if name == "on" and reason is not None:
        raise BackendError(f"model.compile='on' cannot be: {reason}; use model.compile: auto")
    if name != "auto":
        return name == "on"
    if reason is None and device.type == "cpu":
        reason = "on a CPU it is off unless it is asked for"
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if reason is None and not getattr(model_class, "_can_compile_fullgraph", False):
        reason = f"transformers does not say of {config.model_type!r} that it can be traced whole"
    logger.info("compile: auto chose %s", "on" if reason is None else f"off: {reason}")
    return reason is None


def decoder_layers(causal_lm: PreTrainedModel) -> list[nn.Module]:
    """The layers of the model's body. Raises BackendError for a model that has none under `layers`."""
    layers = getattr(causal_lm.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not layers:
        raise BackendError(
            f"{type(causal_lm).__name__} keeps its decoder layers elsewhere than in `layers`, so they cannot be "
            "compiled one by one; use model.compile: off"
        )
    return list(layers)


def _why_not(
    device: torch.device, *, backend: Backend, dropout: float, kernels: str, is_partitioned: bool
) -> str | None:
    if is_partitioned:
        return "ZeRO-3 gathers and releases weights around each module, which a graph cannot hold"
    if kernels != "torch":
        return f"model.kernels={kernels!r} are chosen instead of those that it would make"
    if not backend.can_be_traced:
        return f"attention {backend.name} cannot be traced into a graph"
    if backend.name == "sdpa" and dropout:
        return f"attention sdpa has no dropout in a graph, and the model's config asks for attention_dropout={dropout}"
    return _why_no_compiler(device)


def _why_no_compiler(device: torch.device) -> str | None:
    """Triton compiles a launcher in C for each kernel; on a CPU the kernels themselves are C++."""
    if device.type == "cuda" and find_spec("triton") is None:
        return "the package triton, which makes the kernels, is not installed"
    variable, names = ("CC", ("cc", "gcc", "clang")) if device.type == "cuda" else ("CXX", ("c++", "g++", "clang++"))
    found = [name for name in (os.environ.get(variable), *names) if name and which(name)]
    return None if found else f"no compiler was found ({', '.join(names)}, or ${variable})"


def _description(graph: torch.fx.GraphModule) -> str:
    """The inputs that a graph was made for, without weights."""
    values = [node.meta.get("example_value") for node in graph.graph.find_nodes(op="placeholder")]
    shapes = [
        f"{str(value.dtype).removeprefix('torch.')}[{','.join(str(size) for size in value.shape)}]"
        for value in values
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
    ]
    return f"{'training' if torch.is_grad_enabled() else 'measuring'} {' '.join(shapes)}"
