"""What is kept: feedback that users give, and an audit line without personal data for each exchange."""
