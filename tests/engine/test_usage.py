"""Where the time of an engine's thread goes."""

from __future__ import annotations

import time

from vai.engine.usage import NativeTime

LONG = 0.03


def _work(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_what_the_thread_computes_in_a_native_call_is_not_pythons() -> None:
    native = NativeTime()
    before = native.host_seconds()
    with native:
        _work(LONG)
    assert native.cpu >= LONG
    assert native.wall >= LONG
    assert native.host_seconds() - before < LONG


def test_what_it_computes_outside_is_and_waiting_is_nobodys() -> None:
    native = NativeTime()
    before = native.host_seconds()
    _work(LONG)
    with native:
        time.sleep(LONG)
    assert native.host_seconds() - before >= LONG
    assert native.wall >= LONG
    assert native.cpu < LONG


def test_a_call_that_fails_is_counted_too() -> None:
    native = NativeTime()
    try:
        with native:
            _work(LONG)
            raise ValueError
    except ValueError:
        pass
    assert native.wall >= LONG
