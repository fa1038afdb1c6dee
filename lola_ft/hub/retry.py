"""Errors of the Hub: their meaning for the user, and trying again after passing errors."""

import json
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

from lola_ft.errors import PublishError

T = TypeVar("T")
Wait = Callable[[float], None]

WAITS = (1.0, 4.0, 10.0)
"""Seconds to wait before each further try."""

_CONFLICTS = (409, 412)
_LATER = (408, 429)


def with_retries(call: Callable[[], T], repo: str, wait: Wait = time.sleep) -> T:
    """Call a function, and up to three times again after a dropped connection, a server error or a conflict."""
    for seconds in (*WAITS, None):
        try:
            return call()
        except (HTTPError, OSError, RuntimeError, ValueError) as error:
            if seconds is None or not _passing(error):
                raise explain(error, repo) from error
            wait(seconds)
    raise AssertionError("the last try returns or raises")


def explain(error: Exception, repo: str) -> PublishError:
    """Return an error of the Hub in words that a user can act on."""
    status, owner = _status(error), repo.partition("/")[0]
    if status == 401:
        return PublishError(
            f"{repo}: the Hub does not accept your token (401). Log in with `hf auth login`, or set HF_TOKEN, with a "
            "token with write access."
        )
    if status == 403:
        return PublishError(
            f"{repo}: your token may not write there (403). Use a token with write access to '{owner}' (`hf auth "
            "login`), or another --repo."
        )
    if status == 404:
        return PublishError(f"{repo}: the Hub has no such repository, or your token may not see it (404).")
    if status in _CONFLICTS:
        return PublishError(
            f"{repo}: the repository is being changed by someone else ({status}). Run the command again."
        )
    if status is not None:
        again = " Run the command again later." if status >= 500 or status in _LATER else ""
        return PublishError(f"{repo}: the Hub refused with {status}: {_reason(error)}.{again}")
    if any(isinstance(link, OfflineModeIsEnabled) for link in _chain(error)):
        return PublishError(f"{repo}: HF_HUB_OFFLINE is set, so nothing can be sent. Unset it.")
    if _passing(error):
        return PublishError(
            f"{repo}: the Hub cannot be reached, or the connection dropped ({_reason(error)}). Run the command again."
        )
    return PublishError(f"{repo}: the upload failed ({_reason(error)}).")


def _passing(error: Exception) -> bool:
    """Tell whether another try may succeed."""
    status = _status(error)
    if status is not None:
        return status >= 500 or status in (*_LATER, *_CONFLICTS)
    links = list(_chain(error))
    if any(isinstance(link, OfflineModeIsEnabled) for link in links):
        return False
    return any(isinstance(link, HTTPError | ConnectionError | TimeoutError | json.JSONDecodeError) for link in links)


def _status(error: Exception) -> int | None:
    """Return the HTTP status behind an error, which an upload's error may wrap; None if there is none."""
    return next((link.response.status_code for link in _chain(error) if isinstance(link, HfHubHTTPError)), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _reason(error: Exception) -> str:
    last = list(_chain(error))[-1]
    server = next((link.server_message for link in _chain(error) if isinstance(link, HfHubHTTPError)), None)
    return (server or str(last) or type(last).__name__).strip().splitlines()[0].rstrip(".")
