"""LiteLLM asks a server; it wants versions of its own, so it lives in an environment of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from llavakit.types import Conversation, SamplingParams
from tests.serving import MODEL, data_url, miniature, picture, running

pytestmark = pytest.mark.soak
SCRIPT = """
import sys, litellm
address, model, url = sys.argv[1:]
content = [{"type": "text", "text": "How many things are there?"}, {"type": "image_url", "image_url": {"url": url}}]
messages = [{"role": "user", "content": content}]
asked = dict(model=f"openai/{model}", api_base=address, api_key="none", messages=messages, temperature=0, max_tokens=40)
print(litellm.completion(**asked).choices[0].message.content)
print("".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**asked, stream=True)))
"""


def test_litellm_asks_and_streams(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "own")], check=True)
    python = tmp_path / "own" / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "litellm"], check=True)
    with running() as server:
        command = [str(python), "-c", SCRIPT, f"http://127.0.0.1:{server.port}/v1", MODEL, data_url(picture())]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    expected = miniature().chat(Conversation.ask("How many things are there?", picture()), SamplingParams(max_tokens=40)).text
    assert done.stdout.splitlines()[-2:] == [expected, expected]
