"""Out of memory, explained: which part grew, and the `pack_tokens` that would have fitted."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from sft_dist.data.batch import MicroBatch
from sft_dist.errors import OutOfMemoryError

# The innermost of our files on the stack says what was being made.
PARTS = {
    "loss.py": "a chunk of logits in the response head",
    "attention.py": "activations in attention",
    "local.py": "gradients and optimizer states",
    "zero.py": "gradients and optimizer states",
    "optim.py": "optimizer states",
}
_SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """True for Python's, torch's host allocator's and the device's ways of saying it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


@contextmanager
def explained_out_of_memory(*, pack_tokens: int, longest_example: int, checkpointing: str) -> Iterator[None]:
    """Turn an allocation failure into an OutOfMemoryError that names the part and proposes a mend.

    longest_example: tokens of the longest kept example; `pack_tokens` cannot go below it.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        micro = _innermost_micro_batch(frames)
        part = _part_that_grew(frames, micro)
        mend = _mend(micro.input_ids.shape[1] if micro else pack_tokens, longest_example, checkpointing)
        raise OutOfMemoryError(
            f"out of memory: {part} did not fit; {mend} ({str(error).splitlines()[0] if str(error) else 'host memory'})"
        ) from None


def _innermost_micro_batch(frames: list[FrameType]) -> MicroBatch | None:
    found = [frame.f_locals.get("micro") for frame in frames]
    return next((micro for micro in reversed(found) if isinstance(micro, MicroBatch)), None)


def _part_that_grew(frames: list[FrameType], micro: MicroBatch | None) -> str:
    functions = [
        (frame.f_code.co_filename.replace("\\", "/").rsplit("/", 1)[-1], frame.f_code.co_name) for frame in frames
    ]
    if any(name in ("load_model", "from_pretrained") for _, name in functions):
        return "the model's weights"
    pack = f" of a pack of {micro.input_ids.shape[1]} tokens" if micro is not None else ""
    if any(name == "backward" for _, name in functions):
        return f"activations and gradients in the backward{pack}"
    if any(name == "step" for _, name in functions):
        return "optimizer states"
    for file, _ in reversed(functions):
        if file in PARTS:
            return PARTS[file] + (pack if file in ("loss.py", "attention.py") else "")
    return f"activations{pack}" if pack else "weights, gradients and optimizer states"


def _mend(tokens: int, longest_example: int, checkpointing: str) -> str:
    proposal = max(longest_example, tokens // 2)
    if proposal < tokens:
        return f"set batch.pack_tokens={proposal} (now {tokens}): the run gets slower, the loss curve does not change"
    shortest = f"packs are as short as the longest example ({longest_example} tokens)"
    if checkpointing == "none":
        return f"{shortest}; set model.checkpointing: full, or a smaller data.max_tokens"
    return f"{shortest}; use a zero engine with more ranks, zero3_offload, or a smaller data.max_tokens"
