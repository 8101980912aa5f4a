"""Every fault of the list has a test or a stated reason, and the document says which."""

from tests.catalogue import ABSENT, DOCUMENT, ROWS, marked, with_tables


def test_every_fault_has_a_test_or_a_reason() -> None:
    tests = marked()
    assert tests.keys() <= ROWS.keys()
    assert ROWS.keys() - tests.keys() <= ABSENT.keys()
    assert not tests.keys() & ABSENT.keys()


def test_the_document_has_the_tables() -> None:
    text = DOCUMENT.read_text("utf-8")
    assert with_tables(text) == text, "run python -m tests.catalogue"
