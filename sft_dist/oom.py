"""Out of memory, explained: which part grew, and the `pack_tokens` that would have fitted."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from sft_dist.data.batch import MicroBatch
from sft_dist.errors import OutOfMemoryError

_SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """True for Python's, torch's host allocator's and the device's ways of saying it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


@contextmanager
def explained_out_of_memory(*, packing: bool, longest_example: int, checkpointing: str) -> Iterator[None]:
    """Turn an allocation failure into an OutOfMemoryError that names the part and proposes a mend.

    longest_example: tokens of the longest kept example; `pack_tokens` cannot go below it.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        part, pack = _part_that_grew(frames), _tokens_of_pack(frames)
        if pack is None:
            mend = "spread it: a zero engine with more processes, or zero2_offload, zero3_offload"
        else:
            part += f" of a pack of {pack} tokens"
            mend = _smaller_pack(pack, longest_example, packing=packing, checkpointing=checkpointing)
        detail = str(error).splitlines()[0] if str(error) else "host memory"
        raise OutOfMemoryError(f"out of memory: {part} did not fit; {mend} ({detail})") from None


def _tokens_of_pack(frames: list[FrameType]) -> int | None:
    """Tokens of the micro-batch that was being computed; None where memory does not depend on it."""
    names = {frame.f_code.co_name for frame in frames}
    if names & {"load_model", "step"}:
        return None
    found = [frame.f_locals.get("micro") for frame in frames]
    micro = next((micro for micro in reversed(found) if isinstance(micro, MicroBatch)), None)
    return micro.input_ids.shape[1] if micro is not None else None


def _part_that_grew(frames: list[FrameType]) -> str:
    """The stack says what was being made: by function, then by the innermost of our files."""
    names = {frame.f_code.co_name for frame in frames}
    if "load_model" in names:
        return "the model's weights"
    if "step" in names:
        return "optimizer states"
    if "backward" in names:
        return "activations and gradients in the backward"
    files = [Path(frame.f_code.co_filename).name for frame in frames]
    if "loss.py" in files:
        return "a chunk of logits in the response head"
    if "attention.py" in files:
        return "activations in attention"
    return "activations" if _tokens_of_pack(frames) else "weights, gradients and optimizer states"


def _smaller_pack(tokens: int, longest_example: int, *, packing: bool, checkpointing: str) -> str:
    proposal = max(longest_example, tokens // 2)
    if packing and proposal < tokens:
        return f"set batch.pack_tokens={proposal}: the run gets slower, the loss curve does not change"
    shortest = f"packs are as short as the longest example ({longest_example} tokens)"
    if checkpointing != "full":
        return f"{shortest}; set model.checkpointing: full, or a smaller data.max_tokens"
    return f"{shortest}; use a zero engine with more processes, zero3_offload, or a smaller data.max_tokens"
