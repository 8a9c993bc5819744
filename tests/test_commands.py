"""Common behaviour of all commands: one line for every error, exit codes, early checks, no ignored options."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from aisle.cli import run
from aisle.commands import show_rows
from aisle.commands.app import PANELS, app
from aisle.commands.load import program
from aisle.console import cell, prepare_streams, print_json, say_next
from aisle.errors import InputError, OutputClosed
from aisle.failures import TRACEBACK, failure

from .conftest import Server, wait_for

Tool = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Tool:
    """Run a command in this process, in its own folder; return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def called(*arguments: object) -> tuple[int, str, str]:
        code = run([str(each) for each in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return called


def refused(answer: tuple[int, str, str], complaint: str) -> None:
    """Check that an answer is exit code 2 and one line."""
    code, out, err = answer
    assert code == 2, err
    assert out == ""
    assert complaint in err
    assert "Traceback" not in err
    assert err.startswith("aisle: ")
    assert len(err.splitlines()) == 1


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.csv"
    path.write_text("text,category\nred apples,fruit\nphone case,phones\n")
    return path


# What cannot be read, written or reached


def test_a_text_longer_than_a_file_name_is_a_text(tool: Tool, server: Server) -> None:
    code, out, err = tool("classify", "红富士苹果" * 20, "--url", server.url, "--json")
    assert code == 0, err
    assert len(json.loads(out)["predictions"]) == 1


def test_no_text_is_taken_for_a_path(tool: Tool, server: Server) -> None:
    for text in ("a\0b", "x" * 5000, "/" * 300):
        assert tool("classify", text, "--url", server.url, "--json")[0] in (0, 2)


@pytest.mark.parametrize("command", [("rollback",), ("deploy", "--version", "3"), ("deploy",)])
def test_a_missing_repository(tool: Tool, command: tuple[str, ...], tmp_path: Path) -> None:
    refused(tool(*command, "--repository", tmp_path / "missing"), "missing")


def test_the_folder_of_an_output_is_created(tool: Tool, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder" / "sample.csv"
    assert tool("sample", "-o", out, "--rows", 5)[0] == 0
    assert len(out.read_text("utf-8").splitlines()) > 5


def test_a_refused_command_creates_no_folder(tool: Tool, tmp_path: Path) -> None:
    refused(tool("sample", "-o", tmp_path / "new" / "sample.csv", "--rows", 0), "--rows")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("out", "complaint"), [("table.csv/x.csv", "is not a folder"), (".", "is a folder"), ("/proc/x.csv", "")]
)
def test_an_output_that_cannot_be_written(tool: Tool, table: Path, out: str, complaint: str) -> None:
    refused(tool("clean", table, "-o", out), complaint)


@pytest.mark.skipif(os.getuid() == 0, reason="root may read and write everywhere")
def test_no_permission(tool: Tool, table: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(0o500)
    refused(tool("clean", table, "-o", tmp_path / "closed" / "a.csv"), "no permission")
    table.chmod(0)
    refused(tool("clean", table, "-o", "a.csv"), "no permission")


@pytest.mark.parametrize("command", ["clean", "train", "ablate", "search", "stages", "study", "pretrain"])
def test_a_table_that_is_missing_or_a_folder(tool: Tool, tmp_path: Path, command: str) -> None:
    refused(tool(command, "missing.csv", "-o", "out.csv"), "missing.csv: no such file")
    refused(tool(command, tmp_path, "-o", "out.csv"), "is a folder")
    assert list(tmp_path.iterdir()) == []


def test_deeply_nested_json(tool: Tool, tmp_path: Path) -> None:
    (tmp_path / "deep.jsonl").write_text('{"text": ' + "[" * 200_000 + "}\n")
    code, _, err = tool("clean", "deep.jsonl", "-o", "out.csv")
    assert code == 2
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("aisle: ")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (FileNotFoundError(2, "No such file or directory", "a.csv"), 2, "a.csv: no such file or directory"),
        (PermissionError(13, "Permission denied", b"a.csv"), 2, "a.csv: permission denied; check its permissions"),
        (
            OSError(28, "No space left on device"),
            2,
            "No space left on device; free some space and run the command again",
        ),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), 2, "free some space"),
        (
            shutil.Error([("a.so", "b.so", "[Errno 28] No space left on device: 'a.so'")]),
            2,
            "cannot copy a.so: [Errno 28]",
        ),
        (OSError(36, "File name too long", "x"), 2, "x: file name too long; choose a shorter name"),
        (ConnectionRefusedError(111, "Connection refused"), 1, "Connection refused"),
        (TimeoutError(), 1, "TimeoutError"),
        (MemoryError(), 1, "out of memory"),
        (RecursionError("maximum recursion depth"), 2, "nested too deeply"),
        (OutputClosed(), 141, ""),
        (KeyboardInterrupt(), 130, "stopped"),
        (InputError("mend it"), 2, "mend it"),
        (ZeroDivisionError("division by zero"), 1, f"a bug in aisle: {TRACEBACK}=1 shows the traceback"),
    ],
)
def test_every_exception_has_an_exit_code_and_one_line(error: BaseException, code: int, line: str) -> None:
    found, message = failure(error)
    assert found == code
    assert line in message
    assert "\n" not in message


