"""`llamafactory-cli train file.yaml` with stage: sft, and dataset_info.json beside its data."""

import json
from pathlib import Path
from typing import Any

from sft_dist.migrate import schedule, shared, trainer
from sft_dist.migrate.ledger import Ledger, Same

SIGNS = ("stage", "finetuning_type", "cutoff_len", "dataset_dir", "neat_packing", "template", "lora_rank")

SAME = {
    "model_name_or_path": Same("model.path"),
    "learning_rate": Same("optim.lr", convert=shared.number),
    "preprocessing_num_workers": Same("data.workers", convert=int),
    **trainer.SAME,
}

ADAPTERS = dict.fromkeys(
    """
    lora_rank lora_alpha lora_dropout lora_target additional_target loraplus_lr_ratio loraplus_lr_embedding use_rslora
    use_dora pissa_init pissa_iter pissa_convert create_new_adapter oft_rank oft_block_size oft_target module_dropout
    adapter_name_or_path adapter_folder
    """.split(),
    "adapters: all parameters are trained",
)

LACKING = {
    **ADAPTERS,
    **dict.fromkeys(
        "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules use_llama_pro".split(),
        "no layer is frozen: all parameters are trained",
    ),
    **dict.fromkeys(
        "use_galore use_apollo use_badam use_adam_mini use_muon".split(),
        "the optimizer here is AdamW",
    ),
    "use_dft_loss": "another objective than the likelihood of the answer",
    "shift_attn": "attention is whole within a document",
    "mixture_of_depths": "the model is taken as it is",
    "moe_aux_loss_coef": "auxiliary losses are refused before step 1",
    "rope_scaling": "edit the model's config.json; what depends on the length of a pack is refused",
    "use_unsloth": "no such kernels; model.kernels: liger, model.compile: on",
    "use_unsloth_gc": "model.checkpointing: full is torch's own",
    "upcast_layernorm": "norms compute in fp32 inside, as the model does it",
    "upcast_lmhead_output": "the loss is always computed in fp32",
    "resize_vocab": "a base model without a chat template gets ChatML, and its embeddings are resized by themselves",
    "add_tokens": "add tokens to the tokenizer and save model and tokenizer first",
    "add_special_tokens": "add tokens to the tokenizer and save model and tokenizer first",
    "new_special_tokens_config": "add tokens to the tokenizer and save model and tokenizer first",
    "split_special_tokens": "data.control_tokens: neutralise does it, and is the default",
    "train_from_scratch": "weights are always read",
    "interleave_probs": "weight: of a source says how often it is drawn",
    "mix_strategy": "sources are laid together; weight: and cap: mix them",
    "tool_format": "tools are written by the model's own chat template",
    "default_system": "put the system prompt into the rows",
    "enable_thinking": "reasoning is trained where rows have it (reasoning_content)",
    "media_dir": "images, audio and video are refused",
    "early_stopping_steps": "there is no early stopping; train.keep_best keeps the best checkpoints",
    "compute_accuracy": "sft-dist evaluate scores answers",
    "predict_with_generate": "sft-dist evaluate scores answers",
    "use_swanlab": "metrics.jsonl in the run's directory has every step",
    "fp8": "there is no fp8",
    "export_dir": "the model is always exported, to run.dir/run.name/model",
    "tokenized_path": "data.store is where tokenised data is kept; it is made anew",
    "freeze_vision_tower": "text alone is trained",
    "eval_on_each_dataset": "sets that have names, data.held_out: {a: one.jsonl, b: another.jsonl}, are each measured",
    "hf_hub_token": "keep tokens out of files; the hub's client reads its own",
    **trainer.LACKING,
}

IDLE = {
    **dict.fromkeys(
        """
        overwrite_cache preprocessing_batch_size streaming buffer_size plot_loss cache_dir use_fast_tokenizer
        low_cpu_mem_usage print_param_status include_effective_tokens_per_second use_reentrant_gc infer_backend
        infer_dtype offload_folder use_kv_cache ignore_pad_token_for_loss eval_num_beams disable_shuffling
        double_quantization quantization_type quantization_method quantization_device_map packing flash_attn
        freeze_multi_modal_projector freeze_language_model image_max_pixels video_max_pixels ray_run_name
        """.split(),
        "",
    ),
    **trainer.IDLE,
}


