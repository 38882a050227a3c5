"""glm4-deploy doctor"""

from typing import Any

import click

from glm4_deploy import show
from glm4_deploy.doctor import examine


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(as_json: bool) -> None:
    """List what works on this machine, and how to make the rest work."""
    facts: dict[str, Any] = examine()
    if as_json:
        show.print_json(facts)
        return
    show.print_rows(
        f"Python {facts['python']} on {facts['platform']}, {facts['cpus']} cores",
        list(facts["packages"].items()),
    )
    for finding in facts["findings"]:
        mark = "yes" if finding["works"] else "no "
        advice = f" -> {finding['advice']}" if finding["advice"] else ""
        click.echo(f"  {mark}  {finding['name']}: {finding['detail']}{advice}")
    for extra in facts["extras"]:
        missing = ", ".join(extra["missing"])
        lacks = f": {missing} not installed -> {extra['advice']}" if missing else ""
        click.echo(f"  {'no ' if missing else 'yes'}  extra {extra['name']}{lacks}")
    if not facts["extras"]:
        click.echo("  no   extras: not known, as this package is not installed")
