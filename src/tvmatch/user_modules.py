"""Modules of the user's own, which an option names: networks, extractors."""

import importlib
import os
import sys
from types import ModuleType


def import_module(name: str) -> ModuleType:
    """The module of this name, looked for among installed packages and in the current folder.

    Raises whatever the import raises.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as `python -m` does, but last: what is installed goes first
    return importlib.import_module(name)
