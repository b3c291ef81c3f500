# SPDX-License-Identifier: Apache-2.0
"""The command line: what each command prints, writes and ends with."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from batiste import checkpoint
from batiste.cli import main
from tests.cli.blobs import Config, blobs, points

BLOBS = str(Path(__file__).with_name("blobs.py"))
PROGRAM = f"{BLOBS}:blobs"


def test_help_lists_the_commands_quickly_and_without_jax() -> None:
    program = (
        "import sys, batiste.cli\n"
        "try: batiste.cli.main(['--help'])\n"
        "finally: print('jax' in sys.modules, file=sys.stderr)"
    )
    since = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert time.monotonic() - since < 2
    assert (ended.returncode, ended.stderr) == (0, "False\n")
    for word in ("train", "evaluate", "compare", "inspect", "exit codes: 0 done"):
        assert word in ended.stdout


def test_the_package_is_a_command() -> None:
    ended = subprocess.run([sys.executable, "-m", "batiste", "fly"], capture_output=True, text=True)
    assert ended.returncode == 2
    assert "invalid choice: 'fly'" in ended.stderr


def test_help_of_a_program_shows_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", PROGRAM, "--help"]) == 0
    out = capsys.readouterr().out
    assert "usage: batiste train" in out
    assert "  activation      relu | gelu       = relu" in out
    assert "  optimizer.lr    float             = 0.05      learning rate" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "Which program?: expected batiste train PROGRAM.py:NAME"),
        (["train", "nothing.py:f"], "There is no such program: got 'nothing.py'"),
        (["train", BLOBS], f"Which function of {BLOBS}?: expected one of {BLOBS}:blobs"),
        (["train", f"{BLOBS}:blob"], "did you mean 'blobs'?"),
        (["train", f"{BLOBS}:nothing"], "made no experiment: got NoneType"),
        (["train", f"{BLOBS}:two"], "has the wrong arguments: got (a: 'int', b: 'int')"),
        (["train", f"{BLOBS}:model_alone"], "needs more than"),
        (["train", f"{BLOBS}:model_alone", "--set", "a=1"], "takes no settings: got a=1"),
        (["train", PROGRAM, "--set", "optimizer.ls=1"], "did you mean 'optimizer.lr'?"),
        (["train", PROGRAM, "--require", "f1=0.9"], "There is no metric 'f1': expected one of accuracy, loss"),
        (["evaluate", PROGRAM, "--require", "accuracy=high"], "The threshold of accuracy is no number"),
        (["compare", PROGRAM, "one"], "Which checkpoints?"),
    ],
)
def test_a_wrong_command_ends_with_2_and_a_reason(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"batiste {arguments[0]}: ")
    assert message in error
    assert "Traceback" not in error


def test_a_program_that_fails_is_no_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", f"{BLOBS}:broken"]) == 3
    assert "RuntimeError: the data are on another machine" in capsys.readouterr().err


def test_a_program_may_not_hide_a_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "json.py").write_text("")
    assert main(["train", str(tmp_path / "json.py")]) == 2
    assert "cannot have the name of a module that is in use, json" in capsys.readouterr().err


def test_training_ends_with_figures_and_a_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "figures.json"
    assert main(["train", PROGRAM, "--set", "steps=40", "--json", str(figures)]) == 0
    assert "met:    accuracy" in capsys.readouterr().out
    assert json.loads(figures.read_text())["figures"]["accuracy"] > 0.9
    assert main(["train", PROGRAM, "--set", "steps=2", "--require", "accuracy=1"]) == 1
    assert "MISSED: accuracy" in capsys.readouterr().out


def test_a_training_that_breaks_down_is_a_negative_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", PROGRAM, "--set", "apart=nan"]) == 1
    assert "batiste train: " in capsys.readouterr().err


def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [f"{BLOBS}:kept", "--set", f"folder={tmp_path / 'run'}", "--set", "steps=40"]
    assert main(["evaluate", *command]) == 2
    assert "There is no checkpoint" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["train", *command, "--set", "stop_at=7"])
    assert stopped.value.code == 130
    assert "stopped by SIGINT after step 7" in capsys.readouterr().err
    assert main(["train", *command]) == 0
    figures = capsys.readouterr().out
    assert main(["evaluate", *command]) == 0
    assert capsys.readouterr().out == figures
    assert main(["train", PROGRAM, "--set", "steps=40"]) == 0
    assert capsys.readouterr().out == figures, "as without the interruption"


def test_a_fast_run_has_no_verdict_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", PROGRAM, "--fast-dev-run", "--folder", str(tmp_path)]) == 0
    assert not list(tmp_path.iterdir())
    assert "step 3 of 3" in capsys.readouterr().err


def test_inspect_shows_calls_values_and_precision(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", PROGRAM, "--set", "sizes=8,4"]) == 0
    out = capsys.readouterr().out
    assert "Net Summary" in out
    assert "\x1b" not in out
    assert "layers/layers/1/kernel  Param  float32[8, 4]  128 B" in out
    assert "layers/layers/1  Linear  float32  bfloat16" in out
    assert main(["inspect", f"{BLOBS}:model_alone"]) == 0
    assert "The table of calls needs the arguments of one" in capsys.readouterr().out


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model as it was made, and one that was trained, as a file of its own and as the folder of a run."""
    folder = tmp_path_factory.mktemp("checkpoints")
    made = blobs(Config())
    checkpoint.save(folder / "new.ckpt", made.model)
    for _ in range(40):
        made.step(*made.state, points(Config(), 0))  # pyright: ignore[reportOptionalCall]
    checkpoint.save(folder / "trained.ckpt", made.model)
    with checkpoint.Manager(folder / "run" / "checkpoints") as manager:
        manager.save(40, {"state": made.state, "run": 40})
    return {"new": folder / "new.ckpt", "trained": folder / "trained.ckpt", "run": folder / "run"}


