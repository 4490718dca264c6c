"""Text nobody prepared: what a fixed list of Debian documentation packages puts on a machine, judged on their own prose.

`listing` is the list with its checksums, `deb` reads a package, `prose` says which documents are prose, which of them are
judged and what comes too near to those, `building` makes a folder of it once, `reading` is the source `data.name=packages`.
"""
