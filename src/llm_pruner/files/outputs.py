"""What a command may write, and what of a user's it would destroy: said before any work begins.

A folder that this package writes lists its files, with what they held, in ``MANIFEST``. Only such a
folder is ever replaced, and only while it holds nothing else.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

from llm_pruner.errors import UserError, require_kind
from llm_pruner.files.disk import (
    can_move,
    expanded,
    json_object,
    new_file,
    new_folder,
    read_json,
    starts_with,
    tidy,
)

MANIFEST = ".written-by-llm-pruner"
"""A name without an ending, so that nothing takes it for a part of the model."""

RECOVERY_FILE = "recovery.json"
"""What ``recover`` writes of a run beside the weights."""

_WHOLE, _BLOCK = 2**24, 2**16
"""Bytes up to which a file is read whole to know it again, and of a sample of a larger one."""

_MODEL = re.compile(
    r"plan\.json|config\.json|generation_config\.json|.*\.safetensors|.*\.gguf|.*\.bin|.*\.index\.json"
    r"|tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)"
    r"|merges\.txt|(tokenizer|spiece|sentencepiece.*)\.(model|vocab)|ice_text\.model|.*\.tiktoken"
    r"|chat_template\.(jinja|json)|(video_)?preprocessor_config\.json|processor_config\.json"
)
"""Files of a model."""

_RECORDS = re.compile(r"report\.(json|html)|README\.md|(recovery|vocabulary)\.json|request\.yaml")
"""Files that lie beside a model that this package wrote."""

_CURVE = re.compile(r"(curve|plan-[\d.e-]+)\.json")
"""Files of sizes that were measured."""

_BEFORE = re.compile(
    rf"({_MODEL.pattern}|{_RECORDS.pattern}|adapter/adapter_(config\.json|model\.safetensors)"
    r"|adapter/README\.md|additional_chat_templates/\w+\.jinja"
    r"|(modeling|configuration|tokenization|layout|registration)\w*\.py)"
)
"""What folders hold that were written before there was a manifest."""

_TASKS_BEFORE = re.compile(
    r"(boolq|piqa|hellaswag|winogrande|arc_easy|arc_challenge|openbookqa)\.(jsonl|yaml)"
    r"|offline_data\.py"
)

_HALF = re.compile(r"\..+\.partial-[a-z0-9_]{8}")

Kind = Literal["results", "page", "plan"]

Source = str | Path | None
"""Something that a command reads: a path, a name on the hub, a word for what the package ships or
a model writes, or nothing."""

_WORDS = (None, "", "default", "demo", "self", "chat", "pruned")


def check_output(out: Path, overwrite: bool, reads: Iterable[Source] = ()) -> None:
    """Raise UserError if ``out`` cannot become the output folder; meant to run before long work.

    An empty folder is fine; a file never. With ``overwrite`` a folder with content is, if this
    package wrote all that it holds, and it has nothing to do with what is read. What earlier
    processes left when they were killed is cleared away.

    Args:
        reads: all that the command reads; names that are no files here do not matter.
    """
    check_place(out, "--out")
    if out.is_symlink() and not out.exists():
        raise UserError(f"{out} is a link to something that is not there; choose another name")
    place = out.resolve()
    tidy(place)
    if place.is_dir():
        if os.path.ismount(place):
            raise UserError(f"{out} is a mount point and cannot be replaced; name a folder in it")
        if not os.access(place, os.W_OK):  # what it holds has to go, or another takes its place
            raise UserError(f"{out} may not be written; name another folder, or allow it")
        here = Path.cwd()
        if place == here or place in here.parents:
            raise UserError(f"{out} is the current folder or holds it; name another folder")
        if any(place.iterdir()):
            if not overwrite:
                raise UserError(
                    f"{out} exists and is not empty, so nothing was written; "
                    "choose another folder or pass --overwrite"
                )
            _check_replaceable(out, place, reads)
            if not can_move(place):
                raise UserError(
                    f"{out} is of a lower layer of an overlay and cannot be replaced; name another "
                    "folder"
                )
    elif place.exists():
        raise UserError(f"{out} is a file, but the output is a folder; choose another name")


def check_file(
    option: str,
    file: Path,
    kind: Kind = "results",
    reads: Iterable[Source] = (),
    out: Path | None = None,
) -> None:
    """Raise UserError if a file cannot be written; meant to run before long work.

    A file with content is replaced by results or a page only if it holds such, by a plan only if
    it holds one, and never if it is a part of a model or is read. What is no file, as a device, is
    written into.

    Args:
        option: what names it, for what is said.
        file: the file; a link stands for what it leads to.
        kind: what will be written.
        reads: all that the command reads, and other files that it writes.
        out: the folder or file that the command writes; what lies there is not to be replaced.
    """
    what = f"{option} {file}"
    if os.path.isdir(file):
        raise UserError(f"{what} is a folder; name the file to write")
    if _is_written_into(file):
        if not os.access(file, os.W_OK):
            raise UserError(f"{what} may not be written; name another file")
        return
    check_place(file, option)
    place = file.resolve()
    tidy(place)
    made = None if out is None else out.resolve()
    in_out = place.parent == made
    used = made is not None and place in (made, *made.parents)
    used |= in_out and _CURVE.fullmatch(place.name) is not None
    if used or any(place == read for _, read in _places(reads)):
        raise UserError(f"{what} is used by this command otherwise; name another file")
    model, record = (pattern.fullmatch(place.name) for pattern in (_MODEL, _RECORDS))
    there = place.exists()
    beside_model = in_out or (place.parent / "config.json").is_file()
    lone_plan = kind == "plan" and place.name == "plan.json" and not beside_model
    if ((there or beside_model) and model and not lone_plan) or (beside_model and record):
        does = "would replace" if there or in_out else "would be taken for"
        raise UserError(f"{what} {does} a file of a model; name another file")
    if there and not _holds(place, kind):
        noun = kind if kind == "results" else f"a {kind}"
        raise UserError(
            f"{what} exists and does not hold {noun}, so it is not replaced; name another file"
        )


def check_new_file(out: Path, magic: bytes, overwrite: bool, reads: Iterable[Source]) -> None:
    """Raise UserError if ``out`` cannot become a binary file; meant to run before long work.

    Args:
        out: the file; a link stands for what it leads to.
        magic: how such files begin; no other is replaced.
    """
    if os.path.isdir(out):
        raise UserError(f"{out} is a folder; --out names the file to write")
    check_place(out, "--out")
    place = out.resolve()
    tidy(place)
    if any(place == read for _, read in _places(reads)):
        raise UserError(f"{out} is read by this command, so it is not replaced; give another --out")
    if not place.exists():
        return
    if not overwrite:
        raise UserError(f"{out} exists; give another --out, or --overwrite to replace it")
    if not starts_with(place, magic):
        raise UserError(
            f"{out} is no {magic.decode()} file, so it is not replaced; give another --out"
        )


def write_output(file: Path, text: str) -> None:
    """Write ``text`` as UTF-8 with ``\\n`` line ends; the file holds all of it or is as it was.

    A link stands for what it leads to. What is no file, as a device, is written into.
    """
    file = Path(file)
    if _is_written_into(file):
        with file.open("a", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
        return
    place = file.resolve()
    rewrite(place.parent, {place.name: text})


def rewrite(folder: Path, texts: Mapping[str, str]) -> None:
    """Replace files of a folder, one after the other, and keep its manifest true at any moment."""
    written = _manifest(folder)
    if written is not None:
        new = {name: _digest_of(io.BytesIO(text.encode())) for name, text in texts.items()}
        either = {name: sorted({*written.get(name, ()), value}) for name, value in new.items()}
        _write_manifest(folder, written | either)
    for name, text in texts.items():
        _write(folder / name, text)
    if written is not None:
        _write_manifest(folder, written | {name: [value] for name, value in new.items()})


def not_ours(folder: Path) -> str | None:
    """Return what a folder holds that this package did not write, in words; None if nothing."""
    written = _manifest(folder)
    names = sorted(_names(folder))
    if written is None:
        return _not_ours_before(folder, names)
    for name in names:
        if name == MANIFEST:
            continue
        if name not in written or (folder / name).is_symlink():
            return f"{name}, which llm-pruner did not write"
        if _digest(folder / name) not in written[name]:
            return f"{name}, which was changed since llm-pruner wrote it"
    return None


def _not_ours_before(folder: Path, names: list[str]) -> str | None:
    """Return the same of a folder without a manifest, as earlier versions wrote it."""
    report = json_object(folder / "report.json")
    ours = {"format_version", "source"} <= report.keys()
    recipe = json_object(folder / "config.json").get("quantization_config")
    ours |= isinstance(recipe, dict) and recipe.get("quant_method") == "llm_pruner"
    tasks = (folder / "offline_data.py").is_file()
    pattern = _BEFORE if ours else _TASKS_BEFORE if tasks else None
    for name in names:
        if pattern is None or not pattern.fullmatch(name) or (folder / name).is_symlink():
            return f"{name}, which llm-pruner did not write"
    card, digest = folder / "README.md", report.get("card_digest")
    if digest and card.is_file() and hashlib.sha256(card.read_bytes()).hexdigest() != digest:
        return "README.md, which was changed since llm-pruner wrote it"
    return None


def _check_replaceable(out: Path, place: Path, reads: Iterable[Source]) -> None:
    if place == Path.home():
        raise UserError(f"{out} is your home folder, which is not replaced; name another folder")
    for source, read in _places(reads):
        what = "is" if read == place else None
        if place in read.parents:
            what = f"holds {source}, which is"
        elif read in place.parents:
            what = f"lies in {source}, which is"
        if what is not None and read.exists():
            raise UserError(
                f"{out} {what} read by this command, so it is not replaced; give another --out"
            )
    holds = not_ours(place)
    if holds is not None:
        raise UserError(
            f"{out} holds {holds}, so it is not replaced; move that away or give another --out"
        )


def _places(reads: Iterable[Source]) -> Iterator[tuple[Source, Path]]:
    """Yield what was named and the path that it may mean."""
    for source in reads:
        if source not in _WORDS:
            yield source, expanded(str(source)).resolve()


def _is_written_into(file: Path) -> bool:
    """Whether a path names a device, a pipe, or a file that a process has open."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            return True
    except (OSError, ValueError):  # no such file, or no name of one
        return False
    top, *names = file.absolute().parts[1:3]
    return top == "proc" or (top == "dev" and names[0] in ("fd", "stdout", "stderr"))


