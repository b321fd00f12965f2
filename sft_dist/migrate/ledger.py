"""What became of every key of a file: where it went, what it now means, what is left to its owner, what is lost."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

SECTIONS = ("run", "model", "data", "batch", "loss", "optim", "train", "wandb")
OFF = (None, False, "", "no", "none", "None", 0, 0.0)


@dataclass(frozen=True)
class Taken:
    """theirs: key and value as given. ours: key and value of the recipe. meaning: what changes by it, if anything."""

    theirs: str
    ours: str
    meaning: str = ""


@dataclass(frozen=True)
class Said:
    """Something about a key of theirs, in words."""

    key: str
    text: str


@dataclass(frozen=True)
class Same:
    """A key of theirs that is a key of ours. convert: their value to ours."""

    ours: str
    meaning: str = ""
    convert: Callable[[Any], Any] = lambda value: value


@dataclass
class Ledger:
    """Filled while a file is converted. given: the file. gpus: of the run there; None where nobody said.

    steps: optimizer steps of the run there, where its owner knows them. recipe: ours, by dotted key.
    """

    given: Mapping[str, Any]
    gpus: int | None = None
    steps: int | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)
    taken: list[Taken] = field(default_factory=list)
    asked: list[Said] = field(default_factory=list)
    lacking: list[Said] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)
    refused: list[Said] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)

    def get(self, key: str, default: Any = None) -> Any:
        """Their value; the key counts as dealt with. null is the default, as for them."""
        self.seen.add(key)
        value = self.given.get(key)
        return default if value is None else value

    def is_on(self, key: str) -> bool:
        """True where a switch is given and not off; the key counts as dealt with."""
        return self.get(key) not in OFF

    def put(self, ours: str, value: Any, *, theirs: str = "", meaning: str = "", remark: str = "") -> None:
        """Set a key of the recipe. theirs: the keys that it comes from, comma between; what they say is shown.

        remark: the comment beside it, instead of where it comes from.
        """
        self.recipe[ours] = value
        keys = [key.strip() for key in theirs.split(",") if key.strip()]
        self.seen |= set(keys)
        said = ", ".join(f"{key}: {_shown(self.given[key])}" for key in keys if key in self.given)
        self.remarks[ours] = remark or said
        if said:
            self.taken.append(Taken(said, f"{ours}: {_shown(value)}", meaning))
        elif meaning:
            self.taken.append(
                Taken(f"({keys[0]} not given)" if keys else "(always)", f"{ours}: {_shown(value)}", meaning)
            )

    def ask(self, key: str, text: str) -> None:
        """The owner has to decide."""
        self.seen.add(key)
        self.asked.append(Said(key, text))

    def lack(self, key: str, text: str) -> None:
        """There is no counterpart."""
        self.seen.add(key)
        self.lacking.append(Said(f"{key}: {_shown(self.given[key])}" if key in self.given else key, text))

    def refuse(self, key: str, text: str) -> None:
        """What the file does is another thing than full supervised fine-tuning."""
        self.seen.add(key)
        self.refused.append(Said(f"{key}: {_shown(self.given[key])}" if key in self.given else key, text))

    def take_same(self, table: Mapping[str, Same]) -> None:
        """Keys that only have another name."""
        for key, same in table.items():
            if self.given.get(key) is not None:
                self.put(same.ours, same.convert(self.given[key]), theirs=key, meaning=same.meaning)
            self.seen.add(key)

    def note_lacking(self, table: Mapping[str, str]) -> None:
        """Keys without counterpart, by reason; those that are off are only listed."""
        for key, reason in table.items():
            if key in self.given and key not in self.seen:
                if self.given[key] in OFF or self.given[key] in ([], {}):
                    self.idle.append(key)
                else:
                    self.lack(key, reason)
            self.seen.add(key)

    def note_idle(self, keys: Mapping[str, str]) -> None:
        """Keys that are about their own machinery, and change nothing of what is trained."""
        self.idle += [key for key in keys if key in self.given and key not in self.seen]
        self.seen |= set(keys)

    @property
    def unknown(self) -> list[str]:
        """Keys that nothing above dealt with."""
        return [key for key in self.given if key not in self.seen]

    def nested(self) -> dict[str, Any]:
        """The recipe as plain data, in the order of its sections."""
        found: dict[str, Any] = {}
        for section in SECTIONS:
            for key, value in self.recipe.items():
                first, _, rest = key.partition(".")
                if first == section:
                    if rest:
                        found.setdefault(first, {})[rest] = value
                    else:
                        found[first] = value
        return found


def _shown(value: Any) -> str:
    """On one line, clipped; of data sets their paths."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        value = ", ".join(str(each.get("path", "?")) for each in value)
    text = " ".join((f"{value:g}" if isinstance(value, float) else str(value)).split())
    return text if len(text) <= 60 else text[:57] + "..."
