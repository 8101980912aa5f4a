"""The public model classes: batch-shaped forward, generate, from_pretrained, save_pretrained."""
