"""Import of user modules that an option names, such as networks and extractors."""

import importlib
import os
import sys
from types import ModuleType


def import_module(name: str) -> ModuleType:
    """Import a module from the installed packages or, after these, from the current folder.

    Raises any exception of the import.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # like `python -m`, but after the installed packages
    return importlib.import_module(name)
