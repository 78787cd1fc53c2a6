"""Chat templates: what real ones write, and what hostile ones cannot do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from vai.errors import BadRequest
from vai.text.template import PLAIN_CHAT, Template

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "é<>"}]

CHATML = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role != 'system' %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

ALTERNATING = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def workers() -> list[Path]:
    """Template workers that are children of this process."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"vai.text.template" in (process / "cmdline").read_bytes():
                found.append(process)
        except OSError:
            continue
    return found


@pytest.fixture
def render() -> Iterator[object]:
    """Render a source, once or more, and close."""
    made: dict[str, Template] = {}

    def run(source: str | None, messages: object = TURNS, deadline: float = 5, **variables: object) -> str:
        template = made.setdefault(str(source), Template(source, deadline=deadline))
        return template.render(messages, **variables)  # hostile shapes too

    yield run
    for template in made.values():
        template.close()


def test_a_chatml_template_writes_what_it_should(render) -> None:
    assert render(CHATML, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nho<|im_end|>\n<|im_start|>user\né<><|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_can_refuse_a_conversation_in_its_own_words(render) -> None:
    assert render(ALTERNATING, bos_token="<s>", eos_token="</s>") == "<s>[INST] hi [/INST] ho</s>[INST] é<> [/INST]"
    with pytest.raises(BadRequest, match="Roles must alternate user/assistant"):
        render(ALTERNATING, TURNS[1:])


def test_without_a_template_there_is_a_plain_one(render) -> None:
    assert (
        render(None, bos_token="<s>", add_generation_prompt=True) == "<s>user: hi\nassistant: ho\nuser: é<>\nassistant:"
    )
    assert Template(None).source == PLAIN_CHAT


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "hi"}'),
        ("{{ messages[2].content | tojson }}", '"é<>"'),  # neither ASCII nor HTML escapes, unlike Jinja's own
        ("{{ messages[0] | tojson(indent=1) }}", '{\n "role": "user",\n "content": "hi"\n}'),
        ("{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}", "hi"),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}", "hoé<>"),
        ("{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}{{ n.x }}", "3"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "hi"),
        ("{{ messages[::-1][0].content }}{{ messages[1:] | length }}", "é<>2"),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('a') }}", "<a>"),
        ("{{ strftime_now('%Y') }}", str(datetime.now().astimezone().year)),
        ("  {% if true %}\n  x\n  {% endif %}\ny", "  x\ny"),  # trim_blocks, lstrip_blocks
        ("{{ messages[0].nothing is defined }}{{ missing }}", "False"),
        ("{{ 'a,b'.split(',') | join('-') }}{{ 'x'.startswith('x') }}", "a-bTrue"),
    ],
)
def test_what_real_templates_use_works(render, source: str, text: str) -> None:
    assert render(source) == text


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ ''.format.__self__ }}{{ '{0.__class__}'.format(messages) }}",
        "{{ messages.append(1) }}",
        "{% set _ = messages[0].update({'role': 'system'}) %}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ self._TemplateReference__context.__class__ }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(render, source: str) -> None:
    try:
        text = render(source)
    except BadRequest as error:
        assert "chat template failed" in error.message
    else:
        assert text == ""  # what must not be seen is undefined, and undefined prints nothing


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ [1] * 10 ** 10 }}",
        "{{ '%10000000000d' % 1 }}",
        "{% for i in range(99999) %}{{ 'a' * 10000 }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 9 ** (9 ** 9) }}",
        "{% set x = namespace(s='a') %}{% for i in range(64) %}{% set x.s = x.s + x.s %}{% endfor %}{{ x.s }}",
    ],
)
def test_a_template_cannot_run_write_or_allocate_without_end(render, source: str) -> None:
    with pytest.raises(BadRequest, match="chat template failed"):
        render(source, deadline=1)


@pytest.mark.parametrize(
    "source", ["{% if", "{{ x", "{% endfor %}", "{{ 1 / 0 }}", "{{ 'a' | nothing }}", "{{ '\\ud800' }}"]
)
def test_a_broken_template_is_an_error_with_a_sentence(render, source: str) -> None:
    with pytest.raises(BadRequest, match=r"^The model's chat template failed: .+\.$"):
        render(source)


def test_a_killed_template_does_not_spoil_the_next_rendering(render) -> None:
    source = (
        "{% if messages[0].content == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
        "{% endfor %}{% endif %}{{ messages[0].content }}"
    )
    for _ in range(2):
        with pytest.raises(BadRequest, match="longer than 1 seconds"):
            render(source, [{"role": "user", "content": "loop"}], deadline=1)
        assert render(source, deadline=1) == "hi"


def test_messages_that_are_not_json_are_refused(render) -> None:
    with pytest.raises(BadRequest, match="JSON"):
        render("x", [{"role": "user", "content": object()}])
    with pytest.raises(BadRequest, match="JSON"):
        render("x", [{"role": "user", "content": float("nan")}])


def test_the_worker_starts_with_the_first_rendering_is_kept_and_ends_with_close() -> None:
    assert workers() == []
    template = Template("{{ messages[0].content }}")
    assert workers() == []
    template.render(TURNS)
    [first] = workers()
    template.render(TURNS)
    assert workers() == [first]
    template.close()
    assert workers() == []
    template.close()


def test_a_worker_ends_when_its_owner_is_gone() -> None:
    template = Template("{{ messages[0].content }}")
    template.render(TURNS)
    [worker] = workers()
    pid = os.pidfd_open(int(worker.name))
    try:
        assert template._worker is not None
        template._worker._socket.close()  # what the kernel does for a killed owner
        template._worker._answers.close()
        os.waitid(os.P_PIDFD, pid, os.WEXITED | os.WNOWAIT)
    finally:
        os.close(pid)
    template.close()
