. /tmp/w/venv/bin/activate
cd /tmp/w/study
while pgrep -f go3.sh >/dev/null; do sleep 2; done
python scripts/small_batch.py --only length
