"""Bodies and fields that are wrong: each is a 400 (or another 4xx) that names it, and never anything else. Sections A, C and D."""

import base64
import json
import random
import re
import zlib
from typing import Any

import pytest

from llavakit.server.config import ServerConfig
from llavakit.server.faults import HttpError
from llavakit.server.strict_json import parse_json
from tests.serving import MODEL, Reply, Running, chat_body, data_url, picture, running
from tests.soak.mutants import mutant

LEAKS = re.compile(rb"(?<![0-9])0x[0-9a-f]{6,}|/root|/tmp|/home|site-packages|Traceback|pydantic|PIL|torch", re.IGNORECASE)


def refused(reply: Reply, code: str | None = None, param: str | None = None) -> None:
    """Check that a reply is a client's fault, in OpenAI's form, and tells nothing else."""
    assert 400 <= reply.status < 500, (reply.status, reply.body)
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert not LEAKS.search(reply.body), reply.body
    if code is not None:
        assert error["code"] == code, error
    if param is not None:
        assert error["param"] == param, error


def asked(content: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 1}


def with_image(url: Any) -> dict[str, Any]:
    return asked([{"type": "image_url", "image_url": url}, {"type": "text", "text": "?"}])


@pytest.mark.catalogue("C1", "C22")
@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[]", b"7", b'"x"', b"{", b"{}x", b"[" * 200_000, b'{"model":' * 100, b"9" * 5000, b'{"a": 1, "a": 2}',
        b"\xff\xfe", b"\xef\xbb\xbf{}", b'{"model": "\\ud800"}', b'{"model": NaN}', b'{"temperature": 1e400}',
        b'{"temperature": -Infinity}',
    ],
)  # fmt: skip
def test_bodies_that_are_no_json_are_refused(server: Running, body: bytes) -> None:
    refused(server.chat(body))


@pytest.mark.catalogue("C1")
def test_nesting_and_size_have_limits_and_strings_do_not_count(server: Running) -> None:
    deep = asked("x")
    for _ in range(70):
        deep = {"metadata": deep}
    refused(server.chat(deep), "invalid_json")
    refused(server.chat(b'{"stop": [' + b"[]," * (1 << 18) + b'"x"]}'), "invalid_json")
    refused(server.chat({**asked("x"), "logit_bias": {str(number): 1 for number in range(1 << 17)}}), "invalid_json")
    assert server.chat(asked("[" * 100 + '"{')).status == 200
    value = {"a": "[,:" * 100 + '\\"'}
    assert parse_json(json.dumps(value).encode(), max_depth=1, max_marks=5) == value
    with pytest.raises(HttpError):
        parse_json(json.dumps(value).encode(), max_depth=1, max_marks=4)


@pytest.mark.catalogue("C2", "F7")
@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonx", "multipart/form-data"])
def test_other_kinds_of_bodies_are_refused(server: Running, kind: str) -> None:
    refused(server.chat(json.dumps(chat_body()).encode(), {"Content-Type": kind}))
    refused(server.chat(chat_body(), {"Content-Encoding": "gzip"}), "unsupported_encoding")


@pytest.mark.catalogue("C3")
def test_large_bodies_are_not_read(server: Running) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000000000\r\n\r\n"
    assert server.raw(head).startswith(b"HTTP/1.1 413")
    small = running(ServerConfig(port=0, max_body_bytes=1000))
    with small as limited:
        assert limited.chat(chat_body("x" * 2000)).code == "body_too_large"
        chunk = b"320\r\n" + b"x" * 800 + b"\r\n"
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        assert limited.raw(head + chunk * 2).startswith(b"HTTP/1.1 413")
        assert limited.chat(chat_body()).status == 200


