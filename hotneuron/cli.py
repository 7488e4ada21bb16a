"""The `hotneuron` command: its subcommands, and errors as one line instead of a traceback.

Every subcommand lives in a file of its own and imports torch, the engine and the server inside its
function, so that `--help` stays quick.
"""

import os
import sys
from collections.abc import Sequence

import typer

from prosparse.analysis_cli import app as prosparse_app

from .commands import bench, chat, doctor, place, pull, report, serve, version
from .console import explain

app = typer.Typer(
    name="hotneuron",
    help="An LLM server that computes only the neurons that fire.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("serve")(serve.serve)
app.command("chat")(chat.chat)
app.command("pull")(pull.pull)
app.command("place")(place.place)
app.command("bench")(bench.bench)
app.command("report")(report.report)
app.command("doctor")(doctor.doctor)
app.command("version")(version.version)
app.add_typer(prosparse_app, name="prosparse")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # The kernels have a thread pool of their own. Without this, torch's idle threads spin on the
    # same cores after each of its operations. It counts only if set before torch is loaded.
    # `prosparse` uses torch alone and loses a tenth of its speed when those threads sleep.
    if arguments[:1] != ["prosparse"]:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app(args=arguments)
    except SystemExit as stop:
        if isinstance(stop.code, int) or stop.code is None:
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except (ValueError, OSError, RuntimeError) as error:
        if not explain(error):
            raise
        return 1
    return 0
