"""Which versions of other packages an integration works with, checked in one way and said in one form."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping

from packaging.specifiers import SpecifierSet


def require(
    module: str,
    needed: Mapping[str, str],
    *,
    cause: Exception | None = None,
    also: str = "",
    install: str = "pip install {}",
) -> None:
    """Raise ImportError where a package is missing or of another version, or for `cause`.

    module: who needs them. needed: version specifiers by package. cause: what importing them raised.
    also: what else is needed, in words. install: the command, {} for the packages.
    """
    found = {name: _installed(name) for name in needed}
    if cause is None and all(found[name] in SpecifierSet(versions) for name, versions in needed.items()):
        return
    needs = [f"{name}{versions}" for name, versions in needed.items()]
    raise ImportError(
        f"{module} needs {' and '.join(needs)}{also}; found "
        f"{' and '.join(f'{name} {number}' for name, number in found.items())}"
        f"{'' if cause is None else f' ({cause})'}. Run: {install.format(' '.join(map(repr, needs)))}"
    ) from cause


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"
