"""The token store: what is in it, what is not, and that nothing but a whole one is ever opened."""

import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sft_dist.config import Source
from sft_dist.data import build
from sft_dist.data.build import StoreSpec, prepare, store_fingerprint, wait_for_store
from sft_dist.data.chat import ChatTokenizer, Example
from sft_dist.data.conversation import Conversation
from sft_dist.data.files import iter_rows
from sft_dist.data.inspect import summary
from sft_dist.data.prepare import describe_progress
from sft_dist.data.rows import parse_row
from sft_dist.data.store import TokenStore
from sft_dist.errors import DataError
from tests.unit import chat_templates

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer of bytes, without a template: ChatML gets installed."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=257, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return directory


def chat(question: str, answer: str) -> str:
    return json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})


def talk(*turns: str, system: str | None = None) -> str:
    """user, assistant, user, assistant ..."""
    roles = ("user", "assistant") * (len(turns) // 2)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
    return json.dumps({"messages": [{"role": "system", "content": system}] * bool(system) + messages})


def texts(store: TokenStore, index: int) -> list[str]:
    """The trained answers of an example, without their stop tokens."""
    example = store.example(index)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], example.is_response.astype(int), [0]])))
    tokenizer = ChatTokenizer.load(store.tokenizer_dir)
    runs = [example.input_ids[a : b - 1].tolist() for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return [tokenizer.decode(run) for run in runs]


def write(path: Path, *rows: str) -> Source:
    path.write_text("".join(f"{row}\n" for row in rows))
    return Source(path=str(path))


def make(
    sources: list[Source],
    model: Path,
    directory: Path,
    *,
    workers: int | None = 1,
    progress: Any = None,
    lock_timeout_s: float = 60.0,
    **changes: Any,
) -> TokenStore:
    return prepare(
        spec(sources, model, **changes),
        store_dir=directory,
        workers=workers,
        progress=progress,
        lock_timeout_s=lock_timeout_s,
    )


def spec(sources: list[Source], model: Path, **changes: Any) -> StoreSpec:
    return StoreSpec(tuple(sources), str(model), **changes)


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def names(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir() if not entry.name.endswith(".lock")}


# ---------------------------------------------------------------- what is stored


def test_stored_examples_are_those_of_the_tokenizer(model: Path, tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", chat("1", "one"), "", chat("2", "two two"))
    second = write(tmp_path / "b.jsonl", chat("3", "three"))
    store = make([first, second], model, tmp_path / "stores")
    conversations = [parse_row(row, "messages") for source in (first, second) for row in iter_rows(source)]
    assert all(isinstance(item, Conversation) for item in conversations)
    expected = ChatTokenizer.load(model).encode(conversations)  # type: ignore[arg-type]
    assert len(store) == 3
    for index, wanted in enumerate(expected):
        assert isinstance(wanted, Example)
        got = store.example(index)
        assert got.input_ids.dtype == np.int32
        assert got.is_response.dtype == np.bool_
        np.testing.assert_array_equal(got.input_ids, wanted.input_ids)
        np.testing.assert_array_equal(got.is_response, wanted.is_response)
        assert got.origin == wanted.origin == store.origin(index)
        assert store.lengths[index] == len(wanted.input_ids)
        assert store.num_responses[index] == wanted.is_response.sum()
    assert [store.origin(index).line for index in range(3)] == [1, 3, 1]
    assert store.source_ranges == [(0, 2), (2, 3)]
    assert store.max_length == store.lengths.max()
    assert store.lengths.dtype == np.int64
    assert store.meta["tokens"] == store.lengths.sum()
    assert store.meta["response_tokens"] == store.num_responses.sum()


def test_examples_are_views_of_the_file(model: Path, tmp_path: Path) -> None:
    store = make([write(tmp_path / "a.jsonl", chat("1", "one"))], model, tmp_path / "stores")
    example = store.example(0)
    assert not example.input_ids.flags.owndata
    assert not example.input_ids.flags.writeable
    for index in (-1, 1):
        with pytest.raises(IndexError):
            store.example(index)


def test_the_stored_tokenizer_is_the_one_that_made_the_tokens(model: Path, tmp_path: Path) -> None:
    store = make([write(tmp_path / "a.jsonl", chat("1", "one"))], model, tmp_path / "stores")
    tokenizer = ChatTokenizer.load(store.tokenizer_dir)
    assert tokenizer.digest == ChatTokenizer.load(model).digest
    assert (
        tokenizer.decode(store.example(0).input_ids.tolist())
        == "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n"
    )


def test_any_number_of_workers_writes_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "IN_PROCESS_BYTES", 0)
    rows = [chat(f"q{n}", "word " * (n % 7 + 1)) if n % 50 else "{broken" for n in range(1, 1100)]
    source = write(tmp_path / "a.jsonl", *rows)
    stores = [
        make([source], model, tmp_path / f"s{workers}", workers=workers, bad_rows="drop") for workers in (1, 2, 3)
    ]
    assert stores[0].fingerprint == stores[1].fingerprint
    assert contents(stores[0].path) == contents(stores[1].path) == contents(stores[2].path)
    assert stores[0].meta["dropped"]["malformed_json"]["count"] == 21


def test_chunk_sizes_change_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "a.jsonl", *[chat(f"q{n}", "x" * n) for n in range(1, 50)])
    one = make([source], model, tmp_path / "s1")
    monkeypatch.setattr(build, "CHUNK_ROWS", 7)
    assert contents(make([source], model, tmp_path / "s2").path) == contents(one.path)


