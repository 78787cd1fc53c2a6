"""Who gets the prompt rows of a step."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vai.engine.portions import KEPT, Prompt, portions, rows_within, work


def rows(*needs: int, room: int) -> list[int]:
    return portions([Prompt(need, 0) for need in needs], room)


def test_a_prompt_alone_gets_the_whole_step() -> None:
    assert rows(4000, room=32) == [32]
    assert rows(10, room=32) == [10]


def test_a_short_prompt_gets_in_beside_a_long_one() -> None:
    assert rows(4000, 8, room=32) == [24, 8]
    assert rows(4000, 3000, 5, 2, room=32) == [24, 1, 5, 2]


def test_what_nobody_short_needs_stays_with_the_first() -> None:
    assert rows(4000, 2, room=32) == [30, 2]
    assert rows(10, 4000, room=32) == [10, 22]


def test_a_step_of_a_few_rows_is_the_firsts_alone() -> None:
    assert rows(4000, 1, room=KEPT - 1) == [KEPT - 1, 0]


def test_a_worse_priority_does_not_get_in_by_being_short() -> None:
    assert portions([Prompt(4000, 0), Prompt(8, 1)], 32) == [32, 0]


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(-1, 1)), max_size=70), st.integers(0, 600))
def test_the_first_never_loses_more_than_is_kept_and_no_row_is_wasted(needs: list[tuple[int, int]], room: int) -> None:
    prompts = [Prompt(*need) for need in needs]
    given_rows = portions(prompts, room)
    assert len(given_rows) == len(prompts)
    assert all(0 <= got <= prompt.rows for got, prompt in zip(given_rows, prompts, strict=True))
    assert sum(given_rows) == min(room, sum(prompt.rows for prompt in prompts))
    if prompts:
        assert given_rows[0] >= min(prompts[0].rows, room - room // KEPT)


@given(st.floats(0, 5000), st.integers(0, 100_000), st.floats(0, 1 / 32))
def test_rows_within_is_the_most_that_fits(room: float, context: int, slope: float) -> None:
    rows = rows_within(room, context, slope)
    assert work(rows, context, slope) <= room * (1 + 1e-9)
    assert work(rows + 1, context, slope) > room * (1 - 1e-9)


def test_a_prompt_with_a_long_beginning_gets_fewer_rows_and_takes_none_from_a_short_one() -> None:
    given_rows = portions([Prompt(4000, 0, context=8000), Prompt(6, 0)], 64, 512, 0.001)
    assert given_rows == [6, 6]  # 58 of work, a row being 9
    assert portions([Prompt(4000, 0, context=8000)], 32, 512, 0.01) == [1]  # less than what it costs, or it never ends


@given(
    st.lists(st.builds(Prompt, st.integers(1, 5000), st.integers(-1, 1), st.integers(0, 20_000)), max_size=20),
    st.floats(1, 2000),
    st.integers(1, 512),
    st.floats(0, 1 / 32),
)
def test_no_more_is_given_than_there_is_room_for(prompts: list[Prompt], room: float, most: int, slope: float) -> None:
    given_rows = portions(prompts, room, most, slope)
    assert sum(given_rows) <= most
    assert all(0 <= rows <= prompt.rows for rows, prompt in zip(given_rows, prompts, strict=True))
    spent = sum(work(rows, prompt.context, slope) for rows, prompt in zip(given_rows, prompts, strict=True))
    assert spent <= room * (1 + 1e-9) or sum(given_rows) == 1
    assert not prompts or sum(given_rows) > 0
