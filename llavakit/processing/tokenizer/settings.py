"""The JSON files beside a tokenizer's model: who holds which role, which tokens were added, flags.

Owns: reading and writing tokenizer_config.json, special_tokens_map.json and added_tokens.json.
Deviation from transformers 4.37: tokens that only added_tokens.json lists are special, as LLaVA's are.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken

from llavakit.errors import CheckpointError, InputError
from llavakit.processing.tokenizer.added_tokens import entry_of_token, special_token, token_of_entry
from llavakit.processing.tokenizer.batch import Side
from llavakit.processing.tokenizer.texts import UNLIMITED, TextTokenizer
from llavakit.processing.tokenizer.vocabulary import ROLES
from llavakit.storage.documents import json_bytes, read_optional_json
from llavakit.storage.hub import HubArguments

__all__ = ["Settings", "TokenizerOptions", "assign_roles", "read_settings", "settings_files", "split_options"]

_EXTRA_KEYS = ("additional_special_tokens", "extra_special_tokens")


class TokenizerOptions(HubArguments, total=False):
    """The keywords of from_pretrained: the hub's, and what a caller may say instead of the files."""

    bos_token: str | AddedToken | None
    eos_token: str | AddedToken | None
    unk_token: str | AddedToken | None
    pad_token: str | AddedToken | None
    sep_token: str | AddedToken | None
    cls_token: str | AddedToken | None
    mask_token: str | AddedToken | None
    additional_special_tokens: Sequence[str | AddedToken]
    add_bos_token: bool
    add_eos_token: bool
    legacy: bool
    model_max_length: int
    padding_side: Side
    truncation_side: Side
    split_special_tokens: bool
    clean_up_tokenization_spaces: bool
    spaces_between_special_tokens: bool
    use_default_system_prompt: bool
    sp_model_kwargs: Mapping[str, Any]
    use_fast: bool
    """Taken and not heeded: the class is the choice."""


def split_options(owner: str, options: TokenizerOptions) -> tuple[HubArguments, dict[str, Any]]:
    """Split from_pretrained's keywords into the hub's and the tokenizer's. Raises: InputError for an unknown one."""
    known, of_hub = TokenizerOptions.__annotations__, HubArguments.__annotations__
    unknown = next((name for name in options if name not in known), None)
    if unknown is not None:
        raise InputError(f"{owner}.from_pretrained knows no {unknown!r}; it knows {', '.join(known)}")
    hub = {name: value for name, value in options.items() if name in of_hub}
    return cast(HubArguments, hub), {name: value for name, value in options.items() if name not in of_hub and name != "use_fast"}


