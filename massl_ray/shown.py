"""Text for people to see: in files, on terminals and web pages, and in messages."""

import re

SECRET = re.compile(
    r"(?i)(?:.*(?:key|key_?id|secret|token|tok|password|passwd|pwd|passphrase|credentials?|auth|signature|sig)"
    r"|x-(?:amz|goog)-.*"  # a signed address, which is another one every day
    r"|s[eprtv]|spr|sk\w+|expires)"  # the same on Azure
)
USERS = ("abfs", "abfss", "gs", "gcs", "hdfs", "viewfs", "sftp", "ssh")
"""Schemes whose user is part of where it is: a container, an account without a secret."""
ADDRESS = re.compile(r"(?<![A-Za-z0-9+.-])([A-Za-z][A-Za-z0-9+.-]*)://([^\s'\"<>]*)")


def redacted(text: str) -> str:
    """A URI, or a sentence with URIs in it, without their passwords, keys, tokens and signatures."""
    return ADDRESS.sub(lambda found: _without_secrets(*found.groups()), text) if "://" in text else text


def in_a_line(name: str) -> str:
    """File names may be any bytes: line feeds, and what makes a terminal do things."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def _without_secrets(scheme: str, rest: str) -> str:
    whole = rest.rstrip(".,:;!)")
    ending = rest[len(whole) :]  # of the sentence
    address, mark, options = whole.partition("?")
    root, slash, path = address.partition("/")
    if "@" in path and "@" not in root and not re.fullmatch(r"([^:]*|\[.*\])(:\d*)?", root):
        root, slash, path = f"@{path.rpartition('@')[2]}".partition("/")  # a password with a slash in it, which should be %2F
    elif "@" not in root and not re.fullmatch(r"([^:]*|\[.*\])(:.{0,5})?", root):
        root = root.partition(":")[0]  # what an error quotes of such an address: too long for a port
    user, at, host = root.rpartition("@")
    name = user.partition(":")[0] if scheme.lower() in USERS else ""
    kept = [option for option in options.split("&") if option and not SECRET.fullmatch(option.partition("=")[0])]
    return f"{scheme}://{name}{at if name else ''}{host}{slash}{path}{mark if kept else ''}{'&'.join(kept)}{ending}"