def test_a_bug_is_one_line_that_names_the_place(tool: Tool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import aisle.train.synthetic.catalogue

    def broken(*_: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(aisle.train.synthetic.catalogue, "write_sample", broken)
    code, out, err = tool("sample", "-o", "a.csv")
    assert (code, out) == (1, "")
    assert "KeyError: 'surprise' (test_commands.py:" in err
    assert len(err.splitlines()) == 1
    monkeypatch.setenv(TRACEBACK, "1")
    assert "Traceback" in tool("sample", "-o", "a.csv")[2]


# Numbers and names


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("classify a --timeout nan", "--timeout"),
        ("classify a --timeout inf", "--timeout"),
        ("classify a --timeout 0", "--timeout"),
        ("classify a --timeout -1", "--timeout"),
        ("classify a --top-k 0", "--top-k"),
        ("clean table.csv -o a.csv --near nan", "--near"),
        ("train table.csv -o c --learning-rate nan", "--learning-rate"),
        ("train table.csv -o c --learning-rate inf", "--learning-rate"),
        ("drift c table.csv --days inf", "--days inf: give a finite number"),
        ("train table.csv -o c --learning-rate 0", "--learning-rate"),
        ("train table.csv -o c --learning-rate 1e9", "--learning-rate"),
        ("train table.csv -o c --layers 1000000000", "--layers"),
        ("train table.csv -o c --hidden-size 1024000", "--hidden-size"),
        ("train table.csv -o c --class-floor 1000000000", "--class-floor"),
        ("train table.csv -o c --focal 1e9", "--focal"),
        ("distil t table.csv -o c --temperature 1e9", "--temperature"),
        ("loadtest table.csv --workers 1000000000", "--workers"),
        ("loadtest table.csv --callers 1000000000", "--callers"),
        ("overload table.csv --times 1e9", "--times"),
        ("train table.csv -o c --seed -1", "--seed"),
        ("train table.csv -o c --folds 1", "two folds or more"),
        ("train table.csv -o c --hidden-size 100", "a multiple of 64"),
        ("train table.csv -o c --augment nosuch", "there is no 'nosuch'; choose from delete"),
        ("distil t table.csv -o c --augment nosuch", "there is no 'nosuch'"),
        ("stages table.csv -o c --augment nosuch", "there is no 'nosuch'"),
        ("ablate table.csv -o c --techniques nosuch", "there is no 'nosuch'; choose from none"),
        ("build c --precision int9", "there is no 'int9'; choose from int8"),
        ("build c --target nosuch", "there is no 'nosuch'; choose from openvino"),
        ("build c --gate 0.9 -1", "give two shares"),
        ("build c --gate 98 1", "give two shares"),
        ("build c --gate nan 0", "finite number"),
        ("deploy c --precision int9", "there is no 'int9'"),
        ("frontier c table.csv --precisions int9", "there is no 'int9'"),
        ("bench nosuch", "there is no 'nosuch'; choose from engines"),
        ("bench services --systems nosuch", "there is no 'nosuch'"),
        ("serve --grpc-port 99999", "--grpc-port"),
        ("serve --http-port 0", "--http-port"),
        ("serve --metrics-port 8001", "need different ports"),
        ("bench gpu --server-python nosuch", "nosuch: no such program"),
        ("bench gpu --work table.csv", "table.csv: it is a file; name a folder"),
        ("bench gpu --texts other.csv", "other.csv: no column 'text'"),
        ("bench engines --texts empty.csv", "empty.csv has no row"),
        ("bench gpu --parts ,", "name a part"),
        ("sample -o - --json", "choose one"),
        ("review table.csv -o - --json", "choose one"),
        ("clean table.csv -o a.csv --label-map table.csv", "a label map has the columns `from` and `to`"),
        ("demo empty.csv", "empty.csv has no text to classify"),
        ("demo --repository table.csv", "table.csv is a file; --repository names a folder"),
        ("build c --repository table.csv", "table.csv is a file; --repository names a folder"),
        ("bench engines --checkpoint made", "made is not a checkpoint"),
        ("bench gpu --checkpoint made", "made is not a checkpoint"),
        ("serve --host= ", "--host is empty; give an address"),
        ("serve --metrics-host= ", "--metrics-host is empty; give an address"),
        ("serve --trace-url collector:4318", "--trace-url collector:4318: give an OTLP/HTTP endpoint"),
        ("serve --cache-mb 1000000000", "--cache-mb 1000000000: this machine has"),
        ("search table.csv -o made", "made holds a checkpoint; choose another folder"),
        ("ablate table.csv -o made", "made holds a checkpoint; choose another folder"),
        ("stages table.csv -o made", "made holds a checkpoint; choose another folder"),
        ("ablate table.csv -o c --rows 1", "--rows"),
        ("serve --tls-cert missing.pem --tls-key missing.pem", "missing.pem: no such file"),
        ("evaluate c table.csv --baselines missing.csv", "missing.csv: no such file"),
        ("evaluate c table.csv --report table.csv/page.html", "is not a folder"),
        ("evaluate c table.csv --report page.json", "name it .html"),
        ("evaluate c table.csv --baselines other.csv", "other.csv: no column 'text'; it has: title"),
        ("pretrain table.csv other.csv -o c", "other.csv: no column 'text'"),
        ("prune c table.csv other.csv -o n", "other.csv: no column 'text'"),
        ("distil t table.csv -o c --unlabelled other.csv", "other.csv: no column 'text'"),
        ("demo other.csv", "other.csv: no column 'text'"),
        ("distil t table.csv -o c --unlabelled empty.csv", "empty.csv has no row"),
        ("prune c table.csv empty.csv -o n", "empty.csv has no row"),
        ("pretrain table.csv empty.csv -o c", "empty.csv has no row"),
        ("evaluate c table.csv --baselines empty.csv", "empty.csv has no row"),
        ("clean table.csv -o a.csv --label-map empty.csv", "empty.csv has no row"),
        ("frontier c table.csv --report table.csv", "name it .html"),
        ("retrain c table.csv --corrections missing.csv -o n", "missing.csv: no such file"),
        ("distil t table.csv -o c --unlabelled missing.csv", "missing.csv: no such file"),
        ("explain a --check missing.csv", "missing.csv: no such file"),
        ("drift c missing.jsonl", "missing.jsonl: no such file"),
        ("train table.csv -o table.csv", "is a file; name a folder"),
        ("train table.csv -o c --model table.csv", "cannot load table.csv: it is a file"),
        ("train table.csv -o c --label-column text", "--text-column and --label-column are both 'text'"),
        ("drift c table.csv --days 0", "Invalid value for '--days'"),
        ("train table.csv -o c --log-dir table.csv", "is a file; name a folder"),
    ],
)
def test_arguments_are_checked_before_the_work(tool: Tool, table: Path, arguments: str, complaint: str) -> None:
    table.with_name("other.csv").write_text("title\nred apples\n")
    table.with_name("empty.csv").write_text("text,category,from,to\n")
    (table.parent / "made").mkdir()
    (table.parent / "made" / "labels.json").touch()
    refused(tool(*arguments.split()), complaint)


