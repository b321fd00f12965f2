"""Axolotl's `datasets`: where rows are, what they look like, which turns of them train."""

from typing import Any

from sft_dist.migrate.ledger import OFF, Ledger

DATASET_IDLE = ("ds_type", "trust_remote_code", "conversation", "preprocess_shards", "chat_template", "temperature")
ROLE_MAPPINGS = ({"role": "role", "content": "content"}, {"role": "from", "content": "value"})


def put_sources(ledger: Ledger) -> None:
    """data.train from `datasets`."""
    entries = ledger.get("datasets") or []
    sources = [source for entry in entries for source in _sources(ledger, dict(entry))]
    if not sources:
        sources = [{"path": "SET-ME.jsonl"}]
        ledger.ask("datasets", "none is in the file: set data.train")
    ledger.put("data.train", sources, theirs="datasets")
    if ledger.is_on("train_on_inputs"):
        ledger.lack("train_on_inputs", "only assistant turns are trained")


def _sources(ledger: Ledger, entry: dict[str, Any]) -> list[dict[str, Any]]:
    path = str(entry.pop("path", ""))
    where = f"datasets[{path}]"
    source: dict[str, Any] = {"path": path}
    for key in ("split", "revision"):
        if (value := entry.pop(key, None)) and (key, value) != ("split", "train"):
            source[key] = str(value)
    source["format"] = _format(ledger, where, entry)
    _masks(ledger, where, entry)
    files = entry.pop("data_files", None)
    for key in DATASET_IDLE:
        entry.pop(key, None)
    for key, value in entry.items():
        if value not in OFF:
            ledger.lack(f"{where}.{key}", f"{value}: no counterpart")
    names = [files] if isinstance(files, str) else list(files or [])
    return (
        [{**source, "path": str(name)} for name in names] if names and path in ("json", "csv", "parquet") else [source]
    )


def _format(ledger: Ledger, where: str, entry: dict[str, Any]) -> str:
    kind = entry.pop("type", None)
    field = entry.pop("field_messages", None)
    roles = entry.pop("message_property_mappings", None)
    role, content = entry.pop("message_field_role", None), entry.pop("message_field_content", None)
    if role or content:
        roles = {"role": role or "role", "content": content or "content"}
    if isinstance(kind, dict):
        ledger.ask(
            f"{where}.type",
            "a format of one's own: write the rows as messages, or as prompt and completion (docs/data.md)",
        )
        return "auto"
    name = str(kind or "").partition(":")[0].partition(".")[0]
    if name in ("completion", "pretrain"):
        ledger.refuse(f"{where}.type", f"{kind}: raw text is not trained, rows are conversations")
        return "auto"
    if name in ("alpaca", "alpaca_chat", "gpteacher", "alpaca_w_system"):
        ledger.ask(
            f"{where}.type",
            f"{kind} wraps rows into Alpaca's own sentences; here instruction and input are a user turn",
        )
        return "alpaca"
    if name == "sharegpt" or (name == "chat_template" and roles == {"role": "from", "content": "value"}):
        if field not in (None, "conversations"):
            ledger.ask(f"{where}.field_messages", f"rename {field} in the rows to conversations")
        return "sharegpt"
    if name == "chat_template":
        if field not in (None, "messages") or (roles and roles not in ROLE_MAPPINGS):
            ledger.ask(
                f"{where}.field_messages", f"rename {field or roles} in the rows to messages of role and content"
            )
        return "messages"
    ledger.ask(f"{where}.type", f"{kind} is not known here: see which format sft-dist prepare recognises")
    return "auto"


def _masks(ledger: Ledger, where: str, entry: dict[str, Any]) -> None:
    """Which turns and tokens train."""
    trained = entry.pop("roles_to_train", None)
    if trained is not None and set(trained) - {"assistant", "gpt"}:
        ledger.lack(f"{where}.roles_to_train", f"{trained}: only assistant turns are trained")
    ends = entry.pop("train_on_eos", None)
    if ends not in (None, "turn"):
        ledger.lack(f"{where}.train_on_eos", f"{ends}: the stop token of every trained turn is trained, and no other")
    field = entry.pop("message_field_training", None)
    if field not in (None, "train", "weight"):
        ledger.ask(f"{where}.message_field_training", f"rename {field} in the turns to train")
    if entry.pop("message_field_training_detail", None):
        ledger.lack(f"{where}.message_field_training_detail", "a turn trains as a whole")


def put_held_out(ledger: Ledger, rows: int | None) -> int | None:
    """data.held_out or its share. Returns the rows that are left to train on."""
    if entries := ledger.get("test_datasets"):
        sources = [source for entry in entries for source in _sources(ledger, dict(entry))]
        ledger.put("data.held_out", sources, theirs="test_datasets")
    size = float(ledger.get("val_set_size", 0.0))
    share = size if size < 1 else size / rows if rows else None
    if share is None:
        ledger.ask("val_set_size", f"{size:g} rows: set data.held_out_share to that share of all rows")
    elif share:
        ledger.put(
            "data.held_out_share",
            round(share, 6),
            theirs="val_set_size",
            meaning="by a hash of the prompt: equal prompts fall on the same side",
        )
    return int(rows * (1 - (share or 0))) if rows else None
