"""GBNF as llama.cpp means it, down to its escapes, comments, names and line breaks."""

from __future__ import annotations

import re

import pytest

from vai.text.gbnf import to_lark


@pytest.mark.parametrize(
    ("gbnf", "lark"),
    [
        ('root ::= "a"', 'start: R0\nR0: "a"\n'),
        (
            '# first\nroot ::= # a comment\n  "a" | # and\n  b\n\nb ::= ("b"\n  "c")*',
            'start: R0\nR0: "a" | R1\nR1: ( "b" "c" ) *\n',
        ),
        ('root ::= "(" root ")" | x\nx ::= "x"', 'start: r0\nr0: "(" r0 ")" | R1\nR1: "x"\n'),
        ('root ::= a\na ::= b\nb ::= a | c\nc ::= "c"', 'start: r0\nr0: r1\nr1: r2\nr2: r1 | R3\nR3: "c"\n'),
        (
            'root ::= a-b a_b A_b\na-b ::= "1"\na_b::="2"\nA_b ::= ""',
            'start: R0\nR0: R1 R2 R3\nR1: "1"\nR2: "2"\nR3: ""\n',
        ),
        (r'root ::= "\x41\u00e4\U0001F600\n\"\\/"', 'start: R0\nR0: "Aä😀\\n\\"\\\\/"\n'),
        (r"root ::= [a-z] .", "start: R0\nR0: /[\\x{61}-\\x{7A}]/ /(?s:.)/\n"),
        (r"root ::= [^\]\-x] [+-]", "start: R0\nR0: /[^\\x{5D}\\x{2D}\\x{78}]/ /[\\x{2B}\\x{2D}]/\n"),
        ('root ::= "a"? "b"{2} "c"{1,} "d"{0,3}', 'start: R0\nR0: "a" ? "b" {2,2} "c" {1,} "d" {0,3}\n'),
        ('root ::= | "a" ( | "b")', 'start: R0\nR0: "" | "a" ( "" | "b" )\n'),
        ("root ::=", 'start: R0\nR0: ""\n'),
    ],
)
def test_a_grammar_becomes_the_lark_that_means_the_same(gbnf: str, lark: str) -> None:
    assert to_lark(gbnf) == lark


@pytest.mark.parametrize(
    ("gbnf", "named"),
    [
        ('start ::= "a"', "no rule 'root'"),
        ('"a"\nroot ::= "b"', "does not begin with a rule"),
        ("root ::= other", "'root' refers to 'other'"),
        ('root ::= "a"\nroot ::= "b"', "two rules 'root'"),
        ('root ::= ("a"', "parentheses of the rule 'root'"),
        ('root ::= "a")', "parentheses of the rule 'root'"),
        ("root ::= " + "(" * 1000, "parentheses of the rule 'root'"),
        ('root ::= "a\nroot', "line 1 cannot be read"),
        ('root ::= "a"\nb ::= §', "line 2 cannot be read"),
        ("root ::= *", "nothing stands before *"),
        ("root ::= (+)", "nothing stands before +"),
        ('root ::= "a"{99999999}', "1048576 times"),
        ("root ::= [z-a]", "ends before it begins"),
        ("root ::= []", "no character"),
        (r'root ::= "\ud800"', "D800 is no character"),
        (r'root ::= "\U00110000"', "110000 is no character"),
        (r'root ::= "\q"', "no escape"),
    ],
)
def test_what_cannot_be_read_is_named(gbnf: str, named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        to_lark(gbnf)
