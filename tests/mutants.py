"""Bugs planted one at a time: the suite must notice each of them.

    python tests/mutants.py             all of them, as `make mutants` does
    python tests/mutants.py clip shift  those whose name contains one of the words

Each bug is one replacement in a copy of the project, judged by the tests that ought to catch it. It is caught when
those tests run and fail. It is no proof when they cannot run at all, so that is an error here: a text to replace that
is not there exactly once, a selection that finds no test, a copy that breaks on a name or an import, a test that hangs.
Exit code 0: every bug is caught.
"""

import contextlib
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "runs", "build", "dist", "*.egg-info")
SIDE_BY_SIDE = 2
# What most tests import, and nothing of the project: loaded once, as that takes longer than most tests.
PRELOADED = ["pytest", "hypothesis", "torch.distributed", "transformers.models.qwen2.modeling_qwen2", "rich.live"]
TIME_LIMIT_S = 300
BASELINE_TIME_LIMIT_S = 900
# As tests/conftest.py has them, but before anything is loaded; and lines that are not cut.
SETTINGS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
SURVIVED = "SURVIVED"
# Errors of a replacement that does not fit its surroundings, not of a trainer that is wrong.
BROKEN = re.compile(
    r"^(?:E\s+)?(?:SyntaxError|IndentationError|ImportError|ModuleNotFoundError|NameError|UnboundLocalError): .*", re.M
)
# A test that failed, not a fixture that did: what breaks the set-up was not noticed by a test.
FAILED = re.compile(r"^FAILED (\S+::\S+)", re.M)

BATCH, CHAT, STORE = "unit/test_batch.py", "unit/test_chat.py", "unit/test_store.py"
TEMPLATES, DRAWS = "unit/test_templates.py", "unit/test_draws.py"
LOSS, ATTENTION = "unit/test_loss.py", "unit/test_attention.py"
GENERATE = "unit/test_generate.py"
COMPILE, SUBMIT = "unit/test_compile.py", "unit/test_submit.py"
SCHEDULE, RATES = "unit/test_schedule.py", "unit/test_optim.py"
CURVE, RESUME = "numerics/test_curve.py", "numerics/test_resume.py"
SHIFT = f"{BATCH}::test_a_trained_token_is_predicted_from_the_position_before_it"
REFERENCE = f"{CURVE}::test_a_single_process_draws_the_reference_curve[single-packs-example_mean-r103-w1]"
LAYOUT = f"{CURVE}::test_every_layout_draws_the_single_process_curve"
RESUMED = f"{RESUME}::test_a_resumed_run_is_the_uninterrupted_run[single-packs-example_mean-r103-from5-w1]"


