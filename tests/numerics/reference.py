"""The slow, obvious trainer: one document a forward, full logits, the loss formula written out.

Of the product it uses nothing but the example ids of each step. Rendering, mask, shift, weights, learning rate,
clipping and AdamW are its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests.tiny import ASSISTANT, STOP, USER, WORDS

IDS = {text: index for index, text in enumerate([*WORDS, " ", "?", USER, ASSISTANT, STOP])}
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


@dataclass
class Curve:
    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, Tensor]


def tokens_of(prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """(prompt ids, answer ids) of `<|u|>prompt<|a|>answer<|e|>`; the answer's end with the stop token."""
    asked = [IDS[USER], *(IDS[letter] for letter in prompt)] if prompt else []
    return [*asked, IDS[ASSISTANT]], [*(IDS[letter] for letter in answer), IDS[STOP]]


def load(model_dir: Path, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation="eager").train()


def step_loss(model: torch.nn.Module, batch: Sequence[tuple[str, str]], loss: str) -> float:
    """-1/N sum_i 1/|y_i| sum_t log P(y_t | x, y_<t), or -1/sum|y_i| sum_i sum_t log P. Adds gradients up in `.grad`."""
    total_response = sum(len(tokens_of(*pair)[1]) for pair in batch)
    value = 0.0
    for pair in batch:
        x, y = tokens_of(*pair)
        log_p = model(input_ids=torch.tensor([x + y]), use_cache=False).logits[0].log_softmax(-1)
        summed = sum(log_p[len(x) + t - 1, y[t]] for t in range(len(y)))
        share = -summed / (len(batch) * len(y)) if loss == "example_mean" else -summed / total_response
        share.backward()
        value += share.item()
    return value


def train(
    model_dir: Path,
    steps: Sequence[Sequence[tuple[str, str]]],
    *,
    loss: str,
    peak_lr: float,
    warmup: int,
    max_norm: float,
    decay: float,
) -> Curve:
    """AdamW with decoupled decay on matrices, written out.

    lr(s) = peak * s / (W + 1) for the W warm-up steps, then peak * (1 + cos(pi * (s - W - 1) / (S - W))) / 2.
    """
    model = load(model_dir, torch.float32)
    parameters = dict(model.named_parameters())
    first = {name: torch.zeros_like(p) for name, p in parameters.items()}
    second = {name: torch.zeros_like(p) for name, p in parameters.items()}
    curve = Curve([], [], {})
    for s, batch in enumerate(steps, start=1):
        model.zero_grad()
        curve.losses.append(step_loss(model, batch, loss))
        norm = math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in parameters.values()))
        curve.grad_norms.append(norm)
        cosine = (1 + math.cos(math.pi * (s - warmup - 1) / (len(steps) - warmup))) / 2
        lr = peak_lr * (s / (warmup + 1) if s <= warmup else cosine)
        with torch.no_grad():
            for name, p in parameters.items():
                g = p.grad * min(1.0, max_norm / (norm + 1e-6))
                if p.ndim >= 2:
                    p.mul_(1 - lr * decay)
                first[name].mul_(BETA1).add_(g, alpha=1 - BETA1)
                second[name].mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
                m_hat, v_hat = first[name] / (1 - BETA1**s), second[name] / (1 - BETA2**s)
                p.sub_(lr * m_hat / (v_hat.sqrt() + EPS))
    curve.weights = {name: p.detach().clone() for name, p in parameters.items()}
    return curve


def gradient_fp64(model_dir: Path, batch: Sequence[tuple[str, str]], *, loss: str) -> dict[str, Tensor]:
    """The gradient of one step in double precision."""
    model = load(model_dir, torch.float64)
    step_loss(model, batch, loss)
    return {name: p.grad.clone() for name, p in model.named_parameters()}
