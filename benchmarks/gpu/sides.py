"""The sides of the comparison. Each builds the same random weights on the device, trains the same packs, and is gone.

ours         the product: load_model, start_engine, load_steps and what the training loop does with a step
trl_default  SFTTrainer as its defaults are, on rows that are packed already
trl_tuned    SFTTrainer without checkpointing where that fits, with Liger kernels and our attention per document
hf_default   where TRL is not installed: a transformers model that computes its own loss, in a plain loop, with what
hf_tuned     the two sides of TRL change. These are not TRL.
"""

import contextlib
import functools
import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from gpu.clock import Region
from gpu.models import Case
from gpu.packs import Steps
from torch import Tensor, nn
from torch.profiler import record_function
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from sft_dist.config import Recipe, parse_recipe
from sft_dist.data.batch import StepBatch, build_step, load_steps
from sft_dist.engine.interface import Engine
from sft_dist.engine.start import start_engine
from sft_dist.loop import seed_forward
from sft_dist.model.attention import Backend, choose_backend
from sft_dist.model.load import load_model
from sft_dist.optim import build_adamw
from sft_dist.step_measure import peak_memory_bytes
from sft_dist.world import World

LR = 1e-5
BETAS, EPS, MAX_GRAD_NORM = (0.9, 0.999), 1e-8, 1.0
IGNORED = -100
OPTIMIZER_RANGE, HEAD_RANGE = "sft_dist: optimizer", "sft_dist: head"
"""Names of the stretches that a profile tells apart."""


@dataclass(frozen=True)
class Work:
    """What every side is given. warmup >= 2, timed: steps."""

    case: Case
    steps: Steps
    device: torch.device
    dtype: torch.dtype
    warmup: int
    timed: int

    @property
    def dtype_name(self) -> str:
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"


@dataclass(frozen=True)
class Measured:
    """What a side did: seconds of its timed steps, losses of all steps, syncs of one step, peak memory."""

    seconds: float
    losses: list[float]
    syncs: dict[str, int] | None
    peak_bytes: int
    settings: dict[str, Any]


@contextlib.contextmanager
def layers_as_they_were(case: Case) -> Iterator[None]:
    """Undo what a side does to the model's module in transformers: Liger puts its kernels there for the process."""
    name = case.config["model_type"]
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    before = dict(vars(module))
    try:
        yield
    finally:
        vars(module).update(before)


