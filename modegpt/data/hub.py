"""The hub where it can be reached, and else the libraries' own caches of it."""

import re
import socket
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from modegpt.errors import UserError, shortened
from modegpt.progress import errors_only

LOGGERS = ("datasets", "huggingface_hub", "transformers")


@contextmanager
def hub_access(what: str, remedy: str) -> Iterator[None]:
    """Let the libraries fetch ``what`` from the hub, or from their own cache where the hub is out of reach.

    Asked directly they retry for half a minute and print each try; here an unreachable hub is known at once, and they
    show nothing but, on a terminal, bars. Raises UserError with the ``remedy`` when ``what`` is neither reachable nor
    cached, and with the steps to a licence where it is gated.
    """
    import datasets
    import huggingface_hub

    flags = [(huggingface_hub.constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")]
    before = [getattr(module, name) for module, name in flags]
    offline = any(before) or not _hub_answers(huggingface_hub.constants.ENDPOINT)
    for module, name in flags:
        setattr(module, name, offline)
    try:
        with _silence():
            yield
    except (OSError, datasets.exceptions.DatasetsError) as error:
        reason = _offline_reason(any(before)) if offline else _reason(error)
        raise UserError(f"cannot load {what} from the hub ({reason}); {remedy}") from None
    finally:
        for (module, name), value in zip(flags, before, strict=True):
            setattr(module, name, value)


def commit_of(data: Any) -> str | None:
    """The commit of the hub's repository that a ``datasets.Dataset`` was made from; None for one made otherwise."""
    folders = {Path(file["filename"]).parent.name for file in data.cache_files}
    return next((folder for folder in sorted(folders) if re.fullmatch(r"[0-9a-f]{40}", folder)), None)


def commit_of_file(repository: str, file: str, revision: str | None) -> str | None:
    """The commit of a model's repository that ``file`` of it is from, once it was loaded; None where it was not."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, file, revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None  # .../snapshots/COMMIT/FILE


def _reason(error: BaseException) -> str:
    """Why the hub did not give what it was asked for: what its own answer says, where that is behind ``error``."""
    import huggingface_hub
    from huggingface_hub import errors

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, errors.RepositoryNotFoundError | errors.RevisionNotFoundError):
        cause = cause.__cause__
    gated = None
    if isinstance(cause, errors.GatedRepoError):  # older versions of huggingface_hub know its address alone
        gated = cause.repo_id or urlsplit(str(cause.response.url)).path.partition("/resolve/")[0].strip("/")
    if data := re.match(r"Dataset '(\S+)' is a gated dataset", str(error)):  # ``datasets`` drops the cause
        gated = f"datasets/{data[1]}"
    if gated is not None:
        page = f"{huggingface_hub.constants.ENDPOINT}/{gated}"
        return f"it is gated: accept its licence at {page}, then log in with `hf auth login`, or set HF_TOKEN"
    match cause:
        case errors.RepositoryNotFoundError():
            return "there is no repository of this name, or it is private: then log in with `hf auth login`"
        case errors.RevisionNotFoundError():
            return "its repository has no such revision: give a branch, a tag or a commit"
    return shortened(str(error))


def _offline_reason(wanted: bool) -> str:
    import huggingface_hub

    where = huggingface_hub.constants.ENDPOINT
    return f"{'HF_HUB_OFFLINE is set' if wanted else f'{where} cannot be reached'}, and its cache here has no copy"


@contextmanager
def _silence() -> Iterator[None]:
    """No warnings of the libraries, whose errors say it all, and bars on a terminal only."""
    import datasets
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    bars = [] if sys.stderr.isatty() else [datasets.are_progress_bars_disabled(), are_progress_bars_disabled()]
    if bars:
        datasets.disable_progress_bars()
        disable_progress_bars()
    try:
        with errors_only(LOGGERS):
            yield
    finally:
        for were_off, enable in zip(bars, (datasets.enable_progress_bars, enable_progress_bars), strict=False):
            if not were_off:
                enable()


def _hub_answers(endpoint: str) -> bool:
    address = urlsplit(endpoint)
    host = address.hostname or ""
    if urllib.request.getproxies() and not urllib.request.proxy_bypass(host):  # a proxy resolves names for us
        return True
    try:
        socket.create_connection((host, address.port or (80 if address.scheme == "http" else 443)), timeout=5).close()
    except OSError:
        return False
    return True