def test_why_no_row_is_left(tool: Tool, table: Path) -> None:
    """The message counts the dropped rows by reason."""
    code, _, err = tool("clean", table.name, "-o", "a.csv", "--min-rows", 1000)
    assert code == 2
    assert err.splitlines()[-1] == "aisle: table.csv: no row is left (2 rare category)"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("distil t t table.csv -o c", "TEACHER: t is given twice"),
        ("frontier c c table.csv", "CHECKPOINT: c is given twice"),
        ("frontier c table.csv --precisions int8 --precisions int8", "--precisions: int8 is given twice"),
        ("train table.csv -o c --augment delete --augment delete", "--augment: delete is given twice"),
        ("pretrain table.csv table.csv -o c", "DATA: table.csv is given twice"),
        ("prune c table.csv ./table.csv -o n", "DATA: table.csv is given twice"),
        ("bench engines engines", "PART: engines is given twice"),
        ("loadtest table.csv --callers 8 --callers 8", "--callers: 8 is given twice"),
    ],
)
def test_what_is_given_twice_is_refused(tool: Tool, table: Path, arguments: str, complaint: str) -> None:
    refused(tool(*arguments.split()), complaint)


# No option is silently ignored


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("loadtest table.csv --second-opinion --shares 0.5", "--shares: "),
        ("loadtest table.csv --second-opinion --workers 2", "--workers: "),
        ("loadtest table.csv --second-opinion --zipf 1", "--zipf: "),
        ("loadtest table.csv --second-opinion --web --report a.html", "--web, --report: "),
        ("loadtest table.csv --second-opinion --pid 1", "--pid: "),
        ("loadtest table.csv --second-opinion --warm-up 1", "--warm-up: "),
        ("loadtest table.csv --second-opinion --callers 1 --callers 2", "give --callers once"),
        ("deploy c --version 3", "--version: "),
        ("deploy --precision int8", "--precision: "),
        ("deploy --agreement 0.5", "--agreement: "),
        ("deploy --canary-seconds 5", "--canary-seconds: "),
        ("build c --text-column a", "--text-column: "),
        ("build c --target openvino --workspace-mb 5 --timing-cache t", "--workspace-mb, --timing-cache: "),
        ("compare c --label-column a", "--label-column: "),
        ("drift c table.csv --label-column a", "--label-column: "),
        ("train table.csv -o c --augment-rate 0.5", "--augment-rate: "),
        ("train table.csv -o c --model bert --layers 2", "--layers: "),
        ("pretrain table.csv -o c --model bert --hidden-size 64", "--hidden-size: "),
        ("distil t table.csv -o c --augment-rate 0.5", "--augment-rate: "),
        ("distil t table.csv -o c --model bert --layers 2", "--layers: "),
        ("explain a --rows 3 --seed 1", "--rows, --seed: "),
        ("bench engines --systems aisle", "--systems: "),
        ("bench scaling --tune", "--tune: "),
        ("bench engines --seconds 3", "--seconds: "),
        ("bench --quick --rounds 3", "--rounds: "),
        ("bench --text-column a", "--text-column: "),
        ("classify a --text-column b", "--text-column: "),
        ("classify a --keep-text", "--keep-text"),
        ("serve --trace-one-in 5", "--trace-one-in: "),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(tool: Tool, table: Path, arguments: str, complaint: str) -> None:
    refused(tool(*arguments.split()), complaint)