@dataclass(frozen=True)
class Mutant:
    """A planted bug. file: under sft_dist/; `old` occurs in it once; tests: node ids under tests/ that must notice."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = [
    # ------------------------------------------------------------ which token is trained, with what weight
    Mutant(
        "targets shifted twice",
        "data/batch.py",
        "targets = [document[positions] for",
        "targets = [document[np.minimum(positions + 1, len(document) - 1)] for",
        SHIFT,
    ),
    Mutant(
        "response index off by one",
        "data/batch.py",
        "index = [start + positions - 1 for",
        "index = [start + positions for",
        SHIFT,
    ),
    Mutant(
        "positions run on across documents",
        "data/batch.py",
        "torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None]",
        "torch.arange(sum(lengths))[None]",
        f"{BATCH}::test_a_pack_is_its_documents_end_to_end",
    ),
    Mutant(
        "example_mean weighs like token_mean",
        "data/batch.py",
        'if loss == "example_mean":',
        'if loss == "mean":',
        f"{BATCH}::test_example_mean_gives_every_example_the_same_total",
    ),
    Mutant(
        "N counts the examples of the pack only",
        "data/batch.py",
        "[weight_of[i] for i in pack],",
        "[weight_of[i] * len(weight_of) / len(pack) for i in pack],",
        f"{BATCH}::test_weights_sum_to_one_over_all_ranks_and_micro_batches[2]",
    ),
    Mutant(
        # Every weight still adds up to 1: only another layout's curve shows it.
        "mean of micro-batch means",
        "loop.py",
        "share = engine(micro)  #",
        "share = engine(micro) / (micro.weights.sum() * len(batch.micros))  #",
        f"{LAYOUT}[single-onepack-example_mean-r103-w1]",
    ),
    Mutant(
        "filler trains a token",
        "data/batch.py",
        "[np.zeros(FILLER_TOKENS, bool)], [0.0]",
        "[np.arange(FILLER_TOKENS) > 0], [0.1]",
        f"{BATCH}::test_a_filler_is_a_document_without_responses",
    ),
    Mutant(
        "fillers left out",
        "data/schedule.py",
        "micro_steps.append(tuple(row))",
        "micro_steps.append(tuple(pack for pack in row if pack))",
        f"{SCHEDULE}::test_every_draw_of_a_step_is_trained_exactly_once",
    ),
    Mutant(
        "every micro-batch is the last",
        "data/batch.py",
        "is_last=m == last)",
        "is_last=True)",
        f"{BATCH}::test_weights_sum_to_one_over_all_ranks_and_micro_batches[2]",
    ),
    # ------------------------------------------------------------ model and loss
    Mutant(
        "documents attend to each other",
        "model/attention.py",
        "return torch.cat([_attend_document(*qkv, scale=scale, window=window, dropout=dropout) for qkv in documents])",
        "return _attend_document(q, k, v, scale=scale, window=window, dropout=dropout)",
        f"{ATTENTION}::test_perturbing_one_document_leaves_the_others_unchanged",
    ),
    Mutant(
        "check against the model's own logits disabled",
        "model/verify.py",
        "if not (agreement.logit_error <= tolerance and loss_error <= tolerance):",
        "if agreement.logit_error < 0:",
        f"{ATTENTION}::test_a_soft_capped_model_is_refused_with_both_numbers",
    ),
    Mutant(
        "check against the model's own logits not made",
        "train.py",
        "agreement = require_own_loss(",
        "from sft_dist.model.verify import compare_with_own_logits\n        agreement = compare_with_own_logits(",
        "launch/test_errors.py::test_a_model_whose_logits_disagree",
    ),
    Mutant(
        "added tokens start at noise",
        "model/load.py",
        "weight[new] = weight[~new].float().mean(0).to(weight.dtype)",
        "pass",
        "unit/test_base_model.py::test_new_rows_start_at_the_mean_and_old_ones_stay",
    ),
    Mutant(
        "head gradient summed in bf16",
        "model/loss.py",
        "torch.zeros_like(weight, dtype=torch.float32)",
        "torch.zeros_like(weight)",
        f"{LOSS}::test_bf16_weight_gradient_is_summed_in_fp32_over_chunks",
    ),
    Mutant(
        "head ignores the engine's scale",
        "model/loss.py",
        "scale = grad_outputs[0]",
        "scale = torch.ones_like(grad_outputs[0])",
        f"{LOSS}::test_loss_and_gradients_equal_full_logits_in_double_precision",
    ),
    Mutant(
        "equal sizes of the first pack are one size",
        "model/compile.py",
        "use_duck_shape=False",
        "use_duck_shape=True",
        f"{COMPILE}::test_packs_of_every_size_share_one_graph_and_its_results[qwen2-none]",
    ),
    Mutant(
        "constants become inputs of graphs",
        "model/compile.py",
        "specialize_float=True",
        "specialize_float=False",
        f"{COMPILE}::test_packs_of_every_size_share_one_graph_and_its_results[qwen3-none]",
    ),
    Mutant(
        "a graph for every longest document",
        "model/attention.py",
        "max(2, 1 << (micro.max_seqlen - 1).bit_length())",
        "micro.max_seqlen",
        f"{COMPILE}::test_the_longest_document_is_rounded_up_to_a_power_of_two[3-4]",
    ),
    Mutant(
        "flash-attn 4 sees one token too many",
        "model/attention.py",
        "(None, None) if window is None else (window - 1, 0)",
        "(-1, 0) if window is None else (window, 0)",
        "unit/test_kernels.py::test_a_flash_backend_is_called_for_the_attention_that_sdpa_computes[flash_attention_4-8]",
    ),
    Mutant(
        "selective checkpointing attends again",
        "model/checkpointing.py",
        "MUST_SAVE if is_attention",
        "MUST_SAVE if not is_attention",
        "unit/test_checkpointing.py::test_selective_keeps_attention_outputs_and_no_more",
    ),
    Mutant(
        "measuring recomputes activations",
        "model/checkpointing.py",
        "    causal_lm.disable_input_require_grads()\n",
        "    pass\n",
        f"{COMPILE}::test_packs_of_every_size_share_one_graph_and_its_results[qwen3-full]",
    ),
    Mutant(
        "the loss is looked at in the forward",
        "model/load.py",
        "        result: Tensor = self.head(",
        "        assert bool(hidden.isfinite().all())\n        result: Tensor = self.head(",
        "unit/test_no_sync.py::test_forward_and_backward_read_nothing_back[qwen2-none-single]",
    ),
    Mutant(
        "tied weights are counted twice",
        "shape.py",
        "(1 if self.is_tied else 2)",
        "2",
        "unit/test_shape.py::test_matrices_are_counted_as_by_hand",
    ),
    Mutant(
        "the last layer keeps the first rows, not the trained ones",
        "model/last_layer.py",
        "hidden.index_select(1, response_index)",
        "hidden[:, : len(response_index)]",
        "unit/test_last_layer.py::test_loss_and_gradients_are_those_of_the_whole_layer[qwen2-none]",
    ),
    Mutant(
        "the last layer keeps all rows",
        "model/last_layer.py",
        "if response_index is not None:",
        "if False:",
        "unit/test_last_layer.py::test_the_last_mlp_sees_trained_rows_alone",
    ),
    # ------------------------------------------------------------ engines
    Mutant(
        "DeepSpeed's throughput timer waits before each forward",
        "engine/zero.py",
        '"throughput": {"enabled": False}',
        '"throughput": {"enabled": True}',
        "distributed/test_step_traffic.py",
    ),
    Mutant(
        "DeepSpeed averages over ranks",
        "engine/zero.py",
        "self.deepspeed.backward(loss * self.world.size,",
        "self.deepspeed.backward(loss,",
        f"{LAYOUT}[zero2-packs-example_mean-r103-w2]",
    ),
    Mutant(
        "DDP does not sum gradients over ranks",
        "engine/local.py",
        "if self.world.size > 1:",
        "if self.world.size > 99:",
        f"{LAYOUT}[ddp-packs-example_mean-r103-w2]",
    ),
    Mutant(
        "bf16 weights updated without an fp32 master",
        "engine/local.py",
        "weight.copy_(self._masters[name])",
        "self._masters[name].copy_(weight.copy_(self._masters[name]))",
        "numerics/test_bf16.py::test_layouts_spread_a_bf16_curve_at_most_twice_as_much_as_orders_do",
    ),
    Mutant(
        "clipping ignored",
        "engine/local.py",
        "torch._foreach_mul_(gradients, scale)",
        "pass",
        REFERENCE,
    ),
    Mutant(
        "ZeRO clipping ignored",
        "engine/zero.py",
        '"gradient_clipping": max_grad_norm,',
        '"gradient_clipping": 0.0,',
        f"{LAYOUT}[zero2-packs-example_mean-r103-w2]",
    ),
    Mutant(
        "learning rate of the step before",
        "loop.py",
        "lr = lr_at(batch.step,",
        "lr = lr_at(max(1, batch.step - 1),",
        REFERENCE,
    ),
    Mutant(
        "decay begins a step early",
        "optim.py",
        "progress = (step - optim.warmup_steps - 1)",
        "progress = (step - optim.warmup_steps)",
        f"{RATES}::test_linear_and_constant",
    ),
    Mutant(
        "weight decay on norms and biases",
        "optim.py",
        '{"params": undecayed, "weight_decay": 0.0}',
        '{"params": undecayed, "weight_decay": optim.weight_decay}',
        REFERENCE,
    ),
    Mutant(
        "held-out loss is a mean of pack means",
        "evaluate.py",
        "total += engine(build_micro_batch(store, row[rank], weight_of, is_last=False).to(engine.device))",
        "micro = build_micro_batch(store, row[rank], weight_of, is_last=False).to(engine.device)\n"
        "                total += engine(micro) / (micro.weights.sum() * len(self.micro_steps))",
        f"{CURVE}::test_held_out_loss_is_the_same_on_every_layout[single-packs-example_mean-r103-eval7-w1]",
    ),
    # ------------------------------------------------------------ schedule
    Mutant(
        "a step reaches into the next epoch",
        "data/schedule.py",
        "return epoch, draws[bounds[index] : bounds[index + 1]]",
        "ids = draws[bounds[index] : bounds[index + 1]]\n"
        "        missing = (self._examples or len(ids)) - len(ids)\n"
        "        return epoch, np.append(ids, self._epoch(epoch + 1)[0][:missing])",
        f"{SCHEDULE}::test_an_epoch_ends_a_step_and_the_next_is_reshuffled",
    ),
    Mutant(
        "the short last step of an epoch is dropped",
        "data/schedule.py",
        "return np.append(np.arange(0, n, examples, dtype=np.int64), n)",
        "return np.arange(0, n + 1, examples, dtype=np.int64)",
        f"{SCHEDULE}::test_an_epoch_ends_a_step_and_the_next_is_reshuffled",
    ),
    Mutant(
        "seed ignored",
        "data/draws.py",
        "np.random.PCG64([seed, epoch])",
        "np.random.PCG64([0, epoch])",
        f"{SCHEDULE}::test_seed_and_epoch_decide_the_draws",
    ),
    Mutant(
        "every epoch in the same order",
        "data/draws.py",
        "np.random.PCG64([seed, epoch])",
        "np.random.PCG64([seed, 0])",
        f"{SCHEDULE}::test_an_epoch_ends_a_step_and_the_next_is_reshuffled",
    ),
    Mutant(
        "a rank is slow beside the slower of two",
        "status.py",
        "statistics.median_low(",
        "statistics.median_high(",
        "unit/test_status.py::test_the_rank_above_the_median_is_slow",
    ),
    Mutant(
        "uneven packs are called slowness",
        "status.py",
        " * imbalance / max(2 - imbalance, 0.1)",
        "",
        "unit/test_status.py::test_what_uneven_packs_explain_is_no_slowness",
    ),
    Mutant(
        "a host whose clock is behind is called lost",
        "status.py",
        "beat is None or beat.beat == before.beat.beat",
        "True",
        "unit/test_status.py::test_a_host_whose_clock_is_behind_is_not_lost_while_it_beats",
    ),
    Mutant(
        "status blames the rank that spoke first",
        "status.py",
        "(rank.beat.blamed != rank.beat.rank, rank.beat.time)",
        "rank.beat.time",
        "unit/test_status.py::test_a_run_that_failed_gives_the_reason_of_who_is_to_blame",
    ),
    Mutant(
        "status reads the weights",
        "status.py",
        "state = commits.read_state(newest[0])",
        "commits.verify(newest[0]); state = commits.read_state(newest[0])",
        "unit/test_status.py::test_the_bytes_of_weights_are_not_read",
    ),
    Mutant(
        "the step that warms up counts as a forward pass",
        "forward_time.py",
        "        if self._is_warm:",
        "        if True:",
        "unit/test_forward_time.py::test_the_first_step_which_warms_up_is_left_out",
    ),
    Mutant(
        "a begun run without a trace in the metrics starts again",
        "job.py",
        'if after := max((start["after_step"] for start in starts), default=0):',
        "if after := 0:",
        "launch/test_resume.py::test_a_begun_run_is_known_by_any_trace_of_it",
    ),
    Mutant(
        "a run's own checkpoint is noted by its whole path",
        "run_record.py",
        "return checkpoint.name if own else",
        "return checkpoint.name if False else",
        "launch/test_resume.py::test_a_run_that_was_moved_goes_on_from_its_own_checkpoint",
    ),
    Mutant(
        "a run is cut behind its checkpoint",
        "job.py",
        "if state.step > job.schedule.num_steps:",
        "if False:",
        "launch/test_resume.py::test_a_run_is_not_cut_behind_its_checkpoint",
    ),
    Mutant(
        "a stop file is made before the lock is held",
        "launch.py",
        " or not self.at_work.exists()",
        "",
        "unit/test_launch.py::test_a_signal_becomes_the_stop_file_and_reaches_nobody_else",
    ),
    Mutant(
        "every host looks at the lock",
        "launch.py",
        "    if plan.holds_the_lock:\n        remove_stale",
        "    if True:\n        remove_stale",
        "unit/test_launch.py::test_only_host_0_looks_at_the_lock_and_others_point_to_it_when_they_fail",
    ),
    Mutant(
        "gloo listens where the host's name points",
        "launch.py",
        '{"GLOO_SOCKET_IFNAME": route.interface, ',
        "{",
        "unit/test_launch.py::test_several_hosts_meet_at_an_address_and_are_not_held_on_loopback",
    ),
    Mutant(
        "several hosts are started with the processes of one",
        "launch.py",
        "str(num_processes * num_hosts)",
        "str(num_processes)",
        "unit/test_launch.py::test_several_hosts_meet_at_an_address_and_are_not_held_on_loopback",
    ),
    Mutant(
        "one process where several were asked for, in silence",
        "accelerate_config.py",
        "if kind in ONE and (num_processes or 1) > 1:",
        "if False:",
        "unit/test_accelerate_config.py::test_what_would_be_ignored_in_silence_is_refused",
    ),
    Mutant(
        "an engine is chosen that leaves no room for activations",
        "engine_choice.py",
        "if needs[engine] <= room)",
        "if needs[engine] <= gpu_bytes)",
        "unit/test_engine_choice.py::test_the_plainest_engine_whose_state_leaves_room_for_activations",
    ),
    Mutant(
        "a name that means each host itself is taken for host 0",
        "machine.py",
        ' and main_host not in (destination[0], "localhost")',
        " and False",
        "unit/test_machine.py::test_a_name_that_leads_nowhere_or_to_each_host_itself_is_refused",
    ),
    Mutant(
        "a finished model's perplexity is of the mean per example",
        "evaluation/record.py",
        "math.exp(self.token_mean)",
        "math.exp(self.example_mean)",
        "launch/test_evaluate.py::test_a_finished_model_has_the_loss_that_the_run_ended_with",
    ),
    Mutant(
        "a dominated step fills its other ranks no further",
        "data/schedule.py",
        "if is_even or dearest",
        "if True or is_even or dearest",
        f"{SCHEDULE}::test_beside_a_long_example_the_other_ranks_get_as_much_to_do",
    ),
    Mutant(
        "packs side by side are not evened out",
        "data/schedule.py",
        "rows = [_swap(step, row) for row in _fill(step, order)]",
        "rows = _fill(step, order)",
        f"{SCHEDULE}::test_steps_are_as_even_as_can_be",
    ),
    Mutant(
        "a full pack is never looked at again",
        "data/schedule.py",
        "while aside and -aside[0][0] >= length:",
        "while False:",
        f"{SCHEDULE}::test_steps_are_as_even_as_can_be",
    ),
    Mutant(
        "a swap overfills the other pack",
        "data/schedule.py",
        "fits = (length <= room) & (-length <= rooms[top])",
        "fits = length <= room",
        f"{SCHEDULE}::test_no_pack_is_overfilled_when_examples_change_places",
    ),
    Mutant(
        "room is not counted after a swap",
        "data/schedule.py",
        "rooms[changed] -= sign * int(length[mine, other])",
        "pass",
        f"{SCHEDULE}::test_no_pack_is_overfilled_when_examples_change_places",
    ),
    Mutant(
        "a pack in the order of its costs",
        "data/schedule.py",
        "for place in sorted(pack))",
        "for place in pack)",
        f"{SCHEDULE}::test_a_pack_keeps_the_order_of_the_draws",
    ),
    Mutant(
        "dominated steps are counted against the whole step",
        "data/schedule.py",
        "np.add.reduceat(costs, bounds[:-1]) / world_size",
        "np.add.reduceat(costs, bounds[:-1])",
        f"{SCHEDULE}::test_steps_that_one_example_dominates_are_counted_and_the_worst_is_named",
    ),
    Mutant(
        "the worst step is named by its place in the segment",
        "data/schedule.py",
        "before + worst + 1,",
        "worst + 1,",
        f"{SCHEDULE}::test_dominated_steps_are_counted_from_where_a_later_segment_begins",
    ),
    Mutant(
        "another example is named as the dominating one",
        "banner.py",
        "example_id, share = dominated.example_id, dominated.share",
        "example_id, share = 0, dominated.share",
        "unit/test_banner.py::test_an_example_that_dominates_its_step_is_named",
    ),
    # ------------------------------------------------------------ checkpoints and resume
    Mutant(
        "schedule starts over after a resume",
        "train.py",
        "first_step=state.step + 1,",
        "first_step=1,",
        RESUMED,
    ),
    Mutant(
        "optimizer state not restored",
        "engine/fragments.py",
        "                    target[done - start : end - start].copy_(",
        '                    (target if kind == "master" else target.clone())[done - start : end - start].copy_(',
        RESUMED,
    ),
    Mutant(
        "the optimiser counts its updates from 0 again",
        "engine/local.py",
        '["step"].fill_(num_updates)',
        '["step"].fill_(0)',
        RESUMED,
    ),
    Mutant(
        "ZeRO-3 goes on with the weights it was started with",
        "engine/zero.py",
        "            weights.data.copy_(master.data)\n",
        "            pass\n",
        f"{RESUME}::test_a_resumed_run_is_the_uninterrupted_run[zero3-packs-example_mean-r103-bf16-from6-w2]",
    ),
    Mutant(
        "checkpoint bytes not hashed",
        "commits.py",
        "hashlib.file_digest(handle, xxhash.xxh3_128)",
        "xxhash.xxh3_128()",
        "unit/test_commits.py::test_a_damaged_file_is_named",
    ),
    Mutant(
        "manifest not hashed",
        "commits.py",
        "if xxhash.xxh3_128_hexdigest(text.encode()) != digest:",
        "if not digest:",
        "unit/test_commits.py::test_a_commit_mark_that_names_another_manifest_is_refused",
    ),
    Mutant(
        "ranks that share the reading leave files out",
        "commits.py",
        "files[part::num_parts]",
        "files[part :: num_parts + 1]",
        "unit/test_commits.py::test_ranks_that_share_the_reading_leave_no_file_out",
    ),
    Mutant(
        "another run's checkpoint accepted",
        "checkpoint.py",
        "if changes.curve and not allow_change:",
        "if len(changes.curve) > 99:",
        "unit/test_checkpoint.py::test_settings_that_change_the_curve_are_refused_key_by_key",
    ),
    Mutant(
        "changed draws do not begin a segment",
        "checkpoint.py",
        "    if changes.new_draws:\n",
        "    if False:\n",
        "unit/test_checkpoint.py::test_a_change_that_is_allowed_keeps_the_draws_unless_they_changed",
    ),
    Mutant(
        "one rank's failed write is committed",
        "checkpoint.py",
        "        if num_failed:\n",
        "        if num_failed > 1:\n",
        "unit/test_checkpoint.py::test_a_save_that_fails_anywhere_ends_the_run_and_keeps_the_one_before",
    ),
    Mutant(
        "a save is committed before all ranks have written",
        "checkpoint.py",
        "if pending is None or num_written + num_failed < world.size:",
        "if pending is None:",
        "unit/test_checkpoint.py::test_a_save_is_committed_by_the_step_that_finds_all_ranks_done",
    ),
    Mutant(
        "the copy is no copy",
        "engine/fragments.py",
        "                begin, offset = begin + numel, offset + numel\n",
        "                views = {kind: t[begin : begin + numel] for kind, t in fragment.tensors.items()}\n"
        "                copies[-1] = Fragment(fragment.name, fragment.start + begin, views)\n"
        "                begin, offset = begin + numel, offset + numel\n",
        "unit/test_fragments.py::test_a_snapshot_keeps_what_was_and_its_buffers",
    ),
    Mutant(
        "a broken checkpoint that was named is passed over in silence",
        "checkpoint.py",
        "        if not may_fall_back:\n            break\n",
        "",
        "unit/test_checkpoint.py::test_a_named_one_that_is_broken_is_refused",
    ),
    Mutant(
        "old checkpoints deleted before the new one is whole",
        "commits.py",
        "    free = shutil.disk_usage(directory).free\n",
        "    for old in committed(directory):\n        shutil.rmtree(old)\n"
        "    free = shutil.disk_usage(directory).free\n",
        "unit/test_checkpoint.py::test_a_save_that_fails_anywhere_ends_the_run_and_keeps_the_one_before",
    ),
    Mutant(
        "half a deletion looks committed",
        "commits.py",
        '                path = path.rename(path.with_name(f".old-{path.name}"))\n',
        "                pass\n",
        "unit/test_commits.py::test_what_cannot_be_deleted_is_told_and_tried_again_and_stops_no_save",
    ),
    Mutant(
        "checkpoint committed before its manifest",
        "commits.py",
        "    write_durably(writing / MANIFEST, text)\n",
        "    writing.rename(writing.with_name(writing.name[1:]))\n"
        "    writing = writing.with_name(writing.name[1:])\n"
        "    write_durably(writing / COMMITTED, xxhash.xxh3_128_hexdigest(text.encode()))\n"
        "    write_durably(writing / MANIFEST, text)\n",
        "unit/test_commits.py::test_a_crash_at_any_moment_leaves_whole_checkpoints",
    ),
    Mutant(
        "a checkpoint that everybody may write is trusted",
        "commits.py",
        "if info.st_mode & stat.S_IWOTH:",
        "if info.st_mode & stat.S_IXOTH & ~stat.S_IXOTH:",
        "unit/test_commits.py::test_what_others_own_or_may_write_is_not_trusted",
    ),
    Mutant(
        "update with a gradient that is not finite",
        "engine/local.py",
        "applied = math.isfinite(grad_norm) and not withhold",
        "applied = not withhold",
        "unit/test_local_engine.py::test_a_step_whose_gradient_is_not_finite_is_withheld",
    ),
    Mutant(
        "update with a loss that is not finite",
        "guard.py",
        "if not math.isfinite(loss):",
        "if math.isnan(loss):",
        "unit/test_guard.py::test_a_loss_that_is_not_finite_is_withheld_with_and_without_a_guard",
    ),
    Mutant(
        "a withheld step counts as an update",
        "commits.py",
        "num_updates=self.num_updates + applied,",
        "num_updates=self.num_updates + 1,",
        "unit/test_commits.py::test_a_withheld_step_advances_and_counts_and_an_applied_one_ends_the_count",
    ),
    Mutant(
        "a step that is replayed is not compared",
        "metrics.py",
        "if abs(now - was) > self._tolerance * (1 + abs(was)):",
        "if False:",
        "unit/test_metrics.py::test_what_differs_is_said_with_both_values",
    ),
    Mutant(
        "a dead rank is not looked at",
        "heartbeat.py",
        'status[0] not in "ZX" and ',
        "",
        "unit/test_heartbeat.py::test_a_zombie_is_dead",
    ),
    # ------------------------------------------------------------ clusters
    Mutant(
        "a job whose predecessor failed waits for ever",
        "submit.py",
        '"--kill-on-invalid-dep=yes"',
        '"--parsable"',
        f"{SUBMIT}::test_three_jobs_each_after_the_one_before",
    ),
    Mutant(
        "every job waits for the first",
        "submit.py",
        "after=numbers[-1] if numbers else None",
        "after=numbers[0] if numbers else None",
        f"{SUBMIT}::test_three_jobs_each_after_the_one_before",
    ),
    Mutant(
        "no place for the logs of the jobs",
        "submit.py",
        "(recipe.run.path / LOGS).mkdir(parents=True, exist_ok=True)",
        "pass",
        f"{SUBMIT}::test_three_jobs_each_after_the_one_before",
    ),
    Mutant(
        "jobs before a refused one stay",
        "submit.py",
        'subprocess.run(["scancel", *numbers], env=environ)',
        "pass",
        f"{SUBMIT}::test_a_refused_job_takes_those_before_it_along",
    ),
    Mutant(
        "a job inherits the job it is submitted from",
        "submit.py",
        "environ=without_job(os.environ)",
        "environ=os.environ",
        f"{SUBMIT}::test_settings_of_the_site_reach_sbatch_and_the_jobs",
    ),
    # ------------------------------------------------------------ data
    Mutant(
        "stop token not trained",
        "data/chat.py",
        "is_response[first:last] = True",
        "is_response[first : last - 1] = True",
        f"{CHAT}::test_every_answer_is_trained_through_its_stop_token",
    ),
    Mutant(
        "newline after the stop token trained",
        "data/chat.py",
        "is_response[first:last] = True",
        "is_response[first : last + 1] = True",
        f"{CHAT}::test_newline_after_the_stop_token_is_not_trained",
    ),
    Mutant(
        "forged control tokens let through",
        "data/chat.py",
        'None if control_tokens == "trust" else self._control.found_in(conversation)',
        "None",
        f"{CHAT}::test_exactly_the_trained_answers_are_trained_whatever_the_turns_hold",
    ),
    Mutant(
        "forged control tokens not counted",
        "data/chat.py",
        "(*job.remarks, remark), named=True",
        "job.remarks, named=True",
        f"{STORE}::test_forged_control_tokens_are_counted_with_their_lines",
    ),
    Mutant(
        "control tokens that are to be refused are neutralised",
        "data/chat.py",
        'if control_tokens == "error":',
        'if control_tokens == "refuse":',
        f"{CHAT}::test_a_forged_control_token_is_refused_and_named_if_so_asked",
    ),
    Mutant(
        "words are cut otherwise than by the tokenizer",
        "data/encoder.py",
        "|[{space}]+(?![^{space}])|[{space}]+",
        "|[{space}]+",
        "unit/test_encoder.py::test_tokens_are_those_of_the_library",
    ),
    Mutant(
        "the short way to tokens is never compared",
        "data/encoder.py",
        "            self._compare_one(texts, found)\n",
        "",
        "unit/test_encoder.py::test_a_short_way_that_errs_is_found_and_not_trained",
    ),
    Mutant(
        "the mask begins where every word were one token",
        "data/encoder.py",
        "token += len(self._tokens[word])",
        "token += 1",
        "unit/test_encoder.py::test_spans_have_the_tokens_that_overlap_them",
    ),
    Mutant(
        "role tokens that are not called special can be forged",
        "data/chat.py",
        "special | self.markers.frame | set(self.markers.stops)",
        "special | set(self.markers.stops)",
        f"{TEMPLATES}::test_role_tokens_that_are_not_called_special_cannot_be_forged",
    ),
    Mutant(
        "control tokens that a normalizer makes go unnoticed",
        "data/chat.py",
        "        if not job.is_trusted:",
        "        if job.is_trusted:",
        f"{TEMPLATES}::test_control_tokens_that_only_a_normalizer_makes_are_refused",
    ),
    Mutant(
        "a store is committed for data that changed after it was hashed",
        "data/build.py",
        "if _stamps(plan.spec.sources) != plan.stamps:",
        "if not plan.stamps:",
        f"{STORE}::test_a_file_that_changes_after_it_was_hashed_is_not_stored",
    ),
    Mutant(
        "turns of one row fall on both sides of a split",
        "data/build.py",
        "prompt_hash(conversation) if part.prompt_hash is None else part.prompt_hash",
        "prompt_hash(conversation)",
        f"{STORE}::test_examples_of_one_row_share_a_prompt_hash",
    ),
    Mutant(
        "turns that do not train are trained",
        "data/masks.py",
        "if not messages[turn.index].train:",
        "if messages[turn.index].train is None:",
        f"{TEMPLATES}::test_turns_that_do_not_train_are_context",
    ),
    Mutant(
        "answers without their thinking are trained",
        "data/masks.py",
        "if turn.dropped_reasoning:",
        "if turn.dropped_reasoning and False:",
        f"{TEMPLATES}::test_thinking_written_into_the_answer_is_kept_or_reported",
    ),
    Mutant(
        "a prompt of inference that is not the one of training goes unsaid behind tool results",
        "data/masks.py",
        'if earlier and earlier[-1].role == "user" and before',
        "if before",
        "unit/test_prompt_tokens.py::test_templates_that_ask_otherwise_than_they_train_are_those_of_the_docs",
    ),
    Mutant(
        "the mask runs on into the tool's result",
        "data/masks.py",
        "text.find(stop, turn.calls[-1])",
        "text.rfind(stop, turn.calls[-1])",
        f"{TEMPLATES}::test_the_table_of_templates_in_the_docs_is_what_happens",
    ),
    Mutant(
        "generation tags ignored",
        "data/masks.py",
        "if tags is None:",
        "if tags is None or tags:",
        f"{TEMPLATES}::test_a_turn_outside_generation_tags_is_not_trained",
    ),
    Mutant(
        "a tool that the template drops goes unnoticed",
        "data/masks.py",
        """            if not found:
                raise Refused("message_dropped", "the template leaves out the tools""",
        """            if found is None:
                raise Refused("message_dropped", "the template leaves out the tools""",
        f"{TEMPLATES}::test_tools_that_the_template_does_not_write_are_refused",
    ),
    Mutant(
        "differences that cancel are taken for evidence",
        "significance.py",
        "observed = abs(found.sum()) - 1e-12 * np.abs(found).sum()",
        "observed = abs(found.sum()) * (1 - 1e-12)",
        "unit/test_significance.py::test_a_few_differences_are_tried_under_every_sign",
    ),
    Mutant(
        "null fill of Parquet kept",
        "data/readers.py",
        "for key, item in value.items() if item is not None}",
        "for key, item in value.items()}",
        "unit/test_files.py::test_parquet_rows_are_numbered_and_null_fill_is_left_out",
    ),
    Mutant(
        "held-out examples are drawn",
        "data/draws.py",
        "Pool(np.arange(first, last, dtype=np.int64)[~is_held_out[first:last]], weight, cap)",
        "Pool(np.arange(first, last, dtype=np.int64), weight, cap)",
        f"{DRAWS}::test_every_response_token_of_every_draw_is_trained_once_and_nothing_else",
    ),
    Mutant(
        "rows with equal prompts fall on both sides",
        "data/draws.py",
        "_splitmix64(prompt_hash ^ key)",
        "_splitmix64(np.arange(len(prompt_hash), dtype=np.uint64) ^ key)",
        f"{DRAWS}::test_equal_prompts_fall_on_one_side_whatever_is_added_or_moved",
    ),
    Mutant(
        "hard first",
        "data/draws.py",
        "np.argsort(self._ease[draws], kind",
        "np.argsort(-self._ease[draws], kind",
        f"{DRAWS}::test_easy_first_and_what_is_equally_easy_is_shuffled_anew",
    ),
    Mutant(
        "a cap takes the same subset in every epoch",
        "data/draws.py",
        "divmod(epoch * num, len(ids))",
        "divmod(0 * num, len(ids))",
        f"{DRAWS}::test_a_cap_takes_another_seeded_subset_in_every_epoch",
    ),
    Mutant(
        "truncation keeps the oldest turns",
        "data/build.py",
        "fitting, high = (shorter[middle], tried), middle - 1",
        "fitting, low = (shorter[middle], tried), middle + 1",
        f"{STORE}::test_too_long_conversations_lose_their_oldest_turns_and_no_answer_is_cut",
    ),
    Mutant(
        "truncation loses the system prompt",
        "data/build.py",
        "messages[:num_system] + messages[start:] for start",
        "messages[start:] for start",
        f"{STORE}::test_too_long_conversations_lose_their_oldest_turns_and_no_answer_is_cut",
    ),
    Mutant(
        "only the last turn trains and all do",
        "data/rows.py",
        "message.train and index != last",
        "message.train and index > last",
        f"{STORE}::test_every_turn_can_be_an_example_of_its_own",
    ),
    Mutant(
        "a weight of 0 trains",
        "data/rows.py",
        'if turns == "last":',
        'messages = [replace(m, train=m.role == "assistant") for m in messages]\n    if turns == "last":',
        "launch/test_bad_data.py::test_bad_data_is_refused_with_its_line",
    ),
    Mutant(
        "a key given twice counts once",
        "data/strict_json.py",
        "if len(found) < len(pairs)",
        "if len(found) > len(pairs)",
        "launch/test_bad_data.py::test_bad_data_is_refused_with_its_line",
    ),
    Mutant(
        "line numbers count from 0",
        "data/readers.py",
        "yield RawRow(Origin(stream.name, stream.num_lines), text)",
        "yield RawRow(Origin(stream.name, stream.num_lines - 1), text)",
        "unit/test_files.py::test_lines_are_those_of_the_file",
    ),
    Mutant(
        "too long rows kept",
        "data/build.py",
        "    if len(result.input_ids) <= settings.spec.max_tokens:",
        "    if len(result.input_ids) <= 10**9:",
        f"{STORE}::test_dropped_rows_are_counted_by_cause",
    ),
    Mutant(
        "too long rows dropped where they are an error",
        "data/build.py",
        'if num_too_long and plan.spec.too_long == "error":',
        'if num_too_long and plan.spec.too_long == "refuse":',
        f"{STORE}::test_too_long_rows_can_be_an_error_with_line_length_and_limit",
    ),
    Mutant(
        "store reused for changed data",
        "data/files.py",
        'f"{suffix_of(file.name)} {_hash_file(file)}\\n"',
        'f"{suffix_of(file.name)} {file.stat().st_size}\\n"',
        f"{STORE}::test_whatever_changes_tokens_changes_the_fingerprint",
    ),
    Mutant(
        "store committed before it is written",
        "data/build.py",
        "            temporary.mkdir()\n",
        "            temporary.mkdir()\n            (temporary / COMMITTED).write_text('{}')\n",
        f"{STORE}::test_killed_preparation_leaves_no_store_and_no_processes_and_the_next_one_is_whole[1]",
    ),
    Mutant(
        "a rank without an example runs nothing",
        "data/batch.py",
        "for m, row in enumerate(batch.micro_steps)\n",
        "for m, row in enumerate(batch.micro_steps) if row[rank]\n",
        f"{BATCH}::test_a_rank_without_an_example_runs_a_filler",
    ),
    Mutant(
        "bf16 gradients accumulated in bf16",
        "engine/local.py",
        "of.grad.float() if master.grad is None else master.grad.add_(of.grad)",
        "of.grad.float() if master.grad is None else (master.grad + of.grad).bfloat16().float()",
        "unit/test_local_engine.py::test_bf16_gradients_are_summed_in_fp32_over_micro_batches",
    ),
    Mutant(
        "evaluation mode left on",
        "evaluate.py",
        "model.train(was_training)",
        "pass",
        "unit/test_local_engine.py::test_evaluating_puts_training_mode_back",
    ),
    Mutant(
        "store committed before it is flushed",
        "data/build.py",
        '    for file in [*files, temporary / "tokenizer", temporary]:\n',
        "    for file in [temporary]:\n",
        f"{STORE}::test_everything_is_flushed_before_the_commit",
    ),
    Mutant(
        "the check before step 1 compares no losses",
        "model/verify.py",
        "if not (agreement.logit_error <= tolerance and loss_error <= tolerance):",
        "if not agreement.logit_error <= tolerance:",
        "unit/test_attention.py::test_a_loss_that_disagrees_is_refused_even_when_the_logits_agree",
    ),
    Mutant(
        "dynamic rotary embeddings accepted",
        "model/load.py",
        'LEAKING_ROPE = ("dynamic", "longrope")',
        'LEAKING_ROPE = ("longrope",)',
        "unit/test_attention.py::test_frequencies_that_depend_on_the_pack_are_refused[dynamic]",
    ),
    Mutant(
        "a withheld step poisons the next ones under offload",
        "engine/zero.py",
        "            self._forget_gradients()\n",
        "            pass\n",
        "numerics/test_withheld.py::test_a_poisoned_step_is_withheld_and_the_next_one_applied"
        "[zero2_offload-packs-example_mean-r103-poisoned-bf16-w2]",
    ),
    Mutant(
        "missing weights start at random",
        "model/load.py",
        'if missing := sorted(info["missing_keys"]):',
        'if missing := sorted(info["unexpected_keys"]):',
        "launch/test_errors.py::test_a_model_with_missing_weights",
    ),
    Mutant(
        "gradient norm in fp32",
        "engine/local.py",
        "torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts",
        "torch.linalg.vector_norm(part).double() for part in parts",
        "unit/test_local_engine.py::test_the_gradient_norm_of_a_large_tensor_is_exact",
    ),
    Mutant(
        "ZeRO adds bf16 gradients up in bf16",
        "engine/zero.py",
        '"data_types": {"grad_accum_dtype": "fp32"},',
        '"data_types": {"grad_accum_dtype": "bf16"},',
        "numerics/test_bf16.py::test_zero_adds_bf16_gradients_up_in_fp32[zero2-packs-example_mean-r103-accumulates-bf16-w2]",
    ),
    # Evaluation.
    Mutant(
        "a unit that contradicts is taken for none",
        "scoring/numeric.py",
        "if given.unit.dimension != expected.unit.dimension:",
        "if given.unit.dimension != expected.unit.dimension and unit_required:",
        "unit/test_scoring.py::test_numbers_that_are_wrong",
    ),
    Mutant(
        "a dose is taken for a power of ten",
        "scoring/numeric.py",
        r"?([1-9]\d?){_PER}|([-",
        r"?(\d\d?)|([-",
        "unit/test_scoring.py::test_numbers_are_found_with_their_units",
    ),
    Mutant(
        "a list of options chooses its first",
        "scoring/choice.py",
        "(possible if possible or not _JOINED.search(item[1]) else certain).add(letter)",
        "possible.add(letter)",
        "unit/test_scoring.py::test_a_list_of_options_chooses_none",
    ),
    Mutant(
        "batches are formed from what a rank was dealt",
        "answering.py",
        "    batches = form_batches([len(question.ids) for question in questions], batch_size=batch_size)\n"
        "    left = [batch for batch in batches if any(index not in found for index in batch)]\n",
        "    mine_only = [index for index in range(len(questions)) if index not in found]\n"
        "    left = [mine_only[first : first + batch_size] for first in range(0, len(mine_only), batch_size)]\n",
        "unit/test_answering.py::test_an_evaluation_that_goes_on_answers_whole_batches_that_lack_an_answer",
    ),
    Mutant(
        "answers come from weights of before the update",
        "model/answering.py",
        "if is_in_pieces else parameter.detach()",
        "if is_in_pieces else parameter.detach().clone()",
        "unit/test_answering.py::test_the_trained_model_is_as_it_was_and_its_weights_are_shared",
    ),
    Mutant(
        "McNemar looks at one side",
        "significance.py",
        "float(2 * tail / 2**changed)",
        "float(tail / 2**changed)",
        "unit/test_significance.py::test_mcnemar_counts_all_ways_in_which_the_changes_may_fall",
    ),
    # ---------------------------------------------------------------- generate, chat and export
    Mutant(
        "settings beside the weights bend an answer",
        "generate.py",
        "        self.model.generation_config = GenerationConfig()\n",
        "",
        f"{GENERATE}::test_a_greedy_answer_is_the_most_likely_tokens_whatever_settings_lie_beside_the_weights",
    ),
    Mutant(
        "a streamed piece ends inside a character",
        "generate.py",
        'if not text or text.endswith("\\ufffd"):',
        "if not text:",
        f"{GENERATE}::test_pieces_end_where_characters_do",
    ),
    Mutant(
        "an average forgets the oldest checkpoint",
        "export.py",
        "for each in pieces:",
        "for each in [pieces[-1], *pieces[1:]]:",
        "unit/test_export.py::test_an_average_is_the_plain_mean_of_the_masters",
    ),
    Mutant(
        "a private push to a public repository",
        "push.py",
        "if private and not api.repo_info(repository).private:",
        "if False:",
        "launch/test_push.py::test_a_push_arrives_byte_for_byte_and_what_goes_wrong_is_one_line",
    ),
    # Doctor and import.
    Mutant(
        "doctor: ranks of a trial that hangs outlive it",
        "doctor/probe.py",
        "for pid in [*(pid for pid, _ in descendants(process.pid)), process.pid]:",
        "for pid in [process.pid]:",
        "unit/test_doctor.py::test_a_program_that_hangs_is_ended_with_what_it_started",
    ),
    Mutant(
        "doctor: a port in use is called free",
        "doctor/host.py",
        "require_free_port(port)",
        "pass",
        "unit/test_doctor.py::test_a_broken_machine_is_told_whole_and_ends_with_1",
    ),
    Mutant(
        "import: GPUs are left out of a step",
        "migrate/shared.py",
        "return self.per_device * self.accumulation * self.gpus",
        "return self.per_device * self.accumulation",
        "unit/test_migrate.py::test_a_step_is_micro_batch_times_accumulation_times_gpus",
    ),
    Mutant(
        "import: unknown keys are dropped in silence",
        "migrate/ledger.py",
        "return [key for key in self.given if key not in self.seen]",
        "return []",
        "unit/test_migrate.py::test_unknown_keys_are_named",
    ),
    Mutant(
        "import: a template of several lines becomes keys of the recipe",
        "migrate/convert.py",
        'return redacted(" ".join(text.split()))',
        "return redacted(text)",
        "unit/test_migrate.py::test_comments_keep_the_recipe_what_it_is_and_hide_secrets",
    ),
    # ------------------------------------------------------------ what the pages say
    Mutant(
        "the weights of the pages' worked example",
        "data/batch.py",
        "return 1.0 / (len(num_responses) * num_responses.astype(np.float64))",
        "return np.full(len(num_responses), 1.0 / num_responses.sum(dtype=np.float64))",
        "unit/test_doc_examples.py",
    ),
    Mutant(
        "a logged loss that is not the one by hand",
        "loop.py",
        "shares.append(share.detach().double())",
        "shares.append(share.detach().double() * 1.0001)",
        "launch/test_doc_commands.py::test_commands_do_what_the_docs_say",
    ),
    Mutant(
        "an error in other words than the troubleshooting page has",
        "loop.py",
        "updates in a row were withheld, the last at step",
        "updates were withheld one after the other, at last at step",
        "unit/test_troubleshooting.py",
    ),
    # The planner.
    Mutant(
        "a plan leaves the optimizer's moments out of what is sharded",
        "plan/memory_parts.py",
        '"moments": MOMENT_BYTES * (num_params if is_local else share)',
        '"moments": MOMENT_BYTES * num_params',
        "unit/test_memory.py::test_bytes_of_a_parameter_by_hand",
    ),
    Mutant(
        "a plan forgets that the last layer's MLP sees trained rows only",
        "plan/memory_parts.py",
        "- on_responses * (tokens - responses) + last_norm",
        "+ last_norm",
        "unit/test_memory.py::test_activations_are_what_autograd_keeps",
    ),
    Mutant(
        "a plan takes a step for one pack that may be two",
        "engine_choice.py",
        "batch.tokens - 1 + longest if",
        "batch.tokens if",
        "unit/test_engine_choice.py::test_gradients_stay_as_they_are_only_where_a_step_is_one_pack_for_sure",
    ),
    Mutant(
        "a plan and a launch use different shares of a card",
        "plan/planner.py",
        "gpu_bytes=machine.memory_bytes / USABLE_SHARE",
        "gpu_bytes=machine.memory_bytes",
        "unit/test_plan.py::test_what_auto_is_in_the_plan_it_is_when_launched",
    ),
    Mutant(
        "a disk without the checkpoints that are kept for ever",
        "plan/planner.py",
        "kept += steps // math.lcm(train.keep_every, train.save_every)",
        "pass",
        "unit/test_doctor.py::test_checkpoints_that_are_kept_for_ever_count_for_the_disk",
    ),
    # ------------------------------------------------------------ the live view and the report
    Mutant(
        "a curve keeps the first value of each stretch instead of its extremes",
        "report/figures.py",
        "kept |= {int(first + values[first:last].argmin()), int(first + values[first:last].argmax())}",
        "kept |= {int(first)}",
        "unit/test_report.py::test_decimation_keeps_every_extreme_and_few_points",
    ),
    Mutant(
        "the report counts what a later start went back behind",
        "metrics.py",
        'counted = [line for line in lines if line["step"] <= ends[attempt_of(line)]]',
        "counted = lines",
        "unit/test_report.py::test_what_a_later_start_went_back_behind_is_gone",
    ),
    Mutant(
        "the live view shows what a later start went back behind",
        "live/state.py",
        'if line["step"] > self._ends.get(attempt_of(line), math.inf):',
        "if False:",
        "unit/test_live.py::test_what_a_start_went_back_behind_is_not_shown",
    ),
    Mutant(
        "time left without saves and held-out losses",
        "status.py",
        "return Pace(step_s, step_s + besides_s / num_steps, tokens_per_s)",
        "return Pace(step_s, step_s, tokens_per_s)",
        "unit/test_live.py::test_the_view_says_what_the_lines_say",
    ),
    Mutant(
        "log lines go straight to the terminal and are drawn over",
        "live/tracker.py",
        "moved.append((handler, handler.setStream(streams[handler.stream])))",
        "moved.append((handler, None))",
        "unit/test_live.py::test_what_is_said_meanwhile_stays_above_the_last_picture",
    ),
    Mutant(
        "a process that ends is taken apart under gloo's threads",
        "world.py",
        "    os._exit(code)",
        "    sys.exit(code)",
        "unit/test_end_process.py::test_threads_exit_functions_and_output_are_waited_for",
    ),
    Mutant(
        "a rank that leaves the word to rank 0 ends at once, and torchrun ends rank 0 before it spoke",
        "world.py",
        "    time.sleep(patience_s)",
        "    time.sleep(0)",
        "unit/test_world.py::test_only_neighbours_of_rank_0_wait_for_it",
    ),
]