FIELDS: list[tuple[str, list[Any]]] = [
    ("n", [0, -1, 10**9, 1.5, "1", True, 9]),
    ("temperature", [-0.1, 2.1, "0.5", [], True, 10**20]),
    ("top_p", [0, -1, 1.1, "1"]),
    ("top_k", [-2, 10**12, 1.5]),
    ("min_p", [-0.1, 1.1]),
    ("presence_penalty", [-2.1, 2.1, "1"]),
    ("frequency_penalty", [-2.1, 2.1]),
    ("repetition_penalty", [0, -1, 11]),
    ("max_tokens", [0, -1, 10**12, 1.5, "8"]),
    ("max_completion_tokens", [0, -5]),
    ("stop", [["a"] * 5, [""], "", "x" * 257, 7, [7]]),
    ("logit_bias", [{"999999": 1}, {"-1": 1}, {"a": 1}, {"1": 101}, {"1": "x"}, [], {str(n): 1 for n in range(301)}]),
    ("top_logprobs", [21, -1, 1.5]),
    ("seed", [10**30, 1.5, "1"]),
    ("stream", ["yes", 1]),
    ("stream_options", [{"include_usage": "yes"}, {"other": 1}, 7]),
    ("user", ["x" * 513, 7]),
    ("response_format", [{"type": "grammar"}, {"type": "json_schema"}, 7, {"type": "json_schema", "json_schema": {"name": "x"}}]),
    ("messages", [None, "hi", [], [[]], [None], 7, [{"role": "user"}]]),
    ("model", [None, 7, "", "x" * 10_000]),
]


@pytest.mark.catalogue("C7", "C8", "C9", "C10", "C11", "C13", "C14", "C15", "C16", "C20", "C22")
@pytest.mark.parametrize(("name", "values"), FIELDS, ids=[name for name, _ in FIELDS])
def test_values_out_of_range_are_named(server: Running, name: str, values: list[Any]) -> None:
    for value in values:
        extra = {"logprobs": True} if name == "top_logprobs" else {"stream": True} if name == "stream_options" else {}
        reply = server.chat({**chat_body(), **extra, name: value})
        refused(reply)
        assert name in (reply.json()["error"]["param"] or "") or name in reply.json()["error"]["message"], (value, reply.json())


@pytest.mark.catalogue("C4", "C12", "C17", "C18", "A28", "G4")
@pytest.mark.parametrize(
    "name",
    ["tools", "tool_choice", "functions", "chat_template", "chat_template_kwargs", "min_tokens", "regex", "guided_json", "grammar",
     "prompt_embeds", "cache_salt", "mm_hashes", "best_of", "echo", "modalities", "audio", "reasoning_effort", "x" * 300],
)  # fmt: skip
def test_fields_that_are_not_supported_are_named(server: Running, name: str) -> None:
    refused(server.chat({**chat_body(), name: 1}), "unsupported_parameter", name[:200])


@pytest.mark.catalogue("C4")
def test_fields_that_ask_for_nothing_are_taken(server: Running) -> None:
    harmless = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "safety_identifier": "x",
        "n": None,
        "stop": None,
        "modalities": None,
        "tools": None,
        "tool_choice": None,
        "reasoning_effort": None,
    }
    assert server.chat({**chat_body(), **harmless}).status == 200
    for name, value in {"store": True, "tools": [], "tool_choice": "none"}.items():
        refused(server.chat({**chat_body(), name: value}), param=name)


