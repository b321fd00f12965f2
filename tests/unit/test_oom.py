"""Out of memory says which part grew and which pack_tokens would have fitted."""

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sft_dist.errors import OutOfMemoryError
from sft_dist.oom import explained_out_of_memory
from tests import tiny
from tests.unit.test_attention import documents, load, pack


def explain(longest_example: int = 100, checkpointing: str = "none", packing: bool = True) -> object:
    return explained_out_of_memory(packing=packing, longest_example=longest_example, checkpointing=checkpointing)


@pytest.fixture
def out_of_memory(tied_model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], object]:
    """A forward on a pack of 600 tokens whose attention cannot be allocated."""
    model, micro = load(tied_model), pack(documents(300, 200, 100), 0, 1, 2)

    def too_large(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", too_large)
    return lambda: model(micro)


def test_a_failed_forward_names_the_pack_and_proposes_half(out_of_memory: Callable[[], object]) -> None:
    proposal = r"activations in attention of a pack of 600 tokens .*set batch\.pack_tokens=300: .*does not change"
    with pytest.raises(OutOfMemoryError, match=proposal), explain():
        out_of_memory()


def test_packs_that_cannot_shrink_get_another_mend(out_of_memory: Callable[[], object]) -> None:
    with pytest.raises(OutOfMemoryError, match="checkpointing: full"), explain(longest_example=600):
        out_of_memory()
    with pytest.raises(OutOfMemoryError, match="checkpointing: full"), explain(packing=False):
        out_of_memory()
    with pytest.raises(OutOfMemoryError, match="zero3_offload"), explain(longest_example=600, checkpointing="full"):
        out_of_memory()


def test_states_that_do_not_fit_are_not_blamed_on_the_pack() -> None:
    def step() -> None:
        micro = pack(documents(300), 0)
        raise MemoryError(f"no room for moments, after a pack of {micro.max_seqlen}")

    with pytest.raises(OutOfMemoryError, match="optimizer states did not fit; spread it: a zero engine"), explain():
        step()


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
