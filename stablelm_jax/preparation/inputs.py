"""Which files there are to read, in which order, and of what kind each of them is."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence

from stablelm_jax.preparation import hub
from stablelm_jax.preparation.finding import InputError, InputFile, LeftOut, files_of
from stablelm_jax.preparation.formats import kind_of, missing_package

TRAINING_NOTES = ".training.json"  # ends the name of what stands beside a trained tokenizer
_METADATA = ("state.json", "dataset_info.json", "dataset_dict.json")


def find_files(
    inputs: Sequence[str],
    file_format: str = "auto",
    left_out: list[LeftOut] | None = None,
    tokenizer: str | None = None,
    revisions: dict[str, str] | None = None,
) -> list[InputFile]:
    """All files to read under `inputs` (files, folders, patterns; local or any fsspec URL).

    Args:
      left_out: gets what is found and not read.
      tokenizer: a tokenizer.json that is no text: it is left out, with what it was made from.
      revisions: of inputs on the Hub that are known, as `hub.pinned` takes them; gets the others.

    Raises:
      InputError: nothing is found under a name, or a file is named twice.
    """
    left_out = [] if left_out is None else left_out
    revisions = {} if revisions is None else revisions
    path = os.path.realpath(tokenizer or "")
    notes = os.path.splitext(path)[0] + TRAINING_NOTES
    ours = {path, notes, os.path.join(path, "tokenizer.json")}
    files: dict[str, InputFile] = {}
    identities: dict[tuple[int, int], str] = {}
    for written in inputs:
        try:
            found = files_of(hub.pinned(written, revisions), left_out, identities)
        except OSError as error:  # of the Hub
            raise InputError(f"--input {error}") from error
        for file in found:
            if file.path in files:
                raise InputError(f"--input: {file.name} is reached twice; name it once")
            if os.path.realpath(file.path) in ours:
                left_out.append(LeftOut(file.name, "the tokenizer", file.size))
            else:
                kind, compression = kind_of(file.last_name, file_format)
                if missing := missing_package(kind):
                    raise InputError(f"{file.name}: {missing}")
                files[file.path] = file._replace(kind=kind, compression=compression)
    return _without_metadata(list(files.values()), left_out)


def _without_metadata(files: list[InputFile], left_out: list[LeftOut]) -> list[InputFile]:
    """Leaves out what `save_to_disk` of Hugging Face datasets writes beside and above its rows."""
    saved = {os.path.dirname(file.path) for file in files if file.kind == "arrow"}
    saved |= {os.path.dirname(folder) for folder in saved}
    kept = []
    for file in files:
        if file.last_name in _METADATA and os.path.dirname(file.path) in saved:
            left_out.append(LeftOut(file.name, "metadata of a data set", file.size or 0))
        else:
            kept.append(file)
    return kept


def check_split(split_on: str | None, files: Sequence[InputFile]) -> None:
    """InputError where texts are to be split and there are none."""
    if split_on and not {"text", "tar", "zip", "warc"} & {file.kind for file in files}:
        raise InputError("--split-on cuts texts, and there is none in the input")


def fingerprint(files: Sequence[InputFile]) -> str:
    """A hash that changes when a file is added, taken away, renamed, moved in order or changed.

    The folder that all files share is left out: moving it as a whole keeps the hash.
    """
    shared = len(os.path.commonprefix([os.path.dirname(file.path) + "/" for file in files]))
    rows = [[f.path[shared:], f.size, f.version, f.kind, f.compression] for f in files]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
