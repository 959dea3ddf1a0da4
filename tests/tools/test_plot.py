"""``flame-ext plot``: what is drawn is what the file says."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from flame_ext.tools.main import main
from flame_ext.tools.plot import draw, read_metrics


def write(folder: Path, lines: list[dict[str, Any]], rest: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + rest)
    return folder


LINES = [
    {"step": 1, "loss_ce": 2.5, "loss_future": None, "future_top1": 0.0, "note": "text"},
    {"step": 2, "loss_ce": 2.0, "loss_future": 7.5, "future_top1": 0.25},
    {"step": 4, "loss_ce": 1.5, "loss_future": 7.0, "future_top1": 0.5},
]


def test_lines_have_the_values_of_the_file(tmp_path: Path) -> None:
    a = write(tmp_path / "a", LINES, rest='{"step": 5, "loss')  # killed while it wrote
    b = write(tmp_path / "b", [{"step": 3, "loss_ce": 4.0}])
    figure = draw([("a", read_metrics(a)), ("b", read_metrics(b / "metrics.jsonl"))])
    drawn = {
        panel.get_title(): [(line.get_label(), list(line.get_xdata()), list(line.get_ydata())) for line in panel.lines]
        for panel in figure.axes
    }
    assert drawn == {
        "loss_ce": [("a", [1, 2, 4], [2.5, 2.0, 1.5]), ("b", [3], [4.0])],
        "loss_future": [("a", [2, 4], [7.5, 7.0])],
        "future_top1": [("a", [1, 2, 4], [0.0, 0.25, 0.5])],
    }


@pytest.mark.parametrize(("name", "begin"), [("curves.png", b"\x89PNG"), ("deep/curves.svg", b"<?xml")])
def test_a_picture_is_written(tmp_path: Path, capsys: pytest.CaptureFixture, name: str, begin: bytes) -> None:
    run = write(tmp_path / "run", LINES)
    assert main(["plot", str(run), "--output", str(tmp_path / name), "--metrics", "loss_ce"]) == 0
    assert (tmp_path / name).read_bytes().startswith(begin) and "Drew run to" in capsys.readouterr().out


def test_a_run_is_called_as_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = (write(tmp_path / name, LINES) for name in "ab")
    monkeypatch.chdir(a)
    assert main(["plot", ".", str(b / "metrics.jsonl")]) == 0
    assert "Drew a, b to curves.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "name the dump folder of a run"),
        (["empty"], "holds no step with a number"),
        (["broken"], "line 1: not a step of a run"),
        (["cut"], "line 2: not a step of a run"),
        (["run", "--metrics", "loss_ce", "loss_x"], "no run has loss_x; there are: future_top1, loss_ce, loss_future"),
        (["run", "--labels", "a", "b"], "--labels names 2, for 1 runs"),
        (["run", "--output", "curves.gif"], "expected a name that ends in .png"),
    ],
)
def test_bad_input_gets_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("run"), LINES)
    write(Path("empty"), [])
    write(Path("broken"), [{"loss": 1.0}, {"step": 2}])
    write(Path("cut"), LINES[:1], rest='{"step": 2, "lo\n{"step": 3, "loss_ce": 1.0}\n')
    assert main(["plot", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1
    assert not list(tmp_path.glob("curves.*"))


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, real = write(tmp_path / "run", LINES), builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["plot", str(run), "--output", str(tmp_path / "a.png")]) == 2
    assert "pip install 'flame_ext[plot]'" in capsys.readouterr().err
