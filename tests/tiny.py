"""Tiny tokenizers, models and data sets, and processes to run them on. Built in code, no network."""

import contextlib
import json
import os
import socket
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sft_dist import package_files

USER, ASSISTANT, STOP = "<|u|>", "<|a|>", "<|e|>"
WORDS = list(string.ascii_lowercase)
# Markers cost one token each, so that a short example is short: "<|u|>x<|a|>y<|e|>" is 5 tokens.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|a|>{{ m.content }}<|e|>"
    "{% else %}<|u|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|a|>{% endif %}"
)


def write_tokenizer(directory: Path) -> Path:
    """One token per letter and three control tokens: token counts are letter counts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {text: index for index, text in enumerate([*WORDS, " ", "?", USER, ASSISTANT, STOP])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.add_special_tokens([USER, ASSISTANT, STOP])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": STOP,
        "pad_token": USER,
        "chat_template": TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def write_model(directory: Path, *, tied: bool = True, architecture: str = "qwen2", **overrides: Any) -> Path:
    """A random model of two layers, fp32, with the letter tokenizer beside it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    write_tokenizer(directory)
    settings = {
        "vocab_size": 32,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": tied,
        "dtype": "float32",
    } | overrides
    config = AutoConfig.for_model(architecture, **settings)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def write_speller(directory: Path, follows: Mapping[str, str], **overrides: Any) -> Path:
    """A model that knows one thing: which token follows which. Its layers add nothing to the embedding, a unit vector
    per token, and the head has that vector in the row of the token that follows."""
    from safetensors.torch import load_file, save_file

    write_model(directory, tied=False, **overrides)
    ids = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    file = directory / "model.safetensors"
    weights = load_file(file)
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")) or "embed" in name or "lm_head" in name:
            weight.zero_()
    for token, after in follows.items():
        weights["model.embed_tokens.weight"][ids[token], ids[token]] = 1
        weights["lm_head.weight"][ids[after], ids[token]] = 1
    save_file(weights, file, metadata={"format": "pt"})
    return directory


def write_chats(path: Path, *, num_examples: int, seed: int, longest: int = 1000) -> list[tuple[str, str]]:
    """Single turns of letters that follow a learnable rule: lengths 3 to `longest`, answers from 1 letter to hundreds.

    Returns the (prompt, answer) pairs in file order.
    """
    rng = np.random.default_rng(seed)
    pairs = [("", "q"), ("ab", "c" * min(300, longest // 2)), ("x" * (longest - 8), "y")]
    while len(pairs) < num_examples:
        # Most examples are short; the tail is long.
        length, share = int(np.clip(rng.lognormal(3.2, 1.1), 3, longest // 2)), rng.uniform(0.05, 0.9)
        start, stride = rng.integers(0, 26), rng.integers(1, 4)
        letters = "".join(WORDS[(start + stride * i) % 26] for i in range(length))
        cut = max(1, min(length - 1, int(length * (1 - share))))
        pairs.append((letters[:cut], letters[cut:]))
    order = rng.permutation(num_examples)
    pairs = [pairs[i] for i in order]
    turns = [[("user", prompt)] * bool(prompt) + [("assistant", answer)] for prompt, answer in pairs]
    rows = [{"messages": [{"role": role, "content": content} for role, content in row]} for row in turns]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return pairs


def write_recipe(
    directory: Path, model: Path | str, *, name: str = "r", num_examples: int = 40, **sections: dict[str, Any]
) -> Path:
    """<name>.yaml of three steps over chats beside it, made if need be. sections: merged over what it says."""
    chats = directory / "train.jsonl"
    if not chats.exists():
        write_chats(chats, num_examples=num_examples, seed=0, longest=60)
    recipe: dict[str, dict[str, Any]] = {
        "run": {"name": name, "dir": str(directory / "runs"), "report": False},  # which takes seconds
        "model": {"path": str(model)},
        "data": {"train": str(chats), "max_tokens": 128},
        "batch": {"examples": 8},
        "optim": {"lr": 1e-3},
        "train": {"steps": 3},
    }
    merged = {key: values | sections.pop(key, {}) for key, values in recipe.items()} | sections
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(merged))
    return path


def write_zero_file(directory: Path, engine: str) -> Path:
    """The shipped file, with buffers for a tiny model and, under ZeRO-3, nothing too small to be sharded."""
    knobs = json.loads(package_files.find(f"deepspeed/{engine}.json").read_text())
    knobs["zero_optimization"]["reduce_bucket_size"] = 10**6
    if engine.startswith("zero3"):
        knobs["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = directory / f"{engine}.json"
    path.write_text(json.dumps(knobs))
    return path


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_ranks(command: Sequence[str], *, world_size: int, timeout_s: float, **environ: str) -> str:
    """Run the command once per rank and return rank 0's output. Raises AssertionError with all output on failure."""
    root = Path(__file__).resolve().parent.parent
    shared = os.environ | {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(root),
        **environ,
    }
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(world_size)]
        ranks = [
            subprocess.Popen(
                [sys.executable, *command],
                env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            for rank, log in enumerate(logs)
        ]
        failed = _wait_for_all(ranks, timeout_s)
        outputs = []
        for log in logs:
            log.seek(0)
            outputs.append(log.read())
    assert not failed, f"ranks {failed} failed or ran over {timeout_s:g} s:\n" + "\n".join(o[-6000:] for o in outputs)
    return outputs[0]


def _wait_for_all(ranks: list["subprocess.Popen[bytes]"], timeout_s: float) -> list[int]:
    """Ranks that failed or took too long. One that failed leaves the others waiting in a collective: they are ended."""
    deadline = time.monotonic() + timeout_s
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        if any(rank.poll() for rank in ranks):
            time.sleep(1)
            break
        time.sleep(0.05)
    failed = [index for index, rank in enumerate(ranks) if rank.poll() != 0]
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
        rank.wait(timeout=30)
    return failed
