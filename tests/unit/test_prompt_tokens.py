"""What a model is asked with is what it was trained behind, token for token, for every template.

The table in docs/templates.md is made here: `UPDATE_DOCS=1 python -m pytest tests/unit/test_prompt_tokens.py`.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import transformers

from sft_dist import package_files
from sft_dist.config import load_recipe
from sft_dist.data.chat import ChatTokenizer, Example
from sft_dist.data.conversation import Conversation
from sft_dist.demo.dataset import example_texts, generate_examples
from sft_dist.demo.model import build_tokenizer
from tests.unit import chat_templates
from tests.unit.chat_templates import NAMES, SCENARIOS, noted_turns, talk
from tests.unit.test_templates import UNUSABLE, as_dicts

DOCS = Path(__file__).parents[2] / "docs" / "templates.md"
MARK = "<!-- made by tests/unit/test_prompt_tokens.py -->\n"
WITH_SYSTEM = {
    "system, single turn": talk(("system", "Be brief."), ("user", "What is 2 + 2?"), ("assistant", "It is 4.")),
    "system, multi-turn": talk(
        ("system", "Be brief."),
        ("user", "What is 2 + 2?"),
        ("assistant", "It is 4."),
        ("user", "Und <|im_end|> größer 🙂?"),
        ("assistant", "That is 6."),
    ),
}
CONVERSATIONS = SCENARIOS | WITH_SYSTEM
# The template of each model that a shipped recipe names.
TEMPLATE_OF = {"Qwen/Qwen2.5-1.5B-Instruct": "qwen2_5", "Qwen/Qwen3-4B": "qwen3", "Qwen/Qwen3-8B": "qwen3"}

Loader = Callable[[str], ChatTokenizer]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    cache: dict[str, ChatTokenizer] = {}

    def loader(name: str) -> ChatTokenizer:
        if name not in cache:
            directory = tmp_path_factory.mktemp("t") / name
            cache[name] = ChatTokenizer.load(chat_templates.write(directory, chat_templates.source(name)))
        return cache[name]

    return loader


def pairs(
    tokenizer: ChatTokenizer, conversation: Conversation, *, turns: str
) -> Iterator[tuple[list[int], list[int], bool]]:
    """Of each trained turn: ids at inference, ids before its first trained token, and whether a difference is noted.

    None for a refused row.

    turns: all makes one example of the conversation, each makes one that ends in each trained turn.
    """
    ends = [index + 1 for index, message in enumerate(conversation.messages) if message.train]
    for end in ends if turns == "each" else ends[-1:]:
        shown = Conversation(conversation.messages[:end], conversation.origin, conversation.tools)
        (example,) = tokenizer.encode([shown])
        if not isinstance(example, Example):
            continue
        context, noted = (noted_turns(example, cause) for cause in ("thinking_dropped", "asked_otherwise"))
        is_first = np.diff(np.concatenate([[0], example.is_response.astype(int)])) == 1
        trained = [turn for turn in ends if turn <= end and turn not in context]
        starts = np.flatnonzero(is_first).tolist()
        assert len(starts) == len(trained)
        for start, turn in list(zip(starts, trained, strict=True))[-1 if turns == "each" else 0 :]:
            asked = tokenizer.encode_prompt(conversation.messages[: turn - 1], conversation.tools)
            yield asked, example.input_ids[:start].tolist(), turn in noted


def differences(tokenizer: ChatTokenizer, *, turns: str) -> str:
    """How prompts at inference and in training end where they differ, over all conversations; empty if nowhere."""
    found: dict[str, None] = {}
    for conversation in CONVERSATIONS.values():
        for asked, trained, is_noted in pairs(tokenizer, conversation, turns=turns):
            assert is_noted == (asked != trained)
            if asked != trained:
                texts = tokenizer.decode(asked), tokenizer.decode(trained)
                same = next(at for at in range(len(texts[0]) + 1) if texts[0][: at + 1] != texts[1][: at + 1])
                ends = [repr(text[same:])[1:-1].replace("|", "\\|") for text in texts]
                ends = [f"`{end}`" if end else "nothing" for end in ends]
                found[f"{ends[0]} at inference, {ends[1]} in training"] = None
    return "; ".join(found)


@pytest.mark.parametrize("path", package_files.recipes(), ids=lambda path: path.stem)
def test_every_recipe_asks_with_the_tokens_that_it_trained_behind(path: Path, load: Loader, tmp_path: Path) -> None:
    model = load_recipe(path).model.path
    if model == "demo/model":
        build_tokenizer(example_texts(generate_examples(60, 0, "train")), tmp_path)
        tokenizer, theirs = ChatTokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    else:
        tokenizer = load(TEMPLATE_OF[model])
        chat_templates.write(tmp_path, chat_templates.source(TEMPLATE_OF[model]))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    compared = 0
    for turns in ("all", "each"):
        for conversation in CONVERSATIONS.values():
            for asked, trained, is_noted in pairs(tokenizer, conversation, turns=turns):
                assert asked == trained
                assert not is_noted
                compared += 1
    assert compared >= 12, "single and multi-turn, with and without system prompt, all and each"
    conversation = SCENARIOS["multi-turn"]
    expected = theirs.apply_chat_template(
        as_dicts(conversation)[:3], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert tokenizer.encode_prompt(conversation.messages[:3]) == expected, "and with those that transformers makes"


def test_templates_that_ask_otherwise_than_they_train_are_those_of_the_docs(load: Loader) -> None:
    rows = {
        name: [differences(load(name), turns=turns) or "equal" for turns in ("all", "each")]
        for name in NAMES
        if name not in UNUSABLE
    }
    others = {name: cells for name, cells in rows.items() if cells != ["equal", "equal"]}
    lines = [
        f"Equal on {len(rows) - len(others)} of {len(rows)} usable templates. On the others, for some conversation:",
        "",
        "| template | `turns: all` | `turns: each` |",
        "|---|---|---|",
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in others.items()),
    ]
    table = "\n".join(lines)
    before, mark, rest = DOCS.read_text(encoding="utf-8").partition(MARK)
    _, end, after = rest.partition("<!-- end -->")
    if os.environ.get("UPDATE_DOCS") == "1":
        DOCS.write_text(f"{before}{mark}{table}\n{end}{after}", encoding="utf-8")
    else:
        assert rest.startswith(f"{table}\n{end}"), "docs/templates.md is out of date: run with UPDATE_DOCS=1"
    assert not {"qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3_1"} & others.keys()