def convert(ledger: Ledger, *, full: bool, directory: Path) -> None:
    """Fill the ledger. directory: where the file lies; dataset_dir is looked for there, too."""
    _method(ledger, full=full)
    ledger.take_same(SAME)
    _model(ledger)
    max_tokens = int(ledger.get("cutoff_len", 2048))
    _data(ledger, directory)
    meaning = "longer rows are dropped and counted; there they are cut, prompt and answer in proportion"
    ledger.put("data.max_tokens", max_tokens, theirs="cutoff_len", meaning=meaning)
    packed = ledger.is_on("packing") or ledger.is_on("neat_packing")
    if packed:
        key = "neat_packing" if ledger.is_on("neat_packing") else "packing"
        meaning = "documents never see each other" + ("; with packing alone theirs did" if key == "packing" else "")
        ledger.put("batch.packing", True, theirs=key, meaning=meaning)
    step = shared.put_step(
        ledger,
        keys="per_device_train_batch_size, gradient_accumulation_steps",
        per_device=int(ledger.get("per_device_train_batch_size", 8)),
        accumulation=int(ledger.get("gradient_accumulation_steps", 1)),
        packed=packed,
        max_tokens=max_tokens,
    )
    trainer.put_updates(ledger, default_lr=5e-5)
    rows = schedule.count_rows(ledger.recipe["data.train"], 0.0)
    _held_out(ledger, directory, rows)
    if rows:
        rows = int(rows * (1 - ledger.recipe.get("data.held_out_share", 0.0)))
    trainer.put_course(ledger, step, num_rows=rows)
    shared.put_engine(ledger)
    shared.put_wandb(ledger)
    shared.put_run(ledger, output="saves/imported", name_key="run_name")
    ledger.note_lacking(LACKING)
    ledger.note_idle(IDLE)


def _method(ledger: Ledger, *, full: bool) -> None:
    stage = ledger.get("stage", "sft")
    if stage != "sft":
        ledger.refuse(
            "stage", "only sft is supervised fine-tuning; preference tuning and pre-training are out of scope"
        )
    kind = str(ledger.get("finetuning_type", "lora"))
    if kind == "full":
        ledger.idle.append("finetuning_type")
    else:
        note = "" if "finetuning_type" in ledger.given else "their default is lora: "
        shared.adapters(ledger, "finetuning_type", full=full, note=note)
    shared.quantised(ledger, ("quantization_bit",), full=full)
    if "stage" in ledger.given:
        ledger.idle.append("stage")


def _model(ledger: Ledger) -> None:
    if "model.path" not in ledger.recipe:
        ledger.put("model.path", "SET/ME", remark="YOURS TO SET")
        ledger.ask("model_name_or_path", "is not in the file: set model.path")
    revision = ledger.get("model_revision", "main")
    if revision != "main":
        ledger.put("model.revision", str(revision), theirs="model_revision")
    if ledger.is_on("pure_bf16"):
        ledger.put(
            "model.dtype",
            "bf16",
            theirs="pure_bf16",
            meaning="master weights stay fp32: updates at 1e-5 would round away",
        )
    ledger.seen.add("pure_bf16")
    shared.put_dtype(ledger)
    shared.put_attention(ledger, "flash_attn")
    shared.put_remote_code(ledger, "trust_remote_code")
    if not ledger.is_on("disable_gradient_checkpointing"):
        shared.put_checkpointing(ledger, "gradient_checkpointing", default=True)
    ledger.seen.add("gradient_checkpointing")
    if ledger.is_on("enable_liger_kernel"):
        ledger.put("model.kernels", "liger", theirs="enable_liger_kernel")
    if ledger.is_on("torch_compile"):
        ledger.put("model.compile", "on", theirs="torch_compile", meaning="decoder layers alone are compiled")
    ledger.seen |= {"enable_liger_kernel", "torch_compile"}
    if template := ledger.get("template"):
        ledger.ask(
            "template",
            f"{template} is written by their code; here the tokenizer's own template is used, or data.chat_template. "
            "Their qwen adds a system prompt where a row has none: compare with sft-dist inspect",
        )


def _data(ledger: Ledger, directory: Path) -> None:
    if ledger.is_on("train_on_prompt"):
        ledger.lack("train_on_prompt", "only assistant turns are trained")
    ledger.seen.add("train_on_prompt")
    if ledger.is_on("mask_history"):
        ledger.put("data.turns", "last", theirs="mask_history")
    ledger.seen.add("mask_history")
    sources = _sources(ledger, "dataset", directory)
    if sources:
        ledger.put("data.train", sources, theirs="dataset, dataset_dir")
    else:
        ledger.put("data.train", [{"path": "SET-ME.jsonl"}], remark="YOURS TO SET")
        ledger.ask("dataset", "no data set could be found: set data.train")
    most = ledger.get("max_samples")
    if most is not None:
        for source in ledger.recipe["data.train"]:
            source["cap"] = min(source.get("cap", int(most)), int(most))
        ledger.put(
            "data.train",
            ledger.recipe["data.train"],
            theirs="max_samples",
            meaning="cap: so many an epoch, other ones each time; there always the first",
        )


