"""Guides: what compiles matches what it says, and what does not is refused by name, quickly."""

from __future__ import annotations

import contextlib
import gc
import signal
import socket
import sys
import threading
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from fastserve.errors import ErrorCode, RequestError
from fastserve.text import guide_validator
from fastserve.text.guide import grammar_of
from fastserve.text.guide_validator import MAX_GRAMMAR_CHARACTERS, GuideValidator
from fastserve.text.tokenizer import Tokenizer
from fastserve.types import Guide


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> LLTokenizer:
    return LLTokenizer(tokenizer.backend.to_str(), eos_token=tokenizer.eos_token_ids[0])


@pytest.fixture(scope="module")
def validator(tokenizer: Tokenizer) -> GuideValidator:
    return GuideValidator(tokenizer)


def accepts(vocabulary: LLTokenizer, guide: Guide, text: str) -> bool:
    """Whether `text`, and the end after it, is allowed by the guide."""
    matcher = LLMatcher(vocabulary, grammar_of(guide))
    assert not matcher.is_error(), matcher.get_error()
    tokens = vocabulary.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("guide", "yes", "no"),
    [
        (
            Guide(json='{"type": "object", "properties": {"a": {"type": "integer"}}}'),
            '{"a": 1}',
            '{"a": "x"}',
        ),
        (Guide(regex="[0-9]{3}"), "123", "12"),
        (Guide(choice=["yes", "no"]), "no", "maybe"),
        (Guide(grammar='start: "(" start ")" | "x"'), "((x))", "((x)"),
    ],
)
def test_guides_of_each_kind(
    vocabulary: LLTokenizer, validator: GuideValidator, guide: Guide, yes: str, no: str
) -> None:
    validator.validate(guide, "guided_decoding")
    assert accepts(vocabulary, guide, yes)
    assert not accepts(vocabulary, guide, no)


def test_a_choice_is_literal(vocabulary: LLTokenizer, validator: GuideValidator) -> None:
    texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)

    @settings(max_examples=200, deadline=None)
    @given(choices=st.lists(texts, min_size=1, max_size=4), other=texts)
    def check(choices: list[str], other: str) -> None:
        guide = Guide(choice=choices)
        validator.validate(guide, "choice")
        assert all(accepts(vocabulary, guide, choice) for choice in choices)
        assert accepts(vocabulary, guide, other) == (other in choices)

    check()


@pytest.mark.parametrize(
    "guide",
    [
        Guide(json="{"),
        Guide(json='{"type": "nonsense"}'),
        Guide(json='{"$ref": "http://example.com/schema.json"}'),
        Guide(json='{"items":' * 5000 + "{}" + "}" * 5000),
        Guide(regex="("),
        Guide(regex=r"(a)\1"),
        Guide(regex="(" * 50000 + "a" + ")" * 50000),
        Guide(regex=r"[^\s\S]"),
        Guide(grammar=""),
        Guide(grammar="start: undefined"),
        Guide(grammar="start: " + "(" * 10000 + '"a"' + ")" * 10000),
        Guide(choice=["x" * (MAX_GRAMMAR_CHARACTERS + 1)]),
    ],
    ids=lambda guide: str(guide)[:40],
)
def test_guides_that_do_not_compile(validator: GuideValidator, guide: Guide) -> None:
    with pytest.raises(RequestError, match=r"^`guided_decoding`: ") as raised:
        validator.validate(guide, "guided_decoding")
    assert len(str(raised.value)) < 1000


STAND_IN = """#!{python}
import os, signal, socket, sys
from fastserve.text import guide_validator

class Compiler:
    def __init__(self, *_, **__):
        {what}

guide_validator.LLMatcher = Compiler
guide_validator.MAX_CPU_SECONDS = {seconds}
guide_validator._serve(socket.socket(fileno=int(sys.argv[-1])))
"""
"""Takes the place of the child's interpreter; no guide is needed that harms a compiler."""
DIES = "os.kill(os.getpid(), signal.SIGKILL)"
DOES_NOT_END = "while True: pass"


def stand_in(directory: Path, what: str, seconds: float) -> str:
    """The path of an interpreter whose compiler does `what`, and has so much processor time."""
    path = directory / "python"
    path.write_text(STAND_IN.format(python=sys.executable, what=what, seconds=seconds))
    path.chmod(0o700)
    return str(path)


