"""One run of one side of cpu_vs_trl.py, in a process of its own: sft_dist, TRL, or a plain loop.

Every side reads the same rows, the same weights and the same tokenizer, takes the same number of optimizer steps with
torch's AdamW at one constant lr, in fp32, and minimises the same mean over the trained tokens of a step. The clock
starts when step 3 has ended and stops when the last one has: saving and export come after it.

    python benchmarks/cpu_sides.py '{"side": "ours", ...}'      the fields of Task; writes marks-<rank>.json
"""

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from chats import trl_template
from cpu_floor import gemm_seconds, profiled
from prepare_vs_trl import cpu_seconds

NUM_UNTIMED = 3
# The newline behind `<|im_start|>assistant` and the one behind `<|im_end|>`: TRL's template trains both, ours neither.
EXTRA_TOKENS_PER_ANSWER = 2
# Above the longest row, so that nothing is cut anywhere.
MAX_TOKENS = 2048
LR = 1e-3
BETAS = (0.9, 0.999)
EPS = 1e-8
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Task:
    """What a process is to do.

    kind: ours, trl, reference, or floor. examples: in a step, over all ranks. packs: of TRL in a step, over all ranks;
    0 for rows that are not packed. pack_tokens: the longest pack, of ours as well. micro: packs, or rows, in a
    micro-batch of TRL.
    settings: fields of SFTConfig, and `attention`; of `model` in our recipe. num_profiled: steps behind the untimed
    ones that are profiled.
    """

    kind: str
    rows: str
    model: str
    directory: str
    epochs: int = 1
    examples: int = 1
    packs: int = 0
    pack_tokens: int = 0
    micro: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    num_profiled: int = 0


@dataclass
class Marks:
    """The clocks at the end of each step, and what this rank trained in it.

    groups: seconds of a profiled step by group of ops. gemms: seconds and FLOPs of a step's matrix products by part.
    """

    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    responses: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    prepare_cpu_s: float = 0.0
    groups: dict[str, float] = field(default_factory=dict)
    gemms: dict[str, tuple[float, float]] = field(default_factory=dict)

    @contextmanager
    def preparing(self) -> Iterator[None]:
        started = cpu_seconds()
        yield
        self.prepare_cpu_s += cpu_seconds() - started

    def step_ended(self, *, tokens: int, responses: int) -> None:
        self.tokens.append(tokens)
        self.responses.append(responses)
        self.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.wall_s.append(time.perf_counter())
        self.cpu_s.append(time.process_time())


def main() -> None:
    task = Task(**json.loads(sys.argv[1]))
    run = {"ours": run_ours, "trl": run_trl, "reference": run_reference, "floor": run_floor}[task.kind]
    marks = run(task)
    Path(task.directory, f"marks-{rank()}.json").write_text(json.dumps(asdict(marks)))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def read_messages(path: str) -> list[list[dict[str, str]]]:
    """The rows of an Alpaca file, .jsonl or .json, as messages: what sft_dist makes of them."""
    text = Path(path).read_text(encoding="utf-8")
    rows = json.loads(text) if text.lstrip().startswith("[") else list(map(json.loads, text.splitlines()))
    chats = []
    for row in rows:
        question = "\n\n".join(part for part in (row["instruction"], row.get("input", "")) if part)
        chats.append([{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}])
    return chats


# ---------------------------------------------------------------- sft_dist


def run_ours(task: Task) -> Marks:
    """`sft_dist.train.run` on a recipe, as `sft-dist train` calls it; the clocks are read where a step is logged."""
    from rich.console import Console

    from sft_dist import job, trackers, train
    from sft_dist.config import parse_recipe
    from sft_dist.metrics import Metrics, StepMetrics

    marks = Marks()
    profiling = ExitStack()

    class Timed(trackers.Trackers):
        def log(self, metrics: Metrics) -> None:
            super().log(metrics)
            if not isinstance(metrics, StepMetrics):
                return
            marks.losses.append(metrics.loss)
            # They are of all ranks, so one of them tells.
            tokens, responses = (metrics.tokens, metrics.response_tokens) if rank() == 0 else (0, 0)
            marks.step_ended(tokens=tokens, responses=responses)
            if task.num_profiled and metrics.step == NUM_UNTIMED:
                marks.groups = profiling.enter_context(profiled(num_steps=task.num_profiled))
            if task.num_profiled and metrics.step == NUM_UNTIMED + task.num_profiled:
                profiling.close()

    open_or_prepare = job.open_or_prepare

    def timed_open(*args: Any, **kwargs: Any) -> Any:
        with marks.preparing():
            return open_or_prepare(*args, **kwargs)

    trackers.Trackers = train.Trackers = Timed  # type: ignore[misc]
    job.open_or_prepare = timed_open
    recipe = parse_recipe(
        {
            "run": {"name": "ours", "dir": task.directory, "report": False},
            "model": {"path": task.model, "dtype": "fp32"} | task.settings,
            "data": {"train": task.rows, "max_tokens": MAX_TOKENS, "workers": 1},
            "batch": {"examples": task.examples, "pack_tokens": task.pack_tokens},
            "loss": "token_mean",
            "optim": {"lr": LR, "schedule": "constant", "betas": BETAS, "eps": EPS, "max_grad_norm": MAX_GRAD_NORM},
            "train": {"epochs": task.epochs},
        },
        origin="benchmark",
    )
    with open(os.devnull, "w") as nowhere:
        train.run(recipe, console=Console(file=nowhere))
    return marks


