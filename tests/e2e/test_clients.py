"""Real clients, unchanged: the openai package, LangChain, curl."""

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr

from llavakit.types import Conversation, SamplingParams
from tests.serving import MODEL, Running, chat_body, data_url, miniature, picture, running

KEY = "sk-clients"
QUESTION = "How many things are there?"
CONTENT: Any = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": data_url(picture())}}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(keys=(KEY,)) as found:
        yield found
        assert found.is_quiet()


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=KEY, max_retries=0) as found:
        yield found


def expected(tokens: int = 80) -> str:
    return miniature().chat(Conversation.ask(QUESTION, picture()), SamplingParams(max_tokens=tokens)).text


def test_the_openai_package_asks_and_streams(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": CONTENT}]
    whole = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=80, temperature=0)
    assert whole.choices[0].message.content == expected()
    again = [*messages, whole.choices[0].message, {"role": "user", "content": "And now?"}]
    assert client.chat.completions.create(model=MODEL, messages=again, max_completion_tokens=3).usage
    pieces = client.chat.completions.create(
        model=MODEL,
        messages=messages,
        max_tokens=80,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(pieces)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected()
    assert chunks[-1].usage == whole.usage
    with client.chat.completions.stream(model=MODEL, messages=messages, max_tokens=80, temperature=0) as stream:
        assert stream.get_final_completion().choices[0].message.content == expected()


def test_the_openai_package_continues_lists_and_counts(client: openai.OpenAI) -> None:
    text = client.completions.create(model=MODEL, prompt="a red circle", max_tokens=5, temperature=0, logprobs=2)
    assert text.choices[0].text == miniature().generate("a red circle", SamplingParams(max_tokens=5)).text
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


class Count(BaseModel):
    number: int
    certain: bool


def test_the_openai_package_gets_structured_answers(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": CONTENT}]
    parsed = client.chat.completions.parse(model=MODEL, messages=messages, response_format=Count, max_tokens=60, temperature=0)
    assert isinstance(parsed.choices[0].message.parsed, Count)


def test_the_openai_package_raises_its_own_errors(client: openai.OpenAI, server: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="no model of that name"):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.BadRequestError, match="temperature must be at most 2") as found:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x"}], temperature=3)
    assert found.value.param == "temperature"
    stranger = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_the_openai_package_asks_many_things_at_once(server: Running) -> None:
    async def all_of() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=KEY) as found:
            messages: Any = [{"role": "user", "content": CONTENT}]
            asking = (found.chat.completions.create(model=MODEL, messages=messages, max_tokens=80, temperature=0) for _ in range(12))
            return [one.choices[0].message.content for one in await asyncio.gather(*asking)]

    assert asyncio.run(all_of()) == [expected()] * 12


def test_langchain_asks_and_streams(server: Running) -> None:
    chat = ChatOpenAI(
        model=MODEL, base_url=f"http://127.0.0.1:{server.port}/v1", api_key=SecretStr(KEY), temperature=0, max_completion_tokens=80
    )
    message = HumanMessage(content=CONTENT)
    assert chat.invoke([message]).content == expected()
    assert "".join(str(chunk.content) for chunk in chat.stream([message])) == expected()
    structured = chat.with_structured_output(Count, method="json_schema").invoke([message])
    assert isinstance(structured, Count)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_asks(server: Running) -> None:
    command = ["curl", "--silent", "--fail", f"http://127.0.0.1:{server.port}/v1/chat/completions", "--json", "@-"]
    body = json.dumps(chat_body(QUESTION, data_url(picture()), max_tokens=80))
    done = subprocess.run(
        [*command, "-H", f"Authorization: Bearer {KEY}"], input=body, capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == expected()
