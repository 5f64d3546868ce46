"""How options and files are read: one grammar for all of them. Pure but for reading files.

A value is what YAML 1.2's core schema makes of it: `1e-3` and `3` are numbers, `true` is a boolean, `'3'` is a text.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ByteSize, TypeAdapter, ValidationError

from fedtide.console.yaml12 import CoreLoader
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.flower.apps import flatten
from fedtide.fabric.plans.tracking import Tracking
from fedtide.fabric.strict import ConfigValues, Scalar
from fedtide.fabric.validation import checked

M = TypeVar("M", bound=BaseModel)

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
LONGEST_VALUE = 100_000
_SIZE = TypeAdapter(ByteSize)


def value(option: str, key: str, text: str) -> Any:
    """One value: a scalar, or a list or mapping in YAML's flow style.

    Raises:
        ConfigError: it is no YAML.
    """
    if len(text) > LONGEST_VALUE:
        raise ConfigError(f"{option} {key}", f"has more than {LONGEST_VALUE} characters")
    try:
        return yaml.load(text, Loader=CoreLoader)  # noqa: S506  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        what = exc.problem if isinstance(exc, yaml.MarkedYAMLError) and exc.problem else str(exc)
        raise ConfigError(f"{option} {key}", f"cannot be read: {what}", "Put a text into quotes") from exc


def scalar(option: str, key: str, text: str) -> Scalar:
    """One number, boolean or text.

    Raises:
        ConfigError: a list, a mapping or nothing.
    """
    found = value(option, key, text)
    if not isinstance(found, bool | int | float | str):
        remedy = f"Write {key}='...' for a text" if text else f"Write {key}=''  for an empty text"
        raise ConfigError(f"{option} {key}", "must be a number, true, false or a text", remedy)
    return found


def pairs(option: str, texts: Iterable[str]) -> list[tuple[str, str]]:
    """`key=value` texts; raises ConfigError for a malformed pair or a duplicate key."""
    found = [pair(option, text) for text in texts]
    twice = next((key for i, (key, _) in enumerate(found) if any(key == k for k, _ in found[:i])), None)
    if twice is not None:
        raise ConfigError(f"{option} {twice}", "stands there twice")
    return found


def pair(option: str, text: str) -> tuple[str, str]:
    """`key=value`; the value as it stands."""
    key, equals, rest = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(option, f"{text!r} is not key=value")
    return key.strip(), rest


def settings(texts: Iterable[str], declared: ConfigValues) -> ConfigValues:
    """`--set` of a run config, each `key=value` or a TOML file, whose values give way to pairs.

    Where the app declares a text, the value is a text, whatever it looks like.
    """
    given = list(texts)
    files = [text for text in given if "=" not in text and text.endswith(".toml")]
    found: ConfigValues = {}
    for file in files:
        found |= _of_file(Path(file))
    for key, text in pairs("--set", (text for text in given if text not in files)):
        found[key] = _text(key, text) if isinstance(declared.get(key), str) else scalar("--set", key, text)
    return found


def _of_file(file: Path) -> ConfigValues:
    """Raises ConfigError: no such file, or no table of run config values."""
    try:
        return flatten(tomllib.loads(read_text(file)), str(file))
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(str(file), f"is not TOML: {exc}") from exc


def _text(key: str, text: str) -> str:
    """Of a key that is declared as a text: without its quotes, if it has any, and else as it stands."""
    if not text.strip().startswith(("'", '"')):
        return text
    try:
        read = value("--set", key, text)
    except ConfigError:
        return text
    return read if isinstance(read, str) else text


def fields(option: str, text: str, kind: type[M]) -> M:
    """`a=1,b=x+y` as a `kind`: a list takes `+`.

    Raises:
        ConfigError: a field that does not exist, or a value that it does not take.
    """
    given = {}
    for key, part in pairs(option, (p for p in text.split(",") if p.strip())):
        known = kind.model_fields.get(key)
        is_list = known is not None and known.annotation == list[str]
        given[key] = _words(option, key, part) if is_list else scalar(option, key, part)
    return checked(kind, given, option)


def _words(option: str, key: str, text: str) -> list[str]:
    words = text.strip().split("+")
    if not all(word.strip() for word in words):
        raise ConfigError(f"{option} {key}", f"{text!r} has an empty place", f"For example {key}=a+b")
    return words


def tracking(texts: Iterable[str], declared: Tracking | None) -> Tracking | None:
    """`--track` options over what the app declares: `mlflow=URL`, `tensorboard`, `experiment=NAME`, or `none`.

    Raises:
        ConfigError: another word, or a value that is wrong.
    """
    words = [text if "=" in text else f"{text}=true" for text in texts]
    if words == ["none=true"]:
        return None
    before = declared.model_dump() if declared is not None else {}
    given = {key: text == "true" if key == "tensorboard" else text for key, text in pairs("--track", words)}
    return checked(Tracking, {**before, **given}, "--track")


def labels(option: str, text: str) -> dict[str, str]:
    """`a=b,c=d` as a selector."""
    found = pairs(option, (p for p in text.split(",") if p.strip()))
    return {key: wanted.strip() for key, wanted in found}


def seconds(option: str, text: str) -> float:
    """A duration such as 90s, 30m, 1h or 7d, in seconds."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd])", text)
    if found is None:
        raise ConfigError(option, f"{text!r} is no duration", "For example 90s, 30m, 1h, 7d")
    return float(found[1]) * _SECONDS[found[2]]


MAX_FILE_BYTES = 64 * 1024 * 1024
"""What a person writes, or a request holds, is smaller; a device file has no end."""


def size(option: str, text: str) -> int:
    """Bytes, from a text such as 500MB or 2GiB; raises ConfigError."""
    try:
        return int(_SIZE.validate_python(text))
    except ValidationError as exc:
        raise ConfigError(option, f"{text!r} is no size", "For example 500MB or 20GB") from exc


def read_text(file: Path) -> str:
    """A file as text; raises ConfigError if it cannot be read or is not UTF-8."""
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ConfigError(str(file), f"has more than {MAX_FILE_BYTES // 1024**2} MiB")
        return data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise ConfigError(str(file), f"is not UTF-8, at byte {exc.start}", "Save it as UTF-8") from exc
    except OSError as exc:
        raise ConfigError(str(file), f"cannot be read: {exc.strerror}") from exc
