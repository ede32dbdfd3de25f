"""The configuration of a run: dataclasses, YAML files, recipes, command-line options."""

from tvmatch.config.recipes import recipe, recipe_names
from tvmatch.config.schema import Config, OptimizerConfig, TrainingConfig

__all__ = ["Config", "OptimizerConfig", "TrainingConfig", "recipe", "recipe_names"]
