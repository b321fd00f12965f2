"""A chat template: compiled with plain Jinja as transformers compiles it, without loading torch.

Templates differ in how they want a conversation: content as text or as a list of parts, tool arguments as an object
or as its JSON text, the content of a turn that only calls tools as "" or null. Which one is found by trying.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import product
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sft_dist.data.conversation import REASONING_KEYS, Message, Refused, ToolCall
from sft_dist.data.strict_json import clip
from sft_dist.errors import ConfigError

FIXED_DATE = datetime(2024, 7, 26)
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Written by `{% generation %}` and `{% endgeneration %}`: private-use characters, taken out of every render.
TAG_OPEN, TAG_CLOSE = "\U000ffff0", "\U000ffff1"
DICT_ATTRIBUTES = frozenset(dir(dict))
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "A probe.",
        "parameters": {
            "type": "object",
            "properties": {"weight": {"type": "number", "description": "A number."}},
            "required": ["weight"],
        },
    },
}
PROBE_CALL = ToolCall("probe", {"weight": 70}, id="call00001")

Mark = Callable[[str, str], str]
"""(text, kind) -> the text with a mark in it. kind: content, reasoning or call."""


@dataclass(frozen=True, slots=True)
class Form:
    """How a template wants a conversation. calls: whether it can write tool calls at all."""

    parts: bool = False
    arguments_as_text: bool = False
    empty_as_null: bool = False
    calls: bool = False


class ChatTemplate:
    """A compiled template and the form in which it takes conversations."""

    def __init__(self, source: str, *, name: str, specials: Mapping[str, str]) -> None:
        """specials: named special tokens, e.g. bos_token. Raises ConfigError for a syntax error."""
        self.source, self.name = source, name
        self.has_tags = re.search(r"\{%[-+]?\s*generation\b", source) is not None
        self._specials = dict(specials)
        self._compiled = _compile(source, name)
        self._reasoning_keys = [key for key in REASONING_KEYS if key in source] or [REASONING_KEYS[0]]
        self.form = Form()
        self.form = self._find_form()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text, with TAG_OPEN and TAG_CLOSE in it if `has_tags`. Raises Refused if the template raises."""
        try:
            return self._compiled.render(
                messages=messages,
                tools=tools or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._specials,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise Refused(
                "template_refused", f"the chat template refuses this conversation: {quoted(str(error))}"
            ) from None

    def text_of(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of messages, without the marks of tags. Raises Refused if the template raises."""
        fields = [self.fields(message) for message in messages]
        return without_tags(self.render(fields, tools, add_generation_prompt=add_generation_prompt))

    def fields(self, message: Message, mark: Mark | None = None) -> dict[str, Any]:
        """A message as the template wants it, its texts passed through `mark`."""
        content: Any = mark(message.content, "content") if mark else message.content
        fields: dict[str, Any] = {"role": message.role, "content": content}
        if message.reasoning is not None:
            reasoning = mark(message.reasoning, "reasoning") if mark else message.reasoning
            fields |= dict.fromkeys(self._reasoning_keys, reasoning)
        if message.tool_calls:
            fields["tool_calls"] = [self._call(call, mark) for call in message.tool_calls]
            if not content and self.form.empty_as_null:
                fields["content"] = None
        if message.name is not None:
            fields["name"] = message.name
        if message.tool_call_id is not None:
            fields["tool_call_id"] = message.tool_call_id
        if self.form.parts and fields["content"] is not None:
            fields["content"] = [{"type": "text", "text": content}]
        return fields

    def _call(self, call: ToolCall, mark: Mark | None) -> dict[str, Any]:
        arguments: Any = call.arguments
        if self.form.arguments_as_text:
            arguments = json.dumps(arguments, ensure_ascii=False)
        name = mark(call.name, "call") if mark else call.name
        fields: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
        return fields if call.id is None else {"id": call.id} | fields

    def _find_form(self) -> Form:
        """The first form in which a probe shows in the render; the plain one if none does."""
        form = next((form for form in (Form(), Form(parts=True)) if self._shows_chat(form)), Form())
        for empty_as_null, as_text in product((False, True), repeat=2):
            tried = replace(form, empty_as_null=empty_as_null, arguments_as_text=as_text, calls=True)
            if self._shows_call(tried):
                return tried
        return form

    def _shows_chat(self, form: Form) -> bool:
        turns = [Message("user", "Probe question?"), Message("assistant", "Probe answer.")]
        return "Probe answer." in self._tried(turns, form)

    def _shows_call(self, form: Form) -> bool:
        """Whether a call is written once, its arguments as an object and not as a string of JSON."""
        call = Message("assistant", "", tool_calls=(ToolCall("probe", {"note": 'a "b"'}, PROBE_CALL.id),))
        result = Message("tool", "Probe result.", name="probe", tool_call_id=PROBE_CALL.id)
        turns = [Message("user", "Probe question?"), call, result, Message("assistant", "Probe answer.")]
        text = self._tried(turns, form, [PROBE_TOOL])
        return all(part in text for part in ("Probe result.", "Probe answer.", "note")) and r"\\\"b" not in text

    def _tried(self, turns: Sequence[Message], form: Form, tools: Sequence[Mapping[str, Any]] = ()) -> str:
        before, self.form = self.form, form
        try:
            return self.text_of(turns, tools)
        except Refused:
            return ""
        finally:
            self.form = before


def without_tags(text: str) -> str:
    """A render without the marks of `{% generation %}`."""
    return text.replace(TAG_OPEN, "").replace(TAG_CLOSE, "")


def quoted(text: str, limit: int = 80) -> str:
    """The text in quotes, cut if it is long."""
    return repr(clip(text, limit))


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: its body between two marks."""

    tags = {"generation"}  # noqa: RUF012  declared so by Jinja

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        start, end = (jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)]) for mark in (TAG_OPEN, TAG_CLOSE))
        return jinja2.nodes.Scope([start, *body, end]).set_lineno(line)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a short way to the keys of a message, which halves the time of a render."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        """As in Jinja: an attribute goes before a key of its name, and a dict has none that its class has not."""
        if type(obj) is dict and attribute in obj and attribute not in DICT_ATTRIBUTES:
            return obj[attribute]
        return super().getattr(obj, attribute)


def _compile(template: str, name: str) -> jinja2.Template:
    """Compile in the sandbox and with the names that transformers gives templates, which are code from strangers."""
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _template_json
    environment.globals["raise_exception"] = _template_raise
    # A template that prints today's date would make other tokens every day; it gets the same date always.
    environment.globals["strftime_now"] = lambda form: FIXED_DATE.strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"{name}: the chat template has a syntax error in line {error.lineno}: {error.message}"
        ) from None


def _template_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _template_raise(message: str) -> None:
    raise jinja2.TemplateError(message)
