"""SAEs of other libraries, in and out: files are the interface, and none of those libraries is imported.

One file a format, each with `FILES`, by which a folder is known, `read` (-> one of our SAEs, computing the same codes
and reconstructions) and, where something of ours can be said in it exactly, `write`. What a format says and we cannot
is refused, as are tensors that nobody asked for.
"""
