"""Files: tensors by offset, atomic folders, durable journals, hub access."""
