"""What makes the course, and no learner imports: notebook to module, execution, the book, coursework, tables.

`python -m tfkit.authoring` lists the commands; the Makefile calls them. A file of this package imports the others in
one direction only: files <- notebooks <- coursework, tables, book; `__main__` knows them all.
"""
