"""Outputs of a report: terminal tables, Markdown, JUnit XML, an HTML page; comparisons of reports, and their history."""