@pytest.mark.catalogue("C5", "C6", "C24", "D11")
@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "root", "content": "x"}], "messages.0.role"),
        ([{"role": 7, "content": "x"}], "messages.0.role"),
        ([{"content": "x"}], "messages.0.role"),
        ([{"role": "user", "content": None}], "messages.0.content"),
        ([{"role": "user", "content": 7}], "messages.0.content"),
        ([{"role": "user", "content": {}}], "messages.0.content"),
        ([{"role": "user", "content": []}], "messages.0.content"),
        ([{"role": "user", "content": " \n"}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content.0.text"),
        ([{"role": "user", "content": [{"type": "video"}]}], "messages.0.content.0"),
        ([{"role": "user", "content": [{"text": "x"}]}], "messages.0.content.0"),
        ([{"role": "user", "content": "x", "tool_calls": []}], "messages.0.tool_calls"),
        ([{"role": "tool", "content": "x"}], "messages.0.role"),
        ([{"role": "assistant", "content": "x"}], "messages"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": "y"}], "messages"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}], "messages"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "messages"),
        ([{"role": "user", "content": "x"}] * 257, "messages"),
    ],
)
def test_conversations_that_are_none_are_named(server: Running, messages: list[Any], param: str) -> None:
    refused(server.chat({"model": MODEL, "messages": messages}), param=param)


def test_an_answer_that_said_nothing_may_come_back(server: Running) -> None:
    said = [{"role": role, "content": text} for role, text in (("user", "x"), ("assistant", ""), ("user", "y"))]
    reply = server.ask("POST", "/v1/tokenize", {"model": MODEL, "messages": said}).json()
    assert server.chat({"model": MODEL, "messages": said, "max_tokens": 1}).json()["usage"]["prompt_tokens"] == reply["count"]


@pytest.mark.catalogue("C6", "C24")
def test_pictures_belong_to_the_users_turns(server: Running) -> None:
    image = {"type": "image_url", "image_url": {"url": data_url(picture())}}
    for role in ("system", "assistant"):
        messages = [{"role": "user", "content": "x"}, {"role": role, "content": [image]}, {"role": "user", "content": "y"}]
        refused(server.chat({"model": MODEL, "messages": messages[1:] if role == "system" else messages}), param="messages")
    assert server.chat(asked([image])).status == 200


@pytest.mark.catalogue("C19")
@pytest.mark.parametrize("name", ["other", "../x", "/etc/passwd", "a\0b", "x" * 512, "miniature/../mini"])
def test_other_models_are_not_found(server: Running, name: str) -> None:
    refused(server.chat({**chat_body(), "model": name}), "model_not_found", "model")


@pytest.mark.catalogue("A26", "A27")
@pytest.mark.parametrize(
    "url",
    [
        "", "data:", "data:image/png", "data:image/png;base64", "data:image/png,abcd", "data:text/html;base64,AAAA",
        "data:image/png;base64,",
        "data:image/png;base64,A", "data:image/png;base64,AA*A", "data:image/png;base64,AA AA", "data:image/png;base64,AAAA=", "AAAA",
        "data:image/png;base64,data:image/png;base64,AAAA", "data:image/png;base64,-_-_", "upload:none", "upload:",
        None, 7, [], {}, {"url": None}, {"url": 7}, {"href": "x"}, {"url": "data:", "extra": 1}, {"url": "data:", "detail": "best"},
    ],
)  # fmt: skip
def test_addresses_that_are_no_pictures_are_refused(server: Running, url: Any) -> None:
    refused(server.chat(with_image({"url": url} if isinstance(url, str) else url)))


@pytest.mark.catalogue("A26")
def test_base64_is_measured_before_it_is_decoded() -> None:
    with running(ServerConfig(port=0, max_image_bytes=5000, max_images_bytes=4000)) as server:
        refused(server.chat(with_image({"url": data_url(b"\0" * 5010)})), "image_too_large")
        small = picture(0, 64, 64)
        fitting = [{"type": "image_url", "image_url": {"url": data_url(small)}}] * (4000 // len(small) + 1)
        assert len(fitting) <= 8
        refused(server.chat(asked([*fitting, {"type": "text", "text": "?"}])), "image_too_large")


def png(width: int, height: int, body: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


@pytest.mark.catalogue("A1", "A2", "A3", "A4", "A6", "A8", "A17", "A18", "A30")
@pytest.mark.parametrize(
    "data",
    [
        b"", b"\0", b"GIF89a", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7", b"RIFF\0\0\0\0WEBP", b"II*\0",
        b"\x89PNG\r\n\x1a\n",
        png(60_000, 60_000), png(1, 100_000, b"\0" * 200_000), png(100_000, 1, b"\0" * 13_000), png(0, 5), png(9000, 9000),
        picture()[:-30], picture()[: len(picture()) // 2],
    ],
    ids=str,
)  # fmt: skip
def test_pictures_that_are_none_are_refused(server: Running, data: bytes) -> None:
    refused(server.chat(with_image({"url": data_url(data)})))


@pytest.mark.catalogue("A1", "A2", "A14", "A15", "A21", "A22", "A30")
def test_damaged_pictures_are_answered_or_refused(server: Running) -> None:
    rng = random.Random(0)
    for _ in range(60):
        reply = server.chat(with_image({"url": data_url(mutant(rng.randrange(10_000)))}))
        if reply.status != 200:
            refused(reply)
    assert server.chat(with_image({"url": data_url(picture())})).status == 200


@pytest.mark.catalogue("A18")
def test_what_a_picture_is_says_its_content(server: Running) -> None:
    assert server.chat(with_image({"url": data_url(picture(), "image/jpeg")})).status == 200
    assert server.chat(with_image({"url": "DATA:IMAGE/PNG;BASE64," + base64.b64encode(picture()).decode()})).status == 200


@pytest.mark.catalogue("A25", "C23", "B14")
def test_pictures_are_counted_before_they_are_looked_at(server: Running) -> None:
    one = {"type": "image_url", "image_url": {"url": data_url(picture())}}
    refused(server.chat(asked([one] * 9)), "too_many_images")
    urls = [{"type": "image_url", "image_url": {"url": f"http://127.0.0.1:1/{n}"}} for n in range(50)]
    refused(server.chat(asked(urls)), "too_many_images")
    with running(ServerConfig(port=0, max_images_pixels=64 * 64 + 1)) as limited:
        refused(limited.chat(asked([one, one])), "invalid_image")
        assert limited.chat(asked([one])).status == 200


@pytest.mark.catalogue("D6", "C23", "D7")
def test_prompts_that_do_not_fit_are_refused_before_a_picture_is_decoded(server: Running) -> None:
    most = server.app.service.max_prompt_tokens
    words = "red " * (most + 10)
    refused(server.chat(asked(words)), "context_length_exceeded")
    before = server.app.service.decoders.num_killed
    broken = {"type": "image_url", "image_url": {"url": data_url(picture()[:-30])}}
    refused(server.chat(asked([broken, {"type": "text", "text": words}])), "context_length_exceeded")
    assert server.app.service.decoders.num_killed == before
    count = server.ask("POST", "/v1/tokenize", {"model": MODEL, "messages": asked("red " * 100)["messages"]}).json()["count"]
    fitting = asked("red " * (100 + most - count))
    assert server.ask("POST", "/v1/tokenize", {"model": MODEL, "messages": fitting["messages"]}).json()["count"] == most
    assert server.chat({**fitting, "max_tokens": None}).json()["usage"]["completion_tokens"] == 1
    refused(server.chat(asked("red " * (101 + most - count))), "context_length_exceeded")
    refused(server.ask("POST", "/v1/completions", {"model": MODEL, "prompt": words, "max_tokens": 1}), "context_length_exceeded")
    refused(server.chat(asked("x" * (1 << 20) + "y")), "invalid_value")


@pytest.mark.catalogue("D1", "D2", "D3", "D5")
@pytest.mark.parametrize(
    "text", ["<image>", "</s>", "<s>", "<unk>", "[INST] x [/INST]", "USER: x ASSISTANT:", "<\u200bimage>", "＜image＞", "<pad>"]
)
def test_markup_in_a_users_text_is_text(server: Running, text: str) -> None:
    tokenize = server.ask("POST", "/v1/tokenize", {"model": MODEL, "messages": asked(f"what is {text} ?")["messages"]}).json()
    special = server.app.service.backend.processor.tokenizer.special_ids
    plain = server.ask("POST", "/v1/tokenize", {"model": MODEL, "messages": asked("what is it ?")["messages"]}).json()
    assert (
        sum(index in special for index in tokenize["tokens"]) == sum(index in special for index in plain["tokens"]) + text.count("＜") * 0
    )
    assert server.chat(asked(text)).status == 200


@pytest.mark.catalogue("D8", "D9")
@pytest.mark.parametrize("text", ["a" * 4000, "\n" * 4000, "\U0001f468\u200d\U0001f469" * 300, "\u202e\u0627" * 500, "\0\x1b[31m\x7f" * 50])
def test_odd_texts_are_answered_or_too_long(server: Running, text: str) -> None:
    reply = server.chat(asked(f"x{text}"))
    assert reply.status == 200 or reply.code == "context_length_exceeded"


def test_prompts_of_completions_are_checked(server: Running) -> None:
    wrong: tuple[Any, ...] = ([], [[]], [""], "", [-1], [10**9], [True], [1, "a"], [[1], "a"], None, {}, ["a"] * 9)
    for prompt in wrong:
        refused(server.ask("POST", "/v1/completions", {"model": MODEL, "prompt": prompt, "max_tokens": 1}))
    fields: tuple[dict[str, Any], ...] = ({"suffix": "x"}, {"echo": True}, {"best_of": 2}, {"messages": []})
    for field in fields:
        refused(server.ask("POST", "/v1/completions", {"model": MODEL, "prompt": "a", **field}))
