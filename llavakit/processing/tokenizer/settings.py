"""The JSON files beside a tokenizer's model: who holds which role, which tokens were added, flags.

Owns: reading and writing tokenizer_config.json, special_tokens_map.json and added_tokens.json.
Deviation from transformers 4.37: tokens that only added_tokens.json lists are special, as LLaVA's are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from llavakit.errors import CheckpointError
from llavakit.processing.tokenizer.added_tokens import entry_of_token, special_token, token_of_entry
from llavakit.processing.tokenizer.batch import Side
from llavakit.processing.tokenizer.texts import UNLIMITED, TextTokenizer
from llavakit.processing.tokenizer.vocabulary import ROLES
from llavakit.storage.documents import json_bytes, read_optional_json

__all__ = ["Settings", "assign_roles", "read_settings", "settings_files"]

_EXTRA_KEYS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a folder's JSON files say about its tokenizer."""

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

    def flag(self, name: str, *, default: bool) -> bool:
        """Return a flag of the config. Raises: CheckpointError when it is neither true nor false."""
        value = self.config.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.source}/tokenizer_config.json states {name}={value!r}; expected true or false")
        return value

    def side(self, name: str, *, default: Side) -> Side:
        """Return a side of the config. Raises: CheckpointError when it is neither left nor right."""
        value = self.config.get(name)
        if value is None:
            return default
        if value not in ("left", "right"):
            raise CheckpointError(f"{self.source}/tokenizer_config.json states {name}={value!r}; expected left or right")
        side: Side = value
        return side

    @property
    def model_max_length(self) -> int:
        """The longest input that the model knows."""
        limit = self.config.get("model_max_length")
        return int(limit) if isinstance(limit, int | float) and not isinstance(limit, bool) else UNLIMITED


def read_settings(folder: Path) -> Settings:
    """Read the JSON files of a folder. Raises: CheckpointError."""
    config, roles_map = (read_optional_json(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json"))
    roles: dict[str, AddedToken | None] = {}
    for role in ROLES:
        written = [table[role] for table in (config, roles_map) if role in table]
        if written:
            roles[role] = next((token for token in map(token_of_entry, written) if token is not None), None)
    extras = [table.get(key) for table in (config, roles_map) for key in _EXTRA_KEYS]
    entries: Any = next((entry for entry in extras if entry), [])
    listed = list(entries.values()) if isinstance(entries, Mapping) else list(entries)
    additional = tuple(token for token in map(token_of_entry, listed) if token is not None)
    return Settings(str(folder), config, roles, additional, _read_added(folder, config))


def _read_added(folder: Path, config: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Read added_tokens.json and added_tokens_decoder, which must agree."""
    decoder, table = config.get("added_tokens_decoder", {}), read_optional_json(folder / "added_tokens.json")
    try:
        entries: list[tuple[int, AddedToken | None]] = [(int(index), special_token(token)) for token, index in table.items()]
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
    """Give the roles of the files. A pad token that does not exist is added; Raises: CheckpointError for other missing tokens."""
    for role, token in settings.roles.items():
        if token is None:
            continue
        if role != "pad_token" and tokenizer.find_token(token.content) is None:
            raise CheckpointError(
                f"{settings.source} makes {token.content!r} the {role}, which is not in the vocabulary of {len(tokenizer)}"
            )
        if tokenizer.added_tokens_encoder.get(token.content) is None:
            tokenizer.add_special_tokens({role: special_token(token.content)})
        else:
            tokenizer.assign_role(role, token.content)
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
