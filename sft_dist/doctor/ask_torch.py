"""`python -m sft_dist.doctor.ask_torch`: what torch says of itself and of the GPUs, as JSON."""

import json
from typing import Any

import torch


def facts() -> dict[str, Any]:
    """Versions, ABI and devices; why_not: why there is no GPU to compute on, None where there is."""
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cxx11_abi": torch.compiled_with_cxx11_abi(),
        "nccl": list(torch.cuda.nccl.version()) if torch.cuda.is_available() else None,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "distributed": torch.distributed.is_available(),
        "why_not": _why_no_gpu(),
        "archs": torch.cuda.get_arch_list(),
        "devices": [_device(index) for index in range(torch.cuda.device_count())],
    }


def _why_no_gpu() -> str | None:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # a build without CUDA, no driver, one that is too old
        return str(error).splitlines()[0]
    return None


def _device(index: int) -> dict[str, Any]:
    """error: why nothing can be computed there, as on one that another process has for itself."""
    try:
        free, total = torch.cuda.mem_get_info(index)
        torch.ones(8, device=torch.device("cuda", index)).sum().item()
    except RuntimeError as error:
        return {"error": str(error).splitlines()[0]}
    major, minor = torch.cuda.get_device_capability(index)
    name = torch.cuda.get_device_name(index)
    return {"name": name, "capability": [major, minor], "free": free, "total": total}


if __name__ == "__main__":
    print(json.dumps(facts()))
