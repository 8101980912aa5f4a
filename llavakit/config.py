"""Configuration machinery: model configs that check each assignment, and frozen run configs built strictly from mappings.

Owns: setting(), the checks, ModelConfig, build_run_config. Refuses: torch; knowing any particular model.
Invariants: a declared field always holds a checked value; unknown keys of a model config survive a round trip;
unknown keys of a run config are errors; structural fields are fixed once a model was built from them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Self, TypeVar

from llavakit.errors import ConfigError

__all__ = [
    "Check",
    "ModelConfig",
    "boolean",
    "build_run_config",
    "choice",
    "integer",
    "number",
    "optional",
    "override_run_config",
    "run_config_to_dict",
    "setting",
    "text",
]

Check = Callable[[str, object], Any]
"""check(field name, value) -> value to store; raises ConfigError."""
T = TypeVar("T")


def integer(low: int | None = None, high: int | None = None) -> Check:
    """Accept an int (not a bool) from low to high."""

    def check(name: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{name} must be an integer, got {value!r}")
        if (low is not None and value < low) or (high is not None and value > high):
            raise ConfigError(f"{name} must be {_range(low, high)}, got {value}")
        return value

    return check


def number(low: float | None = None, high: float | None = None) -> Check:
    """Accept a finite int or float from low to high; stored as float."""

    def check(name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{name} must be a number, got {value!r}")
        try:
            converted = float(value)
        except OverflowError:
            converted = math.inf
        if not math.isfinite(converted) or (low is not None and converted < low) or (high is not None and converted > high):
            raise ConfigError(f"{name} must be finite and {_range(low, high)}, got {value}")
        return converted

    return check


def boolean() -> Check:
    """Accept True or False."""

    def check(name: str, value: object) -> bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be true or false, got {value!r}")
        return value

    return check


def text() -> Check:
    """Accept a string."""

    def check(name: str, value: object) -> str:
        if not isinstance(value, str):
            raise ConfigError(f"{name} must be a string, got {value!r}")
        return value

    return check


def choice(*allowed: object) -> Check:
    """Accept one of the listed values."""

    def check(name: str, value: object) -> object:
        if value not in allowed:
            raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        return value

    return check


def optional(inner: Check) -> Check:
    """Accept None or whatever inner accepts."""
    return lambda name, value: None if value is None else inner(name, value)


def _range(low: float | None, high: float | None) -> str:
    if low is None:
        return "a number" if high is None else f"at most {high}"
    return f"at least {low}" if high is None else f"from {low} to {high}"


def setting(default: Any, check: Check, *, structural: bool = False) -> Any:
    """Declare a field of a ModelConfig; structural ones decide shapes and cannot change once a model is built."""
    metadata = {"check": check, "structural": structural}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(kw_only=True, eq=False, init=False)
class ModelConfig:
    """A mutable model configuration in the style of config.json.

    Declared fields are checked when set; any other name is kept as it came and written back by to_dict. Subclasses are dataclasses
    with init=False: the constructor takes every spelling that their normalize() knows, and names that are not declared.
    """

    model_type: ClassVar[str] = ""

    def __init__(self, **values: Any) -> None:
        """Set all fields; a null counts as absent where the field cannot hold one. Raises: ConfigError for a wrong value."""
        given = self.normalize(values)
        given.pop("model_type", None)
        object.__setattr__(self, "_hidden", {})
        for field in dataclasses.fields(self):
            is_given = field.name in given
            value = given.pop(field.name, None)
            if not is_given or (value is None and not _takes_none(field)):
                value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            setattr(self, field.name, value)
        for name, value in given.items():
            if name.isidentifier() and not hasattr(type(self), name):
                setattr(self, name, value)
            else:
                self._hidden[name] = value  # no attribute can have this name, but files may

    @classmethod
    def normalize(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Turn other spellings of the fields into the declared ones; subclasses override. Raises: ConfigError."""
        return dict(values)

    def __setattr__(self, name: str, value: object) -> None:
        field = self.__dataclass_fields__.get(name)
        if field is not None and "check" in field.metadata:
            if field.metadata["structural"] and self.is_built and value != getattr(self, name):
                raise ConfigError(f"{name} decides the shapes of a model that is already built; change the config before building it")
            value = field.metadata["check"](name, value)
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        # Only reached for names that are not set; declared so that type checkers accept the kept unknown keys.
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    @property
    def is_built(self) -> bool:
        """Whether a model was built from this config."""
        return "_is_built" in self.__dict__

    def mark_built(self) -> None:
        """Fix the structural fields; called by the model's constructor after validate()."""
        object.__setattr__(self, "_is_built", True)

    def restructure(self, **values: object) -> None:
        """Change structural fields of a built model; only for code that changes the shapes with them (resizing the vocabulary)."""
        self.__dict__.pop("_is_built", None)
        for name, value in values.items():
            setattr(self, name, value)
        self.mark_built()

    def validate(self) -> None:
        """Check what involves several fields; subclasses override. Raises: ConfigError."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from the mapping of a config.json, and check it as a whole. Raises: ConfigError."""
        config = cls(**values)
        config.validate()
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds: model_type, declared fields, then the unknown keys that were kept."""
        values: dict[str, Any] = {"model_type": self.model_type} if self.model_type else {}
        for name, value in self.__dict__.items():
            if name not in _OWN_NAMES:
                values[name] = value.to_dict() if isinstance(value, ModelConfig) else value
        return {**values, **self._hidden}

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and isinstance(other, ModelConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # mutable

    def to_json(self) -> str:
        """Return config.json's text."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"