@pytest.mark.parametrize("what", [DIES, DOES_NOT_END])
def test_a_compiler_that_dies_or_does_not_end_costs_one_guide(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    validator = GuideValidator(tokenizer)
    monkeypatch.setattr(sys, "executable", stand_in(tmp_path, what, 0.05))
    for guide in (Guide(regex="a"), Guide(regex="b")):
        with pytest.raises(RequestError, match=r"^`guided_decoding`: .* too complex"):
            validator.validate(guide, "guided_decoding")
    child = validator._child
    assert child is not None
    assert not child.has_ended  # only what was forked for the guide ended


def test_a_guide_that_is_being_tried_out_holds_up_no_other(validator: GuideValidator) -> None:
    validator.validate(Guide(regex="ab"), "guided_decoding")
    child = validator._child
    assert child is not None
    ours, theirs = socket.socketpair()
    with ours, theirs:  # a guide that never ends: its process waits for the grammar
        socket.send_fds(child._control, [b"\n"], [theirs.fileno()])
        assert ours.recv(1) == b"\n"
        validator.validate(Guide(regex="abc"), "guided_decoding")


def test_a_long_guide_gives_way_to_the_engine(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", stand_in(tmp_path, DOES_NOT_END, 0.5))
    child = guide_validator._Child(tokenizer)
    parent = psutil.Process(child._process.pid)
    compiling = threading.Thread(target=child.compile, args=[""])
    compiling.start()
    priorities = set()
    while compiling.is_alive():
        for process in parent.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                priorities.add(process.nice())
    child.end()
    assert max(priorities) - min(priorities) == 10


def test_a_guide_has_so_much_time_by_the_clock(
    validator: GuideValidator, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = Guide(regex="abcd")
    validator.validate(Guide(regex="a"), "guided_decoding")
    child = validator._child
    assert child is not None
    with monkeypatch.context() as patch:
        patch.setattr(guide_validator, "MAX_SECONDS", 0.01)
        child._process.send_signal(signal.SIGSTOP)
        with pytest.raises(RequestError, match=r"`guided_decoding`: .* took more than 0\.01 s") as raised:
            validator.validate(guide, "guided_decoding")
        child._process.send_signal(signal.SIGCONT)
    assert raised.value.code is ErrorCode.INVALID_ARG
    validator.validate(guide, "guided_decoding")  # the machine was slow, the guide is none the worse


def test_a_child_that_is_lost_is_started_anew(
    validator: GuideValidator, monkeypatch: pytest.MonkeyPatch
) -> None:
    validator.validate(Guide(regex="a"), "guided_decoding")
    child = validator._child
    assert child is not None
    child._process.kill()
    child._process.wait()
    with monkeypatch.context() as patch:  # as it is where the child ends while a guide is tried out
        patch.setattr(guide_validator._Child, "has_ended", False)
        with pytest.raises(RequestError, match=r"`guided_decoding`: .*send it again") as raised:
            validator.validate(Guide(regex="abcde"), "guided_decoding")
    assert raised.value.code is ErrorCode.UNAVAILABLE
    validator.validate(Guide(regex="abcde"), "guided_decoding")


def chain(length: int) -> Guide:
    """Rules that refer to each other."""
    rules = "\n".join(f'r{i}: "a" r{i + 1}' for i in range(length))
    return Guide(grammar=f'start: r0\n{rules}\nr{length}: "x"\n')


def test_guides_of_honest_depth_pass(validator: GuideValidator) -> None:
    validator.validate(chain(100), "guided_decoding")


def test_a_compiler_that_does_not_start_is_not_the_clients_fault(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RequestError, match="does not start") as raised:
        GuideValidator(tokenizer).validate(Guide(regex="a"), "guided_decoding")
    assert raised.value.code is ErrorCode.INTERNAL


def test_the_child_ends_with_its_validator(tokenizer: Tokenizer) -> None:
    validator = GuideValidator(tokenizer)
    validator.validate(Guide(regex="a"), "guided_decoding")
    child = validator._child
    assert child is not None
    assert not child.has_ended
    del validator
    gc.collect()
    assert child.has_ended
