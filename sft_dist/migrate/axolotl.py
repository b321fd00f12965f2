"""`axolotl train file.yaml`."""

from sft_dist.migrate import axolotl_data, schedule, shared
from sft_dist.migrate.ledger import Ledger, Same

SIGNS = ("base_model", "sequence_len", "micro_batch_size", "sample_packing", "num_epochs", "val_set_size", "adapter")

SAME = {
    "base_model": Same("model.path"),
    "learning_rate": Same("optim.lr", convert=shared.number),
    "weight_decay": Same("optim.weight_decay", "norms and biases are left out, as there", shared.number),
    "adam_epsilon": Same("optim.eps", convert=shared.number),
    "seed": Same("run.seed", "the order of examples is another one all the same", int),
    "dataset_processes": Same("data.workers", convert=int),
    "dataset_num_proc": Same("data.workers", convert=int),
}


LACKING = {
    **dict.fromkeys(
        """
        lora_r lora_alpha lora_dropout lora_target_modules lora_target_linear lora_modules_to_save lora_fan_in_fan_out
        lora_model_dir peft peft_use_dora peft_use_rslora peft_layers_to_transform lora_mlp_kernel lora_qkv_kernel
        lora_o_kernel relora relora_steps loftq merge_lora loraplus_lr_ratio loraplus_lr_embedding
        """.split(),
        "adapters: all parameters are trained",
    ),
    "neftune_noise_alpha": "NEFTune's noise on embeddings is not there",
    "noisy_embedding_alpha": "NEFTune's noise on embeddings is not there",
    "embedding_lr": "all parameters have the same rate",
    "embedding_lr_scale": "all parameters have the same rate",
    "lr_groups": "all parameters have the same rate",
    "optim_args": "AdamW's settings are optim.betas, optim.eps and optim.weight_decay",
    "optim_target_modules": "all parameters are trained alike",
    "unfrozen_parameters": "no layer is frozen: all parameters are trained",
    "lr_quadratic_warmup": "warm-up is linear",
    "cosine_constant_lr_ratio": "the cosine ends at optim.min_lr, without a plateau",
    "curriculum_sampling": "data.order has easy-first orders",
    "shuffle_merged_datasets": "data.order: shuffle draws over all sources",
    "dataset_exact_deduplication": "sft-dist lint names duplicates; remove them from the files",
    "early_stopping_patience": "there is no early stopping; train.keep_best keeps the best checkpoints",
    "loss_watchdog_threshold": "train.spike_guard withholds updates whose loss jumps",
    "loss_watchdog_patience": "train.max_withheld ends a run after so many withheld updates",
    "sequence_parallel_degree": "parallel by data only; data.max_tokens has to fit on one GPU",
    "context_parallel_size": "parallel by data only; data.max_tokens has to fit on one GPU",
    "tensor_parallel_size": "parallel by data only; zero3 spreads the weights",
    "use_pose": "positions are those of the document",
    "special_tokens": "set them in the tokenizer and save it; a base model without a template gets ChatML by itself",
    "tokens": "add tokens to the tokenizer and save model and tokenizer first",
    "added_tokens_overrides": "rename tokens in the tokenizer first",
    "eot_tokens": "the stop token is what the template writes after an answer",
    "default_system_message": "put the system prompt into the rows",
    "overrides_of_model_config": "edit the model's config.json",
    "model_config": "edit the model's config.json",
    "plugins": "there are no plugins",
    "unsloth_cross_entropy_loss": "the loss never holds the logits whole, with no package",
    "cut_cross_entropy": "the loss never holds the logits whole, with no package",
    "liger_fused_linear_cross_entropy": "the loss never holds the logits whole, with no package",
    "liger_cross_entropy": "the loss never holds the logits whole, with no package",
    "flash_attn_cross_entropy": "the loss never holds the logits whole, with no package",
    "tokenizer_config": "the tokenizer is the one in model.path",
    "base_model_config": "the config is the one in model.path",
    "hub_model_id": "the model is written to run.dir/run.name/model; upload it from there",
    "push_dataset_to_hub": "tokenised data stays in data.store",
    "resume_from_checkpoint": shared.THEIR_CHECKPOINTS,
    "auto_resume_from_checkpoints": "the same command always goes on",
    "do_bench_eval": "sft-dist evaluate scores answers",
    "do_causal_lm_eval": "sft-dist evaluate scores answers",
    "eval_table_size": "sft-dist evaluate scores answers",
    "fp8": "there is no fp8",
    "qat": "no quantised weights",
    "quantization": "no quantised weights",
    "min_sample_len": "short rows are kept; sft-dist lint names empty ones",
    "group_by_length": "steps are balanced without it",
    "auto_find_batch_size": "the batch is what the recipe says",
    "save_only_model": "checkpoints always hold what is needed to go on",
    "tf32": "fp32 is multiplied as torch does by default",
    "use_tensorboard": "metrics.jsonl in the run's directory has every step",
    "use_mlflow": "metrics.jsonl in the run's directory has every step",
    "use_comet": "metrics.jsonl in the run's directory has every step",
    "mlflow_tracking_uri": "metrics.jsonl in the run's directory has every step",
    "comet_project_name": "metrics.jsonl in the run's directory has every step",
}

