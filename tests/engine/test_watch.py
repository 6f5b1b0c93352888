"""That preparation takes long is told once in a process."""

import time

import pytest

from fastrefine.engine import watch


@pytest.fixture(autouse=True)
def untold(monkeypatch):
    monkeypatch.setattr(watch, "_told", False)


def wait_for(capsys):
    """stderr from when something is on it."""
    text = ""
    for _ in range(500):
        text += capsys.readouterr().err
        if text:
            break
        time.sleep(0.01)
    return text


def test_slow_preparation_is_told_once_a_process(capsys):
    told = ""
    for _ in range(3):
        with watch.told_when_slow(True, seconds=0.01):
            told += wait_for(capsys) if not told else ""
            time.sleep(0.05)
    assert (told + capsys.readouterr().err).count("preparing the networks") == 1


def test_quick_preparation_is_not_told_and_a_later_slow_one_is(capsys):
    with watch.told_when_slow(True, seconds=60.0):
        pass
    assert not capsys.readouterr().err
    with watch.told_when_slow(True, seconds=0.01):
        assert "preparing the networks" in wait_for(capsys)
