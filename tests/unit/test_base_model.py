"""A base model without a chat template gets ChatML, room for its tokens, and a stop."""

from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_dist.config import parse_recipe
from sft_dist.data.chat import ChatTokenizer
from sft_dist.data.conversation import Message
from sft_dist.generate import Answerer, Sampling
from sft_dist.model.load import align_generation, grow_vocabulary
from sft_dist.train import run
from tests import tiny


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """31 tokens and a model with 32 rows, no template, no ChatML tokens: one row is spare, one is missing."""
    directory = tiny.write_model(tmp_path / "base")
    config = directory / "tokenizer_config.json"
    config.write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|e|>", "pad_token": "<|u|>"}')
    return directory


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_start_at_the_mean_and_old_ones_stay(tied: bool, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.write_model(tmp_path, tied=tied), dtype=torch.float32)
    before = [model.get_input_embeddings().weight.clone(), model.get_output_embeddings().weight.clone()]
    old = before[0].shape[0]
    grow_vocabulary(model, num_tokens=old + 2, added_token_ids=[old, old + 1])
    assert model.config.vocab_size == old + 2
    for was, matrix in zip(before, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True):
        assert torch.equal(matrix.weight[:old], was)
        assert torch.equal(matrix.weight[old:], was.mean(0).expand(2, -1))
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied


def test_rows_that_exist_are_kept_when_no_token_is_new(tied_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tied_model, dtype=torch.float32)
    before = model.get_input_embeddings().weight.clone()
    grow_vocabulary(model, num_tokens=20, added_token_ids=[])
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_generation_stops_where_training_stopped(tied_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tied_model)
    model.generation_config.eos_token_id = 5
    align_generation(model, stop_ids=(7, 8), eos_id=7, pad_id=9)
    assert model.generation_config.eos_token_id == [7, 8, 5]
    assert (model.config.eos_token_id, model.config.pad_token_id, model.generation_config.pad_token_id) == (7, 9, 9)


def test_a_base_model_is_trained_exported_and_stops(base: Path, tmp_path: Path) -> None:
    """It learns to repeat one letter and then stop: the new stop token is trained, generated, and ends the answer."""
    chats = ['{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bbb"}]}\n'] * 8
    (tmp_path / "d.jsonl").write_text("".join(chats))
    recipe = parse_recipe(
        {
            "run": {"name": "base", "dir": str(tmp_path / "runs"), "report": False},
            "model": {"path": str(base)},
            "data": {"train": str(tmp_path / "d.jsonl")},
            "batch": {"examples": 8},
            "optim": {"lr": 5e-3},
            "train": {"steps": 60},
        },
        origin="test",
    )
    model_dir = run(recipe, console=Console(quiet=True)).model_dir
    assert model_dir is not None
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token == "<|im_end|>"
    assert "<|im_start|>" in tokenizer.chat_template
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    assert model.get_input_embeddings().num_embeddings == ChatTokenizer.load(model_dir).num_tokens == 33
    assert stop in model.generation_config.eos_token_id
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    plain = model.generate(prompt, max_new_tokens=20, do_sample=False)[0, prompt.shape[1] :]
    assert plain.tolist()[-1] == stop, "plain transformers stops by itself"
    answers = list(Answerer.load(model_dir).answer([[Message("user", "a", train=False)]] * 2, sampling=Sampling(20)))
    assert answers == ["bbb", "bbb"]