IDLE = dict.fromkeys(
    """
    strict tokenizer_type model_type type_of_model tokenizer_use_fast tokenizer_legacy is_falcon_derived_model
    is_llama_derived_model is_mistral_derived_model is_qwen_derived_model dataset_prepared_path pad_to_sequence_len
    eval_sample_packing logging_steps debug local_rank world_size ddp ddp_timeout gradient_checkpointing_kwargs
    dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor dataloader_drop_last remove_unused_columns
    eval_batch_size include_tokens_per_second save_safetensors low_cpu_mem_usage device device_map max_memory
    gc_steps hf_use_auth_token wandb_entity wandb_name wandb_run_id wandb_log_model wandb_watch wandb_mode
    sample_packing_group_size sample_packing_bin_size sample_packing_eff_est sample_packing_sequentially
    multipack_real_batches total_num_tokens total_supervised_tokens flash_attn_rms_norm flash_attn_fuse_qkv
    flash_attn_fuse_mlp batch_flattening dataset_keep_in_memory dataset_shard_num dataset_shard_idx
    skip_prepare_dataset greater_is_better metric_for_best_model profiler_steps load_in_8bit load_in_4bit torch_dtype
    liger_rope liger_rms_norm liger_layer_norm liger_glu_activation float32 float16 bfloat16 train_on_inputs
    chat_template
    bf16 fp16 gptq strict_loading experimental_skip_move_to_device use_ray ray_num_workers xformers_attention
    flex_attention s2_attention eager_attention fsdp_final_state_dict_type deepspeed eval_max_new_tokens
    shuffle_before_merging_datasets
    """.split(),
    "",
)


def convert(ledger: Ledger, *, full: bool) -> None:
    """Fill the ledger. full: a file for adapters becomes full fine-tuning, because its owner says so."""
    _method(ledger, full=full)
    ledger.take_same(SAME)
    _model(ledger)
    max_tokens = int(ledger.get("sequence_len", 512))
    meaning = "longer rows are dropped and counted"
    ledger.put("data.max_tokens", max_tokens, theirs="sequence_len", meaning=meaning)
    _too_long(ledger)
    axolotl_data.put_sources(ledger)
    packed = ledger.is_on("sample_packing")
    if packed:
        ledger.put(
            "batch.packing",
            True,
            theirs="sample_packing",
            meaning="documents never see each other, whatever the attention",
        )
    step = _step(ledger, packed=packed, max_tokens=max_tokens)
    schedule.put_schedule(ledger, "lr_scheduler", default="cosine")
    if (ratio := ledger.get("cosine_min_lr_ratio")) is not None:
        ledger.put("optim.min_lr", ledger.recipe["optim.lr"] * float(ratio), theirs="cosine_min_lr_ratio")
    schedule.put_optimizer(ledger, "optimizer")
    rows = schedule.count_rows(ledger.recipe["data.train"], 0.0)
    rows = axolotl_data.put_held_out(ledger, rows)
    length = schedule.put_length(ledger, step, epochs_key="num_epochs", default_epochs=1.0, num_rows=rows)
    schedule.put_warmup(ledger, length, default_share=0.03, default_most=100)
    for what in ("eval", "save"):
        _per_epoch(ledger, what, length)
        schedule.put_every(
            ledger, what, length, strategies=(f"{what}_strategy", "evaluation_strategy")[: 1 + (what == "eval")]
        )
    schedule.put_saves(ledger)
    shared.put_engine(ledger)
    shared.put_wandb(ledger, project_key="wandb_project", project_is_enough=True)
    if "wandb.project" in ledger.recipe and ledger.get("wandb_mode") == "offline":
        ledger.put("wandb.mode", "offline", theirs="wandb_mode")
    shared.put_run(ledger, output="model-out", name_key="wandb_name")
    ledger.note_lacking(LACKING)
    ledger.note_idle(IDLE)


