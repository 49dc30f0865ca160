"""What of the folder `mlflow/` comes with qbrec: it must be no package, so in a wheel it lies inside ours."""

from __future__ import annotations

from pathlib import Path

import qbrec
from qbrec.errors import RegistryError


def shipped(name: str) -> Path:
    """A file or folder of `mlflow/`: inside the installed package, or in a source checkout.

    Raises:
        RegistryError: The installation is incomplete.
    """
    package = Path(qbrec.__file__).parent
    for path in (package / "_mlflow" / name, package.parent / "mlflow" / name):
        if path.exists():
            return path
    raise RegistryError(f"{name} is missing", where=str(package), fix="install qbrec again from its wheel")


def shipped_names(folder: str, *, suffix: str) -> list[str]:
    """Names, without their suffix, of the files in a folder of `mlflow/`.

    Raises:
        RegistryError: The installation is incomplete.
    """
    return sorted(path.name.removesuffix(suffix) for path in shipped(folder).glob(f"*{suffix}"))
