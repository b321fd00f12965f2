"""Chat templates compiled with plain Jinja, as transformers compiles them, without loading torch."""

import json
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sft_dist.errors import ConfigError

FIXED_DATE = datetime(2024, 7, 26)
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: rendered as its body."""

    tags = {"generation"}  # noqa: RUF012  declared so by Jinja

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def compile_template(template: str, name: str) -> jinja2.Template:
    """Compile in the sandbox and with the names that transformers gives templates, which are code from strangers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
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