@dataclass(frozen=True)
class Outcome:
    """What became of a bug. problem: "" when it was caught, else why it was not."""

    mutant: Mutant
    caught_by: str
    problem: str
    seconds: float


def main() -> int:
    words = sys.argv[1:]
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.name for word in words)]
    if not chosen:
        print(
            f"no bug has {' or '.join(map(repr, words))} in its name; there are: {', '.join(m.name for m in MUTANTS)}"
        )
        return 2
    started = time.monotonic()
    os.environ |= SETTINGS
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with (
        tempfile.TemporaryDirectory(prefix="mutants-") as directory,
        ProcessPoolExecutor(SIDE_BY_SIDE, mp_context=context) as pool,
    ):
        pristine = Path(directory) / "pristine"
        shutil.copytree(ROOT, pristine, ignore=NOT_COPIED)
        problems = [problem for mutant in chosen if (problem := misfit(mutant, pristine))]
        problems = problems or baseline_problems(chosen, pristine, pool)
        if problems:
            print("\n".join(problems))
            return 2
        outcomes = list(pool.map(judge, chosen, [pristine] * len(chosen)))
    print_table(outcomes)
    num_caught = sum(not outcome.problem for outcome in outcomes)
    num_survived = sum(outcome.problem == SURVIVED for outcome in outcomes)
    num_open = len(outcomes) - num_caught - num_survived
    without_verdict = f", {num_open} without a verdict" if num_open else ""
    print(f"{num_caught} caught, {num_survived} survived{without_verdict}, {time.monotonic() - started:.0f} s")
    return 0 if num_caught == len(outcomes) else 1


