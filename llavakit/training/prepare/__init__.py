"""Training rows from sets as they are published."""
