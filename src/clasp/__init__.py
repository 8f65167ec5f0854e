"""clasp: a CLIP out of two pre-trained models. Public names, one by one; nothing inside the package imports from here.

They are fetched when first asked for: the command must be able to set up the machine before torch is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clasp.commands.embed_batches import BatchEmbedder
    from clasp.commands.environment import configure_environment
    from clasp.config.build import load
    from clasp.convert.mteb_encoder import as_mteb
    from clasp.convert.onnx_model import OnnxModel
    from clasp.convert.open_clip import as_open_clip
    from clasp.errors import UserError
    from clasp.models.backbone import Backbone
    from clasp.models.inference import EmbeddingModel

__version__ = "0.1.0"
__all__ = [
    "Backbone",
    "BatchEmbedder",
    "EmbeddingModel",
    "OnnxModel",
    "UserError",
    "__version__",
    "as_mteb",
    "as_open_clip",
    "configure_environment",
    "load",
]

_HOME = {
    "load": "clasp.config.build",
    "as_open_clip": "clasp.convert.open_clip",
    "as_mteb": "clasp.convert.mteb_encoder",
    "EmbeddingModel": "clasp.models.inference",
    "Backbone": "clasp.models.backbone",
    "OnnxModel": "clasp.convert.onnx_model",
    "BatchEmbedder": "clasp.commands.embed_batches",
    "UserError": "clasp.errors",
    "configure_environment": "clasp.commands.environment",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"clasp has no {name!r}; its public names are {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
