"""What moved and what stayed: pure measures of states and weights."""
