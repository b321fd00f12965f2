"""`trl sft --config file.yaml`: the fields of SFTConfig, ModelConfig and the script's arguments."""

from typing import Any

from sft_dist.migrate import schedule, shared, trainer
from sft_dist.migrate.ledger import Ledger, Same

SIGNS = (
    "model_name_or_path",
    "dataset_name",
    "per_device_train_batch_size",
    "assistant_only_loss",
    "use_peft",
)
PROMPT_TOO = (
    "TRL trains the prompt too unless assistant_only_loss is set (or rows are prompt and completion); here only "
    "assistant turns are trained, so losses are not comparable and answers are learnt sooner"
)

SAME = {
    "model_name_or_path": Same("model.path"),
    "learning_rate": Same("optim.lr", convert=shared.number),
    "dataset_num_proc": Same("data.workers", convert=int),
    **trainer.SAME,
}

QUANTISED = ("load_in_8bit", "load_in_4bit")

LACKING = {
    **dict.fromkeys(
        (
            *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters"),
            *("lora_modules_to_save", "lora_task_type", "use_rslora", "use_dora"),
        ),
        "adapters: all parameters are trained",
    ),
    **dict.fromkeys(("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"), "no quantised weights"),
    "model_init_kwargs": "the model is built from its own config.json; edit that",
    "router_aux_loss_coef": "mixtures of experts with auxiliary losses are refused before step 1",
    "dataset_config": "a configuration of a hub data set cannot be named; give its files, as data.train",
    "dataset_kwargs": "rows are always prepared, by sft-dist prepare",
    "eos_token": "the tokenizer's own stop token ends an answer, as its template writes it",
    "pad_token": "there is no padding",
    "dataset_text_field": "plain text is not trained: rows are conversations (docs/data.md)",
    **trainer.LACKING,
}

IDLE = dict.fromkeys(
    (
        *("padding_free", "pad_to_multiple_of", "eval_packing", "packing_strategy", "shuffle_dataset", "dtype"),
        *("dataset_streaming", "streaming", "ignore_bias_buffers", "model_revision", "torch_dtype", "bf16"),
        *trainer.IDLE,
    ),
    "",
)


def convert(ledger: Ledger, *, full: bool) -> None:
    """Fill the ledger. full: a file for adapters becomes full fine-tuning, because its owner says so."""
    _method(ledger, full=full)
    ledger.take_same(SAME)
    _model(ledger)
    packed, max_tokens = _data(ledger)
    accumulation = int(ledger.get("gradient_accumulation_steps", 1))
    step = shared.put_step(
        ledger,
        keys="per_device_train_batch_size, gradient_accumulation_steps",
        per_device=int(ledger.get("per_device_train_batch_size", 8)),
        accumulation=accumulation,
        packed=packed,
        max_tokens=max_tokens,
    )
    trainer.put_updates(ledger, default_lr=2e-5)
    rows = schedule.count_rows(ledger.recipe["data.train"], ledger.recipe.get("data.held_out_share", 0.0))
    trainer.put_course(ledger, step, num_rows=rows)
    shared.put_engine(ledger)
    shared.put_wandb(ledger, project_key="project")
    shared.put_run(ledger, output="trainer_output", name_key="run_name")
    ledger.note_lacking(LACKING)
    ledger.note_idle(IDLE)


def _method(ledger: Ledger, *, full: bool) -> None:
    if ledger.is_on("use_peft"):
        shared.adapters(ledger, "use_peft", full=full)
    shared.quantised(ledger, QUANTISED, full=full)
    if (loss := ledger.get("loss_type", "nll")) not in ("nll", "chunked_nll"):
        ledger.refuse("loss_type", f"{loss} is another objective than the likelihood of the answer")


