"""The miniature world: coloured shapes, digits, letters and words on varied backgrounds, with captions, boxes and questions."""
