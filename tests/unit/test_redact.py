import io
import logging
import time

import pytest

from sft_dist.redact import RedactingFilter, redacted, redacted_tree

LETTERS = "AbCdEfGhIjKlMnOpQrStUvWxYz0123456789"
HEX_40 = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("git clone https://ann:pa%20ss@host/repo", "git clone https://ann:***@host/repo"),
        ("proxy http://:p@ss:w0rd@10.0.0.1:3128 refused", "proxy http://:***@10.0.0.1:3128 refused"),
        (f"token hf_{LETTERS[:34]}.", "token ***."),
        (f"OPENAI sk-proj-{LETTERS}", "OPENAI ***"),
        (f"https://ghp_{LETTERS}@github.com/a/b", "https://***@github.com/a/b"),
        (f"github_pat_11{LETTERS}_{LETTERS}", "***"),
        ("id=AKIAABCDEFGHIJKLMNOP", "id=***"),
        (f"wandb login {HEX_40}", "wandb login ***"),
        (f'WANDB_API_KEY="{HEX_40}"', 'WANDB_API_KEY="***"'),
        (f"key wandb_v1_{LETTERS}_{LETTERS}", "key ***"),
        ("Bearer abc.DEF-123_456~xyz tail", "Bearer *** tail"),
        ("{'Authorization': 'Basic dXNlcjpwYXNz'}", "{'Authorization': '***'}"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.abc-_", "***"),
    ],
)
def test_a_secret_becomes_stars_and_its_surroundings_stay(text: str, clean: str) -> None:
    assert redacted(text, {}) == clean
    assert redacted(clean, {}) == clean, "redacting twice changes nothing more"


@pytest.mark.parametrize(
    "text",
    [
        "runs/sft-2024/checkpoints/step-000100/model.safetensors",
        f"code {HEX_40[:32]} and a commit {HEX_40}",
        "https://host:8080/a/b@c?x=1:2 ssh://git@host/repo file:///tmp/a@b:c",
        "the bearer responsibilities of basic internationalization",
        "data: s3://bucket/key, hf_checkpoint_directory_of_the_tokenizer, task-sk-learn",
        "sk-a-name-without-any-number-in-it",
        "eos_token: <|im_end|>, pack_tokens=16384, token: 12345678",
        "step 12/100  loss 0.1234  lr 1.00e-05  |g| 1.234  12,345 tok/s",
        "wandb is off for this run: CommError: failed to reach http://127.0.0.1:8080 after 3 attempts",
    ],
)
def test_what_is_no_secret_stays_as_it_is(text: str) -> None:
    assert redacted(text, {}) == text


def test_values_of_secret_variables_are_hidden_wherever_they_stand() -> None:
    environ = {
        "HF_TOKEN": "opensesame",
        "MY_SECRET": "opensesame-and-more",
        "PGPASSWORD": "correct horse",
        "WANDB_API_KEY": "short",
        "TOKENIZERS_PARALLELISM": "parallel",
        "HF_TOKEN_PATH": "/home/ann/token",
        "HOME": "/home/ann",
    }
    text = "opensesame-and-more opensesame correct horse short parallel /home/ann/token"
    assert redacted(text, environ) == "*** *** *** short parallel /home/ann/token"


def test_the_environment_of_the_process_counts_unless_another_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "opensesame")
    assert redacted("say opensesame") == "say ***"
    assert redacted("say opensesame", {}) == "say opensesame"


def test_a_tree_is_copied_with_its_secrets_hidden() -> None:
    tree = {
        "model": {"path": "https://ann:secret@host/m", "revision": None, "eos_token": "<|im_end|>"},
        "data": ({"path": "a.jsonl", "weight": 1.5}, f"hf_{LETTERS}"),
        "wandb": {"api_key": "abc", "hub_token": 5, "password": None},
    }
    assert redacted_tree(tree, {}) == {
        "model": {"path": "https://ann:***@host/m", "revision": None, "eos_token": "<|im_end|>"},
        "data": [{"path": "a.jsonl", "weight": 1.5}, "***"],
        "wandb": {"api_key": "***", "hub_token": "***", "password": None},
    }
    assert tree["model"]["path"] == "https://ann:secret@host/m"  # type: ignore[call-overload, index]


def test_log_records_lose_their_secrets_in_arguments_and_tracebacks() -> None:
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.addFilter(RedactingFilter())
    logger = logging.getLogger("test_redact")
    logger.addHandler(handler)
    try:
        logger.warning("cannot fetch %s after %d tries", "https://ann:opensesame@host", 3)
        try:
            raise ValueError("https://ann:hidden@host")
        except ValueError:
            logger.exception("failed")
        logger.warning("plain %s", "words")
    finally:
        logger.removeHandler(handler)
    said = out.getvalue()
    assert "cannot fetch https://ann:***@host after 3 tries\n" in said
    assert "ValueError: https://ann:***@host" in said
    assert "opensesame" not in said
    assert "hidden@" not in said
    assert said.endswith("plain words\n")


@pytest.mark.parametrize(
    "piece",
    ["a", "://", "://a:", "sk-", "sk-a", "wandb ", "Bearer ", "Bearer a", "eyJa", "0123456789abcdef", "authorization "],
)
def test_a_long_text_takes_linear_time(piece: str) -> None:
    """A megabyte in the time that a quadratic pattern needs for a few kilobytes; best of two, the machine is shared."""
    text = piece * (1_000_000 // len(piece))
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        redacted(text, {})
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 2
