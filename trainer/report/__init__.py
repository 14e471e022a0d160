"""What a run has come to: report.json, report.md, report.html and the model card."""
