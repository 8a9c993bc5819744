"""Decorators that add options to a command: the fields of a settings dataclass, or a group of common options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from aisle.commands.command import among
from aisle.errors import InputError

Command = TypeVar("Command", bound=Callable[..., Any])
Before = Callable[[dict[str, Any], dict[str, Any]], None]


def takes(
    kind: type[Any], names: Sequence[str] = (), into: str = "settings", **defaults: Any
) -> Callable[[Command], Command]:
    """Return a decorator that adds an option for each field of a dataclass, and passes one instance to the command.

    A field's metadata describes its option; `aisle.train.core.settings.option` makes it. A field without metadata is
    not an option.

    Args:
        names: the fields that become options; by default all.
        into: the parameter of the command that receives the instance.
        defaults: defaults of this command that differ from those of the dataclass.
    """
    offered = {each.name: each for each in fields(kind) if each.metadata and (not names or each.name in names)}
    hints = get_type_hints(kind)
    added = {
        name: (_option(each, hints[name]), defaults.get(name, None if each.default == () else each.default))
        for name, each in offered.items()
    }

    def before(options: dict[str, Any], arguments: dict[str, Any]) -> None:
        values = {name: tuple(value or ()) if offered[name].default == () else value for name, value in options.items()}
        arguments[into] = kind(**values)

    return lambda command: with_options(command, added, before, into)


def with_options(command: Command, added: dict[str, tuple[Any, Any]], before: Before, replaced: str = "") -> Command:
    """Return a command with additional options.

    Args:
        added: the type and the default of each option, by name.
        before: called with the values of the options and the command's own arguments, which it may change.
        replaced: a parameter that `before` sets; the options take its place in the signature.
    """
    own = inspect.signature(command, eval_str=True)

    def run(**arguments: Any) -> Any:
        options = {name: arguments.pop(name) for name in added}
        before(options, arguments)
        return command(**arguments)

    keyword = inspect.Parameter.KEYWORD_ONLY
    further = [
        inspect.Parameter(name, keyword, annotation=kind, default=value) for name, (kind, value) in added.items()
    ]
    parameters = [each.replace(kind=keyword) for each in own.parameters.values()]
    place = next((i for i, each in enumerate(parameters) if each.name == replaced), len(parameters))
    parameters[place : place + 1] = further
    run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
    return run  # type: ignore[return-value]


def _option(described: Field[Any], kind: Any) -> Any:
    """Return the annotation of a dataclass field's option."""
    about = described.metadata
    several = described.default == ()
    choices = about["choices"]
    information = typer.Option(
        help=about["help"],
        min=about["min"],
        max=about["max"],
        show_default=about["shown"] or True,
        callback=among(choices) if choices else _multiple(about["multiple_of"]),
        autocompletion=choices,
    )
    return Annotated[list[str] | None if several else kind, information]


def _multiple(of: int | None) -> Callable[..., Any] | None:
    """Return a callback that refuses values that are not a multiple of a number."""

    def check(param: typer.CallbackParam, value: Any) -> Any:
        if value is not None and value % of:
            raise InputError(f"{param.opts[0]} {value}: give a multiple of {of}")
        return value

    return check if of else None
