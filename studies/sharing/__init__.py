"""Weight sharing between two modalities, from scratch and on a pre-trained trunk: ``python -m studies.sharing``."""
