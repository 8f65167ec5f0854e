"""clasp: a CLIP out of two pre-trained models. Public names, one by one; nothing inside the package imports from here.

They are fetched when first asked for: the command must be able to set up the machine before torch is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clasp.commands.environment import settle
    from clasp.config.build import load
    from clasp.models.backbone import Base
    from clasp.models.inference import Model
    from clasp.types import UserError

__version__ = "0.1.0"
__all__ = ["Base", "Model", "UserError", "__version__", "load", "settle"]

_HOME = {
    "load": "clasp.config.build",
    "Model": "clasp.models.inference",
    "Base": "clasp.models.backbone",
    "UserError": "clasp.types",
    "settle": "clasp.commands.environment",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"clasp has no {name!r}; its public names are {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
