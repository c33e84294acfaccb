"""Who vouches for a bundle: Ed25519 signatures, with keys in the PEM files that openssl writes.

openssl genpkey -algorithm ed25519 -out signing.pem
openssl pkey -in signing.pem -pubout -out signing.pub.pem
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

_SHOWN = 16  # hexadecimal digits by which people tell keys apart


class SignError(ValueError):
    """A key that cannot be read, or a signature that does not hold; the message says which and why."""


class Signature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """key: the 32 bytes of the public key that `value`, 64 bytes, was made for.  Neither is to be believed."""

    key: bytes
    value: bytes


def private_key(path: Path) -> Ed25519PrivateKey:
    """The key in the PEM file `path`.  Raises `SignError`, or `OSError` when it cannot be read."""
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except TypeError:
        raise SignError(f"{path} is encrypted: decrypt it with openssl pkey -in {path} -out FILE") from None
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SignError(f"{path} holds no private key in PEM form") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise SignError(f"{path} holds a key of another kind: make one with openssl genpkey -algorithm ed25519")
    return key


def public_key(path: Path) -> Ed25519PublicKey:
    """The key in the PEM file `path`.  Raises `SignError`, or `OSError` when it cannot be read."""
    try:
        key = load_pem_public_key(path.read_bytes())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SignError(
            f"{path} holds no public key in PEM form: openssl pkey -in PRIVATE -pubout -out FILE writes one"
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise SignError(f"{path} holds a key of another kind, not Ed25519")
    return key


def name(key: Ed25519PublicKey | bytes) -> str:
    """What people call a public key: its first hexadecimal digits."""
    raw = key if isinstance(key, bytes) else key.public_bytes_raw()
    return raw.hex()[:_SHOWN]


def sign(key: Ed25519PrivateKey, digest: str) -> Signature:
    """Vouch for the index with `digest`."""
    return Signature(key.public_key().public_bytes_raw(), key.sign(_message(digest)))


def check(signature: Signature, digest: str, trust: Sequence[Ed25519PublicKey]) -> bool:
    """Whether one of the keys `trust` made the signature.  Raises `SignError` when none at all made it."""
    try:
        Ed25519PublicKey.from_public_bytes(signature.key).verify(signature.value, _message(digest))
    except (InvalidSignature, ValueError) as error:
        raise SignError("was changed after it was signed: its signature does not match") from error
    return any(signature.key == key.public_bytes_raw() for key in trust)


def _message(digest: str) -> bytes:
    return b"vllm-compile-ext bundle " + digest.encode()
