"""Keys of transformers' TrainingArguments, which TRL and LLaMA-Factory both take."""

from sft_dist.migrate import schedule
from sft_dist.migrate.ledger import Ledger, Same
from sft_dist.migrate.shared import THEIR_CHECKPOINTS, Step, number

SAME = {
    "weight_decay": Same("optim.weight_decay", "norms and biases are left out, as there", number),
    "adam_epsilon": Same("optim.eps", convert=number),
    "seed": Same("run.seed", "the order of examples is another one all the same", int),
}

LACKING = {
    "neftune_noise_alpha": "NEFTune's noise on embeddings is not there",
    "label_smoothing_factor": "the loss has no label smoothing",
    "auto_find_batch_size": "the batch is what the recipe says; out of memory is explained, with a mend",
    "optim_args": "AdamW's settings are optim.betas, optim.eps and optim.weight_decay",
    "optim_target_modules": "all parameters are trained alike",
    "train_sampling_strategy": "the order is data.order: shuffle, or a curriculum",
    "group_by_length": "steps are balanced without it: what is in a step does not depend on lengths",
    "length_column_name": "lengths are known from the store",
    "early_stopping_patience": "there is no early stopping; train.keep_best keeps the best checkpoints",
    "push_to_hub": "the model is written to run.dir/run.name/model; upload it from there",
    "hub_model_id": "the model is written to run.dir/run.name/model; upload it from there",
    "hub_token": "keep tokens out of files; the hub's client reads its own",
    "save_only_model": "checkpoints always hold what is needed to go on",
    "activation_offloading": "activations are not offloaded; model.checkpointing: full recomputes them",
    "liger_kernel_config": "model.kernels: liger takes norm, rotary embedding and SwiGLU",
    "torch_compile_backend": "layers are compiled with inductor",
    "torch_compile_mode": "layers are compiled with inductor's default mode",
    "parallelism_config": "parallel by data only",
    "resume_from_checkpoint": THEIR_CHECKPOINTS,
    "ignore_data_skip": "a resumed run goes on at the same example",
    "eval_on_start": "the held-out loss is always measured before step 1",
    "metric_for_best_model": "train.keep_best goes by the held-out loss",
    "tf32": "fp32 is multiplied as torch does by default",
    "bf16_full_eval": "evaluation computes in the dtype of training",
    "fp16_full_eval": "evaluation computes in the dtype of training",
    "average_tokens_across_devices": "it always does: weights of tokens are final before the step is spread",
}

IDLE = dict.fromkeys(
    """
    do_train do_eval do_predict overwrite_output_dir logging_steps logging_strategy logging_first_step logging_dir
    log_level log_level_replica log_on_each_node disable_tqdm per_device_eval_batch_size eval_accumulation_steps
    eval_delay eval_do_concat_batches eval_use_gather_object batch_eval_metrics prediction_loss_only data_seed
    dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers
    dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers
    ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout debug enable_jit_checkpoint
    full_determinism gradient_checkpointing_kwargs greater_is_better hub_always_push hub_private_repo hub_revision
    hub_strategy include_for_metrics include_num_input_tokens_seen include_tokens_per_second label_names local_rank
    logging_nan_inf_filter remove_unused_columns restore_callback_states_from_checkpoint save_on_each_node
    save_safetensors skip_memory_metrics torch_empty_cache_steps trackio_space_id trackio_bucket_id
    trackio_static_space_id use_cache use_cpu accelerator_config activation_checkpointing_kwargs
    """.split(),
    "about their own machinery",
)


def put_updates(ledger: Ledger, *, default_lr: float) -> None:
    """The section optim."""
    if "optim.lr" not in ledger.recipe:
        ledger.put("optim.lr", default_lr, meaning="their default", remark="their default")
    schedule.put_schedule(ledger, "lr_scheduler_type", default="linear")
    schedule.put_optimizer(ledger, "optim")


def put_course(ledger: Ledger, step: Step, *, num_rows: int | None) -> None:
    """The length of the run and what comes every so many steps."""
    length = schedule.put_length(ledger, step, epochs_key="num_train_epochs", default_epochs=3.0, num_rows=num_rows)
    schedule.put_warmup(ledger, length)
    schedule.put_every(ledger, "eval", length, strategies=("eval_strategy", "evaluation_strategy"))
    schedule.put_every(ledger, "save", length, strategies=("save_strategy",))
    schedule.put_saves(ledger)
