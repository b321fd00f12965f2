"""`python -m sft_dist.doctor.smoke_inputs DIRECTORY`: data, a tokenizer, a tiny model and a recipe of three steps."""

import sys
from pathlib import Path

import yaml

from sft_dist.demo.dataset import example_texts, generate_examples, write_demo_data
from sft_dist.demo.model import build_model, build_tokenizer
from sft_dist.doctor.trial import NUM_STEPS

NUM_EXAMPLES = 60
SEED = 0


def main(directory: Path) -> None:
    """Everything lies in `directory`, and the run will too."""
    files = write_demo_data(directory / "data", num_train=NUM_EXAMPLES, num_held_out=6, seed=SEED)
    texts = example_texts(generate_examples(NUM_EXAMPLES, SEED, "train"))
    model = build_tokenizer(texts, directory / "model", vocab_size=300)
    build_model(model, model, hidden_size=64, intermediate_size=128, num_heads=4, num_kv_heads=2, seed=SEED)
    recipe = {
        "run": {"name": "smoke", "dir": str(directory / "runs")},
        "model": {"path": str(model)},
        "data": {"train": [str(file) for file in files.train], "max_tokens": 512, "workers": 1},
        "batch": {"examples": 8, "pack_tokens": 2048},
        "optim": {"lr": 1e-3},
        "train": {"steps": NUM_STEPS},
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