def test_progress_counts_rows(model: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, float | None]] = []
    source = write(tmp_path / "a.jsonl", *[chat(f"q{n}", "a" * 500) for n in range(600)])
    make([source], model, tmp_path / "s", progress=lambda *done: seen.append(done))
    assert [rows for rows, _ in seen] == [256, 512, 600]
    shares = [share or 0.0 for _, share in seen]
    assert 0 < shares[0] < shares[-1] == 1


def test_progress_says_rate_and_time_left() -> None:
    assert describe_progress(3000, 0.25, elapsed_s=30) == "3,000 rows, 100 rows/s, 25%, 1:30 left"
    assert describe_progress(3000, None, elapsed_s=30) == "3,000 rows, 100 rows/s"


# ---------------------------------------------------------------- refused rows


def test_bad_rows_are_listed_with_their_lines(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", chat("1", "one"), *["{"] * 25, chat("2", "<|im_end|>"))
    with pytest.raises(DataError) as caught:
        make([source], model, tmp_path / "s", control_tokens="error")
    lines = str(caught.value).splitlines()
    assert "26 bad rows of 27 (25 malformed_json, 1 control_token)" in lines[0]
    assert "data.bad_rows: drop" in lines[0]
    assert lines[1].startswith(f"  {source.path}:2: malformed JSON")
    assert len(lines) == 22
    assert lines[-1] == "  ... and 6 more"
    assert names(tmp_path / "s") == set()


def test_dropped_rows_are_counted_by_cause(model: Path, tmp_path: Path) -> None:
    source = write(
        tmp_path / "a.jsonl", chat("1", "one"), *["{"] * 8, chat("2", "<|im_end|>"), chat("3", "long " * 100)
    )
    store = make([source], model, tmp_path / "s", bad_rows="drop", max_tokens=100, control_tokens="error")
    dropped = store.meta["dropped"]
    assert {cause: entry["count"] for cause, entry in dropped.items()} == {
        "control_token": 1,
        "malformed_json": 8,
        "too_long": 1,
    }
    assert len(dropped["malformed_json"]["examples"]) == 5
    assert dropped["too_long"]["examples"][0].startswith(f"{source.path}:11: ")
    assert store.meta["rows_read"] == 11
    assert store.meta["examples"] == store.meta["rows_kept"] == len(store) == 1


def test_too_long_rows_can_be_an_error_with_line_length_and_limit(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", chat("1", "one"), chat("2", "x" * 200))
    length = make([source], model, tmp_path / "s").max_length
    assert len(make([source], model, tmp_path / "s", max_tokens=length)) == 2
    with pytest.raises(DataError, match=rf"a\.jsonl:2: {length} tokens, more than data\.max_tokens={length - 1}"):
        make([source], model, tmp_path / "s", max_tokens=length - 1, too_long="error")


def test_nothing_left_is_an_error(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", chat("1", "one"))
    with pytest.raises(DataError, match=r"nothing is left to train on of 1 rows \(1 too_long\)"):
        make([source], model, tmp_path / "s", max_tokens=3)


# ---------------------------------------------------------------- the fingerprint


def test_an_existing_store_is_opened_and_not_made_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.jsonl", chat("1", "one"))
    first = make([source], model, tmp_path / "s")
    monkeypatch.setattr(build, "_build", lambda *_, **__: pytest.fail("built again"))
    assert make([source], model, tmp_path / "s", workers=2).path == first.path


def test_whatever_changes_tokens_changes_the_fingerprint(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", chat("1", "one"))
    moved = write(tmp_path / "moved.jsonl", chat("1", "one"))
    other = write(tmp_path / "b.jsonl", chat("1", "onE"))
    template = tmp_path / "t.jinja"
    template.write_text(ChatTokenizer.load(model).template.replace("assistant\\n", "assistant:\\n"))
    tokenizer, changed = ChatTokenizer.load(model), ChatTokenizer.load(model, chat_template=None)
    assert tokenizer.digest == changed.digest
    changes = [
        {"max_tokens": 99},
        {"too_long": "error"},
        {"bad_rows": "drop"},
        {"turns": "last"},
        {"control_tokens": "error"},
        {"difficulty_field": "level"},
    ]
    found = [
        *(store_fingerprint(spec([source], model, **change), tokenizer) for change in ({}, *changes)),
        *(
            store_fingerprint(spec(several, model), tokenizer)
            for several in ([other], [source, other], [other, source])
        ),
    ]
    assert len(set(found)) == len(found)
    assert store_fingerprint(spec([moved], model), tokenizer) == found[0]


def test_every_turn_can_be_an_example_of_its_own(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", talk("1", "one", "2", "two", "3", "three"), chat("4", "four"))
    store = make([source], model, tmp_path / "s", turns="each")
    assert [texts(store, index) for index in range(4)] == [["one"], ["two"], ["three"], ["four"]]
    assert [store.origin(index).line for index in range(4)] == [1, 1, 1, 2]
    assert store.lengths[0] < store.lengths[1] < store.lengths[2]
    assert store.meta["rows_read"] == 2
    last = make([source], model, tmp_path / "s", turns="last")
    assert [texts(last, index) for index in range(2)] == [["three"], ["four"]]


def test_too_long_conversations_lose_their_oldest_turns_and_no_answer_is_cut(model: Path, tmp_path: Path) -> None:
    long = talk("1" * 30, "one", "2" * 30, "two", "3" * 30, "three", system="S")
    source = write(tmp_path / "a.jsonl", long, chat("4", "four"), chat("5" * 300, "five"))
    whole = make([source], model, tmp_path / "s")
    limit = int(whole.lengths[0]) - 1
    store = make([source], model, tmp_path / "s", max_tokens=limit, too_long="truncate")
    assert [texts(store, index) for index in range(2)] == [["two", "three"], ["four"]]
    text = ChatTokenizer.load(store.tokenizer_dir).decode(store.example(0).input_ids.tolist())
    assert "<|im_start|>system\nS<|im_end|>" in text
    assert "111" not in text
    assert store.meta["notes"]["truncated"]["count"] == 1
    assert store.meta["notes"]["truncated"]["examples"][0].startswith(f"{source.path}:1: {limit + 1} tokens")
    assert store.meta["dropped"]["too_long"]["count"] == 1
    tight = make([source], model, tmp_path / "s", max_tokens=int(store.lengths[0]) - 1, too_long="truncate")
    assert texts(tight, 0) == ["three"]
    with pytest.raises(DataError, match=r"2 rows of 3 are too long; raise data.max_tokens"):
        make([source], model, tmp_path / "s", max_tokens=limit, too_long="error")


def test_a_row_that_gives_several_examples_is_one_row(model: Path, tmp_path: Path) -> None:
    """One row keeps two of its three examples, one gives none, and one is no row at all."""
    long = [{"role": "user", "content": "x" * 900}, {"role": "assistant", "content": "x"}] * 1
    three = json.loads(talk("1", "one", "2", "two"))["messages"] + long
    source = write(tmp_path / "a.jsonl", json.dumps({"messages": three}), json.dumps({"messages": long * 2}), "{")
    store = make([source], model, tmp_path / "s", turns="each", max_tokens=200, bad_rows="drop")
    meta = store.meta
    assert (meta["rows_read"], meta["rows_kept"], meta["examples"], len(store)) == (3, 1, 2, 2)
    assert {cause: dropped["count"] for cause, dropped in meta["dropped"].items()} == {
        "malformed_json": 1,
        "too_long": 2,
    }
    stream = io.StringIO()
    summary(store, Console(file=stream, width=200))
    assert "3 read, 1 kept, 2 dropped" in stream.getvalue()
    assert "1 of 3 rows kept" in stream.getvalue()


def test_examples_of_one_row_share_a_prompt_hash(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", talk("1", "one", "2", "two"), talk("1", "one", "3", "three"))
    hashes = make([source], model, tmp_path / "s", turns="each").prompt_hash
    assert hashes[0] == hashes[1] != hashes[2] == hashes[3]


def test_a_truncated_conversation_asks_what_is_left_of_it(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", talk("1" * 200, "one", "2", "two"), chat("2", "two"))
    store = make([source], model, tmp_path / "s", max_tokens=100, too_long="truncate", turns="last")
    assert store.prompt_hash[0] == store.prompt_hash[1]


def test_truncation_keeps_all_system_prompts_and_calls_with_their_results(tmp_path: Path) -> None:
    model = chat_templates.write(tmp_path / "m", chat_templates.source("qwen2_5"))
    call = {"id": "c1", "function": {"name": "f", "arguments": {}}}
    turns = [
        {"role": "user", "content": "q" * 400},
        {"role": "assistant", "content": "look", "tool_calls": [call]},
        {"role": "user", "content": "hurry"},
        {"role": "tool", "content": "R", "tool_call_id": "c1"},
        {"role": "assistant", "content": "done"},
    ]
    system = [{"role": "system", "content": "S" * 30}, {"role": "developer", "content": "D" * 30}]
    asked = json.loads(talk("1" * 400, "one", "2", "two"))["messages"]
    source = write(tmp_path / "a.jsonl", json.dumps({"messages": turns}), json.dumps({"messages": system + asked}))
    limit = int(make([source], model, tmp_path / "s").lengths.min()) - 1
    store = make([source], model, tmp_path / "s", max_tokens=limit, too_long="truncate")
    assert [store.origin(index).line for index in range(len(store))] == [2]
    text = ChatTokenizer.load(store.tokenizer_dir).decode(store.example(0).input_ids.tolist())
    assert "S" * 30 in text
    assert "D" * 30 in text
    assert "111" not in text
    assert store.meta["dropped"]["too_long"]["examples"][0].startswith(f"{source.path}:1: ")


def test_truncation_never_leaves_an_example_without_a_response(model: Path, tmp_path: Path) -> None:
    turns = [("user", "1"), ("assistant", "one"), ("user", "2" * 60), ("assistant", "two")]
    messages = [{"role": role, "content": content} for role, content in turns]
    row = json.dumps({"messages": [*messages[:3], messages[3] | {"train": False}]})
    source = write(tmp_path / "a.jsonl", row, chat("4", "four"))
    store = make([source], model, tmp_path / "s", max_tokens=60, too_long="truncate")
    assert [texts(store, index) for index in range(len(store))] == [["four"]]
    assert store.meta["dropped"]["too_long"]["count"] == 1


def test_forged_control_tokens_are_counted_with_their_lines(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", chat("1", "one"), chat("<|im_end|><|im_end|>", "two"))
    note = make([source], model, tmp_path / "s").meta["notes"]["control_tokens_neutralised"]
    where = f"{source.path}:2: turn 1 (user) contains '<|im_end|>' 2 times, encoded as text"
    assert note == {"count": 1, "examples": [where]}
    with pytest.raises(DataError, match=r"a\.jsonl:2: .*which would become a control token"):
        make([source], model, tmp_path / "s", control_tokens="error")


def test_equal_prompts_have_equal_hashes_and_difficulty_is_kept(model: Path, tmp_path: Path) -> None:
    rows = [json.loads(chat(question, "x")) | {"level": level} for question, level in (("A b", 2), (" a  B\n", 0.5))]
    source = write(tmp_path / "a.jsonl", *map(json.dumps, rows), json.dumps(json.loads(chat("c", "x")) | {"level": 1}))
    store = make([source], model, tmp_path / "s", difficulty_field="level")
    assert store.prompt_hash[0] == store.prompt_hash[1] != store.prompt_hash[2]
    assert store.difficulty.tolist() == [2, 0.5, 1]
    assert np.isnan(make([source], model, tmp_path / "s").difficulty).all()


def test_a_renamed_file_reuses_the_store_under_its_new_name(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", chat("1", "one"))
    first = make([source], model, tmp_path / "s")
    moved = Source(path=str((tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")))
    store = make([moved], model, tmp_path / "s")
    assert store.path == first.path
    assert str(store.origin(0)) == f"{moved.path}:1"
    assert store.meta["sources"][0]["path"] == moved.path


# ---------------------------------------------------------------- faults


def test_store_without_its_commit_does_not_exist_and_is_made_again(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", chat("1", "one"))
    store = make([source], model, tmp_path / "s")
    whole = contents(store.path)
    (store.path / "COMMITTED").unlink()
    (store.path / "tokens.bin").write_bytes(b"torn")
    (tmp_path / "s" / ".tmp-0123").mkdir()
    with pytest.raises(DataError, match="no committed token store"):
        TokenStore.open(store.path)
    assert contents(make([source], model, tmp_path / "s").path) == whole
    assert names(tmp_path / "s") == {store.fingerprint}


@pytest.mark.parametrize("name", ["tokens.bin", "response.bin", "index.npz", "meta.json", "tokenizer/tokenizer.json"])
def test_cut_or_lost_files_are_named(model: Path, tmp_path: Path, name: str) -> None:
    store = make([write(tmp_path / "a.jsonl", chat("1", "one"))], model, tmp_path / "s")
    content = (store.path / name).read_bytes()
    (store.path / name).write_bytes(content[:-1])
    with pytest.raises(
        DataError, match=f"{Path(name).name} has {len(content) - 1} bytes, committed with {len(content)}"
    ):
        TokenStore.open(store.path)
    (store.path / name).unlink()
    with pytest.raises(DataError, match=f"{Path(name).name} is missing"):
        TokenStore.open(store.path)


SCRIPT = textwrap.dedent(
    """
    import os, sys
    from pathlib import Path
    from sft_dist.config import Source
    from sft_dist.data import build

    if __name__ == "__main__":
        build.IN_PROCESS_BYTES = 0 if int(sys.argv[4]) > 1 else build.IN_PROCESS_BYTES
        def progress(rows, share):
            print("rows", rows, flush=True)
        spec = build.StoreSpec((Source(path=sys.argv[1]),), sys.argv[2])
        made = build.prepare(spec, store_dir=Path(sys.argv[3]), workers=int(sys.argv[4]), progress=progress)
        print("torch" in sys.modules, "transformers" in sys.modules, "datasets" in sys.modules, len(made))
    """
)


def start(tmp_path: Path, source: Source, model: Path, *, workers: int = 1) -> "subprocess.Popen[str]":
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), source.path, str(model), str(tmp_path / "s"), str(workers)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_preparing_loads_neither_torch_nor_transformers(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", chat("1", "one"))
    output, _ = start(tmp_path, source, model).communicate(timeout=60)
    assert output.split("\n")[-2] == "False False False 1"


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_preparation_leaves_no_store_and_no_processes_and_the_next_one_is_whole(
    model: Path, tmp_path: Path, workers: int
) -> None:
    source = write(tmp_path / "a.jsonl", *[chat(f"q{n}", "word " * 30) for n in range(20_000)])
    process = start(tmp_path, source, model, workers=workers)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("rows")
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not any((entry / "COMMITTED").exists() for entry in (tmp_path / "s").iterdir())
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    write(tmp_path / "small.jsonl", chat("1", "one"))
    store = make([Source(path=str(tmp_path / "small.jsonl"))], model, tmp_path / "s")
    assert names(tmp_path / "s") == {store.fingerprint}


def test_a_file_that_changes_after_it_was_hashed_is_not_stored(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while a process waits for the lock of another."""
    source = write(tmp_path / "a.jsonl", chat("1", "one"))
    remove = build._remove_leftovers

    def meddle(path: Path) -> None:
        write(tmp_path / "a.jsonl", chat("1", "one"), chat("2", "two"))
        remove(path)

    monkeypatch.setattr(build, "_remove_leftovers", meddle)
    with pytest.raises(DataError, match="changed while it was read"):
        make([source], model, tmp_path / "s")
    assert names(tmp_path / "s") == set()


def test_two_processes_make_one_store(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", *[chat(f"q{n}", "word " * 20) for n in range(1500)])
    outputs = [process.communicate(timeout=120)[0] for process in [start(tmp_path, source, model) for _ in range(2)]]
    assert [output.split()[-1] for output in outputs] == ["1500", "1500"]
    assert sorted("rows" in output for output in outputs) == [False, True]


def test_data_that_changes_while_it_is_read_is_not_stored(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    source = write(path, *[chat(f"q{n}", "a") for n in range(300)])

    def meddle(*_: object) -> None:
        with path.open("a") as stream:
            stream.write(chat("new", "row") + "\n")

    with pytest.raises(DataError, match="changed while it was read"):
        make([source], model, tmp_path / "s", progress=meddle)
    assert names(tmp_path / "s") == set()


def test_unwritable_place_is_named(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written.*data\.store"):
        make([write(tmp_path / "a.jsonl", chat("1", "one"))], model, tmp_path / "file" / "s")


# ---------------------------------------------------------------- other ranks


def test_waiting_ends_when_the_store_is_committed(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", *[chat(f"q{n}", "a") for n in range(300)])
    process = start(tmp_path, source, model)
    store = wait_for_store(spec([source], model), store_dir=tmp_path / "s", timeout_s=60, poll_s=0.05)
    process.communicate(timeout=60)
    assert len(store) == 300


def test_waiting_ends_soon_when_nobody_prepares(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", chat("1", "one"))
    begin = time.monotonic()
    with pytest.raises(DataError, match="preparation failed on local rank 0"):
        wait_for_store(spec([source], model), store_dir=tmp_path / "s", timeout_s=60, grace_s=0.3, poll_s=0.05)
    assert time.monotonic() - begin < 10


def test_waiting_for_one_who_holds_the_lock_is_bounded(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", chat("1", "one"))
    store = make([source], model, tmp_path / "s")
    shutil.rmtree(store.path)
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(str(store.path) + ".lock", ready, done))
    holder.start()
    try:
        assert ready.wait(30)
        with pytest.raises(DataError, match=r"no token store after 1 s"):
            wait_for_store(spec([source], model), store_dir=tmp_path / "s", timeout_s=1, grace_s=0.3, poll_s=0.05)
        with pytest.raises(DataError, match="another process has been preparing"):
            make([source], model, tmp_path / "s", lock_timeout_s=0.2)
    finally:
        done.set()
        holder.join()


def _hold(path: str, ready: Any, done: Any) -> None:
    with FileLock(path):
        ready.set()
        done.wait(60)


def test_everything_is_flushed_before_the_commit(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed, original = set(), os.fsync

    def fsync(handle: int) -> None:
        if not list((tmp_path / "s").rglob("COMMITTED")):
            flushed.add(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    store = make([write(tmp_path / "a.jsonl", chat("1", "one"))], model, tmp_path / "s")
    assert {file.name for file in store.path.rglob("*") if file.name != "COMMITTED"} <= flushed
    assert "COMMITTED.tmp" in flushed
