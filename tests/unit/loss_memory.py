"""Prints the peak bytes above baseline of a loss and its backward, in a fresh process: `ours` or `full` logits."""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from sft_dist.model.loss import ResponseHead

TOKENS, RESPONSES, HIDDEN, VOCABULARY = 4096, 1229, 256, 152_000


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    weight = nn.Parameter(torch.randn(VOCABULARY, HIDDEN) * 0.02)
    index = torch.randperm(TOKENS)[:RESPONSES].sort().values
    targets = torch.randint(VOCABULARY, (RESPONSES,))
    weights = torch.full((RESPONSES,), 1 / RESPONSES)
    warm_up = torch.randn(64, 64) @ torch.randn(64, 64)  # the matmul library's own buffers belong to the baseline
    gradient_bytes = weight.numel() * 4
    assert warm_up.isfinite().all()
    reset_peak()
    before = resident("VmRSS")
    if sys.argv[1] == "ours":
        ResponseHead(weight)(hidden.index_select(0, index), targets, weights).backward()
    else:
        labels = torch.full((TOKENS,), -100).scatter(0, index, targets)
        nn.functional.cross_entropy(hidden @ weight.T, labels).backward()
    print(resident("VmHWM") - before - gradient_bytes)


if __name__ == "__main__":
    main()
