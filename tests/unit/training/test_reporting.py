"""What a run writes down: metrics without holes or repeats, progress, the loss curve."""

import json
from pathlib import Path

import pytest

from llavakit.errors import TrainingError
from llavakit.training.reporting import RunReporter, StepRecord, write_loss_curve


def record(step: int, *, loss: float = 1.0, num_tokens: int = 100) -> StepRecord:
    return StepRecord(
        step=step,
        loss=loss,
        lr=0.1,
        grad_norm=2.0,
        shares={"right": 0.5},
        num_tokens=num_tokens,
        num_samples=4,
        flops=3e12,
        memory_bytes=2 * 10**9,
        wait_s=0.1,
        step_s=0.5,
    )


def reporter(path: Path, *, is_terminal: bool = False) -> RunReporter:
    return RunReporter(path, log_every_s=0.0, is_terminal=is_terminal)


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_line_holds_rates_and_shares(tmp_path: Path) -> None:
    assert record(3).to_dict() == {
        "step": 3, "loss": 1.0, "lr": 0.1, "grad_norm": 2.0, "right": 0.5, "tokens_per_s": 200.0, "samples_per_s": 8.0,
        "tflops_per_s": 6.0, "memory_gb": 2.0, "wait_share": 0.2,
    }  # fmt: skip
    assert record(3, loss=float("nan")).to_dict()["loss"] is None
    assert "tokens_per_s" not in record(3, num_tokens=0).to_dict()


def test_the_share_of_the_peak_is_told_where_the_peak_is_known(tmp_path: Path) -> None:
    ours = RunReporter(tmp_path / "metrics.jsonl", log_every_s=0.0, is_terminal=False, peak_flops=24e12)
    ours.begin(0, 1)
    ours.record(record(0))
    ours.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["mfu"] == 0.25


def test_a_resumed_run_forgets_later_steps_and_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = reporter(path)
    first.begin(0, 9)
    for step in range(5):
        first.record(record(step))
    path.write_bytes(path.read_bytes() + b'{"step": 5, "lo')
    second = reporter(path)
    second.begin(3, 9)
    second.record(record(3))
    second.close()
    first.close()
    assert steps(path) == [0, 1, 2, 3]


def test_missing_steps_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="lacks steps before 4"):
        reporter(tmp_path / "metrics.jsonl").begin(4, 9)


def test_lines_are_in_the_file_before_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    ours = reporter(path)
    ours.begin(0, 2)
    ours.record(record(0))
    ours.sync()
    assert steps(path) == [0]
    ours.close()


def test_progress_is_logged_where_there_is_no_terminal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = reporter(tmp_path / "metrics.jsonl")
    with caplog.at_level("INFO"):
        ours.begin(0, 2)
        ours.record(record(0))
        ours.close()
    assert "step 1/2" in caplog.text


def test_a_terminal_gets_a_live_line_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    ours = reporter(tmp_path / "metrics.jsonl", is_terminal=True)
    with caplog.at_level("INFO"):
        ours.begin(0, 2)
        ours.record(record(0))
        ours.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "1/2" in captured.err
    assert not caplog.text


def test_the_loss_curve_skips_what_is_not_a_number(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": step, "loss": None if step == 60 else 2.0}) + "\n" for step in range(120)))
    write_loss_curve(metrics, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
