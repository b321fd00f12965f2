"""Answers of a model, with exactly the template and the stop tokens of training."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from sft_dist.data.chat import ChatTokenizer
from sft_dist.data.conversation import Message
from sft_dist.errors import ConfigError
from sft_dist.model.load import num_positions
from sft_dist.quiet import quiet_libraries
from sft_dist.run_files import MODEL


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Nothing else has a say: not the settings that lie beside the weights.

    max_new_tokens: the longest answer. temperature: 0 is greedy. top_k: 0 is all tokens. repetition_penalty: 1 is none.
    seed: with the place of a conversation it decides what is drawn.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.max_new_tokens > 0 and 0 <= self.temperature < 100 and 0 < self.top_p <= 1):
            raise ConfigError(
                f"max_new_tokens={self.max_new_tokens}, temperature={self.temperature:g}, top_p={self.top_p:g}: "
                "use at least one token, a temperature from 0 to 100, and a top_p above 0 and up to 1"
            )
        if not (self.top_k >= 0 and 0.01 <= self.repetition_penalty <= 100 and self.seed >= 0):
            raise ConfigError(
                f"top_k={self.top_k}, repetition_penalty={self.repetition_penalty:g}, seed={self.seed}: use a top_k of "
                "0 (all tokens) or more, a penalty from 0.01 to 100 (1 is none), and a seed of 0 or more"
            )

    def config(self, *, stop_ids: Sequence[int], pad_id: int | None) -> GenerationConfig:
        """The same for transformers. Every knob is said: what is left out it fills in, as by a top_k of 50."""
        sampled = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=self.temperature > 0,
            repetition_penalty=self.repetition_penalty,
            eos_token_id=list(stop_ids),
            pad_token_id=pad_id if pad_id is not None else stop_ids[0],
            **(sampled if self.temperature > 0 else {}),
        )


def find_model(path: Path) -> Path:
    """The directory of an exported model: `path` itself, or `path/model` of a run. Raises ConfigError without any."""
    for directory in (path, path / MODEL):
        if (directory / "config.json").is_file():
            return directory
    raise ConfigError(
        f"{path}: no model here (config.json is missing); name an exported model, or a finished run such as runs/<name>"
    )


def hash_model(directory: Path) -> str:
    """Hex digest of the files that decide what a model answers: weights, configuration and tokenizer, byte by byte."""
    digest = xxhash.xxh3_128()
    for file in sorted(directory.iterdir()):
        if file.suffix in (".safetensors", ".json", ".jinja", ".model"):
            with file.open("rb") as handle:
                content = hashlib.file_digest(handle, xxhash.xxh3_128)
            digest.update(f"{file.name} {content.hexdigest()}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Streamed:
    """An answer that was shown while it was made. is_whole: the model ended it; else it was cut or stopped."""

    text: str
    is_whole: bool


class PieceDecoder:
    """Ids to text while they come. A piece ends where a character does, however many tokens that took.

    Each piece is decoded with the one before it, since a token may read differently at the start of a text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._context, self._done = 0, 0

    def add(self, token: int) -> str:
        """The text that is whole now; empty in the middle of a character."""
        self._ids.append(token)
        text = self._open_text()
        if not text or text.endswith("\ufffd"):
            return ""
        self._context, self._done = self._done, len(self._ids)
        return text

    def rest(self) -> str:
        """What was still open when the last token had come."""
        text = self._open_text()
        self._context = self._done = len(self._ids)
        return text

    def _open_text(self) -> str:
        before = self._decode(self._ids[self._context : self._done])
        return self._decode(self._ids[self._context :])[len(before) :]