# What is shown


def test_names_and_texts_are_shown_unchanged(tool: Tool, capsys: pytest.CaptureFixture[str]) -> None:
    nasty = "[bold]苹果[/red] :smile: \x1b[2J\x07"
    show_rows({"name": "[link=x]name[/y]"}, [{"name": nasty}, {"name": None}, {"name": 0.12345}])
    shown = capsys.readouterr().out
    assert "[bold]苹果[/red] :smile: \\x1b[2J\\x07" in shown
    assert "[link=x]name[/y]" in shown
    assert "\x1b" not in shown
    code, _, err = tool("sample", "-o", "[bold]a[/x].csv", "--rows", 5)
    assert code == 0
    assert "[bold]a[/x].csv" in err
    refused(tool("clean", "[/x]\x1b.csv", "-o", "a.csv"), "[/x]\\x1b.csv: no such file")


def test_a_table_in_a_narrow_terminal_is_complete(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a-name-without-spaces-" * 8
    monkeypatch.setenv("COLUMNS", "80")
    show_rows({"name": "name", "rows": "rows"}, [{"name": name, "rows": 3}])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert name in "".join(line.split("│")[1].strip() for line in shown.splitlines() if line.count("│") == 3)


@pytest.mark.parametrize("encoding", ["gbk", "ascii", "utf-8"])
def test_any_encoding_of_the_terminal(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
    prepare_streams()
    value = {"text": "苹果 ½ é 😀 \udcff"}
    print_json(value)
    show_rows({"text": "text"}, [value])
    sys.stdout.flush()
    lines = written.getvalue().decode(encoding).splitlines()
    assert json.loads(lines[0]) == value
    assert len(lines) > 4


def test_a_stream_that_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    prepare_streams()
    print_json({"a": 1})


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
@pytest.mark.parametrize(
    "environment",
    [{"COLUMNS": "1"}, {"COLUMNS": "x", "TERM": "dumb"}, {"NO_COLOR": "1"}, {"PYTHONIOENCODING": "gbk", "LC_ALL": "C"}],
)
def test_help_in_any_terminal(
    tool: Tool, monkeypatch: pytest.MonkeyPatch, arguments: list[str], environment: dict[str, str]
) -> None:
    monkeypatch.delenv("HOME", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, out, err = tool(*arguments)
    assert (code, err) == (0, "")
    assert out


def test_the_next_command_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    say_next("checkpoint in a b", "aisle", "build", Path("a b"))
    assert capsys.readouterr().err == "checkpoint in a b; next: aisle build 'a b'\n"


def test_numbers_are_right_aligned() -> None:
    assert cell(3).justify == "right"
    assert cell("3").justify == "left"


# The command as a process


def test_aisle_without_arguments_prints_help(tool: Tool) -> None:
    alone = tool()
    assert alone == tool("--help") == tool("-h")
    assert alone[0] == 0
    assert alone[2] == ""
    assert "<bool>" not in alone[1]
    first, *others = (alone[1].index(name) for name in PANELS)
    assert all(first < other for other in others)


def test_completion_knows_commands_and_names(
    tool: Tool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, number, offered in [("aisle tr", 1, "train"), ("aisle build c --precision ", 4, "int8")]:
        monkeypatch.setenv("_AISLE_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(number))
        code, out, _ = tool()
        assert code == 0
        assert offered in out.split()


def test_every_command_is_in_a_panel() -> None:
    import typer

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    named = [name for names in PANELS.values() for name in names]
    assert sorted(named) == sorted(commands)
    assert len(next(iter(PANELS.values()))) == 8


def test_every_flag_has_its_opposite() -> None:
    import typer

    commands = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    for name, command in {**commands, **commands["category"].commands}.items():
        for param in command.params:
            if getattr(param, "is_bool_flag", False) and param.name != "as_json":
                assert param.secondary_opts, f"{name} {param.opts}"


def test_the_version(tool: Tool) -> None:
    code, out, _ = tool("--version")
    assert (code, out.split()[0]) == (0, "aisle")


def test_the_address_of_the_server_comes_from_the_environment(
    tool: Tool, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    monkeypatch.setenv("AISLE_URL", server.url)
    assert tool("classify", "红富士苹果")[0] == 0


def test_help_imports_no_heavy_modules() -> None:
    heavy = ("torch", "transformers", "numpy", "matplotlib", "tritonclient", "openvino")
    code = f"import sys; from aisle.cli import run; run(['-h']); sys.exit(str([*({{*{heavy}}} & {{*sys.modules}})]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"


def process(*arguments: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "aisle", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload,no-any-return]


def test_ctrl_c_exits_with_130_and_says_how_to_resume(table: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        stopped = process("classify", table, "-o", tmp_path / "out.csv", "--url", f"localhost:{port}")
        silent.accept()  # it is running
        stopped.send_signal(signal.SIGINT)
        _, err = stopped.communicate(timeout=60)
    assert stopped.returncode == 130
    assert "Traceback" not in err
    assert err.splitlines()[-1] == "aisle: stopped; run the same command again to resume"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_killed_leaves_no_temporary_file(tmp_path: Path, number: int) -> None:
    with subprocess.Popen(["sleep", "600"], stdout=subprocess.PIPE) as never:  # it holds the pipe open
        try:
            killed = process(
                "clean",
                "-",
                "-o",
                tmp_path / "out.csv",
                stdin=never.stdout,
                env={**os.environ, "TMPDIR": str(tmp_path)},
                # nohup ignores SIGHUP, and so would its child.
                preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
            )
            wait_for(lambda: any(tmp_path.glob("aisle-stdin-*")) or killed.poll() is not None)
            assert killed.poll() is None
            killed.send_signal(number)
            _, err = killed.communicate(timeout=60)
        finally:
            never.kill()
    assert killed.returncode == 128 + number
    assert err.splitlines()[-1] == "aisle: stopped"
    assert list(tmp_path.iterdir()) == []


def test_an_error_is_the_last_line(tmp_path: Path) -> None:
    """A progress bar ends before it."""
    (tmp_path / "in.csv").write_text("title,kind\na,x\n")
    done = process("clean", tmp_path / "in.csv", "-o", tmp_path / "out.csv")
    _, err = done.communicate(timeout=60)
    assert err.splitlines()[-1].startswith("aisle: ")
    assert "no column 'text'" in err.splitlines()[-1]


def test_a_closed_pipe_exits_quietly(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = process("sample", "-o", tmp_path / "a.csv", "--rows", 5, "--json", stdout=writing)
    os.close(writing)
    _, err = done.communicate(timeout=60)
    assert done.returncode == 141
    assert "aisle: " not in err
    assert "Traceback" not in err


def test_a_full_disk_behind_stdout() -> None:
    with open("/dev/full", "w") as full:
        done = process("--help", stdout=full)
        _, err = done.communicate(timeout=60)
    assert done.returncode == 2
    assert err == "aisle: No space left on device; free some space and run the command again\n"


def test_make_clean_keeps_checkpoints_and_versions(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).parent.parent / "Makefile", tmp_path)
    kept = [tmp_path / "work" / "checkpoint" / "a", tmp_path / "model_repository" / "encoder" / "1" / "model.bin"]
    for file in (*kept, tmp_path / "work" / "sample" / "config.json"):
        file.parent.mkdir(parents=True)
        file.touch()
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    assert all(file.exists() for file in kept)
    assert not (tmp_path / "work" / "sample").exists()
    asked = subprocess.run(
        ["make", "clean-all"], cwd=tmp_path, input="no\n", text=True, capture_output=True, check=False
    )
    assert asked.returncode != 0
    assert all(file.exists() for file in kept)
    subprocess.run(["make", "clean-all"], cwd=tmp_path, input="yes\n", text=True, capture_output=True, check=True)
    assert not any(file.exists() for file in kept)


def test_a_program_is_looked_for_as_the_shell_does(tmp_path: Path) -> None:
    assert program(Path("sh")) == Path("sh")
    with pytest.raises(InputError, match="no such program"):
        program(tmp_path)


def test_a_report_does_not_replace_the_table_that_it_is_about(tool: Tool, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    table.write_text('[{"text": "red apples", "category": "fruit"}]')
    for command in (
        "evaluate c table.json",
        "clean table.json -o o.csv",
        "drift c table.json",
        "frontier c table.json",
    ):
        refused(tool(*command.split(), "--report", "table.html"), "its figures would replace table.json")
    assert json.loads(table.read_text())[0]["category"] == "fruit"
