"""The `aisle` command: what every command has in common. Each is a thin function over the folder of its stage."""

from __future__ import annotations

import sys
from typing import Any

import typer
from rich.table import Table

from aisle.commands import adapt, data, engine, learn, live, load, measure, serving
from aisle.console import say, stderr
from aisle.errors import InputError, ServerError

app = typer.Typer(
    help="Product text in, category out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for stage in (data, learn, measure, engine, serving, live, load, adapt):
    app.add_typer(stage.app)

# What each extra brings, so that a missing module can name it.
EXTRAS = {
    "torch": "train",
    "transformers": "train",
    "sklearn": "train",
    "scipy": "train",
    "captum": "train",
    "datasketch": "clean",
    "optuna": "train",
    "tensorboard": "train",
    "tokenizers": "train",
    "pypinyin": "train",
    "pyarrow": "parquet",
    "matplotlib": "report",
    "jinja2": "report",
    "onnx": "build",
    "onnxscript": "build",
    "openvino": "build",
    "onnxruntime": "build",
    "aiohttp": "loadtest",
    "locust": "loadtest",
}


def main() -> None:
    """Run the command; errors the user can mend are one line on stderr, never a traceback."""
    try:
        app(standalone_mode=False)
    except InputError as error:
        _exit(2, str(error))
    except ServerError as error:
        _exit(1, str(error))
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        _exit(2, f"this command needs an extra: pip install 'aisle[{extra}]'")
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except Exception as error:
        # typer's own usage errors, told by their exit code so as not to depend on its private classes
        if hasattr(error, "format_message"):
            _exit(2, error.format_message())
        if type(error).__name__ == "GateError":  # by name, so that the thin client does without its module
            _show_gate(error)
            _exit(3, str(error))
        raise


def _exit(code: int, message: str) -> None:
    say("aisle: " + " ".join(message.split()))
    sys.exit(code)


def _show_gate(error: Any) -> None:
    """Show what was asked of an engine beside what it does."""
    table = Table("", "asked", "found")
    table.add_row("top-1 agreement", f"≥ {error.row['least_agreement']:.2%}", f"{error.row['agreement']:.2%}")
    table.add_row("macro-F1 loss", f"≤ {error.row['largest_f1_loss']:.2%}", f"{error.row['f1_loss']:.2%}")
    stderr.print(table)
