"""The `qbrec` command: finds commands by name, turns errors into messages and exit codes."""

from __future__ import annotations

import importlib
import sys

import click

from qbrec import __version__
from qbrec.errors import QbrecError

# command → (module, what it is for); modules are imported when their command is.
_COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("run", "The whole road: catalog to registered model and report."),
    "submit": ("jobs", "The same on a cluster: send it there, follow it, end as it ends."),
    "status": ("jobs", "How far a submitted run is."),
    "logs": ("jobs", "The log of a submitted run."),
    "stop": ("jobs", "Stop a submitted run with a checkpoint."),
    "doctor": ("doctor", "Check this machine: versions, GPUs, network, storage, cluster."),
    "synth": ("synth", "Write a synthetic catalogue with a known truth."),
    "import": ("importer", "Write the input contract from Amazon Reviews, MovieLens or CSV."),
    "plan": ("plan", "Memory, disk, steps and hours that a run of a given size needs."),
    "catalog": ("stages", "Stage 0: validate, index, encode, group users."),
    "append": ("append", "Add, change and retire items of a finished catalogue."),
    "fuse": ("stages", "Stage 1: one fused vector per item."),
    "quantize": ("stages", "Stage 2: codebooks and semantic IDs."),
    "pretrain": ("stages", "Stage 3: masked pretraining on all domains."),
    "finetune": ("stages", "Stage 3: fine-tuning on the target domain."),
    "evaluate": ("stages", "Rank the whole catalogue for every user, beside the baselines."),
    "ablate": ("ablate", "What each part is worth: the run again without it."),
    "coldstart": ("coldstart", "How well items that were never trained on are recommended."),
    "recommend": ("recommend", "Rank items for a history, or for all users."),
    "serve": ("serve", "Serve a registered model over HTTP."),
    "ids": ("ids", "Show semantic IDs with their labels; find items by prefix."),
    "register": ("registry", "Register the run's model as @challenger."),
    "promote": ("registry", "Gate the challenger and make it @champion."),
    "rollback": ("registry", "Give @champion back to the previous version."),
    "registry": ("versions", "List registered versions, show one, compare two."),
    "report": ("report", "Write the run's HTML report."),
    "track": ("track", "Send to MLflow what it missed of a run."),
}
# Where a command's name is a keyword of Python, its function bears another.
_FUNCTIONS = {"import": "importer"}


class LazyGroup(click.Group):
    """A group that imports a command's module only when that command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands, in the order of use."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now."""
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"qbrec.cli.{_COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, _FUNCTIONS.get(cmd_name, cmd_name))
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qbrec")
def cli() -> None:
    """Multimodal sequential recommendation over semantic IDs (Q-BERT4Rec).

    \b
    From nothing to ranked items in two commands:
      qbrec synth data/demo --items 3000 --users 6000
      qbrec run --set data.domains.demo.items=data/demo/items.parquet \\
                --set data.domains.demo.interactions=data/demo/interactions.parquet

    Exit codes: 0 ok, 2 configuration, 3 data, 4 checkpoint, 5 cluster or registry, 6 a gate said no,
    143 stopped by SIGTERM after a checkpoint.
    """


def main() -> None:
    """Entry point of the `qbrec` script."""
    try:
        cli(standalone_mode=False)
    except QbrecError as error:
        click.secho(f"error: {error}", err=True, fg="red")
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted: the same command goes on from here", err=True)
        sys.exit(130)
