"""The configuration machinery: checks on assignment, kept unknown keys, structural fields, strict run configs."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import pytest

from llavakit.config import (
    Check,
    ModelConfig,
    boolean,
    build_run_config,
    choice,
    integer,
    number,
    optional,
    run_config_to_dict,
    setting,
    text,
)
from llavakit.errors import ConfigError


@dataclass(kw_only=True, eq=False, init=False)
class Shape(ModelConfig):
    """A config of two fields."""

    model_type: ClassVar[str] = "shape"
    width: int = setting(4, integer(1, 9), structural=True)
    """Structural."""
    rate: float = setting(0.5, number(0.0, 1.0))
    """Free."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    """Nested table."""

    names: tuple[str, ...] = ()
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run config with every kind of field."""

    steps: int
    rate: float = 1.0
    limit: float | None = None
    is_on: bool = False
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("check", "good", "bad", "told"),
    [
        (integer(1, 9), 9, 10, "x must be from 1 to 9, got 10"),
        (integer(1), 1, 0, "x must be at least 1, got 0"),
        (integer(high=3), -5, 4, "x must be at most 3, got 4"),
        (integer(), 3, True, "x must be an integer, got True"),
        (integer(), 3, 3.0, "x must be an integer, got 3.0"),
        (number(0.0), 2, -1, "x must be finite and at least 0.0, got -1"),
        (number(), 0.5, float("nan"), "x must be finite"),
        (number(), 0.5, "1", "x must be a number, got '1'"),
        (boolean(), False, 0, "x must be true or false, got 0"),
        (text(), "", None, "x must be a string, got None"),
        (choice("a", "b"), "b", "c", "x must be one of 'a', 'b', got 'c'"),
        (optional(integer(0)), None, -1, "x must be at least 0, got -1"),
    ],
)
def test_checks_accept_and_refuse(check: Check, good: object, bad: object, told: str) -> None:
    assert check("x", good) == good
    with pytest.raises(ConfigError) as caught:
        check("x", bad)
    assert told in str(caught.value)


def test_numbers_are_stored_as_floats() -> None:
    assert isinstance(number()("x", 1), float)
    with pytest.raises(ConfigError, match="x must be finite"):
        number()("x", 10**400)


def test_each_assignment_is_checked_and_a_refused_one_changes_nothing() -> None:
    config = Shape()
    config.rate = 1
    with pytest.raises(ConfigError, match="rate"):
        config.rate = 2.0
    assert config.rate == 1.0


def test_structural_fields_are_fixed_once_built() -> None:
    config = Shape()
    config.width = 5
    config.mark_built()
    config.width = 5
    config.rate = 0.1
    with pytest.raises(ConfigError, match="already built"):
        config.width = 6
    config.restructure(width=7)
    assert config.width == 7
    assert config.is_built


def test_unknown_keys_survive_a_round_trip_and_are_attributes() -> None:
    values = {"model_type": "shape", "width": 3, "rate": 0.25, "mystery": {"a": [1, None]}}
    config = Shape.from_dict(values)
    assert config.mystery == {"a": [1, None]}
    assert config.to_dict() == values
    assert Shape.from_dict(config.to_dict()) == config
    config.added = 1
    assert config.to_dict()["added"] == 1


def test_a_missing_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Shape has no field 'nothing'"):
        _ = Shape().nothing


@pytest.mark.parametrize("key", ["from_dict", "to_dict", "not a name", "is_built"])
def test_keys_that_can_be_no_attributes_survive_and_hide_nothing(key: str) -> None:
    config = Shape.from_dict({key: 1})
    assert config.to_dict()[key] == 1
    assert not config.is_built
    assert Shape.from_dict(config.to_dict()) == config


def test_equality_is_of_values_not_of_having_been_built() -> None:
    built = Shape()
    built.mark_built()
    assert built == Shape()
    assert built != Shape(width=5)
    assert built != object()


def test_run_configs_are_built_from_tables_and_back() -> None:
    config = build_run_config(Run, {"steps": 3, "rate": 2, "inner": {"names": ["x"], "kind": "b"}})
    assert config == Run(steps=3, rate=2.0, inner=Inner(names=("x",), kind="b"))
    assert build_run_config(Run, run_config_to_dict(config)) == config


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, "Run needs steps"),
        ({"steps": 1, "speed": 2}, "Run has no field 'speed'; it has steps"),
        ({"steps": 1.5}, "steps must be an integer"),
        ({"steps": "1"}, "steps must be an integer"),
        ({"steps": 1, "is_on": 1}, "is_on must be true or false"),
        ({"steps": 1, "limit": "no"}, "limit must be a number"),
        ({"steps": 1, "inner": {"kind": "c"}}, "inner.kind must be one of 'a', 'b'"),
        ({"steps": 1, "inner": {"names": [1]}}, r"inner.names\[0\] must be a string"),
        ({"steps": 1, "inner": {"x": 1}}, "inner has no field 'x'"),
        ({"steps": 1, "inner": 3}, "inner must be a table"),
    ],
)
def test_run_configs_refuse_with_the_path(values: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        build_run_config(Run, values)
