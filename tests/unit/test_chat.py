"""Masks, templates and tokenizer files, on unmodified templates of real models and a tokenizer trained here."""

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from sft_dist.data.chat import ChatTokenizer, Example
from sft_dist.data.conversation import BadRow, Conversation, Message, Origin
from sft_dist.data.template import CHATML
from sft_dist.errors import ConfigError

TEMPLATES = Path(find_spec("trl").submodule_search_locations[0]) / "chat_templates"
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CASES = {
    "qwen2_5": (QWEN, "<|im_end|>"),
    "qwen3": (QWEN, "<|im_end|>"),
    "qwen3_instruct_2507": (QWEN, "<|im_end|>"),
    "llama3_1": (LLAMA, "<|eot_id|>"),
    "llama3": (LLAMA, "<|eot_id|>"),
    "gemma": (("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "phi3": (("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"), "<|end|>"),
    "deepseek_r1_distill": (
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        "<｜end▁of▁sentence｜>",
    ),
    "qwen3_5_think": (QWEN, "<|im_end|>"),
    "glm4moe": (("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"), None),
}
# How Qwen2 and Llama 3 cut words: line breaks stay together, so a prompt that ends in them is cut as in the whole.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "user assistant system The answer is 4, yes. What is 2 + 2? <think>\n\n</think>\n\n" * 20,
    "Größe naïve 你好 🙂" * 5,
]


def write_tokenizer(
    directory: Path,
    specials: tuple[str, ...] = QWEN,
    template: str | None = None,
    *,
    trim_offsets: bool = False,
    plain: tuple[str, ...] = ("<think>", "</think>"),
    **config: object,
) -> Path:
    """A byte-level BPE in Qwen's manner (NFC, thinking tags as tokens that are not special)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=list(specials), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings_ = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": specials[0],
        "eos_token": specials[0],
        **config,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings_))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return directory


def template_text(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text()


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ChatTokenizer]:
    cache: dict[str, ChatTokenizer] = {}

    def loader(name: str) -> ChatTokenizer:
        if name not in cache:
            directory = tmp_path_factory.mktemp(name)
            specials = CASES[name][0] if name in CASES else QWEN
            template = None if name == "none" else CHATML if name == "chatml" else template_text(name)
            cache[name] = ChatTokenizer.load(write_tokenizer(directory, specials, template))
        return cache[name]

    return loader


def talk(*turns: str, system: str | None = None) -> Conversation:
    """user, assistant, user, assistant ..."""
    messages = [Message("system", system)] if system else []
    for index, text in enumerate(turns):
        messages.append(Message("assistant", text, True) if index % 2 else Message("user", text))
    return Conversation(tuple(messages), Origin("d.jsonl", 7))


def trained_texts(tokenizer: ChatTokenizer, example: Example) -> list[str]:
    """Text of each run of trained tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], example.is_response.astype(int), [0]])))
    return [tokenizer.decode(example.input_ids[a:b].tolist()) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def encode_one(tokenizer: ChatTokenizer, conversation: Conversation) -> Example:
    (result,) = tokenizer.encode([conversation])
    assert isinstance(result, Example), result
    return result


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][1]])
@pytest.mark.parametrize(
    "turns",
    [
        ("What is 2 + 2?", "4"),
        ("Say 4 or yes. yes? 4", "yes", "Is 4 yes?", "4"),
        ("Hi", "  spaced answer \n", "Again", "\nGröße 🙂 你好\n\n"),
        ("user", "assistant", "assistant\n", "user\nassistant\n"),
        ("a", "b\n\nc\n", "d", "e", "f", "g"),
    ],
)
def test_every_answer_is_trained_through_its_stop_token(
    load: Callable[[str], ChatTokenizer], name: str, turns: tuple[str, ...]
) -> None:
    tokenizer = load(name)
    example = encode_one(tokenizer, talk(*turns))
    texts = trained_texts(tokenizer, example)
    answers = turns[1::2]
    assert len(texts) == len(answers)
    for text, answer in zip(texts, answers, strict=True):
        assert text.endswith(CASES[name][1])
        body = text.removesuffix(CASES[name][1]).strip()
        assert body in (
            answer.strip(),
            f"<think>\n\n</think>\n\n{answer.strip()}",
            f"</think>\n\n{answer.strip()}",
        ) or ("think" in body and body.endswith(answer.strip()))
    assert not example.is_response[0]
    assert example.input_ids.dtype == np.int32
    assert example.is_response.dtype == bool


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "chatml"])
def test_the_tokens_are_those_of_the_whole_render(load: Callable[[str], ChatTokenizer], name: str) -> None:
    tokenizer = load(name)
    conversation = talk("What is 2 + 2?", "4", "And 3 + 3?", "6", system="Be brief.")
    example = encode_one(tokenizer, conversation)
    expected = tokenizer._tokenizer.encode(tokenizer.render(conversation.messages), add_special_tokens=False).ids
    assert example.input_ids.tolist() == expected


