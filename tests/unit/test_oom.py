"""Out of memory says which part grew and which pack_tokens would have fitted."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sft_dist.errors import OutOfMemoryError
from sft_dist.oom import explained_out_of_memory
from tests import tiny
from tests.unit.test_attention import documents, load, pack


def explain(longest_example: int = 100, checkpointing: str = "none") -> object:
    return explained_out_of_memory(pack_tokens=4096, longest_example=longest_example, checkpointing=checkpointing)


def test_a_failed_forward_names_the_pack_and_proposes_half(tied_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tied_model)
    micro = pack(documents(300, 200, 100), 0, 1, 2)

    def too_large(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", too_large)
    with (
        pytest.raises(
            OutOfMemoryError,
            match=r"activations in attention of a pack of 600 tokens .*pack_tokens=300 \(now 600\).*does not change",
        ),
        explain(),
    ):
        model(micro)


def test_packs_that_cannot_shrink_get_another_mend() -> None:
    with pytest.raises(OutOfMemoryError, match="checkpointing: full"), explain(longest_example=4096):
        raise MemoryError
    with pytest.raises(OutOfMemoryError, match="zero3_offload"), explain(longest_example=4096, checkpointing="full"):
        raise MemoryError


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(RuntimeError, match="shapes"), explain():
        raise RuntimeError("shapes do not match")


def test_a_real_allocation_failure_on_the_host(tmp_path: Path) -> None:
    """A process that may not have the memory: exit code 3, one line, no traceback."""
    tiny.write_model(tmp_path / "m", hidden_size=256, intermediate_size=4096)
    tiny.write_chats(tmp_path / "d.jsonl", num_examples=400, seed=0, longest=900)
    (tmp_path / "r.yaml").write_text(
        f"run: {{name: a, dir: {tmp_path}/runs}}\nmodel: {{path: {tmp_path}/m}}\ndata: {{train: {tmp_path}/d.jsonl}}\n"
        "batch: {examples: 400, pack_tokens: 1000000}\noptim: {lr: 1e-3}\ntrain: {steps: 2}\n"
    )
    root = Path(__file__).parents[2]
    code = (
        "import resource, sys; from sft_dist import train, cli; import torch; torch.set_num_threads(1); "
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096; "
        "resource.setrlimit(resource.RLIMIT_AS, (used + 1200 * 2**20,) * 2); "
        f"sys.exit(cli.main(['train', '{tmp_path}/r.yaml']))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert result.returncode == 3, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    assert "error: out of memory: " in result.stderr
    assert "set batch.pack_tokens=" in result.stderr
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY, "only the child was limited"
