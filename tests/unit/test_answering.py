"""Answers do not depend on what is answered beside, nor on how many ranks there are, and leave the model as it was."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sft_dist.answering import answer_all, form_batches
from sft_dist.config import ModelSection
from sft_dist.data.chat import ChatTokenizer
from sft_dist.data.questions import Question
from sft_dist.generate import Answerer, Sampling
from sft_dist.model.answering import as_answering
from sft_dist.model.attention import choose_backend
from sft_dist.model.load import PackedModel, load_model
from sft_dist.world import World
from tests import tiny

CPU = torch.device("cpu")
PROMPTS = [[28, 0, 29], [28, *range(25), 29], [28, 5, 5, 5, 29], [28, 20, 3, 17, 8, 9, 9, 29], [28, 1, 29]]
SAMPLING = Sampling(max_new_tokens=14)


def load(directory: Path) -> PackedModel:
    section = ModelSection(path=str(directory), checkpointing="full")
    backend = choose_backend("sdpa", device=CPU, dtype=torch.float32)
    return load_model(section, backend=backend, dtype=torch.float32, device=CPU, num_tokens=0, added_token_ids=())


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "llama"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Larger weights than a fresh model has: its answers are then of more than one letter.
    return tiny.write_model(
        tmp_path_factory.mktemp("m") / request.param, architecture=request.param, tied=False, initializer_range=0.3
    )


@torch.no_grad()
def plain_answer(directory: Path, prompt: list[int]) -> str:
    """Token by token, alone, without padding and without a cache."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer, ids = ChatTokenizer.load(directory), list(prompt)
    for _ in range(SAMPLING.max_new_tokens):
        best = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if best in tokenizer.stop_ids:
            break
        ids.append(best)
    return tokenizer.decode([token for token in ids[len(prompt) :] if token not in tokenizer.special_ids])


def test_batched_or_alone_the_answer_is_the_most_likely_token_each_time(directory: Path) -> None:
    answering = as_answering(load(directory), device=CPU)
    answerer = Answerer(answering, ChatTokenizer.load(directory), device=CPU)
    together = answerer.complete(PROMPTS, sampling=SAMPLING)
    alone = [answerer.complete([prompt], sampling=SAMPLING)[0] for prompt in PROMPTS]
    assert together == alone == [plain_answer(directory, prompt) for prompt in PROMPTS]
    assert len(set(together)) == len(PROMPTS), "the prompts are told apart"


def test_the_trained_model_is_as_it_was_and_its_weights_are_shared(directory: Path) -> None:
    model = load(directory)
    implementation = model.causal_lm.config._attn_implementation
    random_state = torch.get_rng_state()
    answering = as_answering(model, device=CPU)
    storages = {name: value.data_ptr() for name, value in answering.named_parameters()}
    assert storages == {name: value.data_ptr() for name, value in model.causal_lm.named_parameters()}
    assert not answering.training
    assert not any(parameter.requires_grad for parameter in answering.parameters())
    before = answering(input_ids=torch.tensor([PROMPTS[0]])).logits
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert torch.allclose(answering(input_ids=torch.tensor([PROMPTS[0]])).logits, 2 * before)
    Answerer(answering, ChatTokenizer.load(directory), device=CPU).complete(PROMPTS, sampling=SAMPLING)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.causal_lm.config._attn_implementation == implementation
    assert torch.equal(torch.get_rng_state(), random_state)


def test_batches_are_formed_longest_first() -> None:
    assert form_batches([2, 9, 5, 9, 1], batch_size=2) == [[1, 3], [2, 0], [4]]
    assert form_batches([], batch_size=2) == []


class Echo:
    """Answers with the last token, and remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def complete(self, prompts: list[tuple[int, ...]], *, sampling: Sampling) -> list[str]:
        self.batches.append([prompt[-1] for prompt in prompts])
        return [f"to {prompt[-1]}" for prompt in prompts]


QUESTIONS = [Question("s", f"d:{i}", "t", (), "", (*range(5 - i), i)) for i in range(5)]


def test_an_evaluation_that_goes_on_answers_whole_batches_that_lack_an_answer() -> None:
    """Batches are [0, 1], [2, 3], [4]: the first is known, the second half known."""
    echo, told = Echo(), []
    answers = answer_all(
        echo,  # type: ignore[arg-type]
        QUESTIONS,
        world=World(),
        sampling=SAMPLING,
        batch_size=2,
        known={0: "known", 1: "known", 3: "half known"},
        on_batch=told.append,
    )
    assert answers == ["known", "known", "to 2", "to 3", "to 4"]
    assert echo.batches == [[2, 3], [4]]
    assert told == [{2: "to 2", 3: "to 3"}, {4: "to 4"}]
