"""Artefacts on the Hugging Face Hub: `owner/name/folder` to a local folder of the Hub's cache.

Of a folder only the names that `load` reads are downloaded: `examples.safetensors`, which is larger
than the weights, never is. `HF_HUB_OFFLINE`, `HF_HOME` and tokens are `huggingface_hub`'s to read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import files, gemma_scope_1, gemma_scope_2

_REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/(.+?))?/?", re.ASCII)
_FOLDER = re.compile(r"(?:[\w-][\w.-]*/)*[\w-][\w.-]*", re.ASCII)  # no part starts with a dot
NAMES = (
    *(files.CONFIG, gemma_scope_2.PARAMS, "params_layer_[0-9]*.safetensors"),
    gemma_scope_1.PARAMS,
)


def split(source: str, subfolder: str | None) -> tuple[str, str] | None:
    """`(owner/name, folder)` if `source` has the form of a Hub id; the folder may be empty."""
    match = _REPOSITORY.fullmatch(source)
    if match is None or ".." in match[1]:
        return None
    folder = "/".join(part for part in (match[2], subfolder) if part).rstrip("/")
    return (match[1], folder) if not folder or _FOLDER.fullmatch(folder) else None


def fetch(repository: str, folder: str, revision: str | None) -> Path:
    """The folder (or `.safetensors`, `.npz` file) of a repository, in the Hub's cache.

    Raises:
        ImportError: `huggingface_hub` is not installed.
        FileNotFoundError: no such repository, revision or folder, or offline and not in the cache.
        PermissionError: the repository is gated.
        ConnectionError: the Hub does not answer, or refuses otherwise.
    """
    where = f"load: {repository}" + (f"/{folder}" if folder else "")
    hub = _library(where)
    parent, slash, name = folder.rpartition("/")
    if not name.endswith((".safetensors", ".npz")):
        parent, slash, name = folder, "/" if folder else "", ""
    names = (files.CONFIG, name) if name else NAMES
    with _explained(hub.utils, where, revision):
        root = hub.snapshot_download(
            repository,
            revision=revision,
            allow_patterns=[parent + slash + pattern for pattern in names],
            ignore_patterns=["*examples.safetensors"],
        )
    path = Path(root) / folder
    if not any((path.parent if name else path).glob("params*")):
        raise FileNotFoundError(
            f"{where}: the repository has no artefact there"
            f"{_at(revision)}, or it is not in the local cache and the Hub is offline; an artefact "
            "is a folder like resid_post/layer_12_width_16k_l0_small"
        )
    return path


def _library(where: str) -> Any:
    try:
        import huggingface_hub.utils
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("huggingface_hub"):
            raise  # it is there, and broken
        raise ImportError(
            f"{where} is no local path, and to load it from the Hugging Face Hub needs "
            "huggingface_hub: pip install huggingface_hub"
        ) from error
    return huggingface_hub


@contextmanager
def _explained(errors: Any, where: str, revision: str | None) -> Iterator[None]:
    """Turn the library's errors into those that `fetch` promises."""
    try:
        yield
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{where}: the repository is gated: accept its terms on huggingface.co, then run "
            "`hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{where} is neither a local path nor in a repository of the Hugging Face Hub (a "
            "private one needs `hf auth login`)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{where}: there is no revision {revision!r}") from error
    except errors.LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{where} is not in the local cache of the Hugging Face Hub{_at(revision)}, and the "
            f"Hub is offline or cannot be reached: {error!s:.300}"
        ) from error
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled) as error:
        raise ConnectionError(f"{where}: the Hugging Face Hub refused: {error!s:.300}") from error


def _at(revision: str | None) -> str:
    return "" if revision is None else f" at revision {revision!r}"
