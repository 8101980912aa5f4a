"""The tables of docs/serving.md: the faults that a server must survive with the tests about each, and the server's settings.

Owns: ROWS (what each fault is), ABSENT (why one has no test), marked (which tests name which rows), and both tables. Run as a module it
writes them into the document.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

__all__ = ["ABSENT", "DOCUMENT", "ROWS", "marked", "settings", "table", "with_tables"]

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "serving.md"
FAULTS = "<!-- faults: made by python -m tests.catalogue -->", "<!-- end of faults -->"
SETTINGS = "<!-- settings: made by python -m tests.catalogue -->", "<!-- end of settings -->"

ROWS: dict[str, str] = {
    "A1": "empty or random bytes as a picture",
    "A2": "a picture cut off anywhere",
    "A3": "a header of enormous size without data",
    "A4": "a small file of many pixels",
    "A5": "sizes that Pillow only warns of",
    "A6": "very thin pictures",
    "A7": "pictures of a few pixels",
    "A8": "no width or height",
    "A9": "animated pictures",
    "A10": "CMYK colours",
    "A11": "16 bits a channel",
    "A12": "TIFF and floating point",
    "A13": "transparency",
    "A14": "EXIF rotation, damaged EXIF",
    "A15": "megabytes of metadata",
    "A16": "broken or huge colour profiles",
    "A17": "SVG, PDF and other formats",
    "A18": "a wrong media type",
    "A19": "files that are two things",
    "A20": "JPEG with thousands of scans",
    "A21": "damaged and interlaced PNG",
    "A22": "damaged BMP and GIF",
    "A23": "a decoder that crashes",
    "A24": "a decoder that takes too long",
    "A25": "pixels of all pictures together",
    "A26": "damaged base64 and data URLs",
    "A27": "image parts of a wrong form",
    "A28": "tensors in place of pictures",
    "A29": "the same picture twice",
    "A30": "what error texts give away",
    "B1": "schemes other than http and https",
    "B2": "private addresses in any spelling",
    "B3": "addresses that two parsers read differently",
    "B4": "redirects to forbidden places, endless ones",
    "B5": "a name that changes its address",
    "B6": "slow and hanging origins",
    "B7": "lengths that lie, endless bodies",
    "B8": "compressed responses",
    "B9": "errors and empty bodies of an origin",
    "B10": "errors that tell open ports from closed ones",
    "B11": "proxies, cookies and keys",
    "B12": "untrusted certificates",
    "B13": "addresses inside of text",
    "B14": "many addresses",
    "B15": "paths of local files",
    "B16": "other ways to open a connection",
    "C1": "bodies that are no JSON, deep, double or not finite",
    "C2": "other media types and encodings",
    "C3": "bodies above the limit",
    "C4": "unknown fields",
    "C5": "messages of a wrong form",
    "C6": "turns out of order, pictures in other turns",
    "C7": "n out of range",
    "C8": "temperature out of range",
    "C9": "top_p, top_k, min_p out of range",
    "C10": "penalties out of range",
    "C11": "max_tokens out of range",
    "C12": "min_tokens",
    "C13": "stop strings",
    "C14": "logit_bias",
    "C15": "log probabilities",
    "C16": "seeds",
    "C17": "grammars and forms",
    "C18": "chat templates in requests",
    "C19": "unknown models and paths as models",
    "C20": "long or odd user names",
    "C21": "request ids of clients",
    "C22": "flags that are no booleans",
    "C23": "too many pictures, too many tokens",
    "C24": "pictures without text, text without pictures",
    "C25": "other methods, other spellings of paths",
    "D1": "typed image markers",
    "D2": "typed special tokens and roles",
    "D3": "special tokens in disguise",
    "D4": "markers in training data",
    "D5": "special tokens that a model emits",
    "D6": "prompts above the context",
    "D7": "prompts that just fit",
    "D8": "very long and odd texts",
    "D9": "words that tokenize slowly",
    "D10": "characters cut between chunks",
    "D11": "empty texts",
    "D12": "instructions inside of pictures",
    "D13": "scores that are not finite",
    "E1": "many requests at once",
    "E2": "a full queue",
    "E3": "too long in the queue",
    "E4": "too long in all",
    "E5": "clients that go away",
    "E6": "many that go away at once",
    "E7": "clients that do not read",
    "E8": "clients that send slowly",
    "E9": "idle, half-closed, pipelined connections",
    "E10": "memory that runs out",
    "E11": "a request above all memory",
    "E12": "forced preemption",
    "E13": "cache eviction under pressure",
    "E14": "an engine that breaks",
    "E15": "an engine that hangs",
    "E16": "one bad request in a batch",
    "E17": "a step without memory",
    "E18": "pictures that cannot be encoded",
    "E19": "SIGTERM with running answers",
    "E20": "kill and restart",
    "E21": "logs that cannot be written",
    "E22": "hours of mixed requests",
    "E23": "one key that floods",
    "E24": "pictures that starve texts",
    "E25": "no file descriptors left",
    "E26": "errors after a stream began",
    "E27": "clients that retry",
    "F1": "wrong, missing and double keys",
    "F2": "paths without a key",
    "F3": "Host headers and absolute targets",
    "F4": "serving others without a key",
    "F5": "rebinding of names",
    "F6": "origins",
    "F7": "cross-site posts",
    "F8": "smuggled and malformed HTTP",
    "F9": "huge heads",
    "F10": "ranges",
    "F11": "paths out of a folder",
    "F12": "log injection and secrets in logs",
    "F13": "markup in answers",
    "F14": "markup cut between chunks",
    "F15": "names of uploaded files",
    "F16": "uploaded pictures shown again",
    "F17": "keys and chats in the browser",
    "F18": "debug paths",
    "F19": "labels of metrics",
    "F20": "registration of workers",
    "F21": "pickles between processes",
    "F22": "other listening ports",
    "F23": "requests a minute",
    "F24": "guessing keys",
    "G1": "pictures of equal bytes and other shapes",
    "G2": "equal texts with other pictures",
    "G3": "keys of cached blocks",
    "G4": "hashes from clients",
    "G5": "caches of other keys",
    "G6": "blocks of aborted requests",
    "G7": "memory of kept pictures",
    "G8": "stale buffers",
    "G9": "rows of a batch",
}
"""Every fault, by its name in the design's list."""

