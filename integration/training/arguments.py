"""Values of a dataclass of arguments as its annotations say, where a file gave text.

PyYAML takes `5e-6` for a string: YAML 1.1 asks for a point.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from typing import Any

_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def refuse_label_smoothing(arguments: Any) -> None:
    """ValueError for `TrainingArguments.label_smoothing_factor`, which nothing here would look at."""
    if arguments.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={arguments.label_smoothing_factor}: the loss is one of pairs, which it does not "
            "smooth: leave it 0"
        )


def numbers_from_text(arguments: Any) -> None:
    """Turn strings in fields of int or float into numbers; ValueError that names the field where they are none.

    In a dict (`lr_scheduler_kwargs`), whose values have no annotations, what has an exponent is a number.
    """
    hints = typing.get_type_hints(type(arguments))
    for field in dataclasses.fields(arguments):
        value = getattr(arguments, field.name, None)
        if isinstance(value, dict):
            setattr(arguments, field.name, _numbers_inside(value))
        if not isinstance(value, str):
            continue
        kinds = _kinds(hints.get(field.name))
        if str in kinds or not {int, float} & kinds:
            continue
        number = _number(value, float in kinds)
        if number is None:
            wanted = "a number" if float in kinds else "an int"
            raise ValueError(f"{field.name}={value!r}: it must be {wanted}")
        setattr(arguments, field.name, number)


def _numbers_inside(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers_inside(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_numbers_inside(part) for part in value]
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _kinds(hint: Any) -> set[Any]:
    """The members of a union, or the hint itself."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return set(typing.get_args(hint))
    return {hint}


def _number(text: str, fraction: bool) -> int | float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    if fraction:
        return number
    return int(number) if number.is_integer() else None
