"""Files of other trainers as recipes: what is taken over, asked, lacking and refused; the examples of the page."""

import ast
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_dist import cli
from sft_dist.config import load_recipe
from sft_dist.errors import ConfigError
from sft_dist.migrate.convert import Migration, migrate, to_yaml

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(
    r"### A worked example\n.*?```yaml\n(.*?)```\n\n`sft-dist import (\w+)\.yaml --gpus 8 -o recipe\.yaml` writes\n\n"
    r"```yaml\n(.*?)```",
    PAGE,
    re.S,
)
NUM_ROWS = 3200
OF_A_DATA_SET = (
    *("path", "type", "split", "data_files", "revision", "field_messages", "message_property_mappings"),
    *("roles_to_train", "train_on_eos", "message_field_training"),
)
"""Keys of the entries of Axolotl's `datasets`."""

TRL = {"model_name_or_path": "m/m", "dataset_name": "a/b", "assistant_only_loss": True}
FACTORY = {
    "model_name_or_path": "m/m",
    "stage": "sft",
    "finetuning_type": "full",
    "dataset_dir": "ONLINE",
    "dataset": "a/b",
}
OFFLOADED = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
WITH_MIN = {"lr_scheduler_type": "cosine_with_min_lr"}
AXOLOTL = {
    "base_model": "m/m",
    "learning_rate": "1e-5",
    "datasets": [{"path": "a/b", "type": "chat_template"}],
    "warmup_steps": 1,
}


@pytest.fixture
def convert(tmp_path: Path) -> Any:
    def run(given: dict[str, Any], *, full: bool = False, gpus: int | None = 1, steps: int | None = None) -> Migration:
        path = tmp_path / "theirs.yaml"
        path.write_text(yaml.safe_dump(given, sort_keys=False))
        return migrate(path, origin=None, gpus=gpus, steps=steps, full=full)

    return run


def said(entries: list[Any]) -> str:
    return "\n".join(f"{entry.key}: {entry.text}" for entry in entries)


def write_rows(directory: Path) -> None:
    """What the examples of the page name."""
    chat = {"messages": [{"role": "user", "content": "BMI?"}, {"role": "assistant", "content": "22.9"}]}
    (directory / "data").mkdir()
    (directory / "data" / "chats.jsonl").write_text((json.dumps(chat) + "\n") * NUM_ROWS)
    note = {"instruction": "BMI?", "output": "22.9"}
    (directory / "data" / "notes.json").write_text(json.dumps([note] * NUM_ROWS))
    (directory / "data" / "dataset_info.json").write_text('{"notes": {"file_name": "notes.json"}}')


# The page.


def test_the_page_has_an_example_for_each() -> None:
    assert [name for _, name, _ in EXAMPLES] == ["trl", "llamafactory", "axolotl"]