# ---------------------------------------------------------------- TRL


def run_trl(task: Task) -> Marks:
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    marks = Marks()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    packed = task.packs > 0
    per_step = task.packs if packed else task.examples
    arguments = {
        "output_dir": str(Path(task.directory, "trainer")),
        "use_cpu": True,
        "bf16": False,
        "ddp_backend": "gloo" if world_size > 1 else None,
        "packing": packed,
        "packing_strategy": "bfd",
        "max_length": task.pack_tokens if packed else None,
        "assistant_only_loss": True,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": task.micro,
        "gradient_accumulation_steps": per_step // (task.micro * world_size),
        "num_train_epochs": task.epochs,
        "optim": "adamw_torch_fused",
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "adam_epsilon": EPS,
        "weight_decay": 0.0,
        "max_grad_norm": MAX_GRAD_NORM,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "dataset_num_proc": None,
        "logging_strategy": "no",
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    settings = dict(task.settings)
    attention = settings.pop("attention", "sdpa")
    if attention == PER_DOCUMENT:
        register_per_document()
    step = [0, 0]  # tokens, and trained ones, since the last update
    shares: list[torch.Tensor] = []
    losses: list[torch.Tensor] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            losses.append(torch.stack(shares).sum())
            marks.step_ended(tokens=step[0], responses=step[1])
            step[:] = [0, 0]
            shares.clear()

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            with marks.preparing():
                return super()._prepare_dataset(*args, **kwargs)

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            is_padded = "attention_mask" in inputs  # otherwise rows lie end to end, and positions restart
            starts = inputs["attention_mask"][:, 0] if is_padded else inputs["position_ids"] == 0
            step[0] += int(inputs["attention_mask"].sum()) if is_padded else inputs["input_ids"].numel()
            step[1] += int((inputs["labels"] != -100).sum()) - EXTRA_TOKENS_PER_ANSWER * int(starts.sum())
            loss = super().training_step(model, inputs, *args, **kwargs)
            shares.append(loss.detach())
            return loss

    with marks.preparing():
        rows = datasets.Dataset.from_list([{"messages": chat} for chat in read_messages(task.rows)])
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32, attn_implementation=attention)
    model.config.use_cache = False
    trainer = Timed(
        model,
        args=SFTConfig(**arguments | settings),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    if trainer.chat_template != trl_template("qwen2_5_training"):
        raise SystemExit("TRL did not take its training variant of the template")
    trainer.train()
    marks.losses = [float(loss) for loss in losses]
    return marks


# ---------------------------------------------------------------- the plain loop


PER_DOCUMENT = "per_document"


def register_per_document() -> None:
    """Attention as transformers' `sdpa`, one document of the row after the other."""
    import torch
    import torch.nn.functional as F
    from transformers import AttentionInterface

    def attend(_: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, position_ids: Any, **__: Any) -> Any:
        starts = (position_ids[0] == 0).nonzero()[:, 0].tolist()
        lengths = [end - start for start, end in zip(starts, [*starts[1:], q.shape[2]], strict=True)]
        documents = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
        out = [F.scaled_dot_product_attention(*d, is_causal=True, scale=scaling, enable_gqa=True) for d in documents]
        return torch.cat(out, dim=2).transpose(1, 2), None

    AttentionInterface.register(PER_DOCUMENT, attend)


def run_reference(task: Task) -> Marks:
    """What one writes by hand: documents end to end, attention per document, the head where a token is trained."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM, AutoTokenizer

    marks = Marks()
    register_per_document()
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    template = trl_template("qwen2_5_training")
    with marks.preparing():
        encoded = [
            tokenizer.apply_chat_template(
                chat, chat_template=template, return_assistant_tokens_mask=True, return_dict=True
            )
            for chat in read_messages(task.rows)
        ]
        rows = [(torch.tensor(e["input_ids"]), torch.tensor(e["assistant_masks"], dtype=torch.bool)) for e in encoded]
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32, attn_implementation=PER_DOCUMENT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)
    model.train()
    torch.manual_seed(0)
    for _ in range(task.epochs):
        for chosen in torch.randperm(len(rows)).split(task.examples):
            ids, masks = zip(*(rows[i] for i in chosen), strict=True)
            tokens, trained = torch.cat(ids), torch.cat(masks)
            positions = torch.cat([torch.arange(len(document)) for document in ids])
            index = trained.nonzero()[:, 0]
            output = model.model(tokens[None], position_ids=positions[None], use_cache=False)
            loss = F.cross_entropy(model.lm_head(output.last_hidden_state[0, index - 1]), tokens[index])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            marks.losses.append(loss.item())
            marks.step_ended(tokens=len(tokens), responses=len(index) - EXTRA_TOKENS_PER_ANSWER * len(ids))
    return marks


# ---------------------------------------------------------------- the floor


def run_floor(task: Task) -> Marks:
    """The matrix products of one step of `examples` mean rows, each measured alone."""
    from transformers import AutoConfig

    from sft_dist.shape import ModelShape

    shape = ModelShape.from_config(AutoConfig.from_pretrained(task.model).to_dict())
    assert shape is not None
    tokens, responses = task.settings["tokens"], task.settings["responses"]
    return Marks(gemms=gemm_seconds(shape, tokens=tokens, responses=responses))


if __name__ == "__main__":
    main()