def random_model(case: Case, *, device: torch.device, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """Weights made where they are trained: no copy on the host. The same for the same device and dtype."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**case.config)
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return model


# ---------------------------------------------------------------- ours


@dataclass(frozen=True)
class Trainer:
    """Our side, running. step: trains the next step and returns its loss."""

    engine: Engine
    step: Callable[[], float]


def our_recipe(work: Work, model: dict[str, Any]) -> Recipe:
    """A user's recipe for this work. model: settings of its section."""
    return parse_recipe(
        {
            "run": {"name": "gpu-step"},
            "model": {"path": "made-up", "dtype": work.dtype_name} | model,
            "data": {"train": "made-up.jsonl"},
            "batch": {"examples": 1, "pack_tokens": work.case.pack_tokens},
            "optim": {"lr": LR, "betas": BETAS, "eps": EPS, "max_grad_norm": MAX_GRAD_NORM},
            "loss": "token_mean",
            "train": {"engine": "single"},
        },
        origin="gpu_step",
    )


@contextlib.contextmanager
def our_trainer(work: Work, recipe: Recipe) -> Iterator[Trainer]:
    """The product's own path, but that weights are made instead of read and nothing is written."""
    load = functools.partial(
        load_model,
        backend=choose_backend(recipe.model.attention, device=work.device, dtype=work.dtype),
        dtype=work.dtype,
        device=work.device,
        num_tokens=1,
        added_token_ids=(),
    )
    with _weights_made(work), tempfile.TemporaryDirectory() as directory:
        AutoConfig.for_model(**work.case.config).save_pretrained(directory)
        section = recipe.model.model_copy(update={"path": directory})
        engine = start_engine(
            recipe,
            name="single",
            world=World(),
            dtype=work.dtype,
            device=work.device,
            load_model=functools.partial(load, section),
            make_optimizer=functools.partial(build_adamw, optim=recipe.optim),
        )
    batches = load_steps(
        work.steps.store,
        iter(work.steps.batches),
        rank=0,
        loss=recipe.loss,
        pack_tokens=work.case.pack_tokens,
        device=work.device,
    )
    with contextlib.closing(engine):
        yield Trainer(engine, lambda: _train_step(engine, next(batches)))


def _train_step(engine: Engine, batch: StepBatch) -> float:
    """What sft_dist/loop.py does with a step, without what is due after it."""
    shares = []
    for index, micro in enumerate(batch.micros):
        seed_forward(0, batch.step, 0, index)
        with engine.accumulate(is_last=micro.is_last):
            share = engine(micro)
            engine.backward(share)
        shares.append(share.detach().double())
    loss = float(torch.stack(shares).sum())
    with record_function(OPTIMIZER_RANGE):
        engine.step(lr=LR, grad_norm=float(engine.reduce()))
    return loss


@contextlib.contextmanager
def _weights_made(work: Work) -> Iterator[None]:
    """load_model reads a config and weights; here the weights were never written."""

    def made(_path: str, *, attn_implementation: str, dtype: torch.dtype, **_: Any) -> Any:
        model = random_model(work.case, device=work.device, dtype=dtype, attention=attn_implementation)
        return model, {"missing_keys": []}

    with mock.patch.object(AutoModelForCausalLM, "from_pretrained", made):
        yield


def run_ours(work: Work, *, model: dict[str, Any]) -> Measured:
    recipe = our_recipe(work, model)
    settings = recipe.model.model_dump(mode="json", exclude={"path", "revision", "trust_remote_code"})
    with our_trainer(work, recipe) as trainer:
        measured = _drive(work, trainer.step, settings=settings)
        compiled = trainer.engine.model.compiled
    return replace(measured, settings=settings | {"graphs": len(compiled.graphs) if compiled else 0})


def _drive(work: Work, step: Callable[[], float | Tensor], *, settings: dict[str, Any]) -> Measured:
    """Train all steps of a side that is a plain function of the step."""
    region = Region(work.device, warmup=work.warmup, timed=work.timed)
    losses = []
    with contextlib.closing(region):
        for index in range(1, work.warmup + work.timed + 1):
            losses.append(step())
            region.step_ended(index)
    return Measured(
        region.seconds, [float(loss) for loss in losses], region.syncs, peak_memory_bytes(work.device), settings
    )


# ---------------------------------------------------------------- rows as a peer takes them


def peer_rows(work: Work) -> list[dict[str, list[int]]]:
    """Each pack as one row, in the order in which ours are trained: ids, labels, lengths of its documents."""
    store, rows = work.steps.store, []
    for batch in work.steps.batches[: work.warmup + work.timed]:
        for (pack,) in batch.micro_steps:
            examples = [store.example(index) for index in pack]
            pairs = [zip(e.input_ids.tolist(), e.is_response.tolist(), strict=True) for e in examples]
            rows.append(
                {
                    "input_ids": [token for e in examples for token in e.input_ids.tolist()],
                    "labels": [token if trained else IGNORED for pair in pairs for token, trained in pair],
                    "seq_lengths": [len(e.input_ids) for e in examples],
                }
            )
    return rows


def peer_model(work: Work, *, attention: str) -> PreTrainedModel:
    """The weights that ours starts from, in fp32: autocast makes the compute bf16, the optimizer has fp32 weights."""
    return random_model(work.case, device=work.device, dtype=work.dtype, attention=attention).float()


def per_document_attention(backend: Backend) -> str:
    """Our attention under a name for models that are called with transformers' own document bounds."""

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        assert cu_seq_lens_q is not None
        assert attention_mask is None
        lengths = tuple(cu_seq_lens_q.diff().tolist()) if cu_seq_lens_q.device.type == "cpu" else ()
        out = backend.attend(
            # Under autocast rotary embeddings leave q and k in fp32, which the flash kernels do not take.
            *(x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value)),
            cu_seqlens=cu_seq_lens_q,
            max_seqlen=max_length_q,
            document_lengths=lengths,
            scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
            window=sliding_window,
            dropout=dropout,
        )
        return out[None], None

    AttentionInterface.register("per_document_for_peers", forward)
    return "per_document_for_peers"


def has_liger(device: torch.device) -> bool:
    """Liger's kernels are Triton's: they run on GPUs."""
    return device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None


# ---------------------------------------------------------------- TRL