@pytest.mark.parametrize(("theirs", "name", "ours"), EXAMPLES, ids=[name for _, name, _ in EXAMPLES])
def test_the_examples_of_the_page_come_out_as_it_shows(
    theirs: str,
    name: str,
    ours: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_rows(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path(f"{name}.yaml").write_text(theirs)
    assert cli.main(["import", f"{name}.yaml", "--gpus", "8", "-o", "recipe.yaml"]) == 0
    assert Path("recipe.yaml").read_text() == ours
    recipe = load_recipe("recipe.yaml")
    assert recipe.loss == "token_mean"
    printed = capsys.readouterr().out
    assert "taken over from" in printed
    assert "unknown" not in printed


@pytest.mark.parametrize(
    ("heading", "given"),
    [("From TRL", TRL), ("From LLaMA-Factory", FACTORY), ("From Axolotl", AXOLOTL)],
    ids=["trl", "llamafactory", "axolotl"],
)
def test_every_key_in_the_tables_of_the_page_is_known(heading: str, given: dict[str, Any], convert: Any) -> None:
    section = PAGE.split(f"## {heading}\n", 1)[1].split("### A worked example", 1)[0]
    firsts = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    outside = {"dataset_info.json", "num_samples", *OF_A_DATA_SET}
    keys = {key.split(":")[0] for cell in firsts for key in re.findall(r"`([^`]+)`", cell)} - outside
    assert len(keys) > 25
    assert convert({**dict.fromkeys(sorted(keys)), **given}).ledger.unknown == []


def test_a_recipe_that_is_there_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, output = tmp_path / "theirs.yaml", tmp_path / "recipe.yaml"
    theirs.write_text(yaml.safe_dump(TRL))
    output.write_text("mine")
    assert cli.main(["import", str(theirs), "-o", str(output)]) == 2
    assert output.read_text() == "mine"
    assert "--force" in capsys.readouterr().err
    assert cli.main(["import", str(theirs)]) == 0
    streams = capsys.readouterr()
    assert yaml.safe_load(streams.out)["model"]["path"] == "m/m", "the recipe alone goes where output is sent"
    assert "taken over from TRL" in streams.err


# Nothing is dropped in silence.


def fields_of(module: str, *names: str) -> set[str]:
    """Fields of dataclasses in an installed package's source, which need not be imported."""
    package, _, rest = module.partition(".")
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    file = Path(spec.origin).parent / (rest.replace(".", "/") + ".py")
    classes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ClassDef)]
    found = {
        item.target.id
        for node in classes
        if node.name in names
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }
    assert found, f"{module} has no {names}"
    return found


def test_every_field_of_trls_command_is_known(convert: Any) -> None:
    """By the dataclasses of the TRL and transformers that are installed."""
    known = (
        fields_of("trl.trainer.sft_config", "SFTConfig")
        | fields_of("trl.trainer.base_config", "_BaseConfig")
        | fields_of("trl.trainer.model_config", "ModelConfig")
        | fields_of("trl.scripts.utils", "ScriptArguments", "DatasetMixtureConfig")
        | fields_of("transformers.training_args", "TrainingArguments")
    )
    inner = {name for name in known if name.startswith("_") or name.isupper()} | {"framework"}
    nothing = dict.fromkeys(sorted(known - inner))
    assert convert({**nothing, **TRL}).ledger.unknown == []


def test_unknown_keys_are_named(convert: Any) -> None:
    for given in (TRL, FACTORY, AXOLOTL):
        assert convert({**given, "frobnicate": 3, "also_this": None}).ledger.unknown == ["frobnicate", "also_this"]


@pytest.mark.parametrize("given", [TRL, FACTORY, AXOLOTL], ids=["trl", "llamafactory", "axolotl"])
def test_what_has_no_counterpart_is_said_when_it_is_on(given: dict[str, Any], convert: Any) -> None:
    on = convert({**given, "neftune_noise_alpha": 5}).ledger
    assert "neftune_noise_alpha: 5: NEFTune" in said(on.lacking)
    off = convert({**given, "neftune_noise_alpha": None}).ledger
    assert "neftune" not in said(off.lacking)
    assert "neftune_noise_alpha" in off.idle


# What a step is.


def test_a_step_is_micro_batch_times_accumulation_times_gpus(convert: Any) -> None:
    sizes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5}
    assert convert({**TRL, **sizes}, gpus=7).recipe["batch"]["examples"] == 3 * 5 * 7
    assumed = convert({**FACTORY, **sizes}, gpus=None)
    assert assumed.recipe["batch"]["examples"] == 15
    assert "one GPU was assumed" in said(assumed.ledger.asked)
    theirs = {"micro_batch_size": 3, "gradient_accumulation_steps": 5}
    assert convert({**AXOLOTL, **theirs}, gpus=2).recipe["batch"]["examples"] == 30
    total = convert({**AXOLOTL, "micro_batch_size": 2, "batch_size": 64}, gpus=4).recipe
    assert total["batch"]["examples"] == 64, "batch_size is that of all GPUs"


