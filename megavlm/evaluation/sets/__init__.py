"""Published sets from local files, judged with a trained model: questions, yes/no, captions, objects, features.

Every kind of set is a reader (file to `Item`s), a scorer (answers or drawings to figures), and the one driver of `judge` between them.
"""
