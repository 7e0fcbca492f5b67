"""The hub where it can be reached, and else the libraries' own caches of it."""

import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from modegpt.errors import UserError


@contextmanager
def hub_access(what: str, remedy: str) -> Iterator[None]:
    """Let the libraries fetch ``what`` from the hub, or from their own cache where the hub is out of reach.

    Asked directly they retry for half a minute and print each try; here an unreachable hub is known at once.
    Raises UserError with the ``remedy`` when ``what`` is neither reachable nor cached.
    """
    import datasets
    import huggingface_hub

    flags = [(huggingface_hub.constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")]
    before = [getattr(module, name) for module, name in flags]
    offline = any(before) or not _hub_answers(huggingface_hub.constants.ENDPOINT)
    for module, name in flags:
        setattr(module, name, offline)
    try:
        yield
    except (OSError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot load {what} from the hub ({reason}); {remedy}") from None
    finally:
        for (module, name), value in zip(flags, before, strict=True):
            setattr(module, name, value)


def _hub_answers(endpoint: str) -> bool:
    if urllib.request.getproxies():  # a proxy resolves names for us
        return True
    address = urlsplit(endpoint)
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=5).close()
    except OSError:
        return False
    return True
