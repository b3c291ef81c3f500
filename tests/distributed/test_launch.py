# SPDX-License-Identifier: Apache-2.0
"""launch: output with numbers, the exit code of the first failure, signals passed on, nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from batiste.distributed import launch
from batiste.distributed.launch import main
from batiste.graph.errors import ArgumentError

ME = "import os, sys, time, signal; me = int(os.environ['JAX_PROCESS_ID'])\n"


def program(folder: Path, text: str) -> str:
    path = folder / "program.py"
    path.write_text(ME + text)
    return str(path)


def test_each_process_knows_its_place_and_its_lines_have_its_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_other=1")
    monkeypatch.delenv("NPROC", raising=False)
    names = ("JAX_NUM_PROCESSES", "JAX_COORDINATOR_ADDRESS", "XLA_FLAGS", "NPROC")
    text = f"print(me, sys.argv[1:], *[os.environ[n] for n in {names}])\nprint('bad', me, file=sys.stderr)"
    assert launch([program(tmp_path, text), "--x", "1"], 3, devices=4, port=1234) == 0
    said, bad = capsys.readouterr()
    flags = "--xla_other=1 --xla_force_host_platform_device_count=4"
    assert sorted(said.splitlines()) == [
        f"[{i}] {i} ['--x', '1'] 3 127.0.0.1:1234 {flags} 16".replace("  ", " ") for i in range(3)
    ]
    assert sorted(bad.splitlines()) == [f"[{i}] bad {i}" for i in range(3)]


def test_when_one_fails_all_are_ended_and_its_code_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('pid', os.getpid(), flush=True)\n"
    text = stubborn + "while me == 0: time.sleep(1)\ntime.sleep(0.5); sys.exit(7)"
    began = time.monotonic()
    assert launch([program(tmp_path, text)], 2, grace=0.3) == 7
    assert time.monotonic() - began < 10
    said, bad = capsys.readouterr()
    assert bad == "launch: process 1 failed with exit code 7. Ending the others.\n"
    for line in said.splitlines():
        with pytest.raises(ProcessLookupError):
            os.kill(int(line.split()[-1]), 0)


def test_a_process_that_a_signal_ended_gives_128_and_the_signal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch([program(tmp_path, "if me: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)")], 2) == 137
    assert "process 1 was ended by SIGKILL" in capsys.readouterr().err


def test_an_abort_that_follows_from_another_end_is_not_taken_for_the_cause(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "if me: time.sleep(0.2)\nos.kill(os.getpid(), signal.SIGKILL if me else signal.SIGABRT)"
    assert launch([program(tmp_path, text)], 2) == 137
    assert "process 1 was ended by SIGKILL" in capsys.readouterr().err
    assert launch([program(tmp_path, "os.kill(os.getpid(), signal.SIGABRT)")], 2) == 134, "both aborted: the first"
    assert "was ended by SIGABRT" in capsys.readouterr().err


def test_a_signal_is_passed_on(tmp_path: Path) -> None:
    text = (
        "def end(number, _):\n    print('got', number, flush=True); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\nprint('ready', flush=True)\ntime.sleep(60)"
    )
    command = [sys.executable, "-m", "batiste.distributed", "launch", "-n", "2", program(tmp_path, text)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    ready = sorted(running.stdout.readline() for _ in range(2))
    assert ready == ["[0] ready\n", "[1] ready\n"]
    running.send_signal(signal.SIGTERM)
    said, _ = running.communicate(timeout=30)
    assert sorted(said.splitlines()) == ["[0] got 15", "[1] got 15"]
    assert running.returncode == 128 + signal.SIGTERM


def test_any_command_can_be_launched(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "-n", "1", sys.executable, "-c", "print('hello')"]) == 0
    assert capsys.readouterr().out == "[0] hello\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["launch", "nowhere.py"], "there is no such program: got nowhere.py"),
        (["launch", "no-such-command"], "Fix: for a module, write: python -m MODULE"),
        (["launch", "-n", "0", "x.py"], "got '0', expected a whole number above zero"),
        (["launch"], "required: PROGRAM"),
    ],
)
def test_wrong_arguments_end_with_status_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(argv)
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["launch", "--help"])
    assert "launch -n 2 --devices 4 train.py" in " ".join(capsys.readouterr().out.split())


def test_launch_refuses_no_processes() -> None:
    with pytest.raises(ArgumentError, match="wrong devices: got 0, expected 1 or more"):
        launch([sys.executable], 1, devices=0)
