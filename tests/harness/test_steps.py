"""The actions of a response, and what sets one apart from the next, on texts written out."""

from __future__ import annotations

import pytest

from harness.verifiers import steps


def cut(pieces: list[str], separator: steps.Separator, longest: int = 99) -> list[str]:
    return ["".join(pieces[i] for i in step) for step in steps.actions(pieces, separator, longest)]


def test_actions_cover_the_response_but_for_the_opening_of_its_think() -> None:
    pieces = ["<think>", "\n", "1+2", "\n", "3", "\n", "</think>", "\n", "3", ""]
    assert cut(pieces, "line") == ["1+2\n", "3\n", "</think>\n", "3"]
    assert [*steps.actions(pieces, "line", 99)[-1]] == [8, 9]  # with the end token
    assert cut(pieces[2:], "line") == cut(pieces, "line")
    assert cut(["<think>", "\n"], "line") == [] == cut([], "line")


def test_a_long_action_is_cut_into_lines_and_a_long_line_into_pieces() -> None:
    pieces = ["a", "\n", "b", "b", "b", "\n", "\n", "c", "\n"]
    assert cut(pieces, "blank") == ["a\nbbb\n\n", "c\n"]
    assert cut(pieces, "blank", 5) == ["a\n", "bbb\n\n", "c\n"]
    assert cut(pieces, "blank", 3) == ["a\n", "bbb", "\n\n", "c\n"]


def test_a_token_over_a_boundary() -> None:
    assert cut(["One", ".", " Two", ".\n", "Three"], "sentence") == ["One.", " Two.\n", "Three"]
    assert cut(["a", ".\n\nb", "c"], "blank") == [
        "a.\n\nb",
        "c",
    ]  # more than space: the earlier step's


def test_statements_go_on_inside_brackets_and_quotes() -> None:
    code = "x = [1,\n     2]\n\ny = '''a\n\nb'''\nz = 1 + \\\n    2\nif z:\n    f(\n  z)\n"
    lines = [
        "x = [1,\n     2]\n\n",
        "y = '''a\n\nb'''\n",
        "z = 1 + \\\n    2\n",
        "if z:\n",
        "    f(\n  z)\n",
    ]
    assert steps.split(code, "statement") == lines
    assert steps.split(code, "block") == [lines[0], "".join(lines[1:])]
    assert steps.split(code, "line")[:2] == ["x = [1,\n", "     2]\n\n"]


def test_sentences() -> None:
    text = "It is 3.5 m. Is it? Yes!\nSo: a\n\nEnd."
    assert steps.split(text, "sentence") == [
        "It is 3.5 m. ",
        "Is it? ",
        "Yes!\n",
        "So: a\n\n",
        "End.",
    ]


@pytest.mark.parametrize(("step", "separator", "is_whole"), [
    ("", "line", False), (" \n", "blank", False), ("a", "line", True), ("f(", "line", True),
    ("f(", "statement", False), ("f(1)", "statement", True), ("x = '''a", "block", False), ("don't", "statement", True),
    ("1) do this\n", "statement", True), ("nice :)\n", "block", True), ("}\n", "statement", True),
    ("f(\n" * 31, "statement", False), ("f(\n" * 32, "statement", True),
])  # fmt: skip
def test_what_is_whole(step: str, separator: steps.Separator, is_whole: bool) -> None:
    assert steps.whole(step, separator) is is_whole


def test_a_bracket_that_is_never_closed_joins_no_more_than_some_lines() -> None:
    text = "so :(\n" + "x = 1\n" * 2000
    found = steps.split(text, "statement")
    assert found[0].count("\n") == steps.JOINED and found[1] == "x = 1\n" and "".join(found) == text


def test_the_space_after_the_opening_belongs_to_the_first_word() -> None:
    assert cut(["<think>", " The", " cat", "\n"], "line") == [" The cat\n"]
