"""What becomes of a report: a terminal's tables, Markdown, JUnit XML, one HTML page, comparisons, a history."""
