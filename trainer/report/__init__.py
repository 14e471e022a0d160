"""report.json, report.md and report.html of a run."""
