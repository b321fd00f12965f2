"""Answers of a model, with exactly the template and the stop tokens of training."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from sft_dist.data.chat import ChatTokenizer
from sft_dist.data.conversation import Message
from sft_dist.errors import ConfigError
from sft_dist.quiet import quiet_libraries


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. max_new_tokens: the longest answer."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (self.max_new_tokens > 0 and 0 <= self.temperature < 100 and 0 < self.top_p <= 1):
            raise ConfigError(
                f"max_new_tokens={self.max_new_tokens}, temperature={self.temperature:g}, top_p={self.top_p:g}: "
                "use at least one token, a temperature from 0 to 100, and a top_p above 0 and up to 1"
            )


class Answerer:
    """A model that is ready to answer, and its tokenizer."""

    def __init__(self, model: PreTrainedModel, tokenizer: ChatTokenizer, *, device: torch.device) -> None:
        """model: with an attention that honours a padding mask: a prompt is answered alike alone and in a batch.

        Its own settings for generation are dropped: a repetition penalty beside the weights would be no greedy answer.
        """
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.model.generation_config = GenerationConfig()

    @classmethod
    def load(cls, model_dir: Path, *, device: torch.device | None = None) -> "Answerer":
        """A model directory in Hugging Face format. Raises ConfigError when the directory holds no model."""
        if not (model_dir / "config.json").is_file():
            raise ConfigError(
                f"{model_dir}: no model here (config.json is missing); a finished run exports to runs/<name>/model"
            )
        quiet_libraries()
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                model_dir, dtype=dtype, attn_implementation="sdpa"
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise ConfigError(f"{model_dir}: cannot be loaded: {str(error).splitlines()[0]}") from None
        return cls(model.to(device).eval(), ChatTokenizer.load(str(model_dir)), device=device)

    def answer(
        self, conversations: Sequence[Sequence[Message]], *, sampling: Sampling, batch_size: int = 64
    ) -> Iterator[str]:
        """The next assistant turn of each conversation, in order."""
        prompts = [self.tokenizer.encode_prompt(messages) for messages in conversations]
        for start in range(0, len(prompts), batch_size):
            yield from self.answer_batch(prompts[start : start + batch_size], sampling)

    @torch.no_grad()
    def answer_batch(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[str]:
        """The answers to prompts that are given as ids, one batch of them."""
        longest = max(len(prompt) for prompt in prompts)
        # Padding goes in front and is masked by length, whatever its id.
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
            mask[row, longest - len(prompt) :] = 1
        stops = self.tokenizer.stop_ids
        sampled = {"temperature": sampling.temperature, "top_p": sampling.top_p} if sampling.temperature > 0 else {}
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=sampling.temperature > 0,
            eos_token_id=list(stops),
            pad_token_id=self.tokenizer.pad_id if self.tokenizer.pad_id is not None else stops[0],
            **sampled,
        )
        output = self.model.generate(
            ids.to(self.device), attention_mask=mask.to(self.device), generation_config=config, synced_gpus=False
        )
        return [self._until_stop(row.tolist(), set(stops)) for row in output[:, longest:]]

    def _until_stop(self, ids: list[int], stops: set[int]) -> str:
        end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        # A control token inside an answer is a slip of the model; shown as text, it could not be sent back to it.
        return self.tokenizer.decode([token for token in ids[:end] if token not in self.tokenizer.special_ids])
