"""What two modalities may share, trained from scratch and on a pre-trained trunk: ``python -m studies.sharing``."""
