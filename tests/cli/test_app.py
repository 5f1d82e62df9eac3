"""The shell around the commands: help, version, exit codes, signals and what is imported when."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kvfold as package
from kvfold.cli import app

from .conftest import Kvfold


def test_alone_it_shows_help(kvfold: Kvfold) -> None:
    result = kvfold()
    assert result.returncode == 0
    for command in ("generate", "calibrate", "eval", "info", "demo"):
        assert command in result.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["--version"]) == 0
    assert capsys.readouterr().out == f"kvfold {package.__version__}\n"


@pytest.mark.parametrize("command", [["generate"], ["calibrate"], ["eval"], ["eval", "perplexity"], ["info"], ["demo"]])
def test_every_command_has_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main([*command, "--help"]) == 0
    assert "Usage: kvfold" in capsys.readouterr().out


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from kvfold.cli.app import main; main(['--help']); main(['generate', '--help']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_package_names_are_lazy_and_complete() -> None:
    assert set(package.__all__) <= set(dir(package))
    assert package.SamplingParams(max_tokens=3).max_tokens == 3
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        _ = package.LMM


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generte"], "Did you mean 'generate'?"),
        (["generate", "--promt", "x"], "--prompt"),
        (["generate", "--max-tokens", "many"], "--max-tokens"),
        (["generate"], "give --prompt TEXT or --prompt-file FILE"),
        (["generate", "--prompt", " "], "A prompt is empty"),
        (["generate", "--prompt", "x", "--kv", "zeroc(bits=4"], "the parenthesis is not closed: add ')'"),
        (["generate", "--prompt", "x", "--kv-memory", "lots"], "write a size such as '1GiB'"),
        (["generate", "--prompt", "x", "--temperature", "-1"], "temperature=-1.0 is not allowed"),
        (["generate", "--prompt-file", "/nonexistent/prompt"], "/nonexistent/prompt"),
        (["eval", "perplexity"], "Missing option '--text'"),
        (["eval", "perplexity", "--text", "x", "--kv", ""], "use 'none'"),
        (["info", "--memory", "0"], "write a size such as '1GiB'"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.startswith("kvfold: ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe\x00", b"text\x00text"])
def test_prompt_files_must_hold_text(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompt"
    file.write_bytes(content)
    assert app.main(["generate", "--prompt-file", str(file)]) == 2
    assert str(file) in capsys.readouterr().err


def test_interrupt_is_quiet_and_130(tmp_path: Path) -> None:
    fifo = tmp_path / "prompt"
    os.mkfifo(fifo)  # reading it blocks until someone writes, so the process is surely at work
    command = Path(sys.executable).with_name("kvfold")
    process = subprocess.Popen(
        [command, "generate", "--prompt-file", fifo],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite that runs in the background of a shell inherits an ignored SIGINT, and so would this process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while True:
        try:
            writer = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError:  # nobody reads yet
            time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    os.close(writer)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


def test_a_closed_pipe_is_quiet() -> None:
    command = Path(sys.executable).with_name("kvfold")
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run([command, "--help"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert result.returncode == 1
    assert result.stderr == ""
