cd /tmp/wF; PYTHONPATH=$PWD/src OMP_NUM_THREADS=1 exec .venv/bin/pytest -q -x "$@"