def misfit(mutant: Mutant, pristine: Path) -> str:
    """Why the bug cannot be planted, "" if it can."""
    text = (pristine / "sft_dist" / mutant.file).read_text(encoding="utf-8")
    count = text.count(mutant.old)
    if count != 1:
        where = f"sft_dist/{mutant.file} holds {mutant.old!r} {count} times"
        return f"{mutant.name}: {where}; expected once: adapt it to the code as it is"
    try:
        compile(text.replace(mutant.old, mutant.new), mutant.file, "exec")
    except SyntaxError as error:
        return f"{mutant.name}: planted, sft_dist/{mutant.file} is no Python any more: {error}"
    return ""


def baseline_problems(chosen: Sequence[Mutant], pristine: Path, pool: ProcessPoolExecutor) -> list[str]:
    """Why failing tests would prove nothing: they fail without any bug."""
    selections = sorted({mutant.tests for mutant in chosen})
    slow = [tests for tests in selections if tests.startswith("numerics/")]
    halves = [half for half in (slow, [tests for tests in selections if tests not in slow]) if half]
    runs = pool.map(run_tests, [pristine] * len(halves), halves, [BASELINE_TIME_LIMIT_S] * len(halves))
    return [f"without any bug, exit code {code}:\n{output[-6000:]}" for code, output in runs if code != 0]


