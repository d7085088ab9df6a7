"""Hashes of models, for identities: answers of a model with other weights are other answers."""

import functools
import hashlib
import pathlib


@functools.cache
def weights_hash(folder: str) -> str:
    """sha256 of what a model's folder says of it, weights, config and tokenizer, in hexadecimal."""
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(folder).iterdir()):
        if path.suffix in (".safetensors", ".json", ".txt", ".model", ".jinja"):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
