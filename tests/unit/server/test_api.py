"""The API as it should be used: answers equal to the engine's own, whole and streamed, and everything that can be asked of them."""

import json
import math
from typing import Any

import pytest

from llavakit.server.config import ServerConfig
from llavakit.types import Conversation, SamplingParams
from tests.serving import MODEL, Running, chat_body, data_url, miniature, picture, running

QUESTION = "How many things are there?"
GREEDY = SamplingParams(max_tokens=12)


def expected(question: str = QUESTION, *pictures: bytes, params: SamplingParams = GREEDY) -> str:
    return miniature().chat(Conversation.ask(question, *pictures), params).text


def text_of(reply: Any) -> str:
    return str(reply.json()["choices"][0]["message"]["content"])


def test_an_answer_is_the_engines(server: Running) -> None:
    reply = server.chat(chat_body(QUESTION, data_url(picture()), max_tokens=12))
    assert reply.status == 200
    value = reply.json()
    assert text_of(reply) == expected(QUESTION, picture())
    assert (value["object"], value["model"]) == ("chat.completion", MODEL)
    assert value["choices"][0]["finish_reason"] in ("stop", "length")
    usage = value["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] <= 12
    assert reply.headers["x-request-id"] in value["id"]


def test_a_streamed_answer_joins_to_the_whole_one(server: Running) -> None:
    body = chat_body(QUESTION, data_url(picture()), max_tokens=12, stream=True, stream_options={"include_usage": True})
    reply = server.chat(body)
    assert reply.headers["content-type"] == "text/event-stream"
    *chunks, counted, done = reply.events()
    assert done is None
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected(QUESTION, picture())
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"][0]["finish_reason"]] in (["stop"], ["length"])
    assert counted["choices"] == []
    assert counted["usage"] == server.chat(chat_body(QUESTION, data_url(picture()), max_tokens=12)).json()["usage"]


def test_several_turns_and_pictures(server: Running) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(picture(1))}}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A thing."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "And here?"}, {"type": "image_url", "image_url": {"url": data_url(picture(2))}}],
        },
    ]
    reply = server.chat({"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 12})
    assert reply.status == 200
    again = server.chat({"model": MODEL, "messages": [*messages, {"role": "assistant", "content": text_of(reply)}]})
    assert again.status == 400
    developer = [{**messages[0], "role": "developer"}, *messages[1:]]
    assert text_of(server.chat({"model": MODEL, "messages": developer, "temperature": 0, "max_tokens": 12})) == text_of(reply)


def test_several_answers_are_drawn_by_their_seed(server: Running) -> None:
    body = chat_body(n=3, temperature=1.0, seed=5, max_tokens=10)
    first, second = server.chat(body).json(), server.chat(body).json()
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    assert first["choices"] == second["choices"]
    streamed = server.chat({**body, "stream": True}).events()
    for choice in first["choices"]:
        parts = [one["choices"][0] for one in streamed if one is not None and one["choices"][0]["index"] == choice["index"]]
        assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]


@pytest.mark.catalogue("C13", "D10")
def test_stop_strings_end_an_answer_and_are_no_part_of_it(server: Running) -> None:
    whole = expected(params=SamplingParams(max_tokens=40))
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    reply = server.chat(chat_body(max_tokens=40, stop=[stop]))
    assert text_of(reply) == whole[: whole.index(stop)]
    assert reply.json()["choices"][0]["finish_reason"] == "stop"
    streamed = server.chat(chat_body(max_tokens=40, stop=stop, stream=True)).events()
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in streamed if one) == text_of(reply)


def test_log_probabilities_come_with_the_likeliest_tokens(server: Running) -> None:
    entries = server.chat(chat_body(logprobs=True, top_logprobs=3)).json()["choices"][0]["logprobs"]["content"]
    assert len(entries) == 8 or entries[-1]["token"] == "</s>"
    for entry in entries:
        assert entry["logprob"] <= 0
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["token"] == entry["token"]
        assert entry["bytes"] is None or bytes(entry["bytes"]).decode("utf-8", errors="replace") == entry["token"]
    streamed = server.chat(chat_body(logprobs=True, stream=True)).events()
    known = [one["choices"][0]["logprobs"] for one in streamed if one is not None and one["choices"][0]["logprobs"]]
    assert [one["content"][0]["logprob"] for one in known] == [entry["logprob"] for entry in entries]


def test_a_form_is_followed(server: Running) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}},
        "required": ["n"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "count", "schema": schema, "strict": True}}
    value = json.loads(text_of(server.chat(chat_body(response_format=form, max_tokens=60))))
    assert value.keys() == {"n"}
    reply = server.chat(chat_body(response_format={"type": "json_object"}, max_tokens=4))
    assert text_of(reply).lstrip().startswith("{")
    assert server.chat(chat_body(response_format={"type": "text"})).status == 200
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    refused = server.chat(chat_body(response_format=wrong))
    assert (refused.status, refused.json()["error"]["param"]) == (400, "response_format")


def test_tokens_may_be_favoured(server: Running) -> None:
    index = miniature().processor.tokenizer.encode_text("red")[0]
    text = text_of(server.chat(chat_body(logit_bias={str(index): 100}, max_tokens=3)))
    assert text.split() == ["red"] * len(text.split())


