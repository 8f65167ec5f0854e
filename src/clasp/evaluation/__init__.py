"""What an encoder can do, with intervals."""
