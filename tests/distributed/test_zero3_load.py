"""ZeRO-3 shards a model while it is read: no rank ever holds a full copy."""

from pathlib import Path

import yaml

from tests import tiny

SCRIPT = str(Path(__file__).with_name("zero3_load.py"))


def peak_bytes(path: Path, tmp_path: Path) -> dict[str, int]:
    """Peak private bytes of rank 0 while it loads the model, by engine, on two ranks."""
    recipe = tmp_path / "recipe.yaml"
    raw = {
        "run": {"name": "r"},
        "model": {"path": str(path)},
        "data": {"train": "unused.jsonl"},
        "batch": {"examples": 8},
        "optim": {"lr": 1e-3},
        "train": {"timeout_s": 60},
    }
    recipe.write_text(yaml.safe_dump(raw))
    # glibc keeps freed blocks below this size; the check is of what is alive at once.
    out = tiny.run_ranks(
        [SCRIPT, str(recipe), "zero3", "zero2"], world_size=2, timeout_s=120, MALLOC_MMAP_THRESHOLD_="65536"
    )
    words = [line.split() for line in out.splitlines()]
    return {line[0]: int(line[1]) for line in words if line and line[0] in ("zero2", "zero3")}


def test_no_rank_holds_a_full_copy(tmp_path: Path) -> None:
    """Weights of 150 MiB in fp32, on disk in bf16, on two ranks: half of them each, and a layer's worth in flight."""
    path = tiny.write_model(
        tmp_path / "m", hidden_size=768, intermediate_size=3072, num_hidden_layers=5, head_dim=64, dtype="bfloat16"
    )
    size = 2 * (path / "model.safetensors").stat().st_size
    peaks = peak_bytes(path, tmp_path)
    print(f"\nweights {size >> 20} MiB; private peaks while loading: {peaks}")
    assert size > 140 * 2**20
    assert peaks["zero2"] > 0.9 * size, "the measure sees a full copy where there is one"
    assert peaks["zero3"] < 0.75 * size
