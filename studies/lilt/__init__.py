"""The five claims of LilT (Khan & Fu, ICLR 2023) as reproducible studies, one command each.

``python -m studies.lilt CLAIM --photos FOLDER [--emoji FOLDER]`` in the root of the repository. A study is a list of
cells (a row of its table and a seed); each is trained, evaluated, and recorded as one line of ``results/CLAIM.jsonl``,
from which the table and the figure are made. A recorded cell is not run again.
"""
