"""Every chat template that the installed trl ships, with a tokenizer that knows its control tokens."""

import json
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from sft_dist.data.chat import Example
from sft_dist.data.conversation import Conversation, Message, Origin, ToolCall

FOLDER = Path(find_spec("trl").submodule_search_locations[0]) / "chat_templates"
NAMES = sorted(file.stem for file in FOLDER.glob("*.jinja") if not file.stem.endswith("_training"))
BOS, EOS = "<|bos|>", "<|eos|>"
CONTROL = re.compile(
    r"<\|[\w/]+\|>|<\|[\w]+>|<[\w]+\|>|<｜[^｜\n]+｜>|<(?:start|end)_of_\w+>|<end_of_utterance>|\[gMASK\]|<sop>|<\|\"\|>"
)
# Tokens that tokenizers match whole but do not call special: text may use them.
WORDS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
# How Qwen2 and Llama 3 cut words: line breaks stay together, so a prompt that ends in them is cut as in the whole.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "user assistant system The answer is 4, yes. What is 2 + 2? <think>\n\n</think>\n\n" * 20,
    "Größe 你好 🙂" * 5,
]

WEIGH = {
    "type": "function",
    "function": {
        "name": "find_bmi",
        "description": "Body mass index.",
        "parameters": {
            "type": "object",
            "properties": {"weight_kg": {"type": "number", "description": "in kg"}, "note": {"type": "string"}},
            "required": ["weight_kg"],
        },
    },
}


def source(name: str) -> str:
    """The text of a template, `qwen3` or `qwen3_training`."""
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def write(directory: Path, template: str, *, more_control: Sequence[str] = ()) -> Path:
    """A byte-level BPE that knows the control tokens of a template, and the template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(__import__("tokenizers").Regex(SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    control = dict.fromkeys([BOS, EOS, *more_control, *CONTROL.findall(template)])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in WORDS])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return directory


def talk(*turns: tuple[str, str] | Message, tools: Sequence[dict[str, Any]] = ()) -> Conversation:
    """A conversation whose assistant turns train."""
    messages = [
        turn if isinstance(turn, Message) else Message(turn[0], turn[1], train=turn[0] == "assistant") for turn in turns
    ]
    return Conversation(tuple(messages), Origin("d.jsonl", 7), tuple(tools))


def noted_turns(example: Example, cause: str) -> set[int]:
    """Turns, from 1, of which something is noted."""
    return {int(re.match(r"turn (\d+)", note.reason)[1]) for note in example.remarks if note.cause == cause}


def calling(content: str = "", **arguments: Any) -> Message:
    call = ToolCall("find_bmi", arguments, id="call00007")
    return Message("assistant", content, train=True, tool_calls=(call,))


RESULT = Message("tool", "bmi=22.86", name="find_bmi", tool_call_id="call00007")
SCENARIOS = {
    "single turn": talk(("user", "What is 2 + 2?"), ("assistant", "The answer is 4")),
    "multi-turn": talk(
        ("user", "What is 2 + 2?"), ("assistant", "It is 4."), ("user", "And 3 + 3?"), ("assistant", "That is 6.")
    ),
    "tools": talk(
        ("user", "Weight 70 kg?"),
        calling(weight_kg=70, note='of "X" today'),
        RESULT,
        ("assistant", "It is 22.9."),
        tools=[WEIGH],
    ),
    "thinking": talk(
        ("user", "What is 2 + 2?"),
        Message("assistant", "It is 4.", train=True, reasoning="Two and two."),
        ("user", "And 3 + 3?"),
        Message("assistant", "That is 6.", train=True, reasoning="Three and three."),
    ),
}
