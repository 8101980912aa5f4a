"""Makes the embedded miniature from seeds: stages, teacher, accuracy table. The only package that composes its L6 siblings."""
