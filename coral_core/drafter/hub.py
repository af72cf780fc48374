"""Folders from the Hugging Face Hub, and to it."""

from pathlib import Path

from coral_core import embedded
from coral_core.errors import ArtifactError, CoralError, first_line
from coral_core.hub import login, offline_where_absent

READ = ("*.json", "*.safetensors", "pytorch_model*.bin", "head/*")
"""What a drafter's repository may hold that is read; a folder for an engine, in a folder of its own, is not."""


def fetch(name: str, revision: str | None = None) -> Path:
    """The folder of that name, what coral ships by it (`pico`), or the Hub repository's copy in the user's cache.

    Raises ArtifactError when there is neither.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if own := embedded.shipped(name):
        return own / "drafter"
    if folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ArtifactError(f"no folder {name}; give the folder of a drafter, or a Hub id as org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        with offline_where_absent():
            return Path(snapshot_download(name, revision=revision, allow_patterns=list(READ)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = f"{first_line(error)}{login(error) or '.'}"
        raise ArtifactError(f"no folder {name}, and the Hub does not give it: {reason}") from error


def upload(folder: Path, repo_id: str, *, private: bool | None = None, message: str = "A drafter by coral") -> str:
    """Make the model repository where it is missing, and upload a folder to it in one commit; the commit's address.

    Raises CoralError with the Hub's reason.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message=message)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CoralError(f"the Hub refused {repo_id}: {first_line(error)}. Log in with: hf auth login") from error
    return str(done.commit_url)
