"""Ctrl-C and SIGTERM within one process; `test_convert` and `test_trainer_resume` send them to real commands."""

from __future__ import annotations

import signal
import threading

import pytest

from zimage_cli import app
from zimage_cli.commands import inspect
from zimage_cli.terminal.signals import STOPPED, Terminated, noted, unwinding

RAISED = {signal.SIGINT: KeyboardInterrupt, **dict.fromkeys(STOPPED, Terminated)}
FATES = (
    (signal.SIGINT, 130, "error: interrupted"),
    (signal.SIGTERM, 143, "error: terminated"),
    (signal.SIGHUP, 129, "error: the terminal was closed"),
)


@pytest.mark.parametrize("first", RAISED)
@pytest.mark.parametrize("second", RAISED)
def test_the_first_is_noted_and_the_next_of_either_kind_unwinds(first: int, second: int) -> None:
    before = [signal.getsignal(number) for number in RAISED]
    with pytest.raises(RAISED[signal.Signals(second)]), unwinding(), noted() as received:
        signal.raise_signal(first)
        assert received == [first]
        signal.raise_signal(second)
    assert received == [first]
    assert [signal.getsignal(number) for number in RAISED] == before


def test_each_has_its_exit_code_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for number, code, line in FATES:
        monkeypatch.setattr(inspect, "run", lambda *_, number=number: signal.raise_signal(number))
        assert app.main(["inspect", "--input", "x"]) == code
        assert capfd.readouterr().err.strip() == line


def test_a_program_that_nohup_started_outlives_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with unwinding(), noted() as received:
            signal.raise_signal(signal.SIGHUP)
            assert received == [] and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            signal.raise_signal(signal.SIGTERM)  # the next one unwinds, and this still has no effect
            signal.raise_signal(signal.SIGHUP)
            assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_leaves_the_handlers_alone() -> None:
    seen, before = [], signal.getsignal(signal.SIGTERM)

    def work() -> None:
        with unwinding(), noted() as received:
            seen.append((received, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [([], before)]
