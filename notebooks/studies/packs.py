"""Where real image sets lie that are not downloaded: the folder that CLKIT_DATA names."""

import os
from pathlib import Path


def pack(name: str) -> Path | None:
    """The zip or else the folder of a name in $CLKIT_DATA; None where there is neither."""
    root = os.environ.get("CLKIT_DATA")
    places = (Path(root) / f"{name}.zip", Path(root) / name) if root else ()
    return next((path for path in places if path.exists()), None)
