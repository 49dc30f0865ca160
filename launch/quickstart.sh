#!/usr/bin/env bash
# From a fresh clone to ranked items, a registered model and a report: about 3,000 synthetic items and 6,000 users.
#
#   bash launch/quickstart.sh
#
# Needs Python >= 3.11, pip and git; no compiler, no GPU. Everything it makes lies in .venv and quickstart/.
# Run it again and what is finished is reused, what was cut off goes on.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

install_qbrec
cd "$ROOT"
CONFIG=launch/quickstart.yaml

if [[ ! -f quickstart/data/complete ]]; then
    echo "== a synthetic catalogue"
    qbrec synth quickstart/data --items 3000 --users 6000
    touch quickstart/data/complete
fi

echo "== qbrec run --config $CONFIG"
qbrec run --config "$CONFIG"

echo
echo "== five semantic IDs:  qbrec ids show --config $CONFIG --count 5"
qbrec ids show --config "$CONFIG" --count 5

# The first user's last three items, as somebody would read them from a log.
history="$(python - <<'PY'
import pyarrow.parquet as pq

rows = pq.read_table("quickstart/data/interactions.parquet", filters=[("user_id", "=", "u000000000")])
print(" ".join(f"--history {item}" for item in rows.sort_by("timestamp")["item_id"].to_pylist()[-3:]))
PY
)"
echo
echo "== what to show next:  qbrec recommend --config $CONFIG $history --k 5"
# shellcheck disable=SC2086  # the options are meant to be split
qbrec recommend --config "$CONFIG" $history --k 5

echo
echo "report:   $ROOT/quickstart/storage/runs/quickstart/report.html"
echo "MLflow:   sqlite:///$ROOT/quickstart/storage/mlflow.db"
echo "          look at it: $VENV/bin/mlflow ui --backend-store-uri sqlite:///$ROOT/quickstart/storage/mlflow.db"
