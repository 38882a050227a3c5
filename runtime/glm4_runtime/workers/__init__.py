"""Processes that run untrusted input, chat templates and grammars, with limits.

pool.py       this process's side: hands each task to a worker
worker.py     one worker process: start, task, end
child.py      the worker's side: reads tasks, sets the limits
templates.py  the worker that renders chat templates
grammars.py   the worker that tries grammars
"""