@dataclass(frozen=True, slots=True)
class Settings:
    """What a folder's JSON files, and its caller, say about its tokenizer."""

    source: str
    """The folder, for errors."""
    config: Mapping[str, Any]
    """tokenizer_config.json as it is."""
    roles: Mapping[str, AddedToken | None]
    """Tokens by role; a role that is written as null is None, one that is not written is absent."""
    additional: tuple[AddedToken, ...] = ()
    """Special tokens without a role."""
    added: Mapping[int, AddedToken] = field(default_factory=dict)
    """Added tokens by id."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """What the caller says instead of the config."""

    def value(self, name: str) -> Any:
        """Return what the caller or else the config says, None where neither does."""
        return self.overrides[name] if name in self.overrides else self.config.get(name)

    def flag(self, name: str, *, default: bool) -> bool:
        """Return a flag. Raises: InputError, or CheckpointError where a file states it, when it is neither true nor false."""
        value = self.value(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._fault(name, "true or false")
        return value

    def side(self, name: str, *, default: Side) -> Side:
        """Return a side. Raises: InputError, or CheckpointError where a file states it, when it is neither left nor right."""
        value = self.value(name)
        if value is None:
            return default
        if value not in ("left", "right"):
            raise self._fault(name, "left or right")
        side: Side = value
        return side

    @property
    def model_max_length(self) -> int:
        """The longest input that the model knows."""
        limit = self.value("model_max_length")
        is_limit = isinstance(limit, int | float) and not isinstance(limit, bool) and 1 <= limit < UNLIMITED
        return int(limit) if is_limit else UNLIMITED

    def _fault(self, name: str, expected: str) -> CheckpointError | InputError:
        if name in self.overrides:
            return InputError(f"{name} must be {expected}, got {self.overrides[name]!r}")
        return CheckpointError(f"{self.source}/tokenizer_config.json states {name}={self.config[name]!r}; expected {expected}")


def read_settings(folder: Path, overrides: Mapping[str, Any] | None = None) -> Settings:
    """Read the JSON files of a folder; overrides come before what they say. Raises: CheckpointError.

    Where the config lists no added_tokens_decoder the files are older than transformers 4.34: special_tokens_map.json then comes
    before the config, as it does there.
    """
    overrides = overrides or {}
    config, roles_map = (read_optional_json(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json"))
    tables = (config, roles_map) if "added_tokens_decoder" in config else (roles_map, config)
    roles: dict[str, AddedToken | None] = {}
    for role in ROLES:
        written = [overrides[role]] if role in overrides else [table[role] for table in tables if role in table]
        if written:
            roles[role] = next((token for token in map(token_of_entry, written) if token is not None), None)
    extras = [table.get(key) for table in (overrides, *tables) for key in _EXTRA_KEYS]
    entries: Any = next((entry for entry in extras if entry), [])
    listed = list(entries.values()) if isinstance(entries, Mapping) else entries
    if not isinstance(listed, list | tuple):
        raise CheckpointError(f"{folder}: additional_special_tokens must be a list, got {listed!r}")
    additional = tuple(token for token in map(token_of_entry, listed) if token is not None)
    flagged = {token.content: token for token in (*roles.values(), *additional) if token is not None}
    return Settings(str(folder), config, roles, additional, _read_added(folder, config, flagged), overrides)


def _read_added(folder: Path, config: Mapping[str, Any], flagged: Mapping[str, AddedToken]) -> dict[int, AddedToken]:
    """Read added_tokens.json and added_tokens_decoder, which must agree; the former has no flags, but may have them elsewhere."""
    decoder, table = config.get("added_tokens_decoder", {}), read_optional_json(folder / "added_tokens.json")
    try:
        entries: list[tuple[int, AddedToken | None]] = [
            (operator.index(index), flagged.get(token) or special_token(token)) for token, index in table.items()
        ]
        entries += [(int(index), token_of_entry(entry, is_special=not isinstance(entry, Mapping))) for index, entry in decoder.items()]
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: the added tokens must be a table of tokens and ids") from error
    added: dict[int, AddedToken] = {}
    for index, token in entries:
        if token is None or index < 0 or (index in added and added[index].content != token.content):
            raise CheckpointError(f"{folder}: added token {token} with id {index}; expected one non-empty text for each id")
        added[index] = token
    return dict(sorted(added.items()))


def assign_roles(tokenizer: TextTokenizer, settings: Settings) -> None:
    """Give the roles of the files. A pad token that does not exist is added, and one that the caller names.

    Raises: CheckpointError for other missing tokens.
    """
    for role, token in settings.roles.items():
        if token is None:
            if role in settings.overrides:
                tokenizer.assign_role(role, None)
            continue
        if role != "pad_token" and role not in settings.overrides and tokenizer.find_token(token.content) is None:
            raise CheckpointError(
                f"{settings.source} makes {token.content!r} the {role}, which is not in the vocabulary of {len(tokenizer)}"
            )
        if tokenizer.find_token(token.content) in tokenizer.special_ids:
            tokenizer.assign_role(role, token.content)
        else:
            tokenizer.add_special_tokens({role: token})
    missing = [token for token in settings.additional if tokenizer.find_token(token.content) is None]
    tokenizer.add_special_tokens({"additional_special_tokens": missing})
    tokenizer.additional_special_tokens = [token.content for token in settings.additional]


def settings_files(tokenizer: TextTokenizer, config: Mapping[str, Any]) -> dict[str, bytes]:
    """Build the JSON files; config holds what is not the same for all tokenizers."""
    roles = tokenizer.special_tokens_map
    own = {
        "added_tokens_decoder": {str(index): entry_of_token(token) for index, token in tokenizer.added_tokens_decoder.items()},
        **{role: roles.get(role) for role in ("bos_token", "eos_token", "unk_token", "pad_token")},
        **roles,
        "clean_up_tokenization_spaces": tokenizer.clean_up_tokenization_spaces,
        "split_special_tokens": tokenizer.split_special_tokens,
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
        "model_max_length": tokenizer.model_max_length,
    }
    values = {key: value for key, value in config.items() if key not in own and key not in _EXTRA_KEYS} | own
    beyond = {token: index for token, index in tokenizer.added_tokens_encoder.items() if index >= tokenizer.vocab_size}
    return {
        "tokenizer_config.json": json_bytes(values),
        "special_tokens_map.json": json_bytes(roles),
        **({"added_tokens.json": json_bytes(beyond)} if beyond else {}),
    }
