"""The files that put a server into production: they parse, name options that exist, and ask for paths that are served."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from llavakit.cli.main import build_app

FOLDER = Path(__file__).parents[2] / "examples" / "serving"


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command line of `llava serve` in the files."""
    container = (FOLDER / "Containerfile").read_text()
    entry = ["serve", "--host", "0.0.0.0"]
    assert f"ENTRYPOINT {str(['llava', *entry]).replace(chr(39), chr(34))}" in container
    yield "container", [*entry, *yaml.safe_load(re.findall(r"^CMD (.*)$", container, re.MULTILINE)[-1])]
    yield "compose", [*entry, *document("compose.yaml")["services"]["llava"]["command"]]
    deployment = next(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()))
    yield "kubernetes", [*entry, *deployment["spec"]["template"]["spec"]["containers"][0]["args"]]
    job = next(yaml.safe_load_all((FOLDER / "kuberay.yaml").read_text()))
    yield "kuberay", shlex.split(job["spec"]["entrypoint"])[1:]
    unit = (FOLDER / "llavakit.service").read_text()
    yield "systemd", shlex.split(re.findall(r"^ExecStart=\S+/llava (.*)$", unit, re.MULTILINE)[0])


def document(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


@pytest.mark.parametrize(("name", "arguments"), commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_commands_have_options_that_exist(name: str, arguments: list[str]) -> None:
    build_app().parse_args(arguments, exit_on_error=False, print_error=False)
    assert "--api-key-file" in arguments


def test_the_container_copies_what_is_there_and_stays_unprivileged() -> None:
    text = (FOLDER / "Containerfile").read_text()
    root = FOLDER.parents[1]
    for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        for name in line.split():
            assert (root / name).exists(), name
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE) == ["llava"]
    extras = re.findall(r"\.\[([\w,]+)\]", text)[0].split(",")
    assert all(f"\n{extra} = [" in (root / "pyproject.toml").read_text() for extra in extras)


def test_the_cluster_files_belong_together() -> None:
    deployment, service = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]
    assert deployment["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"] == service["spec"]["selector"]
    (container,) = pod["spec"]["containers"]
    assert container["ports"][0]["containerPort"] == service["spec"]["ports"][0]["targetPort"]
    assert {probe["httpGet"]["path"] for probe in (container["startupProbe"], container["livenessProbe"])} == {"/health"}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["spec"]["volumes"]}
    composed = document("compose.yaml")
    assert set(composed["services"]["llava"]["secrets"]) == composed["secrets"].keys()


def test_the_ray_files_belong_together() -> None:
    job, service = yaml.safe_load_all((FOLDER / "kuberay.yaml").read_text())
    spec = job["spec"]["rayClusterSpec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    assert spec["headGroupSpec"]["template"]["metadata"]["labels"] == service["spec"]["selector"]
    for group in groups:
        pod = group["template"]["spec"]
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert job["spec"]["entrypoint"].startswith("llava serve --cluster --ray-address auto")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_unit_is_one(tmp_path: Path) -> None:
    text = (FOLDER / "llavakit.service").read_text().replace("/opt/llavakit/bin/llava", "/bin/true")
    (tmp_path / "llavakit.service").write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", str(tmp_path / "llavakit.service")], capture_output=True, text=True, timeout=60)
    assert "llavakit.service:" not in done.stderr, done.stderr
