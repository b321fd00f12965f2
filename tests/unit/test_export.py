"""An export is what `save_pretrained` writes of the same model, at the end of a run and from its checkpoints."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from sft_dist import cli
from sft_dist.config import load_recipe
from sft_dist.data.chat import ChatTokenizer
from sft_dist.model.export import write_export
from sft_dist.model.load import grow_vocabulary
from sft_dist.train import run
from tests import tiny

SECRET = "hf_" + "s" * 34
MODELS = ["qwen2", "qwen3", "llama", "base"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three steps each, a checkpoint after every one. `base` has no template and gets the tokens of ChatML."""
    found = {}
    for name in MODELS:
        directory = tmp_path_factory.mktemp(name)
        model = tiny.write_model(
            directory / "start", architecture={"base": "qwen2"}.get(name, name), tied=name in ("qwen2", "base")
        )
        if name == "base":
            config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|e|>", "pad_token": "<|u|>"}
            (model / "tokenizer_config.json").write_text(json.dumps(config))
        (model / "README.md").write_text("---\nlicense: mit\n---\nhf_" + "x" * 30)
        recipe = tiny.write_recipe(
            directory,
            model,
            name="clinic",
            num_examples=24,
            train={"save_every": 1, "keep_checkpoints": 3, "eval_every": 3},
            data={"held_out_share": 0.2, "max_tokens": 50},
        )
        assert run(load_recipe(recipe), console=Console(quiet=True)).finished
        found[name] = directory / "runs" / "clinic"
    return found


def export(*arguments: object) -> Path:
    """Run the verb; the directory that it names."""
    words = [str(word) for word in arguments]
    assert cli.main(["export", *words]) == 0
    return Path(words[0])


