"""`kvfold`: the commands, and how their errors reach the user.

Exit codes: 0 done; 1 nobody reads the output any more; 2 the input is wrong (one sentence on stderr);
130 interrupted. Anything else is a defect of kvfold and shows its traceback.
"""

import errno
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Annotated

import typer
from typer.exceptions import Abort, TyperException

from kvfold import __version__
from kvfold.cli import (
    bench,
    calibrate,
    cluster,
    demo,
    evaluate,
    generate,
    info,
    methods,
    parallel,
    plan,
    profile,
    serve,
    simulate,
)
from kvfold.errors import KvfoldError

USER_ERROR = 2
INTERRUPTED = 130

app = typer.Typer(
    help="LLM inference with a compressed, paged KV cache.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("generate")(generate.generate)
app.command("calibrate")(calibrate.calibrate)
app.add_typer(evaluate.app, name="eval")
app.add_typer(bench.app, name="bench")
app.command("info")(info.info)
app.command("methods")(methods.methods)
app.command("parallel")(parallel.parallel)
app.command("serve")(serve.serve)
app.command("profile")(profile.profile)
app.command("simulate")(simulate.simulate)
app.command("plan")(plan.plan)
app.command("demo")(demo.demo)
app.add_typer(cluster.app, name="cluster")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvfold {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `kvfold` with `arguments` (default: those of the process) and return its exit code."""
    if isinstance(sys.stdout, TextIOWrapper):
        # A model may write what the terminal's encoding lacks; better escaped than a crash.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = app(args=arguments, prog_name="kvfold", standalone_mode=False)
        sys.stdout.flush()
    except KvfoldError as error:
        return _fail(str(error))
    except TyperException as error:
        return _fail(_usage(error))
    except (KeyboardInterrupt, Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        _discard_stdout()
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _discard_stdout()
        return _fail(f"cannot write: {error.strerror}; free some space.")
    if code == INTERRUPTED:
        print("interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _discard_stdout() -> None:
    """Python flushes stdout once more at exit, and would complain there."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str) -> int:
    print(f"kvfold: {message}", file=sys.stderr)
    return USER_ERROR


def _usage(error: TyperException) -> str:
    """The message of a wrong command line, and where its options are explained."""
    context = getattr(error, "ctx", None)
    hint = f" See '{context.command_path} --help'." if context is not None else ""
    message = error.format_message()
    return (message if message.endswith((".", "?")) else message + ".") + hint