def test_texts_are_continued(server: Running) -> None:
    prompts = ["a red circle", "a blue"]
    reply = server.ask("POST", "/v1/completions", {"model": MODEL, "prompt": prompts, "max_tokens": 6, "temperature": 0, "logprobs": 1})
    assert reply.status == 200
    value = reply.json()
    assert value["object"] == "text_completion"
    for choice, prompt in zip(value["choices"], prompts, strict=True):
        assert choice["text"] == miniature().generate(prompt, SamplingParams(max_tokens=6)).text
        assert len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["token_logprobs"]) <= 6
    ids = miniature().requests.prompt(prompts[0]).ids
    by_ids = server.ask("POST", "/v1/completions", {"model": MODEL, "prompt": list(ids), "max_tokens": 6, "temperature": 0}).json()
    assert by_ids["choices"][0]["text"] == value["choices"][0]["text"]
    body = {"model": MODEL, "prompt": prompts, "max_tokens": 6, "temperature": 0, "stream": True}
    streamed = server.ask("POST", "/v1/completions", body).events()
    for number, choice in enumerate(value["choices"]):
        parts = [one["choices"][0]["text"] for one in streamed if one is not None and one["choices"][0]["index"] == number]
        assert "".join(parts) == choice["text"]
    assert value["usage"]["prompt_tokens"] == sum(len(miniature().requests.prompt(prompt).ids) for prompt in prompts)


def test_what_a_conversation_costs_is_told(server: Running) -> None:
    body = {key: value for key, value in chat_body(QUESTION, data_url(picture())).items() if key in ("model", "messages")}
    found = server.ask("POST", "/v1/tokenize", body).json()
    assert found["count"] == len(found["tokens"]) == server.chat(chat_body(QUESTION, data_url(picture()))).json()["usage"]["prompt_tokens"]
    (image,) = found["images"]
    assert (image["width"], image["height"]) == (64, 64)
    assert image["tokens"] == found["tokens"].count(max(set(found["tokens"]), key=found["tokens"].count))
    text = server.ask("POST", "/v1/tokenize", {"model": MODEL, "prompt": "a red circle"}).json()
    assert text["tokens"] == list(miniature().requests.prompt("a red circle").ids)
    assert server.ask("POST", "/v1/tokenize", {"model": MODEL}).status == 400


def test_given_answers_are_scored(server: Running) -> None:
    body = {key: value for key, value in chat_body("Is there a red cross?", data_url(picture())).items() if key in ("model", "messages")}
    candidates = ["Yes.", "No.", *(f"There are {number}." for number in range(ServerConfig().max_choices + 1))]
    found = server.ask("POST", "/v1/score", {**body, "candidates": candidates}).json()["data"]
    own = miniature().score(Conversation.ask("Is there a red cross?", picture()), candidates)
    assert [one["text"] for one in found] == candidates
    for ours, told in zip(own, found, strict=True):
        assert math.isclose(ours.logprob, told["logprob"], rel_tol=1e-6)
    assert math.isclose(sum(one["share"] for one in found), 1, rel_tol=1e-9)
    for wrong in ([], [""], ["x"] * 65):
        assert server.ask("POST", "/v1/score", {**body, "candidates": wrong}).status == 400


@pytest.mark.catalogue("F15")
def test_files_may_come_along(server: Running) -> None:
    request = json.dumps(chat_body(QUESTION, "upload:scene", max_tokens=12)).encode()
    parts = {b"request": request, b'scene"; filename="../../etc/passwd': picture()}
    form = b"".join(b'--xyz\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % pair for pair in parts.items()) + b"--xyz--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=xyz"}
    assert text_of(server.chat(form, headers)) == expected(QUESTION, picture())
    lost = form.replace(b'name="scene"', b'name="other"')
    assert server.chat(lost, headers).code == "invalid_image"
    for torn in (form[:-6], b"", form.replace(b"--xyz", b"--abc"), form.replace(b"request", b"wish")):
        assert server.chat(torn, headers).code == "invalid_form"


def test_models_health_and_counts(server: Running) -> None:
    (model,) = server.ask("GET", "/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == (MODEL, miniature().requests.context_len)
    assert server.ask("GET", f"/v1/models/{MODEL}").json() == model
    assert server.ask("GET", "/v1/models/other").code == "model_not_found"
    assert server.ask("GET", "/health").json() == {"status": "ok"}
    assert server.ask("GET", "/ready").json() == {"status": "ready"}
    server.chat(chat_body())
    text = server.ask("GET", "/metrics").body.decode()
    assert 'llava_responses_total{route="/v1/chat/completions",status="200"}' in text
    assert "llava_cache_blocks_used 0.0" in text
    assert "llava_first_token_seconds_count" in text
    described = server.ask("GET", "/openapi.json").json()
    assert described["paths"].keys() >= {"/v1/chat/completions", "/v1/completions", "/v1/tokenize", "/v1/score", "/v1/models"}


def test_sagemaker_asks_in_its_own_way() -> None:
    with running(is_sagemaker=True) as server:
        assert server.ask("GET", "/ping").status == 200
        body = {key: value for key, value in chat_body(max_tokens=12).items() if key != "model"}
        assert text_of(server.ask("POST", "/invocations", body)) == expected()
        assert server.ask("POST", "/invocations", {"prompt": "a red", "max_tokens": 3}).json()["object"] == "text_completion"
        assert server.ask("POST", "/invocations", []).status == 400
    with running() as plain:
        assert plain.ask("GET", "/ping").status == 404