class Answerer:
    """A model that is ready to answer, and its tokenizer."""

    def __init__(self, model: PreTrainedModel, tokenizer: ChatTokenizer, *, device: torch.device) -> None:
        """model: with an attention that honours a padding mask: a prompt is answered alike alone and in a batch."""
        self.model, self.tokenizer, self.device = model, tokenizer, device
        # Else transformers takes what `Sampling` leaves out from there; Qwen's penalises repetition in greedy answers.
        self.model.generation_config = GenerationConfig()

    @classmethod
    def load(cls, model_dir: Path, *, device: torch.device | None = None) -> "Answerer":
        """A model directory in Hugging Face format, or a run's directory.

        Raises ConfigError when there is no model, or none that can be loaded.
        """
        model_dir = find_model(model_dir)
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

    @property
    def num_positions(self) -> int | None:
        """Tokens of prompt and answer together that the model has positions for; None if its config does not say."""
        return num_positions(self.model.config)

    def answer(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        sampling: Sampling,
        batch_size: int = 64,
        tools: Sequence[Sequence[Mapping[str, Any]]] | None = None,
    ) -> Iterator[str]:
        """The next assistant turn of each conversation, in order. tools: what each may call, one entry for each."""
        offered = tools if tools is not None else [()] * len(conversations)
        prompts = [self.tokenizer.encode_prompt(*each) for each in zip(conversations, offered, strict=True)]
        for start in range(0, len(prompts), batch_size):
            yield from self.complete(prompts[start : start + batch_size], sampling=sampling, place=start)

    @torch.no_grad()
    def complete(self, prompts: Sequence[Sequence[int]], *, sampling: Sampling, place: int = 0) -> list[str]:
        """The answers to prompts as `encode_prompt` makes them, as one batch. place: decides, with the seed, what is
        drawn: the index of the first prompt among all."""
        longest = max(len(prompt) for prompt in prompts)
        # Padding goes in front and is masked by length, whatever its id.
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
            mask[row, longest - len(prompt) :] = 1
        output = self._generate(ids, mask, sampling, place)
        return [self.tokenizer.decode(self._words(row.tolist())) for row in output[:, longest:]]

    @torch.no_grad()
    def stream(
        self,
        prompt: Sequence[int],
        *,
        sampling: Sampling,
        on_text: Callable[[str], None],
        should_stop: Callable[[], bool] = lambda: False,
        place: int = 0,
    ) -> Streamed:
        """The answer to one prompt, which goes to `on_text` piece by piece while it is made.

        should_stop: asked after each token; the answer so far is then the answer.
        """
        pieces = PieceDecoder(self.tokenizer.decode)
        written: list[str] = []

        def show(piece: str) -> None:
            if piece:
                written.append(piece)
                on_text(piece)

        def take(token: int) -> None:
            for word in self._words([token]):
                show(pieces.add(word))

        ids = torch.tensor([list(prompt)])
        streamed = {
            "streamer": _TokenStreamer(take),
            "stopping_criteria": StoppingCriteriaList([lambda row, _scores: _verdict(row, should_stop())]),
        }
        output = self._generate(ids, torch.ones_like(ids), sampling, place, **streamed)
        show(pieces.rest())
        return Streamed("".join(written), is_whole=int(output[0, -1]) in self.tokenizer.stop_ids)

    def _generate(self, ids: Tensor, mask: Tensor, sampling: Sampling, place: int, **streamed: Any) -> Tensor:
        config = sampling.config(stop_ids=self.tokenizer.stop_ids, pad_id=self.tokenizer.pad_id)
        with _drawing(sampling.seed, place, self.device):
            output: Tensor = self.model.generate(
                ids.to(self.device),
                attention_mask=mask.to(self.device),
                generation_config=config,
                synced_gpus=False,
                **streamed,
            )
        return output

    def _words(self, ids: list[int]) -> list[int]:
        """The ids before the first stop token, without control tokens.

        One inside an answer is a slip of the model; shown as text, it could not be sent back to it.
        """
        stops = self.tokenizer.stop_ids
        end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        return [token for token in ids[:end] if token not in self.tokenizer.special_ids]


class _TokenStreamer(BaseStreamer):  # type: ignore[misc]
    """Hands on every new token of one row; transformers puts the whole prompt first."""

    def __init__(self, take: Callable[[int], None]) -> None:
        self._take, self._is_prompt = take, True

    def put(self, value: Tensor) -> None:
        if not self._is_prompt:
            for token in value.flatten().tolist():
                self._take(token)
        self._is_prompt = False

    def end(self) -> None:
        pass


def _verdict(rows: Tensor, is_over: bool) -> Tensor:
    return torch.full((rows.shape[0],), is_over, dtype=torch.bool, device=rows.device)


@contextmanager
def _drawing(seed: int, place: int, device: torch.device) -> Iterator[None]:
    """Random numbers that seed and place decide; those of the process go on behind as if nothing had been drawn."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(np.random.SeedSequence([seed, place]).generate_state(1)[0]))
        yield
