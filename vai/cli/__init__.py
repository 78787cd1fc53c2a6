"""The command line. Each command is a small module, imported when it is used, so that `vai --help` is instant."""

from __future__ import annotations

import importlib
import os
import sys

import click

from vai.errors import VaiError

# command -> (module, its line in `vai --help`), in the order a newcomer needs them
_COMMANDS = {
    "load": ("load", "Burn a model file into memory and give it a name."),
    "run": ("run", "Answer a prompt, or chat."),
    "serve": ("serve", "Start VAI: the HTTP server and the engine behind it."),
    "ls": ("ls", "List the models by name."),
    "ps": ("ps", "List the running processes and what they work on."),
    "status": ("status", "Show memory, models, leases and processes in one table."),
    "show": ("show", "Show what a model is made of."),
    "plan": ("plan", "Say what models will take of the memory, before loading them."),
    "verify": ("verify", "Check every byte of the images in memory."),
    "rm": ("rm", "Remove a model from memory."),
    "stop": ("stop", "End all processes of VAI; the weights stay in memory."),
    "logs": ("logs", "Show what the processes wrote."),
    "synth": ("synth", "Make a model file with random weights, for tests and measurements."),
    "quantize": ("quantize", "Make a model file of fewer bits."),
    "doctor": ("doctor", "Look at this machine: its ceilings, and what people stumble over."),
    "trace": ("trace", "Show where the time of a step goes, operation by operation."),
    "bench": ("bench", "Measure this machine."),
}


# What people type who come from elsewhere, and what they are told.
_ELSEWHERE = {
    "list": "vai ls",
    "models": "vai ls",
    "chat": "vai run NAME",
    "start": "vai serve",
    "create": "vai load FILE --name NAME",
    "import": "vai load FILE --name NAME",
    "unload": "vai rm NAME",
    "kill": "vai stop",
    "version": "vai --version",
    "pull": "vai load FILE --name NAME; VAI downloads nothing, so get the GGUF file first",
}


class _Commands(click.Group):
    """A group that knows its commands by name and imports one when it is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"vai.cli.{_COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] in _ELSEWHERE:
            raise click.UsageError(
                f"There is no command '{args[0]}' here; what you want is: {_ELSEWHERE[args[0]]}", ctx
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in _COMMANDS.items()])


def _version(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    if wanted:
        from vai import __version__

        click.echo(f"vai {__version__}")
        ctx.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Show the version.")
def vai() -> None:
    """Many language models, served from memory that outlives its processes.

    \b
    A model is burned into shared memory once and stays there:
      vai load model.gguf --name m     burn it
      vai run m "Hello"                use it, with or without a server
      vai serve                        serve it at http://127.0.0.1:8642/v1

    \b
    Where things are: images in VAI_ROOT (default /dev/shm/vai-UID), names in
    $XDG_DATA_HOME/vai/names, logs in $XDG_STATE_HOME/vai/logs.
    """


def main() -> None:
    """Run the command line and exit: with the error's own code, 130 after Ctrl-C; a traceback means a bug."""
    try:
        sys.exit(vai.main(prog_name="vai", standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except VaiError as error:
        print(f"vai: {error.message}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        print(file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `vai ls | head`: whoever read us has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:  # a full disk, a file that is not ours: the system's own words say which
        print(f"vai: {error}", file=sys.stderr)
        sys.exit(1)