def judge(mutant: Mutant, pristine: Path) -> Outcome:
    """Plant one bug in a copy of its own and run its tests."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-", dir=pristine.parent) as directory:
        copy = Path(directory) / "project"
        shutil.copytree(pristine, copy, ignore=NOT_COPIED)
        file = copy / "sft_dist" / mutant.file
        file.write_text(file.read_text(encoding="utf-8").replace(mutant.old, mutant.new), encoding="utf-8")
        code, output = run_tests(copy, [mutant.tests], TIME_LIMIT_S)
    outcome = Outcome(mutant, *verdict(code, output), time.monotonic() - started)
    print(f"{outcome.seconds:5.0f} s  {mutant.name}: {outcome.problem or 'caught'}", flush=True)
    return outcome


def verdict(code: int | None, output: str) -> tuple[str, str]:
    """(test that failed, "") for pytest's exit code 1, else ("", why the bug is not caught). code: None for no end."""
    if code == 0:
        return "", SURVIVED
    broken, failed = BROKEN.search(output), FAILED.search(output)
    if code == 1 and failed and not broken:
        return failed.group(1), ""
    tail = "\n".join(output.splitlines()[-15:])
    if code is None:
        return "", f"NO VERDICT, its tests did not end within {TIME_LIMIT_S} s:\n{tail}"
    return "", f"NO VERDICT, pytest's exit code was {code}{': ' + broken.group() if broken else ''}:\n{tail}"