def test_with_packing_a_step_is_tokens(convert: Any) -> None:
    packed = convert({**TRL, "packing": True, "max_length": 512, "per_device_train_batch_size": 2}, gpus=4).recipe
    assert packed["batch"] == {"packing": True, "tokens": 2 * 4 * 512, "pack_tokens": 1024}
    theirs = {"sample_packing": True, "sequence_len": 256, "micro_batch_size": 2, "gradient_accumulation_steps": 2}
    assert convert({**AXOLOTL, **theirs}).recipe["batch"]["tokens"] == 2 * 2 * 256
    assert convert({**FACTORY, "neat_packing": True}).recipe["batch"]["tokens"] == 8 * 2048


# Masks.


def test_trained_prompts_have_no_counterpart(convert: Any) -> None:
    without = {key: value for key, value in TRL.items() if key != "assistant_only_loss"}
    assert "TRL trains the prompt too" in said(convert(without).ledger.lacking)
    assert convert(TRL).ledger.lacking == []
    assert "only assistant turns" in said(convert({**FACTORY, "train_on_prompt": True}).ledger.lacking)
    assert convert({**FACTORY, "mask_history": True}).recipe["data"]["turns"] == "last"
    assert "only assistant turns" in said(convert({**AXOLOTL, "train_on_inputs": True}).ledger.lacking)
    sets = [{"path": "a/b", "type": "chat_template", "roles_to_train": ["assistant", "user"], "train_on_eos": "all"}]
    lacking = said(convert({**AXOLOTL, "datasets": sets}).ledger.lacking)
    assert "roles_to_train" in lacking
    assert "train_on_eos" in lacking


# Schedules and lengths.


