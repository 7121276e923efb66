"""`from_pretrained`, `save_pretrained` and `push_to_hub` for models, by the mixin of huggingface_hub.

It comes with accelerate. Where it is not installed, models work but have none of these methods.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from npp_ds.errors import UserError

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"

if TYPE_CHECKING:

    class PyTorchModelHubMixin:
        def __init_subclass__(cls, **arguments: Any) -> None: ...
        @classmethod
        def from_pretrained(cls, folder: str | Path, **arguments: Any) -> Any: ...
        def save_pretrained(self, folder: str | Path, **arguments: Any) -> Any: ...
else:
    try:
        from huggingface_hub import PyTorchModelHubMixin
    except ImportError:

        class PyTorchModelHubMixin:
            def __init_subclass__(cls, **arguments: Any) -> None: ...


class HubModel(PyTorchModelHubMixin, library_name="npp_ds", tags=["next-patch-prediction", "image-generation"]):
    """A model whose `__init__` takes a dataclass `config`. Its folders hold config.json and model.safetensors.

    All tensors must fit unless `strict=False` is given, and pickled weights are never read.
    """

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **arguments: Any) -> Any:
        folder = Path(arguments["model_id"])
        if folder.is_dir() and not (folder / WEIGHTS_FILE).is_file():
            raise UserError(f"{folder}: no {WEIGHTS_FILE} in it; expected a folder of save_pretrained or npp export")
        return super()._from_pretrained(strict=strict, **arguments)  # type: ignore[misc]

    @classmethod
    def _load_as_pickle(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        raise UserError(f"{model_file}: pickled weights are not read; expected {WEIGHTS_FILE} beside it")
