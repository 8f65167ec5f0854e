"""Weight sharing between the two towers."""
