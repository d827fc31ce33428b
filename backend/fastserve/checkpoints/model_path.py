"""From what a user names (a path, or a model of the Hugging Face hub) to files on this machine.

Imports no torch.
"""

from __future__ import annotations

from pathlib import Path

from fastserve.checkpoints.model_error import ModelError

_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def resolve_model_path(model: str) -> Path:
    """The GGUF file or the directory of `model`; a model of the hub is fetched into the hub's own cache.

    Raises ModelError if there is no such path and the hub has no such model, or cannot be reached.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ModelError(
            f"{model}: no such file or directory, and not the name of a model of the hub (owner/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_FILES))
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{model}: not on this machine, and the hub cannot be reached. Fetch it where there is a network "
            f"(`hf download {model}`), then give its directory"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise ModelError(f"{model}: the hub refused it: {error}") from error