def _held_out(ledger: Ledger, directory: Path, rows: int | None) -> None:
    if ledger.get("eval_dataset"):
        ledger.put("data.held_out", _sources(ledger, "eval_dataset", directory), theirs="eval_dataset")
    size = float(ledger.get("val_size", 0.0))
    if 0 < size < 1:
        ledger.put(
            "data.held_out_share",
            size,
            theirs="val_size",
            meaning="by a hash of the prompt: equal prompts fall on the same side",
        )
    elif size >= 1 and rows:
        ledger.put("data.held_out_share", round(size / rows, 6), theirs="val_size", meaning=f"{size:g} of {rows} rows")
    elif size >= 1:
        ledger.ask("val_size", f"{size:g} rows: set data.held_out_share to that share of all rows")


def _sources(ledger: Ledger, key: str, directory: Path) -> list[dict[str, Any]]:
    """Sources of the names under `key`, by dataset_info.json."""
    given = ledger.get(key, "")
    names = given if isinstance(given, list) else [name.strip() for name in str(given).split(",") if name.strip()]
    folder = str(ledger.get("dataset_dir", "data"))
    if folder == "ONLINE":
        return [{"path": name} for name in names]
    place = next(
        (at for at in (Path(folder), directory / folder, directory) if (at / "dataset_info.json").is_file()), None
    )
    if place is None:
        if names:
            ledger.ask(
                "dataset_dir", f"{folder}/dataset_info.json is not here: data.train names the data sets as they do"
            )
        return [{"path": name} for name in names]
    known = json.loads((place / "dataset_info.json").read_text(encoding="utf-8"))
    sources = []
    for name in names:
        if name not in known:
            ledger.ask(key, f"{name} is not in {place}/dataset_info.json: set its path in data.train")
            continue
        sources.append(_source(ledger, name, known[name], place))
    return sources


def _source(ledger: Ledger, name: str, info: dict[str, Any], place: Path) -> dict[str, Any]:
    where = f"dataset_info.json, {name}"
    source: dict[str, Any] = {}
    if info.get("file_name"):
        source["path"] = str(place / info["file_name"])
    else:
        source["path"] = str(info.get("hf_hub_url") or info.get("ms_hub_url") or info.get("script_url") or name)
        if not info.get("hf_hub_url"):
            ledger.ask(where, "comes from another hub or a script: fetch it, and give its files")
    for key in ("split", "revision"):
        if info.get(key) and (key, info[key]) != ("split", "train"):
            source[key] = info[key]
    if info.get("num_samples"):
        source["cap"] = int(info["num_samples"])
    source["format"] = _format(ledger, where, info)
    if info.get("ranking"):
        ledger.refuse(where, "ranking: true is preference data")
    if info.get("subset") or info.get("folder"):
        ledger.lack(where, "a subset or folder of a hub data set cannot be named; give its files")
    return source


def _format(ledger: Ledger, where: str, info: dict[str, Any]) -> str:
    """The row format; columns of other names have to be renamed in the rows."""
    columns, tags = info.get("columns") or {}, info.get("tags") or {}
    if info.get("formatting", "alpaca") == "alpaca":
        usual = {
            "prompt": "instruction",
            "query": "input",
            "response": "output",
            "history": "history",
            "system": "system",
        }
        other = {key: name for key, name in columns.items() if key in usual and name and name != usual[key]}
        row_format = "alpaca"
    elif tags.get("role_tag") == "role":
        usual = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
        other = {key: name for key, name in tags.items() if key in usual and name != usual[key]}
        other |= {key: name for key, name in columns.items() if key == "messages" and name != "messages"}
        row_format = "messages"
    else:
        other = {key: name for key, name in columns.items() if key == "messages" and name != "conversations"}
        usual_tags = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"}
        other |= {key: name for key, name in tags.items() if key in usual_tags and name != usual_tags[key]}
        row_format = "sharegpt"
    if other:
        named = ", ".join(f"{key} {name!r}" for key, name in other.items())
        ledger.ask(where, f"{named}: rename them in the rows to what {row_format} rows have (docs/data.md)")
    return row_format
