"""Runs on the Hugging Face hub: ``clasp.load("hf:USER/NAME")``, and the upload of an exported folder.

Input: a repository's name, or a folder and a name. Output: a folder on this machine, or the address of the upload.
Note: errors of the hub (no network, no token, no such repository) are one line each.
"""

from __future__ import annotations

from pathlib import Path

from clasp.types import UserError

RUN_SCHEME = "hf:"


def fetch_run(run: str | Path) -> Path:
    """The folder of a run; that of ``hf:USER/NAME`` is downloaded into the hub's cache. Raises ``UserError``."""
    if not isinstance(run, str) or not run.startswith(RUN_SCHEME):
        return Path(run)
    from huggingface_hub import snapshot_download

    name = run.removeprefix(RUN_SCHEME)
    try:
        return Path(snapshot_download(name))
    except (OSError, ValueError) as error:
        raise UserError(
            f"run {run!r} cannot be downloaded ({_first_line(error)}); a folder loads without a hub"
        ) from None


def is_hub_run(name: str) -> bool:
    """Whether the repository ``hf:USER/NAME`` is a run, by its ``recipe.toml``; false for other models.

    Raises ``UserError`` where the hub cannot be reached and the file is not in its cache.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        hf_hub_download(name.removeprefix(RUN_SCHEME), "recipe.toml")
    except RemoteEntryNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise UserError(
            f"model {name!r} cannot be read from the hub ({_first_line(error)}); a folder needs no hub, and clip:"
            f"{name.removeprefix(RUN_SCHEME)} opens a CLIP that the hub's cache has"
        ) from None
    return True


def require_hub_token() -> None:
    """Raises ``UserError`` where there is no token to upload with."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError(
            "--push needs a token of the hub: type hf auth login, or set HF_TOKEN; without --push no hub is used"
        )


def push_run(folder: Path, name: str) -> str:
    """Upload ``folder`` as the repository ``name``; returns its address. Raises ``UserError``."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--push {name}: the hub cannot be reached, or refuses it ({_first_line(error)}); without --push the "
            "folder is written, to be uploaded later"
        ) from None
    return str(address)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
