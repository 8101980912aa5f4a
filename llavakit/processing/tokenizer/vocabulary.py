"""Names and ids: the vocabulary's entries, the special tokens by role, tokens added later.

Owns: Tokenizer, what the rest of the package needs of a tokenizer; Vocabulary, the half of the public tokenizers that knows no
text. Invariant: a role is held by a token that exists.
Deviations from transformers 4.37: a role or id that does not exist is an error, never unk or None in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, overload

import numpy as np
from tokenizers import AddedToken

from llavakit.errors import InputError
from llavakit.processing.tokenizer.added_tokens import AddedTokens, special_token
from llavakit.processing.tokenizer.batch import Batch, Padding, Side, TensorKind

__all__ = ["ROLES", "NeededRole", "NeededRoleId", "Role", "RoleId", "Tokenizer", "Vocabulary"]

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_ADDITIONAL = "additional_special_tokens"


class Tokenizer(Protocol):
    """What the processor, the chat templates and the engine need of a tokenizer."""

    padding_side: Side
    """Where short rows of a batch are filled."""

    @property
    def bos_token_id(self) -> int | None:
        """Id that opens a prompt, where the model has one."""

    @property
    def eos_token_id(self) -> int | None:
        """Id that ends an answer."""

    @property
    def pad_token_id(self) -> int | None:
        """Id that fills rows, where there is one."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that are no text."""

    @property
    def added_tokens(self) -> Mapping[str, int]:
        """Tokens beyond the model's own, with bos, eos and unk left out."""

    @property
    def replaces_each_byte(self) -> bool:
        """Whether each bad byte of an answer is U+FFFD, or each run of them."""

    def __len__(self) -> int:
        """Count all ids."""

    def find_token(self, token: str) -> int | None:
        """Look up a token's id; None where there is no such token."""

    def convert_ids_to_tokens(self, ids: int) -> str:
        """Look up the token of an id. Raises: InputError."""

    def encode_text(self, text: str) -> list[int]:
        """Encode plain text, in which no token is special. Raises: PromptError."""

    def decode_text(self, ids: Iterable[int]) -> str:
        """Turn an answer's ids into text."""

    def text_bytes(self, index: int, *, is_first: bool = False) -> bytes | None:
        """Return the bytes that an id adds to an answer; None for an id that is no text."""

    def files(self) -> dict[str, bytes]:
        """Build every file of the tokenizer by name."""

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: Padding = False,
        max_length: int | None = None,
        return_tensors: TensorKind | None = None,
    ) -> Batch:
        """Encode texts in which special tokens mean themselves."""


class Role:
    """The token of a role; assign one that exists, or None."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._role = name

    def __get__(self, holder: Vocabulary, owner: type | None = None) -> str | None:
        return holder.role(self._role)

    def __set__(self, holder: Vocabulary, token: str | AddedToken | None) -> None:
        holder.assign_role(self._role, None if token is None else str(token))


class RoleId:
    """The id of a role's token; assign one that exists, or None."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._role = name.removesuffix("_id")

    def __get__(self, holder: Vocabulary, owner: type | None = None) -> int | None:
        token = holder.role(self._role)
        return None if token is None else holder.find_token(token)

    def __set__(self, holder: Vocabulary, index: int | None) -> None:
        holder.assign_role(self._role, None if index is None else holder.convert_ids_to_tokens(index))


class NeededRole(Role):
    """The token of a role that every tokenizer of the class has."""

    def __get__(self, holder: Vocabulary, owner: type | None = None) -> str:
        token = holder.role(self._role)
        if token is None:
            raise InputError(f"the tokenizer has no {self._role}; assign one that exists")
        return token


class NeededRoleId(RoleId):
    """The id of a role that every tokenizer of the class has."""

    def __get__(self, holder: Vocabulary, owner: type | None = None) -> int:
        index = super().__get__(holder, owner)
        if index is None:
            raise InputError(f"the tokenizer has no {self._role}; assign one that exists")
        return index


