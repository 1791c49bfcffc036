"""Texts and questions that can be installed: packages fetched and checked, split by whole works, kept in one cache.

What lives here: packages and their checksums (`package`), what a source is and its folder in the cache (`source`), one
module a source, their list (`registry`), and how much of a test text is in training texts (`overlap`). The files that a
source gives are plain text, or JSON lines of questions; tasks read them by path.

May import: `files`, `versions`, `errors`.

One more: a module with a `SOURCE`, and its name in `registry.SOURCES`.
"""