def run_trl(work: Work, *, tuned: bool, checkpointing: bool) -> Measured:
    """SFTTrainer. tuned: our attention, Liger kernels where they run, rows collated by a worker, `checkpointing`."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    losses: list[Tensor] = []
    region = Region(work.device, warmup=work.warmup, timed=work.timed)

    class Recorded(SFTTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.detach())
            return loss

    class Marks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            region.step_ended(state.global_step)

    on_cuda = work.device.type == "cuda"
    attention = "sdpa"
    settings: dict[str, Any] = {}
    if tuned:
        attention = per_document_attention(choose_backend("auto", device=work.device, dtype=work.dtype))
        settings |= {"gradient_checkpointing": checkpointing, "use_liger_kernel": has_liger(work.device)}
        settings |= {"dataloader_num_workers": int(on_cuda)}
    with tempfile.TemporaryDirectory() as directory, contextlib.closing(region):
        config = SFTConfig(
            directory,
            max_steps=work.warmup + work.timed,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=work.case.packs,
            packing=True,
            max_length=work.case.pack_tokens,
            dataset_kwargs={"skip_prepare_dataset": True},
            train_sampling_strategy="sequential",
            learning_rate=LR,
            lr_scheduler_type="constant",
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_epsilon=EPS,
            weight_decay=0.0,
            max_grad_norm=MAX_GRAD_NORM,
            bf16=work.dtype == torch.bfloat16,
            use_cpu=not on_cuda,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        )
        trainer = Recorded(
            peer_model(work, attention=attention),
            config,
            train_dataset=Dataset.from_list(peer_rows(work)),
            processing_class=_any_tokenizer(),
            callbacks=[Marks()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.accelerator.free_memory()
    packs = work.case.packs
    per_step = [float(sum(losses[i : i + packs])) for i in range(0, len(losses), packs)]
    settings |= {"attention": attention, "gradient_checkpointing": config.gradient_checkpointing}
    return Measured(region.seconds, per_step, region.syncs, peak_memory_bytes(work.device), settings)


def _any_tokenizer() -> Any:
    """SFTTrainer asks for one; rows that are tokenised already need nothing of it but a padding token."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<pad>")


# ---------------------------------------------------------------- reference HF


def run_hf(work: Work, *, tuned: bool, checkpointing: bool) -> Measured:
    """A transformers model in fp32 under bf16 autocast, its own loss from all logits, fused AdamW. It is not TRL."""
    attention = "sdpa"
    if tuned:
        attention = per_document_attention(choose_backend("auto", device=work.device, dtype=work.dtype))
    model = peer_model(work, attention=attention)
    model.train()
    liger = tuned and has_liger(work.device)
    if liger:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=True)
    if checkpointing or not tuned:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    on_cuda = work.device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0, fused=on_cuda)
    batches = iter(work.steps.batches)

    def step() -> Tensor:
        batch = build_step(work.steps.store, next(batches), rank=0, loss="token_mean", pack_tokens=None)
        total = torch.zeros((), device=work.device)
        for pack, micro in zip(batch.packs, batch.micros, strict=True):
            micro = micro.to(work.device)
            labels = torch.cat([_labels(work, index) for index in pack])[None].to(work.device)
            with torch.autocast(work.device.type, dtype=torch.bfloat16, enabled=work.dtype == torch.bfloat16):
                loss = model(
                    input_ids=micro.input_ids,
                    position_ids=micro.position_ids,
                    labels=labels,
                    use_cache=False,
                    num_items_in_batch=batch.num_responses,
                    cu_seq_lens_q=micro.cu_seqlens,
                    cu_seq_lens_k=micro.cu_seqlens,
                    max_length_q=micro.max_seqlen,
                    max_length_k=micro.max_seqlen,
                ).loss
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    settings = {"attention": attention, "gradient_checkpointing": checkpointing or not tuned, "use_liger_kernel": liger}
    return _drive(work, step, settings=settings)


def _labels(work: Work, index: int) -> Tensor:
    """A document's labels, unshifted; its first token is predicted by no other."""
    example = work.steps.store.example(index)
    ids = torch.tensor(example.input_ids, dtype=torch.int64)
    return ids.masked_fill(~torch.tensor(example.is_response), IGNORED)


SIDES: dict[str, Callable[..., Measured]] = {
    "trl_default": functools.partial(run_trl, tuned=False),
    "trl_tuned": functools.partial(run_trl, tuned=True),
    "hf_default": functools.partial(run_hf, tuned=False),
    "hf_tuned": functools.partial(run_hf, tuned=True),
}
"""Peers: (work, checkpointing) -> Measured."""

NAMES = {
    "ours": "sft_dist",
    "trl_default": "TRL, defaults",
    "trl_tuned": "TRL, tuned",
    "hf_default": "reference HF loop, TRL's defaults (not TRL)",
    "hf_tuned": "reference HF loop, tuned (not TRL)",
}


def default_sides() -> list[str]:
    """TRL where it can be imported, else the reference loops in its place."""
    peers = "trl" if importlib.util.find_spec("trl") is not None else "hf"
    return ["ours", f"{peers}_default", f"{peers}_tuned"]