def _method(ledger: Ledger, *, full: bool) -> None:
    if ledger.is_on("adapter"):
        shared.adapters(ledger, "adapter", full=full)
    shared.quantised(ledger, ("load_in_8bit", "load_in_4bit", "gptq"), full=full)
    for key in ("rl", "reward_model", "process_reward_model"):
        if ledger.is_on(key):
            ledger.refuse(key, "only supervised fine-tuning; preference tuning and reward models are out of scope")
    if ledger.is_on("pretraining_dataset"):
        ledger.refuse("pretraining_dataset", "raw text is not trained: rows are conversations")


def _model(ledger: Ledger) -> None:
    for missing, ours, value in (("base_model", "model.path", "SET/ME"), ("learning_rate", "optim.lr", 1e-5)):
        if ours not in ledger.recipe:
            ledger.put(ours, value, remark="YOURS TO SET")
            ledger.ask(missing, f"is not in the file: set {ours}")
    for key in ("revision_of_model", "model_revision"):
        if ledger.get(key):
            ledger.put("model.revision", str(ledger.given[key]), theirs=key)
    shared.put_dtype(ledger)
    shared.put_attention(ledger, "attn_implementation")
    for key, name in (("flash_attention", "flash_attention"), ("sdp_attention", "sdpa"), ("eager_attention", "sdpa")):
        if ledger.is_on(key):
            ledger.put("model.attention", name, theirs=key, meaning="auto would do without the package, too")
    for key in ("xformers_attention", "flex_attention"):
        if ledger.is_on(key):
            ledger.put("model.attention", "auto", theirs=key, meaning="auto says which it takes")
    shared.put_remote_code(ledger, "trust_remote_code")
    shared.put_checkpointing(ledger, "gradient_checkpointing", default=False)
    liger = [
        key for key in ("liger_rope", "liger_rms_norm", "liger_layer_norm", "liger_glu_activation") if ledger.is_on(key)
    ]
    if liger:
        ledger.put("model.kernels", "liger", theirs=", ".join(liger))
    if ledger.is_on("torch_compile") and ledger.given["torch_compile"] != "auto":
        ledger.put("model.compile", "on", theirs="torch_compile", meaning="decoder layers alone are compiled")
    ledger.seen |= {"torch_compile", "torch_compile_backend", "torch_compile_mode"}
    template, text = ledger.get("chat_template", "tokenizer_default"), ledger.get("chat_template_jinja")
    if text and "{" not in str(text):
        ledger.put("data.chat_template", str(text), theirs="chat_template_jinja")
    elif text:
        ledger.ask("chat_template_jinja", "save the template as a file and name it in data.chat_template")
    elif not str(template).startswith("tokenizer_default"):
        ledger.ask(
            "chat_template",
            f"{template} is theirs; here it is the tokenizer's own, ChatML where it has none, or data.chat_template",
        )
    ledger.seen.add("chat_template")


def _step(ledger: Ledger, *, packed: bool, max_tokens: int) -> shared.Step:
    micro = int(ledger.get("micro_batch_size", 1))
    accumulation = int(ledger.get("gradient_accumulation_steps", 1))
    keys = "micro_batch_size, gradient_accumulation_steps"
    if (total := ledger.get("batch_size")) is not None and "gradient_accumulation_steps" not in ledger.given:
        accumulation, keys = max(1, int(total) // (micro * (ledger.gpus or 1))), "batch_size, micro_batch_size"
    return shared.put_step(
        ledger, keys=keys, per_device=micro, accumulation=accumulation, packed=packed, max_tokens=max_tokens
    )


def _too_long(ledger: Ledger) -> None:
    strategy = str(ledger.get("excess_length_strategy", "drop"))
    if strategy == "truncate":
        text = "no answer is ever cut; data.too_long: truncate leaves the oldest turns out, whole"
        ledger.lack("excess_length_strategy", text)
    elif strategy == "raise":
        ledger.put("data.too_long", "error", theirs="excess_length_strategy")
    elif "excess_length_strategy" in ledger.given:
        ledger.put("data.too_long", "drop", theirs="excess_length_strategy")


def _per_epoch(ledger: Ledger, what: str, length: schedule.Length) -> None:
    key = f"{what}s_per_epoch"
    count = ledger.get(key)
    if not count:
        ledger.idle += [key] * (key in ledger.given)
    elif not schedule.can_come(ledger, what, key):
        return
    elif length.per_epoch:
        ledger.put(
            f"train.{what}_every",
            max(1, int(length.per_epoch / shared.number(count))),
            theirs=key,
            meaning=f"{length.per_epoch} steps an epoch",
        )
    else:
        ledger.ask(key, f"set train.{what}_every to the steps of an epoch (sft-dist inspect tells) divided by {count}")
