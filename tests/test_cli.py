import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from aisle.commands.command import simplify_help

from .conftest import Server, aisle


@pytest.mark.long
def test_train_evaluate_build_as_a_program_calls_them(tmp_path: Path, server: Server, checkpoint: Path) -> None:
    data = tmp_path / "a.jsonl"
    rows = [{"title": f"{'苹果 斤' if i % 2 else '手机壳 款'}{i}", "kind": "ab"[i % 2]} for i in range(600)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ["--text-column", "title", "--label-column", "kind"]

    done = aisle("train", data, *columns, "-o", tmp_path / "out", "--epochs", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert {"accuracy", "macro_f1", "per_class", "seconds"} <= json.loads(done.stdout).keys()

    done = aisle("evaluate", tmp_path / "out", data, *columns, "--json")
    assert {"accuracy", "macro_f1", "per_class", "texts_per_second"} <= json.loads(done.stdout).keys()

    done = aisle("build", tmp_path / "out", "--repository", tmp_path / "repository", "--precision", "fp32", "--json")
    assert json.loads(done.stdout)["version"] == 1
    assert (tmp_path / "repository" / "encoder" / "1" / "model.xml").exists()


def test_classify_texts(server: Server) -> None:
    done = aisle("classify", "红富士苹果", "手机壳", "--top-k", "2", "--url", server.url, "--json")
    predictions = json.loads(done.stdout)["predictions"]
    assert [len(p["categories"]) for p in predictions] == [2, 2]
    assert "红富士苹果" in aisle("classify", "红富士苹果", "--url", server.url).stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["classify", ""], "empty once cleaned"),
        (["classify", "好", "--top-k", "0"], "greater than or equal to 1"),
        (["classify", __file__], "give the output with -o"),
        (["classify", "none.csv", "-o", "out.csv"], "no such file"),
        (["evaluate", "only-one"], "give either"),
        (["evaluate", "no-checkpoint", __file__], "is not a checkpoint"),
        (["train", __file__, "-o", "ckpt"], "unknown file format"),
        (["build", "no-checkpoint"], "no-checkpoint: no such folder"),
        (["build", "no-checkpoint", "--precision", "int3"], "int3"),
        (["train", "none.csv", "-o", "x"], "no such file"),
        (["train", "--epochs", "0", __file__, "-o", "x"], "epochs"),
        (["serve", "--repository", "/nowhere"], "holds no built version"),
        (["no-command"], "no-command"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(server: Server, arguments: list[str], complaint: str) -> None:
    url = ["--url", server.url] if arguments[0] == "classify" else []
    done = aisle(*arguments, *url)
    assert done.returncode == 2
    assert done.stdout == ""
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("aisle: ")]) == 1


def test_no_server_is_exit_code_1() -> None:
    done = aisle("classify", "好", "--url", "localhost:1")
    assert done.returncode == 1
    assert done.stderr.startswith("aisle: ")


def test_a_minimal_installation_names_the_missing_extra(tmp_path: Path, server: Server) -> None:
    """Without torch and other extras, the client works, and other commands name the missing extra."""
    heavy = ("torch", "transformers", "tokenizers", "sklearn", "openvino", "onnx", "pyarrow", "onnxruntime", "pytriton")
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nfor name in {heavy!r}:\n    sys.modules[name] = None\n")
    env = {"PYTHONPATH": str(tmp_path)}
    assert aisle("classify", "好", "--url", server.url, env=env).returncode == 0
    assert aisle("--help", env=env).returncode == 0
    for command, extra in [
        (["train", __file__, "-o", "x"], "train"),
        (["evaluate", "a", "b.csv"], "train"),
        (["build", "a"], "build"),
    ]:
        done = aisle(*command, env=env)
        assert done.returncode == 2
        assert f"pip install 'aisle-classifier[{extra}]'" in done.stderr


def test_the_help_works_with_a_typer_that_formats_types_itself() -> None:
    parameter = SimpleNamespace(is_bool_flag=False)
    assert simplify_help([parameter]) == [parameter]
