"""Processes that run the input of strangers, chat templates and grammars, under limits.

pool.py       this process's side: hands each task to a worker
worker.py     one worker process: started, asked, ended
child.py      the worker's own side: reads tasks, holds each to its limits
templates.py  the worker that renders chat templates
grammars.py   the worker that tries grammars
"""
