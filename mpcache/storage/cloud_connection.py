"""The servers behind s3:// and gs:// URLs: how they are reached, and what their errors mean.

Credentials come from the environment and the clouds' usual files, and go nowhere but to the server.
"""

import contextlib
import datetime
import errno
import functools
import importlib.util
import ipaddress
import os
import re
from collections.abc import Iterator
from typing import Any, Literal
from urllib.parse import urlsplit

from mpcache.errors import DamagedStoreError, UsageError
from mpcache.untrusted_names import printable

Scheme = Literal["s3", "gs"]
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")
_METADATA = "169.254.169.254"
_SECONDS = datetime.timedelta(seconds=1)

# short: Python does not see Ctrl-C until obstore gives up
_RETRIES: dict[str, Any] = {
    "max_retries": 100,
    "backoff": {"init_backoff": 0.2 * _SECONDS, "max_backoff": 1 * _SECONDS, "base": 2},
    "retry_timeout": 5 * _SECONDS,
}
_TIMEOUTS: dict[str, Any] = {
    "connect_timeout": 5 * _SECONDS,
    "read_timeout": 30 * _SECONDS,  # also for sending a few megabytes and for a large copy
    "timeout": 180 * _SECONDS,  # of one request, which carries a few megabytes at most
}


def is_url(text: str) -> bool:
    """Whether text is a URL rather than a path."""
    return _SCHEME.match(text) is not None


def split_url(url: str) -> tuple[Scheme, str, str]:
    """Scheme, bucket and prefix of an s3:// or gs:// URL; UsageError for any other text."""
    scheme, _, rest = url.partition("://")
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.removesuffix("/")
    if re.search("[@:?]", rest):  # the message does not repeat the URL, which may hold a password
        raise UsageError(
            "a URL must not contain credentials or the characters @, : and ? after the scheme; "
            "set credentials in the environment"
        )
    if scheme not in ("s3", "gs") or not _BUCKET.fullmatch(bucket):
        raise UsageError(
            "a store must be a path, s3://BUCKET/NAME or gs://BUCKET/NAME, got "
            f"{printable(url)}; give the store in one of these forms"
        )
    steps = prefix.split("/") if prefix else []
    if not prefix.isprintable() or any(step in ("", ".", "..") for step in steps):
        raise UsageError(
            "the names between the slashes of a URL must be printable, and none may be empty, '.' "
            f"or '..', got {printable(url)}; give another URL"
        )
    return ("s3" if scheme == "s3" else "gs"), bucket, prefix


@functools.lru_cache(maxsize=64)
def bucket_client(scheme: Scheme, bucket: str) -> Any:
    """obstore's client of a bucket, one in a process, so that connections are reused."""
    if importlib.util.find_spec("obstore") is None:
        raise UsageError(
            f"{scheme}:// needs the package obstore, which is not installed; run pip install "
            f"'mpcache[{scheme}]'"
        )
    from obstore.store import GCSStore, S3Store

    if scheme == "gs":
        return GCSStore(bucket, client_options=_TIMEOUTS, retry_config=_RETRIES)  # type: ignore[arg-type]  # plain dicts
    options = {**_TIMEOUTS, "allow_http": True} if is_local_address(_endpoint()) else _TIMEOUTS
    provider = _credentials(bucket)
    return S3Store(
        bucket,
        client_options=options,  # type: ignore[arg-type]  # as above
        retry_config=_RETRIES,  # type: ignore[arg-type]  # as above
        **({} if provider is None else {"credential_provider": provider}),
    )


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def is_local_address(endpoint: str) -> bool:
    """Whether an address is this machine's own, where plain HTTP is safe."""
    host = urlsplit(endpoint).hostname or ""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _credentials(bucket: str) -> Any:
    """Credentials as AWS's own tools find them, profiles and single sign-on included.

    None where the environment has them, or boto3 is missing: obstore then looks for them itself.
    """
    variables = ("AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE")
    if any(os.environ.get(name) for name in variables) or importlib.util.find_spec("boto3") is None:
        return None
    from boto3 import Session
    from obstore.auth.boto3 import Boto3CredentialProvider

    session = Session()
    if session.get_credentials() is None:
        raise _no_credentials(f"s3://{bucket}")
    return Boto3CredentialProvider(session)


# --- errors ---


@contextlib.contextmanager
def translate_errors(url: str) -> Iterator[None]:
    """Raise errors of a server as the contract of Storage names them, in one line.

    Raises:
        FileNotFoundError: there is no such object.
        PermissionError, NotADirectoryError: access is denied, or there is no such bucket.
        ConnectionError: the server does not answer, or fails; a retry may help.
        OSError: the server refuses the request; the line says why.
        DamagedStoreError: the bucket has object names that no store has.
    """
    from obstore import exceptions

    try:
        yield
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            raise _no_bucket(url) from None
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from None
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError):
        raise _unusable(
            url, "access is denied; check the permissions of the bucket and your credentials"
        ) from None
    except exceptions.InvalidPathError as error:
        raise DamagedStoreError(
            f"{url} holds an object with a name that is not valid in a store: {_line(error)}; "
            "rename or remove the object"
        ) from None
    except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
        raise
    except exceptions.BaseError as error:
        if "NoSuchBucket" in str(error):
            raise _no_bucket(url) from None
        if _METADATA in str(error):  # where only machines of a cloud find credentials
            raise _no_credentials(url) from None
        refused = re.search(r"status code: (3|4(?!08|29))", str(error))
        raise (OSError if refused else ConnectionError)(f"{url}: {_line(error)}") from None


def _no_bucket(url: str) -> OSError:
    return NotADirectoryError(errno.ENOTDIR, "there is no such bucket", url)


def _no_credentials(url: str) -> OSError:
    names = "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if url.startswith("gs:"):
        names = "GOOGLE_APPLICATION_CREDENTIALS"
    return _unusable(url, f"there are no credentials; set {names} in the environment")


def _unusable(url: str, reason: str) -> OSError:
    return PermissionError(errno.EACCES, reason, url)


def _line(error: Exception) -> str:
    """The message of an error, without credentials and without the body of an answer."""
    line, *_ = re.split(r"[<{\n]", str(error))  # what follows is the body of an answer
    code = re.search(r"<Code>(\w+)</Code>", str(error))
    line = re.sub(r"://[^/\s]*@", "://", line).rstrip(" :")
    return printable(f"{line}: {code[1]}" if code else line)
