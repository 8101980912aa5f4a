"""storage.hub: a folder wins, a hub id is fetched, anything else is an error that says what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from llavakit.errors import CheckpointError
from llavakit.storage.hub import check_inside, name_of_folder, resolve_model, upload_folder
from tests.fake_hub import TOKEN, FakeHub, commit_of, fake_hub

__all__ = ["fake_hub"]
MODEL = "owner/name"
FILES = {
    "config.json": b"{}",
    "tokenizer.model": b"pieces",
    "model.safetensors": bytes(100),
    "LICENSE.txt": b"terms",
    "README.md": b"# card",
    "pytorch_model.bin": b"pickle",
    "modeling_code.py": b"import os",
    "original/model.safetensors": bytes(100),
    "consolidated.safetensors": bytes(100),
}
WANTED = {"config.json", "tokenizer.model", "model.safetensors", "LICENSE.txt", "README.md"}


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_folders_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("owner/name") == Path("owner/name")
    assert resolve_model(tmp_path) == tmp_path


@pytest.mark.parametrize("model", ["nothing", "../up", "/no/where", "a/b/c", "owner/", "~/x", "https://hub/a", "a b/c"])
def test_what_is_neither_folder_nor_id_never_reaches_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no folder"):
        resolve_model(model)


def test_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_model(tmp_path / "model.safetensors")


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no revision v2; leave the revision out"):
        resolve_model(tmp_path, revision="v2")


@pytest.mark.parametrize("revision", ["", " ", "../main", "a b", "/etc", "x/../../y"])
def test_impossible_revisions_never_reach_the_network(hub: FakeHub, revision: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be a revision"):
        resolve_model(MODEL, revision=revision)
    assert not hub.tokens


def test_only_needed_files_are_fetched(hub: FakeHub) -> None:
    hub.add(MODEL, FILES)
    assert names(resolve_model(MODEL)) == WANTED
    assert sorted(hub.fetched) == sorted(WANTED)


def test_a_processor_needs_no_weights(hub: FakeHub) -> None:
    hub.add(MODEL, FILES)
    assert names(resolve_model(MODEL, parts="processor")) == {"config.json", "tokenizer.model"}


def test_names_that_leave_the_folder_are_not_fetched(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(MODEL, {**FILES, "../../../../evil.json": b"{}", "/evil.json": b"{}", "a/../../evil.json": b"{}"})
    assert names(resolve_model(MODEL)) == WANTED
    assert not list(tmp_path.rglob("evil.json"))


def test_what_is_in_the_cache_needs_no_hub(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(MODEL, FILES)
    folder = resolve_model(MODEL)
    hub.tokens.clear()
    assert resolve_model(MODEL, local_files_only=True) == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model(MODEL) == folder
    assert not hub.tokens
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.stop()
    assert resolve_model(MODEL) == folder


def test_a_cache_that_lacks_licences_is_used_offline_and_one_that_lacks_weights_is_not(hub: FakeHub) -> None:
    hub.add(MODEL, FILES)
    resolve_model(MODEL, parts="processor")
    assert resolve_model(MODEL, parts="processor", local_files_only=True)
    with pytest.raises(CheckpointError, match="not, or not wholly, in the cache and looking on the hub is switched off"):
        resolve_model(MODEL, local_files_only=True)
    folder = resolve_model(MODEL)
    (folder / "LICENSE.txt").unlink()
    assert resolve_model(MODEL, local_files_only=True) == folder


def test_revisions_are_branches_tags_and_commits(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(MODEL, FILES)
    other = {**FILES, "config.json": b'{"a": 1}'}
    hub.add(MODEL, other, revision="v2")
    for revision in ("v2", commit_of(other)):
        folder = resolve_model(MODEL, revision=revision, cache_dir=tmp_path / "elsewhere")
        assert (folder / "config.json").read_bytes() == b'{"a": 1}'
        assert folder.is_relative_to(tmp_path / "elsewhere")
    assert (resolve_model(MODEL) / "config.json").read_bytes() == b"{}"
    for revision in ("v3", "0" * 40):
        with pytest.raises(CheckpointError, match=f"owner/name has no revision {revision}"):
            resolve_model(MODEL, revision=revision)


def test_renamed_repositories_are_followed(hub: FakeHub) -> None:
    hub.add("new/name", FILES)
    hub.renamed[MODEL] = "new/name"
    assert names(resolve_model(MODEL)) == WANTED


def test_gated_private_and_missing_say_what_to_do(hub: FakeHub) -> None:
    hub.add("some/gated", FILES).is_gated = True
    hub.add("some/private", FILES).is_private = True
    with pytest.raises(
        CheckpointError, match=rf"some/gated is gated: accept its terms at {hub.url}/some/gated and log in with `hf auth login`"
    ):
        resolve_model("some/gated")
    for model in ("some/private", "some/missing"):
        with pytest.raises(CheckpointError, match=f"has no model {model}, or it is private .* check the name, or `hf auth login`"):
            resolve_model(model)


def test_a_token_opens_gated_and_private_ones_and_is_in_no_message(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("some/gated", FILES).is_gated = True
    hub.add("some/private", FILES).is_private = True
    assert names(resolve_model("some/private", token=TOKEN)) == WANTED
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert names(resolve_model("some/gated")) == WANTED
    with pytest.raises(CheckpointError, match="has no model") as caught:
        resolve_model("some/missing")
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "told"),
    [(401, "hf auth login"), (403, "answered 403; log in"), (429, "answered 429"), (503, "answered 503; try again later")],
)
def test_other_answers_are_named(hub: FakeHub, status: int, told: str) -> None:
    hub.status = status
    with pytest.raises(CheckpointError, match=told):
        resolve_model(MODEL)


def test_no_hub_at_all(hub: FakeHub) -> None:
    hub.stop()
    with pytest.raises(CheckpointError, match=rf"there is no folder owner/name; .* {hub.url} cannot be reached; check the network"):
        resolve_model(MODEL)


def test_a_broken_download_goes_on_where_it_broke(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    weights = bytes(range(256)) * 400
    hub.add(MODEL, {**FILES, "model.safetensors": weights})
    hub.cut["model.safetensors"] = 70_000
    assert (resolve_model(MODEL) / "model.safetensors").read_bytes() == weights
    assert hub.fetched.count("model.safetensors") == 2


def test_a_connection_that_stays_broken_is_said_and_complete_files_are_kept(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.add(MODEL, FILES)
    hub.cut["model.safetensors"], hub.is_cutting_on = 0, True
    with pytest.raises(CheckpointError, match=f"owner/name: the connection to {hub.url} failed .* check the network and try again"):
        resolve_model(MODEL)
    hub.cut.clear()
    hub.fetched.clear()
    assert names(resolve_model(MODEL)) == WANTED
    assert "model.safetensors" in hub.fetched
    assert len(hub.fetched) < len(WANTED)


def test_files_that_are_complete_are_not_fetched_again(hub: FakeHub) -> None:
    repo = hub.add(MODEL, FILES)
    resolve_model(MODEL)
    repo.revisions["main"] = {**FILES, "config.json": b'{"a": 1}'}
    hub.fetched.clear()
    resolve_model(MODEL)
    assert hub.fetched == ["config.json"]


def test_pickle_weights_come_only_when_asked_for(hub: FakeHub) -> None:
    only_pickle = {"config.json": b"{}", "pytorch_model.bin": b"pickle", "training_args.bin": b"pickle"}
    hub.add(MODEL, only_pickle)
    with pytest.raises(CheckpointError, match=r"no safetensors.*run code.*set allow_pickle"):
        resolve_model(MODEL)
    assert "pytorch_model.bin" not in hub.fetched
    assert names(resolve_model(MODEL, allow_pickle=True)) == {"config.json", "pytorch_model.bin"}
    assert names(resolve_model(MODEL, allow_pickle=True, local_files_only=True)) == {"config.json", "pytorch_model.bin"}
    hub.add("both/kinds", FILES)
    assert names(resolve_model("both/kinds", allow_pickle=True)) == WANTED


def test_links_of_the_shared_store_are_followed_and_others_are_not(tmp_path: Path) -> None:
    digest = "ab" * 32
    folder, store = tmp_path / "models--o--n" / "snapshots" / "abc", tmp_path / "blobs" / "ab"
    blobs = tmp_path / "models--o--n" / "blobs"
    for path in (folder, store, blobs):
        path.mkdir(parents=True)
    (store / digest).touch()
    (blobs / "etag").symlink_to(store / digest)
    (folder / "shared").symlink_to(blobs / "etag")
    check_inside(folder / "shared", folder)
    (tmp_path / "blobs" / "other").touch()
    (folder / "other").symlink_to(tmp_path / "blobs" / "other")
    with pytest.raises(CheckpointError, match="leads outside"):
        check_inside(folder / "other", folder)


def test_uploads_make_the_repository_the_branch_and_one_commit(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    for name, data in (("config.json", b"{}"), ("model.safetensors", bytes(50))):
        (tmp_path / "out" / name).write_bytes(data)
    address = upload_folder(tmp_path / "out", MODEL, private=True, revision="v2", message="Add it", token=TOKEN)
    assert hub.commits == [(MODEL, "v2", "Add it")]
    assert address.startswith(f"{hub.url}/{MODEL}/commit/")
    assert hub.repos[MODEL].is_private
    assert hub.repos[MODEL].revisions["v2"] == {"config.json": b"{}", "model.safetensors": bytes(50)}
    assert hub.repos[MODEL].revisions["main"] == {}


def test_uploads_need_a_name_and_a_login(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'name' is not a hub id; give owner/name"):
        upload_folder(tmp_path, "name", message="x")
    with pytest.raises(CheckpointError, match="hf auth login"):
        upload_folder(tmp_path, MODEL, message="x")


PROBE = """
from llavakit.errors import CheckpointError
from llavakit.storage.hub import resolve_model
for model in ("owner/name", "double..dot/name"):
    try:
        print(resolve_model(model).name)
    except CheckpointError as error:
        print(error)
