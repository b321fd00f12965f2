"""The state of training in pieces that any layout can be put together from.

A *fragment* is a run of consecutive elements of one parameter, flattened, with its fp32 master weight and AdamW's two
moments. A ZeRO rank holds the fragments of its shard; a DDP rank holds everything and writes its share of it:

    model.embed_tokens.weight   |------- rank 0 -------|------- rank 1 -------|     as written by two ranks
                                |-- rank 0 --|-- rank 1 --|-- rank 2 --|-- 3 --|     as read by four

Files are safetensors with the keys kind/start/name. Nothing is gathered: memory grows by one block while reading.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from sft_dist.errors import CheckpointError

KINDS = ("master", "exp_avg", "exp_avg_sq")
BLOCK_ELEMENTS = 8 * 2**20
"""Elements read at a time: 32 MiB."""
SNAPSHOT_ELEMENTS = 64 * 2**20
"""Elements of a block of host memory: 256 MiB. torch rounds pinned memory up to a power of two: this is one."""


@dataclass(frozen=True)
class Fragment:
    """Elements start..start+n of a flattened parameter. tensors: by kind, `[n]` fp32, views of what is trained."""

    name: str
    start: int
    tensors: Mapping[str, Tensor]

    @property
    def numel(self) -> int:
        return self.tensors["master"].numel()


def share_of(fragments: Sequence[Fragment], *, rank: int, world_size: int) -> list[Fragment]:
    """The part of replicated state that this rank writes: consecutive, equal to one element. Views."""
    total = sum(fragment.numel for fragment in fragments)
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    share, offset = [], 0
    for fragment in fragments:
        begin, end = max(first - offset, 0), min(last - offset, fragment.numel)
        if begin < end:
            cut = {kind: tensor[begin:end] for kind, tensor in fragment.tensors.items()}
            share.append(Fragment(fragment.name, fragment.start + begin, cut))
        offset += fragment.numel
    return share


class Snapshot:
    """Copies fragments into host memory that is kept for the next save: one copy of this rank's share, no more."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[str, int], Tensor] = {}

    def of(self, fragments: Sequence[Fragment]) -> list[Fragment]:
        """The fragments as they are now, cut where a block of host memory ends. Overwrites the snapshot before."""
        copies = []
        total, offset = sum(fragment.numel for fragment in fragments), 0
        for fragment in fragments:
            begin = 0
            while begin < fragment.numel:
                block, at = divmod(offset, SNAPSHOT_ELEMENTS)
                numel = min(fragment.numel - begin, SNAPSHOT_ELEMENTS - at)
                size = min(SNAPSHOT_ELEMENTS, total - block * SNAPSHOT_ELEMENTS)
                tensors = {
                    kind: self._block(kind, block, size, tensor)[at : at + numel].copy_(
                        tensor[begin : begin + numel], non_blocking=True
                    )
                    for kind, tensor in fragment.tensors.items()
                }
                copies.append(Fragment(fragment.name, fragment.start + begin, tensors))
                begin, offset = begin + numel, offset + numel
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def _block(self, kind: str, index: int, size: int, like: Tensor) -> Tensor:
        if (kind, index) not in self._blocks:
            pinned = like.device.type == "cuda"
            self._blocks[kind, index] = torch.empty(size, dtype=like.dtype, pin_memory=pinned)
        return self._blocks[kind, index]


def write_fragments(fragments: Sequence[Fragment], file: Path) -> None:
    """Write a rank's fragments. Raises OSError or SafetensorError when the disk does not take them."""
    tensors = {
        f"{kind}/{fragment.start}/{fragment.name}": tensor.cpu()
        for fragment in fragments
        for kind, tensor in fragment.tensors.items()
    }
    safetensors.torch.save_file(tensors, file)


@torch.no_grad()
def read_fragments(fragments: Sequence[Fragment], files: Sequence[Path]) -> None:
    """Fill fragments from whatever pieces the files hold, whoever wrote them.

    Raises CheckpointError naming a weight or a moment that is missing, in whole or in part.
    """
    try:
        pieces = Pieces(files)
        for fragment in fragments:
            for kind, target in fragment.tensors.items():
                pieces.read_into(target, kind=kind, name=fragment.name, start=fragment.start)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{files[0].parent if files else ''}: cannot be read: {error}") from None


@dataclass(frozen=True)
class _Piece:
    start: int
    numel: int
    file: Path
    key: str


class Pieces:
    """Which file holds which elements. Raises OSError, SafetensorError or ValueError for files that hold no pieces."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._found: dict[tuple[str, str], list[_Piece]] = {}
        for file in files:
            with safetensors.safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118, a file is no dict
                    kind, start, name = key.split("/", 2)
                    (numel,) = opened.get_slice(key).get_shape()
                    self._found.setdefault((kind, name), []).append(_Piece(int(start), numel, file, key))
        for pieces in self._found.values():
            pieces.sort(key=lambda piece: piece.start)

    def read_into(self, target: Tensor, *, kind: str, name: str, start: int) -> None:
        """Copy elements start..start+n into `target`, `[n]`, a block at a time. Raises CheckpointError for a gap."""
        done = start
        for piece, first, last in self._overlaps(kind, name, start, start + target.numel()):
            if first > done:
                break
            with safetensors.safe_open(piece.file, framework="pt") as opened:
                stored = opened.get_slice(piece.key)
                while done < last:
                    end = min(done + BLOCK_ELEMENTS, last)
                    target[done - start : end - start].copy_(stored[done - piece.start : end - piece.start])
                    done = end
        if done < start + target.numel():
            raise CheckpointError(
                f"{kind} of {name}: elements {done} to {start + target.numel()} are in no file of the checkpoint"
            )

    def _overlaps(self, kind: str, name: str, start: int, end: int) -> Iterator[tuple[_Piece, int, int]]:
        for piece in self._found.get((kind, name), ()):
            first, last = max(piece.start, start), min(piece.start + piece.numel, end)
            if first < last:
                yield piece, first, last


def adamw_state(optimizer: torch.optim.Optimizer, weight: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a weight, made as AdamW makes it if there was no update yet."""
    state: dict[str, Tensor] = optimizer.state[weight]
    if not state:
        on_device = optimizer.defaults.get("fused")
        state["step"] = torch.zeros((), device=weight.device if on_device else "cpu")
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight.data), torch.zeros_like(weight.data)
    return state


def require_shapes(found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]) -> None:
    """Raise CheckpointError when the checkpoint is of another model, naming the first weight that differs."""
    for name in [*expected, *found]:
        then, now = found.get(name), expected.get(name)
        if then is None or now is None or list(then) != list(now):
            raise CheckpointError(
                f"weight {name}: {then and list(then)} in the checkpoint, {now and list(now)} in the model"
            )
