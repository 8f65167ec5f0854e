"""Results drawn for people: reads rows of results, never models."""