"""


def probe(environment: dict[str, str]) -> list[str]:
    done = subprocess.run([sys.executable, "-c", PROBE], env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_the_environment_names_hub_cache_and_offline_use(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(MODEL, FILES)
    online = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    offline = {**online, "HF_HUB_OFFLINE": "1"}
    assert "looking on the hub is switched off" in probe(offline)[0]
    assert not hub.tokens
    first, second = probe(online)
    assert first == commit_of(FILES)
    assert "allows no such name" in second
    assert f"Bearer {TOKEN}" in hub.tokens
    hub.stop()
    assert probe(offline)[0] == commit_of(FILES)


def test_what_was_trained_beside_an_adapter_comes_with_it(hub: FakeHub) -> None:
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x", "non_lora_trainables.bin": b"y", "optimizer.bin": b"z"}
    hub.add("owner/lora", files)
    assert {path.name for path in resolve_model("owner/lora").iterdir()} == set(files) - {"optimizer.bin"}
    hub.add("owner/whole", {"config.json": b"{}", "model.safetensors": b"x", "non_lora_trainables.bin": b"y"})
    assert {path.name for path in resolve_model("owner/whole").iterdir()} == {"config.json", "model.safetensors"}


def test_folders_are_called_as_people_call_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert name_of_folder(tmp_path / "models--owner--a-b--c" / "snapshots" / "0f3a") == "owner/a-b--c"
    assert name_of_folder(tmp_path / "model") == "model"
    monkeypatch.chdir(tmp_path)
    assert name_of_folder(Path()) == tmp_path.name
