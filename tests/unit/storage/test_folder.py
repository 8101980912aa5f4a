"""storage.folder: a folder appears whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import functools
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.harness import write_result
from llavakit.errors import StorageError
from llavakit.storage import folder as module
from llavakit.storage.folder import MANIFEST_NAME, FileEntry, atomic_folder, manifest_problems, new_folder, read_manifest, remove_unfinished

FILES = ("a.txt", "b.bin", "sub/c.txt")


def save(destination: Path, text: str) -> None:
    with atomic_folder(destination, overwrite=True) as temporary:
        for name in FILES:
            path = temporary / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text * 1000, encoding="utf-8")


def contents(destination: Path) -> set[str]:
    return {(destination / name).read_text(encoding="utf-8")[:1] for name in FILES}


def neighbours(destination: Path) -> list[str]:
    return sorted(path.name for path in destination.parent.iterdir())


def run_forked(work: Callable[[], None]) -> int:
    """Run work in a forked child; return its exit status, or minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_new_folder_has_a_manifest_that_holds(tmp_path: Path) -> None:
    save(tmp_path / "out", "x")
    entries = read_manifest(tmp_path / "out")
    assert entries is not None
    assert sorted(entries) == sorted(FILES)
    assert manifest_problems(tmp_path / "out", check_hashes=True) == []
    assert neighbours(tmp_path / "out") == ["out"]


def test_overwriting_replaces_everything(tmp_path: Path) -> None:
    save(tmp_path / "out", "x")
    (tmp_path / "out" / "stray").touch()
    save(tmp_path / "out", "y")
    assert contents(tmp_path / "out") == {"y"}
    assert not (tmp_path / "out" / "stray").exists()


def test_overwriting_must_be_allowed(tmp_path: Path) -> None:
    save(tmp_path / "out", "x")
    with pytest.raises(StorageError, match="exists"), atomic_folder(tmp_path / "out", overwrite=False):
        pytest.fail("the block must not run")
    assert contents(tmp_path / "out") == {"x"}


def test_folder_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="unchanged"), atomic_folder(tmp_path / "out", overwrite=False):
        save(tmp_path / "out", "x")
    assert contents(tmp_path / "out") == {"x"}


def test_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(StorageError, match="is a file"):
        save(tmp_path / "out", "x")


def test_working_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    for destination in (Path(), tmp_path):
        with pytest.raises(StorageError, match="working directory"):
            save(destination, "x")


def test_link_is_followed(tmp_path: Path) -> None:
    save(tmp_path / "real", "x")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(tmp_path / "link", "y")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "real") == {"y"}


def test_carried_files_and_folders_survive(tmp_path: Path) -> None:
    out = tmp_path / "out"
    save(out, "x")
    (out / "notes.md").write_text("mine", encoding="utf-8")
    (out / "deep" / "er").mkdir(parents=True)
    (out / "deep" / "er" / "file").write_text("mine too", encoding="utf-8")
    with atomic_folder(out, overwrite=True, carry=lambda name: not name.endswith(".bin")) as temporary:
        (temporary / "a.txt").write_text("new", encoding="utf-8")
    assert (out / "a.txt").read_text(encoding="utf-8") == "new"
    assert (out / "notes.md").read_text(encoding="utf-8") == "mine"
    assert (out / "deep" / "er" / "file").read_text(encoding="utf-8") == "mine too"
    assert not (out / "b.bin").exists()
    assert manifest_problems(out, check_hashes=True) == []


def fail_while_saving(destination: Path) -> None:
    with atomic_folder(destination, overwrite=True) as temporary:
        (temporary / "a.txt").touch()
        raise ZeroDivisionError


def test_error_in_the_block_leaves_the_old_folder(tmp_path: Path) -> None:
    save(tmp_path / "out", "x")
    with pytest.raises(ZeroDivisionError):
        fail_while_saving(tmp_path / "out")
    assert contents(tmp_path / "out") == {"x"}
    assert neighbours(tmp_path / "out") == ["out"]


def test_full_disk_leaves_the_old_folder(tmp_path: Path) -> None:
    save(tmp_path / "out", "x")

    def save_with_small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
        with pytest.raises(StorageError, match="what was there before is unchanged"):
            save(tmp_path / "out", "y")

    assert run_forked(save_with_small_disk) == 0
    assert contents(tmp_path / "out") == {"x"}
    assert neighbours(tmp_path / "out") == ["out"]