def test_a_checkpoint_is_evaluated_wherever_it_is(
    checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    figures = []
    for place in (
        checkpoints["trained"],
        checkpoints["run"],
        checkpoints["run"] / "checkpoints",
        checkpoints["run"] / "checkpoints" / "0000000040.ckpt",
    ):
        assert main(["evaluate", PROGRAM, "--from", str(place)]) == 0
        figures.append(capsys.readouterr().out)
    assert len(set(figures)) == 1
    assert main(["evaluate", PROGRAM, "--from", str(checkpoints["new"])]) == 1
    assert capsys.readouterr().out != figures[0]
    assert main(["evaluate", PROGRAM]) == 1
    assert "the model is as the program makes it" in capsys.readouterr().err


def test_two_checkpoints_are_compared(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new, trained, file = str(checkpoints["new"]), str(checkpoints["run"]), tmp_path / "changes.json"
    assert main(["compare", PROGRAM, new, trained, "--json", str(file)]) == 0
    assert "better in loss: examples" in capsys.readouterr().out
    assert json.loads(file.read_text())["changes"]["loss"]["verdict"] == "better"
    assert main(["compare", PROGRAM, trained, new]) == 1
    assert "worse" in capsys.readouterr().out


def test_checkpoints_that_cannot_be_used_are_explained(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(checkpoints["trained"].read_bytes()[:-9])
    empty = tmp_path / "empty"
    empty.mkdir()
    for place, message in (
        (tmp_path / "nowhere", "There is no checkpoint"),
        (empty, "no checkpoint"),
        (damaged, "damaged"),
    ):
        assert main(["evaluate", PROGRAM, "--from", str(place)]) == 2
        assert message in (error := capsys.readouterr().err)
        assert "Traceback" not in error
    assert main(["evaluate", PROGRAM, "--from", str(checkpoints["trained"]), "--set", "sizes=9"]) == 2
    assert "layers/layers/0/kernel" in capsys.readouterr().err
