"""Random numbers with addresses: every draw is a function of a key and of what it is drawn for.

There are two keys. The *seed* (public) fixes data, splits and initialization. The *secret* (never exported) fixes
noise and sampling: whoever knows the noise can subtract it. An address names purpose, round, user and step or record,
by identifier and not by position, so removing one record or one user changes no other draw. Poisson sampling of
clients alone goes by the place on the public list of registered users, on which a user without records stays.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedpers.errors import ConfigError

Part = str | int
_UNIT = float(2**-53)  # spacing of the doubles in [0, 1) that 53 random bits reach


def seed_key(seed: int) -> bytes:
    """Return the 32-byte key of a public integer seed."""
    return hashlib.blake2b(str(seed).encode(), digest_size=32, person=b"fedpers-seed").digest()


def secret_key(text: str | None) -> bytes:
    """Return the 32-byte secret: fresh from the operating system, or the one given as 64 hexadecimal digits.

    Raises:
        ConfigError: the text is not 64 hexadecimal digits.
    """
    if text is None:
        return secrets.token_bytes(32)
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != 32:
        raise ConfigError("privacy.secret: expected 64 hexadecimal digits (32 bytes); leave it out for a fresh secret.")
    return key


def run_keys(secret: bytes, configuration: str) -> tuple[bytes, bytes]:
    """Return the server's and the clients' key for one configuration (its text, without what changes no result).

    A secret that is given twice must not protect two different releases with the same noise, so every configuration has
    keys of its own; the server never holds the key of the clients' noise.
    """
    root = derive(secret, "run", configuration)
    return derive(root, "server"), derive(root, "clients")


def _encode(address: Sequence[Part]) -> bytes:
    parts = []
    for part in address:
        if type(part) not in (str, int):  # 1.0 and "1.0" must not meet either
            raise TypeError(f"an address is made of str and int, not {type(part).__name__}")
        parts.append(_part(b"i" if isinstance(part, int) else b"s", str(part)))
    return b"".join(parts)


def _part(kind: bytes, text: str) -> bytes:
    # Type and length before each part: ("a", "bc") and ("ab", "c") or 1 and "1" never meet.
    encoded = text.encode()
    return b"%c%d:%b" % (kind, len(encoded), encoded)


@lru_cache(maxsize=2**18)
def _stem(name: str) -> bytes:
    """A record's name as a part of an address; a run asks for the same ones in every round."""
    return _part(b"s", name)


def derive(key: bytes, *address: Part) -> bytes:
    """Return the 32 bytes that belong to `address` under `key` (BLAKE2b as a keyed pseudo-random function)."""
    return hashlib.blake2b(_encode(address), digest_size=32, key=key).digest()


def generator(key: bytes, *address: Part) -> np.random.Generator:
    """Return a counter-based generator (Philox 4x64) for one address."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(derive(key, *address)[:16], "little")))


def uniforms(key: bytes, address: Sequence[Part], names: Sequence[str], count: int = 1) -> NDArray[np.float64]:
    """Return uniforms in [0, 1), shape (names, count): row i depends on the key, the address and names[i] alone."""
    if any(type(name) is not str for name in names):
        raise TypeError("names are str")
    root = derive(key, *address)
    ends = [b"%d" % block for block in range(-(-count // 8))]
    # A million of these are drawn in a run whose steps cost nothing else, so there is one call for each.
    digests = [
        hashlib.blake2b(stem + end, digest_size=64, key=root).digest() for stem in map(_stem, names) for end in ends
    ]
    words = np.frombuffer(b"".join(digests), dtype="<u8").reshape(len(names), 8 * len(ends))
    return (words[:, :count] >> np.uint64(11)).astype(np.float64) * _UNIT


def order(key: bytes, address: Sequence[Part], names: Sequence[str]) -> NDArray[np.intp]:
    """Return a random permutation of names; removing one name leaves the order of the others as it was."""
    return np.argsort(uniforms(key, address, names)[:, 0], kind="stable")


def fingerprint(key: bytes, *address: Part) -> str:
    """Name a random stream for the ledger: the same stream has the same name, and the name tells nothing of it."""
    return derive(key, "fingerprint", *address).hex()