def run_tests(project: Path, selections: Sequence[str], time_limit_s: float) -> tuple[int | None, str]:
    """pytest's exit code, None when it ran over the limit, and its output."""
    scratch = Path(tempfile.mkdtemp(dir=project.parent))
    command = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={scratch}/tests"]
    command += ["--hypothesis-profile=ci"]  # the same examples every time: no bug is caught, or missed, by luck
    command += [f"tests/{selection}" for selection in selections]
    output = scratch / "output"
    # A fork of this process, which has loaded what tests import.
    process = multiprocessing.get_context("fork").Process(target=run_pytest, args=(project, command, output))
    process.start()
    assert process.pid is not None
    try:
        process.join(time_limit_s)
        code = process.exitcode
    finally:
        # The ranks that a test started are in its session; a test that was cut off leaves them behind.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return code, output.read_text(encoding="utf-8", errors="replace") if code is not None else ""


def run_pytest(project: Path, command: list[str], output: Path) -> None:
    """Be pytest in a session of its own and in the project, which this process and those it starts import."""
    os.setsid()
    os.chdir(project)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    # Before site-packages, where an editable install points at the project that was copied.
    os.environ["PYTHONPATH"] = str(project)
    sys.path.insert(0, str(project))
    import pytest

    import sft_dist
    import tests

    imported = [sft_dist.__file__, tests.__file__]
    if imported != [f"{project}/sft_dist/__init__.py", f"{project}/tests/__init__.py"]:
        sys.exit(f"the copy is not what is imported, but {imported}")
    sys.exit(int(pytest.main(command)))


def print_table(outcomes: Sequence[Outcome]) -> None:
    names = max(len(outcome.mutant.name) for outcome in outcomes)
    files = max(len(outcome.mutant.file) for outcome in outcomes)
    print()
    for outcome in outcomes:
        caught_by = outcome.caught_by.removeprefix("tests/") or outcome.problem.splitlines()[0]
        print(f"{outcome.mutant.name:{names}}  {outcome.mutant.file:{files}}  {outcome.seconds:4.0f} s  {caught_by}")
    print()


if __name__ == "__main__":
    sys.exit(main())
