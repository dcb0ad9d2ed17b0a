"""`tokenmill models`: get weights, and say which are here. Imports no torch."""

import json

import click

from tokenmill.engine.sources import list_models, pull, resolve


@click.group()
def models() -> None:
    """Get model weights, and list those on this machine."""


@models.command("pull")
@click.argument("name")
@click.option("--quiet", "-q", is_flag=True, help="Say nothing while it goes.")
def pull_model(name: str, *, quiet: bool) -> None:
    """Bring the model NAME to this machine: a known name, or a hub id such as owner/name."""

    def say(line: str) -> None:
        if not quiet:
            click.echo(line, err=True)

    click.echo(str(pull(name, say)))


@models.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def list_known(*, as_json: bool) -> None:
    """List the known models and those on this machine."""
    for entry in list_models():
        if as_json:
            path = str(entry.path) if entry.path else None
            click.echo(json.dumps({"name": entry.name, "path": path, "origin": entry.origin}))
        else:
            where = entry.path or f"not here; run: tokenmill models pull {entry.name}"
            click.echo(f"{entry.name}  ({entry.origin})\n    {where}")


@models.command("path")
@click.argument("name")
@click.option("--quiet", "-q", is_flag=True, help="Only check: print nothing.")
def show_path(name: str, *, quiet: bool) -> None:
    """Print where the model NAME is on this machine."""
    path = resolve(name)
    if not quiet:
        click.echo(str(path))
