"""`qbrec coldstart`: how well items that were never trained on are recommended."""

from __future__ import annotations

import click

from qbrec.cli.options import run_options


@click.command()
@run_options
@click.option(
    "--share",
    type=click.FloatRange(min=0, max=0.5, min_open=True),
    default=0.05,
    show_default=True,
    help="Share of the target domain's items to hold out, drawn with run.seed.",
)
def coldstart(config_path: str | None, overrides: tuple[str, ...], resume: str, share: float) -> None:
    """Hold items out, train without them, append them, and see who finds them.

    A run of its own, `<run.name>-coldstart`, is trained up to fine-tuning on what is left: the items are in
    no split, and each history ends before its first one. They are then appended as `qbrec append` does.
    Every user with such an item is asked for the first one, given what stands before it: among all items, and
    among those held out.

    Beside the model as it serves stand the same without the rows of the item graphs that appending made,
    semantic IDs alone, and content alone (cosines to the items of the history, summed). The result is a
    table, and `coldstart.json` in the folder of that run. The same command again goes on where it was cut
    off.

    \b
    Examples:
      qbrec coldstart --config shop.yaml
      qbrec coldstart --config shop.yaml --share 0.1 --workers 2
    """
    from qbrec.coldstart_run import measure_coldstart
    from qbrec.config import load_config
    from qbrec.evaluation.coldstart import RESULT, format_coldstart
    from qbrec.pipeline import say
    from qbrec.run_coldstart import coldstart_config
    from qbrec.run_record import run_directory

    config = load_config(config_path, overrides=overrides)

    def warn(text: str) -> None:
        click.secho(text, err=True, fg="yellow")

    found = measure_coldstart(config, share=share, resume=resume, say=say, warn=warn)
    if found is None:
        return
    click.echo()
    click.echo(format_coldstart(found.load_json(RESULT)))
    click.echo()
    click.echo(f"figures   {run_directory(coldstart_config(config)) / RESULT}")
