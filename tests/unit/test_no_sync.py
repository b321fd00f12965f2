"""From the first forward through the last backward, the host never waits for the device.

Proved without a GPU: tensors on torch's `meta` device have shapes and no values, so whatever reads one back (`.item()`,
`.tolist()`, `.cpu()`, `if tensor:`, a boolean mask, `nonzero`) fails. What would copy from host memory on the way is
found by watching each operation: on a GPU such a copy waits too, unless its source is pinned.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sft_dist.config import ModelSection, OptimSection
from sft_dist.data.batch import MicroBatch
from sft_dist.engine.local import LocalEngine
from sft_dist.model.attention import BACKENDS, Backend
from sft_dist.model.compile import CompiledLayers
from sft_dist.model.load import PackedModel, load_model
from sft_dist.optim import build_adamw
from sft_dist.world import World
from tests import tiny
from tests.unit.test_attention import documents, pack

CPU, DEVICE = torch.device("cpu"), torch.device("meta")
ROWS = documents(2, 40, 17, 90)


class _NoHostTensors(TorchDispatchMode):
    """Refuses operations that take host memory beside the device's. A lone number is a launch argument."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        host = [tuple(x.shape) for x in tensors if x.device.type == "cpu" and x.dim() > 0]
        if host and (is_device(kwargs) or any(x.device == DEVICE for x in tensors)):
            raise AssertionError(f"{func.name()} takes {host} from host memory")
        return func(*args, **(kwargs or {}))


class _NoHostNumbers(TorchFunctionMode):
    """Refuses tensors that are made of Python's numbers: they are made on the host, then copied."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and is_device(kwargs):
            raise AssertionError(f"{func.__name__} takes numbers from host memory")
        return func(*args, **(kwargs or {}))


def is_device(kwargs: dict[str, Any] | None) -> bool:
    device = (kwargs or {}).get("device")
    return device is not None and torch.device(device) == DEVICE


@contextlib.contextmanager
def no_host_data() -> Iterator[None]:
    with _NoHostNumbers(), _NoHostTensors():
        yield


def on_device(micro: MicroBatch) -> MicroBatch:
    tensors = {name: value.to(DEVICE) for name, value in vars(micro).items() if isinstance(value, Tensor)}
    return replace(micro, **tensors)


def start(path: Path, *, dtype: torch.dtype, world: World, backend: Backend, **section: Any) -> LocalEngine:
    loaded = load_model(
        ModelSection(path=str(path), **section),
        backend=backend,
        dtype=dtype,
        device=CPU,
        num_tokens=32,
        added_token_ids=[],
    )
    causal_lm = loaded.causal_lm.to(DEVICE)
    causal_lm.tie_weights()  # on its way to this device a weight becomes another object
    model = PackedModel(causal_lm)
    return LocalEngine(
        model,
        name="ddp" if world.size > 1 else "single",
        world=world,
        device=DEVICE,
        max_grad_norm=1.0,
        make_optimizer=functools.partial(build_adamw, optim=OptimSection(lr=1e-3)),
    )


def train_two_micro_batches(engine: LocalEngine) -> None:
    """What a step runs up to its one reduction."""
    micros = [on_device(pack(ROWS, 0, 1, 2)), on_device(pack(ROWS, 3))]
    with no_host_data():
        shares = []
        for index, micro in enumerate(micros):
            with engine.accumulate(is_last=index == 1):
                share = engine(micro)
                engine.backward(share)
            shares.append(share.detach().double())
        assert torch.stack(shares).sum().device == DEVICE
    assert all(master.grad is not None for master in engine._masters.values())


@pytest.mark.parametrize("world", [World(), World(rank=0, size=2)], ids=["single", "ddp"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_forward_and_backward_read_nothing_back(
    architecture: str, checkpointing: str, world: World, tmp_path: Path
) -> None:
    path = tiny.write_model(tmp_path, architecture=architecture)
    engine = start(path, dtype=torch.bfloat16, world=world, backend=BACKENDS["sdpa"], checkpointing=checkpointing)
    train_two_micro_batches(engine)


@pytest.mark.parametrize(
    "settings",
    [
        {"attention_dropout": 0.2},
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2},
        {"tied": False},
    ],
    ids=["dropout", "window", "untied"],
)
def test_nor_do_the_models_variants(settings: dict[str, Any], tmp_path: Path) -> None:
    path = tiny.write_model(tmp_path, **settings)
    train_two_micro_batches(start(path, dtype=torch.float32, world=World(), backend=BACKENDS["sdpa"]))


def test_torchs_varlen_attention_is_given_nothing_from_the_host(tied_model: Path) -> None:
    """The call that is made on a GPU, with the shapes that torch declares for its results."""
    engine = start(tied_model, dtype=torch.bfloat16, world=World(), backend=BACKENDS["torch_varlen"])
    train_two_micro_batches(engine)


def test_measuring_reads_nothing_back_either(tied_model: Path) -> None:
    engine = start(tied_model, dtype=torch.bfloat16, world=World(), backend=BACKENDS["sdpa"])
    engine.model.eval()
    micro = on_device(pack(ROWS, 0, 1))
    with torch.no_grad(), no_host_data():
        assert engine(micro).device == DEVICE


def longest_read_back(q: Tensor, *_: Tensor, cu_seqlens: Tensor, **__: Any) -> Tensor:
    return q * int(cu_seqlens.diff().max())


def padding_dropped_by_a_mask(q: Tensor, *_: Tensor, cu_seqlens: Tensor, **__: Any) -> Tensor:
    return q + q[q > 0].sum()


def stopped_when_not_finite(q: Tensor, *_: Tensor, **__: Any) -> Tensor:
    if not q.isfinite().all():
        raise ValueError
    return q


def table_from_the_host(q: Tensor, *_: Tensor, document_lengths: tuple[int, ...], **__: Any) -> Tensor:
    return q * torch.tensor(document_lengths, device=q.device).sum()


def table_moved_to_the_device(q: Tensor, *_: Tensor, document_lengths: tuple[int, ...], **__: Any) -> Tensor:
    return q * torch.tensor(document_lengths).to(q.device).sum()


@pytest.mark.parametrize(
    "attend",
    [
        longest_read_back,
        padding_dropped_by_a_mask,
        stopped_when_not_finite,
        table_from_the_host,
        table_moved_to_the_device,
    ],
)
def test_an_attention_that_waits_is_found(attend: Callable[..., Tensor], tied_model: Path) -> None:
    backend = replace(BACKENDS["sdpa"], attend=attend)
    engine = start(tied_model, dtype=torch.float32, world=World(), backend=backend)
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError), match=r"meta|host memory"):
        train_two_micro_batches(engine)


def test_compiled_layers_read_nothing_back(tied_model: Path) -> None:
    """Their bounds on the host are read on the host, by the one operation that stands for the loop over documents."""
    torch._dynamo.reset()
    engine = start(tied_model, dtype=torch.float32, world=World(), backend=BACKENDS["torch_varlen"])
    engine.model.compiled = CompiledLayers(engine.model.causal_lm, compiler="aot_eager")
    for micro in (pack(ROWS, 0, 1, 2), pack(ROWS, 3)):
        engine.backward(engine(on_device(micro)))
    assert len(engine.model.compiled.graphs) == 1
    torch._dynamo.reset()
