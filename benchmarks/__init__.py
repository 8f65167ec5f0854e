"""How fast clasp is and how much memory it takes, against what one would use instead; see README.md here."""
