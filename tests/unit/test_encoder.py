"""The short way to tokens gives what the tokenizers library gives, token by token and span by span."""

import re
from collections.abc import Callable, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from sft_dist.data import encoder as encoder_module
from sft_dist.data.encoder import DIGITS, Encoded, Encoder, _overlapping
from sft_dist.errors import BackendError

Pair = Callable[[str], tuple[Encoder, Tokenizer]]
QWEN, LLAMA = DIGITS
ADDED = ("<|im_start|>", "<|im_end|>", "<|im_end|>x", "<think>")
CORPUS = [
    "The patient weighs 70 kg; isn't it 154.3 lb? It's 12,345.67 mg/dL, they'll say. I'm sure we've had WE'VE.\n\n" * 9,
    "Größe naïve café ﬁne №5 ½ ² Ⅳ  double  spaces\t\ttabs\r\n\r\nlines\n 你好世界 안녕 🙂👍🏽 “quoted” — dash… don’t"
    * 5,
]


def tokenizer_of(split: str, *, merges: int = 300, **flags: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + merges, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False, **flags) for text in ADDED])
    return tokenizer


@pytest.fixture(scope="module")
def pair() -> Pair:
    made: dict[str, tuple[Encoder, Tokenizer]] = {}

    def get(split: str) -> tuple[Encoder, Tokenizer]:
        if split not in made:
            tokenizer = tokenizer_of(split)
            made[split] = (Encoder(tokenizer), tokenizer)
        return made[split]

    return get


PIECES = (
    *ADDED, *CORPUS[0].split(" ")[:20],
    "'s", "'S", "'ſ", "'T", "’s", "'re", "'", " ", "  ", "\n", "\r", "\r\n", " \n", "\t", "\v", "\f", "\x1c",
    "\x1f", "\x85", "\xa0", "\u2003", "\u2028", "\u200b", "\u200d", "\u0301", "é", "ß", "ŉ", "ǅ", "ﬁ", "中", "文",
    "한", "あ", "ア", "א", "ع", "अ", "ก", "1", "12", "123", "1234", "²", "½", "Ⅳ", "٣", "a1", "🙂", "👍🏽", "❤️",
    "\U00020000", "\ue000", "\ufffd", "_", "$", "...", "?!", "”", "—", "ſ", "\u212a", "\u212b", "\ufeff", "\u0345",
    "İ", "ı", "\u1e9e", "，", "１",
)  # fmt: skip
TEXTS = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=25).map("".join), st.text(st.characters(codec="utf-8"), max_size=40)
)


@settings(max_examples=400)
@given(st.sampled_from([QWEN, LLAMA]), TEXTS)
@example(QWEN, "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000)])))
@example(LLAMA, "".join(f"a{chr(i)}'{chr(i)}1 {chr(i)}\n" for i in range(0x3400)))
@example(QWEN, "the   patient in  the  ward")
@example(LLAMA, "the   patient in  the  ward")
def test_tokens_are_those_of_the_library(pair: Pair, split: str, text: str) -> None:
    ours, theirs = pair(split)
    ids = theirs.encode(text, add_special_tokens=False).ids
    (found,) = ours.encode([text], [[]])
    assert found.ids == ids
    assert ours.decode([ids]) == [theirs.decode(ids, skip_special_tokens=False)]


@settings(max_examples=300)
@given(st.sampled_from([QWEN, LLAMA]), TEXTS, st.data())
def test_spans_have_the_tokens_that_overlap_them(pair: Pair, split: str, text: str, data: st.DataObject) -> None:
    ours, theirs = pair(split)
    ends = [match.end() for match in re.finditer("|".join(map(re.escape, sorted(ADDED, key=len, reverse=True))), text)]
    spans = [(data.draw(st.integers(0, end - 1)), end) for end in ends]
    (found,) = ours.encode([text], [spans])
    assert found == _overlapping(theirs.encode(text, add_special_tokens=False), spans)


@pytest.mark.parametrize("split", DIGITS)
@pytest.mark.parametrize("text", [CORPUS[0], CORPUS[1], "<|im_start|>user\nHi “there”<|im_end|>\n"])
def test_usual_text_goes_the_short_way(pair: Pair, split: str, text: str) -> None:
    """Otherwise the tests above would compare the library with itself."""
    ours, theirs = pair(split)
    assert ours._words is not None
    found = ours._words.encode(text, [])
    assert found is not None
    assert found.ids == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "change",
    [
        lambda t: setattr(t, "normalizer", normalizers.NFKC()),
        lambda t: setattr(t, "normalizer", normalizers.Lowercase()),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False)),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Metaspace()),
        lambda t: setattr(t, "pre_tokenizer", None),
        lambda t: setattr(t.model, "dropout", 0.5),
        lambda t: t.add_special_tokens([AddedToken("<r>", rstrip=True)]),
        lambda t: t.add_tokens([AddedToken("<n>", normalized=True)]),
        lambda t: t.add_tokens([AddedToken("w", single_word=True, normalized=False)]),
    ],
)
def test_other_tokenizers_go_the_librarys_way(change: Callable[[Tokenizer], object]) -> None:
    tokenizer = tokenizer_of(QWEN, merges=20)
    assert Encoder(tokenizer)._words is not None
    change(tokenizer)
    ours = Encoder(tokenizer)
    assert ours._words is None
    text = "w Isn't <r>  <n> it<|im_end|>"
    if not getattr(tokenizer.model, "dropout", None):
        assert ours.encode([text], [[]])[0].ids == tokenizer.encode(text, add_special_tokens=False).ids


def test_ids_beyond_the_vocabulary_have_no_text(pair: Pair) -> None:
    """A model's embedding may have more rows than its tokenizer has tokens."""
    ours, theirs = pair(QWEN)
    ids = theirs.encode("yes").ids
    assert ours.decode([[*ids, 10**6]]) == [theirs.decode([*ids, 10**6])] == ["yes"]


@pytest.mark.parametrize("text", ["e\u0301", "\U00020000", "\u0378", "\U0010ffff", "\ua000"])
def test_unusual_text_goes_the_librarys_way(pair: Pair, text: str) -> None:
    ours, _ = pair(QWEN)
    assert ours._words is not None
    assert ours._words.encode(text, []) is None


def test_a_short_way_that_errs_is_found_and_not_trained(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair(QWEN)
    assert ours._words is not None
    monkeypatch.setattr(ours._words, "_find", re.compile(r"\S+|\s+").findall)
    texts: Sequence[str] = ["the patient weighs", "cd"]
    with pytest.raises(BackendError, match="differs from the tokenizers library on 'the patient weighs'"):
        ours.encode(texts, [[], []])


def test_words_are_forgotten_before_they_fill_the_memory(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair(LLAMA)
    monkeypatch.setattr(encoder_module, "MAX_WORDS", 3)
    text = "one two three four five six <|im_end|>"
    (found,) = ours.encode([text], [[(4, len(text))]])
    assert isinstance(found, Encoded)
    assert found.ids == theirs.encode(text).ids
    assert ours._words is not None
    assert len(ours._words._tokens) <= 3
