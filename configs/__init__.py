"""Run configs: each file is one page that `launch/run.py --config=` takes."""
