"""What a user sees of a compilation that takes a while."""

import io
import sys
import time

from pyro_elbo.compile.executable import compiling


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_start_and_end_of_a_compilation_are_logged(caplog):
    with caplog.at_level("INFO", "pyro_elbo"), compiling():
        assert [r.getMessage() for r in caplog.records] == ["compiling a step"]
    assert caplog.records[1].getMessage() == "compiled in 0 s"


def test_a_terminal_counts_the_seconds(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with compiling():
        time.sleep(1.2)
    assert "\rcompiling … 1 s" in terminal.getvalue()
    assert terminal.getvalue().endswith("\n")
