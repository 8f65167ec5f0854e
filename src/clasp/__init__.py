"""Public names of clasp, one by one; nothing inside the package imports from here."""
