"""What is exported is the trained model, whatever engine held it."""

import pytest
import torch

from tests.numerics.lab import Case, Lab

EXPORTED = [
    Case("zero3", 2, checks=("in_memory",)),
    Case("zero2", 2, checks=("in_memory",)),
]


@pytest.mark.parametrize("case", EXPORTED, ids=lambda case: case.run_name)
@torch.no_grad()
def test_the_export_reloads_to_the_same_logits(case: Case, lab: Lab) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model_dir = lab.run_dir(case) / "model"
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    in_memory = torch.load(lab.run_dir(case) / "logits.pt")
    assert torch.equal(model(input_ids=torch.arange(20)[None], use_cache=False).logits, in_memory)
    untrained = AutoModelForCausalLM.from_pretrained(lab.model_dir, dtype=torch.float32)
    assert not torch.equal(untrained.lm_head.weight, model.lm_head.weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight, "ties are kept"
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "ab"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|u|>ab<|a|>"
    assert model.generation_config.eos_token_id == [tokenizer.convert_tokens_to_ids("<|e|>")]
