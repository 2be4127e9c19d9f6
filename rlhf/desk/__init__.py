"""The desk: where people rank. Tasks and who works on them, what was said, how far people agree. No web in it.

`Desk` (rlhf/desk/desk.py) is the whole of it to the outside; `open_desk` opens that of a run.
"""
