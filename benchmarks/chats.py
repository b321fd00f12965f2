"""Chats to measure on, the same everywhere: made-up words with Zipf frequencies, and a tokenizer trained on it."""

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

NUM_WORDS = 40_000
NUM_NUMBERS = 600
BLOCK_ROWS = 1_000
TOKENIZER_ROWS = 10_000
VOCAB_SIZE = 32_000
# How Qwen2 cuts text before byte pairs are joined.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ONSETS = "b c d f g h j k l m n p r s t v w br ch cl cr dr fl gr pl pr sh st str th tr".split() + [""] * 6
VOWELS = "a a a e e e e i i i o o o u u ai ea ou io é ü ñe".split()
CODAS = ["", "", "", "", *"n r s t l m d ck nd ng nt rs st".split()]
# What follows a word, and how often. A capital follows what ends a sentence.
GAPS = {
    " ": 0.84,
    ", ": 0.06,
    ". ": 0.055,
    ".\n\n": 0.01,
    ":\n- ": 0.005,
    "? ": 0.005,
    "! ": 0.005,
    " (": 0.01,
    ") ": 0.01,
}
ENDS_SENTENCE = tuple(gap[0] in ".?!:" for gap in GAPS)


@dataclass(frozen=True)
class Shape:
    """How long chats are. exchanges: probabilities of 1, 2, ... questions with their answers.

    words: median number of words of a question and of an answer; both are log-normal.
    """

    exchanges: tuple[float, ...]
    question_words: float
    answer_words: float
    spread: float


LONG = Shape(exchanges=(0.6, 0.25, 0.15), question_words=17, answer_words=50, spread=0.8)
SHORT = Shape(exchanges=(1.0,), question_words=13, answer_words=26, spread=0.45)
ALPACA = Shape(exchanges=(1.0,), question_words=12, answer_words=36, spread=0.75)


def write_chats(file: Path, *, num_rows: int, shape: Shape, seed: int = 0) -> None:
    """Write JSONL in the `messages` format. Memory does not grow with the number of rows."""
    with file.open("w", encoding="utf-8") as out:
        for turns in islice(_chats(shape, seed), num_rows):
            messages = [
                {"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(turns)
            ]
            out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def write_alpaca(file: Path, *, num_rows: int, seed: int = 0) -> None:
    """Write JSONL in the Alpaca format; two rows in five have an `input`, as there."""
    with file.open("w", encoding="utf-8") as out:
        for index, (question, answer) in enumerate(islice(_chats(ALPACA, seed), num_rows)):
            first, _, rest = question.partition(" ")
            has_input = rest and index % 5 < 2
            row = {
                "instruction": first if has_input else question,
                "input": rest if has_input else "",
                "output": answer,
            }
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_tokenizer(directory: Path, *, shape: Shape, vocab_size: int = VOCAB_SIZE) -> Path:
    """A byte-level BPE as Qwen2.5 has one, trained on other rows of the same kind, with Qwen2.5's chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    rows = islice(_chats(shape, seed=1), TOKENIZER_ROWS)
    tokenizer.train_from_iterator((text for turns in rows for text in [*turns, "system\nuser\nassistant\n"]), trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in CONTROL])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 131_072,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (directory / "chat_template.jinja").write_text(trl_template("qwen2_5"), encoding="utf-8")
    return directory


def trl_template(name: str) -> str:
    """A chat template as the installed trl ships it, found without importing trl."""
    spec = find_spec("trl")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit("trl is not installed, whose chat templates this measures with; install the `dev` extra")
    return (Path(spec.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def _chats(shape: Shape, seed: int) -> Iterator[list[str]]:
    """Endless chats, each as the texts of its turns, a question first."""
    # Only `random()`, whose numbers no version of numpy changes; lengths by the inverse of their distribution.
    rng = np.random.Generator(np.random.PCG64(seed))
    write = _writer()
    exchange_ends = np.cumsum(shape.exchanges)[:-1]
    while True:
        num_turns = 2 * (1 + np.searchsorted(exchange_ends, rng.random(BLOCK_ROWS), side="right"))
        ends = np.cumsum(num_turns)
        is_answer = np.arange(ends[-1]) % 2 == 1
        medians = np.where(is_answer, shape.answer_words, shape.question_words)
        lengths = np.maximum(1, medians * np.exp(shape.spread * _normal(rng, ends[-1]))).astype(np.int64)
        texts = write(rng, lengths)
        for start, end in zip(ends - num_turns, ends, strict=True):
            yield texts[start:end]


def _writer() -> Callable[[np.random.Generator, np.ndarray], list[str]]:
    """A function (rng, lengths in words) -> texts."""
    words = _words()
    pieces = np.array([*words, *(word.capitalize() for word in words)], dtype=object)
    gaps = np.array(list(GAPS), dtype=object)
    capital_after = np.array(ENDS_SENTENCE)
    weights = (np.arange(len(words)) + 2.7) ** -1.05  # Mandelbrot's form of Zipf's law
    word_ends, gap_ends = np.cumsum(weights / weights.sum()), np.cumsum(list(GAPS.values()))

    def write(rng: np.random.Generator, lengths: np.ndarray) -> list[str]:
        ends = np.cumsum(lengths)
        chosen = np.minimum(np.searchsorted(word_ends, rng.random(ends[-1]), side="right"), len(words) - 1)
        gap = np.minimum(np.searchsorted(gap_ends, rng.random(ends[-1]), side="right"), len(gaps) - 1)
        starts_sentence = np.concatenate([[True], capital_after[gap[:-1]]])
        starts_sentence[ends[:-1]] = True
        both = np.empty(2 * ends[-1], dtype=object)
        both[0::2], both[1::2] = pieces[chosen + len(words) * starts_sentence], gaps[gap]
        both[2 * ends - 1] = "."
        parts = both.tolist()
        return ["".join(parts[2 * start : 2 * end]) for start, end in zip(ends - lengths, ends, strict=True)]

    return write


def _words() -> list[str]:
    """Words in the order of their frequency, the frequent ones short, with numbers among them."""
    rng = random.Random("words")
    words: dict[str, None] = {}
    while len(words) < NUM_WORDS:
        num_syllables = 1 + int(0.6 * math.log10(len(words) + 1) * rng.random())
        parts = (rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(num_syllables))
        words["".join(parts)] = None
    found = list(words)
    for _ in range(NUM_NUMBERS):
        size = rng.choice((1, 2, 3, 4, 4))
        number = str(rng.randrange(10**size)) + rng.choice(("", "", "", "%", ".5", ",000"))
        found.insert(int(10 ** rng.uniform(2, math.log10(NUM_WORDS))), number)
    return found


def _normal(rng: np.random.Generator, count: int) -> np.ndarray:
    """Box and Muller's normal numbers."""
    radius: np.ndarray = np.sqrt(-2 * np.log(1 - rng.random(count)))
    return radius * np.cos(2 * np.pi * rng.random(count))
