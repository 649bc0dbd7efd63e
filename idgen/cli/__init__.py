"""The command line. Each command lives in a module of its own and is imported when it is called.

Exit codes: 0 done; 1 the machine cannot (no pipeline can run, a check failed); 2 the user's input, named with its cure.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from idgen.errors import Cancelled, IdgenError

COMMANDS = {
    "generate": "make portraits from a photo and a prompt",
    "batch": "render a prompt file into a folder",
    "faces": "show which faces are found in photos",
    "identity": "make, look at and mix identities",
    "pipelines": "list the pipelines, and what each lacks",
    "weights": "list, download, check and carry model weights",
    "demo": "open the web demo",
    "serve": "run the HTTP service",
    "bench": "measure speed against stock diffusers",
    "doctor": "say what this machine can do, and why not the rest",
}
"""name -> one line of help. The module ``idgen.cli.NAME`` holds a function or a typer app of that name."""


class LazyGroup(TyperGroup):
    """Imports a command's module when it is called, so that ``idgen --help`` stays quick."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, name: str) -> Any:
        if name not in COMMANDS:
            return None
        if ctx.resilient_parsing or (ctx.invoked_subcommand is None and "--help" in sys.argv[1:2]):
            return to_click(_stub(COMMANDS[name]), name)
        module = importlib.import_module(f"idgen.cli.{name}")
        return to_click(getattr(module, "app", None) or getattr(module, name), name)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # typer would end without a word
            raise Cancelled("interrupted.") from None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        import difflib

        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            ctx.fail(f"there is no command {args[0]!r}.{hint} There are: {', '.join(COMMANDS)}.")
        return super().resolve_command(ctx, args)


def _stub(help_text: str) -> Any:
    """Stands for a command in the list of commands, which shows one line of each and runs none."""
    app = typer.Typer(add_completion=False)
    app.command(help=help_text)(lambda: None)
    return app


def to_click(command: Any, name: str) -> Any:
    """A command as the group holds it, from a typer app or a plain function."""
    if not isinstance(command, typer.Typer):
        wrapped = typer.Typer(add_completion=False)
        wrapped.command()(command)
        command = wrapped
    made: Any = typer.main.get_command(command)
    made.name = name
    return made


app = typer.Typer(
    cls=LazyGroup,
    add_completion=False,
    no_args_is_help=True,
    help="Identity-preserving portraits: one photo and a prompt in, portraits out that stay recognisably that person.",
    pretty_exceptions_enable=False,
)


def _version(value: bool) -> None:
    if value:
        from idgen import __version__

        typer.echo(f"idgen {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Identity-preserving portraits: one photo and a prompt in, portraits out that stay recognisably that person."""


UsageError: Any = typer.BadParameter.__mro__[1]
"""click's class, or the one of typer's own copy of click: newer versions of typer have one."""


def complain(message: object) -> None:
    """Print an error, as every command does."""
    print(f"idgen: error: {message}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an :class:`IdgenError` or a wrong option becomes one line on stderr and exit code 2."""
    import logging

    logging.basicConfig(format="idgen: %(message)s", level=logging.WARNING, stream=sys.stderr)
    try:
        code = app(args=arguments, prog_name="idgen", standalone_mode=False)
    except UsageError as error:
        if said := error.format_message():  # without any argument the help was shown, and there is nothing to add
            where = error.ctx.command_path if error.ctx else "idgen"
            complain(f"{said.replace('Value error, ', '').rstrip('.')}. See: {where} --help")
        raise SystemExit(2) from None
    except Cancelled as error:
        print(f"idgen: {error}", file=sys.stderr)
        raise SystemExit(130) from None
    except IdgenError as error:
        complain(error)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("idgen: interrupted.", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise SystemExit(0) from None
    raise SystemExit(code or 0)
