"""Whether a recipe can work, before it is paid for, and what this machine has: one file a subject.

`examine.py` is where to begin: it calls every check in order. A check looks at a `Case` and returns
`Finding`s; it never repairs, and never writes outside its own scratch folder.
"""