ABSENT: dict[str, str] = {
    "A12": "TIFF is refused as a format (A17)",
    "B15": "the server opens no file that a request names",
    "C21": "requests cannot name themselves; ids are the server's",
    "D12": "a model may obey what a picture says: there are no tools, nothing is fetched, answers are shown as text",
}
"""Faults without a test of their own, and why."""


def marked() -> dict[str, list[str]]:
    """Find the tests that name rows: module::test by row."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            for decorator in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.catalogue":
                    assert isinstance(node, ast.FunctionDef)
                    for row in decorator.args:
                        assert isinstance(row, ast.Constant)
                        found[str(row.value)].append(
                            f"{path.stem.removeprefix('test_')}: {node.name.removeprefix('test_').replace('_', ' ')}"
                        )
    return dict(found)


def table() -> str:
    """Write the table: each fault with its tests, or with the reason why it has none."""
    tests = marked()
    lines = ["| | fault | tests |", "|---|---|---|"]
    for row, title in ROWS.items():
        lines.append(f"| {row} | {title} | {'; '.join(tests[row]) if row in tests else f'none: {ABSENT[row]}'} |")
    return "\n".join(lines)


def settings() -> str:
    """Write the table of the server's settings: flag, default, meaning."""
    tree = ast.parse((ROOT / "llavakit" / "server" / "config.py").read_text("utf-8"))
    config = next(node for node in tree.body if isinstance(node, ast.ClassDef))
    lines = ["| flag | default | |", "|---|---|---|"]
    for node, told in zip(config.body, config.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(told, ast.Expr) and node.value is not None:
            flag = ast.unparse(node.target).replace("_", "-")
            value = eval(ast.unparse(node.value), {})  # shifts and products of numbers
            lines.append(f"| `--{flag}` | {value if value not in ((), None) else ''} | {ast.literal_eval(told.value)} |")
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """Return a document with the tables in their places."""
    for (begin, end), made in ((FAULTS, table()), (SETTINGS, settings())):
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{made}\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text("utf-8")), encoding="utf-8")