def _holds(file: Path, kind: Kind) -> bool:
    """Whether a file that is there holds what is to be written, or nothing."""
    if file.stat().st_size == 0:
        return True
    if kind == "page":
        with file.open("rb") as stream:
            return stream.read(9).lower() == b"<!doctype"
    if kind == "plan":
        return {"groups", "package_version"} <= json_object(file).keys()
    try:
        found = read_json(file)
    except (OSError, ValueError):
        return False
    if isinstance(found, list):  # of questions with their answers, of which there may be none
        turns = (isinstance(one, dict) and {"question", "answers"} <= {*one} for one in found)
        return all(turns)
    return isinstance(found, dict) and bool(found)


def _names(folder: Path) -> list[str]:
    """Return the files and links under a folder, as paths from it, but what a kill left half."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    names = (path.relative_to(folder).as_posix() for path in found)
    return [name for name in names if not _HALF.fullmatch(name)]


def _manifest(folder: Path) -> dict[str, list[str]] | None:
    """Return the digests that each file may have; None if there is no manifest."""
    files = json_object(folder / MANIFEST).get("files")
    return files if isinstance(files, dict) else None


def _write_manifest(folder: Path, files: Mapping[str, list[str]]) -> None:
    _write(folder / MANIFEST, json.dumps({"files": dict(files)}, indent=1) + "\n")


def _write(file: Path, text: str) -> None:
    with new_file(file) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def _digest_of(content: BinaryIO) -> str:
    """Return the SHA-256 of what a file holds; of a large one, of its size and 256 pieces of it."""
    size = content.seek(0, os.SEEK_END)
    if size <= _WHOLE:
        content.seek(0)
        return hashlib.sha256(content.read()).hexdigest()
    pieces = _WHOLE // _BLOCK
    digest = hashlib.sha256(f"{size}".encode())
    for number in range(pieces):
        content.seek(number * (size - _BLOCK) // (pieces - 1))
        digest.update(content.read(_BLOCK))
    return digest.hexdigest()


def _digest(file: Path) -> str:
    if not file.is_file():
        return ""
    with file.open("rb") as stream:
        return _digest_of(stream)


_BESIDE = 32
"""Bytes that names of what is made beside an output are longer (``.NAME.partial-abcdefgh``)."""

_INSIDE = 128
"""Bytes of the longest path inside a checkpoint or a run."""

_SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def check_place(path: Path, option: str) -> None:
    """Raise UserError unless a file or folder can be made at ``path``; whether it may is not asked.

    A link stands for what it leads to. Folders that are missing would be made, so the nearest one
    that is there is tried: permissions say nothing of a file system that is mounted for reading.
    """
    if "\0" in str(path):
        raise UserError(f"{option} {path.name!a} has a zero byte; give another name")
    path = Path(os.path.realpath(path))  # a loop of links is for others to refuse
    there, reason = nearest(path.parent), ""
    if there.is_dir():
        for part in path.relative_to(there).parts:
            longest = _limit(there, "PC_NAME_MAX", 255) - (_BESIDE if part == path.name else 0)
            _check_length(part, longest, option)
        _check_length(str(path), _limit(there, "PC_PATH_MAX", 4096) - _BESIDE - _INSIDE, option)
        try:
            tempfile.TemporaryDirectory(prefix=".llm-pruner-", dir=there).cleanup()
        except OSError as error:
            reason = f" ({error.strerror})"
        else:
            return
    raise UserError(
        f"{path} cannot be made, since {there} is not a folder that may be written{reason}; "
        f"give another {option}"
    )


def nearest(path: Path) -> Path:
    """Return the path, or the nearest of its parents that is there."""
    path = Path(path).absolute()
    while not os.path.exists(path):  # unlike Path.exists, says no of a name that is too long
        path = path.parent
    return path


def free_bytes(path: Path) -> int:
    """Return how much can be written where ``path`` is or will be."""
    return shutil.disk_usage(nearest(path)).free


def check_shard_size(size: str) -> None:
    """Raise UserError unless ``size`` is one such as ``5GB`` that a weight file can have."""
    require_kind("max_shard_size", size, str, "a size such as 5GB")
    if bytes_of(size) < 1:
        raise UserError(
            f"--max-shard-size {size[:40]!r} is no size of a file; use a number above 0 with KB, "
            "MB, GB or TB, such as 5GB"
        )


def bytes_of(size: str) -> int:
    """Return the bytes of a size such as ``5GB``, a thousand to the step; 0 if it is none."""
    number, unit = size.strip()[:-2], size.strip()[-2:].upper()
    try:
        return int(float(number) * _SIZES[unit])
    except (KeyError, ValueError, OverflowError):
        return 0


def _check_length(name: str, longest: int, option: str) -> None:
    length = len(os.fsencode(name))
    if length > longest:
        raise UserError(
            f"{option} {name[:20]}... has {length} bytes, and the file system takes {longest}; "
            "give a shorter one"
        )


def _limit(folder: Path, name: str, default: int) -> int:
    """Return a limit of the file system; ``default`` where the system does not say."""
    try:
        return os.pathconf(folder, name)
    except (AttributeError, OSError, ValueError):  # not on Windows
        return default


@contextmanager
def atomic_directory(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder beside ``out`` that takes its place when the block ends well.

    If the block raises, the new folder is removed, with those of its parents that had to be made,
    and ``out`` is as it was. With ``overwrite`` the old folder is replaced only at the end. Raises
    UserError as ``check_output``.
    """
    check_output(Path(out), overwrite)
    with new_folder(Path(out).resolve()) as folder:
        yield folder
        check_output(Path(out), overwrite)  # it may have come into being during the work
        (folder / MANIFEST).unlink(missing_ok=True)
        _write_manifest(folder, {name: [_digest(folder / name)] for name in sorted(_names(folder))})