@pytest.mark.parametrize("name", ["qwen2_5", "llama3_1", "chatml"])
def test_what_precedes_the_last_answer_is_the_inference_prompt(load: Callable[[str], ChatTokenizer], name: str) -> None:
    tokenizer = load(name)
    conversation = talk("What is 2 + 2?", "4", "Sure?", "yes")
    example = encode_one(tokenizer, conversation)
    prompt = tokenizer.encode_prompt(conversation.messages[:-1])
    assert example.input_ids[: len(prompt)].tolist() == prompt
    assert not example.is_response[len(prompt) - 1]
    assert example.is_response[len(prompt)]


def test_newline_after_the_stop_token_is_not_trained(load: Callable[[str], ChatTokenizer]) -> None:
    tokenizer = load("qwen2_5")
    example = encode_one(tokenizer, talk("hi", "yes"))
    assert tokenizer.decode(example.input_ids[-1:].tolist()) == "\n"
    assert not example.is_response[-1]
    assert example.is_response[-2]
    assert example.input_ids[-2] in tokenizer.stop_ids


def test_qwen3_trains_the_empty_thinking_block_only_where_the_template_writes_it(
    load: Callable[[str], ChatTokenizer],
) -> None:
    tokenizer = load("qwen3")
    texts = trained_texts(tokenizer, encode_one(tokenizer, talk("a", "4", "b", "4")))
    assert texts == ["4<|im_end|>", "<think>\n\n</think>\n\n4<|im_end|>"]


def test_earlier_thinking_that_qwen3_drops_is_context_and_the_last_is_trained(
    load: Callable[[str], ChatTokenizer],
) -> None:
    tokenizer = load("qwen3")
    thought = "<think>\nhm yes\n</think>\n\n"
    texts = trained_texts(tokenizer, encode_one(tokenizer, talk("a", thought + "4", "b", thought + "yes")))
    assert texts == [thought + "yes<|im_end|>"]


def test_trimming_templates_do_not_lose_the_mask(load: Callable[[str], ChatTokenizer]) -> None:
    tokenizer = load("llama3_1")
    assert trained_texts(tokenizer, encode_one(tokenizer, talk("a", "\n yes \n\n"))) == ["yes<|eot_id|>"]


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_white_space_inside_answers_is_trained_whatever_the_post_processor_trims(
    tmp_path: Path, trim_offsets: bool
) -> None:
    tokenizer = ChatTokenizer.load(write_tokenizer(tmp_path, QWEN, CHATML, trim_offsets=trim_offsets))
    answer = "\t\tindented\n\n\n    four   \n"
    (text,) = trained_texts(tokenizer, encode_one(tokenizer, talk("a", answer)))
    # The first "\t" follows the "\n" of the generation prompt; a token of both may be trained as one.
    assert text.lstrip("\n") == answer + "<|im_end|>"


def test_bytes_of_one_character_are_all_trained(load: Callable[[str], ChatTokenizer]) -> None:
    tokenizer = load("chatml")
    example = encode_one(tokenizer, talk("𝔘 𓀀", "𓀀"))
    assert trained_texts(tokenizer, example) == ["𓀀<|im_end|>"]
    assert example.is_response.sum() == 5  # four bytes and the stop token


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_a_forged_control_token_is_refused_and_named_if_so_asked(
    load: Callable[[str], ChatTokenizer], role: str, token: str
) -> None:
    tokenizer = load("qwen3")
    forged = f"see {token}here"
    texts = {"user": "hi", "assistant": "yes", "system": "sys", role: forged}
    rows = [talk(texts["user"], texts["assistant"], system=texts["system"])]
    (result,) = tokenizer.encode(rows, control_tokens="error")
    assert isinstance(result, BadRow)
    assert result.cause == "control_token"
    assert token in result.reason
    assert role in result.reason


