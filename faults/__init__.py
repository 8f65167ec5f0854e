"""``make faults`` and ``make fuzz``: kills, full disks, flipped bits, hostile inputs, and the counts of what happened.

Input: a seed. Output: ``counts.json``, and the tables of ``docs/reliability.md``, which are written from it. Note:
everything runs on tiny towers and the drawings of ``tests/toydata.py``, in processes forked from one that has the
libraries imported, so that a trial takes a second.
"""