def files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def tensors(directory: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Key -> dtype and shape over all weight files, from their headers."""
    found = {}
    for file in directory.glob("*.safetensors"):
        with safetensors.safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            for key in opened.keys():  # noqa: SIM118, a file is no dict
                found[key] = (opened.get_slice(key).get_dtype(), tuple(opened.get_slice(key).get_shape()))
    return found


def reference(run_dir: Path, directory: Path, **settings: Any) -> Path:
    """The model that training began with, saved by transformers with the tokenizer of training."""
    start = run_dir.parents[1] / "start"
    ChatTokenizer.load(start).save(directory / "trained")
    tokenizer = AutoTokenizer.from_pretrained(directory / "trained")
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    grow_vocabulary(model, num_tokens=len(tokenizer), added_token_ids=[])
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    stops = [tokenizer.eos_token_id, model.generation_config.eos_token_id]
    model.generation_config.eos_token_id = [stop for stop in dict.fromkeys(stops) if stop is not None]
    model.save_pretrained(directory / "saved", **settings)
    tokenizer.save_pretrained(directory / "saved")
    return directory / "saved"


@pytest.mark.parametrize("name", MODELS)
def test_an_export_has_the_files_keys_shapes_and_dtypes_of_save_pretrained(
    name: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    ours, theirs = runs[name] / "model", reference(runs[name], tmp_path)
    assert sorted(files(ours)) == sorted([*files(theirs), "README.md"])
    assert tensors(ours) == tensors(theirs)
    assert ("lm_head.weight" in tensors(ours)) == (name in ("qwen3", "llama"))
    for file in ("config.json", "generation_config.json"):
        assert (ours / file).read_text() == (theirs / file).read_text(), file
    mine, other = (AutoTokenizer.from_pretrained(directory) for directory in (ours, theirs))
    assert mine.get_vocab() == other.get_vocab()
    assert mine.special_tokens_map == other.special_tokens_map
    assert mine.chat_template == other.chat_template


@pytest.mark.parametrize("name", MODELS)
def test_what_a_checkpoint_exports_is_byte_for_byte_what_the_end_of_the_run_did(
    name: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    export(runs[name], "--checkpoint", 3, "--output", tmp_path / "again")
    assert files(tmp_path / "again") == files(runs[name] / "model")


def test_shards_and_their_index_are_those_of_save_pretrained(runs: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(runs["llama"] / "model", dtype=torch.float32)
    tokenizer = ChatTokenizer.load(runs["llama"] / "model")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    write_export(model, tmp_path / "ours", tokenizer=tokenizer, card="", shard_size="100KB")
    ours, theirs = files(tmp_path / "ours"), files(tmp_path / "theirs")
    assert len([file for file in ours if file.endswith(".safetensors")]) > 2
    assert "model.safetensors.index.json" in ours
    assert {file: ours[file] for file in theirs} == theirs
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())


def masters(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    """The master weights of a checkpoint that one process wrote, by name, flat."""
    found = safetensors.numpy.load_file(run_dir / "checkpoints" / f"step-{step:08d}" / "rank-00000.safetensors")
    return {key.split("/", 2)[2]: value for key, value in found.items() if key.startswith("master/0/")}


def test_an_average_is_the_plain_mean_of_the_masters(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = runs["qwen3"]
    export(run_dir, "--average", 3)
    directory = run_dir / "model-step-00000003-average-3"
    assert f"{directory}: mean of the weights after steps 1, 2, 3, float32" in capsys.readouterr().out
    found = safetensors.numpy.load_file(directory / "model.safetensors")
    three = [masters(run_dir, step) for step in (1, 2, 3)]
    for name, value in found.items():
        mean = np.mean([weights[name].astype(np.float64) for weights in three], axis=0)
        assert np.array_equal(value.ravel(), mean.astype(np.float32)), name
    assert any(not np.array_equal(value.ravel(), three[2][name]) for name, value in found.items())
    assert "uniform mean of those after steps 1, 2, 3 of 3" in (directory / "README.md").read_text()
    export(run_dir, "--average", 2, "--checkpoint", 2, "--dtype", "bf16")
    directory = run_dir / "model-step-00000002-average-2-bf16"
    assert {dtype for dtype, _ in tensors(directory).values()} == {"BF16"}
    assert json.loads((directory / "config.json").read_text())["dtype"] == "bfloat16"
    with safetensors.safe_open(directory / "model.safetensors", framework="pt") as opened:
        mean = np.mean([weights["model.norm.weight"].astype(np.float64) for weights in three[:2]], axis=0)
        expected = torch.from_numpy(mean.astype(np.float32)).bfloat16()
        assert torch.equal(opened.get_tensor("model.norm.weight"), expected)


def test_an_export_loads_in_a_pipeline(runs: dict[str, Path]) -> None:
    chat = pipeline("text-generation", model=str(runs["base"] / "model"), dtype=torch.float32)
    (answer,) = chat([{"role": "user", "content": "ab"}], max_new_tokens=5)
    assert answer["generated_text"][-1]["role"] == "assistant"


def test_the_card_tells_what_the_model_was_made_from_and_nothing_of_the_machine(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = runs["llama"]
    task = {"metric": "numeric", "n": 50, "score": 0.5, "ci": [0.36, 0.64], "before": {"score": 0.02, "ci": [0, 0.1]}}
    losses = {"examples": 5, "response_tokens": 90, "example_mean": 2.5, "token_mean": 2.25, "perplexity": 9.4877}
    row = {"id": "1", "prompt": [{"role": "user", "content": "a patient's name"}], "truth": "b", "answer": "c"}
    sets = {"sets": {"held_out": {**losses, "tasks": {"calculator": task}, "worst": [row]}}}
    (run_dir / "evaluation.json").write_text(json.dumps({"model": str(run_dir / "model"), **sets}))
    weights = (run_dir / "model" / "model.safetensors").read_bytes()
    monkeypatch.setenv("SOME_API_KEY", "llama-secret-value")
    command = "sft-dist train /home/alice/patients/r.yaml run.dir=/mnt/ward7"
    record = json.loads((run_dir / "run.json").read_text())
    record["starts"][-1]["environment"]["command"] = command
    (run_dir / "run.json").write_text(json.dumps(record))
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(config.replace("revision: null", f"revision: llama-secret-value-{SECRET}", 1))
    export(run_dir)
    (run_dir / "config.yaml").write_text(config)
    assert "as it was, with a new card" in capsys.readouterr().out
    assert (run_dir / "model" / "model.safetensors").read_bytes() == weights
    card = (run_dir / "model" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "mit"
    assert header["library_name"] == "transformers"
    assert header["pipeline_tag"] == "text-generation"
    assert "base_model" not in header, "a directory is no name that anybody else knows"
    store = json.loads(next((run_dir.parent / "stores").glob("*/meta.json")).read_text())
    dropped = store["dropped"]["too_long"]["count"]
    assert f"`{store['fingerprint']}`" in card
    assert f"| train.jsonl | messages | 24 | {24 - dropped} | 1.0 |" in card
    assert f"| too_long | {dropped} |" in card
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in steps if line["event"] == "step"}
    assert f"| loss, step 1 | {losses[1]:.4f} |\n| loss, step 3 | {losses[3]:.4f} |" in card
    assert "| held-out loss, after step 0 |" in card
    assert "| held_out | calculator | numeric | 50 | 0.500 (0.36 to 0.64) | 0.020 (0.00 to 0.10) |" in card
    assert "| held_out | 5 | 90 | 2.5000 | 2.2500 | 9.4877 |" in card
    assert "An answer ends with `<|e|>` (30)" in card
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, re.S)[1])
    assert recipe["optim"]["lr"] == 1e-3
    assert recipe["data"]["train"][0]["path"] == "train.jsonl"
    for hidden in (str(run_dir.parents[1]), "/tmp", "alice", "ward7", SECRET, "llama-secret-value", "a patient's name"):
        assert hidden not in card, hidden
    export(run_dir, "--checkpoint", 2)
    earlier = (run_dir / "model-step-00000002" / "README.md").read_text()
    assert "weights after step 2 of 3" in earlier
    assert "calculator" not in earlier, "that was measured on other weights"
    assert "loss, step 3" not in earlier


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = runs["qwen2"]

    def refused(*arguments: object) -> str:
        capsys.readouterr()
        assert cli.main(["export", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    before = sorted(run_dir.iterdir())
    assert "no committed checkpoint of that step; it has: 1, 2, 3" in refused(run_dir, "--checkpoint", 7)
    assert "has 2 committed checkpoints to export, 3 are needed" in refused(run_dir, "--average", 3, "--checkpoint", 2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    assert "is there already" in refused(run_dir, "--output", tmp_path / "full")
    assert "no run is here" in refused(tmp_path)
    assert "name a repository with --push-to-hub" in refused(run_dir, "--private")
    part = run_dir / "checkpoints" / "step-00000001" / "rank-00000.safetensors"
    whole = part.read_bytes()
    part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert f"{part}: is" in refused(run_dir, "--checkpoint", 1)
    part.write_bytes(whole)
    start = run_dir.parents[1] / "start" / "config.json"
    config = start.read_text()
    start.write_text(config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert "has another config than the model that was trained" in refused(run_dir, "--checkpoint", 1)
    start.write_text(config)
    assert sorted(run_dir.iterdir()) == before