def test_private_use_characters_in_the_text_do_not_move_the_mask(load: Callable[[str], ChatTokenizer]) -> None:
    tokenizer = load("chatml")
    answer = "\U000f0000\U000f0001 x"
    assert trained_texts(tokenizer, encode_one(tokenizer, talk("\U000f0000", answer))) == [answer + "<|im_end|>"]
    (result,) = tokenizer.encode([talk("\U000f0000", "\U00100000")])
    assert isinstance(result, BadRow)
    assert result.cause == "mask_not_verified"


def test_bad_rows_keep_their_place_in_a_batch(load: Callable[[str], ChatTokenizer]) -> None:
    results = load("chatml").encode([talk("a", "b"), talk("\U000f0000", "\U00100000"), talk("c", "d")])
    assert [type(result) for result in results] == [Example, BadRow, Example]


def test_message_that_the_template_drops_is_refused(tmp_path: Path) -> None:
    template = CHATML.replace(
        "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
    )
    tokenizer = ChatTokenizer.load(write_tokenizer(tmp_path, QWEN, template))
    (result,) = tokenizer.encode([talk("a", "b", system="Only French.")])
    assert isinstance(result, BadRow)
    assert result.cause == "message_dropped"
    assert "system" in result.reason


def test_template_that_rewrites_answers_is_not_verified(tmp_path: Path) -> None:
    template = CHATML.replace(
        "message['content'] +", "(message['content'] | upper if loop.index > 3 else message['content']) +"
    )
    tokenizer = ChatTokenizer.load(write_tokenizer(tmp_path, QWEN, template))
    (result,) = tokenizer.encode([talk("a", "b", "C", "upper me")])
    assert isinstance(result, BadRow)
    assert result.cause == "mask_not_verified"
    assert "UPPER ME" in result.reason


def test_template_that_refuses_a_conversation_gives_its_own_reason(load: Callable[[str], ChatTokenizer]) -> None:
    (result,) = load("gemma").encode([talk("a", "b", system="s")])
    assert isinstance(result, BadRow)
    assert result.cause == "template_refused"
    assert "System" in result.reason


def test_template_without_special_stop_token_is_refused_at_load(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:\n{% endif %}"
    )
    with pytest.raises(ConfigError, match="no end that a model could learn"):
        ChatTokenizer.load(write_tokenizer(tmp_path, QWEN, template))


def test_plain_text_headers_work_and_a_forged_one_in_an_answer_is_refused(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}### assistant:\n{% endif %}"
    )
    tokenizer = ChatTokenizer.load(write_tokenizer(tmp_path, QWEN, template))
    assert trained_texts(tokenizer, encode_one(tokenizer, talk("### assistant:\nno", "yes"))) == ["yes<|endoftext|>"]
    (result,) = tokenizer.encode([talk("a", "x ### assistant:\ny")])
    assert isinstance(result, BadRow)
    assert result.cause == "mask_not_verified"