def kill_at(event: int) -> None:
    """Kill this process at the given audit event (each open, rename, mkdir, removal raises one)."""
    left = event

    def hook(name: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def save_and_die(destination: Path, step: int) -> None:
    kill_at(step)
    save(destination, "1")


def kill_at_every(stride: int, out: Path, *, has_exchange: bool) -> int:
    """Kill a save at every stride-th step that the interpreter reports, and return how many steps it has."""
    save(out, "0")
    seen = set()
    for step in range(0, 1000, stride):
        if run_forked(functools.partial(save_and_die, out, step)) == 0:
            break
        if has_exchange:
            assert manifest_problems(out, check_hashes=True) == []
            seen |= contents(out)
        save(out, "0")
        assert neighbours(out) == ["out"]
    assert step > 30
    assert contents(out) == {"1"}
    assert seen == ({"0", "1"} if has_exchange and stride == 1 else seen & {"0", "1"})
    return step


def test_unfinished_saves_of_any_folder_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".out.tmp-12-0123abcd", ".other.tmp-99999-0123abcd.old"):
        (tmp_path / name).mkdir()
    others = {"out", ".out", ".out.tmp", "out.tmp-12-0123abcd", ".out.tmp-x-0123abcd", ".out.tmp-12-0123abc"}
    for name in others:
        (tmp_path / name).mkdir()
    remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == others


def test_kill_at_sampled_steps_of_a_save_leaves_old_or_new(tmp_path: Path) -> None:
    kill_at_every(13, tmp_path / "out", has_exchange=True)


@pytest.mark.soak
@pytest.mark.parametrize("has_exchange", [True, False])
def test_kill_at_each_step_of_a_save_leaves_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_exchange: bool) -> None:
    if not has_exchange:
        monkeypatch.setattr(module, "_exchange", lambda first, second: False)
    num_kills = kill_at_every(1, tmp_path / "out", has_exchange=has_exchange)
    write_result(f"save_kills_{'exchange' if has_exchange else 'rename'}", "make soak", {"num_kills": num_kills})


def test_old_folder_comes_back_where_folders_cannot_be_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_exchange", lambda first, second: False)
    out = tmp_path / "out"
    save(out, "0")
    rename, calls = Path.rename, []

    def rename_once(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(path, target)

    def die_between_the_renames() -> None:
        monkeypatch.setattr(Path, "rename", rename_once)
        save(out, "1")

    assert run_forked(die_between_the_renames) == -signal.SIGKILL
    assert not out.exists()
    with pytest.raises(ZeroDivisionError):
        fail_while_saving(out)  # the next save need not even succeed
    assert contents(out) == {"0"}
    assert neighbours(out) == ["out"]


SAVER = """
import sys
from pathlib import Path
from llavakit.storage.folder import atomic_folder
for turn in range(10**6):
    with atomic_folder(Path(sys.argv[1]), overwrite=True) as temporary:
        (temporary / "sub").mkdir()
        for name in ("a.txt", "b.bin", "sub/c.txt"):
            (temporary / name).write_text(str(turn % 10) * 200_000)
    print(turn, flush=True)
"""


@pytest.mark.parametrize("seed", range(5))
def test_kill_at_a_random_moment_leaves_a_complete_folder(tmp_path: Path, seed: int) -> None:
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", SAVER, str(out)], stdout=subprocess.PIPE) as saver:
        assert saver.stdout is not None
        saver.stdout.readline()
        time.sleep(random.Random(seed).uniform(0, 0.05))
        saver.kill()
    assert manifest_problems(out, check_hashes=True) == []
    assert len(contents(out)) == 1
    save(out, "x")
    assert neighbours(out) == ["out"]


def test_problems_of_a_damaged_folder_are_listed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    save(out, "x")
    (out / "a.txt").unlink()
    (out / "b.bin").write_bytes(b"short")
    (out / "sub" / "c.txt").write_text("y" * 1000, encoding="utf-8")
    assert manifest_problems(out, check_hashes=False) == ["a.txt is missing", "b.bin has 5 bytes, expected 1000"]
    assert manifest_problems(out, check_hashes=True)[2] == "sub/c.txt has other contents than when it was saved"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"version": 1}', '{"version": 1, "files": {"a": 3}}', '{"version": 1, "files": [1]}']
)
def test_unreadable_manifest_is_no_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(text, encoding="utf-8")
    assert read_manifest(tmp_path) is None
    assert manifest_problems(tmp_path, check_hashes=False) != []


def test_manifest_of_a_later_version_is_an_error(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text('{"version": 2, "files": {}}', encoding="utf-8")
    with pytest.raises(StorageError, match="version 2"):
        read_manifest(tmp_path)


def test_leftovers_of_living_processes_stay(tmp_path: Path) -> None:
    mine = tmp_path / f".out.tmp-{os.getpid()}-feed"
    mine.mkdir()
    save(tmp_path / "out", "x")
    assert mine.is_dir()


def test_a_manifest_may_do_without_hashes(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out", hashes=False) as temporary:
        (temporary / "a.txt").write_text("abc")
    entries = read_manifest(tmp_path / "out")
    assert entries == {"a.txt": FileEntry(3, None)}
    assert manifest_problems(tmp_path / "out", check_hashes=True) == []
    (tmp_path / "out" / "a.txt").write_text("abcd")
    assert manifest_problems(tmp_path / "out", check_hashes=True) == ["a.txt has 4 bytes, expected 3"]
