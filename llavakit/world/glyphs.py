"""A bitmap font of 36 glyphs, 5 x 7 cells each, drawn for this project.

Owns: the cells of digits and capital letters. A row is five characters, '#' for ink.
"""

from __future__ import annotations

import functools

__all__ = ["GLYPH_COLS", "GLYPH_ROWS", "glyph_cells"]

GLYPH_COLS, GLYPH_ROWS = 5, 7

# Seven rows per glyph, each a five-bit number written in base 32 (0-9, then a-v), top row first.
_ROWS = {
    "0": "ehjlphe", "1": "4c4444e", "2": "eh1248v", "3": "v2421he", "4": "26aiv22", "5": "vgu11he",
    "6": "68guhhe", "7": "v124888", "8": "ehhehhe", "9": "ehhf12c", "A": "ehhvhhh", "B": "uhhuhhu",
    "C": "ehggghe", "D": "sihhhis", "E": "vgguggv", "F": "vgguggg", "G": "ehgnhhf", "H": "hhhvhhh",
    "I": "e44444e", "J": "72222ic", "K": "hikokih", "L": "ggggggv", "M": "hrllhhh", "N": "hhpljhh",
    "O": "ehhhhhe", "P": "uhhuggg", "Q": "ehhhlid", "R": "uhhukih", "S": "fgge11u", "T": "v444444",
    "U": "hhhhhhe", "V": "hhhhha4", "W": "hhhllla", "X": "hha4ahh", "Y": "hhha444", "Z": "v1248gv",
}  # fmt: skip


@functools.cache
def glyph_cells(character: str) -> tuple[tuple[int, int], ...]:
    """Return the inked (column, row) cells of one digit or capital letter."""
    cells = []
    for row, code in enumerate(_ROWS[character]):
        bits = int(code, 32)
        cells += [(col, row) for col in range(GLYPH_COLS) if bits >> (GLYPH_COLS - 1 - col) & 1]
    return tuple(cells)
