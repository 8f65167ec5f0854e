"""What moved and what stayed: pure measures of states and weights; and what goes on inside our nets."""
