"""Paths and URIs: which is which, and how messages show them without credentials."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

# A scheme of two letters or more: one letter is a drive of Windows. `Path` drops one of the slashes.
_SCHEME = r"[A-Za-z][\w+.-]+:/+"

# Credentials reach to the last "@": a password may hold any character, "/", "@", "?" and blanks too.
# Azure's URIs name a container before it, abfss://container@account.
_CREDENTIALS = re.compile(rf"({_SCHEME})(?:[^\s/:@]*:.*@|(?<!abfs://)(?<!abfss://)[^\s/@]+@)", re.S)


def is_uri(location: str | Path) -> bool:
    """Return whether a location is a URI rather than a path."""
    return re.match(_SCHEME, str(location)) is not None


def is_directory(location: str | Path) -> bool:
    """Return whether a path is a directory; a URI is assumed to be one."""
    return is_uri(location) or Path(location).is_dir()


def local_path(location: str | Path) -> Path:
    """Return a path on this machine."""
    if is_uri(location):
        raise ValueError(f"{display_name(location)} is a URI; expected a path on this machine")
    return Path(location)


def split_uri(location: str) -> tuple[str, str, str]:
    """Return the scheme and host of a URI, the path, and the options with their question mark."""
    scheme, _, rest = location.partition("://")
    rest, mark, options = rest.partition("?")
    host, _, path = rest.partition("/")
    return f"{scheme}://{host}/", path, mark + options


def display_name(location: str | Path) -> str:
    """Return a location for messages: a URI without quoting, options and credentials."""
    if not is_uri(location):
        return str(location)
    return unquote(_CREDENTIALS.sub(r"\1", str(location)).partition("?")[0])


def without_passwords(text: str) -> str:
    """Return a text in which no URI holds credentials or options."""
    return re.sub(r"(?<=[?&])([\w.-]+)=[^\s&]*", r"\1=...", _CREDENTIALS.sub(r"\1", text))