def _model(ledger: Ledger) -> None:
    if "model.path" not in ledger.recipe:
        ledger.put("model.path", "SET/ME", remark="YOURS TO SET")
        ledger.ask("model_name_or_path", "is not in the file (they give it on the command line): set model.path")
    revision = ledger.get("model_revision", "main")
    if revision != "main":
        ledger.put("model.revision", str(revision), theirs="model_revision")
    shared.put_dtype(ledger)
    shared.put_attention(ledger, "attn_implementation")
    shared.put_remote_code(ledger, "trust_remote_code")
    shared.put_checkpointing(ledger, "gradient_checkpointing", default=True)
    if ledger.is_on("use_liger_kernel"):
        ledger.put("model.kernels", "liger", theirs="use_liger_kernel")
    if ledger.is_on("torch_compile"):
        ledger.put("model.compile", "on", theirs="torch_compile", meaning="decoder layers alone are compiled")
    template = ledger.get("chat_template_path")
    if template and str(template).endswith((".jinja", ".j2", ".txt")):
        ledger.put("data.chat_template", str(template), theirs="chat_template_path")
    elif template:
        ledger.lack(
            "chat_template_path", "a tokenizer elsewhere; save its chat template as a Jinja file: data.chat_template"
        )


def _data(ledger: Ledger) -> tuple[bool, int]:
    """Sources, masks and lengths. Returns whether they pack, and the longest example."""
    if mixture := ledger.get("datasets"):
        sources = [source for entry in mixture for source in _sources(ledger, dict(entry))]
        ledger.put("data.train", sources, theirs="datasets")
    elif name := ledger.get("dataset_name"):
        source = {"path": str(name), "split": str(ledger.get("dataset_train_split", "train"))}
        ledger.put("data.train", [_short(source)], theirs="dataset_name, dataset_train_split")
        if str(ledger.get("eval_strategy", "no")) not in ("no", "False"):
            held_out = {"path": str(name), "split": str(ledger.get("dataset_test_split", "test"))}
            ledger.put(
                "data.held_out",
                [held_out],
                theirs="dataset_test_split",
                meaning="" if "dataset_test_split" in ledger.given else "their default",
            )
    else:
        ledger.put("data.train", [{"path": "SET-ME.jsonl"}], remark="YOURS TO SET")
        ledger.ask("dataset_name", "is not in the file (they give it on the command line): set data.train")
    ledger.seen |= {"dataset_name", "dataset_train_split", "dataset_test_split"}
    if share := ledger.get("test_split_size"):
        ledger.put(
            "data.held_out_share",
            float(share),
            theirs="test_split_size",
            meaning="by a hash of the prompt: equal prompts fall on the same side",
        )
    return _masks_and_lengths(ledger)


def _sources(ledger: Ledger, entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Our sources of one entry of `datasets`."""
    files = entry.get("data_files")
    path = str(entry.get("path", ""))
    for key in ("name", "data_dir", "columns", "fraction"):
        if entry.get(key) is not None:
            ledger.lack(
                f"datasets[{path}].{key}", "no counterpart; weight: and cap: mix sources, files are given by path"
            )
    if isinstance(files, str):
        files = [files]
    if isinstance(files, list) and path in ("json", "csv", "parquet"):
        return [{"path": str(file)} for file in files]
    return [_short({"path": path, "split": str(entry.get("split", "train"))})]


def _short(source: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in source.items() if (key, value) != ("split", "train")}


def _masks_and_lengths(ledger: Ledger) -> tuple[bool, int]:
    if ledger.is_on("assistant_only_loss") or ledger.is_on("completion_only_loss"):
        key = "assistant_only_loss" if ledger.is_on("assistant_only_loss") else "completion_only_loss"
        meaning = "the newlines after `assistant` and after the stop token, which TRL trains, are left out"
        ledger.put("data.turns", "all", theirs=key, meaning=meaning)
    else:
        ledger.lack("assistant_only_loss", PROMPT_TOO)
    ledger.seen |= {"assistant_only_loss", "completion_only_loss"}
    packed = ledger.is_on("packing")
    if packed:
        strategy = ledger.get("packing_strategy", "bfd")
        meaning = "documents never see each other" + ("; with wrapped, theirs did" if strategy == "wrapped" else "")
        ledger.put("batch.packing", True, theirs="packing", meaning=meaning)
    key = "max_seq_length" if "max_seq_length" in ledger.given else "max_length"
    given = ledger.given.get(key, 1024)
    if given is None:
        given = 4096
        ledger.ask(
            key, "no limit there; data.max_tokens is set to 4096: raise it to the longest example (sft-dist inspect)"
        )
    ledger.put(
        "data.max_tokens",
        int(given),
        theirs=key,
        meaning="longer rows are dropped and counted; TRL cuts their end off, and with it the answer's",
    )
    ledger.seen |= {"max_length", "max_seq_length", "truncation_mode"}
    return packed, int(given)
