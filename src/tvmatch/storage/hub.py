"""Downloads from and uploads to the Hugging Face Hub. Failures raise an `InputError` of one line.

`huggingface_hub` is imported when a function is called, because the import is slow.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tvmatch.errors import InputError, one_line

_TIMEOUT = 10.0  # seconds for a request
_MODEL = "neither a folder here nor a repository on the Hub that you have access to"


def download(
    repo_id: str,
    patterns: Sequence[str],
    *,
    subject: str | None = None,
    neither: str = _MODEL,
    **options: Any,
) -> Path:
    """Download the files of a model whose names match; without a network, use the cache.

    Args:
        repo_id: "user/name".
        patterns: of the files' names.
        subject, neither: see `hub_errors`.
        options: of `huggingface_hub.snapshot_download`, such as `revision` and `token`.

    Raises:
        InputError: if the repository or revision does not exist, is not accessible, or is neither cached nor
            reachable.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(repo_id, subject=subject, neither=neither):
        folder = snapshot_download(repo_id, allow_patterns=list(patterns), library_name="tvmatch", **options)
    return Path(folder)


def upload(
    folder: Path, repo_id: str, *, private: bool = False, token: str | None = None, commit_message: str
) -> str:
    """Upload a folder's files as one commit.

    Args:
        folder: to upload.
        repo_id: "user/name"; the repository is created if it does not exist.
        private: whether a new repository is private.
        token: of the Hub. Default: that of `hf auth login`.
        commit_message: message of the commit.

    Returns:
        The URL of the repository.

    Raises:
        InputError: for an invalid name, without access, or if the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    with hub_errors(repo_id):
        api = HfApi(token=token, library_name="tvmatch")
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
    return str(address)


def dataset_commit(name: str, *, subject: str | None = None, endpoint: str | None = None) -> str | None:
    """The newest commit of a data set on the Hub; one request with a short timeout.

    Args:
        name: of the data set.
        subject: see `hub_errors`.
        endpoint: of the Hub. Default: HF_ENDPOINT.

    Raises:
        InputError: if the data set does not exist, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    with hub_errors(
        name,
        subject=subject,
        neither="neither a local path nor a data set on the Hugging Face Hub",
        address=f"https://huggingface.co/datasets/{name}",
        hint="; HF_HUB_OFFLINE=1 uses an earlier download",
    ):
        return HfApi(endpoint=endpoint).dataset_info(name, timeout=_TIMEOUT).sha


def check_repository_name(repo_id: str) -> None:
    """Check the name of a repository.

    Raises:
        InputError: if it is not a valid name.
    """
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    with hub_errors(repo_id):
        validate_repo_id(repo_id)


@contextmanager
def hub_errors(
    name: str,
    *,
    subject: str | None = None,
    neither: str = _MODEL,
    address: str | None = None,
    hint: str = "",
) -> Iterator[None]:
    """Context that converts errors of the Hub to an `InputError`.

    Args:
        name: of the repository.
        subject: the option with the name. Default: the error is about the repository.
        neither: the message for a name that does not exist.
        address: URL of the page to request access. Default: the model's page.
        hint: appended if the Hub cannot be reached.
    """
    from huggingface_hub import errors

    def refusal(reason: str) -> InputError:
        return InputError(name, reason) if subject is None else InputError(subject, f"{name!r} is {reason}")

    try:
        yield
    except errors.GatedRepoError:
        page = address or f"https://huggingface.co/{name}"
        raise refusal(f"gated; ask for access at {page}, then `hf auth login`") from None
    except errors.HFValidationError:
        no_name = "neither a folder here nor a name user/name on the Hub"
        raise refusal(no_name if subject is None else neither) from None
    except errors.RepositoryNotFoundError:
        raise refusal(neither) from None
    except errors.RevisionNotFoundError:
        raise InputError(name, "the Hub has no such revision of it") from None
    except errors.LocalTokenNotFoundError:
        raise InputError("token", "give a token of the Hub, or log in with `hf auth login`") from None
    except Exception as error:  # of the HTTP client, which depends on the version, or a full disk
        reason = one_line(error)
        if isinstance(error, errors.LocalEntryNotFoundError):
            reason = "it is not in the cache, and the Hub cannot be reached"
        elif isinstance(error, errors.OfflineModeIsEnabled):
            reason = "the Hub cannot be reached, HF_HUB_OFFLINE is set"
        raise refusal(f"{neither} that can be reached ({reason}){hint}") from error
