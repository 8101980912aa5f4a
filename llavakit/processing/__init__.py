"""From conversations and pictures to ids and tiles, and from ids back to text."""
