"""Statistics, plots and pages for reports."""
