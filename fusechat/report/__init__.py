"""Results: tables, intervals, figures and one page."""