def test_instruction_templates_without_generation_prompt_are_learned(tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    directory = write_tokenizer(tmp_path, ("<s>", "</s>", "[INST]", "[/INST]"), template, eos_token="</s>")
    tokenizer = ChatTokenizer.load(directory)
    assert trained_texts(tokenizer, encode_one(tokenizer, talk("a", "b", "c", "d"))) == [" b</s>", " d</s>"]


def test_a_wrong_mask_does_not_pass_verification(
    load: Callable[[str], ChatTokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load("chatml")
    right = tokenizer._finder._delimit
    for shift_start, shift_end in [(-12, 0), (1, 0), (0, -10), (0, 1), (-1, 0)]:

        def wrong(*args: Any, a: int = shift_start, b: int = shift_end, **where: int) -> tuple[int, int]:
            start, end = right(*args, **where)
            return start + a, end + b

        monkeypatch.setattr(tokenizer._finder, "_delimit", wrong)
        (result,) = tokenizer.encode([talk("What is 2 + 2?", "The answer is 4")])
        # One character earlier is the white space of the header, which may be joined with the answer.
        if (shift_start, shift_end) != (-1, 0):
            assert isinstance(result, BadRow), (shift_start, shift_end)
            assert result.cause == "mask_not_verified"


@settings(max_examples=60)
@given(
    st.lists(
        st.text(min_size=1, max_size=30).filter(lambda text: text.strip() and "\x00" not in text),
        min_size=2,
        max_size=6,
    )
)
def test_any_text_is_masked_exactly_or_refused(load: Callable[[str], ChatTokenizer], texts: list[str]) -> None:
    tokenizer = load("chatml")
    turns = texts[: len(texts) // 2 * 2]
    try:
        "".join(turns).encode()
    except UnicodeEncodeError:
        return
    (result,) = tokenizer.encode([talk(*turns)])
    if isinstance(result, BadRow):
        return
    nfc = tokenizer._tokenizer.normalizer.normalize_str
    got = [text.removesuffix("<|im_end|>").strip() for text in trained_texts(tokenizer, result)]
    assert got == [nfc(answer).strip() for answer in turns[1::2]]


HOSTILE = (
    "4", "yes", " ", "\n", "\n\n", "user", "assistant", "assistant\n", "Größe 你好 🙂", "\u0301", "\U000f0000",
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_end|>\n<|im_start|>assistant\n",
    "<|eot_id|>", "<|im_", "end|>", "<tool_response>", "{{ bos_token }}", "{% generation %}",
)  # fmt: skip


@settings(max_examples=120)
@given(
    st.sampled_from(["chatml", "qwen2_5", "qwen3_instruct_2507"]),
    st.lists(st.lists(st.sampled_from(HOSTILE), min_size=1, max_size=8).map("".join), min_size=2, max_size=6),
    st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_exactly_the_trained_answers_are_trained_whatever_the_turns_hold(
    load: Callable[[str], ChatTokenizer], name: str, texts: list[str], trains: list[bool]
) -> None:
    turns = [f"x{text}x" for text in texts[: len(texts) // 2 * 2]]
    conversation = talk(*turns)
    flags = iter(trains)
    messages = [
        replace(message, train=next(flags)) if message.role == "assistant" else message
        for message in conversation.messages
    ]
    if not any(message.train for message in messages):
        return
    tokenizer = load(name)
    (example,) = tokenizer.encode([replace(conversation, messages=tuple(messages))])
    assert isinstance(example, Example), example
    nfc = tokenizer._tokenizer.normalizer.normalize_str
    expected = [nfc(message.content) + "<|im_end|>" for message in messages if message.train]
    assert trained_texts(tokenizer, example) == expected
    context = tokenizer.decode(example.input_ids[~example.is_response].tolist())
    assert all(nfc(message.content) in context for message in messages if not message.train)
    # As many control tokens as the template writes, whatever the turns say.
    starts = tokenizer._tokenizer.token_to_id("<|im_start|>")
    assert (example.input_ids == starts).sum() == len(turns) + (name == "qwen2_5")


# ---------------------------------------------------------------- ChatML for tokenizers without a template


def test_without_a_template_chatml_and_its_tokens_are_installed(tmp_path: Path) -> None:
    plain = ChatTokenizer.load(write_tokenizer(tmp_path / "with", QWEN, CHATML))
    assert not plain.added_chatml
    tokenizer = ChatTokenizer.load(write_tokenizer(tmp_path / "without", ("<|endoftext|>",)))
    assert tokenizer.added_chatml
    assert tokenizer.specials["eos_token"] == "<|im_end|>"
    assert tokenizer.specials["pad_token"] == "<|endoftext|>"
    assert tokenizer.pad_id != tokenizer.eos_id
    assert tokenizer.eos_id in tokenizer.stop_ids
    assert tokenizer.num_tokens == max(tokenizer._tokenizer.get_vocab().values()) + 1
    assert trained_texts(tokenizer, encode_one(tokenizer, talk("a", "b"))) == ["b<|im_end|>"]


@pytest.mark.parametrize("style", ["string", "object", "special_tokens_map"])
def test_eos_is_read_from_every_place_it_is_written(tmp_path: Path, style: str) -> None:
    directory = write_tokenizer(tmp_path, QWEN, CHATML, eos_token=None)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    value = {"string": "<|im_end|>", "object": {"content": "<|im_end|>", "special": True}}.get(style)
    if value:
        (directory / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": value}))
    else:
        (directory / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    tokenizer = ChatTokenizer.load(directory)
    assert tokenizer.eos_id == tokenizer._tokenizer.token_to_id("<|im_end|>")


@pytest.mark.parametrize("named", [False, True])
def test_template_in_the_config_is_used(tmp_path: Path, named: bool) -> None:
    value = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}] if named else CHATML
    tokenizer = ChatTokenizer.load(write_tokenizer(tmp_path, QWEN, chat_template=value))
    assert tokenizer.template == CHATML
    assert not tokenizer.added_chatml


def test_given_template_replaces_the_tokenizers_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML.replace("'\\n' +", "' MINE\\n' +", 1))
    tokenizer = ChatTokenizer.load(write_tokenizer(tmp_path / "m", QWEN, CHATML), chat_template=file)
    assert "MINE" in tokenizer.render(talk("a", "b").messages)
    assert tokenizer.digest != ChatTokenizer.load(tmp_path / "m").digest


def test_generation_blocks_are_rendered_as_their_body(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = ChatTokenizer.load(write_tokenizer(tmp_path, QWEN, template))
    assert trained_texts(tokenizer, encode_one(tokenizer, talk("a", "b"))) == ["b<|im_end|>"]


# ---------------------------------------------------------------- errors of loading


def test_missing_tokenizer_json_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json.*save_pretrained"):
        ChatTokenizer.load(tmp_path)


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        ChatTokenizer.load(tmp_path / "absent")


def test_broken_files_and_templates_are_named(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "a", QWEN, "{% for %}")
    with pytest.raises(ConfigError, match="syntax error in line 1"):
        ChatTokenizer.load(tmp_path / "a")
    write_tokenizer(tmp_path / "b", QWEN, CHATML)
    (tmp_path / "b" / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json is not valid JSON"):
        ChatTokenizer.load(tmp_path / "b")
    (tmp_path / "b" / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
        ChatTokenizer.load(tmp_path / "b")


def test_templates_cannot_reach_python(tmp_path: Path) -> None:
    template = "{{ messages.__class__.__mro__ }}" + CHATML
    with pytest.raises(ConfigError):
        ChatTokenizer.load(write_tokenizer(tmp_path, QWEN, template))


# ---------------------------------------------------------------- agreement with transformers


@pytest.mark.parametrize("name", ["none", "qwen3", "qwen2_5", "llama3_1"])
def test_saved_tokenizer_is_the_same_in_transformers_and_here(
    load: Callable[[str], ChatTokenizer], tmp_path: Path, name: str
) -> None:
    from transformers import AutoTokenizer

    tokenizer = load(name)
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    again = ChatTokenizer.load(tmp_path)
    assert again.files == tokenizer.files
    assert again.digest == tokenizer.digest
    messages = talk("What is 2 + 2?", "4", "Größe?", "yes", system="Be brief.").messages
    as_dicts = [{"role": message.role, "content": message.content} for message in messages]
    assert theirs.apply_chat_template(as_dicts, tokenize=False) == tokenizer.render(messages)
    assert theirs.apply_chat_template(
        as_dicts[:-1], add_generation_prompt=True, return_dict=False
    ) == tokenizer.encode_prompt(messages[:-1])
    assert theirs.eos_token_id == tokenizer.eos_id
    assert theirs.pad_token_id == tokenizer.pad_id
    assert len(theirs) == tokenizer.num_tokens


def test_added_tokens_stay_consistent_in_every_file(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    directory = write_tokenizer(tmp_path / "base", ("<|endoftext|>",))
    entry = {
        "content": "<|endoftext|>",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": {"0": entry}}))
    (directory / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    tokenizer = ChatTokenizer.load(directory)
    tokenizer.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "special_tokens_map.json").read_text())["eos_token"] == "<|im_end|>"
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs.eos_token_id == tokenizer.eos_id
    assert theirs.pad_token_id == tokenizer.pad_id
    assert theirs.convert_tokens_to_ids("<|im_start|>") == tokenizer._tokenizer.token_to_id("<|im_start|>")


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_instruct_2507", "llama3", "gemma"])
def test_masks_agree_with_the_marked_variants_of_the_templates(
    load: Callable[[str], ChatTokenizer], tmp_path: Path, name: str
) -> None:
    """TRL's `{% generation %}` variants say what is an answer. They may train line breaks after it, nothing else."""
    from transformers import AutoTokenizer

    tokenizer = load(name)
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    conversation = talk("What is 4? yes?", "4", "yes?", "The answer is\n\nyes 🙂")
    found = theirs.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in conversation.messages],
        chat_template=template_text(f"{name}_training"),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    example = encode_one(tokenizer, conversation)
    assert found["input_ids"] == example.input_ids.tolist()
    differs = np.flatnonzero(np.asarray(found["assistant_masks"], dtype=bool) != example.is_response)
    assert tokenizer.decode(example.input_ids[differs].tolist()).strip() == ""


def test_what_the_generation_prompt_already_holds_is_not_trained(load: Callable[[str], ChatTokenizer]) -> None:
    """A template that opens the thinking block in the generation prompt: only what follows it is a response."""
    tokenizer = load("qwen3_5_think")
    assert tokenizer.markers.generation_prompt.endswith("assistant\n<think>\n")
    texts = trained_texts(tokenizer, encode_one(tokenizer, talk("a", "4", "b", "yes")))
    assert texts == ["4<|im_end|>", "\n</think>\n\nyes<|im_end|>"]


def test_answers_that_the_vocabulary_cannot_write_are_refused(tmp_path: Path) -> None:
    """Without byte fallback an unknown character vanishes from the tokens, and the model would learn a gap."""
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        special_tokens=list(QWEN), initial_alphabet=[chr(code) for code in range(32, 127)] + ["\n"]
    )
    tokenizer.train_from_iterator([], trainer)
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    good, bad = ChatTokenizer.load(tmp_path).encode([talk("a é", "cafe"), talk("a", "café")])
    assert isinstance(good, Example)
    assert isinstance(bad, BadRow)
    assert bad.cause == "mask_not_verified"
    assert "'caf<|im_end|>', not 'café<|im_end|>'" in bad.reason


def test_truncation_and_padding_of_the_tokenizer_file_are_ignored(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path, QWEN, CHATML)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=512)
    tokenizer.save(str(directory / "tokenizer.json"))
    loaded = ChatTokenizer.load(directory)
    example = encode_one(loaded, talk("What is 2 + 2?", "The answer is 4"))
    assert loaded.decode(example.input_ids.tolist()) == loaded.render(
        talk("What is 2 + 2?", "The answer is 4").messages
    )


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("chat_template.jinja", b"{{ messages }}\xff", "is not UTF-8 at byte 14"),
        ("chat_template.json", b'{"chat_template": [{"name": "default"}]}', "has no text under 'template'"),
        ("tokenizer_config.json", b'{"chat_template": ["default"]}', "has no text under 'template'"),
        ("tokenizer_config.json", b'{"chat_template": 5}', "chat_template is a number; expected a text"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [1]}', "added_tokens_decoder is a list; expected an obje"),
        ("tokenizer_config.json", b"[" * 10**5, "is not valid JSON"),
        ("special_tokens_map.json", b"[]", "expected an object, got a list"),
        ("added_tokens.json", b"{", "is not valid JSON"),
        ("added_tokens.json", b"[1]", "expected an object, got a list"),
        ("added_tokens.json", b'{"<x>": "7"}', "the id of '<x>' is '7', no token id"),
        ("vocab.json", b"\xff", "is not valid JSON"),
        ("vocab.json", b'{"a": 0, "b": -1}', "the id of 'b' is -1, no token id"),
        ("tokenizer.json", b"\xff", "cannot be read"),
    ],
)
def test_bad_files_of_a_tokenizer_are_named(tmp_path: Path, file: str, content: bytes, reason: str) -> None:
    directory = write_tokenizer(tmp_path)
    (directory / file).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        ChatTokenizer.load(directory)
    assert str(caught.value).startswith(f"{directory}/{file}")
    assert reason in str(caught.value)


@pytest.mark.parametrize("vocab", [[], {"a": "0"}, {"a": 1.5}, {"a": 0, "b": 0, "ab": 1}, None])
def test_a_vocabulary_that_is_none_is_named(tmp_path: Path, vocab: object) -> None:
    """Two tokens of one id pass the library, or make it panic, which is no Exception in Python."""
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    fields = json.loads(tokenizer.to_str())
    fields["model"]["vocab"] = vocab
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
        ChatTokenizer.load(tmp_path)


def test_a_template_by_the_name_of_default_is_used(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    assert ChatTokenizer.load(write_tokenizer(tmp_path, chat_template=named)).template == CHATML
