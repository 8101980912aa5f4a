"""Logging: silent until shown, one handler however often it is shown."""

import logging

import pytest

from llavakit.logs import logger, show_logs


@pytest.fixture(autouse=True)
def no_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger("llavakit")
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", logging.NOTSET)


def test_loggers_are_named_by_their_part() -> None:
    assert logger("engine").name == "llavakit.engine"
    assert logger("engine").parent is logging.getLogger("llavakit")


def test_show_logs_writes_one_line_per_record_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    show_logs()
    show_logs()
    logger("engine").info("loaded %d", 3)
    logger("engine").debug("hidden")
    assert capsys.readouterr() == ("", "INFO llavakit.engine: loaded 3\n")
