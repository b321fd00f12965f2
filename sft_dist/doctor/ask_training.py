"""`python -m sft_dist.doctor.ask_training [recipe.yaml key=value ...]`: attention that a run would get, as JSON.

Without a recipe: what `auto` gives. Attends over a pack of two documents with the backend that was chosen, and compares
with each document alone, so that a kernel that does not run on this GPU is found here.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PretrainedConfig

from sft_dist.config import Recipe, load_recipe
from sft_dist.engine.collectives import choose_device
from sft_dist.engine.start import zero_knobs
from sft_dist.errors import SftDistError
from sft_dist.model.attention import BACKENDS, Backend, choose_backend
from sft_dist.model.compile import choose_compile
from sft_dist.model.kernels import apply_kernels
from sft_dist.model.load import compute_dtype, read_config
from sft_dist.world import World

LENGTHS = (33, 15)
NUM_HEADS, HEAD_DIM = 4, 64


def main(words: Sequence[str]) -> dict[str, Any]:
    """The facts. error: why the run would be refused; None where it would not."""
    recipe = load_recipe(words[0], words[1:]) if words else None
    device = choose_device(World())
    dtype = compute_dtype(recipe.model.dtype if recipe else "auto", device)
    facts: dict[str, Any] = {"device": device.type, "dtype": str(dtype).removeprefix("torch."), "error": None}
    try:
        config = read_config(recipe.model) if recipe else None
        dropout = float(getattr(config, "attention_dropout", 0.0) or 0.0)
        facts["others"] = {name: backend.why_not(device, dtype, dropout) for name, backend in BACKENDS.items()}
        name = recipe.model.attention if recipe else "auto"
        backend = choose_backend(name, device=device, dtype=dtype, dropout=dropout)
        facts["attention"] = backend.name
        facts["difference"] = attention_error(backend, device=device, dtype=dtype)
        if recipe is not None and config is not None:
            facts["compiled"] = _compiles(recipe, config, backend, device)
            if recipe.train.engine.startswith("zero"):
                zero_knobs(recipe, recipe.train.engine)
    except SftDistError as error:
        facts["error"] = str(error)
    return facts


def _compiles(recipe: Recipe, config: PretrainedConfig, backend: Backend, device: torch.device) -> bool:
    """Whether decoder layers will be compiled. Raises BackendError where they, or Liger's kernels, cannot be had."""
    section = recipe.model
    apply_kernels(section.kernels, config, device)
    is_partitioned = recipe.train.engine.startswith("zero3")
    return choose_compile(
        section.compile,
        config,
        device=device,
        backend=backend,
        kernels=section.kernels,
        is_partitioned=is_partitioned,
    )


def attention_error(backend: Backend, *, device: torch.device, dtype: torch.dtype) -> float:
    """Largest difference of a pack of two documents to each document alone, in fp32 by torch's own attention."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, sum(LENGTHS), NUM_HEADS, HEAD_DIM)
    q, k, v = torch.randn(shape, generator=generator).to(device, dtype)
    bounds = torch.tensor([0, LENGTHS[0], sum(LENGTHS)], dtype=torch.int32, device=device)
    out = backend.attend(
        q,
        k,
        v,
        cu_seqlens=bounds,
        max_seqlen=max(LENGTHS),
        document_lengths=LENGTHS,
        scale=HEAD_DIM**-0.5,
        window=None,
        dropout=0.0,
    )
    alone = []
    for document in zip(q.split(LENGTHS), k.split(LENGTHS), v.split(LENGTHS), strict=True):
        dq, dk, dv = (x.float().transpose(0, 1) for x in document)
        alone.append(F.scaled_dot_product_attention(dq, dk, dv, is_causal=True).transpose(0, 1))
    return float((out.float() - torch.cat(alone)).abs().max())


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
