"""The report of an evaluation: tables, figures, JSON and an HTML page."""
