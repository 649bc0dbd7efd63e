"""Prompt files: `.txt`, `.csv`, `.jsonl` and `.yaml`, read line by line, so that one bad line costs one row.

A reader yields entries: the line where one begins, and the fields it gives, or the `BadRequest` that it is.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from idgen.batch.matrix import expand
from idgen.batch.storage import filesystem, is_url
from idgen.errors import BadRequest

LONGEST = 1 << 20
"""Characters of one row. More is no prompt, and would be held in memory at once."""

Entry = tuple[int, "dict[str, Any] | BadRequest"]
_FLAG = re.compile(r"(?:^|\s)--(?=[A-Za-z])")
_BLANK = " \t,;\r\n"
"""What a blank line of a CSV file is made of: spreadsheets write the delimiters of an empty row."""
_SECTION = re.compile(r"([A-Za-z_]+)\s*:(?:\s|$)")


@dataclass(frozen=True)
class Row:
    """One row of a prompt file, after matrices were spelt out."""

    number: int
    """from 1; a bad row has one too"""
    line: int
    """from 1, where it begins in the file; for rows given from code the same as `number`"""
    fields: dict[str, Any]
    problem: BadRequest | None = None


def read_rows(source: str | Path | Iterable[Any], defaults: dict[str, Any], matrix: dict[str, Any]) -> Iterator[Row]:
    """The rows of a prompt file (a path or a URL), or of mappings given from code.

    defaults: fields of rows that do not give them. matrix: axes for rows that give no such field themselves.
    Raises `BadRequest` when the file cannot be read at all; a row that is wrong by itself has a `problem` instead.
    """
    entries = _entries(source) if isinstance(source, str | Path) else _from_code(source)
    number = 0
    from_file: dict[str, Any] = {}
    for line, entry in entries:
        if isinstance(entry, dict) and set(entry) == {"defaults"}:
            from_file = entry["defaults"] or {}
            if not isinstance(from_file, dict):
                entry = BadRequest("defaults: give fields, such as 'steps: 30'.", "defaults")
            else:
                continue
        try:
            if isinstance(entry, BadRequest):
                raise entry
            for fields in expand(entry, {**defaults, **from_file}, matrix):
                number += 1
                yield Row(number, line, fields)
        except BadRequest as error:
            number += 1
            yield Row(number, line, {}, error)


def folder_of(source: str | Path | Iterable[Any]) -> str:
    """What relative paths in a prompt file are relative to."""
    if not isinstance(source, str | Path):
        return "."
    return str(source).rsplit("/", 1)[0] if is_url(source) else str(Path(source).absolute().parent)


def _from_code(source: Iterable[Any]) -> Iterator[Entry]:
    for line, fields in enumerate(source, 1):
        yield line, dict(fields) if isinstance(fields, dict) else _not_a_row(fields)


def _entries(source: str | Path) -> Iterator[Entry]:
    suffix = Path(str(source)).suffix.lower()
    if suffix not in READERS:
        raise BadRequest(f"{source}: a prompt file ends in {', '.join(READERS)}.", "file")
    try:
        # Wrong bytes are kept as surrogates and found in the row that has them; the others are read on.
        with _open(source) as raw, io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="") as lines:
            for line, entry in READERS[suffix](lines):
                yield line, entry if isinstance(entry, BadRequest) or not _undecodable(entry) else _NOT_UTF8
    except FileNotFoundError:
        raise BadRequest(f"{source}: there is no such file.", "file") from None
    except OSError as error:
        raise BadRequest(f"{source} cannot be read: {error.strerror or error}.", "file") from None


def _open(source: str | Path) -> IO[bytes]:
    if is_url(source):
        fs, path = filesystem(str(source))
        return fs.open(path, "rb")
    return Path(source).open("rb")


_NOT_UTF8 = BadRequest("this line is not UTF-8 text. Save the file with the encoding UTF-8.", "file")


def _undecodable(entry: Any) -> bool:
    return bool(re.search("[\ud800-\udfff]", json.dumps(entry, ensure_ascii=False, default=str)))


def _not_a_row(value: Any) -> dict[str, Any] | BadRequest:
    if isinstance(value, str):
        return {"prompt": value}
    return BadRequest(f"a row has fields, such as 'prompt: a painting'; this is {str(value)[:60]!r}.", "row")


def _txt(lines: Iterable[str]) -> Iterator[Entry]:
    """One prompt a line; flags at its end give other fields."""
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if text and not text.startswith("#"):
            yield number, _flags(text)


def _flags(text: str) -> dict[str, Any] | BadRequest:
    found = _FLAG.search(text)
    prompt = text[: found.start()].strip() if found else text
    fields: dict[str, Any] = {"prompt": prompt} if prompt else {}
    if not found:
        return fields
    lexer = shlex.shlex(text[found.start() :], posix=True)
    lexer.whitespace_split, lexer.commenters, lexer.escape = True, "", ""  # a backslash belongs to a Windows path
    try:
        words = list(lexer)
    except ValueError as error:
        return BadRequest(f"{text[found.start() :].strip()!r} cannot be read ({error}). Close the quotes.", "prompt")
    given: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            if name in given or name in fields:
                return BadRequest(f"this line gives --{name} twice. Take one of them out.", name)
            given[name] = [value] if equals else []
        else:  # words up to the next flag belong together: --negative blurry, dark
            given[name].append(word)
    for name, parts in given.items():
        if not parts:
            return BadRequest(f"--{name} has no value. Write it behind the flag; '' stands for an empty text.", name)
    return fields | {name: " ".join(parts).strip() for name, parts in given.items()}


def _csv(lines: io.TextIOWrapper) -> Iterator[Entry]:
    """The first line that is not blank names the fields; an empty cell is a field not given."""
    named = ((number, text) for number, text in enumerate(lines, 1) if text.strip(_BLANK))
    first, header = next(named, (0, ""))
    if not header:
        return
    delimiter = max(",;\t", key=header.count)
    names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter))]
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        line = first + reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, BadRequest(f"this line cannot be read as CSV ({error}). Close the quotes.", "file")
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) > len(names):
            said = f"this line has {len(cells)} cells, the header names {len(names)}. Put quotes around commas."
            yield line, BadRequest(said, "file")
            continue
        yield line, {name: cell for name, cell in zip(names, cells) if cell.strip()}


def _jsonl(lines: Iterable[str]) -> Iterator[Entry]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            if len(line) > LONGEST:
                raise ValueError(f"longer than {LONGEST} characters")
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, BadRequest(f"this line is not JSON ({error}). One row a line, such as {_SAMPLE}", "file")
            continue
        yield number, value if isinstance(value, dict) else _not_a_row(value)


_SAMPLE = '{"photo": "ada.png", "prompt": "a painting"}'


def _yaml(lines: Iterable[str]) -> Iterator[Entry]:
    """A list of rows, or the sections `defaults`, `matrix` and `rows`. Each row is parsed by itself."""
    rows_named = False
    for start, chunk in _yaml_chunks(lines):
        value = _parse_yaml(start, chunk)
        if isinstance(value, BadRequest):
            yield start, value
        elif isinstance(value, list):
            for each in value:
                yield start, each if isinstance(each, dict) else _not_a_row(each)
        elif isinstance(value, dict) and set(value) == {"rows"}:
            rows_named = True
            for each in value["rows"] or []:
                yield start, each if isinstance(each, dict) else _not_a_row(each)
        elif isinstance(value, dict) and set(value) in ({"matrix"}, {"defaults"}):
            if rows_named and "defaults" in value:
                yield start, BadRequest("put 'defaults' before 'rows', which it is for.", "defaults")
            else:
                yield start, value
        elif value is not None:
            said = f"{str(value)[:60]!r}: a prompt file is a list of rows, or has the sections defaults, matrix, rows."
            yield start, BadRequest(said, "file")


def _yaml_chunks(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Cut YAML where a row or a section begins, so that a broken one harms no other and none is long in memory."""
    start, chunk, indent = 1, list[str](), 0
    for number, line in enumerate(lines, 1):
        bare = line.strip()
        depth = len(line) - len(line.lstrip(" "))
        if depth == 0 and (not bare or bare.startswith(("#", "---", "%"))) and not chunk:
            continue
        item = bare == "-" or bare.startswith("- ")
        if depth == 0 and bare == "rows:":
            if chunk:
                yield start, "".join(chunk)
            yield number, "rows: []"
            chunk, indent = [], -1
            continue
        if indent == -1 and item:
            indent = depth
        top = depth == 0 and bool(bare) and not bare.startswith("#") and (item or not _closes(bare))
        if (item and depth == indent) or (top and not (item and indent > 0)):
            if chunk:
                yield start, "".join(chunk)
            start, chunk = number, []
            if top and not item:
                indent = 0 if not _SECTION.match(bare) else indent if indent == -1 else -2
            elif depth == 0:
                indent = 0
        chunk.append(line)
    if chunk:
        yield start, "".join(chunk)


def _closes(bare: str) -> bool:
    return bare[0] in "]})\"'"


def _parse_yaml(start: int, text: str) -> Any:
    import yaml

    if len(text) > LONGEST:
        return BadRequest(f"this row is longer than {LONGEST} characters.", "file")
    try:
        return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {start + mark.line}" if mark is not None else ""
        said = getattr(error, "problem", None) or str(error)
        return BadRequest(f"this row is not YAML{where} ({said}). Check quotes and indentation.", "file")


READERS: dict[str, Callable[[Any], Iterator[Entry]]] = {
    ".txt": _txt,
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".yaml": _yaml,
    ".yml": _yaml,
}
