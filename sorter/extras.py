"""Optional dependencies: a sentence about what to install, instead of an ImportError."""

import importlib.util

from sorter.errors import ConfigurationError


def hint(what: str, extra: str) -> str:
    """What needs an extra, and how to install it.

    Args:
        what: the flag, command or feature that uses it, as the subject of the sentence.
        extra: its name in pyproject.toml.
    """
    return f"{what} needs the extra {extra!r}: run pip install '.[{extra}]' in sorter's folder"


def require(module: str, extra: str, needed_by: str) -> None:
    """Make sure that an extra is installed.

    Args:
        module: one that the extra brings.
        extra: its name in pyproject.toml.
        needed_by: the flag or command that uses it.

    Raises:
        ConfigurationError: the module is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise ConfigurationError(hint(needed_by, extra))
