"""Whether the Hugging Face Hub answers. Asked before its client is: without a network that one tries for minutes."""

import contextlib
from collections.abc import Iterator

PATIENCE_S = 5.0
"""A Hub that has not answered after so many seconds is taken for absent."""


def answers() -> bool:
    """Whether the Hub, its mirror (HF_ENDPOINT) or the proxy before it answers within PATIENCE_S; never in the client's
    offline mode. An answer that is an error is the client's to tell."""
    import ssl
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        urllib.request.urlopen(request, timeout=PATIENCE_S).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # the client may know certificates that Python does not
    except OSError:
        return False
    return True


@contextlib.contextmanager
def offline_where_absent() -> Iterator[None]:
    """Where the Hub does not answer, its clients take what is in their caches, or fail at once."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = not answers()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def login(error: BaseException) -> str:
    """What mends it where the Hub hides a repository or asks for leave, as the end of a message; else ''."""
    from huggingface_hub.errors import RepositoryNotFoundError

    cause: BaseException | None = error
    while cause:  # transformers and datasets raise errors of their own from the Hub's
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(cause, RepositoryNotFoundError) or status in (401, 403):
            return ". If it is private or gated, accept its terms on its page and run: hf auth login"
        cause = cause.__cause__
    return ""


def unreachable() -> str:
    """What a user is told where the Hub does not answer."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return f"the Hub ({constants.ENDPOINT}) does not answer"
