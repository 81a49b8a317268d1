"""How a run is shown.

- lines.py: what the workers write, line by line; the answer and the figures
- panes.py: the same on a terminal (screen.py: whose it is): the history, and below it a pane for each worker
- trace.py: a run as one page (trace.html): what each worker saw, and what each token attended to
"""
