"""Work in several processes: ordered, bounded, and honest about what went wrong in them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from itertools import islice

import pytest

from finetune_trainer.data.workers import CHUNK_ROWS, INLINE_ROWS, encode_all
from finetune_trainer.errors import TrainerError

MANY = INLINE_ROWS + 10 * CHUNK_ROWS


def with_process(rows: list[int]) -> list[tuple[int, int]]:
    return [(row * row, os.getpid()) for row in rows]


def chatty(rows: list[int]) -> list[int]:
    print("a library prints something")
    return rows


def failing(rows: list[int]) -> list[int]:
    if MANY - 1 in rows:
        raise ZeroDivisionError("in row 7")
    return rows


def killed(rows: list[int]) -> list[int]:
    os.kill(os.getpid(), signal.SIGKILL)
    return rows


@pytest.mark.parametrize("processes", [1, 3])
def test_results_come_in_order_with_what_they_belong_to(processes: int) -> None:
    results = list(encode_all(with_process, range(MANY), processes))
    assert [(row, square) for row, (square, _) in results] == [(row, row * row) for row in range(MANY)]
    workers = {process for _, (_, process) in results}
    assert (workers == {os.getpid()}) == (processes == 1)


def test_few_rows_are_done_without_starting_processes() -> None:
    assert {process for _, (_, process) in encode_all(with_process, range(INLINE_ROWS), 3)} == {os.getpid()}


def test_what_workers_print_does_not_disturb_their_answers() -> None:
    assert [made for _, made in encode_all(chatty, range(MANY), 2)] == list(range(MANY))


def test_rows_are_read_only_as_far_as_results_are_taken() -> None:
    read = 0

    def rows() -> Iterator[int]:
        nonlocal read
        for row in range(100 * MANY):
            read = row + 1
            yield row

    results = encode_all(with_process, rows(), 2)
    list(islice(results, CHUNK_ROWS))
    results.close()
    assert read <= INLINE_ROWS + 1 + 5 * CHUNK_ROWS


def test_an_error_in_a_worker_is_raised_here_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError, match="in row 7"):
        list(encode_all(failing, range(MANY), 2))


def test_a_worker_that_is_killed_is_told_with_the_likely_reason() -> None:
    with pytest.raises(TrainerError, match="a process that tokenises the data ended with code -9") as error:
        list(encode_all(killed, range(MANY), 2))
    assert error.value.advice == "if it was killed for memory, raise resources.memory"