class Vocabulary:
    """Tokens by name, id and role; a subclass says what its model holds."""

    bos_token, eos_token, unk_token, pad_token = Role(), Role(), Role(), Role()
    sep_token, cls_token, mask_token = Role(), Role(), Role()
    bos_token_id, eos_token_id, unk_token_id, pad_token_id = RoleId(), RoleId(), RoleId(), RoleId()
    sep_token_id, cls_token_id, mask_token_id = RoleId(), RoleId(), RoleId()

    def __init__(self) -> None:
        self._added = AddedTokens()
        self._roles: dict[str, str] = {}
        self._additional: list[str] = []

    # What a subclass provides

    @property
    def vocab_size(self) -> int:
        """Entries of the model, added tokens not counted."""
        raise NotImplementedError

    def _piece_id(self, token: str) -> int | None:
        """Look up an entry of the model."""
        raise NotImplementedError

    def _piece(self, index: int) -> str | None:
        """Look up the entry of the model that has an id."""
        raise NotImplementedError

    def _register(self, tokens: Sequence[AddedToken]) -> None:
        """Add tokens, each with its id in the model or else behind the last one; known ones take the new flags."""
        raise NotImplementedError

    # Entries

    def __len__(self) -> int:
        """Count the ids, added tokens included."""
        return max((self.vocab_size - 1, *self._added.tokens())) + 1

    def find_token(self, token: str) -> int | None:
        """Look up a token's id; None where there is no such token."""
        index = self._added.find(token)
        return self._piece_id(token) if index is None else index

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int: ...
    @overload
    def convert_tokens_to_ids(self, tokens: list[str] | tuple[str, ...]) -> list[int]: ...
    def convert_tokens_to_ids(self, tokens: str | list[str] | tuple[str, ...]) -> int | list[int]:
        """Look up ids; an unknown token is unk. Raises: InputError for one where the tokenizer has no unk."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        index = self.find_token(tokens)
        unknown = self.unk_token_id if index is None else index
        if unknown is None:
            raise InputError(f"{tokens!r} is not in the vocabulary, and the tokenizer has no unk token; add it with add_tokens")
        return unknown

    @overload
    def convert_ids_to_tokens(self, ids: int) -> str: ...
    @overload
    def convert_ids_to_tokens(self, ids: Iterable[int], skip_special_tokens: bool = False) -> list[str]: ...
    def convert_ids_to_tokens(self, ids: int | Iterable[int], skip_special_tokens: bool = False) -> str | list[str]:
        """Look up tokens. Raises: InputError for an id outside the vocabulary."""
        if isinstance(ids, np.integer):
            ids = int(ids)
        if not isinstance(ids, int):
            skipped = self.special_ids.union(self.all_special_ids) if skip_special_tokens else frozenset()
            return [self.convert_ids_to_tokens(int(index)) for index in ids if int(index) not in skipped]
        added = self._added.token(ids)
        piece = self._piece(ids) if added is None else str(added.content)
        if piece is None:
            raise InputError(f"id {ids} is outside the vocabulary of {len(self)} tokens")
        return piece

    def get_vocab(self) -> dict[str, int]:
        """Return all ids by token."""
        pieces = ((self._piece(index), index) for index in range(self.vocab_size))
        return {piece: index for piece, index in pieces if piece is not None} | self._added.ids()

    # Added tokens

    @property
    def added_tokens(self) -> dict[str, int]:
        """Ids of the tokens that text is cut at, by token; bos, eos and unk are left out."""
        common = {self.role(role) for role in ("bos_token", "eos_token", "unk_token")}
        return {token: index for token, index in self._added.ids().items() if token not in common}

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """Ids of the tokens that text is cut at, by token."""
        return self._added.ids()

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Tokens that text is cut at, with their flags, by id."""
        return self._added.tokens()

    def get_added_vocab(self) -> dict[str, int]:
        """Return added_tokens_encoder."""
        return self._added.ids()

    def add_tokens(self, tokens: str | AddedToken | Sequence[str | AddedToken], special_tokens: bool = False) -> int:
        """Append tokens after the last id, or mark existing ones as cut out of text; returns how many ids are new.

        Special ones that hold no role are additional_special_tokens from then on.
        """
        listed = [tokens] if isinstance(tokens, str | AddedToken) else list(tokens)
        named = {str(token): token for token in reversed(listed) if str(token)}
        new = [_marked(token, is_special=special_tokens) for token in reversed(named.values()) if self._is_news(token)]
        before = len(self)
        self._register(new)
        self._additional += [token.content for token in new if token.special and token.content not in self.all_special_tokens]
        return len(self) - before

    def _is_news(self, token: str | AddedToken) -> bool:
        known = self._added.find(str(token))
        return known is None or (isinstance(token, AddedToken) and self._added.token(known) != token)

    # Roles

    def role(self, name: str) -> str | None:
        """Return the token that holds a role."""
        return self._roles.get(name)

    def assign_role(self, name: str, token: str | None) -> None:
        """Give a role to a token that exists, or to none. Raises: InputError."""
        if token is None:
            self._roles.pop(name, None)
        elif self.find_token(token) is None:
            raise InputError(f'{token!r} is not in the vocabulary; add it with add_special_tokens({{"{name}": {token!r}}})')
        else:
            self._roles[name] = token

    def add_special_tokens(
        self,
        special_tokens_dict: Mapping[str, str | AddedToken | Sequence[str | AddedToken]],
        *,
        replace_additional_special_tokens: bool = True,
    ) -> int:
        """Add tokens by role, for example {"pad_token": "<pad>"}; returns how many ids are new.

        additional_special_tokens takes a list. Raises: InputError for an unknown role.
        """
        before = len(self)
        for role, value in special_tokens_dict.items():
            if role == _ADDITIONAL and not isinstance(value, str | AddedToken):
                listed = [special_token(token) if isinstance(token, str) else token for token in value]
                self._register(listed)
                kept = [] if replace_additional_special_tokens and listed else self._additional
                self._additional = list(dict.fromkeys((*kept, *(token.content for token in listed))))
            elif role in ROLES and isinstance(value, str | AddedToken):
                self._register([special_token(value) if isinstance(value, str) else value])
                self._roles[role] = str(value)
            else:
                raise InputError(f"cannot add {value!r} as {role!r}; the roles are {', '.join(ROLES)}, and {_ADDITIONAL} with a list")
        return len(self) - before

    @property
    def additional_special_tokens(self) -> list[str]:
        """Special tokens without a role; assign a list of tokens that exist."""
        return list(self._additional)

    @additional_special_tokens.setter
    def additional_special_tokens(self, tokens: Sequence[str]) -> None:
        """Choose the tokens; they must exist."""
        missing = [token for token in tokens if self.find_token(token) is None]
        if missing:
            raise InputError(f'{missing[0]!r} is not in the vocabulary; add it with add_special_tokens({{"{_ADDITIONAL}": [...]}})')
        self._additional = list(tokens)

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        """Ids of additional_special_tokens."""
        return self.convert_tokens_to_ids(self._additional)

    @property
    def special_tokens_map(self) -> dict[str, str | list[str]]:
        """Tokens by role, as special_tokens_map.json holds them."""
        named: dict[str, str | list[str]] = {role: self._roles[role] for role in ROLES if role in self._roles}
        return {**named, _ADDITIONAL: list(self._additional)} if self._additional else named

    @property
    def all_special_tokens(self) -> list[str]:
        """Tokens that hold a role, and additional_special_tokens."""
        return list(dict.fromkeys((*(self._roles[role] for role in ROLES if role in self._roles), *self._additional)))

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of all_special_tokens."""
        return self.convert_tokens_to_ids(self.all_special_tokens)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that are no text: bos, eos, unk and what else was added as special."""
        return self._added.special_ids()


def _marked(token: str | AddedToken, *, is_special: bool) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, normalized=not is_special, special=is_special)
    if is_special and not token.special:
        return AddedToken(
            token.content,
            single_word=token.single_word,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            normalized=token.normalized,
            special=True,
        )
    return token