def test_a_share_of_warm_up_needs_the_number_of_steps(
    convert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = convert({**TRL, "warmup_ratio": 0.1})
    assert asked.recipe["optim"]["warmup_steps"] == 0
    assert "warmup_ratio: 0.1 of all steps" in said(asked.ledger.asked)
    assert "YOURS TO SET" in asked.commented
    assert convert({**TRL, "warmup_ratio": 0.1, "max_steps": 95}).recipe["optim"]["warmup_steps"] == 10, (
        "rounded up, as there"
    )
    assert convert({**TRL, "warmup_ratio": 0.1}, steps=40).recipe["optim"]["warmup_steps"] == 4
    assert convert({**TRL, "warmup_steps": 0.2, "max_steps": 10}).recipe["optim"]["warmup_steps"] == 2, (
        "below 1 it is a share"
    )
    write_rows(tmp_path)
    monkeypatch.chdir(tmp_path)
    counted = {**TRL, "datasets": [{"path": "json", "data_files": ["data/chats.jsonl"]}], "num_train_epochs": 2.5}
    sizes = {"per_device_train_batch_size": 30, "warmup_ratio": 0.1, "save_strategy": "epoch"}
    found = convert({**counted, **sizes}).recipe
    per_epoch = -(-NUM_ROWS // 30)
    assert found["train"]["steps"] == -(-per_epoch * 5 // 2), "half an epoch is steps"
    assert found["optim"]["warmup_steps"] == -(-found["train"]["steps"] // 10)
    assert found["train"]["save_every"] == per_epoch


def test_defaults_of_theirs_are_written_out(convert: Any) -> None:
    """What nobody wrote there decides their run all the same."""
    trl, factory, axolotl = (convert(given).recipe for given in (TRL, FACTORY, AXOLOTL))
    assert (trl["optim"]["lr"], trl["optim"]["schedule"], trl["train"]["epochs"]) == (2e-5, "linear", 3)
    assert (trl["data"]["max_tokens"], trl["batch"]["examples"]) == (1024, 8)
    assert (factory["optim"]["lr"], factory["optim"]["schedule"], factory["data"]["max_tokens"]) == (
        5e-5,
        "linear",
        2048,
    )
    assert (axolotl["optim"]["schedule"], axolotl["train"]["epochs"], axolotl["data"]["max_tokens"]) == (
        "cosine",
        1,
        512,
    )
    assert trl["model"]["checkpointing"] == factory["model"]["checkpointing"] == "full"
    assert "checkpointing" not in axolotl["model"]
    assert {recipe["loss"] for recipe in (trl, factory, axolotl)} == {"token_mean"}
    no_warmup = {key: value for key, value in AXOLOTL.items() if key != "warmup_steps"}
    assert convert({**no_warmup, "max_steps": 1000}).recipe["optim"]["warmup_steps"] == 30
    assert convert({**no_warmup, "max_steps": 9000}).recipe["optim"]["warmup_steps"] == 100


@pytest.mark.parametrize(
    ("given", "key", "expected"),
    [
        ({"lr_scheduler_type": "constant_with_warmup"}, "optim.schedule", "constant"),
        ({**WITH_MIN, "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}, "optim.min_lr", 2e-6),
        ({**WITH_MIN, "lr_scheduler_kwargs": '{"min_lr": 3e-6}'}, "optim.min_lr", 3e-6),
        ({"max_grad_norm": 0}, "optim.max_grad_norm", 1e9),
        ({"adam_beta2": 0.95}, "optim.betas", [0.9, 0.95]),
        ({"deepspeed": OFFLOADED}, "train.engine", "zero3_offload"),
        ({"deepspeed": "configs/ds_z2_offload_config.json"}, "train.engine", "zero2_offload"),
        ({"deepspeed": "zero1.json"}, "train.engine", "zero1"),
        ({"fsdp": "full_shard auto_wrap"}, "train.engine", "zero3"),
        ({"attn_implementation": "flash_attention_3"}, "model.attention", "flash_attention_3"),
        ({"attn_implementation": "kernels-community/flash-attn2"}, "model.attention", "auto"),
        ({"use_liger_kernel": True}, "model.kernels", "liger"),
        ({"save_steps": 50, "save_total_limit": 3}, "train.keep_checkpoints", 3),
        ({"output_dir": "out/My run (2)/"}, "run.name", "My-run-2"),
        ({"report_to": "wandb", "project": "clinic"}, "wandb.project", "clinic"),
    ],
)  # fmt: skip
def test_values_are_translated(given: dict[str, Any], key: str, expected: Any, convert: Any) -> None:
    section, _, name = key.partition(".")
    found = convert({**TRL, **given}).recipe[section][name]
    assert found == pytest.approx(expected) if isinstance(expected, float) else found == expected


@pytest.mark.parametrize("given", [TRL, FACTORY, AXOLOTL], ids=["trl", "llamafactory", "axolotl"])
def test_a_0_turns_off_what_comes_every_so_many_steps(given: dict[str, Any], convert: Any) -> None:
    share = {"val_size": 0.1, "val_set_size": 0.1, "test_split_size": 0.1}
    off = convert({**given, **share, "eval_steps": 0, "save_steps": 0, "save_strategy": "steps"}, steps=100)
    assert not {"eval_every", "save_every"} & off.recipe["train"].keys()
    assert {"eval_steps", "save_steps", "save_strategy"} <= set(off.ledger.idle)


@pytest.mark.parametrize(("count", "share"), [(2, 0.5), (0.5, 2), ("1", 1)])
def test_so_many_times_an_epoch_is_every_so_many_steps(
    count: Any, share: float, convert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path)
    monkeypatch.chdir(tmp_path)
    rows = {"path": "json", "data_files": ["data/chats.jsonl"], "type": "chat_template", "field_messages": "messages"}
    given = {**AXOLOTL, "datasets": [rows], "micro_batch_size": 32, "gradient_accumulation_steps": 1}
    found = convert({**given, "saves_per_epoch": count}).recipe["train"]
    assert found["save_every"] == NUM_ROWS // 32 * share


def test_null_is_the_default_of_a_strategy(convert: Any) -> None:
    assert "held_out" not in convert({**TRL, "eval_strategy": None}).recipe["data"]
    assert "held_out" in convert({**TRL, "eval_strategy": "epoch"}).recipe["data"]


@pytest.mark.parametrize("given", [FACTORY, AXOLOTL, {**AXOLOTL, "evals_per_epoch": 2}, TRL])
def test_losses_without_held_out_data_need_a_word(given: dict[str, Any], convert: Any) -> None:
    found = convert({**given, "eval_steps": 5, "load_best_model_at_end": True}, steps=50)
    assert not {"eval_every", "keep_best"} & found.recipe["train"].keys()
    assert "there is no held-out data" in said(found.ledger.asked)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({**AXOLOTL, "wandb_project": "clinic"}, "wandb_project: clinic"),
        ({**AXOLOTL, "wandb_project": "clinic", "report_to": "wandb"}, "wandb_project: clinic, report_to: wandb"),
        ({**TRL, "project": "clinic", "report_to": "wandb"}, "project: clinic, report_to: wandb"),
        ({**FACTORY, "report_to": "wandb"}, "report_to: wandb"),
    ],
)
def test_where_wandb_comes_from_is_said(given: dict[str, Any], expected: str, convert: Any) -> None:
    ledger = convert(given).ledger
    assert [each.theirs for each in ledger.taken if each.ours.startswith("wandb.project")] == [expected]
    assert ledger.unknown == []


@pytest.mark.parametrize("named", [{}, {"report_to": "none"}, {"report_to": ["tensorboard"]}])
def test_a_project_alone_turns_nothing_on_in_trl(named: dict[str, Any], convert: Any) -> None:
    found = convert({**TRL, "project": "clinic", **named})
    assert "wandb" not in found.recipe
    assert "report_to does not ask for wandb" in said(found.ledger.lacking)


def test_optimizers_and_schedules_without_counterpart_need_a_word(convert: Any) -> None:
    found = convert({**TRL, "optim": "adamw_bnb_8bit", "lr_scheduler_type": "polynomial", "trust_remote_code": True})
    asked = said(found.ledger.asked)
    assert "adamw_bnb_8bit becomes AdamW" in asked
    assert "polynomial has no counterpart" in asked
    assert "trust_remote_code" in asked
    assert "NEEDS YOUR WORD" in found.commented
    commit = "a" * 40
    pinned = convert({**TRL, "trust_remote_code": True, "model_revision": commit}).recipe["model"]
    assert (pinned["trust_remote_code"], pinned["revision"]) == (True, commit)


# What is refused.


@pytest.mark.parametrize(
    ("given", "words", "with_full"),
    [
        ({**TRL, "use_peft": True, "lora_r": 16}, "use_peft: true: sft_dist trains all", True),
        ({**TRL, "use_peft": True, "load_in_4bit": True}, "load_in_4bit: true: quantised", True),
        ({**TRL, "loss_type": "dft"}, "another objective", False),
        ({**FACTORY, "finetuning_type": "lora", "lora_rank": 8}, "--full", True),
        ({key: value for key, value in FACTORY.items() if key != "finetuning_type"}, "their default", True),
        ({**FACTORY, "stage": "dpo"}, "only sft", False),
        ({**AXOLOTL, "adapter": "qlora", "load_in_4bit": True}, "adapter: qlora: sft_dist trains all", True),
        ({**AXOLOTL, "rl": "dpo"}, "preference tuning", False),
        ({**AXOLOTL, "datasets": [{"path": "a/b", "type": "completion"}]}, "raw text", False),
    ],
)
def test_other_things_than_full_fine_tuning_are_refused(
    given: dict[str, Any], words: str, with_full: bool, convert: Any
) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        convert(given)
    if with_full:
        found = convert(given, full=True)
        assert "learning_rate" in said(found.ledger.asked), "a rate of adapters is no rate for all weights"
    else:
        with pytest.raises(ConfigError, match=re.escape(words)):
            convert(given, full=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected the mapping"),
        ("a: [", "not valid YAML"),
        ("foo: 1", "cannot be told by its keys; say so with --from"),
        (
            "model_name_or_path: m\nper_device_train_batch_size: many\nassistant_only_loss: true",
            "is not what TRL takes",
        ),
        ("model_name_or_path: m\nmax_length: 1\nassistant_only_loss: true", "the recipe made from"),
    ],
)
def test_files_that_are_none_are_refused_in_words(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(words)):
        migrate(path, origin=None, gpus=1, steps=None, full=False)


# Data sets.


def test_dataset_info_becomes_sources(convert: Any, tmp_path: Path) -> None:
    info = {
        "notes": {"file_name": "notes.json", "num_samples": 10},
        "chats": {"file_name": "chats.jsonl", "formatting": "sharegpt", "num_samples": 5},
        "openai": {
            "hf_hub_url": "a/b",
            "split": "train[:10]",
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
        },
        "odd": {"file_name": "odd.csv", "columns": {"prompt": "question", "response": "answer"}},
    }
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    given = {**FACTORY, "dataset_dir": "data", "dataset": "notes, chats, openai, odd, missing", "max_samples": 7}
    found = convert(given)
    folder = tmp_path / "data"
    assert found.recipe["data"]["train"] == [
        {"path": str(folder / "notes.json"), "cap": 7, "format": "alpaca"},
        {"path": str(folder / "chats.jsonl"), "format": "sharegpt", "cap": 5},
        {"path": "a/b", "split": "train[:10]", "format": "messages", "cap": 7},
        {"path": str(folder / "odd.csv"), "format": "alpaca", "cap": 7},
    ]
    asked = said(found.ledger.asked)
    assert "prompt 'question', response 'answer': rename them" in asked
    assert "missing is not in" in asked


def test_axolotls_data_sets_become_sources(convert: Any) -> None:
    sets = [
        {"path": "json", "data_files": ["a.jsonl", "b.jsonl"], "type": "chat_template", "field_messages": "messages"},
        {
            "path": "c.jsonl",
            "type": "chat_template",
            "field_messages": "conversations",
            "message_property_mappings": {"role": "from", "content": "value"},
        },
        {"path": "d/e", "type": "alpaca", "split": "test", "shards": 4},
        {"path": "f/g", "type": {"field_instruction": "q"}},
    ]
    found = convert({**AXOLOTL, "datasets": sets})
    assert found.recipe["data"]["train"] == [
        {"path": "a.jsonl", "format": "messages"},
        {"path": "b.jsonl", "format": "messages"},
        {"path": "c.jsonl", "format": "sharegpt"},
        {"path": "d/e", "split": "test", "format": "alpaca"},
        {"path": "f/g", "format": "auto"},
    ]
    assert "datasets[d/e].shards: 4" in said(found.ledger.lacking)
    assert "a format of one's own" in said(found.ledger.asked)


def test_comments_keep_the_recipe_what_it_is_and_hide_secrets(convert: Any) -> None:
    given = {**TRL, "run_name": "a # b: c", "hub_token": "hf_" + "a" * 30, "chat_template_path": "x\n- y.jinja"}
    found = convert(given)
    assert yaml.safe_load(found.commented) == found.recipe
    template = convert({**AXOLOTL, "chat_template": "{{ messages }}\nloss: example_mean\n\u2028train: {steps: 1}"})
    assert yaml.safe_load(template.commented) == template.recipe
    assert "steps: 1" in next(line for line in template.commented.splitlines() if "NEEDS YOUR WORD  chat_t" in line)
    assert yaml.safe_load(to_yaml(found.ledger, origin="trl", file="f.yaml")) == found.recipe
    assert "hf_aaa" not in found.commented