_OWN_NAMES = ("_is_built", "_hidden")


def _takes_none(field: dataclasses.Field[Any]) -> bool:
    """Whether None is a value of a field, and not just its absence."""
    try:
        field.metadata["check"](field.name, None)
    except ConfigError:
        return False
    return True


def build_run_config(cls: type[T], values: Mapping[str, Any], *, where: str = "") -> T:
    """Build a frozen run config (a dataclass, possibly nested) from a mapping; unknown keys and wrong types are errors.

    Lists become tuples where the field is a tuple; ints are accepted for floats. Raises: ConfigError with the dotted path.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or cls.__name__} must be a table, got {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError(f"{where or cls.__name__} has no field {unknown[0]!r}; it has {', '.join(fields)}")
    arguments = {name: _convert(hints[name], value, f"{where}.{name}" if where else name) for name, value in values.items()}
    missing = [name for name, field in fields.items() if name not in arguments and _is_required(field)]
    if missing:
        raise ConfigError(f"{where or cls.__name__} needs {', '.join(missing)}")
    return cls(**arguments)


def run_config_to_dict(config: Any) -> dict[str, Any]:
    """Return a run config as plain JSON values; build_run_config reads it back."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def override_run_config(config: T, assignments: Iterable[str]) -> T:
    """Change fields of a run config, each named by its path: "optim.lr=1e-4". Values are JSON; what is no JSON is text.

    Raises: ConfigError for a field that is not there, or a value that does not fit.
    """
    values = run_config_to_dict(config)
    for assignment in assignments:
        path, sign, text = assignment.partition("=")
        if not sign:
            raise ConfigError(f"a setting is NAME=VALUE, like optim.lr=1e-4, got {assignment!r}")
        *parents, name = path.strip().split(".")
        table = values
        for parent in parents:
            inner = table.get(parent)
            if not isinstance(inner, dict):
                raise ConfigError(f"there is no setting {path!r}: {parent!r} holds no settings")
            table = inner
        table[name] = _json_or_text(text.strip())
    return build_run_config(type(config), values)


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return run_config_to_dict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else build_run_config(hint, value, where=where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        inner = [argument for argument in arguments if argument is not type(None)]
        return _convert(inner[0], value, where) if len(inner) == 1 else value
    if origin is typing.Literal:
        return choice(*arguments)(where, value)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    checks: dict[Any, Check] = {int: integer(), float: number(), bool: boolean(), str: text()}
    return checks[hint](where, value) if hint in checks else value
