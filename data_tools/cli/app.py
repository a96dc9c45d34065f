"""The `mmvit-data` program: one short function per verb, heavy imports inside it."""

from __future__ import annotations

from typing import Annotated

import typer

from data_tools.cli import demo, examine, make, select
from data_tools.cli.words import DataVerbs
from data_tools.core.program import print_version, run_program

app = typer.Typer(
    cls=DataVerbs,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Make, check and transform shards of image-text pairs. Errors have a short message; --debug adds a traceback.",
)

_VERSION = typer.Option("--version", "-V", callback=print_version, is_eager=True, help="Print the version and exit.")


@app.callback()
def _options(version: Annotated[bool, _VERSION] = False) -> None:
    """Declare the options before a verb."""


# In the order of the help.
app.command()(demo.emoji)
app.command()(demo.digits)
app.command()(make.index)
app.command()(examine.check)
app.command()(examine.repair)
app.command()(demo.synthetic)
app.command()(make.tokenizer)
app.command()(examine.stats)
app.command()(examine.peek)
app.command()(make.make)
app.command()(select.reshard)
app.command("filter")(select.filter_)
app.command()(select.dedup)


def main() -> None:
    """Run `mmvit-data`."""
    run_program(app, "mmvit-data")


if __name__ == "__main__":
    main()
