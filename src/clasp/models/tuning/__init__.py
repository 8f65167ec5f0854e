"""What trains in a tower: tuning specs and the methods that they name."""
