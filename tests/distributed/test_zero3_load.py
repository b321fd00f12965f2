"""ZeRO-3 shards a model while it is read: no rank ever holds a full copy."""

from pathlib import Path

import yaml

from tests import tiny

SCRIPT = str(Path(__file__).with_name("zero3_load.py"))


def peak_bytes(path: Path, engine: str, tmp_path: Path) -> int:
    recipe = tmp_path / f"{engine}.yaml"
    raw = {
        "run": {"name": "r"},
        "model": {"path": str(path)},
        "data": {"train": "unused.jsonl"},
        "batch": {"examples": 8},
        "optim": {"lr": 1e-3},
        "train": {"engine": engine, "timeout_s": 60},
    }
    recipe.write_text(yaml.safe_dump(raw))
    # glibc keeps freed blocks below this size; the check is of what is alive at once.
    out = tiny.run_ranks([SCRIPT, str(recipe)], world_size=2, timeout_s=120, MALLOC_MMAP_THRESHOLD_="65536")
    return int(out.split("peak ")[1].split()[0])


def test_no_rank_holds_a_full_copy(tmp_path: Path) -> None:
    """Weights of 240 MiB in fp32, on disk in bf16, on two ranks: half of them each, and a layer's worth in flight."""
    path = tiny.write_model(
        tmp_path / "m", hidden_size=768, intermediate_size=3072, num_hidden_layers=7, head_dim=64, dtype="bfloat16"
    )
    size = 2 * (path / "model.safetensors").stat().st_size
    sharded, whole = peak_bytes(path, "zero3", tmp_path), peak_bytes(path, "zero2", tmp_path)
    print(f"\nweights {size >> 20} MiB; private peak while loading: zero3 {sharded >> 20}, zero2 {whole >> 20} MiB")
    assert size > 200 * 2**20
    assert whole > 0.9 * size, "the measure sees a full copy where there is one"
    assert sharded < 0.75 * size
