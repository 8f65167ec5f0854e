"""clasp: a CLIP out of two pre-trained models. Public names, one by one; nothing inside the package imports from here.

They are fetched when first asked for: the command must be able to set up the machine before torch is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clasp.commands.embed_batches import BatchEmbedder
    from clasp.commands.environment import configure_environment
    from clasp.config.build import load
    from clasp.models.backbone import Backbone
    from clasp.models.inference import EmbeddingModel
    from clasp.types import UserError

__version__ = "0.1.0"
__all__ = ["Backbone", "BatchEmbedder", "EmbeddingModel", "UserError", "__version__", "configure_environment", "load"]

_HOME = {
    "load": "clasp.config.build",
    "EmbeddingModel": "clasp.models.inference",
    "Backbone": "clasp.models.backbone",
    "BatchEmbedder": "clasp.commands.embed_batches",
    "UserError": "clasp.types",
    "configure_environment": "clasp.commands.environment",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"clasp has no {name!r}; its public names are {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
