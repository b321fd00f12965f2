"""Answers: what is chosen, what is shown while it comes, and that nothing beside the recipe's template has a say."""

import random
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from sft_dist.data.chat import ChatTokenizer
from sft_dist.data.conversation import Message
from sft_dist.errors import ConfigError
from sft_dist.generate import Answerer, PieceDecoder, Sampling, find_model
from tests import tiny
from tests.unit import chat_templates

ASKED = [Message("user", "abc")]
ALPHABET = {tiny.ASSISTANT: "a", **dict(zip(tiny.WORDS, tiny.WORDS[1:], strict=False)), "z": tiny.STOP}


@pytest.fixture(scope="module")
def answerer(tmp_path_factory: pytest.TempPathFactory) -> Answerer:
    """Random weights, and settings beside them that would bend every answer."""
    directory = tiny.write_model(tmp_path_factory.mktemp("m"), tied=False)
    bent = GenerationConfig(repetition_penalty=9.0, do_sample=True, top_k=1, temperature=9.0, no_repeat_ngram_size=2)
    bent.save_pretrained(directory)
    return Answerer.load(directory, device=torch.device("cpu"))


@torch.no_grad()
def greedy(answerer: Answerer, num_tokens: int) -> str:
    """The most likely token, one after another, without a cache."""
    prompt = answerer.tokenizer.encode_prompt(ASKED)
    ids = list(prompt)
    while len(ids) < len(prompt) + num_tokens and ids[-1] not in answerer.tokenizer.stop_ids:
        ids.append(int(answerer.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    words = [token for token in ids[len(prompt) :] if token not in answerer.tokenizer.special_ids]
    return answerer.tokenizer.decode(words)


def test_a_greedy_answer_is_the_most_likely_tokens_whatever_settings_lie_beside_the_weights(answerer: Answerer) -> None:
    expected = greedy(answerer, 40)
    assert len(set(expected)) < len(expected), "a penalty on repetition would show"
    assert list(answerer.answer([ASKED], sampling=Sampling(40))) == [expected]


@pytest.mark.parametrize("sampling", [Sampling(30), Sampling(30, temperature=1.5, top_p=0.95, top_k=20, seed=3)])
def test_what_is_streamed_is_what_is_answered(answerer: Answerer, sampling: Sampling) -> None:
    pieces: list[str] = []
    prompt = answerer.tokenizer.encode_prompt(ASKED)
    streamed = answerer.stream(prompt, sampling=sampling, on_text=pieces.append)
    assert "".join(pieces) == streamed.text == next(answerer.answer([ASKED], sampling=sampling))
    assert len(pieces) == len(streamed.text) > 3, "letter by letter"
    assert not set("".join(pieces)) & set("<|>"), "no control token is shown"


def test_what_is_drawn_is_decided_by_seed_and_place_alone(answerer: Answerer) -> None:
    sampling = Sampling(20, temperature=2.0)
    torch.manual_seed(5)
    expected_next = torch.rand(1)
    torch.manual_seed(5)
    answers = list(answerer.answer([ASKED] * 4, sampling=sampling, batch_size=2))
    assert torch.equal(torch.rand(1), expected_next), "the caller's random numbers go on as if nothing was drawn"
    assert list(answerer.answer([ASKED] * 4, sampling=sampling, batch_size=2)) == answers
    prompts = [answerer.tokenizer.encode_prompt(ASKED)] * 2
    assert answerer.complete(prompts, sampling=sampling, place=2) == answers[2:], (
        "from the middle, as a killed job does"
    )
    assert len(set(answers)) == 4
    assert list(answerer.answer([ASKED] * 4, sampling=Sampling(20, temperature=2.0, seed=1), batch_size=2)) != answers


def test_an_answer_can_be_stopped_and_says_whether_the_model_ended_it(tmp_path: Path) -> None:
    speller = Answerer.load(tiny.write_speller(tmp_path, ALPHABET), device=torch.device("cpu"))
    prompt = speller.tokenizer.encode_prompt(ASKED)
    pieces: list[str] = []

    def say(limit: int, stop_after: int = 99) -> tuple[str, bool]:
        pieces.clear()
        answer = speller.stream(
            prompt, sampling=Sampling(limit), on_text=pieces.append, should_stop=lambda: len(pieces) >= stop_after
        )
        return answer.text, answer.is_whole

    assert say(40) == ("abcdefghijklmnopqrstuvwxyz", True)
    assert say(3) == ("abc", False)
    assert say(40, stop_after=5) in [("abcde", False), ("abcdef", False)], "at the next token at the latest"


def test_pieces_end_where_characters_do(tmp_path: Path) -> None:
    """A tokenizer of single bytes and short runs of them: most characters below take several tokens."""
    tokenizer = ChatTokenizer.load(chat_templates.write(tmp_path, chat_templates.source("qwen2_5")))
    text = "Größe 170 cm, 体重 70 kg 🙂👩‍⚕️ é é\n\tﬁn"
    ids = tokenizer._encoder.ids(text)
    decoder = PieceDecoder(tokenizer.decode)
    pieces = [decoder.add(token) for token in ids]
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(not piece for piece in pieces) > 10, "characters that were held back until they were whole"
    assert decoder.rest() == ""
    rng = random.Random(0)
    plain = [token for token in range(tokenizer.num_tokens) if token not in tokenizer.special_ids]
    for _ in range(50):  # broken characters, too, come out as they do in one go
        ids = rng.choices(plain, k=12)
        decoder = PieceDecoder(tokenizer.decode)
        assert "".join([*map(decoder.add, ids), decoder.rest()]) == tokenizer.decode(ids)


def test_a_run_stands_for_its_model_and_settings_out_of_range_are_refused(tmp_path: Path) -> None:
    model = tiny.write_tokenizer(tmp_path / "runs" / "a" / "model")
    (model / "config.json").write_text("{}")
    assert find_model(model) == find_model(tmp_path / "runs" / "a") == model
    with pytest.raises(ConfigError, match="no model here"):
        find_model(tmp_path)
    for wrong in ({"top_k": -1}, {"repetition_penalty": 0.0}, {"top_p": 0.0}, {"temperature": -1.0}, {"seed": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Sampling(**wrong)  # type: ignore[arg-type]
