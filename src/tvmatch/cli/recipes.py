"""`tvmatch recipes`: list the recipes of the package."""

import yaml
from rich.console import Console
from rich.table import Table

from tvmatch.config import recipe_names
from tvmatch.config.parser import OneLineParser
from tvmatch.config.recipes import recipe_text

DESCRIPTION = "List the recipes, or print one as YAML, as a start for a custom configuration."


def run(arguments: list[str]) -> int:
    """List the recipes, or print one."""
    parser = OneLineParser(prog="tvmatch recipes", description=DESCRIPTION)
    parser.add_argument("recipe", type=str, nargs="?", default=None, help="recipe to print")
    name = parser.parse_args(arguments).recipe
    if name is not None:
        print(recipe_text(name), end="")
        return 0
    table = Table("recipe", "description", box=None)
    for column in ("steps", "batch"):
        table.add_column(column, justify="right")
    for recipe in recipe_names():
        text = recipe_text(recipe)
        training = yaml.safe_load(text)["training"]
        summary = text.splitlines()[0].lstrip("# ")
        table.add_row(recipe, summary, f"{training['steps']:,}", str(training["batch_size"]))
    Console().print(table)
    return 0
